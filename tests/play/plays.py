"""A stage for plays: a charger and its two servers around a Relay, without sockets; time passes when told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import ocpp_2w_proxy as p

INI = """\
[ext-server]
server = ws://primary.example
secondary_server = ws://secondary.example
primary_rfid = PRIM*
secondary_rfid = SECO*
{more}
"""


def config_of(text: str, environment: dict[str, str] | None = None) -> p.Config:
    return p.Ini(Path("test.ini"), environment or {}, p.concern_of).load(text)


class StageLink:
    """Stands in for a Link: notes what it is sent, and says what the play lets it say."""

    def __init__(self, stage: Stage, name: str, subprotocol: str) -> None:
        self.stage = stage
        self.name = name
        self.protocol = self
        self.subprotocol = subprotocol
        self.texts: list[str] = []
        self.on_text: Any = None
        self.on_closed: Any = None
        self.is_open = True
        self.closed_with: tuple[int, str] | None = None
        self.opened = self.seen = stage.time
        self.ping_at = 0.0
        self.pings = 0
        self.has_ponged = True
        self.is_closed = False
        self.closed_by = "the play"

    def attach(self, on_text: Any, on_closed: Any) -> None:
        self.on_text, self.on_closed = on_text, on_closed

    def send(self, text: str) -> None:
        if self.is_open:
            self.texts.append(text)

    def keep_alive(self, now: float, interval: float) -> None:
        if now >= self.ping_at:
            self.ping_at = now + interval
            self.pings += 1

    def close(self, code: int, reason: str = "") -> None:
        if self.is_open:
            self.is_open, self.closed_with = False, (code, reason)

    def abort(self, _because: str = "") -> None:
        self.close(1006)

    # What the play does with it.

    def says(self, text: str) -> None:
        self.seen = self.stage.time
        self.on_text(self, text)

    def calls(self, message_id: p.MessageId, action: str, **payload: Any) -> None:
        self.says(json.dumps([2, message_id, action, payload]))

    def answers(self, message_id: p.MessageId, **payload: Any) -> None:
        self.says(json.dumps([3, message_id, payload]))

    def errs(self, message_id: p.MessageId, code: str = "InternalError") -> None:
        self.says(json.dumps([4, message_id, code, "", {}]))

    def hears_texts(self) -> list[str]:
        """Return what the peer was sent since the last look."""
        self.stage.journal.settle()
        texts, self.texts = self.texts, []
        return texts

    def hears(self) -> list[Any]:
        return [json.loads(text) for text in self.hears_texts()]

    def hears_text(self) -> str:
        """Return the one text that the peer was sent since the last look."""
        (text,) = self.hears_texts()
        return text

    def hears_call(self) -> tuple[str, str, dict[str, Any]]:
        ((number, message_id, action, payload),) = self.hears()
        assert number == 2
        return message_id, action, payload

    def lost(self) -> None:
        self.is_open, self.is_closed = False, True
        self.on_closed(self)


class StageJournal(p.Journal):
    """Saves at once, in this thread, whenever somebody looks."""

    def wait(self, then: Callable[[], None]) -> None:
        self.waiters[then] = None  # Whoever looks lets it happen.

    def _run(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        then(job())

    def settle(self) -> None:
        """Save until nobody waits for it any more."""
        while self.waiters and not (self.failure or self.writing):
            self.save()


class Stage:
    """One charger with a primary and, unless the ini says otherwise, a secondary."""

    def __init__(
        self,
        more: str = "",
        version: str = "ocpp1.6",
        ini: str = INI,
        connect: bool = True,
        state: Path | None = None,
    ) -> None:
        self.time = 1000.0
        self.utc = 1_800_000_000.0
        self.dialled: list[str] = []
        self.version = version
        self.config = config_of(ini.format(more=more))
        self.state = state  # Of the state file; None = in memory only.
        self.open()
        if connect:
            self.charger_connects()
            if "secondary" in self.relay.outboxes:
                self.secondary_connects()

    def open(self) -> None:
        """Start the proxy, with what its state file holds."""
        self.journal = StageJournal.open(self.state, self.now) if self.state else StageJournal(self.now)
        self.begin(self.journal.memory("CP1").version or self.version)
        self.charger = self.primary = self.secondary = StageLink(self, "nobody", self.version)

    def begin(self, version: str) -> None:
        """Let the proxy make its Relay for the charger."""
        dialer: Any = SimpleNamespace(begin=self.dials)
        self.relay = p.Relay("CP1", self.config, version, dialer, self.journal)

    def dials(self, work: Any, name: str) -> None:
        """Note a dial that is asked for; the play itself connects the servers."""
        work.close()
        self.dialled.append(name)

    def killed(self, ini: str = "") -> None:
        """Kill the proxy, edit its ini, and start it again; nobody is connected any more."""
        self.journal.database.close()
        if ini:
            self.config = config_of(ini)
        self.open()
        self.memory.retry(self.now().utc)

    def now(self) -> p.Instant:
        return p.Instant(self.time, self.utc + self.time)

    @property
    def memory(self) -> p.Memory:
        return self.relay.memory

    def waiting(self, peer: p.Peer | None) -> list[p.Call]:
        return [call for call in self.memory.stored if call.peer == peer]

    def outbox(self, peer: p.Peer) -> p.Outbox:
        return self.relay.outboxes[peer]

    def charger_connects(self, version: str = "") -> None:
        version = version or self.version
        primary: Any = None
        charger: Any = StageLink(self, "charger", version)
        if "primary" in self.relay.outboxes:
            primary = self.primary = StageLink(self, "primary", version)
        self.charger = charger
        self.relay.connect(charger, primary, version, {})

    def secondary_connects(self, accepts: bool = True) -> None:
        self.secondary = self.connects("secondary")
        if not accepts:
            return
        self.charger.calls("boot", "BootNotification", chargePointVendor="V", chargePointModel="M")
        if "primary" in self.relay.outboxes:
            self.primary.answers("boot", status="Accepted", currentTime="2026-01-01T00:00:00Z", interval=300)
            self.primary.hears()
        self.answer_boot()
        self.charger.hears()

    def cannot_dial(self, peer: p.Peer, error: p.DialError) -> None:
        dialer: Any = self.relay.dialer
        dialer.dial = AsyncMock(side_effect=error)
        asyncio.run(self.outbox(peer)._dial())

    def connects(self, peer: p.Peer) -> StageLink:
        outbox = self.outbox(peer)
        link: Any = StageLink(self, peer, outbox.version)
        outbox.dialing = None
        needs_boot = peer == "secondary" or bool(self.memory.boot)
        outbox.connected(link, needs_boot=needs_boot)
        stage_link: StageLink = link
        return stage_link

    def answer_boot(self, status: str = "Accepted", interval: int = 300) -> dict[str, Any]:
        """Let the secondary answer the BootNotification that it is sent; return its payload."""
        message_id, action, payload = self.secondary.hears_call()
        assert action == "BootNotification"
        self.secondary.answers(message_id, status=status, currentTime="x", interval=interval)
        return payload

    def passes(self, seconds: float) -> None:
        """Let time pass, with the watchdog looking every half second at what is due."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(self.time + 0.5, end)
            for link in self.relay.links():
                if not link.is_open:
                    link.on_closed(link)  # type: ignore[misc]
            self.journal.settle()
            if self.relay.deadline <= self.time:
                self.relay.tick()
            self.journal.settle()

    def starts(self, badge: str, message_id: str = "s1", connector: int = 1, meter: int = 0) -> None:
        told: dict[str, Any] = {"connectorId": connector, "idTag": badge, "meterStart": meter}
        self.charger.calls(message_id, "StartTransaction", **told, timestamp="2026-01-01T00:00:00Z")

    def primary_session(self, server_id: int = 7, badge: str = "PRIM1", connector: int = 1) -> Any:
        return self.session(self.primary, server_id, badge, connector)

    def secondary_session(self, server_id: int = 7, badge: str = "SECO1", connector: int = 1) -> Any:
        return self.session(self.secondary, server_id, badge, connector)

    def session(self, server: StageLink, server_id: int, badge: str, connector: int) -> Any:
        """Let the charger start a session of a server; return the transaction id that it hears."""
        self.starts(badge, "start", connector)
        heard = self.charger.hears()
        message_id, action, _ = server.hears_call()
        assert action == "StartTransaction"
        server.answers(message_id, transactionId=server_id, idTagInfo={"status": "Accepted"})
        return (self.charger.hears() + heard)[-1][2]["transactionId"]

    def asks(self, name: str, action: str, status: str = "Accepted", **payload: Any) -> dict[str, Any]:
        """Let a server call the charger, and the charger answer; return the payload that it heard."""
        link: StageLink = getattr(self, name)
        link.calls(action, action, **payload)
        ((_, message_id, _, heard),) = [message for message in self.charger.hears() if message[0] == 2]
        self.charger.answers(message_id, status=status)
        link.hears()
        return dict(heard)
