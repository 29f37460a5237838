"""
Reports of real chargers and servers: what they send, and who has to hear it.

Each begins with the number of its case; the doors, the page, the ini and the command have theirs elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import Play
from tests.play.peers import accepting, charger, eventually, house
from tests.play.plays import INI, Stage
from tests.play.script import Script, goes_as_told, plays
from tests.play.wires import Log, Patch

V16, V201 = "ocpp1.6", "ocpp2.0.1"
ACCEPTED = {"status": "Accepted"}
TRIGGERED = 'meterValue=[{"sampledValue":[{"value":"1","context":"Trigger"}]}]'

test_a_case_of_1_6 = plays(f"""
Who hears what of it.

3 Without a clock a start is another one once the id of the first was used, and the power was cut.
    charger sends s StartTransaction connectorId=1 idTag=SECO1 meterStart=0, charger reads m,
    secondary takes, charger returns, charger boots, charger is Available, secondary takes,
    charger sends s StartTransaction connectorId=1 idTag=SECO1 meterStart=0, primary takes
    => secondary: Start Meter:7 Status:Available Start; primary: Status:Available; sessions: 2;
    file stop!='' ended>0: 0 1|0 None
12 A charger that hangs up if it is called before it boots, three seconds after connecting, is asked nothing.
    charger leaves, 60 s, charger returns, 3 s, charger boots, 60 s => charger:
13 A Call of the primary right after connecting reaches the charger at once: no question stands before it.
    charger leaves, 60 s, charger returns, primary calls g GetConfiguration, look, charger answers g
    => charger: GetConfiguration|; primary: |g
20 Of a charger that crashed three times the sessions before are over without a stop, but for the last.
    charger starts 1 PRIM1, primary accepts, charger starts 2 PRIM2, primary accepts,
    charger starts 3 PRIM3 2, primary accepts, charger is Available
    => file connector stop!='' ended>0: 1 0 1|1 0 1|2 0 None
23 A badge on no list is told in full, the number to copy; one that is listed, or that an app made up, is not.
    charger shows a 04D5E6F7A8B9C0, primary takes, charger starts 1 04D5E6F7A8B9C1, primary takes,
    charger shows b PRIM04D5E6F7A8, primary takes, primary claims APP04D5E6, charger starts 2 APP04D5E6 2
    => told APP04D5E6: 0; told 04D5E6F7A8B9C0: 1; told 04D5E6F7A8B9C1: 1; told PRIM04D5E6F7A8: 0;
    told badge is on primary_rfid: 1
28 Readings that the primary asks for in the secondary's session are its alone, for a minute.
    charger starts 1, secondary takes, 3 times (primary asks TriggerMessage requestedMessage=MeterValues,
    charger reads m {TRIGGERED}, primary accepts, charger reads n, secondary takes, 2 s), look, 60 s,
    charger reads o {TRIGGERED}, secondary takes
    => primary: Meter Meter Meter|; secondary: Start Meter:7 Meter:7 Meter:7|Meter:7;
    charger: 1:Accepted m n m n m n|o
28 Nor are they kept for a secondary that has refused the session.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails,
    primary asks TriggerMessage requestedMessage=MeterValues, charger reads m {TRIGGERED}
    => primary: Meter; charger: 1:Accepted m; refused: Start
What CallErrors refused is tried once more a day for thirty days; then it is kept, and sent nowhere.
    charger starts 1, secondary accepts, charger stops e, secondary fails, 11 s, secondary fails, 61 s,
    secondary fails, 29 days, proxy retries, secondary fails, look, 1.1 days, proxy retries
    => secondary: Start Stop:7 Stop:7 Stop:7 Stop:7|; refused: Stop; stored:
A charger that waits for an answer is closed when the disk fails for longer than the grace,
    disk full, charger starts 1, 14 s, look, 3 s => charger: |; secondary: |;
    closed: charger:1012 primary:1001
and one that waits for nothing stays.
    disk full, 14 s, charger beats h, 20 s => charger: h; closed:
29 Copied readings are all that the primary sees of the secondary's session, and its answers go nowhere.
    proxy with primary_copies=MeterValues, charger shows a, charger starts 1, secondary takes,
    charger reads m, primary accepts, charger reads n, primary fails, charger stops e transactionData=[],
    secondary takes => primary: Meter Meter; secondary: Authorize Start Meter:7 Meter:7 Stop:7;
    charger: a:Accepted 1:Accepted m n e
""")

test_a_case_of_2_0_1 = plays(
    """
Who hears what of it.

1 A station that counts from one again after a power cut has a new session; the one before has no stop.
    charger tells 0 Started SECO1 T timestamp=t1, charger tells 1 Updated - T timestamp=t2, secondary takes,
    charger returns, charger boots, charger tells 0 Started PRIM1 T timestamp=t3,
    charger tells 1 Updated - T timestamp=t4, charger tells 2 Ended - T timestamp=t5, primary takes
    => primary: Event:0 Event:1 Event:2; secondary: Event:0 Event:1;
    file badge owner stop!='' ended>0: SECO1 secondary 0 1|PRIM1 primary 1 1
2 One that ends the broken-off transaction under number 0 is heard: its clock has not started again.
    charger tells 0 Started SECO1 T timestamp=t1, charger tells 1 Updated - T timestamp=t2, secondary takes,
    charger returns, charger boots, charger tells 0 Ended - T timestamp=t3, secondary takes
    => secondary: Event:0 Event:1 Event:0; primary: ; file stopped_at: t3
5 All of a session in messages of 1.6 over 2.0.1 is the secondary's.
    charger shows a, charger starts 1, secondary takes, charger reads m, charger stops e, secondary takes
    => secondary: Authorize Start Meter:7 Stop:7; primary: ; charger: a:Accepted 1:Accepted m e
6a A charger whose number never moves loses no event: the time tells it from a repeat.
    charger tells 0 Started SECO1 T timestamp=t0, charger tells 0 Updated - T timestamp=t1,
    charger tells 0 Updated - T timestamp=t2, charger tells 0 Ended - T timestamp=t3, secondary takes
    => secondary: Event:0 Event:0 Event:0 Event:0; primary: ; file stopped_at: t3
6b Meter values instead of events belong to the session on their EVSE.
    charger tells 0 Started SECO1 T evse={"id":1}, charger sends m MeterValues evseId=1, secondary takes
    => secondary: Event:0 Meter; primary: ; charger: T0:Accepted m
28 An event that the primary has asked for stays its owner's, and the primary gets a MeterValues.
    charger tells 0 Started SECO1, primary asks TriggerMessage requestedMessage=MeterValues,
    charger sends a TransactionEvent eventType=Updated seqNo=1 triggerReason=Trigger meterValue=[]
    transactionInfo={"transactionId":"T"}, look,
    charger sends b TransactionEvent eventType=Updated seqNo=2 meterValue=[]
    transactionInfo={"transactionId":"T"}, secondary takes
    => primary: Meter|; secondary: Event:0|Event:1 Event:2; charger: T0:Accepted a|b
An Authorize with a certificate waits for the secondary: only the server can check it (Plug & Charge).
    charger sends a Authorize idToken={"idToken":"SECO1"} certificate=x, 8 s, look, secondary accepts, look,
    charger sends b Authorize idToken={"idToken":"SECO1"} iso15118CertificateHashData=[], look,
    secondary refuses => secondary: Authorize||Authorize|; charger: |a:Accepted||b:Blocked; primary: |||
It waits also behind a start that the proxy has answered itself.
    charger tells 0 Started SECO1, charger sends a Authorize idToken={"idToken":"SECO1"} certificate=x,
    secondary accepts, secondary accepts => charger: T0:Accepted a:Accepted
Where nobody checks it within ten seconds it is not accepted; a late answer goes nowhere.
    charger sends a Authorize idToken={"idToken":"SECO1"} certificate=x, 9 s, look, 2 s, secondary accepts
    => charger: |a:NoCertificateAvailable
While the secondary is away, five seconds are enough.
    secondary leaves, charger sends a Authorize idToken={"idToken":"SECO1"} certificate=x, 4 s, look, 2 s
    => charger: |a:NoCertificateAvailable
""",
    versions=[V201],
)

test_a_case_of_both_versions = plays(
    """
Who hears what of it.

6c A report that comes before the answer to its request is the asker's.
    secondary calls g UpdateFirmware requestId=5, charger sends r FirmwareStatusNotification requestId=5,
    charger answers g => secondary: FirmwareStatusNotification g; primary: ; charger: UpdateFirmware r
16 A transaction that a serializer has left null names nothing, so that the profile passes.
    secondary calls x SetChargingProfile csChargingProfiles={"transactionId":null}
    chargingProfile={"transactionId":null}, charger answers x => charger: SetChargingProfile; secondary: x
""",
    versions=[V16, V201],
)


def test_a_queue_that_is_sent_in_one_go_arrives_in_order_and_is_answered(play: Play) -> None:
    """4: 122 messages without waiting for answers; those behind the start do not know its id."""
    readings = ", ".join(f"charger reads m{number} n={number}" for number in range(120))
    steps = f"charger starts 1 PRIM1, {readings}, charger stops e, look, primary takes"
    heard = {"primary": f"Start|{' '.join(f'Meter:7/{number}' for number in range(120))} Stop:7"}
    heard["charger"] = f"|1:Accepted {' '.join(f'm{number}' for number in range(120))} e"
    goes_as_told(play(), steps, heard | {"secondary": "|"})


async def test_a_session_of_2_0_1_is_delivered_after_its_charger_was_set_to_1_6(caplog: Log) -> None:
    """6: over a connection of its own version, while the charger is there; then the secondary has 1.6."""
    async with house() as (proxy, primary, secondary):
        await secondary.stop()
        async with charger(proxy, versions=[V201]) as cp:
            for kind, badge in (("Started", {"idToken": {"idToken": "SECO1"}}), ("Ended", {})):
                said = {"eventType": kind, "seqNo": 0, "transactionInfo": {"transactionId": "T"}, **badge}
                await cp.calls(kind, "TransactionEvent", **said)
            await eventually(lambda: "secondary: cannot connect" in caplog.text)
        async with charger(proxy, versions=[V16]) as cp:
            await cp.boots()
            await secondary.start()
            await secondary.heard.until(lambda m: m[3].get("eventType") == "Ended")
            assert (await secondary.connection(0)).subprotocol == V201
            assert (await secondary.connection(1)).subprotocol == V16
        assert secondary.heard.actions().count("TransactionEvent") == 2
        assert "TransactionEvent" not in primary.heard.actions()


def test_a_badge_after_hours_of_readings_keeps_the_start_and_the_newest_of_them(play: Play) -> None:
    """7: plugged in at 18:00, the tariff starts at 01:00: at most 100 events wait for the badge."""
    readings = ", ".join(f"charger tells {number}" for number in range(1, 421))
    steps = f"charger tells 0 Started, {readings}, charger tells 421 Updated SECO1, secondary takes"
    kept = " ".join(f"Event:{number}" for number in (0, *range(322, 422)))
    goes_as_told(play(version=V201), steps, {"secondary": kept, "primary": ""})


def test_a_long_inventory_arrives_in_order_at_a_server_that_is_slower_than_the_charger() -> None:
    """14: 100 reports 60 ms apart, 120 ms for each: none grows too old, though call_timeout is 3 s."""
    stage, due, heard = Stage(version=V201, ini="[host]\ncall_timeout = 3\n" + INI), list[str](), list[int]()
    stage.asks("secondary", "GetBaseReport", requestId=5)
    for number in range(200):
        if number < 100:
            stage.charger.calls(f"r{number}", "NotifyReport", requestId=5, seqNo=number)
        stage.passes(0.06)
        for _, message_id, _, payload in stage.secondary.hears():
            due.append(message_id)
            heard.append(payload["seqNo"])
        if number % 2:
            stage.secondary.answers(due.pop(0))
    assert heard == list(range(100))
    assert [answer[1] for answer in stage.charger.hears()] == [f"r{number}" for number in range(100)]
    assert stage.primary.hears() == []


@pytest.mark.parametrize(
    ("asker", "asked", "action"),
    [
        ("primary", "charger", "RemoteStartTransaction"),
        ("secondary", "charger", "RemoteStartTransaction"),
        ("charger", "primary", "Heartbeat"),
    ],
)
@pytest.mark.parametrize("written", ["12345678", '"12345678"'])
def test_an_answer_goes_back_under_the_number_that_was_sent(
    asker: str, asked: str, action: str, written: str
) -> None:
    """15: some servers, and some chargers, count in numbers; others answer these with a text."""
    stage = Stage()
    call = f'[2,12345678,"{action}",{{"idTag":"PRIM1"}}]'
    getattr(stage, asker).says(call)
    assert getattr(stage, asked).hears_text() == call
    getattr(stage, asked).says(f'[3,{written},{{"status":"Accepted"}}]')
    assert getattr(stage, asker).hears() == [[3, 12345678, ACCEPTED]]
    stage.charger.says('[2,43,"Authorize",{"idTag":"SECO1"}]')
    assert stage.charger.hears() == [[3, 43, {"idTagInfo": ACCEPTED}]]


# The home energy manager.


def test_copied_readings_of_2_0_1_are_meter_values_of_the_evse() -> None:
    """29: of Started, Updated and Ended alike; an event without a reading is not copied."""
    stage = Stage("primary_copies = MeterValues", version=V201)
    for number, kind in enumerate(("Started", "Updated", "", "Ended")):
        said: dict[str, Any] = {"eventType": kind or "Updated", "seqNo": number}
        said |= {"transactionInfo": {"transactionId": "T"}} | (
            {"meterValue": [{"n": number}]} if kind else {}
        )
        said |= {} if number else {"evse": {"id": 2}, "idToken": {"idToken": "SECO1"}}
        stage.charger.calls(f"e{number}", "TransactionEvent", **said)
        assert [answer[:2] for answer in stage.charger.hears()] == [[3, f"e{number}"]]
        message_id, action, heard = stage.secondary.hears_call()
        assert (action, heard) == ("TransactionEvent", said)
        stage.secondary.answers(message_id)
        copies = stage.primary.hears()
        wanted = [["MeterValues", {"evseId": 2, "meterValue": [{"n": number}]}]] if kind else []
        assert [copy[2:] for copy in copies] == wanted
        for _, message_id, *_ in copies:
            stage.primary.answers(message_id, idTokenInfo={"status": "Blocked"})
        assert stage.charger.hears() == stage.secondary.hears() == []


# As a meter writes it; blanks, escapes and digits are a part of what is signed.
OCMF = r'"OCMF|{\"FV\" : \"1.0\",\"RD\":[{\"TM\":\"2026-01-01T00:00:00,000+0100 S\",\"RV\":1.10}]}'
OCMF += r'|{\"SD\":\"3045\/0220\u00e9\"}"'


SIGNED = [
    (V16, '"MeterValues", {"connectorId" : 1, "transactionId": ID, "meterValue":[ METER ] } ]', 1),
    (V16, '"StopTransaction", {"connectorId" : 1, "transactionId": ID, "transactionData":[ METER ] } ]', 0),
    (
        V201,
        '"TransactionEvent", {"eventType":"Ended", "seqNo":1,"transactionInfo":{"transactionId":"T"}, ',
        1,
    ),
]


@pytest.mark.parametrize(("version", "tail", "copies"), SIGNED)
def test_a_signed_reading_reaches_its_owner_byte_for_byte(version: str, tail: str, copies: int) -> None:
    """30: only the ids around it are others; a copy of it for the primary holds the same characters."""
    stage = Stage("primary_copies = MeterValues", version=version)
    if version == V16:
        number = stage.secondary_session(server_id=7)
        meter = '{"timestamp":"t", "sampledValue":[{"value":' + OCMF + ',"format":"SignedData"}]}'
    else:
        Script(stage).plays("charger tells 0 Started SECO1, secondary takes")
        meter = '{"sampledValue":[{"value":1.10,"signedMeterValue":{"signedMeterData":' + OCMF + "}}]}"
        number, tail = "T", tail + '"meterValue":[ METER ]}]'
    tail = tail.replace("METER", meter)
    stage.charger.says('[2, "m1", ' + tail.replace("ID,", f"{number},"))
    heard = stage.secondary.hears_text()
    assert heard == f"[2, {json.dumps(json.loads(heard)[1])}, " + tail.replace("ID,", "7,")
    assert [meter in copy for copy in stage.primary.texts] == [True] * copies


async def test_what_call_errors_refused_is_tried_once_more_after_a_day(monkeypatch: Patch) -> None:
    """With the rest of its session, and with nobody's help."""
    monkeypatch.setattr(p, "RETRY_SECONDS", (0.0, 0.0))
    # A relay that waits for nothing wakes for its Pings only, and finds then what is to be tried.
    async with house(host="ping_interval = 0.5") as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        await secondary.heard.call("BootNotification")
        secondary.answers = None
        await cp.stops("SECO1", await cp.starts("SECO1"))
        refused = list[str]()
        for _ in range(3):
            start = await secondary.heard.until(lambda m: m[2] == "StartTransaction" and m[1] not in refused)
            refused.append(start[1])
            await secondary.connections[0].send(json.dumps([4, start[1], "InternalError", "", {}]))
        memory = proxy.journal.memories["CP1"]
        await eventually(lambda: len(memory.calls) - len(memory.stored) == 2)
        secondary.answers = accepting
        proxy.retry_at -= p.DAY  # A day goes by.
        assert (await secondary.heard.call("StopTransaction"))[3]["transactionId"] == 7
        assert secondary.heard.actions().count("StartTransaction") == 4
        await eventually(lambda: not memory.calls)
        assert proxy.retry_at > asyncio.get_running_loop().time() + p.DAY - 60
