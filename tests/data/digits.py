"""Two small networks trained on handwritten digits, and the digits: accuracy on real data.

The digits are scikit-learn's bundled ones (UCI's optical recognition test set: 1797 images of 8x8,
integers 0 to 16). The weights beside this file are what `train_digits` made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
CLASSES = 10
_TEST_IMAGES, _SPLIT_SEED = 500, 0


@dataclass(frozen=True)
class Digits:
    """Images, float32 (n, 1, 8, 8) in [-1, 1], and their labels, int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> tuple[Digits, Digits]:
    """Return the 1297 digits to train and to calibrate on, and the 500 to test on."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    train, test = order[_TEST_IMAGES:], order[:_TEST_IMAGES]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def _conv_norm(ic: int, oc: int, k: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ic, oc, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(oc)
    )


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, ic: int, oc: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv_norm(ic, oc, 3, stride), _conv_norm(oc, oc, 3)
        same = ic == oc and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(ic, oc, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        inner = torch.relu(self.first(x))
        return torch.relu(self.second(inner) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widened 1x1, depthwise 3x3, narrowed 1x1 without an activation."""

    def __init__(self, ic: int, oc: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        wide = ic * factor
        self.layers = nn.Sequential(
            _conv_norm(ic, wide, 1), nn.ReLU6(),
            _conv_norm(wide, wide, 3, stride, groups=wide), nn.ReLU6(),
            _conv_norm(wide, oc, 1),
        )  # fmt: skip
        self.residual = ic == oc and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return x + self.layers(x) if self.residual else self.layers(x)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def residual() -> nn.Module:
    """Return a network of ResNet's blocks."""
    return nn.Sequential(
        _conv_norm(1, 16, 3), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        *_head(64),
    )  # fmt: skip


def depthwise() -> nn.Module:
    """Return a depthwise-separable network of MobileNetV2's blocks."""
    return nn.Sequential(
        _conv_norm(1, 16, 3), nn.ReLU6(),
        InvertedResidual(16, 16, 1), InvertedResidual(16, 32, 2), InvertedResidual(32, 32, 1),
        _conv_norm(32, 96, 1), nn.ReLU6(),
        *_head(96),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": residual, "depthwise": depthwise}


def checkpoint(name: str) -> Path:
    """Return where the weights of a network are kept."""
    return HERE / f"digits_{name}.npz"


def load_network(name: str) -> nn.Module:
    """Return a trained network in evaluation mode."""
    module = NETWORKS[name]()
    with np.load(checkpoint(name)) as arrays:
        state = {key: torch.from_numpy(arrays[key].astype("float32")) for key in arrays.files}
    wanted = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
    if set(state) != wanted:
        raise ValueError(f"{checkpoint(name)} holds {sorted(state)}; allowed: {sorted(wanted)}")
    module.load_state_dict(state, strict=False)
    return module.eval().requires_grad_(False)
