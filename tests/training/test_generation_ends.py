"""Where the trained model stops generating."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chunkflow_cli.training.generation_ends import stop_where_answers_end

TOKENIZER = SimpleNamespace(convert_ids_to_tokens={5: "<|im_end|>", 7: "<|eot|>"}.__getitem__)


@pytest.mark.parametrize(("known", "stops"), [(None, [5, 7]), (2, [2, 5, 7]), ([2, 5], [2, 5, 7])])
def test_final_stops_where_answers_end(known: int | list[int] | None, stops: list[int]) -> None:
    generation = SimpleNamespace(eos_token_id=known)
    line = stop_where_answers_end(generation, {7: 1, 5: 3}, TOKENIZER, is_adapter=False)  # type: ignore[arg-type]
    assert generation.eos_token_id == stops
    assert line is not None
    assert "<|eot|> (7) too" in line
    assert stop_where_answers_end(generation, {5: 3}, TOKENIZER, is_adapter=False) is None  # type: ignore[arg-type]
    assert generation.eos_token_id == stops


def test_an_adapter_is_saved_with_the_stops_and_says_that_loaders_do_not_read_them() -> None:
    generation = SimpleNamespace(eos_token_id=2)
    line = stop_where_answers_end(generation, {5: 3}, TOKENIZER, is_adapter=True)  # type: ignore[arg-type]
    assert generation.eos_token_id == [2, 5]
    assert line == (
        "warning: answers end with <|im_end|> (5), where the base model does not stop: "
        "generate with eos_token_id=5, as chat and export --merge do"
    )
