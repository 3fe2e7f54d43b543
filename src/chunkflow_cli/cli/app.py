"""Define the help and options of each command. The module that does the work is imported only when the command runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from chunkflow_cli import __version__
from chunkflow_cli.cli.command import CONFIGURATION, Request, Result, command, home_expanded
from chunkflow_cli.cli.completion import complete_override
from chunkflow_cli.cli.groups import config_app, recipes_app
from chunkflow_cli.cli.mistakes import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Plot = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE", help="Draw a plot to a .png, .svg or .pdf file.", callback=home_expanded),
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Exact chunked fine-tuning of language models on long-tailed data.

    Packs short samples and splits long ones into chunks of one size. Peak
    memory depends on the chunk size and hardly on the longest sample. Loss and
    gradients are those of ordinary training.

    [bold]Examples[/]
      chunkflow doctor
      chunkflow recipes list
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
    """
    if version:
        print(__version__)
        raise typer.Exit
    # Progress bars of libraries (loading, dequantizing) would break into ours. tqdm reads this when first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")


@command(app)
def train(
    request: Request,
    overrides_file: Annotated[
        str | None,
        typer.Option(
            "--overrides",
            metavar="FILE",
            help="YAML file of configuration keys, such as tune-chunk-size writes. It wins over the recipe.",
            callback=home_expanded,
        ),
    ] = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Run every combination of values given as key=a,b,c.")
    ] = False,
) -> Result:
    r"""Fine-tune a model.

    Run the same command again to resume an interrupted run.

    [bold]Examples[/]
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
      chunkflow train recipe=tiny_random model.lora.enabled=true \
        train.output_dir=outputs/lora
      chunkflow train recipe=tiny_random -m chunk.size=64,128 train.steps=2
    """
    from chunkflow_cli.cli import train

    return train.run(request, overrides_file=overrides_file, multirun=multirun)


@command(app, fails_unless="passed")
def verify(request: Request) -> Result:
    """Check that a model trains exactly in chunks.

    Compares loss and gradients in chunks with those of whole sequences, on
    random tokens. Exits with code 1 if they differ by more than rounding.

    [bold]Examples[/]
      chunkflow verify recipe=tiny_random
      chunkflow verify recipe=tiny_random verify.dtype=float64 chunk.size=50
      chunkflow verify recipe=tiny_random chunk.size=64 chunk.k=2 --json
    """
    loaded = request.load(require=("model.path",))
    from chunkflow_cli.cli import verify

    return verify.run(loaded, json_output=request.json_output)


@command(app, without=(*CONFIGURATION, "config_dir"))
def export(
    request: Request,
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run (its train.output_dir).")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="DIR", help="Folder to write. Default: RUN_DIR/export.", callback=home_expanded
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters into the model's weights.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="REPO",
            help="Upload the result to this Hugging Face repository. A new repository is private.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and uploaded, and stop.")
    ] = False,
) -> Result:
    r"""Write the model of a run as a Hugging Face folder, with a model card.

    Prints the path on stdout, and on stderr how to load the model.

    [bold]Examples[/]
      chunkflow train recipe=tiny_random train.output_dir=outputs/tiny
      chunkflow export outputs/tiny
      chunkflow export outputs/tiny --output exported
      chunkflow train recipe=tiny_random model.lora.enabled=true \
        train.output_dir=outputs/lora
      chunkflow export outputs/lora --merge --output merged
      chunkflow export outputs/lora --output adapter \
        --push-to-hub me/adapter --dry-run
    """
    from chunkflow_cli.cli import export

    return export.run(
        run_dir, output=output, merge=merge, push_to_hub=push_to_hub, dry_run=dry_run, json_output=request.json_output
    )


@command(app, without=(*CONFIGURATION, "config_dir"))
def chat(
    request: Request,
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR", help="Folder of a finished run (its train.output_dir), or of a whole or merged model."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Print the answer to this prompt, and stop.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Maximum number of tokens in an answer.", min=1)
    ] = 1024,
) -> Result:
    """Talk to the model of a run.

    Uses its chat template, or completes text if it has none. Adapters are
    loaded with their base model.

    [bold]Examples[/]
      chunkflow chat outputs/chats
      chunkflow chat outputs/chats --prompt "Who are you?"
      chunkflow chat outputs/chats --prompt "Who are you?" --max-tokens 64 --json
      chunkflow chat merged
    """
    from chunkflow_cli.cli import chat

    return chat.run(run_dir, prompt=prompt, max_tokens=max_tokens, json_output=request.json_output)


@command(app, fails_unless="ready")
def doctor(
    request: Request,
    seconds: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Time limit of each check.", min=1.0)
    ] = 60.0,
) -> Result:
    """Check this machine: packages, GPUs, attention backends and caches.

    Prints what is missing or broken and how to fix it. With overrides, checks
    what that run needs. Exits with code 1 if training cannot work here.

    [bold]Examples[/]
      chunkflow doctor
      chunkflow doctor --json
      chunkflow doctor recipe=tiny_random model.dtype=float32
    """
    if request.cfg is not None:
        request.load()
    from chunkflow_cli.cli import doctor

    return doctor.run(
        request.overrides or [], config_dir=request.config_dir, seconds=seconds, json_output=request.json_output
    )


@command(app, without=("overrides",))
def analyze(
    request: Request,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA|OVERRIDES",
            help="Files, folders, globs or data set ids, and overrides such as recipe=NAME.",
            autocompletion=complete_override,
        ),
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show",
            metavar="N",
            help="Also print N samples, from the shortest to the longest, and mark the tokens that the loss counts.",
            min=1,
        ),
    ] = None,
    plot: Plot = None,
) -> Result:
    """Show the lengths of the samples in a data set.

    Also shows what padding, packing, truncation and chunks of several sizes
    would cost. Lengths are exact if a model is named, otherwise estimated.

    [bold]Examples[/]
      chunkflow analyze recipe=tiny_random
      chunkflow analyze recipe=tiny_random --show 3
      chunkflow analyze recipe=tiny_random --plot lengths.png
      chunkflow analyze recipe=tiny_random data.train_on=all --json
    """
    from chunkflow_cli.config.words import is_override

    paths = [word for word in words or [] if not is_override(word)]
    loaded = request.load([word for word in words or [] if is_override(word)])
    if not loaded.config.model.path.lower().endswith(".gguf"):  # transformers reads those with torch
        from chunkflow_cli.data.tokenizer import keep_torch_out

        keep_torch_out()
    from chunkflow_cli.cli import analyze

    return analyze.run(paths, loaded, plot=plot, show=show, json_output=request.json_output)


@command(app)
def plan(
    request: Request,
    step: Annotated[int, typer.Option("--step", metavar="N", help="Step to show the schedule of, counted from 1.")] = 1,
    plot: Plot = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="RUN_DIR",
            help="Folder of a run with train.trace=true, to show its operations next to the predicted ones.",
            callback=home_expanded,
        ),
    ] = None,
) -> Result:
    """Show what train would do: chunks, schedule, balance, time and memory.

    Reads the data and the model's configuration and tokenizer, not its weights.

    [bold]Examples[/]
      chunkflow plan recipe=tiny_random
      chunkflow plan recipe=tiny_random chunk.size=64 --plot step.png
      chunkflow plan recipe=tiny_random launch.processes=4 tune.device=h100
    """
    loaded = request.load()
    from chunkflow_cli.config.load import check_set
    from chunkflow_cli.config.schema import DataFormat
    from chunkflow_cli.data.data_sets import configs_of_sources

    needs_model = any(each.format is not DataFormat.tokens for each in configs_of_sources(loaded.config.data))
    check_set(loaded.tree, ("model.path", "data.path") if needs_model else ("data.path",))
    from chunkflow_cli.training.reading_ahead import read_ahead

    keys = read_ahead(loaded.config)
    from chunkflow_cli.cli import plan

    return plan.run(loaded, step=step, plot=plot, trace=trace, keys=keys, json_output=request.json_output)


@command(app, "tune-chunk-size")
def tune_chunk_size(
    request: Request,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="File for the keys of the best pair. Default: outputs/RECIPE/tuned.yaml.",
            callback=home_expanded,
        ),
    ] = None,
    plot: Plot = None,
) -> Result:
    r"""Find the fastest chunk.size and chunk.k that fit your data, model and memory.

    Plans your data with every pair of values. If the device is this machine's,
    also runs a real step with each of the best pairs.

    [bold]Examples[/]
      chunkflow tune-chunk-size recipe=tiny_random tune.device=h100
      chunkflow tune-chunk-size recipe=tiny_random tune.device=cpu --plot grid.png
      chunkflow tune-chunk-size recipe=tiny_random tune.chunk_sizes=[64,128,256] \
        --output tuned.yaml
    """
    loaded = request.load(require=("model.path", "data.path"))
    from chunkflow_cli.training.reading_ahead import read_ahead

    keys = read_ahead(loaded.config)
    from chunkflow_cli.cli import tune

    return tune.run(
        loaded, config_dir=request.config_dir, output=output, plot=plot, keys=keys, json_output=request.json_output
    )


app.add_typer(config_app, name="config")
app.add_typer(recipes_app, name="recipes")
