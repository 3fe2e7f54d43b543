"""Check that a model has the positions of a run, and can be divided into its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.own_attention import check_own_attention
from chunkflow_cli.model.special_types import computes_own_attention
from chunkflow_cli.planning.topology import Topology, key_value_copies


def check_fits(config: Config, hf_config: Any, layouts: Sequence[Topology]) -> None:
    """Check what a plan of a run asks of the model: positions up to `data.max_length`, and these layouts.

    Raises:
        UsageError: the model has learned fewer positions, or as `check_own_attention` and `check_layouts`.
    """
    check_own_attention(config.model, hf_config)
    if config.data.max_length is not None:
        from chunkflow_cli.model.positions import check_positions  # imports torch

        check_positions(config, hf_config)
    check_layouts(config, hf_config, layouts)


def check_layouts(config: Config, hf_config: Any, layouts: Sequence[Topology]) -> None:
    """Refuse a layout that the model's heads or layers cannot be divided among. Nothing is loaded.

    A layout that is not the run's own was listed under `cluster.*`, which the error then names.

    Raises:
        UsageError: names the key, the model's heads or layers, and the sizes that are possible.
    """
    text = hf_config.get_text_config()
    layers = int(text.num_hidden_layers)
    of_layers = attention_heads(hf_config)
    head_counts = sorted({(layer.heads, layer.kv_heads) for layer in of_layers})
    for layout in layouts:
        if computes_own_attention(hf_config):
            for part, size, what in (("sequence", layout.sequence, "tokens"), ("pipeline", layout.pipeline, "layers")):
                key = f"parallel.{part}" if size == getattr(config.parallel, part) else f"cluster.{part}s"
                if size > 1:
                    raise UsageError(
                        f"{key}={size}: models of type {text.model_type!r} compute their attention themselves, with "
                        f"all {what} on one device\n  use {key}=1"
                    )
        try:
            for heads, kv_heads in head_counts:
                key_value_copies(heads, kv_heads, layout.sequence)
        except ValueError as error:
            key = "parallel.sequence" if layout.sequence == config.parallel.sequence else "cluster.sequences"
            name = config.model.path or text.model_type
            raise UsageError(f"{key}={layout.sequence} does not suit {name}:\n  its {error}") from error
        if layout.pipeline > 1 and any(not layer.owns_keys for layer in of_layers):
            key = "parallel.pipeline" if layout.pipeline == config.parallel.pipeline else "cluster.pipelines"
            raise UsageError(
                f"{key}={layout.pipeline}: the last layers of {config.model.path or text.model_type} attend to keys of "
                "earlier layers, which another stage may hold\n  use one stage; parallel.sequence is possible"
            )
        if layout.pipeline > layers:
            key = "parallel.pipeline" if layout.pipeline == config.parallel.pipeline else "cluster.pipelines"
            raise UsageError(
                f"{key}={layout.pipeline}: the model has {layers} layers, and each stage needs one\n"
                f"  choose {layers} stages or fewer"
            )
    most = max(layouts, key=lambda layout: layout.pipeline, default=None)
    if most is not None and most.pipeline > 1:
        from chunkflow_cli.model.loading import on_meta_device  # imports torch
        from chunkflow_cli.model.stage_parts import layers_and_norm

        key = "parallel.pipeline" if most.pipeline == config.parallel.pipeline else "cluster.pipelines"
        layers_and_norm(on_meta_device(config.model, hf_config), most.pipeline, key)
