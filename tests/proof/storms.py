"""
A storm: one charger and its two servers that say anything at all, and what must hold all the same.

Nothing raises; a Call gets at most one answer, from the proxy or its owner; what the secondary answers never
reaches the charger; what the servers hear has been said so, but for ids; every table keeps its bound.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import ocpp_2w_proxy as p
from tests.play.kills import save
from tests.play.plays import Stage, StageLink

SERVERS: tuple[str, ...] = p.SERVERS
PEERS = ("charger", *SERVERS)
IDS = {"transactionId", "requestId", "remoteStartId"}  # What the proxy may translate.
ANSWERS = (p.CALLRESULT, p.CALLERROR)
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
    if facts.role == "event":
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
    answers = [p.result_text("{id}", payload) for payload in (p.dump(ANSWER), "{}")]
    answers += [f'[{kind},"{{id}}","InternalError","",{{}}]' for kind in (4, 5)]
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

    def __init__(
        self, version: str, more: str = "", is_fair: bool = False, state: Path | None = None
    ) -> None:
        self.stage = Stage(more, version=version, state=state)
        self.is_ignoring = not more
        self.is_fair = (
            is_fair  # A server claims its own badges only, and readings tell whose `session` it is.
        )
        self.said: dict[tuple[str, str], list[p.Message]] = {}  # Calls, by sender and message id.
        self.unreadable: Counter[tuple[str, str]] = Counter()  # Calls, likewise.
        self.answered: Counter[tuple[str, str]] = Counter()
        self.told: dict[int, str] = {}  # The badges of fair sessions, by the id that the charger was told.
        self.links: dict[str, StageLink] = {}
        self.due: dict[str, dict[str, float]] = {}  # What each peer has to answer, and since when.
        self.meet()
        self.listen("charger")

    def meet(self) -> None:
        """Forget what was to be answered on connections that have ended."""
        for peer in PEERS:
            if self.links.get(peer) is not self.link(peer):
                self.links[peer], self.due[peer] = self.link(peer), {}
                for calls in (self.said, self.unreadable, self.answered):
                    for key in [key for key in calls if key[0] == peer != "charger"]:
                        del calls[key]

    def link(self, peer: str) -> StageLink:
        return getattr(self.stage, peer)  # type: ignore[no-any-return]

    def says(self, peer: str, text: str) -> None:
        """Let a peer say something, with the ids that are of interest now, and check what follows."""
        sessions = self.stage.memory.sessions.values()
        newest = next((s.transaction_id for s in reversed(sessions) if s.transaction_id is not None), 7)
        oldest = next(iter(self.due[peer]), "nobody")
        text = text.replace("{id}", oldest).replace("{transaction}", str(newest))
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
        if message.type in (p.CALL, p.SEND):
            self.said.setdefault((peer, str(message.message_id)), []).append(message)
        else:
            self.due[peer].pop(str(message.message_id), None)

    def passes(self, seconds: float) -> None:
        self.stage.time += seconds
        self.stage.relay.tick()
        self.settle("nobody")

    def restart(self) -> None:
        """Kill the proxy once all is on disk, and start it again: it knows what it knew."""
        known = self.saved()
        self.stage.killed()
        assert self.saved() == known
        self.stage.charger_connects()
        self.stage.secondary_connects(accepts=False)
        self.meet()

    def saved(self) -> int:
        """Save; return how many sessions there are, but for starts that nobody has answered."""
        save(self.stage)
        assert self.stage.journal.failure == ""
        return sum(session.transaction_id is not None for session in self.stage.memory.sessions.values())

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
        for peer in p.SERVERS:
            if not self.link(peer).is_open:
                setattr(self.stage, peer, self.stage.connects(peer))
        self.meet()
        self.check_tables()

    def listen(self, peer: str, speaker: str = "nobody") -> None:
        for text in self.link(peer).hears_texts():
            message = p.parse(text)
            if message.type in ANSWERS:
                self.check_answer(peer, message, speaker)
                continue
            if peer == "charger":
                assert all(self.stage.time - since >= 29 for since in self.due[peer].values()), "two at once"
                assert message.message_id not in self.due[peer], "two under one id"
            elif message.type == p.CALL:
                self.check_forwarded(peer, message)
            self.due[peer][str(message.message_id)] = self.stage.time

    def check_answer(self, peer: str, message: p.Message, speaker: str) -> None:
        """An answer has been asked for, is the only one, and is none of the secondary's."""
        key = peer, str(message.message_id)
        self.answered[key] += 1
        asked = len(self.said.get(key, ())) + self.unreadable[key]
        assert self.answered[key] <= asked, f"{peer} hears {message.text}, an answer too many"
        if self.is_ignoring and peer == "charger" and speaker == "secondary":
            raise AssertionError(f"the secondary's answer reaches the charger: {message.text}")
        calls = self.said.get(key, ()) if peer == "charger" and self.is_fair else ()
        for call in calls:
            if call.action == "StartTransaction" and message.type == p.CALLRESULT:
                self.told[message.payload["transactionId"]] = call.payload["idTag"]

    def check_forwarded(self, peer: str, message: p.Message) -> None:
        """A Call of the charger's is what it has said, and this server's; others are the proxy's own."""
        if self.is_fair:
            badge = message.payload.get("session", message.payload.get("idTag", peer))
            assert badge[:4].upper() == peer[:4].upper(), f"{peer} hears of {badge}"
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
        assert len(memory.sessions) <= p.MAX_SESSIONS
        assert len(memory.calls) <= p.MAX_STORED
        assert max(map(len, (memory.claims, memory.asked, memory.statuses, commands.sent))) <= p.MAX_FEW
        assert len(commands.waiting) <= 2 * p.MAX_FEW
        assert all(len(session.answers) <= p.MAX_FEW for session in memory.sessions.values())
