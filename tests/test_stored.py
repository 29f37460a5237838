"""Stored Calls: the charger is answered here, and the owner gets everything, in order, once."""

from __future__ import annotations

import random

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import slow_disk
from tests.play.plays import Stage, actions

SECONDARY = p.Peer.SECONDARY


def stop(stage: Stage, transaction_id: object, message_id: str = "e") -> None:
    stage.charger.calls(
        message_id, "StopTransaction", transactionId=transaction_id, meterStop=5, timestamp="t"
    )


def test_a_session_while_the_secondary_is_away_is_delivered_when_it_is_back() -> None:
    """Boot first, then the session in order, with the secondary's own transaction id."""
    stage = Stage()
    stage.secondary.lost()
    stage.starts("SECO1")
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    stop(stage, transaction_id)
    assert stage.charger.hears() == [[3, "m", {}], [3, "e", {}]]
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    delivered = stage.delivers()
    assert [action for action, _ in delivered] == [
        "BootNotification",
        "StartTransaction",
        "MeterValues",
        "StopTransaction",
    ]
    assert [payload["transactionId"] for _, payload in delivered[2:]] == [72, 72]
    assert stage.waiting(SECONDARY) == []


def test_everything_waits_until_the_secondary_accepts_the_boot() -> None:
    """Pending or Rejected: asked again after its interval."""
    stage = Stage()
    stage.secondary.lost()
    stage.starts("SECO1")
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    stage.answer_boot("Pending", interval=20)
    stage.passes(19)
    assert stage.secondary.hears() == []
    stage.passes(2)
    stage.answer_boot("Rejected", interval=0)
    stage.passes(p.BOOT_RETRY_SECONDS + 1)
    stage.answer_boot("Accepted")
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_stored_call_keeps_its_message_id_for_life() -> None:
    """After two silent minutes the server is disconnected, and gets the same text on the next connection."""
    stage = Stage()
    stage.starts("SECO1")
    first = stage.secondary.hears_text()
    stage.passes(p.DELIVERY_SECONDS - 1)
    old = stage.secondary
    assert old.closed_with is None
    stage.passes(1.5)
    assert old.closed_with is not None
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    stage.answer_boot()
    assert stage.secondary.hears_text() == first


def test_a_late_answer_to_a_stored_call_counts() -> None:
    """After `call_timeout` other Calls have their turn, but the next stored one still waits."""
    stage = Stage()
    stage.starts("SECO1")
    message_id = stage.secondary.hears_call()[0]
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stop(stage, transaction_id)
    stage.passes(31)
    stage.charger.calls("n", "StatusNotification", connectorId=2, errorCode="NoError", status="Charging")
    copy = stage.secondary.hears_call()
    assert copy[1] == "StatusNotification"
    stage.secondary.answers(copy[0])
    stage.secondary.answers(message_id, transactionId=9, idTagInfo={"status": "Accepted"})
    assert stage.secondary.hears_call()[2]["transactionId"] == 9


def test_a_call_error_is_tried_three_times_with_growing_delay_each_under_a_new_id() -> None:
    """A message id that the server has seen is not used again; then the session is refused and kept."""
    stage = Stage()
    stage.starts("SECO1")
    stop(stage, stage.charger.hears()[0][2]["transactionId"])
    ids = []
    for delay in (*p.RETRY_SECONDS, None):
        message_id, action, _ = stage.secondary.hears_call()
        assert action == "StartTransaction"
        ids.append(message_id)
        stage.secondary.errs(message_id)
        if delay is not None:
            stage.passes(delay - 1)
            assert stage.secondary.hears() == []
            stage.passes(2)
    assert len(set(ids)) == 3
    assert [(call.action, call.refused) for call in stage.memory.refused] == [
        ("StartTransaction", "CallError InternalError"),
        ("StopTransaction", "CallError InternalError"),
    ]
    assert stage.waiting(SECONDARY) == []


def test_a_call_error_on_another_message_refuses_that_message_alone() -> None:
    """A reading is not tried again; the rest of the session goes on."""
    stage = Stage()
    transaction_id = stage.secondary_session(server_id=9)
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    stop(stage, transaction_id)
    stage.secondary.errs(stage.secondary.hears_call()[0])
    assert [call.action for call in stage.memory.refused] == ["MeterValues"]
    assert stage.secondary.hears_call()[1] == "StopTransaction"


def test_a_refused_start_with_a_usable_id_still_gets_the_rest_of_its_session() -> None:
    """A status other than Accepted is words on the session; the server knows it."""
    stage = Stage()
    stage.starts("SECO1")
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stop(stage, transaction_id)
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=9, idTagInfo={"status": "Invalid"})
    assert [session.refused for session in stage.memory.sessions.values()] == ["status Invalid"]
    assert stage.memory.refused == []
    assert stage.secondary.hears_call()[2]["transactionId"] == 9


def test_a_refused_start_without_a_usable_id_refuses_its_session() -> None:
    """What comes later is answered to the charger and kept as refused at once."""
    stage = Stage()
    stage.starts("SECO1")
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=0, idTagInfo={"status": "Invalid"})
    stop(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.secondary.hears() == []
    assert [call.action for call in stage.memory.refused] == [
        "StartTransaction",
        "StopTransaction",
    ]


def test_a_refused_2_x_start_refuses_its_session() -> None:
    """In 2.x the Started event is the start."""
    stage = Stage(version="ocpp2.0.1")
    payload = {"seqNo": 0, "transactionInfo": {"transactionId": "T"}, "idToken": {"idToken": "SECO1"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", **payload)
    (start,) = stage.waiting(SECONDARY)
    start.tries = 2
    stage.secondary.errs(stage.secondary.hears_call()[0])
    stage.charger.calls("1", "TransactionEvent", eventType="Ended", **{**payload, "seqNo": 1})
    assert stage.secondary.hears() == []
    assert len(stage.memory.refused) == 2


# Repeats.


def test_a_repeated_stored_start_joins_its_session() -> None:
    """One Call at the server, the same transaction id for the charger."""
    stage = Stage()
    stage.starts("SECO1", "1")
    (first,) = stage.charger.hears()
    stage.starts("SECO1", "2")
    assert stage.charger.hears() == [[3, "2", first[2]]]
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_repeated_relayed_start_joins_the_one_in_flight() -> None:
    """One Call at the server, one answer, by the newest message id."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.starts("PRIM1", "2")
    assert [message[1] for message in stage.primary.hears()] == ["1"]
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == [[3, "2", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]]


def test_a_repeated_relayed_start_joins_the_one_in_the_queue() -> None:
    """It waits behind another Call."""
    stage = Stage()
    stage.charger.calls("0", "Heartbeat")
    stage.starts("PRIM1", "1")
    stage.starts("PRIM1", "2")
    stage.primary.answers("0", currentTime="t")
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    assert [message[1] for message in stage.charger.hears()] == ["0", "2"]


def test_a_repeated_start_of_an_answered_session_is_answered_again() -> None:
    """The charger did not hear the first answer; the server hears nothing new."""
    stage = Stage()
    stage.primary_session(server_id=7)
    stage.starts("PRIM1", "again")
    assert stage.charger.hears() == [[3, "again", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]]
    assert stage.primary.hears() == []


def test_a_repeated_start_after_the_stop_is_new() -> None:
    """An ended session is joined by nothing."""
    stage = Stage()
    stop(stage, stage.primary_session(server_id=7))
    stage.primary.answers("e")
    stage.primary.hears()
    stage.starts("PRIM1", "again")
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_start_that_was_never_answered_is_sent_again_when_repeated() -> None:
    """Its first Call timed out, or its connection was lost."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.passes(31)
    stage.starts("PRIM1", "2")
    assert [message[1] for message in stage.primary.hears()] == ["1", "2"]
    assert len(stage.memory.sessions) == 1


def test_a_repeated_start_is_answered_from_a_late_answer() -> None:
    """The server has the session; the repeat must not make it two."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.passes(31)
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    stage.primary.hears()
    stage.starts("PRIM1", "2")
    assert stage.primary.hears() == []
    assert stage.charger.hears()[0][2]["transactionId"] == 7


def test_a_start_that_the_primary_answers_with_an_error_is_sent_again_when_repeated() -> None:
    """The error is the charger's to deal with."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.primary.errs("1")
    assert stage.charger.hears()[0][0] == 4
    stage.starts("PRIM1", "2")
    assert [message[1] for message in stage.primary.hears()] == ["1", "2"]


def test_an_answer_that_is_written_as_an_empty_array_is_an_answer() -> None:
    """PHP writes nothing so; the session goes on, and its stop is sent once."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    stage.charger.calls("e", "StopTransaction", transactionId=transaction_id, meterStop=9, timestamp="t")
    for action in ("MeterValues", "StopTransaction"):
        message_id, sent, _ = stage.secondary.hears_call()
        assert sent == action
        stage.secondary.says(f'[3,"{message_id}",[]]')
    assert stage.waiting(p.Peer.SECONDARY) == []


def test_a_repeated_stored_stop_is_answered_again_and_not_stored_again() -> None:
    """The same transaction is stopped once."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stop(stage, transaction_id, "1")
    assert stage.charger.hears() == [[3, "1", {}]]
    stop(stage, transaction_id, "2")
    assert stage.charger.hears() == [[3, "2", {}]]
    assert [action for action, _ in stage.delivers()] == ["StopTransaction"]


def test_meter_values_are_never_taken_for_repeats() -> None:
    """Equal readings are readings."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    for number in range(2):
        stage.charger.calls(str(number), "MeterValues", connectorId=1, transactionId=transaction_id)
    assert [action for action, _ in stage.delivers()] == ["MeterValues", "MeterValues"]


# Without the charger, without end.


def test_what_is_left_when_the_charger_goes_is_delivered_without_it() -> None:
    """The connection to the secondary stands until the outbox is empty."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    stop(stage, transaction_id)
    stage.charger.lost()
    assert stage.primary.closed_with is not None
    assert stage.secondary.closed_with is None
    assert [action for action, _ in stage.delivers()] == ["MeterValues", "StopTransaction"]
    link = stage.secondary
    stage.passes(1)
    assert link.closed_with is not None
    assert stage.relay.is_idle


def test_the_secondary_is_redialled_for_what_is_left() -> None:
    """A charger that is gone does not keep its session from its owner."""
    stage = Stage()
    stop(stage, stage.secondary_session())
    stage.charger.lost()
    stage.secondary.lost()
    stage.passes(2)
    assert isinstance(stage.relay.tasks.started, list)  # type: ignore[attr-defined]
    assert stage.relay.tasks.started[-1] == "CP1: secondary: dial"  # type: ignore[attr-defined]
    stage.secondary_connects(accepts=False)
    assert [action for action, _ in stage.delivers()] == ["BootNotification", "StopTransaction"]


def test_a_server_whose_login_is_the_chargers_own_waits_for_the_charger() -> None:
    """`secondary_auth = forward`: the proxy cannot log in without it."""
    stage = Stage("secondary_auth = forward")
    stage.starts("SECO1")
    stage.charger.lost()
    stage.secondary.lost()
    stage.primary.lost()
    assert stage.relay.is_idle
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()] == ["BootNotification", "StartTransaction"]


def test_beyond_the_bound_the_oldest_meter_values_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a start or a stop: where only these are left, the charger keeps what comes."""
    monkeypatch.setattr(p, "MAX_STORED", 4)
    stage = Stage()
    stage.secondary.lost()
    for number in range(3):
        stage.starts("SECO1", f"s{number}", connector=number + 1, meter=number)
        transaction_id = stage.charger.hears()[-1][2]["transactionId"]
        stage.charger.calls(f"m{number}", "MeterValues", connectorId=number + 1, transactionId=transaction_id)
    stored = [call.action for call in stage.waiting(SECONDARY)]
    assert stored == ["StartTransaction", "StartTransaction", "StartTransaction", "MeterValues"]
    stage.starts("SECO1", "s4", connector=5, meter=5)
    assert [message[1] for message in stage.charger.hears()] == ["m2", "s4"]
    stage.starts("SECO1", "s5", connector=6, meter=6)
    assert stage.charger.hears() == []
    assert [call.action for call in stage.waiting(SECONDARY)] == ["StartTransaction"] * 4


def test_an_authorize_waits_for_its_server_and_goes_with_the_connection() -> None:
    """What belongs to no session is kept in memory, never by age; a lost connection takes it along."""
    stage = Stage()
    stage.secondary.lost()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    stage.passes(100)
    stage.secondary_connects(accepts=False)
    stage.charger.calls("2", "Authorize", idTag="SECO2")
    stage.passes(2.5)
    stage.answer_boot()
    assert stage.secondary.hears_call()[2] == {"idTag": "SECO1"}
    stage.secondary.lost()
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()] == ["BootNotification"]


# With secondary_replies = forward.


def forwarding(more: str = "", connect: bool = True) -> Stage:
    return Stage(f"secondary_replies = forward\nunknown_rfid = secondary\n{more}", connect=connect)


def test_forward_relays_the_secondarys_verdict() -> None:
    """Like the primary's; towards the secondary, the message id is the proxy's."""
    stage = forwarding()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    assert stage.charger.hears() == []
    stage.secondary.answers(stage.secondary.hears_call()[0], idTagInfo={"status": "Blocked"})
    assert stage.charger.hears() == [[3, "1", {"idTagInfo": {"status": "Blocked"}}]]


def test_forward_waits_for_a_secondary_that_has_just_gone() -> None:
    """Five seconds; when it is back in time, it answers itself."""
    stage = forwarding()
    stage.secondary.lost()
    stage.starts("SECO1", "1")
    stage.passes(3)
    assert stage.charger.hears() == []
    stage.secondary_connects(accepts=False)
    stage.answer_boot()
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears()[0][2]["transactionId"] == 7


def test_forward_answers_in_the_place_of_a_secondary_that_stays_away() -> None:
    """After five seconds the Call becomes a stored one where it stands."""
    stage = forwarding()
    stage.secondary.lost()
    stage.starts("SECO1", "1")
    stage.passes(6)
    ((_, _, answer),) = stage.charger.hears()
    assert answer["idTagInfo"] == {"status": "Accepted"}
    assert answer["transactionId"] % 2 == 1
    stop(stage, answer["transactionId"])
    assert stage.charger.hears() == [[3, "e", {}]]
    stage.secondary_connects(accepts=False)
    stage.passes(2.5)
    assert [action for action, _ in stage.delivers()][1:] == ["StartTransaction", "StopTransaction"]


def test_forward_does_not_wait_again_at_every_redial() -> None:
    """A secondary that has been away for long is not about to answer."""
    stage = forwarding()
    stage.secondary.lost()
    stage.passes(20)
    stage.starts("SECO1", "1")
    assert stage.charger.hears()[0][1] == "1"


def test_forward_waits_five_seconds_for_the_first_connection() -> None:
    """A charger that has just come has not been heard by its secondary yet."""
    stage = forwarding(connect=False)
    stage.charger_connects()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    stage.passes(4)
    assert stage.charger.hears() == []
    stage.passes(2)
    assert stage.charger.hears()[0][2] == {"idTagInfo": {"status": "Accepted"}}


def test_forward_answers_after_ten_silent_seconds_then_at_once_until_the_secondary_answers() -> None:
    """A late answer to what was stored counts, and ends the silence."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    start = stage.secondary.hears_call()[0]
    stage.passes(9)
    assert stage.charger.hears() == []
    stage.passes(2)
    ((_, _, answer),) = stage.charger.hears()
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=answer["transactionId"])
    assert stage.charger.hears() == [[3, "m", {}]]
    stage.secondary.answers(start, transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == []
    assert [payload["transactionId"] for _, payload in stage.delivers()] == [7]
    stage.charger.calls("n", "MeterValues", connectorId=1, transactionId=answer["transactionId"])
    assert stage.charger.hears() == []
    stage.secondary.answers(stage.secondary.hears_call()[0])
    assert stage.charger.hears() == [[3, "n", {}]]


def test_forward_sends_a_call_again_that_was_in_flight_when_the_connection_was_lost() -> None:
    """The secondary may not have had it; the charger still waits."""
    stage = forwarding()
    stage.passes(p.OWN_BOOT_SECONDS)
    stage.starts("SECO1", "1")
    text = stage.secondary.hears_text()
    stage.secondary.lost()
    stage.secondary_connects(accepts=False)
    stage.answer_boot()
    assert stage.secondary.hears_text() == text


def test_forward_keeps_the_order_behind_older_stored_calls() -> None:
    """While older ones wait, the proxy answers."""
    stage = forwarding()
    stage.secondary.lost()
    stage.starts("SECO1", "1")
    stage.passes(6)
    transaction_id = stage.charger.hears()[0][2]["transactionId"]
    stage.secondary_connects(accepts=False)
    stop(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]


@pytest.mark.parametrize(("badge", "status"), [("SECO1", "Accepted"), ("STRANGER", "Invalid")])
def test_forward_stands_in_with_invalid_for_a_badge_that_nothing_speaks_for(badge: str, status: str) -> None:
    """On no list, without a claim, not accepted by that server in the last hour."""
    stage = forwarding()
    stage.secondary.lost()
    stage.passes(6)
    stage.charger.calls("1", "Authorize", idTag=badge)
    assert stage.charger.hears()[0][2] == {"idTagInfo": {"status": status}}


def test_forward_hands_kept_events_over_before_the_settling_one_is_relayed() -> None:
    """The events that waited for their owner do not count as older stored Calls."""
    stage = Stage("secondary_replies = forward", version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    assert stage.charger.hears() == [[3, "0", {}]]
    token = {"idToken": {"idToken": "SECO1", "type": "ISO14443"}}
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    assert stage.charger.hears() == []
    stage.secondary.answers(stage.secondary.hears_call()[0])
    message_id, _, payload = stage.secondary.hears_call()
    assert payload["seqNo"] == 1
    stage.secondary.answers(message_id, idTokenInfo={"status": "Accepted"})
    assert stage.charger.hears() == [[3, "1", {"idTokenInfo": {"status": "Accepted"}}]]


def test_forward_answers_a_repeated_event_that_was_stored_again() -> None:
    """What the proxy has answered once, it answers again."""
    stage = Stage("secondary_replies = forward", version="ocpp2.0.1")
    stage.secondary.lost()
    stage.passes(6)
    payload = {"eventType": "Started", "seqNo": 0, "transactionInfo": {"transactionId": "T"}}
    token = {"idToken": {"idToken": "SECO1", "type": "ISO14443"}}
    for message_id in "ab":
        stage.charger.calls(message_id, "TransactionEvent", **payload, **token)
        assert [message[1] for message in stage.charger.hears()] == [message_id]
    assert len(stage.waiting(SECONDARY)) == 1


def test_an_answer_to_a_stored_call_that_was_relayed_before_is_not_forwarded() -> None:
    """The charger has its answer already; one Call, one answer."""
    stage = forwarding()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    stage.passes(11)
    assert len(stage.charger.hears()) == 1
    stage.secondary.answers("1", idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == []


def test_forward_joins_a_start_that_is_in_flight_when_the_charger_connects_again() -> None:
    """The secondary's connection outlives the charger's; the repeat hears the one answer."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    stage.charger_connects()
    stage.starts("SECO1", "2")
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == [[3, "2", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]]


def test_forward_stores_a_start_whose_charger_has_gone() -> None:
    """It is delivered without the charger, which hears its transaction id when it repeats."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    stage.charger.lost()
    stage.passes(11)
    assert len(stage.waiting(SECONDARY)) == 1
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    stage.charger_connects()
    stage.starts("SECO1", "2")
    session = stage.memory.sessions[stage.charger.hears()[0][2]["transactionId"]]
    assert session.server_id == 7
    assert len(stage.memory.sessions) == 1


def test_forward_answers_the_repeat_of_a_start_that_was_stored_without_its_charger() -> None:
    """Even while the secondary stays silent; a charger must not be left without an answer."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    stage.charger.lost()
    stage.passes(11)
    stage.charger_connects()
    stage.starts("SECO1", "2")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Accepted"}


def test_forward_stores_a_stop_once_whose_charger_has_gone() -> None:
    """Its repeat is answered again and not stored again; meter values are left to the charger to repeat."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    start = stage.secondary.hears_call()[0]
    stage.secondary.answers(start, transactionId=7, idTagInfo={"status": "Accepted"})
    stop(stage, 7)
    stage.charger.lost()
    stage.passes(11)
    stage.charger_connects()
    stage.charger.hears()
    stop(stage, 7, "again")
    assert stage.charger.hears() == [[3, "again", {}]]
    assert [call.action for call in stage.waiting(SECONDARY)] == ["StopTransaction"]
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=7)
    stage.delivers()


def test_forward_forgets_an_authorize_whose_charger_has_gone() -> None:
    """Nobody waits for it, and nothing of a session depends on it."""
    stage = forwarding()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    stage.charger.lost()
    stage.passes(11)
    assert stage.memory.stored == {}


def test_forward_still_vouches_for_a_listed_badge_whose_start_is_repeated() -> None:
    """The list speaks for it, however often it is sent."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    stage.charger.lost()
    stage.secondary.lost()
    stage.charger_connects()
    stage.passes(6)
    stage.starts("SECO1", "2")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Accepted"}


def test_forward_waits_for_a_secondary_that_has_a_boot_to_answer() -> None:
    """A charger that boots on a standing connection makes it wait, not away."""
    stage = forwarding()
    stage.passes(20)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.charger.calls("1", "Authorize", idTag="STRANGER")
    assert stage.charger.hears() == []
    stage.answer_boot()
    assert stage.secondary.hears_call()[1] == "Authorize"


def test_forward_keeps_the_order_in_what_it_stores() -> None:
    """A Call that has waited longer is stored before one that comes now."""
    stage = forwarding()
    stage.secondary.lost()
    stage.starts("SECO1", "1", connector=1)
    stage.time += 5.4
    stage.starts("SECO2", "2", connector=2)
    badges = [call.content.payload["idTag"] for call in stage.waiting(SECONDARY)]
    assert badges == ["SECO1", "SECO2"]


def test_a_start_that_was_refused_may_be_tried_again() -> None:
    """A charger with a stuck clock says the same twice, and means a new attempt."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.primary.answers("1", transactionId=0, idTagInfo={"status": "Blocked"})
    stage.starts("PRIM1", "2")
    assert [message[1] for message in stage.primary.hears()] == ["1", "2"]


def test_a_late_answer_does_not_replace_the_id_that_the_charger_was_told() -> None:
    """A start that was sent twice is answered twice; the stop goes by what the charger knows."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.passes(31)
    stage.starts("PRIM1", "2")
    stage.primary.answers("2", transactionId=8, idTagInfo={"status": "Accepted"})
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    stage.primary.hears()
    stop(stage, 8)
    assert stage.primary.hears_call()[2]["transactionId"] == 8


def test_a_repeated_stop_without_a_usable_id_ends_no_other_session() -> None:
    """It is known by what it says."""
    stage = Stage()
    for connector in (1, 2):
        stage.secondary_session(server_id=6 + connector, badge=f"SECO{connector}", connector=connector)
    for message_id in "ab":
        payload = {"transactionId": -1, "idTag": "SECO1", "meterStop": 5, "timestamp": "t"}
        stage.charger.calls(message_id, "StopTransaction", **payload)
    assert [payload["transactionId"] for _, payload in stage.delivers()] == [7]
    assert (stage.memory.on_connector(1), stage.memory.on_connector(2) is None) == (None, False)


def test_kept_events_that_the_primary_refuses_hold_up_no_verdict() -> None:
    """The charger waits for the answer to its badge; the primary's connection is left alone."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    token = {"idToken": {"idToken": "PRIM1", "type": "ISO14443"}}
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    stage.primary.errs(stage.primary.hears_call()[0])
    assert stage.primary.hears_call()[0] == "1"
    stage.passes(200)
    assert stage.primary.closed_with is None


def test_kept_events_that_the_primary_leaves_unanswered_hold_up_no_verdict() -> None:
    """After `call_timeout` the settling event has its turn."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.charger.calls("1", "TransactionEvent", eventType="Ended", seqNo=1, **info)
    stage.primary.hears()
    stage.passes(31)
    assert stage.primary.hears_call()[0] == "1"


def test_the_settling_event_waits_until_a_restart_would_not_send_the_kept_one_again() -> None:
    """Else a kill between them sends the beginning of the transaction after its second event."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    token = {"idToken": {"idToken": "PRIM1", "type": "ISO14443"}}
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    started = stage.primary.hears_call()[0]
    with slow_disk(stage) as finish:
        stage.primary.answers(started)
        assert stage.primary.hears() == []
        finish()
    assert stage.primary.hears_call()[0] == "1"


def test_a_kept_event_that_fails_lets_no_verdict_of_another_transaction_pass() -> None:
    """Each transaction's events arrive in their order, whatever becomes of others'."""
    stage = Stage(version="ocpp2.0.1")
    token = {"idToken": {"idToken": "PRIM1", "type": "ISO14443"}}
    for name in ("A", "B"):
        info = {"transactionInfo": {"transactionId": name}}
        stage.charger.calls(f"{name}0", "TransactionEvent", eventType="Started", seqNo=0, **info)
        stage.charger.calls(f"{name}1", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    stage.primary.errs(stage.primary.hears_call()[0])
    message_id, _, payload = stage.primary.hears_call()
    assert (message_id, payload["transactionInfo"]) == ("A1", {"transactionId": "A"})
    stage.primary.answers(message_id)
    assert stage.primary.hears() == []
    stage.passes(11)
    stage.primary.answers(stage.primary.hears_call()[0])
    message_id, _, payload = stage.primary.hears_call()
    assert (payload["transactionInfo"], payload["seqNo"]) == ({"transactionId": "B"}, 0)
    stage.primary.answers(message_id)
    assert stage.primary.hears_call()[0] == "B1"


def test_a_kept_event_that_an_old_connection_still_holds_lets_no_verdict_pass() -> None:
    """It may never have arrived; the new connection carries it as soon as the old one is closed."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    token = {"idToken": {"idToken": "PRIM1", "type": "ISO14443"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    assert stage.primary.hears_call()[2]["seqNo"] == 0
    old = stage.primary
    stage.charger_connects()
    stage.charger.calls("2", "TransactionEvent", eventType="Updated", seqNo=1, **info, **token)
    stage.passes(31)
    assert "TransactionEvent" not in actions(stage.primary.hears())
    old.lost()
    assert stage.primary.hears_call()[2]["seqNo"] == 0


def test_a_transaction_without_an_owner_that_falls_silent_is_the_primarys() -> None:
    """A month later its kept events are handed over, not dropped."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.relay.carry_out(stage.sweeps(p.SILENT_SECONDS + 1))
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def test_what_is_in_flight_is_not_dropped_for_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer may be on the way."""
    monkeypatch.setattr(p, "MAX_STORED", 2)
    stage = Stage()
    transaction_id = stage.secondary_session()
    for number in range(4):
        stage.charger.calls(str(number), "MeterValues", connectorId=1, transactionId=transaction_id, n=number)
        stage.charger.hears()
    assert [payload["n"] for _, payload in stage.delivers()] == [0, 3]


def test_forward_joins_a_start_whose_answer_from_the_proxy_was_not_heard() -> None:
    """Only the owner's own refusal makes the next start a new one; the repeat hears its late verdict."""
    stage = forwarding()
    stage.starts("STRANGER", "a")
    stage.charger.lost()
    stage.passes(11)
    stage.secondary.answers(
        stage.secondary.hears_call()[0], transactionId=7, idTagInfo={"status": "Accepted"}
    )
    stage.secondary.lost()
    stage.charger_connects()
    stage.starts("STRANGER", "b")
    ((_, _, answer),) = stage.charger.hears()
    assert answer["idTagInfo"] == {"status": "Accepted"}
    assert [session.server_id for session in stage.memory.sessions.values()] == [7]


def test_refused_starts_do_not_push_an_open_session_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again and again ends each time."""
    monkeypatch.setattr(p, "MAX_SESSIONS", 5)
    stage = Stage()
    transaction_id = stage.secondary_session()
    for number in range(10):
        stage.starts("PRIM1", f"r{number}", connector=2)
        stage.primary.answers(f"r{number}", transactionId=0, idTagInfo={"status": "Blocked"})
    stop(stage, transaction_id)
    assert [action for action, _ in stage.delivers()] == ["StopTransaction"]


@pytest.mark.parametrize("answers", [True, False])
def test_a_kept_event_that_fails_stalls_no_later_one_of_the_primary(answers: bool) -> None:
    """Neither of its own transaction nor of the next."""
    stage = Stage(version="ocpp2.0.1")

    def says(name: str, number: int, kind: str, **more: object) -> None:
        payload = {"eventType": kind, "seqNo": number, "transactionInfo": {"transactionId": name}}
        stage.charger.calls(f"{name}{number}", "TransactionEvent", **payload, **more)

    token = {"idToken": {"idToken": "PRIM1", "type": "ISO14443"}}
    for name in ("T", "U"):
        says(name, 0, "Started")
        says(name, 1, "Updated")
        says(name, 2, "Updated", **token)
    heard = []
    for _ in range(16):
        for _, message_id, _, payload in stage.primary.hears():
            heard.append((payload["transactionInfo"]["transactionId"], payload["seqNo"]))
            if payload["seqNo"] > 1:
                stage.primary.answers(message_id, idTokenInfo={"status": "Accepted"})
            elif answers:
                stage.primary.errs(message_id)
        stage.passes(16)
    assert {("T", 2), ("U", 2)} <= set(heard)
    assert [message[1] for message in stage.charger.hears() if message[1][1] == "2"] == ["T2", "U2"]
    assert stage.primary.closed_with is None


@pytest.mark.parametrize("answers", [True, False])
def test_a_delivery_to_the_primary_without_a_charger_ends(answers: bool) -> None:
    """What it leaves unanswered waits for the charger."""
    stage = Stage("primary_user = u", version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.charger.calls("1", "TransactionEvent", eventType="Ended", seqNo=1, **info)
    if answers:
        stage.primary.errs(stage.primary.hears_call()[0])
    stage.charger.lost()
    link = stage.primary
    stage.passes(2 * p.DELIVERY_SECONDS)
    assert link.closed_with is not None


def test_a_refusal_of_the_repeat_does_not_override_the_accepted_start() -> None:
    """The server has begun the session; the charger must not stop it for the second answer."""
    stage = Stage()
    stage.starts("PRIM1", "a")
    stage.passes(31)
    stage.starts("PRIM1", "b")
    stage.primary.answers("a", transactionId=7, idTagInfo={"status": "Accepted"})
    stage.primary.answers("b", transactionId=0, idTagInfo={"status": "ConcurrentTx"})
    assert stage.charger.hears() == [[3, "b", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]]


def test_forward_stores_a_repeated_stop_once_if_both_are_converted() -> None:
    """One answer, to the newest message id."""
    stage = forwarding()
    stage.starts("SECO1", "1")
    start = stage.secondary.hears_call()[0]
    stage.secondary.answers(start, transactionId=7, idTagInfo={"status": "Accepted"})
    stage.charger.hears()
    stop(stage, 7, "m")
    stage.passes(5)
    stop(stage, 7, "n")
    stage.passes(11)
    assert [message[:2] for message in stage.charger.hears()] == [[3, "n"]]
    assert [call.action for call in stage.waiting(SECONDARY)] == ["StopTransaction"]


def test_forward_holds_a_settling_event_behind_the_kept_ones() -> None:
    """While one of them waits to be tried again, the charger is answered in the secondary's place."""
    stage = Stage("secondary_replies = forward", version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    for number in range(2):
        stage.charger.calls(str(number), "TransactionEvent", eventType="Started", seqNo=number, **info)
    token = {"idToken": {"idToken": "SECO1", "type": "ISO14443"}}
    stage.charger.calls("2", "TransactionEvent", eventType="Updated", seqNo=2, **info, **token)
    stage.charger.hears()
    stage.secondary.errs(stage.secondary.hears_call()[0])
    assert stage.secondary.hears() == []
    stage.passes(11)
    assert stage.charger.hears() == [[3, "2", {"idTokenInfo": {"status": "Accepted"}}]]


def test_the_oldest_charger_charger_without_anything_open_is_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chargers that come once and never again do not fill the memory."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    stage = Stage()
    stage.primary_session()
    for name in ("idle", "new", "newer"):
        stage.journal.memory(name)
    assert list(stage.journal.memories) == ["CP1", "newer"]


def test_an_id_in_use_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transaction ids of the proxy are random, and unique for the charger all the same."""
    numbers = iter([p.FIRST_PROXY_ID, p.FIRST_PROXY_ID, p.FIRST_PROXY_ID + 2])
    monkeypatch.setattr(random, "randrange", lambda *_: next(numbers))
    stage = Stage()
    ids = [stage.secondary_session(badge=f"SECO{number}", connector=number) for number in (1, 2)]
    assert ids == [p.FIRST_PROXY_ID + 1, p.FIRST_PROXY_ID + 3]


def test_what_a_connection_left_unanswered_goes_out_on_the_next() -> None:
    """Under the same message id, and before what follows it; a charger that comes again need not boot."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    token = {"idToken": "PRIM1", "type": "ISO14443"}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, idToken=token, **info)
    message_id, _, payload = stage.primary.hears_call()
    assert payload["seqNo"] == 0
    old = stage.primary
    stage.charger_connects()
    old.lost()
    stage.charger.calls("1", "TransactionEvent", eventType="Updated", seqNo=1, idToken=token, **info)
    stage.passes(9)
    assert stage.primary.hears() == []
    stage.passes(2)
    assert stage.primary.hears_call()[0] == message_id
    stage.primary.answers(message_id)
    assert stage.primary.hears_call()[2]["seqNo"] == 1
