"""Words of the command line and YAML files of keys: what a person types is what a key gets."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkflow_cli.cli.train import combinations, run_sweep, without_idle_words
from chunkflow_cli.config import key_files
from chunkflow_cli.config.checks import check
from chunkflow_cli.config.foreign import FOREIGN
from chunkflow_cli.config.keys import describe_keys, known_keys, unknown_key, walk_keys
from chunkflow_cli.config.load import load
from chunkflow_cli.config.overrides import check_words, parse_override
from chunkflow_cli.config.schema import Config
from chunkflow_cli.config.texts import quoted, unquoted
from chunkflow_cli.config.words import as_word, is_override, read_words
from chunkflow_cli.errors import UsageError

NO_PATHS = {
    "hardware", "data.split", "data.subset", "data.eval_split", "log.project", "log.run_name", "preference.loss",
}  # fmt: skip
"""Keys that hold a text which is no path. Any other must be declared with `a_path`, so that ~ is expanded in it."""
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), st.sampled_from("'\"\\[]{}(),=:$~ \n\t")
    ),
    max_size=12,
)
LIKE_NUMBERS = [
    "1.10",
    "1_000",
    "1e-5",
    "007",
    "2024-01-02",
    "true",
    "Null",
    "0x10",
    "12:30:00",
    "yes",
    ".5",
    "-1",
    "inf",
]


def error_of(*words: str, config_dir: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load(list(words), config_dir)
    return str(caught.value)


# Texts


def arrived(typed: str) -> str:
    """Return what a word sets its key to, as Hydra's parser reads it, before homes and interpolations are resolved."""
    (word,), problems = read_words([typed])
    problems += check_words([word])
    if problems:
        raise UsageError(problems[0])
    return str(parse_override(word).value())


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example("it's")
@example("'q")
@example("a\\")
@example(" a ")
@example("x\ny")
@example("${")
@example("a\\${b")
@example("???")
@example("null")
@example("[a]")
@example("größe/日本")
def test_any_text_arrives_unchanged_or_the_error_shows_how_to_write_it(text: str) -> None:
    """Quotes around the whole text and `${...}` keep their meaning; everything else is the text that was typed."""
    for key in ("train.output_dir", "model.path"):
        try:
            value = arrived(f"{key}={text}")
        except UsageError as error:
            (shown,) = re.findall(rf"write (\S*{re.escape(key)}=.*)\Z", str(error), re.DOTALL)
            value = arrived(*shlex.split(shown)).replace("\\${", "${")
            assert value in (unquoted(text).replace("\\${", "${"), f"./{text}")
        else:
            assert value == unquoted(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from("'\""))
def test_hydra_reads_a_quoted_text_as_it_was(text: str, quote: str) -> None:
    """Hydra's own parser is the truth."""
    words, _ = read_words([f"data.eval_path={quoted(text, quote)}"])
    assert parse_override(words[0]).value() == text
    assert unquoted(quoted(text, quote)) == text


@pytest.mark.parametrize("text", LIKE_NUMBERS)
def test_what_looks_like_a_number_stays_text(text: str, tmp_path: Path) -> None:
    """On the command line, within a section, in a recipe (with quotes or without) and in a file of overrides."""
    ways = [[f"train.output_dir={text}"], [f"train={{output_dir: {text}}}"]]
    for number, written in enumerate((f'"{text}"', text)):
        if written.lower() == "null":
            continue  # without quotes, YAML's null is no value
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"train:\n  output_dir: {written}\n")
        ways += [[str(path)], [f"overrides={path}"]]
    for words in ways:
        assert load(words).config.train.output_dir == text, words


def test_null_is_no_value_where_the_key_allows_it(tmp_path: Path) -> None:
    config = load(["data.eval_path=null", "data.cache_dir=NULL", "train.output_dir=null", "model.path=null"]).config
    assert (config.data.eval_path, config.data.cache_dir) == (None, None)
    assert (config.train.output_dir, config.model.path) == ("null", "null")
    (tmp_path / "r.yaml").write_text("train: {output_dir: null}\nmodel: {path: }\n")
    config = load([str(tmp_path / "r.yaml")]).config
    assert (config.train.output_dir, config.model.path) == (None, "")


def test_lists_interpolations_and_quotes_keep_their_meaning() -> None:
    words = [
        "model.lora.enabled=true",
        "model.lora.target_modules=[.*\\.q_proj, 'a,b', 1.10]",
        'model.path="a \\"b\\""',
        "data.path=${model.path}/x y",
    ]
    config = load(words).config
    assert config.model.lora.target_modules == [".*\\.q_proj", "a,b", "1.10"]
    assert config.model.path == 'a "b"'
    assert config.data.path == 'a "b"/x y'


@pytest.mark.parametrize(("value", "expected"), [("1e6", 1_000_000), ("4096.0", 4096), ("1_000", 1000), ("+5", 5)])
def test_whole_numbers_in_any_notation(value: str, expected: int, tmp_path: Path) -> None:
    assert load([f"data.max_length={value}"]).config.data.max_length == expected
    (tmp_path / "r.yaml").write_text(f"data: {{max_length: {value}}}\n")
    assert load([str(tmp_path / "r.yaml")]).config.data.max_length == expected
    assert "must be an integer" in error_of("data.max_length=1.5")


def test_a_word_as_text_can_be_read_back() -> None:
    for text in ("plain", "'q'", "null", "a,b", "[a]", '"', "1.10"):
        assert load([as_word("data.cache_dir", text)]).config.data.cache_dir == text


def test_commas_are_several_runs_only_in_a_sweep(tmp_path: Path) -> None:
    runs = combinations(["data.path=a b.jsonl, c(1).jsonl", 'train.output_dir="x,y"', "chunk.size=64,128"])
    assert [run[0] for run in runs[::2]] == ["data.path=a b.jsonl", "data.path=c(1).jsonl"]
    assert {run[1] for run in runs} == {'train.output_dir="x,y"'}
    assert [run[2] for run in runs[:2]] == ["chunk.size=64", "chunk.size=128"]
    assert combinations(["recipe=a,b", "chunk.k=range(1,3)"])[-1] == ["recipe=b", "chunk.k=2"]
    assert combinations(["eval.prompts=[a,b],[c]"]) == [["eval.prompts=[a,b]"], ["eval.prompts=[c]"]]
    with pytest.raises(UsageError, match=r"eval.prompts=\[a\],\[b\] must be a list in brackets"):
        load(["eval.prompts=[a],[b]"])
    with pytest.raises(UsageError, match=r"train.output_dir=a,b: .* in one directory"):
        run_sweep(["recipe=tiny_random", "train.output_dir=a,b"], config_dir=None, json_output=True)
    assert load([f"train.output_dir={tmp_path}/a,b"]).config.train.output_dir == f"{tmp_path}/a,b"


@pytest.mark.parametrize(("typed", "runs", "left_out"), [
    (["optim=adamw,sgd", "optim.momentum=0.9"], [["optim=adamw"], ["optim=sgd", "optim.momentum=0.9"]],
     ["optim.momentum=0.9"]),
    (["optim.schedule=constant,linear", "optim.min_lr_ratio=0.1,0.2"],  # three different runs, not four
     [["optim.schedule=constant"], ["optim.schedule=linear", "optim.min_lr_ratio=0.1"],
      ["optim.schedule=linear", "optim.min_lr_ratio=0.2"]], ["optim.min_lr_ratio=0.1", "optim.min_lr_ratio=0.2"]),
    (["model.lora.enabled=true,false", "model.lora={r: 4, alpha: 8}"],
     [["model.lora.enabled=True", "model.lora.r=4", "model.lora.alpha=8"], ["model.lora.enabled=False"]],
     ["model.lora.alpha=8", "model.lora.r=4"]),
])  # fmt: skip
def test_a_sweep_leaves_a_key_out_of_runs_in_which_it_has_no_effect(
    typed: list[str], runs: list[list[str]], left_out: list[str]
) -> None:
    assert without_idle_words(combinations(typed)) == (runs, left_out)
    for words in runs:
        load(words)


def test_a_key_without_effect_in_any_run_of_a_sweep_is_refused() -> None:
    with pytest.raises(UsageError, match=r"optim.momentum=0.9 has no effect with optim.name=adamw"):
        run_sweep(["recipe=tiny_random", "train.seed=1,2", "optim.momentum=0.9"], config_dir=None, json_output=True)


def test_two_files_with_a_comma(tmp_path: Path) -> None:
    assert "for several files" in error_of("data.path=a.jsonl,b.jsonl")
    (tmp_path / "a,b.jsonl").touch()
    assert load([f"data.path={tmp_path}/a,b.jsonl"]).config.data.path.endswith("a,b.jsonl")


# Home folders


def test_every_text_is_a_path_or_known_to_be_none() -> None:
    """A new path key without `a_path` would be the one in which ~ is not expanded."""
    texts = {key.name for key in describe_keys().values() if (key.is_text or key.is_path) and not key.choices}
    assert {name for name in texts if not describe_keys()[name].is_path} - NO_PATHS == set()


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [key.name for key in describe_keys().values() if key.is_path and key.name.count(".") == 1]
    lines = {section: ", ".join(f"{name.partition('.')[2]}: ~/x" for name in names)
             for section, names in itertools.groupby(paths, lambda name: name.partition(".")[0])}  # fmt: skip
    (tmp_path / "r.yaml").write_text("".join(f"{section}: {{{keys}}}\n" for section, keys in lines.items()))
    (tmp_path / "recipes").mkdir()
    for words in ([f"{name}=~/x" for name in paths], ["recipe=~/r.yaml"], ["overrides=~/r.yaml"]):
        config = load(words, "~")
        values = {name: getattr(section, entry.name) for name, section, entry in walk_keys(config.config)}
        assert {values[name] for name in paths} == {f"{tmp_path}/x"}, words
        assert "~" not in str(config.tree)


def test_home_of_others_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(["data.path=~root/x"]).config.data.path == os.path.expanduser("~root/x")
    assert "write data.path=./~nobody-here/x" in error_of("data.path=~nobody-here/x")
    monkeypatch.setenv("HOME", "")
    assert error_of("data.cache_dir=~/x").startswith("data.cache_dir=~/x: there is no home folder, because HOME is not")


# Words that set nothing, and wrong keys


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tiny_random", "did you mean recipe=tiny_random?"),
        ("chats.jsonl", "did you mean data.path=chats.jsonl?"),
        ("~/my chats.jsonl", "did you mean 'data.path=~/my chats.jsonl'?"),
        ("chunk.size", "such as chunk.size=VALUE"),
        ("=", "without spaces around the ="),
        ("learning_rate", "did you mean optim.lr?"),
        ("nowhere.yaml", "recipe=nowhere.yaml: there is no such file"),
        ("optim.lr=1e-4,", "optim.lr=1e-4, must be a number"),
        ("engine.deepspeed={a", "engine.deepspeed={a must be a mapping such as {key: value}"),
        ("model.lora.target_modules=q_proj", "write 'model.lora.target_modules=[q_proj]'"),
        ("+model.scaling=yarn", "there is no configuration key 'model.scaling'"),
    ],
)
def test_a_word_that_sets_nothing_leads_to_one_that_does(word: str, expected: str) -> None:
    error = error_of(word)
    assert expected in error
    assert "mismatched" not in error
    assert "viable" not in error


def test_a_yaml_file_alone_is_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "lr=3 mine.yaml"
    path.write_text("chunk: {size: 77}\n")
    for word in (str(path), f"recipe={path}", f"recipe='{path}'"):
        loaded = load([word, "chunk.k=2"])
        assert (loaded.config.chunk.size, loaded.config.chunk.k, loaded.recipe) == (77, 2, "lr_3_mine")
    assert is_override(str(path))
    assert not is_override("~/chats.jsonl")
    assert "second of its kind" in error_of(str(path), "recipe=tiny_random")


def test_all_wrong_words_are_named_at_once() -> None:
    error = error_of("learning_rate=1", "num_epochs=3", "chunk.sise=4", "chunk.size=8", "x.jsonl")
    for part in ("4 things are wrong", "optim.lr?", "train.epochs?", "chunk.size?", "data.path=x.jsonl?"):
        assert part in error
    assert len(error.splitlines()) == 5


def test_names_of_other_tools_lead_to_keys_that_exist() -> None:
    for name, meant in FOREIGN.items():
        assert name not in known_keys()
        if " " not in meant:
            assert meant in known_keys(), name
        for key in re.findall(r"\b[a-z]+\.[a-z_.]*[a-z]", meant):
            assert key in known_keys(), (name, key)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optim.lr"), ("train.lr", "optim.lr"), ("optim.learning_rate", "optim.lr"), ("seed", "train.seed"),
        ("base_model", "model.path"), ("model-name-or-path", "model.path"), ("micro_batch_size", "train.global_batch_size"),
        ("cutoff_len", "data.max_length"), ("trainer.max_epochs", "train.epochs"), ("steps", "train.steps"),
        ("modell.path", "model.path"), ("wandb_project", "log.project"), ("sample_packing", "not needed"), ("bf16", "bfloat16"),
    ],
)  # fmt: skip
def test_a_wrong_key_leads_to_the_right_one(name: str, meant: str) -> None:
    assert meant in unknown_key(name).partition("\n")[2]


# Files of keys


def test_wrong_keys_of_a_recipe_have_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "axolotl.yaml"
    path.write_text("base_model: x\ndatasets:\n  - path: a\ntraining:\n  lr: 3\nchunk: 5\nmodel: {dtype: bfloat16}\n")
    assert error_of(str(path)).splitlines() == [
        "4 things are wrong:",
        f"  recipe {path}, line 1: there is no configuration key 'base_model'; did you mean model.path?",
        f"  recipe {path}, line 2: there is no configuration key 'datasets'; did you mean data.sources?",
        f"  recipe {path}, line 5: there is no configuration key 'training.lr'; did you mean optim.lr?",
        f"  recipe {path}, line 6: chunk=5: chunk is a section of keys; set one of its keys, such as chunk.size",
    ]
    path.write_text("model:\n  dtype: bf16\n")
    assert error_of(str(path)).startswith(f"recipe {path}, line 2: model.dtype=bf16 must be one of")
    path.write_text("chunk.size: 4\n")
    assert "chunk: {size: VALUE}" in error_of(str(path))


def test_a_file_of_overrides_wins_over_the_recipe_and_words_win_over_it(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text('chunk: {size: 33, k: 3}\ndata: {path: "a, b=c: d"}\n')
    loaded = load(["chunk.k=5", f"overrides={path}", "recipe=tiny_random"])
    assert (loaded.config.chunk.size, loaded.config.chunk.k, loaded.config.data.path) == (33, 5, "a, b=c: d")
    assert loaded.config.train.global_batch_size == 16
    assert loaded.recipe == "tiny_random"
    path.write_text("chunk: {sise: 3}\n")
    assert error_of(f"overrides={path}").startswith(f"--overrides={path}, line 1: there is no configuration key")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB.encode(), "stands for more than 10,000 values"),
        (b"a: &a [*a]\n", "stands for more than 10,000 values"),
        (b"a: " + b"[" * 5000, "is not valid YAML"),
        (b"a" * 70_000, "has more than 64 KiB"),
        (b"\x93\xff\x00", "is not valid YAML: it is not a text in UTF-8"),
        (b"- a\n", "holds no keys"),
        (b"", "holds no keys"),
        (b"hardware: !!python/object/apply:os.system ['true']\n", "is not valid YAML: could not determine a constructor"),
        (b"chunk: {size: 1, size: 2}\n", "found duplicate key size in line 1"),
        (b"train: {output_dir: \"a\\0b\"}\n", "zero byte"),
    ],
)  # fmt: skip
def test_hostile_recipes_are_refused_in_no_time(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    start = time.process_time()
    assert expected in error_of(str(path))
    assert time.process_time() - start < 5
    assert key_files.MOST_VALUES == 10_000


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe without a writer never ends, nor does reading /dev/zero."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.yaml", tmp_path / "folder.yaml", tmp_path / "zero.yaml"):
        assert error_of(f"recipe={path}") == f"recipe {path} is not a file\n  name a YAML file of keys"
        assert error_of(f"overrides={path}") == f"--overrides={path} is not a file\n  name a YAML file of keys"


def test_a_folder_of_configurations_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a, b=c [1]"
    (folder / "optim").mkdir(parents=True)
    (folder / "recipes").mkdir()
    (folder / "optim" / "careful.yaml").write_text("lr: 1.0e-7\n")
    (folder / "recipes" / "torn.yaml").write_text("chunk: {size: 4")  # is not read unless it is asked for
    assert load(["optim=careful"], str(folder)).config.optim.lr == 1e-7
    assert "torn.yaml is not valid YAML" in error_of("recipe=torn", config_dir=str(folder))


# Values


def test_every_number_has_bounds_and_is_finite() -> None:
    """2**70 and nan are refused by name, whatever the key."""
    for name, section, entry in walk_keys(config := Config()):
        value, kinds = getattr(section, entry.name), describe_keys()[name].kinds
        if not {int, float, list[int], list[float]} & set(kinds):
            continue
        assert {"at_least", "above"} & set(entry.metadata), name
        is_whole = bool({int, list[int]} & set(kinds))
        assert not is_whole or {"at_most", "below"} & set(entry.metadata), name
        for wrong in (2**70,) if is_whole else (math.nan, math.inf, -math.inf, -1.0):
            setattr(section, entry.name, [wrong] if isinstance(value, list) else wrong)
            with pytest.raises(UsageError, match=rf"^{name}="):
                check(config)
        setattr(section, entry.name, value)
    check(config)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("{optimizer: {type: Lamb}}", "engine.deepspeed.optimizer is set by chunkflow\n  set optim.name"),
        ("{gradient_accumulation_steps: 4}", "set train.global_batch_size"),
        ("{zero_optimization: {stage: 2}}", "set engine.zero_stage"),
        ("{fp16: {enabled: true}}", "set model.dtype"),
        ("{nonsense: 1}", "engine.deepspeed.nonsense is not a key that chunkflow passes to DeepSpeed"),
        ("{zero_optimisation: {overlap_comm: true}}", "did you mean engine.deepspeed.zero_optimization?"),
        ("{zero_optimization: {reduce_buckt_size: 4}}", "did you mean engine.deepspeed.zero_optimization.reduce_bucket_size?"),
        ("{zero_optimization: {reduce_bucket_size: lots}}", "must be an integer of at least 0"),
        ("{zero_optimization: {offload_param: {pin_memory: true}}}", "no effect with engine.offload=none"),
        ("{zero_optimization: 3}", "must be a mapping"),
    ],
)  # fmt: skip
def test_keys_of_deepspeed_without_effect_are_refused(given_: str, expected: str) -> None:
    assert expected in error_of(f"engine.deepspeed={given_}")


def test_all_missing_keys_are_named_with_an_example() -> None:
    with pytest.raises(UsageError) as caught:
        load([], require=("model.path", "data.path"))
    assert str(caught.value).splitlines() == [
        "model.path and data.path are not set",
        "  add, for example: model.path=Qwen/Qwen2.5-0.5B-Instruct data.path=chats.jsonl",
        "  or try it with a recipe that needs nothing: recipe=tiny_random",
    ]
