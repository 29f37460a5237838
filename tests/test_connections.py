"""Connections as the Relay and its Outboxes see them: boot, grace, redial, takeover, watchdog."""

from __future__ import annotations

import math

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Response

import ocpp_2w_proxy as p
from tests.play.plays import Stage, actions

PRIMARY, SECONDARY = p.Peer.PRIMARY, p.Peer.SECONDARY


def dials(stage: Stage) -> list[str]:
    """Return the names of the dials asked for since the last look."""
    tasks: list[str] = stage.relay.tasks.started  # type: ignore[attr-defined]
    stage.relay.tasks.started = []  # type: ignore[attr-defined]
    return tasks


# Every new connection to the secondary starts whole.


def test_a_new_connection_to_the_secondary_gets_boot_and_statuses_first() -> None:
    """With message ids of the proxy; its answers go nowhere."""
    stage = Stage()
    stage.passes(p.OWN_BOOT_SECONDS)
    for connector in (0, 1):
        stage.charger.calls(
            f"n{connector}",
            "StatusNotification",
            connectorId=connector,
            errorCode="NoError",
            status="Charging",
        )
        stage.primary.answers(f"n{connector}")
        stage.delivers()
    stage.charger.hears()
    stage.secondary.lost()
    stage.secondary_connects(accepts=False)
    delivered = stage.delivers()
    assert [action for action, _ in delivered] == [
        "BootNotification",
        "StatusNotification",
        "StatusNotification",
    ]
    assert delivered[0][1] == {"chargePointVendor": "V", "chargePointModel": "M"}
    assert [payload["connectorId"] for _, payload in delivered[1:]] == [0, 1]
    assert stage.charger.hears() == []


def test_a_status_that_came_before_the_boot_was_accepted_is_sent_once() -> None:
    """The secondary needs the last status of each connector, not its history."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    for message_id, status in (("1", "Available"), ("2", "Charging")):
        stage.charger.calls(
            message_id, "StatusNotification", connectorId=1, errorCode="NoError", status=status
        )
    delivered = [payload["status"] for action, payload in stage.delivers() if action == "StatusNotification"]
    assert delivered == ["Charging"]


def test_a_charger_that_boots_itself_is_not_repeated() -> None:
    """Within two seconds of its arrival its own BootNotification is the one."""
    stage = Stage()
    stage.charger.lost()
    stage.secondary.lost()
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(1)
    assert stage.secondary.hears() == []
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="New")
    assert stage.answer_boot()["chargePointModel"] == "New"
    stage.passes(5)
    assert stage.secondary.hears() == []


def test_a_boot_that_came_before_the_secondary_was_there_is_passed_on_at_once() -> None:
    """No need to wait for another."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.secondary_connects(accepts=False)
    assert stage.secondary.hears_call()[1] == "BootNotification"


@pytest.mark.parametrize(
    ("version", "model"), [("ocpp1.6", "chargePointModel"), ("ocpp2.0.1", "chargingStation")]
)
def test_the_boot_of_an_unknown_charger_is_made_up(version: str, model: str) -> None:
    """After ten seconds; the charger is asked nothing, some hang up if they are called before their boot."""
    stage = Stage(connect=False, version=version)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(9)
    assert stage.charger.hears() == stage.primary.hears() == stage.secondary.hears() == []
    stage.passes(2)
    _, action, payload = stage.secondary.hears_call()
    assert action == "BootNotification"
    assert "CP1" in str(payload[model])
    assert stage.charger.hears() == []


def test_a_boot_that_the_secondary_leaves_unanswered_is_sent_again() -> None:
    """It keeps the gate closed, and the place for `call_timeout` only."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.secondary.hears()
    stage.passes(30 + p.BOOT_RETRY_SECONDS + 1)
    assert stage.secondary.hears_call()[1] == "BootNotification"


def test_the_secondary_gets_heartbeats_at_the_interval_that_it_asked_for() -> None:
    """The charger's own go to the primary."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.answer_boot(interval=60)
    stage.charger.calls("h", "Heartbeat")
    stage.passes(59)
    assert stage.secondary.hears() == []
    stage.passes(2)
    message_id, action, _ = stage.secondary.hears_call()
    assert action == "Heartbeat"
    stage.secondary.answers(message_id, currentTime="t")
    stage.passes(60)
    assert stage.secondary.hears_call()[1] == "Heartbeat"


def test_a_copy_frees_its_place_after_five_seconds() -> None:
    """A secondary that ignores copies still gets its sessions."""
    stage = Stage()
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
    stage.secondary.hears()
    stage.starts("SECO1")
    assert stage.secondary.hears() == []
    stage.passes(p.PASSING_SECONDS + 0.5)
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_secondary_that_is_down_delays_nothing() -> None:
    """The charger and its primary notice nothing."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.charger.calls("1", "Heartbeat")
    assert stage.primary.hears_call()[0] == "1"
    stage.primary.answers("1", currentTime="t")
    stage.charger.calls("2", "Authorize", idTag="SECO1")
    assert [message[1] for message in stage.charger.hears()] == ["1", "2"]


def test_the_secondary_is_redialled_with_growing_delays() -> None:
    """After 1 s, times 1.6, at most 60 s, each +-20 %."""
    stage = Stage()
    outbox = stage.outbox(SECONDARY)
    stage.secondary.lost()
    waits = []
    for _ in range(14):
        waits.append(outbox.next_at - stage.time)
        stage.cannot_dial(SECONDARY, p.DialError("no"))
    expected = [min(1.6**n, 60) for n in range(14)]
    assert all(0.79 <= wait / want <= 1.21 for wait, want in zip(waits, expected, strict=True))


def test_a_server_that_nothing_is_left_for_is_not_redialled() -> None:
    """The charger is gone, and the relay is not woken for nothing."""
    stage = Stage()
    stage.charger.lost()
    stage.secondary.lost()
    assert stage.outbox(SECONDARY).next_at == math.inf


def test_a_connection_that_stood_a_minute_makes_the_next_redial_a_first_one() -> None:
    """The delays start again."""
    stage = Stage()
    outbox = stage.outbox(SECONDARY)
    outbox.redial_after = 60.0
    stage.passes(61)
    stage.secondary.lost()
    assert outbox.next_at - stage.time <= 1.2


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "secondary_user"),
        (403, "secondary_auth"),
        (404, "secondary_id"),
        (101, "versions"),
        (500, "again"),
    ],
)
def test_a_refusal_says_what_to_change(status: int, advice: str, caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING for the person who runs it, not one for each attempt."""
    stage = Stage()
    stage.secondary.lost()
    error = p.DialError(f"HTTP {status}", Response(status, "x", Headers()))
    for _ in range(3):
        stage.cannot_dial(SECONDARY, error)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("CP1: secondary: cannot connect to ws://secondary.example")
    assert advice in line


# The primary.


def test_a_lost_primary_is_redialled_at_once_while_calls_wait_in_order() -> None:
    """Within `primary_grace` the charger notices nothing but a delay."""
    stage = Stage()
    dials(stage)
    stage.primary.lost()
    stage.passes(0.5)
    assert dials(stage) == ["CP1: primary: dial"]
    stage.charger.calls("1", "Heartbeat")
    stage.charger.calls("2", "DataTransfer", vendorId="x")
    stage.primary_connects()
    message_id, action, payload = stage.primary.hears_call()
    assert (action, payload["chargePointModel"]) == ("BootNotification", "M")
    stage.primary.answers(message_id, status="Accepted", currentTime="t", interval=300)
    assert stage.primary.hears_call()[0] == "1"
    stage.primary.answers("1", currentTime="t")
    assert stage.primary.hears_call()[0] == "2"


def test_a_call_that_was_sent_when_the_primary_was_lost_is_not_sent_again() -> None:
    """It may have been carried out; its sender repeats it."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.primary.lost()
    stage.primary_connects()
    stage.primary.answers(stage.primary.hears_call()[0], status="Accepted", currentTime="t", interval=9)
    assert stage.primary.hears() == []
    stage.starts("PRIM1", "2")
    assert stage.primary.hears_call()[0] == "2"


def test_a_primary_that_stays_away_closes_the_charger() -> None:
    """So that the charger's own offline queue takes over."""
    stage = Stage()
    stage.primary.lost()
    stage.passes(14)
    assert stage.charger.closed_with is None
    stage.passes(2)
    assert stage.charger.closed_with is not None
    assert stage.charger.closed_with[0] == 1012


def test_a_primary_that_never_saw_a_boot_gets_none_made_up() -> None:
    """It let the charger in without one before."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.primary.lost()
    stage.charger.calls("1", "Heartbeat")
    stage.primary_connects()
    assert stage.primary.hears_call()[0] == "1"


@pytest.mark.parametrize("status", ["Pending", "Rejected", None])
def test_a_primary_that_does_not_accept_the_repeated_boot_still_gets_the_chargers_calls(
    status: str | None,
) -> None:
    """The charger has been let in; it must not be left without answers."""
    stage = Stage()
    stage.primary.lost()
    stage.charger.calls("1", "Heartbeat")
    stage.primary_connects()
    message_id = stage.primary.hears_call()[0]
    if status is None:
        stage.passes(31)
    else:
        stage.primary.answers(message_id, status=status, currentTime="t", interval=600)
    assert stage.primary.hears_call()[0] == "1"


def test_a_primary_that_comes_and_goes_without_an_answer_does_not_hold_the_charger() -> None:
    """The grace runs on until the primary answers something or stands."""
    stage = Stage()
    for _ in range(8):
        stage.primary.lost()
        stage.passes(1)
        if stage.charger.is_open:
            stage.primary_connects()
            stage.passes(1)
    assert stage.charger.closed_with is not None


@pytest.mark.parametrize("away", [1, 12])
def test_a_primary_that_is_back_in_time_keeps_the_charger(away: int) -> None:
    """However short the grace, or late the return: it is given a moment to stand."""
    stage = Stage("primary_grace = 2" if away == 1 else "", connect=False)
    stage.charger_connects()
    stage.primary.lost()
    stage.passes(away)
    stage.primary_connects()
    stage.passes(20)
    assert stage.charger.closed_with is None


def test_a_charger_that_boots_itself_ends_the_repeated_boot() -> None:
    """The primary need not be asked again for what it has accepted."""
    stage = Stage()
    stage.primary.lost()
    stage.primary_connects()
    stage.primary.answers(stage.primary.hears_call()[0], status="Pending", currentTime="t", interval=30)
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=300)
    stage.primary.hears()
    stage.passes(60)
    assert actions(stage.primary.hears()) == []


def test_a_primary_that_stands_again_ends_the_grace() -> None:
    """Even if a quiet charger gives it nothing to answer."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.primary.lost()
    stage.passes(1)
    stage.primary_connects()
    stage.passes(20)
    assert stage.charger.closed_with is None
    stage.primary.lost()
    stage.passes(10)
    assert stage.charger.closed_with is None


# The charger.


def test_when_the_charger_goes_its_servers_are_closed() -> None:
    """Nothing is left for them."""
    stage = Stage()
    stage.charger.lost()
    assert stage.primary.closed_with == (1001, "the charger is gone")
    assert stage.secondary.closed_with == (1001, "the charger is gone")


def test_an_answer_in_flight_when_the_charger_goes_still_tells_its_session() -> None:
    """The charger repeats its start and hears the transaction that the primary has begun."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    primary = stage.primary
    stage.charger.lost()
    primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    primary.lost()
    stage.charger_connects()
    stage.starts("PRIM1", "2")
    assert stage.primary.hears() == []
    assert stage.charger.hears()[0][2]["transactionId"] == 7


def test_an_answer_to_the_old_connection_at_a_takeover_still_tells_its_session() -> None:
    """The old primary connection is being closed; its last word counts."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    old = stage.primary
    stage.charger_connects()
    old.says("gibberish")
    old.answers("other", x=1)
    old.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == []
    stage.starts("PRIM1", "2")
    assert stage.charger.hears()[0][2]["transactionId"] == 7


def test_an_answer_to_a_kept_event_counts_on_the_old_connection_too() -> None:
    """It is not delivered twice for a takeover."""
    stage = Stage(version="ocpp2.0.1")
    info = {"transactionInfo": {"transactionId": "T"}}
    stage.charger.calls("0", "TransactionEvent", eventType="Started", seqNo=0, **info)
    stage.charger.calls("1", "TransactionEvent", eventType="Ended", seqNo=1, **info)
    message_id = stage.primary.hears_call()[0]
    old = stage.primary
    stage.charger_connects()
    old.answers(message_id)
    assert stage.waiting(PRIMARY) == []
    stage.primary.answers(message_id)
    assert stage.relay.outboxes[PRIMARY].in_flight is None


def test_a_takeover_replaces_the_old_connection_at_once() -> None:
    """The old one's end and its late words touch nothing of the new one."""
    stage = Stage()
    old_charger, old_primary, secondary = stage.charger, stage.primary, stage.secondary
    stage.charger_connects()
    assert old_charger.closed_with is not None
    assert old_primary.closed_with is not None
    assert secondary.closed_with is None
    old_charger.calls("late", "Heartbeat")
    old_charger.lost()
    old_primary.lost()
    stage.charger.calls("1", "Heartbeat")
    assert stage.primary.hears_call()[0] == "1"


def test_a_takeover_answers_the_calls_that_the_old_connection_left_unanswered() -> None:
    """Their servers must not wait for an answer that cannot come."""
    stage = Stage()
    stage.secondary.calls("1", "ClearCache")
    stage.secondary.calls("2", "ClearCache")
    stage.charger_connects()
    assert [message[:3] for message in stage.secondary.hears()] == [
        [4, "1", "GenericError"],
        [4, "2", "GenericError"],
    ]


def test_the_secondary_is_redialled_when_the_charger_comes_back_with_another_version() -> None:
    """Both servers must speak the charger's version."""
    stage = Stage()
    secondary = stage.secondary
    dials(stage)
    stage.charger_connects("ocpp2.0.1")
    stage.passes(2.5)
    assert secondary.closed_with is not None
    assert "CP1: secondary: dial" in dials(stage)
    assert stage.relay.router.version == "ocpp2.0.1"


def test_message_ids_are_not_reused_on_a_connection_that_outlives_the_charger() -> None:
    """Chargers count from 1 again; SteVe refuses an id that it has seen on the connection."""
    stage = Stage("secondary_replies = forward")
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    stage.secondary.answers(stage.secondary.hears_call()[0], idTagInfo={"status": "Accepted"})
    stage.charger_connects()
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    message_id = stage.secondary.hears_call()[0]
    assert message_id != "1"
    stage.secondary.answers(message_id, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == [[3, "1", {"idTagInfo": {"status": "Accepted"}}]]


def test_calls_that_wait_for_the_primary_are_dropped_when_the_charger_goes() -> None:
    """Their sender is gone, and repeats them when it is back."""
    stage = Stage()
    stage.charger.calls("1", "Heartbeat")
    stage.charger.calls("2", "DataTransfer", vendorId="x")
    stage.charger.lost()
    stage.charger_connects()
    assert stage.primary.hears() == []


# The watchdog.


def test_a_charger_that_is_not_seen_is_closed() -> None:
    """Any frame counts as seen, a Pong too."""
    stage = Stage()
    stage.charger.seen = stage.primary.seen = stage.secondary.seen = stage.time
    stage.time += 499
    stage.primary.seen = stage.secondary.seen = stage.time
    stage.relay.watch()
    assert stage.charger.closed_with is None
    stage.time += 2
    stage.relay.watch()
    assert stage.charger.closed_with is not None


def test_a_charger_that_never_answers_pings_has_three_heartbeat_intervals() -> None:
    """Some firmwares do not know Pongs, and send a Heartbeat an hour."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.charger.has_ponged = False
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=3600)
    stage.time += 10_000
    stage.relay.watch()
    assert stage.charger.closed_with is None
    stage.time += 1_000
    stage.relay.watch()
    assert stage.charger.closed_with is not None


def test_a_server_that_is_not_seen_is_closed() -> None:
    """After `ping_interval` and `ping_timeout`."""
    stage = Stage()
    stage.time += 89
    stage.relay.watch()
    assert stage.secondary.closed_with is None
    stage.time += 2
    stage.charger.seen = stage.primary.seen = stage.time
    stage.relay.watch()
    assert stage.secondary.closed_with is not None
    assert stage.primary.closed_with is stage.charger.closed_with is None


def test_all_peers_are_pinged_right_away_and_every_interval() -> None:
    """A charger that hangs up on silence does not."""
    stage = Stage()
    links = [stage.charger, stage.primary, stage.secondary]
    assert [link.pings for link in links] == [1, 1, 1]
    stage.passes(61)
    assert [link.pings for link in links] == [3, 3, 3]


@pytest.mark.parametrize("work", [True, False])
def test_a_relay_whose_secondary_is_down_is_not_woken_for_nothing(work: bool) -> None:
    """Neither for a boot that cannot be sent, nor for a retry or a dial that is not due."""
    stage = Stage()
    if work:
        stage.starts("SECO1")
        stage.secondary.errs(stage.secondary.hears_call()[0])
    stage.secondary.lost()
    stage.outbox(SECONDARY).next_at = stage.time + 1000
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=300)
    stage.passes(70)
    ticks = 0
    for _ in range(50):
        stage.time += 0.5
        if stage.relay.deadline <= stage.time:
            ticks += 1
            stage.relay.tick()
    assert ticks <= 2


def test_a_flood_of_copies_is_bounded() -> None:
    """A secondary that answers nothing does not fill the memory."""
    stage = Stage()
    for number in range(p.MAX_LIVE + 20):
        stage.charger.calls(str(number), "StatusNotification", connectorId=1, status="Charging")
    assert len(stage.outbox(SECONDARY).live) <= p.MAX_LIVE


def test_an_idle_relay_wakes_only_for_what_is_due() -> None:
    """The watchdog passes by a relay that has nothing to do."""
    stage = Stage()
    stage.delivers()
    stage.passes(1)
    assert stage.relay.deadline > stage.time + 10
    stage.charger.lost()
    stage.primary.lost()
    stage.secondary.lost()
    assert stage.relay.is_idle


def test_a_connection_that_is_lost_with_a_call_in_flight_leaves_nothing_behind() -> None:
    """Nobody waits for the last word of a link that is closed already."""
    stage = Stage()
    stage.starts("SECO1")
    stage.secondary.hears_call()
    stage.secondary.lost()
    assert stage.outbox(p.Peer.SECONDARY).sent == {}


def test_calls_that_were_given_up_are_forgotten_with_the_charger() -> None:
    """Nothing on its next connection answers them."""
    stage = Stage()
    stage.primary.calls("1", "Reset", type="Soft")
    stage.passes(31)
    assert len(stage.relay.commands.spent) == 1
    stage.charger_connects()
    assert stage.relay.commands.spent == {}
