"""Calibration: run the fp32 graph over inputs and let observers watch its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..progress import track
from ..target import host_target
from .input_mean import InputMean
from .observer import Observer


def instrument(mod: tvm.IRModule, names: Sequence[str]) -> tvm.IRModule:
    """Return a module whose ``main`` returns a tuple: its result, then the tensors of those names.

    Parameters
    ----------
    mod : tvm.IRModule
        With a single dataflow block, such as `quantize` returns.
    names : sequence of str
        Variable names or parameter names.
    """
    func = mod["main"]
    exposer = _Exposer(mod, names)
    rebuilt = exposer.visit_expr(func)
    tensors = {param.name: param for param in rebuilt.params} | exposer.exposed
    unknown = [name for name in names if name not in tensors]
    if unknown:
        raise ValueError(f"names is {unknown}; allowed: names of main's parameters and tensors")
    results = [rebuilt.body.body, *(tensors[name] for name in names)]
    body = relax.SeqExpr(rebuilt.body.blocks, relax.Tuple(results))
    ret_type = relax.TupleType([result.ty for result in results])
    exposed = relax.Function(rebuilt.params, body, ret_type, func.is_pure, func.attrs)
    new = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    new.update_func(mod.get_global_var("main"), exposed)
    return relax.transform.DeadCodeElimination()(relax.transform.Normalize()(new))


@mutator
class _Exposer(PyExprMutator):
    """Turns named tensors of the dataflow block into results of it."""

    def __init__(self, mod: tvm.IRModule, names: Sequence[str]) -> None:
        super().__init__(mod)
        self.names = frozenset(names)
        self.exposed: dict[str, relax.Var] = {}

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        self.builder_._begin_dataflow_block()
        for binding in block.bindings:
            self.visit_binding(binding)
        for name, var in list(self.exposed.items()):
            if isinstance(var, relax.DataflowVar):
                self.exposed[name] = self.builder_.emit_output(var)
        return self.builder_._end_block()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        super().visit_var_binding_(binding)
        if binding.var.name in self.names:
            # Not get_var_remap: asked about a variable that was kept, it stores a null for it.
            self.exposed[binding.var.name] = self.visit_expr(binding.var)


def calibrate(
    mod: tvm.IRModule,
    calibration: Iterable[Any],
    watched: Mapping[str, Observer],
    *,
    means: Iterable[InputMean] = (),
    target: tvm.target.Target | None = None,
    progress: bool = True,
) -> int:
    """Run a prepared module over calibration inputs, observers watching; return their number.

    Parameters
    ----------
    mod : tvm.IRModule
        Prepared fp32 module (`graph.prepare`).
    calibration : iterable
        Each item is the input of one run: an array, a tuple of arrays in the order of the
        parameters, or a dict of arrays by parameter name. Shapes are those of the parameters.
    watched : mapping of str to Observer
        By variable name.
    means : iterable of InputMean
        What else looks on, at tensors that are watched.
    target : tvm.target.Target, optional
        Where to run; this machine by default.
    progress : bool
        Show a progress bar.
    """
    followers: dict[str, list[InputMean]] = {}
    for mean in means:
        followers.setdefault(mean.tensor, []).append(mean)
    runs = 0
    items = track(calibration, "calibrating", progress)
    outputs = run_instrumented(mod, list(watched), items, target)
    for tensors in outputs:
        for (name, observer), values in zip(watched.items(), tensors, strict=True):
            if not np.isfinite(values).all():
                raise ValueError(f"calibration item {runs} makes {name} infinite or NaN")
            observer.update(values)
            for mean in followers.get(name, ()):
                mean.update(values)
        runs += 1
    if runs == 0:
        raise ValueError("calibration is empty; allowed: an iterable of at least one input")
    return runs


def run_instrumented(
    mod: tvm.IRModule,
    names: Sequence[str],
    inputs: Iterable[Any],
    target: tvm.target.Target | None = None,
) -> Iterator[list[np.ndarray]]:
    """Compile a module for this machine and yield the named tensors for each input.

    Parameters are those of `instrument` and `calibrate`.
    """
    run = Instrumented(mod, names, target)
    for index, item in enumerate(inputs):
        _, tensors = run(run.arguments(item, f"calibration item {index}"))
        yield [tensors[name] for name in names]


class Instrumented:
    """A module compiled to return its result and the tensors of some names.

    Parameters
    ----------
    mod, names
        As for `instrument`.
    target : tvm.target.Target, optional
        This machine by default.
    """

    def __init__(
        self, mod: tvm.IRModule, names: Sequence[str], target: tvm.target.Target | None = None
    ) -> None:
        self.names = list(names)
        self.params = list(mod["main"].params)
        executable = tvm.compile(instrument(mod, names), target=target or host_target())
        self._main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def arguments(self, item: Any, what: str) -> list[Any]:
        """Return an input of `calibrate` as tensors in the order of the parameters.

        ``what`` names the item in the ValueError that one of other shapes raises.
        """
        return arguments(item, self.params, what)

    def __call__(self, arguments: Sequence[Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Return the results of ``main``, a tuple's one after the other, and tensors by name."""
        result, *tensors = self._main(*arguments)
        exposed = {name: tensor.numpy() for name, tensor in zip(self.names, tensors, strict=True)}
        return _flat(result), exposed


def _flat(result: Any) -> list[np.ndarray]:
    """Return a result of the VM as arrays, those of tuples one after the other."""
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [array for field in result for array in _flat(field)]


def arguments(item: Any, params: Sequence[relax.Var], what: str) -> list[Any]:
    """Return an item as tensors in the order of the parameters."""
    names = [param.name for param in params]
    if isinstance(item, Mapping):
        if set(item) != set(names):
            raise ValueError(f"{what} has the inputs {sorted(item)}; allowed: {names}")
        arrays = [item[name] for name in names]
    else:
        arrays = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(arrays) != len(params):
        raise ValueError(f"{what} has {len(arrays)} inputs; allowed: {len(params)}, {names}")
    return [_argument(x, param, what) for x, param in zip(arrays, params, strict=True)]


def _argument(value: Any, param: relax.Var, what: str) -> Any:
    array = np.ascontiguousarray(value, dtype=str(param.ty.dtype))
    want = [int(dim.value) if hasattr(dim, "value") else None for dim in param.ty.shape]
    fits = len(want) == array.ndim and all(
        dim in (None, have) for dim, have in zip(want, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{what}: {param.name} has shape {array.shape}; "
            f"allowed: {tuple('any' if dim is None else dim for dim in want)}"
        )
    return tvm.runtime.tensor(array)
