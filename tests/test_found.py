"""Rare turns: two faults at once, a repeat at the wrong moment, a table that is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import (
    FORWARD,
    event,
    forgotten,
    full_disk,
    killed,
    left,
    numbers,
    reads,
    refused,
    save,
    stops,
    told_id,
)
from tests.play.plays import Stage, StageLink, actions

PRIMARY, SECONDARY = p.Peer.PRIMARY, p.Peer.SECONDARY
ACCEPTED = {"status": "Accepted"}


def accepts_all(link: StageLink) -> list[tuple[str, dict[str, Any]]]:
    """Let a server accept whatever it is sent; return Actions and payloads."""
    accepted: list[tuple[str, dict[str, Any]]] = []
    while heard := link.hears():
        for _, message_id, action, payload in heard:
            accepted.append((action, payload))
            link.answers(message_id, status="Accepted", currentTime="x", interval=300)
    return accepted


def start_refused(stage: Stage, badge: str = "SECO1") -> Any:
    """Let the secondary refuse a start for good; return the transaction id that the charger hears."""
    stage.starts(badge, "x")
    transaction_id = told_id(stage)
    for seconds in (*p.RETRY_SECONDS, 0.0):
        stage.secondary.errs(stage.secondary.hears_call()[0])
        stage.passes(seconds)
    return transaction_id


def retried(stage: Stage, utc: float) -> list[str]:
    """Let it be time for the daily retry; return the Actions of what the secondary gets."""
    stage.memory.retry(utc)
    stage.relay.deliver()
    stage.passes(6)
    return [action for action, _ in stage.delivers() if action != "Heartbeat"]


# Whose it is.


@pytest.mark.parametrize("badge", ["PRIM", "SECO"])
def test_an_event_that_names_two_transactions_reaches_their_owner_unchanged(badge: str) -> None:
    """And so does what comes behind it."""
    stage = Stage(version="ocpp2.0.1")
    link = stage.primary if badge == "PRIM" else stage.secondary
    for name in ("T1", "T2"):
        event(stage, 0, "Started", badge + name, name)
        link.answers(link.hears_call()[0])
    named = [{"transactionId": "T1"}, {"transactionId": "T2"}]
    stage.charger.calls("n", "NotifyEvent", eventData=named)
    message_id, action, payload = link.hears_call()
    assert (action, payload) == ("NotifyEvent", {"eventData": named})
    link.answers(message_id)
    event(stage, 1, "Ended", name="T1")
    assert link.hears_call()[2]["seqNo"] == 1


@pytest.mark.parametrize("how", ["the primary is lost", "the charger takes over", "the proxy is killed"])
def test_a_start_that_the_primary_asked_for_is_still_its_own_when_repeated(how: str, tmp_path: Path) -> None:
    """The badge is the secondary's; the remote start was used up by a start that nobody answered."""
    stage = Stage(state=tmp_path / "state.db")
    stage.primary.calls("r", "RemoteStartTransaction", idTag="SECO1")
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    stage.primary.hears()
    stage.starts("SECO1", "s1")
    assert stage.primary.hears_call()[1] == "StartTransaction"
    if how == "the primary is lost":
        stage.primary.lost()
        stage.primary_connects()
    elif how == "the charger takes over":
        old = stage.primary
        stage.charger_connects()
        old.lost()
    else:
        killed(stage)
    stage.starts("SECO1", "s2")
    assert "StartTransaction" in [action for action, _ in accepts_all(stage.primary)]
    assert "StartTransaction" not in [action for action, _ in stage.delivers()]


def test_readings_on_the_connector_of_a_rejected_start_are_the_stations() -> None:
    """The primary sees them as it does those of any idle connector."""
    stage = Stage("unknown_rfid = reject")
    stage.starts("STRANGER")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Invalid"}
    stage.charger.calls("m", "MeterValues", connectorId=1, meterValue=[])
    assert stage.primary.hears() == [[2, "m", "MeterValues", {"connectorId": 1, "meterValue": []}]]


def test_a_transaction_whose_id_is_used_again_before_it_had_an_owner_is_the_primarys() -> None:
    """It has no end, and no badge can come any more."""
    stage = Stage(version="ocpp2.0.1")
    for timestamp in ("t1", "t2"):
        info = {"transactionInfo": {"transactionId": "T"}, "seqNo": 0, "timestamp": timestamp}
        stage.charger.calls(timestamp, "TransactionEvent", eventType="Started", **info)
    stage.passes(p.MADE_UP_BOOT_SECONDS)
    assert [payload["timestamp"] for _, payload in accepts_all(stage.primary)] == ["t1"]
    assert left(stage, PRIMARY) == []
    event(stage, 1, "Ended")
    heard = [payload.get("timestamp") for _, payload in accepts_all(stage.primary)]
    assert heard == ["t2", None]


def test_a_transaction_that_the_connector_ends_without_an_owner_is_the_primarys() -> None:
    """Available says that nothing charges there; but a badge may come late, so that a week passes first."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}, "seqNo": 0, "evse": {"id": 1}}
    stage.charger.calls("e", "TransactionEvent", eventType="Started", **info)
    stage.charger.calls("a", "StatusNotification", evseId=1, connectorId=1, connectorStatus="Available")
    assert [action for action, _ in accepts_all(stage.primary)] == ["StatusNotification"]
    stage.relay.carry_out(stage.sweeps(p.SESSION_SECONDS + 1))
    assert numbers(accepts_all(stage.primary)) == [0]
    assert stage.memory.stored == {}


# What a server leaves unanswered, or refuses.


def test_an_answer_takes_its_own_call_from_the_outbox() -> None:
    """The daily retry has put an older session in front of the one in flight; both arrive."""
    stage = Stage()
    stops(stage, start_refused(stage))
    stage.charger.hears()
    stage.starts("SECO2", "y", connector=2)
    message_id = stage.secondary.hears_call()[0]
    stage.memory.retry(stage.now().utc)
    stage.relay.deliver()
    stage.secondary.answers(message_id, transactionId=9, idTagInfo=ACCEPTED)
    delivered = stage.delivers()
    assert [action for action, _ in delivered] == ["StartTransaction", "StopTransaction"]
    assert delivered[0][1]["idTag"] == "SECO1"
    assert left(stage) == []


def test_a_session_whose_start_is_too_old_to_be_tried_again_is_not_sent_without_it() -> None:
    """Its stop is younger; to its server it would belong to nothing."""
    stage = Stage()
    transaction_id = start_refused(stage)
    for _ in range(60):
        stage.passes(60)
        stage.delivers()
    stops(stage, transaction_id)
    start, stop = stage.memory.refused
    assert retried(stage, (start.since + stop.since) / 2 + p.REFUSED_SECONDS) == []
    assert [action for action, _ in refused(stage)] == ["StartTransaction", "StopTransaction"]


def test_of_too_much_that_is_refused_readings_go_before_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of them; what is left can be tried again as a session."""
    monkeypatch.setattr(p, "MAX_REFUSED", 4)
    stage = Stage()
    transaction_id = start_refused(stage)
    for number in range(4):
        reads(stage, transaction_id, f"m{number}", n=number)
    stops(stage, transaction_id)
    kept = [(call.action, call.content.payload.get("n")) for call in stage.memory.refused]
    readings = [("MeterValues", 2), ("MeterValues", 3)]
    assert kept == [("StartTransaction", None), *readings, ("StopTransaction", None)]
    actions_left = ["StartTransaction", "MeterValues", "MeterValues", "StopTransaction"]
    assert retried(stage, stage.now().utc) == actions_left


@pytest.mark.parametrize("unanswered", [1, 2])
def test_kept_events_that_the_primary_never_answers_hold_back_no_other_transaction(unanswered: int) -> None:
    """After two minutes the next one has its turn."""
    stage = Stage(version="ocpp2.0.1")
    names = [f"T{number}" for number in range(unanswered + 1)]
    for name in names:
        event(stage, 0, "Started", name=name)
        event(stage, 1, "Ended", "PRIM1", name=name)
    heard = []
    for _ in range(unanswered + 1):
        stage.passes(p.DELIVERY_SECONDS + 10)
        heard += [
            m[3]["transactionInfo"]["transactionId"] for m in stage.primary.hears() if m[3]["seqNo"] == 0
        ]
    assert heard == names


def test_a_kept_event_that_the_primary_never_answers_does_not_hold_back_its_own_transaction() -> None:
    """The events that are relayed still go, however late it is."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started")
    event(stage, 1, badge="PRIM1")
    stage.passes(p.DELIVERY_SECONDS + 10)
    assert [message[3]["seqNo"] for message in stage.primary.hears()] == [0, 1]
    event(stage, 2, "Ended")
    assert stage.primary.hears_call()[2]["seqNo"] == 2


def test_heartbeats_that_the_secondary_never_answers_hold_back_no_session() -> None:
    """It wants one each second, and each holds the place for five; they do not pile up either."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.charger.calls("boot", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.answer_boot(interval=1)
    stage.passes(600)
    assert set(actions(stage.secondary.hears())) == {"Heartbeat"}
    assert len(stage.outbox(SECONDARY).own) <= 1
    stage.starts("SECO1")
    stage.passes(3 * p.PASSING_SECONDS)
    assert "StartTransaction" in actions(stage.secondary.hears())


def test_a_stored_call_that_many_others_have_outlived_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many were sent behind it that a late answer would not be known; the next connection carries it."""
    monkeypatch.setattr(p, "MAX_LATE", 3)
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started")
    event(stage, 1, "Ended", "PRIM1")
    assert stage.primary.hears_call()[2]["seqNo"] == 0
    for number in range(5):
        stage.charger.calls(f"h{number}", "Heartbeat")
        stage.passes(31)
    stage.primary.hears()
    stage.primary.lost()
    stage.primary_connects()
    assert numbers(accepts_all(stage.primary)) == [0]
    assert left(stage, PRIMARY) == []


def test_a_repeat_that_is_still_in_the_queue_is_answered_by_the_late_answer() -> None:
    """It needs not go out: the primary has the session."""
    stage = Stage()
    stage.starts("PRIM1", "s1")
    stage.primary.hears()
    stage.charger.calls("h", "Heartbeat")
    stage.passes(31)
    assert actions(stage.primary.hears()) == ["Heartbeat"]
    stage.starts("PRIM1", "s2")
    stage.primary.answers("s1", transactionId=7, idTagInfo=ACCEPTED)
    stage.primary.answers("h", currentTime="x")
    assert stage.charger.hears() == [
        [3, "s2", {"transactionId": 7, "idTagInfo": ACCEPTED}],
        [3, "h", {"currentTime": "x"}],
    ]
    assert stage.primary.hears() == []


def test_the_id_that_a_repeat_was_told_stays_when_the_secondary_names_another_later() -> None:
    """`forward`: the charger goes by it, so its stop finds the session."""
    stage = Stage(f"{FORWARD}\nsecondary_auth = forward")
    stage.starts("SECO1", "a")
    assert stage.charger.hears() == []
    stage.charger.lost()
    stage.passes(1)
    forgotten(stage)
    stage.charger_connects()
    stage.starts("SECO1", "b")
    transaction_id = told_id(stage)
    stage.secondary_connects()
    message_id, action, _ = stage.secondary.hears_call()
    assert action == "StartTransaction"
    stage.secondary.answers(message_id, transactionId=7, idTagInfo=ACCEPTED)
    stops(stage, transaction_id)
    ((action, payload),) = stage.delivers()
    assert (action, payload["transactionId"]) == ("StopTransaction", 7)
    assert refused(stage) == []


def test_a_control_character_in_an_answer_does_not_cut_the_charger_that_repeats() -> None:
    """Strict JSON forbids it, the primary sends it; what it has refused may be tried again."""
    stage = Stage()
    stage.starts("PRIM1", "s1")
    stage.primary.hears()
    invalid = '{"transactionId":0,"idTagInfo":{"status":"Invalid","parentIdTag":"A\x01"}}'
    stage.primary.says(f'[3,"s1",{invalid}]')
    assert '"Invalid","parentIdTag":"A\x01"' in stage.charger.hears_text()
    stage.starts("PRIM1", "s2")
    assert stage.primary.hears_call()[:2] == ("s2", "StartTransaction")


# The disk.


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


def test_relayed_events_of_a_transaction_with_a_late_badge_go_on_while_the_disk_fails() -> None:
    """What was kept of it waits for the disk; the driver does not."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started")
    with full_disk(stage):
        event(stage, 1, badge="PRIM1")
        stage.passes(20)
        assert stage.primary.hears_call()[:2] == ("T1", "TransactionEvent")
        stage.primary.answers("T1", idTokenInfo=ACCEPTED)
        assert stage.charger.hears() == [[3, "T1", {"idTokenInfo": ACCEPTED}]]
        event(stage, 2)
        assert stage.primary.hears_call()[:2] == ("T2", "TransactionEvent")
        stage.primary.answers("T2")
    save(stage)
    stage.passes(20)
    assert numbers(accepts_all(stage.primary)) == [0]


def test_an_answer_that_is_cut_from_too_many_held_ones_is_given_to_a_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fails for long; once it is back the charger starts again."""
    monkeypatch.setattr(p, "MAX_HELD", 3)
    stage = Stage()
    with full_disk(stage):
        stage.starts("SECO1", "s1")
        for number in range(3):
            stage.charger.calls(f"m{number}", "MeterValues", connectorId=1, meterValue=[], n=number)
    stage.passes(2)
    assert [message[1] for message in stage.charger.hears()] == ["m0", "m1", "m2"]
    stage.starts("SECO1", "s2")
    ((_, message_id, payload),) = stage.charger.hears()
    assert (message_id, payload["idTagInfo"]) == ("s2", ACCEPTED)
    assert len(stage.memory.sessions) == 1


# What a server asks for.


def test_a_server_that_is_connected_in_another_version_cannot_reach_the_charger() -> None:
    """It is there to take what is left of that version; its Calls would mean nothing to the charger."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    event(stage, 1, "Ended")
    stage.secondary.lost()
    stage.charger_connects("ocpp1.6")
    stage.charger.hears()
    stage.outbox(SECONDARY).dial()
    stage.secondary = stage.connects(SECONDARY)
    assert stage.outbox(SECONDARY).version == "ocpp2.0.1"
    stage.secondary.hears()
    stage.secondary.calls("r", "Reset", type="Immediate")
    assert [message[:3] for message in stage.secondary.hears()] == [[4, "r", "GenericError"]]
    assert stage.charger.hears() == []


@pytest.mark.parametrize("kind", [["V2GRootCertificate"], {"a": 1}])
def test_a_certificate_type_that_is_no_text_is_refused(kind: object) -> None:
    """The secondary may install only what the car needs, and this is nothing that it is known to need."""
    stage = Stage(version="ocpp2.0.1")
    stage.secondary.calls("i", "InstallCertificate", certificateType=kind, certificate="x")
    assert stage.secondary.hears() == [[3, "i", {"status": "Rejected"}]]
    assert stage.charger.hears() == []
