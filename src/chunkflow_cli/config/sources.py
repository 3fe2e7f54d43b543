"""Handle several data sets: the name of each source, and its mistakes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from chunkflow_cli.config.keys import as_written, wrong_value
from chunkflow_cli.config.schema import DataConfig, SourceConfig
from chunkflow_cli.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)
_LENGTHS = re.compile(r"\d+K-\d+K")
"""Names of length buckets, which stand in the same place of a metric's name."""
_SUFFIXES = re.compile(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|gz|zst|bz2|xz))+$")


def _name_of(source: SourceConfig) -> str:
    """Return the name of a source: the one that it has, or the last part of its path."""
    if source.name:
        return source.name
    path = source.path[0] if isinstance(source.path, list) else source.path
    parts = [part for part in PurePath(path).parts if not set(part) & set("*?[]/")]
    stem = _SUFFIXES.sub("", parts[-1]) if parts else ""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", stem).strip("._") or "source"


def name_sources(config: DataConfig) -> None:
    """Give each source without a name the one that it goes by."""
    for source in config.sources:
        source.name = _name_of(source)


def has_data(config: DataConfig) -> bool:
    """Return whether the configuration names data to train on."""
    return bool(config.path or config.sources)


def shown_data(config: DataConfig) -> str:
    """Return the paths of the data to train on."""
    paths = [source.path for source in config.sources] or [config.path]
    return ", ".join(map(as_written, paths))


def check_sources(data: DataConfig) -> None:
    """Reject sources that no run can use.

    Raises:
        UsageError: names the source and its key.
    """
    if not data.sources:
        return
    if data.path:
        raise UsageError(
            f"data.path={as_written(data.path)} and data.sources are both set\n"
            "  remove one of them, or make the path a source of its own"
        )
    for index, source in enumerate(data.sources):
        key = f"data.sources[{index}]"
        if not source.path:
            raise UsageError(f"{key}.path is not set\n  give each source a path: {{path: chats.jsonl}}")
        check_paths(f"{key}.path", source.path)
        if source.name and (not _NAME.fullmatch(source.name) or _LENGTHS.fullmatch(source.name)):
            raise UsageError(
                f"{key}.name={source.name} cannot be part of the name of a metric\n"
                "  use letters, digits and _ . + -, and not the name of a range of lengths such as 1K-4K"
            )
    _check_names(data.sources)
    without = [_name_of(source) for source in data.sources if source.weight is None]
    if without and len(without) < len(data.sources):
        raise UsageError(
            f"data.sources: {', '.join(without)} {'has' if len(without) == 1 else 'have'} no weight, and others do\n"
            "  give each source a weight, or none"
        )


def _check_names(sources: Sequence[SourceConfig]) -> None:
    paths: dict[str, list[str]] = {}
    for source in sources:
        paths.setdefault(_name_of(source), []).append(as_written(source.path))
    for name, same in paths.items():
        if len(same) > 1:
            raise UsageError(f"data.sources has {len(same)} called {name}: {', '.join(same)}\n  give each its own name")


def check_paths(key: str, paths: object) -> None:
    """Reject a value that is neither a path nor a list of paths.

    Raises:
        UsageError: names the key.
    """
    is_list = isinstance(paths, list) and paths and all(isinstance(path, str) and path for path in paths)
    if not (isinstance(paths, str) or is_list):
        raise UsageError(wrong_value(key, paths))
