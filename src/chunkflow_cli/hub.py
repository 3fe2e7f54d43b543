"""The Hugging Face hub if it can be reached; otherwise the local cache, without long retries."""

from __future__ import annotations

import logging
import os
import socket
from functools import cache
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
