"""x."""

from typing import Any


def why_not(hf_config: Any) -> str | None:
    return None
