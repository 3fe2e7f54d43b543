"""When a run hangs, and what is said of it: no rank has begun another operation for too long.

Our launcher looks at the ranks that it has started (`supervisor.py`). Those that torchrun or deepspeed has started look
after each other: a thread of the first rank watches, and a thread in each obeys it (`watched_together`).
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from chunkflow_cli.processes.heartbeat import Standstill, Watchdog
from chunkflow_cli.processes.worker import END, STACKS, STACKS_SIGNAL, WatchFolder, follow_orders, write_order

STACKS_SECONDS = 1.0
"""For ranks that hang to write their stacks."""


def is_hang(standing: Sequence[Standstill], ranks: Collection[int], limit_seconds: float) -> bool:
    """Whether none of these ranks has moved for so long; a limit of 0 is never reached."""
    return limit_seconds > 0 and all(standing[rank].seconds >= limit_seconds for rank in ranks)


def places(standing: Sequence[Standstill], ranks: Collection[int]) -> str:
    """A line for each rank: where it stands, and for how long."""
    return "\n".join(f"  rank {rank}: {standing[rank].place}, for {_seconds(standing[rank].seconds)}" for rank in ranks)


def hang_message(
    standing: Sequence[Standstill], ranks: Collection[int], limit_seconds: float, watch: WatchFolder
) -> str:
    return (
        f"no rank has moved for launch.hang_seconds={limit_seconds:g}: the run hangs and is ended\n"
        f"{places(standing, ranks)}\n"
        f"  where in the code each one stands is at the end of its log: {watch.log(0).parent}\n"
        "  one that stands elsewhere than the others is the one they wait for; "
        "0 turns this off, if a single operation may take so long"
    )


def look_every(limit_seconds: float) -> float:
    """Seconds between two looks."""
    return min(1.0, limit_seconds / 10 or 1.0)


@contextmanager
def watched_together(watch: WatchFolder, rank: int, processes: int, limit_seconds: float) -> Iterator[None]:
    """Within it a run whose ranks nobody watches is ended when it hangs, by SIGKILL to all; its launcher reports that.

    Args:
        watch: emptied before any rank is here; on a disk that all nodes share.
        rank: of this process.
        processes: of the run.
        limit_seconds: as `launch.hang_seconds`.
    """
    ended = threading.Event()
    watch.log(rank).parent.mkdir(parents=True, exist_ok=True)
    with watch.log(rank).open("a") as stacks:
        faulthandler.register(STACKS_SIGNAL, stacks)
        threads = [threading.Thread(target=follow_orders, args=(watch, ended), name="orders of rank 0", daemon=True)]
        if rank == 0:
            threads.append(
                threading.Thread(
                    target=_watch, args=(watch, processes, limit_seconds, ended), name="watch over hangs", daemon=True
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
            faulthandler.unregister(STACKS_SIGNAL)


def _watch(watch: WatchFolder, processes: int, limit_seconds: float, ended: threading.Event) -> None:
    ranks = range(processes)
    watchdog = Watchdog([watch.heartbeat(rank) for rank in ranks], time.monotonic)
    while not ended.wait(look_every(limit_seconds)):
        standing = watchdog.look()
        if is_hang(standing, ranks, limit_seconds):
            print(f"error: {hang_message(standing, ranks, limit_seconds, watch)}", file=sys.stderr, flush=True)
            write_order(watch, STACKS)
            time.sleep(STACKS_SECONDS)
            write_order(watch, END)
            return


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
