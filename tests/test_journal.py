"""The journal: the state file, what stands in it, disks that fail, and starts with what it holds."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sqlite3
import stat
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.kills import (
    NORMAL,
    Play,
    delivers_alone,
    forgotten,
    full_disk,
    killed,
    left,
    named,
    reads,
    save,
    stops,
    told_id,
    waits,
)
from tests.play.peers import PATIENCE, FakeCharger, FakeServer, charger, eventually, server
from tests.play.plays import INI, Stage, StageJournal, StageLink, config_of
from tests.play.script import goes_as_told, plays_of
from tests.play.wires import LOCAL, command, line_with, port_of, run
from tests.test_outbox import START, STOP


def rows(stage: Stage, table: str = "sessions") -> list[dict[str, Any]]:
    """Return what the file holds; only its own connection can read it."""
    save(stage)
    return [dict(row) for row in stage.journal.database.execute(f"SELECT * FROM {table}")]


def path_of(stage: Stage) -> Path:
    assert stage.state is not None
    return stage.state


# Who may use it.


def test_only_its_owner_can_read_it_and_it_says_whose_it_is(play: Play) -> None:
    """It holds badges; so does sqlite's log beside it. Application id and schema version tell."""
    stage = play()
    save(stage)
    path = path_of(stage)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in path.parent.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600}
    stage.journal.database.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (p.APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (p.SCHEMA_VERSION,)


async def test_a_second_process_on_the_same_file_ends_with_exit_code_2(tmp_path: Path) -> None:
    """One line tells why; the first goes on unharmed, and leaves its sessions to the next."""
    async with command(LOCAL, tmp_path) as first:
        port = await port_of(first)
        done = await asyncio.to_thread(run, cwd=tmp_path)
        advice = "stop that one, or name another file with `state`"
        words = f"state file ocpp-2w-proxy.db: another process uses it; {advice}\n"
        assert (done.returncode, done.stderr) == (2, words)
        uri = f"ws://127.0.0.1:{port}/CP1"
        async with connect(uri, subprotocols=[Subprotocol("ocpp1.6")]) as connection:
            fake = FakeCharger(connection)
            await fake.starts("BADGE")
        await fake.listener
        first.send_signal(signal.SIGKILL)
        await first.wait()
    journal = p.Journal.open(tmp_path / "ocpp-2w-proxy.db", p.current_instant)
    assert [session.badge for session in journal.memories["CP1"].sessions.values()] == ["BADGE"]
    journal.database.close()


@pytest.mark.parametrize(
    ("port", "words"),
    [
        ("PORT", "state file missing/x.db: No such file or directory\n"),
        ("x", "ocpp-2w-proxy.ini:3: port 'x': expected a whole number from 0 to 65535\n"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line_and_exit_code_2(
    tmp_path: Path, port: str, words: str
) -> None:
    """The port is not even tried; a mistake in the ini comes before it, and touches nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = port.replace("PORT", str(listener.getsockname()[1]))
        ini = LOCAL.replace("port = 0", f"port = {port}\nstate = missing/x.db")
        (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
        done = run(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, words)
    assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


def test_a_folder_is_no_state_file_and_none_is_made(tmp_path: Path) -> None:
    """It is left as it is; the path may be mistyped."""
    with pytest.raises(p.StateError, match=r"state file .*: unable to open database file"):
        p.Journal.open(tmp_path, p.current_instant)
    with pytest.raises(p.StateError, match=r"missing/x.db: No such file or directory"):
        p.Journal.open(tmp_path / "missing" / "x.db", p.current_instant)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_in_use_is_not_taken_for_an_unreadable_one(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked is not broken: it stays where it is."""
    monkeypatch.setattr(p, "LOCK_SECONDS", 0.01)
    play()
    with pytest.raises(p.StateError, match="another process uses it"):
        p.Journal.open(tmp_path / "state.db", p.current_instant)
    assert unreadable(tmp_path / "state.db") == []


async def test_without_a_state_file_one_warning_is_given(tmp_path: Path) -> None:
    """`state = none`: all is kept in memory only."""
    async with command(LOCAL.replace("port = 0", "port = 0\nstate = none"), tmp_path) as process:
        await line_with(process, "WARNING state = none: sessions and stored Calls are lost with the process")
        await port_of(process)
        assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


# What cannot be read.


def unreadable(path: Path) -> list[str]:
    """Return the names of the files that were set aside."""
    return sorted(aside.name for aside in path.parent.iterdir() if ".unreadable-" in aside.name)


def is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Open the journal; return whether the file was set aside, told of with ERRORs, and a new one begun."""
    journal = StageJournal.open(path, lambda: p.Instant(0.0, 1_800_000_000.0))
    assert journal.memories == {}
    journal.memory("CP1")
    journal.tick()
    journal.database.close()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    (line,) = told
    assert line.startswith(f"state file {path} cannot be used: ")
    assert f"the old one is kept as {path}.unreadable-20270115-080000, " in line
    return "state.db.unreadable-20270115-080000" in unreadable(path)


def filled(path: Path) -> None:
    """Make a file with one undelivered session, and close it."""
    stage = Stage(state=path)
    stage.secondary.lost()
    stage.starts("SECO1")
    assert rows(stage, "calls")
    stage.journal.database.close()


@pytest.mark.parametrize(
    "content", [b"garbage", b"garbage " * 10_000, b"SQLite format 3\x00" + b"\xff" * 9000, 100, 5000]
)
def test_garbage_is_set_aside(content: bytes | int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the proxy serves on; also a file that was cut off when a disk was full."""
    path = tmp_path / "state.db"
    filled(path)
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    assert is_set_aside(path, caplog)


@pytest.mark.parametrize(
    "sql",
    [
        *(f"PRAGMA user_version = {p.SCHEMA_VERSION + 1}", "PRAGMA user_version = 0"),
        *("UPDATE calls SET text = 'no JSON'", "UPDATE calls SET peer = 'tertiary', session = NULL"),
        *("UPDATE sessions SET owner = 'tertiary'", "UPDATE sessions SET answers = '[1'"),
        *("UPDATE chargers SET statuses = ''", "UPDATE chargers SET claims = '[1]'"),
        *("ALTER TABLE sessions DROP COLUMN answers", "DROP TABLE calls"),
    ],
)
def test_what_cannot_be_understood_is_set_aside(
    sql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another schema version, or a row that tells nothing: the file is kept for whoever can."""
    path = tmp_path / "state.db"
    filled(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql)
    assert is_set_aside(path, caplog)
    with closing(sqlite3.connect(tmp_path / unreadable(path)[0])) as connection:
        assert connection.execute("SELECT count(*) FROM chargers").fetchone() == (1,)


def first_edition(path: Path, version: int, calls: str = "", kept: str = "[]") -> None:
    """Make a file as the first edition left it, as far as the second looks at it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"""
            PRAGMA application_id = {p.APPLICATION_ID};
            PRAGMA user_version = {version};
            CREATE TABLE chargers (charger TEXT PRIMARY KEY);
            INSERT INTO chargers VALUES ('CP1');
            CREATE TABLE sessions (number INTEGER PRIMARY KEY, kept TEXT);
            INSERT INTO sessions VALUES (1, '{kept}');
            CREATE TABLE calls (number INTEGER PRIMARY KEY, refused TEXT);
            {calls}
        """)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("owes", "more"),
    [
        (False, {"calls": "INSERT INTO calls VALUES (1, 'no');"}),
        *((True, {"calls": "INSERT INTO calls VALUES (1, NULL);"}), (True, {"kept": '["x"]'})),
    ],
)
def test_a_file_of_the_first_edition_is_set_aside_unless_it_owes_something(
    version: int, owes: bool, more: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Then that edition has to deliver it, and the file is left as it is."""
    path = tmp_path / "state.db"
    first_edition(path, version, **more)
    if owes:
        words = "1 messages of version 1 that are not delivered yet; let that version deliver them first"
        with pytest.raises(p.StateError, match=f"holds {words}"):
            p.Journal.open(path, p.current_instant)
        assert unreadable(path) == []
    else:
        assert is_set_aside(path, caplog)


def test_what_stands_in_sqlites_log_only_is_set_aside_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed process leaves its last changes there; the new file has nothing of them."""
    stage = Stage(state=tmp_path / "running.db")
    stage.starts("SECO1")
    save(stage)
    with stage.journal.database as connection:
        connection.execute("UPDATE calls SET text = 'no JSON'")
    path = tmp_path / "state.db"
    for suffix in ("", "-wal"):
        copy = path.with_name(path.name + suffix)
        copy.write_bytes((tmp_path / f"running.db{suffix}").read_bytes())
    stage.journal.database.close()
    assert is_set_aside(path, caplog)
    with closing(sqlite3.connect(tmp_path / unreadable(path)[0])) as connection:
        assert connection.execute("SELECT text FROM calls").fetchall() == [("no JSON",)]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM calls").fetchone() == (0,)


def test_a_file_that_cannot_be_set_aside_either_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may be somebody else's."""

    def rename(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "state.db"
    path.write_bytes(b"garbage")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(p.StateError, match=r"file is not a database; .*Permission denied"):
        p.Journal.open(path, p.current_instant)
    assert path.read_bytes() == b"garbage"


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_the_database_of_another_program_is_left_alone(mode: str, tmp_path: Path) -> None:
    """To the byte: the ini names the wrong file."""
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE mail (text)")
    before = path.read_bytes()
    with pytest.raises(p.StateError, match=r"state file .*: is the database of another program"):
        p.Journal.open(path, p.current_instant)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.db"]


# What stands in it.


KEPT = """
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
A relayed session is told as well, with its readings,
    charger starts 1 PRIM1, primary accepts, charger reads m
    meterValue=[{"sampledValue":[{"value":"1.5","unit":"kWh"},{"value":"16","measurand":"Current.Import"}]}]
    => file owner server_id transaction_id meter_start meter_stop ended: primary 7 7 0.0 1500.0 None
and with its stop.
    charger starts 1 PRIM1, primary accepts, charger stops e meterStop=2000, primary accepts
    => file meter_stop ended delivered: 2000.0 1800001000.0 1800001000.0
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
    secondary leaves, charger starts 1, charger stops e, 401 days, proxy dies, proxy dies, secondary takes
    => file badge: ; secondary: Start Start Stop:7; stored:
The secondary gets the charger's own statuses after a kill, before what is left for it.
    charger is Faulted 2, secondary takes, secondary leaves, charger starts 1, proxy killed, look,
    secondary takes => secondary: Status:Faulted Status:Faulted|Start
Beyond the bound the oldest readings go for good, never a start or a stop; one WARNING tells of it.
    limit is MAX_STORED 4, secondary leaves, charger starts 1, charger reads a n=1, charger reads b n=2,
    charger reads c n=3, charger reads d n=4, charger reads f n=5, charger stops e, proxy killed,
    secondary takes => secondary: Start Meter:7/4 Meter:7/5 Stop:7; told are dropped: 1 so far: 1
What is refused is told, and what is not sent because of it, which its server has never seen.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails, charger stops e
    => told StartTransaction is refused (CallError InternalError) and kept: 1;
    told StopTransaction is kept and not sent: its session is refused: CallError InternalError: 1
"""


@pytest.mark.parametrize(("steps", "heard"), plays_of(KEPT))
def test_what_the_file_keeps(play: Play, steps: str, heard: dict[str, str]) -> None:
    """For whoever reads it, and for the next start."""
    goes_as_told(play(), steps, heard)


@pytest.mark.parametrize(("seconds", "saved"), [(58, "1.0"), (61, "2.0")])
def test_the_readings_of_a_session_are_saved_once_a_minute(play: Play, seconds: int, saved: str) -> None:
    """Each of them would keep the disk busy for nothing."""
    steps = "charger starts 1 PRIM1, primary accepts"
    for number in (1, 2):
        value = f'[{{"sampledValue":[{{"value":"{number}"}}]}}]'
        steps += f", charger reads {number} meterValue={value}, primary accepts, {seconds * (2 - number)} s"
    goes_as_told(play(), steps, {"file meter_stop": saved})


def test_a_2_x_transaction_is_told_by_its_samples(play: Play) -> None:
    """In their unit and multiplier."""
    stage = play(version="ocpp2.0.1")
    for number, kind, value, measure in (
        (0, "Started", 1.25, {"unit": "kWh"}),
        (1, "Updated", 2, {"unit": "Wh", "multiplier": 3}),
        (2, "Ended", 3000, {}),
    ):
        samples = [{"timestamp": "t", "sampledValue": [{"value": value, "unitOfMeasure": measure}]}]
        payload = {"eventType": kind, "seqNo": number, "timestamp": f"t{number}", "evse": {"id": 1}}
        payload |= {"transactionInfo": {"transactionId": "T", "stoppedReason": "Local"}}
        payload |= {"meterValue": samples, "idToken": {"idToken": "SECO1", "type": "ISO14443"}}
        stage.charger.calls(str(number), "TransactionEvent", **payload)
    stage.delivers()
    (row,) = rows(stage)
    assert (row["meter_start"], row["meter_stop"]) == (1250.0, 3000.0)
    assert (row["started_at"], row["stopped_at"], row["reason"]) == ("t0", "t2", "Local")
    assert (row["transaction_id"], row["server_id"], row["connector"]) == ("T", "T", 1)
    assert None not in (row["ended"], row["delivered"])


@pytest.mark.parametrize(
    ("ini", "told"),
    [("server = local", "primary local ANY 0"), ("server = ws://a\nunknown_rfid = reject", "primary  ANY 1")],
)
def test_a_session_that_is_delivered_nowhere_is_told_as_well(play: Play, ini: str, told: str) -> None:
    """That of the proxy itself, and that of a badge that was rejected."""
    stage = play(ini=f"[ext-server]\n{ini}\n{{more}}", connect=False)
    heard = {"file owner server badge is_rejected": told, "stored": ""}
    heard |= {"file meter_start meter_stop delivered": "100.0 300.0 None"}
    goes_as_told(stage, "charger returns, charger starts 1 ANY 1 100, charger stops e meterStop=300", heard)


def test_what_is_known_of_the_charger_outlives_a_kill(play: Play) -> None:
    """When it was last seen, and the heartbeat interval that it was given."""
    stage = play()
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    save(stage)
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=900)
    stage.charger.says("[]")
    stage.relay.watch()
    stage.charger.lost()
    killed(stage)
    assert (stage.memory.heartbeat_interval, stage.memory.seen) == (900, stage.utc + 1000)


# Clocks that are set.


CLOCKS = """
A clock that is set ends no session and opens none,
    charger starts 1 PRIM1 2, primary accepts, charger stops d, primary accepts, charger starts 2,
    secondary accepts, CLOCK, 60 s, proxy killed
    => file ended>0: 1|None
and its owner hears of the end.
    charger starts 1, secondary accepts, CLOCK, 60 s, proxy killed, charger stops e, secondary takes
    => charger: 1:Accepted e; secondary: Start Stop:7; stored:
It removes no session that is young.
    charger starts 1, secondary accepts, charger stops e, secondary accepts, CLOCK, 3 times (1 days)
    => file badge: SECO1
"""


@pytest.mark.parametrize("clock", ["clock + 29", "clock - 30", "clock - 40000", "clock - 30, proxy dies"])
@pytest.mark.parametrize(("steps", "heard"), plays_of(CLOCKS))
def test_a_clock_that_is_set(play: Play, clock: str, steps: str, heard: dict[str, str]) -> None:
    """A machine without a battery for its clock gets the time from the network; a kill comes later."""
    goes_as_told(play(), steps.replace("CLOCK", f"7 s, {clock}"), heard)


def test_a_clock_that_begins_in_1970_removes_no_session_that_is_young(play: Play) -> None:
    """The session began then, by the proxy's clock."""
    stage = play()
    stage.utc = 0.0
    steps = "charger starts 1, secondary accepts, charger stops e, secondary accepts, clock + 20833, "
    goes_as_told(stage, f"{steps} 3 times (1 days)", {"file badge": "SECO1"})


# Kills.


def test_a_delivery_without_the_charger_speaks_as_the_charger_did(play: Play) -> None:
    """With its version and its User-Agent, but never with its login."""
    stage = play(version="ocpp2.0.1", connect=False)
    agent = "Charger/1.0 (a firmware that has much to say of itself, and of its modem)"
    link: Any = StageLink(stage, "charger", stage.version)
    stage.relay.connect(link, None, stage.version, p.Credentials("Basic c2VjcmV0", agent))
    save(stage)
    stage.version = "ocpp1.6"  # What the proxy would take an unknown charger's for.
    stage.killed()
    assert stage.relay.version == "ocpp2.0.1"
    assert stage.relay.credentials == p.Credentials(None, agent)


def test_stored_calls_of_another_version_are_delivered_by_the_next_start(play: Play) -> None:
    """In their own version, which knows nothing of the charger's new boot and statuses: a boot is made up."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    stage.charger.lost()
    stage.version = "ocpp2.0.1"
    stage.charger_connects()
    stage.charger.calls("b", "BootNotification", reason="PowerUp", chargingStation={"model": "M"})
    stage.primary.answers("b", status="Accepted", currentTime="2026-01-01T00:00:00Z", interval=300)
    stage.charger.calls("s", "StatusNotification", evseId=1, connectorId=1, connectorStatus="Occupied")
    stage.primary.answers("s")
    save(stage)
    stage.killed()
    delivers_alone(stage)
    assert stage.relay.version == "ocpp1.6"
    stage.secondary_connects(accepts=False)
    assert stage.answer_boot().keys() == {"chargePointVendor", "chargePointModel"}
    assert named(stage.delivers()) == [(START, None), (STOP, 71)]
    assert left(stage) == []


# Another server in the ini.

REPLACED = """
What is left for a secondary that was replaced, and what comes for it, is kept until the ini names it again.
    charger starts 1, secondary accepts, secondary leaves, charger reads m, proxy given OTHER_SECONDARY,
    charger stops e, proxy given OTHER_SECONDARY, look, proxy given NORMAL, secondary takes
    => secondary: Start|Meter:7 Stop:7; charger: 1:Accepted m e|; primary: |; stored:
It is so for one that was taken out.
    charger starts 1, secondary accepts, secondary leaves, charger reads m, proxy given NO_SECONDARY,
    charger stops e, proxy given NO_SECONDARY, look, proxy given NORMAL, secondary takes
    => secondary: Start|Meter:7 Stop:7; charger: 1:Accepted m e|; primary: |; stored:
What is new belongs to the new secondary; what is left for the old one holds nothing up.
    charger starts 1, secondary accepts, secondary leaves, charger reads m, proxy given OTHER_SECONDARY,
    look, charger starts 2 SECO2 2, secondary takes => secondary: Start|Start; stored: Meter
A stop that no session is known for is bound to the server of its badge.
    secondary leaves, charger stops e -1 SECO1, proxy given OTHER_SECONDARY, secondary takes
    => secondary: ; charger: e; stored: Stop
A stop never reaches another primary than that of its session.
    charger starts 1 PRIM1, primary accepts, proxy given OTHER_PRIMARY, charger stops e, look,
    proxy given NORMAL, 20 s => primary: Start|Stop:7; charger: 1:Accepted e|
A session of the proxy itself goes to no server that comes later.
    proxy given LOCAL_PRIMARY, charger starts 1 PRIM1, proxy given NORMAL, charger stops e
    => primary: ; charger: 1:Accepted e; stored:
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
What a server has asked for ends with it: a report is the primary's then,
    secondary asks GetDiagnostics, proxy given OTHER_SECONDARY, charger sends r DiagnosticsStatusNotification
    => primary: DiagnosticsStatusNotification; secondary:
also one that names its request,
    secondary asks GetLog requestId=1, proxy given NO_SECONDARY,
    charger sends r LogStatusNotification requestId=1 => primary: LogStatusNotification
and so are the sessions that follow a remote start
    secondary claims GUEST, proxy given OTHER_SECONDARY, charger starts 1 GUEST => primary: Start; secondary:
or a reservation.
    secondary asks ReserveNow idTag=GUEST reservationId=5 expiryDate=2099-01-01T00:00:00Z,
    proxy given NO_SECONDARY, charger starts 1 GUEST => primary: Start
"""


@pytest.mark.parametrize(("steps", "heard"), plays_of(REPLACED))
def test_a_server_that_is_replaced(play: Play, steps: str, heard: dict[str, str]) -> None:
    """A session belongs to the address that its server had when it began."""
    goes_as_told(play(), steps, heard)


# A disk that fails.

FAILING = """
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
So is a stop,
    charger starts 1, secondary accepts, disk full, charger stops a, 4 s, charger stops b, 4 s, look,
    disk well, 2 s => charger: 1:Accepted|b; secondary: Start|Stop:7
a reading,
    charger starts 1, secondary accepts, disk full, charger reads a, 4 s, charger reads b, 4 s, look,
    disk well, 2 s => charger: 1:Accepted|b; secondary: Start|Meter:7
and one of a session that is refused.
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
"""


@pytest.mark.parametrize(("steps", "heard"), plays_of(FAILING))
def test_while_the_disk_fails(play: Play, steps: str, heard: dict[str, str]) -> None:
    """What would have to be kept stays unanswered, and nothing else."""
    goes_as_told(play(), steps, heard)


def test_a_file_that_is_really_full_goes_on_when_there_is_room(play: Play) -> None:
    """What sqlite could not write, it has not written in part."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    save(stage)
    run = stage.journal.database.execute
    run("PRAGMA max_page_count = 1")  # As many as there are.
    reads(stage, transaction_id, meterValue=["x" * 100_000])
    waits(stage, 5)
    assert stage.charger.hears() == []
    assert stage.journal.failure == "database or disk is full"
    assert run("SELECT count(*) FROM calls").fetchone()[0] == 0
    run("PRAGMA max_page_count = 1000000")
    waits(stage, 1.5)
    assert stage.charger.hears() == [[3, "m", {}]]
    killed(stage)
    assert named(stage.delivers()) == [("MeterValues", 70)]


def test_a_relay_that_is_made_anew_keeps_the_order_of_what_is_not_on_disk_yet(play: Play) -> None:
    """A charger whose login is needed comes back before the disk has taken its last message."""
    stage = play("secondary_auth = forward")
    stage.secondary.lost()
    stage.starts("SECO1")
    reads(stage, told_id(stage))
    stage.charger.lost()
    stage.passes(0.5)
    forgotten(stage)
    assert left(stage) == [START, "MeterValues"]


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


# Bounds.


def test_a_charger_that_was_forgotten_for_others_is_known_again_when_it_comes(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the disk fails while it is forgotten."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    stage = play()
    stage.journal.memory("idle")
    stage.journal.tick()
    stage.journal.memory("newer")
    assert "idle" not in stage.journal.memories
    with full_disk(stage):
        stage.journal.tick()
        stage.journal.memory("idle")
    waits(stage, 1.5)
    stage.killed()
    assert "idle" in stage.journal.memories


def test_a_charger_with_something_open_is_not_forgotten_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is connected; of the idle ones the oldest goes, so that they do not fill the memory."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    stage = Stage()
    stage.journal.memory("other")
    stage.primary_session()
    for is_in_use in (True, False):
        stage.memory.is_in_use = is_in_use
        stage.journal.memory(f"new {is_in_use}")
        assert list(stage.journal.memories) == ["CP1", f"new {is_in_use}"]
    assert [row["charger"] for row in rows(stage, "chargers")] == list(stage.journal.memories)
    monkeypatch.setattr(p, "MAX_MEMORIES", 1)
    stage.memory.is_in_use = stage.journal.memories["new False"].is_in_use = True
    assert not stage.journal.has_room("one more")


# With the thread that writes, and real processes.


@asynccontextmanager
async def proxy_with(path: Path, ini: str) -> AsyncIterator[p.Proxy]:
    """A proxy on a free port, with a state file."""
    config = config_of(f"[host]\naddr = 127.0.0.1\nport = 0\n{ini}")
    proxy = p.Proxy(config, p.Journal.open(path, p.current_instant))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


def ini_for(primary: FakeServer, secondary: FakeServer) -> str:
    """Return an ini with both servers."""
    text = INI.format(more="").replace("ws://primary.example", primary.url)
    return text.replace("ws://secondary.example", secondary.url)


async def test_what_is_left_is_delivered_by_the_next_run_without_the_charger(tmp_path: Path) -> None:
    """Then the connection is closed, and nothing is left of the charger but its Memory."""
    path = tmp_path / "state.db"
    async with server() as primary, server() as secondary:
        ini = ini_for(primary, secondary)
        await secondary.stop()
        async with proxy_with(path, ini) as proxy, charger(proxy) as fake:
            await fake.boots()
            number = await fake.starts("SECO1")
            await fake.calls("e", STOP, transactionId=number, meterStop=9, timestamp="t")
        await secondary.start()
        async with proxy_with(path, ini) as proxy:
            await secondary.heard.call(STOP)
            assert secondary.heard.actions() == ["BootNotification", START, STOP]
            boot, _, stop = (message[3] for message in secondary.heard.messages)
            assert (boot["chargePointModel"], stop["transactionId"]) == ("M", 7)
            await (await secondary.connection()).wait_closed()
            await eventually(lambda: not proxy.relays)
            assert not proxy.journal.memories["CP1"].stored
        async with proxy_with(path, ini) as proxy:
            assert proxy.relays == {}
    assert len(secondary.requests) == 1


async def test_all_chargers_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is at one save, everybody's changes gather for the next."""
    writes: list[int] = []
    write = p.Journal._write

    def slow_write(journal: p.Journal, statements: list[Any]) -> str:
        writes.append(len(statements))
        time.sleep(0.02)
        return write(journal, statements)

    async with proxy_with(tmp_path / "state.db", "[ext-server]\nserver = local") as proxy:
        async with AsyncExitStack() as stack:
            fakes = [await stack.enter_async_context(charger(proxy, f"CP{number}")) for number in range(50)]
            monkeypatch.setattr(p.Journal, "_write", slow_write)
            await asyncio.gather(*(fake.starts("BADGE") for fake in fakes))
            assert 1 <= len(writes) < len(fakes)
    journal = p.Journal.open(tmp_path / "state.db", p.current_instant)
    assert sum(len(memory.sessions) for memory in journal.memories.values()) == 50
    journal.database.close()


async def test_stopping_saves_what_was_unsaved(tmp_path: Path) -> None:
    """Also what nobody waited for."""
    path = tmp_path / "state.db"
    async with proxy_with(path, "[ext-server]\nserver = local") as proxy:
        async with charger(proxy) as fake:
            await fake.calls("s", "StatusNotification", connectorId=3, errorCode="NoError", status="Faulted")
            proxy.journal.tick = lambda: None  # type: ignore[method-assign]  # The watchdog saves nothing.
            await fake.calls("t", "StatusNotification", connectorId=4, errorCode="NoError", status="Faulted")
    journal = p.Journal.open(path, p.current_instant)
    assert len(journal.memories["CP1"].statuses) == 2
    journal.database.close()


@asynccontextmanager
async def proxy_and_charger(path: Path, primary: FakeServer) -> AsyncIterator[tuple[p.Proxy, FakeCharger]]:
    """A proxy that is the secondary itself, with a state file, and a charger."""
    ini = NORMAL.replace("ws://primary.example", primary.url).replace("ws://secondary.example", "local")
    async with proxy_with(path, ini) as proxy, charger(proxy) as fake:
        yield proxy, fake


async def test_a_disk_that_hangs_holds_up_no_relayed_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop never waits for it; the stored Call does."""
    monkeypatch.setattr(p, "SAVE_SECONDS", 0.2)
    write, is_back = p.Journal._write, threading.Event()

    def hanging(journal: p.Journal, statements: list[Any]) -> str:
        is_back.wait(PATIENCE)
        return write(journal, statements)

    async with server() as primary, proxy_and_charger(tmp_path / "state.db", primary) as (proxy, fake):
        monkeypatch.setattr(p.Journal, "_write", hanging)
        stored = asyncio.create_task(fake.starts("SECO1", "stored"))
        await eventually(lambda: bool(proxy.journal.writing))
        assert await fake.starts("PRIM1", "relayed") == 7
        assert not stored.done()
        is_back.set()
        assert await stored >= p.FIRST_PROXY_ID


async def test_stopping_with_a_disk_that_hangs_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An ERROR tells that something may be lost."""
    monkeypatch.setattr(p, "LAST_SAVE_SECONDS", 0.1)
    journal = p.Journal.open(tmp_path / "state.db", p.current_instant)
    monkeypatch.setattr(journal, "_run", lambda *_: None)
    journal.memory("CP1")
    await journal.close()
    assert "state.db: the last changes may be lost: the disk is too slow" in caplog.text


async def test_stopping_with_a_disk_that_fails_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The charger's stored Call stays unanswered, so that it keeps it."""
    monkeypatch.setattr(p, "LAST_SAVE_SECONDS", 0.1)

    async with server() as primary, proxy_and_charger(tmp_path / "state.db", primary) as (_, fake):
        monkeypatch.setattr(p.Journal, "_write", lambda *_: "disk I/O error")
        await fake.connection.send('[2,"1","StartTransaction",{"connectorId":1,"idTag":"SECO1"}]')
        await fake.calls("2", "Heartbeat")
        assert [message[1] for message in fake.heard.messages] == ["2"]
    assert "state.db: the last changes may be lost: disk I/O error" in caplog.text
