"""join.py: copies in order, of any shape and type."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from topi_int8.schedule.join import joined


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float32"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 14, 14, 64), (3, 1, 65, 520), (2, 1000), (5,), (2, 3, 7, 5)]
)
def test_pieces_lie_one_behind_the_other(shape, dtype) -> None:
    func = joined(shape, 3, dtype).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), "llvm")
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 100, shape).astype(dtype) for _ in range(3)]
    wanted = np.concatenate(pieces)
    out = tvm.runtime.tensor(np.zeros_like(wanted))
    library["main"](*map(tvm.runtime.tensor, pieces), out)
    np.testing.assert_array_equal(out.numpy(), wanted)


@pytest.mark.parametrize(("shape", "count"), [((2, 3), 0), ((), 2)])
def test_nothing_to_join_is_refused(shape, count) -> None:
    with pytest.raises(ValueError, match="count, shape are"):
        joined(shape, count, "uint8")
