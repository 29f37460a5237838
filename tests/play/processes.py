"""How a tool starts a child: it ends when it is told to, and never outlives the tool."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

PR_SET_PDEATHSIG = 1
TOOL = os.getpid()


def call_linux(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def let_go() -> None:
    """Before a child runs: let SIGINT end it, whatever we ignore, and our own end, whatever it is."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(AttributeError, OSError):  # Linux has it.
        call_linux("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != TOOL:  # It has ended before we could ask.
        os._exit(1)
