"""The policies for bad rows and long samples, and the accounting of every row."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import BadRows, DataConfig, DataFormat, Overlong
from chunkflow_cli.data import readers
from chunkflow_cli.data.dataset import CHECKED_BATCHES, CHECKED_ROWS, check_data, open_data, tokenize
from chunkflow_cli.data.formats import detect_format, parse_sample
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.errors import UsageError
from support.tokenized import load, write_rows

IGNORED = -100
BAD_TOKEN_ROWS = [
    ({"input_ids": [1, 10]}, "input_ids[1] is 10, and must be 0 to 9"),
    ({"input_ids": [1, -1]}, "input_ids[1] is -1, and must be 0 to 9"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, 10]}, "labels[2] is 10, and must be 0 to 9, or -100"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, -1]}, "labels[2] is -1, and must be 0 to 9, or -100"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels has 2 entries and input_ids 3"),
    ({"input_ids": []}, "input_ids is empty"),
    ({"input_ids": [1]}, "no targets"),
    ({"input_ids": [1, 2], "labels": [1, IGNORED]}, "no targets"),
    ({"text": "a"}, "no key 'input_ids' (keys: text)"),
    (b'{"input_ids": [1, 2', "not valid JSON"),
    (b'{"input_ids": [1, 2], "x": "\xff"}', "not valid UTF-8"),
]


def test_bad_rows_are_listed_and_skipped_on_request(tmp_path: Path) -> None:
    """An id outside the vocabulary reads foreign memory or crashes a GPU run. Here it is a bad row with a line number."""
    good = {"input_ids": [1, 2]}
    rows = [good, *(row for row, _ in BAD_TOKEN_ROWS), good]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError) as error:
        load(data, vocab=10, format=DataFormat.tokens)
    lines = str(error.value).splitlines()
    assert lines[0] == f"data.path={data}: 11 of 13 rows cannot be trained on"
    assert lines[1] == f"  {data}:2: input_ids[1] is 10, and must be 0 to 9"
    assert len(lines) == 8
    assert lines[6] == "  and 6 more"
    assert "data.bad_rows=skip" in lines[7]
    skipped = load(data, vocab=10, format=DataFormat.tokens, bad_rows=BadRows.skip)
    assert [str(skipped.location(index)) for index in range(len(skipped))] == [f"{data}:1", f"{data}:13"]
    assert [where.line for where, _ in skipped.rejected] == list(range(2, 13))
    for (_, reason), (_, expected) in zip(skipped.rejected, BAD_TOKEN_ROWS, strict=True):
        assert expected in reason
    assert (skipped.total.samples_read, skipped.total.samples_rejected, skipped.total.samples_dropped) == (13, 11, 0)
    with pytest.raises(UsageError, match=r"\n  data\.format=tokens is set.*data\.format=auto"):
        load(write_rows(tmp_path / "b.jsonl", [{"text": "a"}] * 2), vocab=10, format=DataFormat.tokens)


def test_no_sample_left(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1]}, {"input_ids": []}])
    with pytest.raises(
        UsageError, match=r"no samples are left of 2 rows: 2 are bad, 0 were dropped(.|\n)*a.jsonl:1: no targets"
    ):
        load(data, bad_rows=BadRows.skip)


LENGTHS = (2, 5, 9, 4, 7)


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", [{"input_ids": list(range(length))} for length in LENGTHS])


def test_overlong_error_names_the_longest(lengths_file: Path) -> None:
    """The default never cuts or drops: the error lists the samples, their lengths and the choices."""
    with pytest.raises(UsageError) as error:
        load(lengths_file, limit=4)
    assert str(error.value).splitlines() == [
        f"data.path={lengths_file}: 3 of 5 samples are longer than 4 tokens (the model's own limit)",
        f"  {lengths_file}:3: 9 tokens",
        f"  {lengths_file}:5: 7 tokens",
        f"  {lengths_file}:2: 5 tokens",
        "  allow them with data.max_length=9, or set data.overlong=drop or data.overlong=truncate",
    ]
    with pytest.raises(UsageError, match=r"longer than 8 tokens \(data.max_length\)"):
        load(lengths_file, limit=4, max_length=8)
    assert len(load(lengths_file, limit=None)) == len(load(lengths_file, limit=9)) == 5


def test_overlong_drop(lengths_file: Path) -> None:
    data = load(lengths_file, limit=5, overlong=Overlong.drop)
    assert data.lengths.tolist() == [2, 5, 4]
    total = data.total
    assert (total.samples_read, total.samples_dropped, total.samples_rejected, data.samples_truncated) == (5, 2, 0, 0)
    assert [data.location(index).line for index in range(3)] == [1, 2, 4]


def test_overlong_truncate(lengths_file: Path) -> None:
    """The last position that is kept would predict a token that is cut off, so it has no target."""
    data = load(lengths_file, max_length=5, overlong=Overlong.truncate)
    assert data.lengths.tolist() == [2, 5, 5, 4, 5]
    assert data.target_counts.tolist() == [1, 4, 4, 3, 4]
    assert data[2].input_ids.tolist() == [0, 1, 2, 3, 4]
    assert data[2].targets.tolist() == [1, 2, 3, 4, IGNORED]
    total = data.total
    assert (total.samples_read, total.samples_dropped, total.samples_rejected, data.samples_truncated) == (5, 0, 0, 2)
    again = load(lengths_file)
    assert again[2].targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, IGNORED], "the cache itself must not change"


def test_a_truncated_sample_without_targets_is_a_bad_row(tmp_path: Path) -> None:
    """As in TRL issue 6668: every label is cut off, the loss is 0.0, and the run reports success."""
    late = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": []}, late, {"input_ids": [1, 2, 3, 4]}, {"input_ids": [1]}])
    kept = load(data, max_length=2, overlong=Overlong.truncate, bad_rows=BadRows.skip)
    assert kept.lengths.tolist() == [2]
    assert [(where.line, reason.partition(" ")[0]) for where, reason in kept.rejected] == [
        (1, "input_ids"), (2, "no"), (4, "no"),
    ]  # fmt: skip
    assert (kept.total.samples_read, kept.total.samples_rejected, kept.samples_truncated) == (4, 3, 1)
    assert load(data, max_length=3, overlong=Overlong.truncate, bad_rows=BadRows.skip).target_counts.tolist() == [1, 2]
    with pytest.raises(UsageError, match="no targets are left after truncation to 2 tokens"):
        load(write_rows(tmp_path / "b.jsonl", [late]), max_length=2, overlong=Overlong.truncate)


def test_select(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n, n, n]} for n in range(6)] + [{"input_ids": []}])
    whole = load(data, bad_rows=BadRows.skip, max_length=2, overlong=Overlong.truncate)
    part = whole.select([4, 1])
    assert [part[index].input_ids.tolist() for index in (0, 1)] == [[4, 4], [1, 1]]
    assert [str(part.location(index)) for index in (0, 1)] == [f"{data}:5", f"{data}:2"]
    assert (part.total.samples_read, part.total.samples_rejected, part.samples_truncated, len(part)) == (2, 0, 2, 2)
    assert len(whole.select([])) == 0


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.one_of(
            st.lists(st.integers(-1, 11), max_size=6).map(lambda ids: json.dumps({"input_ids": ids}).encode()),
            st.lists(st.sampled_from([IGNORED, 1, 10]), min_size=1, max_size=5).map(
                lambda labels: json.dumps({"input_ids": [1] * len(labels), "labels": labels}).encode()
            ),
            st.sampled_from([b"", b"{", b"\xff", b"[]", b'{"input_ids": [3, 4, 5, 6, 7, 8]}']),
        ),
        min_size=1,
        max_size=12,
    ),
    max_length=st.none() | st.integers(2, 5),
    overlong=st.sampled_from([Overlong.drop, Overlong.truncate]),
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], max_length: int | None, overlong: Overlong
) -> None:
    """Every row that is not blank is trained on unchanged, truncated, dropped, or reported with a reason."""
    kept, dropped, bad = {}, 0, set()
    for line, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            value = json.loads(row)
            ids, labels = value["input_ids"], value.get("labels", value["input_ids"])
        except (ValueError, TypeError):
            bad.add(line)
            continue
        targets = [*labels[1:], IGNORED]
        fits = max_length is None or len(ids) <= max_length
        in_range = all(0 <= token < 10 for token in ids) and all(0 <= t < 10 or t == IGNORED for t in labels)
        if not in_range or all(target == IGNORED for target in targets):
            bad.add(line)
        elif fits:
            kept[line] = (ids, targets)
        elif overlong is Overlong.drop:
            dropped += 1
        elif all(target == IGNORED for target in targets[: max_length - 1]):
            bad.add(line)
        else:
            kept[line] = (ids[:max_length], [*targets[: max_length - 1], IGNORED])
    path = write_rows(tmp_path_factory.mktemp("d") / "a.jsonl", rows)
    policies = {"format": DataFormat.tokens, "bad_rows": BadRows.skip, "max_length": max_length, "overlong": overlong}
    if not kept:
        with pytest.raises(UsageError, match=r"no samples are left|has no rows"):
            load(path, vocab=10, **policies)
        return
    data = load(path, vocab=10, **policies)
    found = {data.location(n).line: (data[n].input_ids.tolist(), data[n].targets.tolist()) for n in range(len(data))}
    assert found == kept
    assert list(found) == sorted(found)
    assert {where.line for where, _ in data.rejected} == bad
    total = data.total
    assert total.samples_dropped == dropped
    assert total.samples_read == len(data) + total.samples_rejected + total.samples_dropped == sum(map(bool, rows))
    assert data.lengths.tolist() == [len(ids) for ids, _ in kept.values()]
    assert data.target_counts.tolist() == [sum(t != IGNORED for t in targets) for _, targets in kept.values()]


def test_eval_path_is_read_instead(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path / "missing.jsonl"), cache_dir=str(tmp_path / "cache"))
    held_out = write_rows(tmp_path / "b.jsonl", [{"input_ids": [1, 2]}])
    settings = {"model_path": "none", "model_limit": None, "vocab_size": None, "trust_remote_code": False}
    assert len(tokenize(replace(config, eval_path=str(held_out)), for_evaluation=True, **settings)) == 1
    with pytest.raises(UsageError, match=r"^data\.eval_path=.*nowhere"):
        tokenize(replace(config, eval_path=str(tmp_path / "nowhere.jsonl")), for_evaluation=True, **settings)


def test_evaluation_on_a_split(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("dev", 2), ("test", 3)):
        write_rows(tmp_path / "d" / f"{name}.jsonl", [{"input_ids": [1, 2]}] * count)
    other = write_rows(tmp_path / "e" / "validation.jsonl", [{"input_ids": [1, 2]}] * 5)
    path, settings = str(tmp_path / "d"), {"cache_dir": str(tmp_path / "cache")}
    for config, train, evaluation in (
        (DataConfig(path=path, eval_split="validation", **settings), 4, 2),
        (DataConfig(path=path, split="train+dev", eval_split="test", **settings), 6, 3),
        (DataConfig(path=path, eval_path=path, **settings), 4, 2),
        (DataConfig(path=path, eval_path=path, eval_split="test", **settings), 4, 3),
        (DataConfig(path=path, eval_path=str(other), **settings), 4, 5),
        (DataConfig(path=[path], eval_path=[str(other), str(other)], **settings), 4, 10),
    ):
        assert open_data(config).names != open_data(config, for_evaluation=True).names
        for for_evaluation, expected in ((False, train), (True, evaluation)):
            found = sum(len(batch.rows) for batch in open_data(config, for_evaluation=for_evaluation).batches())
            assert found == expected, config
    with pytest.raises(UsageError, match=r"^data\.path=.* has no split x; (.|\n)*data\.eval_split=NAME"):
        open_data(DataConfig(path=path, eval_split="x"), for_evaluation=True)


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": "A", "prompt": "unused"}, b"{", {"prompt": "no question", "answer": "B"}]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"answer": "C", "question": "R", "extra": "E"}])
    source = open_data(DataConfig(path=str(path), columns={"question": "prompt", "answer": "completion"}))
    (batch,) = source.batches()
    assert batch.rows == [
        {"prompt": "Q", "completion": "A"}, b"{", {"prompt": "no question", "completion": "B"},
        {"extra": "E", "completion": "C", "prompt": "R"},
    ]  # fmt: skip
    assert detect_format(source) is DataFormat.prompt_completion
    assert source.fingerprint() != open_data(DataConfig(path=str(path))).fingerprint()
    swapped = open_data(DataConfig(path=str(path), columns={"question": "answer", "answer": "question"}))
    assert next(swapped.batches()).rows[3] == {"answer": "R", "question": "C", "extra": "E"}
    with pytest.raises(UsageError, match=r"no row of data\.path has a column missing\n  the first row has question, "):
        open_data(DataConfig(path=str(path), columns={"missing": "text"}))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Q", "answer": "A"}, "{question:instruction,answer:output}"),
        ({"input": "Q", "output": "A"}, "{input:instruction}"),
        ({"id": 1, "query": "Q", "response": "A"}, "{query:instruction,response:output}"),
        ({"prompt": "Q", "response": "A"}, "{prompt:instruction,response:output}"),
        ({"instruction": "I", "context": "", "response": "R"}, "{context:input,response:output}"),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, "{question:instruction,response:output}"),
        ({"system": "S", "query": "Q", "response": "A", "history": []}, "{query:instruction,response:output}"),
        ({"dialogue": "A: Hi", "content": "A document."}, "{content:text}"),
        ({"conversation": []}, "{conversation:messages}"),
        ({"content": "A document."}, "{content:text}"),
    ],
)
def test_names_of_columns_are_suggested(tmp_path: Path, row: dict[str, object], columns: str) -> None:
    """The suggestion can be pasted."""
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(UsageError, match="rows of no known format") as error:
        detect_format(open_data(DataConfig(path=str(path))))
    assert f"as in 'data.columns={columns}'" in str(error.value)
    mapping = dict(pair.split(":") for pair in columns.strip("{}").split(","))
    renamed = open_data(DataConfig(path=str(path), columns=mapping))
    format = detect_format(renamed)
    if row != {"conversation": []}:
        parse_sample(decode_row(next(renamed.batches()).rows[0]), format)


@pytest.mark.parametrize(
    ("is_terminal", "quiet_seconds", "is_shown"), [(True, 0, True), (True, 60, False), (False, 0, False)]
)
def test_progress_is_shown_for_slow_work_on_a_terminal(
    lengths_file: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, quiet_seconds: float, is_shown: bool
) -> None:
    """Progress bars in a log file, or flickering for a second in every run, would be noise."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("chunkflow_cli.console.QUIET_SECONDS", quiet_seconds)
    load(lengths_file)
    assert ("tokenizing" in stream.getvalue()) is is_shown


# The check before anything slow begins


def checked(path: Path, **config: Any) -> str:
    """Return the error of `check_data`; empty if there is none."""
    try:
        check_data(DataConfig(path=str(path), **config))
    except UsageError as error:
        return str(error)
    return ""


def test_bad_rows_are_told_before_anything_slow(tmp_path: Path) -> None:
    """Among the first rows only: the rest is read with the tokenizer, and the error says how many it stands for."""
    good = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    early = write_rows(tmp_path / "early.jsonl", [good, b"{", {"messages": []}, *[good] * 5 * CHECKED_ROWS])
    error = checked(early)
    read = int(error.split(" ")[5])
    assert CHECKED_ROWS <= read < 2 * CHECKED_ROWS
    first, *places, remedy = error.splitlines()
    assert first == f"data.path={early}: 2 of the first {read} rows cannot be trained on"
    assert [place.split(": ")[0] for place in places] == [f"  {early}:2", f"  {early}:3"]
    assert "data.bad_rows=skip" in remedy
    assert checked(early, bad_rows=BadRows.skip) == ""
    alike = checked(write_rows(tmp_path / "alike.jsonl", [good, {"messages": []}, {"messages": []}]))
    assert [place.partition(": ")[2] for place in alike.splitlines()[1:3]] == ["messages is empty", "the same"]
    few = write_rows(tmp_path / "few.jsonl", [good, b"{"])
    assert checked(few).startswith(f"data.path={few}: 1 of 2 rows cannot be trained on\n  {few}:2: not valid JSON")
    assert checked(write_rows(tmp_path / "good.jsonl", [good] * 3)) == ""
    assert "there is no such file" in checked(tmp_path / "missing.jsonl")
    assert "no known format" in checked(write_rows(tmp_path / "odd.jsonl", [{"x": 1}]))


def test_long_rows_are_checked_as_fast_as_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)  # as if each row had a mebibyte
    rows: list[object] = [{"text": "a"}] * CHECKED_BATCHES
    assert checked(write_rows(tmp_path / "a.jsonl", [*rows, b"{"])) == ""
    error = checked(write_rows(tmp_path / "b.jsonl", [*rows[1:], b"{", rows[0]]))
    assert f"1 of the first {CHECKED_BATCHES} rows cannot be trained on" in error


def test_data_to_evaluate_on_is_checked_too(tmp_path: Path) -> None:
    """It is tokenized last, after an hour of the other data."""
    good = write_rows(tmp_path / "a.jsonl", [{"question": "Q", "answer": "A"}])
    bad = write_rows(tmp_path / "b.jsonl", [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": 5}])
    columns = {"question": "prompt", "answer": "completion"}
    assert checked(good, columns=columns, eval_path=str(good)) == ""
    error = checked(good, columns=columns, eval_path=str(bad))
    assert error.startswith(f"data.eval_path={bad}: 1 of 2 rows cannot be trained on\n  {bad}:2: ")
    assert checked(good, columns=columns, eval_path="nowhere.jsonl").startswith(
        "data.eval_path=nowhere.jsonl: there is"
    )
    write_rows(tmp_path / "d" / "train.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "d" / "test.jsonl", [{"text": 5}])
    assert checked(tmp_path / "d") == ""
    error = checked(tmp_path / "d", eval_split="test")
    assert error.startswith(f"data.path={tmp_path}/d: 1 of 1 rows cannot be trained on\n  {tmp_path}/d/test.jsonl:1: ")


def test_the_check_refuses_nothing_that_tokenising_accepts(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2]}, *(row for row, _ in BAD_TOKEN_ROWS)]
    for number, row in enumerate(rows):
        data = write_rows(tmp_path / f"{number}.jsonl", [row, {"input_ids": [1, 2]}])
        if checked(data, format=DataFormat.tokens):
            with pytest.raises(UsageError, match="1 of 2 rows"):
                load(data, vocab=10, format=DataFormat.tokens)
