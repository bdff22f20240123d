"""Options of ``pytest bench``: the layers and the instruction set that are benchmarked."""

import pytest

from bench.targets import ISAS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --batch (repeatable) and --isa, as `python -m bench` has them."""
    group = parser.getgroup("bench")
    group.addoption("--batch", action="append", help="shape file; default: shapes_smoke")
    group.addoption("--isa", default="host", choices=ISAS, help="instruction set")
