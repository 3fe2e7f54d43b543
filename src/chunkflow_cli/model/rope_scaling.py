"""`model.rope_scaling`: stretch a model's rotary embedding, so that it tells more positions apart. Imports no torch.

The setting is written as Hugging Face configurations have it, and goes into the model's own configuration: what is
trained, checked by the guard and saved in `final/` is a model with that configuration.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from chunkflow_cli.config.keys import as_written, did_you_mean
from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.errors import UsageError

KEY = "model.rope_scaling"
SETTINGS = frozenset({
    "rope_type", "type", "factor", "original_max_position_embeddings", "max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor",
    "short_factor", "long_factor",
})  # fmt: skip
"""Settings of a scaling. Another scaling replaces all of them; others, such as the base, stay."""
REPLACEABLE = frozenset({"default", "linear", "yarn", "llama3"})
KINDS = ("yarn", "linear", "llama3", "dynamic", "longrope")
FAR = "full_attention"
"""The kind of layer that is scaled where kinds differ, as transformers itself does: windows never see far."""
ORIGINAL = "original_max_position_embeddings"


def apply_rope_scaling(config: ModelConfig, hf_config: Any) -> None:
    """Write `model.rope_scaling` into a Hugging Face configuration, with the length that the model then has.

    Raises:
        UsageError: the setting is none that transformers knows, or the model cannot be scaled by it.
    """
    if not config.rope_scaling:
        return
    scaling, text, said = dict(config.rope_scaling), hf_config.get_text_config(), _said(config.rope_scaling)
    before = _far_parameters(text)
    if before is None or type(text).__module__.startswith("transformers_modules"):
        raise UsageError(
            f"{said}: a model of type {text.model_type!r} has no rotary embedding that transformers can scale\n"
            f"  remove {KEY}"
        )
    _check_names(scaling, SETTINGS | before.keys(), said)
    kind = str(before.get("rope_type", "default"))
    if kind not in REPLACEABLE:
        raise UsageError(
            f"{said}: the model's own rotary embedding is of the kind {kind!r}, which cannot be replaced\n"
            f"  remove {KEY}"
        )
    factor = scaling.get("factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor >= 1 or math.isinf(factor):
        raise UsageError(f"{said} has no factor of 1 or more\n  write it as in {KEY}={{rope_type: yarn, factor: 4}}")
    original = scaling.get(ORIGINAL, text.max_position_embeddings if kind == "default" else None)
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise _no_original(original, before, said)
    kept = {name: value for name, value in before.items() if name not in SETTINGS}
    after = kept | scaling | {"rope_type": scaling.get("rope_type", scaling.get("type"))}
    after.pop("type", None)
    if after["rope_type"] in ("linear", "dynamic"):  # which have no such setting
        after.pop(ORIGINAL, None)
    else:
        after[ORIGINAL] = original
    if hasattr(text, ORIGINAL):  # phi3 reads it there
        setattr(text, ORIGINAL, original)
    text.max_position_embeddings = int(factor * original)
    if before is text.rope_parameters:
        text.rope_parameters = after
    else:
        text.rope_parameters = {**text.rope_parameters, FAR: after}
    with _complaints(said):
        text.standardize_rope_params()
        text.validate_rope()


def _no_original(original: object, before: Mapping[str, Any], said: str) -> UsageError:
    """Return the error of a length before any scaling that is not known, or no number of tokens."""
    kind = before.get("rope_type", "default")
    reason = f"config.json scales already ({kind})" if original is None else f"{ORIGINAL} is not a number of tokens"
    return UsageError(
        f"{said}: the factor counts from the length before any scaling, and {reason}\n  add {ORIGINAL} to {KEY}"
        + (f"; in config.json it is {before[ORIGINAL]}" if ORIGINAL in before else "")
    )


def _check_names(scaling: Mapping[str, Any], known: frozenset[str], said: str) -> None:
    """Refuse names that no scaling has: transformers would name one of its own functions.

    Raises:
        UsageError: names what is wrong.
    """
    for name in scaling:
        if name not in known:
            raise UsageError(f"{said}: there is no setting {name!r}{did_you_mean(name, sorted(known))}")
    kinds = [scaling[name] for name in ("rope_type", "type") if name in scaling]
    if len({str(kind) for kind in kinds}) != 1 or kinds[0] not in KINDS:
        given = " and ".join(map(str, kinds)) or "not set"
        raise UsageError(
            f"{said}: rope_type is {given}\n  set it to yarn, linear or llama3, as in {{rope_type: yarn, factor: 4}}"
        )


def describe_rope_scaling(config: ModelConfig, hf_config: Any) -> str | None:
    """Return the line that says how `model.rope_scaling` stretches the model; None without it."""
    if not config.rope_scaling:
        return None
    text = hf_config.get_text_config()
    parameters = _far_parameters(text) or {}
    line = (
        f"Rotary embedding: {parameters['rope_type']} with factor {parameters['factor']:g}, "
        f"for {text.max_position_embeddings:,} tokens"
    )
    if config.lora.enabled:
        line += "; an adapter does not hold this: load its base as README.md in final/ shows"
    return line


def scaling_for(hf_config: Any, length: int) -> str | None:
    """Return the words that scale the model to `length` tokens; None if it cannot be scaled."""
    text = hf_config.get_text_config()
    parameters = _far_parameters(text)
    if parameters is None or parameters.get("rope_type", "default") not in REPLACEABLE:
        return None
    limit = text.max_position_embeddings
    if parameters.get("rope_type", "default") == "default":
        return f"{KEY}={{rope_type: yarn, factor: {math.ceil(length / limit)}}}"
    original = parameters.get(ORIGINAL) or int(limit / parameters["factor"])
    own = {name: value for name, value in parameters.items() if name in SETTINGS - {"max_position_embeddings", "type"}}
    stretched = own | {"factor": math.ceil(length / original), ORIGINAL: original}
    return f"{KEY}={{{', '.join(f'{name}: {as_written(value)}' for name, value in stretched.items())}}}"


def loading_arguments(config: ModelConfig, hf_config: Any) -> dict[str, Any]:
    """Return what `from_pretrained` of the base model needs to be the scaled model; nothing without a scaling.

    The text part of a multimodal model cannot be given so.
    """
    if not config.rope_scaling or hf_config.get_text_config() is not hf_config:
        return {}
    return {
        "max_position_embeddings": hf_config.max_position_embeddings,
        "rope_parameters": dict(hf_config.rope_parameters),
    }


def _far_parameters(text: Any) -> Mapping[str, Any] | None:
    """Return the settings of the rotary embedding that sees far; None if the model has none."""
    parameters: Mapping[str, Any] | None = getattr(text, "rope_parameters", None)
    if not parameters or not hasattr(text, "max_position_embeddings"):
        return None
    if text.nested_rope_parameter_keys(parameters):
        return parameters.get(FAR)
    return parameters


@contextmanager
def _complaints(said: str) -> Iterator[None]:
    """Raise what transformers warns of or refuses within the block: it warns of a misspelled setting, and goes on.

    Raises:
        UsageError: with its reason.
    """
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger = logging.getLogger("transformers.modeling_rope_utils")
    level, propagates, listener = logger.level, logger.propagate, Listener()
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        heard.append(str(error.args[0] if error.args else error))
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagates
    if heard:
        raise UsageError(f"{said}: {heard[0]}")


def _said(scaling: Mapping[str, Any]) -> str:
    return f"{KEY}={as_written(dict(scaling))}"
