"""The undocumented names of DeepSpeed that the engine uses: each exists, and only one file uses them."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli import engine
from chunkflow_cli.engine import import_deepspeed, internals

NAMES = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.base_optimizer:ZeROOptimizer": ("clear_backward_seen_flag",),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer": (
        "_hp_optimizer_states_linked", "fp32_groups_has_gradients", "update_hp_grads", "update_lp_params",
    ),
    "deepspeed.runtime.engine:DeepSpeedEngine": ("_running_engine_backward",),
    "deepspeed.runtime.pipe.engine:PipelineEngine": (
        "_exec_optimizer_step", "_exec_reduce_grads", "_exec_reduce_tied_grads",
    ),
    "deepspeed.runtime.pipe.module:PipelineModule": ("ds_pipe_replicated", "get_tied_weights_and_groups", "mpu"),
    "deepspeed.runtime.pipe.topology:PipelineParallelGrid": ("get_data_parallel_group", "get_pipe_parallel_group"),
    "deepspeed.runtime.zero.linear": ("zero3_linear_wrap",),
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload": ("_register_deepspeed_module",),
    "deepspeed.runtime.zero.partition_parameters": (
        "InsertPostInitMethodToModuleSubClasses", "ds_id", "ds_numel", "ds_shape", "ds_status",
    ),
    "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses": ("linear_bk",),
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator": (
        "fetch_sub_module", "release_sub_module",
    ),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        "_hp_optimizer_states_linked", "_model_parallel_all_reduce", "grad_accum", "scaled_global_norm",
        "update_lp_params",
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        "_get_param_partition_rank", "_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_epilogue",
        "checkpoint_event_prologue", "fp16_groups", "fp32_partitioned_groups_flat", "grad_position",
    ),
    "torch": ("_C",),
    "torch._C": ("_current_graph_task_id",),
    "torch:ops.aten": ("_unsafe_view",),
    "torch.utils._python_dispatch": ("_get_current_dispatch_mode_stack", "_pop_mode", "_push_mode"),
    "torch.utils.checkpoint": ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode"),
    "deepspeed.utils.mixed_precision_linkage": ("_hp_mapping",),
    "deepspeed.utils.tensor_fragment:tensor_fragment": (
        "hp_fragment_address", "lp_fragment_address", "param_group_index",
    ),
}  # fmt: skip
"""Class or module of DeepSpeed -> the names that it defines and `engine.internals` uses."""

ROOM = Path(engine.__file__).parent


def attributes(tree: ast.AST) -> set[str]:
    """Return the names that are used as an attribute of anything but `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def defines(owner: Any, name: str) -> bool:
    """Return whether a class or module has a name, or its code sets an attribute of that name."""
    if hasattr(owner, name):
        return True
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return any(
        (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name)
        or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name)
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("owner", NAMES)
def test_deepspeed_has_every_name(owner: str) -> None:
    deepspeed = import_deepspeed()
    found = pkgutil.resolve_name(owner)
    missing = [name for name in NAMES[owner] if not defines(found, name)]
    assert missing == [], (
        f"{owner} has no {', '.join(missing)} in DeepSpeed {deepspeed.__version__}; engine/internals.py was written "
        f"for {internals.TRIED}: read that version's sources, adapt internals.py, and run tests/engine, "
        "tests/training/test_checkpoint.py and tests/training/test_layouts.py"
    )


def test_the_check_sees_a_missing_name() -> None:
    import_deepspeed()
    assert not defines(pkgutil.resolve_name("deepspeed.runtime.engine:DeepSpeedEngine"), "no_such_name")


def test_the_collectives_that_are_turned_off_exist() -> None:
    import_deepspeed()
    assert "deepspeed_shm_comm" in pkgutil.resolve_name("deepspeed.ops.op_builder.all_ops:ALL_OPS")


def test_groups_without_a_timeout_of_their_own_wait_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default would end a rank whose neighbor computes on a long sample for 10 minutes."""
    from torch.distributed import Backend, distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    internals.make_all_groups_wait(timedelta(days=7))
    for backend in ("nccl", "gloo"):
        assert distributed_c10d._get_default_timeout(Backend(backend)) == timedelta(days=7)


def test_only_one_file_uses_them() -> None:
    listed = {name for names in NAMES.values() for name in names}
    for path in ROOM.rglob("*.py"):
        used = attributes(ast.parse(path.read_text(encoding="utf-8")))
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        if path.name == "internals.py":
            # These are asked for by hasattr and getattr.
            assert listed - used == {"ds_shape", "fetch_sub_module", "linear_bk", "release_sub_module"}
            assert private <= listed
        else:
            assert not private, path.name
            assert not used & listed, path.name


def test_the_keys_that_are_passed_on_are_deepspeeds() -> None:
    """DeepSpeed takes unknown keys in silence, so a renamed one would be without effect."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from chunkflow_cli.config.deepspeed_keys import KEYS

    fields = DeepSpeedZeroConfig.model_fields
    names = set(fields) | {str(field.alias) for field in fields.values()}
    assert set(KEYS["zero_optimization"]) <= names
    assert set(KEYS["comms_logger"]) <= set(CommsLoggerConfig.model_fields)
    assert {constants.DUMP_STATE, constants.MEMORY_BREAKDOWN} == {"dump_state", "memory_breakdown"}
