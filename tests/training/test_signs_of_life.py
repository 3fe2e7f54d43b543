"""Work that takes long without operations is no hang: reading, tokenizing, loading and saving tell that bytes move."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from chunkflow_cli import files
from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.data.source import open_source
from chunkflow_cli.engine import StateFiles
from chunkflow_cli.engine.partitions import Partition, parts_to_write, read_partitions
from chunkflow_cli.engine.state_files import write_parts
from chunkflow_cli.files import checksum, written_aside
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.progress_bars import DownloadBar
from chunkflow_cli.model.saving import save_model
from chunkflow_cli.processes.heartbeat import Heartbeat, Watchdog
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.worker import heartbeat
from chunkflow_cli.training.inputs import load_run_data

Beats = list[float]


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beats]:
    """A list that grows with each sign of life."""
    heard: Beats = []
    monkeypatch.setattr(files, "SECONDS_APART", 0.0)
    files.on_bytes_moved(lambda: heard.append(0.0))
    yield heard
    files.on_bytes_moved(None)


def test_bytes_that_move_are_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that loads a model for longer than `launch.hang_seconds` was killed."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "CHUNKFLOW_RUN_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    watch, now = WatchFolder(tmp_path), [0.0]
    watch.prepare()
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    dog = Watchdog([watch.heartbeat(0), watch.heartbeat(1)], lambda: now[0])
    Heartbeat(watch.heartbeat(0)).at(0, "reading the data")
    heartbeat(tmp_path).at(0, "loading the model")
    dog.look()
    for _ in range(4):
        now[0] += 1000.0
        files.bytes_moved()
        standing = dog.look()
        assert standing[1].seconds == 0
        assert str(standing[1].place) == "loading the model"
    assert standing[0].seconds == 4000  # only the rank that moves bytes lives
    beats = standing[1].place.beats
    for _ in range(1000):
        files.bytes_moved()
    assert dog.look()[1].place.beats == beats  # a beat is a write, perhaps over a network: once a second is enough
    files.on_bytes_moved(None)


def test_data_that_is_read_and_tokenised_gives_signs_of_life(tmp_path: Path, beats: Beats) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(500))}) + "\n" for _ in range(1500)))  # 3 MB
    open_source(str(data)).fingerprint()
    assert len(beats) >= 3
    beats.clear()
    config = load(
        ["data.format=tokens", f"data.path={data}", f"data.cache_dir={tmp_path}", "data.num_workers=1"]
    ).config
    load_run_data(config, None)
    assert len(beats) >= 10  # hashed, tokenized in batches, written, checked


def test_weights_that_are_loaded_and_saved_give_signs_of_life(
    tmp_path: Path, beats: Beats, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    weights = len(model.state_dict())
    with written_aside(tmp_path / "model") as folder:
        save_model(folder, model, model.state_dict())
    assert len(beats) >= 1  # a file of weights
    beats.clear()
    given: list[Any] = []
    resolve = modeling_utils._get_resolved_checkpoint_files
    monkeypatch.setattr(
        modeling_utils, "_get_resolved_checkpoint_files", lambda **k: (given.append(k["tqdm_class"]), resolve(**k))[1]
    )
    config = ModelConfig(path=str(tmp_path / "model"))
    loaded = load_model(config, load_config(config), dtype=torch.float32, attention="eager", seed=0)
    assert given == [DownloadBar]
    assert len(beats) >= 2 * weights  # loaded, and looked through for numbers that are not finite
    beats.clear()
    parameters = dict(loaded.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values())
    kept = [Partition(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in parameters.items()]
    write_parts(tmp_path, 0, parts_to_write(kept, optimizer), optimizer="adamw")
    assert len(beats) >= len(kept)
    beats.clear()
    read_partitions(kept, optimizer, StateFiles(tmp_path))
    assert len(beats) == len(kept)
    beats.clear()
    checksum(tmp_path / "state-00000-00000.safetensors")
    assert beats


def test_a_download_gives_signs_of_life(beats: Beats) -> None:
    with DownloadBar(total=100, disable=True) as bar:
        bar.update(10)
    assert beats
