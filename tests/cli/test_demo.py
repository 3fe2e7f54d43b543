"""The data of the demo: real pairs, and a seeded subset that keeps the long tail."""

from __future__ import annotations

import json
import random
from pathlib import Path

from chunkflow_cli.cli.demo import SUBSET_SHARES, Pair, preference, stdlib_pairs, subset

SOURCE = '''"""About numbers."""

class Counter:
    """Counts."""

    def add(self, n):
        """Add n."""
        return n

def undocumented():
    return 1
'''


def test_every_documented_definition_becomes_a_pair(tmp_path: Path) -> None:
    (tmp_path / "numbers_").mkdir()
    (tmp_path / "numbers_" / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(SOURCE)
    pairs = list(stdlib_pairs(tmp_path))
    assert [pair.request.splitlines()[0] for pair in pairs] == [
        "Write the Python source of the module numbers_.",
        "Write the Python source of class Counter of the module numbers_.",
        "Write the Python source of function add of the module numbers_.",
    ]
    assert pairs[0].answer == SOURCE
    messages = json.loads(pairs[2].to_json())["messages"]
    assert messages[1]["content"] == 'def add(self, n):\n    """Add n."""\n    return n\n'
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_the_standard_library_is_long_tailed_and_the_subset_keeps_the_tail() -> None:
    """Without a long sample the demo would show only packing."""
    pairs = list(stdlib_pairs())
    chosen = subset(pairs)
    assert len(pairs) > 3000
    assert chosen == subset(pairs)
    assert [sum(low <= pair.characters < high for pair in chosen) for low, high, _ in SUBSET_SHARES] == [
        count for _, _, count in SUBSET_SHARES
    ]
    assert sum(pair.characters < 3000 for pair in pairs) > 0.8 * len(pairs)
    assert isinstance(chosen[0], Pair)


def test_a_preference_is_the_answer_and_a_worse_one() -> None:
    pair = Pair("Write it.", "def f():\n    a = 1\n    b = 2\n    return a + b\n")
    rows = [preference(pair, random.Random(seed)) for seed in range(8)]
    worse = {row["rejected"][0]["content"] for row in rows}  # type: ignore[index]
    assert all(row["chosen"] == [{"role": "assistant", "content": pair.answer}] for row in rows)
    assert pair.answer not in worse
    assert pair.answer[: len(pair.answer) // 2] in worse
    assert any(sorted(text.splitlines()) == sorted(pair.answer.splitlines()) for text in worse)
