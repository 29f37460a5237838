"""Bends the wall clock and the resolver of a process that has this folder in its PYTHONPATH."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

BENT = Path(os.environ["BENT"])  # A folder: `clock` holds seconds, a file of a host's name what it does.
true_time = time.time
true_getaddrinfo = socket.getaddrinfo


def bent_time() -> float:
    """Return what a clock says that was set by so many seconds."""
    return true_time() + float((BENT / "clock").read_text())


def bent_getaddrinfo(host: Any, *others: Any, **more: Any) -> Any:
    """Look up names of `example` here: they hang, fail, or are this machine."""
    if not str(host).endswith(".example"):
        return true_getaddrinfo(host, *others, **more)
    trouble = BENT / str(host)
    while trouble.exists() and trouble.read_text() == "hangs":
        (BENT / f"{host}.asked").touch()
        time.sleep(0.05)
    if trouble.exists():
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return true_getaddrinfo("127.0.0.1", *others, **more)


time.time = bent_time
socket.getaddrinfo = bent_getaddrinfo
