"""The journal: the state file, what stands in it, disks that fail, and starts with what it holds."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import stat
import threading
import time
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ocpp_2w_proxy as p
from tests.play import kills
from tests.play.kills import Play, killed, reads, save
from tests.play.peers import PATIENCE, charger, eventually, house, running, server
from tests.play.plays import Stage, StageJournal
from tests.play.script import goes_as_told, plays
from tests.play.wires import LOCAL, LOCAL_SERVER, Log, Patch, charger_at, command, line_with, port_of, run


def asked(path: Path, sql: str) -> Any:
    """Let another program run a statement on a file that is closed; return the first value that it gets."""
    with closing(sqlite3.connect(path)) as connection, connection:
        row = connection.execute(sql).fetchone()
        return row and row[0]


# Who may use it.


def test_only_its_owner_can_read_it_and_it_says_whose_it_is(tmp_path: Path) -> None:
    """It holds badges; so does sqlite's log beside it. Application id and schema version tell."""
    stage, path = Stage(state=tmp_path / "state.db"), tmp_path / "state.db"
    save(stage)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600}
    with patch.object(p, "LOCK_SECONDS", 0.01), pytest.raises(p.StateError, match="another process uses it"):
        p.Journal.open(path, p.current_instant)
    stage.journal.database.close()
    assert asked(path, "PRAGMA application_id") == p.APPLICATION_ID
    assert asked(path, "PRAGMA user_version") == p.SCHEMA_VERSION


async def test_a_second_process_on_the_same_file_ends_with_exit_code_2(tmp_path: Path) -> None:
    """One line tells why; the first goes on unharmed, and leaves its sessions to the next."""
    async with command(LOCAL, tmp_path) as first:
        port = await port_of(first)
        done = await asyncio.to_thread(run, cwd=tmp_path)
        words = "another process uses it; stop that one, or name another file with `state`"
        assert (done.returncode, done.stderr) == (2, f"state file ocpp-2w-proxy.db: {words}\n")
        async with charger_at(port) as cp:
            await cp.starts("BADGE")
        first.kill()
        await first.wait()
    assert asked(tmp_path / "ocpp-2w-proxy.db", "SELECT badge FROM sessions") == "BADGE"


@pytest.mark.parametrize(
    ("state", "words"),
    [("missing/x.db", "No such file or directory"), ("folder", "unable to open database file")],
)
def test_a_path_that_cannot_be_written_is_one_line_and_exit_code_2(
    tmp_path: Path, state: str, words: str
) -> None:
    """It may be mistyped: nothing is made, and a folder is left as it is."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "ocpp-2w-proxy.ini").write_text(LOCAL.replace("port = 0", f"port = 0\nstate = {state}"))
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"state file {state}: {words}\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "ocpp-2w-proxy.ini"]


async def test_without_a_state_file_one_warning_is_given(tmp_path: Path) -> None:
    """`state = none`: all is kept in memory only."""
    async with command(LOCAL.replace("port = 0", "port = 0\nstate = none"), tmp_path) as process:
        await line_with(process, "WARNING state = none: sessions and stored Calls are lost with the process")
        await port_of(process)
        assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


# What cannot be read.


def set_aside(path: Path, caplog: Log) -> Path:
    """Open a journal; return where its file was set aside, told of with one ERROR, and a new one begun."""
    journal = StageJournal.open(path, lambda: p.Instant(0.0, 1_800_000_000.0))
    assert journal.memories == {}
    journal.memory("NEW")
    journal.tick()
    journal.database.close()
    assert asked(path, "SELECT charger FROM chargers") == "NEW"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    aside = path.with_name(f"{path.name}.unreadable-20270115-080000")
    assert line.startswith(f"state file {path} cannot be used: ")
    assert f"the old one is kept as {aside}, " in line
    return aside


FIRST_EDITION = f"""PRAGMA application_id = {p.APPLICATION_ID};
    PRAGMA user_version = {{}};
    CREATE TABLE chargers (charger TEXT PRIMARY KEY);
    INSERT INTO chargers VALUES ('CP1');
    CREATE TABLE sessions (number INTEGER PRIMARY KEY, kept TEXT);
    INSERT INTO sessions VALUES (1, '[]');
    CREATE TABLE calls (number INTEGER PRIMARY KEY, refused TEXT);
    INSERT INTO calls VALUES (1, 'no');
"""
OWES = ["INSERT INTO calls VALUES (2, NULL);", "UPDATE sessions SET kept = '[\"x\"]';"]
OWED = "holds 1 messages of version 1 that are not delivered yet; let that version deliver them first"
OTHERS = "is the database of another program"


@pytest.mark.parametrize(
    "harm",
    [
        *(b"garbage", b"garbage " * 10_000, b"SQLite format 3\x00" + b"\xff" * 9000, 100, 5000),
        *(f"PRAGMA user_version = {p.SCHEMA_VERSION + 1}", "PRAGMA user_version = 0"),
        *("UPDATE calls SET text = 'no JSON'", "UPDATE calls SET peer = 'tertiary', session = NULL"),
        *("UPDATE sessions SET owner = 'tertiary'", "UPDATE sessions SET answers = '[1'"),
        *("UPDATE chargers SET statuses = ''", "UPDATE chargers SET claims = '[1]'"),
        *("ALTER TABLE sessions DROP COLUMN answers", "DROP TABLE calls"),
        *(FIRST_EDITION.format(1), FIRST_EDITION.format(2)),
    ],
)
def test_what_cannot_be_read_is_set_aside(harm: bytes | int | str, tmp_path: Path, caplog: Log) -> None:
    """Garbage, what was cut off when a disk was full, another schema, a row that tells nothing."""
    path = tmp_path / "state.db"
    if not str(harm).startswith("PRAGMA application_id"):  # In a file of ours.
        goes_as_told(
            stage := Stage(state=path), "secondary leaves, charger starts 1, 1 s", {"stored": "Start"}
        )
        stage.journal.database.close()
    if isinstance(harm, str):
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(harm)
        assert asked(set_aside(path, caplog), "SELECT charger FROM chargers") == "CP1"
    else:
        content = path.read_bytes()[:harm] if isinstance(harm, int) else harm
        path.write_bytes(content)
        assert set_aside(path, caplog).read_bytes() == content


@pytest.mark.parametrize(
    ("script", "words"),
    [
        *((FIRST_EDITION.format(version) + owed, OWED) for version in (1, 2) for owed in OWES),
        *((f"PRAGMA journal_mode = {mode}; CREATE TABLE mail (text)", OTHERS) for mode in ("DELETE", "WAL")),
        ("", r"file is not a database; .*Permission denied"),  # In somebody else's folder.
    ],
)
def test_what_others_need_is_left_alone(script: str, words: str, tmp_path: Path) -> None:
    """What the first edition has to deliver; another program's database, to the byte: the ini is wrong."""
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    path.write_bytes(before := path.read_bytes() or b"garbage")
    with patch.object(Path, "rename", side_effect=PermissionError(13, "Permission denied")):
        with pytest.raises(p.StateError, match=f"state file .*: {words}"):
            p.Journal.open(path, p.current_instant)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_what_stands_in_sqlites_log_only_is_set_aside_as_well(tmp_path: Path, caplog: Log) -> None:
    """A killed process leaves its last changes there; the new file has nothing of them."""
    stage, path = Stage(state=tmp_path / "running.db"), tmp_path / "state.db"
    stage.starts("SECO1")
    save(stage)
    with stage.journal.database as connection:
        connection.execute("UPDATE calls SET text = 'no JSON'")
    for suffix in ("", "-wal"):
        path.with_name(path.name + suffix).write_bytes((tmp_path / f"running.db{suffix}").read_bytes())
    stage.journal.database.close()
    assert asked(set_aside(path, caplog), "SELECT text FROM calls") == "no JSON"
    assert asked(path, "SELECT count(*) FROM calls") == 0


# What stands in it.


test_what_the_file_keeps = plays("""
For whoever reads it, and for the next start.

A session of the secondary is told in full: whose, where, how much, why it ended;
    charger starts 1 SECO1 2 100, secondary accepts, charger reads m,
    charger stops e meterStop=12500 timestamp=2026-01-01T01:00:00Z reason=EVDisconnected, secondary accepts
    => file charger server badge: CP1 ws://secondary.example SECO1;
    file owner connector transaction_id>1999999999 server_id reason: secondary 2 1 7 EVDisconnected;
    file meter_start meter_stop: 100.0 12500.0;
    file started_at stopped_at: 2026-01-01T00:00:00Z 2026-01-01T01:00:00Z
when it began, by the charger's clock, and ended, by the proxy's; its start is delivered, but its stop counts;
    charger starts 1, secondary accepts, 60 s, charger stops e
    => file begun ended delivered: 1767225600.0 1800001060.0 None
and that its owner knows.
    charger starts 1, secondary accepts, charger stops e, 60 s, secondary accepts
    => file ended delivered: 1800001000.0 1800001060.0
A relayed session is told as well.
    charger starts 1 PRIM1, primary accepts, charger stops e meterStop=2000, primary accepts
    => file owner server_id transaction_id meter_start meter_stop: primary 7 7 0.0 2000.0;
    file ended delivered: 1800001000.0 1800001000.0
Its readings are saved once a minute, because each of them would keep the disk busy for nothing:
    charger starts 1 PRIM1, primary accepts, charger reads m
    meterValue=[{"sampledValue":[{"value":"1.5","unit":"kWh"},{"value":"16","measurand":"Current.Import"}]}],
    58 s, charger reads n meterValue=[{"sampledValue":[{"value":"2"}]}] => file meter_stop ended: 1500.0 None
when it is over, the next one is.
    charger starts 1 PRIM1, primary accepts, charger reads m meterValue=[{"sampledValue":[{"value":"1"}]}],
    61 s, charger reads n meterValue=[{"sampledValue":[{"value":"2"}]}] => file meter_stop: 2.0
What comes after its stop only counts up: some stops say nothing of energy.
    charger starts 1, secondary accepts, charger stops e meterStop=null,
    charger reads n meterValue=[{"sampledValue":[{"value":"4400"}]}], 61 s,
    charger reads o meterValue=[{"sampledValue":[{"value":"4500"}]}], secondary takes
    => file meter_start meter_stop: 0.0 4500.0
An older reading that comes late takes nothing away.
    charger starts 1, secondary accepts, charger reads m meterValue=[{"sampledValue":[{"value":"4000"}]}],
    61 s, charger stops e meterStop=5000, charger reads n meterValue=[{"sampledValue":[{"value":"4400"}]}],
    61 s, charger reads o meterValue=[{"sampledValue":[{"value":"4500"}]}], secondary takes
    => file meter_start meter_stop: 0.0 5000.0
That a start was refused is told in its owner's words, for a session that has ended as well.
    charger starts 1, charger stops e, secondary fails, 11 s, secondary fails, 61 s, secondary fails
    => file refused is_refused: CallError InternalError 1
An ended session is found for a week,
    charger starts 1, secondary accepts, charger stops e, secondary accepts, 6.9 days, proxy dies
    => sessions: 1; file badge: SECO1
and not longer, but kept for 400 days,
    charger starts 1, secondary accepts, charger stops e, secondary accepts, 399 days, proxy dies
    => sessions: 0; file badge: SECO1
and what was refused with it,
    charger starts 1, secondary refuses, charger stops e, 399 days, proxy dies
    => refused: Start Stop; file badge: SECO1
which leaves the file with its session.
    charger starts 1, secondary refuses, charger stops e, 401 days, proxy dies => refused: ; file badge:
A proxy that runs for years does not fill the disk; a session with something undelivered stays.
    charger starts 1, secondary takes, charger stops e, secondary takes, secondary leaves,
    charger starts 2 SECO2, charger stops f, 399 days, 1 days, 1 days => file badge: SECO2
It is delivered then, too, and gone.
    secondary leaves, charger starts 1, charger stops e, 401 days, proxy dies, proxy dies, secondary takes,
    1 days => file badge: ; secondary: Start Start Stop:7; stored:
The secondary gets the charger's own statuses after a kill, before what is left for it.
    charger is Faulted 2, secondary takes, secondary leaves, charger starts 1, proxy killed, look,
    secondary takes => secondary: Status:Faulted Status:Faulted|Start
Beyond the bound the oldest readings go for good, never a start or a stop; one WARNING tells of it.
    limit is MAX_STORED 4, secondary leaves, charger starts 1, charger reads a n=1, charger reads b n=2,
    charger reads c n=3, charger reads d n=4, charger reads f n=5, charger stops e, proxy killed,
    secondary takes => secondary: Start Meter:7/4 Meter:7/5 Stop:7; told are dropped: 1
What is refused is told, and what is not sent because of it, which its server has never seen.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails, charger stops e
    => told StartTransaction is refused (CallError InternalError) and kept: 1;
    told StopTransaction is kept and not sent: its session is refused: CallError InternalError: 1
""")


test_a_clock_that_is_set = plays(
    """
A machine without a battery for its clock gets the time from the network; a kill comes later.

A clock that is set ends no session and opens none,
    charger starts 1 PRIM1 2, primary accepts, charger stops d, primary accepts, charger starts 2,
    secondary accepts, 7 s, THEN, 60 s, proxy killed
    => file ended>0: 1|None
and its owner hears of the end.
    charger starts 1, secondary accepts, 7 s, THEN, 60 s, proxy killed, charger stops e, secondary takes
    => charger: 1:Accepted e; secondary: Start Stop:7; stored:
It removes no session that is young.
    charger starts 1, secondary accepts, charger stops e, secondary accepts, 7 s, THEN, 3 times (1 days)
    => file badge: SECO1
""",
    then=["clock + 29", "clock - 30", "clock - 40000", "clock - 30, proxy dies"],
)


# Another charger, another server.


test_a_server_that_is_replaced = plays("""
A session belongs to the address that its server had when it began.

What is left for a secondary that is replaced, or taken out, and comes for it, is kept until the ini names it.
    charger starts 1, secondary accepts, secondary leaves, charger reads m, proxy given OTHER_SECONDARY,
    charger reads n, proxy given NO_SECONDARY, charger stops e, proxy given NO_SECONDARY, look,
    proxy given NORMAL, secondary takes
    => secondary: Start|Meter:7 Meter:7 Stop:7; charger: 1:Accepted m n e|; primary: |; stored:
What is new belongs to the new secondary; what is left for the old one holds nothing up.
    charger starts 1, secondary accepts, secondary leaves, charger reads m, proxy given OTHER_SECONDARY,
    look, charger starts 2 SECO2 2, secondary takes => secondary: Start|Start; stored: Meter
A stop that no session is known for is bound to the server of its badge.
    secondary leaves, charger stops e -1 SECO1, proxy given OTHER_SECONDARY, secondary takes
    => secondary: ; charger: e; stored: Stop
A stop never reaches another primary than that of its session.
    charger starts 1 PRIM1, primary accepts, proxy given OTHER_PRIMARY, charger stops e, look,
    proxy given NORMAL, 20 s => primary: Start|Stop:7; charger: 1:Accepted e|
A session of the proxy itself is told as well, and goes to no server that comes later.
    proxy given LOCAL_PRIMARY, charger starts 1 PRIM1 1 100, proxy given NORMAL, charger stops e meterStop=300
    => primary: ; charger: 1:Accepted e; stored: ; file owner server badge: primary local PRIM1;
    file meter_start meter_stop delivered: 100.0 300.0 None
What comes for a refused session meanwhile is refused as well: its server has no id for it.
    charger starts 1, secondary refuses, proxy given OTHER_SECONDARY, charger stops e, proxy given NORMAL
    => secondary: Start; charger: 1:Accepted e; refused: Start Stop
A remote stop of another server finds no session of the old one: its id 7 is not theirs.
    charger starts 1, secondary accepts, proxy given OTHER_SECONDARY,
    secondary calls r RemoteStopTransaction transactionId=7 => secondary: Start r:Rejected
A start tells what is left, and what becomes of it: delivered now,
    secondary leaves, charger starts 1, proxy starts, secondary returns, secondary takes
    => told CP1: secondary: 1 stored Calls are left from before: 1; told delivered now: 1;
    told StartTransaction is delivered: 1; told it was the last: 1; secondary: Start
when the charger comes, if only that has the login,
    secondary leaves, charger starts 1, proxy starts LOGIN, look, charger returns, secondary returns,
    secondary takes => told delivered when the charger connects: 1; secondary: |Start
or kept for an address that is not named.
    secondary leaves, charger starts 1, proxy starts OTHER_SECONDARY, secondary returns, 60 s
    => told CP1: 1 stored Calls are kept for ws://secondary.example, which the ini does not name: 1;
    secondary:
What a server has asked for ends with it: a report is the primary's then, also one that names its request,
    secondary asks GetDiagnostics, secondary asks GetLog requestId=1, proxy given OTHER_SECONDARY,
    charger sends r DiagnosticsStatusNotification, primary takes,
    charger sends s LogStatusNotification requestId=1
    => primary: DiagnosticsStatusNotification LogStatusNotification; secondary:
and so are the sessions that follow a remote start.
    secondary claims GUEST, proxy given OTHER_SECONDARY, charger starts 1 GUEST => primary: Start; secondary:
""")


# A disk that fails.

test_while_the_disk_fails = plays("""
What would have to be kept stays unanswered, and nothing else.

A stored Call is unanswered and undelivered until it is on disk.
    disk full, charger starts 1, 10 s, look, disk well, 2 s => charger: |1:Accepted; secondary: |Start
A kill before that: the charger, which has no answer, sends it again, and one session comes of it.
    disk full, charger starts 1, proxy dies, look, charger starts 2, 60 s, secondary takes
    => charger: |2:Accepted; secondary: |Start; sessions: 1
Only the connection that asked is answered; a charger that connects again meanwhile repeats its Call.
    disk full, charger starts 1, charger returns, disk well, 2 s, look, charger starts 2
    => charger: |2:Accepted; secondary: Start|
Relayed traffic goes on, also what a kill now would forget.
    disk full, charger starts 1 PRIM1, primary accepts, charger shows a, look, disk well, proxy killed,
    charger stops e => primary: Start|Stop:7; charger: 1:Accepted a:Accepted|
A start that the charger repeats meanwhile is one Call, and answered once, to the newest message id.
    disk full, charger starts 1, 4 s, charger starts 2, 4 s, charger starts 3, 4 s, look, disk well, 2 s
    => charger: |3:Accepted; secondary: |Start; sessions: 1
So are a reading and a stop,
    charger starts 1, secondary accepts, disk full, charger reads a, 2 s, charger reads b, 2 s,
    charger stops c, 2 s, charger stops d, 2 s, look, disk well, 2 s, secondary takes
    => charger: 1:Accepted|b d; secondary: Start|Meter:7 Stop:7
and a reading of a session that is refused.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails, disk full,
    charger reads a, 4 s, charger reads b, 4 s, look, disk well, 2 s
    => charger: 1:Accepted|b; secondary: Start Start Start|; refused: Start Meter
The next Call waits for the record of the answer before it: a kill must not send that again behind it.
    charger starts 1, charger stops e, disk full, secondary accepts, 10 s, look, disk well, 2 s
    => secondary: Start|Stop:7
So it does if the answer comes while the disk is at an earlier save.
    charger starts 1, disk hangs, charger stops e, secondary accepts, look, disk finishes, look,
    disk finishes => secondary: Start||Stop:7
A disk that hangs counts as failing after five seconds: relayed starts go on, a stored one waits.
    disk hangs, charger starts 1 SECO1 2, charger starts 2 PRIM1, primary accepts, 4 s, look, 2 s, look,
    charger starts 3 PRIM2 3, primary accepts, look, disk finishes, disk well, proxy killed
    => charger: |2:Accepted|3:Accepted|1:Accepted; sessions: 3
What waits for its turn at a disk that hangs is not overtaken.
    disk hangs, charger starts 1 PRIM1, primary accepts, primary calls 2 Reset, look, disk finishes,
    charger shows 3 PRIM2, primary accepts, disk well => charger: |1:Accepted Reset 3:Accepted
A kill meanwhile loses nothing that was answered; what was not, the charger sends again.
    charger starts 1, secondary accepts, disk full, charger reads m, charger stops e, 2 s, proxy dies, look,
    charger stops f, secondary takes => charger: 1:Accepted|f; secondary: Start|Stop:7; stored:
A relay that is made anew keeps the order of what is not on disk yet: a charger with the login comes again.
    proxy with secondary_auth=forward, secondary leaves, disk full, charger starts 1, charger reads m,
    charger leaves, 1 s, proxy forgets, disk well, charger returns, secondary returns, secondary takes
    => secondary: Start Meter:7; stored:
An answer that names no transaction waits for no disk.
    disk hangs, charger starts 1, charger is Charging, primary accepts => charger: n
An answer that is cut from too many that wait is given to a repeat.
    limit is MAX_HELD 3, disk full, charger starts 1, charger reads a n=1, charger reads b n=2,
    charger reads c n=3, disk well, 2 s, look, charger starts 2 => charger: a b c|2:Accepted; sessions: 1
One WARNING a minute tells of it, and one line that it is over.
    disk full, charger starts 1, 150 s, disk well, 2 s
    => told cannot be written: database or disk is full: 3; told can be written again: 1
The bound of what is stored counts meanwhile as well; readings that came and went leave nothing behind.
    charger starts 1, secondary accepts, limit is MAX_STORED 2, disk full, secondary leaves,
    charger reads a n=1, 1 s, charger reads b n=2, 1 s, charger reads c n=3, 1 s, charger reads d n=4, 1 s,
    disk well, 2 s, proxy killed, secondary takes
    => charger: 1:Accepted a b c d; secondary: Start Meter:7/3 Meter:7/4; stored:
""")


def test_a_file_that_is_really_full_goes_on_when_there_is_room(play: Play) -> None:
    """What sqlite could not write, it has not written in part."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    save(stage)
    run = stage.journal.database.execute
    run("PRAGMA max_page_count = 1")  # As many as there are.
    reads(stage, transaction_id, meterValue=["x" * 100_000])
    kills.waits(stage, 5)
    assert (stage.charger.hears(), stage.journal.failure) == ([], "database or disk is full")
    assert run("SELECT count(*) FROM calls").fetchone()[0] == 0
    run("PRAGMA max_page_count = 1000000")
    kills.waits(stage, 1.5)
    assert stage.charger.hears() == [[3, "m", {}]]
    killed(stage)
    assert stage.secondary.hears_call()[2]["transactionId"] == 70


# Who waits for the disk.


def test_a_waiter_of_the_journal_that_fails_does_not_take_the_others_turn() -> None:
    """They belong to other chargers; theirs comes with the next save."""
    stage, turns = Stage(), list[str]()

    def fails() -> None:
        raise ZeroDivisionError

    stage.journal.wait(fails)
    stage.journal.wait(lambda: turns.append("another"))
    with pytest.raises(ZeroDivisionError):
        save(stage)
    save(stage)
    assert turns == ["another"]


def test_nothing_counts_as_saved_because_something_else_was_done(tmp_path: Path) -> None:
    """The thread may be at what is too old, which is removed once a day, when something new comes."""
    journal, jobs = StageJournal(Stage(connect=False).now, tmp_path / "state.db"), list[Any]()
    with patch.object(journal, "_run", lambda _, then: jobs.append(then)):
        journal.tick()
        memory = journal.memory("A")
        journal.save()
        jobs[0]("")
        assert not journal.has(memory)
    journal.database.close()


async def test_whoever_looks_has_a_turn_however_busy_the_disk_is() -> None:
    """One save after the other: a page, a report, a metric wait for one of them, not for the last."""
    journal = p.Journal(Stage(connect=False).now)

    def again() -> None:
        journal.memory("A").note(journal.memory("A"))
        journal.wait(again)

    again()
    await asyncio.sleep(0)
    async with asyncio.timeout(1):
        assert await journal.look_up("SELECT charger FROM chargers") == [{"charger": "A"}]
    journal.waiters.clear()
    await journal.close()


# Bounds.


def test_a_charger_that_was_forgotten_for_others_is_known_again_when_it_comes(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """Its old row is removed before its new one is written, also if the disk fails meanwhile."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    now, jobs = Stage(connect=False).now, list[Any]()
    journal = StageJournal(now, tmp_path / "state.db")
    assert journal.memory("A") is not journal.memory("B")
    journal.save()
    journal.has_room("C", ())
    with patch.object(journal, "_run", lambda _, then: jobs.append(then)):
        journal.memory("C")  # In the place of A,
        journal.save()
        journal.has_room("A", ())
        journal.memory("A")  # which comes again, in the place of B, while the disk is slow
        jobs.pop()("full")  # and fails.
    journal.save()
    journal.database.close()
    assert set(StageJournal(now, tmp_path / "state.db").memories) == {"A", "C"}


def test_a_charger_with_a_refused_session_is_not_forgotten_for_others(monkeypatch: Patch) -> None:
    """It is tried again, in the version of the charger."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 1)
    stage = Stage()
    goes_as_told(
        stage, "charger starts 1, charger stops e, 3 times (secondary fails, 61 s)", {"refused": "Start Stop"}
    )
    assert not stage.journal.has_room("CP2", ())


# With the thread that writes, and real peers.


async def test_what_is_left_of_a_charger_that_nothing_is_known_of_is_delivered(tmp_path: Path) -> None:
    """Its Calls say in which version they are written."""
    path = tmp_path / "state.db"
    async with house(state=path) as (proxy, _, secondary), charger(proxy) as cp:
        await secondary.stop()
        await cp.starts("SECO1")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM chargers")
    async with server() as secondary:
        ini = f"[ext-server]\nserver = local\nsecondary_server = {secondary.url}\nsecondary_rfid = *\n"
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE calls SET server = ?", (secondary.url,))
        async with running(ini, path):
            assert await secondary.heard.call("StartTransaction")


async def test_what_is_left_is_delivered_by_the_next_run_without_the_charger(tmp_path: Path) -> None:
    """In its version, under its User-Agent, without its login; then the connection is closed."""
    path, agent = tmp_path / "state.db", "Charger/1.0 (a firmware that has much to say of itself)"
    async with server() as secondary:
        ini = f"[ext-server]\nserver = local\nsecondary_server = {secondary.url}\nsecondary_rfid = *\n"
        await secondary.stop()
        async with running(ini, path) as proxy:
            async with charger(proxy) as cp:
                await cp.boots()
                await cp.charges("ANY")
            async with charger(proxy, versions=["ocpp2.0.1"], user_agent_header=agent) as cp:
                await cp.boots()  # Of this the old version knows nothing: there a boot is made up.
        await secondary.start()
        async with running(ini, path) as proxy:
            await (await secondary.connection()).wait_closed()
            session = ["StartTransaction", "MeterValues", "StopTransaction"]
            assert secondary.heard.actions() == ["BootNotification", *session]
            assert secondary.heard.messages[0][3]["chargePointVendor"] == "unknown"
            await eventually(lambda: not proxy.relays)
        async with running(ini, path) as proxy:
            assert proxy.relays == {}
    (asks,) = (request.headers for request in secondary.requests)
    assert (asks["Sec-WebSocket-Protocol"], asks["User-Agent"]) == ("ocpp1.6", agent)
    assert "Authorization" not in asks


async def test_all_chargers_share_one_sync(tmp_path: Path, monkeypatch: Patch) -> None:
    """While the disk is at one save, all changes gather for the next; the last one is at the end."""
    path, writes, write = tmp_path / "state.db", list[int](), p.Journal._write

    def slow_write(journal: p.Journal, statements: list[Any]) -> str:
        writes.append(len(statements))
        time.sleep(0.02)
        return write(journal, statements)

    monkeypatch.setattr(p.Journal, "tick", lambda _: None)  # Nobody has to wait for the watchdog.
    async with running(LOCAL_SERVER, path) as proxy, AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(charger(proxy, f"CP{number}")) for number in range(50)]
        monkeypatch.setattr(p.Journal, "_write", slow_write)
        await asyncio.gather(*(fake.charges("BADGE") for fake in fakes))
        assert 1 <= len(writes) < 3 * len(fakes)
        await fakes[0].boots()  # Nobody waits for this one.
    await eventually(lambda: asked(path, "SELECT count(*) FROM sessions WHERE stop != ''") == 50)
    assert asked(path, "SELECT count(*) FROM chargers WHERE boot != ''") == 1


@pytest.mark.parametrize("words", ["disk I/O error", "the disk is too slow"])
async def test_a_disk_that_fails_or_hangs_holds_up_neither_what_is_relayed_nor_the_end(
    words: str, tmp_path: Path, monkeypatch: Patch, caplog: Log
) -> None:
    """An ERROR tells; the charger's stored Call stays unanswered, so that it keeps it."""
    monkeypatch.setattr(p, "LAST_SAVE_SECONDS", 0.1)
    ends = threading.Event()

    def hangs_or_fails(*_: Any) -> str:
        if words == "the disk is too slow":
            ends.wait(PATIENCE)
        return words

    async with house(state=tmp_path / "state.db") as (proxy, *_), charger(proxy) as cp:
        monkeypatch.setattr(p.Journal, "_write", hangs_or_fails)
        await cp.connection.send('[2,"1","StartTransaction",{"connectorId":1,"idTag":"SECO1"}]')
        await eventually(lambda: bool(proxy.journal.writing or proxy.journal.failure))
        await cp.calls("2", "Heartbeat")
        assert [message[1] for message in cp.heard.messages] == ["2"]
    ends.set()
    assert f"state.db: the last changes may be lost: {words}" in caplog.text
