"""The chat template that `data.chat_template` names: a file, or one of several that a tokenizer has.

The tokenizer is given the text as its only template. So the tokens, the cache's key, the run's identity and the
tokenizer in `final/` all follow from one place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.schema import DataConfig, DataFormat
from chunkflow_cli.data.names import printable
from chunkflow_cli.data.template_arguments import compiled_template, names_read
from chunkflow_cli.data.tokenizer import has_tokenizer, load_tokenizer
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BYTES = 1 << 20
"""Bytes of the largest file that is taken for a template. Those that models ship have up to some ten thousand."""


def needs_tokenizer(config: DataConfig, format: DataFormat, model_path: str) -> bool:
    """Return True if a tokenizer writes the samples, or is to be saved with another template.

    Raises:
        UsageError: there is none to save `data.chat_template` with.
    """
    if format is not DataFormat.tokens:
        return True
    if config.chat_template is None or not model_path:
        return False
    if not has_tokenizer(model_path):
        raise UsageError(
            f"data.chat_template={printable(config.chat_template)} has no effect: the rows are ids, and "
            f"model.path={model_path} has no tokenizer to save it with\n  leave the key out"
        )
    return True


def load_with_template(config: DataConfig, model_path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with `data.chat_template` as its only chat template if that is set.

    Raises:
        UsageError: there is no such tokenizer or template, or the template is not valid.
    """
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if config.chat_template is not None:
        tokenizer.chat_template = chosen_template(config.chat_template, tokenizer)
    return tokenizer


def chosen_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the template with this name among the tokenizer's own, or else in the file with this path.

    Raises:
        UsageError: there is neither, or the file holds no chat template.
    """
    own = tokenizer.chat_template or {}
    templates = {"default": own} if isinstance(own, str) else own
    named = f"data.chat_template={printable(choice)}"
    if choice in templates:
        return templates[choice]
    path = Path(choice)
    if not path.is_file():
        has = f"the tokenizer has: {', '.join(sorted(templates))}" if templates else "the tokenizer has no template"
        what = "is a folder" if path.is_dir() else "is neither a file nor a template of the tokenizer"
        raise UsageError(f"{named} {what}\n  name a .jinja file; {has}")
    text = _read(path, named)
    compiled_template(text, named)
    if "messages" not in names_read(text):
        raise UsageError(
            f"{named} is not a chat template: it never reads messages\n  name a Jinja file that writes them"
        )
    return text


def _read(path: Path, named: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UsageError(f"{named} is not a chat template: it has more than {MOST_BYTES // 1024} KiB")
        # Line ends as transformers reads them, when it finds the template next to a tokenizer.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UsageError(f"{named} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{named} is not a chat template: it is not a text in UTF-8 (byte {error.start})") from error
