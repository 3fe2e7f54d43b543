"""Low-rank adapters (LoRA) with peft: add them to a model, load saved ones, summarise what they train, save them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import Init, LoraConfig, ModelConfig, Quantization
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG
from chunkflow_cli.model.adapter_targets import (
    MODULES_KEY,
    PARAMETERS_KEY,
    SAVED_KEY,
    Targets,
    find_targets,
    fused_parameters,
    in_any_layer,
    shortest,
    shortest_as_text,
)
from chunkflow_cli.model.language_part import is_language_part, left_out
from chunkflow_cli.model.rope_scaling import loading_arguments

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
WORTH_A_WARNING = 0.01
"""Share of weights outside of linear layers above which a warning names their missing adapters."""


@dataclass(frozen=True)
class AdapterSummary:
    """Summary of what the adapters of a model train, and what they leave out."""

    kind: str
    """LoRA | DoRA"""
    trained: int
    """Weights of the adapters, and of the modules that are trained whole."""
    base: int
    """Weights of the model without adapters."""
    where: tuple[str, ...]
    """The adapted layers and parameters, without the numbers of their layers."""
    rank: int
    saved: tuple[str, ...]
    """The modules that are trained whole, without the numbers of their layers."""
    saved_weights: int
    """Number of weights in these modules; shared weights count once."""
    unreached: tuple[str, ...]
    """Fused parameters without an adapter, such as those of experts: no name of a linear layer reaches them."""
    unreached_share: float
    """Share of the model's weights in these parameters, between 0 and 1."""

    def __str__(self) -> str:
        where = ", ".join(self.where)
        share = 100 * self.trained / self.base
        whole = f", and all {self.saved_weights:,} of {', '.join(self.saved)}" if self.saved else ""
        return (
            f"{self.kind} trains {share:.2g} % of the weights: {self.trained - self.saved_weights:,} in adapters of "
            f"rank {self.rank} on {where}{whole}"
        )

    @property
    def warning(self) -> str | None:
        """Warning about fused parameters without an adapter, with the key that adapts them; None if they are few."""
        if self.unreached_share < WORTH_A_WARNING:
            return None
        verb = "has" if len(self.unreached) == 1 else "have"
        return (
            f"{' and '.join(self.unreached)} {verb} no adapter: {100 * self.unreached_share:.0f} % of the weights are "
            f"no linear layers. To adapt them: {PARAMETERS_KEY}=[{','.join(self.unreached)}]"
        )


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Return the peft model in train mode: `model` with adapters, everything else frozen.

    With `model.lora.path` the adapters are those saved there. A model on the meta device gets their shapes.

    Raises:
        UsageError: a name in `model.lora` matches nothing that the model has, or the saved adapter does not fit.
    """
    from peft import get_peft_model

    saved = Path(lora.path) if lora.path is not None else None
    settings = _new_settings(model, lora) if saved is None else saved_settings(lora)
    with _without_peft_warnings():
        try:
            peft_model = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            key = "model.lora" if saved is None else f"model.lora.path={saved}"
            raise UsageError(f"{key}: {str(error).splitlines()[0]}") from error
        if saved is not None:
            _load(peft_model, saved)
    peft_model.peft_config["default"].base_model_name_or_path = _name_from_anywhere(model)
    peft_model.train()
    return peft_model  # type: ignore[no-any-return]


def summarize(peft_model: Any) -> AdapterSummary:
    """Return what the adapters of a whole model train; on the meta device, too."""
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, layer, parameter in adapted_layers(peft_model):
        if parameter is None:
            modules[name] = layer
        else:
            parameters[f"{name}.{parameter}"] = getattr(layer.get_base_layer(), parameter)
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in peft_model.parameters()) - trained
    adapted = {id(parameter) for parameter in parameters.values()}
    bare = {name: parameter for name, parameter in _fused(peft_model).items() if id(parameter) not in adapted}
    saved = dict(saved_modules(peft_model))
    copies = {parameter for module in saved.values() for parameter in module.parameters()}
    return AdapterSummary(
        kind="DoRA" if peft_model.peft_config["default"].use_dora else "LoRA",
        trained=trained,
        base=base,
        where=tuple(sorted({name.rpartition(".")[2] for name in modules})) + tuple(in_any_layer(parameters)),
        rank=peft_model.peft_config["default"].r,
        saved=tuple(in_any_layer(saved)),
        saved_weights=sum(parameter.numel() for parameter in copies),
        unreached=tuple(in_any_layer(bare)),
        unreached_share=sum(parameter.numel() for parameter in bare.values()) / base,
    )


def adapted_layers(peft_model: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Yield each layer that peft has put an adapter on: its name in the Hugging Face model, and the layer itself.

    The third is the name of the parameter that the adapter is on; None if it is on the layer's weight as a whole.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            # Several adapted parameters of a layer are wrapped one around the other.
            yield name.replace(".base_layer", ""), layer, getattr(layer, "parameter_name", None)


def saved_modules(peft_model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that is trained whole: its name in the Hugging Face model, and the copy that is trained."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, trained_copy(module)


def trained_copy(module: Any) -> Any:
    """Return the copy that is trained instead of a module under `modules_to_save`; any other module itself."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


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
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        saved = tuple(f"base_model.model.{name}." for name, _ in saved_modules(peft_model))
        others = [name for name in weights if "lora_" not in name and not name.startswith(saved)]
        if not others:
            result = set_peft_model_state_dict(peft_model, weights)
    except Exception as error:  # safetensors, pickle and torch raise errors of their own for damaged or unfit files
        raise UsageError(
            f"{where}: its weights do not fit this model or are damaged\n  {_first_line(error)}"
        ) from error
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


def save_adapters(peft_model: Any, folder: Path, weights: Mapping[str, torch.Tensor], card: str) -> None:
    """Save adapters as a peft folder with `card` as its README.md.

    Args:
        weights: by their names in the model; of a shared one, one name is enough.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    by_every_name = {alias: weights[name] for group in names.values() for name in group if name in weights
                     for alias in group}  # fmt: skip
    with _without_peft_warnings():
        # The base's embeddings are as they were. Unless told so, peft asks the hub for their size.
        peft_model.save_pretrained(str(folder), state_dict=by_every_name, save_embedding_layers=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def adapter_card(config: ModelConfig, peft_model: Any) -> str:
    """Return the README.md of saved adapters: what they are, and how to load them."""
    settings = peft_model.peft_config["default"]
    base = settings.base_model_name_or_path or config.path
    is_local = Path(base).is_absolute()
    loader = "AutoPeftModelForCausalLM" if settings.task_type else "AutoPeftModel"
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- chunkflow"]
    lines += [] if is_local else [f"base_model: {base}"]
    note = ""
    arguments = loading_arguments(config, peft_model.get_base_model().config)
    if config.path.endswith(".gguf"):
        arguments["gguf_file"] = Path(config.path).name
    extra = "".join(f", {name}={value!r}" for name, value in arguments.items())
    if config.quantization is not Quantization.none:
        note += (
            f"\nIts base was stored in {config.quantization.value} (bitsandbytes) in training. "
            "`chunkflow export --merge` merges it into these weights.\n"
        )
    if config.rope_scaling:
        note += (
            f"\nIt was trained with the base's rotary embedding scaled, by `{dict(config.rope_scaling)}`, and is of no "
            "use without it. An adapter does not hold this setting"
            + (": load it as below.\n" if extra else ": use `chunkflow export --merge`.\n")
        )
    if config.init is Init.random:
        note += (
            "\nThe base model was initialised at random (`model.init=random`). Only `chunkflow export --merge` makes "
            "the same base again.\n"
        )
    targets = f"- modules: {', '.join(sorted(settings.target_modules or ())) or 'none'}\n"
    if settings.target_parameters:
        targets += f"- parameters: {', '.join(sorted(settings.target_parameters))}\n"
    if settings.modules_to_save:
        targets += f"- trained whole: {', '.join(sorted(settings.modules_to_save))}\n"
    return "\n".join(lines) + (
        f"\n---\n\n# LoRA adapter\n\nAn adapter for `{base}`, trained with chunkflow: rank {settings.r}, alpha "
        f"{settings.lora_alpha:g}.\n\n{targets}{note}\n"
        f"```python\nfrom peft import {loader}\n\n"
        f'model = {loader}.from_pretrained("FOLDER"{extra})\n```\n\n'
        "`FOLDER` is the folder of this file. `chunkflow export RUN --merge` makes a whole model of it.\n"
    )


def _fused(peft_model: Any) -> dict[str, nn.Parameter]:
    """Return the fused parameters of a model with adapters by their names without them."""
    model = peft_model.get_base_model()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name.replace(".base_layer", ""): parameters[name] for name in fused_parameters(model)}


def _name_from_anywhere(model: Any) -> str:
    """Return the name of a model that loads from any folder: the absolute path of a local one, or its id on the hub."""
    name = str(model.name_or_path)
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Silence peft's advice on tied weights and name patterns, which `find_targets` and `merge` deal with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield
