"""Search for the order of sequences and the warm-up that simulate fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks, Unit
from chunkflow_cli.planning.pipeline_orders import live_activations, state_aware_1f1b
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def searched(
    chunks: Chunks,
    k: int,
    seconds: OperationSeconds,
    most_warmup_extra: int = 2,
    *,
    simulated_operations: int = 1_000_000,
) -> tuple[Schedule, ...]:
    """Return the fastest state-aware 1F1B that is found by varying the order of units and the warm-up.

    The search first tries the orders that rules give, each with each warm-up. Then, until the budget is spent, it moves
    one unit at a time from the best order on. The result depends only on the arguments. Of equally fast schedules the
    one with the fewest live activations wins, then the first.

    Args:
        k: how many chunks of a long sequence keep their activations.
        seconds: durations by which the schedules of all stages are simulated.
        most_warmup_extra: the largest `warmup_extra`; all from 0 on are tried.
        simulated_operations: the budget; a million take about two seconds.
    """
    search = _Search(chunks, k, seconds, simulated_operations)
    units = tuple(chunks.units())
    for order in itertools.chain([units], _orders_by_rule(units, seconds)):
        for warmup_extra in range(most_warmup_extra + 1):
            search.improves(order, warmup_extra)
    improved = True
    while improved:
        improved = False
        for order in _moves(search.units):
            if search.operations_left <= 0:
                break
            if search.improves(order, search.warmup_extra):
                improved = True
                break
    return search.schedules


class _Search:
    """The best schedules so far. Each order is simulated at most once, as long as the budget lasts."""

    def __init__(self, chunks: Chunks, k: int, seconds: OperationSeconds, simulated_operations: int) -> None:
        self._chunks, self._k, self._seconds = chunks, k, seconds
        self.operations_left = simulated_operations
        self._tried: set[tuple[tuple[Unit, ...], int]] = set()
        self._cost = (float("inf"), 0)
        """The makespan and the live activations of the fullest stage."""
        self.units: tuple[Unit, ...] = ()
        self.warmup_extra = 0
        self.schedules: tuple[Schedule, ...] = ()

    def improves(self, units: tuple[Unit, ...], warmup_extra: int) -> bool:
        """Simulate an order and keep it if it is better; the first is simulated whatever the budget."""
        if (units, warmup_extra) in self._tried or (self._tried and self.operations_left <= 0):
            return False
        self._tried.add((units, warmup_extra))
        schedules = state_aware_1f1b(self._chunks, self._k, self._seconds.stages, warmup_extra, units)
        self.operations_left -= sum(len(schedule.ops) for schedule in schedules)
        cost = (simulate(schedules, self._seconds).makespan, max(map(live_activations, schedules)))
        if cost >= self._cost:
            return False
        self._cost, self.units, self.warmup_extra, self.schedules = cost, units, warmup_extra, schedules
        return True


def _orders_by_rule(units: Sequence[Unit], seconds: OperationSeconds) -> Iterator[tuple[Unit, ...]]:
    """Yield standalone chunks before, after, around and between the long sequences, each kind in three orders."""
    work = (seconds.forward + seconds.backward).sum(axis=0)
    cost = {unit: float(sum(work[chunk] for chunk in unit)) for unit in units}
    standalone: list[Unit] = [unit for unit in units if len(unit) == 1]
    long = [unit for unit in units if len(unit) > 1]

    def sorted_ways(same_kind: list[Unit]) -> list[list[Unit]]:
        ascending = sorted(same_kind, key=lambda unit: cost[unit])
        return [same_kind, ascending[::-1], ascending]

    for long_order in sorted_ways(long):
        for order in sorted_ways(standalone):
            half = len(order) // 2
            yield (*order, *long_order)
            yield (*long_order, *order)
            yield (*order[:half], *long_order, *order[half:])
            yield _spread(order, long_order)


def _spread(standalone: Sequence[Unit], long: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return an order with as many standalone chunks before each long sequence as after the last one."""
    shares = np.array_split(np.arange(len(standalone)), len(long) + 1)
    order: list[Unit] = []
    for share, sequence in itertools.zip_longest(shares, long):
        order += [standalone[index] for index in share]
        order += [sequence] if sequence is not None else []
    return tuple(order)


def _moves(units: tuple[Unit, ...]) -> Iterator[tuple[Unit, ...]]:
    """Yield every order with one unit in another place. Long sequences move first, because they matter most."""
    for unit in sorted(units, key=lambda unit: (-len(unit), unit)):
        others = [other for other in units if other != unit]
        for place in range(len(units)):
            moved = (*others[:place], unit, *others[place:])
            if moved != units:
                yield moved
