"""Divide the layers of a model among the stages of a pipeline.

A stage takes as long as its layers, and the last one also runs the head and the loss, which for a large vocabulary cost
as much as several layers. The pipeline is as fast as its slowest stage, so the cut makes that one as fast as possible.
The embedding is a look-up: it takes memory on the first stage, but next to no time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StageLayers:
    """The part of the model on one stage: layers `first` to `stop - 1`."""

    stage: int
    stages: int
    first: int
    stop: int

    @property
    def is_first(self) -> bool:
        """True for the stage with the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """True for the stage with the final norm and the head."""
        return self.stage == self.stages - 1

    @property
    def layers(self) -> int:
        return self.stop - self.first


def cut_layers(layers: int, stages: int, *, head_in_layers: float = 0.0) -> tuple[StageLayers, ...]:
    """Return the cut whose slowest stage is fastest; of equal ones, that with the fewest layers on earlier stages.

    Earlier stages keep more chunks in flight, so fewer layers there need less memory.

    Args:
        layers: number of layers, equally costly.
        stages: number of stages, each of at least one layer.
        head_in_layers: cost of head and loss divided by the cost of a layer.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages of one or more")
    before = stages - 1
    if before == 0:
        return (StageLayers(0, 1, 0, layers),)

    def slowest(last: int) -> float:
        return max(-(-(layers - last) // before), last + head_in_layers)

    last = min(range(layers - before, 0, -1), key=slowest)  # of equals, the most layers on the last stage
    each, over = divmod(layers - last, before)
    bounds = [stage * each + max(0, stage - before + over) for stage in range(stages)] + [layers]
    return tuple(StageLayers(stage, stages, bounds[stage], bounds[stage + 1]) for stage in range(stages))


def layer_shares(cut: tuple[StageLayers, ...]) -> NDArray[np.float64]:
    """Return the share of all layers that each stage holds, (stages,)."""
    return np.array([stage.layers for stage in cut]) / cut[-1].stop
