"""What survives a kill of the proxy, or a start with another ini, in plays."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import (
    ASKED,
    FORWARD,
    LOCAL_PRIMARY,
    NO_SECONDARY,
    NORMAL,
    OTHER_PRIMARY,
    OTHER_SECONDARY,
    PRIMARY,
    SECONDARY,
    Play,
    asks,
    come_back,
    delivers_alone,
    event,
    followers,
    killed,
    left,
    named,
    numbers,
    reads,
    refused,
    save,
    stops,
    told_id,
    version_of,
    waits,
    warnings,
)
from tests.play.plays import Stage, StageLink, actions

# The sessions of the secondary.


def test_a_session_of_the_secondary_goes_on_after_a_kill(play: Play) -> None:
    """Its messages reach the secondary under the secondary's own transaction id."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    killed(stage)
    reads(stage, transaction_id)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "m", {}], [3, "e", {}]]
    assert named(stage.delivers()) == [("MeterValues", 70), ("StopTransaction", 70)]
    assert stage.primary.hears() == []


def test_a_session_that_was_not_delivered_yet_is_delivered_after_a_kill(play: Play) -> None:
    """Complete, in order, once, without the charger, and then it is gone from the disk, too."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    reads(stage, transaction_id)
    stops(stage, transaction_id)
    save(stage)
    stage.killed()
    stage.relay.deliver()
    assert stage.relay.tasks.started == ["CP1: secondary: dial"]  # type: ignore[attr-defined]
    stage.secondary_connects(accepts=False)
    session = [("StartTransaction", None), ("MeterValues", 72), ("StopTransaction", 72)]
    assert named(stage.delivers()) == [("BootNotification", None), *session]
    stage.killed()
    assert left(stage) == []


def test_a_stored_call_keeps_its_message_id_over_a_kill(play: Play) -> None:
    """What the secondary may have had already comes again as the same text."""
    stage = play()
    stage.starts("SECO1")
    first = stage.secondary.hears_text()
    killed(stage)
    assert stage.secondary.hears_text() == first


def test_what_is_not_on_disk_yet_was_not_answered(play: Play) -> None:
    """The charger sends it again, and one session comes of it."""
    stage = play()
    save(stage)
    stage.starts("SECO1", "1")
    assert stage.charger.texts == []
    stage.killed()
    assert stage.memory.sessions == {}
    come_back(stage)
    stage.starts("SECO1", "2")
    assert [message[1] for message in stage.charger.hears()] == ["2"]
    assert named(stage.delivers()) == [("StartTransaction", None)]


def test_a_start_repeated_after_a_kill_joins_its_session(play: Play) -> None:
    """Killed between the commit and the answer: the same transaction id, one Call at the server."""
    stage = play()
    stage.starts("SECO1", "1")
    stage.journal.settle()
    (transaction_id,) = stage.memory.sessions
    killed(stage)
    stage.starts("SECO1", "2")
    assert told_id(stage) == transaction_id
    assert named(stage.delivers()) == [("StartTransaction", None)]
    assert len(stage.memory.sessions) == 1


@pytest.mark.parametrize("delivered", [True, False])
def test_a_stop_repeated_after_a_kill_is_answered_and_not_delivered_again(
    play: Play, delivered: bool
) -> None:
    """Whether its server has had it already or not."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stops(stage, transaction_id, "1")
    if delivered:
        stage.delivers()
    killed(stage)
    stops(stage, transaction_id, "2")
    assert stage.charger.hears() == [[3, "2", {}]]
    assert named(stage.delivers()) == ([] if delivered else [("StopTransaction", 70)])


@pytest.mark.parametrize("badge", ["SECO1", ""])
def test_an_event_repeated_after_a_kill_is_answered_and_not_delivered_again(play: Play, badge: str) -> None:
    """The same transaction and seqNo, with an owner or without one yet."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started", badge)
    killed(stage)
    assert event(stage, 0, "Started", badge)[0][:2] == [3, "T0"]
    event(stage, 1, badge="SECO1")
    assert numbers(stage.delivers()) == [0, 1]


def test_an_answer_that_was_recorded_is_not_asked_for_again(play: Play) -> None:
    """A kill between two Calls of a session: the first is not sent twice."""
    stage = play()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=70, idTagInfo={})
    killed(stage)
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_two_kills_in_a_row_are_as_good_as_one(play: Play) -> None:
    """Nothing is lost by starting."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    killed(stage)
    stage.secondary.hears()
    killed(stage)
    assert named(stage.delivers()) == [("StartTransaction", None), ("StopTransaction", 71)]


def stand_ins(play: Play) -> Stage:
    """Begin a transaction of the secondary; a copy is in flight while two of its events come, both kept."""
    stage = play(FORWARD, version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    stage.secondary.answers(stage.secondary.hears_call()[0], idTokenInfo={"status": "Accepted"})
    stage.charger.calls("s", "StatusNotification", evseId=1, connectorId=1, connectorStatus="Occupied")
    stage.primary.answers("s")
    assert stage.secondary.hears_call()[1] == "StatusNotification"
    event(stage, 1)
    stage.passes(1)
    event(stage, 2)
    return stage


def test_events_that_the_proxy_stands_in_for_keep_their_order_over_a_kill(play: Play) -> None:
    """Also where the second is given up while the first one is on its way."""
    stage = stand_ins(play)
    stage.passes(60)
    assert [message[1] for message in stage.charger.hears()] == ["T1", "T2"]
    assert [call.content.payload["seqNo"] for call in stage.waiting(SECONDARY)] == [1, 2]
    stage.secondary.hears()
    killed(stage)
    assert numbers(stage.delivers()) == [1, 2]


# Whose a session is.


@pytest.mark.parametrize("server_id", [7, 0, -1, p.FIRST_PROXY_ID, p.FIRST_PROXY_ID + 1])
def test_a_session_of_the_primary_goes_on_after_a_kill(play: Play, server_id: int) -> None:
    """Under the primary's own id, also one that the charger knows by another."""
    stage = play()
    transaction_id = stage.primary_session(server_id)
    killed(stage)
    reads(stage, transaction_id)
    assert stage.primary.hears_call()[2]["transactionId"] == server_id
    stage.primary.answers("m")
    stops(stage, transaction_id, idTag="SECO1")
    assert stage.primary.hears_call()[2]["transactionId"] == server_id
    assert stage.secondary.hears() == []


def test_a_forwarded_session_of_the_secondary_goes_on_after_a_kill(play: Play) -> None:
    """Its verdicts are the secondary's again."""
    stage = play(FORWARD)
    stage.starts("SECO1", "1")
    message_id = stage.secondary.hears_call()[0]
    stage.secondary.answers(message_id, transactionId=7, idTagInfo={"status": "Accepted"})
    assert told_id(stage) == 7
    killed(stage)
    stops(stage, 7)
    message_id, action, _ = stage.secondary.hears_call()
    assert action == "StopTransaction"
    stage.secondary.answers(message_id, idTagInfo={"status": "Expired"})
    assert stage.charger.hears() == [[3, "e", {"idTagInfo": {"status": "Expired"}}]]


def test_a_start_that_the_proxy_stood_in_for_is_delivered_after_a_kill(play: Play) -> None:
    """Then its owner answers itself again."""
    stage = play(FORWARD)
    stage.secondary.lost()
    stage.starts("SECO1")
    stage.passes(6)
    transaction_id = told_id(stage)
    killed(stage)
    assert named(stage.delivers()) == [("StartTransaction", None)]
    stops(stage, transaction_id)
    assert stage.charger.hears() == []
    assert stage.secondary.hears_call()[2]["transactionId"] == 71


def test_a_relayed_start_repeated_after_a_kill_hears_the_same_answer(play: Play) -> None:
    """The primary's record was on disk before the charger heard of it."""
    stage = play()
    stage.primary_session(server_id=7)
    killed(stage)
    stage.starts("PRIM1", "again")
    assert stage.charger.hears() == [[3, "again", {"transactionId": 7, "idTagInfo": {"status": "Accepted"}}]]
    assert stage.primary.hears() == []


def test_a_relayed_start_without_an_answer_is_sent_again_when_repeated_after_a_kill(play: Play) -> None:
    """Nobody knows whether its primary has had it."""
    stage = play()
    stage.starts("PRIM1", "1")
    killed(stage)
    stage.starts("PRIM1", "2")
    assert stage.primary.hears_call()[0] == "2"
    stage.primary.answers("2", transactionId=7, idTagInfo={"status": "Accepted"})
    assert told_id(stage) == 7
    assert len(stage.memory.sessions) == 1


def test_a_late_answer_to_a_relayed_start_survives_a_kill(play: Play) -> None:
    """The server has the session; the repeat must not make it two."""
    stage = play()
    stage.starts("PRIM1", "1")
    waits(stage, 31)
    stage.primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    killed(stage)
    stage.starts("PRIM1", "2")
    assert stage.primary.hears() == []
    assert told_id(stage) == 7


def test_forward_vouches_for_a_listed_badge_whose_start_is_repeated_after_a_kill(play: Play) -> None:
    """The list speaks for it, whatever the proxy has forgotten."""
    stage = play(FORWARD)
    stage.starts("SECO1", "1")
    save(stage)
    stage.killed()
    stage.charger_connects()
    stage.passes(6)
    stage.starts("SECO1", "2")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Accepted"}


@pytest.mark.parametrize(("peer", "server_id"), [(PRIMARY, 0), (SECONDARY, 70)])
def test_the_owner_stops_its_session_remotely_after_a_kill(play: Play, peer: p.Peer, server_id: int) -> None:
    """By its own id; the other server is answered with Rejected."""
    stage = play()
    begin = stage.primary_session if peer is PRIMARY else stage.secondary_session
    transaction_id = begin(server_id)
    killed(stage)
    owner, other = stage.primary, stage.secondary
    if peer is SECONDARY:
        owner, other = other, owner
    other.calls("x", "RemoteStopTransaction", transactionId=transaction_id)
    assert other.hears() == [[3, "x", {"status": "Rejected"}]]
    owner.calls("r", "RemoteStopTransaction", transactionId=server_id)
    assert stage.charger.hears_call()[2] == {"transactionId": transaction_id}


def test_a_session_is_still_found_by_its_connector_after_a_kill(play: Play) -> None:
    """Meter values without a transaction id belong to the session there, with its owner's id."""
    stage = play()
    stage.primary_session(server_id=7, connector=2)
    stage.secondary_session(server_id=70, connector=1)
    killed(stage)
    stage.charger.calls("m", "MeterValues", connectorId=1, meterValue=[])
    assert named(stage.delivers()) == [("MeterValues", 70)]
    assert stage.primary.hears() == []


def test_a_session_that_has_left_its_connector_leaves_it_over_a_kill(play: Play) -> None:
    """It stays routable by its id."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stage.charger.calls("s", "StatusNotification", connectorId=1, errorCode="NoError", status="Available")
    killed(stage)
    assert stage.memory.on_connector(1) is None
    stage.delivers()
    stops(stage, transaction_id)
    assert named(stage.delivers()) == [("StopTransaction", 70)]


def test_a_rejected_session_is_rejected_after_a_kill(play: Play) -> None:
    """Recorded here and delivered nowhere."""
    stage = play("unknown_rfid = reject")
    stage.starts("STRANGER")
    transaction_id = told_id(stage)
    killed(stage)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.primary.hears() == stage.delivers() == []


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
@pytest.mark.parametrize("peer", [PRIMARY, SECONDARY])
def test_a_2_x_transaction_keeps_its_owner_over_a_kill(play: Play, version: str, peer: p.Peer) -> None:
    """The badge came with the first event; the later ones carry none."""
    stage = play(version=version)
    event(stage, 0, "Started", f"{peer.value[:4]}1")
    stage.delivers()
    stage.primary.answers("T0", idTokenInfo={"status": "Accepted"})
    killed(stage)
    event(stage, 1)
    event(stage, 2, "Ended")
    heard = [*stage.primary.hears(), *([2, "", *call] for call in stage.delivers())]
    if peer is PRIMARY:
        assert [message[1] for message in heard] == ["T1"]  # T2 waits for its answer.
    else:
        assert [message[3]["seqNo"] for message in heard] == [1, 2]


def test_events_without_an_owner_are_handed_over_after_a_kill(play: Play) -> None:
    """In order, the one with the badge last; a second kill in between changes nothing."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started")
    event(stage, 1)
    killed(stage)
    event(stage, 2)
    killed(stage)
    assert event(stage, 3, badge="SECO1")[0][:2] == [3, "T3"]
    assert numbers(stage.delivers()) == [0, 1, 2, 3]
    assert stage.primary.hears() == []


def test_kept_events_reach_the_primary_after_a_kill_without_the_charger(play: Play) -> None:
    """If the proxy can log in by itself; the last event, which was relayed, the charger repeats."""
    stage = play("primary_user = u", version="ocpp2.0.1")
    event(stage, 0, "Started")
    event(stage, 1, "Ended")
    save(stage)
    stage.killed()
    stage.relay.deliver()
    assert stage.relay.tasks.started == ["CP1: primary: dial"]  # type: ignore[attr-defined]
    stage.primary_connects()
    message_id, action, _ = stage.primary.hears_call()
    assert action == "BootNotification"
    stage.primary.answers(message_id, status="Accepted", currentTime="x", interval=300)
    assert stage.primary.hears_call()[2]["seqNo"] == 0


def test_events_without_an_owner_are_the_primarys_after_a_week_without_the_proxy(play: Play) -> None:
    """They were answered, so they must not be lost."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started")
    save(stage)
    stage.killed()
    stage.time += p.SILENT_SECONDS + p.DAY
    killed(stage)
    stage.passes(p.MADE_UP_BOOT_SECONDS + 1)
    assert actions(stage.primary.hears()) == ["TransactionEvent"]


def test_events_that_become_the_primarys_without_the_charger_are_delivered_without_it(play: Play) -> None:
    """If the proxy can log in by itself; nobody else would dial."""
    stage = play("primary_user = u", version="ocpp2.0.1")
    event(stage, 0, "Started")
    save(stage)
    stage.time += p.SILENT_SECONDS + p.DAY
    stage.killed()
    stage.relay.deliver()
    assert not stage.relay.is_idle
    stage.passes(10)
    assert left(stage, PRIMARY) == ["TransactionEvent"]
    assert "CP1: primary: dial" in stage.relay.tasks.started  # type: ignore[attr-defined]


# Claims and requests.


@pytest.mark.parametrize(("seconds", "owner"), [(200, SECONDARY), (301, PRIMARY)])
def test_a_remote_start_still_counts_after_a_kill(play: Play, seconds: float, owner: p.Peer) -> None:
    """For as long as it would have without."""
    stage = play()
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="GUEST", connectorId=1)
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    save(stage)
    stage.time += seconds
    killed(stage)
    stage.starts("GUEST")
    assert actions(stage.primary.hears()) == (["StartTransaction"] if owner is PRIMARY else [])
    assert actions(stage.secondary.hears()) == (["StartTransaction"] if owner is SECONDARY else [])


def test_a_remote_start_that_was_used_is_used_up_after_a_kill(play: Play) -> None:
    """One session for each."""
    stage = play()
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="GUEST")
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    stage.starts("GUEST", "1")
    killed(stage)
    stage.starts("GUEST", "2", connector=2)
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_remote_start_outlives_no_clock_that_was_set_back(play: Play) -> None:
    """Five minutes from the start of the proxy, at most."""
    stage = play()
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="GUEST")
    stage.charger.hears()
    stage.utc -= 10 * p.DAY
    killed(stage)
    stage.time += p.CLAIM_SECONDS
    stage.starts("GUEST")
    assert actions(stage.primary.hears()) == ["StartTransaction"]


@pytest.mark.parametrize(("minutes", "owner"), [(50, SECONDARY), (70, PRIMARY)])
def test_a_reservation_counts_until_its_expiry_date_over_a_kill(
    play: Play, minutes: int, owner: p.Peer
) -> None:
    """Not for as long as a remote start."""
    stage = play()
    expiry = p.Instant(0.0, stage.now().utc + 3600).text
    stage.secondary.calls("r", "ReserveNow", connectorId=1, expiryDate=expiry, idTag="GUEST", reservationId=5)
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    save(stage)
    stage.time += minutes * 60
    killed(stage)
    stage.starts("GUEST")
    assert actions(stage.primary.hears()) == (["StartTransaction"] if owner is PRIMARY else [])


def test_a_cancelled_reservation_stays_cancelled_over_a_kill(play: Play) -> None:
    """The server has taken its word back."""
    stage = play()
    reservation = {"expiryDate": "2099-01-01T00:00:00Z", "idTag": "GUEST", "reservationId": 5}
    stage.secondary.calls("r", "ReserveNow", connectorId=1, **reservation)
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    stage.secondary.calls("c", "CancelReservation", reservationId=5)
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    killed(stage)
    assert stage.memory.claims == []


@pytest.mark.parametrize("action", ASKED)
@pytest.mark.parametrize("ini", [OTHER_SECONDARY, NO_SECONDARY], ids=["another", "none"])
def test_what_a_server_asked_for_ends_with_it(play: Play, action: str, ini: str) -> None:
    """It falls to the primary; another company in the place of the secondary gets nothing of it."""
    stage = play(version=version_of(action))
    asks(stage, SECONDARY, action)
    killed(stage, ini)
    assert followers(stage, action) == [PRIMARY]
    assert left(stage) == []


# The station.


def test_the_secondary_gets_the_chargers_own_boot_and_statuses_after_a_kill(play: Play) -> None:
    """And heartbeats; the charger need not be there."""
    stage = play()
    stage.charger.calls("s", "StatusNotification", connectorId=2, errorCode="NoError", status="Faulted")
    stage.secondary.lost()
    stage.starts("SECO1")
    save(stage)
    stage.killed()
    stage.secondary_connects(accepts=False)
    assert stage.answer_boot(interval=40) == {"chargePointVendor": "V", "chargePointModel": "M"}
    message_id, action, payload = stage.secondary.hears_call()
    assert (action, payload["connectorId"], payload["status"]) == ("StatusNotification", 2, "Faulted")
    stage.secondary.answers(message_id)
    assert stage.secondary.hears_call()[1] == "StartTransaction"
    stage.passes(41)
    assert stage.secondary.hears_call()[1] == "Heartbeat"


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


def test_a_call_of_a_server_finds_no_charger_after_a_kill(play: Play) -> None:
    """It is answered with a CallError; the delivery goes on."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    save(stage)
    stage.killed()
    stage.secondary_connects(accepts=False)
    stage.secondary.calls("c", "GetConfiguration")
    boot, answer = stage.secondary.hears()
    assert (boot[2], answer[:3]) == ("BootNotification", [4, "c", "GenericError"])
    stage.secondary.answers(boot[1], status="Accepted", currentTime="x", interval=300)
    assert named(stage.delivers()) == [("StartTransaction", None)]


def test_a_server_that_wants_the_chargers_login_waits_for_the_charger_after_a_kill(play: Play) -> None:
    """`secondary_auth = forward`: the login is not kept."""
    stage = play("secondary_auth = forward")
    stage.secondary.lost()
    stage.starts("SECO1")
    save(stage)
    stage.killed()
    assert not stage.outbox(SECONDARY).is_wanted
    assert stage.relay.is_idle
    come_back(stage)
    assert named(stage.delivers()) == [("StartTransaction", None)]


# The version.


def updated(play: Play) -> Stage:
    """Let a whole session be left for the secondary, and the charger come back with OCPP 2.0.1."""
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    stage.charger.lost()
    stage.version = "ocpp2.0.1"
    stage.charger_connects()
    station = {"model": "M", "vendorName": "V"}
    stage.charger.calls("b", "BootNotification", reason="PowerUp", chargingStation=station)
    stage.primary.answers("b", status="Accepted", currentTime="2026-01-01T00:00:00Z", interval=300)
    return stage


def test_stored_calls_of_another_version_are_delivered_by_the_next_start(play: Play) -> None:
    """Over a connection in their own version."""
    stage = updated(play)
    save(stage)
    stage.killed()
    delivers_alone(stage)
    assert stage.relay.version == "ocpp1.6"
    stage.secondary_connects(accepts=False)
    session = [("StartTransaction", None), ("StopTransaction", 72)]
    assert named(stage.delivers()) == [("BootNotification", None), *session]
    assert left(stage) == []


def test_a_delivery_in_a_former_version_says_nothing_of_the_new_one(play: Play) -> None:
    """The charger's boot and its statuses are of OCPP 2.0.1: a boot is made up, and no status is told."""
    stage = updated(play)
    stage.charger.calls("s", "StatusNotification", evseId=1, connectorId=1, connectorStatus="Occupied")
    stage.primary.answers("s")
    save(stage)
    stage.killed()
    delivers_alone(stage)
    stage.secondary_connects(accepts=False)
    assert stage.answer_boot().keys() == {"chargePointVendor", "chargePointModel"}
    assert named(stage.delivers()) == [("StartTransaction", None), ("StopTransaction", 71)]


# The server's address.


def begun_and_read(play: Play) -> tuple[Stage, Any]:
    """Begin a session of the secondary (there: 70); a reading waits when the secondary is lost."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    stage.secondary.lost()
    reads(stage, transaction_id)
    return stage, transaction_id


@pytest.mark.parametrize("ini", [OTHER_SECONDARY, NO_SECONDARY], ids=["another", "none"])
def test_what_is_left_for_a_server_that_the_ini_no_longer_names_is_kept(
    play: Play, ini: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And so is what comes later; with the old address it is delivered in order."""
    stage, transaction_id = begun_and_read(play)
    killed(stage, ini)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert "StopTransaction is kept for ws://secondary.example" in caplog.text
    assert stage.primary.hears() == []
    assert SECONDARY not in stage.relay.outboxes or stage.delivers() == []
    assert left(stage) == ["MeterValues", "StopTransaction"]
    killed(stage, ini)
    killed(stage, NORMAL)
    assert named(stage.delivers()) == [("MeterValues", 70), ("StopTransaction", 70)]
    assert left(stage) == []


def test_a_new_session_goes_to_the_new_secondary(play: Play) -> None:
    """What is left for the old one holds nothing up."""
    stage, _ = begun_and_read(play)
    killed(stage, OTHER_SECONDARY)
    stage.starts("SECO2", connector=2)
    assert named(stage.delivers()) == [("StartTransaction", None)]
    assert left(stage) == ["MeterValues"]


def test_a_stop_without_a_session_is_bound_to_its_server_as_well(play: Play) -> None:
    """A badge of the secondary stops what nobody here knows; another company gets nothing of it."""
    stage = play()
    stage.secondary.lost()
    stops(stage, -1, idTag="SECO1")
    assert stage.charger.hears() == [[3, "e", {}]]
    killed(stage, OTHER_SECONDARY)
    assert stage.delivers() == []
    assert left(stage) == ["StopTransaction"]


def test_a_stop_never_reaches_another_primary_than_the_one_of_its_session(play: Play) -> None:
    """The charger is answered here; the message is kept for the old one."""
    stage = play()
    stage.primary_session(server_id=7)
    killed(stage, OTHER_PRIMARY)
    stops(stage, 7)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.primary.hears() == []
    assert left(stage, PRIMARY) == ["StopTransaction"]
    killed(stage, NORMAL)
    stage.passes(p.MADE_UP_BOOT_SECONDS)
    assert stage.primary.hears_call()[2]["transactionId"] == 7


def test_a_session_of_the_proxy_itself_goes_to_no_server_that_comes_later(play: Play) -> None:
    """`server = local` has recorded its start, and records its stop."""
    stage = play(ini=LOCAL_PRIMARY, connect=False)
    stage.charger_connects()
    stage.starts("PRIM1")
    transaction_id = told_id(stage)
    killed(stage, NORMAL)
    stops(stage, transaction_id)
    assert stage.charger.hears()[-1] == [3, "e", {}]
    assert stage.primary.hears() == left(stage, PRIMARY) == []


def test_a_remote_stop_of_another_server_finds_no_session_of_the_old_one(play: Play) -> None:
    """Its id 70 is not theirs."""
    stage, _ = begun_and_read(play)
    killed(stage, OTHER_SECONDARY)
    stage.secondary.calls("r", "RemoteStopTransaction", transactionId=70)
    assert stage.secondary.hears() == [[3, "r", {"status": "Rejected"}]]


# What was refused.


def refuse_start(stage: Stage) -> None:
    """Let the secondary meet the start that it gets with its last CallError."""
    start = stage.waiting(SECONDARY)[0]
    start.tries = len(p.RETRY_SECONDS)
    stage.secondary.errs(stage.secondary.hears_call()[0])


def test_a_start_that_met_call_errors_is_tried_again_at_every_start(play: Play) -> None:
    """Once; when it is accepted, the rest of its session goes, too."""
    stage = play()
    stage.starts("SECO1")
    stops(stage, told_id(stage))
    refuse_start(stage)
    error = "CallError InternalError"
    for _ in range(2):
        assert refused(stage) == [("StartTransaction", error), ("StopTransaction", error)]
        killed(stage)
        stage.secondary.errs(stage.secondary.hears_call()[0])
        assert stage.secondary.hears() == []
    killed(stage)
    assert named(stage.delivers()) == [("StartTransaction", None), ("StopTransaction", 71)]
    assert refused(stage) == []
    killed(stage)
    assert (left(stage), refused(stage)) == ([], [])


def test_what_comes_after_a_refused_start_is_delivered_with_it(play: Play) -> None:
    """In order: what was refused with it, and what comes after the kill, and the next one."""
    stage = play()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    refuse_start(stage)
    reads(stage, transaction_id)
    killed(stage)
    save(stage)
    killed(stage)
    stops(stage, transaction_id)
    assert named(stage.delivers()) == [
        ("StartTransaction", None),
        ("MeterValues", 71),
        ("StopTransaction", 71),
    ]


def test_a_2_x_start_that_met_call_errors_is_tried_again_as_well(play: Play) -> None:
    """The Started event, and the rest behind it."""
    stage = play(version="ocpp2.0.1")
    event(stage, 0, "Started", "SECO1")
    refuse_start(stage)
    event(stage, 1, "Ended")
    assert [action for action, _ in refused(stage)] == ["TransactionEvent"] * 2
    killed(stage)
    assert numbers(stage.delivers()) == [0, 1]
    assert refused(stage) == []


def test_what_comes_for_a_refused_session_while_its_server_is_not_named_is_refused_as_well(
    play: Play,
) -> None:
    """Its server has no id for it, whatever the ini says meanwhile."""
    stage = play()
    stage.starts("SECO1")
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=0, idTagInfo={"status": "Blocked"})
    transaction_id = told_id(stage)
    killed(stage, OTHER_SECONDARY)
    stops(stage, transaction_id)
    assert stage.charger.hears() == [[3, "e", {}]]
    killed(stage, NORMAL)
    assert stage.delivers() == []
    assert [action for action, _ in refused(stage)] == ["StartTransaction", "StopTransaction"]


def test_a_message_that_met_call_errors_is_tried_again_with_its_servers_id(play: Play) -> None:
    """The rest of its session has gone before."""
    stage = play()
    transaction_id = stage.secondary_session(server_id=70)
    reads(stage, transaction_id)
    refuse_start(stage)
    stops(stage, transaction_id)
    assert named(stage.delivers()) == [("StopTransaction", 70)]
    killed(stage)
    assert named(stage.delivers()) == [("MeterValues", 70)]


def test_what_was_refused_by_a_status_stays_refused(play: Play) -> None:
    """Kept, shown, and not tried again."""
    stage = play()
    stage.starts("SECO1")
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=0, idTagInfo={"status": "Blocked"})
    stops(stage, told_id(stage))
    for _ in range(2):
        killed(stage)
        assert stage.delivers() == []
        assert refused(stage) == [
            ("StartTransaction", "status Blocked"),
            ("StopTransaction", "status Blocked"),
        ]


# What the person who runs it reads.


@pytest.mark.parametrize(
    ("more", "ini", "words"),
    [
        ("", "", "CP1: secondary: 1 stored Calls are left from before; delivered now"),
        (
            "secondary_auth = forward",
            "",
            "CP1: secondary: 1 stored Calls are left from before;"
            " delivered when the charger connects: only it has the login",
        ),
        (
            "",
            OTHER_SECONDARY,
            "CP1: 1 stored Calls are kept for ws://secondary.example, which the ini does not name",
        ),
    ],
)
def test_a_start_tells_what_becomes_of_what_is_left(
    play: Play, caplog: pytest.LogCaptureFixture, more: str, ini: str, words: str
) -> None:
    """Delivered now, when the charger comes, or kept for an address that the ini does not name."""
    caplog.set_level(logging.INFO, "proxy")
    stage = play(more)
    stage.secondary.lost()
    stage.starts("SECO1")
    save(stage)
    stage.killed(ini)
    stage.relay.deliver()
    assert [words] == [line for record in caplog.records if "stored Calls" in (line := record.getMessage())]


def test_the_last_delivery_without_the_charger_is_told(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """So that a backlog has an end in the log, too."""
    caplog.set_level(logging.INFO, "proxy")
    stage = play()
    stage.secondary.lost()
    stage.starts("SECO1")
    save(stage)
    stage.killed()
    stage.secondary_connects(accepts=False)
    stage.delivers()
    assert [record.getMessage() for record in caplog.records][-1] == (
        "CP1: secondary: StartTransaction is delivered; it was the last"
    )


def test_what_is_not_sent_because_its_session_is_refused_is_told_as_that(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    """Its server has never seen it; and it is tried once more."""
    caplog.set_level("INFO")
    stage = play()
    stage.starts("SECO1")
    transaction_id = told_id(stage)
    refuse_start(stage)
    stops(stage, transaction_id)
    told = [line.partition(": [2")[0] for line in warnings(caplog, "CP1")]
    error = "CallError InternalError"
    again = "and kept; tried again at the next start, and once a day"
    assert told == [f"CP1: secondary: StartTransaction is refused ({error}) {again}"]
    words = f"StopTransaction is kept and not sent: its session is refused: {error}"
    assert f"CP1: {words}" in caplog.messages
