"""The layers under pytest-benchmark: ``pytest bench [--batch resnet18] [--isa avx2]``.

The same kernels as `python -m bench`, without rivals, for pytest-benchmark's own comparison and
storage (--benchmark-autosave, --benchmark-compare). Not part of `make test`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import kernels, machine, targets, workloads
from bench.shape_lines import Shape, find_batch, read_shapes

DEFAULT_BATCHES = ("shapes_smoke", "classifiers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case a layer and type."""
    if "shape" not in metafunc.fixturenames:
        return
    batches = metafunc.config.getoption("--batch") or DEFAULT_BATCHES
    shapes = [shape for batch in batches for shape in read_shapes(find_batch(batch))]
    metafunc.parametrize("shape", shapes, ids=[shape.format() for shape in shapes])


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Pin the whole module to one core."""
    with machine.pinned(1):
        yield


@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_layer(benchmark, request: pytest.FixtureRequest, shape: Shape, dtype: str) -> None:
    """Time one kernel; GOP/s and the strategy go into the extra columns."""
    isa = request.config.getoption("--isa")
    try:
        target = targets.choose(isa)
    except targets.WrongMachineError as error:
        pytest.skip(str(error))
    kernel = kernels.build(workloads.make(shape, dtype), target)
    kernel.check()
    benchmark(kernel.call)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info.update(
            strategy=kernel.strategy,
            intrinsic=kernel.intrinsic,
            gops=round(2 * shape.macs / benchmark.stats.stats.min / 1e9, 1),
        )
