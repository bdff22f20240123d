"""fp32 torch modules into Relax, by torch.export and TVM's own importer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tvm

if TYPE_CHECKING:
    import torch


def from_torch(module: torch.nn.Module, example_inputs: Sequence[Any] | Any) -> tvm.IRModule:
    """Return a torch module as a Relax IRModule with its parameters bound as constants.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode: ``module.eval()``.
    example_inputs : torch.Tensor or tuple of torch.Tensor
        Inputs that give the shapes and dtypes of the graph; their values do not matter.

    Returns
    -------
    tvm.IRModule
        One function ``main`` from the inputs to the output tensor (a tuple where the module returns
        several). BatchNorm is still there: `transform.FoldBatchNorm` folds it.

    Raises
    ------
    TypeError
        ``module`` is no torch.nn.Module, or ``example_inputs`` holds something else than tensors.
    ValueError
        ``module`` is in training mode.
    """
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is {type(module).__name__}; allowed: a torch.nn.Module")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or not all(
        isinstance(x, torch.Tensor) for x in example_inputs
    ):
        raise TypeError(
            f"example_inputs is {type(example_inputs).__name__}; "
            "allowed: a torch.Tensor or a tuple of them"
        )
    if module.training:
        raise ValueError("module is in training mode; allowed: evaluation mode, module.eval()")
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns about its own use of a class it deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = torch.export.export(module, tuple(example_inputs))
        return from_exported_program(
            program, keep_params_as_input=False, unwrap_unit_return_tuple=True
        )
