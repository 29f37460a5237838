"""Nothing in the proxy grows while everything around it breaks, and the proof that the soak would see it."""

from __future__ import annotations

from pathlib import Path

import pytest

import ocpp_2w_proxy as p
from tests.play.inside import contents
from tests.play.rig import many_files
from tests.proof.soak import FAULTS, FILES, MEMORY, Run, growth, spare


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="sizes are read from Linux's /proc")
async def test_nothing_grows_whatever_breaks(tmp_path: Path) -> None:
    """60 chargers, each fault once: files, tasks and tables are what they were, and memory nearly so."""
    with many_files():
        report = await Run(tmp_path, seed=1, chargers=60, every=0.4, haste=5).play(0)
    print(report)  # Shown if it fails.
    assert report.problems == []
    assert report.faults.keys() == {fault.__name__ for fault in FAULTS}


def test_what_has_grown_is_found_and_nothing_else() -> None:
    """Memory may grow a little, and a router may remember the last of what comes and goes."""
    start = {MEMORY: 50_000, FILES: 10, "Session": 4, "Relay": 2, "Memory.claims": 0}
    most = {**start, MEMORY: 50_000 + spare(MEMORY, 2), "Session": 8, "Memory.stored": 0}
    assert growth(start, most, chargers=2) == []
    for name in [*most, "New"]:
        assert len(growth(start, {**most, name: most.get(name, 0) + 1}, chargers=2)) == 1


def test_a_table_that_leaks_is_found() -> None:
    """By what it holds, also in the tables in it."""
    memory = p.Memory("CP1")
    before = contents()
    memory.statuses["leak"] = {1: 2, 3: 4}  # type: ignore[assignment]
    assert contents()["Memory.statuses"] == before["Memory.statuses"] + 2
