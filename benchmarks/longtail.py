"""Chat data in the shape of LMSys-Chat-1M, with lengths that are known before anything is tokenized.

    python benchmarks/longtail.py longtail.jsonl                                100,000 rows, about 200 MB
    python benchmarks/longtail.py longtail.jsonl --rows 1000000 --lengths true.npy
    python benchmarks/longtail.py longtail.jsonl --rows 2000 --check            compare with the tokenizer, row by row

Lengths follow the cumulative table of the paper (arXiv 2503.02356, table 1): 90.5 % < 1K, 99.54 % < 4K, 99.91 % < 8K,
99.99 % < 32K, longest 303K; between two entries the share grows with the logarithm of the length. They are quantiles
in a shuffled order, not draws, so that the table holds for any number of rows, to the row.

A row is `{"messages": [...]}` with one to four questions and answers. Words are drawn by Zipf's law from those that the
SmolLM2 tokenizer has as one token, at a text's beginning as after a space; a sample's length is thus its words and what
the chat template writes around them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import emit, hardware, say, smollm2_path

K = 1024
TABLE = {1 * K: 0.905, 4 * K: 0.9954, 8 * K: 0.9991, 32 * K: 0.9999}
"""Share of the samples that are shorter."""
SHORTEST, LONGEST = 64, 303 * K
MOST_TURNS = 4
"""Questions and answers of a row."""
WORDS = 16_384
ZIPF_SHIFT = 2.7
"""Zipf-Mandelbrot: the word of rank r comes with a weight of 1 / (r + 2.7)."""
BLOCK_ROWS = 2_000
"""Rows that are drawn at once."""


@dataclass(frozen=True)
class Shape:
    """What a row's length is made of, beside its words."""

    words: list[str]
    """Most frequent first."""
    around_row: int
    """Tokens of the template that a row has once (a default system message)."""
    around_turn: int
    """Tokens of the template around a question and its answer."""


def smollm2_shape(tokenizer: Any) -> Shape:
    """
    Args:
        tokenizer: SmolLM2's; its template writes as many tokens around a turn whatever the turn says.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    found = [
        (number, token[1:])
        for token, number in vocabulary.items()
        if re.fullmatch("Ġ[A-Za-z]+", token) and token[1:] in vocabulary
    ]
    # Merges were learned in the order of their frequency, and so ids are ranks.
    words = [word for _, word in sorted(found)[:WORDS]]
    turn = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]
    once = len(tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)) - 2
    twice = len(tokenizer.apply_chat_template(turn * 2, tokenize=True, return_dict=False)) - 4
    return Shape(words, 2 * once - twice, twice - once)


def long_tailed_lengths(rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(rows,) tokens, shuffled."""
    shares = np.array([0.0, *TABLE.values(), 1.0])
    logarithms = np.log([SHORTEST, *TABLE, LONGEST])
    quantiles = (np.arange(rows) + 0.5) / rows
    # A hair above: the logarithm of a whole number must not fall below it again.
    lengths = np.floor(np.exp(np.interp(quantiles, shares, logarithms)) + 1e-6).astype(np.int64)
    lengths[-1] = LONGEST
    return rng.permutation(lengths)


def rows_as_json(lengths: NDArray[np.int64], shape: Shape, rng: np.random.Generator) -> Iterator[bytes]:
    """A line for each length, a block of lines at a time."""
    words = np.array([f" {word}".encode() for word in shape.words], object)
    weights = 1 / (np.arange(len(words)) + 1 + ZIPF_SHIFT)
    # Inverse of the cumulative law as a table: a draw is one look-up.
    ticks = (np.arange(1 << 20) + 0.5) / (1 << 20)
    by_tick = np.searchsorted(np.cumsum(weights) / weights.sum(), ticks).astype(np.int32)
    for start in range(0, len(lengths), BLOCK_ROWS):
        block = lengths[start : start + BLOCK_ROWS]
        room = block - shape.around_row
        turns = np.minimum(rng.integers(1, MOST_TURNS + 1, len(block)), room // (shape.around_turn + 2))
        assert (turns > 0).all(), "a row has at least a question and an answer, of a word each"
        lines = []
        for turn_count, word_count in zip(turns.tolist(), (room - turns * shape.around_turn).tolist(), strict=True):
            # Where the words part into texts, none of them empty.
            cuts = np.sort(rng.choice(word_count - 1, 2 * turn_count - 1, replace=False, shuffle=False)) + 1
            drawn = words[by_tick[rng.integers(0, 1 << 20, word_count, dtype=np.int32)]].tolist()
            edges = [0, *cuts.tolist(), word_count]
            texts = [b"".join(drawn[a:b])[1:] for a, b in itertools.pairwise(edges)]
            messages = b"},{".join(
                b'"role":"%s","content":"%s"' % (b"assistant" if index % 2 else b"user", text)
                for index, text in enumerate(texts)
            )
            lines.append(b'{"messages":[{%s}]}\n' % messages)
        yield b"".join(lines)


def write_long_tailed(path: Path, rows: int, *, tokenizer: Any, seed: int = 0) -> NDArray[np.int64]:
    """Write the rows as JSON lines; returns (rows,) the tokens of each after SmolLM2's chat template."""
    rng = np.random.default_rng(seed)
    lengths = long_tailed_lengths(rows, rng)
    with path.open("wb") as file:
        for block in rows_as_json(lengths, smollm2_shape(tokenizer), rng):
            file.write(block)
    return lengths


def check(path: Path, lengths: NDArray[np.int64], tokenizer: Any) -> int:
    """How many rows are of another length when they are rendered and tokenized."""
    wrong = 0
    with path.open("rb") as file:
        for line, length in zip(file, lengths.tolist(), strict=True):
            messages = json.loads(line)["messages"]
            wrong += len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) != length
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="of the .jsonl file")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="write the true lengths to this .npy file")
    parser.add_argument("--check", action="store_true", help="compare each length with what the tokenizer gives")
    arguments = parser.parse_args()

    from chunkflow_cli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_path(), trust_remote_code=False)
    started = time.perf_counter()
    lengths = write_long_tailed(arguments.path, arguments.rows, tokenizer=tokenizer, seed=arguments.seed)
    seconds = time.perf_counter() - started
    say(f"{arguments.path}: {len(lengths):,} rows in {seconds:.0f} s")
    if arguments.lengths is not None:
        np.save(arguments.lengths, lengths)
    result = {
        "benchmark": "longtail",
        "hardware": hardware(),
        "rows": len(lengths),
        "bytes": arguments.path.stat().st_size,
        "tokens": int(lengths.sum()),
        "shorter": {f"<{limit // K}K": float(np.mean(lengths < limit)) for limit in TABLE},
        "longest": int(lengths.max()),
        "seconds": round(seconds, 1),
    }
    if arguments.check:
        result["rows_of_another_length"] = check(arguments.path, lengths, tokenizer)
    emit(result, None)


if __name__ == "__main__":
    main()
