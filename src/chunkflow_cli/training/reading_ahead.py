"""Read small data before torch is imported, so that what is wrong with it is said in a second.

Tokenizing needs transformers, which imports torch if it can, and that takes seconds. So transformers is imported
without torch first, and forgotten afterwards: it decides only once whether there is a torch.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from chunkflow_cli.config.schema import Config
from chunkflow_cli.data.data_sets import configs_of_evaluation, configs_of_sources
from chunkflow_cli.data.dataset import open_data
from chunkflow_cli.data.source import HubDataset
from chunkflow_cli.data.tokenizer import keep_torch_out, let_torch_in
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.training.inputs import FoundData, load_run_data

LARGEST_BYTES = 8 << 20
"""Larger data is read after everything else is checked: that takes less time than reading it."""


def read_ahead(config: Config) -> tuple[str, ...]:
    """Tokenize the data of a run if it is small, and return the keys of its entries in the cache.

    Returns:
        `FoundData.keys`; nothing if the data is still to be read.

    Raises:
        UsageError: see `load_run_data`.
    """
    needs_torch = config.model.trust_remote_code or config.model.path.lower().endswith(".gguf")
    if needs_torch or not sys.modules.keys().isdisjoint(("torch", "transformers")) or not _is_small(config):
        return ()
    with _transformers_without_torch():
        try:
            hf_config = load_config(config.model) if config.model.path else None
            data = load_run_data(config, hf_config)
        except (ImportError, UsageError) as error:
            if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
                return ()  # the code of a rare configuration or tokenizer imports torch
            raise
        return FoundData.of(data).keys


def _is_small(config: Config) -> bool:
    sources = [open_data(each) for each in configs_of_sources(config.data)]
    sources += [open_data(each, for_evaluation=True) for each in configs_of_evaluation(config.data)]
    is_local = not any(isinstance(getattr(each, "source", each), HubDataset) for each in sources)
    return is_local and sum(each.nbytes for each in sources) <= LARGEST_BYTES


@contextmanager
def _transformers_without_torch() -> Iterator[None]:
    before = dict(os.environ)
    keep_torch_out()
    gc.disable()  # small data makes little garbage, and an eighth of the import is collecting
    try:
        yield
    finally:
        gc.enable()
        let_torch_in()
        if "TRANSFORMERS_VERBOSITY" not in before:
            os.environ.pop("TRANSFORMERS_VERBOSITY", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
