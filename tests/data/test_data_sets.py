"""Several data sets in one run: what is read of each, what is left out, and what is said about it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkflow_cli.cli import analyze
from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config
from chunkflow_cli.data.dataset import check_data
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.training.contributions import contributions
from chunkflow_cli.training.identity import differences, identify
from chunkflow_cli.training.inputs import FoundData, RunData, load_run_data
from chunkflow_cli.training.setup import read_setup
from support.tokenized import write_rows


def ids(count: int, first: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [first + row, 1, 2, *range(row % 5)]} for row in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", ids(20, 100))
    write_rows(tmp_path / "b.jsonl", ids(7, 200))
    return tmp_path


def configured(folder: Path, *sources: str, **keys: Any) -> Config:
    words = [f"data.sources=[{','.join(sources).replace('@', f'{folder}/')}]", f"data.cache_dir={folder / 'cache'}"]
    return load(
        ["data.format=tokens", *words, *(f"{key.replace('__', '.')}={value}" for key, value in keys.items())]
    ).config


def samples_of(data: Any) -> list[tuple[list[int], list[int]]]:
    return [(sample.input_ids.tolist(), sample.targets.tolist()) for sample in map(data.__getitem__, range(len(data)))]


def test_sources_without_weights_are_a_list_of_paths(folder: Path) -> None:
    """Same samples, same order, same steps: naming the sources changes nothing but what is reported."""
    several = configured(folder, "{path: @a.jsonl}", "{path: @b.jsonl}", train__global_batch_size=4)
    one = load(
        [f"data.path=[{folder}/a.jsonl,{folder}/b.jsonl]", "data.format=tokens", f"data.cache_dir={folder / 'cache'}",
         "train.global_batch_size=4"]
    ).config  # fmt: skip
    found = [load_run_data(config, None).train for config in (several, one)]
    assert samples_of(found[0]) == samples_of(found[1])
    assert [str(found[0].location(n)) for n in range(27)] == [str(found[1].location(n)) for n in range(27)]
    assert found[0].rows.tolist() == found[1].rows.tolist() == list(range(27))
    plans = [
        read_setup(config, None, DEVICES["cpu"]).plan(data) for config, data in zip((several, one), found, strict=True)
    ]
    assert [step.samples.tolist() for step in plans[0]] == [step.samples.tolist() for step in plans[1]]
    assert contributions(plans[1], found[1]) == {}


def test_contributions_are_what_the_steps_take(folder: Path) -> None:
    config = configured(folder, "{path: @a.jsonl, weight: 1}", "{path: @b.jsonl, weight: 2, name: more}",
                        train__global_batch_size=6, train__epochs=3)  # fmt: skip
    data = load_run_data(config, None).train
    plan = read_setup(config, None, DEVICES["cpu"]).plan(data)
    names = np.array(["a"] * 20 + ["more"] * 7)
    taken = np.concatenate([step.samples for step in plan])
    assert len(taken) == 3 * 27
    found = contributions(plan, data)
    for name, part in found.items():
        own = taken[names[taken] == name]
        assert part.samples == len(own)
        assert part.tokens == data.lengths[own].sum()
        assert part.targets == data.target_counts[own].sum()
        assert part.passes == pytest.approx(len(own) / (names == name).sum())
    assert found["more"].share_of_samples == pytest.approx(2 / 3)
    assert sum(part.share_of_tokens for part in found.values()) == pytest.approx(1)


def test_a_weight_does_not_tokenise_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_run_data(configured(folder, "{path: @a.jsonl, weight: 1}", "{path: @b.jsonl, weight: 1}"), None)
    monkeypatch.setattr("chunkflow_cli.data.dataset.build_entry", lambda *_: pytest.fail("tokenized"))
    load_run_data(configured(folder, "{path: @b.jsonl, name: x, weight: 9}", "{path: @a.jsonl, weight: 1}"), None)
    load_run_data(configured(folder, "{path: @a.jsonl, samples: 3}", data__deduplicate=True), None)


def test_limits_and_held_out_samples_are_of_each_source(folder: Path) -> None:
    """Held out of all together, a small source might lose all of its samples to one side."""
    sources = ("{path: @a.jsonl, samples: 10}", "{path: @b.jsonl, samples: 7}")
    data = load_run_data(configured(folder, *sources, data__eval_fraction=0.3), None)
    assert [len(data.train.samples_of(n)) for n in (0, 1)] == [7, 5]
    assert [len(data.evaluation.samples_of(n)) for n in (0, 1)] == [3, 2]
    assert [count.samples_beyond_limit for count in data.read.counts] == [10, 0]
    lines = sorted(str(part.location(n)) for part in (data.train, data.evaluation) for n in range(len(part)))
    assert len(set(lines)) == 17
    assert sum("a.jsonl" in line for line in lines) == 10
    again, other = (
        load_run_data(configured(folder, *sources, train__seed=seed, data__eval_fraction=0.3), None) for seed in (0, 1)
    )
    assert samples_of(again.train) == samples_of(data.train)
    assert samples_of(other.train) != samples_of(data.train)


def test_a_limit_above_the_source_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_run_data(configured(folder, "{path: @b.jsonl, samples: 8}"), None)
    assert "data.sources[b].samples=8: the source has only 7" in capsys.readouterr().err


def test_the_same_rows_twice_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ("{path: @a.jsonl, name: one}", "{path: @a.jsonl, name: two}")
    load_run_data(configured(folder, *twice), None)
    assert "data.sources: one and two hold the same rows, which count twice" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"data.sources\[two\].path=.*: none of its samples is left to train on"):
        load_run_data(configured(folder, *twice, data__deduplicate=True), None)
    load_run_data(configured(folder, "{path: @a.jsonl}", data__eval_path=str(folder / "a.jsonl")), None)
    assert "so the held-out loss is a training loss" in capsys.readouterr().err


def test_duplicates_are_left_out_and_named(folder: Path) -> None:
    """Equal ids with other targets are another sample, and so is one that is equal only up to where it is cut."""
    write_rows(folder / "c.jsonl", [
        {"input_ids": [1, 2, 3, 4, 5, 6]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [1, 2, 3]},
    ])  # fmt: skip
    write_rows(folder / "d.jsonl", [{"input_ids": [1, 2, 3, 9, 9, 9]}, {"input_ids": [7, 7]}, {"input_ids": [7, 7]}])
    sources = ("{path: @c.jsonl}", "{path: @d.jsonl}")
    keys = {"data__max_length": 3, "data__overlong": "truncate", "data__deduplicate": True}
    data = load_run_data(configured(folder, *sources, **keys), None).read
    kept = Counter(map(repr, samples_of(data)))
    every = load_run_data(configured(folder, *sources, **keys | {"data__deduplicate": False}), None).read
    assert set(kept) == set(map(repr, samples_of(every))), "nothing but repetitions is gone"
    assert max(kept.values()) == 1
    assert [count.samples_duplicate for count in data.counts] == [3, 2]
    assert [(str(where), reason) for where, reason in data.duplicates] == [
        (f"{folder}/{row}", f"a duplicate of {folder}/{of}")
        for row, of in (("c.jsonl:2", "c.jsonl:1"), ("c.jsonl:3", "c.jsonl:1"), ("c.jsonl:5", "c.jsonl:1"),
                        ("d.jsonl:1", "c.jsonl:1"), ("d.jsonl:3", "d.jsonl:2"))
    ]  # fmt: skip


def test_equal_digests_of_other_samples_lose_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkflow_cli.data.encoded_batch.digest_of", lambda *_: 1)
    data = load_run_data(configured(folder, "{path: @a.jsonl}", data__deduplicate=True, data__num_workers=1), None)
    assert len(data.read) == 20


def test_a_rank_finds_each_source_in_the_cache(folder: Path) -> None:
    config = configured(folder, "{path: @a.jsonl}", "{path: @b.jsonl}", data__eval_path=folder / "a.jsonl")
    first = load_run_data(config, None)
    told = FoundData.parse(str(FoundData.of(first)))
    assert len(told.keys) == 3
    assert samples_of(load_run_data(config, None, told.keys).train) == samples_of(first.train)
    assert first.evaluation.names == ()


def test_evaluation_on_a_split_of_each_source(tmp_path: Path) -> None:
    for source in ("x", "y/main"):
        write_rows(tmp_path / source / "train.jsonl", ids(4, 10))
        write_rows(tmp_path / source / "test.jsonl", ids(3, 20))
    data = load_run_data(configured(tmp_path, "{path: @x}", "{path: @y, subset: main}", data__eval_split="test"), None)
    assert data.evaluation.names == ("x", "y")
    assert (len(data.train), len(data.evaluation)) == (8, 6)


def test_mistakes_name_the_source(folder: Path) -> None:
    write_rows(folder / "bad.jsonl", [{"input_ids": [1, 2]}, {"input_ids": []}])
    for source, said in (
        ("{path: @nowhere.jsonl, name: odd}", r"^data\.sources\[odd\]\.path=.*nowhere.jsonl"),
        ("{path: @bad.jsonl}", r"^data\.sources\[bad\]\.path=.*bad.jsonl: 1 of 2 rows(.|\n)*bad.jsonl:2"),
        ("{path: @b.jsonl, columns: {x: text}}", r"no row of data\.sources\[b\]\.path has a column x"),
    ):
        with pytest.raises(UsageError, match=said):
            check_data(configured(folder, "{path: @a.jsonl}", source).data)
    config = configured(folder, "{path: @a.jsonl, weight: 1e6}", "{path: @b.jsonl, weight: 1}")
    with pytest.raises(UsageError, match=r"data\.sources\[b\]\.weight: no sample of it would be drawn"):
        read_setup(config, None, DEVICES["cpu"]).plan(load_run_data(config, None).train)


def test_a_run_goes_on_with_the_same_weights_only(folder: Path) -> None:
    made = []
    for weight in (1, 2):
        config = configured(folder, f"{{path: @a.jsonl, weight: {weight}}}", "{path: @b.jsonl, weight: 1}")
        config.model.path = str(folder)
        made.append(identify(config, load_run_data(config, None)))
    assert differences(made[0], made[0]) == []
    assert differences(made[0], made[1]) == ["data.sources[a].weight was 1.0 and is 2.0"]


def test_analyze_says_what_each_source_contributes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.sources=[{{path: {folder}/a.jsonl, weight: 3}},{{path: {folder}/b.jsonl, weight: 1}}]"]
    found = analyze.run([], load(["data.format=tokens", *words]))["datasets"]
    assert [(each["source"], each["share_of_samples"]) for each in found] == [("a", 0.75), ("b", 0.25)]
    assert sum(each["share_of_targets"] for each in found) == pytest.approx(1)
    assert "75.0 %" in capsys.readouterr().out
    json.dumps(found)


def test_run_data_counts_every_sample(folder: Path) -> None:
    data: RunData = load_run_data(
        configured(folder, "{path: @a.jsonl, samples: 9}", "{path: @b.jsonl}", data__eval_fraction=0.5), None
    )
    assert data.read.total.samples_read == 27
    assert len(data.train) + len(data.evaluation) + data.read.total.samples_beyond_limit == 27
