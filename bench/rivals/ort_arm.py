"""onnxruntime's aarch64 wheel under QEMU as a rival in instructions.

Optional. ``python -m bench.rivals.ort_arm`` fetches the wheel into build/emulator/arm-ort; it runs
in the aarch64 Python that ``tests/emulator/setup_arm.sh`` puts into build/emulator/arm. Each layer
is one ``com.microsoft.QLinearConv`` with ``channels_last=1``, the form that onnxruntime itself
turns convolutions into on the inside of a network: no transposes stand around it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from topi_int8.workload import Conv2dWorkload

from .. import emulated
from ..emulated import REPOSITORY, EmulatorError

VERSION = "1.32.0"
PYTHON_ROOT = REPOSITORY / "build" / "emulator" / "arm"
ROOT = REPOSITORY / "build" / "emulator" / "arm-ort"
GUEST = Path(__file__).resolve().parent / "ort_guest.py"

# What its CPU detection reads; the host's own files describe another architecture, and crash it.
# Features come from the emulated CPU itself (AT_HWCAP), but are doubted for some cores by name.
_CPUINFO = (
    "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n\n"
)
_PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "neoverse-n1": "0xd0c"}
_NEOVERSE_N2 = "0xd49"  # stands for "max"
_FAKES = {
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
    "sys/devices/system/cpu/online": "0\n",
    "sys/devices/system/cpu/cpu0/topology/cluster_cpus_list": "0\n",
}


def setup(root: Path = ROOT) -> None:
    """Fetch the wheel into `root`; what is there already is kept.

    Raises
    ------
    RuntimeError
        With pip's last words.
    """
    site = root / "site"
    if (site / "onnxruntime").is_dir():
        return
    root.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root),
            "--only-binary=:all:", *platforms, "--python-version=3.11", "--implementation=cp",
            "--abi=cp311", f"onnxruntime=={VERSION}",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"pip download onnxruntime: {done.stderr.strip()[-400:]}")
    (wheel,) = root.glob(f"onnxruntime-{VERSION}-*aarch64.whl")
    with tempfile.TemporaryDirectory(dir=root) as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        Path(folder).rename(site)
        Path(folder).mkdir()


def unavailable(root: Path = ROOT) -> str:
    """Return why it cannot run here, or ""."""
    if not (PYTHON_ROOT / "python").exists():
        return "no aarch64 Python (tests/emulator/setup_arm.sh)"
    if not (root / "site" / "onnxruntime").is_dir():
        return "not set up (python -m bench.rivals.ort_arm)"
    return ""


def _fake_root(top: Path, cpu: str) -> Path:
    """Fill a folder that stands before / for the guest: the sysroot, and `_FAKES`."""
    cpuinfo = _CPUINFO.format(part=_PARTS.get(cpu.split(",")[0], _NEOVERSE_N2))
    for name, text in {**_FAKES, "proc/cpuinfo": cpuinfo}.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for entry in (PYTHON_ROOT / "sysroot").iterdir():
        (top / entry.name).symlink_to(entry.resolve())
    return top


def save_model(workload: Conv2dWorkload, path: Path) -> None:
    """Write the ONNX model of one layer: NHWC in and out, relu in the output's range."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    w = workload
    rng = np.random.default_rng(0)
    unsigned = w.data_dtype == "uint8"
    element = TensorProto.UINT8 if unsigned else TensorProto.INT8
    dtype = np.uint8 if unsigned else np.int8
    weight = rng.integers(-127, 128, (w.oc, w.ic // w.groups, w.kh, w.kw)).astype(np.int8)
    out_zero = 0 if unsigned else -128
    constants = {
        "x_scale": np.float32(0.02), "x_zero": dtype(w.data_zero_point), "w": weight,
        "w_scale": rng.uniform(0.001, 0.01, w.oc).astype(np.float32),
        "w_zero": np.zeros(w.oc, np.int8), "y_scale": np.float32(0.05),
        "y_zero": dtype(out_zero), "b": rng.integers(-999, 999, w.oc).astype(np.int32),
    }  # fmt: skip
    names = "x x_scale x_zero w w_scale w_zero y_scale y_zero b".split()
    node = helper.make_node(
        "QLinearConv", names, ["y"], domain="com.microsoft", channels_last=1,
        kernel_shape=[w.kh, w.kw], strides=list(w.strides), dilations=list(w.dilation),
        pads=list(w.padding), group=w.groups,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info("x", element, [w.n, w.ih, w.iw, w.ic])],
        [helper.make_tensor_value_info("y", element, [w.n, w.oh, w.ow, w.oc])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def save_nothing(path: Path) -> None:
    """Write a model of next to no work: what calling a session costs."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "nothing",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def count(
    workloads: Sequence[Conv2dWorkload], cpu: str, root: Path = ROOT
) -> tuple[str, list[int | str]]:
    """Return (version, for each layer its instructions or why there are none).

    The cost of calling a session (from Python, some ten thousand instructions) is measured on an
    empty model and taken off.

    Raises
    ------
    EmulatorError
        When it cannot run here at all.
    """
    if reason := unavailable(root):
        raise EmulatorError(f"onnxruntime: {reason}")
    with tempfile.TemporaryDirectory(prefix="ort_arm") as name:
        folder = Path(name)
        paths = [folder / "nothing.onnx", *(folder / f"{n}.onnx" for n in range(len(workloads)))]
        save_nothing(paths[0])
        for workload, path in zip(workloads, paths[1:], strict=True):
            save_model(workload, path)
        environment = {
            "PATH": os.environ.get("PATH", ""), "PYTHONHOME": str(PYTHON_ROOT / "sysroot/usr"),
            "PYTHONPATH": f"{PYTHON_ROOT / 'site'}:{root / 'site'}",
        }  # fmt: skip
        top = _fake_root(folder / "root", cpu)
        python = str(PYTHON_ROOT / "sysroot/usr/bin/python3.11")
        program = ["-L", str(top), "-0", python, python, str(GUEST), *map(str, paths)]
        text = emulated.qemu(cpu, folder / "counts", program, env=environment)
        counts = iter(emulated.read_counts(folder / "counts"))
    version, found = "", {}
    for line in text.splitlines():
        kind, what, *rest = line.split(" ", 2)
        if kind == "version":
            version = what
        elif kind == "model":
            found[what] = next(counts)
        elif kind == "failed":
            found[what] = rest[0]
    nothing = found.get(str(paths[0]))
    if not isinstance(nothing, int):
        raise EmulatorError(f"onnxruntime: {nothing or text[-300:]}")
    results = [found.get(str(path), "did not run") for path in paths[1:]]
    return version, [r - nothing if isinstance(r, int) else r for r in results]


if __name__ == "__main__":
    setup()
    print(f"onnxruntime {VERSION} for aarch64: {ROOT}")
