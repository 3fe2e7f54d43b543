"""The user's environment variables that ranks on other nodes need, and how they get there.

DeepSpeed's launcher writes variables into the command line of ssh, where every user of both machines can read them. A
token of the hub or a proxy's password must not be there. So they travel in a file of the run's folder that only the
user can read, and that is deleted when all ranks have read it. Only what a process must have before it starts, for the
loader of shared libraries, is in the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

from chunkflow_cli.processes.watch_folder import WatchFolder

PREFIXES = (
    "HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "XDG_CACHE_",  # caches, hub
    "NCCL_", "GLOO_", "UCX_", "FI_", "TP_SOCKET_",  # networks
    "CUDA_", "CUBLAS_", "CUDNN_", "TORCH_", "PYTORCH_", "TRITON_", "TORCHINDUCTOR_", "MKL_", "KMP_",
    "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_", "WANDB_", "MLFLOW_", "TRACKIO_",
)  # fmt: skip
"""Prefixes of the names of these variables."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""Names in lower or upper case."""
OF_THE_LOADER = ("LD_LIBRARY_PATH", "LD_PRELOAD")
"""What the loader of shared libraries reads when a process starts."""
OF_A_MACHINE = ("CUDA_VISIBLE_DEVICES",)
"""Variables with these prefixes that belong to one machine: the launcher sets them on each node."""


def for_other_nodes(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks on other nodes set themselves when they start."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(PREFIXES) or name.lower() in PROXIES) and name not in OF_A_MACHINE
    }


def leave_variables(watch: WatchFolder, variables: Mapping[str, str]) -> None:
    """Write variables for the ranks into a new file that only the user can read."""
    handle = os.open(watch.variables, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(dict(variables), file)


def take_variables(watch: WatchFolder) -> None:
    """Set the variables that the launcher has left for this rank."""
    os.environ.update(json.loads(watch.variables.read_text(encoding="utf-8")))


def remove_variables(watch: WatchFolder, ranks: Iterable[int] = ()) -> bool:
    """Delete the file if these ranks have started, and return whether it is gone."""
    if not all(watch.heartbeat(rank).exists() for rank in ranks):
        return False
    watch.variables.unlink(missing_ok=True)
    return True
