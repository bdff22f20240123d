"""The networks of the demo: seeded, sane, and clear about weights that cannot be had."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import sqnr
from topi_int8.frontend.torchvision import import_torchvision

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
models = pytest.importorskip("bench.models")


def test_loading_is_seeded() -> None:
    first, x = models.load("resnet18", image=64)
    second, y = models.load("resnet18", image=64)
    other, _ = models.load("resnet18", image=64, seed=1)
    assert torch.equal(x, y) and torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_loading_leaves_torch_random_state_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    models.load("squeezenet1_1", image=64)
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_signals_keep_a_sane_range_and_images_differ(name: str) -> None:
    module, _ = models.load(name, image=64)
    spreads: list[float] = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _m, _i, out: spreads.append(float(out.std())))
    logits = module(torch.from_numpy(models.images(8, 64, seed=5)))
    assert 0.01 < min(spreads) and max(spreads) < 20
    assert 0.2 < float(logits.std()) < 5
    assert len(set(logits.argmax(1).tolist())) > 1


# The smallest network of each of torchvision's files, and the least dB of its logits where noise of
# 50 dB is added to its input: what its weights amplify more than that drowns what int8 adds.
NOISE_BOUND = {
    "alexnet": 45, "convnext_tiny": 45, "densenet121": 45, "efficientnet_b0": 38, "googlenet": 38,
    "inception_v3": 38, "mnasnet0_5": 38, "mobilenet_v3_small": 45, "mobilenet_v3_large": 45,
    "regnet_x_400mf": 45, "regnet_y_400mf": 45, "resnet18": 45, "resnet50": 45,
    "squeezenet1_1": 45, "swin_t": 45, "vgg11_bn": 45,
    # Known to amplify: blocks without a sum, in V2 drawn as small as those with one; 40 blocks.
    "mobilenet_v2": 25, "shufflenet_v2_x0_5": 15, "efficientnet_v2_s": 15,
}  # fmt: skip
# Transformers that take 224x224 alone, which is slow; no BatchNorm makes them depend on us.
NOT_RUN = {"maxvit", "vision_transformer"}


@pytest.mark.parametrize("name", NOISE_BOUND)
def test_noise_is_not_amplified(name: str) -> None:
    module, x = models.load(name, batch=4, image=96)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    noise *= x.norm() / noise.norm() * 10 ** (-50 / 20)
    assert sqnr(module(x).numpy(), module(x + noise).numpy()) > NOISE_BOUND[name]


def test_every_family_of_networks_is_tested_for_noise() -> None:
    zoo = import_torchvision().models
    builder = zoo.get_model_builder
    names = zoo.list_models(module=zoo)
    families = {builder(name).__module__.split(".")[-1] for name in names}
    assert families == {builder(n).__module__.split(".")[-1] for n in NOISE_BOUND} | NOT_RUN


def test_images_are_smooth_and_normalised() -> None:
    images = models.images(4, 96, seed=0)
    assert images.dtype == "float32" and images.shape == (4, 3, 96, 96)
    assert -2.2 < images.min() and images.max() < 2.7  # what ImageNet's normalisation allows
    steps = np.abs(np.diff(images, axis=3)).mean()
    assert steps < 0.5 * images.std()
    assert not np.array_equal(images[0], images[1])


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name is 'resnet19'; allowed: .*resnet18"):
        models.load("resnet19")


def test_weights_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *_args, **_kwargs: None)
    with pytest.raises(RuntimeError, match=r"weights='DEFAULT'.*resnet18.*no network"):
        models.load("resnet18", weights="DEFAULT")
    with pytest.raises(RuntimeError, match="weights='NOSUCH'"):
        models.load("resnet18", weights="NOSUCH")
