"""Where ranks call modules more or less often, ZeRO-3 gathers the weights of the module around these together."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from chunkflow_cli.model.uneven_calls import CALL_EXPERTS_ONE_BY_ONE, modules_with_uneven_calls
from support.models import recurrent_model


def test_experts_that_are_called_one_by_one_are_known() -> None:
    """Found in the sources of transformers: a new version may have more of them.

    transformers gives most classes of experts a product for all experts in one call, by a decorator. The others loop
    over the experts that a token takes; where the loop calls a module, the calls depend on the tokens.
    """
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^(@\S+)?\n?class (\w+Experts)\(.*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL
        ):
            is_called = re.search(r"self\.(mlp|act_fn)\(", match[0])
            if "use_experts_implementation" not in (match[1] or "") and "expert_hit" in match[0] and is_called:
                found.add(match[2])
    assert found == CALL_EXPERTS_ONE_BY_ONE


def test_modules_that_run_once_for_each_segment_are_found() -> None:
    """All attention of a model that picks blocks of keys and its mixers, but no convolution that runs once for all."""
    assert set(modules_with_uneven_calls(recurrent_model("qwen4_exp"))) == {
        "model.layers.0.ple", "model.layers.1.self_attn", "model.layers.2.ple", "model.layers.3.self_attn",
    }  # fmt: skip
    assert not modules_with_uneven_calls(recurrent_model("inkling2"))
