"""quantize_model and deploy_quantized_model: the two calls of the 2018 proposal."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import topi_int8
from topi_int8 import deploy

SHAPE = (1, 8, 6, 6)


def _network() -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """A convolution and its bias, both parameters of main."""
    rng = np.random.default_rng(0)
    values = {
        "weight": rng.normal(size=(16, 8, 3, 3)).astype("float32"),
        "bias": rng.normal(size=(1, 16, 1, 1)).astype("float32"),
    }
    bb = relax.BlockBuilder()
    shapes = {"x": SHAPE, **{name: value.shape for name, value in values.items()}}
    params = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()]
    with bb.function("main", params):
        with bb.dataflow():
            x, weight, bias = params
            total = bb.emit(op.add(bb.emit(op.nn.conv2d(x, weight)), bias))
            out = bb.emit_output(op.nn.relu(total))
        bb.emit_func_output(out)
    return bb.get(), values


MOD, PARAMS = _network()
DATASET = [np.random.default_rng(i).normal(size=SHAPE).astype("float32") for i in range(3)]


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "tvm"])
def test_two_calls_from_a_model_to_its_result(tensors: bool) -> None:
    params = {k: tvm.runtime.tensor(v) for k, v in PARAMS.items()} if tensors else PARAMS
    before = MOD.script(show_meta=True)
    qdq = topi_int8.quantize_model(MOD, params, DATASET, "naive", progress=False)
    assert MOD.script(show_meta=True) == before
    assert [param.name for param in qdq["main"].params] == ["x"]
    with topi_int8.disabled():
        executable = topi_int8.deploy_quantized_model(qdq, topi_int8.host_target())
        stock = tvm.compile(MOD, "llvm")
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(DATASET[0]))
    arrays = map(tvm.runtime.tensor, (DATASET[0], *PARAMS.values()))
    want = relax.VirtualMachine(stock, tvm.cpu())["main"](*arrays).numpy()
    assert np.abs(got.numpy() - want).max() < 0.02 * np.abs(want).max()
    assert topi_int8.library_counts(executable).dtypes.get("i8")


def test_parameters_that_are_bound_already() -> None:
    bound = relax.transform.BindParams("main", PARAMS)(MOD)
    for params in (None, {}):
        qdq = topi_int8.quantize_model(bound, params, DATASET, progress=False, weight_bits=7)
        assert [param.name for param in qdq["main"].params] == ["x"]


def test_kl_is_refused_in_words_until_there_is_such_an_observer(monkeypatch) -> None:
    monkeypatch.setattr(deploy, "OBSERVERS", {"minmax": deploy.OBSERVERS["minmax"]})
    with pytest.raises(ValueError, match=r"calibration is 'kl'; allowed: naive .*no observer 'kl'"):
        topi_int8.quantize_model(MOD, PARAMS, DATASET, "kl")
    with pytest.raises(ValueError, match=r"calibration is 'entropy'; allowed: naive$"):
        topi_int8.quantize_model(MOD, PARAMS, DATASET, "entropy")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(params={"w": DATASET[0]}), ValueError, r"params has \['w'\]; allowed: \['x'"),
        (dict(method="minmax"), TypeError, "method is given; allowed: calibration"),
        (dict(mod="resnet"), TypeError, "mod is str; allowed: a tvm.IRModule"),
    ],
)
def test_refusals(arguments: dict, error: type, message: str) -> None:
    arguments = {"mod": MOD, "params": PARAMS, "dataset": DATASET, **arguments}
    with pytest.raises(error, match=message):
        topi_int8.quantize_model(**arguments)
