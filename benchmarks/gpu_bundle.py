"""Wheels for `make gpu-proof` on a machine that has a GPU and PyTorch, but no network.

    python benchmarks/gpu_bundle.py download FOLDER                 here: `make gpu-bundle`
    python benchmarks/gpu_bundle.py install FOLDER --venv VENV      there: `make gpu-proof` does it

The versions are those that are installed here, which the tests ran with. It needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import site
import subprocess
import sys
from pathlib import Path

LIMIT_BYTES = 64 * 2**20
"""What travels to the machine that the proof was made for."""
BUILT = ("deepspeed", "antlr4-python3-runtime")
"""Packages that publish no wheel. They are built here, without compiled parts: DeepSpeed compiles where it runs."""
DOWNLOADED = (
    "transformers", "peft", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "typing-extensions", "hydra-core", "omegaconf", "orjson", "regex", "rich", "typer", "annotated-doc",
)  # fmt: skip
NOT_HERE = ("flash-linear-attention==0.6.0", "fla-core==0.6.0")
"""Kernels for GPUs, which the tests here run without."""
ASSUMED = (
    "torch", "triton", "numpy", "tokenizers", "safetensors", "huggingface-hub", "accelerate", "einops", "jinja2",
    "markdown-it-py", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "pygments", "pyyaml", "tqdm",
)  # fmt: skip
"""Packages that the machine has, with what they need."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("download", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default="3.12", help="with download: of the machine with the GPU")
    parser.add_argument("--venv", type=Path, help="with install: where; an environment there is replaced")
    arguments = parser.parse_args()
    if arguments.what == "download":
        download(arguments.folder, arguments.python_version)
    elif arguments.venv is None:
        parser.error("install needs --venv")
    else:
        install(arguments.folder, arguments.venv)


def download(folder: Path, python_version: str) -> None:
    """Fill the folder, and fail if it is too large."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    of_target = ["--only-binary=:all:", "--python-version", python_version, "--implementation", "cp"]
    of_target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in DOWNLOADED]
    _run([*pip, "download", "--no-deps", *of_target, "--dest", str(folder), *pinned, *NOT_HERE])
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in BUILT]
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *pinned], DS_BUILD_OPS="0")
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{size / 2**20:6.2f} MiB in {len(wheels)} wheels, of at most {LIMIT_BYTES / 2**20:.0f}, in {folder}")
    print(f"The machine needs Python {python_version}, and already has {', '.join(ASSUMED)}.")
    if size > LIMIT_BYTES:
        raise SystemExit("error: the wheels are too large to travel")


def install(folder: Path, venv: Path) -> None:
    """Make an environment that has the wheels, and for all else the packages of the Python that runs this."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"error: {folder} has no wheels: run make gpu-bundle where there is a network")
    _run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", "--clear", str(venv)])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # An environment made from another one would see the packages of the Python below both.
    (venv / "lib" / version / "site-packages" / "caller.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--ignore-installed", *wheels])


def _run(command: list[str], **variables: str) -> None:
    if code := subprocess.run(command, env={**os.environ, **variables}, check=False).returncode:
        raise SystemExit(f"error: {' '.join(command[:5])} ... ended with exit code {code}")


if __name__ == "__main__":
    main()
