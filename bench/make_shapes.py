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

# Layers of images of 1080 x 1920: the first ones of ResNet, VGG and MobileNetV2.
HD_1080P = """
# First layers on images of 1080 x 1920.
ic3ih1080iw1920oc64oh540ow960kh7kw7sh2sw2ph3pw3n"resnet.conv1"
ic64ih270iw480oc64kh1kw1n"resnet.1x1a"
ic64ih270iw480oc64kh3kw3ph1pw1n"resnet.3x3"
ic64ih270iw480oc256kh1kw1n"resnet.1x1b"
ic256ih270iw480oc128kh1kw1n"resnet.1x1c"
ic3ih1080iw1920oc64kh3kw3ph1pw1n"vgg.conv1"
ic64ih540iw960oc128kh3kw3ph1pw1n"vgg.conv3"
ic3ih1080iw1920oc32oh540ow960kh3kw3sh2sw2ph1pw1n"mobilenet.conv1"
g32ic32ih540iw960oc32kh3kw3ph1pw1n"mobilenet.dw"
g96ic96ih540iw960oc96oh270ow480kh3kw3sh2sw2ph1pw1n"mobilenet.dw_s2"
"""

ODD_CHANNELS = """
# Channels that fill no block up.
ic3ih112oc17oh56kh7sh2ph3n"stem.17"
ic17ih56oc17kh3ph1n"3x3.17"
ic33ih56oc33kh3ph1n"3x3.33"
ic100ih28oc100kh3ph1n"3x3.100"
ic200ih14oc200kh3ph1n"3x3.200"
ic65ih28oc130kh3ph1n"3x3.65-130"
ic17ih56oc33kh1n"1x1.17-33"
ic33ih56oc100kh1n"1x1.33-100"
ic100ih28oc300kh1n"1x1.100-300"
ic300ih28oc100kh1n"1x1.300-100"
ic1000ih7oc257kh1n"1x1.1000-257"
ic100ih28oc100kh5ph2n"5x5.100"
ic33ih56oc66oh28kh3sh2ph1n"3x3s2.33-66"
g17ic17ih56oc17kh3ph1n"dw.17"
g33ic33ih56oc33kh3ph1n"dw.33"
g100ic100ih28oc100oh14kh3sh2ph1n"dw.100s2"
"""

# What `bench cliffs` runs: everything that is no ResNet.
CLIFFS = """
# Shapes outside ResNet; each is held against its nearest neighbour of ResNet-50 or MobileNetV2.
--batch=efficientnet_b0
--batch=regnet_x_400mf
--batch=vgg16
--batch=densenet121
--batch=hd_1080p
--batch=odd_channels
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


def efficientnet_b0() -> Iterator[ConvShape]:
    """EfficientNet-B0: inverted residuals with depthwise 3x3 and 5x5, squeeze and excitation."""
    yield conv("features.0", 3, 224, 32, 3, 2)
    ic, size = 32, 112
    # Table 1 of Tan and Le 2019: expansion t, kernel k, stride s, channels c, repeats n.
    stages = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
    )  # fmt: skip
    for stage, (t, k, s, c, n) in enumerate(stages, 1):
        for repeat in range(n):
            stride, hidden, name = s if repeat == 0 else 1, ic * t, f"features.{stage}.{repeat}"
            if t > 1:
                yield conv(f"{name}.expand", ic, size, hidden, 1)
            yield conv(f"{name}.dw", hidden, size, hidden, k, stride, g=hidden)
            size //= stride
            yield conv(f"{name}.squeeze", hidden, 1, ic // 4, 1)
            yield conv(f"{name}.excite", ic // 4, 1, hidden, 1)
            yield conv(f"{name}.project", hidden, size, c, 1)
            ic = c
    yield conv("features.8", ic, size, 1280, 1)


def regnet_x_400mf() -> Iterator[ConvShape]:
    """RegNetX-400MF: bottlenecks of 1x1, 3x3 in groups of 16 channels, 1x1, all of one width."""
    yield conv("stem", 3, 224, 32, 3, 2)
    ic, size = 32, 112
    # Radosavovic et al. 2020, as torchvision rounds it: widths and depths of the four stages.
    for stage, (width, depth) in enumerate(((32, 1), (64, 2), (160, 7), (400, 12)), 1):
        for block in range(depth):
            s, name = 2 if block == 0 else 1, f"block{stage}-{block}"
            if block == 0:
                yield conv(f"{name}.proj", ic, size, width, 1, s)
            yield conv(f"{name}.a", ic, size, width, 1)
            yield conv(f"{name}.b", width, size, width, 3, s, g=width // 16)
            size //= s
            yield conv(f"{name}.c", width, size, width, 1)
            ic = width


def vgg16() -> Iterator[ConvShape]:
    """VGG-16: 3x3 alone, a pool behind each stage."""
    ic, size, index = 3, 224, 0
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            yield conv(f"features.{index}", ic, size, width, 3)
            ic, index = width, index + 2
        size, index = size // 2, index + 1


def densenet121() -> Iterator[ConvShape]:
    """DenseNet-121: 1x1 to 128 channels and 3x3 to 32 in each layer, 1x1 between the blocks."""
    growth, bottleneck = 32, 128
    yield conv("conv0", 3, 224, 64, 7, 2)
    channels, size = 64, 56
    for block, convs in enumerate((6, 12, 24, 16), 1):
        for layer in range(1, convs + 1):
            name = f"denseblock{block}.{layer}"
            yield conv(f"{name}.conv1", channels, size, bottleneck, 1)
            yield conv(f"{name}.conv2", bottleneck, size, growth, 3)
            channels += growth
        if block < 4:
            yield conv(f"transition{block}", channels, size, channels // 2, 1)
            channels, size = channels // 2, size // 2


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
    "efficientnet_b0": efficientnet_b0,
    "regnet_x_400mf": regnet_x_400mf,
    "vgg16": vgg16,
    "densenet121": densenet121,
    "bert_base": bert_base,
    "classifiers": classifiers,
}

# Files of lines that no network's definition gives.
LISTS = {
    "shapes_smoke": SMOKE,
    "hd_1080p": HD_1080P,
    "odd_channels": ODD_CHANNELS,
    "cliffs": CLIFFS,
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
    for name, text in LISTS.items():
        files[name] = "".join(
            f"{line if line.startswith(('#', '--')) else parse_line(line).format()}\n"
            for line in text.strip().splitlines()
        )
    return files


def main() -> None:
    """Write every file of bench/shapes."""
    SHAPES_DIR.mkdir(exist_ok=True)
    for name, text in texts().items():
        (SHAPES_DIR / name).write_text(text)


if __name__ == "__main__":
    main()
