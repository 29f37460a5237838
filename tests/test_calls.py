"""Rules 2 to 5: answers go to whoever asked, once; the charger has one Call at a time to answer."""

from __future__ import annotations

import json

import pytest

import ocpp_2w_proxy as p
from tests.play.plays import Stage, actions

# Rule 2: answers of the primary.


def test_an_answer_of_the_primary_is_forwarded_once() -> None:
    """A second answer to the same Call is nobody's."""
    stage = Stage()
    stage.charger.calls("1", "Heartbeat")
    stage.primary.answers("1", currentTime="t")
    stage.primary.answers("1", currentTime="t")
    assert stage.charger.hears() == [[3, "1", {"currentTime": "t"}]]


def test_an_error_of_the_primary_is_forwarded_as_it_came() -> None:
    """A CallError is an answer like any other."""
    stage = Stage()
    stage.charger.calls("1", "DataTransfer", vendorId="x")
    text = '[4,"1","NotSupported","no",{ "a" : 1.10 }]'
    stage.primary.says(text)
    assert stage.charger.hears_text() == text


def test_an_unasked_answer_is_dropped() -> None:
    """A charger's firmware may drop its own pending Call when it gets a stray answer."""
    stage = Stage()
    stage.primary.answers("nobody-asked")
    stage.primary.errs("nobody-asked")
    assert stage.charger.hears() == []


def test_a_late_answer_is_dropped() -> None:
    """After `call_timeout` the charger has given up and repeats."""
    stage = Stage()
    stage.charger.calls("1", "Heartbeat")
    stage.passes(31)
    stage.primary.answers("1", currentTime="t")
    assert stage.charger.hears() == []


def test_one_call_at_a_time_is_outstanding_at_the_primary() -> None:
    """A charger with several Calls in flight has them passed on in order."""
    stage = Stage()
    for number in "123":
        stage.charger.calls(number, "DataTransfer", vendorId=number)
    assert [message[1] for message in stage.primary.hears()] == ["1"]
    stage.primary.answers("1", status="Accepted")
    assert [message[1] for message in stage.primary.hears()] == ["2"]
    stage.passes(31)
    assert [message[1] for message in stage.primary.hears()] == ["3"]


def test_equal_calls_sent_ahead_are_all_answered() -> None:
    """A charger that does not wait for answers repeats nothing."""
    stage = Stage()
    for message_id in "123":
        stage.charger.calls(message_id, "Heartbeat")
        stage.primary.answers(message_id, currentTime="t")
    assert [message[1] for message in stage.charger.hears()] == ["1", "2", "3"]


def test_equal_meter_values_that_wait_are_all_delivered() -> None:
    """Equal readings are readings."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.primary.lost()
    for message_id in "12":
        stage.charger.calls(message_id, "MeterValues", connectorId=1, meterValue=[])
    assert len(stage.outbox(p.Peer.PRIMARY).live) == 2


def test_a_flood_of_waiting_calls_is_bounded() -> None:
    """What is too much is dropped; its sender repeats it."""
    stage = Stage()
    for number in range(p.MAX_LIVE + 10):
        stage.charger.calls(str(number), "DataTransfer", vendorId=str(number))
    assert len(stage.outbox(p.Peer.PRIMARY).live) == p.MAX_LIVE


# Rule 4 and 5: Calls of the servers.


@pytest.mark.parametrize("name", ["primary", "secondary"])
def test_a_call_of_a_server_reaches_the_charger_and_its_answer_the_server(name: str) -> None:
    """Text and id pass unchanged in both directions."""
    stage = Stage()
    server = getattr(stage, name)
    text = '[2,"x1","GetConfiguration", {"key":["A"]}]'
    server.says(text)
    assert stage.charger.hears_text() == text
    answer = '[3,"x1",{"configurationKey":[] , "n": 1E400000}]'
    stage.charger.says(answer)
    assert server.hears_text() == answer
    assert stage.primary.hears() == stage.secondary.hears() == []


def test_an_error_of_the_charger_goes_to_the_server_that_called() -> None:
    """A CallError is an answer like any other."""
    stage = Stage()
    stage.secondary.calls("x", "ClearCache")
    stage.charger.errs("x", "NotSupported")
    assert stage.secondary.hears() == [[4, "x", "NotSupported", "", {}]]
    assert stage.primary.hears() == []


def test_an_answer_that_nobody_waits_for_goes_nowhere() -> None:
    """The charger's second answer, or one to nothing, is dropped."""
    stage = Stage()
    stage.charger.answers("?", status="Accepted")
    stage.primary.calls("x", "ClearCache")
    stage.charger.answers("x", status="Accepted")
    stage.charger.answers("x", status="Accepted")
    assert stage.primary.hears() == [[3, "x", {"status": "Accepted"}]]
    assert stage.secondary.hears() == []


def test_the_same_id_from_both_servers_is_told_apart() -> None:
    """The second is rewritten on the way down and restored on the way up."""
    stage = Stage()
    stage.primary.calls("1", "ClearCache")
    stage.secondary.calls("1", "GetLocalListVersion")
    assert stage.charger.hears() == [[2, "1", "ClearCache", {}]]
    stage.charger.answers("1", status="Accepted")
    ((_, wire, action, _),) = stage.charger.hears()
    assert action == "GetLocalListVersion"
    assert wire != "1"
    stage.charger.answers(wire, listVersion=3)
    assert stage.primary.hears() == [[3, "1", {"status": "Accepted"}]]
    assert stage.secondary.hears() == [[3, "1", {"listVersion": 3}]]


def test_a_command_of_a_server_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Who resets the charger, or starts it remotely, belongs into the story of the day."""
    caplog.set_level("INFO")
    stage = Stage()
    stage.secondary.calls("1", "Reset", type="Soft")
    stage.charger.answers("1", status="Rejected")
    stage.primary.calls("2", "RemoteStartTransaction", idTag="X")
    stage.charger.errs("2", "InternalError")
    told = [record.getMessage() for record in caplog.records]
    assert "CP1: secondary asked for Reset: Rejected" in told
    assert "CP1: primary asked for RemoteStartTransaction: InternalError" in told


def test_a_verdict_against_a_badge_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of the primary, which the charger hears, and of the secondary, which it does not."""
    caplog.set_level("INFO")
    stage = Stage()
    stage.charger.calls("1", "Authorize", idTag="PRIM1234567")
    stage.primary.answers("1", idTagInfo={"status": "Blocked"})
    stage.charger.calls("2", "Authorize", idTag="SECO1234567")
    stage.secondary.answers(stage.secondary.hears_call()[0], idTagInfo={"status": "Invalid"})
    told = [record.getMessage() for record in caplog.records]
    assert "CP1: primary answers Authorize with status Blocked; badge ****4567" in told
    assert "CP1: secondary answers Authorize with status Invalid; badge ****4567" in told


def test_the_servers_take_turns() -> None:
    """A server with many Calls does not keep the other waiting for all of them."""
    stage = Stage()
    for number in range(3):
        stage.primary.calls(f"p{number}", "ClearCache")
    for number in range(2):
        stage.secondary.calls(f"s{number}", "ClearCache")
    order = []
    while heard := stage.charger.hears():
        ((_, message_id, _, _),) = heard
        order.append(message_id)
        stage.charger.answers(message_id, status="Accepted")
    assert order == ["p0", "s0", "p1", "s1", "p2"]


def test_a_call_that_the_charger_leaves_unanswered_is_answered_to_its_server() -> None:
    """`call_timeout` counts from sending; then the next is sent."""
    stage = Stage()
    stage.primary.calls("1", "ClearCache")
    stage.passes(20)
    stage.secondary.calls("2", "ClearCache")
    stage.charger.hears()
    stage.passes(10.5)
    assert stage.primary.hears()[0][:3] == [4, "1", "GenericError"]
    assert stage.charger.hears_call()[0] == "2"
    stage.passes(29)
    assert stage.secondary.hears() == []
    stage.passes(2)
    assert stage.secondary.hears()[0][:3] == [4, "2", "GenericError"]


def test_a_late_answer_of_the_charger_is_not_taken_for_another_calls() -> None:
    """An id given up is not used again for a while, even if the other server picks it."""
    stage = Stage()
    stage.primary.calls("1", "ClearCache")
    stage.passes(31)
    stage.primary.hears(), stage.charger.hears()
    stage.secondary.calls("1", "GetLocalListVersion")
    wire = stage.charger.hears_call()[0]
    assert wire != "1"
    stage.charger.answers("1", status="Accepted")
    assert stage.primary.hears() == stage.secondary.hears() == []
    stage.charger.answers(wire, listVersion=1)
    assert stage.secondary.hears() == [[3, "1", {"listVersion": 1}]]


def test_a_call_that_waits_unsent_for_too_long_is_answered_too() -> None:
    """Twice `call_timeout` is the most that a server's Call waits for its turn."""
    stage = Stage(
        "", ini="[host]\ncall_timeout = 10\n[ext-server]\nserver = ws://a\nsecondary_server = ws://b\n{more}"
    )
    for number in range(4):
        stage.primary.calls(str(number), "ClearCache")
    stage.passes(19)
    assert [message[1] for message in stage.primary.hears()] == ["0"]
    stage.passes(2)
    assert [message[1] for message in stage.primary.hears()] == ["1", "2", "3"]


def test_too_many_waiting_calls_of_a_server_are_answered_at_once() -> None:
    """The queue for the charger has a bound for each server."""
    stage = Stage()
    for number in range(p.MAX_COMMANDS + 2):
        stage.primary.calls(str(number), "ClearCache")
    assert [message[:3] for message in stage.primary.hears()] == [
        [4, str(p.MAX_COMMANDS + 1), "GenericError"]
    ]


def test_the_calls_of_a_server_that_is_gone_are_forgotten() -> None:
    """Its Call at the charger keeps the place until it is answered, to nobody."""
    stage = Stage()
    stage.secondary.calls("1", "ClearCache")
    stage.secondary.calls("2", "ClearCache")
    stage.secondary.lost()
    stage.secondary_connects()
    stage.primary.calls("3", "ClearCache")
    assert "3" not in [message[1] for message in stage.charger.hears()]
    stage.secondary.hears()
    stage.charger.answers("1", status="Accepted")
    assert stage.secondary.hears() == []
    assert [message[1] for message in stage.charger.hears()] == ["3"]


def test_a_call_that_nobody_waits_for_times_out_silently() -> None:
    """Its server has gone; there is nobody to tell."""
    stage = Stage()
    stage.secondary.calls("1", "ClearCache")
    stage.secondary.lost()
    stage.passes(31)
    assert stage.relay.commands.outstanding is None


# Who may name whose transaction.


def test_a_server_stops_its_own_session_by_its_own_id() -> None:
    """The id is translated on the way down."""
    stage = Stage()
    transaction_id = stage.secondary_session(server_id=7)
    stage.secondary.says('[2,"x","RemoteStopTransaction",{"transactionId" : 7}]')
    assert (
        stage.charger.hears_text()
        == f'[2,"x","RemoteStopTransaction",{{"transactionId" : {transaction_id}}}]'
    )


def test_a_server_cannot_stop_the_others_session() -> None:
    """It is answered with its schema's Rejected, and the charger hears nothing."""
    stage = Stage()
    stage.primary_session(server_id=7)
    stage.secondary.calls("x", "RemoteStopTransaction", transactionId=7)
    assert stage.secondary.hears() == [[3, "x", {"status": "Rejected"}]]
    assert stage.charger.hears() == []


def test_the_primary_cannot_stop_a_session_of_the_secondary() -> None:
    """Not even by the id that the charger knows it by."""
    stage = Stage()
    transaction_id = stage.secondary_session(server_id=7)
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=transaction_id)
    assert stage.primary.hears() == [[3, "x", {"status": "Rejected"}]]


def test_the_primary_may_name_a_transaction_that_nobody_knows() -> None:
    """It may be older than the proxy; from the secondary such a Call is refused."""
    stage = Stage()
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=99)
    assert stage.charger.hears_call()[2] == {"transactionId": 99}
    stage.secondary.calls("y", "RemoteStopTransaction", transactionId=99)
    assert stage.secondary.hears() == [[3, "y", {"status": "Rejected"}]]


@pytest.mark.parametrize("nothing", [None, True, [], {}])
def test_what_is_no_id_names_no_session(nothing: object) -> None:
    """Not even one that its server knows by an id that is not usable."""
    stage = Stage()
    stage.primary_session(server_id=0)
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=nothing)
    assert stage.charger.hears_call()[2] == {"transactionId": nothing}
    stage.secondary.calls("y", "RemoteStopTransaction", transactionId=nothing)
    assert stage.secondary.hears() == [[3, "y", {"status": "Rejected"}]]


def test_a_charging_profile_is_translated_where_it_names_the_transaction() -> None:
    """The id stands deep in the payload; nothing else changes."""
    stage = Stage()
    transaction_id = stage.secondary_session(server_id=7)
    text = '[2,"x","SetChargingProfile",{"csChargingProfiles":{"chargingProfileId":7,"transactionId":%d}}]'
    stage.secondary.says(text % 7)
    assert stage.charger.hears_text() == text % transaction_id


def test_a_server_that_reuses_an_id_means_its_newest_open_session() -> None:
    """Of several sessions that it knows by one id, the open one is meant."""
    stage = Stage()
    first = stage.secondary_session(server_id=1)
    stage.charger.calls("e", "StopTransaction", transactionId=first, meterStop=1, timestamp="t")
    stage.delivers()
    second = stage.secondary_session(server_id=1, badge="SECO2")
    stage.secondary.calls("x", "RemoteStopTransaction", transactionId=1)
    assert stage.charger.hears_call()[2] == {"transactionId": second}


# secondary_refuse.


def test_an_action_on_secondary_refuse_is_answered_with_the_rejected_of_its_schema() -> None:
    """Only the secondary is refused; the primary may do what it likes."""
    stage = Stage("secondary_refuse = Reset, SendLocalList")
    stage.secondary.calls("x", "Reset", type="Hard")
    assert stage.secondary.hears() == [[3, "x", {"status": "Rejected"}]]
    stage.primary.calls("y", "Reset", type="Hard")
    assert stage.charger.hears_call()[1] == "Reset"


def test_an_action_without_a_rejected_is_refused_with_a_security_error() -> None:
    """Where the schema has no status Rejected."""
    stage = Stage("secondary_refuse = SendLocalList")
    stage.secondary.calls("x", "SendLocalList", listVersion=1, updateType="Full")
    assert stage.secondary.hears()[0][:3] == [4, "x", "SecurityError"]


# Bad input.


@pytest.mark.parametrize("text", ["", "   ", "{", "[]", "[7,1]", '[1,"a","b",{}]', '[3,"x"', "null"])
def test_malformed_text_of_anyone_is_dropped_and_the_session_goes_on(text: str) -> None:
    """Nobody hears of it."""
    stage = Stage()
    for peer in (stage.charger, stage.primary, stage.secondary):
        peer.says(text)
    stage.charger.calls("1", "Heartbeat")
    assert stage.primary.hears_call()[1] == "Heartbeat"
    assert stage.charger.hears() == stage.secondary.hears() == []


@pytest.mark.parametrize(
    ("version", "code"), [("ocpp1.6", "FormationViolation"), ("ocpp2.0.1", "FormatViolation")]
)
def test_a_malformed_call_whose_id_can_be_read_gets_the_versions_code(version: str, code: str) -> None:
    """It is answered to its sender, whoever that is."""
    stage = Stage(version=version)
    for peer in (stage.charger, stage.primary, stage.secondary):
        peer.says('[2,"77","Authorize",{"idTag":}]')
        assert peer.hears()[0][:3] == [4, "77", code]


# OCPP 2.1: SEND and CallResultError.


def test_a_send_of_the_charger_goes_to_the_primary_and_blocks_nothing() -> None:
    """Nobody answers it, so nothing waits for its answer."""
    stage = Stage(version="ocpp2.1")
    stage.charger.says('[6,"1","NotifyPeriodicEventStream",{"id":1}]')
    stage.charger.calls("2", "Heartbeat")
    assert [message[1] for message in stage.primary.hears()] == ["1", "2"]


def test_a_send_of_a_server_goes_to_nobody() -> None:
    """No Action of a server is one."""
    stage = Stage(version="ocpp2.1")
    stage.secondary.says('[6,"2","Whatever",{}]')
    assert stage.charger.hears() == []


def test_a_call_result_error_for_no_answer_goes_nowhere() -> None:
    """Nor does any other: what they say of an answer helps nobody here."""
    stage = Stage(version="ocpp2.1")
    stage.charger.says('[5,"1","FormatViolation","",{}]')
    stage.secondary.calls("9", "ClearCache")
    stage.charger.answers("9", status="Accepted")
    stage.charger.hears()
    stage.primary.says('[5,"9","FormatViolation","",{}]')
    assert stage.charger.hears() == stage.primary.hears() == []


def test_a_call_of_a_server_without_a_charger_is_answered_with_an_error() -> None:
    """On a connection that only delivers, there is nobody to ask."""
    stage = Stage()
    stage.secondary_session()
    stage.charger.calls("m", "MeterValues", connectorId=1, meterValue=[])
    stage.charger.lost()
    stage.secondary.hears()
    stage.secondary.calls("1", "ClearCache")
    assert stage.secondary.hears()[0][:3] == [4, "1", "GenericError"]


def test_texts_are_forwarded_byte_for_byte() -> None:
    """Whatever the spelling of numbers, escapes and blanks."""
    stage = Stage()
    text = '[ 2 , "id-é" , "DataTransfer" , {"vendorId":"\\u00e9\\ud800", "n":1.10, "b": 1E5}]'
    stage.charger.says(text)
    assert stage.primary.hears_text() == text
    assert json.loads(text)[1] == "id-é"
    assert actions([]) == []
