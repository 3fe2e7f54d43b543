"""What takes long and needs no GPU, done while the first sections run: DeepSpeed's CPU optimizer, and the models."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from chunkflow_cli.engine import import_deepspeed
from gpu_proof.models import model_folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    began = time.perf_counter()
    import_deepspeed()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)  # compiles it, once for all processes
    except Exception as error:  # the rows that need it say the same
        print(f"DeepSpeed's CPU optimizer does not compile: {error}", file=sys.stderr)
    print(f"compiled after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name in ("1B", "8B"):
        model_folder(work, name, dry=False)
        print(f"model {name} written after {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
