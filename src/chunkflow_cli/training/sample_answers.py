"""Answers to a few prompts at each evaluation (`eval.prompts`), so that a person can watch the model learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError

from chunkflow_cli.config.schema import DataConfig
from chunkflow_cli.data.template_choice import load_with_template
from chunkflow_cli.engine import all_or_none
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.chunk_model import base_model
from chunkflow_cli.model.hf_config import known_ids, position_limit
from chunkflow_cli.training.display import TrainingDisplay
from chunkflow_cli.training.metrics import keep_rows_before
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState

ANSWERS = "answers.jsonl"
"""File in a run's folder: a row for each prompt of each evaluation."""
MOST_TOKENS = 64
"""Tokens of an answer at most."""


def answer_prompts(run: Prepared, state: RunState, display: TrainingDisplay) -> None:
    """Let the model answer each prompt greedily, show the answers and add them to answers.jsonl.

    The first process, which holds the whole model, generates; the others wait. Prompts are turns of a user if the
    tokenizer has a chat template, and the beginning of a text otherwise. Every process calls it.

    Raises:
        UsageError: the tokenizer is not that of the model; on all processes.
    """
    prompts = run.config.eval.prompts
    if not prompts:
        return
    with all_or_none("writing sample answers"):
        if run.processes.is_first:
            display.phase("sample answers")
            step, path = state.progress.step, run.folder.path / ANSWERS
            keep_rows_before(path, step)
            answers = _answers(run, state, prompts)
            with path.open("a", encoding="utf-8") as file:
                for prompt, answer in zip(prompts, answers, strict=True):
                    file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")
                    display.answer(prompt, answer)


def _answers(run: Prepared, state: RunState, prompts: list[str]) -> list[str]:
    config, model = run.config, run.parts.model
    tokenizer = load_with_template(config.data, config.model.path, trust_remote_code=config.model.trust_remote_code)
    settings = _greedy_settings(run)

    def on_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        state.at("writing sample answers")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    answers = []
    with _as_it_generates(model), torch.no_grad():
        for prompt in prompts:
            text = _as_turn(prompt, tokenizer, config.data) if tokenizer.chat_template else prompt
            given = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(run.device)
            out = model.generate(
                max_new_tokens=_room_for_answer(run, given["input_ids"]),
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                generation_config=settings,
                use_cache=True,
                stopping_criteria=[on_token],
            )
            answers.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def _greedy_settings(run: Prepared) -> Any:
    """Return how an answer is generated: it ends where those of the data do, or the model's own."""
    from transformers import GenerationConfig

    ends = {end for whole in run.data.read.wholes for end in whole.entry.ends}
    stops = run.parts.model.generation_config.eos_token_id
    ends |= {stops} if isinstance(stops, int) else set(stops or ())
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0))


def _as_turn(prompt: str, tokenizer: Any, data: DataConfig) -> str:
    """Return the text of a conversation in which a user has said this.

    Raises:
        UsageError: the chat template does not allow it.
    """
    turns = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **data.template_arguments
        )
    except TemplateError as error:
        raise UsageError(
            f"eval.prompts: the chat template rejects {prompt!r} as a user's turn: {error}\n  remove eval.prompts"
        ) from error
    return text


def _room_for_answer(run: Prepared, ids: torch.Tensor) -> int:
    """Return how many tokens the model may answer to a prompt, (1, tokens).

    Raises:
        UsageError: the model does not know an id, or the prompt leaves no room.
    """
    largest, known = int(ids.max()), known_ids(run.hf_config)
    if largest >= known:
        raise UsageError(
            f"eval.prompts: the tokenizer of model.path={run.config.model.path} gives id {largest}, but the model "
            f"has {known} ids\n  use the tokenizer that belongs to the model, or remove eval.prompts"
        )
    length = ids.shape[1]
    limit = position_limit(run.hf_config) or length + MOST_TOKENS
    if length >= limit:
        raise UsageError(
            f"eval.prompts: a prompt has {length:,} tokens, and the model takes at most {limit:,}\n  shorten it"
        )
    return min(MOST_TOKENS, limit - length)


@contextmanager
def _as_it_generates(model: Any) -> Iterator[None]:
    """Within the block, the model has an attention that works with Hugging Face's cache, and does not train."""
    base = base_model(model)
    ours = base.config._attn_implementation
    model.eval()
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    try:
        yield
    finally:
        base.set_attn_implementation(ours)
        model.train()
