"""What is in a user's ImageNet folder: the images and their classes, however they are listed.

Classes are numbered as torchvision numbers them: by their sorted WordNet ids ("n01440764" is 0).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_IMAGES = frozenset((".jpeg", ".jpg", ".png"))
# Lists of all classes in order, "n01440764 tench, ..." a line: Kaggle's and Caffe's names.
_CLASS_LISTS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")
_ABOVE = 4  # levels that lists may lie above the images: Kaggle's are at ../../../..


@dataclass(frozen=True)
class Sample:
    """An image file and its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Found:
    """Where the images are, and what is needed to number their classes.

    Attributes
    ----------
    images : Path
        The folder of the images, or of the folders of the classes.
    files : sequence of Path
        The images of a flat folder, by name.
    classes : int
        Of the network.
    """

    images: Path
    files: Sequence[Path]
    classes: int

    def beside(self, *names: str) -> Path | None:
        """Return the first file of one of these names beside the images or above them."""
        places = [self.images, *list(self.images.resolve().parents)[:_ABOVE]]
        paths = [place / name for place in places for name in names]
        return next((path for path in paths if path.is_file()), None)

    def numbers(self, ids: Sequence[str], what: str) -> dict[str, int]:
        """Return WordNet id -> class.

        By the list of all classes where there is one; else these are all of them, and their sorted
        order is the numbering.

        Raises
        ------
        ValueError
            They are not all, or not of that list.
        """
        path = self.beside(*_CLASS_LISTS)
        if path is None:
            if len(ids) != self.classes:
                raise ValueError(
                    f"{what} has {len(ids)} classes ({ids[0]} .. {ids[-1]}), the network has "
                    f"{self.classes}; allowed: all {self.classes}, for their sorted order numbers "
                    f"them, or a list of all beside them ({', '.join(_CLASS_LISTS)})"
                )
            return {wnid: i for i, wnid in enumerate(ids)}
        lines = path.read_text(encoding="utf-8").splitlines()
        listed = {line.split()[0]: i for i, line in enumerate(filter(str.strip, lines))}
        if len(listed) != self.classes:
            raise ValueError(
                f"{path} lists {len(listed)} classes; allowed: the network's {self.classes}"
            )
        if unknown := [wnid for wnid in ids if wnid not in listed]:
            raise ValueError(
                f"{what} has the classes {', '.join(unknown[:5])}, which {path} lacks; allowed: "
                f"those that it lists, as {next(iter(listed))}"
            )
        return listed


def find_samples(folder: Path, classes: int = 1000) -> list[Sample]:
    """Return the images of an ImageNet folder with their classes, by name.

    Parameters
    ----------
    folder : Path
        With a ``val`` in it, or that itself: a folder a class, named by its WordNet id; or a flat
        one, with one of these beside the images or above them: ``val.txt`` (name and class from 0),
        ``LOC_val_solution.csv`` (Kaggle's), ``ILSVRC2012_validation_ground_truth.txt`` with the
        devkit's ``meta.mat``.
    classes : int
        Of the network.

    Raises
    ------
    ValueError
        There are no images, or their classes are not the network's; the message says what is there.
    """
    if not folder.is_dir():
        raise ValueError(f"imagenet is {str(folder)!r}; allowed: an existing folder")
    images = folder / "val" if (folder / "val").is_dir() else folder
    folders = [path for path in sorted(images.iterdir()) if path.is_dir() and _images(path)]
    if folders:
        found = Found(images, (), classes)
        numbers = found.numbers([path.name for path in folders], str(images))
        return [Sample(file, numbers[path.name]) for path in folders for file in _images(path)]
    found = Found(images, _images(images), classes)
    if not found.files:
        raise ValueError(
            f"{images} has no images; allowed: a folder a class, or .JPEG files and a list of them"
        )
    for name, read in _LISTS.items():
        if (path := found.beside(name)) is not None:
            return _of_list(path, read(path, found), found)
    raise ValueError(
        f"{images} has {len(found.files)} images and no folders of classes; allowed: with one of "
        f"{', '.join(_LISTS)} beside them"
    )


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)


# ---------------------------------------------------------------- lists of flat folders


def _of_list(path: Path, labels: dict[str, int], found: Found) -> list[Sample]:
    unlisted = [file.name for file in found.files if file.stem not in labels]
    if unlisted:
        raise ValueError(
            f"{path} has no class for {len(unlisted)} of {len(found.files)} images, as "
            f"{unlisted[0]}; allowed: a line for each"
        )
    samples = [Sample(file, labels[file.stem]) for file in found.files]
    for sample in samples:
        if not 0 <= sample.label < found.classes:
            raise ValueError(
                f"{path} gives {sample.path.name} the class {sample.label}; allowed: 0 to "
                f"{found.classes - 1}, the network's classes"
            )
    return samples


def _read_val_txt(path: Path, _: Found) -> dict[str, int]:
    """Read Caffe's list: "ILSVRC2012_val_00000001.JPEG 65" a line."""
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(f"{path}, line {number}: {line!r}; allowed: a name and a class from 0")
        labels[Path(words[0]).stem] = int(words[1])
    return labels


def _read_kaggle(path: Path, found: Found) -> dict[str, int]:
    """Read Kaggle's list: "ILSVRC2012_val_00048981,n03995372 85 131 499 499" a line."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 2 and row[0] != "ImageId"]
    ids = {name: boxes.split()[0] for name, boxes in rows if boxes.strip()}
    if not ids:
        raise ValueError(f"{path} has no classes; allowed: lines of an image's name and its class")
    numbers = found.numbers(sorted(set(ids.values())), str(path))
    return {Path(name).stem: numbers[wnid] for name, wnid in ids.items()}


def _read_devkit(path: Path, found: Found) -> dict[str, int]:
    """Read the devkit's list: a number a line, in the order of the images and of ITS classes."""
    meta = found.beside("meta.mat", "data/meta.mat")
    if meta is None:
        raise ValueError(
            f"{path} numbers classes as the devkit does, not as torchvision; allowed: with the "
            "devkit's meta.mat beside it, which says their WordNet ids"
        )
    numbers = path.read_text(encoding="utf-8").split()
    if len(numbers) != len(found.files):
        raise ValueError(
            f"{path} has {len(numbers)} lines; allowed: one for each of {len(found.files)} images"
        )
    ids = _devkit_ids(meta)
    if unknown := sorted(set(numbers) - set(ids)):
        raise ValueError(f"{path} has the class {unknown[0]!r}; allowed: those of {meta}")
    order = found.numbers(sorted(ids.values()), str(meta))
    return {
        file.stem: order[ids[number]] for file, number in zip(found.files, numbers, strict=True)
    }


def _devkit_ids(meta: Path) -> dict[str, str]:
    """Return ILSVRC2012_ID -> WordNet id of the classes that have no classes below them."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{meta} needs scipy: pip install 'topi_int8[images]'") from error
    rows = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
    leaves = (row for row in rows if not row["num_children"])
    return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in leaves}


# The first that is there says the classes.
_LISTS: dict[str, Callable[[Path, Found], dict[str, int]]] = {
    "val.txt": _read_val_txt,
    "LOC_val_solution.csv": _read_kaggle,
    "ILSVRC2012_validation_ground_truth.txt": _read_devkit,
}
