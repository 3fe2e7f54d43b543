"""Check that a run has a model, data and trackers, before the import of torch, which takes seconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config, Init, LogBackend
from chunkflow_cli.config.sources import has_data
from chunkflow_cli.data.tokenizer import has_tokenizer
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.folder import check_weights
from chunkflow_cli.model.hf_config import check_is_there
from chunkflow_cli.processes.environment import rank
from chunkflow_cli.training.trackers.backends import PACKAGES

GPU_FILES = ("nvidia*", "nvhost*", "kfd", "dxg")
"""What drivers of GPUs put into /dev: NVIDIA's, Jetson's, AMD's and that of Windows' subsystem for Linux."""


def check_inputs(loaded: LoadedConfig) -> None:
    """Check that the model can be found, the data is named and trackers are installed. One error names what is missing.

    Raises:
        UsageError: something is missing.
    """
    config = loaded.config
    missing: list[str] = []
    if not config.model.path:
        missing.append("model.path is not set: a Hugging Face id, a folder or a GGUF file")
    else:
        try:
            check_is_there(config.model)
            if config.model.init is Init.pretrained and Path(config.model.path).exists():
                check_weights(Path(config.model.path), f"model.path={config.model.path}")
        except UsageError as error:
            missing.append(str(error))
        else:
            if config.eval.prompts and not has_tokenizer(config.model.path):
                missing.append(f"eval.prompts needs a tokenizer, and model.path={config.model.path} has none")
    if not has_data(config.data):
        missing.append(
            "data.path is not set: a file (.jsonl, .csv, .parquet, ...), a folder or a Hugging Face data set id"
        )
    if rank() == 0:
        missing += missing_trackers(config)
    if missing and config.hardware and not _has_gpu():
        missing.append(f"a GPU: this machine has none, and the recipe is made for {config.hardware}")
    if len(missing) == 1:
        raise UsageError(missing[0])
    if missing:
        what = "train" if loaded.recipe == "default" else f"recipe {loaded.recipe}"
        lines = "\n".join(f"- {text}" for text in missing)
        raise UsageError(
            f"{what} cannot run here yet. Missing:\n{lines}\n  a recipe that runs anywhere: recipe=tiny_random"
        )


def missing_trackers(config: Config) -> list[str]:
    """Return a line for each tracker in `log.backends` whose package is not installed."""
    return [
        f"log.backends={backend.value} needs the package {backend.value}, which is not installed: "
        f"pip install {backend.value}"
        for backend in config.log.backends
        if backend is not LogBackend.jsonl and not any(map(_is_installed, PACKAGES[backend.value]))
    ]


def _is_installed(distribution: str) -> bool:
    """Whether a distribution is installed; a folder of its name, which a tracker leaves, does not count."""
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _has_gpu() -> bool:
    if not any(path for name in GPU_FILES for path in Path("/dev").glob(name)):
        return False
    import torch

    return torch.cuda.is_available()
