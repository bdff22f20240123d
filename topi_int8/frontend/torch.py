"""torch modules into Relax, fp32 or quantized by PT2E: torch.export, then TVM's own importer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tvm

from .batch import with_batch
from .pt2e import convert_map, register_operators

if TYPE_CHECKING:
    import torch

_UNSUPPORTED = "Unsupported function types"

# Which argument of an operator says that it was traced to train: TVM's importer reads it as given,
# or not at all.
_TRAINS = {
    "aten.dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.batch_norm.default": 5,
}


def from_torch(
    module: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | Any = None,
    *,
    dynamic_shapes: Any = None,
    batch: int | None = None,
) -> tvm.IRModule:
    """Return a torch module or program as a Relax IRModule with its parameters bound as constants.

    A module that torchao's PT2E quantized (``convert_pt2e``) arrives as a QDQ graph, ready for
    ``tvm.compile``; one in float32 is `topi_int8.quantize`'s to quantize. Shapes are logical
    ones: in channels_last, too, the graph is in NCHW.

    Parameters
    ----------
    module : torch.nn.Module or torch.export.ExportedProgram
        A module in evaluation mode, ``module.eval()``, or what torch.export made of it.
    example_inputs : torch.Tensor or tuple of torch.Tensor
        Inputs that give the shapes and dtypes of the graph; their values do not matter. None for an
        ExportedProgram, which has them.
    dynamic_shapes : optional
        As torch.export.export's, for dimensions that shall stay symbolic. Such a graph compiles and
        runs by TVM's own path, in float: `topi_int8.explain` names its layers SLOW.
    batch : int, optional
        The batch that a program whose batch is symbolic shall have, which makes int8 kernels
        possible. To serve several batches, import (or `with_batch`) and compile once for each.

    Returns
    -------
    tvm.IRModule
        One function ``main`` from the inputs to the output tensor (a tuple where the module returns
        several). BatchNorm is still there: `transform.FoldBatchNorm` folds it.

    Raises
    ------
    TypeError
        ``module`` is neither, such as a TorchScript module, or ``example_inputs`` holds something
        else than tensors.
    ValueError
        ``module`` is, or was traced, in training mode; ``batch`` is none that the program can have;
        or an argument is given that an ExportedProgram has already.
    NotImplementedError
        The program has operators that TVM's importer does not know.
    """
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    register_operators()
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns about its own use of a class it deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = _exported(module, example_inputs, dynamic_shapes)
        _refuse_training(program)
        try:
            mod = from_exported_program(
                program,
                keep_params_as_input=False,
                unwrap_unit_return_tuple=True,
                custom_convert_map=convert_map(program),
            )
        except AssertionError as error:
            if not str(error).startswith(_UNSUPPORTED):
                raise
            names = str(error).removeprefix(_UNSUPPORTED).strip()
            raise NotImplementedError(
                f"the program has operators that TVM's importer does not know: {names}"
            ) from error
    return mod if batch is None else with_batch(mod, batch)


def _exported(
    module: torch.nn.Module | torch.export.ExportedProgram, example_inputs: Any, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    import torch

    if isinstance(module, torch.export.ExportedProgram):
        for name, value in (("example_inputs", example_inputs), ("dynamic_shapes", dynamic_shapes)):
            if value is not None:
                raise ValueError(f"{name} is given; allowed with an ExportedProgram: None")
        return module
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"module is a TorchScript {type(module).__name__}; allowed: the torch.nn.Module it was "
            "made from, or torch.export.export(module.eval(), (example_input,))"
        )
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"module is {type(module).__name__}; allowed: a torch.nn.Module or a "
            "torch.export.ExportedProgram"
        )
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or not all(
        isinstance(x, torch.Tensor) for x in example_inputs
    ):
        raise TypeError(
            f"example_inputs is {type(example_inputs).__name__}; "
            "allowed: a torch.Tensor or a tuple of them"
        )
    if module.training and not _is_traced(module):
        raise ValueError("module is in training mode; allowed: evaluation mode, module.eval()")
    return torch.export.export(module, tuple(example_inputs), dynamic_shapes=dynamic_shapes)


def _refuse_training(program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        at = _TRAINS.get(str(node.target))
        if at is not None and len(node.args) > at and node.args[at]:
            raise ValueError(
                f"the program was traced in training mode ({node.target} trains); allowed: "
                "evaluation mode, by module.eval() before torch.export.export, or by torchao's "
                "move_exported_model_to_eval"
            )


def _is_traced(module: torch.nn.Module) -> bool:
    """Whether a module is a graph of operators, whose mode was settled when it was made.

    What torch.export and PT2E give cannot be set to evaluation mode. The one module that it calls
    checks its inputs.
    """
    import torch

    return isinstance(module, torch.fx.GraphModule) and all(
        node.op != "call_module" or node.target == "_guards_fn" for node in module.graph.nodes
    )
