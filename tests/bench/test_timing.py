"""bench/timing.py: rounds alternate, minima are over all of them, and a failure stays its own."""

import pytest

from bench.timing import SAMPLE_SECONDS, Timing, evaluator_sampler, interleave


def test_timing():
    timing = Timing((3.0, 1.0, 2.0))
    assert (timing.min, timing.median) == (1.0, 2.0)
    assert timing.gops(500_000) == pytest.approx(1000)
    for bad in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="samples"):
            Timing(bad)


def test_sampler_fills_its_time():
    asked = []

    def evaluate(number, repeat):
        asked.append((number, repeat))
        return [1e-5] * repeat

    assert evaluator_sampler(evaluate)(0.01) == pytest.approx([10.0] * 50)
    number, repeat = asked[-1]
    assert number * 1e-5 == pytest.approx(SAMPLE_SECONDS)
    assert number * repeat * 1e-5 == pytest.approx(0.01)


def test_a_slow_kernel_is_sampled_once():
    assert evaluator_sampler(lambda number, repeat: [2.0] * (number * repeat))(0.1) == [2e6]


def test_interleave():
    order = []

    def sampler(name, values):
        left = iter(values)

        def sample(seconds):
            order.append((name, seconds))
            value = next(left)
            if value is None:
                raise RuntimeError(f"{name} broke")
            return [value]

        return sample

    found = interleave({"a": sampler("a", [3.0, 1.0, 2.0]), "b": sampler("b", [5.0, None])}, 3, 0.5)
    assert [name for name, _ in order] == ["a", "b", "a", "b", "a"]
    assert {seconds for _, seconds in order} == {0.5}
    assert found["a"] == Timing((3.0, 1.0, 2.0))
    assert str(found["b"]) == "b broke"
