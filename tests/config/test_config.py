"""Configuration: composition, the one gate, and what a user reads when a key is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkflow_cli.config.keys import GONE, describe_keys, known_keys
from chunkflow_cli.config.load import compose, load, read_overrides
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.config.schema import Config, Dtype, OptimizerName
from chunkflow_cli.errors import UsageError

RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe: str) -> None:
    """A recipe with a key that was renamed would fail only for the user who tries it."""
    loaded = load([f"recipe={recipe}"])
    assert loaded.recipe == recipe
    assert loaded.config.model.path
    assert loaded.config.hardware or recipe == "tiny_random"


def test_the_promised_recipes_exist() -> None:
    promised = {"smollm2_stdlib", "tiny_random", "qwen7b", "qwen7b_256k", "qwen0_5b", "qwen14b", "qwen32b", "qwen72b"}
    assert promised | {"llama8b"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_why_and_is_listed(recipe: str) -> None:
    """A value without a reason cannot be changed by anyone who did not choose it."""
    text = (shipped_folder("recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"`{recipe}`" in (shipped_folder("recipes") / "README.md").read_text(encoding="utf-8")


def test_defaults_are_those_of_the_dataclasses() -> None:
    """conf/ and config.py would otherwise tell two stories."""
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


def test_deepspeed_section_is_open() -> None:
    """Any key of DeepSpeed's own configuration may be given, known to us or not."""
    config = load(["engine.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"]).config
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}
    assert load(["+engine.deepspeed.foo=1"]).config.engine.deepspeed == {"foo": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["chunk.sise=4"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["+chunk.sise=4"], ["'chunk.sise'", "did you mean chunk.size?"]),
        (["chunk.size=abc"], ["chunk.size=abc", "Integer"]),
        (["chunk.size=0"], ["chunk.size=0", "at least 1"]),
        (["model.dtype=bf16"], ["model.dtype=bf16", "bfloat16, float32, float64"]),
        (["recipe=qwn7b"], ["'qwn7b'", "did you mean recipe=qwen7b?"]),
        (["recipe=nowhere/x.yaml"], ["nowhere/x.yaml", "no such file"]),
        (["chunk.size=4,8"], ["chunk.size=4,8", "--multirun"]),
        (["optim=adamx"], ["optim/adamx", "sgd"]),
        (["~chunk.size"], ["chunk.size", "cannot be removed"]),
        (["engine.zero_stage=4"], ["engine.zero_stage=4", "0, 1, 2 or 3"]),
        (["plan.cost_model=measured", "tune.device=h100"], ["plan.cost_model=measured with tune.device=h100"]),
        (["data.eval_fraction=1.5"], ["data.eval_fraction=1.5", "below 1"]),
        (["data.eval_fraction=0.1", "data.eval_path=x"], ["data.eval_path", "data.eval_fraction"]),
        (["model.dtype=float64", "model.attention=flash_attn"], ["flash_attn", "float64", "reference"]),
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


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """A typing error in a file is as silent as one on the command line if it only adds a key."""
    path = tmp_path / "typo.yaml"
    path.write_text("train: {global_batchsize: 3}\n")
    with pytest.raises(UsageError, match=r"train\.global_batchsize"):
        load([f"recipe={path}"])


@pytest.mark.parametrize("sign", ["", "+", "++", "~", "a section", "a recipe", "a recipe of a folder", "--overrides"])
@pytest.mark.parametrize("name", GONE)
def test_a_key_of_an_earlier_version_is_refused_by_name(name: str, sign: str, tmp_path: Path) -> None:
    """A script or recipe that used it reads what became of the key, not that it mistyped another one."""
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
        "--overrides": read_overrides(str(path)),
    }
    if sign == "~" and "=" in name:
        words["~"] = [f"~{name}"]
    with pytest.raises(UsageError) as caught:
        load(words.get(sign, [f"{sign}{key}={value}"]), str(tmp_path))
    assert str(caught.value) == f"{name} is gone: {GONE[name]}"
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


def test_keys_of_the_contract_that_this_version_builds() -> None:
    """Users' scripts rely on these names."""
    promised = """
        model.path model.init model.dtype model.attention model.activation_checkpointing model.trust_remote_code
        model.lora.enabled model.lora.r model.lora.alpha model.lora.dropout model.lora.target_modules
        data.path data.format data.train_on data.max_length data.overlong data.bad_rows data.eval_path data.eval_fraction
        data.cache_dir data.num_workers chunk.size chunk.k chunk.fill_tails optim.name optim.lr optim.weight_decay
        optim.betas optim.momentum optim.schedule optim.warmup_ratio optim.grad_clip train.steps train.epochs
        train.global_batch_size train.shuffle train.seed train.loss_weighting train.output_dir train.guard eval.every
        checkpoint.every checkpoint.keep checkpoint.resume log.every log.backends engine.zero_stage engine.offload
        engine.deepspeed
    """.split()
    assert set(promised) <= set(known_keys())


def test_every_key_is_described_below_its_field() -> None:
    """Help and completion show these lines; a key without one is a key that nobody can look up."""
    described = describe_keys()
    assert list(described) == known_keys()
    assert [key.name for key in described.values() if not key.help] == []
    assert described["chunk.size"].default == "8192"
    assert described["model.dtype"].choices == ("bfloat16", "float32", "float64")
    assert described["log.backends"].default == "[jsonl]"
    assert described["log.backends"].is_list


def test_defaults_as_written_compose_to_the_defaults() -> None:
    """Completion offers them, so they must be overrides that Hydra reads."""
    words = [f"{key.name}={key.default}" for key in describe_keys().values() if key.default]
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
    """conf/, recipes/ and the tiny model must be in the wheel, or an installed package composes nothing."""
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
