"""Check that a run has a model and data, before the import of torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.sources import has_data
from chunkflow_cli.data.tokenizer import has_tokenizer
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import check_is_there

GPU_FILES = ("nvidia*", "nvhost*", "kfd", "dxg")
"""What drivers of GPUs put into /dev: NVIDIA's, Jetson's, AMD's and that of Windows' subsystem for Linux."""


def check_inputs(loaded: LoadedConfig) -> None:
    """Check that the model can be found and the data is named. One error names everything that is missing.

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
        except UsageError as error:
            missing.append(str(error))
        else:
            if config.eval.prompts and not has_tokenizer(config.model.path):
                missing.append(f"eval.prompts needs a tokenizer, and model.path={config.model.path} has none")
    if not has_data(config.data):
        missing.append(
            "data.path is not set: a file (.jsonl, .csv, .parquet, ...), a folder or a Hugging Face data set id"
        )
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


def _has_gpu() -> bool:
    if not any(path for name in GPU_FILES for path in Path("/dev").glob(name)):
        return False
    import torch

    return torch.cuda.is_available()
