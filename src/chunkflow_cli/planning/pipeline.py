"""Plan what each stage of a pipeline does in one optimizer step.

    stage 0   F0 F1 S2 F3 B0 B1 B3 R2 B2         two standalone chunks, then a sequence of two chunks, K = 1
    stage 1   F0 F1 S2 B0 F3 B1 B3 R2 B2

1F1B (PipeDream-Flush: Narayanan et al. 2021, arXiv 2006.09503): stage `s` of `P` runs `P - 1 - s` warm-up forwards,
then one forward and one backward in turn. State-aware 1F1B (ChunkFlow, arXiv 2503.02356, section 4.3): forwards in the
order of the chunks, the backwards of a sequence descending, and where 1F1B would run a backward whose later sibling has
not run, another forward instead.

Chunkflow differs from the paper in four ways:
- A stage recomputes *locally*, from its input of the state pass, which it keeps. Sent through the stages again, a
  recompute costs more than it saves: worse than plain 1F1B in the paper's own example.
- `warmup_extra` adds warm-up forwards to every stage. One reaches the bubble of equally long sequences in that example.
- *Whole units ahead*: while a long sequence goes backward, P - 1 - s whole units (standalone chunks, long sequences)
  after it have been forwarded, not P - 1 - s chunks. Otherwise the pipeline drains and fills again at every long
  sequence, and on data with many of them that is worse than no chunks at all. The price is their state.
- *Room*: stage `s` holds at most K + P - 1 - s + warmup_extra live activations, however long the sequences are. A
  forward that would exceed that waits; state passes leave no activations.

Plain and state-aware 1F1B never deadlock: all stages run the same forwards and the same backwards in one order, and a
stage runs at least as many forwards before its j-th backward as the stage after it. So a forward waits only for earlier
forwards of the stage before, and for backwards that themselves wait only for earlier forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.costs import chunk_tokens
from chunkflow_cli.planning.pipeline_orders import plain_1f1b, state_aware_1f1b
from chunkflow_cli.planning.pipeline_search import searched
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.planning.simulate import OperationSeconds
from chunkflow_cli.planning.zero_bubble import zero_bubble

PIPELINE_SCHEDULES = ("1f1b", "state_aware_1f1b", "searched", "zero_bubble")
CHOSEN_BY_SECONDS = ("searched", "zero_bubble")
"""The schedules that depend on how long operations take."""


@dataclass(frozen=True)
class PipelineLayout:
    """How many stages a pipeline has, and how they take turns."""

    stages: int
    schedule: str = "state_aware_1f1b"
    """One of PIPELINE_SCHEDULES."""
    warmup_extra: int = 0
    """Warm-up forwards per stage in addition to those of 1F1B; each takes about one more live activation."""

    def __post_init__(self) -> None:
        if self.schedule not in PIPELINE_SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(PIPELINE_SCHEDULES)}")
        for name, least in (("stages", 1), ("warmup_extra", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def most_warmup_extra(self) -> int:
        """The largest `warmup_extra` that a schedule may have: `searched` tries all from 0 to 2, or to a larger one."""
        return max(2, self.warmup_extra) if self.schedule == "searched" else self.warmup_extra


def plan_pipeline(
    chunks: Chunks, k: int, layout: PipelineLayout, seconds: OperationSeconds | None = None
) -> tuple[Schedule, ...]:
    """Return the operations of one step of a data-parallel rank, one schedule per stage.

    Args:
        k: how many chunks of a long sequence keep their activations.
        seconds: durations by which `searched` and `zero_bubble` choose; by default proportional to tokens.
    """
    if seconds is None:
        seconds = OperationSeconds.proportional(chunk_tokens(chunks), layout.stages)
    match layout.schedule:
        case "1f1b":
            return plain_1f1b(chunks, k, layout.stages, layout.warmup_extra)
        case "zero_bubble":
            return zero_bubble(chunks, k, seconds, layout.warmup_extra)
        case "searched":
            return searched(chunks, k, seconds, layout.most_warmup_extra)
        case _:
            return state_aware_1f1b(chunks, k, layout.stages, layout.warmup_extra)


def sequences_as_chunks(lengths: ArrayLike) -> Chunks:
    """Return the micro-batches of plain training, for comparison: each sequence whole, in the data's order.

    Args:
        lengths: (sequences,) tokens of each sequence.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    index = np.arange(len(sizes))
    return Chunks(int(sizes.max(initial=1)), np.arange(len(sizes) + 1), index, np.zeros_like(sizes), sizes, sizes)


def activation_bound(k: int, layout: PipelineLayout) -> tuple[int, ...]:
    """Return the live activations that each stage never exceeds, (stages,), for any lengths.

    K (P - s + warmup_extra) with plain 1F1B, and K + P - 1 - s + warmup_extra with state-aware 1F1B. `searched` has the
    largest warm-up that it may try, and `zero_bubble` the bound of the fullest stage on all.
    """
    in_flight = [layout.stages - stage + layout.most_warmup_extra for stage in range(layout.stages)]
    if layout.schedule == "1f1b":
        return tuple(k * held for held in in_flight)
    if layout.schedule == "zero_bubble":
        return (k - 1 + in_flight[0],) * layout.stages
    return tuple(k - 1 + held for held in in_flight)
