"""Real photographs to calibrate and to test on: those that scikit-learn and scikit-image bring.

They are read from the installed packages' own files; nothing is downloaded, and neither package is
imported. Crops of some photographs calibrate, crops of other ones test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from topi_int8.images import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

# (package, folder, file); what a release of a package does not bring is left out.
_CALIBRATION = (
    ("sklearn", "datasets/images", "china.jpg"),
    ("sklearn", "datasets/images", "flower.jpg"),
    ("skimage", "data", "chelsea.png"),
)
_TEST = (
    ("skimage", "data", "astronaut.png"),
    ("skimage", "data", "coffee.png"),
    ("skimage", "data", "rocket.jpg"),
)
_CALIBRATION_SEED, _TEST_SEED = 300, 400
# Sides of a crop, as a share of the photograph's shorter side.
_LEAST, _MOST = 0.5, 1.0


class NoPhotographs(Exception):
    """The packages that bring them are not installed; the message says how to get them."""


@dataclass(frozen=True)
class Photos:
    """The photographs at hand, and normalised crops of them.

    Parameters
    ----------
    calibration, test : sequence of Path
        The files, at least one each.
    """

    calibration: Sequence[Path]
    test: Sequence[Path]

    def __post_init__(self) -> None:
        for name in ("calibration", "test"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; allowed: one photograph or more")

    def calibration_images(self, count: int, image: int = 224) -> list[np.ndarray]:
        """Return seeded crops to calibrate on: float32 (1, 3, image, image), ImageNet's scale."""
        return _crops(self.calibration, count, image, _CALIBRATION_SEED)

    def unseen_images(self, count: int, image: int = 224) -> list[np.ndarray]:
        """Return crops of the other photographs, as `calibration_images` does."""
        return _crops(self.test, count, image, _TEST_SEED)

    def __str__(self) -> str:
        calibration, test = (
            ", ".join(path.name for path in paths) for paths in (self.calibration, self.test)
        )
        return f"real photographs: crops of {calibration} calibrate, of {test} test"


def find() -> Photos:
    """Return the photographs of the installed packages.

    Raises
    ------
    NoPhotographs
        Pillow, scikit-learn or scikit-image is missing, or none of their photographs is there.
    """
    missing = [
        package for module, package in (
            ("PIL", "Pillow"), ("sklearn", "scikit-learn"), ("skimage", "scikit-image"),
        ) if find_spec(module) is None
    ]  # fmt: skip
    calibration, test = ([p for p in map(_path, names) if p] for names in (_CALIBRATION, _TEST))
    if not missing and not (calibration and test):
        missing = ["their photographs"]
    if missing:
        raise NoPhotographs(
            f"{', '.join(missing)} not installed: pip install 'topi_int8[images]' for photographs"
        )
    return Photos(tuple(calibration), tuple(test))


def _path(name: tuple[str, str, str]) -> Path | None:
    package, folder, file = name
    spec = find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / folder / file
        if path.is_file():
            return path
    return None


def _crops(paths: Sequence[Path], count: int, image: int, seed: int) -> list[np.ndarray]:
    """Return crops of random place, size and mirroring, the photographs taking turns."""
    from PIL import Image

    photographs = [Image.open(path).convert("RGB") for path in paths]
    # A crop has a seed of its own, so that it is the same however many are asked for.
    return [
        _crop(photographs[i % len(paths)], image, np.random.default_rng(seed + i))
        for i in range(count)
    ]


def _crop(photograph: Image, image: int, rng: np.random.Generator) -> np.ndarray:
    from PIL.Image import Resampling, Transpose

    width, height = photograph.size
    side = int(rng.uniform(_LEAST, _MOST) * min(width, height))
    left, top = rng.integers(0, [width - side + 1, height - side + 1])
    box = (int(left), int(top), int(left) + side, int(top) + side)
    crop = photograph.resize((image, image), Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        crop = crop.transpose(Transpose.FLIP_LEFT_RIGHT)
    return normalise(np.asarray(crop))[None]


def normalise(
    pixels: np.ndarray,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Return (h, w, 3) uint8 pixels as float32 (3, h, w): ``(pixels / 255 - mean) / std``."""
    scaled = np.moveaxis(pixels.astype("float32") / np.float32(255), 2, 0)
    mean, std = (np.array(v, "float32").reshape(3, 1, 1) for v in (mean, std))
    return (scaled - mean) / std
