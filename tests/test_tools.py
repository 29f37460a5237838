"""What the tools start ends with them: as a background job that ignores SIGINT, and when they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from tests.play.peers import eventually
from tests.play.rig import ROOT

TOOL = (sys.executable, "-m", "tests.proof.network", "--only", "sigterm_in_lookup", "--only", "primary_hangs")


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
@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_tool_leaves_no_process_behind(is_killed: bool) -> None:
    """It passes where SIGINT is ignored, as in a background job; killed, it takes its proxy with it."""
    mark = str(uuid.uuid4())
    job = ("sh", "-c", "trap '' INT; exec \"$@\"", "job", *TOOL)
    tool = await asyncio.create_subprocess_exec(
        *job, cwd=ROOT, env={**os.environ, "MARK": mark}, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await eventually(lambda: any("ocpp_2w_proxy.py" in command for command in marked(mark)))
        if is_killed:
            tool.kill()
    finally:
        code = await tool.wait()
    assert code == (-signal.SIGKILL if is_killed else 0)
    await eventually(lambda: not marked(mark))
