"""Why a turn of a conversation cannot be a target, and what to do."""

from __future__ import annotations

from chunkflow_cli.data.sample import BadRowError

REMEDY = "data.train_on=all makes every token a target instead"
SPLIT = "data.turns=split makes a sample of each answer, as the model writes it at inference"


class NotFoundError(BadRowError):
    """A turn cannot be told apart from what is around it."""


def nothing_written(number: int, *, is_cut: bool) -> str:
    """Return why a row is bad that has an answer of which the template writes nothing.

    Args:
        is_cut: it writes something of it when it is the last turn.
    """
    if is_cut:
        return f"the chat template writes nothing of turn {number} once another turn follows it; {SPLIT}"
    return (
        f"the chat template writes nothing of what the assistant says in turn {number}, "
        "so it cannot be learned; use a template that writes it"
    )


def not_found(index: int, remedy: str = REMEDY) -> str:
    """Return why a row is bad in which turn `index` cannot be told apart from what is around it."""
    return (
        f"the chat template writes turn {index + 1} differently within the whole conversation, "
        f"so its targets cannot be found; {remedy}"
    )
