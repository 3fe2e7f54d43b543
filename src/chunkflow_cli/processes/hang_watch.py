"""Detect that a run hangs, which means that no rank starts a new operation for too long, and say where each rank is.

Our launcher watches the ranks that it started (`supervisor.py`). The ranks that torchrun or deepspeed started watch
each other: a thread of rank 0 looks for a hang, and a thread of each rank obeys its orders (`watched_together`).
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from chunkflow_cli.console import human_seconds
from chunkflow_cli.processes.heartbeat import Standstill, Watchdog
from chunkflow_cli.processes.watch_folder import Order, WatchFolder, follow_orders, write_order

STACKS_SECONDS = 1.0
"""Time for hanging ranks to write their stacks."""


def places(standing: Sequence[Standstill], ranks: Collection[int]) -> str:
    """Return a line for each rank: its operation, and for how long it has been at it."""
    return "\n".join(
        f"  rank {rank}: {standing[rank].place}, for {human_seconds(standing[rank].seconds)}" for rank in ranks
    )


def hang_message(
    standing: Sequence[Standstill], ranks: Collection[int], limit_seconds: float, watch: WatchFolder
) -> str | None:
    """Return the error message if none of these ranks has moved for `limit_seconds`, else None. 0 means no limit."""
    if limit_seconds == 0 or any(standing[rank].seconds < limit_seconds for rank in ranks):
        return None
    return (
        f"no rank started a new operation for launch.hang_seconds={limit_seconds:g}: the run hangs and is killed\n"
        f"{places(standing, ranks)}\n"
        "  a rank that is at a different operation is the one the others are waiting for\n"
        f"  each rank's log ends with its Python stacks: {watch.log(0).parent}\n"
        "  if a single operation can take this long, raise launch.hang_seconds; 0 disables the check"
    )


def look_every(limit_seconds: float) -> float:
    """Return the seconds between two looks at the ranks."""
    return min(1.0, limit_seconds / 10 or 1.0)


@contextmanager
def watched_together(watch: WatchFolder, rank: int, processes: int, limit_seconds: float) -> Iterator[None]:
    """Kill the run if it hangs within the block and no launcher of ours watches it.

    Every rank kills itself with SIGKILL, which its launcher reports; rank 0 prints why.

    Args:
        watch: prepared before any rank gets here, on a disk that all nodes share.
        limit_seconds: `launch.hang_seconds`.
    """
    ended = threading.Event()
    with watch.log(rank).open("a") as stacks:
        faulthandler.register(Order.STACKS.value, stacks)
        threads = [threading.Thread(target=follow_orders, args=(watch, ended), name="orders of rank 0", daemon=True)]
        if rank == 0:
            threads.append(
                threading.Thread(
                    target=_watch, args=(watch, processes, limit_seconds, ended), name="hang watch", daemon=True
                )
            )
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()
            faulthandler.unregister(Order.STACKS.value)


def _watch(watch: WatchFolder, processes: int, limit_seconds: float, ended: threading.Event) -> None:
    ranks = range(processes)
    watchdog = Watchdog([watch.heartbeat(rank) for rank in ranks], time.monotonic)
    while not ended.wait(look_every(limit_seconds)):
        message = hang_message(watchdog.look(), ranks, limit_seconds, watch)
        if message is not None:
            print(f"error: {message}", file=sys.stderr, flush=True)
            write_order(watch, Order.STACKS)
            time.sleep(STACKS_SECONDS)
            write_order(watch, Order.END)
            return
