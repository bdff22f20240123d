"""bench/make_shapes.py: the shape files are what it derives, and their MACs the published ones."""

from collections import Counter

import pytest

from bench.make_shapes import NETWORKS, texts
from bench.shape_lines import SHAPES_DIR, ConvShape, read_shapes
from topi_int8.workload import Epilogue

# GMACs of a 224x224 image (of a 128-token sequence for BERT), layers counted.
TOTALS = {
    "resnet18": (1.8136, 20),  # torchvision: 1.814 with its fc
    "resnet50_v1_5": (4.0871, 53),  # torchvision: 4.089 with its fc
    "mobilenet_v2": (0.2995, 52),  # torchvision: 0.301 with its fc
    "efficientnet_b0": (0.3844, 81),  # torchvision: 0.386 with its fc
    "regnet_x_400mf": (0.4138, 71),  # torchvision: 0.414 with its fc
    "vgg16": (15.3466, 13),  # torchvision: 15.47 with its classifier of 0.1236
    "densenet121": (2.8330, 120),  # torchvision: 2.834 with its fc
    "bert_base": (11.174, 12 * 8 + 1),
    "classifiers": (0.00384, 3),
}


def test_files_are_what_the_generator_writes():
    assert {path.name: path.read_text() for path in SHAPES_DIR.iterdir()} == texts()


@pytest.mark.parametrize("name", NETWORKS)
def test_totals(name):
    shapes = read_shapes(SHAPES_DIR / name)
    gmacs, layers = TOTALS[name]
    assert sum(s.macs * s.count for s in shapes) / 1e9 == pytest.approx(gmacs, rel=2e-3)
    assert sum(s.count for s in shapes) == layers
    assert len({s.format() for s in shapes}) == len(shapes)


def test_totals_count_what_the_workload_counts():
    for path in SHAPES_DIR.iterdir():
        for shape in read_shapes(path):
            work = shape.workload("uint8", "int8", Epilogue())
            assert work.macs == shape.macs
            if isinstance(shape, ConvShape):
                assert (work.oh, work.ow) == (shape.h.o, shape.w.o)


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("resnet18", "resnet18"), ("resnet50_v1_5", "resnet50"), ("mobilenet_v2", "mobilenet_v2"),
        ("efficientnet_b0", "efficientnet_b0"), ("regnet_x_400mf", "regnet_x_400mf"),
        ("vgg16", "vgg16"), ("densenet121", "densenet121"),
    ],
)  # fmt: skip
def test_layers_are_those_of_torchvision(name, network):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    from topi_int8.frontend.torchvision import import_torchvision

    seen: Counter = Counter()

    def count(conv, inputs, output):
        seen[
            conv.in_channels, inputs[0].shape[2], conv.out_channels, output.shape[2],
            conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups,
        ] += 1  # fmt: skip

    module = import_torchvision().models.get_model(network, weights=None).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(count)
    with torch.inference_mode():
        module(torch.zeros(1, 3, 224, 224))
    ours = Counter(
        (s.ic, s.h.i, s.oc, s.h.o, s.h.k, s.h.s, s.h.p, s.g) for s in NETWORKS[name]()
    )
    assert ours == seen
