"""
Reports of real chargers and servers: what they send, and who has to hear it.

Over real websockets; with the stand-ins of tests/play/plays.py where time has to pass, or nobody may hear.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import refused, stops
from tests.play.peers import FakeCharger, FakeServer, Hearing, accepting, charger, eventually, house
from tests.play.plays import INI, Stage, actions

V16, V201 = "ocpp1.6", "ocpp2.0.1"
ACCEPTED = {"status": "Accepted"}
STATION = {"vendorName": "V", "model": "M"}


def clock(minute: int) -> str:
    return f"2026-01-01T{minute // 60:02}:{minute % 60:02}:00Z"


def samples(value: object, context: str = "Sample.Periodic") -> list[dict[str, Any]]:
    """Return a meterValue; its value is a text in 1.6, a number in 2.x."""
    return [{"timestamp": clock(0), "sampledValue": [{"value": value, "context": context}]}]


def event(kind: str, number: int, minute: int, badge: str = "", **more: Any) -> dict[str, Any]:
    """Return a TransactionEvent of transaction 1; only a Started names its EVSE."""
    payload = {
        "eventType": kind,
        "seqNo": number,
        "timestamp": clock(minute),
        "triggerReason": "CablePluggedIn",
    }
    payload["transactionInfo"] = {"transactionId": "1"}
    if kind == "Started":
        payload["evse"] = {"id": 1, "connectorId": 1}
    if badge:
        payload["idToken"] = {"idToken": badge, "type": "ISO14443"}
    return {**payload, **more}


async def plays_events(cp: FakeCharger, *events: dict[str, Any]) -> None:
    """Let the charger send TransactionEvents one after the other, each answered."""
    for payload in events:
        message_id = f"{payload['eventType']} {payload['timestamp']}"
        await cp.calls(message_id, "TransactionEvent", **payload)


def events_at(server: FakeServer) -> list[tuple[str, int, str]]:
    """Return kind, seqNo and time of the events that a server has heard."""
    payloads = [call[3] for call in calls_of(server, "TransactionEvent")]
    return [(payload["eventType"], payload["seqNo"], payload["timestamp"]) for payload in payloads]


def calls_of(server: FakeServer, action: str) -> list[list[Any]]:
    return [message for message in server.heard.messages if message[0] == 2 and message[2] == action]


def has_heard(server: FakeServer, action: str, count: int) -> bool:
    return len(calls_of(server, action)) == count


async def boots(cp: FakeCharger) -> None:
    """Let a charger of 2.x boot."""
    await cp.calls("boot", "BootNotification", reason="PowerUp", chargingStation=STATION)


async def all_is_heard(proxy: p.Proxy, cp: FakeCharger, *servers: FakeServer) -> None:
    """Wait until all that is stored is delivered, and until a status that comes behind it is everywhere."""
    await eventually(lambda: not proxy.journal.memories["CP1"].stored)
    status = {"connectorId": 9, "errorCode": "NoError", "status": "Faulted"}
    await cp.calls("last", "StatusNotification", **status)
    for server in servers:
        await server.heard.until(lambda m: m[2] == "StatusNotification" and m[3] == status)


@asynccontextmanager
async def after_a_power_cut(proxy: p.Proxy, version: str) -> AsyncIterator[FakeCharger]:
    """The charger on its next connection; nobody has told the proxy that the last one is dead."""
    async with charger(proxy, versions=[version]) as cp:
        await (boots(cp) if version == V201 else cp.boots())
        yield cp


# Sessions lost, split or at the wrong server.


async def test_a_station_that_counts_from_one_again_after_a_power_cut_has_a_new_session() -> None:
    """The same transaction id with another badge is the other server's; the session before has no stop."""
    second = [event("Started", 0, 60, "PRIM1"), event("Updated", 1, 61), event("Ended", 2, 62)]
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as before:
        await boots(before)
        await plays_events(before, event("Started", 0, 0, "SECO1"), event("Updated", 1, 1))
        async with after_a_power_cut(proxy, V201) as cp:
            await plays_events(cp, *second)
            await all_is_heard(proxy, cp, primary, secondary)
        assert events_at(primary) == [(e["eventType"], e["seqNo"], e["timestamp"]) for e in second]
        assert events_at(secondary) == [("Started", 0, clock(0)), ("Updated", 1, clock(1))]
        proxy.journal.tick()
        columns = "badge, owner, ended IS NOT NULL AS is_over, stop != '' AS has_stop"
        rows = await proxy.journal.look_up(f"SELECT {columns} FROM sessions ORDER BY number")
        assert [list(row.values()) for row in rows] == [
            ["SECO1", "secondary", 1, 0],
            ["PRIM1", "primary", 1, 1],
        ]


async def test_a_station_that_ends_the_broken_off_transaction_under_number_0_is_heard() -> None:
    """Its count starts again, its clock does not: the end is no repeat of the beginning."""
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as before:
        await boots(before)
        await plays_events(
            before, event("Started", 0, 0, "SECO1"), event("Updated", 1, 1), event("Updated", 2, 2)
        )
        async with after_a_power_cut(proxy, V201) as cp:
            await plays_events(cp, event("Ended", 0, 9))
            await all_is_heard(proxy, cp, primary, secondary)
        assert events_at(secondary)[-1] == ("Ended", 0, clock(9))
        assert events_at(primary) == []


async def test_a_charger_without_a_clock_that_starts_again_after_a_power_cut_has_two_sessions() -> None:
    """It has used the id that it was given, so that the same start is another one."""
    start = {"connectorId": 1, "idTag": "SECO1", "meterStart": 0}
    async with house() as (proxy, primary, secondary), charger(proxy) as before:
        await before.boots()
        first = (await before.calls("s", "StartTransaction", **start))["transactionId"]
        await before.calls("m", "MeterValues", connectorId=1, transactionId=first, meterValue=samples("5"))
        async with after_a_power_cut(proxy, V16) as cp:
            await cp.calls("a", "StatusNotification", connectorId=1, errorCode="NoError", status="Available")
            second = (await cp.calls("s", "StartTransaction", **start))["transactionId"]
            await all_is_heard(proxy, cp, primary, secondary)
        assert second != first
        assert [call[3] for call in calls_of(secondary, "StartTransaction")] == [start, start]
        assert "StartTransaction" not in primary.heard.actions()


class SlowHearing(Hearing):
    """Takes its time over each message."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def add(self, message: Any) -> None:
        await super().add(message)
        await asyncio.sleep(self.seconds)


async def test_an_offline_queue_that_is_sent_in_one_go_arrives_in_order_and_is_answered() -> None:
    """122 messages without waiting, to a primary that takes 10 ms for each; they name no id that is known."""
    start = {"connectorId": 1, "idTag": "PRIM1", "meterStart": 0, "timestamp": clock(0)}
    stop = {"transactionId": -1, "meterStop": 121, "timestamp": clock(121)}
    reading = {"connectorId": 1, "transactionId": -1}
    queue = [("StartTransaction", start)]
    queue += [("MeterValues", {**reading, "meterValue": samples(str(n))}) for n in range(1, 121)]
    queue += [("StopTransaction", stop)]
    async with house() as (proxy, primary, secondary):
        primary.heard = SlowHearing(0.01)
        async with charger(proxy) as cp:
            for number, (action, payload) in enumerate(queue):
                await cp.connection.send(json.dumps([2, f"q{number}", action, payload]))
            for number in range(len(queue)):
                assert (await cp.heard.answer(f"q{number}"))[0] == 3
        heard = [(message[2], message[3]) for message in primary.heard.messages]
        named = {"transactionId": 7}  # As the primary has answered the start.
        assert heard == [queue[0], *((action, {**payload, **named}) for action, payload in queue[1:])]
        assert secondary.heard.actions() == []


async def test_all_of_a_1_6_session_over_2_0_1_is_the_secondarys() -> None:
    """A FoxESS speaks 1.6 on a connection that was negotiated as 2.0.1."""
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as cp:
        await cp.boots()
        assert await cp.calls("a", "Authorize", idTag="SECO1") == {"idTagInfo": ACCEPTED}
        number = await cp.starts("SECO1")
        await cp.calls("m", "MeterValues", connectorId=1, transactionId=number, meterValue=samples("5"))
        await cp.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp=clock(9))
        await secondary.heard.call("StopTransaction")
        session = ["Authorize", "StartTransaction", "MeterValues", "StopTransaction"]
        assert secondary.heard.actions() == ["BootNotification", *session]
        assert [message[3]["transactionId"] for message in secondary.heard.messages[-2:]] == [7, 7]
        assert primary.heard.actions() == ["BootNotification"]


async def test_a_session_of_2_0_1_is_delivered_after_its_charger_was_set_to_1_6(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Over a connection of its own version, while the charger is there; then the secondary has 1.6 again."""
    async with house() as (proxy, primary, secondary):
        await secondary.stop()
        async with charger(proxy, versions=[V201]) as cp:
            await boots(cp)
            await plays_events(cp, event("Started", 0, 0, "SECO1"), event("Ended", 1, 9))
            await eventually(lambda: "secondary: cannot connect" in caplog.text)
        async with charger(proxy, versions=[V16]) as cp:
            await cp.boots()
            await secondary.start()
            await secondary.heard.until(lambda m: m[3].get("eventType") == "Ended")
            assert (await secondary.connection(0)).subprotocol == V201
            assert (await secondary.connection(1)).subprotocol == V16
        assert events_at(secondary) == [("Started", 0, clock(0)), ("Ended", 1, clock(9))]
        assert events_at(primary) == []


async def test_a_charger_whose_number_never_moves_loses_no_event() -> None:
    """seqNo 0 for ever: the time tells an event from a repeat."""
    session = [event("Started", 0, 0, "SECO1"), *(event("Updated", 0, minute) for minute in (1, 2))]
    session.append(event("Ended", 0, 3))
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as cp:
        await boots(cp)
        await plays_events(cp, *session)
        await all_is_heard(proxy, cp, primary, secondary)
        assert events_at(secondary) == [(e["eventType"], 0, e["timestamp"]) for e in session]
        assert events_at(primary) == []


async def test_meter_values_of_2_0_1_belong_to_the_session_on_their_evse() -> None:
    """Some chargers send them instead of events."""
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as cp:
        await boots(cp)
        await plays_events(cp, event("Started", 0, 0, "SECO1"))
        assert await cp.calls("m", "MeterValues", evseId=1, meterValue=samples(5)) == {}
        await all_is_heard(proxy, cp, primary, secondary)
        heard = [call[3] for call in calls_of(secondary, "MeterValues")]
        assert heard == [{"evseId": 1, "meterValue": samples(5)}]
        assert "MeterValues" not in primary.heard.actions()


@pytest.mark.parametrize(
    ("version", "asked", "payload", "report"),
    [
        (V16, "GetDiagnostics", {"location": "ftp://x"}, "DiagnosticsStatusNotification"),
        (V16, "UpdateFirmware", {"location": "ftp://x"}, "FirmwareStatusNotification"),
        (V201, "UpdateFirmware", {"requestId": 5, "firmware": {}}, "FirmwareStatusNotification"),
    ],
)
async def test_a_report_that_comes_before_the_answer_is_the_askers(
    version: str, asked: str, payload: dict[str, Any], report: str
) -> None:
    """The charger reports from the moment that it is asked."""
    request = {name: payload[name] for name in payload if name == "requestId"}
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[version]) as cp:
        await (boots(cp) if version == V201 else cp.boots())
        await secondary.heard.call("BootNotification")
        await secondary.calls("g", asked, **payload)
        message_id = (await cp.heard.call(asked))[1]
        assert await cp.calls("r", report, status="Downloading", **request) == {}
        await cp.connection.send(json.dumps([3, message_id, {}]))
        assert await secondary.heard.answer("g") == [3, "g", {}]
        await all_is_heard(proxy, cp, primary, secondary)
        assert [call[3]["status"] for call in calls_of(secondary, report)] == ["Downloading"]
        assert report not in primary.heard.actions()


async def test_a_badge_after_hours_of_readings_keeps_the_start_and_the_newest_of_them() -> None:
    """The car is plugged in at 18:00, its tariff starts at 01:00: at most 100 of its events are kept."""
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[V201]) as cp:
        await boots(cp)
        await plays_events(cp, event("Started", 0, 0), *(event("Updated", n, n) for n in range(1, 421)))
        assert len(proxy.journal.memories["CP1"].stored) == 100
        await plays_events(cp, event("Updated", 421, 421, "SECO1"))
        await all_is_heard(proxy, cp, primary, secondary)
        numbers = [number for _, number, _ in events_at(secondary)]
        assert numbers == [0, *range(322, 421), 421]
        assert events_at(primary) == []


# Chargers and servers that are refused, or made to wait.


@pytest.mark.parametrize("is_known", [False, True])
def test_a_charger_that_boots_three_seconds_after_connecting_is_asked_nothing_before(is_known: bool) -> None:
    """A Wallbox hangs up if it is called before its boot."""
    stage = Stage(connect=False)
    if is_known:
        stage.charger_connects()
        stage.secondary_connects()
        stage.charger.lost()
        stage.passes(60)
    stage.charger_connects()
    stage.secondary_connects(accepts=False)
    stage.passes(3)
    assert stage.charger.hears() == []
    stage.charger.calls("boot", "BootNotification", chargePointVendor="V", chargePointModel="M")
    assert stage.charger.hears() == []
    stage.primary.answers("boot", status="Accepted", currentTime="t", interval=300)
    assert [answer[:2] for answer in stage.charger.hears()] == [[3, "boot"]]


async def test_a_call_of_the_primary_right_after_connecting_reaches_the_charger_at_once() -> None:
    """No question of the proxy's own is before it, which this charger would leave unanswered."""
    async with house() as (proxy, primary, _):
        primary.greeting = ['[2,"g","GetConfiguration",{}]']
        async with charger(proxy) as cp:
            await cp.heard.call("GetConfiguration")
            assert cp.heard.messages == [[2, "g", "GetConfiguration", {}]]
            await cp.connection.send('[3,"g",{"configurationKey":[]}]')
            assert await primary.heard.answer("g") == [3, "g", {"configurationKey": []}]


def test_a_long_inventory_arrives_in_order_at_a_server_that_is_slower_than_the_charger() -> None:
    """100 reports 60 ms apart, 100 ms for each: none grows too old, though call_timeout is 3 s."""
    stage = Stage(version=V201, ini="[host]\ncall_timeout = 3\n" + INI)
    stage.secondary.calls("g", "GetBaseReport", requestId=5, reportBase="FullInventory")
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    assert stage.secondary.hears() == [[3, "g", ACCEPTED]]
    arrived, answered, answer_at = list[int](), list[str](), {}
    for moment in range(0, 12_000, 20):  # In milliseconds.
        if moment % 60 == 0 and moment < 6000:
            number = moment // 60
            is_last = number == 99
            report = {"requestId": 5, "generatedAt": clock(0), "seqNo": number, "tbc": not is_last}
            stage.charger.calls(f"r{number}", "NotifyReport", **report)
        stage.passes(0.02)
        for _, message_id, action, payload in stage.secondary.hears():
            assert action == "NotifyReport"
            arrived.append(payload["seqNo"])
            answer_at[message_id] = moment + 100
        for message_id in [waiting for waiting, due in answer_at.items() if due <= moment]:
            del answer_at[message_id]
            stage.secondary.answers(message_id)
        answered += [message[1] for message in stage.charger.hears()]
    assert arrived == list(range(100))
    assert answered == [f"r{number}" for number in range(100)]
    assert stage.primary.hears() == []


@pytest.mark.parametrize("server", ["primary", "secondary"])
@pytest.mark.parametrize("written", ["12345678", '"12345678"'])
def test_an_answer_goes_back_under_the_number_that_its_server_has_sent(server: str, written: str) -> None:
    """Some servers count in numbers, and some chargers answer with a text."""
    stage = Stage()
    link = getattr(stage, server)
    call = '[2,12345678,"RemoteStartTransaction",{"idTag":"PRIM1"}]'
    link.says(call)
    assert stage.charger.hears_text() == call
    stage.charger.says(f'[3,{written},{{"status":"Accepted"}}]')
    assert link.hears_text().replace(" ", "") == '[3,12345678,{"status":"Accepted"}]'


@pytest.mark.parametrize("written", ["42", '"42"'])
def test_a_charger_that_counts_in_numbers_is_answered_with_its_number(written: str) -> None:
    """By the primary, which may answer with a text, and by the proxy in the secondary's place."""
    stage = Stage()
    stage.charger.says('[2,42,"Heartbeat",{}]')
    assert stage.primary.hears_text() == '[2,42,"Heartbeat",{}]'
    stage.primary.says(f'[3,{written},{{"currentTime":"t"}}]')
    assert stage.charger.hears() == [[3, 42, {"currentTime": "t"}]]
    stage.charger.says('[2,43,"Authorize",{"idTag":"SECO1"}]')
    assert stage.charger.hears() == [[3, 43, {"idTagInfo": ACCEPTED}]]


@pytest.mark.parametrize(("version", "profile"), [(V16, "csChargingProfiles"), (V201, "chargingProfile")])
def test_a_charging_profile_with_an_unset_transaction_passes(version: str, profile: str) -> None:
    """Some serializers write null for what they do not set: it names nothing."""
    stage = Stage(version=version)
    text = '[2,"x","SetChargingProfile",{"connectorId":1,PROFILE:{"id":3,"transactionId":null}}]'.replace(
        "PROFILE", json.dumps(profile)
    )
    stage.secondary.says(text)
    assert stage.charger.hears_text() == text
    stage.charger.answers("x", status="Accepted")
    assert stage.secondary.hears() == [[3, "x", ACCEPTED]]


def test_forward_answers_for_a_silent_secondary_within_the_call_timeout() -> None:
    """It gets the start once, and the stop under its own id as soon as it has told it."""
    stage = Stage("secondary_replies = forward", ini="[host]\ncall_timeout = 1\n" + INI)
    stage.starts("SECO1")
    start_id, action, _ = stage.secondary.hears_call()
    assert action == "StartTransaction"
    assert stage.charger.hears() == []
    stage.passes(2)
    ((_, message_id, answer),) = stage.charger.hears()
    assert (message_id, answer["idTagInfo"]) == ("s1", ACCEPTED)
    stops(stage, answer["transactionId"])
    assert [message[:2] for message in stage.charger.hears()] == [[3, "e"]]
    stage.passes(30)
    assert stage.secondary.hears() == []
    stage.secondary.answers(start_id, transactionId=7, idTagInfo=ACCEPTED)
    _, action, payload = stage.secondary.hears_call()
    assert (action, payload["transactionId"]) == ("StopTransaction", 7)
    assert stage.charger.hears() == []


# What people see.


@pytest.mark.parametrize(
    ("listed", "shown"),
    [("04:A1:B2:C3", "04A1B2C3"), ("04-a1-b2-c3", "04A1B2C3"), ("04A1B2C3", " 04:a1:b2:c3 ")],
)
def test_a_badge_is_the_same_in_every_spelling(listed: str, shown: str) -> None:
    """People write what is printed on the card, chargers what their reader reads."""
    stage = Stage(ini=INI.replace("SECO*", listed))
    stage.starts(shown)
    assert actions(stage.secondary.hears()) == ["StartTransaction"]
    assert stage.primary.hears() == []


@pytest.mark.parametrize("action", ["Authorize", "StartTransaction"])
def test_a_badge_on_no_list_is_told_in_full(action: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is the number to copy into the ini; one that is listed is masked."""
    caplog.set_level(logging.INFO, "proxy")
    stage = Stage()
    for badge in ("04D5E6F7A8B9C0", "PRIM04D5E6F7A8"):
        stage.charger.calls(badge, action, idTag=badge, connectorId=1, meterStart=0, timestamp=clock(0))
    lines = [p.REDACTOR.clean(record.getMessage()) for record in caplog.records]
    assert [line.count("04D5E6F7A8B9C0") for line in lines if "04D5E6F7A8B9C0" in line] == [1]
    assert not any("PRIM04D5E6F7A8" in line for line in lines)


# The home energy manager.


def secondary_session(stage: Stage) -> Any:
    """Let the charger begin a session of the secondary on connector 1; return its id at the charger."""
    if stage.version == V16:
        number = stage.secondary_session(server_id=7)
    else:
        number = "1"
        stage.charger.calls("start", "TransactionEvent", **event("Started", 0, 0, "SECO1"))
        stage.secondary.answers(stage.secondary.hears_call()[0])
        stage.charger.hears()
    assert stage.primary.hears() == []
    return number


def asks_for_readings(stage: Stage) -> None:
    """Let the primary trigger meter values, and the charger accept."""
    stage.primary.calls("t", "TriggerMessage", requestedMessage="MeterValues")
    stage.charger.answers(stage.charger.hears_call()[0], status="Accepted")
    assert stage.primary.hears() == [[3, "t", ACCEPTED]]


def reading(stage: Stage, number: Any, value: int, context: str) -> dict[str, Any]:
    """Let the charger send a MeterValues as its version has them; return it without the transaction id."""
    is_16 = stage.version == V16
    meter = samples(str(value) if is_16 else value, context)
    payload = {"connectorId" if is_16 else "evseId": 1, "meterValue": meter}
    stage.charger.calls(f"m{value}", "MeterValues", **payload, **({"transactionId": number} if is_16 else {}))
    return payload


def delivered(stage: Stage) -> list[dict[str, Any]]:
    """Let the secondary answer the one Call that it hears; return its payloads."""
    return [payload for _, payload in stage.delivers()]


@pytest.mark.parametrize("version", [V16, V201])
def test_readings_that_the_primary_asked_for_in_the_secondarys_session_are_its_alone(version: str) -> None:
    """evcc asks every 2 s; the employer has the charger's own readings as ever, and nothing else."""
    stage = Stage(version=version)
    number = secondary_session(stage)
    own_id = {"transactionId": 7} if version == V16 else {}
    for second in range(0, 6, 2):
        asks_for_readings(stage)
        asked = reading(stage, number, second, "Trigger")
        assert stage.charger.hears() == [[3, f"m{second}", {}]]
        message_id, action, payload = stage.primary.hears_call()
        assert (action, payload) == ("MeterValues", asked)
        stage.primary.answers(message_id)
        assert stage.charger.hears() == stage.secondary.hears() == []
        periodic = reading(stage, number, second + 1, "Sample.Periodic")
        assert delivered(stage) == [{**periodic, **own_id}]
        assert stage.charger.hears() == [[3, f"m{second + 1}", {}]]
        assert stage.primary.hears() == []
        stage.passes(2)
    stage.passes(60)
    stage.delivers()  # Its Heartbeats, if there are any.
    late = reading(stage, number, 9, "Trigger")
    assert (delivered(stage), stage.primary.hears()) == ([{**late, **own_id}], [])


def test_an_event_that_the_primary_asked_for_stays_its_owners_and_the_primary_gets_the_reading() -> None:
    """In 2.x a charger may answer a TriggerMessage with a TransactionEvent."""
    stage = Stage(version=V201)
    secondary_session(stage)
    asks_for_readings(stage)
    told = event("Updated", 1, 1, triggerReason="Trigger", meterValue=samples(5, "Trigger"))
    stage.charger.calls("u", "TransactionEvent", **told)
    assert stage.charger.hears() == [[3, "u", {}]]
    assert delivered(stage) == [told]
    _, action, payload = stage.primary.hears_call()
    assert (action, payload) == ("MeterValues", {"evseId": 1, "meterValue": samples(5, "Trigger")})
    stage.charger.calls("v", "TransactionEvent", **event("Ended", 2, 2, meterValue=samples(6)))
    assert stage.primary.hears() == []


def test_copied_readings_of_1_6_are_all_that_the_primary_sees_of_the_secondarys_session() -> None:
    """They bear no transaction id, and whatever the primary answers goes nowhere."""
    stage = Stage("primary_copies = MeterValues")
    stage.charger.calls("a", "Authorize", idTag="SECO1")
    assert [action for action, _ in stage.delivers()] == ["Authorize"]
    stage.charger.hears()
    number = secondary_session(stage)
    for value, answer in ((5, "answers"), (6, "errs")):
        told = reading(stage, number, value, "Sample.Periodic")
        assert stage.charger.hears() == [[3, f"m{value}", {}]]
        assert delivered(stage) == [{**told, "transactionId": 7}]
        message_id, action, payload = stage.primary.hears_call()
        assert (action, payload) == ("MeterValues", told)
        getattr(stage.primary, answer)(message_id)
        assert stage.charger.hears() == stage.secondary.hears() == []
    stops(stage, number, transactionData=samples("9", "Transaction.End"))
    assert [action for action, _ in stage.delivers()] == ["StopTransaction"]
    assert stage.primary.hears() == []


def test_copied_readings_of_2_0_1_are_meter_values_of_the_evse() -> None:
    """Of Started, Updated and Ended alike, and of MeterValues; an event without a reading is not copied."""
    stage = Stage("primary_copies = MeterValues", version=V201)
    session = [
        event("Started", 0, 0, "SECO1", meterValue=samples(1, "Transaction.Begin")),
        event("Updated", 1, 1, meterValue=samples(2)),
        event("Updated", 2, 2, chargingState="SuspendedEV"),
        event("Ended", 3, 3, meterValue=samples(3, "Transaction.End")),
    ]
    for payload in session:
        stage.charger.calls(f"e{payload['seqNo']}", "TransactionEvent", **payload)
        assert [message[:2] for message in stage.charger.hears()] == [[3, f"e{payload['seqNo']}"]]
        assert delivered(stage) == [payload]
        copies = stage.primary.hears()
        wanted = [{"evseId": 1, "meterValue": payload["meterValue"]}] if "meterValue" in payload else []
        assert [message[2:] for message in copies] == [["MeterValues", values] for values in wanted]
        for _, message_id, *_ in copies:
            stage.primary.answers(message_id, idTokenInfo={"status": "Blocked"})
        assert stage.charger.hears() == stage.secondary.hears() == []


# As a meter writes it; blanks, escapes and digits are a part of what is signed.
OCMF = r'"OCMF|{\"FV\" : \"1.0\",\"RD\":[{\"TM\":\"2026-01-01T00:00:00,000+0100 S\",\"RV\":1.10}]}'
OCMF += r'|{\"SD\":\"3045\/0220\u00e9\"}"'


@pytest.mark.parametrize(
    ("action", "field", "copies"),
    [("MeterValues", "meterValue", 1), ("StopTransaction", "transactionData", 0)],
)
def test_a_signed_reading_of_1_6_reaches_its_owner_byte_for_byte(
    action: str, field: str, copies: int
) -> None:
    """Only the two ids around it are others; a copy of it for the primary holds the same characters."""
    stage = Stage("primary_copies = MeterValues")
    number = secondary_session(stage)
    meter = '[ {"timestamp":"t", "sampledValue":[{"value":' + OCMF + ',"format":"SignedData"}]} ]'
    tail = f'"{action}", {{"connectorId" : 1, "transactionId": ID, "{field}":{meter} }} ]'
    stage.charger.says(('[2, "m1", ' + tail).replace("ID,", f"{number},"))
    heard = stage.secondary.hears_text()
    message_id = json.dumps(json.loads(heard)[1])
    assert heard == f"[2, {message_id}, " + tail.replace("ID,", "7,")
    assert [meter in copy for copy in stage.primary.texts] == [True] * copies


def test_a_signed_reading_of_2_0_1_reaches_its_owner_and_the_primary_byte_for_byte() -> None:
    """The station's id is everybody's, so that only the message id is another."""
    stage = Stage("primary_copies = MeterValues", version=V201)
    secondary_session(stage)
    signed = '{"signedMeterData":' + OCMF + ',"signingMethod":"", "encodingMethod":"OCMF","publicKey":""}'
    meter = '[ {"timestamp":"t", "sampledValue":[{"value":1.10,"signedMeterValue":' + signed + "}]} ]"
    head = '"eventType":"Ended", "seqNo":1,"timestamp":"t9","transactionInfo":{"transactionId":"1"}'
    tail = '"TransactionEvent", {' + head + ', "meterValue":' + meter + "}]"
    stage.charger.says('[2, "m1", ' + tail)
    heard = stage.secondary.hears_text()
    assert heard == f"[2, {json.dumps(json.loads(heard)[1])}, " + tail
    assert meter in stage.primary.hears_text()


# Promises of stored Calls that no report is about.


CERTIFICATES = [{"certificate": "-----BEGIN"}, {"iso15118CertificateHashData": [{"serialNumber": "1"}]}]


@pytest.mark.parametrize("shown", CERTIFICATES)
def test_an_authorize_with_a_certificate_waits_for_the_secondary(shown: dict[str, Any]) -> None:
    """Only the server can check it (Plug & Charge), whatever `secondary_replies` says."""
    stage = Stage(version=V201)
    stage.charger.calls("a", "Authorize", idToken={"idToken": "SECO1", "type": "eMAID"}, **shown)
    message_id, action, payload = stage.secondary.hears_call()
    assert (action, list(payload)) == ("Authorize", ["idToken", *shown])
    stage.passes(8)
    assert stage.charger.hears() == []
    answer = {"idTokenInfo": ACCEPTED, "certificateStatus": "Accepted"}
    stage.secondary.answers(message_id, **answer)
    assert stage.charger.hears() == [[3, "a", answer]]
    assert stage.primary.hears() == []


@pytest.mark.parametrize("is_away", [False, True])
def test_an_authorize_with_a_certificate_that_nobody_checks_in_time_is_not_accepted(is_away: bool) -> None:
    """After 10 s, or when the secondary has been away for 5 s; its late answer goes nowhere."""
    stage = Stage(version=V201)
    if is_away:
        stage.secondary.lost()
    token = {"idToken": "SECO1", "type": "eMAID"}
    stage.charger.calls("a", "Authorize", idToken=token, certificate="-----BEGIN")
    stage.passes(4 if is_away else 9)
    assert stage.charger.hears() == []
    stage.passes(2)
    ((_, message_id, answer),) = stage.charger.hears()
    assert (message_id, answer["certificateStatus"]) == ("a", "NoCertificateAvailable")
    assert answer["idTokenInfo"]["status"] != "Accepted"
    if not is_away:
        stage.secondary.answers(stage.secondary.hears_call()[0], idTokenInfo=ACCEPTED)
        assert stage.charger.hears() == []


async def test_what_call_errors_refused_is_tried_once_more_after_a_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the rest of its session, and with nobody's help."""
    monkeypatch.setattr(p, "RETRY_SECONDS", (0.0, 0.0))
    # A relay that waits for nothing wakes for its Pings only, and finds then what is to be tried.
    async with house(host="ping_interval = 0.5") as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        await secondary.heard.call("BootNotification")
        secondary.answers = None
        number = await cp.starts("SECO1")
        await cp.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp=clock(9))
        for tries in range(3):
            await eventually(partial(has_heard, secondary, "StartTransaction", tries + 1))
            message_id = calls_of(secondary, "StartTransaction")[tries][1]
            await secondary.connections[0].send(json.dumps([4, message_id, "InternalError", "", {}]))
        memory = proxy.journal.memories["CP1"]
        await eventually(
            lambda: [call.action for call in memory.refused] == ["StartTransaction", "StopTransaction"]
        )
        assert "StopTransaction" not in secondary.heard.actions()
        secondary.answers = accepting
        proxy.retry_at -= p.DAY  # A day goes by.
        assert (await secondary.heard.call("StopTransaction"))[3]["transactionId"] == 7
        assert len(calls_of(secondary, "StartTransaction")) == 4
        await eventually(lambda: not (memory.refused or memory.stored))
        assert proxy.retry_at > asyncio.get_running_loop().time() + p.DAY - 60


@pytest.mark.parametrize(("days", "is_tried"), [(29, True), (31, False)])
def test_what_call_errors_refused_is_tried_again_for_thirty_days(days: int, is_tried: bool) -> None:
    """Then it is kept, and shown, and sent nowhere."""
    stage = Stage()
    number = stage.secondary_session(server_id=7)
    stops(stage, number)
    for seconds in (10, 60, 0):
        stage.secondary.errs(stage.secondary.hears_call()[0])
        stage.passes(seconds)
    assert [action for action, _ in refused(stage)] == ["StopTransaction"]
    stage.memory.retry(stage.now().utc + days * p.DAY)
    assert bool(refused(stage)) != is_tried
    assert [call.action for call in stage.waiting(p.Peer.SECONDARY)] == ["StopTransaction"] * is_tried


async def test_a_charger_is_closed_when_the_disk_fails_for_longer_than_the_grace() -> None:
    """It waits for an answer, so that its own queue has to take over; one that waits for nothing stays."""
    more = "primary_grace = 0.5"
    async with house(more) as (proxy, _, secondary), charger(proxy) as cp, charger(proxy, "CP2") as other:
        await cp.boots()
        await secondary.heard.call("BootNotification")
        with patch.object(proxy.journal, "_write", lambda _: "database or disk is full"):
            await cp.connection.send(
                json.dumps([2, "s", "StartTransaction", {"connectorId": 1, "idTag": "SECO1"}])
            )
            assert await cp.closed() == 1012
            assert (await other.calls("h", "Heartbeat"))["currentTime"]
        assert "StartTransaction" not in [message[2] for message in secondary.heard.messages]
        assert [message for message in cp.heard.messages if message[1] == "s"] == []
