"""Writes bench/shapes: the layers of well-known networks at 224x224, from their definitions.

`python -m bench.make_shapes` rewrites the files; a test keeps them equal to what this derives and
their MACs equal to the published totals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .shape_lines import SHAPES_DIR, Axis, ConvShape, MatmulShape, Shape, parse_line

SMOKE = """
# A few small layers, one of each sort: every path of the bench in seconds.
ic64ih14oc64oh14kh3ph1n"3x3*2"
ic64ih14oc128oh7kh3sh2ph1n"3x3s2"
ic64ih14oc128oh14kh1n"1x1"
ic3ih32oc16oh16kh3sh2ph1n"stem"
g32ic32ih14oc32oh14kh3ph1n"depthwise"
ic17ih9iw11oc19kh3kw1ph1pw0n"tails"
"""


def conv(name: str, ic: int, ih: int, oc: int, k: int, s: int = 1, g: int = 1) -> ConvShape:
    """Return a square convolution with "same" padding, k // 2 on every side."""
    p = k // 2
    axis = Axis(i=ih, o=(ih + 2 * p - k) // s + 1, k=k, s=s, p=p)
    return ConvShape(ic=ic, oc=oc, h=axis, w=axis, g=g, name=name)


def resnet18() -> Iterator[ConvShape]:
    """ResNet-18: two 3x3 a block, a 1x1 where the block changes the shape."""
    yield conv("conv1", 3, 224, 64, 7, 2)
    ic, size = 64, 56
    for stage, oc in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            s = 2 if stage > 1 and block == 0 else 1
            yield conv(f"layer{stage}.{block}.conv1", ic, size, oc, 3, s)
            if s == 2:
                yield conv(f"layer{stage}.{block}.downsample", ic, size, oc, 1, s)
            size //= s
            yield conv(f"layer{stage}.{block}.conv2", oc, size, oc, 3)
            ic = oc


def resnet50_v1_5() -> Iterator[ConvShape]:
    """ResNet-50 v1.5: bottlenecks whose 3x3 carries the stride; benchdnn's layer names."""
    yield conv("conv1", 3, 224, 64, 7, 2)
    ic, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for block in range(blocks):
            s = 2 if stage > 2 and block == 0 else 1
            name = f"res{stage}{'abcdef'[block]}_branch"
            if block == 0:
                yield conv(f"{name}1", ic, size, 4 * width, 1, s)
            yield conv(f"{name}2a", ic, size, width, 1)
            yield conv(f"{name}2b", width, size, width, 3, s)
            size //= s
            yield conv(f"{name}2c", width, size, 4 * width, 1)
            ic = 4 * width


def mobilenet_v2() -> Iterator[ConvShape]:
    """MobileNetV2 1.0: inverted residuals (expand 1x1, depthwise 3x3, project 1x1)."""
    yield conv("features.0", 3, 224, 32, 3, 2)
    ic, size, index = 32, 112, 0
    # Table 2 of Sandler et al. 2018: expansion t, channels c, repeats n, stride s.
    for t, c, n, s in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(n):
            index += 1
            stride, hidden = s if repeat == 0 else 1, ic * t
            if t > 1:
                yield conv(f"features.{index}.expand", ic, size, hidden, 1)
            yield conv(f"features.{index}.dw", hidden, size, hidden, 3, stride, g=hidden)
            size //= stride
            yield conv(f"features.{index}.project", hidden, size, c, 1)
            ic = c
    yield conv("features.18", ic, size, 1280, 1)


def bert_base(tokens: int = 128) -> Iterator[MatmulShape]:
    """BERT-base: 12 encoder layers of 12 heads, hidden 768, one sequence of 128 tokens."""
    hidden, heads, ffn = 768, 12, 3072
    head = hidden // heads
    for _ in range(12):
        for name in ("query", "key", "value"):
            yield MatmulShape((tokens, hidden), (hidden, hidden), name)
        yield MatmulShape((heads, tokens, head), (heads, head, tokens), "q_k")
        yield MatmulShape((heads, tokens, tokens), (heads, tokens, head), "attention_v")
        yield MatmulShape((tokens, hidden), (hidden, hidden), "attention_out")
        yield MatmulShape((tokens, hidden), (hidden, ffn), "ffn1")
        yield MatmulShape((tokens, ffn), (ffn, hidden), "ffn2")
    yield MatmulShape((1, hidden), (hidden, hidden), "pooler")


def classifiers() -> Iterator[MatmulShape]:
    """The last layers of the ImageNet networks here, batch 1."""
    for name, features in (("resnet18", 512), ("mobilenet_v2", 1280), ("resnet50", 2048)):
        yield MatmulShape((1, features), (features, 1000), f"{name}.fc")


NETWORKS: dict[str, Callable[[], Iterator[Shape]]] = {
    "resnet18": resnet18,
    "resnet50_v1_5": resnet50_v1_5,
    "mobilenet_v2": mobilenet_v2,
    "bert_base": bert_base,
    "classifiers": classifiers,
}


def merged(shapes: Iterator[Shape]) -> list[Shape]:
    """Return each different shape once, under its first name, with how often it occurred."""
    counted: dict[Shape, tuple[str, int]] = {}
    for shape in shapes:
        key = _renamed(shape, "", 1)
        name, count = counted.get(key, (shape.name, 0))
        counted[key] = (name, count + 1)
    return [_renamed(shape, name, count) for shape, (name, count) in counted.items()]


def _renamed(shape: Shape, name: str, count: int) -> Shape:
    return type(shape)(**{**shape.__dict__, "name": name, "count": count})


def texts() -> dict[str, str]:
    """Return {file name: contents} of bench/shapes."""
    files = {}
    for name, network in NETWORKS.items():
        shapes = merged(network())
        gmacs = sum(shape.macs * shape.count for shape in shapes) / 1e9
        title = (network.__doc__ or name).split("\n")[0]
        head = f"# {title}\n# {gmacs:.3f} GMACs. Written by bench/make_shapes.py.\n"
        files[name] = head + "".join(f"{shape.format()}\n" for shape in shapes)
    files["shapes_smoke"] = "".join(
        f"{line if line.startswith('#') else parse_line(line).format()}\n"
        for line in SMOKE.strip().splitlines()
    )
    return files


def main() -> None:
    """Write every file of bench/shapes."""
    SHAPES_DIR.mkdir(exist_ok=True)
    for name, text in texts().items():
        (SHAPES_DIR / name).write_text(text)


if __name__ == "__main__":
    main()
