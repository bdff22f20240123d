"""Runs an exported network as who deploys it does: ``python -m bench.exported_worker``.

Knows TVM's runtime alone: neither the compiler, nor torch, which tvm_ffi imports where it finds it.
`bench.rss` asks (`bench.worker`).
"""

from __future__ import annotations

import os
import sys

import numpy as np

from .worker import memory_status, serve


class Handler:
    """What can be asked."""

    def memory(self, path: str, data: str) -> dict[str, int]:
        """Return, of a fresh process, resident bytes before a library is loaded, and their peak.

        Parameters
        ----------
        path : str
            What `export_library` wrote.
        data : str
            An .npy file of its one input.
        """
        os.environ["TVM_USE_RUNTIME_LIB"] = "1"
        sys.modules["torch"] = None  # type: ignore[assignment]
        import tvm
        from tvm.runtime.vm import VirtualMachine

        images = np.load(data)
        before = memory_status("VmRSS")
        machine = VirtualMachine(tvm.runtime.load_module(path), tvm.cpu())
        machine["main"](tvm.runtime.tensor(images)).numpy()
        return {"before": before, "peak": memory_status("VmHWM")}


if __name__ == "__main__":
    serve(Handler())
