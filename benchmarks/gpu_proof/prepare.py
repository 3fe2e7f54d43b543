"""What takes long and needs no GPU, done while the first sections run: the models."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu_proof.models import model_folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    began = time.perf_counter()
    for name in ("1B", "8B"):
        model_folder(work, name, dry=False)
        print(f"model {name} written after {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
