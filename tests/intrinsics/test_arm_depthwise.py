"""arm_depthwise.py: gather brings four rows together, dot multiplies them; desc and impl.

Both descriptions are run by this machine, both implementations by qemu, as functions of their own:
what they exchange is an ordinary array.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from bench import arm_asm
from intrinsics import compat
from intrinsics.arm_depthwise import ArmDepthwise
from tests.emulator import arm
from tests.emulator.arm_asm import beyond
from tests.emulator.bare import BareProgram, build_program
from topi_int8.target import isa_target

DILATIONS = (1, 2, 3)
# The dot product, and the least instruction set that has it.
DOTS = {
    ("int8", "int8"): ("sdot", "neon_dotprod"),
    ("uint8", "uint8"): ("udot", "neon_dotprod"),
    ("uint8", "int8"): ("usdot", "neon_i8mm"),
}
each_pair = pytest.mark.parametrize("types", DOTS, ids="_".join)


def functions(which: int) -> dict[str, Any]:
    """Return the descs (0) or impls (1) of every intrinsic, by name."""
    found = {}
    for a, b in DOTS:
        found[f"dot_{a}_{b}"] = ArmDepthwise(a, b).dot()[which]
    for (a, b), dilation in itertools.product(list(DOTS)[:2], DILATIONS):
        found[f"gather_{a}_{dilation}"] = ArmDepthwise(a, b, dilation).gather()[which]
    return found


def compiled(named: dict[str, Any], isa: str) -> tvm.runtime.Executable:
    module = {name: func.with_attr("global_symbol", name) for name, func in named.items()}
    return tvm.compile(tvm.IRModule(module), target=isa_target(isa))


def drawn(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return values of the whole range; or (seed 1) its lower end, (seed 2) either end."""
    rng, ends = np.random.default_rng(seed), np.iinfo(dtype)
    if seed == 0:
        return rng.integers(ends.min, ends.max + 1, shape).astype(dtype)
    values = [ends.min] if seed == 1 else [ends.min, ends.max]
    return rng.choice(values, shape).astype(dtype)


def cases(name: str) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Return (arrays, what the last becomes) of an intrinsic, computed by numpy."""
    found = []
    what, a, rest = name.split("_")
    for seed in (0, 1, 2):
        if what == "gather":
            rows = drawn(a, (3 * int(rest) + 1, 1, 16), seed)
            want = np.stack([rows[t * int(rest), 0] for t in range(4)], axis=1)
            found.append(([rows, np.zeros((16, 4), a)], want))
        else:
            x, w = drawn(a, (4, 4), seed), drawn(rest, (4, 4), seed + 10 * (seed == 0))
            c = np.random.default_rng(seed).integers(-(2**30), 2**30, 4).astype("int32")
            products = (x.astype("int32") * w.astype("int32")).sum(axis=1, dtype="int32")
            found.append(([x, w, c], c + products))
    return found


def test_desc_is_what_it_says():
    library = compiled(functions(0), "generic")
    for name in functions(0):
        for arrays, want in cases(name):
            tensors = [tvm.runtime.tensor(array) for array in arrays]
            library[name](*tensors)
            np.testing.assert_array_equal(tensors[-1].numpy(), want, name)


def wrong(program: BareProgram, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        for arrays, want in cases(name)
        if not np.array_equal(program.call(name, arrays)[-1], want)
    ]


@pytest.mark.arm
@pytest.mark.parametrize("isa", ["neon", "neon_dotprod", "neon_i8mm"])
def test_impl_computes_desc(isa: str, tmp_path: Path, record_property):
    """Gathering needs nothing but NEON: it is run where there is no dot product."""
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    named = {name: func for name, func in functions(1).items() if needs(name) == isa}
    assert named
    program = build_program(compiled(named, isa), list(named), isa, tmp_path)
    where = f"{isa} on {arm.MACHINES[isa].cpu}"
    record_property("qemu", (where, "depthwise intrinsics", len(named)))
    assert not wrong(program, list(named))


def needs(name: str) -> str:
    what, *types = name.split("_")
    return "neon" if what == "gather" else DOTS[tuple(types)][1]


def mnemonics(func: Any, isa: str) -> Counter[str]:
    asm = compiled({"f": func}, isa).mod.inspect_source("asm")
    code = [i for f in arm_asm.parse(asm) for block in f.blocks for i in block.instructions]
    assert not beyond(isa, [i.text for i in code])
    return Counter(i.mnemonic for i in code)


@each_pair
def test_dot_is_one_instruction(types):
    name, isa = DOTS[types]
    found = mnemonics(ArmDepthwise(*types).dot()[1], isa)
    assert found[name] == 1
    assert found[name] == sum(count for other, count in found.items() if other.endswith("dot"))


@pytest.mark.parametrize("dilation", DILATIONS)
def test_gather_is_two_rounds_of_zip(dilation):
    """And nothing slower: no table look-ups. (tests/schedule counts them in a whole kernel.)"""
    found = mnemonics(ArmDepthwise("int8", "int8", dilation).gather()[1], "neon")
    # Alone, the first round is made again for each store, which might have changed the rows.
    assert found["zip1"] + found["zip2"] in (8, 12)
    assert not found["tbl"] and not found["tbx"]


@each_pair
def test_registration(types):
    intrinsics = ArmDepthwise(*types, 2)
    names = intrinsics.register()
    assert names == intrinsics.register()
    for name, made in zip(names, (intrinsics.gather(), intrinsics.dot()), strict=True):
        found = compat.TensorIntrin.get(name)
        tvm.ir.assert_structural_equal(found.desc, made[0])
        tvm.ir.assert_structural_equal(found.impl, made[1])


def test_names_tell_types_and_dilations_apart():
    every = {(*types, d): ArmDepthwise(*types, d).register() for types in DOTS for d in DILATIONS}
    # Gathering knows the data's type and the dilation, the product both types.
    assert len({gather for gather, _ in every.values()}) == 2 * len(DILATIONS)
    assert len({dot for _, dot in every.values()}) == len(DOTS)
    for (a, b, dilation), (gather, dot) in every.items():
        assert a in gather and str(dilation) in gather
        assert f"_{a}_{b}_" in dot


@pytest.mark.parametrize("types", [("int8", "uint8"), ("int16", "int8"), ("float32", "float32")])
def test_types_validate_themselves(types):
    with pytest.raises(ValueError, match=rf"dtypes are {types[0]}, {types[1]}; allowed: .*'int8'"):
        ArmDepthwise(*types)
