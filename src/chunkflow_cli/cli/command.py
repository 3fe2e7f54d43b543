"""Code that all commands share: options, the composed configuration, and the exit code."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkflow_cli.cli.completion import complete_override
from chunkflow_cli.cli.key_help import CommandWithKeys
from chunkflow_cli.errors import UsageError, describe, exit_code_of, is_unexpected

if TYPE_CHECKING:
    from chunkflow_cli.config.load import LoadedConfig


def home_expanded(param: typer.CallbackParam, value: str | None) -> str | None:
    """Expand `~` in the value of an option: the shell does not, in `--output=~/x`."""
    if value is None or not value.startswith("~"):
        return value
    from chunkflow_cli.config.home import expand_home

    return expand_home(value, param.opts[0])


CONFIGURATION = ("overrides", "cfg", "resolve")
"""Options that a command lacks if it does not compose a configuration."""
Result = dict[str, Any] | None
"""What `--json` prints; None if a command has nothing to report, or another process has printed it."""


@dataclass(frozen=True)
class Request:
    """The overrides and options that commands share. Each field is also declared to Typer, by its annotation."""

    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OVERRIDES",
            help="key=value (such as chunk.size=4096), recipe=NAME, or FILE.yaml",
            autocompletion=complete_override,
        ),
    ] = None
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout and everything else to stderr.")
    ] = False
    cfg: Annotated[
        str | None, typer.Option("--cfg", metavar="job", help="Print the composed configuration and exit.")
    ] = None
    resolve: Annotated[
        bool, typer.Option("--resolve", help="With --cfg, resolve references to other keys (${...}).")
    ] = False
    config_dir: Annotated[
        str | None,
        typer.Option(
            "--config-dir",
            metavar="DIR",
            help="Folder to search first for recipes (DIR/recipes) and Hydra groups (DIR).",
            callback=home_expanded,
        ),
    ] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False

    def load(self, overrides: list[str] | None = None, *, require: tuple[str, ...] = ()) -> LoadedConfig:
        """Compose and check the configuration, or with `--cfg` print it and exit.

        Args:
            overrides: instead of those of the request.
            require: keys without a default that the command needs.

        Raises:
            UsageError: the configuration or the value of `--cfg` is wrong.
            typer.Exit: `--cfg` has printed the configuration.
        """
        from chunkflow_cli.config.load import load

        overrides = (self.overrides or []) if overrides is None else overrides
        if self.cfg is None:
            return load(overrides, self.config_dir, require=require)
        if self.cfg != "job":
            raise UsageError(f"--cfg={self.cfg} is not supported: use --cfg job to print the configuration")
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(load(overrides, self.config_dir).tree, resolve=self.resolve), end="")
        raise typer.Exit


def command(
    app: typer.Typer, name: str | None = None, *, without: Collection[str] = (), fails_unless: str | None = None
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Return a decorator that registers `function(request, own options ...)` as a command with the shared options.

    Args:
        app: the application or group that the command belongs to.
        name: of the command; by default that of the function.
        without: fields of `Request` that the command does not take.
        fails_unless: key of the result; where its value is false, the exit code is 1.
    """
    shared = [p for p in inspect.signature(Request, eval_str=True).parameters.values() if p.name not in without]

    def decorate(function: Callable[..., Result]) -> Callable[..., None]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()

        @functools.wraps(function)
        def call(**words: Any) -> None:
            request = Request(**{parameter.name: words.pop(parameter.name) for parameter in shared})
            result = run_command(lambda: function(request, **words), request.json_output, request.debug)
            if fails_unless is not None and result is not None and not result[fails_unless]:
                raise typer.Exit(1)

        overrides, options = [p for p in shared if p.name == "overrides"], [p for p in shared if p.name != "overrides"]
        in_order = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*overrides, *own, *options)]
        call.__signature__ = inspect.Signature(in_order)  # type: ignore[attr-defined]
        return app.command(name, cls=CommandWithKeys)(call)

    return decorate


def run_command(function: Callable[[], Result], json_output: bool, debug: bool) -> Result:
    """Run a command and return its result, printed with `json_output`.

    An exception becomes an exit code and a few lines on stderr; a worker leaves those lines to its launcher.

    Raises:
        typer.Exit: the command failed, or has nothing more to do.
    """
    from chunkflow_cli.processes import environment
    from chunkflow_cli.processes.stop_signals import interruptible

    try:
        with interruptible():
            result = function()
            if json_output and result is not None:
                print(json.dumps(result))
            sys.stdout.flush()
    except typer.Exit:
        raise
    except (KeyboardInterrupt, Exception) as error:
        from chunkflow_cli.processes.failures import record_failure

        if not record_failure(error):
            if debug and not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            else:
                print(_in_a_few_lines(error, environment.rank_in_messages()), file=sys.stderr)
        raise typer.Exit(exit_code_of(error)) from None
    return result


def _in_a_few_lines(error: BaseException, rank: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{rank}{describe(error)}"
    hint = "\n  for the full traceback, run the same command with --debug" if is_unexpected(error) else ""
    return f"error: {rank}{describe(error).removeprefix(rank)}{hint}"
