"""Settings every test shares, and the closing summary: what ran here, and what was missing."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# The workers of pytest-xdist share the cores: each keeps to one. Set before TVM and numpy load.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest
from hypothesis import HealthCheck, settings

from intrinsics.compat import IS_RELAX

# What is collected where TVM has Relay (`make test-relay`). All else here needs Relax.
_ON_RELAY = ("relay", "test_layout.py", "test_workload.py")

# The same examples on every run and machine: a failure is a change of the code, not of the dice.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "search", settings.get_profile("fixed"), derandomize=False, max_examples=500
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, where TVM has Relay, what runs on Relax only."""
    here = Path(__file__).parent
    if IS_RELAX or collection_path in (here, here.parent):
        return None
    wanted = [here / name for name in _ON_RELAY]
    related = any(
        collection_path.is_relative_to(path) or path.is_relative_to(collection_path)
        for path in wanted
    )
    return None if related else True


def _reason(report: pytest.TestReport) -> str:
    where = report.longrepr
    text = where[2] if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")


def _under_qemu(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """Sum up what tests recorded as "qemu": (instruction set and CPU model, what ran, how much)."""
    totals: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "qemu":
                where, what, count = value
                totals[where, what] += count
    lines = {where: [] for where, _ in sorted(totals)}
    for (where, what), count in totals.items():
        lines[where].append(f"{what}: {count}")
    return [f"under qemu, {where}: {'; '.join(rest)}" for where, rest in lines.items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which instruction sets this CPU ran natively, and count the skips by their reasons."""
    from topi_int8 import target

    native = [isa.name for isa in target.X86_ISAS if target.runs_here(isa.name)]
    skipped = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    terminalreporter.section("what this machine could show")
    terminalreporter.write_line(f"native instruction sets: {', '.join(native) or 'none of ours'}")
    for line in _under_qemu(terminalreporter):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"skipped: {sum(skipped.values())}")
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")
