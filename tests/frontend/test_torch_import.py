"""torch modules and torchvision into Relax: the numbers stay, and errors name the argument."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests import graphs
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
