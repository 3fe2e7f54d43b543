"""`chunkflow verify`: compare chunked and whole-sequence loss and gradients of the configured model."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Attention, Config, Cuts, Dtype, Quantization, Task
from chunkflow_cli.console import facts, stderr_console, stdout_console, working
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.acceleration import Acceleration, check_acceleration
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.dropout import remove_dropout
from chunkflow_cli.execution.guard import ROUNDING_SUSPECTED
from chunkflow_cli.execution.parity import InChunks, Parity, compare, random_sequences
from chunkflow_cli.execution.precision import use_float64_parts
from chunkflow_cli.execution.state_home import state_home
from chunkflow_cli.execution.why_not import why_not
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import known_ids, load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.own_attention import check_own_attention
from chunkflow_cli.model.positions import learned_limit
from chunkflow_cli.model.trained_weights import apply_to

LONGEST_DEFAULT = 2048


def run(loaded: LoadedConfig, *, json_output: bool = False) -> dict[str, Any]:
    """Compare, print the outcome unless `json_output` is set, and return what `--json` prints.

    The model is the configured one, with its weights, adapters and activation checkpointing. Dropout is off, because
    two forward passes with dropout cannot agree. The data is a random long sequence and short ones that fill its tail;
    under `train.task=dpo`, `orpo` and `kto` random answers, whose loss autograd knows from whole sequences.

    Raises:
        UsageError: the model cannot be loaded, or cannot run in chunks.
    """
    settle_vector_math()
    config = loaded.config
    console = stderr_console()
    device = training_device()
    dtype_name = config.verify.dtype or (Dtype.float64 if config.model.dtype is Dtype.float64 else Dtype.float32)
    dtype: torch.dtype = getattr(torch, dtype_name.value)
    hf_config = load_config(config.model)
    _check_comparable(config, hf_config, device, dtype)
    remove_dropout(hf_config.get_text_config())
    choice = choose_backend(config.model.attention, hf_config, device, dtype)
    length, chunk_size = _test_size(config, hf_config, console)
    attention.register()
    with working(console, "loading the model"):
        model = _load(config, hf_config, dtype).to(device)
    vocabulary = known_ids(hf_config)
    objective = Objective.of(config)
    lengths = _lengths(length, chunk_size, objective)
    with working(console, f"comparing {sum(lengths):,} tokens, whole and in chunks of {chunk_size:,}"):
        parity = compare(
            model,
            random_sequences(lengths, vocabulary, config.train.seed),
            InChunks(
                choice.backend, chunk_size=chunk_size, k=config.chunk.k, fill_tails=config.chunk.fill_tails,
                # Far more uneven pieces than the costs of any device would give.
                pair_weight=4 / chunk_size if config.chunk.cuts is Cuts.time else 0.0, objective=objective,
                # Small blocks, so that the past is made of several.
                state_home=state_home(config.chunk.offload_state, device, block_tokens=max(1, length // 3)),
                acceleration=Acceleration.of(config),
                share_prompts=config.preference.share_prompts,
            ),
        )  # fmt: skip
    if not parity.passed and _may_be_rounding(config, parity):
        console.print(
            f"float32: the gradient differs by {parity.grad_rel_error:.1e}, which rounding can do to some weights; "
            "comparing again in float64",
            soft_wrap=True,
        )
        del model
        again = copy.deepcopy(config)
        again.verify.dtype, again.model.attention = Dtype.float64, Attention.auto
        return run(replace(loaded, config=again), json_output=json_output)
    result = {
        "passed": parity.passed,
        "loss_rel_error": parity.loss_rel_error,
        **asdict(parity),
        "dtype": dtype_name.value,
        "chunk_size": chunk_size,
        "k": config.chunk.k,
        "length": length,
        "attention": choice.backend.name,
        "task": config.train.task.value,
    }
    if not json_output:
        _print(stdout_console(), result, config)
    return result


def _check_comparable(config: Config, hf_config: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the model can be trained in chunks, and compared in this data type.

    Raises:
        UsageError: says why not.
    """
    check_own_attention(config.model, hf_config)
    check_acceleration(config, hf_config, device)
    if Acceleration.of(config) and dtype is torch.float64:
        raise UsageError(
            "verify.dtype=float64: compiled code (model.compile) and kernels (model.kernels) are compared in float32\n"
            "  leave verify.dtype out, or verify without them"
        )
    if (reason := why_not(hf_config)) is not None:
        raise UsageError(f"models of type {hf_config.model_type!r} cannot be trained in chunks\n  {reason}")


def _may_be_rounding(config: Config, parity: Parity) -> bool:
    """Return whether a difference in float32 may be rounding, so that float64 must decide."""
    has_float64 = not Acceleration.of(config) and config.model.quantization is Quantization.none
    is_small = not parity.is_float64 and parity.grad_rel_error < ROUNDING_SUSPECTED
    return is_small and has_float64 and config.verify.dtype is None


def _test_size(config: Config, hf_config: Any, console: Console) -> tuple[int, int]:
    """Return the length of the long sequence and the chunk size, reduced where the sequence would be a single chunk.

    Raises:
        UsageError: the model has learned fewer positions than `verify.length`.
    """
    chunk_size = config.chunk.size
    length = config.verify.length or min(3 * chunk_size + chunk_size // 2, LONGEST_DEFAULT)
    length = max(length, 8)
    limit = learned_limit(config.model, hf_config, length)
    if limit is not None and config.verify.length is not None:
        raise UsageError(f"verify.length={length}: the model has learned only {limit} positions")
    length = limit or length
    if chunk_size * 2 > length:
        smaller = max(1, length * 2 // 7)
        console.print(
            f"chunk.size={chunk_size:,} is too large for a test of {length:,} tokens: testing chunks of {smaller:,}",
            soft_wrap=True,
        )
        chunk_size = smaller
    return length, chunk_size


def _load(config: Config, hf_config: Any, dtype: torch.dtype) -> Any:
    """Return the configured model, without dropout."""
    model: Any = load_model(config.model, hf_config, dtype=dtype, attention=attention.NAME, seed=config.train.seed)
    use_float64_parts(model, dtype)
    enable_activation_checkpointing(model, config.model.activation_checkpointing)
    if config.model.lora.enabled:
        model = add_lora(model, replace(config.model.lora, dropout=0.0))
        _give_adapters_gradient(model)
    apply_to(model, config.optim)
    return model


def _lengths(length: int, chunk_size: int, objective: Objective | None) -> tuple[int, ...]:
    """Return the lengths of the random sequences: the long one, and short ones that fill the tail of its chunks.

    Of an objective: two long answers, two that share a chunk, and two that are in chunks of their own.
    """
    if objective is None:
        return length, max(2, chunk_size // 3), max(2, chunk_size // 5)
    short = (chunk_size // 4, chunk_size // 5, chunk_size * 2 // 3, chunk_size * 3 // 4)
    return length, max(2, length * 3 // 4), *(max(2, each) for each in short)


def _give_adapters_gradient(model: Any) -> None:
    """Draw the matrix of each adapter that begins at zero at random: with zeros the other one gets no gradient."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.02)


def _print(console: Console, result: dict[str, Any], config: Config) -> None:
    loss = f"{result['loss_whole']:.6f} whole, {result['loss_chunked']:.6f} chunked"
    rows = {
        "model": config.model.path,
        "test": f"{result['length']:,} tokens in chunks of {result['chunk_size']:,}, K = {result['k']}, "
        f"{result['dtype']}, attention {result['attention']}"
        + ("" if config.train.task is Task.sft else f", train.task={config.train.task.value}"),
        "loss": f"{loss} ({result['loss_rel_error']:.1e} relative difference)",
        "gradient": f"{result['grad_rel_error']:.1e} relative difference, {result['tolerance']:.0e} allowed",
        "worst weight": f"{result['grad_max_rel_error_parameter']} ({result['grad_max_rel_error']:.1e})",
    }
    console.print(facts((name, Text(sentence)) for name, sentence in rows.items()))
    passed = Text.assemble(("passed", "green"), ": chunked training of this model is exact")
    failed = Text.assemble(("failed", "red"), ": chunked training of this model differs from whole-sequence training")
    console.print(passed if result["passed"] else failed)
