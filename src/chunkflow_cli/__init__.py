"""Exact chunked fine-tuning of language models on long-tailed data."""

__version__ = "0.1.0"
