"""List the data sets of a run, each with a configuration of its own: those to train on, and those to evaluate on."""

from __future__ import annotations

from dataclasses import replace

from chunkflow_cli.config.schema import DataConfig


def configs_of_sources(config: DataConfig) -> list[DataConfig]:
    """Return a configuration for each data set to train on, with its path in `path`: one alone without `sources`.

    That of a source has this source alone in `sources`.
    """
    return [
        replace(
            config,
            path=source.path,
            sources=[source],
            format=source.format or config.format,
            split=source.split or config.split,
            subset=source.subset or config.subset,
            columns=source.columns or config.columns,
            train_on=source.train_on or config.train_on,
        )
        for source in config.sources
    ] or [config]


def configs_of_evaluation(config: DataConfig) -> list[DataConfig]:
    """Return a configuration for each data set to evaluate on: `data.eval_path`, or a split of each source."""
    if config.eval_path is not None:
        return [replace(config, sources=[])]
    return configs_of_sources(config) if has_evaluation_data(config) else []


def has_evaluation_data(config: DataConfig) -> bool:
    """Return whether the configuration names data to evaluate on: a path, or a split of `data.path`."""
    return config.eval_path is not None or config.eval_split is not None


def key_of_path(config: DataConfig) -> str:
    """Return the key of `path` in one of `configs_of_sources`, for messages."""
    return f"data.sources[{config.sources[0].name}].path" if config.sources else "data.path"
