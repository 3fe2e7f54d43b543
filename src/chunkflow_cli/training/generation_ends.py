"""Make the trained model stop generating at the tokens that end the answers it learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from chunkflow_cli.data.tokenizer import missing_stops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_where_answers_end(
    generation: Any, ends: Iterable[int], tokenizer: PreTrainedTokenizerBase, *, is_adapter: bool
) -> str | None:
    """Add to a generation configuration the tokens that end answers, and return a line that says so.

    A model that is given another chat template, or a base model, has learned to end an answer with a token at which its
    published configuration does not stop: it would go on talking to itself.

    Args:
        generation: the configuration of the model; it is changed, and saved with the model.
        ends: ids that end answers, as in `EncodedBatch.ends`.
        is_adapter: whoever loads an adapter gets the base model's configuration, so the line says what to do instead.

    Returns:
        The line, or None if generation stops at these tokens already.
    """
    known = generation.eos_token_id
    missing = missing_stops(known, ends)
    if not missing:
        return None
    names = " and ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in missing)
    generation.eos_token_id = [*([] if known is None else [known] if isinstance(known, int) else known), *missing]
    if is_adapter:
        return (
            f"warning: answers end with {names}, where the base model does not stop: generate with "
            f"eos_token_id={missing if len(missing) > 1 else missing[0]}, as chat and export --merge do"
        )
    return f"final/ stops at {names} too, which ends answers of the data (generation_config.json)"
