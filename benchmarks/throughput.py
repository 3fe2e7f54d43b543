"""Training speed, side by side: chunkflow, a plain Hugging Face loop, and TRL's SFTTrainer with packing.

    python benchmarks/throughput.py                       float32, about five minutes
    python benchmarks/throughput.py --dtype bfloat16
    python benchmarks/throughput.py --samples 48 --rounds 7 --out throughput.json

All train SmolLM2-135M on the same samples, one optimizer step over all of them at a time, with the same optimizer and
the same target weights. Each contender lives in a process of its own and waits there for its turn; in a round each
takes one step, in rotating order, so that noise of the machine falls on all alike. Ratios are taken within a round;
the median round counts. The learning rate is 0: every step does all the work, on the same weights, so all losses agree.

Two loads: `mixed`, samples of the demo (docstring as request, source as answer) of at most --max-length tokens, and
`long`, one sequence of --long-length random tokens, which chunkflow runs with K = N: nothing is recomputed.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import PlainTraining, emit, hardware, load_plain_model, median, say, smollm2_path

LR = 0.0
SETTINGS_OF_TRL = "packing=True, packing_strategy=bfd, per_device_train_batch_size=1, gradient_checkpointing=False"


@dataclass(frozen=True)
class RawSample:
    input_ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Load:
    """One optimizer step's worth of work."""

    name: str
    samples: list[RawSample]
    chunk_size: int
    k: int

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.samples]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Timing:
    seconds: float
    cpu_seconds: float
    """Of all threads; less moved by other work on the machine than seconds."""
    loss: float


@dataclass(frozen=True)
class Contender:
    name: str
    worker: str
    loads: tuple[str, ...]


CONTENDERS = (
    Contender("chunkflow", "chunkflow", ("mixed", "long")),
    Contender("hf_plain", "plain", ("mixed", "long")),
    Contender("hf_plain_checkpointed", "plain", ("mixed",)),
    Contender("trl_packed", "trl", ("mixed",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; one more warms up (default: 5)")
    parser.add_argument("--samples", type=int, default=32, help="samples of the mixed load (default: 32)")
    parser.add_argument("--max-length", type=int, default=2048, help="longest sample of the mixed load (default: 2048)")
    parser.add_argument("--chunk-size", type=int, default=2048, help="chunk.size on the mixed load (default: 2048)")
    parser.add_argument("--long-length", type=int, default=2048, help="tokens of the long load; 0 leaves it out")
    parser.add_argument("--long-chunk-size", type=int, default=512, help="chunk.size on the long load (default: 512)")
    parser.add_argument("--threads", type=int, help="torch threads of every contender (default: torch's own choice)")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CONTENDERS], help="these contenders only")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes to come; this one is running already
        torch.set_num_threads(arguments.threads)

    loads = make_loads(arguments)
    contenders = [c for c in CONTENDERS if arguments.only is None or c.name in arguments.only]
    rate_before = matrix_rate()
    workers = {name: Worker(name, loads, arguments.dtype) for name in dict.fromkeys(c.worker for c in contenders)}
    try:
        for worker in workers.values():
            worker.wait_until_loaded()
        timings = race(loads, contenders, workers, arguments.rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    rate = max(rate_before, matrix_rate())
    results = {load.name: summary(load, timings, rate) for load in loads}
    emit(
        {
            "benchmark": "throughput",
            "hardware": hardware(),
            "model": "SmolLM2-135M-Instruct",
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "float32_matrix_product_flops_per_second": rate,
            "trl_settings": SETTINGS_OF_TRL,
            "loads": results,
        },
        arguments.out,
    )


# What is trained on


def make_loads(arguments: argparse.Namespace) -> list[Load]:
    loads = [Load("mixed", demo_samples(arguments.samples, arguments.max_length), arguments.chunk_size, 1)]
    if arguments.long_length:
        ids = np.random.default_rng(0).integers(0, 49_152, arguments.long_length + 1, dtype=np.int32)
        pieces = -(-arguments.long_length // arguments.long_chunk_size)
        loads.append(Load("long", [RawSample(ids[:-1], ids[1:])], arguments.long_chunk_size, pieces))
    for load in loads:
        say(f"{load.name}: {len(load.samples)} samples, {load.tokens:,} tokens, the longest {max(load.lengths):,}; "
            f"chunk.size={load.chunk_size} chunk.k={load.k}")  # fmt: skip
    return loads


def demo_samples(count: int, max_length: int) -> list[RawSample]:
    """Samples of the demo, tokenized as `chunkflow train` does it, in a seeded order."""
    from chunkflow_cli.cli.demo import stdlib_pairs, subset
    from chunkflow_cli.config.schema import DataConfig
    from chunkflow_cli.data.dataset import tokenize

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        path.write_text("".join(pair.to_json() + "\n" for pair in subset(list(stdlib_pairs()))), encoding="utf-8")
        data = tokenize(
            DataConfig(path=str(path), cache_dir=folder), model_path=smollm2_path(), model_limit=None, vocab_size=None,
            trust_remote_code=False,
        )  # fmt: skip
        fitting = [int(index) for index in np.flatnonzero(data.lengths <= max_length)]
        longest = max(fitting, key=lambda index: int(data.lengths[index]))
        others = [index for index in fitting if index != longest]
        random.Random(0).shuffle(others)
        chosen = [longest, *others[: count - 1]]  # the tail is in every step
        return [RawSample(np.array(data[i].input_ids), np.array(data[i].targets)) for i in chosen]


# The contenders, each in a process of its own

Step = Callable[[Load], Timing]


def timed(work: Callable[[], float]) -> Timing:
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = work()
    return Timing(time.perf_counter() - start, time.process_time() - cpu_start, loss)


class Worker:
    """A process that takes a step whenever it is told to."""

    def __init__(self, kind: str, loads: Sequence[Load], dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(kind, theirs, list(loads), dtype), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_loaded(self) -> None:
        self._wait()

    def step(self, contender: str, load: str) -> Timing:
        self._ours.send((contender, load))
        timing = self._wait()
        assert isinstance(timing, Timing)
        return timing

    def _wait(self) -> Any:
        try:
            return self._ours.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"a contender ended with exit status {self._process.exitcode}; see above") from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def work(kind: str, connection: Connection, loads: list[Load], dtype: str) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # stdout belongs to the one JSON object
        {"chunkflow": work_chunkflow, "plain": work_plain, "trl": work_trl}[kind](
            connection, {load.name: load for load in loads}, getattr(torch, dtype)
        )


def work_chunkflow(connection: Connection, loads: dict[str, Load], dtype: torch.dtype) -> None:
    """The parts of `chunkflow train`, put together as it does."""
    from chunkflow_cli.config.schema import Attention, Dtype, EngineConfig, ModelConfig, OptimConfig
    from chunkflow_cli.engine import Engine, EngineSettings
    from chunkflow_cli.execution.attention import function as attention
    from chunkflow_cli.execution.attention.choice import choose_backend
    from chunkflow_cli.execution.chunk_model import ChunkModel
    from chunkflow_cli.execution.cpu_quirks import convert_linear_layers, settle_vector_math
    from chunkflow_cli.execution.runner import Runner
    from chunkflow_cli.execution.step import RunnerSettings, StepBatch
    from chunkflow_cli.model.device import training_device
    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.model.loading import load_model
    from chunkflow_cli.planning.chunks import build_chunks
    from chunkflow_cli.planning.schedule import plan

    settle_vector_math()
    device = training_device()
    config = ModelConfig(path=smollm2_path())
    hf_config = load_config(config)
    backend = choose_backend(Attention.auto, hf_config, device, dtype).backend
    attention.register()
    model = load_model(config, hf_config, dtype=dtype, attention=attention.NAME, seed=0)
    convert_linear_layers(model)
    name = Dtype(str(dtype).removeprefix("torch."))
    engine = Engine(ChunkModel(model, backend), EngineSettings(EngineConfig(), OptimConfig(lr=LR), name, device))
    runner = Runner(engine, RunnerSettings(device))

    def step(load: Load) -> float:
        chunks = build_chunks(load.lengths, load.chunk_size)
        targets = sum(int((sample.targets != -100).sum()) for sample in load.samples)
        weights = np.full(len(load.samples), 1.0 / targets)
        result = runner.run((plan(chunks, load.k),), StepBatch(chunks, load.samples, weights))
        engine.set_learning_rate(LR)
        engine.step()
        return result.loss

    serve(connection, lambda _, load: timed(lambda: step(loads[load])))


def work_plain(connection: Connection, loads: dict[str, Load], dtype: torch.dtype) -> None:
    training = PlainTraining(load_plain_model(dtype), LR)

    def step(contender: str, load: str) -> Timing:
        if contender.endswith("checkpointed"):
            training.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            training.model.gradient_checkpointing_disable()
        return timed(lambda: training.step(loads[load].samples))

    serve(connection, step)


def serve(connection: Connection, step: Callable[[str, str], Timing]) -> None:
    connection.send("ready")
    with suppress(EOFError):  # the race is over
        while True:
            contender, load = connection.recv()
            connection.send(step(contender, load))


def work_trl(connection: Connection, loads: dict[str, Load], dtype: torch.dtype) -> None:
    """SFTTrainer's own loop, held at the start of each optimizer step until its turn comes."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    from chunkflow_cli.data.tokenizer import load_tokenizer

    samples = loads["mixed"].samples
    rows = {
        "input_ids": [sample.input_ids.tolist() for sample in samples],
        "labels": [[-100, *sample.targets[:-1].tolist()] for sample in samples],
    }
    data = Dataset.from_dict(rows)
    longest = max(loads["mixed"].lengths)
    packs = len(pack_dataset(data, longest, "bfd"))

    class Gate(TrainerCallback):
        ready = False
        timing: tuple[float, float] = (0.0, 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.ready:
                connection.send("ready")
                self.ready = True
            connection.recv()
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.timing = time.perf_counter() - self.start[0], time.process_time() - self.start[1]

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs is not None and "loss" in logs:
                connection.send(Timing(*self.timing, float(logs["loss"])))

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_length=longest, packing=True, packing_strategy="bfd", per_device_train_batch_size=1,
            gradient_accumulation_steps=packs, max_steps=10**6, learning_rate=LR, lr_scheduler_type="constant",
            weight_decay=0.0, optim="adamw_torch_fused", max_grad_norm=1.0, bf16=dtype is torch.bfloat16, use_cpu=True,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            # With bf16=True the Trainer keeps float32 weights and computes under autocast: its ordinary mixed training.
            model=load_plain_model(torch.float32), args=settings, train_dataset=data, callbacks=[Gate()],
            processing_class=load_tokenizer(smollm2_path(), trust_remote_code=False),
        )  # fmt: skip
        trainer.train()


# The race

Timings = dict[tuple[str, str], list[Timing]]


def race(loads: Sequence[Load], contenders: Sequence[Contender], workers: dict[str, Worker], rounds: int) -> Timings:
    """All timings, by (contender, load); the round that warms up is left out."""
    timings: Timings = {}
    for round_number in range(rounds + 1):
        for load in loads:
            racing = [contender for contender in contenders if load.name in contender.loads]
            turn = round_number % len(racing)
            for contender in racing[turn:] + racing[:turn]:
                timing = workers[contender.worker].step(contender.name, load.name)
                say(f"round {round_number} {load.name:6} {contender.name:22} {timing.seconds:7.2f} s  "
                    f"{load.tokens / timing.seconds:7.0f} tokens/s  loss {timing.loss:.4f}")  # fmt: skip
                if round_number:
                    timings.setdefault((contender.name, load.name), []).append(timing)
    return timings


def summary(load: Load, timings: Timings, rate: float) -> dict[str, Any]:
    """Of one load: every contender, and chunkflow against the fastest rival."""
    flops = load_flops(load)
    mine = timings.get(("chunkflow", load.name))
    result: dict[str, Any] = {
        "samples": len(load.samples), "tokens": load.tokens, "longest": max(load.lengths), "flops": flops,
        "chunk_size": load.chunk_size, "k": load.k, "contenders": {},
    }  # fmt: skip
    for (name, load_name), times in timings.items():
        if load_name != load.name:
            continue
        seconds = median(t.seconds for t in times)
        row = {
            "seconds": round(seconds, 3),
            "fastest_seconds": round(min(t.seconds for t in times), 3),
            "tokens_per_second": round(load.tokens / seconds, 1),
            "mfu": round(flops / seconds / rate, 4),
            "cpu_seconds": round(median(t.cpu_seconds for t in times), 3),
            "loss": times[0].loss,
            "all_seconds": [round(t.seconds, 3) for t in times],
        }
        if mine is not None and name != "chunkflow":
            pairs = list(zip(times, mine, strict=True))
            row["chunkflow_is_faster_by"] = round(median(other.seconds / ours.seconds for other, ours in pairs), 3)
            row["chunkflow_is_faster_by_in_cpu_seconds"] = round(
                median(other.cpu_seconds / ours.cpu_seconds for other, ours in pairs), 3
            )
            row["loss_difference"] = abs(times[0].loss - mine[0].loss)
        result["contenders"][name] = row
    ratios = {
        name: row["chunkflow_is_faster_by"]
        for name, row in result["contenders"].items()
        if "chunkflow_is_faster_by" in row
    }
    if ratios:
        result["fastest_rival"] = min(ratios, key=lambda name: ratios[name])
        result["chunkflow_to_fastest_rival"] = min(ratios.values())
    return result


def load_flops(load: Load) -> float:
    from chunkflow_cli.config.schema import ModelConfig
    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.model.shape import shape_without_weights
    from chunkflow_cli.planning.model_shape import training_flops

    config = ModelConfig(path=smollm2_path())
    return training_flops(load.lengths, shape_without_weights(config, load_config(config)))


def matrix_rate() -> float:
    """Of a large float32 product, as `chunkflow train` measures what MFU is relative to."""
    from chunkflow_cli.training.hardware import peak_flops

    return peak_flops(torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    main()
