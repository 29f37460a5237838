"""OCPP 2.x: the station picks the transaction id, and the badge may come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import killed
from tests.play.plays import Stage, actions


@pytest.fixture(params=["ocpp2.0.1", "ocpp2.1"])
def stage(request: pytest.FixtureRequest) -> Stage:
    """One charger and its servers, in both versions."""
    return Stage(version=request.param)


def event(
    stage: Stage, number: int, kind: str = "Updated", badge: str | None = None, **info: Any
) -> list[list[Any]]:
    """Let the charger send a TransactionEvent of transaction T1; return what it hears."""
    payload: dict[str, Any] = {"eventType": kind, "seqNo": number, "triggerReason": "x"}
    payload["timestamp"] = info.pop("timestamp", "t")
    payload["transactionInfo"] = {"transactionId": info.pop("transaction", "T1"), **info}
    if badge is not None:
        payload["idToken"] = {"idToken": badge, "type": "NoAuthorization" if badge == "" else "ISO14443"}
    stage.charger.calls(f"e{number}", "TransactionEvent", **payload)
    return stage.charger.hears()


def numbers(delivered: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """Return the sequence numbers of delivered events."""
    return [payload["seqNo"] for action, payload in delivered if action == "TransactionEvent"]


def test_an_authorize_goes_by_its_token(stage: Stage) -> None:
    """The badge of 2.x is the idToken's idToken."""
    stage.charger.calls("1", "Authorize", idToken={"idToken": "SECO1", "type": "ISO14443"})
    assert stage.charger.hears() == [[3, "1", {"idTokenInfo": {"status": "Accepted"}}]]
    assert actions(stage.secondary.hears()) == ["Authorize"]


def test_a_transaction_whose_first_event_has_a_badge_is_its_owners(stage: Stage) -> None:
    """Later events follow it, whatever badge ends it."""
    assert event(stage, 0, "Started", "SECO1") == [[3, "e0", {"idTokenInfo": {"status": "Accepted"}}]]
    assert event(stage, 1) == [[3, "e1", {}]]
    assert event(stage, 2, "Ended", "PRIM1") == [[3, "e2", {"idTokenInfo": {"status": "Accepted"}}]]
    assert numbers(stage.delivers()) == [0, 1, 2]
    assert stage.primary.hears() == []


def test_events_without_an_owner_are_kept_until_a_badge_settles_it(stage: Stage) -> None:
    """They are answered, and handed over in order, the settling event last."""
    assert event(stage, 0, "Started", chargingState="EVConnected") == [[3, "e0", {}]]
    assert event(stage, 1) == [[3, "e1", {}]]
    assert stage.primary.hears() == stage.secondary.hears() == []
    event(stage, 2, badge="SECO1")
    assert numbers(stage.delivers()) == [0, 1, 2]
    assert stage.primary.hears() == []


def test_kept_events_reach_the_primary_before_the_settling_one_that_is_relayed(stage: Stage) -> None:
    """The charger hears the primary's verdict on its badge; the kept events' answers go nowhere."""
    event(stage, 0, "Started")
    assert event(stage, 1, badge="PRIM1") == []
    message_id, _, payload = stage.primary.hears_call()
    assert payload["seqNo"] == 0
    stage.primary.answers(message_id)
    assert stage.primary.hears_call()[0] == "e1"
    stage.primary.answers("e1", idTokenInfo={"status": "Blocked"})
    assert stage.charger.hears() == [[3, "e1", {"idTokenInfo": {"status": "Blocked"}}]]


@pytest.mark.parametrize(
    ("kind", "badge", "info"),
    [("Updated", None, {"chargingState": "Charging"}), ("Updated", "", {}), ("Ended", None, {})],
)
def test_what_settles_a_transaction_without_a_badge(
    stage: Stage, kind: str, badge: str | None, info: dict[str, Any]
) -> None:
    """Energy that flows, NoAuthorization, or its end gives it to the primary."""
    event(stage, 0, "Started", chargingState="EVConnected")
    event(stage, 1, kind, badge, **info)
    message_id, _, payload = stage.primary.hears_call()
    assert payload["seqNo"] == 0
    stage.primary.answers(message_id)
    assert stage.primary.hears_call()[0] == "e1"
    assert stage.secondary.hears() == []


def test_a_rejected_badge_settles_a_transaction_that_nobody_gets(stage: Stage) -> None:
    """`unknown_rfid = reject`: recorded here, Invalid for the charger, delivered nowhere."""
    stage = Stage("unknown_rfid = reject", version=stage.version)
    event(stage, 0, "Started")
    assert event(stage, 1, badge="STRANGER") == [[3, "e1", {"idTokenInfo": {"status": "Invalid"}}]]
    assert event(stage, 2, "Ended") == [[3, "e2", {}]]
    assert stage.primary.hears() == stage.secondary.hears() == []


def test_a_repeated_event_is_answered_again_and_not_stored_again(stage: Stage) -> None:
    """Same transaction, same seqNo: kept, stored, it makes no difference."""
    event(stage, 0, "Started")
    assert event(stage, 0, "Started") == [[3, "e0", {}]]
    event(stage, 1, badge="SECO1")
    assert event(stage, 1, badge="SECO1") == [[3, "e1", {"idTokenInfo": {"status": "Accepted"}}]]
    assert numbers(stage.delivers()) == [0, 1]


def test_an_id_that_is_used_again_names_a_new_transaction(stage: Stage) -> None:
    """Some stations count from the start again when they reboot; each session is its badge's, and whole."""
    for day, badge in enumerate(("SECO1", "SECO2", "PRIM1", "SECO1")):
        heard: list[int] = []
        for number, kind in enumerate(("Started", "Updated", "Ended")):
            event(stage, number, kind, badge if number == 0 else None, timestamp=f"day {day}, {number}")
            for message in stage.primary.hears():
                heard.append(message[3]["seqNo"])
                stage.primary.answers(message[1])
        delivered = numbers(stage.delivers())
        assert (delivered, heard) == (([], [0, 1, 2]) if badge == "PRIM1" else ([0, 1, 2], []))


def test_an_id_that_is_used_again_is_two_sessions_after_a_kill(tmp_path: Path) -> None:
    """What was left of both is delivered, and the events that follow belong to the second."""
    stage = Stage(version="ocpp2.0.1", state=tmp_path / "state.db")
    stage.secondary.lost()
    for day in range(2):
        for number, kind in enumerate(("Started", "Updated", "Ended")[: 3 - day]):
            event(stage, number, kind, "SECO1" if number == 0 else None, timestamp=f"day {day}, {number}")
    killed(stage)
    event(stage, 2, "Ended", timestamp="day 1, 2")
    delivered = [payload["timestamp"] for action, payload in stage.delivers() if action == "TransactionEvent"]
    assert delivered == [f"day {day}, {number}" for day in range(2) for number in range(3)]


def test_a_started_that_is_repeated_after_the_end_is_no_new_transaction(stage: Stage) -> None:
    """It says the time of the first one."""
    for number, kind in enumerate(("Started", "Ended")):
        event(stage, number, kind, "SECO1", timestamp=f"t{number}")
    assert event(stage, 0, "Started", "SECO1", timestamp="t0")[0][:2] == [3, "e0"]
    assert numbers(stage.delivers()) == [0, 1]


def test_a_full_store_keeps_the_event_that_says_whose_the_session_is(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The badge came behind the cable: without it, nobody could bill what is left."""
    monkeypatch.setattr(p, "MAX_STORED", 4)
    stage.secondary.lost()
    event(stage, 0, "Started")
    event(stage, 1, badge="SECO1")
    for number in range(2, 9):
        event(stage, number)
    event(stage, 9, "Ended")
    left = [call.content.payload["seqNo"] for call in stage.waiting(p.Peer.SECONDARY)]
    assert left == [0, 1, 8, 9]


def test_an_event_without_a_transaction_id_goes_by_its_badge(stage: Stage) -> None:
    """A message that its schema forbids is still nobody else's."""
    stage.charger.calls("1", "TransactionEvent", eventType="Started", seqNo=0, idToken={"idToken": "PRIM1"})
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def request_start(stage: Stage, server: str, number: int = 1, evse: int | None = None) -> dict[str, Any]:
    """Let a server start the badge TAG remotely, and the charger accept; return what the charger heard."""
    payload: dict[str, Any] = {"idToken": {"idToken": "TAG", "type": "Central"}, "remoteStartId": number}
    if evse is not None:
        payload["evseId"] = evse
    link = getattr(stage, server)
    link.calls(f"r-{server}", "RequestStartTransaction", **payload)
    message_id, _, heard = stage.charger.hears_call()
    stage.charger.answers(message_id, status="Accepted")
    link.hears()
    return heard


def test_a_remote_start_claims_the_transaction_that_names_it(stage: Stage) -> None:
    """Without a badge in the event, the remoteStartId counts."""
    request_start(stage, "secondary", 5)
    event(stage, 0, "Started", remoteStartId=5)
    assert numbers(stage.delivers()) == [0]


def test_a_remote_start_id_counts_only_together_with_the_badge(stage: Stage) -> None:
    """Some servers say 1 every time; another badge under that number is not theirs."""
    request_start(stage, "secondary", 1)
    event(stage, 0, "Started", "PRIM1", remoteStartId=1)
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def test_of_two_claims_for_a_badge_the_one_whose_number_is_named_wins(stage: Stage) -> None:
    """The remoteStartId tells which of two remote starts it was."""
    wire = request_start(stage, "secondary", 4)["remoteStartId"]
    request_start(stage, "primary", 9)
    event(stage, 0, "Started", "TAG", remoteStartId=wire)
    assert numbers(stage.delivers()) == [0]


def test_the_answer_to_a_remote_start_may_name_its_transaction(stage: Stage) -> None:
    """A transaction that began with the cable is settled by it."""
    event(stage, 0, "Started", chargingState="EVConnected")
    stage.secondary.calls(
        "r", "RequestStartTransaction", idToken={"idToken": "TAG", "type": "Central"}, remoteStartId=3
    )
    stage.charger.hears()
    stage.charger.answers("r", status="Accepted", transactionId="T1")
    answer, kept = stage.secondary.hears()
    assert answer == [3, "r", {"status": "Accepted", "transactionId": "T1"}]
    assert (kept[2], kept[3]["seqNo"]) == ("TransactionEvent", 0)
    stage.secondary.answers(kept[1])
    event(stage, 1, chargingState="Charging")
    assert numbers(stage.delivers()) == [1]


def test_a_report_without_a_request_id_is_not_taken_for_request_0(stage: Stage) -> None:
    """A missing id is no id."""
    stage.secondary.calls("g", "GetBaseReport", requestId=0, reportBase="FullInventory")
    stage.charger.answers("g", status="Accepted")
    stage.charger.calls("n", "FirmwareStatusNotification", status="Idle")
    assert actions(stage.primary.hears()) == ["FirmwareStatusNotification"]


def test_a_claim_for_an_evse_matches_a_transaction_that_named_it_before(stage: Stage) -> None:
    """Only the first events of a transaction name its EVSE."""
    request_start(stage, "secondary", 5, evse=2)
    payload = {
        "eventType": "Started",
        "seqNo": 0,
        "transactionInfo": {"transactionId": "T1"},
        "evse": {"id": 1},
    }
    stage.charger.calls("e0", "TransactionEvent", **payload)
    stage.charger.hears()
    event(stage, 1, badge="TAG")
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def test_charging_needs_belong_to_the_session_on_their_evse(stage: Stage) -> None:
    """NotifyEVChargingNeeds names no transaction; an EVSE whose session has no owner is the station's."""
    payload = {
        "eventType": "Started",
        "seqNo": 0,
        "transactionInfo": {"transactionId": "T1"},
        "evse": {"id": 2},
    }
    stage.charger.calls("e0", "TransactionEvent", **payload)
    stage.charger.hears()
    stage.charger.calls("n1", "NotifyEVChargingNeeds", evseId=2, chargingNeeds={})
    assert actions(stage.primary.hears()) == ["NotifyEVChargingNeeds"]
    stage.primary.answers("n1", status="Accepted")
    event(stage, 1, badge="SECO1")
    stage.charger.hears()
    stage.charger.calls("n2", "NotifyEVChargingNeeds", evseId=2, chargingNeeds={})
    assert stage.charger.hears() == [[3, "n2", {"status": "Processing"}]]
    assert [action for action, _ in stage.delivers()][-1] == "NotifyEVChargingNeeds"


def test_an_event_that_names_the_transaction_of_the_secondary_is_the_secondarys(stage: Stage) -> None:
    """NotifyEvent carries transaction ids in its items."""
    event(stage, 0, "Started", "SECO1")
    stage.charger.calls("n", "NotifyEvent", generatedAt="t", seqNo=0, eventData=[{"transactionId": "T1"}, {}])
    assert stage.charger.hears() == [[3, "n", {}]]
    assert [action for action, _ in stage.delivers()] == ["TransactionEvent", "NotifyEvent"]


def test_the_end_of_a_reservation_is_reported_to_the_server_that_made_it(stage: Stage) -> None:
    """The report comes when the reservation has just expired; nothing else matches it then."""
    expiry = p.Instant(0, stage.utc + stage.time + 60).text
    token = {"idToken": "PRIM1", "type": "ISO14443"}
    stage.secondary.calls("r", "ReserveNow", id=5, idToken=token, expiryDateTime=expiry)
    stage.charger.answers("r", status="Accepted")
    stage.passes(61)
    stage.secondary.hears()
    stage.charger.calls("s", "ReservationStatusUpdate", reservationId=5, reservationUpdateStatus="Expired")
    assert actions(stage.secondary.hears()) == ["ReservationStatusUpdate"]
    event(stage, 0, "Started", "PRIM1")
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def test_an_event_that_names_a_transaction_without_an_owner_concerns_the_station(stage: Stage) -> None:
    """Nobody has been told of it yet."""
    event(stage, 0, "Started")
    stage.charger.calls("n", "NotifyEvent", generatedAt="t", seqNo=0, eventData=[{"transactionId": "T1"}])
    assert actions(stage.primary.hears()) == ["NotifyEvent"]


def test_a_report_goes_to_the_server_that_asked_for_it(stage: Stage) -> None:
    """The constant requestId 0 of some servers is an id like any other."""
    stage.secondary.calls("g", "GetBaseReport", requestId=0, reportBase="FullInventory")
    stage.charger.hears()
    stage.charger.answers("g", status="Accepted")
    stage.secondary.hears()
    stage.charger.calls("n", "NotifyReport", requestId=0, generatedAt="t", seqNo=0)
    assert actions(stage.secondary.hears()) == ["NotifyReport"]


def test_a_server_names_only_its_own_transactions(stage: Stage) -> None:
    """In 2.x all know the same id, so nothing is translated, and the owner is checked."""
    event(stage, 0, "Started", "SECO1")
    stage.delivers()
    stage.primary.calls("x", "RequestStopTransaction", transactionId="T1")
    assert stage.primary.hears() == [[3, "x", {"status": "Rejected"}]]
    stage.secondary.calls("y", "RequestStopTransaction", transactionId="T1")
    assert stage.charger.hears_call()[2] == {"transactionId": "T1"}
    stage.charger.answers("y", status="Accepted")
    stage.secondary.hears()
    stage.primary.calls("z", "CostUpdated", transactionId="T1", totalCost=1)
    assert stage.primary.hears()[0][:3] == [4, "z", "SecurityError"]


def test_a_transaction_without_an_owner_may_be_named_by_the_primary_only(stage: Stage) -> None:
    """The secondary cannot know of it."""
    event(stage, 0, "Started")
    stage.secondary.calls("x", "RequestStopTransaction", transactionId="T1")
    assert stage.secondary.hears() == [[3, "x", {"status": "Rejected"}]]
    stage.primary.calls("y", "RequestStopTransaction", transactionId="T1")
    assert stage.charger.hears_call()[0] == "y"


def test_an_empty_transaction_id_is_not_usable(stage: Stage) -> None:
    """It names nothing, so nobody is refused for it."""
    stage.primary.calls("x", "GetTransactionStatus", transactionId="")
    assert stage.charger.hears_call()[0] == "x"


def test_the_proxy_answers_a_vat_number_with_itself() -> None:
    """The one answer that repeats a field of its Call."""
    stage = Stage(ini="[ext-server]\nserver = local\n{more}", version="ocpp2.1")
    stage.charger.calls("1", "VatNumberValidation", vatNumber="DE1")
    assert stage.charger.hears() == [[3, "1", {"vatNumber": "DE1", "status": "Rejected"}]]
