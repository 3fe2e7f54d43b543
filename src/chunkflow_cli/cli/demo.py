"""The demo: fine-tune a small real model on the Python standard library of this machine.

    python -m chunkflow_cli.cli.demo              write the data, train, ask the model a question
    python -m chunkflow_cli.cli.demo --data-only  write the data and exit
    python -m chunkflow_cli.cli.demo --preferences  write the pairs of recipe=smollm2_preferences and exit

Each sample asks for the source of a function, class or module, given its docstring. As in real chat data, most samples
are short and a few are very long. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPE = "smollm2_stdlib"
ALL_PAIRS = Path("data/stdlib_pairs.jsonl")
SUBSET = Path("data/stdlib_demo.jsonl")
PREFERENCES = Path("data/stdlib_preferences.jsonl")
SEED = 0
# Characters of request and answer together, about 3.4 per token.
SUBSET_SHARES = ((0, 2_500, 110), (3_000, 6_000, 4), (16_500, 18_000, 1))
"""Tuples (minimum tokens, limit, number of samples): mostly short samples, some longer, one of eight chunks or more."""
QUESTION = "What is the capital of France?"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Pair:
    """A request and the answer to learn."""

    request: str
    answer: str

    @property
    def characters(self) -> int:
        return len(self.request) + len(self.answer)

    def to_json(self) -> str:
        answer = textwrap.dedent(self.answer)  # white space at its beginning would join the template's last token
        messages = [{"role": "user", "content": self.request}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages}, ensure_ascii=False)


def stdlib_pairs(folder: Path | None = None) -> Iterator[Pair]:
    """Yield request and answer of every documented module, class and function of the library, without importing any."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in string literals
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files are broken on purpose
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        yield from _pairs_of(tree, source, module)


def _pairs_of(tree: ast.Module, source: str, module: str) -> Iterator[Pair]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documentation = ast.get_docstring(node)
        if not documentation:
            continue
        if isinstance(node, ast.Module):
            kind, answer = f"the module {module}", source
        else:
            kind = f"{'class' if isinstance(node, ast.ClassDef) else 'function'} {node.name} of the module {module}"
            answer = "".join(lines[node.lineno - 1 : node.end_lineno])
        yield Pair(f"Write the Python source of {kind}.\n\n{documentation}", answer)


def subset(pairs: Sequence[Pair]) -> list[Pair]:
    """Return a seeded subset that keeps the long tail."""
    generator = random.Random(SEED)
    chosen = []
    for at_least, below, count in SUBSET_SHARES:
        candidates = [pair for pair in pairs if at_least <= pair.characters < below]
        chosen += generator.sample(candidates, min(count, len(candidates)))
    generator.shuffle(chosen)
    return chosen


def write_data() -> None:
    """Write all pairs and the subset below the current folder."""
    pairs = list(stdlib_pairs())
    SUBSET.parent.mkdir(parents=True, exist_ok=True)
    for path, rows in ((ALL_PAIRS, pairs), (SUBSET, subset(pairs))):
        path.write_text("".join(pair.to_json() + "\n" for pair in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} samples, the longest {max(pair.characters for pair in rows):,} characters")


def preference(pair: Pair, generator: random.Random) -> dict[str, str | list[dict[str, str]]]:
    """Return a request with its answer and a worse one: half of it, or its lines in another order."""
    answer = textwrap.dedent(pair.answer)
    first, *lines = answer.splitlines(keepends=True)
    shuffled = "".join([first, *generator.sample(lines, len(lines))])
    worse = shuffled if generator.random() < 0.5 and shuffled != answer else answer[: len(answer) // 2]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (answer, worse))
    return {"prompt": [{"role": "user", "content": pair.request}], "chosen": chosen, "rejected": rejected}


def write_preferences() -> None:
    """Write the pairs of `recipe=smollm2_preferences`: the demo's subset, whose long tail they keep."""
    generator = random.Random(SEED)
    rows = [preference(pair, generator) for pair in subset(list(stdlib_pairs()))]
    PREFERENCES.parent.mkdir(parents=True, exist_ok=True)
    PREFERENCES.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{PREFERENCES}: {len(rows):,} pairs; train on them with chunkflow train recipe=smollm2_preferences")


def ask(model_folder: str, question: str) -> str:
    """Return the trained model's answer, decoded greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, length:], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M on the Python standard library.")
    parser.add_argument("--data-only", action="store_true", help="write the data and exit")
    parser.add_argument("--preferences", action="store_true", help="write pairs of answers and exit")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, e.g. train.steps=2")
    arguments = parser.parse_args()
    if arguments.preferences:
        write_preferences()
        return
    write_data()
    if arguments.data_only:
        return
    from chunkflow_cli.cli.app import app

    command = ["train", f"recipe={RECIPE}", *arguments.overrides]
    print("\n$ chunkflow " + " ".join(command), flush=True)
    try:
        app(command)
    except SystemExit as end:
        if end.code:
            raise
    final = max(Path("outputs", RECIPE).glob("*/final"), key=lambda path: path.stat().st_mtime)
    print(f"\nIt still answers general questions:\n  > {QUESTION}\n  {ask(str(final), QUESTION)}")


if __name__ == "__main__":
    main()
