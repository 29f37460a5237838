"""The state file itself: who may use it, what stands in it, what can be read, and real disks and sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.kills import FORWARD, SECONDARY, Play, killed, named, save, told_id, waits
from tests.play.peers import FakeCharger, FakeServer, charger, eventually, server
from tests.play.plays import INI, Stage, StageJournal, config_of
from tests.test_command_line import LOCAL, command, line_with, port_of, run


def rows(stage: Stage, table: str = "sessions") -> list[dict[str, Any]]:
    """Return what the file holds; only its own connection can read it."""
    save(stage)
    return [dict(row) for row in stage.journal.database.execute(f"SELECT * FROM {table}")]


def stops(stage: Stage, transaction_id: object, **more: object) -> None:
    """Let the charger send a StopTransaction."""
    payload = {"transactionId": transaction_id, "meterStop": 5, "timestamp": "t", **more}
    stage.charger.calls("e", "StopTransaction", **payload)


# Who may use it.


def test_only_its_owner_can_read_it(play: Play, tmp_path: Path) -> None:
    """It holds badges; so does sqlite's log beside it."""
    save(play())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600}


def test_it_says_whose_it_is(play: Play, tmp_path: Path) -> None:
    """By application id and schema version."""
    stage = play()
    stage.journal.database.close()
    with closing(sqlite3.connect(tmp_path / "state.db")) as connection:
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


def test_a_path_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The folder is missing; the port is not even tried."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ini = LOCAL.replace("port = 0", f"port = {port}\nstate = missing/x.db")
        (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
        done = run(cwd=tmp_path)
    words = "state file missing/x.db: No such file or directory\n"
    assert (done.returncode, done.stderr) == (2, words)


def test_a_mistake_in_the_ini_comes_before_the_state_file(tmp_path: Path) -> None:
    """And touches nothing."""
    (tmp_path / "ocpp-2w-proxy.ini").write_text(LOCAL.replace("port = 0", "port = x\nstate = missing/x.db"))
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ocpp-2w-proxy.ini:3: port 'x'")
    assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


def test_a_folder_is_no_state_file(tmp_path: Path) -> None:
    """It is left as it is."""
    with pytest.raises(p.StateError, match=r"state file .*: unable to open database file"):
        p.Journal.open(tmp_path, p.current_instant)


def test_a_folder_that_is_missing_is_told_by_its_name(tmp_path: Path) -> None:
    """No folder is made: the path may be mistyped."""
    with pytest.raises(p.StateError, match=r"missing/x.db: No such file or directory"):
        p.Journal.open(tmp_path / "missing" / "x.db", p.current_instant)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_in_use_is_not_taken_for_an_unreadable_one(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked is not broken: it stays where it is, and its owner goes on."""
    monkeypatch.setattr(p, "LOCK_SECONDS", 0.01)
    stage = play()
    with pytest.raises(p.StateError, match="another process uses it"):
        p.Journal.open(tmp_path / "state.db", p.current_instant)
    assert unreadable(tmp_path / "state.db") == []
    stage.starts("SECO1")
    assert len(stage.charger.hears()) == 1


async def test_without_a_state_file_one_warning_is_given(tmp_path: Path) -> None:
    """`state = none`: all is kept in memory only."""
    async with command(LOCAL.replace("port = 0", "port = 0\nstate = none"), tmp_path) as process:
        await line_with(process, "WARNING state = none: sessions and stored Calls are lost with the process")
        await port_of(process)
        assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


def test_without_a_state_file_nothing_piles_up_to_be_saved() -> None:
    """It is saved in memory."""
    stage = Stage()
    stops(stage, stage.secondary_session())
    stage.delivers()
    stage.primary_session(badge="PRIM1", connector=2)
    stage.relay.tick()
    stage.journal.tick()
    assert (stage.journal.pending, stage.journal.writing, stage.journal.waiters) == ({}, {}, {})
    assert len(rows(stage)) == 2


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


@pytest.mark.parametrize(
    "content", [b"garbage", b"garbage " * 10_000, b"SQLite format 3\x00" + b"\xff" * 9000]
)
def test_garbage_is_set_aside(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it is, and the proxy serves on."""
    path = tmp_path / "state.db"
    path.write_bytes(content)
    assert is_set_aside(path, caplog)
    assert (tmp_path / unreadable(path)[0]).read_bytes() == content


def filled(path: Path, sql: str = "") -> None:
    """Make a file with one undelivered session, change it, and close it."""
    stage = Stage(state=path)
    stage.secondary.lost()
    stage.starts("SECO1")
    assert rows(stage, "calls")
    stage.journal.database.executescript(sql)
    stage.journal.database.close()


@pytest.mark.parametrize(
    "sql",
    [
        f"PRAGMA user_version = {p.SCHEMA_VERSION + 1}",
        "PRAGMA user_version = 0",
        "UPDATE calls SET text = 'no JSON'",
        "UPDATE calls SET peer = 'tertiary', session = NULL",
        "UPDATE sessions SET owner = 'tertiary'",
        "UPDATE sessions SET answers = '[1'",
        "UPDATE chargers SET statuses = ''",
        "UPDATE chargers SET claims = '[1]'",
        "ALTER TABLE sessions DROP COLUMN answers",
        "DROP TABLE calls",
    ],
)
def test_what_cannot_be_understood_is_set_aside(
    sql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another schema version, or a row that tells nothing: the file is kept for whoever can."""
    path = tmp_path / "state.db"
    filled(path, sql)
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
def test_a_file_of_the_first_edition_is_set_aside(
    version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing in it waits for a server; what was refused is kept for whoever looks."""
    path = tmp_path / "state.db"
    first_edition(path, version, "INSERT INTO calls VALUES (1, 'no');")
    assert is_set_aside(path, caplog)


@pytest.mark.parametrize("more", [{"calls": "INSERT INTO calls VALUES (1, NULL);"}, {"kept": '["x"]'}])
def test_a_file_of_the_first_edition_that_owes_something_ends_the_proxy(
    more: dict[str, str], tmp_path: Path
) -> None:
    """That edition has to deliver it; the file is left as it is."""
    path = tmp_path / "state.db"
    first_edition(path, 2, **more)
    words = "holds 1 messages of version 1 that are not delivered yet; let that version deliver them first"
    with pytest.raises(p.StateError, match=words):
        p.Journal.open(path, p.current_instant)
    assert unreadable(path) == []


def test_when_a_charger_was_last_seen_outlives_a_restart(play: Play) -> None:
    """For whoever asks since when it is gone."""
    stage = play()
    stage.charger.says("[]")
    stage.relay.watch()
    stage.charger.lost()
    killed(stage)
    assert stage.journal.memories["CP1"].seen == stage.utc + 1000


@pytest.mark.parametrize("size", [100, 5000])
def test_a_file_that_was_cut_off_is_set_aside(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk was full, or a copy was not finished."""
    path = tmp_path / "state.db"
    filled(path)
    path.write_bytes(path.read_bytes()[:size])
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


# Sessions, for people and for the Status section.


def test_a_session_of_the_secondary_is_told_in_full(play: Play) -> None:
    """Whose, where, when, how much, why it ended, and whether its owner knows."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70, badge="SECO1", connector=2)
    stage.time += 60
    stops(stage, transaction_id, meterStop=12_500, timestamp="2026-01-01T01:00:00Z", reason="EVDisconnected")
    (row,) = rows(stage)
    assert row["delivered"] is None  # Its start is; its stop counts.
    stage.time += 60
    stage.delivers()
    (row,) = rows(stage)
    told = {
        "charger": "CP1",
        "owner": "secondary",
        "server": "ws://secondary.example",
        "badge": "SECO1",
        "connector": 2,
        "transaction_id": transaction_id,
        "server_id": 70,
        "begun": stage.utc + 1000,
        "ended": stage.utc + 1060,
        "delivered": stage.utc + 1120,
        "started_at": "2026-01-01T00:00:00Z",
        "stopped_at": "2026-01-01T01:00:00Z",
        "meter_start": 0.0,
        "meter_stop": 12_500.0,
        "reason": "EVDisconnected",
    }
    assert row | told == row


def test_a_relayed_session_is_told_as_well(play: Play) -> None:
    """The primary's, with its readings."""
    stage = play()
    stage.primary_session(server_id=0)
    (transaction_id,) = stage.memory.sessions
    samples = [{"value": "1.5", "unit": "kWh"}, {"value": "16", "measurand": "Current.Import"}]
    readings = [{"timestamp": "t", "sampledValue": samples}]
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=readings)
    stage.primary.answers("m")
    (row,) = rows(stage)
    assert (row["meter_start"], row["meter_stop"], row["stopped_at"]) == (0.0, 1500.0, "")
    assert (row["owner"], row["server"]) == ("primary", "ws://primary.example")
    assert (row["server_id"], row["transaction_id"]) == (0, transaction_id)
    stops(stage, transaction_id, meterStop=2000)
    stage.primary.answers("e")
    (row,) = rows(stage)
    assert (row["meter_stop"], row["ended"]) == (2000.0, stage.now().utc)
    assert row["delivered"] == stage.now().utc


def test_a_2_x_transaction_is_told_by_its_samples(play: Play) -> None:
    """In their unit and multiplier."""
    stage = play(version="ocpp2.0.1")

    def event(number: int, kind: str, value: float, measure: dict[str, Any], **info: str) -> None:
        samples = [{"timestamp": "t", "sampledValue": [{"value": value, "unitOfMeasure": measure}]}]
        payload = {"eventType": kind, "seqNo": number, "timestamp": f"t{number}", "evse": {"id": 1}}
        payload |= {"transactionInfo": {"transactionId": "T", **info}, "meterValue": samples}
        payload |= {"idToken": {"idToken": "SECO1", "type": "ISO14443"}}
        stage.charger.calls(str(number), "TransactionEvent", **payload)

    event(0, "Started", 1.25, {"unit": "kWh"})
    event(1, "Updated", 2, {"unit": "Wh", "multiplier": 3})
    event(2, "Ended", 3000, {}, stoppedReason="Local")
    stage.delivers()
    (row,) = rows(stage)
    assert (row["meter_start"], row["meter_stop"]) == (1250.0, 3000.0)
    assert (row["started_at"], row["stopped_at"], row["reason"]) == ("t0", "t2", "Local")
    assert (row["transaction_id"], row["server_id"], row["connector"]) == ("T", "T", 1)
    assert None not in (row["ended"], row["delivered"])


def test_a_session_of_the_proxy_itself_is_told_as_well(play: Play) -> None:
    """`server = local`: it is delivered nowhere."""
    stage = play(ini="[ext-server]\nserver = local\n{more}", connect=False)
    stage.charger_connects()
    stage.starts("ANY", meter=100)
    transaction_id = stage.charger.hears()[-1][2]["transactionId"]
    stops(stage, transaction_id, meterStop=300)
    (row,) = rows(stage)
    assert (row["owner"], row["server"], row["badge"]) == ("primary", "local", "ANY")
    assert (row["meter_start"], row["meter_stop"], row["delivered"]) == (100.0, 300.0, None)
    assert rows(stage, "calls") == []


def test_a_rejected_session_is_told_as_one(play: Play) -> None:
    """Who knows why the charger charged all the same."""
    stage = play("unknown_rfid = reject")
    stage.starts("STRANGER")
    (row,) = rows(stage)
    assert (row["badge"], row["is_rejected"], row["delivered"]) == ("STRANGER", 1, None)


def ended_session(play: Play) -> Stage:
    """Play a session of the secondary to its end, all of it delivered."""
    stage = play()
    stops(stage, stage.secondary_session())
    stage.delivers()
    save(stage)
    return stage


@pytest.mark.parametrize(("days", "is_found"), [(6.9, True), (7.1, False)])
def test_an_ended_session_is_found_for_a_week(play: Play, days: float, is_found: bool) -> None:
    """Then it only stands in the file."""
    stage = ended_session(play)
    stage.time += days * p.DAY
    stage.killed()
    assert bool(stage.memory.sessions) is is_found
    assert len(rows(stage)) == 1


def test_old_sessions_leave_the_file_at_a_start(play: Play) -> None:
    """After 400 days."""
    stage = ended_session(play)
    stage.time += p.KEEP_SECONDS - p.DAY
    stage.killed()
    assert len(rows(stage)) == 1
    stage.time += 2 * p.DAY
    stage.killed()
    assert rows(stage) == []


def test_old_sessions_leave_the_file_once_a_day(play: Play) -> None:
    """A proxy that runs for years does not fill the disk."""
    stage = ended_session(play)
    for _ in range(400):
        assert len(rows(stage)) == 1
        stage.time += p.DAY
    assert rows(stage) == []


def test_an_old_session_with_something_undelivered_stays_in_the_file(play: Play) -> None:
    """However long its server is away."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stops(stage, transaction_id)
    save(stage)
    stage.time += p.KEEP_SECONDS + p.DAY
    for _ in range(2):
        stage.killed()
        assert (len(rows(stage)), len(rows(stage, "calls"))) == (1, 2)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()][1:] == ["StartTransaction", "StopTransaction"]


def test_what_was_refused_leaves_the_file_with_its_session(play: Play) -> None:
    """After 400 days, too."""
    stage = play()
    stage.starts("SECO1")
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=0, idTagInfo={"status": "Blocked"})
    stops(stage, stage.charger.hears()[0][2]["transactionId"])
    assert len(rows(stage, "calls")) == 2
    stage.time += p.KEEP_SECONDS + p.DAY
    stage.killed()
    assert (rows(stage), rows(stage, "calls")) == ([], [])


def test_an_open_session_that_was_silent_for_a_month_counts_as_ended(play: Play) -> None:
    """It frees its connector; its late stop is delivered all the same."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    save(stage)
    stage.time += p.SILENT_SECONDS + 60
    stage.killed()
    stage.passes(1)
    assert stage.memory.on_connector(1) is None
    (row,) = rows(stage)
    assert (row["ended"] is not None, row["has_stop"]) == (True, 0)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    stage.delivers()
    stops(stage, transaction_id)
    assert [payload["transactionId"] for _, payload in stage.delivers()] == [70]


def test_a_clock_that_was_set_back_between_two_runs_ends_nothing(play: Play) -> None:
    """A machine without a battery for its clock."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stops(stage, stage.primary_session(server_id=7, connector=2), idTag="PRIM1")
    save(stage)
    stage.utc = 0.0
    stage.killed()
    opened = [session for session in stage.memory.sessions.values() if session.ended is None]
    assert [session.transaction_id for session in opened] == [transaction_id]
    stage.passes(1)
    assert len(rows(stage)) == 2
    stage.killed()
    assert len(stage.memory.sessions) == 2


@pytest.mark.parametrize("silent", [0.0, 7 * 3600.0], ids=["at once", "hours later"])
@pytest.mark.parametrize("days", [30, -30])
def test_a_clock_that_is_set_in_mid_session_does_not_end_it(play: Play, days: int, silent: float) -> None:
    """A machine without a battery for its clock gets the time from the network; a kill comes later."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    save(stage)
    stage.time += silent
    waits(stage, 1)
    stage.utc += days * p.DAY
    stage.time += silent
    waits(stage, 60)
    killed(stage)
    stage.passes(1)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_a_clock_that_is_set_lets_no_other_server_have_a_relayed_session(play: Play) -> None:
    """Its owner is found as before."""
    stage = play(FORWARD)
    waits(stage, 1)
    stage.starts("SECO1", "1")
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    assert told_id(stage) == 7
    save(stage)
    stage.utc += 30 * p.DAY
    waits(stage, 60)
    killed(stage)
    stage.passes(1)
    stops(stage, 7)
    assert stage.primary.hears() == []
    assert named(stage.delivers()) == [("StopTransaction", 7)]


def test_a_clock_that_is_set_by_decades_removes_no_session_that_is_young(play: Play) -> None:
    """A machine without a battery for its clock begins in 1970."""
    stage = play()
    stage.utc = 0.0
    stops(stage, stage.secondary_session(server_id=70))
    stage.delivers()
    save(stage)
    stage.utc = 1_800_000_000.0
    for _ in range(3):
        stage.time += p.DAY
        assert len(rows(stage)) == 1


def test_an_ended_session_stays_ended_when_the_clock_is_set_back(play: Play) -> None:
    """A repeated stop is still one."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stops(stage, transaction_id)
    stage.delivers()
    save(stage)
    stage.utc -= 30 * p.DAY
    killed(stage)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.delivers() == []


# The bound of what was refused.


@pytest.mark.parametrize("is_error", [False, True])
def test_the_bound_of_what_was_refused_holds_for_the_file(
    play: Play, monkeypatch: pytest.MonkeyPatch, is_error: bool
) -> None:
    """Whatever the refusal; the oldest goes."""
    monkeypatch.setattr(p, "MAX_REFUSED", 5)
    monkeypatch.setattr(p, "RETRY_SECONDS", ())
    stage = play()
    for number in range(8):
        stage.starts("SECO1", f"s{number}", meter=number)
        stage.charger.hears()
        message_id = stage.secondary.hears_call()[0]
        if is_error:
            stage.secondary.errs(message_id)
        else:
            stage.secondary.answers(message_id, transactionId=0, idTagInfo={"status": "Blocked"})
        kept = [json.loads(row["text"])[3]["meterStart"] for row in rows(stage, "calls")]
        assert kept == list(range(max(0, number - 4), number + 1))
    assert len(stage.memory.refused) == 5


# What peers may send.

TEXTS = st.text(st.characters(), max_size=30) | st.sampled_from(["\ud800", "\x00", "\udfff\x00x", "😀"])
NUMBERS = st.integers() | st.sampled_from([10**30, -(10**30), 10**400, 2**63, 2**63 - 1, -(2**63) - 1])
VALUES = TEXTS | NUMBERS | st.floats() | st.none() | st.booleans() | st.lists(st.integers(), max_size=2)


def remembered(stage: Stage) -> list[Any]:
    """Return what matters of the answered sessions; half of a surrogate pair is kept as a question mark."""
    return [
        (
            *map(p.to_column, (session.transaction_id, session.server_id, session.start, session.stop)),
            session.ended,
        )
        for session in stage.memory.sessions.values()
        if session.transaction_id is not None
    ]


def survives(stage: Stage) -> None:
    """Save, kill the proxy and start it again: it is as it was, and goes on saving."""
    before, stored = remembered(stage), [call.text for call in stage.waiting(SECONDARY)]
    save(stage)
    assert stage.journal.failure == ""
    stage.killed()
    assert remembered(stage) == before
    assert [call.text for call in stage.waiting(SECONDARY)] == stored
    stage.charger_connects()
    save(stage)
    assert stage.journal.failure == ""


def on_disk(version: str = "ocpp1.6") -> tuple[Stage, TemporaryDirectory[str]]:
    """Begin a play whose file lies in a folder of its own."""
    folder = TemporaryDirectory()
    return Stage(version=version, state=Path(folder.name, "state.db")), folder


def end(stage: Stage, folder: TemporaryDirectory[str]) -> None:
    """Let go of the file and the folder."""
    stage.journal.database.close()
    folder.cleanup()


@settings(max_examples=60, deadline=None)
@given(badge=TEXTS, connector=VALUES, meter=VALUES, timestamp=VALUES, server_id=VALUES)
@example(badge="\ud800", connector=10**30, meter=10**400, timestamp=5, server_id=10**30)
def test_nothing_in_a_1_6_session_breaks_a_save(
    badge: str, connector: Any, meter: Any, timestamp: Any, server_id: Any
) -> None:
    """Whatever stands where a number or a text is expected."""
    stage, folder = on_disk()
    for name in (f"SECO{badge}", f"PRIM{badge}"):
        payload = {"connectorId": connector, "idTag": name, "meterStart": meter, "timestamp": timestamp}
        stage.charger.calls(name[:4], "StartTransaction", **payload)
        stage.charger.hears()
        for link in (stage.primary, stage.secondary):
            for _, message_id, _, _ in link.hears():
                link.answers(message_id, transactionId=server_id, idTagInfo={"status": badge})
    stop = {"transactionId": server_id, "idTag": badge, "meterStop": meter, "timestamp": timestamp}
    stage.charger.calls("e", "StopTransaction", **stop, reason=badge)
    survives(stage)
    end(stage, folder)


@settings(max_examples=60, deadline=None)
@given(name=TEXTS, badge=TEXTS, number=VALUES, evse=VALUES, other=VALUES)
@example(name="\ud800", badge="\ud800", number=10**30, evse=10**30, other=5)
def test_nothing_in_a_2_x_transaction_breaks_a_save(
    name: str, badge: str, number: Any, evse: Any, other: Any
) -> None:
    """With its badge or before it."""
    stage, folder = on_disk("ocpp2.0.1")
    for token in (f"SECO{badge}", ""):
        info = {"transactionId": f"{name}{token}", "stoppedReason": other, "remoteStartId": number}
        payload = {"eventType": "Started", "seqNo": number, "timestamp": other, "evse": {"id": evse}}
        payload |= {"transactionInfo": info}
        payload |= {"idToken": {"idToken": token, "type": "ISO14443"}} if token else {}
        stage.charger.calls(f"x{token}", "TransactionEvent", **payload)
    survives(stage)
    end(stage, folder)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, number=VALUES, interval=VALUES)
@example(text="\ud800", number=10**30, interval=10**30)
def test_nothing_about_the_station_breaks_a_save(text: str, number: Any, interval: Any) -> None:
    """Boot, statuses, claims, requests."""
    stage, folder = on_disk()
    stage.charger.calls("b", "BootNotification", chargePointVendor=text, chargePointModel=number)
    stage.primary.answers("b", status="Accepted", currentTime=text, interval=interval)
    stage.charger.calls("s", "StatusNotification", connectorId=number, status=text)
    stage.primary.answers("s")
    for action, payload in (
        ("RemoteStartTransaction", {"idTag": text, "connectorId": number}),
        ("ReserveNow", {"idTag": text, "reservationId": number, "expiryDate": text}),
        ("ReserveNow", {"idTag": text, "reservationId": number, "expiryDate": "0001-01-01T00:00:00+14:00"}),
        ("GetLog", {"requestId": number}),
        ("GetDiagnostics", {}),
    ):
        stage.primary.calls(action, action, **payload)
        for message in stage.charger.hears():
            if message[0] == 2:
                stage.charger.answers(message[1], status="Accepted")
    before = stage.memory.claims
    survives(stage)
    assert list(map(repr, stage.memory.claims)) == list(map(repr, before))
    end(stage, folder)


@given(TEXTS | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.none() | st.booleans())
def test_every_value_can_be_stored(value: Any) -> None:
    """As it is, if sqlite has a place for it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        ((stored,),) = connection.execute("SELECT :value", {"value": p.to_column(value)})
    expected = re.sub("[\ud800-\udfff]", "?", value) if isinstance(value, str) else value
    assert stored == expected


# With real sockets, and the thread that writes.


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


async def plays_a_session(proxy: p.Proxy) -> None:
    """Let a charger come, charge with a badge of the secondary, and go."""
    async with charger(proxy) as fake:
        await fake.boots()
        number = await fake.starts("SECO1")
        await fake.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp="t")


async def test_what_is_left_is_delivered_by_the_next_run_without_the_charger(tmp_path: Path) -> None:
    """Then the connection is closed, and nothing is left of the charger but its Memory."""
    path = tmp_path / "state.db"
    async with server() as primary, server() as secondary:
        ini = ini_for(primary, secondary)
        await secondary.stop()
        async with proxy_with(path, ini) as proxy:
            await plays_a_session(proxy)
        await secondary.start()
        async with proxy_with(path, ini) as proxy:
            await secondary.heard.call("StopTransaction")
            assert secondary.heard.actions() == ["BootNotification", "StartTransaction", "StopTransaction"]
            boot, _, stop = (message[3] for message in secondary.heard.messages)
            assert (boot["chargePointModel"], stop["transactionId"]) == ("M", 7)
            await (await secondary.connection()).wait_closed()
            await eventually(lambda: not proxy.relays)
            assert not proxy.journal.memories["CP1"].stored
        async with proxy_with(path, ini) as proxy:
            assert proxy.relays == {}
    assert len(secondary.requests) == 1


async def test_a_killed_process_goes_on_with_its_sessions(tmp_path: Path) -> None:
    """SIGKILL in mid-session: the secondary gets it whole, the charger notices a reconnect."""
    async with server() as primary, server() as secondary, AsyncExitStack() as stack:
        ini = f"[host]\naddr = 127.0.0.1\nport = 0\n{ini_for(primary, secondary)}"
        await secondary.stop()
        number = 0
        for is_first in (True, False):
            process = await stack.enter_async_context(command(ini, tmp_path))
            uri = f"ws://127.0.0.1:{await port_of(process)}/CP1"
            async with connect(uri, subprotocols=[Subprotocol("ocpp1.6")]) as connection:
                fake = FakeCharger(connection)
                if is_first:
                    await fake.boots()
                    number = await fake.starts("SECO1")
                    process.kill()
                    await fake.closed()
                    await secondary.start()
                else:
                    await fake.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp="t")
                    await secondary.heard.call("StopTransaction")
            await fake.listener
        heard = [action for action in secondary.heard.actions() if action != "BootNotification"]
        assert heard == ["StartTransaction", "StopTransaction"]


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
            assert 1 <= len(writes) <= 15
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
