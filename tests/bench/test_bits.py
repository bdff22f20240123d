"""`bench bits`: its lines, its page, and the target beside which packed weights stand."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="bench bits imports torch's frontend")

from bench import bits
from bench.timing import Timing
from tests.packed import packing_target
from topi_int8.quantize import quantize
from topi_int8.target import features


def test_lines_say_what_was_found_or_why_not():
    line = bits.Widths(4, "uint8", "", 17.25, (7, 8), (2, 21), Timing((1500.0,)), Timing((2e3,)))
    assert line.cells() == ["4", "uint8", "yes", "17.2", "7/8", "2/21", "1.50", "2.00"]
    refused = bits.Widths(1, "uint8", "no zero")
    assert refused.cells()[:3] == ["1", "uint8", "refused: no zero"]
    rows = bits.markdown([line, refused]).splitlines()
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(("weights", "activations"), bits.SWEEP)
def test_the_sweep_is_made_or_refused_by_name(weights, activations):
    """Whatever is refused is so before anything is calibrated, with a reason."""
    try:
        quantize(None, [], weight_bits=weights, activation_dtype=activations)
    except ValueError as error:
        assert (weights, activations) in ((1, "uint8"), (8, "int16"), (8, "int32"))
        assert "allowed: " in str(error) and "(" in str(error)
    except TypeError as error:
        assert "mod is NoneType" in str(error)


def test_a_target_without_unpacking_is_the_same_otherwise():
    target = packing_target("avx512_vnni")
    plain = features(bits.without_unpacking(target))
    assert features(target).llvm - plain.llvm == {"gfni"}
    assert plain.isas == features(target).isas


def test_a_page_keeps_what_is_around_its_tables():
    page = "before\n<!-- bits -->\nold\n<!-- /bits -->\nafter\n"
    made = bits.put(page, "| new |\n")
    assert made == "before\n<!-- bits -->\n| new |\n<!-- /bits -->\nafter\n"
    for broken in ("nothing", "<!-- bits -->", page + page, "<!-- /bits --> <!-- bits -->"):
        with pytest.raises(ValueError, match="allowed: both, once"):
            bits.put(broken, "")
