"""Tokens: chat template and loss mask, the content-hashed cache, and the samples that a run uses."""

from chunkflow_cli.tokens.tokenized import TokenizedData, TokenizedSample, tokenize
from chunkflow_cli.tokens.tokenizer import has_tokenizer, load_tokenizer

__all__ = ["TokenizedData", "TokenizedSample", "has_tokenizer", "load_tokenizer", "tokenize"]
