"""Documentation that can go stale without anybody noticing: generated pages, links, keys, quoted messages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from chunkflow_cli.config.keys import known_keys

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
REMOVED_KEYS = {"chunk.k_per"}
"""Keys that docs/design.md mentions because they were removed."""


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs", REPOSITORY / "benchmarks" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_configuration_page_is_current(generator: ModuleType) -> None:
    """A changed default or a new key is not documented until somebody runs `make docs`."""
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == generator.configuration_page(), "docs/configuration.md is out of date: run make docs"


def test_configuration_page_has_every_key(generator: ModuleType) -> None:
    page = generator.configuration_page()
    assert [key for key in known_keys() if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    """A renamed page or heading breaks links in other pages, which nobody rereads."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_keys_in_commands_exist(page: Path) -> None:
    """A reader who copies a command with a key that was renamed learns only that the page is wrong."""
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    named = set(re.findall(r"(?<![\w./-])([a-z]+(?:\.[a-z_]+)+)(?==)", page.read_text(encoding="utf-8")))
    unknown = {name for name in named if name.partition(".")[0] in sections} - set(known_keys()) - REMOVED_KEYS
    assert unknown == set()


def test_quoted_messages_are_in_the_code() -> None:
    """Readers search docs/troubleshooting.md for the message that they see: it must quote what the code prints."""
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", code)  # string literals that continue on the next line
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [words for heading in re.findall(r"^### (`.+)$", page, re.MULTILINE) for words in quotes(heading)]
    assert len(quoted) > 20
    assert [words for words in quoted if any(part not in code for part in words.split("…"))] == []


def quotes(heading: str) -> list[str]:
    return re.findall(r"`([^`]+)`", heading)


def test_the_readme_fits_its_purpose() -> None:
    """It convinces in one screen, and the rest is in docs/."""
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
