"""QDQ written into the ONNX model it came from: the same scales and integers, or nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topi_int8
from tests.graphs import sqnr
from tests.onnx_models import small_classifier
from topi_int8.frontend import _onnx_edit, files, write_onnx
from topi_int8.frontend import _onnx_match as match

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.normal(0, 1, (1, 3, 16, 16)).astype("float32") for _ in range(3)]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_classifier(opset=19)  # onnx's evaluator knows no earlier pairs


@pytest.fixture(scope="module")
def modules(model: Any, images: list[np.ndarray]) -> tuple[Any, Any]:
    mod = files.import_onnx(model)
    return mod, topi_int8.quantize(mod, images, progress=False)


def test_the_model_is_quantized_as_the_module_is(
    model: Any, modules: tuple[Any, Any], images: list[np.ndarray], tmp_path: Path
) -> None:
    before = model.SerializeToString()
    write_onnx.write(model, *modules, (images[0],), tmp_path / "q.onnx")
    assert model.SerializeToString() == before
    written = onnx.load(tmp_path / "q.onnx")
    ops = Counter(node.op_type for node in written.graph.node)
    activations, layers = write_onnx._read(modules[1])
    biases = sum(layer.bias is not None for layer in layers)
    assert len(layers) == 5 and biases == 4 and "BatchNormalization" not in ops
    assert ops["QuantizeLinear"] == len(activations)
    assert ops["DequantizeLinear"] == len(activations) + len(layers) + biases
    weights = [t for t in written.graph.initializer if t.name.endswith("_q")]
    dtypes = Counter(onnx.numpy_helper.to_array(t).dtype.name for t in weights)
    assert dtypes == {"int8": 5, "int32": 4}
    assert [e.name for e in written.graph.input] == ["image"]
    assert [e.name for e in written.graph.output] == ["scores"]
    # Bit for bit what the Relax module computes, and near what onnx's own evaluator does.
    (relax,), (imported,) = (
        match.run(mod, [(images[1],)]) for mod in (modules[1], files.import_onnx(written))
    )
    np.testing.assert_array_equal(imported[0], relax[0])
    evaluated = [
        ReferenceEvaluator(m).run(None, {"image": images[1]})[0]
        for m in (model, written)
    ]
    assert sqnr(evaluated[1], relax[0]) > 40  # an integer may round otherwise
    assert sqnr(evaluated[0], relax[0]) > 20


def test_a_quantized_output_keeps_its_name_and_a_skipped_layer_its_weight(
    images: list[np.ndarray], tmp_path: Path
) -> None:
    model = small_classifier(opset=13)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("r0", onnx.TensorProto.FLOAT, [1, 16, 16, 16])
    )
    mod = files.import_onnx(model)
    quantized = topi_int8.quantize(mod, images, skip=["conv2d_0"], progress=False)
    write_onnx.write(model, mod, quantized, (images[0],), tmp_path / "q.onnx")
    written = onnx.load(tmp_path / "q.onnx")
    assert [e.name for e in written.graph.output] == ["scores", "r0"]
    assert {"r0_real", "r0_q", "r0"} <= {name for n in written.graph.node for name in n.output}
    assert "BatchNormalization" in {node.op_type for node in written.graph.node}
    assert "w0" in {tensor.name for tensor in written.graph.initializer}


def refused(model: Any, mods: tuple[Any, Any], images: list[np.ndarray], path: Path) -> str:
    with pytest.raises(ValueError) as error:
        write_onnx.write(model, *mods, (images[0],), path)
    assert not path.exists() and "write .json instead" in str(error.value)
    return str(error.value)


def test_refusals(
    model: Any,
    modules: tuple[Any, Any],
    images: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "q.onnx"
    old = small_classifier(opset=11)
    assert "model has opset 11; allowed for .onnx: 13" in refused(old, modules, images, path)
    branch = onnx.helper.make_node("Relu", ["x"], ["y"])
    looped = onnx.ModelProto()
    looped.CopyFrom(model)
    looped.graph.node[0].attribute.append(
        onnx.helper.make_attribute("body", onnx.helper.make_graph([branch], "b", [], []))
    )
    assert "control flow (Conv)" in refused(looped, modules, images, path)

    with monkeypatch.context() as patch:
        # A pair that is left out is caught by running the result.
        place = _onnx_edit.Editor.quantize_tensor

        def forget(self: Any, tensor: str, params: Any) -> None:
            if tensor != "r2":
                place(self, tensor, params)

        patch.setattr(_onnx_edit.Editor, "quantize_tensor", forget)
        assert "would differ from the Relax one by" in refused(model, modules, images, path)
    for name in ("relax_values", "onnx_values"):
        monkeypatch.setattr(match, name, lambda *_: defaultdict(list))
    # Nothing in the ONNX graph is like a layer, or like the input.
    assert "no node that computes 'conv2d_0'" in refused(model, modules, images, path)
    monkeypatch.setattr(_onnx_edit.Editor, "quantize_layer", lambda *_: None)
    assert "no tensor like 'image'" in refused(model, modules, images, path)


def test_weights_are_matched_by_their_rounding() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (3, 5)).astype("float32")
    scale = (np.abs(real).max(axis=1) / 127).astype("float32")
    values = np.rint(real / scale[:, None]).astype("int8")
    rows = _onnx_edit.Constant(values, scale, 0)
    assert _onnx_edit.is_rounded(rows, real, None)
    factor = np.array([2, 3, 4], "float32")
    scaled = _onnx_edit.Constant(values, scale * factor, 0)
    assert _onnx_edit.is_rounded(scaled, real, factor)
    assert not _onnx_edit.is_rounded(scaled, real, None)
    assert not _onnx_edit.is_rounded(rows, real.T, None)
    assert not _onnx_edit.is_rounded(rows, None, None)
    # One scale in all, and so small that the largest are clipped.
    step = np.float32(np.abs(real).max() / 14)
    clipped = np.clip(np.rint(real / step), -7, 7).astype("int8")
    assert _onnx_edit.is_rounded(_onnx_edit.Constant(clipped, step, 0), real, None)
    clipped[0, 0] += 1
    assert not _onnx_edit.is_rounded(_onnx_edit.Constant(clipped, step, 0), real, None)


def test_tensors_are_matched_by_what_they_hold() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3)).astype("float32"), rng.normal(size=(2, 3)).astype("float32")
    held = {"a": [a], "moved": [a.reshape(3, 2)], "again": [a * np.float32(1 + 1e-6)], "b": [b]}
    assert match.find([a], held) == ["a", "again"]
    assert match.find([a + 0.01], held) == []
