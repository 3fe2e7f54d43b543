"""Read the nodes of a run from `launch.hostfile`."""

from __future__ import annotations

import ipaddress
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


_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d{0,3})", re.ASCII)
_NAME = re.compile(r"(?:\w[\w.-]*@)?(\w[\w.-]*|[0-9a-f.]*:[0-9a-f:.]*(?:%\w+)?)", re.ASCII | re.IGNORECASE)
"""A host's name or address, perhaps with a user: nothing that is an option for ssh or a command for a shell."""


def read_hostfile(path: str) -> list[Host]:
    """Read a hostfile: lines of `HOST slots=N`, as for MPI and DeepSpeed; `#` begins a comment.

    Raises:
        UsageError: the file cannot be read, names no host or the same host twice, or has a line of another form.
    """
    if not Path(path).is_file():
        raise UsageError(f"launch.hostfile={path}: no such file\n  write lines such as: node-1 slots=8")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"launch.hostfile={path} cannot be read: {error.strerror}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"launch.hostfile={path}, line {number}"
        match = _LINE.fullmatch(text)
        if match is None:
            raise UsageError(f"{where}: {text!r} does not have the form: node-1 slots=8")
        name = match.group(1)
        if not _is_host(name):
            raise UsageError(
                f"{where}: {name!r} is not the name or address of a host\n"
                "  a name has letters, digits, dots, hyphens and underscores: node-1.example.org, or user@node-1"
            )
        if name.lower() in {host.name.lower() for host in hosts}:
            raise UsageError(f"{where}: {name} is listed twice\n  give each host one line, with all of its slots")
        hosts.append(Host(name, int(match.group(2))))
    if not hosts:
        raise UsageError(f"launch.hostfile={path} names no host\n  write lines such as: node-1 slots=8")
    return hosts


def _is_host(text: str) -> bool:
    match = _NAME.fullmatch(text)
    if match is None or ":" not in text:
        return match is not None
    try:
        ipaddress.ip_address(match.group(1))
    except ValueError:
        return False
    return True
