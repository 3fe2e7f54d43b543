"""Times the operations of chunks with the real model on the real device, in a process of its own.

    python -m ….training.measure --out FILE --sizes 512 1024 --budget SECONDS --overrides recipe=NAME ...
    python -m ….training.measure --out FILE --pairs 512:1 1024:2 --step 0 --overrides recipe=NAME ...

For each chunk size, smallest first, a sequence of three chunks and one standalone chunk run as training runs them: so
state passes, forwards, recomputes and backwards are timed over a past of none, one and two chunks. That is done with
all tokens as targets and with a tenth of them, for head and loss cost by target; an optimizer step follows each. Sizes
that the time budget has no room for are left out: the costs are linear, and two sizes are enough for a line.
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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import progress_bar
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.engine import EngineSettings, check_settings, close_process_group
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.shape import shape_without_weights
from chunkflow_cli.planning.calibration import Calibration, MemorySample, OperationSample, fit_costs, fit_memory
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.costs import CostModel, chunk_tokens
from chunkflow_cli.planning.memory_parts import state_bytes
from chunkflow_cli.planning.schedule import Op, plan
from chunkflow_cli.training.assembly import Assembly, assemble
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.setup import described_device, read_setup

CHUNKS_OF_SEQUENCE = 3
FEW_TARGETS = 0.1
FEWEST_SIZES = 2


def calibrate(config: Config, sizes: Sequence[int], *, budget_seconds: float) -> Calibration:
    """Measure the configured model on this machine's device.

    Args:
        config: `model`, `engine` and `optim` decide what is measured.
        sizes: chunk sizes that may be measured.
        budget_seconds: no further size is begun that would, by the last one's time, go beyond it.

    Raises:
        UsageError: the model cannot be loaded or trained here.
    """
    settle_vector_math()
    device = training_device()
    check_settings(EngineSettings(config.engine, config.optim, config.model.dtype, device))
    hf_config = load_config(config.model)
    dtype: torch.dtype = getattr(torch, config.model.dtype.value)
    backend = choose_backend(config.model.attention, hf_config, device, dtype).backend
    parts = assemble(config, hf_config, backend, device)
    parts.engine.set_learning_rate(0.0)  # weights stay what they are; the work is the same

    _run(parts, device, min(sizes), 1.0)  # kernels are chosen and buffers made: not timed
    parts.engine.step()
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
            for share in (1.0, FEW_TARGETS):
                with _peak(device) as peak:
                    operations += _run(parts, device, size, share)
                peaks.append(peak.bytes)
                with _peak(device) as peak:
                    step_began = time.perf_counter()
                    parts.engine.step()
                    steps.append(time.perf_counter() - step_began)
                step_peaks.append(peak.bytes)
            if device.type == "cpu":  # the step's buffers come on top of what the heap has not given back of the chunks
                peaks += step_peaks[-len(peaks) :]
            state = state_bytes(parts.shape, CHUNKS_OF_SEQUENCE * size, size, dtype.itemsize)
            memory.append(MemorySample(size, state, max(peaks)))
            progress(index + 1)
            now = time.perf_counter()
            if index + 1 >= FEWEST_SIZES and now - started + 2.2 * (now - began) > budget_seconds:
                break
    name = present_device().name
    shape = shape_without_weights(config.model, hf_config)  # as `plan` and `train` know it, activations counted
    costs, worst = fit_costs(operations, step_seconds=min(steps), source=f"measured on {name}", shape=shape)
    fitted = fit_memory(memory, step_peak_bytes=min(step_peaks), activation_bytes_per_token=kept)
    return Calibration(name, shape, costs, fitted, worst)


def _activation_bytes(parts: Assembly, size: int) -> float:
    """Bytes that the layers keep for backward for each token, counted; infinite under ZeRO-3, which has the weights
    only within the engine's forward: all that a line through the peaks rises by is then taken to be kept."""
    module = parts.engine.module
    if parts.engine.needs_joined_retained_chunks:
        return math.inf
    assert isinstance(module, ChunkModel)
    sequence = _random_sequence(np.random.default_rng(0), size, size, 1.0, parts.shape.vocab_size)
    return activation_bytes_per_token(module, sequence)


def _run(parts: Assembly, device: torch.device, size: int, target_share: float) -> list[OperationSample]:
    """One step over a long sequence and a standalone chunk; gradients are left in the engine."""
    lengths = [CHUNKS_OF_SEQUENCE * size, size]
    chunks = build_chunks(lengths, size, fill_tails=False)
    generator = np.random.default_rng(size)
    sequences = [_random_sequence(generator, length, size, target_share, parts.shape.vocab_size) for length in lengths]
    targets = _targets_of_chunks(chunks, sequences)
    tokens = chunk_tokens(chunks)
    pairs = replace(CostModel.proportional(), shape=parts.shape).chunk_pairs(chunks)
    samples: list[OperationSample] = []

    def timed(op: Op, seconds: float) -> None:
        (chunk,) = op.chunks
        samples.append(
            OperationSample(op.kind.value, float(tokens[chunk]), float(pairs[chunk]), float(targets[chunk]), seconds)
        )

    weights = np.full(len(lengths), 1.0 / max(1, int(targets.sum())))
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


def _targets_of_chunks(chunks: Chunks, sequences: Sequence[TokenizedSample]) -> NDArray[np.int64]:
    return np.array(
        [
            sum(
                int(np.count_nonzero(sequences[segment.sequence].targets[segment.start : segment.stop] != IGNORED))
                for segment in chunk.segments
            )
            for chunk in chunks
        ]
    )


@dataclass
class _Peak:
    bytes: int = 0


@contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """The most memory that was held within: by the allocator of a GPU, by the whole process on a CPU."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = int(torch.cuda.max_memory_allocated(device))
        return
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak anew
        is_reset = True
    except OSError:
        is_reset = False
    yield peak
    if is_reset:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak.bytes = int(line.split()[1]) * 1024
    else:  # of the whole process so far: right for the larger sizes, which come last
        unit = 1 if sys.platform == "darwin" else 1024
        peak.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(config: Config, pairs: Sequence[tuple[int, int]], step: int) -> dict[tuple[int, int], float]:
    """Seconds of one real optimizer step of the run under each (chunk_size, k): the same samples, in turn.

    Args:
        config: the run; its data is taken from the token cache.
        pairs: what to run.
        step: which of the run's steps, from 0.

    Raises:
        UsageError: the model or the data cannot be loaded.
    """
    settle_vector_math()
    device = training_device()
    hf_config = load_config(config.model)
    data = load_run_data(config, hf_config).train
    dtype: torch.dtype = getattr(torch, config.model.dtype.value)
    backend = choose_backend(config.model.attention, hf_config, device, dtype).backend
    parts = assemble(config, hf_config, backend, device)
    parts.engine.set_learning_rate(0.0)
    _run(parts, device, min(size for size, _ in pairs), 1.0)
    parts.engine.step()
    plan_of_run = read_setup(config, hf_config, described_device(config, present_device())).plan(data)
    total = len(pairs) * int(data.lengths[plan_of_run.batches[step]].sum())
    seconds = {}
    done = 0
    with progress_bar("running the best", total) as progress:
        for size, k in pairs:
            run = replace(plan_of_run, chunk_size=size, k=k)
            (share,) = run[step].ranks
            sequences = [data[int(sample)] for sample in share.samples]
            weights = np.full(len(sequences), 1.0 / int(share.target_counts.sum()))

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                progress(done)

            began = time.perf_counter()
            parts.runner.run(share.schedules, StepBatch(share.chunks, sequences, weights), advance)
            parts.engine.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[size, k] = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--sizes", type=int, nargs="+", help="chunk sizes to time")
    parser.add_argument("--pairs", nargs="+", metavar="SIZE:K", help="run one real step under each instead")
    parser.add_argument("--step", type=int, default=0, help="with --pairs: which step of the run, from 0")
    parser.add_argument("--config-dir")
    parser.add_argument("--overrides", nargs="*", default=[])
    arguments = parser.parse_args()
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
    from chunkflow_cli.errors import ChunkflowError

    try:
        main()
    except ChunkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
