"""A picture file as the array that an image classifier takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# torchvision's for its ImageNet weights, of pixels in [0, 1]; so is the share that is kept.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_CROP = 224 / 256
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LAYOUTS = ("NCHW", "NHWC")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become arrays.

    Parameters
    ----------
    layout : str
        "NCHW" or "NHWC".
    channels : int
        1, 3 or 4.
    size : tuple of int
        Rows and columns of the result.
    mean, std : tuple of float
        Of each channel, or one for all: ``(pixel / 255 - mean) / std``.
    crop : float
        In (0, 1]: the picture is resized until its result, cut out of the middle, is this share of
        it; 1 keeps the whole of a square picture.
    """

    layout: str
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = IMAGENET_CROP

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; allowed: {', '.join(LAYOUTS)}")
        if self.channels not in _MODES:
            allowed = ", ".join(map(str, _MODES))
            raise ValueError(f"channels are {self.channels}; allowed: {allowed}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}; allowed: rows and columns, 1 or more")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{name} is {values}; allowed: {self.channels} finite numbers, one a channel, "
                    "or one for all"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; allowed: above 0")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; allowed: above 0, up to 1")

    @classmethod
    def for_shape(
        cls,
        shape: Sequence[int | str],
        layout: str = "",
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        crop: float = IMAGENET_CROP,
    ) -> Preprocessing:
        """Return the preprocessing for a network's input; what is not given follows from its shape.

        Raises
        ------
        ValueError
            For an input that is no image, or options that do not fit it.
        """
        shape = tuple(shape)
        if len(shape) != 4:
            raise ValueError(f"the input has shape {shape}, no image's; give .npy instead")
        layout = layout or _layout_of(shape)
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
        own = dict(zip(layout, shape, strict=True))
        wanted = (own["H"], own["W"])
        if size is None:
            if any(isinstance(dim, str) for dim in wanted):
                raise ValueError(f"size is not given, and the input's is {wanted}; give --size")
            size = wanted
        elif any(isinstance(dim, int) and dim != s for dim, s in zip(wanted, size, strict=True)):
            raise ValueError(f"size is {size}; allowed: {wanted}, the input's")
        channels = own["C"] if isinstance(own["C"], int) else 3
        colour = channels == len(IMAGENET_MEAN)
        return cls(
            layout, channels, size, mean or (IMAGENET_MEAN if colour else (0.0,)),
            std or (IMAGENET_STD if colour else (1.0,)), crop,
        )  # fmt: skip

    def read(self, path: Path) -> np.ndarray:
        """Return a picture file as float32 (C, H, W) or (H, W, C), by `layout`.

        Raises
        ------
        ImportError
            Pillow is not installed.
        ValueError
            The file is no picture that Pillow reads.
        """
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise ImportError(
                f"{path} needs Pillow: pip install pillow; or give arrays as .npy"
            ) from error
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(self._cut(picture.convert(_MODES[self.channels])), "float32")
        except UnidentifiedImageError:
            raise ValueError(f"{path} is no picture; allowed: {', '.join(SUFFIXES)}") from None
        pixels = pixels.reshape(*self.size, self.channels) / np.float32(255)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(pixels if self.layout == "NHWC" else pixels.transpose(2, 0, 1))

    def _cut(self, picture: object) -> object:
        """Return the middle of a picture, resized by its shorter side."""
        from PIL import Image

        rows, columns = self.size
        wanted = round(rows / self.crop), round(columns / self.crop)
        scale = max(wanted[0] / picture.height, wanted[1] / picture.width)
        width = max(round(picture.width * scale), columns)
        height = max(round(picture.height * scale), rows)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - columns) // 2, (height - rows) // 2
        return picture.crop((left, top, left + columns, top + rows))


def _layout_of(shape: tuple[int | str, ...]) -> str:
    """Return the layout whose channels are 1, 3 or 4; ValueError where both or none are."""
    found = [layout for layout in LAYOUTS if shape[layout.index("C")] in _MODES]
    if len(found) != 1:
        raise ValueError(f"layout is not given, and shape {shape} does not tell; allowed: "
                         f"{', '.join(LAYOUTS)}")  # fmt: skip
    return found[0]
