"""The end of a run: nothing spoiled is saved, and what was learned is kept where there is room for it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import stderr_console
from chunkflow_cli.errors import RunError
from chunkflow_cli.files import written_aside
from chunkflow_cli.training import final_model, finish
from support.tokenizers import CHATML, make_tokenizer

FULL = "No space left on device"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run whose steps are done, of a model without a tokenizer. Its disk is full; that of temporary files is not."""
    folder, config = tmp_path / "run", Config()
    config.model.path = str(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(final_model, "save_final", saved_unless(lambda path: path.is_relative_to(folder)))
    monkeypatch.setattr(finish, "save_progress", lambda run, state: folder / "checkpoints" / "step-00000007")
    return SimpleNamespace(
        config=config,
        recorder=None,
        data=SimpleNamespace(
            read=SimpleNamespace(wholes=[SimpleNamespace(entry=SimpleNamespace(ends={}), chat_template=None)])
        ),
        parts=SimpleNamespace(engine=SimpleNamespace(is_stage=False, first_not_finite=lambda: None), model=None),
        processes=SimpleNamespace(is_first=True, gather=lambda value: [value]),
        folder=SimpleNamespace(path=folder, final=folder / "final", checkpoints=folder / "checkpoints"),
        console=stderr_console(),
    )


def test_whoever_may_read_a_new_file_may_read_the_model(tmp_path: Path) -> None:
    """A container writes it as root."""
    with written_aside(tmp_path / "final") as folder:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "final" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


STATE = SimpleNamespace(at=lambda what: None, progress=SimpleNamespace(step=7))


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, FULL)


def saved_unless(is_full: Callable[[Path], bool]) -> Callable[..., None]:
    """Return a stand-in for `save_final` which leaves its half, as the real one does, where the disk is full."""

    def save(folder: Path, *_: Any, **__: Any) -> None:
        place = folder.with_name(f".{folder.name}.writing") if is_full(folder) else folder
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text("weights")
        if is_full(folder):
            full()

    return save


def error_of(run: Any) -> str:
    with pytest.raises(RunError) as caught:
        finish.finish(run, STATE)  # type: ignore[arg-type]
    assert not run.folder.final.exists()
    assert not list(run.folder.path.glob(".final*")), "its half takes the room that a checkpoint needs"
    return str(caught.value)


def test_spoilt_weights_never_become_final(run: Any) -> None:
    """The loss of the last step is from before its update, which can spoil the weights: all would look well."""
    run.parts.engine.first_not_finite = lambda: "the weight of layers.1.up"
    run.folder.checkpoints.mkdir(parents=True)
    assert error_of(run) == (
        "after step 7, the weight of layers.1.up is not finite: it is not saved\n"
        "  lower optim.lr, or look at the data of the last steps; no checkpoint was saved before"
    )


def test_the_model_is_saved_with_the_template_that_wrote_its_samples(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is not read again: it may have changed since the first step, or be gone."""
    saved = {}

    def save_final(folder: Path, model: Any, tokenizer: Any, *_: Any, **__: Any) -> None:
        saved["template"] = tokenizer.chat_template
        full()

    monkeypatch.setattr(final_model, "save_final", save_final)
    run.config.model.path = str(make_tokenizer(tmp_path / "model"))
    run.config.data.chat_template = str(tmp_path / "gone.jinja")
    run.parts.model = SimpleNamespace(generation_config=GenerationConfig())
    for template, expected in (("{{ messages }}", "{{ messages }}"), (None, CHATML)):
        run.data.read.wholes[0].chat_template = template
        error_of(run)
        assert saved["template"] == expected


def test_no_room_for_the_model_leaves_a_checkpoint(run: Any) -> None:
    final, checkpoint = run.folder.final, run.folder.checkpoints / "step-00000007"
    assert error_of(run) == (
        f"the model could not be saved to {final}: {FULL}\n"
        f"  what was learned is in {checkpoint}: make room, and the same command finishes the run"
    )


def test_no_room_for_a_checkpoint_either_leaves_the_model_elsewhere(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "save_progress", full)
    error = error_of(run)
    assert error.startswith(f"the model could not be saved to {run.folder.final}: {FULL}\n")
    (elsewhere,) = re.findall(r"\n  the model is in (\S+) instead: move it away from there\n", error)
    assert Path(elsewhere).is_relative_to(tmp_path / "tmp")
    assert (Path(elsewhere) / "model.safetensors").read_text() == "weights"
    assert error.endswith(f"\n  a checkpoint could not be saved either: {FULL}")


def test_what_is_lost_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "save_progress", full)
    monkeypatch.setattr(final_model, "save_final", saved_unless(lambda path: True))
    run.folder.checkpoints.mkdir(parents=True)
    assert error_of(run).endswith(f"({FULL}): all steps are lost")
