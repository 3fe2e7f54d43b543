"""Configuration: how it is composed and checked, and the errors that name a wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkflow_cli.config.keys import GONE, describe_keys, known_keys, walk_keys
from chunkflow_cli.config.load import compose, load
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.config.schema import Config, Dtype, OptimizerName, TrainOn
from chunkflow_cli.errors import UsageError

RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe: str) -> None:
    """If a key is renamed, a recipe that still has the old name fails here."""
    loaded = load([f"recipe={recipe}"])
    assert loaded.recipe == recipe
    assert loaded.config.model.path
    assert loaded.config.hardware or recipe == "tiny_random"


def test_the_promised_recipes_exist() -> None:
    promised = {"smollm2_stdlib", "tiny_random", "qwen7b", "qwen7b_256k", "qwen0_5b", "qwen14b", "qwen32b", "qwen72b"}
    assert promised | {"llama8b"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_begins_with_a_comment_and_is_listed(recipe: str) -> None:
    """A comment at the top says why the values are what they are, so that others can change them."""
    text = (shipped_folder("recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"`{recipe}`" in (shipped_folder("recipes") / "README.md").read_text(encoding="utf-8")


def test_defaults_are_those_of_the_dataclasses() -> None:
    """The files in conf/ and schema.py agree."""
    assert load([]).config == Config()


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    config = load(["recipe=tiny_random", "chunk.size=64"]).config
    assert config.chunk.size == 64
    assert config.model.dtype is Dtype.float32
    assert config.train.global_batch_size == 16


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my run-1.yaml"
    path.write_text("chunk: {size: 77}\noptim: {name: sgd}\n")
    loaded = load([f"recipe={path}", "chunk.k=3"])
    assert (loaded.config.chunk.size, loaded.config.chunk.k) == (77, 3)
    assert loaded.config.optim.name is OptimizerName.sgd
    assert loaded.recipe == "my_run-1"


def test_config_dir_adds_recipes_and_groups(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("chunk: {size: 99}\n")
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "careful.yaml").write_text("lr: 1.0e-7\n")
    config = load(["recipe=mine", "optim=careful"], str(tmp_path)).config
    assert config.chunk.size == 99
    assert config.optim.lr == 1e-7


def test_optimizer_group_changes_its_defaults() -> None:
    config = load(["optim=sgd"]).config
    assert config.optim.name is OptimizerName.sgd
    assert config.optim.lr == 1e-2


def test_the_learning_rate_follows_what_is_trained() -> None:
    """Adapters hardly move at the rate of a full fine-tune, which a recipe for one must not set for them."""
    rates = {
        (): 1e-5, ("model.lora.enabled=true",): 2e-4, ("recipe=qwen7b",): 1e-5,
        ("recipe=qwen7b", "model.lora.enabled=true"): 2e-4, ("optim=sgd", "model.lora.enabled=true"): 1e-2,
        ("model.lora.enabled=true", "optim.lr=3e-5"): 3e-5,
    }  # fmt: skip
    assert {words: load(words).config.optim.lr for words in rates} == rates


def test_paths_and_columns(tmp_path: Path) -> None:
    """Lists of paths and names of columns, on the command line and in a recipe."""
    loaded = load(["data.path=[a.jsonl,b.jsonl]", "data.columns={question:prompt,answer:completion}"]).config.data
    assert (loaded.path, loaded.columns) == (["a.jsonl", "b.jsonl"], {"question": "prompt", "answer": "completion"})
    assert load(["data.columns.question=prompt", "data.path=a.jsonl"]).config.data.columns == {"question": "prompt"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {path: [a.jsonl, b.jsonl], columns: {question: prompt}, eval_path: c.jsonl}\n")
    from_file = load([f"recipe={recipe}", "data.columns={answer: completion}"]).config.data
    assert (from_file.path, from_file.eval_path) == (["a.jsonl", "b.jsonl"], "c.jsonl")
    assert from_file.columns == {"question": "prompt", "answer": "completion"}
    assert load([f"recipe={recipe}", "data.path=d.jsonl"]).config.data.path == "d.jsonl"


def test_deepspeed_section_is_open() -> None:
    """engine.deepspeed takes keys of DeepSpeed's own configuration."""
    config = load(["engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"]).config
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}
    assert load(["+engine.deepspeed.dump_state=true"]).config.engine.deepspeed == {"dump_state": True}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["chunk.sise=4"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["+chunk.sise=4"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["trian.steps=3"], ["'trian.steps'", "did you mean train.steps?"]),
        (["~chunk.sise"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["+foo.bar=1"], ["'foo.bar'"]),
        (["chunk.size=abc"], ["chunk.size=abc", "an integer"]),
        (["chunk.size=null"], ["chunk.size=null", "an integer"]),
        (["data.max_length=x"], ["data.max_length=x", "an integer or null"]),
        (["data.max_length=1"], ["data.max_length=1", "at least 2 or null"]),
        (["optim.lr=fast"], ["optim.lr=fast", "a number"]),
        (["optim.lr=nan"], ["optim.lr=nan", "at least 0"]),
        (["optim.lr=inf"], ["optim.lr=inf", "a finite number and at least 0"]),
        (["optim.eps=-1"], ["optim.eps=-1.0", "above 0"]),
        (["model.lora.alpha=nan"], ["model.lora.alpha=nan", "a finite number and above 0"]),
        (["model.lora.alpha=inf"], ["model.lora.alpha=inf", "a finite number and above 0"]),
        (["model.lora.alpha=-1"], ["model.lora.alpha=-1.0", "above 0"]),
        (["model.lora.r=0"], ["model.lora.r=0", "at least 1"]),
        (["model.lora.path=x"], ["model.lora.path=x", "set model.lora.enabled=true"]),
        (["optim.betas=[0.9,x]"], ["optim.betas[1]=x", "a number"]),
        (["optim.betas=0.9"], ["optim.betas=0.9", "[0.9,0.999]"]),
        (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two numbers"]),
        (["optim.betas=[0.9,1]"], ["optim.betas=[0.9,1.0]", "below 1"]),
        (["train.shuffle=maybe"], ["train.shuffle=maybe", "true, false"]),
        (["engine.deepspeed=5"], ["engine.deepspeed=5", "{key: value}"]),
        (["chunk=big"], ["chunk=big", "a section", "chunk.size"]),
        (["chunk={size:abc}"], ["chunk.size=abc", "an integer"]),
        (["chunk={sise:4}"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["+chunk.size=4"], ["+chunk.size=4", "leave out the +"]),
        (["chunk.size"], ["'chunk.size'", "key=value"]),
        (["chunk.size=0"], ["chunk.size=0", "at least 1"]),
        (["model.dtype=bf16"], ["model.dtype=bf16", "bfloat16, float32, float64"]),
        (["recipe=qwn7b"], ["'qwn7b'", "did you mean recipe=qwen7b?"]),
        (["recipe=nowhere/x.yaml"], ["nowhere/x.yaml", "no such file"]),
        (["recipe=null"], ["'null'", "recipes: gemma4_31b"]),
        (["optim=null"], ["optim=null", "optim=NAME"]),
        (["chunk.size=4,8"], ["chunk.size=4,8", "several values", "--multirun"]),
        (["chunk.size=range(1,3)"], ["chunk.size=range(1,3)", "--multirun"]),
        (["optim=adamx"], ["optim=adamx", "sgd", "did you mean optim=adamw?"]),
        (["optim.lr_factors=[a]"], ["optim.lr_factors=[a]", "{key: value}"]),
        (["optim.lr_factors={a: x}"], ["optim.lr_factors.a=x", "a number"]),
        (["optim.freeze=['']"], ['optim.freeze=[""]', "name a weight"]),
        (["data.sources={path: a}"], ["data.sources={path: a}", "[{path: chats.jsonl}]"]),
        (["data.sources=[{path: a, columns: [b]}]"], ["data.sources[0].columns=[b]", "{key: value}"]),
        (["eval.prompts=[\udcff]"], ["eval.prompts", "is not valid UTF-8"]),
        (["eval.prompts=[a,' ']"], ["eval.prompts=[a, ]", "an empty prompt"]),
        (["optim=sgd", "optim.betas=[0.8,0.9]"], ["optim.betas=[0.8,0.9]", "optim.name=sgd", "set optim=adamw"]),
        (["optim.momentum=0.9"], ["optim.momentum=0.9", "optim.name=adamw", "optim=sgd"]),
        (["model.lora.r=8"], ["model.lora.r=8", "model.lora.enabled=false", "set model.lora.enabled=true"]),
        (["preference.beta=0.5"], ["preference.beta=0.5", "train.task=sft", "set train.task=dpo"]),
        (["train.task=dpo", "preference.gamma=1"], ["preference.gamma=1.0", "preference.loss=sigmoid", "simpo"]),
        (["log.backends=[jsonl,wandb,jsonl]"], ["log.backends=[jsonl,wandb,jsonl] has jsonl twice"]),
        (["log.run_name=x"], ["log.run_name=x", "log.backends=[jsonl]", "add wandb"]),
        (["~chunk.size"], ["~chunk.size", "cannot be removed", "set its value"]),
        (["~chunk"], ["~chunk", "cannot be removed"]),
        (["engine.zero_stage=4"], ["engine.zero_stage=4", "at least 0 and at most 3"]),
        (["cluster.node_gb_per_second=0"], ["cluster.node_gb_per_second=0", "above 0 or null"]),
        (["launch.processes=6", "parallel.pipeline=2", "parallel.sequence=2"], ["processes=6", "sequence=2", "of 4"]),
        (["parallel.spread=all"], ["parallel.spread=all", "set parallel.sequence"]),
        (["plan.cost_model=measured", "tune.device=h100"], ["plan.cost_model=measured with tune.device=h100"]),
        (["data.eval_fraction=1.5"], ["data.eval_fraction=1.5", "below 1"]),
        (["data.eval_fraction=0.1", "data.eval_path=x"], ["data.eval_path", "data.eval_fraction"]),
        (["data.eval_fraction=0.1", "data.eval_split=test"], ["data.eval_split=test", "data.eval_fraction"]),
        (["data.eval_split=train"], ["data.eval_split=train is the split that is trained on"]),
        (["data.columns={a:text,b:text}"], ["gives two columns the name text"]),
        (["data.sources=a.jsonl"], ["data.sources=a.jsonl", "[{path: chats.jsonl}]"]),
        (["data.sources=[a.jsonl]"], ["data.sources[0]=a.jsonl", "{path: chats.jsonl}"]),
        (["data.sources=[{path: a},{path: b, heft: 2}]"], ["'data.sources[1].heft'", "weight, samples"]),
        (["data.sources=[{path: a, weight: big}]"], ["data.sources[0].weight=big", "a number"]),
        (["data.sources=[{path: a, weight: 0}]"], ["data.sources[0].weight=0", "above 0"]),
        (["data.sources=[{path: a, format: message}]"], ["data.sources[0].format=message", "messages?"]),
        (["data.sources=[{path: a, weight: 1},{path: b}]"], ["data.sources: b has no weight"]),
        (["data.sources=[{path: x/a.jsonl},{path: y/a.jsonl}]"], ["2 called a: x/a.jsonl, y/a.jsonl", "its own name"]),
        (["data.sources=[{path: a, name: 1K-4K}]"], ["data.sources[0].name=1K-4K", "1K-4K"]),
        (["data.sources=[{name: a}]"], ["data.sources[0].path is not set"]),
        (["data.sources=[{path: ''}]"], ["data.sources[0].path is not set"]),
        (["data.sources=[{path: [3, 4], columns: {a: text, b: text}}]"], ["data.sources[0].columns", "the name text"]),
        (["data.sources=[{path: a}]", "data.path=b"], ["data.path=b and data.sources are both set"]),
        (["train.global_batch_size=8", "train.global_batch_tokens=9"], ["size=8", "tokens=9", "both set"]),
        (["eval.keep_best=true"], ["eval.keep_best=true needs held-out data", "data.eval_fraction"]),
        (["eval.early_stopping_patience=2", "data.eval_fraction=0.1"], ["patience=2", "eval.every"]),
        (["eval.prompts=[Hi]", "engine.zero_stage=3"], ["eval.prompts", "engine.zero_stage=3", "at most 2"]),
        (["eval.prompts=[Hi]", "parallel.pipeline=2"], ["eval.prompts", "parallel.pipeline=2", "at most 1"]),
        (["train.global_batch_size=null"], ["train.global_batch_size=null", "train.global_batch_tokens"]),
        (["model.dtype=float64", "model.attention=flash_attn"], ["flash_attn", "float64", "reference"]),
        (["model.path=${data.pth}"], ["'data.pth'", "the name of another key"]),
        (["chunk.size=${model.path}"], ["chunk.size", "${model.path}"]),
        (["data.path=${package_file:no_such_package/x}"], ["no-such-package", "pip install"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_errors_name_the_key_the_value_and_the_remedy(words: list[str], expected: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(words)
    for part in expected:
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_sources_in_words_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are as they are typed, and a mistake in a file is found by its line."""
    monkeypatch.setenv("HOME", "/home/me")
    words = (
        "data.sources=[{path: ~/my chats (1).jsonl, name: 007, weight: 2},{path: [a.jsonl,b,c.jsonl], train_on: all}]"
    )
    with pytest.raises(UsageError, match="a has no weight"):
        load([words])
    first, second = load([words.replace(", weight: 2", "")]).config.data.sources
    assert (first.path, first.name, second.path, second.train_on) == (
        "/home/me/my chats (1).jsonl", "007", ["a.jsonl", "b", "c.jsonl"], TrainOn.all
    )  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  sources:\n    - {path: a.jsonl, name: 1.10}\n    - path: b.jsonl\n      weight: much\n")
    with pytest.raises(UsageError, match=r"mine.yaml, line 5: data.sources\[1\].weight=much must be a number"):
        load([str(file)])
    file.write_text(file.read_text().replace("weight: much", "samples: 1e3"))
    assert [(each.name, each.samples) for each in load([str(file)]).config.data.sources] == [
        ("1.10", None),
        ("b", 1000),
    ]
    assert load([str(file), "data.sources=[{path: c}]"]).config.data.sources[0].path == "c"


def test_tokens_of_a_step_replace_its_samples() -> None:
    assert load([]).config.train.global_batch_size == 256
    train = load(["recipe=tiny_random", "train.global_batch_tokens=99", "train.global_batch_size=null"]).config.train
    assert (train.global_batch_size, train.global_batch_tokens) == (None, 99)
    assert load(["train.global_batch_tokens=99"]).config.train.global_batch_size is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("chunk: {size: abc}", "chunk.size=abc must be an integer"),
        ("chunk: {size: null}", "chunk.size=null must be an integer"),
        ("model: {dtype: bf16}", "model.dtype=bf16 must be one of bfloat16, float32, float64"),
        ("tune: {ks: 3}", "tune.ks=3 must be a list"),
        ("chunk: {size: 0}", "chunk.size=0 must be at least 1"),
        ("train: {neftune_noise_alpha: 1e30}", "train.neftune_noise_alpha=1e+30 must be at least 0 and at most 1,000"),
        ("chunk: 5", "line 1: chunk=5: chunk is a section of keys\n  set one of its keys, such as chunk.size"),
        ("chunk: {size: [", "is not valid YAML"),
        ("- a", "holds no keys"),
    ],
)
def test_errors_in_a_recipe_name_the_key_and_the_value(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        load([f"recipe={path}"])
    assert expected in str(caught.value)


def test_a_key_of_a_recipe_without_effect_is_refused_unless_the_command_line_takes_it_away(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  lora:\n    r: 64\n")
    with pytest.raises(UsageError, match=r"mine.yaml, line 3: model.lora.r=64 has no effect"):
        load([f"recipe={path}"])
    path.write_text("model:\n  lora:\n    r: 64\n    enabled: true\n")
    load([f"recipe={path}", "model.lora.enabled=false"])


def test_an_error_in_a_file_of_a_group_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "careful.yaml").write_text("lrr: 3\n")
    with pytest.raises(UsageError, match=r"'optim\.lrr'\n  did you mean optim\.lr\?"):
        load(["optim=careful"], str(tmp_path))


def test_bounds_are_metadata_that_the_checks_know() -> None:
    """A misspelled bound would otherwise fail only when somebody sets the key."""
    marks = {mark for _, _, entry in walk_keys(Config()) for mark in entry.metadata}
    assert marks == {"at_least", "at_most", "above", "below", "path", "null_is_a_name"}


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """A typo in a file must not silently add a key."""
    path = tmp_path / "typo.yaml"
    path.write_text("train: {global_batchsize: 3}\n")
    with pytest.raises(UsageError, match=r"train\.global_batchsize"):
        load([f"recipe={path}"])


@pytest.mark.parametrize("sign", ["", "+", "++", "~", "a section", "a recipe", "a recipe of a folder", "--overrides"])
@pytest.mark.parametrize("name", GONE)
def test_a_key_of_an_earlier_version_is_refused_by_name(name: str, sign: str, tmp_path: Path) -> None:
    """The error says what became of the key, instead of taking it for a typo."""
    key, _, value = name.partition("=")
    value = value or "1"
    section, _, field = key.partition(".")
    path = tmp_path / "recipes" / "old.yaml"
    path.parent.mkdir()
    path.write_text(f"{section}: {{{field}: {value}}}\n")
    words = {
        "a section": [f"{section}={{{field}:{value}}}"],
        "a recipe": [f"recipe={path}"],
        "a recipe of a folder": ["recipe=old"],
        "--overrides": [f"overrides={path}"],
    }
    where = {"--overrides": f"--overrides={path}, line 1: "}
    where |= dict.fromkeys(("a recipe", "a recipe of a folder"), f"recipe {path}, line 1: ")
    if sign == "~" and "=" in name:
        words["~"] = [f"~{name}"]
    with pytest.raises(UsageError) as caught:
        load(words.get(sign, [f"{sign}{key}={value}"]), str(tmp_path))
    assert str(caught.value) == f"{where.get(sign, '')}{name} is gone: {GONE[name]}"
    assert caught.value.exit_code == 2


def test_a_key_that_moved_is_named_with_the_one_it_is_now() -> None:
    with pytest.raises(UsageError, match=r"tune\.pipelines is gone: it is now cluster\.pipelines"):
        load(["tune.pipelines=[1,2]"])
    moved = [sentence.removeprefix("it is now ") for sentence in GONE.values() if sentence.startswith("it is now ")]
    assert len(moved) == 5
    assert set(moved) <= set(known_keys())


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(UsageError, match=r"model\.path is not set"):
        load([], require=["model.path"])


def test_printed_configuration_keeps_interpolations_until_resolved() -> None:
    _, tree = compose(["recipe=tiny_random"])
    from omegaconf import OmegaConf

    assert "${package_file:" in OmegaConf.to_yaml(tree)
    assert "${" not in OmegaConf.to_yaml(tree, resolve=True)


def test_keys_that_scripts_rely_on_exist() -> None:
    """Users' scripts rely on these names."""
    promised = """
        model.path model.init model.dtype model.attention model.activation_checkpointing model.trust_remote_code
        model.lora.enabled model.lora.r model.lora.alpha model.lora.dropout model.lora.target_modules
        data.path data.format data.train_on data.max_length data.overlong data.bad_rows data.eval_path data.eval_fraction
        data.chat_template data.template_arguments
        data.cache_dir data.num_workers chunk.size chunk.k chunk.fill_tails optim.name optim.lr optim.weight_decay
        optim.betas optim.momentum optim.schedule optim.warmup_ratio optim.grad_clip train.steps train.epochs
        train.global_batch_size train.shuffle train.seed train.loss_weighting train.output_dir train.guard eval.every
        checkpoint.every checkpoint.keep checkpoint.resume log.every log.backends engine.zero_stage engine.offload
        engine.deepspeed
    """.split()
    assert set(promised) <= set(known_keys())


def test_every_key_is_described_below_its_field() -> None:
    """Help, completion and documentation show these texts."""
    described = describe_keys()
    assert list(described) == known_keys()
    assert [key.name for key in described.values() if not key.help] == []
    assert described["chunk.size"].default == "8192"
    assert described["model.dtype"].choices == ("bfloat16", "float32", "float64")
    assert described["log.backends"].default == "[jsonl]"
    assert described["log.backends"].is_list


def test_defaults_as_written_compose_to_the_defaults() -> None:
    """Completion offers the defaults, so Hydra must be able to read them."""
    described = [key for key in describe_keys().values() if key.default and not key.null_is_a_name]
    words = [f"{key.name}={key.default}" for key in described]
    assert load(words).config == Config()


def test_a_recipe_of_the_config_dir_hides_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "qwen7b.yaml").write_text("chunk: {size: 99}\n")
    assert recipe_files(str(tmp_path))["qwen7b"].parent == tmp_path / "recipes"
    assert load(["recipe=qwen7b"], str(tmp_path)).config.chunk.size == 99
    with pytest.raises(UsageError, match="is not a folder"):
        recipe_files(str(tmp_path / "nowhere"))


@pytest.mark.processes
def test_wheel_ships_what_the_editable_install_finds(tmp_path: Path) -> None:
    """An installed package needs conf/, recipes/ and the tiny model."""
    import subprocess
    import sys
    import zipfile

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            REPOSITORY,
        ],
        check=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "chunkflow_cli/conf/config.yaml" in names
    assert {f"chunkflow_cli/recipes/{recipe}.yaml" for recipe in RECIPES} <= set(names)
    assert "chunkflow_cli/assets/tiny_random/samples.jsonl" in names
