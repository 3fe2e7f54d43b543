"""Run one forward of a model on torch's meta device, and read from it the sizes that planning needs.

The model's own code says which heads each attention layer has, which window, and what a recurrent layer hands on. No
table of architectures is needed, and new ones are read as old ones are.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow_cli.config.schema import Dtype
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.model.activation_checkpointing import COSTLY
from chunkflow_cli.model.attention_heads import attention_heads, block_of, by_size
from chunkflow_cli.model.float32_weights import widen_float32_weights
from chunkflow_cli.model.key_block_shapes import attention_to_blocks_on_meta
from chunkflow_cli.model.key_blocks import NO_MASKS
from chunkflow_cli.model.language_part import decoder_of
from chunkflow_cli.model.own_attention import KeyCache
from chunkflow_cli.model.scan_shapes import KernelOnMeta, recurrent_functions_on_meta
from chunkflow_cli.model.special_types import attends_to_blocks, computes_own_attention
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers

PROBE_TOKENS = 256
"""Length of the forward, a multiple of the blocks that scans pad their tokens to. Except for a few small tables, bytes
per token do not depend on it."""
FEW_TOKENS = 32
"""Length of the shortest forward of models that compute attention themselves: some have tables of few positions."""
BLOCK_TOKENS, BLOCK_PAST = 512, 8192
"""That of models that attend to blocks of keys, of which it holds several; and tokens of the past, beyond windows."""
PROBE_ATTENTION = "chunkflow_shape"
"""Name under which transformers knows the attention of the forward."""


@dataclass(frozen=True)
class Probed:
    """Sizes read from a forward."""

    attention: tuple[AttentionLayers, ...]
    recurrent: RecurrentLayers
    activation_bytes_per_token: float
    """Bytes that all layers keep for backward."""
    largest_layer_bytes_per_token: float
    """Those of the layer that keeps the most."""
    product_bytes_per_token: float
    """Bytes of the results of matrix products and attention, over all layers: selective checkpointing keeps them."""
    score_bytes: float = 0.0
    """Bytes per query-key pair that all layers keep for backward; 0 with a kernel."""
    past_score_bytes: float = 0.0
    """Bytes per pair of a query and a key of the past, likewise."""
    past_key_bytes: float = 0.0
    """Bytes per token of the past that all layers keep for backward; 0 with a kernel."""


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count what autograd saves within the block: each storage once -> its bytes, without the model's own tensors.

    What it frees again is taken off, so keep the block's results alive until you have read the counts.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    holders: Counter[int] = Counter()

    def pack(tensor: Tensor) -> Tensor | _Held:
        storage = tensor.untyped_storage()
        if storage._cdata in weights:
            return tensor
        kept[storage._cdata] = storage.nbytes()
        holders[storage._cdata] += 1
        # Detached, for an output that a function saves would hold that function, which then is never released.
        return _Held(tensor.detach(), storage._cdata, release)

    def release(address: int) -> None:
        holders[address] -= 1
        if not holders[address]:
            del kept[address]

    def unpack(packed: Tensor | _Held) -> Tensor:
        return packed.tensor if isinstance(packed, _Held) else packed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


class _Held:
    """A tensor that autograd keeps; it reports when it is released."""

    def __init__(self, tensor: Tensor, address: int, release: Callable[[int], None]) -> None:
        self.tensor, self._address, self._release = tensor, address, release

    def __del__(self) -> None:
        self._release(self._address)


def probe(model: Any, kernels: frozenset[str]) -> Probed | None:
    """Run a forward of a causal LM on the meta device, and return what it shows. The model is of no other use then.

    Attention keeps what a fused kernel keeps: queries, keys, values, output, and a float32 log-sum-exp per head and
    token.

    Args:
        kernels: packages whose kernels run the recurrent layers (`recurrent_functions.installed_kernels`).

    Returns:
        None if a forward needs numbers.

    Raises:
        UsageError: a forward of a model with recurrent layers fails, for which there are no formulas.
    """
    from transformers import AttentionInterface

    widen_float32_weights(model)
    if computes_own_attention(model.config):
        return _probe_own_attention(model, kernels)
    seen = _Attention()
    # It has no mask function, so transformers makes no mask, for which it would look at the numbers of positions.
    AttentionInterface.register(PROBE_ATTENTION, seen)
    if attention_heads(model.config):
        model.set_attn_implementation(PROBE_ATTENTION)
    _forget_padding(model)
    model.train()
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(PROBE_TOKENS, device="meta")[None]
    products = _Products()
    recurrent = None
    try:
        with (
            kept_for_backward(model) as kept,
            _kept_by_layers(model, kept) as of_layers,
            recurrent_functions_on_meta(model, kernels, kept) as recurrent,
            _grouped_products_of_any_dtype(),
            products,
        ):
            hidden = decoder_of(model)(input_ids=ids, position_ids=positions, use_cache=False)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if recurrent is None or not (recurrent.edge_bytes or recurrent.weights):
            return None  # there are formulas for models without recurrent layers
        raise UsageError(
            f"a model of type {model.config.model_type!r} cannot be planned: its sizes cannot be read off a forward "
            f"without numbers ({first_line(error)})\n"
            f"  another model.dtype may work: {', '.join(dtype.value for dtype in Dtype)}"
        ) from error
    if not seen.layers and not recurrent.edge_bytes:
        return None
    total = sum(kept.values())
    del hidden
    return Probed(
        attention=by_size(seen.layers),
        recurrent=recurrent.layers(PROBE_TOKENS),
        activation_bytes_per_token=total / PROBE_TOKENS,
        largest_layer_bytes_per_token=max(of_layers, default=0) / PROBE_TOKENS,
        product_bytes_per_token=(products.bytes + seen.bytes) / PROBE_TOKENS,
    )


def _forget_padding(model: Any) -> None:
    """Make the model look for no padding in the ids, which gpt2 does and warns of."""
    # Some configurations refuse None (modernbert-decoder).
    object.__setattr__(model.config.get_text_config(), "pad_token_id", None)


def _probe_own_attention(model: Any, kernels: frozenset[str]) -> Probed:
    """Run forwards of three lengths, which tell apart what grows with the tokens, with their square, and not at all.

    Behind a past, the keys of a layer are copies; without one, they may be views of a larger tensor. The forwards that
    keep more are counted. Others have a longer past, and show what its keys add.
    """
    _forget_padding(model)
    model.train()
    is_of_blocks = attends_to_blocks(model.config)
    few, past = (BLOCK_TOKENS, BLOCK_PAST) if is_of_blocks else (FEW_TOKENS, 0)
    run = functools.partial(_kept_of_length, model, kernels)
    with _fused_sdpa(), _grouped_products_of_any_dtype():
        in_long = [run(times * few, 0) for times in (1, 2, 3)]
        alone = in_long if is_of_blocks else [run(times * few, None) for times in (1, 2, 3)]
        # Beyond `past` tokens, a window hides what is added in front.
        before = [run(tokens, past).kept for tokens in (few, 2 * few)] if past else [each.kept for each in in_long[:2]]
        with_past = [run(times * few, past + few).kept - kept for times, kept in zip((1, 2), before, strict=True)]
    found = max(alone, in_long, key=lambda lengths: lengths[-1].kept)
    per_token, per_pair = _growth([each.kept for each in found], few)
    per_past_pair = max(0.0, (with_past[1] - with_past[0]) / few**2)
    recurrent = found[0].recurrent
    return Probed(
        attention=by_size(found[0].attention),
        recurrent=recurrent,
        activation_bytes_per_token=per_token,
        largest_layer_bytes_per_token=_growth([each.of_layer for each in found], few)[0],
        product_bytes_per_token=0.0,  # these models cannot keep products alone
        score_bytes=per_pair,
        past_score_bytes=per_past_pair,
        past_key_bytes=max(0.0, with_past[0] / few - per_past_pair * few),
    )


def _growth(kept: Sequence[int], few: int) -> tuple[float, float]:
    """Return the bytes per token and per pair of tokens, given those of one, two and three times `few` tokens.

    What does not grow is left out: tables that the model has anyway (gpt_neo's mask), and small casts of weights.
    """
    once, twice, thrice = kept
    per_pair = max(0.0, (thrice - 2 * twice + once) / (2 * few**2))
    return (twice - once) / few - 3 * few * per_pair, per_pair


@contextmanager
def _fused_sdpa() -> Iterator[None]:
    """Let torch's attention keep what its kernels keep, where it has one: for heads of one width, as many of keys as of
    queries, and a mask without gradient. There is always a mask, as in a chunk; each layer keeps one of numbers."""
    from transformers.masking_utils import AttentionMaskInterface

    plain, masks = nn.functional.scaled_dot_product_attention, AttentionMaskInterface._global_mapping
    make_mask = masks["sdpa"]

    def always(*args: Any, **options: Any) -> Any:
        return make_mask(*args, **{**options, "allow_is_causal_skip": False})

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **more: Any
    ) -> Tensor:
        if attn_mask is None or attn_mask.dtype is torch.bool:
            attn_mask = query.new_empty(1, 1, query.shape[-2], key.shape[-2])
        has_kernel = value.shape[-1] == key.shape[-1] and key.shape[1] == query.shape[1] and not attn_mask.requires_grad
        if not has_kernel:
            return plain(query, key, value, attn_mask, *args, **{**more, "is_causal": False})
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        output = torch.empty_like(query)
        saved = [query, key, value, output, log_sum_exp, attn_mask]
        fused_output: Tensor = KernelOnMeta.apply(output, saved, query, key, value)
        return fused_output

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", fused), mock.patch.dict(masks, sdpa=always):
        yield


class _Kept(NamedTuple):
    """What a forward of a model that computes attention itself keeps for backward."""

    kept: int
    """Bytes, all together."""
    of_layer: int
    """Bytes of the layer that keeps the most."""
    attention: list[AttentionLayers]
    recurrent: RecurrentLayers


def _kept_of_length(model: Any, kernels: frozenset[str], tokens: int, past: int | None) -> _Kept:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    run = functools.partial(
        decoder_of(model), input_ids=ids, position_ids=torch.arange(tokens, device="meta")[None] + (past or 0),
        use_cache=False,
    )  # fmt: skip
    with (
        kept_for_backward(model) as kept,
        _kept_by_layers(model, kept) as of_layers,
        recurrent_functions_on_meta(model, kernels, kept) as tally,
    ):
        if attends_to_blocks(model.config):
            with attention_to_blocks_on_meta(model, past or 0) as found:
                hidden = run(attention_mask=NO_MASKS)
            recurrent, layers = tally.layers(tokens, found.edge_bytes, found.incomplete), found.layers
        else:
            cache = _Cache(model.config.get_text_config(), past)
            hidden = run(past_key_values=cache)
            recurrent, layers = tally.layers(tokens), cache.layers
    found_kept = _Kept(sum(kept.values()), max(of_layers, default=0), layers, recurrent)
    del hidden
    return found_kept


class _Cache(KeyCache):
    """A cache that remembers the sizes of what each layer hands to it. If there can be a past, it returns copies."""

    def __init__(self, config: Any, past: int | None) -> None:
        super().__init__(past or 0)
        self._copies = past is not None
        self._config = config
        self.layers: list[AttentionLayers] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        is_mixed = getattr(self._config, "is_heterogeneous", False)  # dots3_note
        config = self._config.per_layer_config[layer_idx] if is_mixed else self._config
        kinds = getattr(config, "layer_types", None) or ()
        is_sliding = layer_idx < len(kinds) and kinds[layer_idx] == "hybrid_sliding"  # inkling
        heads = int(config.swa_num_attention_heads if is_sliding else config.num_attention_heads)
        self.layers.append(AttentionLayers(1, heads, keys.shape[1], keys.shape[3], values.shape[3]))
        if not self._copies:
            return keys, values
        both = (torch.cat([t.new_empty(*t.shape[:2], self._past, t.shape[3]), t], 2) for t in (keys, values))
        keys, values = both
        return keys, values

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        self.layers.append(AttentionLayers(1, 1, 1, keys.shape[2], 0, has_gradients=False))
        return torch.cat([keys.new_empty(len(keys), self._past, keys.shape[2]), keys], 1)


@contextmanager
def _grouped_products_of_any_dtype() -> Iterator[None]:
    """Run experts by an operator of transformers, for torch's own takes only bfloat16 on the meta device."""
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before


@contextmanager
def _kept_by_layers(model: nn.Module, kept: dict[int, int]) -> Iterator[list[int]]:
    """Count what each layer adds to `kept` within the block. A layer is what activation checkpointing runs again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    before: list[int] = []
    of_layers: list[int] = []
    handles = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            handles += [
                layer.register_forward_pre_hook(lambda *_: before.append(sum(kept.values()))),
                layer.register_forward_hook(lambda *_: of_layers.append(sum(kept.values()) - before.pop())),
            ]
    try:
        yield of_layers
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):
    """Counts the bytes of the results that selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in COSTLY:
            self.bytes += result.nbytes
        return result


class _Attention:
    """A fused attention kernel without numbers, as transformers calls it; it remembers the sizes of each layer."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayers] = []
        self.bytes = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        sliding_window: Any = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        layer, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
        block = None if layer is None else block_of(config, layer)
        self.layers.append(
            AttentionLayers(
                1, query.shape[1], key.shape[1], key.shape[3], value.shape[3],
                window=sliding_window, block=block, owns_keys=not getattr(module, "is_kv_shared_layer", False),
            )
        )  # fmt: skip
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        self.bytes += output.nbytes + log_sum_exp.nbytes
        output = KernelOnMeta.apply(output, [query, key, value, output, log_sum_exp], query, key, value)
        return output.transpose(1, 2).contiguous(), None  # (batch, tokens, heads, value_dim); some models take a view
