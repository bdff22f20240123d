"""The grid's kernels for ARM: many compiled at once, run elsewhere, compared as everywhere.

`tests.kernels.run` calls ``built.library["main"]`` on arrays of this process. `Elsewhere` is such a
library: it sends the arrays to whatever runs the kernel and stores what comes back, inputs too, so
that a kernel which changes one is caught.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm

from tests import kernels, reference
from tests.grid import DEPTHWISE, DTYPES, EPILOGUE_BASES, EPILOGUES, FLOATS, MATMULS, SHAPES
from topi_int8.strategy import declines_nhwc
from topi_int8.target import isa_target
from topi_int8.workload import Conv2dWorkload

from .bare import KernelFault

Call = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


Works = Mapping[str, kernels.Workload]

# Weights that are never -128: two products of int8 then fit int16, which smlal needs.
NARROW = {"weight_range": (-127, 127)}
# Instruction sets whose strategies depend on that.
NARROW_ISAS = ("neon", "armv7_neon")


@dataclass(frozen=True)
class Case:
    """A workload and the layout that its kernel is asked for in; a matmul has none."""

    work: kernels.Workload
    layout: str = "NCHWc"


def packed(works: Works) -> dict[str, Case]:
    """Return the workloads on packed tensors."""
    return {name: Case(work) for name, work in works.items()}


def nhwc(works: Works) -> dict[str, Case]:
    """Return those of the convolutions that may stay in NHWC."""
    return {
        f"nhwc_{name}": Case(work, "NHWC")
        for name, work in works.items()
        if isinstance(work, Conv2dWorkload) and not declines_nhwc(work)
    }


def narrow(works: Works) -> dict[str, kernels.Workload]:
    """Return the int8 workloads, their weights proven not to be -128."""
    return {
        f"narrow_{name}": replace(work, **NARROW)
        for name, work in works.items()
        if work.weight_dtype == "int8" and not work.weight_zero_point and not work.is_float
    }


def _epilogues(base: str) -> dict[str, kernels.Workload]:
    work = EPILOGUE_BASES[base]
    return {f"{base}_{name}": work.with_epilogue(epi) for name, epi in EPILOGUES.items()}


# Table -> case. The packed ones are together the whole of tests/grid.py.
TABLES: dict[str, Mapping[str, Case]] = {
    "shapes": packed(SHAPES),
    "dtypes": packed(DTYPES),
    **{f"epilogues_{base}": packed(_epilogues(base)) for base in EPILOGUE_BASES},
    "matmuls": packed(MATMULS),
    # Strategies of every instruction set ask for narrow weights here.
    "depthwise": packed({**DEPTHWISE, **narrow(DEPTHWISE)}),
    "floats": packed(FLOATS) | nhwc(FLOATS),
    "nhwc_shapes": nhwc(SHAPES),
    "nhwc_rest": nhwc({**DTYPES, **_epilogues("conv"), **DEPTHWISE, **narrow(DEPTHWISE)}),
    "narrow_shapes": packed(narrow(SHAPES)),
    "narrow_rest": packed(narrow({**DTYPES, **_epilogues("conv"), **MATMULS})),
    "narrow_nhwc": nhwc(narrow({**SHAPES, **DTYPES})),
}

# What `make test` runs of them: each operator, kind of shape, pair of types and kind of epilogue.
_CONV = EPILOGUE_BASES["conv"]
_SIGNED = EPILOGUE_BASES["1x1"].with_epilogue(EPILOGUES["s8_residual_s8"])
_SAFE = narrow({"conv": _CONV.with_epilogue(EPILOGUES["u8"]), "ic17_oc33": SHAPES["ic17_oc33"],
                "matmul": MATMULS["u8"]})  # fmt: skip
SAMPLE: dict[str, Case] = {
    **packed({
        **{name: SHAPES[name] for name in ("prime_31", "image_7x7", "batch_3", "groups_16")},
        "groups_misaligned": SHAPES["groups_misaligned"],
        "one_pixel": SHAPES["one_pixel_3x3"],
        "stem": SHAPES["stem_3x3"].with_epilogue(EPILOGUES["u8_relu6"]),
        "everything": SHAPES["everything"].with_epilogue(EPILOGUES["float32"]),
        "residual": _CONV.with_epilogue(EPILOGUES["u8_residual_s8"]),
        "signed": replace(_SIGNED, data_dtype="int8"),
        **{
            name: DTYPES[name]
            for name in ("u8s8_zero_point_255", "s8s8_zero_point", "u8u8",
                         "s8u8_weight_zero_point", "u8u8_proven_int8")
        },
        **{
            name: MATMULS[name]
            for name in ("vector_odd", "k_7", "s8s8", "batch_odd_n", "residual")
        },
        **_SAFE,
        "depthwise": DEPTHWISE["c17"].with_epilogue(EPILOGUES["u8"]),
        "depthwise_types": DEPTHWISE["s8_weight_zero_point"],
        **narrow({name: DEPTHWISE[name] for name in ("c65", "stride_2", "kernel_5")}),
        "floats": FLOATS["conv"],
        "float_matmul": FLOATS["matmul"],
    }),
    **nhwc({
        "residual": _CONV.with_epilogue(EPILOGUES["s8_residual_u8"]),
        "u8u8": DTYPES["u8u8"],
        "one_pixel": SHAPES["one_pixel_3x3"],
        "stem": SHAPES["stem_3x3"],
        **_SAFE,
        "depthwise": DEPTHWISE["batch_3"].with_epilogue(EPILOGUES["u8"]),
        **narrow({"c128": DEPTHWISE["c128"], "stride_2": DEPTHWISE["stride_2"]}),
        "floats": FLOATS["conv"],
    }),
}  # fmt: skip


class Elsewhere:
    """A library whose function "main" runs in another machine."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getitem__(self, name: str) -> Callable[..., None]:
        assert name == "main", name
        return self._main

    def _main(self, *tensors: Any) -> None:
        results = self._call([tensor.numpy() for tensor in tensors])
        for tensor, result in zip(tensors, results, strict=True):
            tensor.copyfrom(result)


@dataclass(frozen=True)
class Batch:
    """Kernels compiled into one module, by the names of their cases; none has a library yet."""

    isa: str
    built: Mapping[str, kernels.Built]
    executable: tvm.runtime.Executable

    @property
    def symbols(self) -> list[str]:
        """Names of the functions, in the order of the cases."""
        return [symbol(name) for name in self.built]

    def check(self, run: Callable[[str, Sequence[np.ndarray]], list[np.ndarray]]) -> list[str]:
        """Run every case by ``run(function's name, arrays)``; return what is wrong with which.

        Twice each: on random operands, and on those at both ends of their ranges, where a narrow
        accumulator overflows.
        """
        wrong = []
        for name, built in self.built.items():
            here = replace(built, library=Elsewhere(functools.partial(run, symbol(name))))
            for extreme in (False, True):
                ops = reference.random_operands(built.work, seed=0, extreme=extreme)
                want = kernels.expected(built.work, ops)
                try:
                    kernels.compare(built.work, kernels.run(here, ops), want)
                except (AssertionError, KernelFault) as error:
                    what = f"{name} ({built.decision.strategy}{', extreme' if extreme else ''})"
                    wrong.append(f"{what}: {error}")
        return wrong

    def strategies(self) -> set[str]:
        """The strategies that the cases have got."""
        return {built.decision.strategy for built in self.built.values()}


def symbol(name: str) -> str:
    """The function's name of a case."""
    return f"kernel_{name}"


def compile_batch(cases: Mapping[str, Case], isa: str) -> Batch:
    """Compile the kernel that the strategy table chooses for each case, all in one module."""
    built, functions = {}, {}
    for name, case in cases.items():
        decision = kernels.decide(case.work, isa, case.layout)
        kernel = decision.kernel()
        built[name] = kernels.Built(case.work, decision, kernel, None)
        functions[symbol(name)] = kernel.func.with_attr("global_symbol", symbol(name))
    target = isa_target(isa)
    try:
        executable = tvm.compile(tvm.IRModule(functions), target=target)
    except Exception as error:
        error.add_note(f"{isa}: {_uncompilable(functions, target)} of {list(functions)}")
        raise
    return Batch(isa, built, executable)


def _uncompilable(functions: Mapping[str, Any], target: tvm.target.Target) -> list[str]:
    """Which of the functions do not compile alone."""
    wrong = []
    for name, function in functions.items():
        try:
            tvm.compile(tvm.IRModule({name: function}), target=target)
        except Exception:
            wrong.append(name)
    return wrong
