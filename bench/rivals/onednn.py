"""oneDNN from PyPI as a rival: `setup` fetches and builds it, `OneDnn` keeps its server running.

Optional. ``make onednn`` (or ``python -m bench.rivals.onednn``) puts the libraries of
``onednn-devel-cpu-gomp`` into build/onednn and compiles onednn.cpp against them with g++.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from tvm.target import Target

from topi_int8.workload import Conv2dWorkload

from .. import targets
from ..place import HERE as THIS_MACHINE
from ..place import Place
from ..timing import Sampler
from ..workloads import OUTPUTS, Workload
from . import Unavailable

VERSION = "2023.2.0"  # oneDNN 3.2: the last that PyPI has of these packages
PACKAGES = tuple(f"{name}=={VERSION}" for name in ("onednn-devel-cpu-gomp", "onednn-cpu-gomp"))

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "onednn.cpp"
ROOT = HERE.parent.parent / "build" / "onednn"
PROGRAM = ROOT / "onednn_bench"

# What ONEDNN_MAX_CPU_ISA calls our instruction sets.
MAX_CPU_ISA = {
    "amx_int8": "AVX512_CORE_AMX",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx_vnni": "AVX2_VNNI",
    "avx512_bw": "AVX512_CORE",
    "avx2": "AVX2",
    "generic": "SSE41",
}

_SHORT = {dtype: short for short, dtype in OUTPUTS.items()}
_ANSWER_SECONDS = 120


def setup(root: Path = ROOT) -> Path:
    """Fetch oneDNN into `root` and build the server; what is there already is kept.

    Returns
    -------
    Path
        The program.

    Raises
    ------
    RuntimeError
        With the failing command's last words.
    """
    library = root / "lib" / "libdnnl.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        # --prefix, not --target: the libraries are data files, which --target drops.
        _run(
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed",
            "--no-warn-script-location", "--prefix", str(root), *PACKAGES,
        )  # fmt: skip
    return compile_server(root)


def compile_server(root: Path = ROOT) -> Path:
    """Compile onednn.cpp against the libraries in `root`, unless it is up to date."""
    program = root / PROGRAM.name
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        lib = root / "lib"
        _run(
            os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-Wall", "-Wextra",
            f"-I{root / 'include'}", str(SOURCE), "-o", str(program),
            f"-L{lib}", "-ldnnl", f"-Wl,-rpath,{lib}",
        )  # fmt: skip
    return program


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-800:]}")


def is_set_up(root: Path = ROOT) -> bool:
    """Whether `setup` has been run."""
    return (root / "lib" / "libdnnl.so").exists() and (root / PROGRAM.name).exists()


class OneDnn:
    """oneDNN, capped to the instruction set of the Target it first sees.

    Its server inherits this process's cores and OMP_NUM_THREADS when it starts.
    """

    name = "onednn"
    title = "oneDNN"

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.version = ""
        self._server: subprocess.Popen[str] | None = None
        self._isa = ""
        self._requests = 0

    def prepare(
        self, workload: Workload, target: Target, place: Place = THIS_MACHINE
    ) -> tuple[Sampler, str]:
        """Create the primitive; see `Rival`. The note is the implementation's name."""
        if place.remote:
            raise Unavailable("on this machine only")
        if not is_set_up(self.root):
            raise Unavailable("not set up (make onednn)")
        self._start(targets.isa_of(target))
        line = request(workload)
        implementation, _ = self._ask(line, 0.001)

        def sample(seconds: float) -> list[float]:
            return self._ask(line, seconds)[1]

        return sample, implementation

    def close(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=10)
            self._server.stdout.close()
            self._server = None

    def _start(self, isa: str) -> None:
        if self._server is not None and self._isa == isa:
            return
        self.close()
        try:
            compile_server(self.root)
        except RuntimeError as error:
            raise Unavailable(f"does not build: {error}") from None
        self._isa = isa
        self._server = subprocess.Popen(
            [str(self.root / PROGRAM.name)],
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": MAX_CPU_ISA[isa]},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.version = self._read()

    def _read(self) -> str:
        assert self._server is not None
        ready, _, _ = select.select([self._server.stdout], [], [], _ANSWER_SECONDS)
        answer = self._server.stdout.readline().strip() if ready else ""
        if not answer:
            code = self._server.poll()
            self._server.kill()
            self._server.wait()
            self._server.stdout.close()
            self._server = None
            raise Unavailable(f"server gave no answer (exit code {code})")
        return answer

    def _ask(self, line: str, seconds: float) -> tuple[str, list[float]]:
        """Return (implementation, microseconds of each sample)."""
        if self._server is None:
            raise Unavailable("server has stopped")
        self._requests += 1
        kind, _, rest = line.partition(" ")
        try:
            self._server.stdin.write(f"{kind} {self._requests} {1000 * seconds:g} {rest}\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            pass  # _read says how it ended
        answer = self._read().split(" ")
        if answer[0] != "ok" or answer[1] != str(self._requests):
            raise Unavailable(" ".join(answer[2:]) or "no answer")
        return answer[2], [float(us) for us in answer[3:]]


def request(workload: Workload) -> str:
    """Return the server's request for a workload, without id and time (see onednn.cpp)."""
    w, epilogue = workload, workload.epilogue
    fields: dict[str, object] = {
        "dtype": _SHORT[w.data_dtype],
        "out": _SHORT[epilogue.out_dtype],
        "bias": int(epilogue.bias),
        "relu": int(epilogue.clip_min is not None),
        "sum": int(epilogue.residual_dtype is not None),
    }
    if isinstance(w, Conv2dWorkload):
        top, left, bottom, right = w.padding
        fields |= {
            "g": w.groups, "mb": w.n, "ic": w.ic, "ih": w.ih, "iw": w.iw,
            "oc": w.oc, "oh": w.oh, "ow": w.ow, "kh": w.kh, "kw": w.kw,
            "sh": w.strides[0], "sw": w.strides[1], "dh": w.dilation[0] - 1,
            "dw": w.dilation[1] - 1, "ph": top, "pw": left, "ph_r": bottom, "pw_r": right,
        }  # fmt: skip
        kind = "conv"
    else:
        fields |= {"batch": w.batch, "m": w.m, "n": w.n, "k": w.k}
        fields["constant"] = int(w.weight_constant)
        kind = "dense"
    return " ".join([kind, *(f"{key}={value}" for key, value in fields.items())])


if __name__ == "__main__":
    try:
        print(f"oneDNN {VERSION}: {setup()}")
    except RuntimeError as failure:
        sys.exit(f"oneDNN could not be set up: {failure}")
