"""The training engine: the only place that imports deepspeed.

It knows nothing of chunks. A step is any number of forwards and backwards, then `step()`. DeepSpeed's own counting of
micro-steps is turned off: `gradient_accumulation_steps` stays 1 and the step is where we say it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.config import Dtype, EngineConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.errors import RunError, UsageError

TAG = "engine"
"""Name of the engine's folder within a checkpoint."""


@dataclass(frozen=True)
class EngineSettings:
    engine: EngineConfig
    optim: OptimConfig
    dtype: Dtype
    device: torch.device


def check_settings(settings: EngineSettings) -> None:
    """Refuse combinations that DeepSpeed would run wrongly or not at all.

    Raises:
        UsageError: names the key and what to set instead.
    """
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    if settings.dtype is Dtype.float64:
        raise UsageError("model.dtype=float64 is for `chunkflow verify`: DeepSpeed trains in bfloat16 or float32")
    if stage in (0, 2) and settings.dtype is Dtype.bfloat16:  # 257 gradients 1, 2^-9, 2^-9... sum to 1.0 there, not 1.5
        raise UsageError(
            f"engine.zero_stage={stage} would add up the gradients of all chunks in bfloat16 and lose the small ones\n"
            "  take engine.zero_stage=1 or 3, which add them up in float32"
        )
    if offload is not Offload.none and settings.device.type == "cpu":
        raise UsageError(
            f"engine.offload={offload.value} moves data from a GPU to the host, and this machine has no GPU"
        )
    if offload is Offload.optimizer and stage not in (1, 2, 3):
        raise UsageError(f"engine.offload=optimizer needs engine.zero_stage=1, 2 or 3, not {stage}")
    if offload is Offload.parameters and stage != 3:
        raise UsageError(f"engine.offload=parameters needs engine.zero_stage=3, not {stage}")


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ours, with `engine.deepspeed` merged over it."""
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 50_000_000}
    if offload is not Offload.none:
        zero["offload_optimizer"] = host
    if offload is Offload.parameters:
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optim.grad_clip,
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if settings.dtype is Dtype.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # or the float32 sum is rounded to bfloat16 before it is used
    if stage in (0, 1):
        config["managed_gradient_accumulation"] = False
    return _merge(config, settings.engine.deepspeed)


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class Engine:
    """A DeepSpeed engine around a module whose forward returns a scalar loss.

    The loss must already be normalised over the whole step: gradients of all backwards are summed.
    """

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        check_settings(settings)
        deepspeed = _import_deepspeed()
        _init_process_group(deepspeed, settings.device)
        self._stage = settings.engine.zero_stage
        self._clip = settings.optim.grad_clip
        with _quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=_optimizer(module, settings),
                config=deepspeed_config(settings),
            )
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self._averaged_over = self._engine.dp_world_size
        self._coalescing: AbstractContextManager[Any] | None = None

    @property
    def needs_joined_retained_chunks(self) -> bool:
        """ZeRO-3 traces one forward for one backward: the retained chunks of a sequence must share a call."""
        return self._stage == 3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._stage == 2 and self._coalescing is None:
            # ZeRO-2 otherwise keeps the gradient of the last backward only.
            self._coalescing = self._engine.coalesce_grad_reduction()
            self._coalescing.__enter__()
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if self._stage >= 1:  # two backwards with no forward between them would lose gradients
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss * self._averaged_over, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update the weights and forget the gradients; returns the gradient norm before clipping."""
        self._close_coalescing()
        norm = None
        if self._stage == 0:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm is {norm}: the weights of this step are spoilt and are not saved")
        return norm

    def discard_gradients(self) -> None:
        """Forget what an interrupted step has accumulated."""
        self._close_coalescing()
        self._engine.zero_grad()
        if self._stage >= 1:
            self._engine.optimizer.zero_grad()

    def _close_coalescing(self) -> None:
        if self._coalescing is not None:
            self._coalescing.__exit__(None, None, None)
            self._coalescing = None

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Within it, the module's parameters are whole on every rank, whatever the ZeRO stage."""
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def save(self, folder: Path) -> None:
        """Weights and optimizer state into `folder`, which need not exist."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, exact to the bit."""
        with _quiet():
            path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise RunError(f"{folder} holds no complete engine state")


def close_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _optimizer(module: nn.Module, settings: EngineSettings) -> torch.optim.Optimizer:
    """Weight decay is for matrices; norms and biases have none, as in the Hugging Face trainer."""
    optim = settings.optim
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    betas = (optim.betas[0], optim.betas[1])
    if settings.engine.offload is not Offload.none:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=betas, eps=optim.eps, adamw_mode=True)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed
        import deepspeed.ops

        # Its shared-memory collectives would be compiled on every start, and a killed build leaves a lock that the
        # next start waits for without end. gloo and NCCL do without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _init_process_group(deepspeed: Any, device: torch.device) -> None:
    if torch.distributed.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("this version trains in one process: start it without torchrun or the deepspeed launcher")
    # Without all of these DeepSpeed looks for MPI.
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in single.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = str(_free_port())
    with _quiet():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints and warns while it starts and saves; none of it tells a user anything. Errors still raise."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
