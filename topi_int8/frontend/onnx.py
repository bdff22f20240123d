"""ONNX models into Relax by TVM's own importer, with the quantized operators that it lacks.

TVM's importer looks its converters up in one function of a module. Replacing that, even for the
time of a call, would change what every other user of the process gets; so its class is derived
from, and nothing of TVM's is touched. The derived importer asks our tables first
(`_onnx_quantized`, `_onnx_integer`), resolves ``auto_pad`` and arithmetic on shapes where those
are known, and gives the variable of each node the node's name, which is what `explain` prints.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.ir import Op

from . import _onnx_integer, _onnx_quantized
from ._onnx_node import Node, known_shape, with_explicit_pads
from .quantized import is_quantized

if TYPE_CHECKING:
    import onnx

_CONVERTERS = {**_onnx_quantized.CONVERTERS, **_onnx_integer.CONVERTERS}
_HANDLED = {"If", "Constant"}  # by the importer itself
_PRODUCTS = {"conv1d", "conv2d", "conv3d", "matmul"}


def from_onnx(
    model: onnx.ModelProto | str | PathLike[str],
    shape_dict: Mapping[str, Sequence[int]] | None = None,
    opset: int | None = None,
) -> tvm.IRModule:
    """Return an ONNX model as a Relax IRModule with its parameters bound as constants.

    Every quantized form is taken: QDQ, QOperator (QLinearConv, QLinearMatMul, and com.microsoft's
    QLinearAdd, QGemm, ..), integers (ConvInteger, MatMulInteger) and dynamic quantization. They
    arrive as ``relax.quantize``/``dequantize`` around float operators, or as int32 convolutions and
    matmuls of 8-bit integers, which FuseQDQ turns into integer kernels.

    Parameters
    ----------
    model : onnx.ModelProto or path
        A path is loaded with its external data.
    shape_dict : mapping of str to sequence of int, optional
        Shapes of inputs, where the model leaves dimensions open. Convolutions of symbolic shape are
        not made integer.
    opset : int, optional
        Of the ai.onnx operators, instead of the model's own.

    Returns
    -------
    tvm.IRModule
        One function ``main``; its variables have the names of the model's nodes (of a node without
        a name, its first output's), dots become underscores.

    Raises
    ------
    TypeError
        ``model`` is neither a ModelProto nor a path.
    ValueError
        ``shape_dict`` names no input of the model, or a node's attributes or operands are none that
        can be converted; a note names the node.
    tvm.error.OpNotImplemented
        The model has operators without a converter.
    """
    import onnx

    if isinstance(model, str | PathLike):
        model = onnx.load(model)
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model is {type(model).__name__}; allowed: an onnx.ModelProto or a path")
    shapes = {name: [int(dim) for dim in shape] for name, shape in (shape_dict or {}).items()}
    inputs = [entry.name for entry in model.graph.input]
    for name in shapes:
        if name not in inputs:
            raise ValueError(f"shape_dict has {name!r}; allowed: {', '.join(inputs)}")
    if opset is None:
        versions = {entry.domain: entry.version for entry in model.opset_import}
        opset = versions.get("", versions.get("ai.onnx", 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Renaming name", category=UserWarning)
        mod = _importer()(shapes, None).from_onnx(model.graph, opset)
    mod["main"] = _with_named_output(mod["main"])
    # Constants' reshapes and transposes done, as `quantize` wants them. Not where it is quantized:
    # folding would make float32 weights of int8 ones.
    return mod if is_quantized(mod) else relax.transform.FoldConstant()(mod)


def _with_named_output(func: relax.Function) -> relax.Function:
    """Return a function whose one result has the name of the variable that it copies.

    CanonicalizeBindings leaves of the two the result's variable, and that is called "gv".
    """
    *blocks, last = func.body.blocks
    *bindings, final = last.bindings
    if not (final.var.same_as(func.body.body) and isinstance(final.value, relax.Var)):
        return func
    named = relax.Var(final.value.name, final.var.ty)
    block = type(last)([*bindings, relax.VarBinding(named, final.value)])
    body = relax.SeqExpr([*blocks, block], named)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


@functools.cache
def _importer() -> type:
    """Return the importer's class; TVM's, its base, cannot be imported without onnx."""
    from tvm.relax.frontend.onnx import onnx_frontend

    stock = onnx_frontend._get_convert_map()

    class Importer(onnx_frontend.ONNXGraphImporter):
        """TVM's importer with our converters, and names."""

        _name: str | None = None  # of the node that is converted; None inside a branch of an If

        def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
            unknown = Counter(
                node.op_type for node in graph.node
                if node.op_type not in {*stock, *_CONVERTERS, *_HANDLED}
            )  # fmt: skip
            if unknown:
                counts = ", ".join(f"{op} ({count})" for op, count in sorted(unknown.items()))
                raise tvm.error.OpNotImplemented(f"operators without a converter: {counts}")

        def _construct_nodes(self, graph: onnx.GraphProto) -> None:
            for node in graph.node:
                self._name = node.name or next(iter(node.output), "") or node.op_type
                super()._construct_nodes(_OneNode(node))

        def _convert_subgraph(self, bb: relax.BlockBuilder, graph: onnx.GraphProto) -> Any:
            outer, self._name = self._name, None
            try:
                return super()._convert_subgraph(bb, graph)
            finally:
                self._name = outer

        def _convert_operator(
            self, op_name: str, inputs: list, attrs: dict[str, Any], opset: int
        ) -> relax.Expr:
            def convert(op: str, inputs: Sequence, attrs: Mapping[str, Any]) -> relax.Expr:
                attrs = {**attrs, "tvm_custom": custom}
                if op == "Conv":
                    attrs = with_explicit_pads(inputs[0], inputs[1], attrs)
                if op == "Gather":
                    inputs = [known_shape(*inputs), inputs[1]]
                known = onnx_frontend.onnx_input(inputs)
                return stock[op].get_converter(opset)(
                    self.bb, known, attrs, [self._nodes, self._params]
                )

            custom = attrs.get("tvm_custom", {})
            try:
                if op_name in _CONVERTERS:
                    plain = {key: value for key, value in attrs.items() if key != "tvm_custom"}
                    node = Node(op_name, list(inputs), plain, convert, self._inner)
                    made = _CONVERTERS[op_name](node)
                else:
                    made = convert(op_name, inputs, attrs)
            except Exception as error:
                error.add_note(f"ONNX node {self._name or custom.get('name')!r} ({op_name})")
                raise
            return self._named(made, self._name)

        def _inner(self, made: relax.Expr) -> relax.Expr:
            """Return a part of what a node becomes; the product is what bears its name."""
            if self._name is None or not _is_operator(made):
                return self.bb.normalize(made)
            kind = str(made.op.name).rsplit(".", 1)[-1]
            name = self._name if kind in _PRODUCTS else f"{self._name}_{kind}"
            return self._named(made, name)

        def _named(self, made: Any, name: str | None) -> Any:
            """Return an expression typed; a tensor's as a variable of that name."""
            if not _is_operator(made) or name is None:
                return self.bb.normalize(made) if isinstance(made, relax.Expr) else made
            args = [self._inner(arg) if _is_operator(arg) else arg for arg in made.args]
            if not all(a.same_as(b) for a, b in zip(args, made.args, strict=True)):
                made = relax.Call(made.op, args, made.attrs, made.ty_args)
            typed = self.bb.normalize(made)
            is_tensor = isinstance(typed.ty, relax.TensorType)
            return self.bb.emit(typed, name_hint=name) if is_tensor else typed

    return Importer


class _OneNode:
    """As much of a graph as the importer's loop over nodes reads."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.node = [node]


def _is_operator(expr: Any) -> bool:
    """Return whether an expression is a call of a Relax operator (an arithmetic one is none)."""
    called = isinstance(expr, relax.Call) and isinstance(expr.op, Op)
    return called and str(expr.op.name).startswith("relax.")
