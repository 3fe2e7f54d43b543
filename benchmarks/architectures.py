"""The guard of `train` over every causal language model of the installed transformers, and every multimodal one.

    python benchmarks/architectures.py                          all, about ten minutes of one core
    python benchmarks/architectures.py qwen3_5_text jamba       some
    python benchmarks/architectures.py --docs                   and write the table of docs/models.md

Each architecture is checked in its default configuration; where that has no values, or leaves out a kind of layer, in
that of a published model (`SETTINGS`). Of a multimodal model, the language part is checked. A whole model is never
built. Each check is a process of its own, with a limit of time and memory. `--docs` keeps results in
benchmarks/architectures.json; a run of some replaces theirs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import resource
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.errors import ChunkflowError
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.execution.why_not import why_not
from chunkflow_cli.model.hf_config import (
    NoLanguagePartError,
    refuse_length_dependent_rope,
    refuse_unsupported_attention,
)
from chunkflow_cli.model.loading import empty_model
from common import emit, hardware, say

HERE = Path(__file__).parent
RESULTS = HERE / "architectures.json"
PAGE = HERE.parent / "docs" / "models.md"
BEGIN, END = "<!-- benchmarks/architectures.py: begin -->", "<!-- benchmarks/architectures.py: end -->"
CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WRAPPERS: dict[str, Any] = {
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
"""Decoders of text with towers for images, video or sound."""

INDEXER = {
    "indexer_budget": 2048, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 256, "ple_layer_ids": [1, 2], "eos_token_id": 0,
}  # fmt: skip
COMPASS = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
INKLING = {"unpadded_vocab_size": 200058, "log_scaling_n_floor": 128000}  # by default, neither is in use
GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
GLM_V = {"text_config": {"rope_parameters": GLM_ROPE}}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {
        "mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6, "n_routed_experts": 64,
    }},
    "diffusion_gemma": {"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 0, "<|visual token 000000|>": 1}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 16, 16, 16]},
        }
    },
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 768}}
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {"num_attention_heads": 32, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
    },
    "step3p7": {"text_config": {"sliding_window": 512}},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152}},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 500_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {
        "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma4_text": {"num_kv_shared_layers": 20, "num_hidden_layers": 35, "final_logit_softcapping": 30.0},
    "glm4_moe": {"head_dim": 128},
    **dict.fromkeys(("glm46v", "glm4v", "glmga"), GLM_V),
    "glm4v_moe": {"text_config": {"rope_parameters": GLM_ROPE, "head_dim": 128}},
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, "num_hidden_layers": 40},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "inkling_mm_model": {"text_config": INKLING},
    "inkling_text": INKLING,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 5 + ["conv"], "num_hidden_layers": 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 6, "num_hidden_layers": 24},
    "minimax_m3_vl_text": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
}  # fmt: skip
"""What a published model sets that the default configuration leaves out: a kind of layer, or sharing."""


CANNOT_BE_BUILT = {
    "requires the timm library": "its vision tower needs the package timm, which is not installed here",
    "pixel_values|input_features|object has no attribute 'device'": "it takes no text without images or sound, so that "
    "training in chunks can be compared with nothing",
}
"""What errors say of a small copy."""


@dataclass(frozen=True)
class Outcome:
    """What the guard says of an architecture."""

    kind: str
    """decoder, wrapper, encoder, encoder-decoder, drafter or multimodal; the first two are checked."""
    result: str
    """exact, refused, not built, failed, or not checked."""
    grad_rel_error: float | None = None
    is_float64: bool = False
    why: str = ""
    cpu_seconds: float = 0.0
    peak_mib: int = 0


CHECKED = ("decoder", "wrapper")
KINDS = {
    "bert-generation": "encoder", "trocr": "encoder-decoder", "musicgen": "multimodal", "musicgen_melody": "multimodal",
    "gemma4_assistant": "drafter", "gemma4_unified_assistant": "drafter",
}  # fmt: skip
"""What transformers' own lists and configurations do not tell. A drafter reads keys of another model."""


def kind_of(model_type: str) -> str:
    """Tell decoders of text from other models, by the configuration and by transformers' own lists."""
    if model_type in KINDS:
        return KINDS[model_type]
    config = _config(model_type, {})
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if model_type in WRAPPERS:
        return "wrapper"
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    has_tower = any(part in name for name in config.sub_configs for part in ("vision", "audio", "vq_"))
    return "multimodal" if has_tower else "decoder"


def _config(model_type: str, settings: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def check(model_type: str) -> Outcome:
    """Run the guard on one architecture, in this process."""
    kind = kind_of(model_type)
    if kind not in CHECKED:
        return Outcome(kind, "not checked")
    before = time.process_time()
    error_, is_float64, why = None, False, ""
    try:
        config = _config(model_type, SETTINGS.get(model_type, {}))
        refuse_length_dependent_rope(config.get_text_config())
        refuse_unsupported_attention(config.get_text_config())
        parity = guard(config, requested=Attention.auto, device=torch.device("cpu"), dtype=torch.float32)
    except ChunkflowError as error:
        is_known = why_not(config) is not None or _why_not_loaded(config) is not None
        is_unproved = "train.guard" in str(error) or isinstance(error.__cause__, ImportError)
        result, why = "not built" if is_unproved and not is_known else "refused", _shortened(config, str(error))
    except Exception as error:  # a crash of the guard is a result, too
        result, why = "failed", f"{type(error).__name__}: {str(error)[:300]}"
    else:
        result, error_, is_float64 = "exact", parity.grad_rel_error, parity.is_float64
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Outcome(kind, result, error_, is_float64, why, round(time.process_time() - before, 1), peak)


def _shortened(config: Any, message: str) -> str:
    """Return what is known of the reason, or the reason in a message of the guard, without the sentence around it."""
    if known := why_not(config):
        return known
    if unknown := _why_not_loaded(config):
        return unknown
    for sign, reason in CANNOT_BE_BUILT.items():
        if re.search(sign, message):
            return reason
    _, _, reason = message.partition("in chunks")
    lines = (reason or message).strip(":\n ").splitlines()
    return " ".join(line.strip() for line in lines if "chunkflow verify" not in line)


def _why_not_loaded(config: Any) -> str | None:
    """Return why loading refuses the model, before any guard; None if it does not."""
    try:
        empty_model(config, dtype=torch.float32)
    except NoLanguagePartError as error:
        return "it has" + str(error).partition(" has")[2].partition(", so")[0]
    except Exception as error:  # as in `model.hf_config.unreadable`; others are for the guard
        if "Unrecognized configuration class" in str(error):
            return "AutoModelForCausalLM does not know it, and it has no language part of its own"
    return None


def check_apart(model_type: str, *, seconds: float, memory_gib: float) -> Outcome:
    """Run the guard on one architecture, in a process that is stopped at a limit."""
    context = multiprocessing.get_context("fork")  # the import of torch and transformers takes longer than the check
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        sender.send(check(model_type))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return Outcome(kind_of(model_type), "failed", why=f"not done within {seconds:.0f} seconds")
    except EOFError:
        return Outcome(kind_of(model_type), "failed", why="the process was killed")
    finally:
        process.kill()
        process.join()


def write_page(outcomes: dict[str, dict[str, Any]]) -> None:
    """Replace the generated section of docs/models.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{PAGE} has no section between {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{section(outcomes)}\n{END}{after}", encoding="utf-8")


def section(outcomes: dict[str, dict[str, Any]]) -> str:
    """Return the generated section: counts, what is exact and how far off, and why the others are refused."""
    kinds = [each["kind"] for name, each in outcomes.items() if name in CAUSAL]
    others = ("encoder", "encoder-decoder", "drafter", "wrapper", "multimodal model")
    counts = ", ".join(f"{kinds.count(kind.removesuffix(' model'))} {kind}s" for kind in others[:-1])
    decoders, wrappers = (
        {name: each for name, each in sorted(outcomes.items()) if each["kind"] == kind} for kind in CHECKED
    )
    lines = [
        f"transformers {transformers.__version__} lists {len(kinds)} causal language models: {len(decoders)} text "
        f"decoders, {counts} (next table) and {kinds.count('multimodal')} other {others[-1]}s.",
        f"Of the decoders, {_exact(decoders)} train exactly in chunks. The number next to a name is the relative "
        "difference between gradients in chunks and of whole sequences, on a small copy in float32 or, where marked "
        "with *, float64.",
        "",
        *_tables(decoders),
        "",
        f"It lists {len(wrappers)} multimodal wrappers around a text decoder. The [language part](#multimodal-models) "
        f"of {_exact(wrappers)} trains exactly in chunks:",
        "",
        *_tables(wrappers),
    ]
    return "\n".join(lines)


def _exact(outcomes: dict[str, dict[str, Any]]) -> int:
    return sum(each["result"] == "exact" for each in outcomes.values())


def _tables(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of what is exact, and one of what is refused, and why."""
    exact = [f"{name} {_error(each)}" for name, each in outcomes.items() if each["result"] == "exact"]
    reasons: dict[str, list[str]] = {}
    for name, each in outcomes.items():
        if each["result"] != "exact":
            reasons.setdefault(_reason(each), []).append(name)
    rows = (f"| {', '.join(names)} | {reason} |" for reason, names in sorted(reasons.items(), key=lambda each: each[1]))
    return [*_grid(exact, 4), "", "| refused | why |", "|---|---|", *rows]


def _error(outcome: dict[str, Any]) -> str:
    mantissa, _, exponent = f"{outcome['grad_rel_error']:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" + ("*" if outcome["is_float64"] else "")


def _grid(cells: list[str], columns: int) -> list[str]:
    """Return a table that reads column by column."""
    rows = -(-len(cells) // columns)
    padded = cells + [""] * (rows * columns - len(cells))
    lines = [" | ".join(padded[row::rows]) for row in range(rows)]
    return ["|" + " exact |" * columns, "|" + "---|" * columns, *(f"| {line} |" for line in lines)]


def _reason(outcome: dict[str, Any]) -> str:
    """Return a reason without what differs between models: the name of a class, the value of a setting."""
    reason = outcome["why"].partition(": it cannot be trained")[0].partition(", and chunks do not")[0]
    reason = re.sub(r"^[A-Z]\w*(?= (computes|uses|keeps))", "it", reason)
    reason = re.sub(r"\(\w+=\S+ in config\.json; ", "(", reason)
    return (reason if outcome["result"] == "refused" else f"{outcome['result']}: {reason}").replace("|", "\\|")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE", help="architectures; by default all")
    parser.add_argument("--seconds", type=float, default=180, help="limit for one architecture")
    parser.add_argument("--memory-gib", type=float, default=6.0, help="limit for one architecture")
    parser.add_argument(
        "--docs", action="store_true", help="merge into benchmarks/architectures.json and docs/models.md"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return parser


def _checked(names: Iterable[str], seconds: float, memory_gib: float) -> dict[str, dict[str, Any]]:
    outcomes = {}
    for name in names:
        outcome = check_apart(name, seconds=seconds, memory_gib=memory_gib)
        outcomes[name] = asdict(outcome)
        say(f"{name}: {outcome.kind}, {outcome.result} {outcome.why or outcome.grad_rel_error or ''}")
    return outcomes


def main() -> None:
    args = _parser().parse_args()
    everything = {**CAUSAL, **WRAPPERS}
    if unknown := sorted(set(args.names) - set(everything)):
        raise SystemExit(f"no language models of transformers {transformers.__version__}: {', '.join(unknown)}")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settle_vector_math()
    outcomes = _checked(args.names or everything, args.seconds, args.memory_gib)
    if args.docs:
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        merged = dict(sorted((known | outcomes).items()))
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        write_page(merged)
    results = [each["result"] for each in outcomes.values()]
    counts = {result: results.count(result) for result in dict.fromkeys(results)}
    versions = {"transformers": transformers.__version__, "counts": counts}
    emit({**versions, "hardware": hardware(), "architectures": outcomes}, args.out)


if __name__ == "__main__":
    main()
