"""Reading data: files and data sets to rows (`source`), rows to samples (`formats`)."""

from chunkflow_cli.data.formats import (
    Conversation,
    Instruction,
    Message,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
    decode_row,
    detect_format,
    parse_sample,
)
from chunkflow_cli.data.sizes import EstimatedSizes, estimate_sizes
from chunkflow_cli.data.source import BadRowError, HubDataset, LocalFiles, Location, RowBatch, Source, open_source

__all__ = [
    "BadRowError",
    "Conversation",
    "EstimatedSizes",
    "HubDataset",
    "Instruction",
    "LocalFiles",
    "Location",
    "Message",
    "PlainText",
    "PromptCompletion",
    "RowBatch",
    "Sample",
    "Source",
    "TokenRow",
    "decode_row",
    "detect_format",
    "estimate_sizes",
    "open_source",
    "parse_sample",
]
