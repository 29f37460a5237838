"""Plays of what the others leave open: each notices a fault of the routing that no other play notices."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import (
    FORWARD,
    OTHER_SECONDARY,
    PRIMARY,
    SECONDARY,
    Play,
    come_back,
    event,
    full_disk,
    killed,
    left,
    named,
    numbers,
    reads,
    save,
    slow_disk,
    stops,
    waits,
)
from tests.play.plays import Stage, actions

FIRST = p.FIRST_PROXY_ID
LAST = p.MAX_ID


def rows(stage: Stage) -> list[dict[str, Any]]:
    """Return what the file tells of sessions."""
    save(stage)
    return [dict(row) for row in stage.journal.database.execute("SELECT * FROM sessions")]


def remote_start(stage: Stage, badge: str, number: int | None = None) -> None:
    """Let the secondary start a badge remotely, and the charger accept."""
    if stage.version == "ocpp1.6":
        stage.secondary.calls("r", "RemoteStartTransaction", idTag=badge)
    else:
        token = {"idToken": badge, "type": "Central"}
        stage.secondary.calls("r", "RequestStartTransaction", idToken=token, remoteStartId=number)
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    stage.secondary.hears()


def needs_on(stage: Stage, evse: int) -> None:
    """Let the charger tell what the car on an EVSE needs."""
    stage.charger.calls("n", "NotifyEVChargingNeeds", evseId=evse, chargingNeeds={})


# What is remembered from one connection to the next.


def test_events_without_an_owner_are_owed(play: Play) -> None:
    """A proxy that starts again sees to them, although nothing is stored for a server yet."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started")
    assert [call.action for call in stage.waiting(None)] == ["TransactionEvent"]


def test_a_charger_with_an_open_session_is_not_forgotten_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it is away, and nothing is undelivered."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    stage = Stage()
    stage.primary_session()
    stage.memory.is_in_use = False
    for name in ("idle", "new", "newer"):
        stage.journal.memory(name)
    assert list(stage.journal.memories) == ["CP1", "newer"]


def test_beyond_a_bound_the_newest_stays() -> None:
    """The oldest request and the oldest status go."""
    stage = Stage()
    for number in range(p.MAX_ASKED + 1):
        stage.secondary.calls("r", "GetLog", requestId=number, log={})
        stage.charger.answers("r", status="Accepted")
    assert list(stage.memory.asked) == list(range(1, p.MAX_ASKED + 1))
    for number in range(p.MAX_STATUSES + 1):
        stage.charger.calls("n", "StatusNotification", connectorId=number, status="Available")
    assert str(p.MAX_STATUSES) in list(stage.memory.statuses.values())[-1]


# Whose a Call is.


@pytest.mark.parametrize("server_id", [FIRST, FIRST + 1, LAST - 1, LAST])
def test_an_id_from_either_end_of_the_proxys_range_is_not_told(server_id: int) -> None:
    """The charger would take it for one that names its owner."""
    stage = Stage()
    assert stage.primary_session(server_id=server_id) != server_id


def test_a_stop_badge_that_is_claimed_never_changes_the_owner() -> None:
    """The transaction comes before the remote start of the other server."""
    stage = Stage()
    stage.primary_session(server_id=7)
    remote_start(stage, "PRIM1")
    stops(stage, 7, idTag="PRIM1")
    assert stage.primary.hears_call()[1] == "StopTransaction"


@pytest.mark.parametrize("order", [["T1", "T2"], ["T2", "T1"]])
def test_a_report_on_transactions_of_both_is_the_primarys_in_any_order(order: list[str]) -> None:
    """The first that it names does not decide."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "PRIM1", "T1")
    event(stage, 0, "Started", "SECO1", "T2")
    stage.primary.answers("T10")
    stage.primary.hears()
    stage.charger.calls("n", "NotifyEvent", eventData=[{"transactionId": name} for name in order])
    assert stage.primary.hears_call()[0] == "n"


@pytest.mark.parametrize(("bit", "owner"), [(0, PRIMARY), (1, SECONDARY)])
def test_what_is_kept_of_a_forgotten_session_is_kept_for_its_owner(bit: int, owner: p.Peer) -> None:
    """The lowest bit of the id tells whose it was."""
    stage = Stage()
    stops(stage, FIRST + bit)
    (refusal,) = stage.memory.refused
    assert refusal.peer is owner
    assert refusal.server == f"ws://{owner.value}.example"


def test_what_is_kept_of_a_forgotten_session_is_no_session_in_the_file(play: Play) -> None:
    """Nobody knows when it began, or where."""
    stage = play()
    stops(stage, FIRST + 1)
    assert rows(stage) == []


def test_a_stop_of_minus_1_ends_the_session_whose_start_was_never_answered() -> None:
    """And not the one that has an id (OCPP 1.6 errata 3.18)."""
    stage = Stage()
    transaction_id = stage.secondary_session(connector=2)
    stage.starts("PRIM1", "lost", connector=1)
    stage.passes(31)
    stops(stage, -1)
    assert [session.badge for session in stage.memory.sessions.values() if session.ended] == ["PRIM1"]
    assert stage.memory.sessions[transaction_id].ended is None


def test_a_claim_vouches_for_its_badge() -> None:
    """Where the proxy stands in for the server that asked for the session."""
    stage = Stage("secondary_replies = forward")
    remote_start(stage, "STRANGER")
    stage.secondary.lost()
    stage.passes(6)
    stage.starts("STRANGER")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Accepted"}


def test_a_report_on_an_unknown_request_is_the_primarys() -> None:
    """The server that asked last asked for something else."""
    stage = Stage(version="ocpp2.0.1")
    stage.secondary.calls("s", "UpdateFirmware", requestId=1, firmware={})
    stage.charger.answers("s", status="Accepted")
    stage.charger.calls("1", "FirmwareStatusNotification", status="Installed", requestId=2)
    assert actions(stage.primary.hears()) == ["FirmwareStatusNotification"]


# Verdicts.


def test_a_verdict_on_a_token_counts(caplog: pytest.LogCaptureFixture) -> None:
    """In 2.x it stands elsewhere."""
    caplog.set_level("INFO")
    stage = Stage("secondary_replies = forward", version="ocpp2.0.1")
    token = {"idToken": {"idToken": "STRANGER", "type": "ISO14443"}}
    remote_start(stage, "STRANGER", 1)
    for status in ("Accepted", "Blocked"):
        stage.charger.calls(status, "Authorize", **token)
        stage.secondary.answers(stage.secondary.hears_call()[0], idTokenInfo={"status": status})
        assert stage.charger.hears()[0][2] == {"idTokenInfo": {"status": status}}
    assert "answers Authorize with status Blocked" in caplog.text


@pytest.mark.parametrize("number", [1, 2])
def test_a_rejected_transaction_stays_rejected(number: int) -> None:
    """A repeated event of it gets the same verdict as a new one."""
    stage = Stage("unknown_rfid = reject", version="ocpp2.0.1")
    event(stage, 1, "Started", "STRANGER")
    assert event(stage, number, badge="STRANGER")[0][2] == {"idTokenInfo": {"status": "Invalid"}}


# What concerns the station.


def test_a_session_that_sends_meter_values_is_not_silent() -> None:
    """It counts as ended a week after the last of them, not a week after its start."""
    stage = Stage()
    stage.primary_session(server_id=7)
    stage.time += p.SESSION_SECONDS - 1
    reads(stage, 7)
    stage.time += 2
    stage.relay.router.sweep(stage.now())
    assert stage.memory.sessions[7].ended is None


def test_the_connector_that_was_silent_for_longest_loses_its_status() -> None:
    """Beyond the bound; not the one that was heard of first."""
    stage = Stage()
    for number in [*range(1, p.MAX_STATUSES + 1), 1, p.MAX_STATUSES + 1]:
        stage.charger.calls("n", "StatusNotification", connectorId=number, status="Charging")
    heard = [where for where in ("[1,1]", "[2,2]") if where in stage.memory.statuses]
    assert heard == ["[1,1]"]


def test_a_connector_that_is_not_available_keeps_its_session() -> None:
    """Its meter values are the session's."""
    stage = Stage()
    stage.secondary_session(connector=1)
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
    stage.primary.answers("n")
    stage.delivers()
    reads(stage, None)
    assert [action for action, _ in stage.delivers()] == ["MeterValues"]


def test_a_report_that_is_copied_reaches_the_server_that_asked_once() -> None:
    """What is its own needs no copy."""
    stage = Stage("secondary_copies = DiagnosticsStatusNotification")
    stage.secondary.calls("g", "GetDiagnostics", location="ftp://x")
    stage.charger.answers("g")
    stage.secondary.hears()
    stage.charger.calls("1", "DiagnosticsStatusNotification", status="Uploading")
    assert [action for action, _ in stage.delivers()] == ["DiagnosticsStatusNotification"]


# Sessions of OCPP 1.6.


def test_a_start_that_the_proxy_itself_rejected_is_joined_by_its_repeat() -> None:
    """Only its owner's verdict makes a session that is tried again."""
    stage = Stage("unknown_rfid = reject")
    stage.starts("STRANGER", "s1")
    ((_, _, first),) = stage.charger.hears()
    stage.starts("STRANGER", "s2")
    assert stage.charger.hears() == [[3, "s2", first]]
    assert len(stage.memory.sessions) == 1


def test_a_start_that_was_answered_without_a_verdict_is_joined_by_its_repeat() -> None:
    """Nobody has refused it."""
    stage = Stage()
    stage.starts("PRIM1", "s1")
    stage.primary.hears()
    stage.primary.answers("s1", transactionId=7)
    stage.starts("PRIM1", "s2")
    assert stage.charger.hears() == [[3, "s1", {"transactionId": 7}], [3, "s2", {"transactionId": 7}]]
    assert stage.primary.hears() == []


def test_a_repeat_that_hears_a_late_answer_has_heard_it() -> None:
    """A stop of -1 is then not taken for the stop of that session."""
    stage = Stage()
    stage.secondary_session(connector=2)
    stage.starts("PRIM1", "s1")
    stage.passes(31)
    stage.primary.answers("s1", transactionId=7, idTagInfo={"status": "Accepted"})
    stage.starts("PRIM1", "s2")
    assert stage.charger.hears()[-1][1:] == ["s2", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]
    stops(stage, -1)
    assert [session.ended for session in stage.memory.sessions.values()] == [None, None]


def test_a_session_that_takes_no_connector_survives_a_kill(play: Play) -> None:
    """Its start was not answered, and nothing else is known of it."""
    stage = play(FORWARD)
    stage.starts("SECO1", connector=0)
    assert stage.secondary.hears_call()[1] == "StartTransaction"
    killed(stage)
    stops(stage, -1)
    assert named(stage.delivers()) == [("StartTransaction", None), ("StopTransaction", 71)]


def test_the_file_shows_that_a_forgotten_session_was_delivered(play: Play) -> None:
    """Its server came back after the week in which it could be named."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    stops(stage, stage.charger.hears()[0][2]["transactionId"])
    stage.time += p.SESSION_SECONDS + 1
    stage.relay.carry_out(stage.relay.router.sweep(stage.now()))
    assert stage.memory.sessions == {}
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()][1:] == ["StartTransaction", "StopTransaction"]
    (row,) = rows(stage)
    assert row["delivered"] == stage.now().utc


def test_the_main_meter_is_no_sessions() -> None:
    """Connector 0 is the whole station, though a session may be started there."""
    stage = Stage()
    stage.secondary_session(connector=0)
    reads(stage, None, connectorId=0)
    assert stage.primary.hears_call()[1] == "MeterValues"


# Transactions of OCPP 2.x.


def test_an_evse_that_is_named_late_survives_a_kill(play: Play) -> None:
    """Charging needs there are the transaction's."""
    stage = play(FORWARD, version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    stage.delivers()
    save(stage)
    info = {"transactionInfo": {"transactionId": "T"}, "evse": {"id": 2}}
    stage.charger.calls("T1", "TransactionEvent", eventType="Updated", seqNo=1, **info)
    stage.delivers()
    killed(stage)
    needs_on(stage, 2)
    assert actions(stage.secondary.hears()) == ["NotifyEVChargingNeeds"]


def test_a_transaction_that_sends_events_is_not_silent() -> None:
    """It counts as ended a week after the last of them, not a week after its first."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    stage.time += p.SESSION_SECONDS - 1
    event(stage, 1)
    stage.time += 2
    stage.relay.router.sweep(stage.now())
    assert stage.memory.sessions["T"].ended is None


def test_events_without_a_number_are_no_repeats() -> None:
    """A charger that leaves it out loses nothing."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    for message_id in ("a", "b"):
        info = {"transactionInfo": {"transactionId": "T"}}
        stage.charger.calls(message_id, "TransactionEvent", eventType="Updated", **info)
    assert len(stage.delivers()) == 3


def test_a_repeated_event_is_not_answered_while_the_disk_fails(play: Play) -> None:
    """The first of them is in memory only."""
    stage = play(version="ocpp2.0.1")
    with full_disk(stage):
        for _ in range(2):
            assert event(stage, 0, "Started", "SECO1") == []
            waits(stage, 5)
    waits(stage, 1.5)
    assert event(stage, 0, "Started", "SECO1")[-1] == [3, "T0", {"idTokenInfo": {"status": "Accepted"}}]
    assert numbers(stage.delivers()) == [0]


def test_an_event_without_an_owner_is_not_answered_while_the_disk_fails(play: Play) -> None:
    """It waits for its owner here, and nowhere else."""
    stage = play(version="ocpp2.0.1")
    with full_disk(stage):
        assert event(stage, 0, "Started") == []
    waits(stage, 1.5)
    assert stage.charger.hears() == [[3, "T0", {}]]


def test_the_badge_of_a_transaction_is_vouched_for_to_its_end() -> None:
    """The proxy that stands in for the owner does not refuse whom the owner has asked for."""
    stage = Stage(FORWARD, version="ocpp2.0.1")
    remote_start(stage, "STRANGER", 1)
    event(stage, 0, "Started", "STRANGER")
    stage.secondary.lost()
    stage.passes(6)
    stage.charger.hears()
    assert event(stage, 1, "Ended", "STRANGER")[0][2] == {"idTokenInfo": {"status": "Accepted"}}


def test_a_transaction_that_has_ended_takes_no_evse() -> None:
    """An event that comes after the last names it in vain."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    event(stage, 1, "Ended")
    stage.delivers()
    info = {"transactionInfo": {"transactionId": "T"}, "evse": {"id": 2}}
    stage.charger.calls("T2", "TransactionEvent", eventType="Updated", seqNo=2, **info)
    needs_on(stage, 2)
    assert actions(stage.primary.hears()) == ["NotifyEVChargingNeeds"]


def test_a_transaction_stays_on_the_evse_that_it_has_named_first() -> None:
    """So that it leaves none behind when it ends."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    for number, evse in ((1, 1), (2, 2)):
        info = {"transactionInfo": {"transactionId": "T"}, "evse": {"id": evse}}
        stage.charger.calls(str(number), "TransactionEvent", eventType="Updated", seqNo=number, **info)
    event(stage, 3, "Ended")
    assert (stage.memory.on_connector(1), stage.memory.on_connector(2)) == (None, None)


def test_a_2_x_transaction_never_reaches_another_server_than_its_own(play: Play) -> None:
    """What comes after its server was replaced is kept for the old one."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    assert numbers(stage.delivers()) == [0]
    killed(stage, OTHER_SECONDARY)
    event(stage, 1, "Ended")
    assert stage.delivers() == []
    assert left(stage) == ["TransactionEvent"]


def test_a_relayed_transaction_has_its_owner_over_a_kill(play: Play) -> None:
    """Although its first events were kept, which the disk knew it by."""
    stage = play(FORWARD, version="ocpp2.0.1")
    event(stage, 0, "Started")
    save(stage)
    event(stage, 1, badge="SECO1")
    save(stage)
    assert [row["owner"] for row in rows(stage)] == ["secondary"]
    killed(stage)
    assert numbers(stage.delivers()) == [0, 1]


def test_what_was_handed_over_is_owed_no_more() -> None:
    """Once its owner has answered it."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started")
    event(stage, 1, badge="SECO1")
    assert numbers(stage.delivers()) == [0, 1]
    assert stage.memory.stored == {}


# Answers of the servers.


def test_an_answer_to_the_connection_before_is_not_forwarded() -> None:
    """The charger that has come again has asked nothing yet."""
    stage = Stage(FORWARD)
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    message_id = stage.secondary.hears_call()[0]
    stage.charger_connects()
    stage.secondary.answers(message_id, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == []


def test_the_heartbeat_interval_that_the_charger_was_given_survives_a_kill(play: Play) -> None:
    """A charger that never answers Pings is given three times as long."""
    stage = play()
    save(stage)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    save(stage)
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=900)
    killed(stage)
    assert stage.memory.heartbeat_interval == 900


def test_an_answer_that_names_no_transaction_waits_for_no_disk(play: Play) -> None:
    """Even if something else is to be saved."""
    stage = play()
    save(stage)
    with slow_disk(stage) as finish:
        stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
        stage.primary.answers("n")
        assert stage.charger.hears() == [[3, "n", {}]]
        save(stage)
        finish()


def test_a_badge_that_one_server_has_accepted_is_not_accepted_for_the_other() -> None:
    """Each has its own customers."""
    stage = Stage(f"{FORWARD}\nunknown_rfid = secondary")
    stage.primary.calls("r", "RemoteStartTransaction", idTag="STRANGER")
    stage.charger.answers("r", status="Accepted")
    stage.starts("STRANGER")
    stage.primary.answers("s1", transactionId=7, idTagInfo={"status": "Accepted"})
    stage.secondary.lost()
    stage.passes(6)
    stage.charger.hears()
    stage.charger.calls("a", "Authorize", idTag="STRANGER")
    assert stage.charger.hears()[0][2] == {"idTagInfo": {"status": "Invalid"}}


def test_a_start_that_was_answered_in_the_owners_place_is_no_verdict_of_its_owner() -> None:
    """Its repeat joins it, though the proxy had to say Invalid."""
    stage = Stage(f"{FORWARD}\nunknown_rfid = secondary")
    stage.secondary.lost()
    stage.passes(6)
    stage.starts("STRANGER", "s1")
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()][-1] == "StartTransaction"
    first = stage.charger.hears()[-1][2]
    stage.starts("STRANGER", "s2")
    assert stage.charger.hears() == [[3, "s2", first]]
    assert len(stage.memory.sessions) == 1


def test_a_stop_that_is_repeated_on_the_next_connection_waits_for_the_disk_as_well(play: Play) -> None:
    """The first is stored for a charger that has gone; nothing of it is on disk yet."""
    stage = play(FORWARD)
    stage.starts("SECO1")
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    stage.charger.hears()
    with full_disk(stage):
        stops(stage, 7, "e1")
        stage.charger_connects()
        stops(stage, 7, "e2")
        stage.passes(11)  # Silent: the proxy would answer both.
        assert stage.charger.hears() == []
    waits(stage, 2)
    assert stage.charger.hears() == [[3, "e2", {}]]
    assert left(stage) == ["StopTransaction"]


def test_the_file_shows_that_a_start_was_refused(play: Play) -> None:
    """In its owner's words, for a session that has ended as well."""
    stage = play()
    stage.starts("SECO1")
    stops(stage, stage.charger.hears()[0][2]["transactionId"])
    save(stage)
    stage.waiting(SECONDARY)[0].tries = len(p.RETRY_SECONDS)
    stage.secondary.errs(stage.secondary.hears_call()[0])
    (row,) = rows(stage)
    assert (row["refused"], row["is_refused"]) == ("CallError InternalError", 1)


# Calls of the servers.


def test_nobody_stops_a_transaction_that_was_rejected() -> None:
    """The primary never heard of it."""
    stage = Stage("unknown_rfid = reject", version="ocpp2.0.1")
    event(stage, 0, "Started", "STRANGER")
    stage.primary.calls("x", "RequestStopTransaction", transactionId="T")
    assert stage.primary.hears() == [[3, "x", {"status": "Rejected"}]]
    assert stage.charger.hears() == []


@pytest.mark.parametrize("named", [12, "12"])
def test_a_server_that_quotes_its_ids_stops_its_session(named: object) -> None:
    """Whether it quotes them this time or not."""
    stage = Stage()
    stage.primary_session(server_id="12")  # type: ignore[arg-type]
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=named)
    assert stage.charger.hears_call() == ("x", "RemoteStopTransaction", {"transactionId": named})


def test_a_reservation_of_the_whole_station_counts_on_every_connector() -> None:
    """Connector 0 is any of them."""
    stage = Stage()
    expiry = p.Instant(0, stage.utc + stage.time + 3600).text
    stage.secondary.calls(
        "res", "ReserveNow", connectorId=0, idTag="PRIM1", reservationId=5, expiryDate=expiry
    )
    stage.charger.answers("res", status="Accepted")
    stage.secondary.hears()
    stage.starts("PRIM1", connector=1)
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_servers_second_remote_start_with_one_number_keeps_it() -> None:
    """Some servers say 1 every time; only the other server's number is in the way."""
    stage = Stage(version="ocpp2.0.1")
    remote_start(stage, "PRIM1", 1)
    token = {"idToken": "PRIM2", "type": "Central"}
    text = json.dumps([2, "r2", "RequestStartTransaction", {"idToken": token, "remoteStartId": 1}])
    stage.secondary.says(text)
    assert stage.charger.hears_text() == text


def test_a_remote_start_is_on_disk_before_the_charger_hears_of_it(play: Play) -> None:
    """The session that follows may outlive the proxy."""
    stage = play()
    save(stage)
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="PRIM1")
    assert stage.charger.texts == []
    assert stage.charger.hears_call()[0] == "r"
    stage.killed()
    come_back(stage)
    stage.starts("PRIM1")
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_claim_counts_from_the_moment_its_call_is_sent() -> None:
    """Not from the one when it had to wait for another."""
    stage = Stage()
    stage.primary.calls("busy", "GetConfiguration")
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="PRIM1")
    stage.passes(20)
    stage.charger.answers("busy", configurationKey=[])
    (claim,) = stage.memory.claims
    assert claim.until == stage.now().utc + p.CLAIM_SECONDS


# Answers of the charger.


def test_a_late_answer_counts_once() -> None:
    """Said again, it takes nothing away from a server that has asked since."""
    stage = Stage()
    stage.secondary.calls("s", "GetDiagnostics", location="ftp://x")
    stage.passes(31)
    stage.charger.answers("s")
    stage.primary.calls("p", "GetDiagnostics", location="ftp://y")
    stage.charger.answers("p")
    stage.charger.answers("s")
    stage.primary.hears()
    stage.charger.calls("1", "DiagnosticsStatusNotification", status="Uploaded")
    assert actions(stage.primary.hears()) == ["DiagnosticsStatusNotification"]


def test_a_server_cancels_its_own_reservation_only() -> None:
    """Both have given theirs the same number."""
    stage = Stage()
    expiry = p.Instant(0, stage.utc + stage.time + 3600).text
    for link, badge in ((stage.primary, "SECO1"), (stage.secondary, "PRIM1")):
        link.calls("r", "ReserveNow", connectorId=1, idTag=badge, reservationId=5, expiryDate=expiry)
        stage.charger.answers("r", status="Accepted")
    stage.secondary.calls("c", "CancelReservation", reservationId=5)
    stage.charger.answers("c", status="Accepted")
    assert [claim.badge for claim in stage.memory.claims] == ["seco1"]


def test_a_cancellation_without_a_number_cancels_no_remote_start() -> None:
    """Its schema forbids it; a charger that accepts it cannot mean one."""
    stage = Stage()
    remote_start(stage, "PRIM1")
    stage.secondary.calls("c", "CancelReservation")
    stage.charger.answers("c", status="Accepted")
    assert [claim.badge for claim in stage.memory.claims] == ["prim1"]


def test_a_remote_start_takes_no_transaction_from_its_owner() -> None:
    """Though the charger names it in its answer."""
    stage = Stage(version="ocpp2.0.1")
    event(stage, 0, "Started", "PRIM1")
    stage.primary.answers("T0", idTokenInfo={"status": "Accepted"})
    token = {"idToken": "SECO1", "type": "Central"}
    stage.secondary.calls("r", "RequestStartTransaction", idToken=token, remoteStartId=1)
    stage.charger.answers("r", status="Accepted", transactionId="T")
    assert stage.memory.sessions["T"].owner is PRIMARY


# Time.


def test_a_call_that_waits_unsent_is_given_up_in_time() -> None:
    """Not only when the charger has left the one before it unanswered as well."""
    stage = Stage()
    stage.passes(7)  # So that no Ping is due at the same time.
    for message_id in "abcd":
        stage.primary.calls(message_id, "ClearCache")
    stage.passes(20)
    stage.charger.answers("a", status="Accepted")
    stage.passes(40)
    assert [message[1] for message in stage.primary.hears()] == ["a", "b", "d"]


def test_what_waits_of_a_server_that_is_gone_never_reaches_the_charger() -> None:
    """Nobody would hear its answer."""
    stage = Stage()
    stage.primary.calls("busy", "GetConfiguration")
    stage.secondary.calls("x", "Reset", type="Soft")
    stage.secondary.lost()
    stage.charger.hears()
    stage.charger.answers("busy", configurationKey=[])
    assert stage.charger.hears() == []


def test_events_without_a_number_are_no_repeats_of_each_other() -> None:
    """Also where the proxy stands in for the secondary."""
    stage = Stage(FORWARD, version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    stage.delivers()
    stage.secondary.lost()
    for message_id in ("a", "b"):
        info = {"transactionInfo": {"transactionId": "T"}}
        stage.charger.calls(message_id, "TransactionEvent", eventType="Updated", marker=message_id, **info)
    stage.passes(6)
    assert left(stage) == ["TransactionEvent"] * 2


# What there is no room for.


def test_a_start_that_there_is_no_room_for_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charger hears nothing and keeps it; its repeat is stored."""
    stage = Stage()
    with monkeypatch.context() as full:
        full.setattr(p, "MAX_STORED", 0)
        stage.starts("SECO1")
        assert stage.charger.hears() == []
        assert stage.memory.stored == {}
    stage.starts("SECO1")
    assert stage.charger.hears()[0][0] == 3
    assert len(stage.memory.sessions) == len(stage.memory.stored) == 1


def test_an_event_without_an_owner_that_there_is_no_room_for_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor answered: the charger sends it again."""
    monkeypatch.setattr(p, "MAX_STORED", 0)
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}, "timestamp": "t", "triggerReason": "CablePluggedIn"}
    stage.charger.calls("e", "TransactionEvent", eventType="Started", seqNo=0, **info)
    assert stage.charger.hears() == []
    assert stage.memory.stored == {}


def test_an_event_whose_number_is_none_repeats_no_other() -> None:
    """`true` equals 1 for Python alone."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}, "timestamp": "t", "idToken": {"idToken": "SECO1"}}
    stage.charger.calls("1", "TransactionEvent", eventType="Started", seqNo=1, **info)
    stage.charger.calls("2", "TransactionEvent", eventType="Updated", seqNo=True, **info)
    assert len(stage.waiting(SECONDARY)) == 2


# What a server that answers the charger itself has against a session: kept, for people to see.


def test_what_a_server_has_against_a_start_is_kept_until_it_accepts_it() -> None:
    """The charger has heard it, and may try again."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.primary.errs("1")
    (session,) = stage.memory.sessions.values()
    assert session.refused == "CallError InternalError"
    stage.starts("PRIM1", "2")
    stage.primary.answers("2", transactionId=7, idTagInfo={"status": "Accepted"})
    assert [session.refused for session in stage.memory.sessions.values()] == [""]


@pytest.mark.parametrize("answer", [{}, {"idTagInfo": {"status": "Expired"}}, None])
def test_a_stop_is_refused_by_a_call_error_alone(answer: dict[str, Any] | None) -> None:
    """A badge that has expired meanwhile has been stopped all the same."""
    stage = Stage()
    number = stage.primary_session()
    stops(stage, number)
    if answer is None:
        stage.primary.errs("e")
    else:
        stage.primary.answers("e", **answer)
    session = stage.memory.sessions[number]
    assert (session.refused, session.delivered is None) == ("", answer is None)


@pytest.mark.parametrize("accepted_first", [True, False])
def test_a_stop_that_is_accepted_once_is_accepted(accepted_first: bool) -> None:
    """Whatever the server says to its repeat; a start that it has refused stays refused."""
    stage = Stage()
    number = stage.primary_session()
    for message_id in ("1", "2"):
        stage.charger.calls(message_id, "StopTransaction", transactionId=number, meterStop=1, timestamp="t")
        if (message_id == "1") == accepted_first:
            stage.primary.answers(message_id)
        else:
            stage.primary.errs(message_id)
    session = stage.memory.sessions[number]
    assert session.delivered is not None
    assert session.refused == ""


def test_a_report_on_an_evse_does_not_belong_to_the_session_there() -> None:
    """Only meter values and charging needs do."""
    stage = Stage(version="ocpp2.0.1")
    started = {
        "eventType": "Started",
        "seqNo": 0,
        "transactionInfo": {"transactionId": "T"},
        "evse": {"id": 1},
    }
    stage.charger.calls("1", "TransactionEvent", **started, idToken={"idToken": "SECO1", "type": "ISO14443"})
    assert [s.owner for s in stage.memory.sessions.values()] == [p.Peer.SECONDARY]
    event = {"eventId": 1, "component": {"name": "EVSE", "evse": {"id": 1}}}
    stage.charger.calls("2", "NotifyEvent", seqNo=0, generatedAt="t", eventData=[event])
    assert stage.primary.hears_call()[1] == "NotifyEvent"


def test_a_late_answer_to_a_start_leaves_a_newer_start_of_the_same_words_alone() -> None:
    """The first was given up and has stopped; its id takes nothing away from the second."""
    stage = Stage()
    stage.starts("PRIM1", "s1")
    stage.passes(31)
    stage.charger.calls("e1", "StopTransaction", idTag="PRIM1", meterStop=5, timestamp="x")
    stage.starts("PRIM1", "s2")
    assert len(stage.memory.sessions) == 1
    stage.primary.answers("s1", transactionId=7, idTagInfo={"status": "Accepted"})
    first, second = sorted(stage.memory.sessions.values(), key=lambda session: session.transaction_id is None)
    assert (first.transaction_id, first.has_stop) == (7, True)
    assert (second.transaction_id, second.has_stop) == (None, False)


def test_a_start_whose_server_was_lost_is_found_by_its_stop() -> None:
    """Nobody knows whether the server has it; its stop is the primary's, although its badge is not."""
    stage = Stage()
    stage.primary.calls("r", "RemoteStartTransaction", idTag="SECO1", connectorId=1)
    stage.charger.answers("r", status="Accepted")
    stage.starts("SECO1")
    stage.primary.lost()
    stage.primary_connects()
    for message in stage.primary.hears():
        stage.primary.answers(message[1], status="Accepted", currentTime="x", interval=300)
    stage.charger.calls("e", "StopTransaction", transactionId=0, idTag="SECO1", meterStop=5, timestamp="x")
    assert actions(stage.primary.hears()) == ["StopTransaction"]


def test_a_triggered_reading_without_a_session_goes_to_the_secondary_that_asked() -> None:
    """And the proxy answers, as for all that is the secondary's."""
    stage = Stage()
    stage.secondary.calls("t", "TriggerMessage", requestedMessage="MeterValues")
    stage.charger.answers("t", status="Accepted")
    stage.primary.hears(), stage.secondary.hears(), stage.charger.hears()
    sampled = [{"timestamp": "x", "sampledValue": [{"value": "1", "context": "Trigger"}]}]
    stage.charger.calls("m", "MeterValues", connectorId=1, meterValue=sampled)
    assert stage.charger.hears() == [[3, "m", {}]]
    assert actions(stage.secondary.hears()) == ["MeterValues"]
    assert stage.primary.hears() == []


def test_a_start_that_the_secondary_cannot_answer_is_answered_here() -> None:
    """Its CallError is not forwarded; the driver charges."""
    stage = Stage("secondary_replies = forward")
    stage.starts("SECO1")
    assert stage.charger.hears() == []
    message_id, _, _ = stage.secondary.hears_call()
    stage.secondary.errs(message_id)
    ((kind, _, payload),) = stage.charger.hears()
    assert (kind, payload["idTagInfo"]) == (3, {"status": "Accepted"})
