"""torch modules and torchvision into Relax: the numbers stay, and errors name the argument."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from tests import graphs
from topi_int8.frontend.batch import with_batch
from topi_int8.frontend.torch import from_torch
from topi_int8.frontend.torchvision import import_torchvision
from topi_int8.transform.fold_batch_norm import FoldBatchNorm

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
simulate = pytest.importorskip("tests.simulate").simulate


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.head = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.relu6(self.norm(self.conv(x)))
        return self.head(torch.flatten(self.pool(x), 1))


def test_import_gives_the_same_numbers_with_parameters_bound() -> None:
    torch.manual_seed(0)
    net, x = _Net().eval(), torch.randn(2, 3, 8, 8)
    mod = from_torch(net, x)
    assert [param.name for param in mod["main"].params] == ["x"]
    want = net(x).detach().numpy()
    np.testing.assert_allclose(simulate(mod, x.numpy()), want, rtol=1e-4, atol=1e-5)
    folded = FoldBatchNorm()(mod)
    assert "nn.batch_norm" not in graphs.ops(folded)
    np.testing.assert_allclose(simulate(folded, x.numpy()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
def test_torchvision_classifiers_import_and_fold(name: str) -> None:
    torch.manual_seed(0)
    net = import_torchvision().models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    folded = FoldBatchNorm()(from_torch(net, x))
    assert "nn.batch_norm" not in graphs.ops(folded)
    want = net(x).detach().numpy()
    np.testing.assert_allclose(
        simulate(folded, x.numpy()), want, rtol=1e-3, atol=1e-4 * np.abs(want).max()
    )


def test_channels_last_changes_nothing() -> None:
    torch.manual_seed(0)
    net, x = _Net().eval(), torch.randn(2, 3, 8, 8)
    want = net(x).detach().numpy()
    for module, example in (
        (net, x.contiguous(memory_format=torch.channels_last)),
        (_Net().eval().to(memory_format=torch.channels_last), x),
    ):
        module.load_state_dict(net.state_dict())
        mod = from_torch(module, example.contiguous(memory_format=torch.channels_last))
        ops, plain = graphs.count(mod), graphs.count(from_torch(net, x))
        # flatten is a reshape or two; nothing is permuted.
        assert {name: n for name, n in (ops - plain).items()} in ({}, {"reshape": 1})
        np.testing.assert_allclose(simulate(mod, x.numpy()), want, rtol=1e-4, atol=1e-5)


def test_an_exported_program_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    net, x = _Net().eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (x,))
    want = net(x).detach().numpy()
    for given in (program, program.run_decompositions(), program.module()):
        mod = from_torch(given, x if isinstance(given, torch.nn.Module) else None)
        np.testing.assert_allclose(simulate(mod, x.numpy()), want, rtol=1e-4, atol=1e-5)
    for name in ("example_inputs", "dynamic_shapes"):
        with pytest.raises(ValueError, match=f"{name} is given; allowed with an Expor.*: None"):
            from_torch(program, **{name: x})


class _Branches(torch.nn.Module):
    """Two inputs whose batches are one symbol, and a shape made of it."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.reshape(-1, 2), y.reshape(-1, 2)]).relu()


def test_a_symbolic_batch_runs_with_any_and_is_bound_to_one() -> None:
    torch.manual_seed(0)
    net, batch = _Net().eval(), torch.export.Dim("batch", min=2, max=8)
    mod = from_torch(net, torch.randn(2, 3, 8, 8), dynamic_shapes=({0: batch},))
    assert not hasattr(mod["main"].params[0].ty.shape[0], "value")
    for size in (1, 3, 8):
        x = torch.randn(size, 3, 8, 8)
        one = with_batch(mod, size)
        assert [int(d) for d in one["main"].params[0].ty.shape] == [size, 3, 8, 8]
        assert "tir_var_upper_bound" not in one["main"].attrs
        want = net(x).detach().numpy()
        np.testing.assert_allclose(simulate(one, x.numpy()), want, rtol=1e-4, atol=1e-5)
    assert not hasattr(mod["main"].params[0].ty.shape[0], "value"), "the module was changed"
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    bound = from_torch(program, batch=4)
    assert int(bound["main"].params[0].ty.shape[0]) == 4
    with pytest.raises(ValueError, match="batch is 9; allowed: 1 to 8"):
        with_batch(mod, 9)
    with pytest.raises(ValueError, match="batch is 0; allowed: 1 to 8"):
        from_torch(program, batch=0)
    with pytest.raises(ValueError, match="batch is 4, and no input has a symbolic first dim"):
        from_torch(net, torch.randn(2, 3, 8, 8), batch=4)


def test_all_inputs_get_the_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    x, y = torch.randn(4, 6), torch.randn(4, 2)
    mod = from_torch(_Branches().eval(), (x, y), dynamic_shapes=({0: batch}, {0: batch}), batch=5)
    assert [int(p.ty.shape[0]) for p in mod["main"].params] == [5, 5]
    x, y = torch.randn(5, 6), torch.randn(5, 2)
    np.testing.assert_array_equal(simulate(mod, x.numpy(), y.numpy()), _Branches()(x, y).numpy())


def test_torchscript_is_refused_with_the_line_to_write() -> None:
    net, x = _Net().eval(), torch.randn(1, 3, 8, 8)
    line = r"torch\.export\.export\(module\.eval\(\), \(example_input,\)\)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them itself
        scripts = torch.jit.trace(net, x), torch.jit.script(net), torch.jit.trace(torch.relu, x)
    for script in scripts:
        with pytest.raises(TypeError, match=f"module is a TorchScript .*{line}"):
            from_torch(script, x)


def test_a_program_traced_in_training_mode_is_refused() -> None:
    net, x = torch.nn.Sequential(_Net(), torch.nn.Dropout()), torch.randn(2, 3, 8, 8)
    program = torch.export.export(net.train(), (x,))
    for given, inputs in ((program, None), (program.module(), x)):
        with pytest.raises(ValueError, match="traced in training mode"):
            from_torch(given, inputs)


def test_operators_that_tvm_does_not_know_are_named() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    with pytest.raises(NotImplementedError, match=r"TVM's importer does not know.*eigh"):
        from_torch(Unknown().eval(), torch.eye(3))


def test_errors_name_the_argument() -> None:
    net, x = _Net().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match="module is str"):
        from_torch("resnet18", x)
    with pytest.raises(TypeError, match="example_inputs is ndarray"):
        from_torch(net, x.numpy())
    with pytest.raises(ValueError, match="module is in training mode"):
        from_torch(_Net(), x)


def test_torchvision_imports_once_and_again() -> None:
    assert import_torchvision() is import_torchvision()


def test_the_package_imports_without_torch_and_onnx() -> None:
    # tvm_ffi imports torch where it finds it, so absence is staged: None makes an import fail.
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'onnx')))\n"
        "import topi_int8, topi_int8.frontend.torch as t, topi_int8.frontend.torchvision as tv\n"
        "for call in (tv.import_torchvision, lambda: t.from_torch(None, None)):\n"
        "    try: call()\n"
        "    except ImportError: continue\n"
        "    sys.exit('no ImportError')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
