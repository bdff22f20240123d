"""benchdnn's shape lines, read and written: text -> frozen shape -> topi_int8 workload.

A convolution is ``ic64ih56oc64oh56kh3ph1n"res2a_branch2b*3"`` (keys in any order, ``_`` between
them ignored), a matmul ``128x768:768x3072n"ffn1*12"``. The rules are those of oneDNN's
tests/benchdnn/doc/knobs_desc.md: no ``w`` keys means square, dilation counts from 0, the output is
computed when it is not given, and the padding when only the output is. ``*count`` at the end of a
name says how often a network holds the layer.

Two deliberate differences: a line without ``mb`` means batch 1 (benchdnn: 2), because that is what
is measured here (our own files spell ``mb1`` out, so both programs read them alike); and a matmul
whose weight has batch dimensions is taken as one with a dynamic weight, as in attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import ClassVar

from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload

SHAPES_DIR = Path(__file__).parent / "shapes"

CONV_KEYS = tuple("g mb ic id ih iw oc od oh ow kd kh kw sd sh sw pd ph pw dd dh dw".split())
_TOKEN = re.compile(r"([a-z]+)(-?\d*)")
_COUNT = re.compile(r"(.*)\*([1-9]\d*)", re.DOTALL)


class ShapeLineError(ValueError):
    """A shape line that cannot be read. Names the line, the bad token and what is allowed."""

    def __init__(self, line: str, token: str, why: str, where: str = "") -> None:
        super().__init__(f"{where}{': ' if where else ''}shape line {line!r}: {token!r}: {why}")
        self.line, self.token, self.why = line, token, why

    def at(self, where: str) -> ShapeLineError:
        """Return the same error with the place it was found at."""
        return ShapeLineError(self.line, self.token, self.why, where)


def _check_name(name: str, count: int) -> None:
    if re.search(r'["\s]', name):
        raise ValueError(f"name is {name!r}; allowed: text without quotes and spaces")
    if count < 1:
        raise ValueError(f"count is {count!r}; allowed: an integer >= 1")


def _format_name(name: str, count: int) -> str:
    if count == 1 and not _COUNT.fullmatch(name):
        return f'n"{name}"' if name else ""
    return f'n"{name}*{count}"'


def _split_name(text: str) -> tuple[str, int]:
    """Return (name, count) of what follows the `n` of a line."""
    name = text.removeprefix('"').removesuffix('"')
    counted = _COUNT.fullmatch(name)
    return (counted.group(1), int(counted.group(2))) if counted else (name, 1)


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution: sizes, stride, leading padding, dilation from 0."""

    i: int = 1
    o: int = 1
    k: int = 1
    s: int = 1
    p: int = 0
    d: int = 0

    def __post_init__(self) -> None:
        for name, low in (("i", 1), ("o", 1), ("k", 1), ("s", 1), ("p", 0), ("d", 0)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= {low}")

    @property
    def extent(self) -> int:
        """Input points that one output point spans."""
        return (self.k - 1) * (self.d + 1) + 1

    @property
    def trailing_padding(self) -> int:
        """Padding behind the input; negative where the output leaves input points unread."""
        return (self.o - 1) * self.s - self.i + self.extent - self.p

    @property
    def pads(self) -> tuple[int, int]:
        """(leading, trailing) padding that gives exactly `o` outputs: symmetric where it can be.

        Raises
        ------
        ValueError
            When whole outputs would have to be cropped.
        """

        def outputs(trailing: int) -> int:
            return (self.i + self.p + trailing - self.extent) // self.s + 1

        for trailing in (self.p, max(self.trailing_padding, 0)):
            if outputs(trailing) == self.o:
                return self.p, trailing
        raise ValueError(f"o is {self.o!r}; allowed: {outputs(0)} or more (no cropped outputs)")


@dataclass(frozen=True)
class ConvShape:
    """A convolution's shape line.

    Attributes
    ----------
    ic, oc : int
        Channels of all groups together.
    d, h, w : Axis
        Spatial dimensions; `ndims` (1, 2 or 3) says how many the line has, the others are trivial.
    g, mb : int
        Groups and batch.
    name : str
    count : int
        How often the network holds this layer.
    """

    kind: ClassVar[str] = "conv"
    ic: int
    oc: int
    h: Axis
    w: Axis
    d: Axis = Axis()
    ndims: int = 2
    g: int = 1
    mb: int = 1
    name: str = ""
    count: int = 1

    def __post_init__(self) -> None:
        for field in ("ic", "oc", "g", "mb"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: an integer >= 1")
        if self.ic % self.g or self.oc % self.g:
            raise ValueError(
                f"g is {self.g!r}; allowed: a divisor of ic={self.ic} and oc={self.oc}"
            )
        if self.ndims not in (1, 2, 3):
            raise ValueError(f"ndims is {self.ndims!r}; allowed: 1, 2, 3")
        if (self.ndims < 3 and self.d != Axis()) or (self.ndims < 2 and self.h != Axis()):
            raise ValueError(f"ndims is {self.ndims!r}; allowed: one that covers every axis given")
        _check_name(self.name, self.count)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one such layer, padding's zeros counted as benchdnn does."""
        points = prod(axis.o * axis.k for axis in (self.d, self.h, self.w))
        return self.mb * self.oc * (self.ic // self.g) * points

    def format(self) -> str:
        """Return the canonical line: `parse_line(shape.format()) == shape`."""
        axes = {"w": self.w}
        if self.ndims > 1:
            # A line without w is a square one.
            axes = {"h": self.h} if self.ndims == 2 and self.h == self.w else {"h": self.h} | axes
        if self.ndims > 2:
            axes = {"d": self.d} | axes
        parts = [f"g{self.g}"] if self.g > 1 else []
        parts.append(f"mb{self.mb}")
        for key in ("i", "o"):
            sizes = (f"{key}{axis}{getattr(value, key)}" for axis, value in axes.items())
            parts.append(f"{key}c{getattr(self, key + 'c')}" + "".join(sizes))
        for key, default in (("k", None), ("s", 1), ("p", None), ("d", 0)):
            values = {axis: getattr(value, key) for axis, value in axes.items()}
            if set(values.values()) != {default}:
                parts.append("".join(f"{key}{axis}{value}" for axis, value in values.items()))
        return "".join(parts) + _format_name(self.name, self.count)

    def workload(self, data_dtype: str, weight_dtype: str, epilogue: Epilogue) -> Conv2dWorkload:
        """Return the workload of one such layer; ValueError for what Conv2dWorkload cannot say."""
        if self.d != Axis():
            raise ValueError(f"{self.format()}: id, od, kd...: allowed: 1- and 2-D convolutions")
        try:
            (top, bottom), (left, right) = self.h.pads, self.w.pads
        except ValueError as error:
            raise ValueError(f"{self.format()}: {error}") from None
        return Conv2dWorkload(
            n=self.mb, ic=self.ic, ih=self.h.i, iw=self.w.i, oc=self.oc, kh=self.h.k, kw=self.w.k,
            strides=(self.h.s, self.w.s), padding=(top, left, bottom, right),
            dilation=(self.h.d + 1, self.w.d + 1), groups=self.g,
            data_dtype=data_dtype, weight_dtype=weight_dtype,
            weight_range=None if weight_dtype == "float32" else (-127, 127), epilogue=epilogue,
        )  # fmt: skip


@dataclass(frozen=True)
class MatmulShape:
    """A matmul's shape line: ``src`` (d0, .., M, K) and ``weight`` (d0, .., K, N)."""

    kind: ClassVar[str] = "dense"
    src: tuple[int, ...]
    weight: tuple[int, ...]
    name: str = ""
    count: int = 1

    def __post_init__(self) -> None:
        if len(self.src) < 2 or len(self.src) != len(self.weight):
            raise ValueError(
                f"src, weight are {self.src}, {self.weight}; allowed: both of the same rank >= 2"
            )
        if min(*self.src, *self.weight) < 1:
            raise ValueError(f"src, weight are {self.src}, {self.weight}; allowed: integers >= 1")
        if self.src[-1] != self.weight[-2]:
            raise ValueError(f"K is {self.weight[-2]!r} in the weight; allowed: {self.src[-1]}")
        pairs = zip(self.src[:-2], self.weight[:-2], strict=True)
        if any(a != b and 1 not in (a, b) for a, b in pairs):
            raise ValueError(
                f"weight is {self.weight}; allowed: batch dimensions of {self.src}, or 1"
            )
        _check_name(self.name, self.count)

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the result."""
        batch = (max(a, b) for a, b in zip(self.src[:-2], self.weight[:-2], strict=True))
        return (*batch, self.src[-2], self.weight[-1])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one such layer."""
        return prod(self.out) * self.src[-1]

    def format(self) -> str:
        """Return the canonical line: `parse_line(shape.format()) == shape`."""
        dims = ("x".join(map(str, dims)) for dims in (self.src, self.weight))
        return ":".join(dims) + _format_name(self.name, self.count)

    def workload(self, data_dtype: str, weight_dtype: str, epilogue: Epilogue) -> MatmulWorkload:
        """Return the workload: a weight without batch is constant, one with batch dynamic."""
        batch, (m, k), n = prod(self.src[:-2]), self.src[-2:], self.weight[-1]
        weight_batch = prod(self.weight[:-2])
        if weight_batch > 1 and self.weight[:-2] != self.src[:-2]:
            raise ValueError(
                f"{self.format()}: allowed: weight batch dimensions equal to src's, or 1"
            )
        constant = weight_batch == 1
        # Rows of all batches share a constant weight: one flat matmul.
        m, batch = (m * batch, 1) if constant else (m, batch)
        return MatmulWorkload(
            m=m, n=n, k=k, batch=batch, data_dtype=data_dtype, weight_dtype=weight_dtype,
            weight_range=(-127, 127) if constant and weight_dtype != "float32" else None,
            weight_constant=constant, epilogue=epilogue,
        )  # fmt: skip


Shape = ConvShape | MatmulShape


def parse_line(line: str) -> Shape:
    """Return the shape of one benchdnn line (the kind is told by how it begins).

    Raises
    ------
    ShapeLineError
        Naming the line, the bad token and what is allowed.
    """
    text = line.strip()
    if not text:
        raise ShapeLineError(line, "", "allowed: a convolution or matmul descriptor")
    try:
        return _parse_matmul(text) if text[0].isdigit() else _parse_conv(text)
    except ShapeLineError:
        raise
    except ValueError as error:
        token = str(error).split(" ", 1)[0].rstrip(",:")
        raise ShapeLineError(line, token, str(error)) from None


def _parse_conv(text: str) -> ConvShape:
    values, name, count = _conv_tokens(text)
    for key in ("ic", "oc"):
        if not values.get(key):
            raise ShapeLineError(text, key, "is missing or 0; allowed: an integer >= 1")
    axes = {axis: _axis(text, axis, values) for axis in "dhw"}
    if axes["d"] and bool(axes["h"]) != bool(axes["w"]):
        raise ShapeLineError(text, "d", "a 3-D line needs both h and w keys, or neither")
    if not any(axes.values()):
        raise ShapeLineError(
            text, "ih", "no spatial dimension; allowed: id, ih or iw with a kernel"
        )
    ndims = 3 if axes["d"] else 2 if axes["h"] else 1
    # The one implicit rule: a larger dimension stands for the smaller ones that are not given.
    if axes["d"]:
        axes["h"] = axes["h"] or axes["d"]
    if axes["h"]:
        axes["w"] = axes["w"] or axes["h"]
    given = {axis: value or Axis() for axis, value in axes.items()}
    return ConvShape(
        ic=values["ic"], oc=values["oc"], **given, ndims=ndims,
        g=values.get("g", 1), mb=values.get("mb", 1), name=name, count=count,
    )  # fmt: skip


def _conv_tokens(text: str) -> tuple[dict[str, int], str, int]:
    """Return ({key: value}, name, count) of a convolution line."""
    values: dict[str, int] = {}
    at = 0
    while at < len(text):
        if text[at] == "_":
            at += 1
            continue
        if text[at] == "n":
            return values, *_split_name(text[at + 1 :])
        token = _TOKEN.match(text, at)
        if token is None or token.group(1) not in CONV_KEYS:
            bad = token.group(0) if token else text[at:]
            raise ShapeLineError(text, bad, f"unknown key; allowed: {', '.join(CONV_KEYS)}, n")
        key, number = token.groups()
        if number in ("", "-") or int(number) < 0:
            raise ShapeLineError(text, token.group(0), f"{key} needs an integer >= 0")
        values[key] = int(number)
        at = token.end()
    return values, "", 1


def _axis(text: str, axis: str, values: dict[str, int]) -> Axis | None:
    """Return one spatial dimension, what is not given deduced; None where the line has none."""
    given = {key: values[key + axis] for key in "iokspd" if key + axis in values}
    trivial = {"i": 0, "o": 0, "k": 0, "s": 1, "p": 0, "d": 0}
    if all(given[key] == trivial[key] for key in given):
        return None
    for key in ("i", "k"):
        if not given.get(key):
            raise ShapeLineError(text, key + axis, "is missing or 0; allowed: an integer >= 1")
    i, k, s, d = given["i"], given["k"], given.get("s", 1), given.get("d", 0)
    if s < 1:
        raise ShapeLineError(text, f"s{axis}{s}", "allowed: an integer >= 1")
    extent = (k - 1) * (d + 1) + 1
    o = given.get("o", 0)
    if o:
        p = given.get("p", max(((o - 1) * s - i + extent) // 2, 0))
    else:
        p = given.get("p", 0)
        o = (i - extent + 2 * p) // s + 1
    if o < 1:
        raise ShapeLineError(text, f"k{axis}{k}", f"does not fit the input i{axis}{i}")
    return Axis(i=i, o=o, k=k, s=s, p=p, d=d)


def _parse_matmul(text: str) -> MatmulShape:
    dims_text, marker, name_text = text.partition("n")
    name, count = _split_name(name_text) if marker else ("", 1)
    tensors = []
    for tensor in dims_text.rstrip("_").split(":"):
        if not re.fullmatch(r"\d+(x\d+)*", tensor):
            raise ShapeLineError(text, tensor, "allowed: integers joined by x, as 128x768:768x3072")
        tensors.append(tuple(int(dim) for dim in tensor.split("x")))
    if len(tensors) not in (2, 3):
        raise ShapeLineError(text, dims_text, "allowed: src:weight or src:weight:dst")
    shape = MatmulShape(tensors[0], tensors[1], name, count)
    if len(tensors) == 3 and tensors[2] != shape.out:
        given = "x".join(map(str, tensors[2]))
        raise ShapeLineError(text, given, f"allowed as dst: {'x'.join(map(str, shape.out))}")
    return shape


def find_batch(name: str | Path) -> Path:
    """Return the path of a shape file: as given, or a bare name looked up in bench/shapes.

    Raises
    ------
    FileNotFoundError
        Naming the shape files that exist.
    """
    for path in (Path(name), SHAPES_DIR / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in SHAPES_DIR.iterdir() if path.is_file()))
    raise FileNotFoundError(f"batch is {str(name)!r}; allowed: a file, or one of {known}")


def read_shapes(path: str | Path, mb: int = 0) -> list[Shape]:
    """Return the shapes of a batch file.

    As in benchdnn, words are separated by white space, a word that begins with ``#`` comments out
    its line, ``--mb=N,..`` overrides the batch of what follows, ``--batch=FILE`` (looked up
    beside the file) includes another and ``--reset`` forgets the options. Other options set data
    types and attributes, which are the caller's here; they are passed over.

    Parameters
    ----------
    mb : int
        Batch of every convolution; 0 keeps the lines' own.

    Raises
    ------
    ShapeLineError
        With ``file:line`` in front.
    """
    path, batches = Path(path), [0]
    shapes: list[Shape] = []
    for number, word in _words(path):
        where = f"{path}:{number}"
        if word.startswith("--"):
            option, _, value = word[2:].partition("=")
            if option == "batch":
                shapes += read_shapes(path.parent / value, mb)
            elif option == "mb":
                if not re.fullmatch(r"\d+(,\d+)*", value):
                    raise ShapeLineError(word, value, "mb needs integers >= 0, as 1,64", where)
                batches = [int(batch) for batch in value.split(",")]
            elif option == "reset":
                batches = [0]
            continue
        try:
            shape = parse_line(word)
        except ShapeLineError as error:
            raise error.at(where) from None
        if isinstance(shape, ConvShape):
            for batch in [mb] if mb else batches:
                shapes.append(replace(shape, mb=batch or shape.mb))
        else:
            shapes.append(shape)
    return shapes


def _words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, word) without comments; a trailing backslash joins words."""
    pending, joined = "", False
    number = at = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for word in line.split():
            if word.startswith("#"):
                break
            if not joined and word != "\\":
                if pending:
                    yield at, pending
                pending, at = "", number
            joined = word.endswith("\\")
            pending += word.removesuffix("\\")
    if joined:
        raise ShapeLineError(
            pending, pending, "the file ends inside a continued line", f"{path}:{number}"
        )
    if pending:
        yield at, pending
