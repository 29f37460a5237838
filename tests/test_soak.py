"""Nothing in the proxy grows while everything around it breaks, and the proof that the soak would see it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import ocpp_2w_proxy as p
from tests.proof.fleet import FAULTS
from tests.proof.soak import FILES, MEMORY, Run, contents, growth, lift_file_limit, spare

SEED = 1
SECONDS = 60.0  # Of faults.
FAULTS_EVERY = 2.0  # Seconds; enough of them for each to come once.


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="sizes are read from Linux's /proc")
async def test_nothing_grows_whatever_breaks(tmp_path: Path) -> None:
    """500 chargers: descriptors, tasks and tables are what they were, and memory nearly so."""
    lift_file_limit()
    report = await Run(tmp_path, SEED, every=FAULTS_EVERY).play(SECONDS)
    print(report)  # Shown if it fails.
    assert report.problems == []
    assert report.faults.keys() == {fault.__name__ for fault in FAULTS}


# What the soak says to samples that are made up.

START = {MEMORY: 50_000, FILES: 10, "Session": 4, "Relay": 2, "Memory.claims": 0}


def test_what_has_not_grown_is_no_problem() -> None:
    """Memory may grow a little, and a router may remember the last of what comes and goes."""
    end = {**START, MEMORY: 50_000 + spare(MEMORY, 2), "Session": 6, "Memory.stored": 0}
    assert growth(START, end, chargers=2) == []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (MEMORY, 50_001 + spare(MEMORY, 2)),
        (FILES, 11),
        ("Relay", 3),
        ("Session", 9),
        ("Memory.claims", 1),
        ("New", 1),
    ],
)
def test_what_has_grown_is_found(name: str, number: int) -> None:
    """Whatever it is, also what was not there before."""
    assert len(growth(START, {**START, name: number}, chargers=2)) == 1


def test_a_table_that_leaks_is_found() -> None:
    """By what it holds, also in the tables in it."""
    memory = p.Memory("CP1")
    gc.collect()  # What other tests have left must not go now.
    before = contents()
    assert growth(before, contents(), chargers=1) == []
    for _ in range(2):  # Calls, of which two may be left; but no table may hold them.
        memory.store(p.Call(p.Kind.STORED, "MeterValues", "m", "[]", p.NOTHING))
    memory.changed.clear()
    (found,) = growth(before, contents(), chargers=1)
    assert found.startswith("Memory.stored: ")
