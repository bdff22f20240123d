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

    def memory(self, path: str, data: str, weights: str = "") -> dict[str, int]:
        """Return, of a fresh process, resident bytes before a library is loaded, and their peak.

        Parameters
        ----------
        path : str
            The library that `export_library` or `topi_int8.export` wrote.
        data : str
            An .npy file of its one input.
        weights : str
            The folder that `topi_int8.export` wrote, if it did.
        """
        os.environ["TVM_USE_RUNTIME_LIB"] = "1"
        sys.modules["torch"] = None  # type: ignore[assignment]
        import tvm
        from tvm.runtime.vm import VirtualMachine

        images = np.load(data)
        before = memory_status("VmRSS")
        if weights:
            tvm.get_global_func("vm.builtin.tensor_cache.load")(weights, 1, 0)  # 1: kDLCPU
        machine = VirtualMachine(tvm.runtime.load_module(path), tvm.cpu())
        machine["main"](tvm.runtime.tensor(images)).numpy()
        return {"before": before, "peak": memory_status("VmHWM")}


if __name__ == "__main__":
    serve(Handler())
