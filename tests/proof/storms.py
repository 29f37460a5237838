"""
A storm: one charger and its two servers that say anything at all, and what must hold all the same.
A door: a proxy that is knocked at with anything at all.

Nothing raises; a Call gets at most one answer, from the proxy or its owner; what the secondary answers never
reaches the charger; what the primary hears has been said so, but for ids; every table keeps its bound.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeCharger, charger, house
from tests.play.plays import Stage, StageLink
from tests.play.wires import visitor

SERVERS = ("primary", "secondary")
PEERS = ("charger", *SERVERS)
IDS = {"transactionId", "requestId", "remoteStartId"}  # What the proxy may translate.
ANSWERS = (p.MessageType.CALLRESULT, p.MessageType.CALLERROR)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+|\S', re.DOTALL)
# Stands where something else was expected: badges of both lists, ids that are taken, not usable, the proxy's.
ODD = [
    *("", "null", "true", "[]", "{}", '""', "0", "-1", "1", "7", "7.0", "2147483647", "2147483648", "1e400"),
    *("2000000001", '"PRIM1"', '"SECO1"', '"\\ud800"', '"\x00"', '"{id}"', '"{transaction}"'),
    "{transaction}",
    *("NaN", ",", "[", "]", "}", ":", "2", "3", "4", "5", "6", '"i"', '"idTag"', '"transactionId"', "9" * 30),
    *('"Started"', '"Ended"', '"Charging"', '"Available"', '"Rejected"', '"Accepted"', '"NoAuthorization"'),
]


def put(payload: dict[str, Any], path: p.FieldPath, value: Any) -> None:
    """Put a value into a payload, at a path of the vocabulary."""
    place: Any = payload
    for step, following in zip(path, (*path[1:], ""), strict=False):
        inner: Any = [] if following == "*" else {} if following else value
        if step == "*":
            place[:] = place or [inner]
            place = place[0]
        else:
            place = place.setdefault(step, inner)


def template(action: str, facts: p.Facts, badge: str, version: str) -> str:
    """Return a Call of this Action with all that the vocabulary knows of it."""
    payload: dict[str, Any] = {"timestamp": "2026-01-01T00:00:00Z"}
    if facts.role is p.Role.EVENT:
        payload.update(eventType="Started", seqNo=0)
    values = {"badge": badge, "badge_type": "ISO14443", "transaction": "{transaction}", "connector": 1}
    values |= {"request": 5, "reservation": 6, "remote_start": 8, "state": "Charging", "meter": 1000}
    for name, value in {**values, "reason": "Local"}.items():
        put(payload, getattr(facts, name), value)
    text = p.call_text("i", action, p.dump(payload))
    return text.replace('"{transaction}"', "{transaction}") if version == "ocpp1.6" else text


ANSWER: dict[str, Any] = {"status": "Accepted", "currentTime": "x", "interval": 300, "transactionId": 7}
ANSWER |= {name: {"status": "Accepted"} for name in ("idTagInfo", "idTokenInfo")}


def templates(version: str) -> list[tuple[str, str]]:
    """Return senders and texts of everything that an OCPP version knows."""
    words = p.VOCABULARIES[version]
    calls = [
        (sender, template(action, facts, badge, version))
        for senders, table in ((("charger",), words.charger), (SERVERS, words.server))
        for action, facts in table.items()
        for sender in senders
        for badge in ("PRIM1", "SECO1")[: 1 + bool(facts.badge)]
    ]
    error = p.error_text("{id}", "InternalError", "")
    answers = [p.result_text("{id}", p.dump(ANSWER)), p.result_text("{id}", "{}"), error]
    answers.append(error.replace("4", "5", 1))
    return calls + [(sender, text) for text in answers for sender in PEERS]


def edited(text: str, edits: list[tuple[int, str]]) -> str:
    """Return the text with some of its tokens replaced."""
    tokens = TOKEN.findall(text)
    for place, odd in edits:
        tokens[place % len(tokens)] = odd
    return "".join(tokens)


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ids(inner) for key, inner in value.items() if key not in IDS}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


class Storm:
    """Lets the peers of a Stage say what they like, and checks what the others hear."""

    def __init__(self, version: str, more: str = "", state: Path | None = None) -> None:
        self.stage = Stage(more, version=version, state=state)
        self.is_ignoring = not more
        self.said: dict[tuple[str, str], list[p.Message]] = {}  # Calls, by sender and message id.
        self.unreadable: Counter[tuple[str, str]] = Counter()  # Calls, likewise.
        self.answered: Counter[tuple[str, str]] = Counter()
        self.listen("charger")

    def link(self, peer: str) -> StageLink:
        return getattr(self.stage, peer)  # type: ignore[no-any-return]

    def pending_id(self, peer: str) -> str:
        """Return the message id of a Call that this peer may answer."""
        relay = self.stage.relay
        if peer == "charger":
            return str(relay.commands.outstanding.wire_id) if relay.commands.outstanding else "nobody"
        call = self.stage.outbox(p.Peer(peer)).in_flight
        return str(call.message_id) if call else "nobody"

    def says(self, peer: str, text: str) -> None:
        """Let a peer say something, with the ids that are of interest now, and check what follows."""
        sessions = self.stage.memory.sessions.values()
        newest = next((s.transaction_id for s in reversed(sessions) if s.transaction_id is not None), 7)
        text = text.replace("{id}", self.pending_id(peer)).replace("{transaction}", str(newest))
        if text.strip():
            self.note(peer, text)
            self.link(peer).says(text)
            self.settle(peer)

    def note(self, peer: str, text: str) -> None:
        try:
            message = p.parse(text)
        except p.MessageError as error:
            if error.message_id is not None:
                self.unreadable[peer, str(error.message_id)] += 1
            return
        if message.type in (p.MessageType.CALL, p.MessageType.SEND):
            self.said.setdefault((peer, str(message.message_id)), []).append(message)

    def passes(self, seconds: float) -> None:
        self.stage.time += seconds
        self.stage.relay.tick()
        self.settle("nobody")

    def restart(self) -> None:
        stage = self.stage
        stage.journal.save()
        assert not stage.journal.failure
        # A relayed start that nobody has answered yet is known in memory alone; its repeat begins it anew.
        known = [key for key, s in stage.memory.sessions.items() if s.transaction_id is not None]
        stage.killed()
        assert set(known) <= stage.memory.sessions.keys()
        stage.journal.database.close()

    def settle(self, speaker: str) -> None:
        """Let everybody hear what there is, and come back who has gone."""
        self.stage.journal.settle()
        for peer in PEERS:
            self.listen(peer, speaker)
        for link in list(self.stage.relay.links()):
            if not link.is_open:
                link.on_closed(link)  # type: ignore[misc]
        if not self.stage.charger.is_open:
            self.stage.charger_connects()
        for peer in SERVERS:
            if not self.link(peer).is_open:
                setattr(self.stage, peer, self.stage.connects(p.Peer(peer)))
        self.check_tables()

    def listen(self, peer: str, speaker: str = "nobody") -> None:
        for text in self.link(peer).hears_texts():
            message = p.parse(text)
            if message.type in ANSWERS:
                self.check_answer(peer, message, speaker)
            elif peer == "primary" and message.type is p.MessageType.CALL:
                self.check_forwarded(message)

    def check_answer(self, peer: str, message: p.Message, speaker: str) -> None:
        """An answer has been asked for, is the only one, and is none of the secondary's."""
        key = peer, str(message.message_id)
        self.answered[key] += 1
        asked = len(self.said.get(key, ())) + self.unreadable[key]
        assert self.answered[key] <= asked, f"{peer} hears {message.text}, an answer too many"
        if self.is_ignoring and peer == "charger" and speaker == "secondary":
            raise AssertionError(f"the secondary's answer reaches the charger: {message.text}")

    def check_forwarded(self, message: p.Message) -> None:
        """A Call of the charger's is what the charger has said; others are the proxy's own."""
        said = self.said.get(("charger", str(message.message_id)))
        if said is None:
            is_own = message.action in ("BootNotification", "StatusNotification", "Heartbeat")
            assert is_own or len(str(message.message_id)) == 36, f"nobody said {message.text}"
        elif all(message.text != original.text for original in said):
            meant = [(original.action, without_ids(original.payload)) for original in said]
            assert (message.action, without_ids(message.payload)) in meant, f"nobody said {message.text}"

    def check_tables(self) -> None:
        """Nothing grows without end."""
        memory, commands = self.stage.memory, self.stage.relay.commands
        for name in ("sessions", "stored", "refused"):
            assert len(getattr(memory, name)) <= getattr(p, f"MAX_{name.upper()}")
        assert max(map(len, (memory.claims, memory.asked, memory.statuses, commands.sent))) <= p.MAX_FEW
        assert len(commands.waiting) <= 2 * p.MAX_FEW
        assert all(len(session.answers) <= p.MAX_FEW for session in memory.sessions.values())


TOLD = {  # The headers that a server sees of a handshake.
    *("host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version"),
    *("sec-websocket-protocol", "authorization", "user-agent"),
}


class Door:
    """A proxy that strangers knock at while a good charger is connected to it."""

    async def open(self) -> AsyncExitStack:
        """Open it; what is returned closes it."""
        async with AsyncExitStack() as stack:
            self.proxy, self.primary, _ = await stack.enter_async_context(house())
            self.good: FakeCharger = await stack.enter_async_context(charger(self.proxy, "GOOD"))
            return stack.pop_all()

    async def knock(self, request: bytes, hangs_up: bool = False) -> None:
        """Send a request; check the answer, what the primary sees of it, and that the good one is served."""
        self.primary.requests.clear()
        answer = b""
        async with visitor(self.proxy, request) as guest:
            if hangs_up:
                guest.writer.write_eof()
            with suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE):
                    answer = await guest.reader.read(12)
        assert not answer or answer.startswith((b"HTTP/1.1 ", b"\x8a"))
        for seen in self.primary.requests:
            charger_id = urllib.parse.unquote(seen.path.removeprefix("/ocpp/"))
            assert p.is_charger_id(charger_id)
            assert seen.path == f"/ocpp/{urllib.parse.quote(charger_id, safe='')}"
            assert {name.lower() for name in seen.headers} <= TOLD
        await self.good.calls(f"m{len(self.good.heard.messages)}", "Heartbeat")

    async def close(self, stack: AsyncExitStack) -> None:
        """Let another good charger in, and stop."""
        async with charger(self.proxy, "GOOD2") as another:
            await another.calls("1", "Heartbeat")
        await stack.aclose()
