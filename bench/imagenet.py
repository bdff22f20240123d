"""Top-1 and top-5 of networks on a user's own ImageNet: its images read, batched and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topi_int8.images import IMAGENET_MEAN, IMAGENET_STD

from .imagenet_folder import Sample
from .photos import normalise

_LOADERS = 2  # threads that decode the next batch while this one runs
_TOP = 5


@dataclass(frozen=True)
class Preprocess:
    """How a classifier wants its image: as torchvision's ImageClassification preset does it.

    Parameters
    ----------
    resize : int
        The shorter side is resized to this, antialiased.
    crop : int
        Side of the square cut out of the middle.
    interpolation : str
        "bilinear" or "bicubic".
    mean, std : sequence of float
        Of the three channels, pixels being 0 to 1.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop is {self.crop}; allowed: 1 to resize, {self.resize}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation is {self.interpolation!r}; allowed: bilinear, bicubic"
            )

    def __call__(self, path: Path) -> np.ndarray:
        """Return an image file as float32 (3, crop, crop).

        Raises
        ------
        ValueError
            The file is no image that can be read.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        width, height = rgb.size
        short = min(width, height)
        # Rounded down, as torchvision's Resize does.
        size = tuple(self.resize * side // short for side in (width, height))
        resized = rgb.resize(size, Image.Resampling[self.interpolation.upper()])
        # Half to even, as torchvision's CenterCrop does.
        left, top = (round((side - self.crop) / 2) for side in size)
        cut = resized.crop((left, top, left + self.crop, top + self.crop))
        return normalise(np.asarray(cut), self.mean, self.std)


def preprocess_of(network: str, weights: str | None, image: int = 0) -> Preprocess:
    """Return how a network's weights want their images; 256 and 224 without weights.

    Parameters
    ----------
    network : str
        A torchvision classifier.
    weights : str or None
        "DEFAULT", or another name that torchvision knows for it.
    image : int
        Crop to this side instead, resizing in the same proportion; 0: the weights' own.

    Raises
    ------
    ValueError
        torchvision knows no such network or weights.
    """
    found = Preprocess()
    if weights is not None:
        from topi_int8.frontend.torchvision import import_torchvision

        known = import_torchvision().models.get_model_weights(network)
        if weights not in known.__members__:
            raise ValueError(f"weights is {weights!r}; allowed: {', '.join(known.__members__)}")
        preset = known[weights].transforms()
        found = Preprocess(
            preset.resize_size[0], preset.crop_size[0], preset.interpolation.value,
            tuple(preset.mean), tuple(preset.std),
        )  # fmt: skip
    if image in (0, found.crop):
        return found
    return replace(found, crop=image, resize=max(image, found.resize * image // found.crop))


# ---------------------------------------------------------------- evaluation


def split(
    samples: Sequence[Sample], calibration: int, limit: int = 0, seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Return seeded random samples to calibrate on, and others to evaluate on.

    Parameters
    ----------
    calibration : int
        How many to hold out.
    limit : int
        Evaluate on so many at most; 0: on all the rest.

    Raises
    ------
    ValueError
        When nothing would be left to evaluate on.
    """
    if calibration >= len(samples):
        raise ValueError(
            f"calibration is {calibration} of {len(samples)} images; allowed: fewer than there are"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    mixed = [samples[i] for i in order]
    rest = mixed[calibration:]
    return mixed[:calibration], rest[:limit] if limit else rest


def batches(
    samples: Sequence[Sample], size: int, preprocess: Preprocess
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images, labels), the next batch being read meanwhile.

    Images are float32 (size, 3, crop, crop) always: the last batch repeats its last image where
    there are no more, and has as many labels as images of its own.
    """
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    with ThreadPoolExecutor(_LOADERS) as pool:

        def start(part: Sequence[Sample]) -> list[Any]:
            return [pool.submit(preprocess, sample.path) for sample in part]

        reading = start(parts[0]) if parts else []
        for index, part in enumerate(parts):
            images = [future.result() for future in reading]
            reading = start(parts[index + 1]) if index + 1 < len(parts) else []
            images += images[-1:] * (size - len(images))
            yield np.stack(images), np.array([sample.label for sample in part])


@dataclass
class TopK:
    """How often the right class was first, and among the first five."""

    count: int = 0
    first: int = 0
    among: int = 0

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Take in the logits (n, classes) of images of those classes (n,)."""
        best = np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]
        right = best == labels[:, None]
        self.count += len(labels)
        self.first += int(right[:, 0].sum())
        self.among += int(right.any(axis=1).sum())

    @property
    def top1(self) -> float:
        """Share, 0 to 1, of images whose class came first."""
        return self.first / self.count if self.count else 0.0

    @property
    def top5(self) -> float:
        """Share, 0 to 1, of images whose class came among the first five."""
        return self.among / self.count if self.count else 0.0


@dataclass
class Evaluation:
    """Two networks on the same images."""

    fp32: TopK
    int8: TopK
    same: int = 0


def evaluate(
    fp32: Callable[[np.ndarray], np.ndarray],
    int8: Callable[[np.ndarray], np.ndarray],
    data: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Evaluation:
    """Return the accuracy of two networks, functions of images that return logits, on batches."""
    found = Evaluation(TopK(), TopK())
    for images, labels in data:
        wanted, got = (run(images)[: len(labels)] for run in (fp32, int8))
        found.fp32.update(wanted, labels)
        found.int8.update(got, labels)
        found.same += int(np.sum(wanted.argmax(1) == got.argmax(1)))
    return found
