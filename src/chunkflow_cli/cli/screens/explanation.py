"""Explain the result of `chunkflow tune-chunk-size`: why the best pair is best, or why nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chunkflow_cli.console import human_seconds
from chunkflow_cli.planning.search import Candidate

ALIKE = 0.01
"""Relative difference below which two times count as equal, because predictions are not more precise."""


def explain(
    best: Candidate,
    candidates: Sequence[Candidate],
    best_of_layouts: Sequence[Candidate],
    measured_seconds: float | None,
) -> str:
    """Return two sentences: how the best pair spends its time, and what its neighbors would cost.

    Args:
        measured_seconds: of a step with the best pair, if it has run.
    """
    neighbours = _and(list(_neighbours(best, candidates, best_of_layouts)))
    return _where_time_goes(best, measured_seconds) + (
        f" {neighbours[0].upper()}{neighbours[1:]}." if neighbours else ""
    )


def nothing_fits(candidates: Sequence[Candidate], limit_bytes: int, longest: int) -> str:
    """Return the error for a search in which no candidate fits into `limit_bytes`; `longest` is in tokens."""
    least = min(candidates, key=lambda candidate: candidate.memory_bytes)
    layout = f" on {_layout(least)}" if least.stages * least.data_parallel > 1 else ""
    return (
        f"no pair fits into {limit_bytes / 2**30:.1f} GiB: the smallest, chunk.size={least.chunk_size} "
        f"chunk.k={least.k}{layout}, needs {_gib(least)} (the longest sample has {longest:,} tokens)\n"
        "  lower data.max_length or tune.chunk_sizes, or set model.activation_checkpointing=full,\n"
        "  model.lora.enabled=true or engine.offload=optimizer; `chunkflow plan` shows what takes the memory"
        + ("\n  or divide the model into more stages: cluster.pipelines" if layout else "")
    )


def _where_time_goes(best: Candidate, measured_seconds: float | None) -> str:
    total = best.step_seconds
    shares = {
        "second forwards of long samples": best.recompute_seconds,
        "the fixed cost of chunks": best.fixed_seconds,
        "waiting between stages": best.bubble_seconds,
        "the optimizer step": best.optimizer_seconds,
    }
    named = [f"{100 * seconds / total:.0f} % is {name}" for name, seconds in shares.items() if seconds > 0.005 * total]
    text = f"A step is predicted to take {human_seconds(total)}"
    if measured_seconds is not None:
        text = f"A step took {human_seconds(measured_seconds)} when it ran; {human_seconds(total)} were predicted"
    text += f", of which {_and(named)}" if named else ""
    if best.data_parallel > 1 and best.bubble_ratio > 0.005:
        text += f"; with the wait for the slowest rank, devices are idle {100 * best.bubble_ratio:.0f} % of the time"
    return f"{text}."


def _neighbours(
    best: Candidate, candidates: Sequence[Candidate], best_of_layouts: Sequence[Candidate]
) -> Iterator[str]:
    """Yield a clause for the next smaller and larger chunk size, another layout, and the other way to cut."""
    alike = [each for each in candidates if each.is_like(best)]
    smaller = [each for each in alike if each.chunk_size < best.chunk_size and each.fits]
    larger = [each for each in alike if each.chunk_size > best.chunk_size]
    compared = []
    if smaller:
        compared.append(min(smaller, key=lambda each: (-each.chunk_size, each.step_seconds)))
    if fitting := [each for each in larger if each.fits]:
        compared.append(min(fitting, key=lambda each: (each.chunk_size, each.step_seconds)))
    for times, sizes in _by_times(compared, best).items():
        yield f"chunks of {' and '.join(map(str, sizes))} take {times}"
    if larger and not fitting:
        near = min(larger, key=lambda each: (each.chunk_size, each.k))
        yield f"chunks of {near.chunk_size} would need {_gib(near)}"
    others = [each for each in best_of_layouts if each.layout != best.layout]
    if fitting := [each for each in others if each.fits]:
        near = min(fitting, key=lambda each: each.step_seconds)
        yield f"{_layout(near)} would take {_times(near, best)}"
    elif others:
        near = min(others, key=lambda each: each.memory_bytes)
        yield f"{_layout(near)} would need {_gib(near)}"
    if twins := [each for each in candidates if each.fits and each.is_at(best) and each.cuts != best.cuts]:
        yield f"cuts of equal {twins[0].cuts} would take {_times(twins[0], best)}"


def _layout(candidate: Candidate) -> str:
    grouped = f" in groups of {candidate.sequence}" if candidate.sequence > 1 else ""
    if candidate.stages == 1:
        return f"{candidate.data_parallel} ranks{grouped or ' without a pipeline'}"
    several = candidate.data_parallel > 1
    pipelines = f"{candidate.data_parallel} pipelines of " if several else "a pipeline of "
    return f"{pipelines}{candidate.stages} stages{grouped}"


def _by_times(compared: Sequence[Candidate], best: Candidate) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {}
    for each in compared:
        sizes.setdefault(_times(each, best), []).append(each.chunk_size)
    return sizes


def _times(other: Candidate, best: Candidate) -> str:
    ratio = other.step_seconds / best.step_seconds
    return "just as long" if abs(ratio - 1) < ALIKE else f"{ratio:.2f} times as long ({_why(other, best)})"


def _why(other: Candidate, best: Candidate) -> str:
    """Name what makes most of the difference between two candidates."""
    differences = {
        "second forwards": other.recompute_seconds - best.recompute_seconds,
        "the fixed cost of chunks": other.fixed_seconds - best.fixed_seconds,
        "waiting": other.waiting_seconds - best.waiting_seconds,
        "the optimizer step": other.optimizer_seconds - best.optimizer_seconds,
    }
    slower = other.step_seconds >= best.step_seconds
    name = max(differences, key=lambda key: differences[key] if slower else -differences[key])
    return f"{'more' if slower else 'less'} time for {name}"


def _gib(candidate: Candidate) -> str:
    return f"{candidate.memory_bytes / 2**30:.1f} GiB"


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
