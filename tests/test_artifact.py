"""save and load: what a library says of itself survives, and what cannot run here is refused before
its first instruction.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests.graphs import build
from topi_int8 import _host, artifact, isa_check
from topi_int8 import target as targets
from topi_int8.qparams import QParams
from topi_int8.save import inputs_of, outputs_of
from topi_int8.signature import OUTPUT_NAMES

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (1, 8, 12, 12)
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc is not installed, it links libraries"
)


def small(emit: Any, x: relax.Var) -> relax.Expr:
    """Two convolutions and a classifier, its weight large enough to be kept apart."""
    rng, nn = np.random.default_rng(3), relax.op.nn

    def const(*shape: int) -> relax.Expr:
        return relax.const(rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype("float32"))

    x = emit(nn.relu(emit(nn.conv2d(x, const(16, 8, 3, 3), padding=1))))
    x = emit(nn.relu(emit(nn.conv2d(x, const(128, 16, 3, 3), strides=2))))
    x = emit(relax.op.mean(x, [2, 3]))
    return emit(relax.op.matmul(x, const(128, 160)))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(6).normal(0, 1, SHAPE).astype("float32")


@pytest.fixture(scope="module")
def mod(image: np.ndarray) -> tvm.IRModule:
    found = topi_int8.quantize(build(SHAPE, small), [image], progress=False)
    new = found.clone()
    new["main"] = found["main"].with_attr(OUTPUT_NAMES, ["scores"])
    return new


@pytest.fixture(scope="module")
def saved(mod: tvm.IRModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for this machine, and beside it the same with its weights apart."""
    folder = tmp_path_factory.mktemp("saved")
    target = topi_int8.host_target()
    topi_int8.save(mod, target, folder / "net.so")
    topi_int8.save(mod, target, folder / "apart.so", folder / "apart.weights")
    return folder / "net.so"


@pytest.fixture(scope="module")
def wanted(mod: tvm.IRModule, image: np.ndarray) -> np.ndarray:
    executable = tvm.compile(mod, topi_int8.host_target())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(image)).numpy()


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(tvm.runtime, "load_module", never)


def altered(saved: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """Return a copy of the library with other bytes, as many, in its metadata."""
    content = saved.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path = folder / "altered.so"
    path.write_bytes(content.replace(old, new))
    return path


# ---------------------------------------------------------------- what it carries


def test_metadata_survives(saved: Path) -> None:
    network = topi_int8.load(saved)
    told, target = artifact.read_metadata(saved), topi_int8.host_target()
    assert network.metadata == told
    assert told["topi_int8"] == topi_int8.__version__ and told["tvm"] == tvm.__version__
    assert told["target"] == str(target) and told["arch"] == _host.machine()
    assert told["isa"] == targets.features(target).isas[0] and told["weights"] is None
    # Of TVM's own VM, and so of any language, it is a function's result.
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(saved)), tvm.cpu())
    assert json.loads(str(machine[artifact.FUNCTION]())) == told
    (given,), (result,) = network.inputs, network.outputs
    assert (given.name, given.shape, given.dtype) == ("x", SHAPE, "float32")
    assert given.quantization is not None and given.quantization.dtype == "uint8"
    assert (result.name, result.shape, result.quantization) == ("scores", (1, 160), None)


def test_it_computes_what_was_compiled(
    saved: Path, image: np.ndarray, wanted: np.ndarray
) -> None:
    network = topi_int8.load(saved)
    np.testing.assert_array_equal(network(image), wanted)
    with pytest.raises(ValueError, match=r"x is float64 .*; allowed: float32 \(1, 8, 12, 12\)"):
        network(image.astype("float64"))
    with pytest.raises(ValueError, match=r"x is float32 \(8, 12, 12\); allowed: float32 \(1, 8"):
        network(image[0])
    with pytest.raises(ValueError, match=r"arrays are 2; allowed: 1 \(x: float32"):
        network(image, image)


def test_quantization_of_integers_in_and_out() -> None:
    bb = relax.BlockBuilder()
    q = relax.Var("q", relax.TensorType((tvm.tirx.Var("n", "int64"), 4), "uint8"))
    scale, zero = relax.const(0.5, "float32"), relax.const(3, "uint8")
    with bb.function("main", [q]):
        with bb.dataflow():
            real = bb.emit(relax.op.dequantize(q, scale, zero))
            relu = bb.emit(relax.op.nn.relu(real))
            small, zero8 = relax.const(0.25, "float32"), relax.const(-8, "int8")
            back = bb.emit(relax.op.quantize(relu, small, zero8, out_dtype="int8"))
            out = bb.emit_output(relax.Tuple([back, relu]))
        bb.emit_func_output(out)
    (given,) = inputs_of(bb.get())
    assert given.shape == ("n", 4) and given.quantization == QParams(0.5, 3, "uint8")
    first, second = outputs_of(bb.get())
    assert first.name == "output_0" and first.quantization == QParams(0.25, -8, "int8")
    assert second.dtype == "float32" and second.quantization is None
    assert type(given).from_dict(json.loads(json.dumps(given.to_dict()))) == given


def test_it_runs_where_only_tvms_runtime_is(
    saved: Path, image: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, tvm, topi_int8\n"
        "assert tvm._RUNTIME_ONLY and topi_int8.__all__ == ['__version__', 'load']\n"
        "for name in sys.argv[1:3]:\n"
        "    np.save(name + '.npy', topi_int8.load(name)(np.load(sys.argv[3])))\n"
    )
    np.save(tmp_path / "x.npy", image)
    libraries = [str(saved), str(saved.with_name("apart.so"))]
    done = subprocess.run(
        [sys.executable, "-c", code, *libraries, str(tmp_path / "x.npy")], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name in libraries:
        np.testing.assert_array_equal(np.load(name + ".npy"), wanted)


# ---------------------------------------------------------------- refusals


def test_a_cpu_that_lacks_something(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = artifact.read_metadata(saved)["needs"]
    if not needs or not isa_check.flags_are_told():
        pytest.skip("this machine's library needs nothing beyond its architecture")
    last = needs[-1]
    flag = targets.KERNEL_FLAG.get(last, last)
    flags = _host.cpu_flags() - {flag}
    monkeypatch.setattr(_host, "cpu_flags", lambda: flags)
    forbid_loading(monkeypatch)
    with pytest.raises(isa_check.WrongMachineError) as refused:
        topi_int8.load(saved)
    told = str(refused.value)
    assert f"this CPU lacks {last}." in told and "compiled for " in told and "host" in told


def test_a_kernel_that_refuses_tiles(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {**artifact.read_metadata(saved), "needs": ["amx-tile"], "isa": "amx_int8"}
    monkeypatch.setattr(_host, "machine", lambda: told["arch"])
    monkeypatch.setattr(_host, "cpu_flags", lambda: frozenset({"sse2", "asimd", "amx_tile"}))
    monkeypatch.setattr(_host, "amx_permitted", lambda: False)
    with pytest.raises(isa_check.WrongMachineError, match="kernel refuses its tile"):
        artifact.check_machine(saved, told)


def test_a_machine_that_tells_no_flags(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {**artifact.read_metadata(saved), "needs": ["avx2"]}
    monkeypatch.setattr(_host, "cpu_flags", frozenset)
    with pytest.warns(UserWarning, match="needs avx2, and this machine does not say"):
        artifact.check_machine(saved, told)


def test_another_architecture(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host, "machine", lambda: "riscv64")
    forbid_loading(monkeypatch)
    with pytest.raises(isa_check.WrongMachineError, match="this machine is riscv64"):
        topi_int8.load(saved)


def test_another_format(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f'{{"{artifact.MARK}": '.encode()
    path = altered(saved, tmp_path, mark + b"1,", mark + b"9,")
    forbid_loading(monkeypatch)
    with pytest.raises(ValueError, match=r"altered.so', of format 9 .*; allowed: 1\."):
        topi_int8.load(path)


def test_another_tvm(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    monkeypatch.setattr(tvm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"compiled by TVM 0\..*; allowed: TVM 0\.99\.1"):
        topi_int8.load(saved)


def test_what_is_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    for content in (b"", b"\x7fELF and more"):
        (tmp_path / "other.so").write_bytes(content)
        with pytest.raises(ValueError, match=r"other.so', which carries no metadata; allowed"):
            topi_int8.load(tmp_path / "other.so")
    with pytest.raises(FileNotFoundError):
        topi_int8.load(tmp_path / "none.so")


# ---------------------------------------------------------------- weights apart


def test_weights_apart(
    saved: Path, image: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    apart = saved.with_name("apart.so")
    assert apart.stat().st_size < saved.stat().st_size
    np.testing.assert_array_equal(topi_int8.load(apart)(image), wanted)
    # Both may move; together they are found, apart they are named.
    library = shutil.copy(apart, tmp_path / "moved.so")
    with pytest.raises(FileNotFoundError, match=r"apart.weights', which is no folder of weights"):
        topi_int8.load(library)
    folder = shutil.copytree(saved.with_name("apart.weights"), tmp_path / "elsewhere")
    np.testing.assert_array_equal(topi_int8.load(library, folder)(image), wanted)
    (folder / artifact.WEIGHTS_ID).write_text('{"id": "0"}')
    with pytest.raises(ValueError, match=r"elsewhere', another library's; allowed"):
        topi_int8.load(library, folder)
    with pytest.raises(ValueError, match=r"elsewhere'; allowed: none"):
        topi_int8.load(saved, folder)


# ---------------------------------------------------------------- another machine's


@pytest.fixture(scope="module")
def plain() -> tvm.IRModule:
    return build((1, 4), lambda emit, x: emit(relax.op.nn.relu(x)))


def test_a_library_for_arm(plain: tvm.IRModule, tmp_path: Path) -> None:
    target = topi_int8.target("graviton2")
    if _host.machine() == "aarch64" or shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("aarch64-linux-gnu-gcc is not installed, or this is such a machine")
    topi_int8.save(plain, target, tmp_path / "arm.so")
    told = artifact.read_metadata(tmp_path / "arm.so")
    assert told["arch"] == "aarch64" and {"neon", "dotprod", "lse"} <= set(told["needs"])
    with pytest.raises(isa_check.WrongMachineError, match=r"neon_dotprod .*that is aarch64"):
        topi_int8.load(tmp_path / "arm.so")


def test_no_compiler_for_arm(
    plain: tvm.IRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(ValueError, match=r"links for aarch64: install Debian's gcc-aarch64"):
        topi_int8.save(plain, topi_int8.target("rpi4"), tmp_path / "arm.so")
    with pytest.raises(ValueError, match=r"cc is 'nothing'; allowed: a C compiler"):
        topi_int8.save(plain, topi_int8.host_target(), tmp_path / "arm.so", cc="nothing")


# ---------------------------------------------------------------- features and flags


@pytest.mark.parametrize(
    ("needs", "flags", "missing"),
    [
        (["avx2", "sse4.1"], "avx2 sse4_1", []),
        (["avx512vnni", "avx512bf16"], "avx512_vnni", ["avx512bf16"]),
        (["neon", "dotprod", "lse"], "asimd asimddp", ["lse"]),
        (["neon"], "neon", []),
        (["sve2", "i8mm"], "asimd sve i8mm", ["sve2"]),
    ],
)
def test_lacking(needs: list[str], flags: str, missing: list[str]) -> None:
    assert isa_check.lacking(needs, flags.split()) == missing


def test_what_targets_need() -> None:
    assert isa_check.needed(targets.features(targets.isa_target("generic"))) == ()
    assert "amx-int8" in isa_check.needed(targets.features(targets.isa_target("amx_int8")))
    assert "sve" in isa_check.needed(targets.features(targets.named("graviton3")))
