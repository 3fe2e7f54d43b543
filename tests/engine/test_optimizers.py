"""Every optimizer steps as plain torch or bitsandbytes does, on every ZeRO stage and any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings, check_optimizer
from chunkflow_cli.errors import UsageError
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

LAYOUTS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
MATRICES = frozenset({"up.weight", "down.weight", "experts"})
STEPS, ROWS = 3, 4
OPTIMIZERS = {
    "muon": OptimConfig(
        OptimizerName.muon, lr=0.1, momentum=0.9, weight_decay=0.1, grad_clip=1.0, lr_factors={"down": 0.5}
    ),
    "adafactor": OptimConfig(OptimizerName.adafactor, lr=0.1, weight_decay=0.1, grad_clip=0.0),
    "adamw": OptimConfig(lr=0.1, grad_clip=0.0, lr_factors={"experts": 0.25, "embed.*": 0.1}),
}


class Tiny(nn.Module):
    """Matrices that are tall, wide and stacked, a table, vectors, and sizes that two ranks cannot divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 13)
        self.down = nn.Linear(13, 5)
        self.experts = nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        hidden = hidden + torch.einsum("th,ehf,egf->tg", hidden, self.experts, self.experts) / 20
        return nn.functional.cross_entropy((hidden @ self.embedding.weight.T).float(), targets, reduction="sum")


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, 11, (2, ROWS, 6), generator=torch.Generator().manual_seed(step))
    return tokens, targets


def plain_optimizers(model: Tiny, name: str) -> list[torch.optim.Optimizer]:
    optim = OPTIMIZERS[name]
    if name == "adafactor":
        vectors = [p for p in model.parameters() if p.ndim < 2]
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        return [torch.optim.Adafactor(groups, lr=optim.lr)]
    rest: list[dict[str, Any]] = [
        {"params": [model.embedding.weight], "weight_decay": optim.weight_decay},
        {"params": [model.up.bias], "weight_decay": 0.0},
        {"params": [model.down.bias], "weight_decay": 0.0},
    ]
    if name == "adamw":
        rest[0]["lr"] = 0.1 * optim.lr
        rest += [{"params": [model.up.weight, model.down.weight]}, {"params": [model.experts], "lr": optim.lr / 4}]
        return [torch.optim.AdamW(rest, lr=optim.lr, weight_decay=0.0)]
    rest[2]["lr"] = 0.5 * optim.lr
    model.each_expert = [nn.Parameter(matrix.detach()) for matrix in model.experts]  # views
    muon = [
        {"params": [model.up.weight, *model.each_expert]},
        {"params": [model.down.weight], "lr": 0.5 * optim.lr},
    ]
    return [
        torch.optim.AdamW(rest, lr=optim.lr),
        torch.optim.Muon(muon, lr=optim.lr, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


def train_plainly(name: str) -> dict[str, Tensor]:
    """Return the weights after training without DeepSpeed and without ranks."""
    model = Tiny()
    optimizers = plain_optimizers(model, name)
    for step in range(STEPS):
        model.zero_grad()
        for row in range(ROWS):
            tokens, targets = batch(step)
            (model(tokens[row], targets[row]) / (ROWS * 6)).backward()
        if OPTIMIZERS[name].grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZERS[name].grad_clip)
        for expert, gradient in zip(getattr(model, "each_expert", ()), model.experts.grad, strict=False):  # type: ignore
            expert.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def train_on_all_layouts(_: None) -> dict[tuple[str, int, str], dict[str, Tensor]]:
    from torch import distributed

    from chunkflow_cli.engine import own_rank, process_count

    found = {}
    for name, optim in OPTIMIZERS.items():
        for stage, dtype in LAYOUTS:
            settings = EngineConfig(zero_stage=stage)
            if stage == 3:
                settings.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 8}}
            model = Tiny().to(getattr(torch, dtype))
            engine = Engine(model, EngineSettings(settings, optim, Dtype(dtype), torch.device("cpu"), MATRICES))
            for step in range(STEPS):
                tokens, targets = batch(step)
                for row in range(own_rank(), ROWS, process_count()):
                    engine.backward(engine.forward(tokens[row], targets[row]) / (ROWS * 6))
                engine.set_learning_rate(optim.lr)
                engine.step()
            weights = engine.whole_weights(model, trained_only=False) or {}
            found[name, stage, dtype] = {n: tensor.float().clone() for n, tensor in weights.items()}
    assert distributed.is_initialized()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_plain_torch(ranks: int) -> None:
    """Muon and Adafactor see whole parameters however they are divided. Rates have their factors."""
    found = run_ranks(ranks, "test_optimizers:train_on_all_layouts", None)[0]
    before = {name: p.detach() for name, p in Tiny().named_parameters()}
    for (name, stage, dtype), weights in found.items():
        expected = train_plainly(name)
        # Muon rounds to bfloat16 within, which lifts the order of a sum to 1e-3.
        tolerance = 0.1 if dtype == "bfloat16" else 2e-2 if name == "muon" else 1e-4
        for weight, value in expected.items():
            moved = float((value - before[weight]).norm())
            error = float((weights[weight] - value).norm())
            print(name, stage, dtype, weight, error / max(moved, 1e-9), moved)
            assert error <= tolerance * moved + 1e-6, (name, stage, dtype, weight, error, moved)
