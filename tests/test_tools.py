"""The tools that are run by hand, in small: each finds nothing, would find something, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

import ocpp_2w_proxy as p
from tests.play.frames import unframed
from tests.play.inside import contents
from tests.play.peers import eventually
from tests.play.rig import ROOT, SCRIPT, many_files
from tests.proof.benchmark import MEASUREMENTS, QUICK, Bench, reading, undisturbed
from tests.proof.network import NOT_TRIED, ROWS, Row, Seen, play_all, promised
from tests.proof.soak import FAULTS, FILES, MEMORY, Run, growth, spare

# Every fault of the table in tests/README.md, tried against the script in a process of its own.


@pytest.fixture(scope="module")
def all_seen(request: pytest.FixtureRequest) -> dict[str, Seen]:
    """What became of the rows that were asked for, played at the same time because they mostly wait."""
    asked = {item.name.partition("[")[2] for item in request.session.items if item.path.samefile(__file__)}
    rows = [row for row in ROWS if f"{row.name}]" in asked and not row.is_slow]
    return {seen.name: seen for seen in asyncio.run(play_all(rows))}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_what_is_promised_is_kept(row: Row, all_seen: dict[str, Seen]) -> None:
    """Or it says what was seen instead."""
    if row.is_slow:
        pytest.skip("takes too long here: python -m tests.proof.network")
    seen = all_seen[row.name]
    if seen.text == NOT_TRIED:
        pytest.skip(seen.text)
    assert seen.is_kept, seen.text


def test_the_readme_promises_what_is_played() -> None:
    """A line for each play, and no other."""
    assert sorted(promised()) == sorted(row.name for row in ROWS)


# What the tools start ends with them: as a background job that ignores SIGINT, and when they are killed.


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


# The benchmark measures what it says: at the smallest size, for its books, not for its figures.


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy; the gate installs it")
@pytest.mark.parametrize("name", MEASUREMENTS)
async def test_it_measures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every Call is answered, nothing is complained about, and each version of the script has its figures."""
    scripts = [SCRIPT, Path(shutil.copy(SCRIPT, tmp_path))]
    with undisturbed():
        await getattr(Bench(QUICK, scripts), name)()
    told = capsys.readouterr().out
    assert told.count("\n| ") > 2
    assert all(str(script) in told for script in scripts)


@pytest.mark.parametrize("length", [250, 500, 8000])
def test_a_reading_is_as_long_as_it_says(length: int) -> None:
    """The text, without the head and the key of its frame."""
    ((_, text),), _ = unframed(reading(7, length)[1])
    assert len(text) == length


# Nothing in the proxy grows while everything around it breaks.


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
    most = {**start, MEMORY: 50_000 + spare(MEMORY, 2), "Session": 8, "Memory.calls": 0}
    assert growth(start, most, chargers=2) == []
    for name in [*most, "New"]:
        assert len(growth(start, {**most, name: most.get(name, 0) + 1}, chargers=2)) == 1


def test_a_table_that_leaks_is_found() -> None:
    """By what it holds, also in the tables in it."""
    memory = p.Memory("CP1")
    before = contents()
    memory.statuses["leak"] = {1: 2, 3: 4}  # type: ignore[assignment]
    assert contents()["Memory.statuses"] == before["Memory.statuses"] + 2
