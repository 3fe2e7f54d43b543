"""The checks of `chunkflow doctor`. They run in another process, where they may crash or hang.

    python -m chunkflow_cli.cli.probes SECONDS CHECK [ARGUMENTS AS JSON]

prints one JSON object to stdout. Output of libraries goes to stderr, and so does the stack of a check that crashes or
exceeds its time.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

Answer = dict[str, Any]


def package(module: str) -> Answer:
    """Import a package, unless it is missing."""
    if importlib.util.find_spec(module) is None:
        return {"missing": True}
    importlib.import_module(module)
    return {"missing": False}


def devices() -> Answer:
    """Return the GPUs that torch sees, and what the processor supports."""
    import torch

    from chunkflow_cli.execution.cpu_quirks import cpu_has_bfloat16

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "kind": "cuda",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": free,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bfloat16": properties.major >= 8,
            }
        )
    return {"gpus": gpus, "cuda": torch.version.cuda, "cpu_bfloat16": cpu_has_bfloat16()}


def attention(requested: str, path: str, trust_remote_code: bool, dtype: str) -> Answer:
    """Return the attention backend that a run would use, why, and the objection to each of the others.

    A model that is not configured, or that cannot be read ("model_error"), is taken to have no windows and soft caps.
    """
    import torch
    from transformers import PretrainedConfig

    from chunkflow_cli.config.schema import Attention, ModelConfig
    from chunkflow_cli.errors import UsageError, first_line
    from chunkflow_cli.execution.attention.choice import BACKENDS, choose_backend
    from chunkflow_cli.model.device import training_device
    from chunkflow_cli.model.hf_config import load_config

    model: Any = PretrainedConfig()
    model_error = None
    if path:
        try:
            model = load_config(ModelConfig(path=path, trust_remote_code=trust_remote_code))
        except UsageError as error:
            model_error = str(error)
    device, data_type = training_device(), getattr(torch, dtype)
    objections: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            choose_backend(Attention(name), model, device, data_type)
            objections[name] = None
        except UsageError as error:
            objections[name] = first_line(error).partition(": ")[2]
    if objection := objections.get(requested):
        return {"takes": None, "reason": objection, "objections": objections, "model_error": model_error}
    choice = choose_backend(Attention(requested), model, device, data_type)
    taken, reason = choice.backend.name, choice.reason
    return {"takes": taken, "reason": reason, "objections": objections, "model_error": model_error}


def backend(name: str, dtype: str) -> Answer:
    """Compare an attention backend with plain matrix products, in both passes: {"error": the difference, or None}."""
    import torch

    from chunkflow_cli.errors import UsageError, first_line
    from chunkflow_cli.execution.attention.choice import BACKENDS
    from chunkflow_cli.execution.attention.kernel_check import check_backend
    from chunkflow_cli.execution.cpu_quirks import settle_vector_math
    from chunkflow_cli.model.device import training_device

    settle_vector_math()
    try:
        check_backend(BACKENDS[name](), training_device(), getattr(torch, dtype))
    except UsageError as error:
        return {"error": first_line(error)}
    return {"error": None}


def cache(cache_dir: str | None) -> Answer:
    """Return free space of the folder of tokenized data or its nearest parent, and why it cannot be written to."""
    from chunkflow_cli.data.cache import cache_root

    folder = cache_root(cache_dir)
    present = folder.absolute()
    while not present.exists():
        present = present.parent
    reason = None
    try:
        tempfile.TemporaryFile(dir=present).close()
    except OSError as error:
        reason = error.strerror
    return {"path": str(folder), "free_bytes": shutil.disk_usage(present).free, "error": reason}


def training() -> Answer:
    """Import everything that a run imports in one process: the command, the engine and a model's code."""
    importlib.import_module("chunkflow_cli.training.train")
    importlib.import_module("deepspeed")
    importlib.import_module("transformers.models.llama.modeling_llama")
    return {}


def together(checks: Sequence[tuple[str, Sequence[Any]]]) -> Answer:
    """Return the answer of each check by its name. If one raises, so does this."""
    return {name: CHECKS[name.partition(" ")[0]](*arguments) for name, arguments in checks}


CHECKS: dict[str, Callable[..., Answer]] = {
    function.__name__: function for function in (package, devices, attention, backend, cache, training, together)
}


def main() -> None:
    """Run the check that the command line names and print its answer; an exception is an answer, too.

    It is {"raised": "Type: message", "root": the same of the exception that it comes from}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    seconds, check, *arguments = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    try:
        answer = CHECKS[check](*map(json.loads, arguments))
    except BaseException as error:
        root = error
        while root.__cause__ is not None:  # not __context__: that may be an unrelated error, handled by then
            root = root.__cause__
        answer = {"raised": _one_line(error), "root": _one_line(root)}
    answers.write(json.dumps(answer))
    answers.flush()
    os._exit(0)  # some libraries crash at exit, which would hide the answer


def _one_line(error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


if __name__ == "__main__":
    main()
