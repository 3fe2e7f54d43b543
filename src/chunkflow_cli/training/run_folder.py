"""The folder of a run: its configuration, its checkpoints, its lock, and which checkpoint a run continues from."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.console import stderr_console
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import write_atomically

CONFIG, OVERRIDES = Path(".hydra/config.yaml"), Path(".hydra/overrides.yaml")
REPLACED = ".replaced"
"""Suffix of a checkpoint that another one of the same step is about to replace."""
# Keys that may differ between a run and its continuation: they change neither the loss nor the weights of any step.
FREE_KEYS = (
    "train.output_dir", "train.guard", "train.trace", "checkpoint", "log", "data.cache_dir", "data.num_workers", "tune",
    "plan", "cluster",
    # The layout: checkpoints do not depend on it. engine.deepspeed is not free, because it can change precisions.
    "launch", "parallel", "engine.zero_stage", "engine.offload",
    # Keys that a run which ran out of memory is continued with. Chunks are exact: their size, K and cuts change the
    # rounding and nothing else. (Dropout draws other numbers for other chunks, as it does for another layout.)
    "chunk", "model.activation_checkpointing",
)  # fmt: skip


@dataclass
class RunFolder:
    """The folder of a run, locked by this process or by the first process of the run."""

    path: Path
    checkpoint: Path | None
    """The checkpoint to continue from; None to start from the beginning."""
    _lock: IO[str] | None
    """None in the processes of a run that did not open the folder."""

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def report(self) -> Path:
        """The file that is written last: a run that has it is finished."""
        return self.path / "report.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read_report(self) -> dict[str, Any]:
        """Return the content of report.json."""
        report: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        return report

    def report_of_finished(self) -> dict[str, Any] | None:
        """Return the report if the run is finished, and print how to run it again; otherwise return None."""
        if not self.report.exists():
            return None
        stderr_console().print(
            f"This run is finished already. To run it again: checkpoint.resume=never\n  {self.path}", soft_wrap=True
        )
        return self.read_report()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def open_run_folder(loaded: LoadedConfig) -> RunFolder:
    """Find or create the folder of this run, write its configuration, and find the checkpoint to continue from.

    With `checkpoint.resume=auto` a run continues the unfinished run of the same configuration: the one in
    `train.output_dir`, or if that is not set, the newest in outputs/<recipe>/.

    Raises:
        UsageError: the folder holds a run of another configuration, or one that is still running.
    """
    config = loaded.config
    resume, mine = config.checkpoint.resume, _comparable(loaded.tree)
    if config.train.output_dir is not None:
        path = Path(config.train.output_dir)
        lock = _lock_configured(path, mine, resume)
    else:
        found = _unfinished_run(Path("outputs") / loaded.recipe, mine) if resume == "auto" else None
        path, lock = found or _new_folder(Path("outputs") / loaded.recipe)
    checkpoint = _checkpoint_to_resume(path, resume)
    (path / CONFIG).parent.mkdir(exist_ok=True)
    write_atomically(path / CONFIG, OmegaConf.to_yaml(loaded.tree, resolve=True))
    write_atomically(path / OVERRIDES, OmegaConf.to_yaml(list(loaded.overrides)))
    return RunFolder(path, checkpoint, lock)


def _lock_configured(path: Path, mine: dict[str, Any], resume: str) -> IO[str]:
    """Return the lock of `train.output_dir`, which holds no run, or one of the same configuration to continue."""
    lock = _lock(path)
    if lock is None:
        raise UsageError(
            f"train.output_dir={path}: another process is training in this folder\n"
            "  wait for it to end, or choose another folder"
        )
    if not (path / CONFIG).exists():
        return lock
    if resume == "never":
        path.rename(path.with_name(f"{path.name}.before-{time.strftime('%Y-%m-%d_%H-%M-%S')}"))
        lock.close()
        lock = _lock(path)
        assert lock is not None
        return lock
    different = _differences(path, mine)
    if different:
        raise UsageError(
            f"train.output_dir={path} holds a run of another configuration; different: {', '.join(different)}\n"
            "  choose another folder, or set checkpoint.resume=never to move that run aside"
        )
    return lock


def shared_run_folder(path: Path, resume: str) -> RunFolder:
    """Return the folder of a run that another of its processes has opened; `resume` is `checkpoint.resume`."""
    return RunFolder(path, _checkpoint_to_resume(path, resume), None)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None. Incomplete ones have another name.

    If a process died after it moved a checkpoint aside and before its replacement was in place, the old one is found.
    """
    folder = run_folder / "checkpoints"
    found = {path.name: path for path in folder.glob("step-[0-9]*[0-9]")}
    for path in folder.glob(f".step-*{REPLACED}"):
        found.setdefault(path.name[1:].removesuffix(REPLACED), path)
    return found[max(found)] if found else None


def _checkpoint_to_resume(path: Path, resume: str) -> Path | None:
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(path)
    named = Path(resume)
    checkpoint = named if (named / "state.json").is_file() else newest_checkpoint(named)
    if checkpoint is None:
        raise UsageError(
            f"checkpoint.resume={resume}: there is no checkpoint, and no run with one, at this path\n"
            "  set it to the folder of a checkpoint or of a run, or to auto or never"
        )
    return checkpoint


def _unfinished_run(recipe_folder: Path, mine: dict[str, Any]) -> tuple[Path, IO[str]] | None:
    for path in sorted(recipe_folder.glob("*"), reverse=True):
        if not (path / CONFIG).is_file() or (path / "report.json").exists():
            continue
        if _differences(path, mine):
            continue
        lock = _lock(path)
        if lock is not None:  # else it is running right now
            return path, lock
    return None


def _new_folder(recipe_folder: Path) -> tuple[Path, IO[str]]:
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(100):
        path = recipe_folder / (name if attempt == 0 else f"{name}_{attempt}")
        if not path.exists() and (lock := _lock(path)) is not None:
            return path, lock
    raise AssertionError("a hundred runs started within one second")


def _lock(path: Path) -> IO[str] | None:
    """Return a lock that the kernel releases when the process ends, however it ends; None if another process has it."""
    path.mkdir(parents=True, exist_ok=True)
    handle = (path / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def _comparable(tree: Any) -> dict[str, Any]:
    """Return the values that decide what a run computes, by dotted key."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in FREE_KEYS:
                continue
            if isinstance(value, dict):
                walk(value, f"{name}.")
            else:
                flat[name] = getattr(value, "value", value)

    walk(OmegaConf.to_container(tree, resolve=True), "")
    return flat


def _differences(path: Path, mine: dict[str, Any]) -> list[str]:
    """Return the keys that decide what a run computes, and differ between a run folder and this configuration."""
    theirs = _comparable(OmegaConf.create((path / CONFIG).read_text(encoding="utf-8")))
    return [key for key in sorted(mine.keys() | theirs.keys()) if str(mine.get(key)) != str(theirs.get(key))]
