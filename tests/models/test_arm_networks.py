"""Whole networks in int8 on ARM, under qemu: every tensor they store is x86's.

A network is quantized once and compiled for x86 with AVX2 and for an ARM core, both instrumented to
return each quantized tensor. Accumulators are int32 and exact on both, so what can differ is one
rounding of a requantization, where a compiler fuses a multiply and an add and the other does not.
Two statements, the second for when the first does not hold:

- running freely, every stored tensor is equal, to the bit;
- with each layer fed x86's own tensors (`cut`), its result is within 1 and all but one in a
  thousand are equal. Without the feeding, one early rounding changes everything after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests import graphs
from tests.emulator import arm, arm_rpc
from tests.emulator.arm_asm import beyond, disassembled
from topi_int8.quantize import instrument

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
models = pytest.importorskip("bench.models")
from_torch = pytest.importorskip("topi_int8.frontend.torch").from_torch

pytestmark = pytest.mark.model

IMAGE = 64
NETWORKS = ("resnet18", "mobilenet_v2")
CORES = {"neon": "cortex-a72", "neon_dotprod": "neoverse-n1", "neon_i8mm": "neoverse-v1"}
# What `make test` runs of the six.
SHORT = {("resnet18", "neon"), ("mobilenet_v2", "neon_i8mm")}
CASES = [
    pytest.param(name, isa, marks=() if (name, isa) in SHORT else pytest.mark.arm_full)
    for name in NETWORKS
    for isa in CORES
]


@dataclass(frozen=True)
class Reference:
    """A quantized network, and what x86 makes of an image: the result, then each stored tensor."""

    qdq: tvm.IRModule
    names: tuple[str, ...]
    image: np.ndarray
    tensors: tuple[np.ndarray, ...]


@functools.cache
def reference(name: str) -> Reference:
    """Quantize a network and run it on this machine."""
    module, example = models.load(name, image=IMAGE)
    calibration = [models.images(1, IMAGE, 100 + i) for i in range(4)]
    qdq = topi_int8.quantize(from_torch(module, example), calibration, progress=False)
    names = tuple(
        var.name for var, value in graphs.bindings(qdq) if graphs.op_name(value) == "quantize"
    )
    image = models.images(1, IMAGE, 200)
    tensors = compiled_here(instrument(qdq, names))(image)
    return Reference(qdq, names, image, tuple(tensors))


def compiled_here(mod: tvm.IRModule) -> Callable[..., list[np.ndarray]]:
    """Compile for x86, AVX2 at most; return ``main``, from arrays to arrays."""
    executable = tvm.compile(mod, target=topi_int8.host_target(max_isa="avx2"))
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return lambda *inputs: [out.numpy() for out in main(*map(tvm.runtime.tensor, inputs))]


def run_on(isa: str, mod: tvm.IRModule, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compile for the core of an instruction set and run under qemu, over RPC."""
    executable = tvm.compile(mod, target=topi_int8.target(CORES[isa]))
    with arm_rpc.session(arm.MACHINES[isa].cpu) as server:
        device = server.remote.cpu()
        vm = relax.VirtualMachine(server.load(executable, isa), device)
        vm.set_input("main", *(tvm.runtime.tensor(array, device) for array in inputs))
        vm.invoke_stateful("main")
        return [out.numpy() for out in vm.get_outputs("main")]


def cut(mod: tvm.IRModule, names: Sequence[str]) -> tvm.IRModule:
    """Return a module that computes each named tensor from given values of the others.

    ``main`` takes the image and the named tensors, and returns the result and the named tensors,
    each computed from those of its parameters that it depends on directly.
    """
    func = mod["main"]
    given = {
        var.name: relax.Var(f"given_{var.name}", var.ty)
        for var, _ in graphs.bindings(mod)
        if var.name in names
    }
    known: dict[relax.Var, relax.Expr] = {}
    computed: dict[str, relax.Expr] = {}

    def renamed(expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [renamed(a) for a in expr.args], expr.attrs, expr.ty_args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([renamed(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(renamed(expr.tuple_value), expr.index)
        return known.get(expr, expr) if isinstance(expr, relax.Var) else expr

    bb = relax.BlockBuilder()
    with bb.function("main", [*func.params, *(given[name] for name in names)]):
        with bb.dataflow():
            for var, value in graphs.bindings(mod):
                known[var] = bb.emit(renamed(value))
                if var.name in given:
                    computed[var.name] = known[var]
                    known[var] = given[var.name]
            results = [renamed(func.body.body), *(computed[name] for name in names)]
            out = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(out)
    return bb.get()


def differing(names: Sequence[str], want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict:
    """Name -> absolute differences of the tensors that are not equal; "result" is the first."""
    found = {}
    for name, x, y in zip(("result", *names), want, got, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, name
        if not np.array_equal(x, y):
            found[name] = np.abs(x.astype("float64") - y.astype("float64"))
    return found


@pytest.mark.arm
@pytest.mark.arm_full
def test_cut_computes_what_the_network_does() -> None:
    """On x86 alone: each layer, fed the tensors of a free run, gives these tensors again."""
    ref = reference("mobilenet_v2")
    main = compiled_here(cut(ref.qdq, ref.names))
    got = main(ref.image, *ref.tensors[1:])
    assert not differing(ref.names, ref.tensors, got)
    got = main(ref.image, *(np.zeros_like(tensor) for tensor in ref.tensors[1:]))
    # The first tensor is the image's; what reads a fed tensor has changed.
    changed = differing(ref.names, ref.tensors, got)
    assert ref.names[0] not in changed and len(changed) > len(ref.names) // 2


@pytest.mark.arm
@pytest.mark.parametrize(("name", "isa"), CASES)
def test_network_is_x86s(name: str, isa: str, record_property: Callable) -> None:
    reason = arm.problem(isa, rpc=True)
    if reason:
        pytest.skip(reason)
    ref = reference(name)
    got = run_on(isa, instrument(ref.qdq, ref.names), [ref.image])
    different = differing(ref.names, ref.tensors, got)
    where = f"{isa} on {arm.MACHINES[isa].cpu}"
    if not different:
        record_property("qemu", (where, f"{name}, equal in all stored tensors", len(got)))
        return
    print(f"{name} on {isa}: {len(different)} of {len(got)} tensors differ: {list(different)[:3]}")
    got = run_on(isa, cut(ref.qdq, ref.names), [ref.image, *ref.tensors[1:]])
    different = differing(ref.names, ref.tensors, got)
    if different.pop("result", None) is not None:
        np.testing.assert_allclose(got[0], ref.tensors[0], rtol=1e-5, atol=1e-5)
    for tensor, off in different.items():
        assert off.max() <= 1, f"{tensor}: off by {off.max()}"
        assert np.mean(off > 0) <= 1e-3, f"{tensor}: {np.mean(off > 0):.2%} off by 1"
    record_property("qemu", (where, f"{name}, each layer within one rounding", len(got)))


@pytest.mark.arm
@pytest.mark.arm_full
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_for_a_core_without_dotprod_holds_none(name: str, tmp_path) -> None:
    reason = arm.problem("neon")
    if reason:
        pytest.skip(reason)
    executable = tvm.compile(reference(name).qdq, target=topi_int8.target("cortex-a72"))
    lines = disassembled("neon", arm.export(executable, tmp_path / "network.so", "neon"))
    assert lines and not beyond("neon", lines)
