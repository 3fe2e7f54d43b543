"""The folder of a run: who owns it, its lock, and which checkpoint a run continues from."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.console import counted, stderr_console
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import write_json
from chunkflow_cli.model.folder import damage_of
from chunkflow_cli.training.checkpoint_folder import NAME, STATE, newest_checkpoint, read_state, steps_of
from chunkflow_cli.training.identity import RunIdentity, differences
from chunkflow_cli.training.saved_config import CONFIG, OVERRIDES, differing_keys, save_config

IDENTITY, LOCK, METRICS, PAGE = "identity.json", ".lock", "metrics.jsonl", "report.html"


@dataclass
class RunFolder:
    """The folder of a run, locked by this process or by the first process of the run."""

    path: Path
    checkpoint: Path | None
    """The checkpoint to continue from; None to start from the beginning."""
    _lock: IO[str] | None
    """None in the processes of a run that did not open the folder."""
    _made: Sequence[Path] = ()
    """The folders that were made for the run, the innermost first."""

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

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def read_report(self) -> dict[str, Any]:
        """Return the content of report.json.

        Raises:
            RunError: it is damaged.
        """
        report = _read_object(self.report)
        if report is None or "steps" not in report:
            raise RunError(
                f"{self.report} is damaged: it is not the report of a run\n"
                "  delete it, and the same command writes it again, from the last checkpoint on"
            )
        return report

    def read_identity(self) -> RunIdentity:
        """Return the identity of the run, which the process that opened the folder has written.

        Raises:
            RunError: identity.json is missing or damaged.
        """
        return RunIdentity.from_json(_read_object(self.path / IDENTITY), self.path / IDENTITY)

    def report_of_finished(self) -> dict[str, Any] | None:
        """Return the report if the run is finished, and print how to run it again; otherwise return None.

        Raises:
            RunError: the report or the weights in `final/` are damaged.
        """
        if not self.report.exists():
            return None
        report = self.read_report()
        self._check_final()
        stderr_console().print(
            f"This run is finished already. To run it again: checkpoint.resume=never\n  {self.path}",
            soft_wrap=True,
        )  # fmt: skip
        return report

    def _check_final(self) -> None:
        """Raise if the weights of a finished run are no longer there, or not whole."""
        if reason := damage_of(self.final):
            raise RunError(
                f"{self.path} is a finished run, but its result is damaged: {reason}\n"
                f"  delete {self.report}, and the same command writes {self.final} again, from the last checkpoint on"
            )

    def close(self) -> None:
        """Release the folder. If the run has left nothing in it, delete what was made for it."""
        if self._lock is None:
            return
        if set(_names(self.path)) <= {CONFIG.parent.name, IDENTITY, LOCK, METRICS} and not _has_results(self.path):
            _delete_unused(self.path, self._made)
        self._lock.close()


def open_run_folder(loaded: LoadedConfig, identity: RunIdentity) -> RunFolder:
    """Find or create the folder of this run, write its configuration, and find the checkpoint to continue from.

    With `checkpoint.resume=auto` a run continues the unfinished run of the same configuration: the one in
    `train.output_dir`, or if that is not set, the newest in outputs/<recipe>/. A folder in which no step was done and
    nothing saved belongs to no run.

    Args:
        identity: what the run is made of, by its configuration and data as they are now.

    Raises:
        UsageError: the folder cannot be used, or holds a run of another configuration or over other data, or one that
            is still running.
        RunError: the checkpoint is damaged.
    """
    config = loaded.config
    resume, given = config.checkpoint.resume, config.train.output_dir
    path = Path(given) if given is not None else Path("outputs") / loaded.recipe
    with _usable(path, is_given=given is not None):
        if given is not None:
            folder = _claim(path, loaded)
        else:
            found = _unfinished_run(path, loaded) if resume == "auto" else None
            folder = found or _new_folder(path)
    try:
        folder.checkpoint = _checkpoint_to_resume(folder.path, resume)
        _check_identity(folder, identity, resume)
        if not folder.report.exists():
            with _usable(folder.path, is_given=given is not None):
                save_config(folder.path, loaded)
                write_json(folder.path / IDENTITY, identity.to_json())
            if folder.checkpoint is None and _has_results(folder.path):
                _say(f"The run in {folder.path} was stopped before its first checkpoint: it starts over")
    except BaseException:
        folder.close()
        raise
    return folder


def shared_run_folder(path: Path, resume: str) -> RunFolder:
    """Return the folder of a run that another of its processes has opened; `resume` is `checkpoint.resume`."""
    return RunFolder(path, _checkpoint_to_resume(path, resume), None)


# Whose folder it is


def _claim(path: Path, loaded: LoadedConfig) -> RunFolder:
    """Return `train.output_dir`, which holds no run, or one of the same configuration to continue."""
    resume = loaded.config.checkpoint.resume
    folder = _lock(path)
    if folder is None:
        raise UsageError(
            f"train.output_dir={path}: another process is training in this folder\n"
            "  wait for it to end, or choose another folder"
        )
    try:
        if not _has_results(path):
            return folder
        if resume == "never":
            return _moved_aside(path, folder)
        if not (path / CONFIG).exists():
            raise UsageError(
                f"train.output_dir={path} holds {', '.join(_results(path))}, but not the {CONFIG} of a run\n"
                "  choose another folder, or set checkpoint.resume=never to move this one aside"
            )
        if different := differing_keys(path, loaded.tree):
            lines = "".join(f"\n  {difference}" for difference in different)
            raise UsageError(
                f"train.output_dir={path} holds a run of another configuration{lines}\n"
                "  choose another folder, or set checkpoint.resume=never to move that run aside"
            )
    except BaseException:
        folder.close()
        raise
    return folder


def _moved_aside(path: Path, folder: RunFolder) -> RunFolder:
    """Give the folder of an earlier run another name, and return a new one. A link stays a link, to a new folder."""
    real = path.resolve()
    if real == Path.cwd() or real in Path.cwd().parents:
        raise UsageError(
            f"checkpoint.resume=never: train.output_dir={path} is the current folder or holds it, and is not moved "
            "aside\n  choose another train.output_dir"
        )
    real.rename(real.with_name(f"{real.name}.before-{time.strftime('%Y-%m-%d_%H-%M-%S')}"))
    folder.close()
    real.mkdir(exist_ok=True)
    new = _lock(path)
    if new is None:
        raise UsageError(f"train.output_dir={path}: another process has just begun to train in this folder")
    return new


def _unfinished_run(recipe_folder: Path, loaded: LoadedConfig) -> RunFolder | None:
    """Return the newest run of this configuration, unless it is finished."""
    for path in sorted(recipe_folder.glob("*"), reverse=True):
        if not (path / CONFIG).is_file():
            continue
        try:
            if differing_keys(path, loaded.tree):
                continue
        except UsageError as error:
            _say(f"warning: {error}; so it is not known whether this run could resume there")
            continue
        if (path / "report.json").exists():
            return None
        if (folder := _lock(path)) is not None:  # else it is running right now
            return folder
    return None


def _new_folder(recipe_folder: Path) -> RunFolder:
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(100):
        path = recipe_folder / (name if attempt == 0 else f"{name}_{attempt}")
        if not path.exists() and (folder := _lock(path)) is not None:
            return folder
    raise AssertionError("a hundred runs started within one second")


def _lock(path: Path) -> RunFolder | None:
    """Make a folder and lock it until the process ends, however it ends; return None if another process has it."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    while True:
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / LOCK).open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        if _is_same_file(handle, path / LOCK):
            return RunFolder(path, None, handle, made)
        handle.close()  # its owner has just deleted or moved the folder


def _is_same_file(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _results(path: Path) -> list[str]:
    """Return the names of what a run has left in its folder: steps that were done, and what was saved."""
    found = [name for name in ("report.json", "final") if (path / name).exists() or (path / name).is_symlink()]
    if (path / METRICS).exists() and (path / METRICS).stat().st_size:
        found.append(METRICS)
    if newest_checkpoint(path) is not None:
        found.append("checkpoints")
    return found


def _has_results(path: Path) -> bool:
    return bool(_results(path))


def _names(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except OSError:  # moved or deleted by someone else
        return ["?"]


def _delete_unused(path: Path, made: Sequence[Path]) -> None:
    """Delete the files with which a run begins, and the folders that were made for it, if they are empty."""
    for file in (path / CONFIG, path / OVERRIDES, path / IDENTITY, path / METRICS, path / LOCK):
        file.unlink(missing_ok=True)
    for folder in (path / CONFIG.parent, *made):
        try:
            folder.rmdir()
        except OSError:  # someone else's files are in it
            continue


@contextmanager
def _usable(path: Path, *, is_given: bool) -> Iterator[None]:
    """Explain why a folder cannot be used for a run.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        yield
    except OSError as error:
        parts = [str(part) for part in (path, *path.parents)]
        reason = error.strerror or str(error)
        if os.path.islink(path) and not os.path.exists(path):
            reason = "it is a link that leads nowhere"
        elif files := [part for part in parts if os.path.exists(part) and not os.path.isdir(part)]:
            reason = f"{files[0]} is a file"
        named = f"train.output_dir={path}" if is_given else f"train.output_dir is not set, and {path}"
        raise UsageError(
            f"{named} cannot be used as the folder of a run: {reason}\n"
            "  set train.output_dir to a folder that this user can make and write to"
        ) from error


# Where it goes on


def _checkpoint_to_resume(path: Path, resume: str) -> Path | None:
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(path)
    named = Path(resume)
    is_checkpoint = (named / STATE).is_file() or (named.is_dir() and NAME.fullmatch(named.name))
    checkpoint = named if is_checkpoint else newest_checkpoint(named)
    if checkpoint is None:
        raise UsageError(
            f"checkpoint.resume={resume}: there is no checkpoint, and no run with one, at this path\n"
            "  set it to the folder of a checkpoint or of a run, or to auto or never"
        )
    return checkpoint


def _check_identity(folder: RunFolder, now: RunIdentity, resume: str) -> None:
    """Refuse to go on with other samples, in another order or from another model.

    Raises:
        UsageError: names what differs, with both values.
    """
    named = f"the run in {folder.path}"
    if folder.report.exists() and (folder.path / IDENTITY).exists():
        was, what = folder.read_identity(), "is finished, and is not the run that this command describes"
    elif folder.checkpoint is not None:
        state = read_state(folder.checkpoint)
        was = state.identity
        named = f"checkpoint.resume={resume}" if resume != "auto" else named
        what = f"has done {counted(state.progress.step, 'step')}, and would not be the same run any more"
    else:
        return
    if found := differences(was, now):
        lines = "".join(f"\n  {line}" for line in found)
        raise UsageError(
            f"{named} {what}{lines}\n"
            "  restore what has changed, or start over in another train.output_dir or with checkpoint.resume=never"
        )


def abandoned_checkpoints(folder: RunFolder, step: int) -> list[Path]:
    """Return the checkpoints in a run's folder that are no part of the run that goes on after `step`."""
    checkpoint = folder.checkpoint
    if checkpoint is None or checkpoint.resolve().parent != folder.checkpoints.resolve():
        return [path for path in steps_of(folder.checkpoints) if checkpoint is not None]
    return [path for path in steps_of(folder.checkpoints) if int(path.name[5:]) > step]


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _say(text: str) -> None:
    print(text, file=sys.stderr)
