"""Exact chunked fine-tuning of language models on long-tailed data."""

import logging

__version__ = "0.1.0"

# Libraries import bitsandbytes if it is installed. It then warns of a kernel that is never used here (`quantised.py`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
