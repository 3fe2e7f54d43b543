"""`chunkflow doctor`: check this machine, and say what is missing or broken and how to fix it.

The checks run together in another process (probes.py). If one of them fails there, each runs in a process of its own,
so that a package that crashes or hangs on import is a line in the table. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from chunkflow_cli import __version__
from chunkflow_cli.cli.screens.doctor import print_findings
from chunkflow_cli.config.schema import Config, Kernels
from chunkflow_cli.console import human_bytes, progress_bar, stdout_console
from chunkflow_cli.processes.environment import cores, module_command
from chunkflow_cli.processes.host_memory import usable_memory_bytes

GRACE_SECONDS = 5.0
"""Extra seconds that a check gets after its time limit, to report where it hangs."""
CHECKS_AT_ONCE = 4
"""Number of checks that run at once. Each may import all of torch."""
Answer = dict[str, Any]
"""The result of a check, as plain values."""
LITTLE_SPACE = 2**30
"""Free bytes in the token cache below which doctor warns."""


@dataclass(frozen=True)
class Package:
    """A package that chunkflow uses."""

    distribution: str
    purpose: str
    required: bool = True
    """True if no run works without it."""
    extra: str | None = None
    """The extra of chunkflow-cli that installs it."""
    is_for_gpus: bool = False
    """True if the package is useless without a GPU."""

    @property
    def module(self) -> str:
        names = {"hydra-core": "hydra", "flash-attn": "flash_attn", "flash-linear-attention": "fla"}
        return names.get(self.distribution, self.distribution)

    @property
    def pip_name(self) -> str:
        """Name and versions that chunkflow-cli requires, quoted for a shell."""
        return shlex.quote(f"{self.distribution}{required_versions(self.distribution)}")


PACKAGES = (
    Package("torch", "everything"),
    Package("numpy", "planning"),
    Package("flash-attn", "the fastest attention on NVIDIA GPUs", required=False, extra="flash", is_for_gpus=True),
    Package(
        "flash-linear-attention", "fast recurrent layers on NVIDIA GPUs", required=False, extra="fla", is_for_gpus=True
    ),
    Package("tokenizers", "tokenizing"),
    Package("jinja2", "chat templates"),
    Package("safetensors", "reading and writing weights"),
    Package("transformers", "models"),
    Package("deepspeed", "the training engine"),
    Package("orjson", "reading data"),
    Package("pyarrow", "Parquet data"),
    Package("omegaconf", "configuration"),
    Package("hydra-core", "configuration"),
    Package("rich", "terminal output"),
    Package("typer", "the command line"),
    Package("packaging", "comparing versions"),
    Package("peft", "LoRA", required=False),
    Package("datasets", "data sets of the Hugging Face hub", required=False),
    Package("matplotlib", "plots", required=False),
    Package("gguf", "GGUF models", required=False, extra="quant"),
    Package("bitsandbytes", "model.quantization", required=False, extra="quant"),
    Package("tensorboard", "log.backends=[tensorboard]", required=False, extra="loggers"),
)
"""A package comes after those that it imports: if several fail with the same error, the first is shown as its cause."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong on this machine, and how to fix it."""

    what: str
    remedy: str
    required: bool = True
    """True if training cannot work before this is fixed."""
    error: str | None = None
    """The exception or crash behind the problem. Problems with the same error are shown as one."""


UNANSWERED = {
    "devices": Problem("torch cannot list the devices", "check the driver with nvidia-smi, then reinstall torch"),
    "attention": Problem("no attention backend can be chosen", "reinstall torch and transformers"),
    "cache": Problem("the token cache cannot be checked", "set data.cache_dir=DIR"),
    "training": Problem(
        "the modules that every run needs cannot be imported together",
        "reinstall chunkflow-cli in a fresh virtual environment",
    ),
}
"""The problem if a check raises, crashes or hangs."""


def run(
    overrides: Sequence[str], *, config_dir: str | None = None, seconds: float, json_output: bool = False
) -> dict[str, Any]:
    """Run all checks, print the findings unless `json_output` is set, and return what `--json` prints.

    Args:
        overrides: the run to check: its model, dtype, attention, offloading and cache folder.
        seconds: the longest time that one check, or all together, may take.

    Raises:
        UsageError: an override is wrong.
    """
    config = Config()
    if overrides or config_dir is not None:
        with contextlib.suppress(ImportError):  # then hydra is broken, which the table shows
            from chunkflow_cli.config.load import load

            config = load(overrides, config_dir).config
    findings = examine(config, seconds)
    if not json_output:
        print_findings(stdout_console(), findings)
    return findings


def examine(config: Config, seconds: float) -> dict[str, Any]:
    """Return the findings for a configuration as one JSON object; `ready` is true if training can work."""
    model, dtype = config.model, config.model.dtype.value
    checks: dict[str, tuple[Any, ...]] = {f"package {package.module}": (package.module,) for package in PACKAGES}
    checks |= {
        "devices": (),
        "attention": (model.attention.value, model.path, model.trust_remote_code, dtype),
        "cache": (config.data.cache_dir,),
        "training": (),
    }
    answers = _ask_all(checks, seconds)
    attention = answers["attention"]
    reasons: dict[str, str | None] = attention.get("objections", {})
    kernels = [f"backend {name}" for name, reason in reasons.items() if reason is None and name != "reference"]
    answers |= _ask_all({kernel: (kernel.partition(" ")[2], dtype) for kernel in kernels}, seconds)
    reasons = {name: reason or _failure(answers.get(f"backend {name}", {})) for name, reason in reasons.items()}
    packages = {package.module: describe_package(package, answers[f"package {package.module}"]) for package in PACKAGES}
    problems = one_for_each_error(
        [
            *(problem for package in PACKAGES for problem in _package_problems(package, packages, answers)),
            *(problem for check in UNANSWERED for problem in _unanswered(check, answers[check])),
            *_device_problems(answers["devices"], config),
            *_attention_problems(answers, reasons),
            *cache_problems(answers["cache"]),
        ]
    )
    return {
        "ready": not any(problem.required for problem in problems),
        "chunkflow": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": packages["torch"]["version"],
        "deepspeed": packages["deepspeed"]["version"],
        "packages": packages,
        "devices": [*answers["devices"].get("gpus", []), _processor(answers["devices"])],
        "attention": {
            "requested": model.attention.value,
            "dtype": dtype,
            "takes": attention.get("takes"),
            "reason": attention.get("reason") or _failure(attention),
        },
        "backends": {name: {"works": reason is None, "reason": reason} for name, reason in reasons.items()},
        "cache": answers["cache"],
        "problems": [{"what": p.what, "remedy": p.remedy, "required": p.required} for p in problems],
    }


def ask(check: str, arguments: Sequence[Any], seconds: float) -> Answer:
    """Run a check in a process of its own, and return its answer.

    If it raised, crashed or did not answer in time, the answer is {"raised": what happened, "root": the cause of that}.
    """
    # Files instead of pipes: a process that the hanging one has started would hold a pipe open.
    words = [str(seconds), check.partition(" ")[0], *map(json.dumps, arguments)]
    command = module_command("chunkflow_cli.cli.probes", words)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        limit = seconds + GRACE_SECONDS
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        out.seek(0)
        err.seek(0)
        said, complaint = out.read(), err.read().decode(errors="replace")
    if code == 0:
        answer: Answer = json.loads(said)
        return answer
    if code is None or "Timeout (" in complaint:
        raised = f"no answer in {seconds:g} seconds"
    elif code < 0:
        place = re.search(r'File ".*?([^/"]+/[^/"]+)", line', complaint)  # of faulthandler: the innermost frame
        raised = f"it crashed{f' in {place.group(1)}' if place is not None else ''}: {signal.strsignal(-code)}"
    else:
        raised = f"it ended with exit code {code}: {complaint.strip().rpartition(chr(10))[2]}"
    return {"raised": raised, "root": raised}


def _ask_all(checks: dict[str, tuple[Any, ...]], seconds: float) -> dict[str, Answer]:
    together = ask("together", (list(checks.items()),), seconds)  # on a sound machine, torch is imported once
    return together if together.keys() == checks.keys() else _ask_each(checks, seconds)


def _ask_each(checks: dict[str, tuple[Any, ...]], seconds: float) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    workers = max(2, min(CHECKS_AT_ONCE, cores()))
    with progress_bar("checking this machine", len(checks)) as progress, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(ask, name, arguments, seconds): name for name, arguments in checks.items()}
        try:
            for future in as_completed(futures):
                answers[futures[future]] = future.result()
                progress(len(answers))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers


def required_versions(distribution: str) -> SpecifierSet:
    """Return the versions that chunkflow-cli requires; any version if it runs from a source tree."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in map(Requirement, importlib.metadata.requires("chunkflow-cli") or []):
            if requirement.name.lower() == distribution:
                return requirement.specifier
    return SpecifierSet()


def describe_package(package: Package, answer: Answer) -> dict[str, Any]:
    """Return version and state of a package: ok, missing, broken, too old or too new."""
    version, state = None, "missing" if answer.get("missing") else "broken" if "raised" in answer else "ok"
    if state != "missing":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it was found by its path only
            version = importlib.metadata.version(package.distribution)
    if state == "ok" and version is not None:
        bounds = required_versions(package.distribution)
        failed = [bound for bound in bounds if not bound.contains(version, prereleases=True)]
        if failed:
            state = "too new" if all(bound.operator.startswith("<") for bound in failed) else "too old"
    stated = {"purpose": package.purpose, "required": package.required}
    return {"version": version, "state": state, "error": answer.get("raised"), **stated}


def one_for_each_error(problems: Sequence[Problem]) -> list[Problem]:
    """Keep the first problem of each error; it is required if any of them is (a flash_attn that stops transformers)."""
    kept: dict[str, Problem] = {}
    for problem in problems:
        first = kept.setdefault(problem.error or problem.what, problem)
        kept[problem.error or problem.what] = replace(first, required=first.required or problem.required)
    return list(kept.values())


def _failure(answer: Answer) -> str | None:
    return answer.get("raised") or answer.get("error")


def _unanswered(check: str, answer: Answer) -> list[Problem]:
    problem = UNANSWERED[check]
    if "raised" not in answer:
        return []
    return [replace(problem, what=f"{problem.what}: {answer['raised']}", error=answer["root"])]


def _package_problems(
    package: Package, packages: dict[str, dict[str, Any]], answers: dict[str, Answer]
) -> list[Problem]:
    described, is_flash = packages[package.module], package.module == "flash_attn"
    state = described["state"]
    if state == "ok" or (state == "missing" and package.is_for_gpus and not answers["devices"].get("gpus")):
        return []
    what = {
        "missing": "is not installed",
        "too old": f"{described['version']} is too old",
        "too new": f"{described['version']} is newer than the versions that chunkflow is tested with",
        "broken": f"does not import: {described['error']}",
    }[state]
    remedy = f"pip install {package.pip_name}"
    if state == "missing" and package.extra is not None:
        remedy = f"pip install 'chunkflow-cli[{package.extra}]'"
    elif state == "broken":
        remedy = f"pip install --force-reinstall --no-deps {package.pip_name}"
        if is_flash:
            remedy = f"pip uninstall flash-attn to use another backend, or rebuild it: {remedy} --no-build-isolation"
    what = f"{package.module} {what} (needed for {package.purpose})"
    missing = f"ModuleNotFoundError: No module named '{package.module}'" if state == "missing" else None
    root = answers[f"package {package.module}"].get("root", missing)
    return [Problem(what, remedy, package.required and state != "too new", root)]


def _device_problems(answer: Answer, config: Config) -> list[Problem]:
    problems, offload = [], config.engine.offload.value
    if "raised" in answer:
        return []
    if not answer["gpus"] and offload != "none":
        made_for = f"; the recipe is made for {config.hardware}" if config.hardware else ""
        what = f"engine.offload={offload} moves data from a GPU to the host, and there is no GPU{made_for}"
        problems.append(Problem(what, "set engine.offload=none, or use a machine with a GPU"))
    if not answer["gpus"] and Path("/proc/driver/nvidia/version").exists():
        build = f"built for CUDA {answer['cuda']}" if answer["cuda"] else "built without CUDA"
        what = f"this machine has an NVIDIA driver, but torch ({build}) sees no GPU"
        remedy = "install the torch that fits the driver (https://pytorch.org/get-started); check CUDA_VISIBLE_DEVICES"
        problems.append(Problem(what, remedy, required=False))
    if answer["gpus"] and "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        what = (
            "there is no C compiler: triton needs one for model.kernels=liger, model.compile and fast recurrent layers"
        )
        remedy = "install gcc and the headers of Python (Debian: apt-get install gcc python3-dev)"
        needs_it = config.model.kernels is Kernels.liger or config.model.compile
        problems.append(Problem(what, remedy, required=needs_it))
    return problems


def _attention_problems(answers: dict[str, Answer], reasons: dict[str, str | None]) -> list[Problem]:
    problems, answer = [], answers["attention"]
    if "raised" in answer:
        return []
    if answer["model_error"]:
        what, _, remedy = answer["model_error"].partition("\n")
        problems.append(Problem(what, "; ".join(map(str.strip, remedy.splitlines())) or "set another model.path"))
    working = [name for name, reason in reasons.items() if reason is None]
    if answer["takes"] is None:
        what = f"the configured attention cannot run here: {answer['reason']}"
        problems.append(Problem(what, f"set model.attention=auto, or one of {', '.join(working)}"))
    for name, reason in reasons.items():
        if reason is not None and answer["objections"][name] is None:
            what, remedy = f"attention {name} does not work here: {reason}", f"set model.attention={working[0]}"
            root = answers[f"backend {name}"].get("root")
            problems.append(Problem(what, remedy, required=name == answer["takes"], error=root))
    return problems


def cache_problems(answer: Answer) -> list[Problem]:
    """Return what is wrong with the folder for tokenized data."""
    if "raised" in answer:
        return []
    if answer["error"]:
        what = f"tokenized data cannot be written to {answer['path']}: {answer['error']}"
        return [Problem(what, "set data.cache_dir=DIR to a folder that you can write to")]
    if answer["free_bytes"] < LITTLE_SPACE:
        what = f"only {human_bytes(answer['free_bytes'])} are free for tokenized data in {answer['path']}"
        return [Problem(what, "set data.cache_dir=DIR to a folder with more space", required=False)]
    return []


def _processor(answer: Answer) -> dict[str, Any]:
    """Return the CPU as a device. Its memory is what this process may use, where a container sets a limit."""
    bfloat16 = answer.get("cpu_bfloat16")
    memory = usable_memory_bytes()
    return {"kind": "cpu", "name": platform.machine(), "cores": cores(), "memory_bytes": memory, "bfloat16": bfloat16}
