"""Add the most common configuration keys to the end of a command's `--help`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from chunkflow_cli.cli.mistakes import options_explained

KEYS = {
    "train": (
        "model.path", "data.path", "data.max_length", "chunk.size", "chunk.k", "model.lora.enabled", "optim.lr",
        "train.epochs", "train.global_batch_size", "train.output_dir",
    ),
    "analyze": (
        "model.path", "data.format", "data.columns", "data.split", "data.subset", "data.train_on",
        "data.chat_template", "train.global_batch_size",
    ),
    "plan": (
        "model.path", "data.path", "data.max_length", "chunk.size", "chunk.k", "train.global_batch_size",
        "launch.processes", "tune.device",
    ),
    "tune-chunk-size": (
        "model.path", "data.path", "data.max_length", "train.global_batch_size", "launch.processes", "tune.device",
        "tune.chunk_sizes", "tune.ks", "tune.memory_gib", "tune.budget_seconds",
    ),
    "verify": (
        "model.path", "model.dtype", "model.attention", "chunk.size", "chunk.k", "verify.length", "verify.dtype",
    ),
    "doctor": ("model.path", "model.dtype", "model.attention", "data.cache_dir"),
}  # fmt: skip
"""The keys to show, by command."""


class CommandWithKeys(TyperCommand):
    """A command whose help shows its keys, if it has any in `KEYS`, below its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with options_explained(ctx, args):
            return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self.name in KEYS:
            _print_keys(KEYS[self.name])


def _print_keys(names: tuple[str, ...]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from chunkflow_cli.config.keys import describe_keys
    from chunkflow_cli.console import stdout_console

    described = describe_keys()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(ratio=1)
    for name in names:
        key = described[name]
        text = Text(key.help.replace("`", ""))
        text.append(f" [default: {key.default}]" if key.default not in ("", "null", "{}") else "", style="dim")
        table.add_row(name, text)
    console = stdout_console()
    console.print(Panel(table, title="Common keys", title_align="left", border_style="dim"), soft_wrap=False)
    console.print(" All keys with their values: --cfg job. TAB completion: --install-completion")
