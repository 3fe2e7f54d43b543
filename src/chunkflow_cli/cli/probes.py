"""What `chunkflow doctor` asks of this machine, each question in a process of its own: it may crash or hang there.

    python -m chunkflow_cli.cli.probes SECONDS QUESTION [ARGUMENTS AS JSON]

answers with one JSON object on stdout. Whatever libraries print goes to stderr; so does where it crashed, or where it
was when the seconds were over.
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
import traceback
from collections.abc import Callable
from typing import Any

HUB_SECONDS = 5.0

Answer = dict[str, Any]


def package(module: str) -> Answer:
    """Whether a package imports: {"missing": bool, "version": its own, if it says so}."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return {"missing": True}
    imported = importlib.import_module(module)
    top = sys.modules[module.partition(".")[0]]
    version = getattr(top, "__version__", None) or getattr(imported, "__version__", None)
    return {"missing": False, "version": str(version) if version else None}


def settings(overrides: list[str], config_dir: str | None) -> Answer:
    """The configured values that the other questions depend on; {"usage": text} where the user is at fault."""
    from chunkflow_cli.config.load import load
    from chunkflow_cli.errors import UsageError

    try:
        config = load(overrides, config_dir).config
    except UsageError as error:
        return {"usage": str(error)}
    return {
        "path": config.model.path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": config.model.dtype.value,
        "attention": config.model.attention.value,
        "cache_dir": config.data.cache_dir,
        "offload": config.engine.offload.value,
        "hardware": config.hardware,
    }


def devices() -> Answer:
    """GPUs that torch sees, and what the processor can do."""
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
    """The backend that a run would take, why, and what speaks against each of the others.

    Without a model (or one that cannot be read: "model_error"), of one without windows and soft caps.
    """
    import torch
    from transformers import PretrainedConfig

    from chunkflow_cli.config.schema import Attention, ModelConfig
    from chunkflow_cli.errors import UsageError
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
    device = training_device()
    objections: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            choose_backend(Attention(name), model, device, getattr(torch, dtype))
            objections[name] = None
        except UsageError as error:
            objections[name] = str(error).splitlines()[0].partition(": ")[2]
    taken, reason = None, objections.get(requested) or ""
    if reason == "":
        choice = choose_backend(Attention(requested), model, device, getattr(torch, dtype))
        taken, reason = choice.backend.name, choice.reason
    return {"takes": taken, "reason": reason, "objections": objections, "model_error": model_error}


def backend(name: str, dtype: str) -> Answer:
    """Whether an attention backend computes what plain matrix products do, both ways: {"error": None or why not}."""
    import torch

    from chunkflow_cli.errors import UsageError
    from chunkflow_cli.execution.attention.choice import BACKENDS
    from chunkflow_cli.execution.attention.kernel_check import check_backend
    from chunkflow_cli.execution.cpu_quirks import settle_vector_math
    from chunkflow_cli.model.device import training_device

    settle_vector_math()
    try:
        check_backend(BACKENDS[name](), training_device(), getattr(torch, dtype))
    except UsageError as error:
        return {"error": str(error).splitlines()[0]}
    return {"error": None}


def cache(cache_dir: str | None) -> Answer:
    """The folder of tokenised data: room, and whether it can be written (its nearest parent, where it is not yet)."""
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


def hub() -> Answer:
    """Whether the Hugging Face hub answers, and whether there is a login token (never which)."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, get_token

    answer: Answer = {"endpoint": constants.ENDPOINT, "token": get_token() is not None, "reachable": True}
    if constants.HF_HUB_OFFLINE:
        return {**answer, "reachable": False, "reason": "HF_HUB_OFFLINE is set"}
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        pass  # it answered
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        return {**answer, "reachable": False, "reason": getattr(reason, "strerror", None) or str(reason)}
    return answer


def training() -> Answer:
    """Whether what every run imports can be imported together: the command, the engine and a model's code."""
    importlib.import_module("chunkflow_cli.training.train")
    importlib.import_module("deepspeed")
    importlib.import_module("transformers.models.llama.modeling_llama")
    return {}


QUESTIONS: dict[str, Callable[..., Answer]] = {
    function.__name__: function for function in (package, settings, devices, attention, backend, cache, hub, training)
}


def main() -> None:
    """Answer the question on the command line; an exception is an answer, too.

    It is {"raised": "Type: message", "packages": those it passed through, innermost first}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    seconds, question, *arguments = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    try:
        answer = QUESTIONS[question](*map(json.loads, arguments))
    except BaseException as error:
        lines = str(error).strip().splitlines()
        raised = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        answer = {"raised": raised, "packages": _passed_through(error)}
    answers.write(json.dumps(answer))
    answers.flush()
    os._exit(0)  # some libraries crash on their way out, which would hide the answer


def _passed_through(error: BaseException) -> list[str]:
    """Top-level packages of the frames of an error and of what caused it, where it began first."""
    found: list[str] = []
    if isinstance(error, ModuleNotFoundError) and error.name:
        found.append(error.name.partition(".")[0])
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    found += [name.partition(".")[0] for name in reversed(frames)]
    cause = error.__cause__ or error.__context__
    return list(dict.fromkeys([*(_passed_through(cause) if cause is not None else []), *found]))


if __name__ == "__main__":
    main()
