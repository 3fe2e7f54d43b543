"""The Hugging Face configuration of a model: find it, read it, and refuse what chunks cannot train exactly.

Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable
from chunkflow_cli.model.adapter_folder import explain_adapter_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Return the Hugging Face configuration of a model.

    Raises:
        UsageError: the model cannot be found, or uses something that chunks cannot train exactly.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # silences advice about calls that the user did not make; errors still raise
    logging.disable_progress_bar()
    if adapter := explain_adapter_folder(config.path):
        raise UsageError(adapter)
    if not Path(config.path).exists():
        go_offline_if_unreachable()
    name, extra = pretrained_arguments(config.path)
    try:
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise model_not_found(config, error) from error
    text = hf_config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise UsageError(
            f"model.path={config.path}: its config.json has output_router_logits=true, and the auxiliary loss of a "
            "router is not supported\n  set it to false there to train without that loss"
        )
    refuse_length_dependent_rope(text)
    return hf_config


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
            "  set rope_type in config.json to a fixed kind (default, linear, yarn, llama3)"
        )


def position_limit(hf_config: Any) -> int | None:
    """Return the tokens of the longest sequence that the model was made for; None if its configuration does not say."""
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def model_not_found(config: ModelConfig, error: Exception) -> UsageError:
    """Return the error that explains why transformers could not find or read a model, and what to do."""
    path = Path(config.path)
    if path.exists():
        what, remedy = "config.json", ""
        if (path / "config.json").is_file():
            what, remedy = "weights (*.safetensors)", "\n  to train it from random weights: model.init=random"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UsageError(f"model.path={config.path}: no usable {what} there\n  {reason}{remedy}")
    if config.path.startswith((".", "/", "~")):
        return UsageError(f"model.path={config.path}: there is no such folder or file")
    return UsageError(
        f"model.path={config.path}: neither a local folder nor in the local cache, and the Hugging Face hub "
        f"{'cannot be reached' if go_offline_if_unreachable() else 'does not have it for you'}\n"
        "  with network: check the name, and run `hf auth login` for a gated model\n"
        "  without: copy the model's folder to this machine and set model.path=FOLDER"
    )
