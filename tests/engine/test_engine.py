"""The data-parallel engine: how it sums gradients, what settings it refuses, and the configuration it generates."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig
from chunkflow_cli.engine import EngineSettings, check_settings, deepspeed_config
from chunkflow_cli.errors import UsageError

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")

ACCUMULATE = """
import json, sys, torch
from chunkflow_cli.config.schema import Dtype, EngineConfig, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 64))  # float32, in which some models keep some weights
        self.other = torch.nn.Parameter(torch.zeros(64, 64, dtype=getattr(torch, sys.argv[2])))
    def forward(self, factor):
        return (self.weight.float() * factor).sum() + 0 * self.other.float().sum()

stage, dtype = int(sys.argv[1]), Dtype(sys.argv[2])
model = Model()
settings = EngineSettings(EngineConfig(zero_stage=stage), OptimConfig(name=OptimizerName.sgd, lr=1.0, grad_clip=0.0),
                          dtype, torch.device("cpu"))
engine = Engine(model, settings)
weights, norms = [], []
for count in (256, 3):
    for index in range(count + 1):
        engine.backward(engine.forward(1.0 if index == 0 else 2.0 ** -9))
    norms.append(engine.step() / 64)
    whole = engine.whole_weights(model, trained_only=False)
    weights.append(whole["weight"].float().flatten()[0].item())
print(json.dumps({"weights": weights, "norms": norms}))
"""


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"),
                                              (1, "bfloat16"), (3, "bfloat16")])  # fmt: skip
def test_gradients_of_many_backwards_add_up_in_float32(stage: int, dtype: str) -> None:
    """1 + 256 x 2^-9 is 1.5. A sum in bfloat16 stays at 1, and ZeRO-2 without coalescing keeps only the last term."""
    run = subprocess.run(
        [sys.executable, "-c", ACCUMULATE, str(stage), dtype], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    second = 1 + 3 * 2.0**-9
    assert result["norms"] == pytest.approx([1.5, second], rel=1e-5)
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    assert result["weights"] == pytest.approx([-1.5, -1.5 - second], rel=tolerance)


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
