"""Check a model as a run is to train it, before anything slow begins."""

from __future__ import annotations

from typing import Any

from chunkflow_cli.config.schema import Config
from chunkflow_cli.model.adapter_description import describe_adapters
from chunkflow_cli.model.layouts import check_fits
from chunkflow_cli.model.loading import check_files
from chunkflow_cli.model.rope_scaling import describe_rope_scaling
from chunkflow_cli.model.trained_weights import describe_trained_weights
from chunkflow_cli.planning.topology import Topology


def check_model(config: Config, hf_config: Any, topology: Topology) -> list[str]:
    """Check the model's files, adapters, trained weights, positions and division among the processes of the run.

    Nothing is loaded: the model is made without its weights where its modules are looked at.

    Returns:
        What there is to say at the start of the run, a line each: of scaled positions, of what adapters train, and of
        frozen weights.

    Raises:
        UsageError: names the key and what to set instead.
    """
    check_files(config.model)
    scaled = describe_rope_scaling(config.model, hf_config)
    lines = [] if scaled is None else [scaled]
    if config.model.lora.enabled:
        lines += describe_adapters(config, hf_config)
    lines += describe_trained_weights(config, hf_config)
    check_fits(config, hf_config, [topology])
    return lines
