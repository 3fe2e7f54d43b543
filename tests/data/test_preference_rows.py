"""Rows of preferences: the tokens of TRL's own trainers, and the policies pair by pair."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chunkflow_cli.config.schema import BadRows, DataFormat, Overlong
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.sample import IGNORED, PromptCompletion
from chunkflow_cli.data.tokenized import without_duplicates
from chunkflow_cli.errors import UsageError
from support.tokenized import load, write_rows
from support.tokenizers import make_tokenizer

trl = pytest.importorskip("trl")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, BLUE, GREEN = turn("user", "sky?"), turn("assistant", "It is blue."), turn("assistant", "green")
SYSTEM = turn("system", "short")
FOLLOWED = [GREEN, turn("user", "sure?"), turn("assistant", "yes")]
PAIRS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [SYSTEM, ASKED, BLUE, ASKED], "chosen": FOLLOWED, "rejected": [BLUE]},
    ],
    "whole conversations": [
        {"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"chosen": [SYSTEM, ASKED, BLUE, ASKED, BLUE], "rejected": [SYSTEM, ASKED, BLUE, ASKED, GREEN]},
        {"chosen": [ASKED, BLUE, ASKED, BLUE], "rejected": [ASKED, BLUE]},
    ],
    "texts": [
        {"prompt": "sky? ", "chosen": "blue", "rejected": "green"},
        {"prompt": "x", "chosen": "ab<|im_end|>", "rejected": "a"},
        {"prompt": "sky? ", "chosen": "Hm", "rejected": "no"},  # the prompt's last token becomes part of the answer's
        {"prompt": "x", "chosen": "a", "rejected": ""},
    ],
    "whole texts": [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
}
FEEDBACK: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"prompt": [ASKED], "completion": [BLUE], "label": True},
        {"prompt": [SYSTEM, ASKED], "completion": FOLLOWED, "label": False},
    ],
    "texts": [{"prompt": "sky? ", "completion": "blue", "label": 1}, {"prompt": "a", "completion": "b", "label": 0}],
    "empty, and merged with its prompt": [
        {"prompt": "a", "completion": "", "label": 0},
        {"prompt": "sky? ", "completion": "Hm", "label": 0},
    ],
}


def by_trl(trainer: Any, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenize rows by the method of a trainer of TRL."""
    from datasets import Dataset

    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start", per_device_train_batch_size=2
    )
    stand_in = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    return list(trainer._prepare_dataset(stand_in, Dataset.from_list(rows), tokenizer, arguments, "train"))


def answers(sample: Any) -> tuple[list[int], list[int]]:
    """The ids of a sequence, and of its answer by the targets."""
    return sample.input_ids.tolist(), sample.targets[sample.targets != IGNORED].tolist()


@pytest.mark.torch
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_tokens_of_trls_dpo(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    model = make_tokenizer(tmp_path / "model")
    expected = by_trl(DPOTrainer, PAIRS[name], AutoTokenizer.from_pretrained(model))
    data = load(write_rows(tmp_path / "rows.jsonl", PAIRS[name]), model, format=DataFormat.preference)
    assert len(data) == len(expected)
    for index, row in enumerate(expected):
        for sequence, side in zip(data.sequences(index), ("chosen_ids", "rejected_ids"), strict=True):
            assert answers(sequence) == (row["prompt_ids"] + row[side], row[side])
        assert data.lengths[index] == sum(len(each.input_ids) for each in data.sequences(index))
        assert data.longest_sequences[index] == max(len(each.input_ids) for each in data.sequences(index))
        assert data.answers is not None
        assert data.answers.prompts[index] == len(row["prompt_ids"])


@pytest.mark.torch
@pytest.mark.parametrize("name", FEEDBACK)
def test_labelled_answers_have_the_tokens_of_trls_kto(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer
    from trl import KTOTrainer

    from chunkflow_cli.data.preferences import mismatched

    model = make_tokenizer(tmp_path / "model")
    expected = by_trl(KTOTrainer, FEEDBACK[name], AutoTokenizer.from_pretrained(model))
    data = load(write_rows(tmp_path / "rows.jsonl", FEEDBACK[name]), model, format=DataFormat.feedback)
    assert data.is_good.tolist() == [bool(row["label"]) for row in FEEDBACK[name]]
    for index, row in enumerate(expected):
        assert answers(data.sequences(index)[0]) == (row["prompt_ids"] + row["completion_ids"], row["completion_ids"])
        other = mismatched(data.sequences(index)[0], data.sequences(index - 1)[0], None)
        assert answers(other) == (row["prompt_ids"] + row["KL_completion_ids"], row["KL_completion_ids"])


def test_policies_take_both_answers_of_a_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "c" * 30, "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "rr"},
        {"prompt": "p" * 20, "chosen": "c", "rejected": "rr"},
        {"prompt": "p", "chosen": "c" * 30, "rejected": "c" * 25},  # the same once both are cut
    ]
    model, path = make_tokenizer(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match="3 of 4 samples are longer than 20 tokens"):
        load(path, model, format=DataFormat.preference, max_length=20)
    dropped = load(path, model, format=DataFormat.preference, max_length=20, overlong=Overlong.drop)
    assert (dropped.total.samples_read, dropped.total.samples_dropped, len(dropped)) == (4, 3, 1)
    cut = load(
        path, model, format=DataFormat.preference, max_length=20, overlong=Overlong.truncate, bad_rows=BadRows.skip
    )
    assert (len(cut), cut.total.samples_rejected, cut.samples_truncated) == (2, 2, 1)
    assert "the answers are the same, after truncation to 20 tokens" in cut.rejected[1][1]
    chosen, rejected = cut.sequences(0)
    assert (len(chosen.input_ids), len(rejected.input_ids)) == (20, 3)
    assert (chosen.targets[-1], int((chosen.targets != IGNORED).sum())) == (IGNORED, 19)
    assert cut.target_counts[0] == 19 + 2


BAD = {
    "the same": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    "mixed": ({"prompt": "p", "chosen": "a", "rejected": [GREEN]}, "chosen is a string and rejected is a list"),
    "no prompt": ({"chosen": [BLUE], "rejected": [GREEN]}, "do not begin with the same message"),
    "another prompt": ({"prompt": "why?", "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]}, "prompt is a string"),
    "none chosen": ({"prompt": "p", "rejected": "b"}, "no key 'chosen'"),
    "the same tokens": ({"prompt": "p", "chosen": "a", "rejected": "a<|im_end|>"}, "have the same tokens"),
    "weighted": ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0.5}, "weight is 0.5"),
    "a weighted answer": (
        {"prompt": [ASKED], "chosen": [{**BLUE, "weight": 0}], "rejected": [GREEN]},
        r"chosen\[0\] asks not",
    ),
    "no answer": (
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [ASKED]},
        "rejected has no message of the assistant",
    ),
    "the prompt again": (
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [ASKED, GREEN]},
        "rejected after the prompt begins with the role user, and every token of an answer counts",
    ),
    "two prompts": (
        {
            "chosen": [{"role": "system", "content": "s"}, ASKED, BLUE],
            "rejected": [{"role": "system", "content": "s"}, {"role": "user", "content": "grass?"}, GREEN],
        },
        "chosen after the prompt begins with the role user.*begin both answers with the same question",
    ),
    "another question behind": (
        {"prompt": [ASKED], "chosen": [BLUE, ASKED], "rejected": [GREEN]},
        "chosen ends with the role user, and every token of an answer counts; remove it",
    ),
    "weights of answers": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_weight": 2},
        "chosen_weight is 2, and all rows count",
    ),
    "the same but for a name": (
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [{**BLUE, "name": "n"}]},
        "the same tokens",
    ),
    "asked elsewhere": (
        {"question": "why?", "chosen": "a", "rejected": "b"},
        r"question is not read.*\{question:prompt\}",
    ),
    "asked twice": ({"prompt": "p", "chosen": "a", "rejected": "b", "messages": [ASKED]}, "messages is not read"),
    "system": ({"prompt": "p", "chosen": "a", "rejected": "b", "system_prompt": "s"}, "has no place for system_prompt"),
    "printed": ({"prompt": str([ASKED]), "chosen": "a", "rejected": "b"}, "prompt is a string of messages as Python"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    row, reason = BAD[name]
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_rows(tmp_path / "rows.jsonl", [good, row])
    model = make_tokenizer(tmp_path / "model")
    with pytest.raises(UsageError, match=rf"1 of 2 rows cannot be trained on\n.*jsonl:2: .*{reason}"):
        load(path, model, format=DataFormat.preference)


def test_cells_of_tables_are_read_as_what_they_hold() -> None:
    """In CSV all cells are strings: labels, and lists of messages in JSON."""
    for label in ("true", "True", "1", "1.0", 1, True):
        assert parse_sample({"prompt": "p", "completion": "a", "label": label}, DataFormat.feedback).is_good is True
    assert parse_sample({"prompt": "p", "completion": "a", "label": "0"}, DataFormat.feedback).is_good is False
    for row, format in ((PAIRS["messages"][1], DataFormat.preference), (FEEDBACK["messages"][1], DataFormat.feedback)):
        cells = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        assert parse_sample(cells, format) == parse_sample(row, format)
    text = {"prompt": "Write a chat.", "completion": json.dumps([ASKED])}
    assert parse_sample(text, DataFormat.prompt_completion) == PromptCompletion(**text)


def test_marks_survive_selection(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "c" * n, "rejected": "r"} for n in (2, 5, 9)]
    data = load(
        write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer(tmp_path / "model"), format=DataFormat.preference
    )
    assert [len(each.input_ids) for each in data.select(np.array([2, 0])).sequences(0)] == [11, 3]


def test_labels_and_truncated_answers_tell_samples_apart(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model")
    feedback = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, True)]
    data = load(write_rows(tmp_path / "feedback.jsonl", feedback), model, format=DataFormat.feedback)
    assert [row.line for row, _ in without_duplicates(data).duplicates] == [3]
    pairs = [{"prompt": "p", "chosen": "c" * 30, "rejected": each + "x" * 20} for each in ("a", "b", "a", "aax")]
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    cut = load(path, model, format=DataFormat.preference, max_length=9, overlong=Overlong.truncate)
    assert [row.line for row, _ in without_duplicates(cut).duplicates] == [3]


def test_a_prompt_whose_tokens_change_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tokenizer(tmp_path / "model")
    rows = [{"prompt": "p ", "chosen": each, "rejected": "r"} for each in ("Hm", "hm")]
    load(write_rows(tmp_path / "rows.jsonl", rows), model, format=DataFormat.preference)
    assert "from there on, everything counts as the answer, and" in (said := capsys.readouterr().err)
    assert "(1 row, first" in said
