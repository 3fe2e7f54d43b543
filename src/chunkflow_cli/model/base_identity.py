"""The identity of the weights that adapters were trained on, so that they are never merged into others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from chunkflow_cli.config.schema import Init, ModelConfig

BLOCK_BYTES, BLOCKS = 2**16, 256


def identify_base(config: ModelConfig, hf_config: Any) -> dict[str, Any] | None:
    """Return what tells the base model's weights from others; None for random weights, which the seed decides.

    Returns:
        `path`, and either `commit` (of a model on the hub) or `files`: name of each weight file -> its size and a hash
        of 256 blocks of it. Weights that were trained on differ in almost every block.
    """
    if config.init is Init.random:
        return None
    path = Path(config.path)
    if not path.exists():
        return {"path": config.path, "commit": getattr(hf_config, "_commit_hash", None)}
    path = path.resolve()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return {"path": str(path), "files": {file.name: [file.stat().st_size, _hash(file)] for file in files}}


def difference(recorded: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Return in what a base differs from the recorded one, in words; None if it is the same, wherever it is."""
    if recorded.get("commit") and found.get("commit") and recorded["commit"] != found["commit"]:
        return f"it was at commit {recorded['commit']}, and is at {found['commit']} now"
    before, now = recorded.get("files"), found.get("files")
    if before is None or now is None:
        return None
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if list(before[name]) != list(now[name]):
            return f"{name} holds other weights"
    return None


def _hash(file: Path) -> str:
    """Return a hash of blocks spread evenly over a file, its first and its last bytes included."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as handle:
        if size <= BLOCK_BYTES * BLOCKS:
            digest.update(handle.read())
        else:
            for block in range(BLOCKS):
                handle.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
