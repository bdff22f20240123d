"""Pictures and array files as the inputs of a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from topi_int8 import samples
from topi_int8.images import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from topi_int8.qparams import QParams
from topi_int8.signature import TensorInfo

IMAGE = TensorInfo("x", (1, 3, 8, 8), "float32")


def choose(info: TensorInfo) -> Preprocessing:
    return Preprocessing.for_shape(info.shape)


def no_pictures(info: TensorInfo) -> Preprocessing:
    raise AssertionError(f"{info} has no picture")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra `images`)")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(20, 10), (10, 30), (9, 9)]):
        pil.new("RGB", size, (255, 0, 51 * i)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


# ---------------------------------------------------------------- pictures


def test_a_picture_is_normalised(pictures: Path) -> None:
    found = choose(IMAGE).read(pictures / "1.png")
    assert found.shape == (3, 8, 8) and found.dtype == np.float32
    want = (np.array([1, 0, 0.2]) - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(found, np.broadcast_to(want[:, None, None], (3, 8, 8)), rtol=1e-6)
    nhwc = Preprocessing.for_shape((1, 8, 8, 3)).read(pictures / "1.png")
    np.testing.assert_array_equal(nhwc.transpose(2, 0, 1), found)


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra `images`)")
    # Of 8 x 16, resized by nothing, columns 4 to 11: a ramp tells where they came from.
    ramp = np.tile(np.arange(16, dtype="uint8"), (8, 1))
    pil.fromarray(ramp).save(tmp_path / "ramp.png")
    plain = Preprocessing("NCHW", 1, (8, 8), (0.0,), (1 / 255,), crop=1)
    found = plain.read(tmp_path / "ramp.png")
    np.testing.assert_allclose(found[0], ramp[:, 4:12], atol=1e-4)
    # Half of a picture of 16 x 16: resized to 16, then 8 of the middle.
    pil.fromarray(np.tile(np.arange(16, dtype="uint8"), (16, 1))).save(tmp_path / "square.png")
    half = Preprocessing("NCHW", 1, (8, 8), (0.0,), (1 / 255,), crop=0.5)
    np.testing.assert_allclose(half.read(tmp_path / "square.png")[0], ramp[:, 4:12], atol=1e-4)


def test_the_shape_tells_the_rest() -> None:
    assert Preprocessing.for_shape((1, 3, 8, 9)).layout == "NCHW"
    nhwc = Preprocessing.for_shape(("n", 8, 9, 1))
    assert (nhwc.layout, nhwc.channels, nhwc.size, nhwc.mean) == ("NHWC", 1, (8, 9), (0.0,))
    assert Preprocessing.for_shape((1, 3, "h", "w"), size=(4, 4)).size == (4, 4)


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        ((1, 10), {}, r"shape \(1, 10\), no image's"),
        ((1, 7, 8, 8), {}, r"layout is not given, and shape"),
        ((1, 3, 8, 3), {}, r"layout is not given, and shape"),
        ((1, 3, 8, 8), {"layout": "CHWN"}, r"layout is 'CHWN'; allowed: NCHW, NHWC"),
        ((1, 3, 8, 8), {"layout": "NHWC"}, r"channels are 8; allowed: 1, 3, 4"),
        ((1, 3, 8, 8), {"size": (9, 9)}, r"size is \(9, 9\); allowed: \(8, 8\)"),
        ((1, 3, "h", "w"), {}, r"size is not given"),
        ((1, 3, 8, 8), {"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\); allowed: 3 finite"),
        ((1, 3, 8, 8), {"mean": (float("nan"),)}, r"mean is \(nan,\); allowed"),
        ((1, 3, 8, 8), {"std": (0.0,)}, r"std is \(0.0,\); allowed: above 0"),
        ((1, 3, 8, 8), {"crop": 1.5}, r"crop is 1.5; allowed"),
    ],
)
def test_preprocessing_refusals(shape: tuple, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Preprocessing.for_shape(shape, **options)


def test_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed (extra `images`)")
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"x.png is no picture; allowed: .png"):
        choose(IMAGE).read(tmp_path / "x.png")


# ---------------------------------------------------------------- calibration


def test_a_folder_of_pictures(pictures: Path) -> None:
    found = samples.calibration(pictures, [IMAGE], choose)
    assert [[array.shape for array in item] for item in found] == [[(1, 3, 8, 8)]] * 3
    pairs = samples.calibration(pictures, [TensorInfo("x", (2, 3, 8, 8), "float32")], choose)
    # The second batch is filled up with the first picture.
    assert len(pairs) == 2
    np.testing.assert_array_equal(pairs[1][0][1], found[0][0][0])


def test_arrays(tmp_path: Path) -> None:
    rows = np.arange(4 * 192, dtype="float64").reshape(4, 3, 8, 8)
    np.save(tmp_path / "rows.npy", rows)
    found = samples.calibration(tmp_path / "rows.npy", [IMAGE], no_pictures)
    assert len(found) == 4 and found[3][0].dtype == np.float32
    np.testing.assert_array_equal(found[3][0], rows[3:])
    (tmp_path / "folder").mkdir()
    for i in range(2):
        np.save(tmp_path / "folder" / f"{i}.npy", rows[i].astype("float32"))
    found = samples.calibration(tmp_path / "folder", [IMAGE], no_pictures)
    assert len(found) == 2
    np.testing.assert_array_equal(found[1][0][0], rows[1])


def test_several_inputs(tmp_path: Path) -> None:
    inputs = [TensorInfo("a", (1, 2), "float32"), TensorInfo("b", (1,), "int64")]
    a, b = np.ones((3, 2), "float32"), np.arange(3)
    np.savez(tmp_path / "all.npz", a=a, b=b)
    found = samples.calibration(tmp_path / "all.npz", inputs, no_pictures)
    assert len(found) == 3 and found[2][1] == [2]
    np.savez(tmp_path / "fewer.npz", a=a, b=b[:2])
    with pytest.raises(ValueError, match=r"\[2, 3\] samples for its inputs"):
        samples.calibration(tmp_path / "fewer.npz", inputs, no_pictures)
    np.save(tmp_path / "a.npy", a)
    with pytest.raises(ValueError, match=r"a.npy is for one input; allowed: an .npz with a, b"):
        samples.calibration(tmp_path / "a.npy", inputs, no_pictures)


def test_calibration_refusals(tmp_path: Path) -> None:
    def refuse(name: str, told: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            samples.calibration(tmp_path / name, [IMAGE], no_pictures)

    refuse("nothing", "does not exist; allowed: a folder, .npy or .npz")
    (tmp_path / "empty").mkdir()
    refuse("empty", r"is a folder with none; allowed: pictures")
    (tmp_path / "both").mkdir()
    for name in ("a.png", "b.npy"):
        (tmp_path / "both" / name).touch()
    refuse("both", "is a folder with arrays and pictures")
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_text("no array")
        refuse(name, f"{name} is no")
    np.save(tmp_path / "bytes.npy", np.zeros((2, 3, 8, 8), "uint8"))
    refuse("bytes.npy", r"is uint8; allowed: float32, the array as the network takes it")
    np.save(tmp_path / "other.npy", np.zeros((2, 3, 9, 8), "float32"))
    refuse("other.npy", r"x is float32 \(1, 3, 9, 8\); allowed: float32 \(1, 3, 8, 8\)")
    np.save(tmp_path / "none.npy", np.zeros((0, 3, 8, 8), "float32"))
    refuse("none.npy", r"has shape \(0, 3, 8, 8\); allowed: samples")
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    refuse("y.npz", "y.npz has y; allowed: with x")


# ---------------------------------------------------------------- one run


def test_one_run(tmp_path: Path, pictures: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 8, 8), "float32"))
    (array,) = samples.one([tmp_path / "x.npy"], [IMAGE], no_pictures)
    assert array.shape == (1, 3, 8, 8)
    (picture,) = samples.one([pictures / "0.png"], [IMAGE], choose)
    quantized = TensorInfo("x", (1, 3, 8, 8), "uint8", QParams(0.02, 110, "uint8"))
    (integers,) = samples.one([pictures / "0.png"], [quantized], choose)
    assert integers.dtype == np.uint8
    np.testing.assert_allclose(quantized.quantization.dequantize(integers), picture, atol=0.011)
    two = [TensorInfo("a", (2,), "float32"), TensorInfo("b", (2,), "float32")]
    np.savez(tmp_path / "two.npz", a=np.zeros(2, "float32"), b=np.ones(2, "float32"))
    assert [x.sum() for x in samples.one([tmp_path / "two.npz"], two, no_pictures)] == [0, 2]


def test_one_run_refusals(tmp_path: Path, pictures: Path) -> None:
    def refuse(paths: list[Path], told: str, info: TensorInfo = IMAGE) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            samples.one(paths, [info], choose)

    refuse([], r"input is given 0 times; allowed: 1 \(x: float32")
    refuse([tmp_path / "x.txt"], r"x.txt'; allowed: .png, ")
    refuse([tmp_path / "x.npy"], r"x.npy', which does not exist")
    whole = TensorInfo("x", (1, 3, 8, 8), "uint8")
    refuse([pictures / "0.png"], r"x: uint8 \(1, 3, 8, 8\) has no scale", whole)
    np.save(tmp_path / "x.npy", np.ones((3, 8), "float32"))
    refuse([tmp_path / "x.npy"], r"x.npy: x is float32 \(3, 8\); allowed")
