"""What a run found: one frozen result a layer, and the totals over a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import exp, log

from .shape_lines import Shape
from .timing import Timing


@dataclass(frozen=True)
class RivalResult:
    """A rival's timing of a layer, or the words for why there is none.

    ``note`` is the kernel it chose, or "~" where few runs stand behind the number.
    """

    timing: Timing | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.timing is None and not self.note:
            raise ValueError("note is ''; allowed: the reason, when there is no timing")


@dataclass(frozen=True)
class LayerResult:
    """One layer, measured.

    Parameters
    ----------
    shape : ConvShape or MatmulShape
    strategy, intrinsic : str
        What our table chose.
    declined : tuple of (str, str)
        Faster strategies and why they said no.
    ours : Timing or None
        None when our kernel failed; `error` then says how.
    peak_gops : float or None
        Measured peak of the cores used, for this kernel's instruction.
    peak_loop : str
        The loop it was measured with.
    rivals : dict of str to RivalResult
        By the rival's name.
    checked : bool
        Whether the result was compared with the reference.
    """

    shape: Shape
    strategy: str = ""
    intrinsic: str = ""
    declined: tuple[tuple[str, str], ...] = ()
    ours: Timing | None = None
    peak_gops: float | None = None
    peak_loop: str = ""
    rivals: dict[str, RivalResult] = field(default_factory=dict)
    checked: bool = False
    error: str = ""

    def __post_init__(self) -> None:
        if self.ours is None and not self.error:
            raise ValueError("error is ''; allowed: the reason, when there is no timing")

    @property
    def gops(self) -> float | None:
        """Our GOP/s, two operations a MAC."""
        return None if self.ours is None else self.ours.gops(self.shape.macs)

    @property
    def peak_percent(self) -> float | None:
        """Our share of the measured peak, in percent."""
        if self.gops is None or not self.peak_gops:
            return None
        return 100 * self.gops / self.peak_gops

    def speedup(self, rival: str) -> float | None:
        """Return rival's minimum over ours: above 1 we are faster. None where either is missing."""
        other = self.rivals.get(rival)
        if self.ours is None or other is None or other.timing is None:
            return None
        return other.timing.min / self.ours.min


@dataclass(frozen=True)
class Totals:
    """Sums over a network, each layer times its count, and the geometric mean ratios.

    Attributes
    ----------
    layers, macs : int
        Layers and MACs, counts included, of the rows that were measured.
    us : float
        Sum of our minima, µs.
    rival_us : dict of str to float
        Sum of a rival's minima over the rows it has, µs.
    ratio : dict of str to float
        That sum over ours, on the same rows.
    geomean : dict of str to float
        Geometric mean of the rows' ratios, each row once.
    rows : dict of str to int
        How many rows stand behind a rival's numbers.
    """

    layers: int
    macs: int
    us: float
    rival_us: dict[str, float]
    ratio: dict[str, float]
    geomean: dict[str, float]
    rows: dict[str, int]

    @property
    def gops(self) -> float | None:
        """GOP/s over the whole network."""
        return 2 * self.macs / self.us / 1e3 if self.us else None


def totals(results: list[LayerResult]) -> Totals:
    """Return the totals of the rows that were measured."""
    measured = [r for r in results if r.ours is not None]
    rivals = dict.fromkeys(name for r in measured for name in r.rivals)
    rival_us: dict[str, float] = {}
    ratio: dict[str, float] = {}
    geomean: dict[str, float] = {}
    rows: dict[str, int] = {}
    for name in rivals:
        both = [r for r in measured if r.rivals.get(name, _NONE).timing is not None]
        if not both:
            continue
        rows[name] = len(both)
        rival_us[name] = sum(r.rivals[name].timing.min * r.shape.count for r in both)
        ratio[name] = rival_us[name] / sum(r.ours.min * r.shape.count for r in both)
        geomean[name] = exp(sum(log(r.speedup(name)) for r in both) / len(both))
    return Totals(
        layers=sum(r.shape.count for r in measured),
        macs=sum(r.shape.macs * r.shape.count for r in measured),
        us=sum(r.ours.min * r.shape.count for r in measured),
        rival_us=rival_us, ratio=ratio, geomean=geomean, rows=rows,
    )  # fmt: skip


_NONE = RivalResult(note="not asked")


def with_best_peaks(results: list[LayerResult]) -> list[LayerResult]:
    """Return the results with each peak at its best of the whole run."""
    best: dict[str, float] = {}
    for result in results:
        if result.peak_gops:
            best[result.peak_loop] = max(best.get(result.peak_loop, 0), result.peak_gops)
    return [replace(r, peak_gops=best.get(r.peak_loop, r.peak_gops)) for r in results]
