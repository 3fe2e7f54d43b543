"""One optimizer step of `train` on every engine setting, against the loop that everybody writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from safetensors.torch import load_file

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config
from chunkflow_cli.engine import close_process_group, init_process_group
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.training import train
from chunkflow_cli.training.inputs import load_run_data
from common import PlainTraining
from gpu_proof.cases import Case
from gpu_proof.models import model_folder, write_samples
from gpu_proof.rows import Values, attempt
from gpu_proof.training import Place, free_memory, run_words, words_of_state

LEARNING_RATE, EPS = 0.02, 1e-3
"""A large rate: the change is then as large as the weights, and rounding them to bfloat16 hides little of it. A large
eps: with a small one the first step of AdamW depends on the sign of each gradient, so on rounding."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
LOSS_TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}
Weights = dict[str, torch.Tensor]


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    settle_vector_math()
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = cache(partial(_plain_step, place))  # one for each data type
    for case in cases:
        free_memory()
        if "group" in case.facts:
            yield attempt(partial(_sum_over_group, case.facts["group"]), may_be_refused=False)
        else:
            yield attempt(partial(_compared, case.facts, place, plain), may_be_refused=place.dry)


def _sum_over_group(backend: str) -> Values:
    """Sum a number over a group of one rank, as DeepSpeed starts it."""
    began, device = time.perf_counter(), training_device()
    try:
        init_process_group(device)
        number = torch.ones(1, device=device)
        torch.distributed.all_reduce(number)
        found = torch.distributed.get_backend()
    finally:
        close_process_group()
    failed = found != backend or float(number) != 1.0
    return {"seconds": time.perf_counter() - began, **({"failed": f"{found}, sum {float(number)}"} if failed else {})}


def _compared(facts: dict[str, Any], place: Place, plain: Any) -> Values:
    before, expected, plain_loss = plain(facts["dtype"])
    name = "-".join(map(str, facts.values()))
    words = [
        *_words(place, name, facts["dtype"]), *words_of_state(facts["state"]),
        f"engine.zero_stage={facts['stage']}", f"engine.offload={facts['offload']}",
    ]  # fmt: skip
    began = time.perf_counter()
    report = train.run(load(words), json_output=True)
    seconds = time.perf_counter() - began
    weights = load_file(place.work / name / "final" / "model.safetensors")
    values = {
        "loss_error": abs(report["loss_first"] / plain_loss - 1),
        "update_error": _relative_error(before, weights, expected),
        "seconds": seconds,
    }
    limits = {"loss_error": LOSS_TOLERANCES[facts["dtype"]], "update_error": TOLERANCES[facts["dtype"]]}
    over = [
        f"{key} is {values[key]:.1e}, over {limit:.0e}" for key, limit in limits.items() if not values[key] <= limit
    ]
    return {**values, **({"failed": "; ".join(over)} if over else {})}


def _words(place: Place, name: str, dtype: str) -> list[str]:
    lengths, size = ((90, 20, 30), 32) if place.dry else ((3000, 300, 90), 512)
    path = place.work / "steps.jsonl"
    if not path.exists():
        write_samples(path, list(lengths), 256, target_share=0.6)
    return [
        *run_words(place, name, model_folder(place.work, "small", dry=place.dry), path), "model.init=random",
        f"model.dtype={dtype}", f"chunk.size={size}", "train.steps=1", f"train.global_batch_size={len(lengths)}",
        f"optim.lr={LEARNING_RATE}", f"optim.eps={EPS}", "optim.betas=[0.9,0.999]",
    ]  # fmt: skip


def _plain_step(place: Place, dtype: str) -> tuple[Weights, Weights, float]:
    """Return the weights before and after a step of the plain loop, and its loss."""
    config: Config = load(_words(place, "plain", dtype)).config
    hf_config = load_config(config.model)
    model: Any = load_model(
        config.model, hf_config, dtype=getattr(torch, dtype), attention="sdpa", seed=config.train.seed
    )
    model.to(training_device())
    before = _copied(model)
    data = load_run_data(config, hf_config).train
    loop = PlainTraining(model, lr=LEARNING_RATE, eps=EPS)
    loss = loop.step([data[index] for index in range(len(data))])
    return before, _copied(model), loss


def _copied(model: Any) -> Weights:
    return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in model.named_parameters()}


def _relative_error(before: Weights, weights: Weights, expected: Weights) -> float:
    """Return how far the change of all weights is from the expected change, relative to it."""
    off = sum(float((weights[name].float() - end).square().sum()) for name, end in expected.items())
    change = sum(float((end - before[name]).square().sum()) for name, end in expected.items())
    return float((off / change) ** 0.5)
