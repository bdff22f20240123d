"""bench/photos.py: real photographs, calibration and test apart, and what is said without them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench import demo, models, photos


@pytest.fixture(scope="module")
def found() -> photos.Photos:
    try:
        return photos.find()
    except photos.NoPhotographs as error:
        pytest.skip(str(error))


def test_crops_are_seeded_normalised_and_differ(found: photos.Photos) -> None:
    crops = found.calibration_images(4, 48)
    for crop in crops:
        assert crop.shape == (1, 3, 48, 48) and crop.dtype == "float32"
        # What ImageNet's normalisation allows; a photograph fills much of it.
        assert -2.2 < crop.min() and crop.max() < 2.7 and crop.std() > 0.3
    for first, again in zip(crops, found.calibration_images(2, 48), strict=False):
        np.testing.assert_array_equal(first, again)
    assert not np.array_equal(crops[0], crops[len(found.calibration)])
    # Neighbouring pixels are alike, as noise's are not.
    assert np.abs(np.diff(crops[0], axis=3)).mean() < 0.5 * crops[0].std()


def test_no_photograph_both_calibrates_and_tests(found: photos.Photos) -> None:
    assert not set(found.calibration) & set(found.test)
    names = {path.name for path in (*found.calibration, *found.test)}
    assert {"china.jpg", "flower.jpg", "chelsea.png"} <= names
    unseen = found.unseen_images(2, 48)
    assert all(x.shape == (1, 3, 48, 48) for x in unseen)
    for name in names:
        assert name in str(found)


def test_neither_package_is_imported(found: photos.Photos) -> None:
    before = set(sys.modules)
    photos.find().calibration_images(1, 32)
    assert not {"sklearn", "skimage"} & (set(sys.modules) - before)


def test_without_them_the_demo_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = photos.find_spec
    monkeypatch.setattr(photos, "find_spec", lambda n: None if n == "sklearn" else real(n))
    with pytest.raises(photos.NoPhotographs, match=r"^scikit-learn.* not installed: pip install"):
        photos.find()
    images, words = demo._images()
    assert images is models
    assert words.startswith("seeded synthetic images: ") and "\n" not in words


def test_normalise_is_imagenets() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype("uint8")
    want = (pixels / 255 - models.IMAGENET_MEAN) / models.IMAGENET_STD
    np.testing.assert_allclose(photos.normalise(pixels), want.transpose(2, 0, 1), atol=1e-6)
