"""The networks that the demo, the benchmarks and the tests run: torchvision's, with sane signals.

No weights are downloaded by default. A seeded initialisation alone would not do: with untouched
BatchNorm statistics the signal of a deep network dies or explodes, and quantizing it says nothing.
So BatchNorm's statistics are gathered from the network's own activations on synthetic images, with
gamma and beta drawn around 1 and 0, and the classifier looks where images differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import topi_int8
from topi_int8 import target as targets
from topi_int8.frontend.torchvision import import_torchvision
from topi_int8.images import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    import torch
    from tvm import IRModule
    from tvm.target import Target

_CALIBRATION_SEED, _TEST_SEED = 100, 200


def _inverted_residual_end(block: Any) -> torch.nn.Module | None:
    if hasattr(block, "conv"):  # MobileNetV2's
        return block.conv[-1]
    # ShuffleNet's block of the same name has no such attribute.
    return block.block[-1][1] if getattr(block, "use_res_connect", False) else None


# The last BatchNorm of a residual branch, by the class of its block: drawn small, as training
# leaves it, so that a block refines its input instead of drowning it. None: a block without a sum.
_BRANCH_END = {
    "BasicBlock": lambda block: block.bn2,
    "Bottleneck": lambda block: block.bn3,
    "ResBottleneckBlock": lambda block: block.f.c[1],
    "InvertedResidual": _inverted_residual_end,
    "_InvertedResidual": lambda block: block.layers[-1] if block.apply_residual else None,
    "MBConv": _inverted_residual_end,
    "FusedMBConv": _inverted_residual_end,
}
_BRANCH_GAMMA = 0.25

# Arguments that keep a constructor from a warning, or from a second network beside the first.
_CONSTRUCTOR = {
    "googlenet": dict(init_weights=True, aux_logits=False),
    "inception_v3": dict(init_weights=True, aux_logits=False),
}


def load(
    name: str, weights: str | None = None, seed: int = 0, batch: int = 1, image: int = 224
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a torchvision classifier in evaluation mode and an example input.

    Parameters
    ----------
    name : str
        A torchvision classifier, e.g. "resnet50".
    weights : str or None
        None: seeded weights with BatchNorm statistics of the network's own activations. "DEFAULT"
        (or another name torchvision knows): pretrained weights, downloaded.
    seed : int
        Of the weights (with ``weights=None``) and of the images.
    batch, image : int
        The example is float32 (batch, 3, image, image).

    Raises
    ------
    ValueError
        ``name`` is no torchvision classifier.
    RuntimeError
        The pretrained weights could not be had; the message says why.
    """
    torchvision = import_torchvision()
    import torch

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(classifiers)}")
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = torchvision.models.get_model(
                name, weights=None, **_CONSTRUCTOR.get(name, {})
            ).eval()
            _settle(module, seed, image)
    else:
        try:
            module = torchvision.models.get_model(name, weights=weights).eval()
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise RuntimeError(
                f"weights={weights!r}: torchvision's pretrained {name} could not be loaded "
                f"({type(error).__name__}: {error}). Without a network leave weights out: "
                "seeded weights are used."
            ) from error
    return module.requires_grad_(False), torch.from_numpy(images(batch, image, seed))


def default_weight_bits(target: Target) -> int:
    """Return 7 where only vpmaddubsw on weights in [-63, 63] is fast (x86 without VNNI), else 8."""
    features = targets.features(target)
    return 7 if features.arch == "x86_64" and not features.has("avx_vnni") else 8


def quantize(
    mod: IRModule, image: int, calibration: int = 16, weight_bits: int = 8, batch: int = 1
) -> IRModule:
    """Return the QDQ form of an imported network of that batch, calibrated on seeded images."""
    batches = calibration_images(calibration, image, batch)
    return topi_int8.quantize(mod, batches, weight_bits=weight_bits)


def calibration_images(count: int, image: int, batch: int = 1) -> list[np.ndarray]:
    """Return seeded images to calibrate on, `batch` an array: `count`, or the few more that fill
    the last array.
    """
    return _batches(_CALIBRATION_SEED, count, image, batch)


def unseen_images(count: int, image: int, batch: int = 1) -> list[np.ndarray]:
    """Return seeded images that `quantize` has not seen, as `calibration_images` does."""
    return _batches(_TEST_SEED, count, image, batch)


def _batches(seed: int, count: int, image: int, batch: int) -> list[np.ndarray]:
    # An image has a seed of its own, so that it is the same in whatever batch it stands.
    arrays = -(-count // batch)
    each = [images(1, image, seed + i) for i in range(arrays * batch)]
    return [np.concatenate(each[i * batch : (i + 1) * batch]) for i in range(arrays)]


def images(count: int, image: int = 224, seed: int = 0) -> np.ndarray:
    """Return seeded synthetic images, normalised like ImageNet's: float32 (count, 3, image, image).

    Sums of noise at octaves of falling amplitude, so that neighbouring pixels are alike, as a
    photograph's are and white noise's are not.
    """
    import torch

    rng = np.random.default_rng(seed)
    total = np.zeros((count, 3, image, image), "float32")
    size, amplitude = 1, 1.0
    while size <= image:
        # Channels of a photograph move together; a third of the noise is each one's own.
        grey = rng.normal(size=(count, 1, size, size))
        noise = (grey + rng.normal(size=(count, 3, size, size)) / 2).astype("float32")
        grown = torch.nn.functional.interpolate(
            torch.from_numpy(noise), (image, image), mode="bilinear", align_corners=False
        )
        total += np.float32(amplitude) * grown.numpy()
        size, amplitude = size * 2, amplitude * 0.6
    pixels = 1 / (1 + np.exp(-1.5 * total))
    mean, std = (np.array(v, "float32").reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).astype("float32")


def _settle(module: torch.nn.Module, seed: int, image: int) -> None:
    """Give BatchNorms the statistics of the network's own activations, then fit the classifier."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    batches = [torch.from_numpy(images(4, image, seed + 1000 + i)) for i in range(3)]
    blocks = [(m, _BRANCH_END.get(type(m).__name__)) for m in module.modules()]
    ends = [find(block) for block, find in blocks if find is not None]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for conv in module.modules():
            if isinstance(conv, torch.nn.Conv2d) and conv.groups == conv.in_channels > 1:
                # Random depthwise filters sum to nothing and lose the image; trained ones do not.
                conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1.0
        for norm in norms:
            gamma = _BRANCH_GAMMA if norm in ends else 1.0
            norm.weight.copy_(gamma * (1 + 0.1 * torch.randn_like(norm.weight)))
            norm.bias.copy_(0.1 * torch.randn_like(norm.bias))
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for batch in batches:
            module(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
        linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
        if linears:
            _fit_classifier(module, linears[-1], batches)


def _fit_classifier(
    module: torch.nn.Module, classifier: torch.nn.Linear, batches: list[torch.Tensor]
) -> None:
    """Let the logits depend on the image, with unit spread.

    Features of an untrained network have one large common part and differ between images in few
    directions. A random classifier would see the common part, and give every image the same class;
    this one weighs, at random, the directions in which images do differ.
    """
    import torch

    seen: list[torch.Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for batch in batches:
        module(batch)
    hook.remove()
    features = torch.cat(seen)
    mean = features.mean(0)
    _, strength, directions = torch.linalg.svd(features - mean, full_matrices=False)
    if strength[0] <= 0:
        return
    rank = min(8, len(strength) - 1)
    weight = torch.randn(classifier.out_features, rank) @ directions[:rank]
    weight /= ((features - mean) @ weight.T).std()
    classifier.weight.copy_(weight)
    if classifier.bias is not None:
        classifier.bias.copy_(-weight @ mean)
