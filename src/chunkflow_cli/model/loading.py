"""Making a Hugging Face causal LM: with its weights, or without numbers on torch's meta device."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from chunkflow_cli.config.schema import Init, ModelConfig, Quantization
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.model.adapter_summary import AdapterSummary, summarize
from chunkflow_cli.model.adapters import add_lora, peft_targets
from chunkflow_cli.model.float32_weights import widen_float32_weights
from chunkflow_cli.model.folder import check_checksums, check_weights, listed
from chunkflow_cli.model.hf_config import config_errors, pretrained_arguments, stored_quantisation, unreadable
from chunkflow_cli.model.identity import local_folder
from chunkflow_cli.model.language_part import attention_of, language_class, left_out
from chunkflow_cli.model.openai_gpt import use_attention_interface
from chunkflow_cli.model.own_attention import implementation_for
from chunkflow_cli.model.progress_bars import DownloadBar
from chunkflow_cli.model.quantised import check_dequantised, check_quantised, multiply_dequantised, quantization_config
from chunkflow_cli.model.towers import Original, copyable_files, find_original
from chunkflow_cli.model.weights import check_loaded, incomplete_groups, loading_report
from chunkflow_cli.processes.notices import say_once, warn_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(
    config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None, seed: int
) -> PreTrainedModel:
    """Return the model in train mode, on the CPU, without adapters. A quantized one is on the device of this process.

    `attention` is the name of an implementation in transformers. `seed` decides the weights that are drawn: all of them
    with model.init=random, otherwise those of model.new_weights and the new rows of model.vocab_size.

    Raises:
        UsageError: the weights cannot be found or read, or are not exactly those that the model needs.
    """
    quiet_deepspeed()
    use_attention_interface(hf_config)
    attention = implementation_for(hf_config, attention)
    if config.init is Init.random:
        torch.manual_seed(seed)
        with config_errors(config):
            model = random_model(
                hf_config, dtype=dtype, attention=attention, trust_remote_code=config.trust_remote_code
            )
        if parts := left_out(model).parts:
            warn_once(f"model.init=random draws the language part alone: no weights of {listed(parts)} will be saved")
    else:
        torch.manual_seed(seed)  # of weights that are new
        model = _pretrained(config, hf_config, dtype=dtype, attention=attention)
        if config.vocab_size is not None:
            torch.manual_seed(seed)
            model.resize_token_embeddings(config.vocab_size)
    widen_float32_weights(model)
    model.train()
    return model


def model_of_weights(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    attention: str | None,
) -> Any:
    """Return the model that `load_model` has made on another rank, around its weights, which are not copied.

    Args:
        state: the state dict of that model.
    """
    quiet_deepspeed()
    attention = implementation_for(hf_config, attention)
    own_config = copy.deepcopy(hf_config)
    if hasattr(own_config, "quantization_config"):  # they are not quantized any more
        del own_config.quantization_config
    own_class = type(empty_model(own_config, dtype=dtype, trust_remote_code=config.trust_remote_code))
    language = language_class(hf_config)
    model = own_class.from_pretrained(
        None, config=own_config, state_dict=dict(state), dtype=dtype,
        attn_implementation=attention if language is None else attention_of(own_config, attention),
    )  # fmt: skip
    model.train()
    return model


def random_model(
    hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return a model with random weights, in evaluation mode; of a multimodal one, the language part.

    Args:
        attention: the name of an implementation in transformers; None for its default.
    """
    from transformers import AutoModelForCausalLM

    use_attention_interface(hf_config)
    own_config = copy.deepcopy(hf_config)  # setting a model's attention changes its configuration
    language = language_class(hf_config)
    if language is not None:  # made without numbers first, as for loading, so the towers never take memory
        return language.from_pretrained(
            None, config=own_config, state_dict={}, dtype=dtype,
            attn_implementation=attention_of(own_config, attention),
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(
        own_config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )


def check_files(config: ModelConfig) -> None:
    """Check the files of a local model's weights, which takes milliseconds, unlike loading them.

    Raises:
        UsageError: a file is missing, incomplete or not what its name says.
    """
    path, named = Path(config.path), f"model.path={config.path}"
    if config.init is Init.random or not path.exists():
        return
    check_weights(path, named)
    if (path / "generation_config.json").exists():
        from transformers import GenerationConfig

        try:
            GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{named}: its generation_config.json is invalid: {first_line(error)}\n  correct or delete it"
            ) from error


def _pretrained(config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None) -> Any:
    """Load the weights, and check that they are those of the files."""
    from transformers import AutoModelForCausalLM

    check_files(config)
    named = f"model.path={config.path}"
    check_checksums(Path(config.path), named)
    name, extra = pretrained_arguments(config.path)
    as_saved = _as_saved(config, hf_config)
    stored = _dequantise_on_load(config, as_saved)
    few_bits: dict[str, Any] = {}
    if config.quantization is not Quantization.none:
        few_bits["quantization_config"] = quantization_config(config.quantization, dtype)
    language = None if extra else language_class(hf_config)
    if language is not None and Path(config.path).exists():
        copyable_files(Path(config.path), named)
    with _failures_explained(config, stored):
        model, info = (language or AutoModelForCausalLM).from_pretrained(
            name, config=as_saved, dtype=dtype,
            attn_implementation=attention if language is None else attention_of(hf_config, attention),
            trust_remote_code=config.trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True, tqdm_class=DownloadBar, **extra, **few_bits,
        )  # fmt: skip
    check_loaded(model, info, named, new=config.new_weights)
    if stored is not None:
        check_dequantised(model, stored, named)
        say_once(f"{named}: its weights are stored in {stored}, and converted to {config.dtype.value} for training")
        own_dtype = re.compile("|".join(model._keep_in_fp32_modules_strict or ["(?!)"]))
        for parameter_name, parameter in model.named_parameters():  # what was not quantized has the type of the files
            if own_dtype.search(parameter_name) is None:
                parameter.data = parameter.data.to(dtype)
    if few_bits:
        multiply_dequantised(model)
    if language is not None:
        model.original = _find_original(model, config.path, named)
    if extra:
        # Loading has dequantized the weights: from here on, a float model is trained and saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


@contextmanager
def _failures_explained(config: ModelConfig, stored: str | None) -> Iterator[None]:
    """Explain why the weights of a model cannot be loaded, within the block.

    Args:
        stored: the method by which they are stored in few bits, or None.

    Raises:
        UsageError: with the library's reason, or the weights that it has left out.
    """
    from safetensors import SafetensorError

    named = f"model.path={config.path}"
    with loading_report() as report:
        try:
            yield
        except (OSError, ValueError, LookupError, ImportError, AssertionError, SafetensorError, UnpicklingError,
                EOFError) as error:  # fmt: skip
            raise unreadable(config, "weights", error) from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
                raise
            groups = incomplete_groups(report)
            if not groups:
                raise unreadable(config, "weights", error) from error
            if stored is not None:
                raise UsageError(
                    f"{named}: its weights are stored in {stored}, and transformers cannot convert {listed(groups)}\n"
                    "  set model.path to the model that it was made from, which its model card names"
                ) from error
            raise UsageError(
                f"{named}: parts of {listed(groups)} are missing in its files, or have other shapes than the rest\n"
                "  download the model again"
            ) from error


def _dequantise_on_load(config: ModelConfig, own: Any) -> str | None:
    """Have transformers dequantize weights that were stored in few bits; return by which method, or None."""
    from transformers import AutoConfig

    if config.path.endswith(".gguf"):
        return None
    stored = stored_quantisation(AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code))
    if stored is None:
        return None
    method, settings = stored
    own.quantization_config = settings | {"dequantize": True}
    return method


def _find_original(model: Any, path: str, named: str) -> Original:
    """Return where a multimodal model was loaded from: its own folder, or the cache of the hub.

    Raises:
        UsageError: it is in neither, so the parts that are not trained could not be saved.
    """
    folder = local_folder(path)
    if folder is None:
        raise UsageError(
            f"{named}: its files are not in the cache of the Hugging Face hub, from which the parts of a multimodal "
            "model that are not trained are copied\n  download the model to a folder, and set model.path to it"
        )
    return find_original(model, folder, named)


def _as_saved(config: ModelConfig, hf_config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration with the vocabulary size of the checkpoint, which `model.vocab_size` replaces later."""
    own = copy.deepcopy(hf_config)
    if config.vocab_size is None:
        return own
    from transformers import AutoConfig

    name, extra = pretrained_arguments(config.path)
    saved = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    own.get_text_config().vocab_size = saved.get_text_config().vocab_size
    return own


def on_meta_device(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """Return the configured model without adapters on torch's meta device."""
    quiet_deepspeed()
    with config_errors(config):
        return empty_model(
            hf_config, dtype=getattr(torch, config.dtype.value), trust_remote_code=config.trust_remote_code
        )


def empty_model(hf_config: PretrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Return a model on torch's meta device: every module and shape, but no numbers."""
    from transformers import AutoModelForCausalLM

    use_attention_interface(hf_config)
    own_config = copy.deepcopy(hf_config)  # setting a model's attention changes its configuration
    language = language_class(hf_config)
    with torch.device("meta"):
        if language is not None:
            return language._from_config(own_config, dtype=dtype)
        return AutoModelForCausalLM.from_config(own_config, dtype=dtype, trust_remote_code=trust_remote_code)


def check_adapters(config: ModelConfig, hf_config: PretrainedConfig) -> AdapterSummary:
    """Return what the configured adapters train, read off the whole model without its weights.

    Raises:
        UsageError: as `add_lora`, or something that is trained whole or adapted as a parameter is to be quantized.
    """
    model = on_meta_device(config, hf_config)
    if config.quantization is not Quantization.none and config.lora.path is None:
        check_quantised(model, peft_targets(model, config.lora))
    with torch.device("meta"):
        return summarize(add_lora(model, config.lora))


def skeleton(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """Return the model with its adapters, if any, on the meta device.

    A process that holds one stage of the model needs it to save the whole one.
    """
    model = on_meta_device(config, hf_config)
    if not config.lora.enabled:
        return model
    with torch.device("meta"):
        return add_lora(model, config.lora)


def quiet_deepspeed() -> None:
    """Silence what libraries print about themselves when peft or generation imports them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft uses its old names
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports deepspeed, which prints that it found no GPU
