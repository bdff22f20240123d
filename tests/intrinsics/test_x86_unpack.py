"""x86_unpack.py: weights packed into bytes, and the matrices that take them out again."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te

from intrinsics.compat import i32, ramp, scheduled, sequence, tir
from intrinsics.x86_unpack import BITS, bounds, matrix, packed, unpacked
from tests.packed import packing_target, require_gfni
from topi_int8 import target


def every_byte() -> np.ndarray:
    return np.arange(256, dtype="uint8").view("int8")


def parts_of(byte: np.ndarray, bits: int) -> np.ndarray:
    """Return the weights of each byte, by plain shifts of a signed integer."""
    wide = byte.view("uint8").astype("int64")
    values = [(wide >> part * bits) & ((1 << bits) - 1) for part in range(8 // bits)]
    return np.stack([v - (v >= 1 << bits - 1) * (1 << bits) for v in values])


@pytest.mark.parametrize("bits", BITS)
def test_packed_holds_neighbours_of_the_first_dimension(bits):
    low, high = bounds(bits)
    rng = np.random.default_rng(0)
    weight = rng.integers(low, high + 1, (16, 5, 3)).astype("int8")
    bytes_ = packed(weight, bits)
    assert bytes_.shape == (2 * bits, 5, 3) and bytes_.dtype == "int8"
    back = np.moveaxis(parts_of(bytes_, bits), 0, 1).reshape(weight.shape)
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("bits", BITS)
def test_matrices_by_the_manual(bits):
    """GF2P8AFFINEQB in numpy: bit i of the result is a parity with byte 7 - i of the matrix."""
    for part in range(8 // bits):
        rows = matrix(bits, part).to_bytes(8, "little", signed=True)
        got = np.zeros(256, "uint8")
        for bit in range(8):
            parity = np.bitwise_count(every_byte().view("uint8") & np.uint8(rows[7 - bit])) & 1
            got |= (parity << bit).astype("uint8")
        np.testing.assert_array_equal(got.view("int8"), parts_of(every_byte(), bits)[part])


def test_refusals():
    with pytest.raises(ValueError, match="bits is 3; allowed: 4, 2"):
        packed(np.zeros((8, 1), "int8"), 3)
    with pytest.raises(ValueError, match=r"weights span \[-9, 0\]; allowed in 4 bits: -8..7"):
        packed(np.array([[-9], [0]], "int8"), 4)
    with pytest.raises(ValueError, match="bits, part are 4, 2"):
        matrix(4, 2)


@pytest.mark.parametrize("lanes", [64, 32, 16])
@pytest.mark.parametrize("bits", BITS)
def test_the_instruction(bits, lanes):
    require_gfni("avx512_vnni")
    parts = 8 // bits
    source = te.placeholder((256,), "int8", "source")

    def emit(ins, outs):
        stmts = []
        for first in range(0, 256, lanes):
            where = ramp(i32(first), lanes)
            vector = tir.BufferLoad(ins[0], [where])
            stmts += [
                tir.BufferStore(outs[0], unpacked(vector, bits, part), [i32(part), where])
                for part in range(parts)
            ]
        return sequence(stmts)

    out = te.extern((parts, 256), [source], emit, dtype="int8")
    func = scheduled(te.create_prim_func([source, out]))
    library = tvm.compile(tvm.IRModule({"main": func}), packing_target("avx512_vnni"))
    got = tvm.runtime.tensor(np.zeros((parts, 256), "int8"))
    library["main"](tvm.runtime.tensor(every_byte()), got)
    np.testing.assert_array_equal(got.numpy(), parts_of(every_byte(), bits))


def test_hosts_name_the_feature():
    require_gfni("avx512_vnni")
    assert "gfni" in target.features(target.host_target()).llvm
