"""What plays with a state file share: kills, restarts with another ini, disks that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ocpp_2w_proxy as p
from tests.play.plays import INI, Stage, StageTasks

PRIMARY, SECONDARY = p.Peer.PRIMARY, p.Peer.SECONDARY
NORMAL = INI.format(more="")
OTHER_SECONDARY = NORMAL.replace("ws://secondary.example", "ws://other.example")
OTHER_PRIMARY = NORMAL.replace("ws://primary.example", "ws://other.example")
LOCAL_PRIMARY = NORMAL.replace("ws://primary.example", "local")
NO_SECONDARY = NORMAL.replace("secondary_server = ws://secondary.example\n", "")
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


def forgotten(stage: Stage) -> None:
    """Let the proxy forget a Relay that is idle, and make it anew for a charger that comes."""
    relay = stage.relay
    assert relay.is_idle
    relay.memory.is_in_use = False
    stage.begin(relay.version)


def delivers_alone(stage: Stage) -> None:
    """Let the proxy, which has just started, deliver what is left without waiting for the charger."""
    with patch.object(p, "Tasks", StageTasks), patch.object(p, "current_instant", stage.now):
        proxy = p.Proxy(stage.config, stage.journal)
        proxy._deliver()
    stage.relay = proxy.relays["CP1"]
    stage.version = stage.relay.version


def reads(stage: Stage, transaction_id: object, message_id: str = "m", **more: object) -> None:
    payload = {"connectorId": 1, "transactionId": transaction_id, "meterValue": [], **more}
    stage.charger.calls(message_id, "MeterValues", **payload)


def stops(stage: Stage, transaction_id: object, message_id: str = "e", **more: object) -> None:
    payload = {"transactionId": transaction_id, "meterStop": 5, "timestamp": "t", **more}
    stage.charger.calls(message_id, "StopTransaction", **payload)


def event(stage: Stage, number: int, kind: str = "Updated", badge: str = "", name: str = "T") -> list[Any]:
    """Let the charger send a TransactionEvent; return what it hears."""
    payload: dict[str, Any] = {"eventType": kind, "seqNo": number, "transactionInfo": {"transactionId": name}}
    if badge:
        payload["idToken"] = {"idToken": badge, "type": "ISO14443"}
    stage.charger.calls(f"{name}{number}", "TransactionEvent", **payload)
    return stage.charger.hears()


def named(heard: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, Any]]:
    """Return the Actions of what was delivered, each with the transaction that it names."""
    return [(action, payload.get("transactionId")) for action, payload in heard]


def told_id(stage: Stage) -> Any:
    return stage.charger.hears()[-1][2]["transactionId"]


def left(stage: Stage, peer: p.Peer = SECONDARY) -> list[str]:
    """Return the Actions of what is stored for a server."""
    return [call.action for call in stage.waiting(peer)]


def refused(stage: Stage) -> list[tuple[str, str]]:
    return [(call.action, call.refused) for call in stage.memory.refused]


@contextmanager
def full_disk(stage: Stage) -> Iterator[None]:
    """Let every save fail."""
    with patch.object(stage.journal, "_write", lambda _: "database or disk is full"):
        yield


@contextmanager
def slow_disk(stage: Stage) -> Iterator[Callable[[], None]]:
    """Let saves hang; what is yielded lets the one that hangs succeed."""
    jobs: list[Any] = []
    run = stage.journal._run

    def finish() -> None:
        run(*jobs.pop(0))

    with patch.object(stage.journal, "_run", lambda *job: jobs.append(job)):
        yield finish


def waits(stage: Stage, seconds: float) -> None:
    """Let time pass for the relay and for the journal."""
    for _ in range(int(seconds * 2)):
        stage.passes(0.5)
        save(stage)
