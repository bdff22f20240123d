"""Relay's own tests: collected where TVM has Relay, its logs kept to errors."""

from __future__ import annotations

import functools
import logging

import pytest

from intrinsics.compat import IS_RELAX

# Relax's TVM collects none of them; `make test-relay` does.
collect_ignore_glob = ["test_*.py"] if IS_RELAX else []

# They say of each operator that it was not tuned, and of each implementation that it is slow.
for name in ("autotvm", "strategy", "te_compiler", "topi"):
    logging.getLogger(name).setLevel(logging.ERROR)

if not IS_RELAX:
    from tvm.relay.backend import te_compiler

    # It asks how TVM was built for each dimension of each tensor: a sixth of a network's build.
    te_compiler.libinfo = functools.cache(te_compiler.libinfo)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what TVM 0.17's parser of hybrid script has to hear from newer Pythons."""
    config.addinivalue_line("filterwarnings", "ignore:visit_.* is deprecated:DeprecationWarning")
