"""Disks that fail, hang and fill up; the order towards the charger; the bounds of what is kept."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import (
    FORWARD,
    NORMAL,
    OTHER_SECONDARY,
    PRIMARY,
    SECONDARY,
    Play,
    come_back,
    event,
    forgotten,
    full_disk,
    killed,
    left,
    named,
    reads,
    refused,
    save,
    slow_disk,
    stops,
    told_id,
    waits,
)
from tests.play.peers import PATIENCE, FakeCharger, FakeServer, charger, eventually, server
from tests.play.plays import INI, config_of

# A disk that fails.


def test_a_stored_call_is_unanswered_until_it_is_on_disk(play: Play) -> None:
    """And undelivered; when the disk is back, both go on."""
    stage = play()
    with full_disk(stage):
        stage.starts("SECO1")
        waits(stage, 10)
        assert stage.charger.hears() == stage.secondary.hears() == []
    waits(stage, 1.5)
    assert stage.charger.hears()[0][1] == "s1"
    assert named(stage.delivers()) == [("StartTransaction", None)]


def test_relayed_traffic_goes_on_without_the_disk(play: Play) -> None:
    """Also what a kill now would forget: starts, remote starts."""
    stage = play()
    with full_disk(stage):
        assert stage.primary_session(server_id=7) == 7
        stage.primary.calls("r", "RemoteStartTransaction", idTag="GUEST", connectorId=2)
        assert stage.charger.hears_call()[:2] == ("r", "RemoteStartTransaction")
        stage.charger.answers("r", status="Accepted")
        assert stage.primary.hears() == [[3, "r", {"status": "Accepted"}]]
        stage.charger.calls("a", "Authorize", idTag="SECO1")
        assert stage.charger.hears() == [[3, "a", {"idTagInfo": {"status": "Accepted"}}]]
    waits(stage, 1.5)
    killed(stage)
    stops(stage, 7)
    assert stage.primary.hears_call()[1] == "StopTransaction"


def test_one_warning_a_minute_tells_of_a_disk_that_fails(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    """And one line tells that it is back."""
    caplog.set_level(logging.INFO, "proxy")
    stage = play()
    with full_disk(stage):
        stage.starts("SECO1")
        waits(stage, 150)
    waits(stage, 1.5)
    told = [record.getMessage() for record in caplog.records if record.name == "proxy"]
    told = [line for line in told if line.startswith("state file")]
    file = f"state file {stage.state}"
    failed = f"{file} cannot be written: database or disk is full; relayed traffic goes on"
    assert [line.partition(", what")[0] for line in told[:-1]] == [failed] * 3
    assert told[-1] == f"{file} can be written again; what waited for it goes on"


def test_a_disk_that_comes_and_goes_does_not_fill_the_log(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    """Two lines a minute."""
    stage = play()
    for _ in range(10):
        stage.starts("SECO1")
        with full_disk(stage):
            stage.journal.settle()
        waits(stage, 1.5)
        stops(stage, told_id(stage))
        stage.charger.hears()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 2


@pytest.mark.parametrize("action", ["StartTransaction", "StopTransaction", "MeterValues"])
def test_what_a_charger_repeats_while_the_disk_fails_is_one_call(play: Play, action: str) -> None:
    """One answer in the end, to the newest message id."""
    stage = play()
    transaction_id = None if action == "StartTransaction" else stage.secondary_session(server_id=70)
    with full_disk(stage):
        for number in "123":
            if action == "StartTransaction":
                stage.starts("SECO1", number)
            else:
                {"StopTransaction": stops, "MeterValues": reads}[action](stage, transaction_id, number)
            waits(stage, 4)
        assert stage.charger.hears() == []
    waits(stage, 1.5)
    assert [message[1] for message in stage.charger.hears()] == ["3"]
    assert [delivered[0] for delivered in stage.delivers()] == [action]


@pytest.mark.parametrize("ini", [INI.format(more=FORWARD), OTHER_SECONDARY], ids=["forward", "other"])
def test_meter_values_that_are_repeated_while_the_disk_fails_are_kept_once(play: Play, ini: str) -> None:
    """Also in the place of a secondary that is away, and for one that the ini no longer names."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    killed(stage, ini)
    stage.secondary.lost()
    stage.passes(6)
    with full_disk(stage):
        for number in "123":
            reads(stage, transaction_id, number)
            waits(stage, 4)
        assert stage.charger.hears() == []
    waits(stage, 1.5)
    assert [message[1] for message in stage.charger.hears()] == ["3"]
    assert left(stage) == ["MeterValues"]


def test_meter_values_that_are_equal_are_no_repeats_while_the_disk_is_well(play: Play) -> None:
    """A charger may send two of them before it has heard of the first."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    for number in "12":
        reads(stage, transaction_id, number)
    assert len(stage.charger.hears()) == 2
    assert named(stage.delivers()) == [("MeterValues", 70)] * 2


def test_the_next_call_waits_for_the_record_of_the_answer_before_it(play: Play) -> None:
    """A kill must not send the first one again behind the second."""
    stage = play()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    message_id = stage.secondary.hears_call()[0]
    with full_disk(stage):
        stage.secondary.answers(message_id, transactionId=70, idTagInfo={"status": "Accepted"})
        waits(stage, 10)
        assert stage.secondary.hears() == []
    waits(stage, 1.5)
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_the_next_call_goes_out_once_the_record_before_it_is_on_disk(play: Play) -> None:
    """An answer may come while the disk is at an earlier save; nothing else must come after it."""
    stage = play()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    message_id = stage.secondary.hears_call()[0]
    with slow_disk(stage) as finish:
        stops(stage, transaction_id)
        stage.journal.settle()
        stage.secondary.answers(message_id, transactionId=70, idTagInfo={"status": "Accepted"})
        finish()
        assert stage.secondary.hears() == []
        save(stage)
        finish()
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_a_kill_while_the_disk_fails_loses_nothing_that_was_answered(play: Play) -> None:
    """What was not, the charger sends again."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stage.charger.hears()
    with full_disk(stage):
        reads(stage, transaction_id)
        stops(stage, transaction_id)
        waits(stage, 2)
        stage.killed()
    come_back(stage)
    assert left(stage) == []
    stops(stage, transaction_id)
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_a_disk_that_hangs_counts_as_failing_after_some_seconds(play: Play) -> None:
    """Relayed starts go on; a stored one waits; when the disk is back, nothing is missing."""
    stage = play()
    with slow_disk(stage) as finish:
        stage.starts("SECO1", "1", connector=2)
        stage.journal.settle()
        stage.starts("PRIM1", "2")
        stage.primary.answers("2", transactionId=7, idTagInfo={"status": "Accepted"})
        waits(stage, p.SAVE_SECONDS - 1)
        assert stage.charger.hears() == []
        waits(stage, 1.5)
        assert [message[1] for message in stage.charger.hears()] == ["2"]
        stage.starts("PRIM2", "3", connector=3)
        stage.primary.answers("3", transactionId=8, idTagInfo={"status": "Accepted"})
        assert [message[1] for message in stage.charger.hears()] == ["3"]
        finish()
    assert [message[1] for message in stage.charger.hears()] == ["1"]
    assert named(stage.delivers()) == [("StartTransaction", None)]
    killed(stage)
    assert {7, 8} < stage.memory.sessions.keys()


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
    assert left(stage) == ["StartTransaction", "MeterValues"]


def test_what_is_repeated_for_a_refused_session_while_the_disk_fails_is_kept_once(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer in the end; the session is tried again as it was."""
    monkeypatch.setattr(p, "RETRY_SECONDS", ())
    stage = play()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    stage.secondary.errs(stage.secondary.hears_call()[0])
    save(stage)
    with full_disk(stage):
        for number in "123":
            reads(stage, transaction_id, number)
            waits(stage, 4)
        assert stage.charger.hears() == []
    waits(stage, 1.5)
    assert [message[1] for message in stage.charger.hears()] == ["3"]
    assert [action for action, _ in refused(stage)] == ["StartTransaction", "MeterValues"]
    killed(stage)
    assert named(stage.delivers()) == [("StartTransaction", None), ("MeterValues", 71)]


# With the thread that writes.


@asynccontextmanager
async def proxy_and_charger(path: Path, primary: FakeServer) -> AsyncIterator[tuple[p.Proxy, FakeCharger]]:
    """A proxy that is the secondary itself, on a free port, with a state file, and a charger."""
    ini = NORMAL.replace("ws://primary.example", primary.url).replace("ws://secondary.example", "local")
    config = config_of(f"[host]\naddr = 127.0.0.1\nport = 0\n{ini}")
    proxy = p.Proxy(config, p.Journal.open(path, p.current_instant))
    await proxy.start()
    try:
        async with charger(proxy) as fake:
            yield proxy, fake
    finally:
        await proxy.stop()


async def test_a_disk_that_is_back_lets_the_charger_have_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any other event."""
    write, failures = p.Journal._write, iter(range(2))

    def failing(journal: p.Journal, statements: list[Any]) -> str:
        return write(journal, statements) if next(failures, None) is None else "disk I/O error"

    async with server() as primary, proxy_and_charger(tmp_path / "state.db", primary) as (_, fake):
        monkeypatch.setattr(p.Journal, "_write", failing)
        assert await fake.starts("SECO1") >= p.FIRST_PROXY_ID
    assert "state.db cannot be written: disk I/O error" in caplog.text


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


# The order towards the charger.


def test_what_waits_for_the_disk_is_not_overtaken(play: Play) -> None:
    """A charging profile for a transaction comes after the answer that names it."""
    stage = play()
    stage.starts("PRIM1", "1")
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.texts == []
    profile = {"connectorId": 1, "csChargingProfiles": {"transactionId": 7}}
    stage.primary.calls("p", "SetChargingProfile", **profile)
    assert stage.charger.texts == []
    assert [message[1] for message in stage.charger.hears()] == ["1", "p"]


def test_what_waits_for_its_turn_only_is_not_overtaken_either(play: Play) -> None:
    """The disk is at one save, more texts come for the next, and more when the first is done."""
    stage = play()
    with slow_disk(stage) as finish:
        stage.starts("PRIM1", "1")
        stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
        stage.journal.settle()
        stage.primary.calls("2", "GetConfiguration")
        finish()
        stage.charger.calls("3", "Heartbeat")
        stage.primary.answers("3", currentTime="t")
    assert [message[1] for message in stage.charger.hears()] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["Started", "Updated"])
@pytest.mark.parametrize("badge", ["PRIM1", "SECO1"])
def test_an_event_is_answered_once_its_transaction_is_on_disk(play: Play, kind: str, badge: str) -> None:
    """Also while the disk is at it already, and whoever answers: a kill forgets no owner."""
    stage = play(version="ocpp2.0.1")
    save(stage)
    with slow_disk(stage) as finish:
        token = {"idToken": badge, "type": "ISO14443"}
        payload = {"eventType": kind, "seqNo": 1, "transactionInfo": {"transactionId": "T"}, "idToken": token}
        stage.charger.calls("T1", "TransactionEvent", **payload)
        stage.journal.tick()
        if badge == "PRIM1":
            stage.primary.answers("T1", idTokenInfo={"status": "Accepted"})
        assert stage.charger.texts == []
        finish()
        save(stage)
        if badge == "PRIM1":
            finish()  # What has come since, its answer among it.
    assert [message[:2] for message in stage.charger.hears()] == [[3, "T1"]]
    stage.killed()
    assert [session.owner for session in stage.memory.sessions.values()] == [
        PRIMARY if badge == "PRIM1" else SECONDARY
    ]


def test_an_answer_goes_to_the_connection_that_asked(play: Play) -> None:
    """A charger that connects again meanwhile repeats its Call."""
    stage = play()
    stage.starts("SECO1", "1")
    old = stage.charger
    stage.charger_connects()
    assert stage.charger.hears() == []
    assert [message[1] for message in old.hears()] == []


# Bounds.


def test_beyond_the_bound_the_oldest_meter_values_go_for_good(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the disk, too; never a start or a stop; one WARNING, and a count that survives a kill."""
    monkeypatch.setattr(p, "MAX_STORED", 4)
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    for number in range(6):
        reads(stage, transaction_id, f"m{number}", n=number)
        stage.charger.hears()
    stops(stage, transaction_id)
    killed(stage)
    assert stage.memory.dropped == 4
    told = [record.getMessage() for record in caplog.records if "are dropped" in record.getMessage()]
    limit = "CP1: 4 stored Calls wait; for each new one the oldest meter values are dropped"
    assert told == [f"{limit}: 1 so far"]
    delivered = stage.delivers()
    assert [payload.get("n") for _, payload in delivered] == [None, 4, 5, None]
    assert delivered[-1][0] == "StopTransaction"


def test_the_bound_counts_while_the_disk_fails_as_well(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings that came and went meanwhile leave nothing behind, in memory or on disk."""
    monkeypatch.setattr(p, "MAX_STORED", 4)
    stage = play("primary_grace = 3600")
    transaction_id = stage.secondary_session()
    save(stage)
    with full_disk(stage):
        stage.secondary.lost()
        for number in range(50):
            reads(stage, transaction_id, f"m{number}", n=number)
            waits(stage, 1)
        assert len(stage.memory.stored) == len(stage.outbox(SECONDARY).stored) == 4
    waits(stage, 2)
    assert [message[1] for message in stage.charger.hears()] == [f"m{number}" for number in range(50)]
    assert stage.relay.held == []
    ((count,),) = stage.journal.database.execute("SELECT count(*) FROM calls")
    assert (count, stage.memory.dropped) == (4, 46)
    killed(stage)
    assert [payload["n"] for _, payload in stage.delivers()] == [46, 47, 48, 49]


def test_a_charger_that_waits_for_a_disk_is_closed_after_the_grace(play: Play) -> None:
    """So that its own queue takes over; one that waits for nothing stays."""
    stage = play()
    with full_disk(stage):
        stage.charger.calls("h", "Heartbeat")
        waits(stage, 1)
        stage.starts("SECO1")
        waits(stage, 12)
        assert stage.charger.closed_with is None
        waits(stage, 4)
        assert stage.charger.closed_with == (1012, "what it says cannot be kept")
        assert stage.charger.texts == []


@pytest.mark.parametrize("bound", ["MAX_STORED", "MAX_STORED_TEXT"])
def test_a_bound_of_starts_and_stops_alone_drops_nothing(
    play: Play, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """What is beyond it stays unanswered, so that the charger keeps it until there is room."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1", "s0")
    number = told_id(stage)
    monkeypatch.setattr(p, bound, 1)
    stops(stage, number, "e0")
    stage.starts("SECO1", "s1", meter=1)
    stage.starts("PRIM1", "p", connector=2)
    assert stage.charger.hears() == []
    assert [message[1] for message in stage.primary.hears()] == ["p"]
    monkeypatch.undo()
    killed(stage)
    stops(stage, number, "e0")
    assert stage.charger.hears() == [[3, "e0", {}]]
    assert named(stage.delivers()) == [("StartTransaction", None), ("StopTransaction", 71)]
    stage.starts("SECO1", "s1", meter=1)
    assert [message[1] for message in stage.charger.hears()] == ["s1"]
    assert named(stage.delivers()) == [("StartTransaction", None)]
    assert stage.memory.dropped == 0


def test_a_stop_that_there_is_no_room_for_is_answered_when_it_comes_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session goes on until then."""
    stage = play()
    stage.starts("SECO1")
    number = told_id(stage)
    stage.secondary.hears()
    with monkeypatch.context() as full:
        full.setattr(p, "MAX_STORED", 0)
        stops(stage, number, "e1")
        assert stage.charger.hears() == []
    stops(stage, number, "e2")
    assert stage.charger.hears() == [[3, "e2", {}]]
    assert left(stage) == ["StartTransaction", "StopTransaction"]


@pytest.mark.parametrize("version", ["ocpp1.6", "ocpp2.0.1"])
def test_what_there_is_no_room_for_changes_nothing_until_it_comes_again(
    play: Play, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop, and events with and without an owner; also where the secondary would be waited for."""
    stage = play(FORWARD, version=version)
    stage.secondary.lost()
    stage.passes(6)
    with monkeypatch.context() as full:
        full.setattr(p, "MAX_STORED", 0)
        if version == "ocpp1.6":
            stage.starts("SECO1")
        else:
            event(stage, 0, "Started")
            event(stage, 1, badge="SECO1", name="U")
        assert stage.charger.hears() == []
        assert left(stage) == []
    if version == "ocpp1.6":
        stage.starts("SECO1")
        assert told_id(stage)
    else:
        assert event(stage, 0, "Started")
        assert event(stage, 1, badge="SECO1", name="U")


def test_the_bound_is_one_for_both_servers(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest reading goes, whichever server it is for."""
    monkeypatch.setattr(p, "MAX_STORED", 6)
    stage = play(version="ocpp2.0.1")
    for number in range(3):
        event(stage, number, "Updated" if number else "Started")
    event(stage, 3, badge="PRIM1")
    stage.passes(1)
    stage.secondary.lost()
    for number in range(4):
        event(stage, number, "Updated" if number else "Started", "SECO1", name="U")

    def sequence(peer: p.Peer) -> list[int]:
        return [call.content.payload["seqNo"] for call in stage.waiting(peer)]

    assert (sequence(PRIMARY), sequence(SECONDARY)) == ([0, 2], [0, 1, 2, 3])
    killed(stage)
    assert (sequence(PRIMARY), sequence(SECONDARY)) == ([0, 2], [0, 1, 2, 3])


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


def test_a_charger_that_is_connected_is_never_forgotten(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others come; its next session would be nobody's."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 1)
    stage = play()
    stage.journal.memory("other")
    assert stage.journal.memory("CP1") is stage.memory
