"""The language part of a multimodal model, which is trained, and the other parts, which are not.

A multimodal model is a wrapper: a class with towers for images or sound around a decoder of text and its head. Here the
wrapper's own class is built without the towers, so every weight keeps the name that it has in the wrapper: in
checkpoints, in adapters and in `final/`, which gets the tensors of the towers from the files of the original
(`towers.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from chunkflow_cli.model.folder import listed
from chunkflow_cli.model.hf_config import NoLanguagePartError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LeftOut:
    """The parts of a wrapper that are neither loaded nor trained."""

    parts: tuple[str, ...]
    """Their names: `model.vision_tower`."""
    tensors: frozenset[str]
    """The names of all their tensors."""

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.tensors or any(tensor.startswith(f"{part}.") for part in self.parts)


def language_class(hf_config: PretrainedConfig) -> Any | None:
    """Return the class of a multimodal model without its towers; None for a model that has none, or is unknown.

    The class is the one that `architectures` names, or the one that transformers has for images and text.
    """
    if hf_config.get_text_config() is hf_config or hf_config.is_encoder_decoder:
        return None
    whole = _whole_class(hf_config)
    return None if whole is None else _without_towers(whole)


def attention_of(hf_config: PretrainedConfig, implementation: str | None) -> Any:
    """Return what transformers takes as `attn_implementation` for this one in the decoder of a multimodal model.

    The towers keep their own: some cannot run with it, which transformers refuses although they are left out.
    """
    text = hf_config.get_text_config()
    own = next(name for name in hf_config.sub_configs if getattr(hf_config, name, None) is text)
    return {"": implementation, own: implementation}


def is_language_part(model: Any) -> bool:
    """Return whether a model is the language part of a multimodal one."""
    return hasattr(model, "left_out")


def left_out(model: Any) -> LeftOut:
    """Return what a model of this module leaves out; of any other model, nothing."""
    return model.left_out if is_language_part(model) else LeftOut((), frozenset())


def what_is_trained(model: Any) -> str | None:
    """Return a line that says which part of a multimodal model is trained; None for any other model."""
    parts = left_out(model).parts
    if not parts:
        return None
    rest = "stays as it is" if len(parts) == 1 else "stay as they are"
    return f"Training the language part of {type(model).__name__}; {listed(parts)} {rest}"


def names_in_forward(model: Any) -> frozenset[str]:
    """Return the names of attributes that the class around the head of a model reads in its forward."""
    head = model.get_output_embeddings()
    owners = [module for module in model.modules() if any(child is head for child in module.children())]
    return frozenset(name for owner in owners for name in inspect.unwrap(type(owner).forward).__code__.co_names)


def text_only(model: Any, input_ids: Any) -> dict[str, Any]:
    """Return what a whole model wants to be told in training of tokens that are all text."""
    name = "mm_token_type_ids"
    wants = is_language_part(model) and name in inspect.signature(type(model).forward).parameters
    return {name: input_ids * 0} if wants else {}


def decoder_of(model: Any) -> Any:
    """Return a Hugging Face model without its head and without its towers."""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():  # modernbert-decoder calls its head so
        decoder = model.base_model
    return getattr(decoder, "model", decoder)  # llama4's is its text model with the head


def module_before_head(model: Any) -> Any | None:
    """Return what a Hugging Face model has between its decoder and the weights of its head (modernbert-decoder)."""
    module = getattr(model, "lm_head", None)
    return None if module is model.get_output_embeddings() else module


def _whole_class(hf_config: PretrainedConfig) -> Any | None:
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    for name in hf_config.architectures or ():
        found = getattr(transformers, name, None)
        if getattr(found, "config_class", None) is type(hf_config):
            return found
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(hf_config) in mapping:
            found = mapping[type(hf_config)]
            return found[0] if isinstance(found, tuple) else found
    return None


@cache
def _without_towers(whole: Any) -> Any:
    """Return a subclass of the same name, by which transformers finds how tensors are named in files."""

    def build(self: Any, config: PretrainedConfig, *arguments: Any, **settings: Any) -> None:
        whole.__init__(self, config, *arguments, **settings)
        self.left_out = _leave_out(self)

    def head(self: Any) -> Any:
        if (own := whole.get_output_embeddings(self)) is not None:
            return own
        decoder = self.get_decoder()  # nemotron_h_omni's is a model with its head
        return decoder.get_output_embeddings() if decoder is not self and hasattr(decoder, "lm_head") else None

    methods = {"__init__": build, "get_output_embeddings": head}
    return type(whole.__name__, (whole,), {**methods, "__module__": whole.__module__, "__doc__": whole.__doc__})


def _leave_out(model: Any) -> LeftOut:
    """Remove everything but the decoder and the head from a whole model.

    Raises:
        NoLanguagePartError: it has no decoder of text, or no head.
    """
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    if head is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        missing = "head over a vocabulary" if head is None else "decoder of text"
        raise NoLanguagePartError(
            f"{type(model).__name__} has no {missing}, so there is no language part to train\n"
            "  set model.path to a model that generates text"
        )
    kept = {names[id(head)], names[id(decoder)]}
    parts = dict(_parts_to_leave_out(model, "", kept))
    tensors = []
    for name, (owner, own, part) in parts.items():
        if isinstance(part, nn.Module):
            tensors += [f"{name}.{tensor}" for tensor in part.state_dict()]
        else:
            tensors.append(name)
            vars(owner)["_is_hf_initialized"] = True  # transformers would draw what is no longer there (llava_next)
        setattr(owner, own, None)
    return LeftOut(tuple(parts), frozenset(tensors))


def _parts_to_leave_out(
    module: nn.Module, name: str, kept: set[str]
) -> Iterator[tuple[str, tuple[nn.Module, str, Any]]]:
    """Yield each part that is none of the modules to keep: its whole name, its owner, its name there, and itself."""
    prefix = f"{name}." if name else ""
    for own, tensor in list(module.named_parameters(recurse=False)):
        yield prefix + own, (module, own, tensor)
    for own, child in list(module.named_children()):
        full = prefix + own
        if full in kept:
            continue
        if any(wanted.startswith(f"{full}.") for wanted in kept):
            yield from _parts_to_leave_out(child, full, kept)
        elif any(True for _ in child.state_dict()):
            yield full, (module, own, child)
