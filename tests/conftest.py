"""What every test stands on: one thread, settled vector math, and tiny models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from support.models import TINY

settings.register_profile("chunkflow", deadline=None)  # two shared cores: the clock says nothing about the code
settings.load_profile("chunkflow")

SLOWEST_FIRST = (
    "test_layouts", "test_resuming", "test_pipeline", "test_checkpoint", "test_many_ranks", "test_train", "test_launch",
    "test_help", "test_sequence_parallel", "test_tune", "test_cli", "test_exactness", "test_plan", "test_state_offload",
    "test_recurrent", "test_doctor", "test_engine", "test_completion",
)  # fmt: skip
"""Files that take minutes or nearly so: two workers take a file each, and the last one to begin should be short."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-torch", action="store_true", help="fail every import of torch")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-torch"):
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it now raises ModuleNotFoundError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: within a file nothing changes


WITHOUT_TORCH = ("planning", "config", "data")
"""Rooms whose tests need no torch, but for those that are marked."""


@pytest.fixture(autouse=True)
def _torch_settled_where_it_is_used(request: pytest.FixtureRequest) -> None:
    if request.path.parent.name not in WITHOUT_TORCH or request.node.get_closest_marker("torch"):
        request.getfixturevalue("_torch_settled")


@pytest.fixture(scope="module", autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """After a test file, undo what ZeRO-3 does to torch's linear layer for the rest of the process."""
    yield
    if "deepspeed" in sys.modules:
        from chunkflow_cli.engine import internals

        internals.give_linear_back()


@pytest.fixture(scope="session")
def _torch_settled() -> None:
    """The first threaded exp of a process can be wrong by 1e-4, which would fail a random test of exactness."""
    import torch

    from chunkflow_cli.execution.cpu_quirks import settle_vector_math

    torch.set_num_threads(1)  # tensors this small run ten times slower on threads that wait for each other
    settle_vector_math()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(model_type, **settings)`: a Hugging Face configuration of two narrow layers."""
    from transformers import AutoConfig

    def build(model_type: str, **settings: Any) -> Any:
        return AutoConfig.for_model(model_type, **{**TINY, **settings})

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_model(model_type, dtype=..., seed=0, **settings)`: that model in train mode, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    def build(model_type: str, *, dtype: Any = torch.float32, seed: int = 0, **settings: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, **settings), dtype=dtype)
        model.config.use_cache = False
        return model.train()

    return build
