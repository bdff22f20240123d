"""The documents' code: what docs/from_pytorch.md shows runs, and is as short as it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import sqnr

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from_pytorch.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(32, 10),
    )  # fmt: skip


def test_the_first_block_has_ten_lines() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10
    assert "in ten lines" in PAGE.read_text().splitlines()[0]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed, it links libraries")
def test_the_first_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = small_net()
    rng = np.random.default_rng(1)
    images = [rng.normal(0, 1, (1, 3, 32, 32)).astype("float32") for _ in range(4)]
    space = {"net": net, "images": images}
    exec(compile(BLOCKS[0], str(PAGE), "exec"), space)
    assert (tmp_path / "net.so").is_file()
    assert "topi_int8 on llvm" in capsys.readouterr().out
    with torch.no_grad():
        want = net(torch.from_numpy(images[0])).numpy()
    assert space["scores"].shape == (1, 10)
    assert sqnr(want, space["scores"]) > 20
