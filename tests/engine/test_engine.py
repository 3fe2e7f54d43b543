"""The data-parallel engine: how it sums gradients, what settings it refuses, and the configuration it generates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings, check_settings, deepspeed_config
from chunkflow_cli.errors import UsageError
from support.ranks import run_ranks

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")

LAYOUTS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]


class Model(nn.Module):
    """A weight whose gradient is the sum of the factors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 64))  # float32, in which some models keep some weights
        self.other = nn.Parameter(torch.zeros(64, 64, dtype=dtype))

    def forward(self, factor: float) -> Tensor:
        return (self.weight.float() * factor).sum() + 0 * self.other.float().sum()


def accumulate(_: None) -> dict[tuple[int, str], tuple[list[float], list[float]]]:
    """Return a weight and the gradient norm after each of two steps, on every layout."""
    optim, found = OptimConfig(name=OptimizerName.sgd, lr=1.0, grad_clip=0.0), {}
    for stage, dtype in LAYOUTS:
        model = Model(getattr(torch, dtype))
        engine = Engine(model, EngineSettings(EngineConfig(zero_stage=stage), optim, Dtype(dtype), CPU))
        weights, norms = [], []
        for count in (256, 3):
            for index in range(count + 1):
                engine.backward(engine.forward(1.0 if index == 0 else 2.0**-9))
            norms.append(engine.step() / 64)
            whole = engine.whole_weights(model, trained_only=False) or {}
            weights.append(whole["weight"].float().flatten()[0].item())
        found[stage, dtype] = weights, norms
    return found


@pytest.fixture(scope="module")
def accumulated() -> dict[tuple[int, str], tuple[list[float], list[float]]]:
    return run_ranks(1, "test_engine:accumulate")[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
def test_gradients_of_many_backwards_add_up_in_float32(
    stage: int, dtype: str, accumulated: dict[tuple[int, str], tuple[list[float], list[float]]]
) -> None:
    """1 + 256 x 2^-9 is 1.5. A sum in bfloat16 stays at 1, and ZeRO-2 without coalescing keeps only the last term."""
    weights, norms = accumulated[stage, dtype]
    second = 1 + 3 * 2.0**-9
    assert norms == pytest.approx([1.5, second], rel=1e-5)
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    assert weights == pytest.approx([-1.5, -1.5 - second], rel=tolerance)


@pytest.mark.parametrize(
    ("engine", "dtype", "expected"),
    [
        (EngineConfig(zero_stage=0), Dtype.bfloat16, "engine.zero_stage=0"),
        (EngineConfig(zero_stage=2), Dtype.bfloat16, "engine.zero_stage=2"),
        (EngineConfig(zero_stage=1), Dtype.float64, "model.dtype=float64"),
        (EngineConfig(zero_stage=1, offload=Offload.optimizer), Dtype.bfloat16, "no GPU"),
    ],
    ids=["bf16 on ZeRO-0", "bf16 on ZeRO-2", "float64", "offload without a GPU"],
)
def test_settings_that_deepspeed_would_run_wrongly_are_refused(
    engine: EngineConfig, dtype: Dtype, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        check_settings(EngineSettings(engine, OptimConfig(), dtype, CPU))


def test_parameter_offload_needs_zero_3() -> None:
    cuda = torch.device("cuda", 0)
    with pytest.raises(UsageError, match=r"engine\.zero_stage=3"):
        check_settings(
            EngineSettings(EngineConfig(zero_stage=1, offload=Offload.parameters), OptimConfig(), Dtype.bfloat16, cuda)
        )


def test_user_settings_are_merged_over_ours() -> None:
    engine = EngineConfig(zero_stage=1, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "seed": 3})
    config = deepspeed_config(EngineSettings(engine, OptimConfig(), Dtype.bfloat16, CPU))
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 1
    assert config["seed"] == 3
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
