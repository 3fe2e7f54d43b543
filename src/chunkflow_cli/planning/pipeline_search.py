"""The order of sequences and the warm-up that simulate fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.pipeline_orders import Unit, live_activations, state_aware_1f1b, units_of
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def searched(
    chunks: Chunks,
    k: int,
    stages: int,
    seconds: OperationSeconds,
    most_warmup_extra: int = 2,
    *,
    most_live: int | None = None,
    simulated_operations: int = 1_000_000,
) -> tuple[Schedule, ...]:
    """The fastest state-aware 1F1B that was found: its order of standalone chunks and long sequences, its warm-up.

    First the orders that rules give (standalone chunks before, after, around and between the long sequences; each kind
    as it comes, longest or shortest first), each with each warm-up; then moves of one unit from the best on, as long as
    the budget lasts. The result depends on nothing but the arguments. Of equally fast ones the one with the fewest live
    activations wins, then the first.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        seconds: what the schedules are simulated with.
        most_warmup_extra: warm-up forwards more than P - 1 - s are tried from 0 up to this.
        most_live: live activations that a stage has room for; None: as many as the fastest takes.
        simulated_operations: when to stop; a million take about two seconds.

    Raises:
        ValueError: state-aware 1F1B without extra warm-up already exceeds `most_live`.
    """
    search = _Search(chunks, k, stages, seconds, most_live, simulated_operations)
    units = units_of(chunks)
    warmups = range(most_warmup_extra + 1)
    best = search.measure(units, 0)
    if best is None:
        raise ValueError(f"most_live={most_live}: state-aware 1F1B holds more live activations than that")
    for order in itertools.chain([tuple(units)], _orders_by_rule(units, seconds)):
        for warmup in warmups:
            best = min(best, search.measure(order, warmup) or best)
    improved = True
    while improved and search.has_budget:
        improved = False
        for order in _moves(best.units):
            found = search.measure(order, best.warmup_extra)
            if not search.has_budget:
                break
            if found is not None and found < best:
                best, improved = found, True
                break
    return state_aware_1f1b(chunks, k, stages, best.warmup_extra, best.units)


@dataclass(frozen=True, order=True)
class _Found:
    makespan: float
    live: int
    turn: int
    """How many schedules were measured before: of equals the first wins."""
    warmup_extra: int
    units: tuple[Unit, ...]


class _Search:
    """Measures each schedule once, and counts what that took."""

    def __init__(
        self,
        chunks: Chunks,
        k: int,
        stages: int,
        seconds: OperationSeconds,
        most_live: int | None,
        simulated_operations: int,
    ) -> None:
        self._chunks, self._k, self._stages, self._seconds = chunks, k, stages, seconds
        self._most_live = most_live
        self._operations_left = simulated_operations
        self._found: dict[tuple[tuple[Unit, ...], int], _Found | None] = {}

    @property
    def has_budget(self) -> bool:
        return self._operations_left > 0

    def measure(self, units: Sequence[Unit], warmup_extra: int) -> _Found | None:
        """None if the schedule holds too much, or if the budget is spent; the first is measured in any case."""
        key = (tuple(units), warmup_extra)
        if key in self._found:
            return self._found[key]
        if self._found and not self.has_budget:
            return None
        schedules = state_aware_1f1b(self._chunks, self._k, self._stages, warmup_extra, units)
        self._operations_left -= sum(len(schedule.ops) for schedule in schedules)
        live = max(live_activations(schedule) for schedule in schedules)
        found = None
        if self._most_live is None or live <= self._most_live:
            makespan = simulate(schedules, self._seconds).makespan
            found = _Found(makespan, live, len(self._found), warmup_extra, key[0])
        self._found[key] = found
        return found


def _orders_by_rule(units: Sequence[Unit], seconds: OperationSeconds) -> Iterator[tuple[Unit, ...]]:
    work = (seconds.forward + seconds.backward).sum(axis=0)
    cost = {unit: float(sum(work[chunk] for chunk in unit)) for unit in units}
    standalone: list[Unit] = [unit for unit in units if len(unit) == 1]
    long: list[Unit] = [unit for unit in units if len(unit) > 1]

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
    """As many standalone chunks before each long sequence as after the last one."""
    shares = np.array_split(np.arange(len(standalone)), len(long) + 1)
    order: list[Unit] = []
    for share, sequence in itertools.zip_longest(shares, long):
        order += [standalone[index] for index in share]
        order += [sequence] if sequence is not None else []
    return tuple(order)


def _moves(units: tuple[Unit, ...]) -> Iterator[tuple[Unit, ...]]:
    """Every order in which one unit stands elsewhere: long sequences are moved first, they matter most."""
    for unit in sorted(units, key=lambda unit: (-len(unit), unit)):
        others = [other for other in units if other != unit]
        for place in range(len(units)):
            moved = (*others[:place], unit, *others[place:])
            if moved != units:
                yield moved
