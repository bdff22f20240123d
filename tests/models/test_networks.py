"""Whole networks in int8: our integer execution adds no error to what the QDQ graph itself gives.

The QDQ graph is what quantization decided; `tests.simulate` runs that very graph in float32. Three
claims, each against it:

- step by step, fed with the values our library computed so far, each stored tensor is within 1 and
  all but one in a thousand are equal (float and integer sums may turn an exact tie);
- free running, the library is nearer to the simulated graph than that is to fp32, so the network's
  error is quantization's: the ratio to fp32 torch is the simulated graph's within 3 dB;
- per convolution, the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests import graphs
from topi_int8.quantize import instrument
from topi_int8.quantize.graph import prepare
from topi_int8.quantize.report import stored_tensors
from topi_int8.workload import Conv2dWorkload

pytestmark = pytest.mark.model

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
models = pytest.importorskip("bench.models")
simulate = pytest.importorskip("tests.simulate").simulate
from_torch = pytest.importorskip("topi_int8.frontend.torch").from_torch

# Small images: the same graphs and channel counts, a tenth of the work.
NETWORKS = {"resnet18": 96, "resnet50": 64, "mobilenet_v2": 64}
INPUTS = 8


@dataclass(frozen=True)
class Network:
    """One network in all its forms, and its outputs on the test images."""

    name: str
    mod: tvm.IRModule
    qdq: tvm.IRModule
    images: list[np.ndarray]
    fp32: np.ndarray
    simulated: np.ndarray
    int8: np.ndarray


def _compiled(mod: tvm.IRModule):
    executable = tvm.compile(mod, target=topi_int8.host_target())
    return relax.VirtualMachine(executable, tvm.cpu())["main"]


def _network(name: str) -> Network:
    """Load, import, quantize, compile and run one network."""
    size = NETWORKS[name]
    module, example = models.load(name, image=size)
    mod = from_torch(module, example)
    calibration = [models.images(1, size, 100 + i) for i in range(8)]
    qdq = topi_int8.quantize(mod, calibration, progress=False)
    images = [models.images(1, size, 200 + i) for i in range(INPUTS)]
    main = _compiled(qdq)
    with torch.inference_mode():
        fp32 = np.concatenate([module(torch.from_numpy(x)).numpy() for x in images])
    simulated = np.concatenate([simulate(qdq, x) for x in images])
    int8 = np.concatenate([main(tvm.runtime.tensor(x)).numpy() for x in images])
    return Network(name, mod, qdq, images, fp32, simulated, int8)


def _same_class(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.sum(first.argmax(1) == second.argmax(1)))


# One test a network, not three: each is built once, whichever worker gets it.
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, record_property) -> None:
    network = _network(name)
    _runs_in_integers(network)
    record_property("accuracy", _whole_network_is_as_good_as_its_qdq_graph(network))
    record_property("layers", _each_layer_is_within_rounding_and_as_good_as_simulated(network))


def _whole_network_is_as_good_as_its_qdq_graph(network: Network) -> str:
    quantization = graphs.sqnr(network.fp32, network.simulated)
    ours = graphs.sqnr(network.fp32, network.int8)
    execution = graphs.sqnr(network.simulated, network.int8)
    top1 = _same_class(network.fp32, network.int8), _same_class(network.fp32, network.simulated)
    line = (
        f"{network.name}: SQNR against fp32 torch {ours:.1f} dB, simulated {quantization:.1f} dB; "
        f"against the simulated graph {execution:.1f} dB; "
        f"top-1 as torch {top1[0]} of {INPUTS}, simulated {top1[1]}"
    )
    print(line)
    assert ours > quantization - 3
    assert execution > quantization
    assert top1[0] >= top1[1] - 1
    # The classes the two int8 runs disagree on are near ties: one image in eight at most.
    assert _same_class(network.simulated, network.int8) >= INPUTS - 1
    return line


def _each_layer_is_within_rounding_and_as_good_as_simulated(network: Network) -> str:
    steps = {
        var.name: value
        for var, value in graphs.bindings(network.qdq)
        if graphs.op_name(value) == "quantize"
    }
    main = _compiled(instrument(network.qdq, list(steps)))
    x = network.images[0]
    outputs = main(tvm.runtime.tensor(x))
    actual = {name: out.numpy() for name, out in zip(steps, outputs[1:], strict=True)}

    # Step by step on the library's own values.
    _, computed = simulate(network.qdq, x, trace=True, forced=actual)
    for name, value in actual.items():
        difference = np.abs(value.astype(int) - computed[name].astype(int))
        assert difference.max() <= 1, f"{name}: off by {difference.max()}"
        assert np.mean(difference > 0) <= 1e-3, f"{name}: {np.mean(difference > 0):.2%} off by 1"

    # Per convolution, free running.
    _, fp32 = simulate(prepare(network.mod), x, trace=True)
    _, simulated = simulate(network.qdq, x, trace=True)
    report = []
    for layer, stored in stored_tensors(network.qdq).items():
        tensor = stored.removesuffix("_dq")
        if f"{tensor}_q" in actual:
            scale, zero_point = (arg.value.numpy() for arg in steps[f"{tensor}_q"].args[1:])
            ours = (actual[f"{tensor}_q"].astype("float32") - float(zero_point)) * scale
        else:
            ours = outputs[0].numpy()
        want = graphs.sqnr(fp32[tensor], simulated[stored])
        have = graphs.sqnr(fp32[tensor], ours)
        report.append(f"{layer} {have:.1f} ({want:.1f})")
        assert have > want - 3, f"{layer}: {have:.1f} dB, simulated {want:.1f} dB"
    print(f"{network.name}, dB per layer (simulated): " + ", ".join(report))
    return ", ".join(report)


def _runs_in_integers(network: Network) -> None:
    explanation = topi_int8.explain(network.qdq, topi_int8.host_target(), show=False)
    convolutions = graphs.count(prepare(network.mod))["nn.conv2d"]
    assert sum(isinstance(row.work, Conv2dWorkload) for row in explanation) == convolutions
    assert all(row.work.data_dtype in ("uint8", "int8") for row in explanation)
