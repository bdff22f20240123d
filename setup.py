"""What the package is and needs. Its pins are those that topi_int8/_requirements.py checks."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(module: str) -> dict:
    """Run one module of the package on its own: importing the package would need TVM."""
    return runpy.run_path(str(ROOT / "topi_int8" / f"{module}.py"), run_name=module)


RPC = ["cloudpickle", "psutil", "tornado"]
# Photographs for the demo, and what reads a user's own.
IMAGES = ["Pillow", "scikit-learn", "scikit-image"]
README = ROOT / "README.md"

setup(
    name="topi_int8",
    version=read("_version")["__version__"],
    description="int8 operator strategies for the CPU backends of Apache TVM",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["topi_int8*", "intrinsics*", "bench*"]),
    package_data={"bench": ["shapes/*", "rivals/*.cpp", "*.md"]},
    install_requires=[*read("_requirements")["SUPPORTED"][0].pins(), "numpy", "rich", "typer"],
    entry_points={"console_scripts": ["topi-int8 = topi_int8.cli:main"]},
    extras_require={
        # torchvision has no CPU build of its own: topi_int8/frontend/torchvision.py lets it import.
        "torch": ["torch==2.13.0", "torchvision==0.28.0"],
        "onnx": ["onnx"],
        "tflite": ["tflite"],
        "images": IMAGES,  # what `topi-int8 quantize` and `run` read, and the demo calibrates on
        # What TVM's RPC tracker and server import and apache-tvm does not name.
        "rpc": RPC,
        "bench": [*RPC, *IMAGES, "pytest", "pytest-benchmark", "matplotlib"],
        # scikit-learn for the digits that it bundles.
        "test": [
            *RPC,
            "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "ruff",
            "scikit-learn", "tflite",
            # What quantized ONNX models are compared with; its quantization does not name sympy.
            "onnxruntime==1.32.0", "sympy",
            # Quantizes the PT2E programs that the frontend's tests import.
            "torchao==0.18.0",
        ],
    },
)
