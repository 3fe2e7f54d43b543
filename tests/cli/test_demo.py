"""The data of the demo: real pairs, and a seeded subset that keeps the long tail."""

from __future__ import annotations

import json
from pathlib import Path

from chunkflow_cli.cli.demo import SUBSET_SHARES, Pair, stdlib_pairs, subset

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
