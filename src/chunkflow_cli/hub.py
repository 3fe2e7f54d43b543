"""The Hugging Face hub if it can be reached, otherwise the local cache without long retries; and a faster import."""

from __future__ import annotations

import logging
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

CONNECT_SECONDS = 5.0


@cache
def go_offline_if_unreachable() -> bool:
    """Make huggingface_hub use only its cache if the hub cannot be reached, and return whether that is the case.

    Otherwise it asks for each missing file six times, with pauses: most of a minute until the error.
    """
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False  # a direct connection says nothing about what the proxy reaches
    endpoint = urlparse(constants.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        return True
    return False


def import_models() -> None:
    """Import `transformers.models` in a hundredth of the time.

    It lists what the files of all models export, and so does `transformers` itself, right before. Each reads 2,000
    files, 0.2 s of CPU time, because the cache between them holds 128 folders and there are 500. Here the second list
    is made from the first.
    """
    import transformers

    if "transformers.models" in sys.modules:
        return
    utils: Any = transformers.utils.import_utils
    read = utils.define_import_structure
    folder = Path(transformers.__file__).parent / "models"
    listed = {
        needs: {name.removeprefix("models."): names for name, names in modules.items() if name.startswith("models.")}
        for needs, modules in read(folder, prefix="models").items()
    }

    def define_import_structure(path: str, prefix: str | None = None) -> Any:
        return listed if Path(path) == folder / "__init__.py" and prefix is None else read(path, prefix)

    utils.define_import_structure = define_import_structure
    try:
        import transformers.models
    finally:
        utils.define_import_structure = read
