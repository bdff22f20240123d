"""Who may import whom: the rooms' one direction, and no torch or onnx in the core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = (
    "torch", "torchvision", "onnx", "onnxruntime", "tflite", "tensorflow", "pytest", "PIL",
)  # fmt: skip
# What each room may import of the package; the ground floor first.
ROOMS = {
    "intrinsics": (),
    "topi_int8/compute": ("intrinsics", "layout", "workload", "compute"),
    "topi_int8/schedule": ("intrinsics", "layout", "workload", "compute", "schedule"),
    "topi_int8/kernel.py": (
        "intrinsics", "layout", "workload", "compute", "schedule", "target",
    ),
    "topi_int8/strategy.py": ("kernel", "workload", "target"),
    "topi_int8/explanation.py": ("workload",),
    "topi_int8/workload.py": (),
    "topi_int8/layout.py": (),
    "topi_int8/target.py": ("_host", "_requirements", "target_names"),
    "topi_int8/target_names.py": (),
    "topi_int8/relay": (
        "intrinsics", "compute", "schedule", "kernel", "strategy", "target", "layout", "workload",
        "switch", "explanation", "relay",
    ),
}  # fmt: skip


def sources(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imported(path: Path, whole: bool = True) -> set[str]:
    """Return the dotted names that a file imports, relative ones made absolute.

    With ``whole`` False only what importing the file imports: nothing inside a function.
    """
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    if package[-1] == "__init__":
        package.append("")
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not whole and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{full}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    names = imported(ROOT / "topi_int8" / "transform" / "lower.py")
    assert {"tvm", "tvm.relax", "topi_int8.strategy", "topi_int8.layout.Layout"} <= names
    assert "topi_int8.transform.convert_layout.ConvertLayout" in names
    late = imported(ROOT / "topi_int8" / "override.py")
    assert "topi_int8.transform.pipeline.pipeline" in late
    assert not any("transform" in n for n in imported(ROOT / "topi_int8" / "override.py", False))


@pytest.mark.parametrize("room", ROOMS)
def test_data_flows_one_way(room: str) -> None:
    assert sources(room)
    for path in sources(room):
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "topi_int8":
                assert rest and rest[0] in ROOMS[room], f"{path} imports {name}"
            elif top == "intrinsics" and room != "intrinsics":
                assert "intrinsics" in ROOMS[room], f"{path} imports {name}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "topi_int8/relay"])
def test_kernels_know_no_graph(room: str) -> None:
    for path in sources(room):
        graphs = [n for n in imported(path) if {"relax", "relay"} & set(n.split("."))]
        # compat.py is the one file that asks which TVM this is.
        assert not graphs or path.name == "compat.py", f"{path} imports {graphs}"


def test_relay_and_relax_know_nothing_of_each_other() -> None:
    relay = sources("topi_int8/relay")
    for path in relay:
        relax = [n for n in imported(path) if {"relax", "op", "transform"} & set(n.split(".")[:2])]
        assert not relax, f"{path} imports {relax}"
    relax_only = {path for path in sources("topi_int8") if "tvm.relax" in imported(path)}
    assert len(relax_only) > 10 and not relax_only & set(relay)
    for path in relax_only:
        names = [n for n in imported(path) if n.startswith(("topi_int8.relay", "tvm.relay"))]
        assert not names, f"{path} imports {names}"


def test_extras_are_imported_inside_functions_only() -> None:
    for path in [*sources("topi_int8"), *sources("intrinsics")]:
        extras = {name.split(".")[0] for name in imported(path, whole=False)} & set(EXTRAS)
        assert not extras, f"{path} imports {extras} when it is imported"


def test_only_the_command_line_knows_typer() -> None:
    users = [path for path in sources("topi_int8") if "typer" in imported(path)]
    assert users == [ROOT / "topi_int8" / "cli.py"]
    importers = {path for path in sources("topi_int8") if "topi_int8.cli.main" in imported(path)}
    assert importers == {ROOT / "topi_int8" / "__main__.py"}


def test_no_file_is_longer_than_600_lines() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                             check=False).stdout.split()  # fmt: skip
    files = [ROOT / name for name in tracked] or [*sources("topi_int8"), *sources("intrinsics")]
    long = [str(f) for f in files if f.exists() and "tests" not in f.parts
            and len(f.read_text().splitlines()) > 600]  # fmt: skip
    assert not long


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# tvm_ffi imports torch where it is installed, so sys.modules says nothing: hide the extras instead.
HIDE = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ImportError(name + " is hidden")

sys.meta_path.insert(0, Hide())
"""


def test_everything_but_the_frontends_works_without_the_extras() -> None:
    code = """
import numpy as np, tvm
from tvm import relax
import topi_int8

bb = relax.BlockBuilder()
x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
with bb.function("main", [x]):
    with bb.dataflow():
        out = bb.emit_output(relax.op.nn.conv2d(x, relax.const(np.ones((4, 3, 3, 3), "float32"))))
    bb.emit_func_output(out)
mod = topi_int8.quantize(bb.get(), [np.ones((1, 3, 8, 8), "float32")], progress=False)
tvm.compile(mod, topi_int8.host_target())
print(len(topi_int8.explain(mod, topi_int8.host_target(), show=False)))
"""
    assert run_python(HIDE + code).strip() == "1"
    assert "torch is hidden" in run_python(
        HIDE
        + """
try:
    import torch
except ImportError as error:
    print(error)
"""
    )


def test_importing_the_intrinsics_loads_nothing_of_ours() -> None:
    modules = [f"intrinsics.{p.stem}" for p in sources("intrinsics") if p.stem != "__init__"]
    code = f"""
import {", ".join(modules)}
print([name for name in sys.modules if name.split(".")[0] == "topi_int8"])
"""
    assert run_python(HIDE + code).strip() == "[]"


def test_public_names() -> None:
    code = """
import topi_int8
assert topi_int8.is_enabled()
missing = [name for name in topi_int8.__all__ if not hasattr(topi_int8, name)]
wanted = {"enable", "disable", "disabled", "pipeline", "host_target", "quantize", "explain",
          "features"}
print(missing, sorted(wanted - set(topi_int8.__all__)))
"""
    assert run_python(code).strip() == "[] []"
