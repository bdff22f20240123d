"""Relay's own tests: collected where TVM has Relay, its logs kept to errors."""

from __future__ import annotations

import logging

from intrinsics.compat import IS_RELAX

# Relax's TVM collects none of them; `make test-relay` does.
collect_ignore_glob = ["test_*.py"] if IS_RELAX else []

# They say of each operator that it was not tuned, and of each implementation that it is slow.
for name in ("autotvm", "strategy", "te_compiler", "topi"):
    logging.getLogger(name).setLevel(logging.ERROR)
