"""A small tokenizer for tests: one token a byte, so that expected targets can be written as a string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    **options: Any,
) -> Path:
    """Save a tokenizer of a token a byte, with the merge " H", and return its folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "ĠH"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "H")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>"), AddedToken("<s>")])
    backend.post_processor = (
        processors.ByteLevel(trim_offsets=True)
        if bos is None
        else processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, **options)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
