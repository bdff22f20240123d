"""bench/make_shapes.py: the shape files are what it derives, and their MACs the published ones."""

import pytest

from bench.make_shapes import NETWORKS, texts
from bench.shape_lines import SHAPES_DIR, ConvShape, read_shapes
from topi_int8.workload import Epilogue

# GMACs of a 224x224 image (of a 128-token sequence for BERT), layers counted.
TOTALS = {
    "resnet18": (1.8136, 20),  # torchvision: 1.814 with its fc
    "resnet50_v1_5": (4.0871, 53),  # torchvision: 4.089 with its fc
    "mobilenet_v2": (0.2995, 52),  # torchvision: 0.301 with its fc
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
