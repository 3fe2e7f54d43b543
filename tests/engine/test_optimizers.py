"""Every optimizer steps as plain torch or bitsandbytes does, and resumes, on every ZeRO stage and any number of ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings, check_optimizer, optimizer_states, optimizers
from chunkflow_cli.engine.whole_parameters import choose_owners
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.optimizer_states import state_numbers
from support.muon import orthogonalise_in_float64
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
LAYOUTS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
MATRICES = frozenset({"up.weight", "down.weight", "experts"})
STEPS, ROWS = 3, 4
OPTIMIZERS = {
    "muon": OptimConfig(
        OptimizerName.muon,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        grad_clip=1.0,
        lr_factors={"down": 0.5, "embed.*": 0.1},
    ),
    "adafactor": OptimConfig(OptimizerName.adafactor, lr=0.1, weight_decay=0.1, grad_clip=0.0),
}
if importlib.util.find_spec("bitsandbytes") is not None:
    OPTIMIZERS["adamw_8bit"] = OptimConfig(OptimizerName.adamw_8bit, lr=0.1, grad_clip=0.0)


class Tiny(nn.Module):
    """Matrices that are tall, wide and stacked, a table, vectors, and sizes that two ranks cannot divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 13)
        self.down = nn.Linear(13, 5)
        self.experts = nn.Parameter(torch.randn(3, 5, 101))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        hidden = hidden + torch.einsum("th,ehf,egf->tg", hidden, self.experts, self.experts) / 200
        return nn.functional.cross_entropy((hidden @ self.embedding.weight.T).float(), targets, reduction="sum")


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, 11, (2, ROWS, 6), generator=torch.Generator().manual_seed(step))
    return tokens, targets


def plain_optimizers(model: Any, name: str) -> list[Any]:
    optim = OPTIMIZERS[name]
    if name == "adamw_8bit":
        import bitsandbytes

        return [bitsandbytes.optim.AdamW8bit(model.parameters(), lr=optim.lr, weight_decay=0.0, min_8bit_size=1)]
    if name == "adafactor":
        vectors = [p for p in model.parameters() if p.ndim < 2]
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        return [torch.optim.Adafactor([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=optim.lr)]
    rest: list[dict[str, Any]] = [
        {"params": [model.embedding.weight], "weight_decay": optim.weight_decay},
        {"params": [model.up.bias], "weight_decay": 0.0},
        {"params": [model.down.bias], "weight_decay": 0.0},
    ]
    rest[0]["lr"], rest[2]["lr"] = 0.1 * optim.lr, 0.5 * optim.lr
    model.each_expert = [nn.Parameter(matrix.detach()) for matrix in model.experts]  # views
    groups = [{"params": [model.up.weight, *model.each_expert]}, {"params": [model.down.weight], "lr": 0.5 * optim.lr}]
    return [
        torch.optim.AdamW(rest, lr=optim.lr),
        torch.optim.Muon(groups, lr=optim.lr, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


def train_plainly(name: str) -> dict[str, Tensor]:
    """Return the weights after training without DeepSpeed and without ranks."""
    model: Any = Tiny()
    plain = plain_optimizers(model, name)
    for step in range(STEPS):
        model.zero_grad()
        tokens, targets = batch(step)
        for row in range(ROWS):
            (model(tokens[row], targets[row]) / (ROWS * 6)).backward()
        if OPTIMIZERS[name].grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZERS[name].grad_clip)
        for index, expert in enumerate(getattr(model, "each_expert", ())):
            expert.grad = model.experts.grad[index]
        for optimizer in plain:
            optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def engine_of(optim: OptimConfig, stage: int, dtype: str) -> Engine:
    settings = EngineConfig(zero_stage=stage)
    if stage == 3:
        settings.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 8}}
    model = Tiny().to(getattr(torch, dtype))
    return Engine(model, EngineSettings(settings, optim, Dtype(dtype), CPU, MATRICES))


def train(engine: Engine, optim: OptimConfig, steps: range) -> dict[str, Tensor]:
    from chunkflow_cli.engine import own_rank, process_count

    for step in steps:
        tokens, targets = batch(step)
        for row in range(own_rank(), ROWS, process_count()):
            engine.backward(engine.forward(tokens[row], targets[row]) / (ROWS * 6))
        engine.set_learning_rate(optim.lr)
        engine.step()
    weights = engine.whole_weights(engine.module, trained_only=False) or {}
    return {name: tensor.float().clone() for name, tensor in weights.items()}


def train_on_all_layouts(root: str) -> dict[tuple[str, int, str], list[dict[str, Tensor]]]:
    """Return the weights of an uninterrupted run, of one that goes on from its checkpoint, and of one that goes on from
    that of the layout before."""
    from torch import distributed

    orthogonalise_in_float64()
    found = {}
    for name, optim in OPTIMIZERS.items():
        before = None
        for stage, dtype in LAYOUTS if name != "adamw_8bit" else LAYOUTS[:4:3] + LAYOUTS[4:5]:
            engine = engine_of(optim, stage, dtype)
            train(engine, optim, range(STEPS - 1))
            folder = Path(root, f"{name} {stage} {dtype}")
            folder.mkdir(exist_ok=True)
            engine.save(folder)
            distributed.barrier()
            weights = [train(engine, optim, range(STEPS - 1, STEPS))]
            for start in (folder, before):
                if start is not None and start.name.endswith(dtype):
                    engine.load(start)
                    weights.append(train(engine, optim, range(STEPS - 1, STEPS)))
            found[name, stage, dtype], before = weights, folder
    return found


def test_steps_are_those_of_plain_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon and Adafactor see whole parameters however they are divided, and rates have their factors.

    A DeepSpeed that steps the matrices as plain SGD moves them by another amount altogether.
    """
    orthogonalise_in_float64(monkeypatch.setattr)
    before = {name: p.detach() for name, p in Tiny().named_parameters()}
    for (name, stage, dtype), runs in run_ranks(2, "test_optimizers:train_on_all_layouts", str(tmp_path))[0].items():
        expected = train_plainly(name)
        tolerance = 0.2 if dtype == "bfloat16" else 1e-5
        if name == "adamw_8bit" and stage > 0:
            tolerance = 0.1  # other blocks share a scale
        assert all(torch.equal(runs[0][weight], runs[1][weight]) for weight in expected), (name, stage, dtype)
        for weights in (runs[0], *runs[2:]):
            for weight, value in expected.items():
                moved = float((value - before[weight]).norm())
                error = float((weights[weight] - value).norm())
                assert error <= tolerance * moved + 1e-6, (name, stage, dtype, weight, error / moved)


def test_planned_states_are_those_that_are_kept() -> None:
    """In bytes, for weights of a shape whose embedding and head are a tenth of them."""
    shape = ModelShape(
        layers=2, hidden_size=64, intermediate_size=64, attention=(), vocab_size=50, matmul_parameters=0,
        parameters=64_000, trainable_parameters=64_000,
    )  # fmt: skip
    table, matrix = nn.Parameter(torch.zeros(100, 64)), nn.Parameter(torch.zeros(900, 64))
    for name, optim in OPTIMIZERS.items():
        by_weight = {
            "muon": [torch.optim.AdamW([table]), torch.optim.Muon([matrix])],
            "adafactor": [torch.optim.Adafactor([nn.Parameter(torch.zeros(64, 64)) for _ in range(16)])],
        }.get(name) or [optimizers.make_optimizer(nn.ParameterList([table, matrix]), EngineSettings(
            EngineConfig(), optim, Dtype.float32, CPU))]  # fmt: skip
        numbers = 0
        for optimizer in by_weight:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            states = (tensors for state in optimizer.state.values() for tensors in state.items())
            numbers += sum(t.nbytes / 4 for kind, t in states if torch.is_tensor(t) and t.ndim and "qmap" not in kind)
        weights = 16 * 64 * 64 if name == "adafactor" else 64_000
        assert state_numbers(optim.name.value, optim.momentum, shape) == pytest.approx(numbers / weights, rel=0.01)


def test_eight_bits_survive_other_blocks() -> None:
    """Blocks that are cut elsewhere are rounded anew, which loses no more than half a step of the table."""
    table = torch.cat([torch.linspace(-0.99, 0, 128)[:-1], torch.linspace(0, 1, 129)])
    codes, scale = torch.randint(0, 256, (1000,)).float(), torch.rand(4).repeat_interleave(256)[:1000] + 0.1
    same, scales = optimizer_states._blocks(codes, scale, table)
    assert torch.equal(same.float(), codes)
    assert torch.equal(scales, scale[::256])
    values = table[codes.long()] * scale
    moved, new = optimizer_states._blocks(codes[100:], scale[100:], table)
    error = (table[moved.long()] * new.repeat_interleave(256)[:900] - values[100:]).abs().max()
    assert 0 < error <= 0.01 * scale.max()


def test_owners_share_the_work() -> None:
    """A parameter goes to a rank that holds most of it; where several do, to the one with the least work."""
    assert choose_owners([[9, 1], [5, 5], [5, 5], [0, 4]], [1.0, 1.0, 1.0, 1.0]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("engine", "name", "expected"),
    [
        (EngineConfig(), "paged_adamw_8bit", r"this machine has no GPU\n  set optim=adamw_8bit"),
        (EngineConfig(offload=Offload.optimizer), "muon", "only AdamW and SGD run on the host"),
    ],
)
def test_optimizers_that_cannot_run_are_refused(
    engine: EngineConfig, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=expected):
        check_optimizer(EngineSettings(engine, OptimConfig(OptimizerName(name)), Dtype.float32, CPU))


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"needs bitsandbytes\n  pip install 'chunkflow-cli\[quant\]'"):
        check_optimizer(EngineSettings(EngineConfig(), OptimConfig(OptimizerName.adamw_8bit), Dtype.float32, CPU))
