"""Write what the documentation takes from the code: docs/configuration.md, the tables of docs/gpu.md, and pictures.

make docs
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

from chunkflow_cli.config.keys import Key, describe_element_keys, describe_keys
from chunkflow_cli.config.schema import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "configuration.md"
INTRODUCTION = """\
# Configuration keys

This page lists every key with its default. `make docs` writes it from
[the schema](../src/chunkflow_cli/config/schema.py): do not edit it by hand.

Set a key on the command line as `key=value`, or in a recipe. Later settings win: defaults, then the recipe, then
`--overrides FILE`, then the command line.

    chunkflow train recipe=tiny_random chunk.size=64 optim.lr=5e-4     # override two keys of a recipe
    chunkflow train recipe=tiny_random chunk.size=64 --cfg job         # print the configuration and stop
    chunkflow train recipe=tiny_random -m chunk.size=64,128            # train once with each value

Write a list as `'optim.betas=[0.9,0.95]'`, a mapping as `'engine.deepspeed={key: value}'`, and no value as `null`. The
quotes keep your shell from reading the brackets. An unknown key is an error, with the most
similar known key if there is one. [Coming from another tool](coming-from.md) lists what other tools call
these keys.

An editor with a YAML language server (VS Code with the YAML extension, Neovim, Helix, ...) completes and checks the
keys of a recipe. Write the schema to a file with `chunkflow config schema > chunkflow.schema.json`, and begin the
recipe with `# yaml-language-server: $schema=chunkflow.schema.json`.
"""


def main() -> None:
    PAGE.write_text(configuration_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    from docs_pictures import draw_all
    from gpu_proof.tables import fill_page

    fill_page(DOCS / "gpu.md")
    print(f"filled {DOCS / 'gpu.md'}")

    draw_all()
    print(f"drew {DOCS / 'images'}")


def configuration_page() -> str:
    """Return the text of docs/configuration.md: a section for each group of keys, a row for each key."""
    lines = [INTRODUCTION]
    sections: dict[str, list[Key]] = {}
    for name, key in describe_keys().items():
        sections.setdefault(name.rpartition(".")[0], []).append(key)
    sections[""] = sections.pop("")  # keys outside the groups come last
    for section, keys in sections.items():
        lines.append(f"## {section or 'Other keys'}\n")
        about = _section_docstring(section)
        if about:
            lines.append(f"{about}\n")
        lines += _table(keys)
        for key in keys:
            if key.has_sections:
                lines += [f"### Each of {key.name}\n", f"{inspect.getdoc(get_args(key.kind)[0])}\n"]
                lines += _table([each for name, each in describe_element_keys().items() if name.startswith(key.name)])
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(keys: list[Key]) -> list[str]:
    return ["| key | default | meaning |", "|---|---|---|", *map(_row, keys), ""]


def _row(key: Key) -> str:
    meaning = key.help
    if key.choices and key.choices != ("true", "false"):
        words = ", ".join(f"`{choice}`" for choice in key.choices)
        meaning = f"{meaning} {'A list of' if key.is_list else 'One of'} {words}.".strip()
    default = key.default or '""'
    return f"| `{key.name}` | `{_cell(default)}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    """Escape what Markdown would take for its own: the table's bars, and angle brackets outside code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _section_docstring(section: str) -> str:
    """Return the docstring of a section's dataclass, or an empty string if it has none."""
    value: Any = Config()
    for name in filter(None, section.split(".")):
        value = getattr(value, name)
    kind = type(value)
    documentation = inspect.getdoc(kind) or ""
    # Without a docstring, dataclasses write their signature in its place.
    return "" if documentation.startswith(f"{kind.__name__}(") else documentation


if __name__ == "__main__":
    main()
