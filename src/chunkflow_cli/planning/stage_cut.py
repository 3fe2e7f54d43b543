"""Which layers each stage of a pipeline holds.

A stage takes as long as its layers, and the last one also runs the head and the loss, which for a large vocabulary cost
as much as several layers. The pipeline is as fast as its slowest stage, so that one is made as fast as can be. The
embedding is a look-up: it takes memory on the first stage, but next to no time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StageLayers:
    """What one of the stages holds: layers `first` to `stop - 1` of the model."""

    stage: int
    stages: int
    first: int
    stop: int

    @property
    def is_first(self) -> bool:
        """Holds the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Holds the final norm and the head."""
        return self.stage == self.stages - 1

    @property
    def layers(self) -> int:
        return self.stop - self.first


def cut_layers(layers: int, stages: int, *, head_in_layers: float = 0.0) -> tuple[StageLayers, ...]:
    """The cut whose slowest stage is fastest; of equal ones that in which earlier stages hold fewer layers.

    Earlier stages keep more chunks in flight, so fewer layers there are less memory.

    Args:
        layers: of the model, equally costly.
        stages: that share them; each holds one or more.
        head_in_layers: what head and loss cost, as a multiple of a layer's cost.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages of one or more")
    if stages == 1:
        return (StageLayers(0, 1, 0, layers),)
    before = stages - 1

    def slowest(last: int) -> float:
        return max(-(-(layers - last) // before), last + head_in_layers)

    last = min(range(layers - before, 0, -1), key=slowest)  # of equals, the most layers on the last stage
    each, over = divmod(layers - last, before)
    sizes = [each] * (before - over) + [each + 1] * over + [last]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return tuple(StageLayers(stage, stages, bounds[stage], bounds[stage + 1]) for stage in range(stages))


def layer_shares(cut: tuple[StageLayers, ...]) -> NDArray[np.float64]:
    """(stages,) the share of all layers that each stage holds."""
    return np.array([stage.layers for stage in cut]) / cut[-1].stop
