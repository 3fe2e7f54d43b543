"""The Hugging Face configuration of a model: find it, read it, and refuse what chunks cannot train exactly.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow_cli.config.schema import Init, ModelConfig, Quantization
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable, import_models
from chunkflow_cli.model.adapter_folder import explain_adapter_folder
from chunkflow_cli.model.folder import check_settings
from chunkflow_cli.model.rope_scaling import apply_rope_scaling
from chunkflow_cli.model.special_types import computes_own_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class NoLanguagePartError(ValueError):
    """A multimodal model in which no decoder of text with a head was found."""


def pretrained_arguments(path: str) -> tuple[str, dict[str, str]]:
    """Return the name and the keyword arguments that `from_pretrained` takes for a model id, a folder or a GGUF file.

    Raises:
        UsageError: the GGUF file does not exist.
    """
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise UsageError(f"model.path={path}: there is no such file")
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def check_is_there(config: ModelConfig) -> None:
    """Check that a model can be found, before the import of transformers, which takes seconds.

    Raises:
        UsageError: it is neither here nor on the hub, or it is an adapter, or its config.json is not sound.
    """
    pretrained_arguments(config.path)
    if adapter := explain_adapter_folder(config.path):
        raise UsageError(adapter)
    if Path(config.path).exists():
        check_settings(Path(config.path), f"model.path={config.path}")
        return
    go_offline_if_unreachable()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(config.path, "config.json")
    except LocalEntryNotFoundError as error:
        raise unreadable(config, "config.json", error) from error
    except EntryNotFoundError:
        return  # the repository is there: transformers knows other files that describe a model
    except (OSError, ValueError) as error:  # no such repository, no access to it, or no name of one
        raise unreadable(config, "config.json", error) from error


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Return the Hugging Face configuration of a model, without the settings that chunkflow decides itself.

    Raises:
        UsageError: the model cannot be found or read, or uses something that chunks cannot train exactly.
    """
    check_is_there(config)
    import_models()
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # silences advice about calls that the user did not make; errors still raise
    logging.disable_progress_bar()
    name, extra = pretrained_arguments(config.path)
    with config_errors(config):
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    text = hf_config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise UsageError(
            f"model.path={config.path}: its config.json has output_router_logits=true, and the auxiliary loss of a "
            "router is not supported\n  set it to false there to train without that loss"
        )
    if (layers := getattr(text, "num_hidden_layers", 1)) < 1:
        raise UsageError(f"model.path={config.path}: its config.json has num_hidden_layers={layers}\n  correct it")
    for name in ("layerdrop", "decoder_layerdrop"):
        if rate := getattr(text, name, 0):
            raise UsageError(
                f"model.path={config.path}: its config.json has {name}={rate}, so each forward skips layers at random: "
                f"the chunks of a sample would skip different ones\n  set {name} to 0 there"
            )
    apply_rope_scaling(config, hf_config)
    refuse_length_dependent_rope(text)
    refuse_unsupported_attention(text)
    if text.model_type == "xlstm" and text.mode != "inference":
        raise UsageError(
            f"model.path={config.path}: its config.json has mode={text.mode!r}, in which transformers cannot run "
            "samples of any length\n  set mode to 'inference' there: it trains as well"
        )
    if config.vocab_size is not None:
        if config.vocab_size < text.vocab_size:
            raise UsageError(
                f"model.vocab_size={config.vocab_size}: the model has {text.vocab_size} tokens already\n"
                "  leave it out, or set the number of tokens that your tokenizer has"
            )
        if (known := known_ids(hf_config)) < text.vocab_size:
            raise UsageError(
                f"model.vocab_size={config.vocab_size}: the model predicts its first {known} tokens only "
                "(unpadded_vocab_size in config.json)\n  leave it out, and use the model's own tokenizer"
            )
        text.vocab_size = config.vocab_size
    if not extra:  # a GGUF file is converted to floating point
        _settle_quantisation(config, hf_config)
    _reset_switches(hf_config)
    return hf_config


@contextmanager
def config_errors(config: ModelConfig) -> Iterator[None]:
    """Explain a configuration of which transformers cannot make a model, within the block.

    Raises:
        UsageError: with the library's reason. It checks little itself: zero heads are a ZeroDivisionError.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError,
            StrictDataclassError) as error:  # fmt: skip
        raise unreadable(config, "config.json", error) from error


def refuse_length_dependent_rope(hf_config: Any) -> None:
    """Refuse rotary embeddings that depend on the longest position of a forward: they would differ between chunks.

    Raises:
        UsageError: names the kind of rotary embedding.
    """
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    for kind in sorted({str(part.get("rope_type")) for part in parts} & {"dynamic", "longrope"}):
        raise UsageError(
            f"the model's rotary embedding is of the kind {kind!r}, which depends on the longest position seen: it "
            "would differ between the chunks of a sequence\n"
            "  set a fixed kind (linear, yarn, llama3), in model.rope_scaling or as rope_type in config.json"
        )


INDEXERS = ("index_topk", "index_topk_blocks", "indexer_budget")
"""Settings of attention that first picks keys: how many (DSA: DeepSeek, GLM; MSA: MiniMax; Qwen)."""


def refuse_unsupported_attention(hf_config: Any) -> None:
    """Refuse attention to keys that the model picks, and attention to later tokens.

    Raises:
        UsageError: names the setting.
    """
    for name in INDEXERS:
        if getattr(hf_config, name, None) and not computes_own_attention(hf_config):
            raise UsageError(
                f"the model attends only to keys that an indexer picks ({name}={getattr(hf_config, name)} in "
                f"config.json), and chunks do not support the indexer of {hf_config.model_type!r}\n"
                "  train a model whose attention is full or has sliding windows"
            )
    local, picked = getattr(hf_config, "index_local_blocks", 0), getattr(hf_config, "index_topk_blocks", 0)
    if local > picked:  # all local blocks get the same score
        raise UsageError(
            f"index_local_blocks={local} in config.json is more than index_topk_blocks={picked}: which of the last "
            f"blocks a token sees would depend on the order of a sort\n  set index_local_blocks to at most {picked}"
        )
    if getattr(hf_config, "use_bidirectional_attention", None) in (True, "all"):
        raise UsageError(
            "the model attends to later tokens (use_bidirectional_attention in config.json), and chunkflow trains "
            "causal language models only"
        )


def known_ids(hf_config: Any) -> int:
    """Return the number of ids that the model knows as tokens. Embedding and head may have more rows (inkling)."""
    text = hf_config.get_text_config()
    return min(int(text.vocab_size), int(getattr(text, "unpadded_vocab_size", None) or text.vocab_size))


def position_limit(hf_config: Any) -> int | None:
    """Return the tokens of the longest sequence that the model was made for; None if its configuration does not say."""
    limit = getattr(hf_config.get_text_config(), position_limit_key(hf_config), None)
    return int(limit) if limit else None


def position_limit_key(hf_config: Any) -> str:
    """Return the name that config.json has for the tokens of the longest sequence."""
    text = hf_config.get_text_config()
    if hasattr(text, "max_seq_len"):  # mpt
        return "max_seq_len"
    return str(type(text).attribute_map.get("max_position_embeddings", "max_position_embeddings"))


def unreadable(config: ModelConfig, what: str, error: Exception) -> UsageError:
    """Return the error that explains why transformers could not find or read a part of a model, and what to do."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"a key or a value is missing or unknown: {reason}"
    if isinstance(error, NoLanguagePartError):
        return UsageError(f"model.path={config.path}: {error}")
    if "Unrecognized configuration class" in reason:
        kind = type(error).__name__ if (found := re.search(r"'[\w.]*\.(\w+)'", reason)) is None else found[1]
        return UsageError(
            f"model.path={config.path}: {kind.removesuffix('Config')} is not a causal language model, "
            "and chunkflow trains only those\n  set model.path to a model that generates text"
        )
    if "trust_remote_code" in reason:
        return UsageError(
            f"model.path={config.path}: the model comes with Python code of its own\n"
            "  read that code, and set model.trust_remote_code=true to run it"
        )
    if Path(config.path).exists():
        return UsageError(f"model.path={config.path}: no usable {what} there\n  {reason}")
    if config.path.startswith((".", "/", "~")):
        return UsageError(f"model.path={config.path}: there is no such folder or file")
    if what != "config.json":
        return UsageError(
            f"model.path={config.path}: its {what} cannot be used\n  {reason}\n"
            "  if the download was interrupted, run again with a network: it continues where it stopped"
        )
    return UsageError(
        f"model.path={config.path}: neither a local folder nor in the local cache, and the Hugging Face hub "
        f"{'cannot be reached' if go_offline_if_unreachable() else 'does not have it for you'}\n"
        "  with network: check the name, and run `hf auth login` for a gated model\n"
        "  without: copy the model's folder to this machine and set model.path=FOLDER"
    )


DEQUANTISED = ("fp8", "mxfp4")
"""Methods whose weights transformers converts to floating point while it loads them, on any device."""


def stored_quantisation(hf_config: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the method and the settings by which the weights of a model were stored; None if they are plain."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    return _method(settings), dict(settings if isinstance(settings, dict) else settings.to_dict())


def _settle_quantisation(config: ModelConfig, hf_config: Any) -> None:
    """Refuse quantized weights that are not dequantized on load.

    The model will have plain weights, and random ones are never quantized, so the setting is dropped.

    Raises:
        UsageError: names the method.
    """
    for part in with_parts(hf_config):
        for key in ("quantization_config", "compression_config"):
            settings = getattr(part, key, None)
            if settings is None:
                continue
            is_dequantised = part is hf_config and hf_config.get_text_config() is hf_config
            is_dequantised &= key == "quantization_config" and _method(settings) in DEQUANTISED
            if is_dequantised and config.quantization is not Quantization.none:
                raise UsageError(
                    f"model.quantization={config.quantization.value}: the weights of model.path={config.path} are "
                    f"stored in {_method(settings)}, and cannot be converted and quantized at once\n  convert them to "
                    "bfloat16 first, as docs/models.md shows, or set model.quantization=none"
                )
            if config.init is not Init.random and not is_dequantised:
                raise UsageError(
                    f"model.path={config.path}: its weights are quantized ({_method(settings)}; {key} in config.json), "
                    "and chunkflow trains floating-point weights only\n"
                    "  set model.path to the model that it was made from, which its model card names; "
                    "docs/models.md shows how to convert FP8 and MXFP4"
                )
            delattr(part, key)


def _method(settings: Any) -> str:
    """Return the name of a quantization method, as `quantization_config` has it; old ones of bitsandbytes have none."""
    values = settings if isinstance(settings, dict) else settings.to_dict()
    named = values.get("quant_method")
    if named is not None:
        return str(getattr(named, "value", named))
    return "bitsandbytes" if values.get("load_in_4bit") or values.get("load_in_8bit") else "unknown method"


def _reset_switches(hf_config: Any) -> None:
    """Reset what a config.json can say about how a model runs, and not about what it computes.

    `model.attention` alone decides on attention. Names of kernels on the hub would reach the kernel loader.
    """
    for part in with_parts(hf_config):
        part._attn_implementation = None
        part._experts_implementation = None
        part.output_attentions = False
        part.output_hidden_states = False
        part.return_dict = True
        if hasattr(part, "fusion_config"):
            del part.fusion_config


def with_parts(hf_config: Any) -> Iterator[Any]:
    """Yield a configuration and those within it, such as the text model's."""
    yield hf_config
    for value in vars(hf_config).copy().values():
        if callable(getattr(value, "get_text_config", None)):
            yield from with_parts(value)
