"""explain.py: each operator's strategy and reasons, what is left to TVM, what was really built."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from rich.console import Console
from tvm import relax

import topi_int8
from tests import graphs, reference
from topi_int8 import explain, library_counts, strategy
from topi_int8.explain import Explanation
from topi_int8.explanation import _ranges
from topi_int8.target import isa_target, named
from topi_int8.workload import Conv2dWorkload, Epilogue

NN = relax.op.nn
RNG = np.random.default_rng(2)


def integers(*shape: int, high: int = 127) -> relax.Expr:
    values = RNG.integers(-high, high + 1, shape).astype("int8")
    values.flat[0], values.flat[1] = -high, high  # the range is what the strategies look at
    return relax.const(values)


def module(build: Any, *types: tuple[tuple, str]) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(*t)) for i, t in enumerate(types)]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(bb.emit, *params))
        bb.emit_func_output(out)
    return bb.get()


def net() -> tvm.IRModule:
    """A stem, a 7-bit pointwise, a depthwise, a softmax, and a dense layer; raw integers."""

    def narrow(emit: Any, x: Any) -> Any:
        shifted = emit(relax.op.right_shift(x, relax.const(9, "int32")))
        return emit(relax.op.astype(emit(relax.op.clip(shifted, 0, 255)), "uint8"))

    def build(emit: Any, x: Any) -> Any:
        y = narrow(emit, emit(NN.conv2d(x, integers(32, 3, 3, 3), strides=2, padding=1,
                                        out_dtype="int32")))  # fmt: skip
        y = narrow(emit, emit(NN.conv2d(y, integers(48, 32, 1, 1, high=64), out_dtype="int32")))
        y = emit(NN.conv2d(y, integers(48, 1, 3, 3), groups=48, out_dtype="int32"))
        y = narrow(emit, emit(relax.op.sum(y, [2, 3])))
        logits = emit(relax.op.matmul(y, integers(48, 10), out_dtype="int32"))
        return emit(NN.softmax(emit(relax.op.astype(logits, "float32"))))

    return module(build, ((2, 3, 18, 20), "uint8"))


def quiet(mod: tvm.IRModule, isa: str) -> Explanation:
    return explain(mod, isa_target(isa), show=False)


# ---- rows


def test_rows_say_what_each_operator_is() -> None:
    found = quiet(net(), "avx2")
    assert len(found) == 4 and list(found) == list(found.rows)
    stem, pointwise, depthwise, dense = found
    assert [row.op for row in found] == ["conv2d", "conv2d", "depthwise", "matmul"]
    assert [row.shape for row in found] == [
        "3x3s2 3-32 @18x20 n2", "1x1 32-48 @9x10 n2", "3x3 48-48 @9x10 g48 n2", "2x48x10",
    ]  # fmt: skip
    assert stem.macs == 2 * 9 * 10 * 32 * 3 * 9
    assert pointwise.macs == 2 * 9 * 10 * 48 * 32
    assert depthwise.macs == 2 * 7 * 8 * 48 * 9
    assert dense.macs == 2 * 48 * 10
    assert stem.dtypes == "uint8 int8 int32"
    assert stem.data_layout == "NCHW4c" and stem.out_layout == "NCHW16c"
    assert pointwise.data_layout == pointwise.out_layout == "NCHW16c"
    assert dense.data_layout == "row-major"


@pytest.mark.parametrize(
    "isa, strategies",
    [
        ("amx_int8", ("amx_int8", "amx_int8")),
        ("avx512_vnni", ("avx512_vnni", "avx512_vnni")),
        ("avx_vnni", ("avx_vnni", "avx_vnni")),
        ("avx512_bw", ("avx512_bw", "avx512_bw_7bit")),
        ("avx2", ("avx2", "avx2_7bit")),
        ("generic", ("generic", "generic")),
    ],
)
def test_strategies_of_each_target(isa: str, strategies: tuple[str, str]) -> None:
    stem, pointwise, depthwise, dense = quiet(net(), isa)
    assert stem.strategy == f"conv2d_nchwc_{strategies[0]}"
    assert pointwise.strategy == f"conv2d_nchwc_{strategies[1]}"
    few = "avx512_vnni" if isa == "amx_int8" else strategies[0]  # the dense layer's rows
    assert dense.strategy == f"matmul_{few}"
    assert depthwise.strategy.startswith("depthwise_nchwc")
    assert quiet(net(), isa).strategies().total() == 4


def test_reasons_of_those_that_declined() -> None:
    stem, pointwise, *_ = quiet(net(), "avx2")
    reasons = dict(stem.declined)
    assert reasons["conv2d_nchwc_amx_int8"] == "target lacks amx_int8"
    assert "weights span [-127, 127]" in reasons["conv2d_nchwc_avx2_7bit"]
    assert "could saturate" in reasons["conv2d_nchwc_avx2_7bit"]
    assert "conv2d_nchwc_avx2" not in reasons and "conv2d_nchwc_generic" not in reasons
    assert "conv2d_nchwc_avx2_7bit" not in dict(pointwise.declined)
    assert quiet(net(), "amx_int8").rows[0].declined == ()


def test_rows_are_frozen() -> None:
    (row, *_) = quiet(net(), "generic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.strategy = "faster"  # type: ignore[misc]


# ---- what is left to TVM


def test_others_are_counted() -> None:
    others = {other.op: other for other in quiet(net(), "avx2").others}
    assert others["relax.nn.softmax"].count == 1
    assert others["relax.clip"].count == 3
    assert "plain schedule" in others["relax.nn.softmax"].note
    assert others["topi_int8.layout_transform"].count == 2
    assert quiet(net(), "avx2").naive == ()


def test_a_convolution_of_symbolic_shape_is_named_slow() -> None:
    def build(emit: Any, x: Any) -> Any:
        return emit(NN.conv2d(x, integers(8, 3, 3, 3), out_dtype="int32"))

    mod = module(build, ((tvm.tirx.Var("n", "int64"), 3, 8, 8), "uint8"))
    found = quiet(mod, "avx2")
    assert len(found) == 0
    (other,) = [o for o in found.others if o.op == "relax.nn.conv2d"]
    assert other.count == 1 and other.note.startswith("SLOW") and "symbolic" in other.note
    assert "SLOW" in str(found)


def test_transposed_convolutions_are_named_slow() -> None:
    weight = relax.const(np.ones((3, 4, 2, 2), "float32"))
    mod = module(
        lambda emit, x: emit(NN.conv2d_transpose(x, weight, strides=2)), ((1, 3, 8, 8), "float32")
    )
    notes = {other.op: other.note for other in quiet(mod, "avx2").others}
    assert notes["relax.nn.conv2d_transpose"].startswith("SLOW")


def test_float_convolutions_are_rows_too() -> None:
    weight = relax.const(RNG.normal(size=(8, 3, 3, 3)).astype("float32"))
    mod = module(lambda emit, x: emit(NN.conv2d(x, weight)), ((1, 3, 8, 8), "float32"))
    (row,) = quiet(mod, "avx2")
    assert row.strategy == "conv2d_nchwc_float32" and row.dtypes == "float32 float32 float32"


# ---- printing


def test_the_whole_text() -> None:
    text = str(quiet(net(), "avx2"))
    assert "llvm (avx2)" in text
    for piece in ("conv2d_nchwc_avx2_7bit", "dot_1x8x2_s16s16s32_avx2", "3x3s2 3-32 @18x20 n2",
                  "target lacks amx_int8", "relax.nn.softmax", "NCHW4c > NCHW16c",
                  "why a faster strategy declined", "left to TVM"):  # fmt: skip
        assert piece in text, piece


def test_show_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    silent = quiet(net(), "avx2")
    assert capsys.readouterr().out == ""
    explain(net(), isa_target("avx2"))
    assert capsys.readouterr().out == str(silent)


@pytest.mark.parametrize("width", [20, 40, 80, 300])
def test_tables_fit_a_narrow_terminal(width: int) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        for table in quiet(net(), "avx2").tables():
            console.print(table)
    lines = capture.get().splitlines()
    assert lines and max(map(len, lines)) <= width


def test_ranges_of_operators() -> None:
    assert _ranges(["0", "1", "2", "3", "7"]) == "0-3, 7"
    assert _ranges(["4"]) == "4"
    assert _ranges(["0", "2", "3", "9"]) == "0, 2-3, 9"


# ---- the argument


def test_the_module_is_not_changed() -> None:
    mod = net()
    before = tvm.ir.save_json(mod)
    quiet(mod, "avx2")
    assert tvm.ir.save_json(mod) == before


@pytest.mark.parametrize("target", ["llvm", {"kind": "llvm", "mcpu": "x86-64-v3"}])
def test_target_as_text_or_dict(target: Any) -> None:
    assert len(explain(net(), target, show=False)) == 4


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: targets of kind llvm"):
        explain(net(), {"kind": "cuda", "arch": "sm_80"}, show=False)


def test_no_convolutions_no_rows() -> None:
    mod = module(lambda emit, x: emit(NN.relu(x)), ((3, 4), "float32"))
    found = quiet(mod, "generic")
    assert len(found) == 0 and [other.op for other in found.others] == ["relax.nn.relu"]
    assert "relax.nn.relu" in str(found)


# ---- library_counts


@pytest.mark.parametrize(
    "isa, instruction, absent",
    [
        ("amx_int8", "tdpbusd", ()),
        ("avx512_vnni", "vpdpbusd", ("tdpbusd", "vpmaddubsw")),
        ("avx_vnni", "vpdpbusd", ("tdpbusd", "vpmaddubsw")),
        ("avx512_bw", "vpmaddwd", ("tdpbusd", "vpdpbusd")),
        ("avx2", "vpmaddwd", ("tdpbusd", "vpdpbusd")),
    ],
)
def test_instructions_of_each_target(isa: str, instruction: str, absent: tuple) -> None:
    counts = library_counts(tvm.compile(net(), isa_target(isa)))
    assert counts.instructions[instruction] > 0
    assert not counts.instructions.keys() & set(absent)
    assert counts.dtypes["i8"] > 0 and counts.dtypes["i32"] > 0


def test_seven_bits_show_in_the_instructions() -> None:
    counts = library_counts(tvm.compile(net(), isa_target("avx2")))
    assert counts.instructions["vpmaddubsw"] > 0  # the pointwise layer, and only it
    wide = module(
        lambda emit, x: emit(NN.conv2d(x, integers(32, 16, 3, 3), out_dtype="int32")),
        ((1, 16, 8, 8), "uint8"),
    )
    counts = library_counts(tvm.compile(wide, isa_target("avx2")))
    assert "vpmaddubsw" not in counts.instructions and counts.instructions["vpmaddwd"] > 0


def test_no_dot_instructions_when_we_are_disabled() -> None:
    weight = relax.const(RNG.normal(size=(16, 16, 3, 3)).astype("float32"))

    def build(emit: Any, x: Any) -> Any:
        y = emit(NN.relu(emit(NN.conv2d(x, weight, padding=1))))
        return emit(NN.conv2d(y, weight))

    mod = module(build, ((1, 16, 8, 8), "float32"))
    images = [RNG.normal(size=(1, 16, 8, 8)).astype("float32")]
    quantized = topi_int8.quantize(mod, images, progress=False)
    target = isa_target("avx512_vnni")
    with topi_int8.disabled():
        stock = library_counts(tvm.compile(quantized, target))
    ours = library_counts(tvm.compile(quantized, target))
    # TVM's own pipeline folds the quantized weights to float32 and computes in float.
    assert stock.instructions == {}
    assert ours.instructions["vpdpbusd"] > 20


def test_float_model_counts_no_dot_instructions() -> None:
    weight = relax.const(RNG.normal(size=(16, 16, 3, 3)).astype("float32"))
    mod = module(lambda emit, x: emit(NN.conv2d(x, weight)), ((1, 16, 8, 8), "float32"))
    counts = library_counts(tvm.compile(mod, isa_target("avx2")))
    assert counts.instructions == {} and counts.dtypes["float"] > 0


def test_counting_what_is_no_llvm_library() -> None:
    source = tvm.compile(module(lambda emit, x: emit(NN.relu(x)), ((3, 4), "float32")), "c")
    with pytest.raises(ValueError, match="allowed: one with an llvm module"):
        library_counts(source)


@pytest.mark.parametrize(
    ("core", "products"),
    [
        ("cortex-a72", {"smull", "smlal2", "sadalp"}),
        ("neoverse-n1", {"sdot"}),
        ("neoverse-v1", {"smmla"}),
        ("rpi2", {"vmull.s8", "vmlal.s8", "vpadal.s16"}),
    ],
)
def test_arms_products_are_those_on_vectors(core: str, products: set[str]) -> None:
    """Divisions by constants are smull and smmla of general registers: they do not count."""
    work = Conv2dWorkload(1, 64, 7, 8, 64, 1, 1, data_dtype="int8", weight_range=(-127, 127))
    func = strategy.conv2d(work, named(core)).kernel().func.with_attr("global_symbol", "main")
    counts = library_counts(tvm.compile(tvm.IRModule({"main": func}), target=named(core)))
    assert set(counts.instructions) == products


def test_activations_that_are_too_wide_are_named() -> None:
    """They run, in float, and it is said why."""
    rng, dtype = np.random.default_rng(0), "int16"
    weight = rng.integers(-127, 128, (8, 8, 3, 3)).astype("int8")

    def body(emit, x):
        one, zero = relax.const(np.float32(1e-4)), relax.const(np.array(0, dtype))
        q = emit(relax.op.quantize(x, one, zero, out_dtype=dtype))
        real = emit(relax.op.dequantize(q, one, zero))
        steps = relax.const(np.full(8, 0.01, "float32")), relax.const(np.zeros(8, "int8"))
        w = emit(relax.op.dequantize(relax.const(weight), *steps, axis=0))
        return emit(relax.op.nn.conv2d(real, w, padding=1))

    mod = graphs.build((1, 8, 10, 10), body)
    explanation = quiet(mod, "avx2")
    notes = {other.op: other.note for other in explanation.others}
    for name in ("relax.quantize", "relax.dequantize"):
        assert notes[name].startswith(f"SLOW: {dtype}, and float between: products of int16 with")
    assert all(row.work.is_float for row in explanation.rows)
    x = rng.uniform(-3, 3, (1, 8, 10, 10)).astype("float32")
    vm = relax.VirtualMachine(tvm.compile(mod, isa_target("avx2")), tvm.cpu())
    got = vm["main"](tvm.runtime.tensor(x)).numpy()
    work = Conv2dWorkload(1, 8, 10, 10, 8, 3, 3, padding=(1, 1, 1, 1), data_dtype="float32",
                          weight_dtype="float32", epilogue=Epilogue("float32"))  # fmt: skip
    real = (np.rint(x / np.float32(1e-4)) * 1e-4).astype("float32")
    want = reference.conv2d(work, real, weight.astype("float32") * np.float32(0.01))
    assert graphs.sqnr(want, got) > 80
