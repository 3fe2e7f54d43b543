"""What `train.deterministic` asks of torch, cuBLAS and NCCL before they start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chunkflow_cli.config.schema import Config, TrainConfig
from chunkflow_cli.errors import UsageError, describe, is_unexpected
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers
from chunkflow_cli.processes import notices
from chunkflow_cli.training import determinism
from chunkflow_cli.training.determinism import ask_for_determinism, warn_of_kernels
from chunkflow_cli.training.saved_config import FREE_KEYS

CUBLAS, NCCL = "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (CUBLAS, NCCL):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_all_libraries_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "flash attention would only warn"
    assert (os.environ[CUBLAS], os.environ[NCCL]) == (":4096:8", "^NVLS,NVLSTree")
    monkeypatch.setenv(NCCL, "Ring")
    ask_for_determinism(True)
    assert os.environ[NCCL] == "Ring", "what the user has set stays"
    ask_for_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled(), "not in the next run of a sweep"


def test_nothing_is_asked_by_default() -> None:
    ask_for_determinism(Config().train.deterministic)
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS not in os.environ
    assert NCCL not in os.environ
    assert "train.deterministic" in FREE_KEYS, "it changes rounding only, so a run may go on with another value"


def test_what_has_no_deterministic_kernel_is_told_with_the_key() -> None:
    refused = RuntimeError(
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )
    assert describe(refused) == (
        "train.deterministic=true: cumsum_cuda_kernel does not have a deterministic implementation on this device\n"
        "  set train.deterministic=false"
    )
    assert not is_unexpected(refused)


def test_a_workspace_with_several_orders_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(UsageError, match=r"train.deterministic=true with CUBLAS_WORKSPACE_CONFIG=:0:0.*\n  unset it"):
        ask_for_determinism(True)


def test_kernels_that_promise_nothing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notices.say_once.cache_clear()
    monkeypatch.setattr(determinism, "installed_kernels", lambda: frozenset({"fla", "causal_conv1d"}))
    config, cuda = Config(train=TrainConfig(deterministic=True)), torch.device("cuda")
    plain = ModelShape(
        layers=1, hidden_size=8, intermediate_size=8, attention=(AttentionLayers(1, 1, 1, 8, 8),), vocab_size=9,
        matmul_parameters=1, parameters=1, trainable_parameters=1,
    )  # fmt: skip
    recurrent = replace(plain, recurrent=RecurrentLayers(edge_bytes=1, flops_per_token=1))
    warn_of_kernels(config, plain, cuda)
    warn_of_kernels(Config(), recurrent, cuda)
    warn_of_kernels(config, recurrent, torch.device("cpu"))
    assert capsys.readouterr().err == ""
    warn_of_kernels(config, recurrent, cuda)
    assert "train.deterministic=true" in (warning := capsys.readouterr().err)
    assert "kernels of causal_conv1d, fla, which do not promise" in warning


def test_it_is_asked_before_anything_starts() -> None:
    """CUDA and NCCL read their variables once: the first call of a run comes before the process group."""
    source = Path(determinism.__file__).with_name("train.py").read_text(encoding="utf-8")
    assert source.index("ask_for_determinism(config") < source.index("check_requirements(loaded)")
    assert source.index("check_requirements(loaded)") < source.index("open_folder(loaded")
