"""Rules 2 to 5: answers go to whoever asked, once; the charger has one Call at a time to answer."""

from __future__ import annotations

import pytest

from tests.play.plays import Stage
from tests.play.script import plays

REJECTED = {"status": "Rejected"}

# Rules 4 and 5: Calls of the servers.


test_one_call_at_a_time = plays("""
The charger has one Call to answer, and each answer goes to whoever asked.

One Call at a time is outstanding at the primary; equal ones that are sent ahead are passed on in order.
    charger shows 1 PRIM1, charger shows 2 PRIM1, charger shows 3 PRIM1, look, primary accepts, look, 31 s,
    primary accepts, primary accepts
    => primary: Authorize|Authorize|Authorize; charger: |1:Accepted|3:Accepted
The servers take turns: one with many Calls does not keep the other waiting for all of them.
    primary calls 1 A, primary calls 2 B, primary calls 3 C, secondary calls 1 X, secondary calls 2 Y,
    charger answers A, charger answers X, charger answers B, charger answers Y, charger answers C
    => charger: A X B Y C; primary: 1 2 3; secondary: 1 2
A Call that the charger leaves unanswered is answered to its server; `call_timeout` counts from sending.
    primary calls 1 ClearCache, 20 s, secondary calls 2 Reset, look, 11 s, look, 28 s, look, 2 s
    => charger: ClearCache|Reset||; primary: |1:error||; secondary: |||2:error
A late answer is not taken for another Call's, even if the other server picks its id.
    primary calls 1 ClearCache, 31 s, secondary calls 1 Reset, look, charger answers ClearCache, look,
    charger answers Reset => charger: ClearCache Reset||; primary: 1:error||; secondary: ||1
A Call that waits unsent is given up after twice `call_timeout`, with no other event.
    7 s, primary calls a A, primary calls b B, primary calls c C, primary calls d D, 20 s, charger answers A,
    39 s, look, 1 s => primary: a b:error|d:error; charger: A B C|
Calls of a server that is gone are forgotten; the one at the charger keeps its place until it is answered,
    secondary calls 1 ClearCache, secondary calls 2 Reset, secondary leaves, secondary returns,
    primary calls 3 GetLog, look, charger answers ClearCache, charger answers GetLog
    => charger: ClearCache|GetLog; primary: |3; secondary: |
or too old.
    secondary calls 1 ClearCache, secondary calls 2 Reset, secondary leaves, primary calls 3 GetLog, look,
    31 s => charger: ClearCache|GetLog; primary: |; secondary: |
On a connection that only delivers, there is nobody to ask.
    charger starts 1, charger leaves, secondary calls 1 ClearCache
    => secondary: Start 1:error; charger: 1:Accepted
Beyond the bound for each server a Call is answered at once.
    limit is MAX_FEW 1, primary calls 1 A, primary calls 2 B, primary calls 3 C, secondary calls 4 D
    => charger: A; primary: 3:error; secondary:
A command is told: who resets the charger, or starts it remotely, belongs into the story of the day.
    secondary calls 1 Reset, charger answers Reset Rejected, primary calls 2 RemoteStartTransaction,
    charger fails RemoteStartTransaction => told CP1: secondary asked for Reset: Rejected: 1;
    told CP1: primary asked for RemoteStartTransaction: InternalError: 1
So is a verdict against a badge, of the primary, which the charger hears, and of the secondary.
    charger shows 1 PRIM1234567, primary refuses, charger shows 2 SECO1234567, secondary refuses
    => charger: 1:Blocked 2:Accepted; told CP1: primary answers Authorize with status Blocked: 1;
    told CP1: secondary answers Authorize with status Blocked: 1; told SECO1234567: 0
An answer is passed on once.
    primary calls 1 ClearCache, charger answers ClearCache, charger answers ClearCache => primary: 1
`call_timeout` runs from a Call's sending, though nothing else is due, whenever the next Ping is.
    proxy with [host] ping_interval=3600, 40 s, primary calls a A, primary calls b B, 7 s, charger answers a,
    29 s, look, 2 s => primary: a|b:error
What is on `secondary_refuse` is Rejected, or a CallError by its schema; the primary may do what it likes.
    proxy with secondary_refuse=Reset,SendLocalList,SetVariables, secondary calls x Reset,
    secondary calls y SendLocalList, secondary calls z SetVariables, primary calls 1 Reset
    => secondary: x:Rejected y:error z:error; charger: Reset
A server that is connected in another version, to take what is left of it, cannot reach the charger.
    secondary leaves, charger starts 1, charger stops e, charger returns ocpp2.0.1, 2 s, secondary comes,
    look, secondary calls r Reset => charger: 1:Accepted e|; secondary: Start|r:error
""")


# Who may name whose transaction.


@pytest.mark.parametrize(
    "text",
    [
        '[2,"x","RemoteStopTransaction",{"transactionId" : %d}]',
        '[2,"x","SetChargingProfile",{"csChargingProfiles":{"chargingProfileId":7,"transactionId":%d}}]',
    ],
)
def test_a_server_names_its_own_session_by_its_own_id(text: str) -> None:
    """The id is translated on the way down, and nothing else; the primary cannot name it at all."""
    stage = Stage()
    number = stage.secondary_session(server_id=7)
    stage.secondary.says(text % 7)
    assert stage.charger.hears_text() == text % number
    stage.primary.says(text % number)
    assert stage.primary.hears() == [[3, "x", REJECTED]]


def test_the_proxy_answers_a_vat_number_with_itself() -> None:
    """The one answer that repeats a field of its Call."""
    stage = Stage(ini="[ext-server]\nserver = local\n{more}", version="ocpp2.1")
    stage.charger.calls("1", "VatNumberValidation", vatNumber="DE1")
    assert stage.charger.hears() == [[3, "1", {"vatNumber": "DE1", "status": "Rejected"}]]
