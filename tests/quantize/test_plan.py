"""Which tensors of a graph are quantized: one pair where a kernel stores, none inside a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tests import graphs
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.plan import Plan, make_plan

SHAPE = (1, 8, 6, 6)


def _const(*shape: int) -> relax.Expr:
    return relax.const(np.random.default_rng(0).normal(size=shape).astype("float32"))


def _conv(emit, x, oc: int = 8, k: int = 3, groups: int = 1):
    ic = int(x.ty.shape[1])
    weight = _const(oc, ic // groups, k, k)
    out = emit(op.nn.conv2d(x, weight, padding=k // 2, groups=groups), "conv")
    return emit(op.add(out, _const(1, oc, 1, 1)), "biased")


def _relu(emit, x, name: str = "relu"):
    return emit(op.nn.relu(x), name)


def _plan(body, skip: tuple[str, ...] = ()) -> tuple[set[str], Plan]:
    graph = Graph(prepare(graphs.build(SHAPE, body)))
    by_name = {var.name: var for var in graph.order}
    plan = make_plan(graph, [by_name[name] for name in skip])
    return {var.name for var in plan.tensors}, plan


def _groups(plan: Plan) -> set[frozenset[str]]:
    members: dict = {}
    for var in plan.tensors:
        members.setdefault(plan.representative(var).name, set()).add(var.name)
    return {frozenset(names) for names in members.values() if len(names) > 1}


def test_a_chain_stores_once_and_the_result_stays_float() -> None:
    def body(emit, x):
        return _conv(emit, _relu(emit, _conv(emit, x)))

    tensors, plan = _plan(body)
    assert tensors == {"x", "relu"}
    assert len(plan.computes) == len(plan.bias) == 2


def test_relu6_is_part_of_the_kernel() -> None:
    def body(emit, x):
        clipped = emit(op.clip(_conv(emit, x), 0.0, 6.0), "relu6")
        return _conv(emit, clipped, groups=8)

    assert _plan(body)[0] == {"x", "relu6"}


def test_residual_add_is_fused_and_only_the_other_operand_is_stored() -> None:
    def body(emit, x):
        first = _relu(emit, _conv(emit, x), "first")
        total = emit(op.add(_conv(emit, first), first), "total")
        return _conv(emit, _relu(emit, total, "last"))

    assert _plan(body)[0] == {"x", "first", "last"}


def test_of_two_convolutions_that_are_added_the_later_is_fused() -> None:
    def body(emit, x):
        first = _relu(emit, _conv(emit, x), "first")
        early = emit(op.nn.conv2d(first, _const(8, 8, 1, 1)), "early")
        late = emit(op.nn.conv2d(first, _const(8, 8, 1, 1)), "late")
        return _conv(emit, _relu(emit, emit(op.add(late, early)), "last"))

    # Layers are renamed by position: conv2d_1 is the early one, conv2d_2 the late one.
    assert _plan(body)[0] == {"x", "first", "conv2d_1", "last"}


def test_a_skipped_residual_producer_stays_float() -> None:
    def body(emit, x):
        side = _conv(emit, x)
        return _conv(emit, _relu(emit, emit(op.add(_conv(emit, x), side)), "last"))

    assert _plan(body)[0] == {"x", "biased", "last"}
    assert _plan(body, skip=("conv2d_0",))[0] == {"x", "last"}


def test_a_sum_of_two_convolutions_that_others_read_is_free_standing() -> None:
    def body(emit, x):
        a, b = _relu(emit, _conv(emit, x), "a"), _relu(emit, _conv(emit, x), "b")
        return _conv(emit, emit(op.add(a, b)))

    assert _plan(body)[0] == {"x", "a", "b", "add_0"}


@pytest.mark.parametrize(
    "move",
    [
        lambda x: op.nn.max_pool2d(x, (2, 2)),
        lambda x: op.permute_dims(x, [0, 1, 3, 2]),
        lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]),
        lambda x: op.reshape(x, (1, 8, 9, 4)),
    ],
    ids=["max_pool2d", "permute", "pad", "reshape"],
)
def test_what_moves_integers_shares_the_scale(move) -> None:
    def body(emit, x):
        return _conv(emit, emit(move(_relu(emit, _conv(emit, x))), "moved"))

    tensors, plan = _plan(body)
    assert len(tensors) == 3 and "relu" in tensors
    (group,) = _groups(plan)
    assert "relu" in group


def test_a_pad_with_another_value_is_not_moved_as_integers() -> None:
    def body(emit, x):
        padded = op.nn.pad(_relu(emit, _conv(emit, x)), [0, 0, 0, 0, 1, 1, 1, 1], pad_value=1.0)
        return _conv(emit, emit(padded, "padded"))

    assert _plan(body)[0] == {"x", "padded"}


def test_concat_and_split_share_one_scale() -> None:
    def body(emit, x):
        a, b = _relu(emit, _conv(emit, x), "a"), _relu(emit, _conv(emit, x), "b")
        both = emit(op.concat([a, b], 1))
        halves = emit(op.split(both, 2, 1), "halves")
        return _conv(emit, emit(halves[0], "half"))

    tensors, plan = _plan(body)
    assert tensors == {"x", "a", "b", "concat_0", "half"}
    assert _groups(plan) == {frozenset({"a", "b", "concat_0", "half"})}


def test_average_pool_has_scales_of_its_own_on_both_sides() -> None:
    def body(emit, x):
        mean = emit(op.mean(_relu(emit, _conv(emit, x)), [2, 3], keepdims=True))
        flat = emit(op.reshape(mean, (1, 8)), "flat")
        return emit(op.add(emit(op.matmul(flat, _const(8, 5))), _const(5)))

    tensors, plan = _plan(body)
    assert tensors == {"x", "relu", "mean_0", "flat"}
    assert _groups(plan) == {frozenset({"mean_0", "flat"})}


def test_operators_nobody_knows_stay_float() -> None:
    def body(emit, x):
        wave = emit(op.sin(_conv(emit, x)))
        return _conv(emit, emit(op.multiply(wave, wave), "square"))

    assert _plan(body)[0] == {"x", "square"}


def _silu(emit, x, name: str = "silu"):
    return emit(op.multiply(x, emit(op.sigmoid(x))), name)


def test_a_function_of_one_tensor_is_stored_before_and_after() -> None:
    def body(emit, x):
        return _conv(emit, _silu(emit, _conv(emit, x)))

    assert _plan(body)[0] == {"x", "biased", "silu"}


def test_a_function_follows_the_kernel_s_own_clip() -> None:
    def body(emit, x):
        return _conv(emit, emit(op.tanh(_relu(emit, _conv(emit, x))), "tanh"))

    assert _plan(body)[0] == {"x", "relu", "tanh"}


def test_squeeze_and_excitation() -> None:
    def body(emit, x):
        wide = _silu(emit, _conv(emit, x), "wide")
        gate = emit(op.sigmoid(_conv(emit, emit(op.mean(wide, [2, 3], keepdims=True), "m"), k=1)),
                    "gate")  # fmt: skip
        return _conv(emit, emit(op.multiply(gate, wide), "excited"))

    stored = {"x", "biased", "wide", "mean_0", "biased1", "gate", "excited"}
    assert _plan(body)[0] == stored


def test_a_batch_norm_before_its_convolution_reads_integers() -> None:
    def body(emit, x):
        both = emit(op.concat([_conv(emit, x), _relu(emit, _conv(emit, x))], 1), "both")
        scaled = emit(op.multiply(both, _const(1, 16, 1, 1)))
        return _conv(emit, _relu(emit, emit(op.add(scaled, _const(1, 16, 1, 1))), "norm"))

    tensors, plan = _plan(body)
    assert tensors == {"x", "biased", "relu", "concat_0", "norm"}
    assert _groups(plan) == {frozenset({"biased", "relu", "concat_0"})}


def test_functions_and_affines_that_end_in_a_sum() -> None:
    for addend in (relax.const(0.5), _const(1, 8, 1, 1)):

        def body(emit, x, addend=addend):
            wave = emit(op.multiply(_relu(emit, _conv(emit, x)), _const(8, 1, 1)))
            return _conv(emit, emit(op.add(wave, addend), "sum"))

        tensors = _plan(body)[0]
        assert len(tensors) == 3 and {"x", "relu"} < tensors


def test_a_function_of_what_stays_float_stays_float() -> None:
    def body(emit, x):
        return _conv(emit, emit(op.tanh(emit(op.sin(_conv(emit, x)))), "tanh"))

    assert _plan(body)[0] == {"x", "tanh"}


def test_a_matmul_of_two_activations_wants_the_second_symmetric() -> None:
    def body(emit, x):
        a = _relu(emit, _conv(emit, x), "a")
        b = emit(op.permute_dims(_relu(emit, _conv(emit, x), "b"), [0, 1, 3, 2]), "bt")
        return emit(op.matmul(a, b))

    tensors, plan = _plan(body)
    assert tensors == {"x", "a", "b", "bt"}
    symmetric = {var.name for var in plan.tensors if plan.representative(var) in plan.symmetric}
    assert symmetric == {"b", "bt"}


def test_a_spatial_constant_is_no_bias() -> None:
    def body(emit, x):
        conv = emit(op.nn.conv2d(x, _const(8, 8, 1, 1)))
        return _conv(emit, emit(op.add(conv, _const(6, 6)), "shifted"))

    tensors, plan = _plan(body)
    assert tensors == {"x", "shifted"} and len(plan.bias) == 1
