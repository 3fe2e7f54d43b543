"""Count the states that an optimizer keeps for each weight."""

from __future__ import annotations

from chunkflow_cli.planning.model_shape import ModelShape


def state_numbers(optimizer: str, momentum: float, shape: ModelShape | None = None) -> float:
    """Return what an optimizer keeps per trained weight, in float32 numbers, as a mean over the model.

    The 8-bit states of bitsandbytes are two codes of a byte, and two scales for each block of 256. Adafactor keeps a
    factor of each row and column, counted as if all matrices were `hidden_size` wide (Shazeer & Stern 2018, arXiv
    1804.04235). Muon keeps one number of each weight in the layers, and AdamW two of each in embedding and head.

    Args:
        optimizer: `optim.name`.
        momentum: `optim.momentum`.
        shape: the model's; without one, an optimizer that treats its weights differently is taken at its most.
    """
    if optimizer == "sgd":
        return 1.0 if momentum else 0.0
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * (1 + 4 / 256) / 4
    if optimizer == "adafactor" and shape is not None:
        return 2 / shape.hidden_size
    if optimizer == "muon" and shape is not None:
        tables = (1 if shape.is_head_tied else 2) * shape.head_parameters
        return 1 + (tables / shape.parameters if shape.is_head_trained else 0.0)
    return 2.0


def saved_numbers(optimizer: str, momentum: float) -> float:
    """Return the most that a checkpoint holds of an optimizer's states per trained weight, in float32 numbers.

    Of 8-bit states it holds the code and the scale of every weight, so that any layout can read them.
    """
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * (1 + 4) / 4
    return 0.0 if optimizer == "adafactor" else state_numbers(optimizer, momentum)
