"""The folder that peft saves adapters in. Imports no torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chunkflow_cli.errors import UsageError

ADAPTER_CONFIG = "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a saved adapter.

    Raises:
        UsageError: they cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return settings


def explain_adapter_folder(path: str) -> str | None:
    """Return an error message if `model.path` is the folder of an adapter, otherwise None."""
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return None
    base = read_adapter_config(Path(path)).get("base_model_name_or_path") or "BASE"
    run = Path(path).parent if Path(path).name == "final" else "RUN"
    return (
        f"model.path={path} is an adapter, which needs the model that it was trained on\n"
        f"  to continue training it: model.path={base} model.lora.enabled=true model.lora.path={path}\n"
        f"  to train on from the merged model: chunkflow export {run} --merge --output merged, then model.path=merged"
    )


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Silence peft's advice on tied weights and name patterns, which `find_targets` and `merge` deal with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield
