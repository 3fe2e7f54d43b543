"""Tokens: chat template and loss mask, the content-hashed cache, and the samples that a run uses."""

from chunkflow_cli.tokens.tokenized import TokenizedData, TokenizedSample, TokenizedSource, tokenize, tokenize_source
from chunkflow_cli.tokens.tokenizer import has_tokenizer, load_tokenizer

__all__ = [
    "TokenizedData",
    "TokenizedSample",
    "TokenizedSource",
    "has_tokenizer",
    "load_tokenizer",
    "tokenize",
    "tokenize_source",
]
