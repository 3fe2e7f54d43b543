"""The values that change during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chunkflow_cli.execution.step import StepResult
from chunkflow_cli.planning.run_plan import StepPlan
from chunkflow_cli.processes.heartbeat import Heartbeat


@dataclass
class Progress:
    """How far a run has come: what a continuation needs besides weights, optimizer states and random states."""

    step: int = 0
    """Optimizer steps done. The position in the data follows from it."""
    samples_trained: int = 0
    target_tokens_planned: int = 0
    target_tokens_trained: int = 0
    tokens_trained: int = 0
    chunks: int = 0
    chunk_size: int = 0
    """The largest `chunk.size` of the steps done: a run may go on with another one."""
    recomputed_chunks: int = 0
    train_seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    eval_loss_start: float | None = None
    eval_loss_end: float | None = None
    eval_parts_start: dict[str, float] = field(default_factory=dict)
    """Held-out losses of sources and of ranges of lengths, by name."""
    eval_parts_end: dict[str, float] = field(default_factory=dict)
    eval_step: int | None = None
    """The step after which `eval_loss_end` was measured."""
    best_eval_loss: float | None = None
    """The lowest held-out loss after a step."""
    best_step: int | None = None
    evaluations_since_best: int = 0
    unevaluated: dict[str, Any] | None = None
    """Row of metrics of the last step, if the run was stopped before that step was evaluated."""
    eval_accuracy_start: float | None = None
    """Share of held-out pairs whose chosen answer has the higher reward, before the first step. None with a reference
    model: it is the model itself then."""
    eval_accuracy_end: float | None = None

    def add(self, step: StepPlan, result: StepResult, seconds: float, *, chunk_size: int) -> None:
        """Count a step that is done; `result` holds the loss and the targets of all ranks."""
        self.chunk_size = max(self.chunk_size, chunk_size)
        self.step += 1
        self.samples_trained += len(step.samples)
        self.target_tokens_planned += step.target_tokens
        self.target_tokens_trained += result.target_tokens
        self.tokens_trained += step.tokens
        self.chunks += step.chunks
        self.recomputed_chunks += step.recomputed_chunks
        self.train_seconds += seconds
        self.loss_first = result.loss if self.loss_first is None else self.loss_first
        self.loss_last = result.loss

    def add_evaluation(self, loss: float) -> bool:
        """Count an evaluation after the last step, and return whether its held-out loss is the lowest so far."""
        self.eval_step = self.step
        if self.best_eval_loss is not None and loss >= self.best_eval_loss:
            self.evaluations_since_best += 1
            return False
        self.best_eval_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
        return True

    def forget_best(self) -> None:
        """Count as if no step had been evaluated yet."""
        self.best_eval_loss, self.best_step, self.evaluations_since_best = None, None, 0


@dataclass
class RunState:
    """Everything that changes while a run is prepared, trained and finished, on one process."""

    heartbeat: Heartbeat
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    """The step that runs now, counted from 1; 0 before the first."""
    stop_requested: bool = False
    """True once this process has received Ctrl-C or SIGTERM."""
    random_states: dict[str, Any] = field(default_factory=dict)
    """The random states after the last whole step. An interrupted step has drawn more numbers since."""
    held_out_rewards: dict[str, float] = field(default_factory=dict)
    """Metrics of preferences on the held-out samples, as they were last measured."""

    def at(self, doing: str) -> None:
        """Report to the launcher what this rank does next."""
        self.heartbeat.at(self.step, doing)
