"""Faults of the Outbox and of the Journal that a reader found; each test failed before its mend."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import PRIMARY, event, full_disk, left, reads, save, waits
from tests.play.plays import Stage, StageJournal, actions


def settled_at_the_primary(stage: Stage, events: int) -> None:
    """Let so many events of a transaction be kept, until its end tells that it is the primary's."""
    for number in range(events):
        event(stage, number, "Updated" if number else "Started")
    event(stage, events, "Ended", "PRIM1")


def test_stored_calls_that_the_primary_never_answers_push_no_relayed_one_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their late answers count without a bound; a relayed Call keeps its own place."""
    monkeypatch.setattr(p, "MAX_LATE", 3)
    stage = Stage(version="ocpp2.0.1")
    settled_at_the_primary(stage, 6)
    stage.passes(p.DELIVERY_SECONDS + 10 * 31)
    assert len(left(stage, PRIMARY)) == 6
    stage.primary.hears()
    stage.charger.calls("h", "Heartbeat")
    stage.primary.answers("h", currentTime="x")
    assert stage.charger.hears() == [[3, "h", {"currentTime": "x"}]]


def test_a_stored_call_that_is_skipped_lets_no_others_pass_the_disk() -> None:
    """A kill repeats one Call at most, also while the primary leaves one unanswered and the disk fails."""
    stage = Stage(version="ocpp2.0.1")
    settled_at_the_primary(stage, 4)
    assert stage.primary.hears_call()[2]["seqNo"] == 0
    save(stage)
    stage.passes(p.DELIVERY_SECONDS + 1)
    with full_disk(stage):
        while heard := stage.primary.hears():
            for _, message_id, action, payload in heard:
                assert (action, payload["seqNo"]) in [("TransactionEvent", 1), ("TransactionEvent", 4)]
                stage.primary.answers(message_id)
            stage.passes(1)
    waits(stage, 2)
    assert stage.primary.hears_call()[2]["seqNo"] == 2


def test_what_is_tried_again_does_not_pass_a_call_that_is_on_its_way() -> None:
    """One stored Call at a time, also on the day's second chance of what was refused."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    stage.secondary.errs(stage.secondary.hears_call()[0])
    assert [call.action for call in stage.memory.refused] == ["MeterValues"]
    stage.charger.calls("e", "StopTransaction", transactionId=transaction_id, meterStop=5, timestamp="t")
    message_id, action, _ = stage.secondary.hears_call()
    assert action == "StopTransaction"
    stage.passes(40)
    stage.memory.retry(stage.now().utc)
    stage.relay.deliver()
    stage.passes(5)
    assert stage.secondary.hears() == []
    stage.secondary.answers(message_id)
    assert actions(stage.secondary.hears()) == ["MeterValues"]


# The Journal.


def test_who_waits_for_the_next_save_need_not_wait_for_the_watchdog() -> None:
    """Two chargers whose stored Calls are delivered one after the other, without a tick in between."""
    turns: Counter[str] = Counter()

    async def play() -> None:
        journal = p.Journal(p.current_instant)
        done = asyncio.Event()

        def take_turn(name: str) -> None:
            turns[name] += 1
            memory = journal.memory(name)
            memory.note(memory)
            if turns[name] < 20:
                journal.wait(takers[name])
            elif min(turns.values()) == 20:
                done.set()

        takers = {name: partial(take_turn, name) for name in ("A", "B")}
        for taker in takers.values():
            journal.wait(taker)
        async with asyncio.timeout(5):
            await done.wait()
        await journal.close()

    asyncio.run(play())
    assert turns == {"A": 20, "B": 20}


def test_a_charger_that_comes_back_while_the_disk_fails_is_not_forgotten_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old row is removed before its new one is written, however often that fails."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    now = Stage(connect=False).now
    journal = StageJournal(now, tmp_path / "state.db")
    journal.memory("A")
    journal.memory("B")
    journal.save()
    jobs: list[Any] = []
    with patch.object(journal, "_run", lambda _, then: jobs.append(then)):
        journal.memory("C")  # In the place of A,
        journal.save()
        journal.memory("A")  # which comes again, in the place of B, while the disk is slow
        jobs.pop()("full")  # and fails.
    journal.save()
    assert journal.failure == ""
    journal.database.close()
    assert set(StageJournal(now, tmp_path / "state.db").memories) == {"A", "C"}


def test_readings_that_come_and_go_while_the_disk_fails_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What had to go before it was ever on disk is nothing that the disk has to forget."""
    monkeypatch.setattr(p, "MAX_STORED", 5)
    stage = Stage(state=tmp_path / "state.db")
    transaction_id = stage.secondary_session()
    stage.secondary.lost()
    save(stage)
    with full_disk(stage):
        for number in range(100):
            reads(stage, transaction_id, f"m{number}", n=number)
            save(stage)
        assert len(stage.memory.stored) == 5
        assert len(stage.journal.pending) <= 5 + 2  # And the session and the charger.
    save(stage)
    stage.killed()
    assert [call.content.payload["n"] for call in stage.memory.stored] == [95, 96, 97, 98, 99]
    assert len({call.number for call in stage.memory.stored}) == 5
