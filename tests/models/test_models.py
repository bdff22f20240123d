"""The networks of the demo: seeded, sane, and clear about weights that cannot be had."""

from __future__ import annotations

import numpy as np
import pytest

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
