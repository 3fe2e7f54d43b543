"""Time the operations of chunks with the real model on the real device, in a process of its own.

    python -m ….training.measure --out FILE --sizes 512 1024 --budget SECONDS --overrides recipe=NAME ...
    python -m ….training.measure --out FILE --pairs 512:1 1024:2 --step 0 --overrides recipe=NAME ...

For each chunk size, smallest first, a sequence of three chunks and one standalone chunk run as in training, so that
state passes, forwards, recomputes and backwards are timed after zero, one and two earlier chunks. Each size runs twice,
with all tokens as targets and with a tenth of them, because head and loss cost time per target; an optimizer step
follows each run. Sizes that the time budget or the device's memory has no room for are left out: costs are linear, and
two sizes fix a line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkflow_cli.config.load import load
from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Config, OffloadState
from chunkflow_cli.console import progress_bar
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.engine import EngineSettings, check_settings, close_process_group
from chunkflow_cli.errors import ChunkflowError, UsageError, first_line
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.preferences import Known, PreferenceStep, Sequences
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.model.hf_config import known_ids, load_config
from chunkflow_cli.model.shape import shape_without_weights
from chunkflow_cli.planning.calibration import Calibration, MemorySample, OperationSample, fit_costs, fit_memory
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.costs import CostModel, chunk_tokens
from chunkflow_cli.planning.memory_parts import state_bytes
from chunkflow_cli.planning.memory_settings import ELEMENT_BYTES
from chunkflow_cli.planning.run_plan import RankPlan
from chunkflow_cli.planning.schedule import Op, plan
from chunkflow_cli.processes import streams
from chunkflow_cli.processes.worker import end_with_parent
from chunkflow_cli.training.assembly import Assembly, assemble
from chunkflow_cli.training.determinism import ask_for_determinism
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.setup import described_device, read_setup, scan_kernels

CHUNKS_OF_SEQUENCE = 3
FEW_TARGETS = 0.1
FEWEST_SIZES = 2


def calibrate(config: Config, sizes: Sequence[int], *, budget_seconds: float) -> Calibration:
    """Measure the configured model on this machine's device.

    Args:
        sizes: chunk sizes that may be measured.
        budget_seconds: a size that would exceed this, judged by the time of the last one, is not started.

    Raises:
        UsageError: the model cannot be loaded or trained here, or fewer than two sizes fit into the device's memory.
    """
    hf_config = load_config(config.model)
    config = replace(config, chunk=replace(config.chunk, offload_state=OffloadState.none))  # predicted from its size
    try:
        parts, device = _warmed_up(config, hf_config, min(sizes))
    except torch.OutOfMemoryError as error:
        raise _nothing_fits(min(sizes), error) from error
    operations: list[OperationSample] = []
    memory: list[MemorySample] = []
    steps: list[float] = []
    step_peaks: list[int] = []
    kept = _activation_bytes(parts, min(sizes))
    started = time.perf_counter()
    with progress_bar("timing chunks", len(sizes)) as progress:
        for index, size in enumerate(sorted(sizes)):
            began = time.perf_counter()
            peaks: list[int] = []
            try:
                for share in (1.0, FEW_TARGETS):
                    with _peak_added_to(peaks, device):
                        operations += _run(parts, size, share)
                    with _peak_added_to(step_peaks, device):
                        step_began = time.perf_counter()
                        parts.engine.step()
                        steps.append(time.perf_counter() - step_began)
            except torch.OutOfMemoryError as error:
                _say_what_fits([sample.chunk_tokens for sample in memory], size, error)
                break
            if device.type == "cpu":  # the heap keeps some memory of the chunks, and the step's buffers come on top
                peaks += step_peaks[-len(peaks) :]
            state = state_bytes(parts.shape, CHUNKS_OF_SEQUENCE * size, size, ELEMENT_BYTES[config.model.dtype.value])
            memory.append(MemorySample(size, state, max(peaks)))
            progress(index + 1)
            now = time.perf_counter()
            if index + 1 >= FEWEST_SIZES and now - started + 2.2 * (now - began) > budget_seconds:
                break
    name = present_device().name
    kernels = scan_kernels(config, present_device())
    shape = shape_without_weights(config.model, hf_config, kernels, config.optim)  # as in `plan` and `train`
    costs, worst = fit_costs(operations, step_seconds=min(steps), source=f"measured on {name}", shape=shape)
    fitted = fit_memory(memory, step_peak_bytes=min(step_peaks), activation_bytes_per_token=kept)
    return Calibration(name, shape, costs, fitted, worst)


def _say_what_fits(fitting: Sequence[int], size: int, error: torch.OutOfMemoryError) -> None:
    """Say that a size does not fit, and that the larger ones are predicted.

    Raises:
        UsageError: the sizes that fit are too few to predict others from.
    """
    if len(fitting) < FEWEST_SIZES:
        raise _nothing_fits(size, error) from error
    print(
        f"chunks of {size:,} tokens do not fit into the memory of this device ({CHUNKS_OF_SEQUENCE} of one sequence): "
        f"their costs and memory are predicted from those of {', '.join(f'{each:,}' for each in fitting)}",
        file=sys.stderr,
    )


def _nothing_fits(size: int, error: torch.OutOfMemoryError) -> UsageError:
    return UsageError(
        f"chunks of {size:,} tokens do not fit into the memory of this device: {first_line(error)}\n"
        "  name smaller ones in tune.chunk_sizes, or see what chunkflow plan counts: LoRA, engine.offload and "
        "model.activation_checkpointing save memory"
    )


def _warmed_up(config: Config, hf_config: Any, size: int) -> tuple[Assembly, torch.device]:
    """Assemble the model on this machine's device, and run it once, untimed: kernels are chosen and buffers made."""
    settle_vector_math()
    ask_for_determinism(config.train.deterministic)
    device = training_device()
    check_settings(EngineSettings(config.engine, config.optim, config.model.dtype, device))
    dtype: torch.dtype = getattr(torch, config.model.dtype.value)
    backend = choose_backend(config.model.attention, hf_config, device, dtype).backend
    parts = assemble(config, hf_config, backend, device)
    parts.engine.set_learning_rate(0.0)  # weights keep their values; the work is the same
    _run(parts, size, 1.0)
    parts.engine.step()
    return parts, device


def _activation_bytes(parts: Assembly, size: int) -> float:
    """Count the bytes per token that the layers keep for backward.

    With ZeRO-3 the result is infinite, because weights exist only within the engine's forward: `fit_memory` then
    attributes the whole slope of the measured peaks to what is kept.
    """
    module = parts.engine.module
    if parts.engine.is_divided:
        return math.inf
    assert isinstance(module, ChunkModel)
    sequence = _random_sequence(np.random.default_rng(0), size, size, 1.0, known_ids(parts.model.config))
    return activation_bytes_per_token(module, sequence)


def _run(parts: Assembly, size: int, target_share: float) -> list[OperationSample]:
    """Time one step over a long sequence and a standalone chunk; gradients stay in the engine."""
    lengths = [CHUNKS_OF_SEQUENCE * size, size]
    chunks = build_chunks(lengths, size, fill_tails=False)
    generator = np.random.default_rng(size)
    sequences = [
        _random_sequence(generator, length, size, target_share, known_ids(parts.model.config)) for length in lengths
    ]
    counts = [
        int(np.count_nonzero(sequences[sequence].targets[start:stop] != IGNORED))
        for sequence, start, stop in zip(chunks.sequence, chunks.start, chunks.stop, strict=True)
    ]
    targets = np.add.reduceat(counts, chunks.first_segment[:-1])
    tokens = chunk_tokens(chunks)
    pairs = replace(CostModel.proportional(), shape=parts.shape).chunk_pairs(chunks)
    samples: list[OperationSample] = []

    def timed(op: Op, seconds: float) -> None:
        (chunk,) = op.chunks
        samples.append(
            OperationSample(op.kind.value, float(tokens[chunk]), float(pairs[chunk]), float(targets[chunk]), seconds)
        )

    weights = np.full(len(lengths), 1.0 / max(1, sum(counts)))
    parts.runner.run((plan(chunks, 1),), StepBatch(chunks, sequences, weights), record=timed)
    return samples


def _random_sequence(
    generator: np.random.Generator, length: int, chunk_size: int, target_share: float, vocab_size: int
) -> TokenizedSample:
    ids = generator.integers(0, vocab_size, length, dtype=np.int32)
    targets = np.append(ids[1:], IGNORED).astype(np.int32)
    if target_share < 1:
        targets[np.arange(length) % chunk_size >= target_share * chunk_size] = IGNORED
    return TokenizedSample(ids, targets)


@contextmanager
def _peak_added_to(peaks: list[int], device: torch.device) -> Iterator[None]:
    """Append the most bytes held within the block: by the allocator of a GPU, or by the whole process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        peaks.append(int(torch.cuda.max_memory_allocated(device)))
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that Linux counts
        is_reset = True
    except OSError:
        is_reset = False
    yield
    if is_reset:
        status = Path("/proc/self/status").read_text().splitlines()
        peaks.append(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024)
    else:  # peak of the whole process so far: right for the larger sizes, which come last
        unit = 1 if sys.platform == "darwin" else 1024
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def compare(config: Config, pairs: Sequence[tuple[int, int]], step: int) -> dict[tuple[int, int], float]:
    """Return the measured seconds of one real optimizer step under each (chunk_size, k), over the same samples.

    Pairs that do not fit into the device's memory are left out.

    Args:
        step: index of the step in the run, from 0.

    Raises:
        UsageError: the model or the data cannot be loaded, or no pair fits.
    """
    hf_config = load_config(config.model)
    data = load_run_data(config, hf_config).train
    parts, device = _warmed_up(config, hf_config, min(size for size, _ in pairs))
    plan_of_run = read_setup(config, hf_config, described_device(config, present_device())).plan(data)
    total = len(pairs) * int(data.lengths[plan_of_run.batches[step]].sum())
    seconds = {}
    done = 0
    with progress_bar("running the best", total) as progress:
        for size, k in pairs:
            run = replace(plan_of_run, chunk_size=size, k=k)
            (share,) = run[step].ranks
            batch = _trial_batch(config, data, share, device)

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                progress(done)

            began, fits = time.perf_counter(), True
            try:
                parts.runner.run(share.schedules, batch, advance)
                parts.engine.step()
            except torch.OutOfMemoryError:
                fits = False
            if not fits:  # behind the block above, where the error still holds the activations
                print(f"chunk.size={size} chunk.k={k} does not fit into the memory of this device", file=sys.stderr)
                if parts.engine.is_divided:
                    break  # ZeRO-3 is left in the middle of a pass, with weights on their way
                parts.engine.discard_gradients()
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[size, k] = time.perf_counter() - began
    if not seconds:
        raise UsageError(
            "none of the best pairs fits into the memory of this device: the prediction was too low\n"
            "  set tune.memory_gib to less than the device has"
        )
    return seconds


def _trial_batch(config: Config, data: TokenizedData, share: RankPlan, device: torch.device) -> StepBatch:
    """Return the batch of a step of one process. Preferences take the model itself as reference: only time counts."""
    objective = Objective.of(config)
    samples = [sequence for sample in share.samples.tolist() for sequence in data.sequences(sample)]
    if objective is None:
        weights = np.full(len(samples), 1.0 / int(share.target_counts.sum()))
        return StepBatch(share.chunks, samples, weights)
    sequences = Sequences.of(samples, objective)
    is_good = None if objective.has_pairs else data.is_good[share.samples]
    known = Known(
        counts=sequences.counts,
        reference=np.multiply(sequences.counts, -10.0, dtype=np.float64),
        is_desirable=is_good,
        samples=len(share.samples),
        desirable=0 if is_good is None else int(is_good.sum()),
        imitated_tokens=sequences.imitated_tokens if objective.nll_weight else 0,
    )
    step = PreferenceStep(objective, known, sequences, device)
    return StepBatch(share.chunks, sequences.samples, step.imitated_weights, preferences=step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--sizes", type=int, nargs="+", help="chunk sizes to time")
    parser.add_argument("--pairs", nargs="+", metavar="SIZE:K", help="run one real step under each pair instead")
    parser.add_argument("--step", type=int, default=0, help="with --pairs: index of the step, from 0")
    parser.add_argument("--config-dir")
    parser.add_argument("--overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    streams.prepare()
    end_with_parent()
    os.environ.setdefault("TQDM_DISABLE", "1")
    config = load(arguments.overrides, arguments.config_dir, require=("model.path",)).config
    try:
        if arguments.pairs is None:
            calibrate(config, arguments.sizes, budget_seconds=arguments.budget).save(arguments.out)
            return
        pairs = [(int(size), int(k)) for size, k in (pair.split(":") for pair in arguments.pairs)]
        seconds = compare(config, pairs, arguments.step)
        rows = [{"chunk_size": size, "k": k, "seconds": value} for (size, k), value in seconds.items()]
        arguments.out.write_text(json.dumps(rows), encoding="utf-8")
    finally:
        close_process_group()


if __name__ == "__main__":
    try:
        main()
    except ChunkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
