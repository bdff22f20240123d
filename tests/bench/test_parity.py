"""bench/parity.py: what it counts and what it writes. The networks: tests/models/test_parity.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")

import onnx
from onnx import TensorProto, helper, numpy_helper

from bench import parity
from bench.parity import Difference, Parity

SAME = Difference(0.0, 0.0, 1.0, 4)
ROW = Parity(
    "resnet18", "QDQ", "step", 4, Difference(2.0, 0.25, 0.75, 3), SAME, 21, 1, ("head: float",),
    1000.0, 4000.0, 3.5,
)  # fmt: skip
HEAD = {
    "machine": {"cpu": "A CPU", "date": "2026-01-02T03:04", "commit": "abc"},
    "options": {"calibration": 8, "image": 64, "inputs": 4, "isa": "avx2", "onnxruntime": "ORT 1"},
}


def test_difference_in_steps() -> None:
    first = np.float32([[1, 2, 3], [5, 4, 0]])
    found = Difference.between(first, first + np.float32([[0, 0, 0], [0, 1.5, 0]]), 0.5)
    assert found == Difference(3.0, 0.5, 5 / 6, 1)
    assert Difference.between(first, first, 0.5) == Difference(0.0, 0.0, 1.0, 2)


@pytest.mark.parametrize("quantized", [True, False])
def test_output_step(quantized: bool, tmp_path: Path) -> None:
    last = ["DequantizeLinear", "s"] if quantized else ["Mul", "s"]
    dtype = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(last[0], ["x", "s"], ["y"])], "g",
        [helper.make_tensor_value_info("x", dtype, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2,))],
        [numpy_helper.from_array(np.float32(0.25), "s")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert parity.output_step(tmp_path / "m.onnx") == (0.25 if quantized else None)


def test_what_is_written() -> None:
    document = parity.to_document([ROW], HEAD)
    again = parity.from_document(json.loads(json.dumps(document)))
    assert again == [ROW]
    text = parity.to_markdown(document, again)
    row = "| resnet18 | QDQ | 21 | 1 | 2 | 0.25 | 75.0% | 3/4 | 0 | 0 | 100.0% | 4/4 |"
    assert f"{row} 1.00 | 4.00 | 4.00x |" in text
    assert "Cooled." not in text
    assert "\n\nCooled.\n\n| network" in parity.to_markdown({**document, "note": "Cooled."}, again)
    assert "- resnet18, QDQ: head: float" in text and "A CPU, `avx2`, 2026-01-02" in text
    float_out = replace(ROW, unit="% of spread", us=None)
    assert "2 %" in parity.cells(float_out) and parity.cells(float_out)[-1] == "-"


def test_rows_of_earlier_runs() -> None:
    other, newer = replace(ROW, network="vgg11"), replace(ROW, int8=22)
    found = parity.merged([ROW, other], [newer, replace(ROW, form="QOperator", network="mine")])
    assert [(p.network, p.int8) for p in found] == [("resnet18", 22), ("vgg11", 21), ("mine", 21)]


@pytest.mark.parametrize(
    "wrong, words", [(dict(inputs=0), "inputs is 0"), (dict(forms=("qdq",)), "form is 'qdq'"),
                     (dict(min_time=-1.0), "min_time is -1.0")],
)  # fmt: skip
def test_refusals(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parity.Options(**wrong)
