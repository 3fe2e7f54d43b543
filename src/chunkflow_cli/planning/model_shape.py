"""The numbers of a model that costs and memory are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers
from chunkflow_cli.planning.stage_cut import StageLayers


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model."""

    layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward layer that a token goes through; with experts, the sum over the active ones."""
    attention: tuple[AttentionLayers, ...]
    """The attention layers, by their sizes; in a hybrid model, fewer than `layers`."""
    vocab_size: int
    matmul_parameters: int
    """Weights that every token is multiplied with: all linear layers and the head; only the active experts."""
    parameters: int
    """All weights, each counted once."""
    trainable_parameters: int
    """Weights that get a gradient: all of them, or those of the adapters."""
    layer_activation_bytes: float | None = None
    """Bytes per token that a layer keeps for backward, as a mean; None if they could not be counted."""
    largest_layer_activation_bytes: float | None = None
    """Bytes per token that the layer that keeps the most keeps for backward."""
    layer_product_bytes: float | None = None
    """Bytes per token of the results of a layer's matrix products and attention, as a mean."""
    score_bytes: float = 0.0
    """Bytes per query-key pair that all layers keep for backward, if the model computes attention itself, for every
    query of a chunk with every key; 0 if a kernel does."""
    past_score_bytes: float = 0.0
    """Bytes per pair of a query and a key of the past, likewise: a model may see only some of those."""
    past_key_bytes: float = 0.0
    """Bytes per token of the past that all layers keep for backward in such a model: its keys, and copies."""
    is_by_segment: bool = False
    """True if each segment of a chunk has scores with its own keys only."""
    recurrent: RecurrentLayers = field(default_factory=RecurrentLayers)
    """The recurrent layers, together; by default, there are none."""
    merged_bytes: int = 0
    """Bytes of the copies of adapted expert tensors, over all layers: each chunk that keeps activations has its own."""
    embedding_copy: int = 0
    """Weights of the trained copy of the embedding that adapters come with (`model.lora.modules_to_save`)."""
    head_copy: int = 0
    """Likewise of the head. Where embedding and head share a weight, they share the copy, and both fields count it."""
    workspace_bytes: int = 0
    """Most bytes that a layer needs for a moment: DoRA computes whole weights for their lengths, and a quantized layer
    is multiplied with its dequantized weight."""
    spared_bytes: int = 0
    """Bytes that quantized layers take less than in the model's data type, all together."""
    largest_trained: int = 0
    """Numbers in the largest weight that gets a gradient."""
    gathered_together: int = 0
    """Most weights in modules of a layer that ZeRO-3 gathers at once on several ranks (`engine.gathered_modules`)."""
    is_head_tied: bool = False
    """True if embedding and head share a weight; the first and last stage of a pipeline then hold a copy each."""

    @property
    def is_recurrent(self) -> bool:
        """True if it has recurrent layers. Not only these leave edges (`RecurrentLayers.edge_bytes`)."""
        return self.recurrent.flops_per_token > 0

    @property
    def attention_flops_per_pair(self) -> int:
        """Floating-point operations of a forward for one query-key pair, over all layers."""
        return sum(part.flops_per_pair for part in self.attention)

    @property
    def kv_heads(self) -> int:
        """Fewest heads of keys and values of an attention layer; 1 if there is none."""
        return min((part.kv_heads for part in self.attention), default=1)

    def attended_pairs(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of the first `tokens` positions of a sequence.

        It is the mean over the attention layers, weighted by their operations per pair; 0 without such layers.
        """
        pairs = np.zeros_like(tokens)
        for part in self.attention:
            pairs += part.flops_per_pair / self.attention_flops_per_pair * part.attended_pairs(tokens)
        return pairs

    def scored_pairs(self, past: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of pieces of a sequence that all layers score, seen or not; a mean as above."""
        pairs = np.zeros_like(tokens)
        for part in self.attention:
            pairs += part.flops_per_pair / self.attention_flops_per_pair * part.scored_pairs(past, tokens)
        return pairs

    @property
    def head_parameters(self) -> int:
        """Weights of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def is_head_trained(self) -> bool:
        """True without adapters, or if they come with a trained copy of the head."""
        return self._is_all_trained or self.head_copy > 0

    @property
    def _is_all_trained(self) -> bool:
        return self.trainable_parameters == self.parameters

    def _copies_of(self, is_first: bool, is_last: bool) -> int:
        """Return the weights of the trained copies of embedding and head on a stage."""
        copies = self.embedding_copy * is_first + self.head_copy * is_last
        return min(copies, self.head_copy) if self.is_head_tied and self.head_copy else copies

    def parameters_of(self, held: StageLayers) -> int:
        """Return the number of weights on a stage.

        The first stage holds the embedding, the last one the head. The few other weights (final norm, biases, position
        embeddings) are counted with the layers.
        """
        tables = (1 if self.is_head_tied else 2) * self.head_parameters
        layers = (self.parameters - tables - self._copies_of(True, True)) * held.layers // self.layers
        copies = self._copies_of(held.is_first, held.is_last)
        return layers + min((held.is_first + held.is_last) * self.head_parameters, tables) + copies

    def trainable_parameters_of(self, held: StageLayers) -> int:
        """Return the number of weights on a stage that get a gradient; adapters are part of the layers."""
        if self._is_all_trained:
            return self.parameters_of(held)
        layers = (self.trainable_parameters - self._copies_of(True, True)) * held.layers // self.layers
        return layers + self._copies_of(held.is_first, held.is_last)


def training_flops(lengths: Sequence[int] | NDArray[np.int64], shape: ModelShape) -> float:
    """Return the floating-point operations of forward and backward over whole sequences, without recompute.

    6 per weight and token (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), and for attention
    6 x heads x (key_dim + value_dim) per layer and query-key pair: scores and their weighted sum are 2 each forward,
    and backward is twice the forward. Scans of recurrent layers are counted per token. Norms, softmax and activation
    functions are left out, about 1 % at ordinary sizes.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    per_token = 6.0 * shape.matmul_parameters + 3.0 * shape.recurrent.flops_per_token
    per_pair = 3.0 * shape.attention_flops_per_pair
    return float((per_token * sizes + per_pair * shape.attended_pairs(sizes)).sum())
