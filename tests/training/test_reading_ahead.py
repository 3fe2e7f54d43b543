"""Small data is read before torch is imported, so that what is wrong with it is said in a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.tokenized import write_rows
from support.tokenizers import make_tokenizer

pytestmark = pytest.mark.processes

PROGRAM = """
import sys
from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.training.reading_ahead import read_ahead

words = sys.argv[1:]
keys = read_ahead(load(words).config)
assert len(keys) == 1, keys
try:
    read_ahead(load([*words, "data.max_length=5"]).config)
except UsageError as error:
    assert "1 of 1 samples are longer than 5 tokens" in str(error), error
else:
    raise AssertionError("not said")
assert "torch" not in sys.modules
mine = [vars(module) for name, module in sys.modules.items() if name.startswith("chunkflow_cli")]
kept = [value for names in mine for value in names.values()
        if str(getattr(value, "__module__", "")).startswith("transformers")]
left = [name for name in sys.modules if name.startswith("transformers")]
assert not left and not kept, (left, kept)
"""


def test_data_is_read_without_torch_and_transformers_is_forgotten(tmp_path: Path) -> None:
    """transformers, once imported without torch, has no models: the run has to import it again."""
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    model, data = make_tokenizer(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", [row])
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    words = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={tmp_path}", "data.num_workers=1"]
    subprocess.run([sys.executable, "-c", PROGRAM, *words], check=True, timeout=100)
