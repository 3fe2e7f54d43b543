"""How not to post receives: always ahead, whatever the neighbor still waits for."""

from __future__ import annotations

from collections.abc import Sequence

from chunkflow_cli.planning.message_order import POSTED_AHEAD, SENDS_BACK, SENDS_ON, Receive
from chunkflow_cli.planning.schedule import Schedule


def always_ahead(schedules: Sequence[Schedule], stage: int) -> list[list[Receive]]:
    """Return what `receives_of` would, if a stage posted each receive as early as it has room for it."""
    posts: list[list[Receive]] = [[] for _ in schedules[stage].ops]
    for onward, neighbour, kinds in ((True, stage - 1, SENDS_ON), (False, stage + 1, SENDS_BACK)):
        if neighbour not in range(len(schedules)):
            continue
        order = [chunk for op in schedules[neighbour].ops if op.kind in kinds for chunk in op.chunks]
        needed = posted = 0
        for index, op in enumerate(schedules[stage].ops):
            if op.kind in kinds:
                needed = max(needed, *(order.index(chunk) + 1 for chunk in op.chunks))
            posts[index] += [Receive(chunk, onward) for chunk in order[posted : needed + POSTED_AHEAD]]
            posted = max(posted, min(needed + POSTED_AHEAD, len(order)))
    return posts
