"""An output stage of TE under the names that the sums' axes have, and its tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te

from ..schedule.stages import rows_per_task


@dataclass
class Tiling:
    """An output stage, and its axes by the sums' names for them; None: of one element."""

    stage: Any
    n: Any
    ob: Any
    oh: Any
    ow: Any
    o: Any

    def split(self, name: str, factor: int) -> tuple[Any, Any]:
        """Split an axis; (None, None) if it is not there."""
        axis = getattr(self, name)
        return (None, None) if axis is None else self.stage.split(axis, factor)

    def order(self, *axes: Any) -> None:
        """Order the axes that are there."""
        self.stage.reorder(*(axis for axis in axes if axis is not None))

    def unroll(self, *axes: Any) -> None:
        """Unroll the axes that are there."""
        for axis in axes:
            if axis is not None:
                self.stage.unroll(axis)

    def parallel(self, outer: list[Any], rows: Any) -> None:
        """Run a nest in parallel, as `schedule.stages.parallel_tasks` does."""
        nest = [axis for axis in outer if axis is not None]
        if rows is not None:
            count = 1
            for axis in nest:
                count *= _extent(self.stage, axis)
            task, _ = self.stage.split(rows, rows_per_task(count, _extent(self.stage, rows)))
            nest = [*nest, task]
        if nest:
            self.stage.parallel(self.stage.fuse(*nest) if len(nest) > 1 else nest[0])


def _extent(stage: Any, axis: Any) -> int:
    """Return an axis's extent; TE knows it of root axes, and of splits by their relation."""
    if axis.dom is not None:
        return int(axis.dom.extent)
    for relation in stage.relations:
        if isinstance(relation, te.schedule.Split):
            if axis.same_as(relation.inner):
                return int(relation.factor)
            if axis.same_as(relation.outer):
                return -(-_extent(stage, relation.parent) // int(relation.factor))
    raise ValueError(f"the extent of {axis} is not known")
