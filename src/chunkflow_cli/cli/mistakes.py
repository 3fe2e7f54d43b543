"""Report mistakes that Typer finds, such as an unknown command or option, in the style of all other errors."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import typer
from typer.core import TyperGroup

from chunkflow_cli.errors import ChunkflowError, UsageError

TyperMistake = cast("type[Exception]", typer.BadParameter.__base__)
"""Every mistake in a command line. Typer exports only this subclass of it."""

OTHER_NAMES = {
    **dict.fromkeys(("tune", "tune_chunk_size", "tune-chunk", "search", "autotune"), "tune-chunk-size"),
    **dict.fromkeys(("finetune", "fine-tune", "sft", "fit", "run", "launch", "tune-model"), "train"),
    **dict.fromkeys(("stats", "lengths", "preprocess", "inspect", "data"), "analyze"),
    **dict.fromkeys(("merge", "merge-lora", "convert", "save"), "export"),
    **dict.fromkeys(("check", "info", "env", "diagnose"), "doctor"),
    **dict.fromkeys(("recipe", "ls", "list", "cp", "copy", "init"), "recipes"),
    **dict.fromkeys(("dry-run", "schedule", "simulate", "estimate"), "plan"),
    **dict.fromkeys(("test", "parity", "prove"), "verify"),
    **dict.fromkeys(("infer", "inference", "generate", "talk", "ask"), "chat"),
    **dict.fromkeys(("push", "upload", "push-to-hub"), "export"),
}
"""Commands by their names in other tools."""


class Commands(TyperGroup):
    """A group of commands that prints a mistake as `error: ...` and exits with code 2."""

    def main(self, *args: Any, **words: Any) -> Any:
        try:
            code = super().main(*args, **(words | {"standalone_mode": False}))
        except TyperMistake as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
                print(f"error: {_explain(error)}", file=sys.stderr)
            code = 2
        except ChunkflowError as error:  # in an option
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except typer.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            option = f"--{args[0].lower()}"
            if option in (*ctx.help_option_names, *(name for param in self.params for name in param.opts)):
                raise UsageError(f"there is no command {args[0]!r}\n  did you mean {ctx.command_path} {option}?")
            raise UsageError(_no_such_command(args[0], ctx.command_path, list(self.list_commands(ctx))))
        return super().resolve_command(ctx, args)


@contextmanager
def options_explained(ctx: Any, args: Sequence[str]) -> Iterator[None]:
    """Turn the error for an unknown option into one that names all unknown options, with the keys that they may mean.

    Args:
        ctx: Typer's context of the command.
        args: its words.

    Raises:
        UsageError: an option is unknown.
    """
    given = list(args)  # Typer takes words out of its list
    try:
        yield
    except TyperMistake as error:
        problems = _option_problems(ctx, given) if type(error).__name__ == "NoSuchOption" else []
        if not problems:
            if error.ctx is None:  # type: ignore[attr-defined]
                error.ctx = ctx  # type: ignore[attr-defined]  # whose help `_explain` names
            raise
        from chunkflow_cli.config.overrides import in_one

        raise UsageError(in_one(problems)) from error


def _option_problems(ctx: Any, args: Sequence[str]) -> list[str]:
    """Return an error for each unknown option, and if the command takes overrides, for each wrong word."""
    command = ctx.command
    takes_value = {
        name: not getattr(p, "is_flag", False) for p in command.params for name in (*p.opts, *p.secondary_opts)
    }
    takes_overrides = any(param.name in ("overrides", "words") for param in command.params)
    problems, words, rest = [], [], list(args)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            words.append(word)
        elif name in takes_value:
            if takes_value[name] and "=" not in word and rest:
                rest.pop(0)
        else:
            if "=" not in word and rest and not rest[0].startswith("-") and "=" not in rest[0]:
                value = rest.pop(0)
            options = [option for option in takes_value if option.startswith("-")]
            hint = _meant_by_option(name, value, options, takes_overrides=takes_overrides)
            problems.append(f"there is no option {name!r}\n  {hint or _see_help(ctx)}")
    if takes_overrides and command.name != "analyze":
        from chunkflow_cli.config.overrides import check_words
        from chunkflow_cli.config.words import read_words

        read, wrong = read_words(words)
        problems += wrong + check_words(read)
    return problems


def _meant_by_option(name: str, value: str, options: Sequence[str], *, takes_overrides: bool) -> str:
    """Return a replacement for an unknown option; empty if nothing similar exists."""
    from chunkflow_cli.config.foreign import foreign_name
    from chunkflow_cli.config.keys import known_keys, unknown_key
    from chunkflow_cli.config.words import FILES

    plain = name.lstrip("-")
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    if not takes_overrides:
        return f"did you mean {near[0]}?" if near else ""
    if plain in known_keys() or plain in FILES:
        return f"write keys without dashes: {shlex.quote(plain + '=' + (value or 'VALUE'))}"
    recipe = f"did you mean {shlex.quote('recipe=' + (value or 'FILE.yaml'))}?"
    if plain in ("config", "config_file", "config-file", "recipe-file"):
        return recipe
    if near and foreign_name(plain) is None:
        return f"did you mean {near[0]}?"
    if value.endswith((".yaml", ".yml")):
        return recipe
    hint = unknown_key(plain).partition("\n")[2].strip()
    meant = re.fullmatch(r"did you mean ([\w.]+)\?", hint)
    return f"did you mean {shlex.quote(f'{meant[1]}={value}')}?" if meant and value else hint


def _no_such_command(word: str, path: str, commands: Sequence[str]) -> str:
    if word.endswith((".yaml", ".yml")) or "=" in word:
        return f"there is no command {word!r}\n  did you mean {path} train {shlex.quote(word)}?"
    meant = OTHER_NAMES.get(word.lower())
    near = [meant] if meant in commands else difflib.get_close_matches(word, commands, n=1, cutoff=0.6)
    hint = f"did you mean {path} {near[0]}?" if near else f"commands: {', '.join(commands)}"
    return f"there is no command {word!r}\n  {hint}"


def _explain(error: Any) -> str:
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}\n  {_see_help(error.ctx)}"


def _see_help(ctx: Any) -> str:
    return f"to see what it takes: {'chunkflow' if ctx is None else ctx.command_path} --help"
