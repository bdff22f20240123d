"""override.py: every road of a CPU compile leads through our pipeline, and TVM comes back whole."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.backend import cpu_generic
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T
from tvm.target import Target

from topi_int8 import override
from topi_int8.override import disable, disabled, enable, is_enabled

CPU = {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "x86-64-v2"}


@I.ir_module
class Add:
    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        y = R.add(x, x)
        return y


@pytest.fixture(autouse=True)
def switched_off():
    """Every test starts with TVM as it was found, and leaves the switch as it was."""
    before = is_enabled()
    disable()
    yield
    assert not override._switch._blocks
    (enable if before else disable)()


@pytest.fixture
def compiled_for(monkeypatch) -> list[Target]:
    """The targets that our pipeline was asked for; it does what TVM's own would."""
    calls: list[Target] = []

    def pipeline(target: Target) -> tvm.transform.Pass:
        calls.append(target)
        return relax.pipeline.default_build_pipeline()

    room = ModuleType("topi_int8.transform.pipeline")
    room.pipeline = pipeline
    monkeypatch.setitem(sys.modules, room.__name__, room)
    return calls


def places() -> tuple:
    """Every object of TVM's that a compile looks its pipeline up in."""
    return (
        dict(relax.pipeline.PIPELINE_MAP),
        list(relax.pipeline.PIPELINE_MAP),
        relax.get_pipeline,
        relax.pipeline.get_pipeline,
        relax.get_default_pipeline,
        relax.pipeline.get_default_pipeline,
        dict(vars(cpu_generic)),
        dict(vars(cpu_generic.pipeline)),
        relax.build,
        tvm.compile,
    )


def same_objects(one: tuple, other: tuple) -> bool:
    def same(a, b) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
        return a == b if isinstance(a, list) else a is b

    return all(map(same, one, other))


def under_target(**keywords):
    with Target(CPU):
        return tvm.compile(Add, **keywords)


def through_default_pipeline():
    target = Target(CPU)
    return tvm.compile(Add, target, relax_pipeline=relax.get_default_pipeline(target))


def imported_by_name():
    from tvm.relax.backend.cpu_generic.pipeline import get_default_pipeline

    target = Target(CPU)
    return tvm.compile(Add, target, relax_pipeline=get_default_pipeline(target))


ROADS = {
    "compile_target": lambda: tvm.compile(Add, Target(CPU)),
    "compile_named_default": lambda: tvm.compile(Add, Target(CPU), relax_pipeline="default"),
    "compile_under_target": under_target,
    "relax_build": lambda: relax.build(Add, Target(CPU)),
    "get_pipeline": lambda: tvm.compile(
        Add, Target(CPU), relax_pipeline=relax.get_pipeline("default")
    ),
    "get_default_pipeline": through_default_pipeline,
    "get_default_pipeline_imported": imported_by_name,
}


def runs(executable: tvm.runtime.Executable) -> bool:
    x = np.arange(4, dtype="float32")
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    return np.array_equal(result.numpy(), x + x)


# ---- roads


@pytest.mark.parametrize("road", ROADS)
def test_every_road_takes_our_pipeline_for_its_target(compiled_for, road):
    enable()
    assert runs(ROADS[road]())
    assert [str(target) for target in compiled_for] == [str(Target(CPU))]


@pytest.mark.parametrize("road", ROADS)
def test_no_road_does_when_disabled(compiled_for, road):
    enable()
    disable()
    assert runs(ROADS[road]())
    assert compiled_for == []


@pytest.mark.parametrize("how", ["default", "text"])
def test_without_a_target_it_is_plain_llvm(compiled_for, how):
    enable()
    assert runs(tvm.compile(Add) if how == "default" else tvm.compile(Add, "llvm"))
    assert [str(target) for target in compiled_for] == [str(Target("llvm"))]


def test_a_pipeline_asked_for_by_another_name_is_left_alone(compiled_for):
    enable()
    assert runs(tvm.compile(Add, Target(CPU), relax_pipeline="default_build"))
    own = relax.pipeline.default_build_pipeline()
    assert runs(tvm.compile(Add, Target(CPU), relax_pipeline=own))
    assert compiled_for == []


def test_a_pass_obtained_before_disable_follows_the_switch(compiled_for):
    enable()
    kept = [relax.get_pipeline("default"), relax.get_default_pipeline(Target(CPU))]
    disable()
    for pipeline in kept:
        assert runs(tvm.compile(Add, Target(CPU), relax_pipeline=pipeline))
    assert compiled_for == []


def test_arguments_reach_tvms_own_factory():
    enable()
    with pytest.raises(TypeError, match="nonsense"):
        relax.get_pipeline("default", nonsense=1)


# ---- other targets


def lowered(mod: tvm.IRModule, pipeline: tvm.transform.Pass, target: Target) -> tvm.IRModule:
    with target:
        return pipeline(mod)


@pytest.mark.parametrize(
    "target", [{"kind": "cuda", "arch": "sm_80"}, "opencl", "c"], ids=["cuda", "opencl", "c"]
)
def test_other_kinds_are_left_to_tvm(compiled_for, target):
    target = Target(target, host="llvm")
    stock = lowered(Add, relax.get_pipeline("default"), target)
    enable()
    tvm.ir.assert_structural_equal(lowered(Add, relax.get_pipeline("default"), target), stock)
    assert compiled_for == []


def test_the_gpu_pipeline_is_the_very_same(compiled_for):
    target = Target({"kind": "cuda", "arch": "sm_80"}, host="llvm")
    stock = lowered(Add, relax.get_default_pipeline(target), target)
    enable()
    tvm.ir.assert_structural_equal(lowered(Add, relax.get_default_pipeline(target), target), stock)
    assert compiled_for == []


@I.ir_module
class OnTwoDevices:
    I.module_global_infos(
        {"vdevice": [I.vdevice("llvm"), I.vdevice({"kind": "cuda", "arch": "sm_80"})]}
    )

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        return x


@I.ir_module
class OnOneDevice:
    I.module_global_infos({"vdevice": [I.vdevice("llvm")]})

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        return x


@I.ir_module
class WithGpuKernel:
    @T.prim_func(s_tir=True)
    def kernel(a: T.Buffer((4,), "float32")):
        T.func_attr({"target": T.target({"kind": "cuda", "arch": "sm_80"})})
        a[0] = T.float32(0)

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        return x


@pytest.mark.parametrize(
    ("mod", "ours"),
    [(OnTwoDevices, False), (WithGpuKernel, False), (OnOneDevice, True), (Add, True)],
    ids=["two_devices", "gpu_kernel", "one_cpu_device", "plain"],
)
@pytest.mark.parametrize("by", ["name", "target"])
def test_a_module_partly_for_another_device_is_left_to_tvm(compiled_for, mod, ours, by):
    enable()
    target = Target(CPU)
    named = relax.get_pipeline("default")
    lowered(mod, named if by == "name" else relax.get_default_pipeline(target), target)
    assert len(compiled_for) == ours


# ---- the switch


@pytest.mark.parametrize("times", [1, 3])
def test_tvm_is_left_exactly_as_found(times):
    found = places()
    for _ in range(times):
        enable()
    assert is_enabled() and not same_objects(places(), found)
    for _ in range(times):
        disable()
    assert not is_enabled() and same_objects(places(), found)


def test_disable_without_enable_changes_nothing():
    found = places()
    disable()
    assert same_objects(places(), found)


def test_enabling_twice_wraps_once(compiled_for):
    enable()
    once = places()
    enable()
    assert same_objects(places(), once)


@pytest.mark.parametrize("before", [True, False], ids=["enabled", "disabled"])
def test_disabled_block_returns_to_what_was_before(before):
    found = places()
    (enable if before else disable)()
    outer = places()
    with disabled():
        assert same_objects(places(), found)
        with disabled():
            assert same_objects(places(), found)
        assert same_objects(places(), found)
    assert is_enabled() is before
    assert before or same_objects(places(), outer)


def test_disabled_block_returns_after_an_exception():
    enable()
    with pytest.raises(ZeroDivisionError), disabled():
        raise ZeroDivisionError
    assert is_enabled()


@pytest.mark.parametrize("before", [True, False], ids=["enabled", "disabled"])
def test_switching_inside_a_block_lasts_until_its_end(before):
    (enable if before else disable)()
    with disabled():
        enable()
        assert is_enabled()
        with disabled():
            assert not is_enabled()
        assert is_enabled()
        disable()
        assert not is_enabled()
    assert is_enabled() is before


def test_a_decorated_function_runs_disabled():
    enable()

    @disabled()
    def state() -> bool:
        return is_enabled()

    assert state() is False and state() is False and is_enabled()


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_blocks_of_two_threads(first_out):
    """The switch stays off until both are closed, in either order, and then returns."""
    enable()
    inside = [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]

    def hold(index: int) -> None:
        with disabled():
            inside[index].set()
            assert leave[index].wait(30)

    threads = []
    for index in (0, 1):  # thread 0 is inside first
        threads.append(threading.Thread(target=hold, args=(index,)))
        threads[-1].start()
        assert inside[index].wait(30)
    for count, index in enumerate((first_out, 1 - first_out)):
        assert not is_enabled(), count
        leave[index].set()
        threads[index].join(30)
    assert is_enabled()


def test_many_threads_leave_tvm_as_found():
    found = places()
    barrier = threading.Barrier(8)

    def churn() -> None:
        barrier.wait(30)
        for _ in range(200):
            enable()
            with disabled():
                disable()

    threads = [threading.Thread(target=churn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    disable()
    assert same_objects(places(), found)


def test_what_somebody_else_put_there_since_is_theirs():
    enable()
    found = relax.pipeline.PIPELINE_MAP["default"]
    theirs = lambda: found()  # noqa: E731 - an object with an identity
    relax.pipeline.PIPELINE_MAP["default"] = theirs
    try:
        disable()
        assert relax.pipeline.PIPELINE_MAP["default"] is theirs
        assert runs(tvm.compile(Add, Target(CPU)))
    finally:
        relax.pipeline.PIPELINE_MAP["default"] = relax.pipeline.PIPELINE_MAP["default_build"]
