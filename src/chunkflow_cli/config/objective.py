"""Read from the configuration what a run learns from preferences."""

from __future__ import annotations

from dataclasses import dataclass

from chunkflow_cli.config.schema import Config, PreferenceConfig, PreferenceLoss, Task


@dataclass(frozen=True)
class Objective:
    """What a run learns from preferences."""

    task: Task
    preference: PreferenceConfig

    @classmethod
    def of(cls, config: Config) -> Objective | None:
        """Return the objective of a run; None if it imitates answers."""
        return None if config.train.task is Task.sft else cls(config.train.task, config.preference)

    @property
    def has_pairs(self) -> bool:
        """True if each sample is a pair of answers; False if it is one answer with a label."""
        return self.task is not Task.kto

    @property
    def needs_reference(self) -> bool:
        return self.task is Task.kto or (self.task is Task.dpo and self.preference.loss is not PreferenceLoss.simpo)

    @property
    def nll_weight(self) -> float:
        """Weight of the mean cross entropy of the chosen answers; of ORPO's, with their prompts."""
        return 1.0 if self.task is Task.orpo else self.preference.nll_weight if self.task is Task.dpo else 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of a step, as TRL has them."""
        names = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
        names += ["rewards/accuracies"] if self.has_pairs else ["kl"]
        return (*names, *["nll_loss"] * (self.nll_weight > 0))
