"""Schedules of a pipeline: what each stage does in one optimizer step, and the proof that it is right.

    stage 0   F0 F1 S2 F3 B0 B1 B3 R2 B2         two standalone chunks, then a sequence of two chunks, K = 1
    stage 1   F0 F1 S2 B0 F3 B1 B3 R2 B2

1F1B (PipeDream-Flush: Narayanan et al. 2021, arXiv 2006.09503): stage `s` of `P` runs `P - 1 - s` warm-up forwards,
then one forward and one backward in turn. State-aware 1F1B (ChunkFlow, arXiv 2503.02356, section 4.3): forwards in the
order of the chunks, the backwards of a sequence descending, and where 1F1B would run a backward whose later sibling has
not run, another forward instead.

What is ours:
- A stage recomputes *locally*, from its input of the state pass, which it keeps. Sent through the stages again, a
  recompute costs more than it saves: worse than plain 1F1B in the paper's own example.
- `warmup_extra`: more warm-up forwards a stage. One reaches the bubble of equally long sequences in that example.
- *Whole units ahead*: while a long sequence goes backward, P - 1 - s whole units (standalone chunks, long sequences)
  after it have been forwarded, not P - 1 - s chunks, or the pipeline drains and fills again at every long sequence. On
  data with many, chunk by chunk is worse than no chunks at all; the price is the state of as many sequences.
- *Room*: stage `s` holds at most K + P - 1 - s + warmup_extra live activations, however long the sequences are. What
  would exceed that is forwarded later; state passes leave no activations.

Why plain and state-aware 1F1B never deadlock: all stages run the same forwards and the same backwards in one order, and
a stage runs at least as many forwards before its j-th backward as the stage after it. So a forward waits only for
earlier forwards of the stage before, and for backwards that themselves wait only for earlier forwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.pipeline_orders import plain_1f1b, state_aware_1f1b
from chunkflow_cli.planning.pipeline_search import searched
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.planning.simulate import OperationSeconds
from chunkflow_cli.planning.zero_bubble import zero_bubble

PIPELINE_SCHEDULES = ("1f1b", "state_aware_1f1b", "searched", "zero_bubble")
CHOSEN_BY_SECONDS = ("searched", "zero_bubble")
"""Those that depend on how long operations take."""


@dataclass(frozen=True)
class PipelineLayout:
    """How the model lies on the stages of a pipeline, and how they take turns."""

    stages: int
    schedule: str = "state_aware_1f1b"
    """One of PIPELINE_SCHEDULES."""
    warmup_extra: int = 0
    """More warm-up forwards a stage than 1F1B has; each takes about one more live activation. `searched` tries all
    from 0 up to this, or up to 2."""
    most_live: int | None = None
    """Live activations that a stage has room for; what `searched` and `zero_bubble` take must stay within it."""

    def __post_init__(self) -> None:
        if self.schedule not in PIPELINE_SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(PIPELINE_SCHEDULES)}")
        for name, least in (("stages", 1), ("warmup_extra", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def plan_pipeline(
    chunks: Chunks, k: int, layout: PipelineLayout, seconds: OperationSeconds | None = None
) -> tuple[Schedule, ...]:
    """The operations of one step, a schedule for each stage.

    Args:
        chunks: the chunks of the step of one data-parallel rank.
        k: how many chunks of a long sequence keep their activations.
        layout: the stages.
        seconds: what `searched` and `zero_bubble` choose by; proportional to tokens if not given.
    """
    if seconds is None and layout.schedule in CHOSEN_BY_SECONDS:
        seconds = OperationSeconds.proportional(chunk_tokens(chunks), layout.stages)
    match layout.schedule:
        case "1f1b":
            return plain_1f1b(chunks, k, layout.stages, layout.warmup_extra)
        case "zero_bubble":
            assert seconds is not None
            return zero_bubble(chunks, k, layout.stages, seconds, layout.warmup_extra, most_live=layout.most_live)
        case "searched":
            assert seconds is not None
            return searched(chunks, k, layout.stages, seconds, max(2, layout.warmup_extra), most_live=layout.most_live)
        case _:
            return state_aware_1f1b(chunks, k, layout.stages, layout.warmup_extra)


def sequences_as_chunks(lengths: ArrayLike) -> Chunks:
    """The micro-batches of plain training, to compare with: each sequence whole, in the data's order.

    Args:
        lengths: (sequences,) tokens of each sequence.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    index = np.arange(len(sizes))
    return Chunks(int(sizes.max(initial=1)), np.arange(len(sizes) + 1), index, np.zeros_like(sizes), sizes, sizes)


def chunk_tokens(chunks: Chunks) -> NDArray[np.int64]:
    """(chunks,): tokens of each chunk."""
    ends = np.concatenate([[0], np.cumsum(chunks.stop - chunks.start)])
    return np.diff(ends[chunks.first_segment])


def activation_bound(k: int, layout: PipelineLayout) -> tuple[int, ...]:
    """Live activations that no stage exceeds, whatever the lengths: (stages,).

    Plain 1F1B: K (P - s + warmup_extra). State-aware: K + P - 1 - s + warmup_extra; `searched` has the largest warm-up
    it may try, and `zero_bubble` the room of the fullest stage on all.
    """
    stages = layout.stages
    in_flight = [stages - stage + layout.warmup_extra for stage in range(stages)]
    match layout.schedule:
        case "1f1b":
            return tuple(k * held for held in in_flight)
        case "zero_bubble":
            return (k - 1 + in_flight[0] if layout.most_live is None else layout.most_live,) * stages
        case "searched":
            tried = max(2, layout.warmup_extra)
            held = [k - 1 + stages - stage + tried for stage in range(stages)]
            return tuple(held if layout.most_live is None else [min(layout.most_live, most) for most in held])
        case _:
            return tuple(k - 1 + held for held in in_flight)
