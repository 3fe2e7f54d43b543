"""Predict the seconds of every operation on the chunks of a rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.costs import CostModel, chunk_targets, chunk_tokens
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.simulate import OperationSeconds
from chunkflow_cli.planning.stage_cut import StageLayers, layer_shares


def chunk_operation_seconds(
    chunks: Chunks,
    targets: NDArray[np.int64],
    costs: CostModel,
    pipeline: PipelineLayout | None = None,
    cut: tuple[StageLayers, ...] | None = None,
) -> OperationSeconds:
    """Predict the seconds of every operation on these chunks.

    Each stage of a pipeline takes its layers' share of the model's seconds. The last one also takes head and loss.

    Args:
        targets: (sequences,) tokens that the loss counts.
        cut: the layers of each stage; by default, equal shares.
    """
    shares = stage_shares(pipeline, costs, cut)
    tokens, pairs = chunk_tokens(chunks), costs.chunk_pairs(chunks)
    head = np.zeros((len(shares), len(chunks)))
    head[-1] = costs.seconds_per_target * chunk_targets(chunks, targets)

    def shared(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        return shares[:, None] * seconds

    backward = shared(costs.backward(tokens, pairs))
    return OperationSeconds(
        forward=shared(costs.forward(tokens, pairs)) + head,
        backward=backward,
        recompute=shared(costs.recompute(tokens, pairs)) + head,
        state_pass=shared(costs.state_pass(tokens, pairs)),
        # The two products of a backward have the same size.
        input_gradient=backward / 2,
        weight_gradient=backward / 2,
        transfer=np.tile(
            costs.transfer_latency_seconds + costs.transfer_seconds_per_token * tokens, (len(shares) - 1, 1)
        ),
    )


def stage_shares(
    pipeline: PipelineLayout | None, costs: CostModel, cut: tuple[StageLayers, ...] | None
) -> NDArray[np.float64]:
    """Return the share of the layers' seconds that each stage takes, (stages,); 1 if the costs are of one stage."""
    stages = 1 if pipeline is None else pipeline.stages
    if costs.is_of_one_stage:
        return np.ones(stages)
    return np.full(stages, 1.0 / stages) if cut is None else layer_shares(cut)
