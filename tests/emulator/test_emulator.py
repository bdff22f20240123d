"""The SIGILL emulator against numpy, with instructions assembled by gcc (asm_funcs.c).

On a CPU that has AMX and AVX-VNNI the same functions run natively and are compared just the same.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from . import HERE, compile_cached, counts, install, native_features, reset, traps

ISA_FLAGS = ["-mavx2", "-mamx-tile", "-mamx-int8", "-mavxvnni"]


def gcc_problem() -> str | None:
    """Why the test functions cannot be compiled here, or None."""
    if shutil.which("gcc") is None:
        return "gcc is not installed, it compiles the emulator and its test"
    probe = ["gcc", *ISA_FLAGS, "-E", "-x", "c", "/dev/null"]
    if subprocess.run(probe, check=False, capture_output=True).returncode != 0:
        return f"this gcc does not know {' '.join(ISA_FLAGS)} (12 or later does)"
    return None


GCC_PROBLEM = gcc_problem()
pytestmark = pytest.mark.skipif(GCC_PROBLEM is not None, reason=str(GCC_PROBLEM))

ADDRESSING_FORMS = [
    "form_plain",
    "form_scale2_disp8",
    "form_scale4_negative_disp8",
    "form_scale8_disp32",
    "form_negative_disp32",
    "form_r12_base",
    "form_r13_base",
    "form_rsp_base",
]
VNNI_FORMS = [
    "vnni_ymm_low",
    "vnni_ymm_high_dst",
    "vnni_ymm_high_all",
    "vnni_ymm_memory",
    "vnni_ymm_memory_disp32",
    "vnni_ymm_memory_sib",
    "vnni_xmm_low",
    "vnni_xmm_high_all",
    "vnni_xmm_memory",
]


@functools.cache
def functions() -> ctypes.CDLL:
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", *ISA_FLAGS, "-fPIC", "-shared"]
    lib = ctypes.CDLL(str(compile_cached("gcc", HERE / "asm_funcs.c", flags, ".so")))
    install(["amx", "avxvnni"])
    lib.request_amx()
    return lib


def ptr(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def dot_reference(c: np.ndarray, a: np.ndarray, b: np.ndarray, signs: int) -> np.ndarray:
    """c + a @ b with b in the tile layout (k/4 x n x 4); bytes signed as the bits of signs say."""
    depth, columns = b.shape[0], b.shape[1] // 4
    av = a.view(np.int8 if signs & 2 else np.uint8).astype(np.int64)
    bv = b.view(np.int8 if signs & 1 else np.uint8).astype(np.int64)
    dense = bv.reshape(depth, columns, 4).transpose(0, 2, 1).reshape(4 * depth, columns)
    return (c + av @ dense).astype(np.int32)


@pytest.mark.parametrize("signs", range(4), ids=["uu", "us", "su", "ss"])
@pytest.mark.parametrize(
    "m,n,k", [(16, 16, 64), (1, 1, 4), (7, 16, 64), (16, 5, 64), (16, 16, 12), (3, 11, 28)]
)
def test_tile_dot(m: int, n: int, k: int, signs: int) -> None:
    lib = functions()
    rng = np.random.default_rng(m * 1000 + n * 100 + k + signs)
    a = rng.integers(0, 256, (m, k), dtype=np.uint8)
    b = rng.integers(0, 256, (k // 4, 4 * n), dtype=np.uint8)
    c = rng.integers(-(2**31), 2**31, (m, n), dtype=np.int32)
    a[0], b[:, :4] = 255, 128  # extremes: 255 and -1 times 128 and -128
    expected = dot_reference(c, a, b, signs)
    reset()
    lib.dot(ptr(c), ptr(a), ptr(b), m, n, k, signs)
    np.testing.assert_array_equal(c, expected)
    if "amx" not in native_features():
        name = ["tdpbuud", "tdpbusd", "tdpbsud", "tdpbssd"][signs]
        assert counts() == {
            "ldtilecfg": 1, "tileloadd": 2, "tileloaddt1": 1, name: 1, "tilestored": 1,
            "tilerelease": 1,
        }  # fmt: skip


@pytest.mark.parametrize("rows,colsb", [(16, 64), (1, 4), (5, 64), (16, 8), (3, 60)])
def test_partial_tiles_touch_nothing_else(rows: int, colsb: int) -> None:
    lib = functions()
    source = np.random.default_rng(0).integers(0, 256, (16, 80), dtype=np.uint8)
    out = np.full((16, 96), 0xEE, np.uint8)
    lib.copy_tile(ptr(out), ctypes.c_int64(96), ptr(source), ctypes.c_int64(80), rows, colsb)
    expected = np.full((16, 96), 0xEE, np.uint8)
    expected[:rows, :colsb] = source[:rows, :colsb]
    np.testing.assert_array_equal(out, expected)


def test_negative_stride() -> None:
    lib = functions()
    source = np.random.default_rng(1).integers(0, 256, (16, 64), dtype=np.uint8)
    out = np.zeros((16, 64), np.uint8)
    lib.copy_tile(ptr(out), ctypes.c_int64(64), ptr(source[15:]), ctypes.c_int64(-64), 16, 64)
    np.testing.assert_array_equal(out, source[::-1])


@pytest.mark.parametrize("name", ADDRESSING_FORMS)
def test_addressing_forms(name: str) -> None:
    lib = functions()
    source = np.random.default_rng(2).integers(0, 256, (16, 64), dtype=np.uint8)
    out = np.zeros((16, 64), np.uint8)
    getattr(lib, name)(ptr(out), ptr(source))
    np.testing.assert_array_equal(out, source)


def test_no_index_means_stride_zero() -> None:
    lib = functions()
    source = np.random.default_rng(3).integers(0, 256, (16, 64), dtype=np.uint8)
    out = np.zeros((16, 64), np.uint8)
    lib.form_no_index(ptr(out), ptr(source))
    np.testing.assert_array_equal(out, np.repeat(source[:1], 16, axis=0))


def test_configuration_round_trip() -> None:
    lib = functions()
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32:2] = [4, 8, 64, 12, 1, 0, 33, 64]
    config[48:56] = [1, 16, 3, 9, 16, 0, 2, 16]
    out = np.full(64, 0xEE, np.uint8)
    lib.config_round_trip(ptr(config), ptr(out))
    np.testing.assert_array_equal(out, config)
    lib.store_config_after_release(ptr(out))
    assert not out.any()


def test_configuration_addressing_forms() -> None:
    lib = functions()
    out = np.zeros((3, 64), np.uint8)
    lib.config_forms(ptr(out))
    expected = np.zeros(64, np.uint8)
    expected[[0, 16, 48]] = [1, 64, 16]
    np.testing.assert_array_equal(out, np.tile(expected, (3, 1)))


def test_threads_have_their_own_tiles() -> None:
    lib = functions()
    failures: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        m, n, k = int(rng.integers(1, 17)), int(rng.integers(1, 17)), 4 * int(rng.integers(1, 17))
        for _ in range(200):
            a = rng.integers(0, 256, (m, k), dtype=np.uint8)
            b = rng.integers(0, 256, (k // 4, 4 * n), dtype=np.uint8)
            c = np.zeros((m, n), np.int32)
            expected = dot_reference(c, a, b, 1)
            lib.dot(ptr(c), ptr(a), ptr(b), m, n, k, 1)  # ctypes releases the GIL
            if not np.array_equal(c, expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def vnni_reference(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, op: int = 0, bits: int = 256
) -> np.ndarray:
    """One of vpdpbusd, vpdpbusds, vpdpwssd, vpdpwssds on 32-byte vectors."""
    if op < 2:
        products = a.astype(np.int64) * b.view(np.int8)
    else:
        products = a.view(np.int16).astype(np.int64) * b.view(np.int16)
    total = c.view(np.int32) + products.reshape(8, -1).sum(axis=1)
    if op % 2:
        total = total.clip(-(2**31), 2**31 - 1)
    result = total.astype(np.int32)
    result[bits // 32 :] = 0
    return result


def vnni_operands(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, 32), dtype=np.uint8)
    c = rng.integers(-(2**31), 2**31, 8, dtype=np.int32)
    a[::3] = 255
    c[0], c[1] = 2**31 - 1, -(2**31)  # these overflow
    return c, a, b


@pytest.mark.parametrize("bits", [128, 256])
@pytest.mark.parametrize("op", range(4), ids=["vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds"])
def test_vnni_operations(op: int, bits: int) -> None:
    lib = functions()
    for seed in range(20):
        c, a, b = vnni_operands(seed)
        expected = vnni_reference(c, a, b, op, bits)
        reset()
        lib.vnni(ptr(c), ptr(a), ptr(b), op, bits)
        np.testing.assert_array_equal(c, expected)
        if "avxvnni" not in native_features():
            # "in", not "==": gcc computes two of the results and then selects one
            assert ["vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds"][op] in counts()


@pytest.mark.parametrize("name", VNNI_FORMS)
def test_vnni_forms(name: str) -> None:
    lib = functions()
    for seed in range(5):
        c, a, b = vnni_operands(seed)
        expected = vnni_reference(c, a, b, bits=128 if "xmm" in name else 256)
        getattr(lib, name)(ptr(c), ptr(a), ptr(b))
        np.testing.assert_array_equal(c, expected)


def test_vnni_with_ymm_in_initial_state() -> None:
    lib = functions()
    b = np.random.default_rng(4).integers(0, 256, 32, dtype=np.uint8)
    out = np.full(8, 77, np.int32)
    lib.vnni_from_init_state(ptr(out), ptr(b))
    expected = np.zeros(8, np.int32)
    expected[:4] = 255 * b[:16].view(np.int8).astype(np.int32).reshape(4, 4).sum(axis=1)
    np.testing.assert_array_equal(out, expected)


def test_vnni_preserves_other_registers() -> None:
    lib = functions()
    source = np.random.default_rng(5).integers(0, 256, (16, 32), dtype=np.uint8)
    out = np.zeros((16, 32), np.uint8)
    lib.vnni_preserves(ptr(out), ptr(source))
    expected = source.copy()
    expected[9] = vnni_reference(source[9].view(np.int32), source[2], source[3]).view(np.uint8)
    np.testing.assert_array_equal(out, expected)


def test_vnni_run_with_broadcasts() -> None:
    lib = functions()
    c, a, b = vnni_operands(0)
    expected = c
    for first, lanes in ((0, 32), (8, 32), (20, 16)):  # the last goes to an xmm register
        operand = np.zeros(32, np.uint8)
        operand[:lanes] = np.tile(a[first : first + 4], lanes // 4)
        expected = vnni_reference(expected, operand, b)
    reset()
    lib.vnni_run(ptr(c), ptr(a), ptr(b))
    np.testing.assert_array_equal(c, expected)
    if "avxvnni" not in native_features():
        assert counts() == {"vpdpbusd": 3}
        assert traps() == 1


def test_tvm_worker_threads(tmp_path: Path) -> None:
    """TVM runs the chunks of a parallel loop in threads of its own."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, it links kernels")
    import tvm

    from intrinsics import compat

    functions()
    new = compat.llvm_major() >= 22  # the intrinsic took vectors of int32 before
    name = 'T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.256")'
    a, b = (
        (f'T.reinterpret("int8x32", {v}.vload([i, 0], "{t}x32"))' if new else
         f'T.reinterpret("int32x8", {v}.vload([i, 0], "{t}x32"))')
        for v, t in (("A", "uint8"), ("B", "int8"))
    )  # fmt: skip
    dot = f"T.call_llvm_pure_intrin({name}, {{NSIG:3}} T.Broadcast(T.int32(0), 8), {a}, {b},"
    kernel = f"""
{{PF}}
def main(
    A: T.Buffer((1000, 32), "uint8"), B: T.Buffer((1000, 32), "int8"),
    C: T.Buffer((1000, 8), "int32")
) -> None:
    T.func_attr({{"global_symbol": "main"}})
    with {{block}}("root"):
        for i in T.parallel(0, 1000):
            C[i, T.ramp(T.int32(0), 1, 8)] = {dot} dtype="int32x8")
"""
    module = tvm.IRModule({"main": compat.parse_prim_func(kernel)})
    target = tvm.target.Target({"kind": "llvm", "mcpu": "alderlake"})
    tvm.compile(module, target=target).export_library(str(tmp_path / "kernel.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "kernel.so"))
    rng = np.random.default_rng(7)
    a = rng.integers(0, 256, (1000, 32), dtype=np.uint8)
    b = rng.integers(-128, 128, (1000, 32), dtype=np.int8)
    c = tvm.runtime.tensor(np.zeros((1000, 8), np.int32))
    reset()
    loaded["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), c)
    expected = (a.astype(np.int32) * b).reshape(1000, 8, 4).sum(axis=2)
    np.testing.assert_array_equal(c.numpy(), expected)
    if "avxvnni" not in native_features():
        assert counts() == {"vpdpbusd": 1000}


def test_speed_of_full_tiles() -> None:
    """ResNet-50 needs about 250k full tile products; that has to take seconds, not minutes."""
    lib = functions()
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 256, (2, 16, 64), dtype=np.uint8)
    c = np.zeros((4, 16, 16), np.int32)
    times = 5000
    reset()
    begin = time.perf_counter()
    lib.dot_many(ptr(c), ptr(a), ptr(b), times)
    seconds = time.perf_counter() - begin
    one = dot_reference(np.zeros((16, 16), np.int64), a, b, 1).astype(np.int64)
    np.testing.assert_array_equal(c, np.broadcast_to((one * times).astype(np.int32), c.shape))
    per_dot = seconds / (4 * times) * 1e6
    print(f"{per_dot:.2f} us per 16x16x64 tdpbusd, {traps()} signals for {counts()}")
    assert per_dot < 100


def run_bad(call: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the misusing functions in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ctypes\n"
        "from tests.emulator import test_emulator\n"
        "lib = test_emulator.functions()\n"
        "buffer = ctypes.create_string_buffer(4096)\n"
        f"lib.{call}\n"
        "print('survived')\n"
    )
    command = [sys.executable, "-c", code, str(HERE.parents[1])]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "call,message",
    [
        ("bad_no_config(buffer)", "tileloadd: no tile configuration is loaded"),
        ("bad_unconfigured_tile()", "tilezero: tile is not configured (tile=5)"),
        ("copy_tile(buffer, 64, buffer, 64, 16, 61)", "tileloadd: colsb is not a multiple of 4"),
        ("bad_same_tile(buffer)", "the three tiles must differ"),
        ("bad_shape(buffer, 16, 64, 15, 64, 16, 64)", "tile shapes do not match (dst.rows=16"),
        ("bad_shape(buffer, 16, 64, 16, 60, 16, 64)", "a.colsb=60, b.rows=16"),
        ("bad_shape(buffer, 16, 64, 16, 64, 16, 60)", "b.colsb=60"),
        ("bad_shape(buffer, 16, 62, 16, 64, 16, 62)", "colsb is not a multiple of 4"),
        ("bad_shape(buffer, 17, 64, 16, 64, 16, 64)", "invalid tile shape (tile=0, rows=17"),
        ("bad_shape(buffer, 16, 68, 16, 64, 16, 68)", "invalid tile shape (tile=0"),
        ("bad_shape(buffer, 0, 64, 16, 64, 16, 64)", "invalid tile shape (tile=0, rows=0"),
    ],
)
def test_misuse_is_fatal(call: str, message: str) -> None:
    done = run_bad(call)
    assert "survived" not in done.stdout
    if "amx" in native_features():
        assert done.returncode < 0  # the CPU says #UD or #GP
    else:
        assert message in done.stderr
        assert done.returncode == -signal.SIGABRT


def test_really_illegal_instruction_still_dies() -> None:
    done = run_bad("really_illegal()")
    assert "survived" not in done.stdout
    assert done.returncode == -signal.SIGILL


def test_faulthandler_keeps_working() -> None:
    """A handler that was there before gets the instructions which the emulator does not know."""
    done = run_bad("really_illegal() if not __import__('faulthandler').enable() else None")
    assert done.returncode == -signal.SIGILL
    assert "Fatal Python error: Illegal instruction" in done.stderr


def test_unknown_feature() -> None:
    with pytest.raises(ValueError, match="unknown features"):
        install(["avx10"])
