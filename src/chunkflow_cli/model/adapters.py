"""Low-rank adapters (LoRA) with peft: add them to a model, load saved ones, summarize what they train, save them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from chunkflow_cli.config.schema import LoraConfig
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG, without_peft_warnings
from chunkflow_cli.model.adapter_summary import saved_modules
from chunkflow_cli.model.adapter_targets import (
    MODULES_KEY,
    SAVED_KEY,
    Targets,
    find_targets,
    in_any_layer,
    shortest,
    shortest_as_text,
)
from chunkflow_cli.model.folder import check_checksums
from chunkflow_cli.model.language_part import is_language_part, left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = frozenset({
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "modules_to_save",
    "ensure_weight_tying", "init_lora_weights", "fan_in_fan_out", "runtime_config", "megatron_core",
    "qalora_group_size",
})  # fmt: skip
"""Settings of a saved adapter that training can continue with. Any other setting would change the computation."""


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Return the peft model in train mode: `model` with adapters, everything else frozen.

    With `model.lora.path` the adapters are those saved there. A model on the meta device gets their shapes.

    Raises:
        UsageError: a name in `model.lora` matches nothing that the model has, or the saved adapter does not fit.
    """
    from peft import get_peft_model

    saved = Path(lora.path) if lora.path is not None else None
    settings = _new_settings(model, lora) if saved is None else saved_settings(lora)
    with without_peft_warnings():
        try:
            peft_model = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            key = "model.lora" if saved is None else f"model.lora.path={saved}"
            raise UsageError(f"{key}: {first_line(error)}") from error
        model.disable_input_require_grads()  # as in `enable_activation_checkpointing`
        if saved is not None:
            _load(peft_model, saved)
    peft_model.peft_config["default"].base_model_name_or_path = _name_from_anywhere(model)
    peft_model.train()
    return peft_model  # type: ignore[no-any-return]


def saved_settings(lora: LoraConfig) -> Any:
    """Return peft's settings of the adapter in `model.lora.path`.

    Raises:
        UsageError: there is none, it is of a kind that is not trained here, or `model.lora` contradicts it.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftConfig

    folder = Path(lora.path or "")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"model.lora.path={folder}: there is no {ADAPTER_CONFIG}\n"
            "  set it to the folder of a LoRA adapter, such as final/ of a run with model.lora.enabled=true"
        )
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"model.lora.path={folder}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, PeftLoraConfig):
        kind = getattr(settings.peft_type, "value", settings.peft_type)
        raise UsageError(f"model.lora.path={folder} is an adapter of the kind {kind}: only LoRA can be trained")
    for field in fields(settings):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(settings, field.name)
        if field.name not in SUPPORTED and value != default:
            raise UsageError(
                f"model.lora.path={folder}: its {ADAPTER_CONFIG} has {field.name}={value}, which is not supported\n"
                "  merge that adapter with peft, and train the merged model"
            )
    _refuse_contradictions(lora, settings)
    settings.inference_mode, settings.init_lora_weights = False, True
    return settings


def _refuse_contradictions(lora: LoraConfig, settings: Any) -> None:
    """Refuse keys that contradict the saved adapter, whose rank and targets cannot change."""
    defaults = LoraConfig()
    theirs = {"r": settings.r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    theirs |= {"use_rslora": settings.use_rslora, "use_dora": settings.use_dora}
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        value = getattr(settings, name)
        theirs[name] = value if isinstance(value, str) else sorted(value or ())
    for name, value in theirs.items():
        own = getattr(lora, name)
        if own != getattr(defaults, name) and (sorted(own) if isinstance(own, list) else own) != value:
            raise UsageError(
                f"model.lora.{name}={own} contradicts the adapter in model.lora.path={lora.path}, which has {value}\n"
                f"  remove model.lora.{name}: it comes from the adapter"
            )


def peft_targets(model: Any, lora: LoraConfig) -> Targets:
    """Return what gets an adapter and what is trained whole, as peft is told; on the meta device, too.

    Raises:
        UsageError: as `find_targets`.
    """
    return _as_peft_adapts(model, find_targets(model, lora))


def _new_settings(model: Any, lora: LoraConfig) -> Any:
    """Return peft's settings for new adapters."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    targets = peft_targets(model, lora)
    towers = left_out(model)
    parameter_names = [name for name, _ in model.named_parameters(remove_duplicate=False)] + sorted(towers.tensors)
    for key, is_set, what, off in (
        (f"dropout={lora.dropout:g}", lora.dropout > 0, "dropout", "dropout=0"),
        ("use_dora=true", lora.use_dora, "DoRA", "use_dora=false"),
    ):
        if targets.parameters and is_set:
            raise UsageError(
                f"model.lora.{key}: the adapters of {', '.join(in_any_layer(targets.parameters))} are on parameters, "
                f"for which there is no {what}\n  set model.lora.{off}"
            )
    names = [name for name, _ in model.named_modules() if name]
    towers_names = [name.rpartition(".")[0] for name in towers.tensors]
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=shortest(targets.modules, names),
        target_parameters=shortest(targets.parameters, parameter_names) or None,
        modules_to_save=shortest_as_text(targets.saved, [*names, *towers_names]) or None,
        # As one weight before, embedding and head stay one.
        ensure_weight_tying=_saves_tied_weight(model, targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # The towers of a multimodal model have layers of the same names.
        exclude_modules=rf"(?:{'|'.join(map(re.escape, towers.parts))})(?:\..*)?" if towers.parts else None,
        # Without a task, peft saves which class the names of the adapter fit, and loads the base as that one.
        task_type=None if is_language_part(model) else TaskType.CAUSAL_LM,
    )


def _saves_tied_weight(model: Any, targets: Targets) -> bool:
    """Return whether `modules_to_save` names a weight that embedding and head share: both then use the trained copy.

    Raises:
        UsageError: peft cannot tie them, or the other one of the two has an adapter.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    both = [name for name, module in model.named_modules() if module is embedding or module is head]
    named = [name for name in both if name in targets.saved]
    for name in both if named else []:
        if name in targets.modules:
            raise UsageError(
                f"{SAVED_KEY} names {named[0]}, and {MODULES_KEY} names {name}, which has the same weight\n"
                "  leave one of them out"
            )
        if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            raise UsageError(
                f"{SAVED_KEY} names {named[0]}, a weight that embedding and head share, and peft keeps them one only "
                f"if they are called {' and '.join(EMBEDDING_LAYER_NAMES)}, not {name}\n  name it in {MODULES_KEY}"
            )
    return bool(named)


def _as_peft_adapts(model: Any, targets: Targets) -> Targets:
    """Return the same targets in the form in which peft adapts them and nothing else.

    For some families with experts, peft takes names such as gate_proj for the experts' fused parameters, and dense
    layers of that name would get no adapter. As parameters, `mlp.gate_proj.weight`, they keep theirs.
    """
    from peft import LoraConfig as PeftLoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # peft before 0.19 takes names as they are
        return targets

    def is_taken(name: str) -> bool:
        settings = PeftLoraConfig(target_modules=[name])
        try:
            convert(settings, model, None)
        except ValueError:  # it wants gate_proj and up_proj together
            return True
        return name not in settings.target_modules

    by_ending: dict[str, bool] = {}
    for name in targets.modules:
        ending = name.rpartition(".")[2]
        if ending not in by_ending:
            by_ending[ending] = is_taken(name)
    taken = {name for name in targets.modules if by_ending[name.rpartition(".")[2]]}
    modules = tuple(name for name in targets.modules if name not in taken)
    parameters = tuple(sorted([*targets.parameters, *(f"{name}.weight" for name in taken)]))
    return Targets(modules, parameters, targets.saved)


def _load(peft_model: Any, folder: Path) -> None:
    """Fill adapters with the weights saved in a folder; those of a model on the meta device stay without numbers.

    Raises:
        UsageError: the weights cannot be read, or are not those of these adapters.
    """
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if any(parameter.is_meta for parameter in peft_model.parameters()):
        return
    where = f"model.lora.path={folder}"
    check_checksums(folder, where)
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        saved = tuple(f"base_model.model.{name}." for name, _ in saved_modules(peft_model))
        others = [name for name in weights if "lora_" not in name and not name.startswith(saved)]
        if not others:
            result = set_peft_model_state_dict(peft_model, weights)
    except Exception as error:  # safetensors, pickle and torch raise errors of their own for damaged or unfit files
        raise UsageError(f"{where}: its weights do not fit this model or are damaged\n  {first_line(error)}") from error
    if others:
        raise UsageError(
            f"{where} holds {others[0]}, a weight of the base model that its modules_to_save do not name\n"
            "  merge that adapter with peft, and train the merged model"
        )
    missing = [name for name in result.missing_keys if "lora_" in name]
    problem = [f"has no {name}" for name in missing] + [f"has {name}, too" for name in result.unexpected_keys]
    if problem:
        raise UsageError(
            f"{where} {problem[0]}: it is not an adapter of this model ({len(problem)} names differ)\n"
            f"  set model.path to the model that it was trained on"
        )


def _name_from_anywhere(model: Any) -> str:
    """Return the name of a model that loads from any folder: the absolute path of a local one, or its id on the hub."""
    name = str(model.name_or_path)
    return str(Path(name).resolve()) if name and Path(name).exists() else name
