"""The memory of this machine that this process may use: a container or a job of SLURM gets a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the machine's, or less under the limit of a cgroup.

    Args:
        root: where `proc` and `sys` are.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Yield the limits of this process's cgroup and of those above it, in version 2 or 1 of cgroups.

    Within a container, /proc/self/cgroup may name a group of the host, which is not there: the container's own is then
    where the groups are mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                text = (mount / folder / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdigit():  # "max" is no limit
                yield int(text)
