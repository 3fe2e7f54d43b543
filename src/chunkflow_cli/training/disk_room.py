"""How much room a run needs on the disk of its folder."""

from __future__ import annotations

from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import human_bytes
from chunkflow_cli.planning.memory_settings import ELEMENT_BYTES
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.optimizer_states import saved_numbers


def warning_of_little_room(config: Config, shape: ModelShape, *, free: int, checkpoints: int) -> str | None:
    """Return a warning if the disk has no room for the model and the checkpoints that the run will save.

    Args:
        free: bytes that are free on the disk.
        checkpoints: number of checkpoints that the folder holds already.
    """
    saved = shape.trainable_parameters if config.model.lora.enabled else shape.parameters
    final = saved * ELEMENT_BYTES[config.model.dtype.value]
    states = saved_numbers(config.optim.name.value, config.optim.momentum)
    checkpoint = int(shape.trainable_parameters * 4 * (1 + states))
    # An old checkpoint is deleted when the new one is complete. Without `every`, an interruption saves one.
    most = 1 if config.checkpoint.every is None else config.checkpoint.keep + 1
    # The best model so far is kept until a better one is complete, and until final/ is.
    models = 3 if config.eval.keep_best else 1
    needed = final * models + checkpoint * max(1, most - checkpoints)
    if free >= needed:
        return None
    folders = "final/" if models == 1 else "final/ and best/"
    return (
        f"the disk of the run's folder has {human_bytes(free)} free, and this run needs up to {human_bytes(needed)}: "
        f"{human_bytes(final * models)} for {folders} and {human_bytes(checkpoint)} for each checkpoint "
        f"(checkpoint.keep={config.checkpoint.keep})"
    )
