"""What the proof measures: its sections and their rows, as plain data. Nothing here imports torch.

docs/gpu.md shows these rows, empty until they have been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

GIB = 2**30
MINUTES = 9
"""Minutes that the whole proof may take, from the installation on."""
MINUTES_OF_WHOLE_MODEL = 20
"""From so many minutes on, the longest sample is trained on all layers."""
GOOD = ("passed", "refused", "not here")
"""What a row may be in a section that passes or fails."""
PARITY = ("parity", "steps")
"""Sections whose rows pass or fail."""


@dataclass(frozen=True)
class Case:
    """A row."""

    labels: tuple[str, ...]
    """What stands in the first columns."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the section needs to measure it."""
    process: str = ""
    """Neighbors with the same name share a process. DeepSpeed does not give back all memory of a run."""


@dataclass(frozen=True)
class Column:
    """A column of measured values."""

    key: str
    title: str
    show: Callable[[float], str]


@dataclass(frozen=True)
class Section:
    """A table: what it shows, and how long its process may take."""

    name: str
    title: str
    about: str
    limit_seconds: float
    """0 of a section that is computed from another one's rows."""
    label_titles: tuple[str, ...]
    columns: tuple[Column, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Part:
    """Cases of a section that one process measures, from `first` up to `stop`."""

    section: Section
    first: int
    stop: int

    def __str__(self) -> str:
        return f"{self.section.name}:{self.first}:{self.stop}"

    @classmethod
    def parse(cls, text: str, found: tuple[Section, ...]) -> Part:
        """Return the part that `str` has written."""
        name, first, stop = text.split(":")
        return cls(next(section for section in found if section.name == name), int(first), int(stop))


def parts_of(section: Section) -> list[Part]:
    """Return what the processes of a section measure, in order."""
    parts, first = [], 0
    for _, cases in groupby(section.cases, key=lambda case: case.process):
        stop = first + len(list(cases))
        parts.append(Part(section, first, stop))
        first = stop
    return parts


def error(value: float) -> str:
    return f"{value:.1e}"


def times(value: float) -> str:
    return f"{value:.2f}"


def gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def milliseconds(value: float) -> str:
    return f"{1000 * value:.1f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def count(value: float) -> str:
    return f"{value:,.0f}"


def tokens_in_words(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def sections(*, dry: bool = False, minutes: float = MINUTES) -> tuple[Section, ...]:
    """Return all sections in the order in which they run.

    Args:
        dry: tiny sizes, for a CPU.
        minutes: what the proof may take. The sections share it, and what one leaves over the next ones may use.
    """
    scale = minutes / MINUTES
    return (
        _parity(dry, 60 * scale),
        _steps(dry, 80 * scale),
        _memory(dry, 75 * scale),
        _seconds(dry, 50 * scale),
        _profile(),
        _calibration(dry, 35 * scale),
        _speed(dry, 210 * scale, is_whole=minutes >= MINUTES_OF_WHOLE_MODEL),
    )


def _parity(dry: bool, limit: float) -> Section:
    attention = ("cpu", "reference") if dry else ("flash_attn", "torch_flash", "reference")
    cases = [
        Case((kind, backend, dtype), {"kind": kind, "backend": backend, "dtype": dtype})
        for kind in ("llama", "mistral, window")
        for backend in attention
        for dtype in ("float32", "bfloat16")
    ]
    cases += [
        Case(("qwen3_5", kernels, dtype), {"kind": "qwen3_5", "backend": "auto", "dtype": dtype, "kernels": kernels})
        for kernels, dtype in (("torch", "float32"), ("torch", "bfloat16"), ("fla", "bfloat16"))
    ]
    return Section(
        "parity",
        "Parity",
        "Loss and gradients in chunks and of whole sequences, each against float64. In chunks they may be at most "
        "twice as far off as whole, or 1e-5 in float32.",
        limit,
        ("model", "attention, scans", "data type"),
        (
            Column("loss_error", "loss off", error),
            Column("grad_error", "gradients off", error),
            Column("grad_error_whole", "whole off", error),
        ),
        tuple(cases),
    )


def _steps(dry: bool, limit: float) -> Section:
    settings = [
        (stage, offload, dtype)
        for offload, stages in (("none", (0, 1, 2, 3)), ("optimizer", (1, 2, 3)), ("parameters", (3,)))
        for dtype, allowed in (("float32", (0, 1, 2, 3)), ("bfloat16", (1, 3)))
        for stage in stages
        if stage in allowed
    ]
    settings += [(1, "state", "float32"), (1, "state", "bfloat16")]
    cases = [
        Case(
            (f"ZeRO-{stage}", offload, dtype),
            {"stage": stage, "offload": "none" if offload == "state" else offload, "dtype": dtype,
             "state": "host" if offload == "state" else "device"},
            f"{offload} {dtype}",
        )
        for stage, offload, dtype in settings
    ]  # fmt: skip
    return Section(
        "steps",
        "One optimizer step",
        "The change of all weights in one step of AdamW, against a plain loop over whole sequences with float32 master "
        "weights. It may be 1e-4 off in float32, and 5e-2 in bfloat16. `state` is `chunk.offload_state`.",
        limit,
        ("engine", "on the host", "data type"),
        (
            Column("loss_error", "loss off", error),
            Column("update_error", "update off", error),
            Column("seconds", "seconds", times),
        ),
        (Case(("process group", "", ""), {"group": "gloo" if dry else "nccl"}), *cases),
    )


def _memory(dry: bool, limit: float) -> Section:
    settings = {
        "ZeRO-1": "engine.zero_stage=1",
        "ZeRO-1, selective checkpointing": "engine.zero_stage=1 model.activation_checkpointing=selective",
        "ZeRO-1, full checkpointing, K = 4": "engine.zero_stage=1 model.activation_checkpointing=full chunk.k=4",
        "ZeRO-3": "engine.zero_stage=3",
        "ZeRO-1, optimizer on the host": "engine.zero_stage=1 engine.offload=optimizer",
        "ZeRO-3, parameters on the host": "engine.zero_stage=3 engine.offload=parameters",
    }
    length, chunk, short = (96, 32, 8) if dry else (32768, 8192, 1024)
    cases = [
        Case((name,), {"words": words.split(), "lengths": [length, short, length, short], "chunk_size": chunk}, name)
        for name, words in settings.items()
    ]
    return Section(
        "memory",
        "Peak memory",
        "Two steps of Llama-3.2-1B's shape in bfloat16 over a sample of 32K, in chunks of 8K: what the allocator held "
        "at most, and what `plan` prints.",
        limit,
        ("setting",),
        (
            Column("peak_bytes", "GiB measured", gib),
            Column("predicted_bytes", "GiB planned", gib),
            Column("ratio", "ratio", times),
        ),
        tuple(cases),
    )


def _seconds(dry: bool, limit: float) -> Section:
    sizes = (16, 64) if dry else (512, 2048, 8192, 32768)
    pasts = (0, 64) if dry else (0, 32768, 131072, 262144)
    block = pasts[1]
    cases = [
        Case(
            (tokens_in_words(size), tokens_in_words(past)),
            {"size": size, "past": past, "block": block, "layers": 2, "repeats": 1 if past or dry else 3},
        )
        for past in pasts
        for size in sizes
    ]
    return Section(
        "seconds",
        "Seconds of chunks",
        "Forward and backward of a chunk after the tokens before it, on two layers of Llama-3.1-8B's shape, full "
        "fine-tuning in bfloat16, against the profile of the device's data sheet.",
        limit,
        ("tokens", "after"),
        (
            Column("forward_seconds", "forward ms", milliseconds),
            Column("forward_ratio", "to profile", times),
            Column("backward_seconds", "backward ms", milliseconds),
            Column("backward_ratio", "to profile", times),
        ),
        tuple(cases),
    )


def _profile() -> Section:
    return Section(
        "profile",
        "The profile",
        "What the profile assumes, and what the seconds above say: shares of the data sheet's rate, and of the least "
        "seconds of a layer.",
        0,
        ("share of", ""),
        (
            Column("assumed", "assumed", percent),
            Column("forward", "forward", percent),
            Column("backward", "backward", percent),
        ),
        (
            Case(("rate", "linear layers"), {"coefficient": "seconds_per_token", "assumed": "matmul_efficiency"}),
            Case(("rate", "attention"), {"coefficient": "seconds_per_pair", "assumed": "attention_efficiency"}),
            Case(("60 µs a layer", "all"), {"coefficient": "fixed_seconds", "assumed": None}),
        ),
    )


def _calibration(dry: bool, limit: float) -> Section:
    sizes = (16, 32) if dry else (512, 1024, 2048, 4096)
    return Section(
        "calibration",
        "Calibration",
        "What `tune-chunk-size` fits to timed chunks of Llama-3.1-8B's shape with LoRA, kept for "
        "`plan.cost_model=measured`; and the seconds that `plan` then predicts for 8K, against those of the profile.",
        limit,
        ("model",),
        (
            Column("worst_error", "worst fit", percent),
            Column("predicted_seconds", "s predicted", times),
            Column("profile_seconds", "s by profile", times),
        ),
        (Case(("8B, LoRA",), {"sizes": sizes, "length": 128 if dry else 8192}),),
    )


def _speed(dry: bool, limit: float, *, is_whole: bool) -> Section:
    short, long = ((32, 64), 96) if dry else ((8192, 32768, 131072), 262144)
    layers, few = (2, 1) if dry else (32, 32 if is_whole else 4)

    def rows(lengths: tuple[int, ...], held: int, state: str) -> list[Case]:
        run = {"lengths": [lengths[0] if dry else 8192, *lengths], "layers": held, "state": state}
        return [
            Case((tokens_in_words(length), f"{held} of {layers}", state), {"run": run, "step": step}, f"{held} {state}")
            for step, length in enumerate(lengths, 1)
        ]

    return Section(
        "speed",
        "Training",
        "Steps of `train` over one sample: Llama-3.1-8B's shape, LoRA on all linear layers, bfloat16, chunks of 8K, "
        "K = 1, selective checkpointing. The state is on the host with `chunk.offload_state`. A run page-locks host "
        "memory when it needs more than ever before: some of those seconds, which each length has here, are hidden "
        "behind computation. MFU counts a full fine-tune without recompute, at the data sheet's rate; LoRA spares a "
        "third of its products.",
        limit,
        ("tokens", "layers", "state on"),
        (
            Column("tokens_per_second", "tokens/s", count),
            Column("mfu", "MFU", percent),
            Column("step_seconds", "seconds", times),
            Column("page_lock_seconds", "locking", times),
            Column("peak_bytes", "GiB", gib),
            Column("predicted_bytes", "GiB planned", gib),
        ),
        tuple(
            case
            for lengths, held in ((short, layers), ((long,), few))
            for state in ("device", "host")
            for case in rows(lengths, held, state)
        ),
    )
