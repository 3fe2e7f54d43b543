"""Find, load and fingerprint a model's tokenizer, and read from it what the data needs."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.hub import go_offline_if_unreachable, import_models

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = re.compile(
    r"tokenizer\.(json|model.*)|vocab\.(json|txt|bpe)|tekken\.json|tokenization_\w+\.py|.*\.(model|tiktoken|spm)"
)
"""Names of files that hold a vocabulary. `tokenizer_config.json` alone is not a tokenizer."""
HUB_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def keep_torch_out() -> None:
    """Prevent the import of torch in this process, unless it is imported already.

    transformers imports torch if it can, but needs it only to train and to read GGUF files. `chunkflow analyze` of 300
    chats takes 1.7 s without torch and 3.1 s with it (medians of three runs each, in turn, on two cores; 1.6 and 2.9 s
    of user time), and 180 MiB less memory; each worker process saves as much. transformers 5 has no setting for this.
    Python's import system defines None in `sys.modules` as a module that cannot be imported.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing


def let_torch_in() -> None:
    """Undo `keep_torch_out`. `datasets` fails on a module that is None."""
    if sys.modules.get("torch", "not imported") is None:
        del sys.modules["torch"]


def has_tokenizer(model_path: str) -> bool:
    """Return True if the model (a folder, a GGUF file or a hub id) has a tokenizer, which is then saved with it.

    A hub id that is found neither on the hub nor in its local cache has none.
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
                return False  # no network: the next file would fail in the same way, after many retries
            except EntryNotFoundError:
                continue
            return True
    except (HfHubHTTPError, HFValidationError):  # no such model, no access to it, or not a hub id
        return False
    return False


def load_tokenizer(model_path: str, *, trust_remote_code: bool, named: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder, a GGUF file or a hub id.

    Args:
        named: how messages name it; by default, as `model.path`.

    Raises:
        UsageError: there is none, or it cannot be loaded. (AutoTokenizer does not always raise: for a folder with only
            a configuration it may return a tokenizer with one token.)
    """
    named = named or f"model.path={model_path}"
    path = Path(model_path).expanduser()
    if path.exists() and not has_tokenizer(model_path):
        raise UsageError(
            f"{named} has no tokenizer\n"
            "  name another model, copy the tokenizer's files (tokenizer.json ...) there, or use rows of token ids: "
            "data.format=tokens"
        )
    import_models()
    from huggingface_hub.errors import StrictDataclassError
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
    except Exception as error:
        faults = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError)
        if not isinstance(error, faults) and type(error) is not Exception:
            raise  # a broken tokenizer.json is a plain Exception
        reason = first_line(error)
        raise UsageError(f"{named}: its tokenizer cannot be loaded\n  {reason}") from error
    if len(tokenizer) < 2:
        raise UsageError(f"{named}: its tokenizer has only {len(tokenizer)} tokens\n  are files missing?")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides which tokens a string or a conversation becomes."""
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


def missing_stops(known: int | Sequence[int] | None, ends: Iterable[int]) -> list[int]:
    """Return the ids that end answers and at which generation does not stop yet.

    Args:
        known: `eos_token_id` of a generation configuration.
        ends: ids that end answers, as in `EncodedBatch.ends`.
    """
    stops = [] if known is None else [known] if isinstance(known, int) else known
    return sorted(set(ends) - set(stops))


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the Rust tokenizer, set to report where each token really begins, and never to pad or truncate.

    A byte-level post-processor moves the start of a token past its spaces (`trim_offsets`), so that a token that holds
    only spaces seems to begin where the next one does, and would become a target at the edge of an answer. A
    tokenizer.json may also hold settings for padding and truncation, which transformers overrides on each call.
    """
    plain: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.post_processor = None
    plain.no_padding()
    plain.no_truncation()
    return plain


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids that the tokenizer by default puts before and after a string."""
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    extra = len(whole) - len(plain)
    before = next((start for start in range(extra + 1) if whole[start : start + len(plain)] == plain), None)
    assert before is not None, f"special tokens change how {tokenizer.name_or_path} splits a string"
    return np.array(whole[:before], np.int64), np.array(whole[before + len(plain) :], np.int64)
