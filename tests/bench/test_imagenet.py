"""bench/imagenet.py and the command `accuracy`, on small folders made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("PIL", reason="Pillow is not installed (extra `images`)")
from PIL import Image

import topi_int8
from bench import cli, imagenet
from bench.imagenet_folder import Sample, find_samples
from topi_int8.quantize import AccuracyReport, LayerAccuracy

IDS = ("n01440764", "n01443537", "n01484850")


def picture(path: Path, seed: int, size: tuple[int, int] = (70, 50)) -> Path:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype("uint8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BILINEAR).save(path, "JPEG", quality=95)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two images in each of three class folders."""
    # Made in another order than they are numbered.
    for number, wnid in reversed(list(enumerate(IDS))):
        for i in range(2):
            picture(tmp_path / "val" / wnid / f"ILSVRC2012_val_{i}.JPEG", 10 * number + i)
    return tmp_path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four images in one folder; their list is the test's."""
    for i in range(4):
        picture(tmp_path / f"ILSVRC2012_val_0000000{i + 1}.JPEG", i)
    return tmp_path


def labels(samples: list[Sample]) -> list[int]:
    return [sample.label for sample in samples]


# ---------------------------------------------------------------- folders and lists


def test_folders_are_numbered_by_their_sorted_names(folders: Path) -> None:
    for place in (folders, folders / "val"):
        samples = find_samples(place, 3)
        assert labels(samples) == [0, 0, 1, 1, 2, 2]
        assert [sample.path.parent.name for sample in samples[::2]] == list(IDS)


def test_some_folders_need_the_list_of_all(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"3 classes .n01440764 .. n01484850., the network has 5"):
        find_samples(folders, 5)
    every = ["n00000001", *IDS, "n09999999"]
    lines = [f"{wnid} a name, another" for wnid in every]
    (folders / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
    assert labels(find_samples(folders, 5)) == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="lists 5 classes; allowed: the network's 4"):
        find_samples(folders, 4)
    picture(folders / "val" / "n12345678" / "x.JPEG", 0)
    with pytest.raises(ValueError, match=r"has the classes n12345678, which .*lacks"):
        find_samples(folders, 5)


def test_val_txt(flat: Path) -> None:
    lines = [f"ILSVRC2012_val_0000000{i + 1}.JPEG {label}" for i, label in enumerate((2, 0, 1, 2))]
    (flat / "val.txt").write_text("\n".join(reversed(lines)) + "\n")
    assert labels(find_samples(flat, 3)) == [2, 0, 1, 2]
    with pytest.raises(ValueError, match="the class 2; allowed: 0 to 1"):
        find_samples(flat, 2)
    (flat / "val.txt").write_text(lines[0])
    with pytest.raises(ValueError, match="no class for 3 of 4 images, as ILSVRC2012_val_00000002"):
        find_samples(flat, 3)
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG cat")
    with pytest.raises(ValueError, match=r"line 1: .*allowed: a name and a class from 0"):
        find_samples(flat, 3)


def test_kaggles_list(flat: Path) -> None:
    rows = [
        f"ILSVRC2012_val_0000000{i + 1},{IDS[label]} 85 131 499 499 {IDS[label]} 1 2 3 4"
        for i, label in enumerate((1, 0, 2, 1))
    ]
    (flat / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    assert labels(find_samples(flat, 3)) == [1, 0, 2, 1]
    with pytest.raises(ValueError, match=r"3 classes .*the network has 1000"):
        find_samples(flat)


def test_the_devkits_list_needs_its_own_classes(flat: Path) -> None:
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n2\n1\n")
    with pytest.raises(ValueError, match=r"not as torchvision; allowed: with the devkit's meta"):
        find_samples(flat, 3)
    # The devkit's order is not the sorted one; the last has classes below it and is none itself.
    order = (IDS[2], IDS[0], IDS[1], "n00001740")
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(i + 1, w, "-", 3 * (i == 3)) for i, w in enumerate(order)], kinds)
    synsets["ILSVRC2012_ID"] = [1, 2, 3, 4]
    savemat(flat / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    assert labels(find_samples(flat, 3)) == [2, 1, 0, 2]
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n4\n1\n")
    with pytest.raises(ValueError, match="has the class '4'; allowed: those of"):
        find_samples(flat, 3)
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n")
    with pytest.raises(ValueError, match="has 2 lines; allowed: one for each of 4 images"):
        find_samples(flat, 3)


def test_what_is_no_imagenet_folder(tmp_path: Path, flat: Path) -> None:
    with pytest.raises(ValueError, match="allowed: an existing folder"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="4 images and no folders of classes; allowed: with one"):
        find_samples(flat)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images; allowed:"):
        find_samples(tmp_path / "empty")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (640, 333), (37, 37)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_is_torchvisions(tmp_path: Path, size, interpolation: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    from topi_int8.frontend.torchvision import import_torchvision

    import_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(
        crop_size=224, resize_size=256, interpolation=InterpolationMode(interpolation)
    )
    path = picture(tmp_path / "x.JPEG", 3, size)
    ours = imagenet.Preprocess(interpolation=interpolation)(path)
    assert ours.shape == (3, 224, 224) and ours.dtype == "float32"
    np.testing.assert_allclose(ours, theirs(Image.open(path)).numpy(), atol=1e-6)


def test_grey_images_have_three_channels(tmp_path: Path) -> None:
    Image.fromarray(np.full((60, 60), 128, "uint8")).save(tmp_path / "grey.png")
    got = imagenet.Preprocess(32, 32)(tmp_path / "grey.png")
    assert got.shape == (3, 32, 32)
    np.testing.assert_allclose(got[:, 0, 0], (128 / 255 - np.array(imagenet.IMAGENET_MEAN))
                               / imagenet.IMAGENET_STD, rtol=1e-5)  # fmt: skip
    (tmp_path / "torn.JPEG").write_bytes(b"\xff\xd8nothing")
    with pytest.raises(ValueError, match=r"torn\.JPEG cannot be read as an image"):
        imagenet.Preprocess()(tmp_path / "torn.JPEG")


def test_weights_say_how_they_want_their_images() -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    assert imagenet.preprocess_of("resnet50", None) == imagenet.Preprocess(256, 224)
    assert imagenet.preprocess_of("resnet50", "DEFAULT") == imagenet.Preprocess(232, 224)
    assert imagenet.preprocess_of("resnet50", "IMAGENET1K_V1") == imagenet.Preprocess(256, 224)
    b0 = imagenet.preprocess_of("efficientnet_b0", "DEFAULT")
    assert (b0.resize, b0.crop, b0.interpolation) == (256, 224, "bicubic")
    assert imagenet.preprocess_of("resnet50", None, 112) == imagenet.Preprocess(128, 112)
    with pytest.raises(ValueError, match=r"weights is 'BEST'; allowed: .*IMAGENET1K_V2, DEFAULT"):
        imagenet.preprocess_of("resnet50", "BEST")
    with pytest.raises(ValueError, match="crop is 300; allowed: 1 to resize, 256"):
        imagenet.Preprocess(256, 300)
    with pytest.raises(ValueError, match="interpolation is 'nearest'"):
        imagenet.Preprocess(interpolation="nearest")


def test_batches_keep_their_shape_and_their_order(folders: Path) -> None:
    samples = find_samples(folders, 3)[:5]
    preprocess = imagenet.Preprocess(32, 24)
    got = list(imagenet.batches(samples, 3, preprocess))
    assert [images.shape for images, _ in got] == [(3, 3, 24, 24)] * 2
    assert [list(part) for _, part in got] == [[0, 0, 1], [1, 2]]
    flat = np.concatenate([images for images, _ in got])
    for image, sample in zip(flat, samples, strict=False):
        np.testing.assert_array_equal(image, preprocess(sample.path))
    np.testing.assert_array_equal(flat[5], flat[4])  # the last one again
    assert list(imagenet.batches([], 3, preprocess)) == []


# ---------------------------------------------------------------- accuracy


def test_held_out_images_are_not_evaluated() -> None:
    samples = [Sample(Path(str(i)), i) for i in range(20)]
    held, rest = imagenet.split(samples, 5)
    assert len(held) == 5 and len(rest) == 15 and not set(held) & set(rest)
    assert imagenet.split(samples, 5) == (held, rest) and held != samples[:5]
    assert imagenet.split(samples, 5, limit=4) == (held, rest[:4])
    with pytest.raises(ValueError, match="calibration is 20 of 20 images; allowed: fewer"):
        imagenet.split(samples, 20)


def test_top1_and_top5() -> None:
    logits = -np.abs(np.arange(10)[None] - np.array([[3], [3], [3], [3]])).astype("float32")
    top = imagenet.TopK()
    top.update(logits, np.array([3, 2, 9, 5]))
    assert (top.count, top.first, top.among) == (4, 1, 3)  # 3, 2, 4, 1, 5 are its first five
    assert (top.top1, top.top5) == (0.25, 0.75)
    assert imagenet.TopK().top1 == 0


def test_evaluate_looks_at_the_labelled_images_only() -> None:
    def network(shift: int):
        return lambda images: np.roll(np.eye(10), shift, axis=1)[images[:, 0].astype(int)]

    images = np.array([[1], [2], [3], [3]])  # the last batch is filled up
    data = [(images, np.array([1, 2, 3])), (images, np.array([1, 3]))]
    found = imagenet.evaluate(network(0), network(1), data)
    assert (found.fp32.count, found.fp32.first, found.int8.first, found.same) == (5, 4, 1, 0)


def accuracy(*args: str):
    return CliRunner().invoke(cli.app, ["accuracy", *args], terminal_width=200)


@pytest.mark.model
def test_the_command_on_a_small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    # The report of layers has tests of its own, and compiles the network three times more.
    layer = LayerAccuracy(
        "conv2d_1", "t", 30.0, 1.0, 0.1, None, (), "conv2d", 12.5, None, (), is_int8=True
    )
    shapes: list[tuple[int, ...]] = []

    def report_of(fp32, int8, data, **_):
        shapes.extend(x.shape for x in data)
        return AccuracyReport((layer,), (), len(shapes))

    monkeypatch.setattr(topi_int8, "accuracy_report", report_of)
    for i in range(7):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i}.JPEG", i)
    lines = [f"ILSVRC2012_val_{i}.JPEG {i % 3}" for i in range(7)]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    out, layers, plot = (tmp_path / name for name in ("out.json", "layers.json", "layers.png"))
    done = accuracy(
        "--imagenet", str(tmp_path), "--network", "squeezenet1_1", "--image", "40", "--batch", "2",
        "--calibration", "2", "--skip", "conv2d_0", "--layers", str(layers),
        "--plot", str(plot), "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "top-5" in done.output and "of 5 images" in done.output and "Seeded" in done.output
    document = json.loads(out.read_text())
    assert document["command"] == "accuracy" and document["options"]["skip"] == ["conv2d_0"]
    both = document["accuracy"]
    assert both["fp32"]["images"] == both["int8"]["images"] == 5 >= document["same_top1"] >= 3
    assert shapes == [(2, 3, 40, 40)] * 3 and "skip conv2d_1: its own SQNR" in done.output
    assert AccuracyReport.from_json(layers.read_text()).layers == (layer,)
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--network", "resnet19"], "resnet19"),
        (["--weights", "BEST"], "weights is 'BEST'; allowed: "),
        (["--limit", "-1"], "limit is -1; allowed: 0 or more"),
        (["--batch", "0"], "batch is 0; allowed: 1 or more"),
        (["--weight-bits", "6"], "weight_bits is 6; allowed: 7, 8"),
        (["--isa", "mmx"], "isa is 'mmx'"),
    ],
)
def test_refusals(tmp_path: Path, args: list[str], words: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    done = accuracy("--imagenet", str(tmp_path), "--image", "32", *args)
    assert done.exit_code == 2
    assert words in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


def test_a_folder_of_other_classes_is_refused(folders: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    done = accuracy("--imagenet", str(folders), "--network", "squeezenet1_1", "--image", "32")
    assert done.exit_code == 2
    assert "3 classes (n01440764 .. n01484850), the network has 1000" in done.stderr
