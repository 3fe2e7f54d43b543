"""`chunkflow doctor`: what this machine has, what is broken or missing, and how to get it.

Each question is asked in a process of its own (probes.py), so that a package that crashes or hangs on import is a line
in the table. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from chunkflow_cli import __version__
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import human_bytes, stderr_console, stdout_console
from chunkflow_cli.errors import UsageError

GRACE_SECONDS = 5.0
"""Past its time a question says where it hangs; this long it may take to."""
SIDE_BY_SIDE = 4
LITTLE_SPACE = 2**30
"""Bytes free for tokenised data that are worth a warning."""


@dataclass(frozen=True)
class Piece:
    """A package that is used, and by what."""

    module: str
    """What is imported."""
    distribution: str
    """What is installed."""
    purpose: str
    required: bool = True
    """Whether no run can do without it."""
    extra: str | None = None
    """The extra of chunkflow-cli that brings it."""

    @property
    def install(self) -> str:
        return f"pip install {quoted(f'chunkflow-cli[{self.extra}]' if self.extra else self.requirement)}"

    @property
    def requirement(self) -> str:
        minimum = _minimums().get(self.distribution)
        return f"{self.distribution}>={minimum}" if minimum else self.distribution


PIECES = (
    Piece("torch", "torch", "everything"),
    Piece("transformers", "transformers", "models"),
    Piece("deepspeed", "deepspeed", "the training engine"),
    Piece("tokenizers", "tokenizers", "tokenising"),
    Piece("safetensors", "safetensors", "reading and writing weights"),
    Piece("numpy", "numpy", "planning"),
    Piece("orjson", "orjson", "reading data"),
    Piece("pyarrow", "pyarrow", "Parquet data"),
    Piece("hydra", "hydra-core", "configuration"),
    Piece("omegaconf", "omegaconf", "configuration"),
    Piece("rich", "rich", "what you see"),
    Piece("typer", "typer", "the command line"),
    Piece("peft", "peft", "LoRA", required=False),
    Piece("datasets", "datasets", "data sets of the Hugging Face hub", required=False),
    Piece("zstandard", "zstandard", ".zst data", required=False),
    Piece("matplotlib", "matplotlib", "charts", required=False),
    Piece("flash_attn", "flash-attn", "the fastest attention on NVIDIA GPUs", required=False, extra="flash"),
    Piece("gguf", "gguf", "GGUF models", required=False, extra="quant"),
    Piece("tensorboard", "tensorboard", "log.backends=[tensorboard]", required=False, extra="loggers"),
)


@dataclass(frozen=True)
class Problem:
    what: str
    remedy: str
    required: bool
    """Whether training cannot work here before it is solved."""


@dataclass(frozen=True)
class _Finding:
    """A problem before it is known which of them are one and the same."""

    problem: Problem
    module: str | None = None
    """The package that has it."""
    cause: str | None = None
    """Another package, broken or missing, that it comes from."""


def run(
    overrides: Sequence[str], *, config_dir: str | None = None, seconds: float, json_output: bool = False
) -> dict[str, Any]:
    """Ask everything, show it, and list every problem with its remedy; `ready` says whether training can work here.

    Args:
        overrides: the run that is asked about; its model, dtype, attention and cache folder count.
        config_dir: a folder whose YAML files are found before the shipped ones.
        seconds: how long one question may take.
        json_output: print nothing on stdout.

    Raises:
        UsageError: an override is wrong.
    """
    findings = examine(overrides, config_dir=config_dir, seconds=seconds, console=stderr_console())
    if not json_output:
        _print(stdout_console(), findings)
    return findings


def examine(overrides: Sequence[str], *, config_dir: str | None, seconds: float, console: Console) -> dict[str, Any]:
    """What `run` shows, as one JSON object."""
    chosen = _settings(overrides, config_dir, seconds)
    questions: dict[str, tuple[Any, ...]] = {f"package {piece.module}": (piece.module,) for piece in PIECES}
    questions["devices"] = ()
    questions["attention"] = (chosen["attention"], chosen["path"], chosen["trust_remote_code"], chosen["dtype"])
    questions["cache"] = (chosen["cache_dir"],)
    questions["hub"] = ()
    questions["training"] = ()
    answers = _ask(questions, seconds, console)
    objections = answers["attention"].get("objections", {})
    kernels = [name for name, objection in objections.items() if objection is None and name != "reference"]
    answers |= _ask({f"backend {name}": (name, chosen["dtype"]) for name in kernels}, seconds, console)

    packages = {piece.module: _package(piece, answers[f"package {piece.module}"]) for piece in PIECES}
    backends = {
        name: {
            "works": objection is None and not _failure(answers.get(f"backend {name}", {})),
            "reason": objection or _failure(answers.get(f"backend {name}", {})),
        }
        for name, objection in objections.items()
    }
    problems = _unite(
        [
            *_package_findings(packages, answers, has_gpu=bool(answers["devices"].get("gpus"))),
            *_device_findings(answers["devices"], packages, chosen),
            *_attention_findings(answers["attention"], backends, answers, packages),
            *_training_findings(answers["training"], packages),
            *_cache_findings(answers["cache"], packages),
            *_hub_findings(answers["hub"], packages),
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
            "requested": chosen["attention"],
            "dtype": chosen["dtype"],
            "takes": answers["attention"].get("takes"),
            "reason": answers["attention"].get("reason") or _failure(answers["attention"]),
        },
        "backends": backends,
        "cache": answers["cache"],
        "hub": answers["hub"],
        "problems": [asdict(problem) for problem in problems],
    }


def ask(question: str, arguments: Sequence[Any], seconds: float) -> dict[str, Any]:
    """The answer of a process of its own.

    Where it raised, crashed or did not answer in time: {"raised": what happened, "packages": where, innermost first}.
    """
    # -P: what lies in the current folder is not what a run would import. Files, not pipes: a process that was started
    # by the one that hangs would hold a pipe open.
    command = [sys.executable, "-P", "-m", "chunkflow_cli.cli.probes", str(seconds), question.partition(" ")[0]]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [*command, *map(json.dumps, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            code = process.wait(timeout=seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        said, complaint = out.read(), err.read().decode(errors="replace")
    if code == 0:
        answer: dict[str, Any] = json.loads(said)
        return answer
    if code is None or "Timeout (" in complaint:
        raised = f"no answer in {seconds:g} seconds"
    elif code < 0:
        raised = f"it crashed: {signal.strsignal(-code)}"
    else:
        raised = f"it ended with exit code {code}: {complaint.strip().rpartition(chr(10))[2]}"
    return {"raised": raised, "packages": _packages_of_trace(complaint)}


def _packages_of_trace(complaint: str) -> list[str]:
    """Top-level packages of the files in a faulthandler's trace, innermost first."""
    found = []
    for file in re.findall(r'^\s*File "([^"]+)", line', complaint, re.MULTILINE):
        folder = next(
            (entry for entry in sorted(sys.path, key=len, reverse=True) if file.startswith(f"{entry}/")), None
        )
        if folder:
            found.append(Path(file).relative_to(folder).parts[0].removesuffix(".py"))
    return list(dict.fromkeys(found))


def quoted(requirement: str) -> str:
    """For a shell, which would take `>` for a file and `[` for a pattern."""
    return f"'{requirement}'" if re.search(r"[\[<>]", requirement) else requirement


def _ask(questions: dict[str, tuple[Any, ...]], seconds: float, console: Console) -> dict[str, dict[str, Any]]:
    """All answers; a few questions at a time, since each process may import all of torch."""
    workers = max(2, min(SIDE_BY_SIDE, os.cpu_count() or 1))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    answers: dict[str, dict[str, Any]] = {}
    with progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("looking", total=len(questions))

        def answer(name: str) -> dict[str, Any]:
            progress.update(task, description=f"looking at {name.rpartition(' ')[2]:<13}")
            return ask(name, questions[name], seconds)

        futures: dict[Future[dict[str, Any]], str] = {pool.submit(answer, name): name for name in questions}
        try:
            for future in as_completed(futures):
                answers[futures[future]] = future.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers


def _settings(overrides: Sequence[str], config_dir: str | None, seconds: float) -> dict[str, Any]:
    defaults = Config()
    model, data = defaults.model, defaults.data
    chosen = {
        "path": model.path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype.value,
        "attention": model.attention.value,
        "cache_dir": data.cache_dir,
        "offload": defaults.engine.offload.value,
        "hardware": "",
    }
    if not overrides and config_dir is None:
        return chosen
    answer = ask("settings", (list(overrides), config_dir), seconds)
    if "usage" in answer:
        raise UsageError(answer["usage"])
    return chosen if "raised" in answer else answer  # then hydra is a line in the table


def _package(piece: Piece, answer: dict[str, Any]) -> dict[str, Any]:
    version = answer.get("version")
    if not answer.get("missing"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # then what the package says itself
            version = importlib.metadata.version(piece.distribution)
    minimum = _minimums().get(piece.distribution)
    too_old = bool(version and minimum and _numbers(version) < _numbers(minimum))
    error = answer.get("raised")
    state = "broken" if error else "missing" if answer.get("missing") else "too old" if too_old else "ok"
    return {"version": version, "state": state, "error": error, "purpose": piece.purpose, "required": piece.required}


def _minimums() -> dict[str, str]:
    """The least version of each distribution that chunkflow-cli asks for."""
    try:
        requirements = importlib.metadata.requires("chunkflow-cli") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return {}
    found = (re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", requirement) for requirement in requirements)
    return {match.group(1).lower(): match.group(2) for match in found if match is not None}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _failure(answer: dict[str, Any]) -> str | None:
    """Why a question was not answered well; None if it was."""
    return answer.get("raised") or answer.get("error")


def _cause(answer: dict[str, Any], packages: dict[str, dict[str, Any]], module: str | None = None) -> str | None:
    """The broken or missing package, other than `module`, that an exception or crash began in."""
    for name in answer.get("packages", []):
        if name == module:
            return None
        if name in packages and packages[name]["state"] in ("broken", "missing"):
            return str(name)
    return None


def _unite(findings: Sequence[_Finding]) -> list[Problem]:
    """One problem for each cause: what comes from a package is not listed beside it, but makes it required."""
    roots = {finding.cause for finding in findings if finding.cause is not None and finding.problem.required}
    return [
        replace(finding.problem, required=finding.problem.required or finding.module in roots)
        for finding in findings
        if finding.cause is None
    ]


def _package_findings(
    packages: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any]], *, has_gpu: bool
) -> list[_Finding]:
    findings = []
    for piece in PIECES:
        package, answer = packages[piece.module], answers[f"package {piece.module}"]
        needed_for = f"needed for {piece.purpose}"
        what, remedy = "", ""
        if package["state"] == "missing" and (piece.module != "flash_attn" or has_gpu):
            what, remedy = f"{piece.module} is not installed ({needed_for})", piece.install
        elif package["state"] == "too old":
            what = f"{piece.module} {package['version']} is too old ({needed_for})"
            remedy = f"pip install --upgrade {quoted(piece.requirement)}"
        elif package["state"] == "broken":
            what = f"{piece.module} does not import: {package['error']} ({needed_for})"
            remedy = f"pip install --force-reinstall --no-deps {quoted(piece.requirement)}"
            if piece.module == "flash_attn":
                remedy = (
                    "pip uninstall flash-attn, to take another backend; or compile it anew for the torch that is "
                    "installed: pip install --force-reinstall --no-deps --no-build-isolation flash-attn"
                )
        if what:
            cause = _cause(answer, packages, piece.module)
            findings.append(_Finding(Problem(what, remedy, piece.required), piece.module, cause))
    return findings


def _device_findings(
    answer: dict[str, Any], packages: dict[str, dict[str, Any]], chosen: dict[str, Any]
) -> list[_Finding]:
    if failure := _failure(answer):
        what = f"torch cannot list the devices: {failure}"
        problem = Problem(what, "check the driver with nvidia-smi; reinstall torch", True)
        return [_Finding(problem, cause=_cause(answer, packages))]
    findings = []
    if not answer["gpus"] and chosen["offload"] != "none":
        made_for = f"; the recipe is made for {chosen['hardware']}" if chosen["hardware"] else ""
        what = f"engine.offload={chosen['offload']} moves data from a GPU to the host, and there is no GPU{made_for}"
        findings.append(_Finding(Problem(what, "engine.offload=none, or a machine with a GPU", True)))
    if not answer["gpus"] and Path("/proc/driver/nvidia/version").exists():
        build = f"built for CUDA {answer['cuda']}" if answer["cuda"] else "built without CUDA"
        what = f"this machine has an NVIDIA driver, but torch ({build}) sees no GPU"
        remedy = "install the torch that fits the driver (https://pytorch.org/get-started); check CUDA_VISIBLE_DEVICES"
        findings.append(_Finding(Problem(what, remedy, False)))
    missing = [name for name in ("c++", "ninja") if shutil.which(name) is None]
    if answer["gpus"] and missing:
        what = f"there is no {' and no '.join(missing)}: DeepSpeed compiles its optimizer for engine.offload with it"
        remedy = "install a C++ compiler, and pip install ninja; or leave engine.offload=none"
        findings.append(_Finding(Problem(what, remedy, chosen["offload"] != "none")))
    return findings


def _attention_findings(
    answer: dict[str, Any],
    backends: dict[str, dict[str, Any]],
    answers: dict[str, dict[str, Any]],
    packages: dict[str, dict[str, Any]],
) -> list[_Finding]:
    if "raised" in answer:
        what = f"attention backends cannot be chosen: {answer['raised']}"
        return [_Finding(Problem(what, "reinstall torch and transformers", True), cause=_cause(answer, packages))]
    findings = []
    if answer["model_error"]:
        what, _, remedy = answer["model_error"].partition("\n")
        findings.append(
            _Finding(Problem(what, "; ".join(map(str.strip, remedy.splitlines())) or "another model.path", True))
        )
    working = [name for name, backend in backends.items() if backend["works"]]
    taken = answer["takes"]
    if taken is None:
        what = f"the configured attention cannot run here: {answer['reason']}"
        remedy = f"model.attention=auto, or one of {', '.join(working)}"
        findings.append(_Finding(Problem(what, remedy, True)))
    for name, backend in backends.items():
        if not backend["works"] and answer["objections"][name] is None:
            what = f"attention {name} does not work here: {backend['reason']}"
            problem = Problem(what, f"model.attention={working[0]}", name == taken)
            findings.append(_Finding(problem, cause=_cause(answers[f"backend {name}"], packages)))
    return findings


def _training_findings(answer: dict[str, Any], packages: dict[str, dict[str, Any]]) -> list[_Finding]:
    if "raised" not in answer:
        return []
    problem = Problem(
        f"what every run imports does not import together: {answer['raised']}",
        "reinstall chunkflow-cli in a fresh virtual environment",
        True,
    )
    return [_Finding(problem, cause=_cause(answer, packages))]


def _cache_findings(answer: dict[str, Any], packages: dict[str, dict[str, Any]]) -> list[_Finding]:
    if "raised" in answer:
        what = f"the folder of tokenised data cannot be looked at: {answer['raised']}"
        return [_Finding(Problem(what, "data.cache_dir=FOLDER", True), cause=_cause(answer, packages))]
    if answer["error"]:
        what = f"tokenised data cannot be written to {answer['path']}: {answer['error']}"
        return [_Finding(Problem(what, "data.cache_dir=FOLDER, one that can be written", True))]
    if answer["free_bytes"] < LITTLE_SPACE:
        what = f"only {human_bytes(answer['free_bytes'])} are free for tokenised data in {answer['path']}"
        remedy = "data.cache_dir=FOLDER, one with more room"
        return [_Finding(Problem(what, remedy, False))]
    return []


def _hub_findings(answer: dict[str, Any], packages: dict[str, dict[str, Any]]) -> list[_Finding]:
    if "raised" in answer:
        problem = Problem(
            f"the Hugging Face hub was not asked: {answer['raised']}", "none needed for models in folders", False
        )
        return [_Finding(problem, cause=_cause(answer, packages))]
    if answer["reachable"]:
        return []
    what = f"the Hugging Face hub cannot be reached ({answer['reason']})"
    remedy = "none needed for models and data from folders (model.path=FOLDER); behind a proxy set HTTPS_PROXY"
    return [_Finding(Problem(what, remedy, False))]


def _processor(answer: dict[str, Any]) -> dict[str, Any]:
    """The CPU as a device; its memory is what this process may use, where a container sets a limit."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdigit():
            memory = min(memory, int(text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = re.search(r"^model name\s*:\s*(.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return {
        "kind": "cpu",
        "name": name.group(1) if name is not None else platform.processor() or platform.machine(),
        "cores": cores,
        "memory_bytes": memory,
        "bfloat16": answer.get("cpu_bfloat16"),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


STYLES = {"ok": "green", "missing": "yellow", "too old": "yellow", "broken": "red"}


def _print(console: Console, findings: dict[str, Any]) -> None:
    console.print(f"[bold]chunkflow {findings['chunkflow']}[/], Python {findings['python']}, {findings['platform']}\n")
    _print_packages(console, findings["packages"])
    console.print()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for device in findings["devices"]:
        table.add_row(*_device_row(device))
    for label, text in _other_rows(findings):
        table.add_row(label, Text(text))
    console.print(table)
    console.print()
    for required, heading in ((True, "Training cannot work here before this is solved:"), (False, "Good to know:")):
        problems = [problem for problem in findings["problems"] if problem["required"] is required]
        if problems:
            console.print(Text(heading, style="bold red" if required else "bold"))
        bullets = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        for problem in problems:
            bullets.add_row("-", Text(problem["what"]))
            bullets.add_row("", Text(f"remedy: {problem['remedy']}"))
        if problems:
            console.print(bullets)
            console.print()
    if findings["ready"]:
        console.print(Text("Training can work here. To see it: chunkflow train recipe=tiny_random", style="green"))


def _print_packages(console: Console, packages: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("package", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, package in packages.items():
        state = package["state"]
        remark = "" if state == "ok" else package["error"] or f"for {package['purpose']}"
        table.add_row(name, package["version"] or "", Text(state, style=STYLES[state]), Text(remark))
    console.print(table)


def _device_row(device: dict[str, Any]) -> tuple[str, Text]:
    memory = human_bytes(device["memory_bytes"])
    if device["kind"] == "cuda":
        free = f" ({human_bytes(device['free_bytes'])} free)"
        bfloat16 = "" if device["bfloat16"] else ", no bfloat16: model.dtype=float32"
        return "GPU", Text(f"{device['name']}, {memory}{free}, sm {device['compute_capability']}{bfloat16}")
    cores = f"{device['cores']} core{'s' if device['cores'] > 1 else ''}"
    bfloat16 = {True: ", bfloat16 in hardware", False: ", bfloat16 by way of float32", None: ""}[device["bfloat16"]]
    return "CPU", Text(f"{device['name']}, {cores}, {memory}{bfloat16}")


def _other_rows(findings: dict[str, Any]) -> list[tuple[str, str]]:
    attention, cache, hub = findings["attention"], findings["cache"], findings["hub"]
    asked = f"model.attention={attention['requested']}, {attention['dtype']}"
    rows = [("attention", f"{asked}: takes {attention['takes'] or 'none'} ({attention['reason'] or 'as configured'})")]
    works: Callable[[bool], str] = lambda wanted: ", ".join(  # noqa: E731
        name for name, backend in findings["backends"].items() if backend["works"] is wanted
    )
    if findings["backends"]:
        rows.append(("", f"work here: {works(True) or 'none'}; do not: {works(False) or 'none'}"))
    if "raised" not in cache:
        state = cache["error"] or f"{human_bytes(cache['free_bytes'])} free"
        rows.append(("token cache", f"{cache['path']}, {state}"))
    if "raised" not in hub:
        reach = "reachable" if hub["reachable"] else "not reachable"
        rows.append(("hub", f"{hub['endpoint']} {reach}, {'logged in' if hub['token'] else 'not logged in'}"))
    return rows
