"""Host memory of the ranks of one node after they have loaded one model, and at most while they loaded it.

The target, 1.3 times the model for four ranks, is for loading: what comes next decides how much a rank trains, and
where. On GPUs, the weights leave host memory for each GPU's. On a CPU, ranks of ZeRO-0 to 2 train a replica each, in
their own memory: the last case shows that, and no target is set for it.

    python benchmarks/loading.py                       four ranks, 419 MiB of float32 weights; a minute on two cores
    python benchmarks/loading.py --ranks 8 --out loading.json

Cases: files in the data type of the run, in another one, experts that are stacked; and the first one once more, after
ZeRO-1's engine has started on the CPU (`measured` says which of the two it is). All weights are read once, so that no
page is missing. A rank's memory is its share of its pages as the kernel counts them (Pss): a page that four ranks map
counts a quarter for each. What the process held before it loaded is subtracted. `held` is of all ranks at the end,
`private` the most that no file backs until then.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import emit, hardware, say

LLAMA = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 4096}  # fmt: skip
MIXTRAL = {**LLAMA, "intermediate_size": 1024, "num_local_experts": 4, "num_experts_per_tok": 2}
TARGET_TIMES_MODEL = 1.3
CASES = [
    ("files in model.dtype", "llama", "float32", "float32", None),
    ("files in another dtype", "llama", "float32", "bfloat16", None),
    ("experts one by one in the files", "mixtral", "float32", "float32", None),
    ("files in model.dtype, and ZeRO-1's engine", "llama", "float32", "float32", 1),
]


def pages(kind: str) -> int:
    """Return bytes of this process by a line of smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])


def rank_of_case(model_type: str, saved: str, dtype: str, stage: int | None) -> None:
    """Load as `train` does, and print what this rank holds."""
    import torch

    from chunkflow_cli.config.schema import Config, Dtype, EngineConfig, ModelConfig, OptimConfig
    from chunkflow_cli.engine import Engine, EngineSettings, join_processes
    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.planning.topology import Topology
    from chunkflow_cli.training.loading import load_on_every_rank

    ranks, folder = int(os.environ["WORLD_SIZE"]), os.environ["MODEL"]
    processes = join_processes(torch.device("cpu"), Topology(ranks))
    config = Config(model=ModelConfig(path=folder, dtype=Dtype(dtype)))
    hf_config = load_config(config.model)
    tiny = Config(model=ModelConfig(path=f"{folder}/tiny", dtype=Dtype(dtype)))  # what imports and first calls keep
    load_on_every_rank(tiny, load_config(tiny.model), processes, dtype=getattr(torch, dtype), attention="eager")
    processes.barrier()
    held, private, most, is_done = pages("Pss"), pages("Anonymous"), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.wait(0.02):
            most = max(most, pages("Anonymous"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.monotonic()
    model: Any = load_on_every_rank(config, hf_config, processes, dtype=getattr(torch, dtype), attention="eager")
    for weight in model.parameters():
        weight.sum()
    engine = None
    if stage is not None:
        settings = EngineSettings(EngineConfig(zero_stage=stage), OptimConfig(), Dtype(dtype), torch.device("cpu"))
        engine = Engine(model, settings)
    seconds = time.monotonic() - begun
    processes.barrier()
    is_done.set()
    watcher.join()
    numbers = {"held": pages("Pss") - held, "private": most - private, "seconds": seconds}
    if processes.is_first:
        numbers["model"] = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    processes.barrier()
    print(json.dumps(numbers), flush=True)
    processes.barrier()
    del engine


def run_case(case: tuple[str, str, str, str, int | None], ranks: int, folder: Path) -> dict[str, Any]:
    name, model_type, saved, dtype, stage = case
    path = folder / f"{model_type}-{saved}"
    if not path.exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would print to stdout
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tiny = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
        for settings, place in ((LLAMA if model_type == "llama" else MIXTRAL, path), (tiny, path / "tiny")):
            config = AutoConfig.for_model(model_type, **settings)
            AutoModelForCausalLM.from_config(config, dtype=getattr(torch, saved)).save_pretrained(place)
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599",
                   "OMP_NUM_THREADS": "1", "MODEL": str(path)}  # fmt: skip
    command = [sys.executable, __file__, "--rank-of", model_type, saved, dtype, "" if stage is None else str(stage)]
    started = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    model = found[0]["model"]
    measured = "after loading" if stage is None else "after the engine has started, with a replica on each rank"
    target = TARGET_TIMES_MODEL if stage is None else None
    result = {
        "case": name,
        "measured": measured,
        "target_times_model": target,
        "model_bytes": model,
        "seconds": max(each["seconds"] for each in found),
    }
    for kind in ("held", "private"):
        total = sum(each[kind] for each in found)
        result |= {f"{kind}_bytes": total, f"{kind}_times_model": round(total / model, 2)}
    say(f"{name}: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    parser.add_argument("--rank-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        model_type, saved, dtype, stage = arguments.rank_of
        rank_of_case(model_type, saved, dtype, int(stage) if stage else None)
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = [run_case(case, arguments.ranks, Path(folder)) for case in CASES]
    emit({"hardware": hardware(), "ranks": arguments.ranks, "cases": cases}, arguments.out)


if __name__ == "__main__":
    main()
