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
from chunkflow_cli.data.source import BadRowError, HubDataset, LocalFiles, Location, RowBatch, Source, open_source

__all__ = [
    "BadRowError",
    "Conversation",
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
    "open_source",
    "parse_sample",
]
