"""The shared progress bar: the items as they are, the bar on stderr and only where it is wanted."""

from __future__ import annotations

import pytest

from topi_int8.progress import track


@pytest.mark.parametrize("show", [True, False])
def test_items_pass_through_lazily(show: bool) -> None:
    asked: list[int] = []

    def items():
        for i in range(3):
            asked.append(i)
            yield i

    passing = track(items(), "working", show)
    assert asked == []
    assert next(iter(passing)) == 0 and len(asked) < 3
    assert list(track([4, 5], "working", show)) == [4, 5]
    assert list(track(iter("ab"), "working", show, total=2)) == ["a", "b"]


def test_the_bar_is_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(track(range(3), "working hard", True))
    shown = capsys.readouterr()
    assert "working hard" in shown.err and shown.out == ""
    list(track(range(3), "working hard", False))
    assert capsys.readouterr().err == ""


def test_what_breaks_off_leaves_no_bar_behind() -> None:
    # rich allows one live bar at a time: a second one would raise if the first were still there.
    with pytest.raises(ValueError, match="stop"):
        for _ in track(range(3), "working", True):
            raise ValueError("stop")
    assert list(track(range(2), "working", True)) == [0, 1]
