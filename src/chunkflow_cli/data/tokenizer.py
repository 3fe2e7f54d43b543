"""Loading a tokenizer, telling whether a model has one, and telling two of them apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = re.compile(
    r"tokenizer\.(json|model.*)|vocab\.(json|txt|bpe)|tekken\.json|tokenization_\w+\.py|.*\.(model|tiktoken|spm)"
)
"""Files that hold a vocabulary; `tokenizer_config.json` alone does not make a tokenizer."""
HUB_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def keep_torch_out() -> None:
    """Tokenise without importing torch, which takes seconds: transformers does without it, except for a GGUF file.

    For a process that trains nothing. A module that is None in `sys.modules` cannot be imported: that is how Python
    itself says so. Where torch is imported already, nothing happens.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that torch is missing


def has_tokenizer(model_path: str) -> bool:
    """Whether the model (a folder, a GGUF file or a hub id) brings a tokenizer, and so whether one is to be saved.

    Of a hub id that neither the hub nor its local cache knows anything about, the answer is no.
    """
    path = Path(model_path).expanduser()
    if path.is_file():
        return path.suffix.lower() == ".gguf"
    if path.is_dir():
        return any(TOKENIZER_FILE.fullmatch(entry.name) for entry in path.iterdir())
    return _hub_has_tokenizer(model_path)


def _hub_has_tokenizer(model_id: str) -> bool:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        if any(isinstance(try_to_load_from_cache(model_id, name), str) for name in HUB_TOKENIZER_FILES):
            return True
        for name in HUB_TOKENIZER_FILES:
            try:
                hf_hub_download(model_id, name)
            except LocalEntryNotFoundError:
                return False  # no network: asking for the next file would end the same way, after many tries
            except EntryNotFoundError:
                continue
            return True
    except (HfHubHTTPError, HFValidationError):  # no such model, no access to it, or no hub id at all
        return False
    return False


def load_tokenizer(model_path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, a GGUF file or a hub id.

    Raises:
        UsageError: there is none, or it cannot be loaded. (AutoTokenizer alone does not always say so: of a folder with
            nothing but a configuration it may make a tokenizer of one token.)
    """
    path = Path(model_path).expanduser()
    if path.exists() and not has_tokenizer(model_path):
        raise UsageError(
            f"model.path={model_path} has no tokenizer\n"
            "  put the tokenizer's files (tokenizer.json ...) into the folder, or give data of ids: data.format=tokens"
        )
    from transformers import AutoTokenizer

    if not path.exists():
        go_offline_if_unreachable()
    try:
        if path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=trust_remote_code
            )
        else:
            name = str(path) if path.is_dir() else model_path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"model.path={model_path}: its tokenizer cannot be loaded\n  {reason}") from error
    if len(tokenizer) < 2:
        raise UsageError(f"model.path={model_path}: its tokenizer knows {len(tokenizer)} tokens\n  are files missing?")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which tokens a text, or a conversation, becomes."""
    facts: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    if tokenizer.is_fast:
        facts["backend"] = tokenizer.backend_tokenizer.to_str()
    else:
        facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
        facts["settings"] = {name: repr(value) for name, value in sorted(tokenizer.init_kwargs.items())}
    serialised = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(serialised, digest_size=20).hexdigest()
