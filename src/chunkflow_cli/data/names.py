"""Classify a file by its name: data of some form, certainly not data, or unknown."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .txt (each also with .gz, .zst, .bz2 or .xz), .parquet, .arrow"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_DATA = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|txt)(\.gz|\.zst|\.bz2|\.xz)?$|\.(parquet|arrow)$", re.IGNORECASE)
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|requirements|makefile|dockerfile)\b.*"
    r"|config\.json|dataset_infos?\.json|dataset_dict\.json|_success|thumbs\.db|desktop\.ini|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
    r"|.*\.(png|jpe?g|gif|svg|webp|bmp|ico|pdf|html?|css|md|rst|tex|py[cio]?|ipynb|sh|js|ya?ml|toml|cfg|ini|lock|log"
    r"|safetensors|gguf|pth?|bin|md5|sha1|sha256)",
    re.IGNORECASE | re.DOTALL,
)
"""Names of files that are certainly not training data, such as READMEs and images."""


def kind_of_name(path: Path) -> str | None:
    """Return `jsonl`, `json`, `csv`, `tsv`, `txt`, `parquet` or `arrow`; None if no reader handles this name."""
    match = _DATA.search(path.name)
    if match is None:
        return None
    return (match.group(3) or match.group(1)).lower().replace("ndjson", "jsonl")


def form_of_name(path: Path) -> str:
    """Return the suffix of a data file, with that of its compression: `.jsonl.gz`."""
    match = _DATA.search(path.name)
    return match.group().lower() if match else path.suffix


def is_no_data(name: str) -> bool:
    """Return whether a file certainly holds no rows, whatever its suffix: a README, a license, an image, code."""
    return _NO_DATA.fullmatch(name) is not None


def plain_name(name: str) -> str:
    """Return a name without the suffix of a compression: `a.jsonl` for `a.jsonl.gz`."""
    return next((name[: -len(end)] for end in COMPRESSIONS if name.lower().endswith(end)), name)


def printable(path: Path | str) -> str:
    """Return a path as text that every terminal and file takes, on one line.

    Names are bytes: one that is not UTF-8, or has a newline, is shown with escapes.
    """
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)
