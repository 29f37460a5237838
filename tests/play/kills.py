"""What plays with a state file share: kills, and restarts with another ini."""

from __future__ import annotations

from collections.abc import Callable

import ocpp_2w_proxy as p
from tests.play.plays import INI, Stage

SECONDARY = p.SERVERS[1]
NORMAL = INI.format(more="")
OTHER_SECONDARY = NORMAL.replace("ws://secondary.example", "ws://other.example")
OTHER_PRIMARY = NORMAL.replace("ws://primary.example", "ws://other.example")
LOCAL_PRIMARY = NORMAL.replace("ws://primary.example", "local")
LOCAL_SECONDARY = NORMAL.replace("ws://secondary.example", "local")
NO_SECONDARY = NORMAL.replace("secondary_server = ws://secondary.example", "unknown_rfid = reject")
LOGIN = INI.format(more="secondary_auth = forward")
FORWARD = "secondary_replies = forward"

Play = Callable[..., Stage]  # Begins a play with a state file; takes what Stage takes.


def save(stage: Stage) -> None:
    """Let half a second pass for the journal: all is on disk."""
    stage.journal.tick()
    stage.journal.settle()


def killed(stage: Stage, ini: str = "") -> None:
    """Kill the proxy once all is on disk, start it again, and let the others come back."""
    save(stage)
    stage.killed(ini)
    come_back(stage)


def come_back(stage: Stage) -> None:
    """Let charger and servers connect; everybody's boot is over after two seconds."""
    stage.charger_connects()
    if SECONDARY in stage.relay.outboxes:
        stage.secondary_connects(accepts=False)
        stage.passes(2.5)
        if stage.memory.boot:
            stage.answer_boot()


def reads(stage: Stage, transaction_id: object, message_id: str = "m", **more: object) -> None:
    payload = {"connectorId": 1, "transactionId": transaction_id, "meterValue": [], **more}
    stage.charger.calls(message_id, "MeterValues", **payload)


def stops(stage: Stage, transaction_id: object, message_id: str = "e", **more: object) -> None:
    payload = {"transactionId": transaction_id, "meterStop": 5, "timestamp": "t", **more}
    stage.charger.calls(message_id, "StopTransaction", **payload)


def waits(stage: Stage, seconds: float) -> None:
    """Let time pass for the relay and for the journal."""
    for _ in range(int(seconds * 2)):
        stage.passes(0.5)
        save(stage)
