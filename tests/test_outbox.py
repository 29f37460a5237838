"""Stored Calls: the charger is answered here, the owner gets everything, in order, once; and `forward`."""

from __future__ import annotations

import pytest

from tests.play.kills import Play
from tests.play.script import Script, goes_as_told, plays, plays_of

STORED = """
A session while the secondary is away is delivered in order when it is back, under its own id.
    secondary leaves, charger starts 1, charger reads m, charger stops e, secondary returns, secondary takes
    => secondary: Start Meter:7 Stop:7; charger: 1:Accepted m e; primary: ; stored:
What is left when the charger goes is delivered without it.
    charger starts 1, charger reads m, charger reads n, charger stops e, charger leaves, secondary takes
    => secondary: Start Meter:7 Meter:7 Stop:7; charger: 1:Accepted m n e; stored:
The secondary is redialled for what is left.
    charger starts 1, secondary leaves, charger stops e, charger leaves, secondary returns, secondary takes
    => secondary: Start Start Stop:7; stored:
After a kill it is delivered, and then it is gone from the disk, too.
    secondary leaves, charger starts 1, charger reads m, charger stops e, proxy killed, proxy killed,
    secondary leaves, secondary returns, secondary takes, proxy killed
    => secondary: Start Start Start Meter:7 Stop:7; charger: 1:Accepted m e; stored:
An answer that was recorded is not asked for again after a kill.
    charger starts 1, charger stops e, secondary accepts, proxy killed, secondary takes
    => secondary: Start Stop:7 Stop:7; stored:
A late answer counts; other Calls have their turn, but the next stored one still waits.
    charger starts 1, charger shows a, charger stops e, 31 s, look, secondary accepts, secondary accepts
    => secondary: Start Authorize|Stop:7; charger: 1:Accepted a:Accepted e|
An Authorize waits for its server, never by age, and goes with its connection.
    secondary leaves, charger shows 1, 100 s, secondary returns, charger shows 2, secondary leaves,
    secondary returns, 60 s => secondary: Authorize; charger: 1:Accepted 2:Accepted
A CallError is tried three times with growing delay; then the session is refused and kept.
    charger starts 1, charger stops e, secondary fails, 9 s, look, 2 s, secondary fails, 58 s, look, 3 s,
    secondary fails, 100 s => secondary: Start|Start|Start; refused: Start Stop; stored:
A CallError on a reading refuses it alone; it is tried again at the next start.
    charger starts 1, secondary accepts, charger reads m, secondary fails, charger stops e, secondary takes,
    look, proxy killed, secondary takes, proxy killed
    => secondary: Start Meter:7 Stop:7|Meter:7; refused: ; stored:
A start refused by its status without an id takes its session along, for good.
    charger starts 1, secondary refuses, charger stops e, proxy killed, proxy killed
    => secondary: Start; charger: 1:Accepted e; refused: Start Stop; stored:
A start that met CallErrors is tried once at every start of the proxy; accepted, the rest goes, too.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails, charger reads m, look,
    proxy killed, secondary fails, look, proxy killed, proxy killed, charger stops e, secondary takes,
    proxy killed => secondary: Start Start Start|Start|Start Start Meter:7 Stop:7;
    charger: 1:Accepted m||e; refused: ; stored:
A start and a stop that there is no room for are not answered, and change nothing until they come again.
    limit is MAX_STORED 0, charger starts 1, look, limit ends, charger starts 2, look, limit is MAX_STORED 0,
    charger stops e, look, limit ends, charger stops f, secondary takes
    => charger: |2:Accepted||f; secondary: |Start||Stop:7; sessions: 1; stored:
What is tried again comes before what has come since.
    charger starts 1, charger stops e, secondary fails, 11 s, secondary fails, 61 s, secondary fails,
    secondary leaves, charger starts 2 SECO2 2, proxy killed, secondary takes
    => secondary: Start Start Start Start Stop:7 Start; refused: ; stored:
A repeated stored start joins its session, after a kill, too.
    charger starts 1, charger starts 2, secondary accepts, proxy killed, charger starts 3
    => secondary: Start; charger: 1:Accepted 2:Accepted 3:Accepted; sessions: 1
A repeated stored stop is answered and not stored again, after a kill neither; readings are never repeats.
    charger starts 1, charger reads m, charger reads n, charger stops e, charger stops f, secondary takes,
    proxy killed, charger stops g
    => secondary: Start Meter:7 Meter:7 Stop:7; charger: 1:Accepted m n e f g; stored:
Everything waits until the secondary accepts the boot, which goes again after the interval that it names.
    all noted, secondary leaves, charger starts 1, secondary boots Pending 20, secondary returns, 17 s, look,
    secondary boots Rejected 0, 3 s, look, secondary boots Accepted 300, 65 s
    => secondary: Boot:M|Boot:M|Boot:M Start
So it is where they are too long; the other server's go on.
    limit is MAX_STORED_TEXT 200, secondary leaves, charger starts 1, charger stops e,
    charger starts 2 SECO1 2, charger starts 3 PRIM1 3, look, limit ends, proxy killed, secondary takes,
    charger starts 2 SECO1 2
    => primary: Start|; charger: 1:Accepted|2:Accepted; secondary: |Start Start; sessions: 3
A CallError is told in one line, a verdict too.
    charger starts 1, secondary fails, 11 s, secondary blocks, charger stops e, secondary takes
    => told StartTransaction got a CallError: 1; told answers StartTransaction with CallError: 0;
    told answers StartTransaction with status Blocked: 1
A Call beyond what may wait for a secondary is dropped, and has the proxy's answer all the same.
    limit is MAX_LIVE 2, secondary leaves, charger shows 1, charger shows 2, charger shows 3,
    secondary returns, secondary takes
    => charger: 1:Accepted 2:Accepted 3:Accepted; secondary: Authorize Authorize
What is in flight is not dropped for what comes: its answer may be on the way.
    charger starts 1, secondary accepts, limit is MAX_STORED 2, charger reads a n=0, charger reads b n=1,
    charger reads c n=2, charger reads d n=3, secondary takes => secondary: Start Meter:7/0 Meter:7/3
Of too much that is refused readings go before a start; what is left can be tried again as a session.
    limit is MAX_STORED 4, charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails,
    charger reads a n=0, charger reads b n=1, charger reads c n=2, charger reads d n=3, charger stops e, look,
    proxy killed, secondary takes
    => secondary: Start Start Start|Start Meter:7/2 Meter:7/3 Stop:7; file refused:
A verdict beside an id is words on the session: its server knows it, and the rest follows.
    charger starts 1, secondary blocks, charger stops e, secondary takes
    => secondary: Start Stop:7; file refused is_refused: status Blocked 0; refused:
A server that comes back after the week in which a session can be named still gets it, as the file shows.
    secondary leaves, charger starts 1, charger stops e, 8 days, secondary returns, secondary takes
    => sessions: 0; secondary: Start Stop:7; file delivered>ended: 1; stored:
A session whose start is too old to be tried again is not sent without it, though its stop is younger.
    charger starts 1, secondary fails, 11 s, secondary fails, 61 s, secondary fails, 1 days, charger stops e,
    29.5 days, proxy dies, secondary takes => secondary: Start Start Start; refused: Start Stop
An answer takes its own Call: the daily retry has put an older session in front of the one in flight.
    charger starts 1, charger stops e, secondary fails, 11 s, secondary fails, 61 s, secondary fails,
    charger starts 2 SECO2 2, look, proxy retries, secondary takes
    => secondary: Start Start Start Start|Start Stop:8; file badge server_id: SECO1 8|SECO2 7; stored:
Nor does what is tried again pass a Call on its way that is not answered in time: one stored Call at a time.
    charger starts 1, secondary accepts, charger reads m, secondary fails, charger stops e, 40 s,
    proxy retries, 5 s, look, secondary takes => secondary: Start Meter:7 Stop:7|Meter:7; stored:
A secondary that leaves a stored Call unanswered is left in peace for two minutes,
    charger starts 1, 119 s => closed:
and then disconnected.
    charger starts 1, 122 s => closed: secondary:1000
Heartbeats that the secondary never answers hold back no session, though it wants one each second.
    secondary boots Accepted 1, secondary leaves, secondary returns, secondary boots -, 600 s,
    charger starts 1, 15 s => secondary: Start
"""


@pytest.mark.parametrize(("steps", "heard"), plays_of(STORED))
def test_what_is_stored(play: Play, steps: str, heard: dict[str, str]) -> None:
    """The charger is answered by the proxy; its server gets everything, in order, once."""
    goes_as_told(play(), steps, heard)


test_what_is_stored_of_2_x = plays(
    """
Of either server; at the primary, events that came before anybody knew whose they are.

Stored Calls that the primary never answers push no relayed one out: only those have a bound.
    limit is MAX_LATE 3, charger tells 0 Started, charger tells 1, charger tells 2, charger tells 3,
    charger tells 4, charger tells 5, charger tells 6 Ended PRIM1, 430 s, look, charger beats h
    => charger: T0 T1 T2 T3 T4 T5|h; stored: Event Event Event Event Event Event
The link of another version gives way to a charger that starts a session, though more is left for it.
    secondary leaves, charger tells 0 Started SECO1, charger tells 1, charger tells 2 Ended, charger leaves,
    charger returns ocpp1.6, primary takes, 12 s, secondary comes, secondary boots Accepted 300, look,
    charger starts 1 SECO1, secondary takes, look, 5 s, secondary comes, secondary takes
    => secondary: Event:0||Start; stored: Event Event
Where the primary leaves one unanswered, the next ones go, but none of them before the disk has the last.
    charger tells 0 Started, charger tells 1, charger tells 2, charger tells 3 Ended PRIM1, 122 s,
    primary forgets, look, disk full, primary takes, 10 s, look, disk well, 2 s
    => primary: Event:0 Event:3 Event:1||Event:2
A transaction is told in the file by its samples, in their unit and multiplier.
    charger sends a TransactionEvent eventType=Started seqNo=0 timestamp=t0 evse={"id":1}
    transactionInfo={"transactionId":"T"} idToken={"idToken":"SECO1"}
    meterValue=[{"sampledValue":[{"value":1.25,"unitOfMeasure":{"unit":"kWh"}}]}], secondary accepts,
    charger sends b TransactionEvent eventType=Ended seqNo=1 timestamp=t1
    transactionInfo={"transactionId":"T","stoppedReason":"Local"}
    meterValue=[{"sampledValue":[{"value":2,"unitOfMeasure":{"unit":"Wh","multiplier":3}}]}],
    secondary accepts => file meter_start meter_stop started_at stopped_at reason: 1250.0 2000.0 t0 t1 Local;
    file transaction_id server_id connector ended>0 delivered>0: T T 1 1 1
""",
    versions=["ocpp2.0.1"],
)


test_a_relayed_start_that_the_charger_repeats = plays("""
The charger hears one answer; the primary gets it again only if it may not have it.

It joins the one in flight; one answer, by the newest message id.
    charger starts 1 PRIM1, charger starts 2 PRIM1, primary takes
    => primary: Start; charger: 2:Accepted; sessions: 1
It joins the one in the queue.
    charger beats h, charger starts 1 PRIM1, charger starts 2 PRIM1, primary takes
    => primary: Start; charger: h 2:Accepted; sessions: 1
It is answered again; the primary hears nothing new, after a kill neither.
    charger starts 1 PRIM1, primary accepts, charger starts 2 PRIM1, proxy killed, charger starts 3 PRIM1
    => primary: Start; charger: 1:Accepted 2:Accepted 3:Accepted; sessions: 1
It is new after the stop.
    charger starts 1 PRIM1, primary accepts, charger stops e, primary accepts, charger starts 2 PRIM1
    => primary: Start Stop:7 Start; charger: 1:Accepted e; sessions: 2
It is sent again if it was not answered in time, and the charger goes by the answer that it has heard.
    charger starts 1 PRIM1, 31 s, charger starts 2 PRIM1, primary accepts, primary accepts, charger stops e
    => primary: Start Start Stop:7; charger: 2:Accepted; sessions: 1
It is sent again if its connection was lost, or the proxy was killed before the answer.
    charger starts 1 PRIM1, primary leaves, primary returns, charger starts 2 PRIM1, proxy killed,
    charger starts 3 PRIM1, primary accepts => primary: Start Start Start; charger: 3:Accepted; sessions: 1
It is answered by a late answer, after a kill, too.
    charger starts 1 PRIM1, 31 s, primary accepts, charger starts 2 PRIM1, proxy killed,
    charger starts 3 PRIM1 => primary: Start; charger: 2:Accepted 3:Accepted; sessions: 1
A late answer answers it while it waits in the queue: the primary has the session.
    charger starts 1 PRIM1, charger shows a PRIM2, 31 s, charger starts 2 PRIM1, primary takes
    => primary: Start Authorize; charger: 2:Accepted a:Accepted; sessions: 1
It is sent again after a CallError, which is the charger's to deal with.
    charger starts 1 PRIM1, primary fails, charger starts 2 PRIM1, primary accepts
    => primary: Start Start; charger: 1:error 2:Accepted; sessions: 1; file refused:
It is tried again after a refusal: a charger with a stuck clock means a new attempt.
    charger starts 1 PRIM1, primary refuses, charger starts 2 PRIM1
    => primary: Start Start; charger: 1:Blocked; sessions: 2
A refusal of the repeat does not override the accepted start.
    charger starts 1 PRIM1, 31 s, charger starts 2 PRIM1, primary accepts, primary refuses
    => primary: Start Start; charger: 2:Accepted; sessions: 1
A start that the charger has stopped meanwhile is not answered by its repeat.
    charger starts 1 PRIM1, 31 s, charger stops e, charger starts 2 PRIM1, primary accepts, primary accepts
    => primary: Start Stop:-1 Start; charger: e; sessions: 2
What the primary has asked for is its own after a loss, a takeover and a kill, though the badge is not.
    primary claims SECO1, charger starts 1, primary leaves, primary returns, charger starts 2, look,
    charger returns, charger starts 3, look, proxy killed, charger starts 4
    => primary: Start Start|Start|Start; secondary: ||
What a server has against a start is kept.
    charger starts 1 PRIM1, primary fails => file refused: CallError InternalError
A stop is refused by a CallError alone: a badge that has expired meanwhile has been stopped all the same.
    charger starts 1 PRIM1, primary accepts, charger stops e 7 PRIM1, primary refuses
    => charger: 1:Accepted e:Blocked; file delivered>0 refused: 1
One that met a CallError is sent again, and one that was accepted is answered again.
    charger starts 1 PRIM1, primary accepts, charger stops e, primary fails, charger stops f, primary accepts,
    charger stops g
    => primary: Start Stop:7 Stop:7; charger: 1:Accepted e:error f g; file delivered>0 refused: 1
""")


@pytest.mark.parametrize("then", ["proxy killed", "secondary leaves, secondary returns"])
def test_a_stored_call_keeps_its_message_id_for_life(play: Play, then: str) -> None:
    """The server gets the same Call again on its next connection, after a kill, too."""
    script = Script(play()).plays("charger starts 1")
    (first,) = script.due["secondary"]
    assert script.plays(then).due["secondary"] == [first]
