"""Access the names of DeepSpeed that its documentation does not promise. No other module uses them.

Such a name may change with any release. So `pyproject.toml` bounds DeepSpeed's version, and
`tests/engine/test_internals.py` lists the names and checks that the installed DeepSpeed still has each of them.

An `engine` here is DeepSpeed's own; an `optimizer` is the wrapper that it keeps as `engine.optimizer`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils import _python_dispatch
from torch.utils import checkpoint as torch_checkpoint

SELECTIVE_MODES = (torch_checkpoint._CachingTorchDispatchMode, torch_checkpoint._CachedTorchDispatchMode)
"""The modes in which torch runs a forward and a recompute of selective activation checkpointing."""
TRIED = "0.19.8"
"""The version of DeepSpeed whose sources these names were read in, and that the tests ran with."""


def turn_off_shared_memory_collectives() -> None:
    """Make DeepSpeed use gloo between CPUs.

    Its own collectives are compiled on every start, and a killed build leaves a lock for which the next start waits
    without end. No setting turns them off.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_all_groups_wait(patience: timedelta) -> None:
    """Let operations of process groups that name no timeout of their own wait that long.

    DeepSpeed names none for the groups in which it sums gradients. torch would end a rank that waits in one of them for
    10 minutes (NCCL) or 30 (gloo).
    """
    distributed_c10d.default_pg_timeout = patience
    distributed_c10d.default_pg_nccl_timeout = patience  # type: ignore[attr-defined]


def add_bias_within_products() -> None:
    """Make the linear layers that DeepSpeed exchanges under ZeRO-3 add a bias within the product, not to its result.

    Selective activation checkpointing keeps results of products and takes them again in the recompute. A bias that was
    added to such a result, in place, would then be in it twice.
    """
    from deepspeed.runtime.zero import linear

    if nn.functional.linear is linear.zero3_linear_wrap:
        nn.functional.linear = _linear_of_rows


def give_linear_back() -> None:
    """Undo what ZeRO-3 does to torch for the rest of the process, if it has.

    Its linear layers keep their input for backward even where weights are frozen. A later run of the process, as in a
    sweep, would take more memory than it needs and than is planned.
    """
    if partitioning := sys.modules.get("deepspeed.runtime.zero.partition_parameters"):
        own = nn.functional.linear
        nn.functional.linear = getattr(partitioning.InsertPostInitMethodToModuleSubClasses, "linear_bk", own)


def _linear_of_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return DeepSpeed's product, (..., in) -> (..., out). Of a matrix it adds the bias within the product."""
    from deepspeed.runtime.zero import linear

    rows = linear.zero3_linear_wrap(input.reshape(-1, input.shape[-1]), weight, bias)
    # As torch's own linear layer does: a model may change what it gets in place (llama4).
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, (*input.shape[:-1], rows.shape[-1]))
    return shaped


# Backward


def hide_moves_from_checkpointing() -> None:
    """Run the hooks of ZeRO-3 before and after a layer outside of selective activation checkpointing.

    It counts every operation of a forward and expects the same ones in the recompute, but which weights are gathered,
    kept or freed differs between the two.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    for name in ("fetch_sub_module", "release_sub_module"):
        method = getattr(Coordinator, name)
        if method.__module__ != __name__:  # not exchanged yet
            setattr(Coordinator, name, _hidden(method))


def _hidden(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with without_selective_modes():
            return method(*arguments, **keywords)

    return run


@contextlib.contextmanager
def without_selective_modes() -> Iterator[None]:
    """Take torch's modes of selective checkpointing off the stack within the block, and leave the others on it."""
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    kept = [mode for mode in modes if not isinstance(mode, SELECTIVE_MODES)]
    if len(kept) == len(modes):
        yield
        return
    for _ in modes:
        _python_dispatch._pop_mode()
    for mode in kept:
        _python_dispatch._push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            _python_dispatch._pop_mode()
        for mode in modes:
            _python_dispatch._push_mode(mode)


@contextlib.contextmanager
def unknown_to_zero_3(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let an engine that begins in the block not gather weights at calls of these modules, and of those inside them.

    Leaf modules, DeepSpeed's own way, reduce their gradients once per call and not once per backward.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload as Offload

    register, unknown = Offload._register_deepspeed_module, set(modules)

    def register_others(offload: Any, module: nn.Module, *args: Any, **options: Any) -> None:
        if module not in unknown:
            register(offload, module, *args, **options)

    with mock.patch.object(Offload, "_register_deepspeed_module", register_others):
        yield


def is_in_backward() -> bool:
    """Return whether autograd runs at present: a forward is then a recompute of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def is_empty(parameter: Any) -> bool:
    """Return whether a parameter that ZeRO-3 has divided is not gathered at present."""
    return bool(parameter.ds_status.name == "NOT_AVAILABLE")


def begin_backward(optimizer: Any) -> None:
    """Tell a ZeRO optimizer that another backward begins.

    DeepSpeed does so in its own forward only, and two backwards without a forward between them would lose gradients.
    """
    optimizer.clear_backward_seen_flag()


@contextlib.contextmanager
def without_reduction(engine: Any) -> Iterator[None]:
    """Run backwards of the block without DeepSpeed's hooks, which would reduce the gradients after each of them.

    `engine.no_sync()` does not do this for `torch.autograd.backward`, and `engine.backward` takes only a loss.
    """
    engine._running_engine_backward = True
    try:
        yield
    finally:
        engine._running_engine_backward = False


def is_bf16_optimizer(optimizer: Any) -> bool:
    """Return whether `optimizer` is the one of bfloat16 with ZeRO-1, which sums gradients in float32 buffers."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(optimizer, BF16_Optimizer)


def is_zero_optimizer(optimizer: Any) -> bool:
    """Return whether `optimizer` is the one of ZeRO-1 and 2 that sums gradients in the data type of the weights."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return isinstance(optimizer, DeepSpeedZeroOptimizer)


def move_gradients_to_float32(bf16_optimizer: Any) -> None:
    """Add the parameters' gradients to the float32 sums and zero them; DeepSpeed does so in its own backward only."""
    bf16_optimizer.update_hp_grads(clear_lp_grads=True)


def mark_all_gradients_present(bf16_optimizer: Any) -> None:
    """Count the gradients of all parameters in the norm, those that this rank has not touched included.

    The optimizer leaves these out, though other ranks may have touched them. Their float32 sums begin at zero.
    """
    for present in bf16_optimizer.fp32_groups_has_gradients:
        present[:] = [True] * len(present)


def add_missing_gradient(optimizer: Any, parameter: Any) -> None:
    """Give zeros to a parameter without a gradient.

    ZeRO-1 with bfloat16 weights and the optimizer on the host moves each gradient to `grad_accum`, in float32, and
    reduces what is there; the other optimizers reduce `.grad`.
    """
    if not getattr(optimizer, "use_grad_accum_attribute", False):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad_accum is None:
        parameter.grad_accum = torch.zeros_like(parameter, dtype=torch.float32)


# Pipeline


def pipeline_group(pipeline: Any) -> torch.distributed.ProcessGroup:
    """Return the group of the ranks that hold the stages of this process's pipeline, made by a `PipelineModule`."""
    group: torch.distributed.ProcessGroup = pipeline.mpu().get_pipe_parallel_group()
    return group


def replica_group(pipeline: Any) -> torch.distributed.ProcessGroup:
    """Return the group of the ranks that hold the same stage as this process, made by a `PipelineModule`."""
    group: torch.distributed.ProcessGroup = pipeline.mpu().get_data_parallel_group()
    return group


def sum_tied_gradients(pipeline: Any, weight: nn.Parameter, group: Any, *, counts_in_norm: bool) -> None:
    """Make a `PipelineModule` sum the gradient of a weight of which the stages of a group hold copies.

    The gradient norm counts one of them. The documented way, `TiedLayerSpec`, builds the tied layers itself; here each
    stage comes with them.
    """
    pipeline.get_tied_weights_and_groups = lambda: [(weight, group)]
    weight.ds_pipe_replicated = not counts_in_norm  # type: ignore[attr-defined]


def sum_norm_once(optimizer: Any, group: Any) -> None:
    """Make ZeRO-1 sum the gradient norm over the stages of a pipeline once in a step.

    By itself it does so once for each group of parameters. But stages may have different groups: one may hold no
    matrix, or no weight with a learning rate of its own. Their sums would then wait for each other forever.
    """
    norm_of_stage, sum_over_stages = optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            norm: Tensor = norm_of_stage(norm_type)
        finally:
            optimizer._model_parallel_all_reduce = sum_over_stages
        squares = norm.double().square()
        torch.distributed.all_reduce(squares, group=group)
        return squares.sqrt().to(norm.dtype)

    optimizer.scaled_global_norm = scaled_global_norm


def reduce_gradients(engine: Any) -> None:
    """Sum gradients over tied copies and average them over the replicas of a stage, as `train_batch` ends.

    `train_batch` itself runs DeepSpeed's schedule, and a pipeline engine refuses `step()`.
    """
    engine._exec_reduce_tied_grads()
    engine._exec_reduce_grads()


def update_weights(engine: Any) -> None:
    """Step the optimizer of a pipeline engine and forget the gradients, as `train_batch` ends."""
    engine._exec_optimizer_step()


# Weights and optimizer states


def is_divided(tensor: Tensor) -> bool:
    """Return whether ZeRO-3 has divided a parameter among the ranks."""
    return hasattr(tensor, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole parameter; one that ZeRO-3 has divided is empty between two forwards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def kept_numbers(engine: Any, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    """Return which numbers of a trained parameter this process keeps, and where; None if it keeps none.

    `partitions` describes the layouts. `safe_get_local_*` copies numbers but does not say which ones, and does not know
    ZeRO-0.

    Returns:
        The first number's index in the flattened parameter, the count of numbers, the tensor that the optimizer steps,
        and the first number's index in that tensor, flattened.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return 0, parameter.numel(), parameter, 0
    if stage == 3:
        group, offset, share = optimizer.grad_position[parameter.ds_id]
        start = share * optimizer._get_param_partition_rank(parameter)
        return start, min(share, parameter.ds_numel - start), optimizer.fp32_partitioned_groups_flat[group], offset
    mapping = parameter._hp_mapping
    if mapping is None:  # other ranks keep it
        return None
    (stepped,) = optimizer.param_groups[mapping.param_group_index]["params"]
    inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
    return inside.start, inside.numel, stepped, outside.start


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Copy float32 master weights into the model's weights, by the calls that end a step. Every rank calls it.

    The only public way to these calls is a step, or loading a checkpoint in DeepSpeed's own format.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # releases the small weights, which stay gathered
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # the states are now other tensors
