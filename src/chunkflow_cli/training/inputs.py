"""Load the samples that a run trains on and holds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import Config, LossWeighting
from chunkflow_cli.data.dataset import TokenizedData, has_evaluation_data, hold_out, tokenize
from chunkflow_cli.model.hf_config import position_limit
from chunkflow_cli.planning.run_plan import RankPlan, StepPlan


@dataclass(frozen=True)
class RunData:
    """The samples of a run, tokenised."""

    read: TokenizedData
    """All samples of `data.path`, with the counts of rejected and dropped rows."""
    train: TokenizedData
    evaluation: TokenizedData
    """Samples held out of `data.path`, or those of `data.eval_path` or `data.eval_split`; may be empty."""


def load_run_data(config: Config, hf_config: Any | None) -> RunData:
    """Tokenise the samples of the run, or read them from the cache.

    Args:
        hf_config: the model's configuration; None only if rows are token ids and no model is named.

    Raises:
        UsageError: see `data.dataset.tokenize`.
    """

    def read(*, for_evaluation: bool = False) -> TokenizedData:
        return tokenize(
            config.data,
            for_evaluation=for_evaluation,
            model_path=config.model.path,
            model_limit=None if hf_config is None else position_limit(hf_config),
            vocab_size=None if hf_config is None else int(hf_config.get_text_config().vocab_size),
            trust_remote_code=config.model.trust_remote_code,
        )

    if hf_config is not None and config.data.max_length is not None:
        from chunkflow_cli.model.positions import check_positions  # imports torch

        check_positions(config, hf_config)
    data = read()
    if has_evaluation_data(config.data):
        return RunData(data, data, read(for_evaluation=True))
    return RunData(data, *hold_out(data, config.data.eval_fraction, config.train.seed))


def target_weights(rank: RankPlan, step: StepPlan, weighting: LossWeighting) -> NDArray[np.float64]:
    """Return the weight of each target, per sequence of the rank, (sequences,); over all targets they sum to 1."""
    if weighting is LossWeighting.token:
        return np.full(len(rank.samples), 1.0 / step.target_tokens)
    return 1.0 / (len(step.samples) * rank.target_counts)
