"""Liger's Triton kernels for norms, rotary embeddings and gated feed-forwards, in one model and nowhere else.

Liger knows for each type of model which of its kernels fit, and replaces classes and functions of transformers' files
for the whole process. Here its changes to a model's own modules are kept and those to the files are taken back; the
rotary function is given to the model's own attention modules instead. Its losses are not used: chunks have their own.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Kernels, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.forward_scope import keeps_products

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
ROTARY = "apply_rotary_pos_emb"
"""The name that transformers' files give to their rotary function."""


def check_kernels(config: ModelConfig, model_type: str, device: torch.device) -> None:
    """Refuse `model.kernels=liger` where Liger cannot run.

    Raises:
        UsageError: there is no GPU, no package, or no kernel for this type of model.
    """
    if config.kernels is Kernels.none:
        return
    if device.type == "cpu":
        raise UsageError("model.kernels=liger: its Triton kernels need a GPU\n  set model.kernels=none")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UsageError("model.kernels=liger needs liger-kernel\n  pip install 'chunkflow-cli[liger]'")
    _function_of(model_type)


def use_liger(model: Any) -> None:
    """Replace norms, rotary embeddings and gated feed-forwards of a Hugging Face model, not yet cut into stages.

    Raises:
        UsageError: Liger has no kernels for its type.
    """
    apply = _function_of(model.config.get_text_config().model_type)
    takes_loss = {name: False for name in LOSSES if name in inspect.signature(apply).parameters}
    with _files_restored() as changed:
        apply(model=model, **takes_loss)
    for module in model.modules():
        rotary = changed.get((type(module).__module__, ROTARY))
        if rotary is not None:
            _use_rotary(module, rotary)


def _function_of(model_type: str) -> Any:
    functions = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in functions:
        raise UsageError(
            f"model.kernels=liger: Liger has no kernels for models of type {model_type!r}\n  set model.kernels=none"
        )
    return functions[model_type]


@contextmanager
def _files_restored() -> Iterator[dict[tuple[str, str], Any]]:
    """Take back at the end of the block what it changes in the files of transformers' models.

    Yields:
        (module, name) -> what the block has put there; filled at the end.
    """
    changed: dict[tuple[str, str], Any] = {}
    before = {name: dict(vars(file)) for name, file in _modeling_files()}
    yield changed
    for name, file in _modeling_files():
        for own, value in before.get(name, {}).items():
            if vars(file).get(own) is not value:
                changed[name, own] = vars(file)[own]
                setattr(file, own, value)


def _modeling_files() -> list[tuple[str, Any]]:
    return [(name, file) for name, file in sys.modules.items() if name.startswith("transformers.models.") and file]


def _use_rotary(module: nn.Module, rotary: Any) -> None:
    """Let a module's forward call another rotary function, if it calls one by name."""
    forward = inspect.unwrap(type(module).forward)
    if ROTARY not in forward.__code__.co_names:
        return
    names = {**forward.__globals__, ROTARY: _sparing_products(rotary)}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(own, module)


def _sparing_products(rotary: Any) -> Any:
    """Return the rotary function, made to work on copies where what it is given has to last.

    Liger rotates queries and keys in place, and torch does not see that a Triton kernel writes. They are the results of
    products, which selective checkpointing keeps for the recompute: there, they would be rotated a second time.
    """

    def rotate(queries: Tensor, keys: Tensor, *others: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling() and keeps_products():  # compiled layers are not checkpointed like this
            queries, keys = queries.clone(), keys.clone()
        return rotary(queries, keys, *others, **named)

    return rotate
