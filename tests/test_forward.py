"""With secondary_replies = forward: the secondary answers, and the proxy in its place where it does not."""

from __future__ import annotations

from tests.play.kills import FORWARD, SECONDARY, Play
from tests.play.plays import Stage
from tests.play.script import goes_as_told, plays

FORWARDING = f"{FORWARD}\nunknown_rfid = secondary"


test_what_is_forwarded = plays(
    """
The secondary answers; the proxy stands in for it where it is away, silent, or behind.

A start that the secondary cannot answer is answered by the proxy: the driver charges.
    charger starts 1, secondary fails => charger: 1:Accepted
A session goes on under the secondary's own id, and with its verdicts, after a kill, too.
    charger starts 1, secondary accepts, proxy killed, charger reads m, look, secondary accepts,
    charger stops e, look, secondary accepts => secondary: Start Meter:7|Stop:7|; charger: 1:Accepted|m|e
A secondary that has just gone is waited for, for five seconds.
    secondary leaves, charger starts 1, 2 s, look, secondary returns, look, secondary takes
    => secondary: |Start|; charger: ||1:Accepted
A secondary that loses its connection with the Call in flight gets it again.
    5 s, charger starts 1, secondary leaves, secondary returns, look, secondary takes
    => secondary: Start Start|; charger: |1:Accepted
So it does with one that is not stored.
    5 s, charger shows 1 STRANGER, secondary leaves, secondary returns, look, secondary takes
    => secondary: Authorize Authorize|; charger: |1:Accepted
After five seconds the proxy answers; behind what it has stored it answers at once: the order is kept.
    secondary leaves, charger starts 1, 4 s, look, 2 s, look, charger stops e, secondary returns,
    charger reads m, secondary takes => secondary: ||Start Stop:7 Meter:7; charger: |1:Accepted|e m; stored:
A secondary that has been away for long is not waited for at every redial.
    secondary leaves, 20 s, charger starts 1 => charger: 1:Accepted
What the proxy has answered in its place is delivered after a kill; then the secondary answers itself again.
    secondary leaves, charger starts 1, 6 s, proxy killed, secondary takes, charger stops e, look,
    secondary takes => secondary: Start Stop:7|; charger: 1:Accepted|e
After ten silent seconds the proxy answers, then at once, until the secondary answers something, however late.
    charger starts 1, 9 s, look, 2 s, look, charger reads m, look, secondary accepts, secondary accepts,
    charger reads n, look, secondary takes => secondary: Start|||Meter:7 Meter:7|; charger: |1:Accepted|m||n
A repeat of a start that the proxy has answered joins it: an Invalid of the proxy is no verdict.
    secondary leaves, 6 s, charger starts 1 STRANGER, secondary returns, secondary takes,
    charger starts 2 STRANGER => secondary: Start; charger: 1:Invalid 2:Invalid; sessions: 1
A charger that connects again joins the start in flight; the secondary's connection outlives its own.
    charger starts 1, charger returns, charger starts 2, secondary accepts
    => secondary: Start; charger: 2:Accepted; sessions: 1
A start whose charger has gone is stored, and delivered; its repeat hears the verdict.
    charger starts 1 STRANGER, charger leaves, 11 s, secondary accepts, charger returns,
    charger starts 2 STRANGER => secondary: Start; charger: 2:Accepted; sessions: 1
While the secondary stays silent, the proxy answers the repeat: Invalid for a badge that nothing speaks for.
    charger starts 1 STRANGER, charger leaves, 11 s, charger returns, charger starts 2 STRANGER
    => charger: 2:Invalid; stored: Start; sessions: 1
The list speaks for its badges, however often the start is sent, after a kill, too.
    charger starts 1, charger leaves, secondary leaves, charger returns, 6 s, charger starts 2, proxy killed,
    secondary leaves, 6 s, charger starts 3 => charger: 2:Accepted 3:Accepted; sessions: 1
A stop whose charger has gone is stored once; its repeat is answered again.
    charger starts 1, secondary accepts, charger stops e, charger leaves, 11 s, charger returns,
    charger stops f => charger: 1:Accepted f; stored: Stop
A stop and its repeat are stored once, and answered once.
    charger starts 1, secondary accepts, charger stops e, 5 s, charger stops f, 11 s
    => charger: 1:Accepted f; stored: Stop
A stop that is repeated on the next connection waits for the disk as well.
    charger starts 1, secondary accepts, disk full, charger stops e, charger returns, charger stops f, 11 s,
    look, disk well, 2 s => charger: 1:Accepted|f; stored: Stop
A start that takes no connector, and was not answered, survives a kill.
    charger starts 1 SECO1 0, proxy killed, charger stops e, secondary takes => secondary: Start Start Stop:7
A start that there is no room for is not answered in the secondary's place, until it comes again.
    secondary leaves, 6 s, limit is MAX_STORED 0, charger starts 1, look, limit ends, charger starts 2
    => charger: |2:Accepted; stored: Start; sessions: 1
An Authorize whose charger has gone is forgotten.
    charger shows 1, charger leaves, 11 s => stored:
It stands in with Invalid for a badge that nothing speaks for; not even if the other server has accepted it.
    primary claims GUEST, charger starts 1 GUEST, primary accepts, secondary leaves, 6 s, charger shows 2,
    charger shows 3 STRANGER, charger shows 4 GUEST => charger: 1:Accepted 2:Accepted 3:Invalid 4:Invalid
An answer to the connection before is not forwarded: the charger that has come again has asked nothing yet.
    charger shows 1, charger returns, secondary accepts => charger:
A secondary that has a charger's new boot to answer is waited for: it is not away.
    20 s, secondary boots -, charger boots, charger shows 1 STRANGER, 4 s => charger: ; secondary:
The id that a repeat was told stays when the secondary names another later: the charger's stop has it.
    proxy with secondary_replies=forward secondary_auth=forward, charger starts 1, charger leaves, 1 s,
    proxy forgets, charger returns, 6 s, charger starts 2, secondary returns, secondary accepts,
    charger stops e, secondary takes
    => secondary: Start Start Stop:7; charger: 2:Accepted e; sessions: 1; refused:
What the charger asks on its next connection is not answered because an older Call is answered just now.
    charger starts 1 STRANGER, charger returns, charger starts 2 STRANGER 1 5, secondary accepts, look,
    secondary accepts => charger: |2:Accepted
The verdict of the secondary is the charger's answer, of each of two connectors its own.
    charger starts 1 SECO1 1, charger starts 2 SECO2 2, secondary accepts, look, secondary blocks
    => charger: 1:Accepted|2:Blocked
A secondary that was lost with a Call is not silent once it is back.
    charger shows 1 STRANGER, 5 s, secondary leaves, charger leaves, charger returns, secondary returns, 2 s,
    charger shows 2 STRANGER, 1 s, secondary accepts => charger: 2:Accepted
It is answered within the call timeout; the secondary gets the start once, and the stop under its own id.
    proxy with secondary_replies=forward [host] call_timeout=1, charger starts 1, look, 2 s, charger stops e,
    look, 30 s, secondary takes => charger: |1:Accepted e|; secondary: Start||Stop:7
""",
    more=FORWARDING,
)


test_what_is_forwarded_of_2_x = plays(
    """
The secondary answers; the proxy stands in for it where it is away, silent, or behind.

Kept events are handed over before the settling one is relayed; they are no older stored Calls.
    charger tells 0 Started, charger tells 1 Updated SECO1, secondary accepts, look, secondary refuses
    => secondary: Event:0 Event:1|; charger: T0|T1:Blocked
While a kept one waits to be tried again, the settling one is answered by the proxy, and again if repeated.
    charger tells 0 Started, charger tells 1, charger tells 2 Updated SECO1, secondary fails, look, 11 s,
    charger tells 2 Updated SECO1
    => secondary: Event:0|Event:0; charger: T0 T1|T2:Accepted T2:Accepted; stored: Event Event Event
What the proxy stands in for keeps its order over a kill, also where one is given up behind another.
    charger tells 0 Started SECO1, secondary accepts, charger tells 1, 1 s, charger tells 2, 60 s, look,
    proxy killed, secondary takes => secondary: Event:0 Event:1|Event:1 Event:2; charger: T0:Accepted T1 T2|
A relayed transaction has its owner over a kill, although its first events were kept.
    charger tells 0 Started, charger tells 1 Updated SECO1, look, proxy killed, secondary takes,
    charger tells 2 => secondary: Event:0|Event:0 Event:1 Event:2; primary: |; sessions: 1
The badge of a transaction is vouched for to its end by the remote start of its owner.
    secondary asks RequestStartTransaction idToken={"idToken":"STRANGE"} remoteStartId=1,
    charger tells 0 Started STRANGE, secondary accepts, proxy killed, secondary leaves, 6 s,
    charger tells 1 Ended STRANGE => charger: T0:Accepted T1:Accepted; secondary: Event:0
Events without a number are no repeats of each other, also where the proxy stands in; `true` is no number.
    charger tells 0 Started SECO1, secondary takes, secondary leaves, 6 s,
    charger sends a TransactionEvent eventType=Updated transactionInfo={"transactionId":"T"} timestamp=t,
    charger sends b TransactionEvent eventType=Updated transactionInfo={"transactionId":"T"} timestamp=t,
    charger sends c TransactionEvent eventType=Updated transactionInfo={"transactionId":"T"} seqNo=1,
    charger sends d TransactionEvent eventType=Updated transactionInfo={"transactionId":"T"} seqNo=true
    => stored: Event Event Event Event
""",
    more=FORWARDING,
    versions=["ocpp2.0.1"],
)


def test_forward_waits_for_the_first_connection(play: Play) -> None:
    """Five seconds for a charger that has just come."""
    steps = "charger returns, charger starts 1, 4 s, look, 2 s"
    goes_as_told(play(FORWARDING, connect=False), steps, {"charger": "|1:Accepted"})


def test_forward_keeps_the_order_in_what_it_stores() -> None:
    """A Call that has waited longer is stored before one that comes now."""
    stage = Stage(FORWARDING)
    stage.secondary.lost()
    stage.starts("SECO1", "1", connector=1)
    stage.time += 5.4
    stage.starts("SECO2", "2", connector=2)
    badges = [call.content.payload["idTag"] for call in stage.waiting(SECONDARY)]
    assert badges == ["SECO1", "SECO2"]
