"""The process of a tracker: takes lines of JSON on stdin, hands rows to the library, and answers on stdout.

It may fail, hang or be killed. The run only sees that answers stay away. If the run itself dies, stdin ends, and this
process with it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from chunkflow_cli.files import write_atomically
from chunkflow_cli.training.trackers.backends import BACKENDS, Introduction

CLOSE_SECONDS = 30.0
"""Seconds that a tracker gets to finish."""
SHOWN_CHARACTERS = 160
"""Of an error of a library, at most. Its log has the whole."""


def main() -> None:
    """Run the tracker that the first line introduces, until the run ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the run, which then says that it ends
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**words: Any) -> None:
        answers.write(json.dumps(words) + "\n")

    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    first = json.loads(sys.stdin.readline())
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        _run(first, lines, answer)
    except BaseException as error:  # libraries raise SystemExit, too
        answer(failed=_reason(error))
        raise


def _read(lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        lines.put(json.loads(line))
    lines.put({"end": "failed"})  # after a proper end, nobody reads it
    end = threading.Timer(CLOSE_SECONDS, os._exit, (1,))
    end.daemon = True
    end.start()


def _run(first: dict[str, Any], lines: queue.SimpleQueue[dict[str, Any]], answer: Any) -> None:
    name, kept = first["tracker"], Path(first["kept"])
    known: dict[str, Any] = {"id": None, "step": 0}
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
    run = Introduction(**first["run"], id=known["id"])
    tracker = BACKENDS[name](run)
    known["id"] = tracker.id
    write_atomically(kept, json.dumps(known))
    answer(where=tracker.where)
    while "end" not in (line := lines.get()):
        try:
            # A run that goes on from a checkpoint repeats the rows after it.
            if line["step"] > known["step"] or tracker.drops_repeated:
                tracker.log(line["step"], line["values"])
                known["step"] = line["step"]
                write_atomically(kept, json.dumps(known))
            answer(done=line["step"])
        except Exception as error:
            answer(missed=line["step"], reason=_reason(error))
    tracker.finish(line["end"])
    answer(finished=True)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


if __name__ == "__main__":
    main()
