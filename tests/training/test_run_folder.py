"""Whose folder it is, which run it continues, and what is refused before anything of it is touched."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from chunkflow_cli.config.load import LoadedConfig, load
from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.processes import environment
from chunkflow_cli.training import metrics
from chunkflow_cli.training.checkpoint_folder import SavedState, read_state, write_state
from chunkflow_cli.training.continuation import how_to_go_on, override
from chunkflow_cli.training.disk_room import warning_of_little_room
from chunkflow_cli.training.identity import FileShare, RunIdentity, differences, identify
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.metrics import StepMetrics, metrics_file
from chunkflow_cli.training.progress import Progress
from chunkflow_cli.training.run_folder import RunFolder, abandoned_checkpoints, open_run_folder
from chunkflow_cli.training.saved_config import CONFIG

pytestmark = pytest.mark.ranks

SHARE = FileShare("a.jsonl", 40, 480, "1f3a9c00d1e2f3a4")
IDENTITY = RunIdentity(
    (SHARE, FileShare("b.jsonl", 2, 10, "00")), (), {"train.global_batch_size": 16}, {"source": "s", "tokenizer": "t"},
    {"config.json": "433 bytes (176c12e5)"},
)  # fmt: skip


def loaded(folder: Path | None, *words: str) -> LoadedConfig:
    given = [] if folder is None else [override("train.output_dir", str(folder))]
    return load(["recipe=tiny_random", *given, *words])


def opened(folder: Path | None, *words: str, identity: RunIdentity = IDENTITY) -> RunFolder:
    return open_run_folder(loaded(folder, *words), identity)


def began(folder: Path, *words: str, rows: int = 1, steps: tuple[int, ...] = ()) -> Path:
    """Return the folder of a run that was stopped after some rows of metrics, with checkpoints of these steps."""
    run = opened(folder, *words)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps({"step": row + 1}) + "\n" for row in range(rows)))
    for step in steps:
        saved(run.path, step)
    run.close()
    return run.path


def saved(run: Path, step: int, identity: RunIdentity = IDENTITY) -> Path:
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    write_state(checkpoint, SavedState(Progress(step=step), "one process", 1, identity, {}))
    return checkpoint


# Whose folder it is


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """Its configuration holds keys that are gone, and lacks new ones; both never changed what is computed."""
    began(tmp_path, steps=(1,))
    old = OmegaConf.to_container(OmegaConf.load(tmp_path / CONFIG))
    assert isinstance(old, dict)
    del old["cluster"], old["data"]["overlong"]
    old["chunk"]["k_per"] = "sequence"
    old["parallel"] |= {"schedule": "interleaved", "parts": 2}
    old["tune"] |= {"k_per": ["run", "sequence"], "pipelines": [1, 2], "sequences": [], "gpus_per_node": 8}
    OmegaConf.save(OmegaConf.create(old), tmp_path / CONFIG)
    run = opened(tmp_path, "cluster.pipelines=[1,2]", "chunk.k=2")
    assert run.checkpoint == tmp_path / "checkpoints" / "step-00000001"
    run.close()
    with pytest.raises(UsageError, match=r"\n  data\.overlong was error and is drop\n"):
        opened(tmp_path, "data.overlong=drop")


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    began(tmp_path)
    with pytest.raises(UsageError) as error:
        opened(tmp_path, "optim.lr=2e-3", "train.steps=7", "train.seed=7", "data.path=x.jsonl")
    assert str(error.value).startswith(f"train.output_dir={tmp_path} holds a run of another configuration\n")
    for line in ("optim.lr was 0.001 and is 0.002", "train.steps was null and is 7", "train.seed was 0 and is 7"):
        assert f"\n  {line}\n" in str(error.value)
    assert re.search(r"data\.path was \S.*samples\.jsonl|data\.path was .*… and is x\.jsonl", str(error.value))


def test_a_run_that_did_nothing_owns_nothing(tmp_path: Path) -> None:
    """The remedy of an error before the first step is another key: it must not be refused as another configuration."""
    run = tmp_path / "new" / "run"
    opened(run).close()
    assert not (tmp_path / "new").exists()
    kept = opened(run)
    (run / "rejected.jsonl").write_text("{}\n")
    (run / "metrics.jsonl").touch()
    kept.close()
    assert (run / CONFIG).exists()
    second = opened(run, "optim.lr=2e-3", "checkpoint.resume=never")
    assert OmegaConf.load(run / CONFIG).optim.lr == 0.002
    second.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]


def test_what_others_put_into_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    opened(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_results_of_no_known_run_is_refused(tmp_path: Path) -> None:
    """`final/` would be replaced."""
    (tmp_path / "final").mkdir()
    with pytest.raises(
        UsageError, match=rf"train\.output_dir={tmp_path} holds final, but not the \.hydra/config\.yaml"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["", "a: [1\n", "a: ${nothing.here}\n", "- 1\n", "just words\n", "\xff"])
def test_a_damaged_configuration_of_an_old_run_stops_no_new_one(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "outputs" / "tiny_random" / "2020" / CONFIG
    old.parent.mkdir(parents=True)
    old.write_bytes(content.encode("latin-1"))
    run = opened(None)
    assert run.path != old.parent.parent
    run.close()
    assert f"warning: {old.relative_to(tmp_path)} is damaged: " in capsys.readouterr().err
    (old.parent.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match=r"config\.yaml is damaged"):
        opened(old.parent.parent)


def test_the_newest_run_of_a_configuration_goes_on_and_a_finished_one_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = Path("outputs/tiny_random")
    for name in ("2020", "2021", "2022"):
        began(outputs / name, steps=(1,))
    other = began(outputs / "2023", "optim.lr=2e-3", steps=(1,))
    run = opened(None)
    assert run.path == outputs / "2022"
    running_beside = opened(None)
    assert running_beside.path == outputs / "2021"
    run.close()
    running_beside.close()
    run.report.write_text("{}")
    new = opened(None)
    assert new.path not in (outputs / "2020", outputs / "2021", outputs / "2022", other)
    assert new.checkpoint is None
    new.close()


def test_never_moves_a_run_aside_and_a_link_stays_a_link(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    (tmp_path / "run").symlink_to(big)
    began(tmp_path / "run", steps=(3,))
    run = opened(tmp_path / "run", "checkpoint.resume=never")
    assert run.checkpoint is None
    assert (tmp_path / "run").is_symlink()
    assert not (big / "checkpoints").exists()
    (aside,) = tmp_path.glob("big.before-*")
    assert (aside / "checkpoints" / "step-00000003").is_dir()
    run.close()


def test_never_in_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving it would move the relative paths of the data with it."""
    began(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"train\.output_dir=\. is the current folder"):
        opened(Path(), "checkpoint.resume=never")
    assert (tmp_path / "metrics.jsonl").exists()


def a_file(path: Path) -> Path:
    path.write_text("x")
    return path


def a_link_to_nothing(path: Path) -> Path:
    path.symlink_to(path / "nowhere")
    return path


def a_loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_loop, "it is a link that leads nowhere"),
        (lambda path: a_loop(path) / "run", "Too many levels of symbolic links"),
        (a_file, "is a file"),
        (lambda path: a_file(path) / "run", "is a file"),
        (a_link_to_nothing, "it is a link that leads nowhere"),
        (lambda path: Path("/proc/run"), "No such file"),
        (lambda path: path / ("x" * 256), "File name too long"),
    ],
    ids=["a loop", "below a loop", "a file", "below a file", "a link to nothing", "no real folder", "too long"],
)
def test_a_folder_that_cannot_be_used_is_the_user_s_to_change(
    make: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "here")
    with pytest.raises(UsageError) as error:
        opened(path)
    assert str(error.value).startswith(f"train.output_dir={path} cannot be used as the folder of a run: ")
    assert reason in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"train\.output_dir=ro/run cannot be used .*: Permission denied"):
        opened(Path("ro/run"))
    with pytest.raises(UsageError, match=r"train\.output_dir is not set, and outputs/tiny_random cannot be used"):
        opened(None)


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    run = RunFolder(began(tmp_path), None, None)
    for content in ('{"steps": 3', "[]", "{}", ""):
        run.report.write_text(content)
        with pytest.raises(RunError, match=rf"{run.report} is damaged(.|\n)*delete it"):
            run.report_of_finished()


@pytest.mark.parametrize(
    ("files", "reason"),
    [({}, "has no weights"), ({"model.safetensors": b"x" * 9}, "not a complete safetensors file"),
     ({"adapter_config.json": b"{}"}, "adapter_model.safetensors is missing")],
    ids=["no weights", "half a file", "no adapter"],
)  # fmt: skip
def test_a_finished_run_without_its_weights_is_not_called_finished(
    files: dict[str, bytes], reason: str, tmp_path: Path
) -> None:
    run = RunFolder(began(tmp_path), None, None)
    run.report.write_text('{"steps": 3}')
    run.final.mkdir()
    for name, content in {"config.json": b"{}", **files}.items():
        (run.final / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"is a finished run, but its result is damaged: .*{reason}(.|\n)*delete"):
        run.report_of_finished()


# The same run


def test_other_data_is_refused_with_both_values(tmp_path: Path) -> None:
    grown = replace(IDENTITY, trained_on=(replace(SHARE, samples=50, tokens=600, content="77b2"), IDENTITY.trained_on[1]),
                    ingredients={"source": "other", "tokenizer": "t"})  # fmt: skip
    checkpoint = began(tmp_path / "run", steps=(7,)) / "checkpoints" / "step-00000007"
    with pytest.raises(UsageError) as error:
        opened(tmp_path / "run", identity=grown)
    assert str(error.value) == (
        f"the run in {tmp_path / 'run'} has done 7 steps, and would not be the same run any more\n"
        "  the data has changed: its files hold something else\n"
        "    a.jsonl: was 40 samples, 480 tokens (fingerprint 1f3a9c00), is 50 samples, 600 tokens (fingerprint 77b2)\n"
        "  restore what has changed, or start over in another train.output_dir or with checkpoint.resume=never"
    )
    assert checkpoint.is_dir()
    with pytest.raises(UsageError, match=rf"^checkpoint\.resume={checkpoint} has done 7 steps, and would not be"):
        opened(tmp_path / "two", f"checkpoint.resume={checkpoint}", identity=grown)
    assert not (tmp_path / "two").exists()
    run = opened(tmp_path / "run")
    run.report.write_text('{"steps": 8}')
    run.close()
    with pytest.raises(UsageError, match="is finished, and is not the run that this command describes"):
        opened(tmp_path / "run", identity=grown)


def test_another_batch_size_is_refused_and_another_learning_rate_is_not(tmp_path: Path) -> None:
    """From a named checkpoint into a new folder: what decides the position in the data must be the same."""
    checkpoint = saved(began(tmp_path / "run"), 2)
    words = (f"checkpoint.resume={checkpoint}", "optim.lr=5e-3", "train.epochs=9")
    opened(tmp_path / "two", *words).close()
    smaller = replace(IDENTITY, order={"train.global_batch_size": 8})
    with pytest.raises(UsageError, match=r"\n  train\.global_batch_size was 16 and is 8\n"):
        opened(tmp_path / "two", *words, "train.global_batch_size=8", identity=smaller)


def test_without_a_checkpoint_a_run_begins_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began(tmp_path, rows=3)
    other = replace(IDENTITY, trained_on=())
    run = opened(tmp_path, identity=other)
    assert run.checkpoint is None
    assert run.read_identity() == other
    run.close()
    assert "was stopped before its first checkpoint: it starts over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (IDENTITY, []),
        (replace(IDENTITY, trained_on=tuple(replace(s, file=f"moved/{s.file}") for s in IDENTITY.trained_on)), []),
        (replace(IDENTITY, held_out=(SHARE,)), []),
        (
            replace(IDENTITY, trained_on=IDENTITY.trained_on[::-1], ingredients={"source": "s", "tokenizer": "u"}),
            ["the data has changed: its files are the same, the tokenizer or its chat template is not",
             "  its files are read in another order: b.jsonl, a.jsonl"],
        ),
        (
            replace(IDENTITY, trained_on=IDENTITY.trained_on[:1]),
            ["the data has changed: its files and the tokenizer are the same, the tokens are not (other data.* keys, or "
             "a template with a date)", "  b.jsonl: was 2 samples, 10 tokens (fingerprint 00), is not there"],
        ),
        (
            replace(IDENTITY, model={"config.json": "9 bytes (ab)", "model.safetensors": "1 byte (cd)"}),
            ["model.path has changed: config.json was 433 bytes (176c12e5) and is 9 bytes (ab)",
             "model.path has changed: model.safetensors was not there and is 1 byte (cd)"],
        ),
    ],
    ids=["same", "moved", "held out now", "another order", "a file is gone", "another model"],
)  # fmt: skip
def test_what_differs_is_named(now: RunIdentity, lines: list[str]) -> None:
    assert differences(IDENTITY, now) == lines
    gone = [
        "the held-out data has changed",
        "  a.jsonl: was 40 samples, 480 tokens (fingerprint 1f3a9c00), is not there",
    ]
    found = differences(replace(IDENTITY, held_out=(SHARE,)), now)
    assert [line for line in found if line not in lines] == ([] if now.held_out else gone)


def test_the_identity_follows_the_tokens(tmp_path: Path) -> None:
    """One token, one target, an order, a cut and a held-out sample change it; a name, a space and a suffix do not."""
    rows = [{"input_ids": [3, 4, 5, number], "labels": [-100, 4, 5, number]} for number in range(6, 26)]

    def identity(rows: list[dict[str, list[int]]], *words: str, name: str = "d.jsonl", gap: str = "") -> RunIdentity:
        (tmp_path / name).write_text("".join(gap + json.dumps(row) + "\n" for row in rows))
        config = load(["recipe=tiny_random", f"data.path={tmp_path / name}", "data.eval_fraction=0",
                       f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1", *words]).config  # fmt: skip
        found = identify(config, load_run_data(config, None))
        assert RunIdentity.from_json(json.loads(json.dumps(found.to_json())), tmp_path) == found
        return found

    first = identity(rows)
    assert (first.trained_on[0].samples, first.trained_on[0].tokens) == (20, 80)
    assert first.samples == 20
    assert differences(first, identity(rows, name="other.ndjson", gap=" ")) == []
    token, target = json.loads(json.dumps(rows)), json.loads(json.dumps(rows))
    token[3]["input_ids"][0], target[3]["labels"][1] = 9, -100
    for changed in (token, target, rows[::-1], rows[:-1], [*rows, rows[0]]):
        assert differences(first, identity(changed))[0].startswith("the data has changed: its files hold")
    assert differences(first, identity(rows, "data.overlong=truncate", "data.max_length=3"))
    held_out = identity(rows, "data.eval_fraction=0.1")
    assert differences(first, held_out)
    assert differences(held_out, identity(rows, "data.eval_fraction=0.1", "train.seed=1"))
    assert "train.seed was 0 and is 1" in differences(first, identity(rows, "train.seed=1"))
    assert (
        differences(identity(rows, "train.shuffle=false"), identity(rows, "train.shuffle=false", "train.seed=1")) == []
    )


def test_the_identity_of_a_model_is_that_of_its_files(tmp_path: Path) -> None:
    """One changed weight in the middle of a large file is found: blocks all over it are hashed."""
    (tmp_path / "d.jsonl").write_text('{"input_ids": [3, 4, 5]}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(200_000))
    words = [f"model.path={tmp_path / 'm'}", f"data.path={tmp_path / 'd.jsonl'}", "data.format=tokens",
             f"data.cache_dir={tmp_path}", "data.num_workers=1"]  # fmt: skip

    def identity(*more: str) -> RunIdentity:
        config = load([*words, *more]).config
        return identify(config, load_run_data(config, None))

    first, drawn = identity(), identity("model.init=random")
    assert sorted(first.model) == ["config.json", "model.safetensors"]
    os.utime(tmp_path / "m" / "model.safetensors", (0, 0))
    assert identity() == first
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(100_000) + b"\1" + bytes(99_999))
    (line,) = differences(first, identity())
    assert line.startswith("model.path has changed: model.safetensors was 200,000 bytes (")
    assert identity("model.init=random") == drawn
    adapter, words_of_adapter = tmp_path / "adapter", ("model.lora.enabled=true", f"model.lora.path={tmp_path}/adapter")
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    with_adapter = identity(*words_of_adapter)
    assert identity(*words_of_adapter) == with_adapter
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    (line,) = differences(with_adapter, identity(*words_of_adapter))
    assert line.startswith("model.lora.path has changed: adapter_model.safetensors was 3 bytes (")


# Checkpoints and the way on


def test_steps_after_a_named_checkpoint_are_abandoned(tmp_path: Path) -> None:
    run = began(tmp_path / "run", steps=(2, 9, 10, 100))
    second = run / "checkpoints" / "step-00000009"
    folder = opened(run, f"checkpoint.resume={second}")
    assert [path.name for path in abandoned_checkpoints(folder, 9)] == ["step-00000010", "step-00000100"]
    folder.close()
    other = began(tmp_path / "other", steps=(5, 50))
    folder = opened(other, f"checkpoint.resume={second}")
    assert [path.name for path in abandoned_checkpoints(folder, 9)] == ["step-00000005", "step-00000050"]
    folder.close()
    folder = opened(other)
    assert abandoned_checkpoints(folder, 50) == []
    folder.close()


def test_a_named_checkpoint_without_its_state_is_damaged_and_not_absent(tmp_path: Path) -> None:
    run = began(tmp_path, steps=(1, 2))
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()
    for resume in ("auto", f"{run}/checkpoints/step-00000002"):
        with pytest.raises(RunError, match=rf"step-00000002 is damaged: state\.json is missing\n.*={run}/.*00001"):
            opened(run, f"checkpoint.resume={resume}")
    with pytest.raises(UsageError, match=r"checkpoint\.resume=nowhere: there is no checkpoint"):
        opened(run, "checkpoint.resume=nowhere")
    assert read_state(run / "checkpoints" / "step-00000001").progress.step == 1


def test_the_printed_command_is_the_one_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given back to a shell and to Hydra, it opens the folder that was left, at the checkpoint that was saved."""
    run = tmp_path / "a b, c=d's"
    began(run, steps=(4,))
    checkpoint = run / "checkpoints" / "step-00000004"

    def words(*typed: str, given: bool = True) -> list[str]:
        config = loaded(run if given else None, *typed).config
        output_dir = [override("train.output_dir", str(run))] if given else []
        said = how_to_go_on(config, run, checkpoint, ["train", "--json", "recipe=tiny_random", *output_dir, *typed])
        program, command, *found = shlex.split(said.partition("To resume: ")[2])
        assert (program, command) == ("chunkflow", "train")
        return found

    assert how_to_go_on(loaded(run).config, run, checkpoint, []) == f"The same command resumes from {checkpoint}"
    monkeypatch.chdir(tmp_path)
    for typed, given in (
        (["checkpoint.resume=never"], True), (["checkpoint.resume=never"], False), ([f"checkpoint.resume={tmp_path}"], True),
    ):  # fmt: skip
        folder = open_run_folder(load(words(*typed, given=given)), IDENTITY)
        assert folder.checkpoint == checkpoint
        folder.close()
    monkeypatch.setenv(environment.SWEEP, "0")
    assert load(words()).config.train.output_dir == str(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "add to the same command: checkpoint.resume=auto" in how_to_go_on(loaded(run).config, run, checkpoint, [])


def test_little_room_is_told_before_training() -> None:
    shape = ModelShape(layers=1, hidden_size=1, intermediate_size=1, attention=(AttentionLayers(1, 1, 1, 1, 1),),
                       vocab_size=1, matmul_parameters=1, is_head_tied=True, parameters=2**20,
                       trainable_parameters=2**20)  # fmt: skip
    config = loaded(None, "checkpoint.every=1", "checkpoint.keep=2").config  # float32, AdamW: final/ 4 MiB, 12 each
    assert warning_of_little_room(config, shape, free=40 << 20, checkpoints=0) is None
    said = warning_of_little_room(config, shape, free=(40 << 20) - 1, checkpoints=0)
    assert said is not None
    assert "needs up to 40.0 MiB: 4.0 MiB for final/ and 12.0 MiB for each checkpoint" in said
    assert warning_of_little_room(config, shape, free=16 << 20, checkpoints=2) is None
    config.eval.keep_best = True
    assert "12.0 MiB for final/ and best/" in str(warning_of_little_room(config, shape, free=0, checkpoints=0))


# Metrics

ROW = StepMetrics(3, 1.0, 1.0, 0.1, 1, 1, 1, 1, 0, 0.1, 10.0, 0.1, 5)


def kept_steps(path: Path, first_step: int = 3) -> list[int]:
    with metrics_file([LogBackend.jsonl], path, first_step) as write:
        write(ROW)
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_of_the_steps_to_come_and_a_half_written_end_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for end in ("", '{"step": 4}\n', '{"ste', "\0\0\0"):
        path.write_text('{"step": 1}\n{"step": 2}\n' + end)
        assert kept_steps(path) == [1, 2, 3]


@pytest.mark.parametrize("line", [b"[1]", b"\xff\xfe", b"{}", b'{"step": "1"}', b"", b"null"])
def test_a_file_that_holds_something_else_than_rows_is_named_and_kept(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(RunError, match=rf"{path}:2 is not a row of metrics"):
        kept_steps(path)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b"\n"


def test_a_full_disk_is_told_by_the_name_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "keep_rows_before", lambda *_: None)  # /dev/full has no end
    with pytest.raises(RunError, match=r"/dev/full could not be written: No space left on device"):
        kept_steps(Path("/dev/full"))
