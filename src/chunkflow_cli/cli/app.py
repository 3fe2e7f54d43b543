"""The command line: compose the configuration, then call `<command>.run`. Heavy imports stay inside the functions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from chunkflow_cli import __version__
from chunkflow_cli.cli.key_help import CommandWithKeys
from chunkflow_cli.errors import describe, exit_code_of, is_unexpected

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_override(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from chunkflow_cli.cli.completion import complete_override

    return complete_override(ctx, incomplete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDES",
        help="recipe=NAME, group.key=value, +key=value, ~key",
        show_default=False,
        autocompletion=_complete_override,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Cfg = Annotated[
    str | None,
    typer.Option("--cfg", metavar="job", help="Print the composed configuration and stop.", show_default=False),
]
Resolve = Annotated[bool, typer.Option("--resolve", help="With --cfg: resolve interpolations.")]
ConfigDir = Annotated[
    str | None,
    typer.Option(
        "--config-dir", metavar="DIR", help="Find recipes in DIR/recipes and groups in DIR first.", show_default=False
    ),
]
Plot = Annotated[
    str | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg or .pdf.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Exact chunked fine-tuning of language models on long-tailed data.

    Short samples are packed, long ones split, into chunks of one size: memory
    follows the chunk, not the longest sample, and loss and gradients are those
    of ordinary training.

    [bold]Examples[/]
      chunkflow doctor
      chunkflow recipes list
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
    """
    if version:
        print(__version__)
        raise typer.Exit
    # Bars of libraries (loading, dequantising) would break into ours. tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")


@app.command(cls=CommandWithKeys)
def train(
    overrides: Overrides = None,
    overrides_file: Annotated[
        str | None,
        typer.Option(
            "--overrides", metavar="FILE", help="YAML of keys, as tune-chunk-size writes it.", show_default=False
        ),
    ] = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Run every combination of key=a,b,c.")] = False,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    r"""Fine-tune a model.

    [bold]Examples[/]
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
      chunkflow train recipe=tiny_random model.lora.enabled=true \
        train.output_dir=outputs/lora
      chunkflow train recipe=tiny_random -m chunk.size=64,128 train.steps=2
    """

    def command() -> dict[str, Any] | None:
        from chunkflow_cli.processes import worker

        worker.enter()
        words = overrides or []
        if overrides_file is not None:
            from chunkflow_cli.config.load import read_overrides

            words = [*read_overrides(overrides_file), *words]  # what is typed comes last, and wins
        if multirun:
            from chunkflow_cli.cli import multirun as sweep

            return sweep.run(words, config_dir=config_dir, json_output=json_output)
        from chunkflow_cli.training import launch

        loaded = launch.with_processes(_load(words, cfg, resolve, config_dir))
        if launch.is_needed(loaded):
            return launch.run(loaded, config_dir=config_dir, debug=debug, json_output=json_output)
        from chunkflow_cli.training import train as command_module

        return command_module.run(loaded, json_output=json_output)

    _finish(command, json_output, debug)


@app.command(cls=CommandWithKeys)
def verify(
    overrides: Overrides = None,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    """Prove that chunked training of the configured model equals whole-sequence training. Exit code 1 if not.

    [bold]Examples[/]
      chunkflow verify recipe=tiny_random
      chunkflow verify recipe=tiny_random verify.dtype=float64 chunk.size=50
      chunkflow verify recipe=tiny_random chunk.size=64 chunk.k=2 --json
    """

    def command() -> dict[str, Any]:
        loaded = _load(overrides, cfg, resolve, config_dir, require=("model.path",))
        from chunkflow_cli.cli import verify as command_module

        return command_module.run(loaded, json_output=json_output)

    result = _finish(command, json_output, debug)
    if result is not None and not result["passed"]:
        raise typer.Exit(1)


@app.command()
def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's train.output_dir.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Where to; default RUN_DIR/export.", show_default=False),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add LoRA adapters into the model's weights.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    r"""Write a run's model as a Hugging Face folder.

    [bold]Examples[/], after two runs
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
      chunkflow train recipe=tiny_random model.lora.enabled=true \
        train.output_dir=outputs/lora
      chunkflow export outputs/tiny
      chunkflow export outputs/tiny --output exported
      chunkflow export outputs/lora --merge --output merged
    """

    def command() -> dict[str, Any]:
        from chunkflow_cli.cli import export as command_module

        return command_module.run(run_dir, output=output, merge=merge, json_output=json_output)

    _finish(command, json_output, debug)


@app.command(cls=CommandWithKeys)
def doctor(
    overrides: Overrides = None,
    seconds: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Longest wait for one answer.", min=1.0)
    ] = 60.0,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    """Say what this machine has, what is missing and how to get it. Exit code 1 if training cannot work.

    [bold]Examples[/]
      chunkflow doctor
      chunkflow doctor --json
      chunkflow doctor recipe=tiny_random model.dtype=float32
    """

    def command() -> dict[str, Any]:
        if cfg is not None:
            _load(overrides, cfg, resolve, config_dir)
        from chunkflow_cli.cli import doctor as command_module

        return command_module.run(overrides or [], config_dir=config_dir, seconds=seconds, json_output=json_output)

    result = _finish(command, json_output, debug)
    if result is not None and not result["ready"]:
        raise typer.Exit(1)


recipes_app = typer.Typer(no_args_is_help=True, help=(
    "List recipes, show one, or copy one to make it your own.\n\n"
    "[bold]Examples[/]\n"
    "  chunkflow recipes list\n"
    "  chunkflow recipes show tiny_random\n"
    "  chunkflow recipes copy tiny_random first.yaml"
))  # fmt: skip
app.add_typer(recipes_app, name="recipes")


def _complete_recipe(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from chunkflow_cli.cli.completion import complete_recipe

    return complete_recipe(ctx, incomplete)


RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", help="As in the list.", show_default=False, autocompletion=_complete_recipe)
]


@recipes_app.command("list")
def recipes_list(json_output: Json = False, config_dir: ConfigDir = None, debug: Debug = False) -> None:
    """List the recipes: model, hardware, chunk size and K, longest sample.

    [bold]Examples[/]
      chunkflow recipes list
      chunkflow recipes list --json
      chunkflow recipes list --config-dir .
    """

    def command() -> dict[str, Any]:
        from chunkflow_cli.cli import recipes as command_module

        return command_module.list_recipes(config_dir, json_output=json_output)

    _finish(command, json_output, debug)


@recipes_app.command("show")
def recipes_show(
    name: RecipeName, json_output: Json = False, config_dir: ConfigDir = None, debug: Debug = False
) -> None:
    """Print a recipe as it is, comments included.

    [bold]Examples[/]
      chunkflow recipes show tiny_random
      chunkflow recipes show qwen7b --json
      chunkflow recipes show qwen7b > mine.yaml
    """

    def command() -> dict[str, Any]:
        from chunkflow_cli.cli import recipes as command_module

        return command_module.show(name, config_dir, json_output=json_output)

    _finish(command, json_output, debug)


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeName,
    destination: Annotated[
        str | None,
        typer.Argument(metavar="DEST", help="A file or a folder; default ./NAME.yaml.", show_default=False),
    ] = None,
    json_output: Json = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    """Copy a recipe to a file of yours, and say how to run it. Never overwrites.

    [bold]Examples[/]
      chunkflow recipes copy tiny_random
      chunkflow recipes copy tiny_random my_run.yaml
      chunkflow train recipe=my_run.yaml train.steps=1
    """

    def command() -> dict[str, Any]:
        from chunkflow_cli.cli import recipes as command_module

        return command_module.copy(name, destination, config_dir, json_output=json_output)

    _finish(command, json_output, debug)


@app.command()
def analyze(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]... [OVERRIDES]...",
            help="Files, folders, globs or data set ids; and overrides, as elsewhere.",
            show_default=False,
            autocompletion=_complete_override,
        ),
    ] = None,
    plot: Plot = None,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    """Show how long the samples of a data set are, and what batching, packing or cutting them would cost.

    [bold]Examples[/]
      chunkflow analyze recipe=tiny_random
      chunkflow analyze recipe=tiny_random --plot lengths.png
      chunkflow analyze recipe=tiny_random data.train_on=all --json
    """

    def command() -> dict[str, Any]:
        paths = [word for word in words or [] if not _is_override(word)]
        overrides = [word for word in words or [] if _is_override(word)]
        loaded = _load(overrides, cfg, resolve, config_dir)
        if not loaded.config.model.path.lower().endswith(".gguf"):  # transformers reads those with torch
            from chunkflow_cli.data.tokenizer import keep_torch_out

            keep_torch_out()
        from chunkflow_cli.cli import analyze as command_module

        return command_module.run(paths, loaded, plot=plot, json_output=json_output)

    _finish(command, json_output, debug)


@app.command()
def plan(
    overrides: Overrides = None,
    step: Annotated[int, typer.Option("--step", metavar="N", help="Whose schedule is shown, from 1.")] = 1,
    plot: Plot = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="RUN_DIR",
            help="A run with train.trace=true: its operations beside the predicted ones.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    """Show what train would do, without a model in memory: chunks, schedule, balance, memory.

    [bold]Examples[/]
      chunkflow plan recipe=tiny_random
      chunkflow plan recipe=tiny_random chunk.size=64 --plot step.png
      chunkflow plan recipe=tiny_random launch.processes=4 tune.device=h100
    """

    def command() -> dict[str, Any]:
        loaded = _load(overrides, cfg, resolve, config_dir)
        from chunkflow_cli.cli import plan as command_module

        return command_module.run(loaded, step=step, plot=plot, trace=trace, json_output=json_output)

    _finish(command, json_output, debug)


@app.command("tune-chunk-size")
def tune_chunk_size(
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The best pair's overrides; default outputs/RECIPE/tuned.yaml.",
            show_default=False,
        ),
    ] = None,
    plot: Plot = None,
    json_output: Json = False,
    cfg: Cfg = None,
    resolve: Resolve = False,
    config_dir: ConfigDir = None,
    debug: Debug = False,
) -> None:
    r"""Find the best chunk.size and chunk.k for your data, model and memory.

    [bold]Examples[/]
      chunkflow tune-chunk-size recipe=tiny_random tune.device=h100
      chunkflow tune-chunk-size recipe=tiny_random tune.device=cpu --plot grid.png
      chunkflow tune-chunk-size recipe=tiny_random tune.chunk_sizes=[64,128,256] \
        --output tuned.yaml
    """

    def command() -> dict[str, Any]:
        loaded = _load(overrides, cfg, resolve, config_dir, require=("model.path",))
        from chunkflow_cli.cli import tune as command_module

        return command_module.run(loaded, config_dir=config_dir, output=output, plot=plot, json_output=json_output)

    _finish(command, json_output, debug)


def _is_override(word: str) -> bool:
    """`key=value`, `+key=value` or `~key`; a path that exists is a path, whatever its name."""
    return ("=" in word or word.startswith("~")) and not os.path.exists(word)


class _PrintedConfiguration(Exception):  # noqa: N818 - no error
    """`--cfg` has printed what it was asked for; nothing else is to be done."""


def _load(
    overrides: list[str] | None,
    cfg: str | None,
    resolve: bool,
    config_dir: str | None,
    *,
    require: tuple[str, ...] = (),
) -> Any:
    from omegaconf import OmegaConf

    from chunkflow_cli.config.load import compose, convert
    from chunkflow_cli.errors import UsageError

    recipe, tree = compose(overrides or [], config_dir)
    if cfg is not None:
        if cfg != "job":
            raise UsageError(f"--cfg={cfg} is not known: --cfg job prints the configuration")
        print(OmegaConf.to_yaml(tree, resolve=resolve), end="")
        raise _PrintedConfiguration
    return convert(tree, recipe=recipe, overrides=overrides or [], require=require)


def _finish(command: Callable[[], dict[str, Any] | None], json_output: bool, debug: bool) -> dict[str, Any] | None:
    """Run a command; turn what it raises into an exit code and a few lines, which a worker leaves to its launcher."""
    from chunkflow_cli.processes import environment

    try:
        result = command()
    except _PrintedConfiguration:
        return None
    except (KeyboardInterrupt, Exception) as error:
        if environment.worker_folder() is not None:
            from chunkflow_cli.processes.failures import record_failure

            record_failure(error)
        elif debug and not isinstance(error, KeyboardInterrupt):
            raise
        else:
            rank = f"rank {environment.rank()}: " if environment.is_started_by_launcher() else ""
            _say(_in_a_few_lines(error, rank))
        raise typer.Exit(exit_code_of(error)) from None
    if json_output and result is not None:
        print(json.dumps(result))
    return result


def _in_a_few_lines(error: BaseException, rank: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{rank}{describe(error)}"
    story = "\n  the whole story: the same command with --debug" if is_unexpected(error) else ""
    return f"error: {rank}{describe(error)}{story}"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    from chunkflow_cli.processes import environment, worker

    try:
        app()
    except SystemExit as end:
        if environment.is_started_by_launcher() and not isinstance(end.code, str):
            worker.leave(end.code or 0)
        raise
