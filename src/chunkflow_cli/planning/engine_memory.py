"""Predict what DeepSpeed keeps of weights, gradients and optimizer states, on the device and on the host.

Read in the sources of DeepSpeed 0.19.8, and counted on its own path by `tests/engine/test_engine_memory.py`. What each
ZeRO stage divides is in Rajbhandari et al. 2020, arXiv 1910.02054, section 5. What their table leaves out decides
whether a model fits: gradients are summed in float32 next to those of a chunk, sums over ranks go through buffers, and
the optimizer step has buffers of its own. Below, N and T are the numbers of all and of trained weights, n the ranks
that divide them, b the bytes of an element.

| class of DeepSpeed | runs | on the device in backwards, in addition to b N of weights |
|---|---|---|
| none | ZeRO-0 | 4 T of gradients, the optimizer's states |
| `BF16_Optimizer` | ZeRO-1 in bfloat16 | 4 T + 2 T of gradients, 4 T / n of master weights, states / n |
| `stage_1_and_2` | ZeRO-1 and 2 in float32 | 4 T of gradients, 4 T / n of master weights, states / n |
| `stage_1_and_2` | ... with the optimizer on the host | 4 T of gradients |
| `stage3` | ZeRO-3 | all of it divided by n, and the weights that are gathered |
| `stage3` | ... and a module's weights gathered together | and in its backward, all gradients of that module |
| `stage3` | ... with the optimizer on the host | weights / n, and those that are gathered |
| `stage3` | ... with the weights on the host as well | the gathered weights |
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkflow_cli.planning.memory_settings import MemorySettings

NORM_PIECE = 250_000_000
"""Numbers of a gradient that ZeRO-3 turns into float64 at once for its norm (`stage3._constant_buffered_norm2`)."""
BYTES_OF_NORM = 8
"""DeepSpeed computes norms in float64 (`zero.utils.get_norm_dtype`), of a copy of each gradient."""


@dataclass(frozen=True)
class HeldWeights:
    """Numbers of weights on a rank before ZeRO divides them."""

    all: int
    trained: int
    largest: int
    """Of the largest weight."""
    largest_trained: int
    """Of the largest trained weight: its gradient is reduced alone if it is larger than a bucket."""
    spared_bytes: int = 0
    """Bytes that quantized weights take less than in the model's data type."""
    gathered_together: int = 0
    """Most weights in modules of a layer that ZeRO-3 gathers at once on several ranks (`engine.gathered_modules`)."""

    def bytes_in(self, element_bytes: int) -> int:
        """Return the bytes of all weights, of which those that are not quantized have elements of that size."""
        return self.all * element_bytes - self.spared_bytes


@dataclass(frozen=True)
class EngineBytes:
    """Bytes that DeepSpeed keeps on a rank."""

    weights: int
    """In the data type of the model; with ZeRO-3, a rank's share and what is gathered."""
    gradients: int
    """Of the chunk that goes backward, and their sum over the step, as long as activations are kept."""
    optimizer: int
    """Master weights and the optimizer's states."""
    reduced: int
    """For a moment in a backward, while one gradient is summed over ranks."""
    at_step: int
    """All on the device at the fullest moment of the optimizer step, when no activations are left."""
    host: int


def engine_bytes(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Predict the bytes of one rank."""
    if settings.zero_stage == 3:
        return _stage_3(weights, settings)
    if settings.zero_stage == 0:
        return _stage_0(weights, settings)
    if settings.offload != "none":
        return _stage_1_and_2_on_host(weights, settings)
    if settings.element_bytes == 2:
        return _bf16_optimizer(weights, settings)
    return _stage_1_and_2(weights, settings)


def _optimizer_bytes(numbers: int, settings: MemorySettings) -> int:
    """Return the bytes of the float32 master weights and of the optimizer's states of some weights."""
    return int(numbers * 4 * (1 + settings.optimizer_states))


def _stage_0(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Count without ZeRO: the optimizer steps the weights themselves, so there are no master weights."""
    own = weights.bytes_in(settings.element_bytes)
    gradients = weights.trained * max(4, settings.element_bytes)
    optimizer = int(weights.trained * 4 * settings.optimizer_states)
    copied = 4 * min(weights.trained, settings.buffers.whole)  # engine.allreduce_bucket flattens
    return EngineBytes(own, gradients, optimizer, 0, own + gradients + optimizer + copied, 0)


def _bf16_optimizer(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Count `BF16_Optimizer`: every rank holds the float32 sums of all weights, next to `.grad` in bfloat16."""
    own, trained = weights.bytes_in(settings.element_bytes), weights.trained
    gradients = trained * (4 + settings.element_bytes)
    optimizer = _optimizer_bytes(_share(trained, settings), settings)
    # Two flat tensors are summed, of matrices and of the rest: if they fit one buffer together, they are copied.
    copied = 4 * trained if trained <= settings.buffers.whole else 0
    step = max(copied, 4 * weights.largest_trained)  # _update_hp_grad turns a gradient into float32
    return EngineBytes(own, gradients, optimizer, 0, own + gradients + optimizer + step, 0)


def _stage_1_and_2(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Count whole gradients until the step: ZeRO-2 is told to sum them over ranks only then."""
    own, share = weights.bytes_in(settings.element_bytes), _share(weights.trained, settings)
    bucket = 4 * settings.buffers.reduce  # setup_buckets, from the first backward to the step
    gradients = weights.trained * 4 + bucket
    optimizer = _optimizer_bytes(share, settings)
    # The rank's own gradients move to `grads_in_partition`; with several ranks, a bucket is flattened to be summed.
    step = 4 * share + (bucket if settings.data_parallel > 1 else 0)
    return EngineBytes(own, gradients, optimizer, 0, own + gradients + optimizer + step, 0)


def _stage_1_and_2_on_host(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Count with the optimizer on the host: gradients are still summed on the device.

    In bfloat16 they are summed in `grad_accum`, in float32, and at the step over ranks into a flat float32 partition.
    """
    b, share = settings.element_bytes, _share(weights.trained, settings)
    is_bfloat16 = b == 2
    own = weights.bytes_in(b) + b * weights.largest_trained  # temp_grad_buffer_for_gpu_offload
    bucket = 4 * settings.buffers.reduce
    gradients = weights.trained * 4 + bucket
    step = 4 * share if is_bfloat16 else 0
    step += max(BYTES_OF_NORM * weights.largest_trained, bucket if settings.data_parallel > 1 else 0)
    host = _pinned(4 * share) + int(4 * settings.optimizer_states * share)  # master weights and states
    host += _pinned(4 * share) + _pinned(b * share) + _pinned(b * weights.largest_trained)  # gradients, copies
    reduced = (b + 4) * weights.largest_trained if is_bfloat16 else 0
    return EngineBytes(own, gradients, 0, reduced, own + gradients + step, host)


def _stage_3(weights: HeldWeights, settings: MemorySettings) -> EngineBytes:
    """Count ZeRO-3: gradients are summed over ranks as they come, so that whole ones exist for a moment only."""
    b, buffers = settings.element_bytes, settings.buffers
    share, largest = _share(weights.trained, settings), weights.largest_trained
    together = weights.gathered_together if settings.data_parallel > 1 else 0
    is_on_host = settings.offload != "none"
    own = 0 if settings.offload == "parameters" else _share(weights.bytes_in(b), settings)
    gathered = 0
    if settings.data_parallel > 1 or not own:  # one rank takes a view of what it has
        gathered = b * min(weights.all, buffers.gathered + max(weights.largest, together))
    optimizer = 0 if is_on_host else _optimizer_bytes(share, settings)
    bucket = 4 * buffers.reduce
    gradients = bucket + (0 if is_on_host else 4 * share)
    # __avg_scatter_grads: a gradient, its float32 copy, and the copy that is scattered.
    alone = largest * (b + (4 if b == 2 else 0) + (4 if settings.data_parallel > 1 else 0))
    reduced = max(alone, bucket + b * largest)
    reduced += b * max(0, min(together, weights.trained) - largest)  # all of the module are complete at its end
    at_step = own + optimizer + gradients
    if is_on_host:
        of_largest = _share(largest, settings)
        reduced += 4 * of_largest  # partition_grads fetches the sum, adds, and sends it back
        at_step += 4 * of_largest + BYTES_OF_NORM * min(of_largest, NORM_PIECE)
    else:  # _prepare_fp32_grad_for_sub_group flattens
        at_step += 4 * min(share, buffers.sub_group + _share(largest, settings))
    return EngineBytes(own + gathered, gradients, optimizer, reduced, at_step, _host_of_stage_3(weights, settings))


def _host_of_stage_3(weights: HeldWeights, settings: MemorySettings) -> int:
    if settings.offload == "none":
        return 0
    share = _share(weights.trained, settings)
    groups, rest = divmod(share, max(1, settings.buffers.sub_group))
    gradients = groups * _pinned(4 * settings.buffers.sub_group) + _pinned(4 * rest)  # of the sub-groups, for the step
    gradients += _pinned(4 * share)  # grad_partitions_flat_buffer, the sums
    host = _optimizer_bytes(share, settings) + gradients
    if settings.offload == "parameters":  # each frozen weight is pinned by itself
        host += settings.element_bytes * (_share(weights.all, settings) - share) + _pinned(
            settings.element_bytes * share
        )
    return host


def _share(numbers: int, settings: MemorySettings) -> int:
    return -(-numbers // settings.data_parallel)


def _pinned(size: int) -> int:
    """Return the bytes that torch takes for page-locked memory: the next power of two (`CachingHostAllocator.h`)."""
    return 1 << (size - 1).bit_length() if size else 0
