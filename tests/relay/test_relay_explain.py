"""relay/explain.py: what it says of each operator is what relay.build compiles, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.relay.backend import te_compiler

import topi_int8
from tests.relay import qnn_models
from tests.relay.arm_graph import TARGETS as ARM
from topi_int8 import explain, library_counts
from topi_int8.explanation import Explanation, Other, Row
from topi_int8.relay.strategy import SUFFIX
from topi_int8.workload import MatmulWorkload

HASWELL, CASCADELAKE = "llvm -mcpu=haswell", "llvm -mcpu=cascadelake"
RNG = np.random.default_rng(4)


def module(out: relay.Expr) -> tvm.IRModule:
    function = relay.Function(relay.analysis.free_vars(out), out)
    return relay.transform.InferType()(tvm.IRModule.from_expr(function))


def integers(*shape: int, high: int = 127, dtype: str = "int8") -> np.ndarray:
    values = RNG.integers(-high, high + 1, shape).astype(dtype)
    values.flat[0], values.flat[1] = -high, high  # the range is what the strategies look at
    return values


def var(*shape: Any, dtype: str = "uint8", name: str = "x") -> relay.Var:
    return relay.var(name, shape=shape, dtype=dtype)


def conv(data: relay.Expr, weight: Any, **attrs: Any) -> relay.Expr:
    if isinstance(weight, np.ndarray):
        oc, _, *kernel = weight.shape
        attrs = {"channels": oc, "kernel_size": kernel, **attrs}
        weight = relay.const(weight)
    return relay.nn.conv2d(data, weight, **{"out_dtype": "int32", **attrs})


def float_conv(data: relay.Expr) -> relay.Expr:
    weight = RNG.normal(size=(16, 16, 3, 3)).astype("float32")
    return conv(data, weight, out_dtype="float32")


def small() -> tvm.IRModule:
    """A stem, a depthwise, a pointwise and a dense layer, in QNN."""
    net = qnn_models.Network()
    data = net.input(2, 16)
    x = net.conv(data, 3, 32, 3, 2)
    x = net.conv(net.conv(x, 32, 32, 3, groups=32), 32, 48, 1)
    return module(net.classify(x, 48, 10))


def quiet(mod: tvm.IRModule, target: Any = HASWELL, **more: Any) -> Explanation:
    return explain(mod, target, show=False, **more)


def refused(found: Explanation) -> list[Other]:
    return [other for other in found.others if other.note.startswith("NOT OURS")]


@pytest.fixture(scope="module")
def explained() -> Explanation:
    return quiet(small())


# ---- what is said is what is built


def spans(name: str) -> Callable[[tvm.IRModule], tvm.IRModule]:
    """Return what gives the convolutions and matmuls of a module spans, as importers do."""

    class Spans(relay.ExprMutator):
        count = 0

        def visit_call(self, call: relay.Call) -> relay.Expr:
            call = super().visit_call(call)
            if call.op.name not in ("qnn.conv2d", "qnn.dense"):
                return call
            text = name.format(self.count)
            self.count += 1
            span = relay.Span(relay.SourceName(text), 0, 0, 0, 0)
            return relay.Call(call.op, call.args, call.attrs, call.type_args, span)

    return lambda mod: module(Spans().visit(mod["main"].body))


def elements(tensor: Any) -> int:
    return int(np.prod([int(extent) for extent in tensor.shape]))


def key(row: Row) -> tuple[str, int, int]:
    """Return a row's implementation, and the elements of its data and output."""
    w = row.work
    if isinstance(w, MatmulWorkload):
        return row.strategy, w.batch * w.m * w.k, w.batch * w.m * w.n
    return row.strategy, w.n * w.ic * w.ih * w.iw, w.n * w.oc * w.oh * w.ow


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str, int, int]]]:
    """What TVM's TE compiler selects for integer convolutions and matmuls, as it selects it."""
    found: set[tuple[str, str, int, int]] = set()
    select = te_compiler.select_implementation

    def watched(op: Any, attrs: Any, inputs: Any, out_type: Any, *rest: Any, **more: Any) -> Any:
        implementation, outs = select(op, attrs, inputs, out_type, *rest, **more)
        anchor = any(name in op.name for name in ("conv2d", "dense", "batch_matmul"))
        # Upstream's AlterOpLayout asks too, of calls that it then rewrites.
        compiled = inspect.currentframe().f_back.f_code.co_name == "lower_call"
        if compiled and anchor and "int" in str(inputs[0].dtype):
            sizes = elements(inputs[0]), elements(out_type)
            found.add((op.name, implementation.name, *sizes))
        return implementation, outs

    monkeypatch.setattr(te_compiler, "select_implementation", watched)
    yield found


NETWORKS: dict[str, tuple[Callable[[], tvm.IRModule], str]] = {
    "resnet18": (lambda: qnn_models.resnet(18, size=32), CASCADELAKE),
    "branches": (lambda: qnn_models.branches(size=12), HASWELL),
    "branches_nhwc": (
        lambda: qnn_models.branches(qnn_models.Network("NHWC"), size=12), CASCADELAKE,
    ),
    "small": (small, "llvm"),
    "small_neon": (small, ARM["neon"]),
    "small_dotprod": (small, ARM["neon_dotprod"]),
    "small_armv7": (small, ARM["armv7_neon"]),
}  # fmt: skip
# How many calls are ours; networks that are not named have four.
OURS = {"resnet18": 21, "branches": 7, "branches_nhwc": 7}


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_what_the_te_compiler_selects(name: str, selected: set) -> None:
    make, target = NETWORKS[name]
    mod = make()
    found = quiet(mod, target)
    with tvm.transform.PassContext(opt_level=3):
        relay.build(mod, target)
    # TVM compiles equal calls once, so sets are compared.
    assert {key(row) for row in found} == {s[1:] for s in selected if s[1].endswith(SUFFIX)}
    upstream = {s[0] for s in selected if not s[1].endswith(SUFFIX)}
    assert {other.op for other in refused(found)} == upstream
    assert len(found) == OURS.get(name, 4)


# ---- rows


def test_rows_say_what_each_operator_is(explained: Explanation) -> None:
    stem, _, pointwise, dense = explained
    assert [row.name for row in explained] == ["conv2d_0", "conv2d_1", "conv2d_2", "dense_0"]
    assert [row.op for row in explained] == ["conv2d", "depthwise", "conv2d", "matmul"]
    assert stem.shape.startswith("3x3s2 4-32") and pointwise.shape == "1x1 32-48 @8x8 n2"
    assert pointwise.macs == 2 * 8 * 8 * 32 * 48
    assert {row.dtypes for row in explained} == {"uint8 int8 int32"}  # though avx2 reads int16
    assert stem.data_layout == "NCHW4c" and stem.out_layout == "NCHW16c"
    assert pointwise.data_layout == pointwise.out_layout == "NCHW16c"
    assert dense.data_layout == "row-major"
    assert stem.intrinsic == dense.intrinsic == "dot_1x8x2_s16s16s32_avx2"
    assert explained.strategies() == {
        "conv2d_nchwc_avx2.topi_int8": 2, "depthwise_nchwc.topi_int8": 1,
        "matmul_avx2.topi_int8": 1,
    }  # fmt: skip


def test_reasons_know_the_values_of_packed_weights() -> None:
    data = var(1, 16, 8, 8)
    wide = quiet(module(conv(data, integers(16, 16, 1, 1)))).rows[0]
    reasons = dict(wide.declined)
    assert reasons["conv2d_nchwc_avx512_vnni"] == "target lacks avx512_vnni"
    assert "weights span [-127, 127]" in reasons["conv2d_nchwc_avx2_7bit"]
    narrow = quiet(module(conv(data, integers(16, 16, 1, 1, high=64)))).rows[0]
    assert narrow.strategy == "conv2d_nchwc_avx2_7bit.topi_int8"
    assert "conv2d_nchwc_avx2_7bit" not in dict(narrow.declined)


def test_names_are_those_of_importers() -> None:
    found = quiet(spans("features.{}/Conv")(small()))
    assert [row.name for row in found] == [f"features.{i}/Conv" for i in range(4)]


def test_spans_that_several_calls_share_are_no_names() -> None:
    found = quiet(spans("from_string")(small()))
    assert [row.name for row in found] == ["conv2d_0", "conv2d_1", "conv2d_2", "dense_0"]


PACKED_EARLY = "weight packed at compile time"


def test_weights_that_are_inputs_are_packed_at_run_time() -> None:
    weight = var(16, 16, 3, 3, dtype="int8", name="w")
    mod = module(conv(var(1, 16, 8, 8), weight))
    (row,) = quiet(mod)
    assert row.strategy == "conv2d_nchwc_avx2.topi_int8" and row.data_layout == "NCHW"
    assert dict(row.declined)[PACKED_EARLY] == "the weight is no constant: packed at run time"
    (bound,) = quiet(mod, params={"w": tvm.nd.array(integers(16, 16, 3, 3, high=50))})
    assert bound.strategy == "conv2d_nchwc_winograd_avx2.topi_int8"
    assert bound.data_layout == "NCHW16c" and PACKED_EARLY not in dict(bound.declined)


def test_batched_matmuls_are_packed_at_run_time() -> None:
    a, b = var(4, 8, 16), var(4, 24, 16, dtype="int8", name="y")
    (row,) = quiet(module(relay.nn.batch_matmul(a, b, out_dtype="int32")))
    assert row.name == "batch_matmul_0" and row.shape == "4x8x16x24"
    assert dict(row.declined)[PACKED_EARLY].endswith("packed at run time")


def test_relays_own_quantization() -> None:
    mod = module(float_conv(var(1, 16, 8, 8, dtype="float32")))
    with relay.quantize.qconfig(
        calibrate_mode="global_scale", global_scale=8.0, skip_conv_layers=[], do_simulation=False
    ):
        quantized = relay.quantize.quantize(mod)
    assert len(quiet(mod)) == 0
    (row,) = quiet(quantized)
    assert row.work.data_dtype == "int8" and row.strategy == "conv2d_nchwc_winograd_avx2.topi_int8"


# ---- what is not ours


def _transposed() -> relay.Expr:
    weight = relay.const(integers(8, 4, 2, 2))
    return relay.nn.conv2d_transpose(
        var(1, 8, 6, 6, dtype="int8"), weight, channels=4, kernel_size=(2, 2), out_dtype="int32"
    )


def _qnn_grouped() -> relay.Expr:
    """Return a convolution with groups and a zero point of the weight, which QNN subtracts."""
    three, one = relay.const(3, "int32"), relay.const(1.0)
    return relay.qnn.op.conv2d(
        var(1, 32, 8, 8), relay.const(integers(32, 8, 3, 3)), three, three, one, one,
        kernel_size=(3, 3), channels=32, groups=4,
    )  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], relay.Expr], str, str]] = {
    "dynamic": (
        lambda: conv(var(relay.Any(), 16, 8, 8), integers(16, 16, 3, 3)),
        "nn.conv2d", "a dimension is not known at compile time",
    ),
    "int64 sums": (
        lambda: conv(var(1, 16, 8, 8), integers(16, 16, 1, 1), out_dtype="int64"),
        "nn.contrib_conv2d_NCHWc", "sums are int64, ours int32",
    ),
    "int16 data": (
        lambda: conv(var(1, 16, 8, 8, dtype="int16"), integers(16, 16, 1, 1, dtype="int16")),
        "nn.contrib_conv2d_NCHWc", "operands are ('int16', 'int16')",
    ),
    "layout": (
        lambda: conv(var(8, 8, 32, 1, dtype="int8"), integers(3, 3, 32, 16), channels=16,
                     kernel_size=(3, 3), data_layout="HWCN", kernel_layout="HWIO"),
        "nn.conv2d", "data is HWCN and weight HWIO",
    ),
    "conv1d": (
        lambda: relay.nn.conv1d(var(1, 8, 32), relay.const(integers(8, 8, 3)), out_dtype="int32"),
        "nn.conv1d", "nn.conv1d is none of nn.conv2d",
    ),
    "conv3d": (
        lambda: relay.nn.conv3d(
            var(1, 8, 6, 6, 6), relay.const(integers(8, 8, 3, 3, 3)), out_dtype="int32",
            channels=8, kernel_size=(3, 3, 3),
        ),
        "nn.conv3d", "nn.conv3d is none of nn.conv2d",
    ),
    "transposed": (_transposed, "nn.conv2d_transpose", "nn.conv2d_transpose is none of nn.conv2d"),
    "lowered by QNN": (
        _qnn_grouped, "nn.conv2d", "operands are ('int32', 'int32'), as Relay lowers this qnn.conv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_integer_calls_that_are_not_ours_are_named(name: str) -> None:
    make, op, reason = REFUSED[name]
    found = quiet(module(make()))
    assert len(found) == 0
    (other,) = refused(found)
    assert other.op == op and other.count == 1
    assert other.note.startswith(f"NOT OURS: {reason}"), other.note
    kind = op.removeprefix("nn.").replace("contrib_conv2d_NCHWc", "conv2d")
    assert other.note.endswith(f": {kind}_0")


def test_calls_of_one_reason_stand_together() -> None:
    x = conv(var(1, 16, 8, 8), integers(16, 16, 1, 1))
    x = conv(relay.cast(x, "int16"), integers(16, 16, 1, 1, dtype="int16"))
    x = conv(relay.cast(x, "int16"), integers(16, 16, 1, 1, dtype="int16"))
    found = quiet(module(x))
    assert [row.name for row in found] == ["conv2d_0"]
    (other,) = refused(found)
    assert other.count == 2 and other.note.endswith(": conv2d_1, conv2d_2")


def test_float_operators_are_counted() -> None:
    x = float_conv(float_conv(var(1, 16, 8, 8, dtype="float32")))
    found = quiet(module(relay.nn.softmax(relay.nn.batch_flatten(x))))
    assert len(found) == 0 and refused(found) == []
    others = {other.op: other for other in found.others}
    assert others["nn.contrib_conv2d_NCHWc"].count == 2
    assert others["nn.contrib_conv2d_NCHWc"].note.startswith("float32")
    assert others["nn.softmax"].count == 1


def test_layout_changes_are_counted_with_their_price(explained: Explanation) -> None:
    (other,) = (other for other in explained.others if other.op == "layout_transform")
    assert other.count >= 2 and "a pass over the tensor" in other.note


def test_functions_of_other_compilers_are_theirs() -> None:
    mod = module(conv(var(1, 16, 8, 8), integers(16, 16, 1, 1)))
    theirs = mod["main"].with_attr("Compiler", "dnnl").with_attr("Primitive", 1)
    theirs = theirs.with_attr("global_symbol", "dnnl_0")
    data = var(1, 16, 8, 8)
    mod = tvm.IRModule({"dnnl_0": theirs})
    mod["main"] = relay.Function([data], relay.Call(mod.get_global_var("dnnl_0"), [data]))
    found = quiet(relay.transform.InferType()(mod))
    assert found.rows == ()
    assert [(other.op, other.note) for other in found.others] == [("function", "given to dnnl")]


# ---- printing


def test_the_whole_text(explained: Explanation) -> None:
    text = str(explained)
    assert "topi_int8 on llvm (avx2)" in text
    for piece in ("conv2d_nchwc_avx2.topi_int8", "dot_1x8x2_s16s16s32_avx2", "1x1 32-48 @8x8 n2",
                  "target lacks amx_int8", "layout_transform", "NCHW4c > NCHW16c", "dense_0",
                  "why a faster strategy declined", "left to TVM"):  # fmt: skip
        assert piece in text, piece


def test_show_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    mod = module(conv(var(1, 16, 8, 8), integers(16, 16, 1, 1)))
    silent = quiet(mod)
    assert capsys.readouterr().out == ""
    explain(mod, HASWELL)
    assert capsys.readouterr().out == str(silent)


# ---- the arguments


def test_the_module_is_not_changed() -> None:
    mod = module(conv(var(1, 16, 8, 8), var(16, 16, 1, 1, dtype="int8", name="w")))
    before, text = tvm.ir.structural_hash(mod), str(mod)
    quiet(mod, params={"w": integers(16, 16, 1, 1)})
    assert tvm.ir.structural_hash(mod) == before and str(mod) == text


@pytest.mark.parametrize("target", [{"kind": "llvm", "mcpu": "haswell"}, tvm.target.Target("llvm")])
def test_target_as_dict_or_object_and_module_as_function(target: Any) -> None:
    mod = module(conv(var(1, 16, 8, 8), integers(16, 16, 1, 1)))
    assert len(quiet(mod["main"], target)) == 1


@pytest.mark.parametrize("target", ["c", "nothing"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"target is c.*allowed: targets of kind llvm|nothing"):
        quiet(small(), target)


def test_there_is_nothing_to_explain_while_disabled() -> None:
    with topi_int8.disabled(), pytest.raises(ValueError, match="is disabled"):
        quiet(small())


# ---- library_counts


def _executor(name: str) -> Callable[[tvm.IRModule, str], Any]:
    def build(mod: tvm.IRModule, target: str) -> Any:
        with tvm.transform.PassContext(opt_level=3):
            if name == "vm":
                return relay.vm.compile(mod, target)
            executor = relay.backend.Executor("aot" if name == "aot" else "graph")
            built = relay.build(mod, target, executor=executor)
            return built.get_lib() if name == "module" else built

    return build


@pytest.mark.parametrize("executor", ["graph", "aot", "vm", "module"])
def test_instructions_of_each_executor(executor: str) -> None:
    mod = module(conv(var(1, 16, 8, 8), integers(16, 16, 1, 1)))
    counts = library_counts(_executor(executor)(mod, CASCADELAKE))
    assert counts.instructions.keys() == {"vpdpbusd"} and counts.instructions["vpdpbusd"] > 0
    assert counts.dtypes["i8"] > 0 and counts.dtypes["i32"] > 0


def test_instructions_of_each_target() -> None:
    mod = module(conv(var(1, 16, 8, 8), integers(16, 16, 1, 1)))
    build = _executor("graph")
    assert library_counts(build(mod, HASWELL)).instructions.keys() == {"vpmaddwd"}
    assert library_counts(build(mod, ARM["neon_dotprod"])).instructions.keys() == {"sdot"}
    with topi_int8.disabled():  # upstream's saturate
        assert "vpmaddubsw" in library_counts(build(mod, HASWELL)).instructions


def test_counting_what_is_no_llvm_library(tmp_path: Any) -> None:
    built = _executor("graph")(module(relay.nn.relu(var(3, 4, dtype="float32"))), HASWELL)
    built.export_library(str(tmp_path / "lib.so"))
    with pytest.raises(ValueError, match="allowed: one with an llvm module"):
        library_counts(tvm.runtime.load_module(str(tmp_path / "lib.so")))
