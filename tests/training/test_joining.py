"""One process of a run reads and hashes the data; the others are told where it is in the token cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config
from chunkflow_cli.data import cache
from chunkflow_cli.data.source import LocalFiles
from chunkflow_cli.errors import UsageError
from chunkflow_cli.training.inputs import FoundData, load_run_data
from chunkflow_cli.training.joining import load_data


def configured(folder: Path, *words: str, first: int = 6) -> Config:
    """Return the configuration of a node with its data and its cache in a folder."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("data", range(first, 12)), ("held", range(20, 24))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": [3, 4, 5, row]}) + "\n" for row in rows))
    words = (f"data.path={folder / 'data.jsonl'}", f"data.eval_path={folder / 'held.jsonl'}", *words)
    return load(["data.format=tokens", f"data.cache_dir={folder}", *words]).config


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where all bytes of the data or of the cache are read."""
    monkeypatch.setattr(LocalFiles, "fingerprint", lambda _: pytest.fail("hashed the data"))
    monkeypatch.setattr(cache, "checksum", lambda _: pytest.fail("read the whole cache"))


def test_a_rank_that_sees_the_same_cache_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank hashed all data, one after the other: 50 GB were minutes a rank, and hours for 512."""
    config = configured(tmp_path / "shared")
    first = load_run_data(config, None)
    told = FoundData.parse(str(FoundData.of(first)))
    assert told == FoundData.of(first)
    forbid_reading(monkeypatch)
    own = load_data(config, None, told)
    for mine, theirs in ((own.train, first.train), (own.evaluation, first.evaluation)):
        assert mine.whole.key == theirs.whole.key
        assert [sample.input_ids.tolist() for sample in mine] == [sample.input_ids.tolist() for sample in theirs]
        assert mine.location(0) == theirs.location(0)
    assert load_data(config, None, first) is first


def copied(tmp_path: Path) -> tuple[Config, FoundData]:
    """Return the configuration of a node with a copy of data and cache, and what the first node has found."""
    first = configured(tmp_path / "first")
    told = FoundData.of(load_run_data(first, None))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    return configured(tmp_path / "second"), told


def test_a_node_checks_its_own_copy_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, told = copied(tmp_path)
    checked: list[Path] = []
    plain = cache.checksum
    monkeypatch.setattr(cache, "checksum", lambda path: (checked.append(path), plain(path))[1])
    assert FoundData.of(load_data(config, None, told)).keys == told.keys
    assert len(checked) == 2 * (len(cache.ARRAYS) + 2)  # two entries: their arrays, and the rows that are listed
    (damaged,) = (tmp_path / "second" / "tokens" / told.keys[1]).glob("input_ids.npy")
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UsageError, match=r"is damaged: input_ids\.npy"):
        load_data(config, None, told)


def test_the_other_ranks_of_that_node_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, told = copied(tmp_path)
    monkeypatch.setattr("chunkflow_cli.training.joining.local_rank", lambda: 3)
    forbid_reading(monkeypatch)
    assert FoundData.of(load_data(config, None, told)).keys == told.keys


@pytest.mark.parametrize("local_rank", [0, 3])
def test_a_node_without_a_cache_tokenises_its_data(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = copied(tmp_path)
    shutil.rmtree(tmp_path / "second" / "tokens")
    monkeypatch.setattr("chunkflow_cli.training.joining.local_rank", lambda: local_rank)
    assert FoundData.of(load_data(config, None, told)).keys == told.keys


def test_a_node_with_other_data_is_refused(tmp_path: Path) -> None:
    """It would plan other steps, and the ranks would wait for each other for ever or train on half of each."""
    told = FoundData.of(load_run_data(configured(tmp_path / "first"), None))
    other: Any = configured(tmp_path / "second", first=5)
    with pytest.raises(UsageError, match=r"data.path=.*: its rows, or the tokenizer, are on this node not those of"):
        load_data(other, None, told)
