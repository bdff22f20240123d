"""Runs in the emulated aarch64 Python: each ONNX model once, between the counter's marks.

``python3.11 ort_guest.py MODEL...``: prints a line ``model NAME`` before the marks of each, so that
what the plugin counted can be told apart. Knows nothing of this project.
"""

import ctypes
import sys

import numpy as np
import onnxruntime as ort

MARK = 4242  # tests/emulator/insn_count.c
TYPES = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(float)": np.float32}


def main() -> None:
    """Run the models named on the command line."""
    syscall = ctypes.CDLL(None).syscall
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    print(f"version {ort.__version__}", flush=True)
    for path in sys.argv[1:]:
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            for given in session.get_inputs():
                dtype = TYPES[given.type]
                array = (np.arange(np.prod(given.shape)) * 37 % 251).astype(dtype)
                value = ort.OrtValue.ortvalue_from_numpy(array.reshape(given.shape))
                binding.bind_ortvalue_input(given.name, value)
            for wanted in session.get_outputs():
                value = ort.OrtValue.ortvalue_from_shape_and_type(wanted.shape, TYPES[wanted.type])
                binding.bind_ortvalue_output(wanted.name, value)
            session.run_with_iobinding(binding)  # warm: weights packed, buffers there
        except Exception as error:
            print(f"failed {path} {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"model {path}", flush=True)
        syscall(MARK, 1)
        session.run_with_iobinding(binding)
        syscall(MARK, 2)


if __name__ == "__main__":
    main()
