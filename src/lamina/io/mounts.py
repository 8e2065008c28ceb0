"""Whether a path is on a network file system, where mapping a file for long is not safe."""

from __future__ import annotations

import os

__all__ = ["on_network"]

_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "virtiofs",
}
_known: dict[int, bool] = {}


def on_network(path: str) -> bool:
    """Tell whether ``path`` is on a network (or FUSE) file system; ``False`` where unknown.

    Another machine may truncate a file there, and a mapping of it would then kill the process.
    """
    try:
        device = os.stat(path).st_dev
    except OSError:
        return False
    if device not in _known:
        _known[device] = _file_system(device) in _NETWORK or _file_system(device).startswith("fuse")
    return _known[device]


def _file_system(device: int) -> str:
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        return ""
    return ""
