"""Rule 1: what a server has asked for is its own: remote starts, reservations, reports."""

from __future__ import annotations

import pytest

from tests.play.kills import FORWARD, Play
from tests.play.script import goes_as_told, plays

# Remote starts and reservations.

test_a_claim = plays(
    """
It outlives a kill.

A remote start claims the next session of its badge, and one only,
    secondary asks RemoteStartTransaction idTag=guest, THEN, charger starts 1 GUEST, secondary takes, THEN,
    charger starts 2 GUEST 1 9 => secondary: Start; primary: Start; claims:
also where its server asks twice and the charger refuses the second,
    secondary claims GUEST, secondary calls r RemoteStartTransaction idTag=GUEST, charger answers r Rejected,
    look, THEN, charger starts 1 GUEST => secondary: r:Rejected|Start; primary: |
or accepts both,
    2 times (secondary claims GUEST), THEN, charger starts 1 GUEST, secondary takes,
    charger starts 2 GUEST 1 9 => secondary: Start; primary: Start; claims:
and though its server asks often, the other's claim stands;
    primary claims SECO1, 64 times (secondary claims GUEST), THEN, charger starts 1 SECO1 => primary: Start
for five minutes,
    secondary asks RemoteStartTransaction idTag=GUEST connectorId=1, THEN, 290 s, charger starts 1 GUEST
    => secondary: Start; primary:
and not longer,
    secondary asks RemoteStartTransaction idTag=GUEST, THEN, 301 s, charger starts 1 GUEST => primary: Start
if the charger accepts, on its connector, for its badge;
    secondary calls r RemoteStartTransaction idTag=A, charger answers RemoteStartTransaction Rejected,
    secondary asks RemoteStartTransaction idTag=B connectorId=2, THEN, charger starts 1 A, primary takes,
    charger starts 2 B 3, primary takes, charger starts 3 C 2, look, charger starts 4 B 2
    => primary: Start Start Start|; secondary: r:Rejected|Start; claims:
it is forgotten when its time is over.
    secondary asks RemoteStartTransaction idTag=GUEST, THEN, 1 days => claims:
A reservation claims until its expiry date,
    secondary asks ReserveNow idTag=GUEST reservationId=5 expiryDate=2027-01-15T08:20:00Z, THEN, 150 s,
    charger starts 1 GUEST => secondary: Start; primary:
and not longer, also where its server has shortened it,
    secondary asks ReserveNow idTag=GUEST reservationId=5 expiryDate=2027-01-15T09:20:00Z,
    secondary asks ReserveNow idTag=GUEST reservationId=5 expiryDate=2027-01-15T08:20:00Z, THEN, 210 s,
    charger starts 1 GUEST => primary: Start
for any connector if that is 0, else for its own,
    secondary asks ReserveNow connectorId=0 idTag=A reservationId=5 expiryDate=2027-01-15T08:20:00Z,
    secondary asks ReserveNow connectorId=2 idTag=B reservationId=6 expiryDate=2027-01-15T08:20:00Z, THEN,
    charger starts 1 B, primary takes, charger starts 2 A 3 => primary: Start; secondary: Start
for whoever names it,
    secondary asks ReserveNow connectorId=1 idTag=GUEST reservationId=5 expiryDate=2027-01-15T08:20:00Z, THEN,
    charger sends s StartTransaction connectorId=1 idTag=PRIM1 reservationId=5 => secondary: Start; primary:
but nobody who names another.
    secondary asks ReserveNow connectorId=1 idTag=GUEST reservationId=5 expiryDate=2027-01-15T08:20:00Z, THEN,
    charger sends s StartTransaction connectorId=1 idTag=PRIM1 reservationId=6 => primary: Start
""",
    then=["1 s", "proxy killed"],
)


test_what_a_claim_is_good_for = plays(
    """
The next session of its badge.

An Authorize leaves a claim to the session that follows.
    secondary claims PRIM1, charger shows a PRIM1, charger starts 1 PRIM1, secondary takes
    => secondary: Authorize Start; primary:
Of two claims for one badge the newest wins: it meant the session that follows.
    secondary claims TAG, primary claims TAG, charger starts 1 TAG => primary: Start; secondary:
A stop badge that is claimed never changes the owner.
    charger starts 1 PRIM1, primary accepts, secondary claims PRIM1, charger stops e 7 PRIM1
    => primary: Start Stop:7; secondary:
A claim vouches for its badge where the proxy stands in for the server that asked for the session.
    secondary claims STRANGER, secondary leaves, 6 s, charger starts 1 STRANGER => charger: 1:Accepted
A CallError refuses it,
    secondary calls r RemoteStartTransaction idTag=PRIM1, charger fails RemoteStartTransaction,
    charger starts 1 PRIM1 => primary: Start; secondary: r:error; claims:
and so does an answer that nobody waits for any more: the charger's word counts.
    secondary calls r RemoteStartTransaction idTag=PRIM1, 31 s,
    charger answers RemoteStartTransaction Rejected, charger starts 1 PRIM1 => primary: Start; claims:
It claims nothing while it waits unsent, and counts from sending.
    primary calls b GetConfiguration, secondary calls r RemoteStartTransaction idTag=SECO9, 20 s,
    charger starts 1 PRIM1, charger answers GetConfiguration, charger answers RemoteStartTransaction, 290 s
    => primary: Start b; secondary: r; claims: seco9
A server cancels its own reservation only, although both have given theirs the same number;
    primary asks ReserveNow idTag=SECO1 reservationId=5,
    secondary asks ReserveNow idTag=PRIM1 reservationId=5,
    secondary asks ReserveNow idTag=PRIM2 reservationId=6, secondary claims GUEST,
    secondary asks CancelReservation reservationId=5, proxy killed => claims: seco1 prim2 guest
without a number no remote start is meant.
    secondary claims GUEST, secondary asks CancelReservation => claims: guest
It outlives no clock that was set back: five minutes from the start of the proxy, at most.
    secondary claims PRIM1, clock - 10, proxy killed, 301 s, charger starts 1 PRIM1
    => primary: Start; secondary:
It is on disk before the charger hears of it, because the session that follows may outlive the proxy;
    disk hangs, secondary calls r RemoteStartTransaction idTag=PRIM1, look, disk finishes, proxy dies
    => charger: |RemoteStartTransaction; claims: prim1
where the disk fails, it goes all the same.
    disk full, secondary calls r RemoteStartTransaction idTag=PRIM1 => charger: RemoteStartTransaction
A reservation that is named wins over a newer claim for its badge; why a session is whose is told.
    secondary asks ReserveNow idTag=GUEST reservationId=5, primary claims GUEST,
    charger sends a StartTransaction connectorId=1 idTag=GUEST reservationId=5,
    charger sends b StartTransaction connectorId=1 idTag=GUEST timestamp=t
    => secondary: Start; primary: Start;
    told a session of secondary begins on connector 1: secondary claimed it: its reservation: 1;
    told a session of primary begins on connector 1: primary claimed it: its remote start: 1
One with an expiry that nobody can read claims for five minutes.
    secondary asks ReserveNow idTag=PRIM1 expiryDate=soon,
    secondary asks ReserveNow idTag=PRIM2 expiryDate=2026-13-99, 290 s, charger starts 1 PRIM1,
    secondary takes, 11 s, charger starts 2 PRIM2 2 => secondary: Start; primary: Start
""",
    more=FORWARD,
)


# Requests.


@pytest.mark.parametrize("asked", ["GetDiagnostics", "UpdateFirmware", "SignedUpdateFirmware", "GetLog"])
def test_a_report_goes_to_the_server_that_asked_last(play: Play, asked: str) -> None:
    """In 1.6 some reports name no request; the last such Call tells. What is its own is not copied."""
    report = asked.removeprefix("Get").replace("UpdateFirmware", "Firmware") + "StatusNotification"
    says = f"charger sends m {report}, primary takes, secondary takes"
    steps = f"{says}, look, secondary asks {asked}, {says}, look, primary asks {asked}, {says}"
    told = {"primary": f"{report}||{report}", "secondary": f"{report}|{report}|"}
    goes_as_told(play(f"secondary_copies = {report}"), steps, told)


test_a_report_belongs_to_its_request = plays(
    """
In both versions.

A report belongs to the request that it names, whose id may be 0; else it is the station's.
    secondary asks GetLog requestId=0, charger sends a LogStatusNotification requestId=0, look,
    charger sends b LogStatusNotification, primary takes, charger sends c LogStatusNotification requestId=2
    => secondary: LogStatusNotification|; primary: |LogStatusNotification LogStatusNotification
What the charger has refused is forgotten; some servers only probe.
    secondary calls 1 GetLog requestId=1, charger answers GetLog Rejected,
    charger sends a LogStatusNotification requestId=1 => primary: LogStatusNotification
It is not refused where it takes the place of another.
    secondary calls 1 GetLog requestId=1, charger answers GetLog AcceptedCanceled,
    charger sends a LogStatusNotification requestId=1 => secondary: 1 LogStatusNotification
A refused request takes nothing from the primary,
    primary calls 1 GetLog, charger answers GetLog, secondary calls 2 GetLog, charger answers GetLog Rejected,
    charger sends a LogStatusNotification => primary: 1 LogStatusNotification; secondary: 2:Rejected
and leaves the secondary nothing.
    secondary calls 1 GetLog, charger answers GetLog, primary calls 2 GetLog, charger answers GetLog Rejected,
    charger sends a LogStatusNotification => primary: 2:Rejected LogStatusNotification; secondary: 1
A late refusal leaves a newer request of the same id alone,
    secondary calls a GetLog requestId=1, 31 s, secondary calls b GetLog requestId=1, charger answers b,
    charger answers a Rejected, charger sends c LogStatusNotification requestId=1
    => secondary: a:error b LogStatusNotification; primary:
and an answer that is said again takes nothing away from a server that has asked since.
    secondary calls a GetLog, 31 s, charger answers a, primary calls b GetLog, charger answers b,
    charger answers a, charger sends c LogStatusNotification => primary: b LogStatusNotification
A triggered reading without a session goes to the secondary that asked, and the proxy answers.
    secondary asks TriggerMessage requestedMessage=MeterValues, charger sends m MeterValues connectorId=1
    meterValue=[{"sampledValue":[{"value":"1","context":"Trigger"}]}]
    => secondary: Meter; primary: ; charger: m
""",
    versions=["ocpp1.6", "ocpp2.0.1"],
)
