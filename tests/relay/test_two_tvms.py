"""Relay's TVM and Relax's compute the same quantized layers bit for bit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relay

from tests.relay.calls import X86, Call, run
from tests.relay.relax_side import LAYERS, SHIFT, ZERO, Workload, multipliers
from topi_int8.target import runs_here

ROOT = Path(__file__).resolve().parents[2]
RELAX = ROOT / ".venv" / "bin" / "python"


def _requantize(sums: Any, work: Workload) -> Any:
    wide = relay.multiply(relay.cast(sums, "int64"), relay.const(multipliers(work), "int64"))
    half = relay.add(wide, relay.const(1 << (SHIFT - 1), "int64"))
    shifted = relay.right_shift(half, relay.const(SHIFT, "int64"))
    return relay.cast(relay.clip(relay.add(shifted, relay.const(ZERO, "int64")), 0, 255), "uint8")


def _relay_side(operands: Mapping[str, Any], target: str) -> dict[str, np.ndarray]:
    """Compute all layers in one module."""
    variables, outputs, inputs = [], [], {}
    for name, work in LAYERS.items():
        call = Call(work)
        main = call.module(operands[name])["main"]
        (old,) = main.params
        variables.append(relay.var(name, old.type_annotation))
        sums = relay.bind(main.body, {old: variables[-1]})
        outputs += [sums, _requantize(sums, work)]
        (inputs[name],) = call.inputs(operands[name]).values()
    mod = tvm.IRModule.from_expr(relay.Function(variables, relay.Tuple(outputs)))
    got = run(relay.transform.InferType()(mod), inputs, target)
    return {f"{name}.{what}": got[2 * at + (what == "uint8")]
            for at, name in enumerate(LAYERS) for what in ("sums", "uint8")}  # fmt: skip


def _relax_side(operands: Mapping[str, Any], folder: Path) -> Mapping[str, np.ndarray]:
    arrays = {}
    for name, ops in operands.items():
        named = Call(LAYERS[name]).arrays(ops)
        arrays |= {f"{name}.{which}": array for which, array in named.items()}
    np.savez(folder / "operands.npz", **arrays)
    done = subprocess.run(
        [RELAX, "-m", "tests.relay.relax_side", folder / "operands.npz", folder / "results.npz"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "results.npz")


def test_both_compute_the_same(tmp_path: Path) -> None:
    if not RELAX.exists():
        pytest.skip(f"there is no TVM with Relax in {RELAX.parents[1].name} (make setup)")
    operands = {name: Call(work).operands(seed=4) for name, work in LAYERS.items()}
    fastest = next(isa for isa in reversed(X86) if runs_here(isa))
    relays, relaxes = _relay_side(operands, X86[fastest]), _relax_side(operands, tmp_path)
    assert sorted(relays) == sorted(relaxes)
    for name, got in relays.items():
        np.testing.assert_array_equal(got, relaxes[name], name, strict=True)
    for name, work in LAYERS.items():
        np.testing.assert_array_equal(
            relays[f"{name}.sums"], Call(work).expected(operands[name]), name
        )
        assert len(np.unique(relays[f"{name}.uint8"])) > 20, f"{name}: requantized to nothing"
