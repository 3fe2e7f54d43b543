"""A row of results: what a measurement returns, and what becomes of one that fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from chunkflow_cli.errors import UsageError, describe

Values = dict[str, Any]
"""A row's values by column, and more for the JSON file; `failed` tells why it did not pass."""


class NotHere(Exception):  # noqa: N818 - not an error
    """A case that this machine or this version cannot run, with the reason."""


def attempt(measure: Callable[[], Values], *, may_be_refused: bool = True) -> Values:
    """Return what `measure` returns, or why there is nothing: its status and a note.

    Args:
        may_be_refused: whether this machine may be one on which chunkflow refuses the case.
    """
    started = time.perf_counter()
    try:
        values = measure()
        row = {"status": "FAILED", "note": values["failed"]} if "failed" in values else {"status": "passed"}
        row["values"] = values
    except NotHere as reason:
        row = {"status": "not here", "note": str(reason)}
    except UsageError as error:
        row = {"status": "refused" if may_be_refused else "error", "note": str(error)}
    except Exception as error:
        row = {"status": "error", "note": describe(error), "traceback": traceback.format_exc()}
    return {"values": {}, **row, "took_seconds": time.perf_counter() - started}


def reraise(error: Exception) -> Values:
    raise error
