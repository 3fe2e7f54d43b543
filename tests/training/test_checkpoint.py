"""Checkpoints are exact on every layout, and complete or absent no matter which process dies."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings, StateFiles, state_files
from chunkflow_cli.engine.partitions import kept_partitions
from chunkflow_cli.engine.state_files import Part, write_parts
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import describe_file
from chunkflow_cli.training import checkpoint as checkpoints
from chunkflow_cli.training import checkpoint_folder
from chunkflow_cli.training.checkpoint import Progress, load_checkpoint, random_states, save_checkpoint
from chunkflow_cli.training.checkpoint_folder import (
    check_files,
    newest_checkpoint,
    read_state,
    set_aside,
    steps_of,
    write_state,
)
from chunkflow_cli.training.identity import FileShare, RunIdentity
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

OPTIMIZERS = {
    "adamw": OptimConfig(lr=0.05, weight_decay=0.1, grad_clip=1.0),
    "sgd with momentum": OptimConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.9, grad_clip=1.0),
    "sgd": OptimConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.0, grad_clip=0.0),
}
LAYOUTS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
ROWS = 4
"""Number of rows in a global batch, shared among the ranks."""


class Tiny(nn.Module):
    """A model with a tied head, a frozen parameter, and sizes that two ranks cannot divide evenly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.rand(5), requires_grad=False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.scale
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return nn.functional.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


def engine_of(stage: int, dtype: str, optim: OptimConfig, *, seed: int) -> Engine:
    """Return an engine that partitions large matrices under ZeRO-3 and keeps vectors whole, as for a real model."""
    engine = EngineConfig(zero_stage=stage)
    if stage == 3:
        engine.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 8}}
    model = Tiny(seed).to(getattr(torch, dtype))
    model.scale.data.fill_(0.5)  # it is frozen, so it is part of the model and not of the checkpoint
    return Engine(model, EngineSettings(engine, optim, Dtype(dtype), torch.device("cpu")))


def train(engine: Engine, steps: range) -> list[float]:
    """Return loss and gradient norm of each step; the batch depends on the step only."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(0, 11, (2, ROWS, 6), generator=generator)
        for row in range(rank, ROWS, ranks):
            loss = engine.forward(tokens[row], targets[row]) / (ROWS * 6)
            engine.backward(loss)
            seen.append(float(loss.detach()))
        seen.append(engine.step())
    return seen


def model_weights(engine: Engine) -> dict[str, Tensor]:
    weights = engine.whole_weights(engine.module, trained_only=False)
    return {name: tensor.clone() for name, tensor in (weights or {}).items()}


def written(engine: Engine, folder: Path) -> Path:
    from torch import distributed

    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    distributed.barrier()
    return folder


def whole(files: StateFiles, parameter: str, kind: str = "weight") -> Tensor:
    """Return one array in the parameter's shape, in float32."""
    array = torch.empty(files.shapes[parameter])
    files.read(parameter, kind, 0, array.view(-1))
    return array


def numbers(folder: Path) -> dict[str, Tensor]:
    """Return every master weight and optimizer state as a whole array, and every step count."""
    files = StateFiles(folder)
    arrays = {
        f"{kind} {name}": whole(files, name, kind) for name in files.shapes for kind in ("weight", *files.states(name))
    }
    counts = {
        f"{word} {name}": torch.tensor(value) for name in files.shapes for word, value in files.scalars[name].items()
    }
    return {**arrays, **counts}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit, including the sign of a zero."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    as_bytes = {True: torch.int16, False: torch.int32}
    return [
        name
        for name in one
        if not torch.equal(*(t[name].view(as_bytes[t[name].dtype is torch.bfloat16]) for t in (one, other)))
    ]


def saved_name(ranks: int, stage: int, dtype: str) -> str:
    return f"{ranks} ranks ZeRO-{stage} {dtype}"


# On one layout


def resume_on_the_same_layout(root: str) -> list[str]:
    """Return what a continued run does differently from an uninterrupted one, over all cases."""
    wrong = []
    for stage, dtype in LAYOUTS:
        for name, optim in OPTIMIZERS.items():
            case = f"{name}, ZeRO-{stage} {dtype}"
            first = engine_of(stage, dtype, optim, seed=0)
            train(first, range(2))
            folder = written(first, Path(root, case))
            expected = train(first, range(2, 5))
            second = engine_of(stage, dtype, optim, seed=1)
            second.load(folder)
            if train(second, range(2, 5)) != expected:
                wrong.append(f"{case}: losses or norms")
            if differing(model_weights(first), model_weights(second)):
                wrong.append(f"{case}: the model's weights")
            states = [numbers(written(engine, Path(root, f"{case} {i}"))) for i, engine in enumerate((first, second))]
            wrong += [f"{case}: {array}" for array in differing(*states)]
    return wrong


def test_a_run_continues_to_the_bit(tmp_path: Path) -> None:
    """Weights, momenta and step counts are restored in a model made from another seed."""
    assert run_ranks(2, "test_checkpoint:resume_on_the_same_layout", str(tmp_path)) == [[], []]


# Across layouts


def save_on_all_layouts(root: str) -> dict[str, dict[str, Tensor]]:
    """Return the model's weights one step after each checkpoint."""
    after = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, OPTIMIZERS["adamw"], seed=0)
        train(engine, range(2))
        name = saved_name(int(os.environ["WORLD_SIZE"]), stage, dtype)
        written(engine, Path(root, name))
        train(engine, range(2, 3))
        after[name] = model_weights(engine)
        if (stage, dtype) == (0, "float32"):  # a difference that the comparison below must find
            engine.load(Path(root, name))
            for state in engine._optimizer.state.values():
                state["exp_avg"].zero_()
            train(engine, range(2, 3))
            after["momenta lost"] = model_weights(engine)
    return after


def load_all_layouts(root: str) -> dict[tuple[str, str], tuple[list[str], dict[str, Tensor]]]:
    """Return for each pair of saver and loader which loaded states differ, and the model's weights one step later."""
    found = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, OPTIMIZERS["adamw"], seed=1)
        me = saved_name(int(os.environ["WORLD_SIZE"]), stage, dtype)
        for saved in sorted(path for path in Path(root).iterdir() if path.name.endswith(dtype)):
            engine.load(saved)
            mine = written(engine, Path(root, "loaded", me, saved.name))
            wrong = differing(numbers(saved), numbers(mine))
            train(engine, range(2, 3))
            found[saved.name, me] = (wrong, model_weights(engine))
    return found


def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    """Over one and two processes, all ZeRO stages and both precisions, states are equal to the bit, and so is a step."""
    after = {}
    for ranks in (1, 2):
        after |= run_ranks(ranks, "test_checkpoint:save_on_all_layouts", str(tmp_path))[0]
    lost, kept = after["momenta lost"], after[saved_name(2, 0, "float32")]
    assert max(float((lost[name] - kept[name]).abs().max()) for name in kept) > 1e-3
    for ranks in (1, 2):
        found = run_ranks(ranks, "test_checkpoint:load_all_layouts", str(tmp_path))[0]
        assert len(found) == 4 * 8 + 2 * 4
        for (saved, me), (wrong, weights) in found.items():
            assert wrong == [], f"{saved}, read by {me}"
            for name, expected in after[saved].items():
                tolerance = 1e-6 if saved.endswith("float32") else 2**-7
                torch.testing.assert_close(weights[name], expected, rtol=tolerance, atol=tolerance, msg=f"{saved} {me}")


# Whole or absent


class Engineless:
    """A stand-in for an engine where only files matter: one parameter of 1,000 numbers, shared by the ranks."""

    def __init__(self, value: float, rank: int = 0, ranks: int = 1) -> None:
        self.weight = torch.full((1000 // ranks,), value)
        self.rank = rank
        self.loaded: Tensor | None = None

    def save(self, folder: Path) -> None:
        part = Part("weight", (10, 100), len(self.weight) * self.rank, {"weight": self.weight}, {})
        write_parts(folder, self.rank, [part], optimizer="sgd")

    def load(self, folder: Path) -> None:
        self.loaded = whole(StateFiles(folder), "weight")


IDENTITY = RunIdentity((FileShare("a.jsonl", 3, 12, "0f"),), (), {"train.global_batch_size": 2}, {}, {})


def save(folder: Path, step: int, *, keep: int = 2, rank: int = 0, ranks: int = 1) -> Path:
    engine: Any = Engineless(float(step), rank, ranks)
    return save_checkpoint(
        folder, engine, Progress(step=step), random_states(), layout="one process", keep=keep, identity=IDENTITY
    )


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = [
    (0, "between its files"), (1, "between its files"), (0, "before state.json"), (0, "before the new name"),
    (0, "between two names"),
]  # fmt: skip
"""Rank that is killed, and when."""


def die_at_every_moment(root: str) -> list[int]:
    """Fork this rank for each moment, which spares it another start; return the exit codes."""
    codes = []
    for index, moment in enumerate(MOMENTS):
        child = os.fork()
        if child == 0:
            try:
                die_while_saving(Path(root, str(index)), *moment)
            finally:
                os._exit(1)  # when the other rank has gone
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def die_while_saving(root: Path, victim: int, moment: str) -> None:
    """Save step 1, then kill one rank while it saves the next checkpoint, at the given moment."""
    from torch import distributed

    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{root}-meeting", rank=rank, world_size=2)
    folder = root / "checkpoints"
    save(folder, 1, rank=rank, ranks=2)
    if rank == victim:
        if moment == "between its files":
            state_files.MAX_FILE_BYTES = 1000
            write, written_files = state_files.save_file, []

            def write_one(*words: Any) -> None:
                if written_files:
                    die()
                written_files.append(write(*words))

            state_files.save_file = write_one
        elif moment == "before state.json":
            checkpoints.write_state = die
        elif moment == "before the new name":
            checkpoint_folder._sync_folder = die
        else:
            assert moment == "between two names"
            rename = Path.rename
            Path.rename = lambda path, to: die() if path.name.endswith(".writing") else rename(path, to)  # type: ignore
    save(folder, 1 if moment == "between two names" else 2, rank=rank, ranks=2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each of MOMENTS, in which a rank was killed."""
    root = tmp_path_factory.mktemp("killed")
    codes = run_ranks(2, "test_checkpoint:die_at_every_moment", str(root))
    assert [codes[victim][index] for index, (victim, _) in enumerate(MOMENTS)] == [-signal.SIGKILL] * len(MOMENTS)
    return root


@pytest.mark.parametrize("index", range(len(MOMENTS)), ids=[f"{victim} {moment}" for victim, moment in MOMENTS])
def test_a_rank_killed_while_it_saves_leaves_the_previous_checkpoint(index: int, killed: Path) -> None:
    """Neither its files nor those of the other ranks are taken for a checkpoint."""
    folder = killed / str(index)
    found = newest_checkpoint(folder)
    assert found is not None
    assert json.loads((found / "state.json").read_text())["progress"]["step"] == 1
    assert torch.equal(whole(StateFiles(found), "weight"), torch.full((10, 100), 1.0))
    assert len(list(found.glob("random-*.pt"))) == 2
    save(folder / "checkpoints", 2)  # the run continues, and no leftovers remain
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "step-00000002"
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def other_things_of_two_ranks(root: str) -> dict[str, Any]:
    """Let one rank fail to write, and gather the stages of a model, in one launch."""
    from torch import distributed

    from chunkflow_cli.engine.stage import collect_stages

    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    folder = Path(root, "checkpoints")
    save(folder, 1, rank=rank, ranks=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write = state_files.save_file
    if rank == 1:
        state_files.save_file = full
    try:
        save(folder, 2, rank=rank, ranks=2)
        error = ""
    except RunError as caught:
        error = str(caught)
    state_files.save_file = write
    stages = [
        {"embed": torch.tensor([[1.0, 2.0]]), "layers.0": torch.tensor([3.0], dtype=torch.bfloat16)},
        {"layers.1": torch.tensor([4.0], dtype=torch.bfloat16), "embed": torch.tensor([[1.0, 2.0]])},
    ]
    return {"error": error, "whole": collect_stages(stages[rank], [0, 1], torch.device("cpu"))}


def test_a_full_disk_on_one_rank_fails_all_ranks(tmp_path: Path) -> None:
    """The others neither wait forever nor rename a checkpoint that lacks a rank's files."""
    first, second = run_ranks(2, "test_checkpoint:other_things_of_two_ranks", str(tmp_path))
    assert "failed on rank 1" in first["error"]
    assert "No space left on device" in first["error"]
    assert "No space left on device" in second["error"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert second["whole"] is None
    assert {name: tensor.tolist() for name, tensor in first["whole"].items()} == {
        "embed": [[1.0, 2.0]], "layers.0": [3.0], "layers.1": [4.0],
    }  # fmt: skip
    assert first["whole"]["layers.1"].dtype is torch.bfloat16


def test_the_same_step_again_and_the_oldest_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 3):
        save(folder, step)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    save(folder, 100_000_000, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-100000000"]


def test_what_was_just_saved_is_never_deleted(tmp_path: Path) -> None:
    """Checkpoints of higher steps, which a run from an earlier one leaves behind, do not count as newer."""
    for step in (90, 100):
        save(tmp_path, step)
    assert save(tmp_path, 11, keep=1).is_dir()
    assert [path.name for path in steps_of(tmp_path)] == ["step-00000011"]


def test_steps_that_are_trained_again_are_moved_aside_with_their_metrics(tmp_path: Path) -> None:
    folder, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    metrics.write_text("rows")
    for step in (1, 2, 3):
        save(folder, step, keep=9)
    aside = set_aside(folder, steps_of(folder)[1:], metrics)
    assert aside is not None
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000002", "step-00000003"]
    check_files(aside / "step-00000003", read_state(aside / "step-00000003").files)
    assert [path.name for path in steps_of(folder)] == ["step-00000001"]
    assert newest_checkpoint(tmp_path) == folder / "step-00000001"
    assert set_aside(folder, [], metrics) is None


def test_random_states_are_restored_or_reseeded(tmp_path: Path) -> None:
    """A rank restores its own state; if the number of ranks has changed, seed, step and rank give a new one."""
    engine: Any = Engineless(0.0)
    saved = save(tmp_path, 7)
    expected = torch.rand(3)
    torch.rand(5)
    resumed = load_checkpoint(saved, engine, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert not resumed.is_reseeded
    write_state(saved, replace(read_state(saved), processes=4))
    drawn = []
    for seed in (0, 0, 1):
        assert load_checkpoint(saved, engine, seed=seed).is_reseeded
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_numbers_of_another_kind_of_device_are_not_taken_over(tmp_path: Path) -> None:
    """On a GPU dropout draws there, which a checkpoint of a CPU has no state of, and the other way round."""
    engine: Any = Engineless(0.0)
    saved = save(tmp_path, 7)
    (path,) = saved.glob("random-*.pt")
    states = torch.load(path, weights_only=True)
    here = states["cuda"]
    torch.save({**states, "cuda": torch.zeros(16, dtype=torch.uint8) if here is None else None}, path)
    write_state(saved, replace(read_state(saved), files={f.name: describe_file(f) for f in saved.glob("*-*")}))
    assert load_checkpoint(saved, engine, seed=0).is_reseeded


# What is refused


def test_an_older_format_is_refused_with_a_way_out(tmp_path: Path) -> None:
    engine: Any = Engineless(0.0)
    saved = save(tmp_path, 1)
    (saved / "state.json").write_text(json.dumps({"step": 1, "samples_trained": 3}))
    with pytest.raises(UsageError, match=r"has format 1(.|\n)*checkpoint\.resume=never"):
        load_checkpoint(saved, engine, seed=0)
    (saved / "state.json").unlink()
    with pytest.raises(RunError, match=r"is damaged: state\.json is missing"):
        load_checkpoint(saved, engine, seed=0)


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if kind == "a flipped bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "cut":
        del content[at:]
    elif kind == "longer":
        content += b"\n"
    elif kind == "empty":
        content.clear()
    elif kind == "another file":
        content[:] = b"[]"
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["a flipped bit", "zeros", "cut", "longer", "empty", "another file", "missing"])
def test_any_damage_of_any_file_is_found_and_named(kind: str, tmp_path: Path) -> None:
    """At random places of every file: nothing is loaded, the file and the checkpoint before it are named."""
    engine: Any = Engineless(0.0)
    before, saved = save(tmp_path, 1), save(tmp_path, 2)
    rng = random.Random(5)
    for path in sorted(saved.iterdir()):
        whole_content = path.read_bytes()
        for _ in range(40 if kind in ("a flipped bit", "zeros", "cut") else 1):
            damage(path, kind, rng)
            if kind == "missing":
                path.unlink()
            elif path.read_bytes() == whole_content or (path.name == "state.json" and same_json(path, whole_content)):
                continue
            with pytest.raises(RunError) as error:
                load_checkpoint(saved, engine, seed=0)
            assert f"the checkpoint {saved} is damaged" in str(error.value)
            assert path.name in str(error.value)
            assert f"checkpoint.resume={before}" in str(error.value)
            assert engine.loaded is None
            path.write_bytes(whole_content)
    load_checkpoint(saved, engine, seed=0)
    assert torch.equal(engine.loaded, torch.full((10, 100), 2.0))


def same_json(path: Path, content: bytes) -> bool:
    """Return whether a change was in white space only."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(content))
    except ValueError:
        return False


def test_files_of_another_checkpoint_are_named(tmp_path: Path) -> None:
    """Each is whole, and together they would be taken for one checkpoint."""
    engine: Any = Engineless(0.0)
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    name = "state-00000-00000.safetensors"
    (two / name).write_bytes((one / name).read_bytes())
    with pytest.raises(RunError, match=rf"{name}: its content is not what was written"):
        load_checkpoint(two, engine, seed=0)
    two = save(tmp_path, 2)
    (two / "state-00001-00000.safetensors").write_bytes((one / name).read_bytes())
    with pytest.raises(RunError, match=r"state-00001-00000\.safetensors does not belong to it"):
        load_checkpoint(two, engine, seed=0)


@pytest.mark.parametrize("named", [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "parameters": "[1]"}])
def test_a_file_that_is_no_part_of_a_checkpoint_is_named(named: dict[str, str], tmp_path: Path) -> None:
    state_files.save_file({"weight:0:x": torch.ones(3)}, tmp_path / "state-00000-00000.safetensors", named or None)
    with pytest.raises(RunError, match=r"state-00000-00000\.safetensors is damaged, or not a file of a checkpoint"):
        StateFiles(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "MAX_FILE_BYTES", 1200)
    saved = save(tmp_path, 1)
    files = sorted(saved.glob("state-*"))
    assert len(files) == 4
    assert max(file.stat().st_size for file in files) < 1200 + 400
    middle = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(
        RunError, match="incomplete: it has 300 numbers in a row of the weight of weight, which has 1,000"
    ):
        StateFiles(saved)
    files[1].write_bytes(middle[:-100])
    with pytest.raises(RunError, match=f"{files[1].name} is damaged"):
        StateFiles(saved)
    with pytest.raises(RunError, match="holds no weights"):
        StateFiles(tmp_path / "nowhere")


def test_any_range_is_read_from_any_parts(tmp_path: Path) -> None:
    """Ranges equal slices of the array itself, for parts that start and end anywhere."""
    generator = np.random.default_rng(3)
    array = torch.arange(200.0)
    cuts = [0, *sorted(generator.choice(199, 6, replace=False) + 1), 200]
    for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = Part(
            "a:b", (20, 10), int(start), {"weight": array[start:stop], "exp_avg": -array[start:stop]}, {"step": 3.0}
        )
        write_parts(tmp_path, rank, [part], optimizer="adamw")
    files = StateFiles(tmp_path)
    assert files.states("a:b") == ["exp_avg"]
    assert files.scalars["a:b"] == {"step": 3.0}
    for _ in range(50):
        start, stop = sorted(generator.integers(0, 201, 2))
        into = torch.full((int(stop - start),), torch.nan)
        files.read("a:b", "exp_avg", int(start), into)
        assert torch.equal(into, -array[start:stop])


def refusals(root: str) -> dict[str, str]:
    """Return the errors of engines that do not fit the checkpoint of a `Tiny` with AdamW which they load."""

    class Wider(Tiny):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)

    class Deeper(Tiny):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.more = nn.Linear(5, 5)

    def engine(model: nn.Module, optim: OptimConfig) -> Engine:
        return Engine(model, EngineSettings(EngineConfig(zero_stage=1), optim, Dtype.float32, torch.device("cpu")))

    adamw = OPTIMIZERS["adamw"]
    tiny, deep = written(engine(Tiny(0), adamw), Path(root, "tiny")), written(engine(Deeper(0), adamw), Path(root, "d"))
    said = {}
    for name, model, optim, folder in (
        ("optimizer", Tiny(0), OPTIMIZERS["sgd"], tiny),
        ("wider", Wider(0), adamw, tiny),
        ("deeper", Deeper(0), adamw, tiny),
        ("shallower", Tiny(0), adamw, deep),
    ):
        with pytest.raises(UsageError) as error:
            engine(model, optim).load(folder)
        said[name] = str(error.value)
    return said


def spoilt_on_one_rank(_: Any) -> dict[str, str | None]:
    """Return what each engine says of its numbers when all are finite, and when one of the last rank's is not."""
    said: dict[str, str | None] = {}
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for stage, dtype in ((0, "float32"), (2, "float32"), (1, "bfloat16"), (3, "bfloat16")):
        engine = engine_of(stage, dtype, OPTIMIZERS["adamw"], seed=0)
        train(engine, range(1))
        said[f"ZeRO-{stage} {dtype} finite"] = engine.first_not_finite()
        part = kept_partitions(engine._engine, engine._trained)[-1]
        weight, state = part.of(part.stepped), part.of(engine._optimizer.state[part.stepped]["exp_avg_sq"])
        for numbers, what, bad in (
            (weight, "nan", math.nan), (weight, "inf", -math.inf), (weight, "large", 3.4e38), (state, "state", math.inf),
        ):  # fmt: skip
            good = float(numbers[-1])
            if is_last:
                numbers[-1] = bad
            said[f"ZeRO-{stage} {dtype} {what}"] = engine.first_not_finite()
            numbers[-1] = good
    return said


def test_a_number_that_is_not_finite_is_found_wherever_it_is() -> None:
    """On one rank's part: all ranks learn of it. 3.4e38 is a number in float32, and infinity in bfloat16."""
    first, second = run_ranks(2, "test_checkpoint:spoilt_on_one_rank")
    assert first == second
    for case, said in first.items():
        if case.endswith((" finite", "float32 large")):
            assert said is None, case
        else:
            assert said is not None, case
            assert said.startswith("the exp avg sq of " if case.endswith("state") else "the weight of "), case


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    """Each error says what differs; a part of a larger model would otherwise be loaded silently."""
    (said,) = run_ranks(1, "test_checkpoint:refusals", str(tmp_path))
    assert said["optimizer"].startswith("optim.name=sgd: ")
    assert "up.weight is [7, 5] there, here [8, 5]" in said["wider"]
    assert "it has no more.weight" in said["deeper"]
    assert "which also has more.bias" in said["shallower"]
    assert all("checkpoint.resume=never" in text for text in said.values())
