"""Rule 1: whose a Call of the charger is. Plays in OCPP 1.6; test_transactions.py has those of 2.x."""

from __future__ import annotations

import random

import pytest

from tests.play.kills import Play, killed, reads, stops
from tests.play.plays import Stage
from tests.play.script import plays

FIRST, LAST = 2_000_000_000, 2**31 - 1


# The station, and badges.


@pytest.mark.parametrize(
    ("badge", "owner"), [(" prim7 ", "primary"), ("seco9", "secondary"), (1234, "secondary")]
)
def test_a_badge_is_whose_list_has_it(badge: object, owner: str) -> None:
    """However it is written; its server hears it as it came."""
    stage = Stage("[charger CP1]\nsecondary_rfid = SECO*, 1234")
    stage.charger.calls("1", "Authorize", idTag=badge)
    assert getattr(stage, owner).hears_call()[1:] == ("Authorize", {"idTag": badge})


# The transaction.


@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("server_id", [7, 0, -1, -5, FIRST, FIRST + 1, LAST - 1, LAST, 2**31])
def test_a_session_of_the_primary_stays_with_it(play: Play, is_killed: bool, server_id: int) -> None:
    """An id that could be mistaken is translated both ways, and a stop badge never changes the owner."""
    stage = play()
    number = stage.primary_session(server_id)
    if is_killed:
        killed(stage)
    assert (number == server_id) is (server_id == 7)
    assert number == 7 or FIRST <= number <= LAST
    reads(stage, number)
    heard = {"connectorId": 1, "transactionId": server_id, "meterValue": []}
    assert stage.primary.hears_call()[1:] == ("MeterValues", heard)
    stage.primary.answers("m")
    stage.secondary.calls("y", "RemoteStopTransaction", transactionId=number)
    assert stage.secondary.hears() == [[3, "y", {"status": "Rejected"}]]
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=server_id)
    assert stage.charger.hears()[-1] == [2, "x", "RemoteStopTransaction", {"transactionId": number}]
    stops(stage, number, idTag="SECO1")
    assert stage.primary.hears_call()[2]["transactionId"] == server_id
    assert stage.secondary.hears() == []


# Ids that are not usable.

test_a_stop_finds_its_session = plays(
    """
By its id; without a usable one, by what is known of the sessions.

An unknown id is never guessed, whatever the badge.
    charger starts 1, secondary accepts, charger stops e 4711 SECO1 => primary: Stop:4711; secondary: Start
-1 stops the session whose start was never answered, and not the one that has an id (1.6 errata 3.18).
    charger starts 1 SECO1 2, secondary accepts, charger starts 2 PRIM1, 31 s, charger stops e -1
    => primary: Start Stop:-1; secondary: Start
A late answer to that start is not forwarded, but tells the session its id.
    charger starts 1 PRIM1, 31 s, primary accepts, charger stops e -1 => primary: Start Stop:7; charger: ;
    told a session of primary begins on connector 1: its badge is on primary_rfid: 1;
    told session 7 of primary ends on connector 1: 1
Where its repeat has heard the late answer, -1 is not taken for the stop of that session.
    charger starts 1 SECO1 2, secondary accepts, charger starts 2 PRIM1, 31 s, primary accepts,
    charger starts 3 PRIM1, charger stops e -1 => primary: Start Stop:-1; charger: 1:Accepted 3:Accepted
Nor is -1 taken for the stop of one whose start the proxy has answered, after a kill neither.
    charger starts 1 PRIM1 2, primary accepts, charger reads m, secondary leaves, charger starts 2 SECO1 1,
    proxy killed, charger stops e 0 => stored: Start; file owner badge stop: primary PRIM1|secondary SECO1
It is that of the only open session; those that have ended, or were turned away, are no candidates.
    charger starts 0 STRANGER 2, charger starts 1, secondary accepts, charger stops d, secondary accepts,
    charger starts 2 PRIM1, primary accepts, charger stops e 0
    => primary: Start Stop:7; secondary: Start Stop:7
A power cut took the first one's stop; the second has its connector, so it is the one that stops.
    charger starts 1, secondary accepts, charger starts 2 SECO1 1 5000, secondary accepts, charger stops e -1
    => primary: ; secondary: Start Start Stop:8
It is the same with its badge, though another badge is plugged in, too.
    charger starts 0 PRIM1 2, primary accepts, charger starts 1, secondary accepts,
    charger starts 2 SECO1 1 5000, secondary accepts, charger stops e -1 SECO1
    => primary: Start; secondary: Start Start Stop:8
With two open sessions of other badges, neither is guessed: it goes by its badge.
    charger starts 1 PRIM1 1, primary accepts, charger starts 2 SECO1 2, secondary accepts,
    charger stops e -1 SECO7 => primary: Start; secondary: Start Stop:-1
It is not that of a session of its badge that has its stop.
    charger starts 1, secondary accepts, charger stops e, secondary accepts, charger stops f -1 SECO1
    => secondary: Start Stop:7 Stop:-1
Repeated, it is known by what it says, and ends no other session.
    charger starts 1 SECO1 1, charger starts 2 SECO2 2, secondary takes, charger stops e -1 SECO1,
    charger stops f -1 SECO1, secondary takes
    => primary: ; secondary: Start Start Stop:7; charger: 1:Accepted 2:Accepted e f
A start that was refused with id 0 has another for the charger, whose stop ends no other session.
    charger starts 1 PRIM1, primary accepts, charger starts 2 PRIM2 2, primary refuses, charger stops e,
    primary accepts, charger stops f 7 => primary: Start Start Stop:0 Stop:7; charger: 1:Accepted 2:Blocked e
A start that was rejected is recorded and delivered nowhere; its repeat joins it: no owner has refused it.
    charger starts 1 STRANGER, charger starts 2 STRANGER, proxy killed, charger reads m, charger stops e
    => charger: 1:Invalid 2:Invalid m e; primary: ; secondary: ; sessions: 1; stored: ;
    file server badge owner meter_stop delivered: STRANGER primary 5.0 None
A start whose server was lost is found by its stop, although its badge is another's.
    primary claims SECO1, charger starts 1, primary leaves, primary returns, charger stops e 0 SECO1
    => primary: Start Stop:0; secondary:
Meter values without an id belong to the session on their connector, after a kill, too,
    charger starts 1 PRIM1 2, primary accepts, charger starts 2, secondary accepts, charger is Charging,
    primary takes, secondary takes, proxy killed, secondary takes, look,
    charger sends m MeterValues connectorId=1 transactionId=0, secondary takes
    => primary: Start Status:Charging|; secondary: Start Status:Charging Status:Charging|Meter:7
until that is Available; the session stays routable by its id.
    charger starts 1, secondary accepts, charger is Available, primary takes, secondary takes,
    charger sends m MeterValues connectorId=1 transactionId=0, primary takes, charger stops e
    => primary: Status:Available Meter:0; secondary: Start Status:Available Stop:7
Such a session can be named for seven days; then nobody knows it.
    charger starts 1, secondary accepts, charger is Available, primary takes, secondary takes, 6.9 days,
    charger reads m, secondary takes, 0.2 days, charger reads n
    => secondary: Start Status:Available Meter:7; sessions: 0
A session counts as ended after thirty silent days, without a stop; a message of it is no silence.
    charger starts 1 PRIM1, primary accepts, 29.9 days, charger reads m, primary takes, 29.9 days,
    charger sends n MeterValues connectorId=1, primary takes, 30.1 days,
    charger sends o MeterValues connectorId=1
    => primary: Start Meter:7 Meter:7 Meter; file stop!='' ended>0: 0 1
A session of the secondary is answered here, under an id with the owner in its lowest bit, whoever stops it.
    charger starts 1, secondary accepts, proxy killed, charger reads m, charger stops e idTag=PRIM1,
    charger reads n, secondary takes
    => charger: 1:Accepted m e n; secondary: Start Meter:7 Stop:7 Meter:7; primary: ;
    file transaction_id>1999999999 transaction_id%2: 1 1
Meter values of a connector without a session, or of the main meter, concern the station.
    charger starts 1 SECO1 2, charger starts 0 SECO2 0, charger starts r STRANGER,
    charger sends a MeterValues connectorId=0, primary takes, charger sends b MeterValues connectorId=1,
    primary takes, charger sends c MeterValues connectorId="1", primary takes, charger sends d MeterValues
    => primary: Meter Meter Meter Meter
Starts that are refused again and again do not push an open session out of memory.
    limit is MAX_SESSIONS 5, charger starts 1, secondary accepts,
    10 times (charger starts 2 PRIM1 2, primary refuses), charger stops e -1 SECO1, secondary takes
    => secondary: Start Stop:7
Of too many sessions the oldest go,
    limit is MAX_SESSIONS 2, charger starts 1 SECO1, charger starts 2 SECO2 2, charger starts 3 SECO3 3,
    secondary takes, charger stops e -1 SECO1, charger stops f -1 SECO3, primary takes, secondary takes
    => sessions: 2; secondary: Start Start Start Stop:-1 Stop:9
of claims, too,
    limit is MAX_FEW 2, secondary claims A, secondary claims B, secondary claims C => claims: b c
of what a server has asked for,
    limit is MAX_FEW 2, secondary asks GetLog requestId=1, secondary asks GetLog requestId=2,
    secondary asks GetLog requestId=3, charger sends a LogStatusNotification requestId=1, look,
    charger sends b LogStatusNotification requestId=2
    => primary: LogStatusNotification|; secondary: |LogStatusNotification
and of statuses that of the connector that was silent for longest.
    limit is MAX_FEW 2, charger is Available, charger is Charging 2, charger is Finishing,
    charger is Preparing 3, secondary takes, look, secondary leaves, secondary returns, secondary takes
    => secondary: Status:Available Status:Charging
    Status:Finishing Status:Preparing|Status:Finishing Status:Preparing
Only the Actions of `secondary_copies` are copied; what a secondary misses is not made up for.
    proxy with secondary_copies=SecurityEventNotification, charger is Charging,
    charger sends e SecurityEventNotification, look, secondary leaves,
    charger sends f SecurityEventNotification, secondary returns, 60 s
    => secondary: SecurityEventNotification|Status:Charging
A local secondary records its sessions, whose badges never reach the primary, and gets no copies.
    proxy given LOCAL_SECONDARY, charger starts 1, charger is Charging
    => charger: 1:Accepted; primary: Status:Charging; file badge: SECO1; stored:
Without a secondary its badges are the primary's, as the WARNING says; one on no list may be rejected.
    proxy given NO_SECONDARY, charger shows 1, primary takes, charger shows 2 STRANGER
    => primary: Authorize; charger: 1:Accepted 2:Invalid
What names no badge by its schema is the station's.
    charger sends a DataTransfer idTag=SECO1 => primary: DataTransfer; secondary: ; charger:
A forgotten id of the proxy is its owner's, which does not know it: a stop is kept, a reading not even that.
    charger stops e 2000000000, charger stops f 2000000001,
    charger sends m MeterValues connectorId=1 transactionId=2000000001
    => charger: e f m; primary: ; secondary: ; refused: Stop Stop; stored: ;
    file number: ; refused at: primary secondary;
    told its start is not known here: 2
What becomes of a badge on no list is told.
    charger shows a STRANGER
    => charger: a:Invalid; told Authorize is for nobody (rejected): its badge is on no list: 1
""",
    more="unknown_rfid = reject",
)


def test_an_id_that_another_session_bears_is_translated() -> None:
    """A server that says 1 every time (EVerest's) has several sessions; it means its newest open one."""
    stage = Stage()
    assert stage.primary_session(server_id=1, badge="PRIM1", connector=1) == 1
    second = stage.primary_session(server_id=1, badge="PRIM2", connector=2)
    assert second >= FIRST
    stops(stage, 1)
    assert stage.primary.hears_call()[2]["transactionId"] == 1
    stage.primary.answers("e")
    stage.charger.hears()
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=1)
    assert stage.charger.hears_call()[2] == {"transactionId": second}


def test_a_start_that_is_accepted_without_an_id_gets_one_of_the_proxys() -> None:
    """The charger could not read the answer without it."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    stage.primary.answers(stage.primary.hears_call()[0], idTagInfo={"status": "Accepted"})
    assert stage.charger.hears()[0][2]["transactionId"] >= FIRST


def test_an_id_in_use_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transaction ids of the proxy are random, and unique for the charger all the same."""
    numbers = iter([FIRST, FIRST, FIRST + 2])
    monkeypatch.setattr(random, "randrange", lambda *_: next(numbers))
    stage = Stage()
    ids = [stage.secondary_session(badge=f"SECO{number}", connector=number) for number in (1, 2)]
    assert ids == [FIRST + 1, FIRST + 3]
