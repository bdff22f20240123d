"""The topi-int8 command: every command on a small model, refusals in words, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import topi_int8
from tests.graphs import sqnr
from tests.onnx_models import small_classifier
from topi_int8 import _host, artifact, cli
from topi_int8.frontend import files
from topi_int8.save import inputs_of
from topi_int8.signature import TensorInfo

ROOT = Path(__file__).resolve().parents[1]
onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")
pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc is not installed, it links libraries"
)


def call(*args: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], terminal_width=200)


def done(*args: Any) -> str:
    """Run a command that succeeds; return what it prints."""
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its calibration, and what the commands make of them."""
    folder = tmp_path_factory.mktemp("cli")
    onnx.save(small_classifier(), folder / "net.onnx")
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (3, 3, 16, 16)).astype("float32")
    np.save(folder / "calib.npy", rows)
    np.save(folder / "x.npy", rows[0])
    done("quantize", folder / "net.onnx", "--calib", folder / "calib.npy", "-o", folder / "q.json")
    done("compile", folder / "q.json", "-o", folder / "net.so")
    return folder


# ---------------------------------------------------------------- the commands


def test_quantize_compile_run(place: Path, tmp_path: Path) -> None:
    said = done("run", place / "net.so", "--input", place / "x.npy", "--output", tmp_path / "y.npy")
    got = np.load(tmp_path / "y.npy")
    assert "scores: float32 (1, 10)" in said
    best = np.argsort(-got[0])[:5]
    ranks = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    assert [int(cells[3]) for cells in ranks] == list(best)
    from onnx.reference import ReferenceEvaluator

    given = {"image": np.load(place / "x.npy")[None]}
    want = ReferenceEvaluator(str(place / "net.onnx")).run(None, given)
    assert sqnr(want[0], got) > 20
    told = artifact.read_metadata(place / "net.so")
    assert [entry["name"] for entry in told["inputs"] + told["outputs"]] == ["image", "scores"]


def test_quantize_by_pictures_and_options(place: Path, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra `images`)")
    for i in range(2):
        pil.new("RGB", (20, 24), (100 * i, 40, 200)).save(tmp_path / f"{i}.jpg")
    said = done(
        "quantize", place / "net.onnx", "--calib", tmp_path, "-o", tmp_path / "q.json",
        "--mean", "0", "--std", "1", "--crop", "1", "--size", "16x16", "--layout", "NCHW",
        "--skip", "conv2d_0", "--skip-last", "--weight-bits", "7",
    )  # fmt: skip
    assert "calibrated on 2 inputs by minmax, 7-bit weights" in said
    found = json.loads(done("explain", tmp_path / "q.json", "--json"))
    types = sorted(row["types"].split()[0] for row in found["operators"])
    assert types == ["float32", "float32", "uint8", "uint8", "uint8"]
    (image,) = inputs_of(files.read_model(tmp_path / "q.json"))
    assert image.quantization is None  # its convolution was skipped
    said = done("run", place / "net.so", "--input", tmp_path / "0.jpg")
    assert "scores: float32 (1, 10)" in said


def test_quantize_to_onnx(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    said = done("quantize", place / "net.onnx", "--calib", place / "calib.npy", "-o", out)
    assert f"{out}: calibrated on 3 inputs" in said
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out).graph.node}


def test_compile_with_weights_and_labels(place: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(f"kind{i}" for i in range(10)))
    library, weights = tmp_path / "net.so", tmp_path / "net.weights"
    said = done("compile", place / "q.json", "-o", library, "--weights", weights)
    assert f"{weights}: its weights" in said and "input image: float32 (1, 3, 16, 16)" in said
    assert " x conv2d_nchwc_" in said
    said = done(
        "run", library, "--input", place / "x.npy", "--labels", tmp_path / "labels.txt",
        "--output", tmp_path / "y.npz",
    )  # fmt: skip
    assert "kind" in said
    done("run", place / "net.so", "--input", place / "x.npy", "--output", tmp_path / "one.npy")
    apart, one = np.load(tmp_path / "y.npz")["scores"], np.load(tmp_path / "one.npy")
    np.testing.assert_array_equal(apart, one)
    weights.rename(tmp_path / "moved")
    done("run", library, "--input", place / "x.npy", "--weights", tmp_path / "moved")


def test_models_of_torch_and_open_shapes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    net, x = net.eval(), torch.randn(1, 8)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    mod = files.read_model(tmp_path / "net.pt2")
    done("compile", tmp_path / "net.pt2", "-o", tmp_path / "net.so", "--target", "host")
    with torch.no_grad():
        want = net(x).numpy()
    np.testing.assert_allclose(topi_int8.load(tmp_path / "net.so")(x.numpy()), want, rtol=1e-4,
                               atol=1e-5)  # fmt: skip
    assert [str(v.ty.dtype) for v in mod["main"].params] == ["float32"]

    onnx.save(small_classifier(batch="N"), tmp_path / "open.onnx")
    found = done("explain", tmp_path / "open.onnx", "--shape", "image=2,3,16,16", "--json",
                 "--target", "llvm -mtriple=x86_64-linux-gnu -mcpu=cascadelake")  # fmt: skip
    rows = json.loads(found)["operators"]
    assert len(rows) == 5 and all(row["strategy"] for row in rows)


def test_compile_for_another_machine(place: Path, tmp_path: Path) -> None:
    library = tmp_path / "arm.so"
    args = ("compile", place / "q.json", "-o", library, "--target", "rpi4")
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        result = call(*args)
        assert result.exit_code == 2 and "install Debian's gcc-aarch64-linux-gnu" in result.output
        pytest.skip("aarch64-linux-gnu-gcc is not installed")
    assert f"{library}: for neon" in done(*args)
    told = json.loads(done("explain", library))
    assert told["arch"] == "aarch64"
    if _host.machine() != "aarch64":
        result = call("run", library, "--input", place / "x.npy")
        assert result.exit_code == 2 and "that is aarch64, this machine is" in result.output


def test_explain(place: Path) -> None:
    said = done("explain", place / "q.json", "--target", "graviton3")
    assert "topi_int8 on llvm (neon_i8mm)" in said and "conv2d_0" in said
    told = json.loads(done("explain", place / "net.so"))
    assert told == artifact.read_metadata(place / "net.so")
    found = json.loads(done("explain", place / "q.json", "--json"))
    assert {"target", "operators", "left_to_tvm", "naive"} == set(found)
    assert any(row["declined"] for row in found["operators"])


def test_bench_is_handed_over() -> None:
    assert "resnet50_v1_5" in done("bench", "shapes")
    assert "--rivals" in done("bench", "conv", "--help")
    result = call("bench", "conv", "--isa", "mmx", "--shape", "ic8ih4oc8kh1")
    assert result.exit_code == 2


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topi_int8", "run", "none.so", "--input", "none.npy"], cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "none.so" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:No Op registered for Oddity")
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("quantize net.onnx --calib none -o q.json", "none does not exist; allowed: a folder"),
        ("quantize none.onnx --calib calib.npy -o q.json", "none.onnx', which is no file"),
        ("quantize net.txt --calib calib.npy -o q.json", "model is 'net.txt'; allowed: .onnx, .js"),
        ("quantize net.onnx --calib calib.npy -o q.txt", "output is 'q.txt'; allowed: .json"),
        ("quantize net.onnx --calib calib.npy -o no/q.json", "allowed: in a folder that exists"),
        ("quantize q.json --calib calib.npy -o r.json", "'q.json', quantized already; allowed: fl"),
        ("quantize q.json --calib calib.npy -o q.onnx", "allowed: .json, 'q.json' is no .onnx"),
        ("quantize net.onnx --calib calib.npy -o r.json --method best", "method is 'best'; al"),
        ("quantize net.onnx --calib calib.npy -o r.json --weight-bits 9", "weight_bits is 9"),
        ("quantize net.onnx --calib calib.npy -o r.json --skip conv2d_9", "skip holds 'conv2d_9'"),
        ("quantize net.onnx --calib calib.npy -o r.json --shape y=1", "shape is given for 'y'; al"),
        ("quantize net.onnx --calib calib.npy -o r.json --shape 1,2", "shape is '1,2'; allowed"),
        ("quantize net.onnx --calib calib.npy -o r.json --mean a", "mean is 'a'; allowed: numbers"),
        ("quantize net.onnx --calib calib.npy -o r.json --size 0", "size is '0'; allowed: as 224"),
        ("compile q.json -o net.dll", "output is 'net.dll'; allowed: .so"),
        ("compile q.json -o r.so --target mmx", "target is 'mmx'; allowed: host, a name of"),
        ("compile q.json -o r.so --cc nothing", "cc is 'nothing'; allowed: a C compiler"),
        ("compile q.json -o r.so --shape x=1", "shape is given for 'q.json'; allowed: for .onnx"),
        ("compile q.json -o r.so --weights .", "weights is '.'; allowed: a new folder"),
        ("compile broken.json -o r.so", "model is 'broken.json', which TVM"),
        ("compile broken.onnx -o r.so", "model is 'broken.onnx', which onnx does not read"),
        ("explain odd.onnx", "operators without an importer: "),
        ("run x.npy --input x.npy", "x.npy', which carries no metadata; allowed: a library"),
        ("run net.so --input none.npy", "input is 'none.npy', which does not exist"),
        ("run net.so --input x.npy --input x.npy", "input is given 2 times; allowed: 1"),
        ("run net.so --input x.npy --output y.txt", "output is 'y.txt'; allowed: .npy, .npz"),
        ("run net.so --input x.npy --weights .", "weights is '.'; allowed: none"),
        ("run net.so --input x.npy --labels two.txt", "labels are 2; allowed: 10"),
    ],
)
def test_refusals(place: Path, line: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name in ("broken.json", "broken.onnx", "net.txt"):
        (place / name).write_text("{ no model")
    (place / "two.txt").write_text("a\nb\n")
    node = onnx.helper.make_node("Oddity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "odd", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)],
                                     ir_version=9), place / "odd.onnx")  # fmt: skip
    result = call(*line.split())
    assert result.exit_code == 2, result.output
    assert told in result.output and "Traceback" not in result.output
    assert not (place / "r.json").exists() and not (place / "r.so").exists()


def test_a_failure_is_another_status(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the linker fell over")

    monkeypatch.setattr(topi_int8, "save", fail)
    args = ("compile", place / "q.json", "-o", place / "r.so")
    result = call(*args)
    assert result.exit_code == 1
    assert "error: RuntimeError: the linker fell over (set TOPI_INT8_TRACEBACK=1" in result.output
    assert "Traceback" not in result.output
    monkeypatch.setenv("TOPI_INT8_TRACEBACK", "1")
    assert "Traceback" in call(*args).output


def test_a_cpu_that_lacks_something(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in artifact.read_metadata(place / "net.so")["needs"]:
        pytest.skip("this machine's library needs no avx2")
    flags = _host.cpu_flags() - {"avx2"}
    monkeypatch.setattr(_host, "cpu_flags", lambda: flags)
    result = call("run", place / "net.so", "--input", place / "x.npy")
    assert result.exit_code == 2 and "this CPU lacks avx2" in result.output


def test_several_outputs_are_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        inputs = (TensorInfo("x", (2,), "float32"),)
        outputs = (TensorInfo("a", (1,), "int8"), TensorInfo("b", (), "float32"))

        def __call__(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
            return x[:1].astype("int8"), x.sum()

    monkeypatch.setattr(topi_int8, "load", lambda *_: Network())
    np.save(tmp_path / "x.npy", np.array([3, 4], "float32"))
    given = ("run", tmp_path / "net.so", "--input", tmp_path / "x.npy", "--output")
    result = call(*given, tmp_path / "y.npy")
    assert result.exit_code == 2 and "allowed: .npz, for 2 outputs" in result.output
    assert "a: int8 (1,), 3 to 3" in done(*given, tmp_path / "y.npz")
    found = np.load(tmp_path / "y.npz")
    assert found["a"] == [3] and found["b"] == 7


def test_usage_errors_are_typers() -> None:
    assert call("quantize").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("--help").exit_code == 0
