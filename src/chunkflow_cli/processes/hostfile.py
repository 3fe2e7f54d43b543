"""The nodes of a run, as `launch.hostfile` lists them."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class Host:
    """A node, and the number of ranks that it takes."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name} slots={self.slots}"

    @property
    def is_here(self) -> bool:
        """True if this process runs on the node."""
        return self.name in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def read_hostfile(path: str) -> list[Host]:
    """Read a hostfile: lines of `HOST slots=N`, as for MPI and DeepSpeed; `#` begins a comment.

    Raises:
        UsageError: the file does not exist, names no host or the same host twice, or has a line of another form.
    """
    if not Path(path).is_file():
        raise UsageError(f"launch.hostfile={path}: no such file\n  write lines such as: node-1 slots=8")
    hosts: list[Host] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UsageError(f"launch.hostfile={path}, line {number}: {text!r} does not have the form: node-1 slots=8")
        if match.group(1) in {host.name for host in hosts}:
            raise UsageError(
                f"launch.hostfile={path}, line {number}: {match.group(1)} is listed twice\n"
                "  give each host one line, with all of its slots"
            )
        hosts.append(Host(match.group(1), int(match.group(2))))
    if not hosts:
        raise UsageError(f"launch.hostfile={path} names no host\n  write lines such as: node-1 slots=8")
    return hosts
