"""What the tools start ends with them: as a background job that ignores SIGINT, and when they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.play.peers import eventually
from tests.play.rig import ROOT


def marked(mark: str) -> list[str]:
    """Return what runs with this mark in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:  # It is gone, or another's.
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")
@pytest.mark.parametrize(("row", "code"), [("sigterm_in_lookup", 0), ("primary_hangs", -signal.SIGKILL)])
async def test_a_tool_leaves_no_process_behind(row: str, code: int) -> None:
    """It passes where SIGINT is ignored, as in a background job; killed, it takes its proxy with it."""
    mark = str(uuid.uuid4())
    tool = (sys.executable, "-m", "tests.proof.network", "--only", row)
    job = await asyncio.create_subprocess_exec(
        *("sh", "-c", "trap '' INT; exec \"$@\"", "job", *tool), cwd=ROOT, env={**os.environ, "MARK": mark}
    )
    try:
        if code:
            await eventually(lambda: any("ocpp_2w_proxy.py" in command for command in marked(mark)))
            job.kill()
        assert await asyncio.wait_for(job.wait(), 60) == code
    finally:
        with suppress(ProcessLookupError):
            job.kill()
    await eventually(lambda: not marked(mark))
