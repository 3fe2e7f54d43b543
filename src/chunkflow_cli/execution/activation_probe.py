"""How many bytes of activations a token costs this model: measured, not estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow_cli.execution.chunk_model import ChunkCall, ChunkModel


def activation_bytes_per_token(model: ChunkModel, call: ChunkCall) -> float:
    """Bytes that the layers keep for backward per token, from one forward of a chunk.

    Counts each storage that autograd saves once; weights are not counted. The head and the loss are left out.
    """
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    device = call.batch.input_ids.device

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        # Of this device only: torch warns where all of a machine's are saved, and it is in vain.
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        hidden = model.hidden(call)  # kept alive, so that no address is counted for two tensors
    total = sum(saved.values())
    del hidden
    return total / call.batch.input_ids.shape[1]


def whole_sequence_bytes(
    peak_bytes: int, activation_bytes: float, chunk_tokens: int, longest: int, vocab_size: int, element_bytes: int
) -> int:
    """Predicted peak of the same training with the longest sample as one forward, logits and all.

    Takes the measured peak, exchanges the chunk's activations for the sample's, and adds the logits that a plain loss
    makes for every token: in the model's dtype, in float32, their log-softmax and its gradient. Against measurement:
    benchmarks/LOG.md.
    """
    logits = longest * vocab_size * (element_bytes + 3 * 4)
    more_tokens = max(0, longest - chunk_tokens)
    return int(peak_bytes + more_tokens * activation_bytes + (logits if more_tokens else 0))
