"""Save a model as a Hugging Face folder that transformers 5 and transformers 4 read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG, read_adapter_config
from chunkflow_cli.model.progress_bars import bars_as_signs_of_life
from chunkflow_cli.model.towers import copy_processor, copy_tensors, drop_old_template

AUTO_CLASS = "AutoModelForCausalLM"
GENERATION_CONFIG = "generation_config.json"
FILE_SIZE = "5GB"
"""Largest file of weights. Writing a file gives no sign of life, and 50 GB, the default, can take an hour."""
OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""What transformers 4 calls settings of the rotary embedding in models that do not use the common names."""
KINDS_OF_4 = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
"""Kinds of rotary embedding that transformers 4 has."""


def save_model(folder: Path, model: Any, weights: Mapping[str, Any], *, skeleton: Any = None) -> None:
    """Write the model into an existing folder; of a multimodal model, the parts that were not trained, too.

    Args:
        model: the model, or the part of it that this pipeline stage holds.
        weights: all weights to save, by name.
        skeleton: the whole model without weights, if `model` is a stage.
    """
    whole = skeleton or model
    # Written on its own: transformers refuses to save sampling settings without do_sample, which published models have.
    generation = getattr(model, "generation_config", None)
    whole.generation_config = None if generation is None else type(generation)()
    with bars_as_signs_of_life():
        whole.save_pretrained(str(folder), state_dict=weights, max_shard_size=FILE_SIZE)
    whole.generation_config = generation
    save_generation(folder, generation)
    _rewrite(folder / "config.json", lambda settings: config_for_both(settings, whole.config))
    if (original := getattr(model, "original", None)) is not None:
        copy_tensors(original, folder)
        copy_processor(original, folder)


def save_generation(folder: Path, generation: Any) -> None:
    """Write a model's generation configuration, if it has one: the tokens at which it stops, and how it samples."""
    if generation is not None:
        generation.to_json_file(folder / GENERATION_CONFIG, keys_to_pop=["compile_config"])


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer into an existing folder."""
    tokenizer.save_pretrained(str(folder))
    drop_old_template(folder)
    given = {
        name: tokenizer.init_kwargs[name]
        for name in ("add_bos_token", "add_eos_token")
        if name in tokenizer.init_kwargs
    }
    _rewrite(folder / "tokenizer_config.json", lambda settings: tokenizer_for_both(settings) | given)


def loading_code(folder: Path) -> tuple[str, str]:
    """Return the two lines of Python that load a saved model or adapter.

    How the base of an adapter is loaded stands in its README.md.
    """
    package, loader = loader_of(folder)
    call = f'model = {loader}.from_pretrained("{folder}")'
    card = folder / "README.md"
    if package == "peft" and card.is_file():
        lines = card.read_text(encoding="utf-8").splitlines()
        call = next((line.replace("FOLDER", str(folder)) for line in lines if line.startswith("model = ")), call)
    return f"from {package} import {loader}", call


def loader_of(folder: Path) -> tuple[str, str]:
    """Return the package and its class that load a saved model or adapter: of a multimodal model, the model's own."""
    if (folder / ADAPTER_CONFIG).is_file():
        has_task = read_adapter_config(folder).get("task_type")
        return "peft", "AutoPeftModelForCausalLM" if has_task else "AutoPeftModel"
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}  # a finished run's may be gone
    architectures = settings.get("architectures")
    return "transformers", str(architectures[0]) if architectures and "text_config" in settings else AUTO_CLASS


def config_for_both(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return a config.json of transformers 5 with the names added that version 4 reads.

    Version 5 has the settings of rotary embeddings in `rope_parameters`, per kind of layer if they differ, and calls
    the number of experts `num_local_experts`. Version 4 would take its defaults.

    Args:
        config: the configuration that `settings` was saved from.
    """
    both = dict(settings)
    for name, part in settings.items():
        if name in type(config).sub_configs and isinstance(part, dict):
            both[name] = config_for_both(part, getattr(config, name))
    for name, now in type(config).attribute_map.items():
        if "experts" in name and now in settings:
            both[name] = settings[now]
    rope = settings.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    if not isinstance(full, dict) or "rope_theta" not in full or full.get("rope_type", "default") not in KINDS_OF_4:
        return both  # version 4 has no such model
    names = OTHER_NAMES.get(str(settings.get("model_type")), {})
    rest = dict(full)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = rest.pop(key, None)
        if value is not None:
            both[names.get(key, key)] = value
    if rest.get("rope_type", "default") != "default" or "mrope_section" in rest:
        both["rope_scaling"] = rest
    local = rope.get("sliding_attention") or {}
    if "rope_theta" in local and str(settings.get("model_type")).startswith("gemma3"):
        both["rope_local_base_freq"] = local["rope_theta"]
    return both


def tokenizer_for_both(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json of transformers 5 with the names that version 4 knows, which 5 also reads."""
    both = dict(settings)
    if both.get("tokenizer_class") == "TokenizersBackend":
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(both.get("extra_special_tokens"), list):  # version 4 expects a dictionary under this name
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both


def _rewrite(file: Path, change: Any) -> None:
    text = json.dumps(
        change(json.loads(file.read_text(encoding="utf-8"))), indent=2, sort_keys=True, ensure_ascii=False
    )
    file.write_text(text + "\n", encoding="utf-8")
