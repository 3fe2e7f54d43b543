"""The trained model as a Hugging Face folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chunkflow_cli.console import working
from chunkflow_cli.data.tokenizer import has_tokenizer, load_tokenizer
from chunkflow_cli.model.adapter_saving import adapter_card
from chunkflow_cli.model.loading import skeleton
from chunkflow_cli.training.checkpoint import save_final
from chunkflow_cli.training.generation_ends import stop_where_answers_end
from chunkflow_cli.training.prepared import Prepared


def model_writer(run: Prepared, *, is_final: bool = True) -> Callable[[Path], None]:
    """Return a function that saves the model as it is then, with its tokenizer. Every process calls both.

    Args:
        is_final: False does not repeat where generation has to stop.
    """
    model = run.config.model
    tokenizer = None
    if has_tokenizer(model.path):
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        wholes = run.data.read.wholes
        if (template := next((whole.chat_template for whole in wholes if whole.chat_template), None)) is not None:
            tokenizer.chat_template = template
        ends = dict(sum((Counter(whole.entry.ends) for whole in wholes), Counter[int]()))
        generation = run.parts.model.generation_config
        line = stop_where_answers_end(generation, ends, tokenizer, is_adapter=model.lora.enabled)
        if line is not None and (is_final or not model.lora.enabled):
            run.console.print(line, soft_wrap=True)
    is_whole = not run.parts.engine.is_stage
    whole = None if is_whole or not run.processes.is_first else skeleton(model, run.hf_config)
    card = adapter_card(model, run.parts.model) if model.lora.enabled else ""

    def save(folder: Path) -> None:
        with working(run.console, "saving the model"):
            save_final(folder, run.parts.model, tokenizer, run.parts.engine, skeleton=whole, card=card)

    return save
