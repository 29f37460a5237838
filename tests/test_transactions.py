"""OCPP 2.x: the station picks the transaction id, and the badge may come late."""

from __future__ import annotations

from tests.play.plays import Stage
from tests.play.script import Script, plays

test_events = plays(
    """
Each transaction is one server's, and whole.

Events follow the badge of the first one, whatever badge ends the transaction.
    charger tells 0 Started SECO1, charger tells 1, charger tells 2 Ended PRIM1, secondary takes
    => secondary: Event:0 Event:1 Event:2; primary: ; charger: T0:Accepted T1 T2:Accepted
Without an owner they are answered, and kept until a badge settles it, then handed over in order.
    charger tells 0 Started, proxy killed, charger tells 1, proxy killed, look,
    charger tells 2 Updated SECO1, secondary takes
    => secondary: |Event:0 Event:1 Event:2; primary: |; charger: T0 T1|T2:Accepted; stored:
The settling event comes last at the primary, too, and the charger hears its verdict.
    charger tells 0 Started, charger tells 1 Updated PRIM1, look, primary accepts, look, primary refuses
    => primary: Event:0|Event:1|; secondary: ||; charger: T0||T1:Blocked; stored:
A kept event that the primary leaves unanswered lets the settling one pass after `call_timeout`.
    charger tells 0 Started, charger tells 1 Ended, 29 s, look, 2 s => primary: Event:0|Event:1; closed:
A repeated event is not stored again, and answered as it was (rule 3), after a kill, too.
    charger tells 0 Started SECO1, charger tells 0 Started SECO1, secondary refuses,
    charger tells 0 Started SECO1, proxy killed, charger tells 0 Started SECO1
    => secondary: Event:0; charger: T0:Accepted T0:Accepted T0:Accepted T0:Accepted; stored:
One without an owner is kept once.
    charger tells 0 Started, charger tells 0 Started, proxy killed, charger tells 0 Started,
    charger tells 1 Updated SECO1, secondary takes
    => secondary: Event:0 Event:1; charger: T0 T0 T0 T1:Accepted
It never reaches another server than its own, after that was replaced neither.
    charger tells 0 Started SECO1, secondary takes, proxy given OTHER_SECONDARY, charger tells 1 Ended
    => secondary: Event:0; stored: Event
What a connection left unanswered goes out on the next, ten seconds later: a charger need not boot again.
    charger tells 0 Started, charger tells 1 Updated PRIM1, 20 s, charger leaves, 1 s, charger returns,
    charger tells 1 Updated PRIM1, 9 s, look, 2 s, primary takes => primary: Event:0|Event:0 Event:1; stored:
A kept event that fails lets no verdict of another transaction pass: each one's events arrive in order.
    charger tells 0 Started - A, charger tells 1 Updated PRIM1 A, charger tells 0 Started - B,
    charger tells 1 Updated PRIM1 B, primary fails, primary accepts, look, 11 s, primary takes
    => primary: Event:A0 Event:A1|Event:A0 Event:B0 Event:B1; stored:
A full store keeps the event that says whose the session is, which came behind the cable, and the newest.
    secondary leaves, limit is MAX_STORED 4, charger tells 0 Started, charger tells 1 Updated SECO1,
    charger tells 2, charger tells 3, charger tells 4, charger tells 5 Ended, limit ends, secondary returns,
    secondary takes => secondary: Event:0 Event:1 Event:4 Event:5
The bound is one for both servers: the oldest reading goes, whichever it is for, from the disk, too.
    limit is MAX_STORED 6, charger tells 0 Started, charger tells 1, charger tells 2,
    charger tells 3 Updated PRIM1, 1 s, secondary leaves, charger tells 0 Started SECO1 U,
    charger tells 1 Updated - U, charger tells 2 Updated - U, charger tells 3 Updated - U, proxy killed,
    60 s, secondary takes, primary takes
    => primary: Event:0 Event:0 Event:2; secondary: Event:U0 Event:U1 Event:U2 Event:U3; stored:
What there is no room for changes nothing until it comes again, with an owner or without.
    secondary leaves, limit is MAX_STORED 0, charger tells 0 Started, charger tells 1 Updated SECO1 U, look,
    limit ends, charger tells 0 Started, charger tells 1 Updated SECO1 U
    => charger: |T0 U1:Accepted; stored: Event Event
A kept event that so many others have outlived that its late answer would not be known goes again.
    limit is MAX_LATE 3, charger tells 0 Started, charger tells 1 Ended PRIM1, 31 s, charger shows a PRIM1,
    31 s, charger shows b PRIM1, 31 s, charger shows c PRIM1, 31 s, charger shows d PRIM1, 31 s, look,
    primary leaves, primary returns, primary takes
    => primary: Event:0 Event:1 Authorize Authorize Authorize Authorize|Event:0; stored:
While the disk fails, an event and its repeat are not answered: the first is in memory only.
    disk full, charger tells 0 Started SECO1, 5 s, charger tells 0 Started SECO1, 5 s, look, disk well, 2 s,
    charger tells 0 Started SECO1 => charger: |T0:Accepted T0:Accepted; stored: Event
Nor is one without an owner, which waits for it here, and nowhere else.
    disk full, charger tells 0 Started, look, disk well, 2 s => charger: |T0
What was kept waits for the disk; what is relayed of the transaction goes on, and so does the driver.
    charger tells 0 Started, disk full, charger tells 1 Updated PRIM1, 10 s, look, primary accepts,
    charger tells 2, primary accepts, look, disk well, 20 s
    => primary: Event:1|Event:2|Event:0; charger: T0|T1:Accepted T2|
An event is answered once its transaction is on disk, also while the disk is at it, and whoever answers.
    disk hangs, charger tells 0 Started SECO1, charger tells 1 Updated PRIM1 U, primary accepts, look,
    disk finishes, disk finishes, disk well, proxy killed
    => charger: |T0:Accepted U1:Accepted; sessions: 2
The settling event waits until a restart would not send the kept one again.
    charger tells 0 Started, charger tells 1 Updated PRIM1, disk hangs, primary accepts, look, disk finishes
    => primary: Event:0|Event:1
Energy that flows gives a transaction without a badge to the primary.
    charger tells 0 Started - T chargingState=EVConnected,
    charger tells 1 Updated - T chargingState=Charging, primary takes => primary: Event:0 Event:1
An id that is used again after its end names a new transaction, over a kill, too.
    charger tells 0 Started PRIM1 T timestamp=t3, primary takes, proxy killed,
    charger tells 1 Ended - T timestamp=t4, primary takes, charger tells 0 Started SECO1 T timestamp=t5,
    secondary takes => primary: Event:0 Event:1; secondary: Event:0; file badge stop!='': PRIM1 1|SECO1 0
Two of one id are delivered after a kill, and what follows belongs to the second.
    secondary leaves, charger tells 0 Started SECO1 T timestamp=t1, charger tells 1 Updated - T timestamp=t2,
    charger tells 0 Started SECO1 T timestamp=t3, proxy killed, charger tells 1 Ended - T timestamp=t4,
    secondary takes => secondary: Event:0 Event:1 Event:0 Event:1; file stop!='': 0|1; stored:
A Started that is repeated after the end is no new transaction: it says the time of the first one.
    charger tells 0 Started SECO1 T timestamp=t1, charger tells 1 Ended - T timestamp=t2,
    charger tells 0 Started SECO1 T timestamp=t1, secondary takes
    => secondary: Event:0 Event:1; charger: T0:Accepted T1 T0:Accepted; sessions: 1
Charging needs belong to the session on their EVSE; while that has no owner, they are the station's.
    charger tells 0 Started, charger tells 1 Updated - T evse={"id":2}, look,
    charger sends n NotifyEVChargingNeeds evseId=2, primary takes,
    charger tells 2 Updated SECO1 T evse={"id":3}, proxy killed, secondary takes, look,
    charger sends o NotifyEVChargingNeeds evseId=2, secondary takes, charger tells 3 Ended, secondary takes,
    look, charger sends q NotifyEVChargingNeeds evseId=2
    => primary: |NotifyEVChargingNeeds||NotifyEVChargingNeeds;
    secondary: |Event:0 Event:0 Event:1 Event:2|NotifyEVChargingNeeds Event:3|;
    charger: T0 T1|n T2:Accepted|o T3|
A claim for an EVSE matches no transaction that named another before its badge came.
    secondary asks RequestStartTransaction idToken={"idToken":"TAG"} remoteStartId=5 evseId=2,
    charger tells 0 Started - T evse={"id":1}, charger tells 1 Updated TAG, primary takes
    => primary: Event:0 Event:1; secondary:
A report on an EVSE does not belong to the session there: only meter values and charging needs do.
    charger tells 0 Started SECO1 T evse={"id":1},
    charger sends n NotifyEvent eventData=[{"component":{"evse":{"id":1}}}]
    => primary: NotifyEvent; secondary: Event:0
A transaction that can have no badge any more is the primary's: after thirty silent days,
    charger tells 0 Started, 30.1 days, 11 s, primary takes
    => primary: Event:0; stored: ; file stop!='' ended>0: 0 1
a week after its EVSE was Available, so that a badge may come late,
    charger tells 0 Started - T evse={"id":1}, primary takes,
    charger sends a StatusNotification evseId=1 connectorId=1 connectorStatus=Available, primary takes,
    secondary takes, 6.9 days, 11 s, look, 0.2 days, 11 s, primary takes
    => primary: Status|Event:0; secondary: Status|; stored:
or when its id is used again.
    charger tells 0 Started - T timestamp=t1, charger tells 0 Started - T timestamp=t2, 11 s, primary takes,
    look, charger tells 1 Ended - T timestamp=t3, primary takes => primary: Event:0|Event:0 Event:1; stored:
A remote start claims the transaction that names its number, with its badge,
    secondary asks RequestStartTransaction idToken={"idToken":"TAG"} remoteStartId=4,
    primary asks RequestStartTransaction idToken={"idToken":"TAG"} remoteStartId=9,
    charger tells 0 Started TAG A remoteStartId=4, charger tells 0 Started TAG B remoteStartId=9
    => secondary: Event:A0; primary: Event:B0
or without one, but not with another's: some servers say 1 every time.
    secondary asks RequestStartTransaction idToken={"idToken":"TAG"} remoteStartId=1,
    charger tells 0 Started PRIM1 A remoteStartId=1, charger tells 0 Started - B remoteStartId=1
    => secondary: Event:B0; primary: Event:A0
A server names only its own transactions, and the primary those without an owner.
    charger tells 0 Started SECO1 A, charger tells 0 Started - B, secondary takes,
    primary calls x RequestStopTransaction transactionId=A, primary calls z CostUpdated transactionId=A,
    secondary calls y RequestStopTransaction transactionId=B, look,
    secondary calls v RequestStopTransaction transactionId=A, charger answers RequestStopTransaction,
    primary calls w RequestStopTransaction transactionId=B, charger answers RequestStopTransaction
    => primary: x:Rejected z:error|w; secondary: Event:A0 y:Rejected|v
The answer to a remote start may name a transaction that began with the cable; one with an owner keeps it.
    charger tells 0 Started,
    secondary calls r RequestStartTransaction idToken={"idToken":"A"} remoteStartId=3,
    charger answers r Accepted transactionId=T, secondary takes,
    primary calls q RequestStartTransaction idToken={"idToken":"B"} remoteStartId=3,
    charger answers q Accepted transactionId=T, charger tells 1 Updated - T chargingState=Charging
    => secondary: r Event:0 Event:1; primary: q
The end of a reservation is reported to the server that made it, when nothing else matches it any more.
    secondary asks ReserveNow id=5 idToken={"idToken":"PRIM1"} expiryDateTime=2027-01-15T08:17:40Z, 61 s,
    charger sends a ReservationStatusUpdate reservationId=5, charger tells 0 Started PRIM1
    => secondary: ReservationStatusUpdate; primary: Event:0
A report on transactions is their owner's; on those of both, of none or unknown ones the primary's.
    charger tells 0 Started PRIM1 A, charger tells 0 Started SECO1 B, charger tells 0 Started SECO2 C,
    charger tells 0 Started PRIM2 D, charger tells 0 Started - E, primary takes, secondary takes, look,
    charger sends 1 NotifyEvent eventData=[{"transactionId":"A"},{"transactionId":"B"}], primary takes, look,
    charger sends 2 NotifyEvent eventData=[{"transactionId":"B"},{"transactionId":"A"}], primary takes, look,
    charger sends 3 NotifyEvent eventData=[{"transactionId":"B"},{"transactionId":"C"}], look,
    charger sends 4 NotifyEvent eventData=[{"transactionId":"A"},{"transactionId":"D"}], primary takes, look,
    charger sends 5 NotifyEvent eventData=[{"transactionId":"E"},{}], primary takes, look,
    charger sends 6 NotifyEvent eventData=[{"transactionId":"F"}]
    => primary: Event:A0 Event:D0|NotifyEvent|NotifyEvent||NotifyEvent|NotifyEvent|NotifyEvent;
    secondary: Event:B0 Event:C0|||NotifyEvent|||
A badge that is rejected settles a transaction that nobody gets, nor what was kept of it; nobody may stop it.
    proxy with unknown_rfid=reject, charger tells 0 Started, 2 times (charger tells 1 Updated STRANGER),
    charger tells 2 Updated STRANGER, primary calls x RequestStopTransaction transactionId=T,
    charger tells 3 Ended
    => charger: T0 T1:Invalid T1:Invalid T2:Invalid T3; primary: x:Rejected; secondary: ; stored:
A delivery to the primary without a charger ends, also where that fails to take something,
    proxy with primary_user=u, charger boots, charger tells 0 Started, charger tells 1 Ended, primary fails,
    charger leaves, 239 s => closed: primary:1000 secondary:1001; stored: Event
or leaves it unanswered.
    proxy with primary_user=u, charger boots, charger tells 0 Started, charger tells 1 Ended, charger leaves,
    240 s => closed: primary:1000 secondary:1001; stored: Event
""",
    versions=["ocpp2.0.1", "ocpp2.1"],
)


def test_a_kept_event_that_an_old_connection_still_holds_lets_no_verdict_pass() -> None:
    """It may never have arrived; the next connection carries it, under its id, once the old one is closed."""
    stage = Stage(version="ocpp2.0.1")
    script = Script(stage).plays("charger tells 0 Started, charger tells 1 Updated PRIM1")
    old, ((_, message_id, *_),) = stage.primary, script.due["primary"]
    script.plays("charger returns, charger tells 1 Updated PRIM1, 31 s")
    assert script.due["primary"] == []
    old.lost()
    script.listen()
    assert [call[1] for call in script.due["primary"]] == [message_id]
    assert script.plays("primary accepts").found("primary") == "Event:0 Event:0 Event:1"
