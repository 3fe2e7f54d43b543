"""What several ranks cannot run is refused before the first of them starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.layouts import check_calls_of_modules
from chunkflow_cli.model.mixers import MIXERS
from chunkflow_cli.model.special_types import EXPERTS_ONE_BY_ONE, OWN_MIXERS, TO_BLOCKS


def test_experts_that_are_called_one_by_one_are_refused_under_zero_3() -> None:
    """Found in the sources of transformers: a new version may have more of them.

    transformers gives most classes of experts a product for all experts in one call, by a decorator. The others loop
    over the experts that a token takes; where the loop calls a module, the calls depend on the tokens.
    """
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^(@\S+)?\n?class \w+Experts\(.*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL
        ):
            is_called = re.search(r"self\.(mlp|act_fn)\(", match[0])
            if "use_experts_implementation" not in (match[1] or "") and "expert_hit" in match[0] and is_called:
                found.add(path.parent.name)
    assert found == EXPERTS_ONE_BY_ONE
    for kind in found:
        check_calls_of_modules(1, kind)
        with pytest.raises(UsageError, match=rf"engine\.zero_stage=3 cannot run {kind} on several ranks"):
            check_calls_of_modules(3, kind)
    check_calls_of_modules(3, "mixtral")


def test_modules_that_run_once_for_each_segment_are_refused_under_zero_3() -> None:
    """Found in the sources of transformers: every model that attends to blocks of keys, or with a class of `MIXERS`, but
    those that run once."""
    names = [name for name, mixer in MIXERS.items() if mixer.reach is None]
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        if any(f"class {name}(" in path.read_text(encoding="utf-8") for name in names):
            found.add(path.parent.name)
    assert found == OWN_MIXERS | {"qwen4_exp"}
    for kind in OWN_MIXERS | TO_BLOCKS:
        check_calls_of_modules(1, kind)
        with pytest.raises(UsageError, match=rf"zero_stage=3 cannot run {kind} on several ranks: it runs some modules"):
            check_calls_of_modules(3, kind)
