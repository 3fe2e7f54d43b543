"""Report the progress bars of libraries as signs of life: downloads, and weights loaded and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import tqdm

from chunkflow_cli.files import bytes_moved, moving


class DownloadBar(tqdm):  # type: ignore[type-arg]
    """The progress bar of a download, whose every update is a sign of life, shown or not."""

    def update(self, n: float | None = 1) -> bool | None:
        """Count the bytes of a block."""
        bytes_moved()
        is_shown: bool | None = super().update(n)
        return is_shown


@contextmanager
def bars_as_signs_of_life() -> Iterator[None]:
    """Report what transformers counts within the block: each weight that it loads, and each file that it writes."""
    from transformers.utils import logging

    def hear(make: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        if not args:
            return make(**settings)
        items, *rest = args
        return make(moving(items), *rest, **{"total": len(items), **settings})

    before = logging.set_tqdm_hook(hear)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
