"""Load the model on every rank, with the weights of a node in memory once."""

from __future__ import annotations

import os
from typing import Any

import torch

from chunkflow_cli.config.schema import Config, Init, Quantization
from chunkflow_cli.engine import Processes, all_or_none
from chunkflow_cli.model.loading import load_model, model_of_weights
from chunkflow_cli.model.shared_weights import SharedWeights, share
from chunkflow_cli.processes.environment import local_rank


def load_on_every_rank(
    config: Config, hf_config: Any, processes: Processes, *, dtype: torch.dtype, attention: str
) -> Any:
    """Return the model on the CPU, as `load_model`. The ranks of a node share its pages until they change them.

    The first rank of each node loads it. The others map its files, or what the first one has made of them. Random and
    quantized weights are made by each rank; quantized ones are on its device at once.

    Raises:
        UsageError: as `load_model`, on all ranks.
    """

    def load() -> Any:
        return load_model(config.model, hf_config, dtype=dtype, attention=attention, seed=config.train.seed)

    is_made_here = config.model.init is Init.random or config.model.quantization is not Quantization.none
    if processes.topology.processes == 1 or is_made_here:
        return load()
    model, shared = None, None
    with all_or_none("loading the model"):
        if local_rank() == 0:
            model = load()
            shared = share(model)
    own = None if shared is None else (shared, torch.get_rng_state())
    of_node: tuple[SharedWeights, torch.Tensor] | None = processes.gather(own)[processes.rank - local_rank()]
    if model is None and of_node is None:
        model = load()
    elif model is None and of_node is not None:
        weights, random_state = of_node
        model = model_of_weights(config.model, hf_config, weights.map(), dtype=dtype, attention=attention)
        torch.set_rng_state(random_state)  # adapters are drawn next, on all ranks the same
    processes.barrier()
    if shared is not None:
        os.close(shared.descriptor)
    return model
