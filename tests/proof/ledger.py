"""
The ledger: what a charger was told is recorded arrives at its owner, complete and in order, whatever dies.

Chargers with durable queues play sessions through a proxy in a process of its own, which is killed again and
again, with two servers that stop, hang, cut connections, die before they answer, and refuse. In the end the
books are compared: what the chargers were told with what the servers have accepted.

    python -m tests.proof.ledger --minutes 30 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.http11 import Request
from websockets.protocol import State
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import accepting

ROOT = Path(__file__).parents[2]
now = time.monotonic

CHARGERS = 50
KILLS = 34  # Of the proxy, in a short run.
PACE_SECONDS = (0.1, 0.9)  # Between two messages that a charger has to say.
ANSWER_SECONDS = 2.0  # A charger's patience, then it reconnects and says it again.
REPEAT_SECONDS = (0.05, 0.3)  # Until a charger tries again.
CUT_SHARE = 0.01  # Of a charger's Calls: its connection is lost before the answer.
GAP_SECONDS = (0.3, 1.2)  # Between two faults of a server.
FAULT_SECONDS = (0.3, 2.0)  # How long a server's fault lasts.
LIFE_SECONDS = (0.3, 3.0)  # Of a proxy that is killed from outside.
LONGEST_LIFE_SECONDS = 4.0  # Of one that is to kill itself and does not come by the point.
MOST_PASSES = 100  # A proxy kills itself the first to 100th time that it comes by.
FINISH_SECONDS = 30.0  # For the chargers to say the rest, once nothing breaks any more.
STOP_SECONDS = 8.0  # For the proxy to end after SIGTERM.
SETTLE_SECONDS = 60.0  # For what has not arrived by then.
QUIET_SECONDS = 3.0  # Nothing moved for so long: what has not arrived is not on its way.
NOTING_SECONDS = p.SAVE_SECONDS  # From an answer to its record at most, on a disk that others use, too.

Key = tuple[str, str]  # Charger id and timestamp: what a transaction message is recognised by.
PLAIN: dict[str, Any] = {"compression": None, "ping_interval": None}  # For both ends of a websocket.


# ---------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------

BOOTS: dict[str, dict[str, Any]] = {
    "ocpp1.6": {"chargePointVendor": "V", "chargePointModel": "M"},
    "ocpp2.0.1": {"reason": "PowerUp", "chargingStation": {"vendorName": "V", "model": "M"}},
}


@dataclass(slots=True, eq=False)
class Session:
    """A charging session as its charger played it."""

    charger_id: str
    owner: p.Peer
    badge: str
    version: str = "ocpp1.6"
    transaction_id: Any = None  # As the charger knows it.
    messages: list[Said] = field(default_factory=list)  # In order.

    @property
    def is_relayed(self) -> bool:
        """Whether nothing of it is stored; also what `forward` lets the secondary answer is."""
        return self.owner is p.Peer.PRIMARY


@dataclass(slots=True, eq=False)
class Said:
    """A transaction message of a charger."""

    session: Session
    action: str
    timestamp: str
    payload: dict[str, Any]
    is_kept: bool = False  # An event before the one with the badge.
    sent: list[float] = field(default_factory=list)  # Each time, under a message id of its own.
    answered: float | None = None  # With a CallResult.

    @property
    def key(self) -> Key:
        return self.session.charger_id, self.timestamp

    @property
    def is_reading(self) -> bool:
        """Whether it neither begins nor ends its session, nor tells whose it is."""
        is_update = self.payload.get("eventType") == "Updated" and "idToken" not in self.payload
        return self.action == "MeterValues" or is_update

    @property
    def name(self) -> str:
        place = self.session.messages.index(self)
        what = self.payload.get("eventType", self.action)
        return f"{self.session.charger_id} {self.session.badge} [{place}] {what} {self.timestamp}"


class Charger:
    """A charger with a queue that survives everything: one Call at a time, until it is answered."""

    def __init__(self, number: int, port: int, seed: int) -> None:
        self.charger_id = f"CP-{number:02}"
        self.version = "ocpp2.0.1" if number % 3 == 2 else "ocpp1.6"
        self.forwards = number % 5 == 0
        self.url = f"ws://127.0.0.1:{port}/{self.charger_id}"
        self.story_random = Random(f"{seed} {number} story")
        self.luck = Random(f"{seed} {number} luck")  # Apart, so that repeats do not change the story.
        self.ticks = itertools.count()
        self.message_ids = itertools.count()
        self.sessions: list[Session] = []
        self.winds_down = asyncio.Event()  # It ends its sessions, begins none and hurries.
        self.connection: ClientConnection | None = None
        self.connects = 0

    async def live(self) -> None:
        """Say everything that there is to say, each when it is due or as soon as possible."""
        due = now()
        for said in self.story():
            due += self.story_random.uniform(*PACE_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.winds_down.wait(), max(due - now(), 0.0))
            await self.deliver(said)
        self.hang_up()

    # The sessions.

    def story(self) -> Iterator[Said]:
        """Yield the messages of sessions on two connectors, mixed."""
        playing: dict[int, Iterator[Said]] = {}
        while playing or not self.winds_down.is_set():
            connector = self.story_random.choice((1, 2))
            if connector not in playing and not self.winds_down.is_set():
                playing[connector] = self.session(connector)
            said = next(playing.get(connector, iter(())), None)
            if said:
                said.session.messages.append(said)
                yield said
            else:
                playing.pop(connector, None)

    def session(self, connector: int) -> Iterator[Said]:
        owner, name = self.story_random.choice(((p.Peer.PRIMARY, "PRIM"), (p.Peer.SECONDARY, "SECO")))
        badge = f"{name}{len(self.sessions):04}"
        self.sessions.append(Session(self.charger_id, owner, badge, self.version))
        play = self.session_16 if self.version == "ocpp1.6" else self.session_2
        return play(self.sessions[-1], connector, self.story_random.randint(1, 4))

    def session_16(self, session: Session, connector: int, readings: int) -> Iterator[Said]:
        at = self.timestamp()
        start = {"connectorId": connector, "idTag": session.badge, "meterStart": 0, "timestamp": at}
        yield Said(session, "StartTransaction", at, start)
        named = {"transactionId": session.transaction_id}
        for number in range(readings):
            at = self.timestamp()
            value = [{"timestamp": at, "sampledValue": [{"value": str(number)}]}]
            yield Said(session, "MeterValues", at, {"connectorId": connector, **named, "meterValue": value})
        at = self.timestamp()
        yield Said(session, "StopTransaction", at, {**named, "meterStop": 9, "timestamp": at})

    def session_2(self, session: Session, connector: int, readings: int) -> Iterator[Said]:
        session.transaction_id = f"{self.charger_id}-{session.badge}"
        badge_at = self.story_random.choice((0, 0, 1, 2))
        for number, kind in enumerate(["Started", *["Updated"] * (badge_at + readings), "Ended"]):
            state = "EVConnected" if number <= badge_at else "Charging"
            payload: dict[str, Any] = {
                "eventType": kind,
                "timestamp": self.timestamp(),
                "triggerReason": "CablePluggedIn" if number < badge_at else "MeterValuePeriodic",
                "seqNo": number,
                "transactionInfo": {"transactionId": session.transaction_id, "chargingState": state},
            }
            if number == 0:
                payload["evse"] = {"id": connector, "connectorId": 1}
            if number == badge_at:
                payload["idToken"] = {"idToken": session.badge, "type": "ISO14443"}
            yield Said(session, "TransactionEvent", payload["timestamp"], payload, number < badge_at)

    def timestamp(self) -> str:
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self.ticks))
        return at.strftime("%Y-%m-%dT%H:%M:%SZ")

    # The wire.

    async def deliver(self, said: Said) -> None:
        """Say it again until it is answered with a CallResult, on a new connection where that is due."""
        while said.answered is None:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    connection = self.connection or await self.connect()
                    said.sent.append(now())
                    kind, _, answer, *_ = await self.call(connection, said.action, said.payload)
            except (OSError, TimeoutError, WebSocketException):
                self.hang_up()
                kind = None
            if kind == 3:
                said.answered = now()
            else:
                await asyncio.sleep(self.luck.uniform(*REPEAT_SECONDS))
        if said.action == "StartTransaction":
            said.session.transaction_id = answer["transactionId"]

    async def connect(self) -> ClientConnection:
        """Open a connection and boot."""
        self.connects += 1
        versions = [Subprotocol(self.version)]
        self.connection = await connect(self.url, subprotocols=versions, proxy=None, **PLAIN)
        await self.call(self.connection, "BootNotification", BOOTS[self.version])
        return self.connection

    async def call(self, connection: ClientConnection, action: str, payload: dict[str, Any]) -> list[Any]:
        """Send a Call and return its answer."""
        message_id = f"{self.charger_id}-{next(self.message_ids)}"
        await connection.send(json.dumps([2, message_id, action, payload]))
        if self.luck.random() < CUT_SHARE:
            connection.transport.abort()
        while True:
            answer: list[Any] = json.loads(await connection.recv())
            if answer[0] in (3, 4) and answer[1] == message_id:
                return answer

    def hang_up(self) -> None:
        if self.connection:
            self.connection.transport.abort()
        self.connection = None


@dataclass(slots=True, eq=False)
class Visit:
    """A connection of the proxy to a server."""

    charger_id: str
    connection: Any = None  # A ServerConnection.
    cut: float | None = None  # When the server ended it.


@dataclass(slots=True, eq=False)
class Receipt:
    """A transaction message as a server got it."""

    visit: Visit
    key: Key
    message_id: str
    action: str
    payload: dict[str, Any]
    received: float
    answer: dict[str, Any] = field(default_factory=dict)
    answered: float | None = None  # When the answer was handed to the socket.
    is_refused: bool = False  # It was a CallError.

    @property
    def is_accepted(self) -> bool:
        return self.answered is not None and not self.is_refused


class Server:
    """A server that books what it receives and accepts, and misbehaves when told to."""

    def __init__(self, peer: p.Peer, moved: asyncio.Event) -> None:
        self.peer = peer
        self.moved = moved  # Something was received or accepted.
        self.port = free_port()
        self.receipts: list[Receipt] = []
        self.accepted: set[Key] = set()
        self.visits: set[Visit] = set()
        self.faults: Counter[str] = Counter()
        self.awake = asyncio.Event()  # Until it is set, nothing is answered.
        self.awake.set()
        self.is_refusing = False
        self.deaths_due = 0  # So many Calls are booked and answered with the end of their connection.
        self.transaction_ids = itertools.count(1)  # The same ones at both servers, on purpose.
        self.listener: Listener | None = None

    async def start(self) -> None:
        options = {"process_request": self._process_request, "close_timeout": 0.5, **PLAIN}
        versions = [Subprotocol(version) for version in BOOTS]
        self.listener = await serve(self._talk, "127.0.0.1", self.port, subprotocols=versions, **options)

    async def stop(self) -> None:
        for visit in self.visits:
            visit.cut = now()
        if self.listener:
            # Connections that asyncio accepts in the moment of close() are leaked (CPython 109564).
            for listening in self.listener.sockets:
                asyncio.get_running_loop().remove_reader(listening)
            await asyncio.sleep(0)
            self.listener.close()
            await self.listener.wait_closed()
            self.listener = None

    def cut(self, visits: Iterable[Visit]) -> None:
        """End connections with a reset."""
        for visit in visits:
            visit.cut = now()
            visit.connection.transport.abort()

    async def _process_request(self, _connection: ServerConnection, _request: Request) -> None:
        await self.awake.wait()

    async def _talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        visit = Visit(connection.request.path.rpartition("/")[2], connection)
        self.visits.add(visit)
        with suppress(ConnectionClosed):
            async for text in connection:
                # What a hung server finds on a connection that the proxy has given up is dropped.
                if connection.state is State.OPEN:
                    await self._take(visit, json.loads(text))
        self.visits.discard(visit)

    async def _take(self, visit: Visit, message: list[Any]) -> None:
        """Book a Call and answer it."""
        _, message_id, action, payload = message
        receipt = Receipt(visit, (visit.charger_id, ""), message_id, action, payload, now())
        if timestamp := timestamp_of(payload, action):
            receipt.key = visit.charger_id, timestamp
            self.receipts.append(receipt)
            self.moved.set()
            if self.deaths_due:
                self.deaths_due -= 1
                self.cut([visit])
                return
        await self.awake.wait()
        if timestamp and self.is_refusing:
            await visit.connection.send(json.dumps([4, message_id, "InternalError", "", {}]))
            receipt.is_refused, receipt.answered = True, now()
            return
        answer = accepting(action, payload)
        if action == "StartTransaction":
            answer["transactionId"] = next(self.transaction_ids)
        await visit.connection.send(json.dumps([3, message_id, answer]))
        receipt.answer, receipt.answered = answer, now()
        if timestamp:
            self.accepted.add(receipt.key)
            self.moved.set()


def timestamp_of(payload: dict[str, Any], action: str) -> str:
    """Return the timestamp of a transaction message, "" of any other."""
    holder = payload["meterValue"][0] if action == "MeterValues" else payload
    timestamp: str = holder.get("timestamp", "")
    return timestamp


def free_port() -> int:
    """Return a free port that no outgoing connection takes while its server is down."""
    while True:
        port = random.randrange(20_000, 32_000)  # Below the range that Linux takes its own from.
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------


async def stop(server: Server, luck: Random) -> None:
    """Listen no more for a while, and close all connections."""
    await server.stop()
    await asyncio.sleep(luck.uniform(*FAULT_SECONDS))
    await server.start()


async def hang(server: Server, luck: Random) -> None:
    """Answer nothing for a while; then cut all connections, or answer late."""
    server.awake.clear()
    await asyncio.sleep(luck.uniform(*FAULT_SECONDS))
    if luck.random() < 0.5:
        server.cut(list(server.visits))
    server.awake.set()


async def reset(server: Server, luck: Random) -> None:
    """Cut half of the connections."""
    server.cut([visit for visit in list(server.visits) if luck.random() < 0.5])


async def die(server: Server, luck: Random) -> None:
    """Book the next few Calls and cut their connections instead of answering."""
    server.deaths_due = luck.randint(3, 10)
    await asyncio.sleep(luck.uniform(*FAULT_SECONDS))
    server.deaths_due = 0


async def refuse(server: Server, luck: Random) -> None:
    """Answer every transaction message with a CallError for a while."""
    server.is_refusing = True
    await asyncio.sleep(luck.uniform(*FAULT_SECONDS))
    server.is_refusing = False


FAULTS: list[Callable[[Server, Random], Awaitable[None]]] = [stop, hang, reset, die, refuse]


async def trouble(server: Server, luck: Random, is_over: asyncio.Event) -> None:
    """Let a server have each fault in turn, in an order of its own, until it is over."""
    while True:
        for fault in luck.sample(FAULTS, len(FAULTS)):
            await asyncio.sleep(luck.uniform(*GAP_SECONDS))
            if is_over.is_set():
                return
            await fault(server, luck)
            server.faults[fault.__name__] += 1


# How a proxy dies.
OUTSIDE = "at any moment"
POINTS: dict[str, tuple[type, str]] = {
    "between commit and answer": (p.Journal, "_saved"),
    "between answer and delivery": (p.Answers, "text_for_server"),
    "between the server's answer and its record": (p.Outbox, "_delivered"),
}
UNSYNCED = "right after an answer that waited for no sync"

# What the proxy waits for, in the time of a test.
TIMES = {
    "TICK_SECONDS": 0.1,
    "PASSING_SECONDS": 0.5,
    "ANSWER_SECONDS": 0.6,
    "AWAITED_SECONDS": 0.3,
    "DELIVERY_SECONDS": 0.8,
    "DIAL_SECONDS": 1.0,
    "OWN_BOOT_SECONDS": 0.1,
    "MADE_UP_BOOT_SECONDS": 0.5,
    "BOOT_RETRY_SECONDS": 0.3,
    "RETRY_SECONDS": (0.2, 0.4),
    "STEADY_SECONDS": 0.3,
    "CLOSE_SECONDS": 0.5,
    "REDIAL_SECONDS": {p.Peer.PRIMARY: (0.0, 0.4), p.Peer.SECONDARY: (0.1, 0.4)},
}
TRIES = 3  # CallErrors until a stored message is put aside until the proxy starts again; of a reading 1.


def kill_oneself_at(point: str, number: int) -> None:
    """Let this process kill itself when it comes by the point for the n-th time."""
    owner, name = POINTS[point]
    original, passes = getattr(owner, name), itertools.count(1)

    def passing(*arguments: Any) -> Any:
        is_meant = name != "text_for_server" or arguments[1].kind is p.Kind.STORED
        if is_meant and next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, name, passing)


def answer_unsynced(number: int) -> None:
    """Let answers wait for nothing; the process kills itself after the n-th."""
    passes, send = itertools.count(1), p.Relay._send
    p.Journal.has = lambda *_: True  # type: ignore[method-assign]

    def passing(self: p.Relay, decision: Any) -> None:
        send(self, decision)
        is_stored = isinstance(decision, p.OwnAnswer) and decision.call.kind is p.Kind.STORED
        if is_stored and next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    p.Relay._send = passing  # type: ignore[method-assign]


def run_proxy(ini: Path, point: str, number: int, is_unsynced: bool) -> int:
    """Run the proxy in this process; return its exit code."""
    for name, value in TIMES.items():
        assert hasattr(p, name), f"the proxy has no {name} any more"
        setattr(p, name, value)
    if is_unsynced:
        answer_unsynced(number)
    elif point in POINTS:
        kill_oneself_at(point, number)
    sys.argv = ["ocpp_2w_proxy.py", "--config", str(ini)]
    return p.main()


# ---------------------------------------------------------------------------------------------------------
# Ledger
# ---------------------------------------------------------------------------------------------------------

# Why a server got a message again.
REFUSED = "the server had answered it with a CallError"
UNANSWERED = "the server had not answered it"
SERVER_DIED = "the server died before it answered"
CONNECTION_DIED = "the server died before the proxy had noted its answer"
PROXY_DIED = "the proxy died before it had noted the answer"
CHARGER_AGAIN = "the charger had heard no answer and sent it again"


@dataclass
class Report:
    """What a run found. All is well if there are no problems."""

    problems: list[str] = field(default_factory=list)  # A line each; what it is comes first.
    again: Counter[str] = field(default_factory=Counter)  # What was received before came again, by why.
    doubles: Counter[str] = field(default_factory=Counter)  # What was accepted before was accepted again.
    sessions: int = 0
    messages: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Counter[str]] = field(default_factory=dict)  # By server.
    connects: int = 0
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        return sum(problem.startswith("lost:") for problem in self.problems)

    def __str__(self) -> str:
        servers = [f"{name} broke {listed(faults)}" for name, faults in self.faults.items()]
        lines = [
            f"{self.sessions} sessions, {self.messages} messages, {self.seconds:.0f} s",
            f"the chargers connected {self.connects} times; the proxy was killed {listed(self.kills)}",
            *servers,
            f"received again {listed(self.again)}",
            f"accepted again {listed(self.doubles)}",
            f"lost: {self.lost}; problems: {len(self.problems)}",
        ]
        return "\n".join(lines + self.problems)


def listed(counts: Counter[str]) -> str:
    parts = [f"\n    {number:6} {name}" for name, number in sorted(counts.items()) if number]
    return f"{counts.total()} times{''.join(parts)}"


class Ledger:
    """Compares what the chargers were told with what the servers have got."""

    def __init__(
        self, sessions: list[Session], receipts: dict[p.Peer, list[Receipt]], deaths: list[float]
    ) -> None:
        self.sessions = sessions
        self.deaths = deaths  # Of the proxy.
        self.said = {said.key: said for session in sessions for said in session.messages}
        self.got: dict[p.Peer, dict[Key, list[Receipt]]] = {}  # In the order of their coming.
        for peer, all_receipts in receipts.items():
            self.got[peer] = defaultdict(list)
            for receipt in all_receipts:
                self.got[peer][receipt.key].append(receipt)
        self.report = Report(sessions=len(sessions), messages=len(self.said))

    def check(self) -> Report:
        for session in self.sessions:
            for said in session.messages:
                self._check_arrival(said)
                self._check_repeats(said)
            self._check_order(session)
            self._check_transaction_ids(session)
        for peer, got in self.got.items():
            for key in got.keys() - self.said.keys():
                self._problem("unknown", f"{peer.value} got {key}, which no charger said")
        return self.report

    def _problem(self, kind: str, what: str) -> None:
        self.report.problems.append(f"{kind}: {what}")

    def _at_owner(self, said: Said) -> list[Receipt]:
        return self.got[said.session.owner].get(said.key, [])

    def _accepted(self, said: Said) -> list[Receipt]:
        return [receipt for receipt in self._at_owner(said) if receipt.is_accepted]

    def _check_arrival(self, said: Said) -> None:
        """What is answered stands at the owner as it was said, and nowhere else."""
        receipts = self._at_owner(said)
        if said.answered is None:
            self._problem("unanswered", said.name)
        elif not self._accepted(said):
            self._problem("lost", f"{said.name}; its owner got it {len(receipts)} times")
        if any(said.key in got for peer, got in self.got.items() if peer is not said.session.owner):
            self._problem("wrong server", said.name)
        if any((got.action, content(got)) != (said.action, content(said)) for got in receipts):
            self._problem("altered", said.name)

    def _check_order(self, session: Session) -> None:
        """Nothing comes before what was said before it is accepted, and nothing comes back."""
        places = enumerate(session.messages)
        arrivals = [(receipt.received, place) for place, said in places for receipt in self._at_owner(said)]
        newest = 0
        for at, place in sorted(arrivals):
            said, last = session.messages[place], session.messages[newest]
            if place < newest and not self._is_passed_over(said, at):
                self._problem("order", f"{said.name} came again after {last.name}")
            before = session.messages[max(place - 1, 0)]
            if place and not self._stands(before, at):
                self._problem("order", f"{said.name} came before {before.name} was accepted")
            newest = max(newest, place)

    def _stands(self, said: Said, at: float) -> bool:
        """Whether a message had been accepted by this time, or its owner had missed its chances."""
        times = [receipt.answered or at for receipt in self._accepted(said)]
        return min(times, default=at + 1) <= at or self._is_passed_over(said, at)

    def _is_passed_over(self, said: Said, at: float) -> bool:
        """Whether the rest of the session had not to wait for a message any more."""
        missed = self._missed(said, at)
        if said.is_kept and said.session.is_relayed:
            # The verdict on a badge waits for the events before it until the first of them fails.
            messages = said.session.messages
            return any(self._missed(kept, at) for kept in messages[: messages.index(said) + 1])
        tries = 1 if said.is_reading else TRIES
        return said is not said.session.messages[0] and sum(r.is_refused for r in missed) >= tries

    def _missed(self, said: Said, at: float) -> list[Receipt]:
        """Return the chances to accept a message that its owner had missed by this time."""
        return [r for r in self._at_owner(said) if r.received < at and not r.is_accepted]

    def _check_transaction_ids(self, session: Session) -> None:
        """What follows a start names an id that the owner gave for this very start."""
        if session.version == "ocpp1.6":
            given = [receipt.answer["transactionId"] for receipt in self._accepted(session.messages[0])]
            for said in session.messages[1:]:
                for named in {receipt.payload.get("transactionId") for receipt in self._at_owner(said)}:
                    if named not in given:
                        self._problem("transaction", f"{said.name} names {named}; its start got {given}")

    def _check_repeats(self, said: Said) -> None:
        """Whatever came more than once has a reason."""
        receipts = self._at_owner(said)
        for number, receipt in enumerate(receipts[1:], 1):
            before = receipts[:number]
            why = self._why_again(said, before, receipt)
            if why:
                self.report.again[why] += 1
                self.report.doubles[why] += receipt.is_accepted and any(old.is_accepted for old in before)
            else:
                apart = receipt.received - receipts[number - 1].received
                self._problem("double", f"{said.name} came again after {apart:.2f} s, for no reason")

    def _why_again(self, said: Said, before: list[Receipt], receipt: Receipt) -> str:
        """Return why a message came again, "" for no reason."""
        same = [old for old in before if old.message_id == receipt.message_id]
        if same:
            return self._why_delivered_again(same[-1], receipt)
        # A repeat of what the proxy has stored is known to it; MeterValues are never taken for repeats.
        may_repeat = said.session.is_relayed or said.action == "MeterValues"
        times = sum(at <= receipt.received for at in said.sent) if may_repeat else 1
        # A stored message keeps its id until it meets a CallError.
        is_stored = said.is_kept or not said.session.is_relayed
        refused = sum(old.is_refused for old in before) if is_stored else 0
        ids = len({old.message_id for old in before})
        return CHARGER_AGAIN if times > ids else REFUSED if times + refused > ids else ""

    def _why_delivered_again(self, first: Receipt, second: Receipt) -> str:
        """Return why the proxy sent the same once more, "" for no reason."""
        if first.payload != second.payload or first.visit is second.visit:
            return ""
        if first.is_refused:
            return REFUSED
        if first.answered is None:
            return UNANSWERED if first.visit.cut is None else SERVER_DIED
        if first.visit.cut and abs(first.visit.cut - first.answered) <= NOTING_SECONDS:
            return CONNECTION_DIED
        deaths = [death for death in self.deaths if first.received <= death <= second.received]
        is_near = any(abs(death - first.answered) <= NOTING_SECONDS for death in deaths)
        return PROXY_DIED if is_near else ""


def content(message: Said | Receipt) -> dict[str, Any]:
    """Return the payload without what the proxy may have to translate."""
    return {key: value for key, value in message.payload.items() if key != "transactionId"}


# ---------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------

INI = """\
[logging]
proxy = {level}
rfid = full
[host]
addr = 127.0.0.1
port = {port}
call_timeout = 1
state = state.db
[status]
port = 0
[ext-server]
server = ws://127.0.0.1:{primary}/ocpp
primary_auth = none
primary_grace = 1
primary_rfid = PRIM*
secondary_server = ws://127.0.0.1:{secondary}/ocpp
secondary_rfid = SECO*
"""


class Process:
    """The proxy, in a process of its own."""

    def __init__(self, folder: Path, ini: str, is_unsynced: bool) -> None:
        (folder / "proxy.ini").write_text(ini)
        self.log = folder / "proxy.log"
        self.command = [sys.executable, "-m", "tests.proof.ledger", "--run-proxy", str(folder / "proxy.ini")]
        self.command += ["--unsynced"] if is_unsynced else []
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, point: str = "", number: int = 0) -> None:
        """Start it; it is to kill itself when it comes by the point for the n-th time."""
        death = ["--point", point, "--number", str(number)]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(*self.command, *death, cwd=ROOT, stderr=log)

    async def ends(self, seconds: float, code: int) -> None:
        """Wait until it has ended by itself with this exit code. Raises TimeoutError."""
        assert self.process is not None
        async with asyncio.timeout(seconds):
            await self.process.wait()
        ended = self.process.returncode
        assert ended == code, f"the proxy ended with {ended}:\n{self.log.read_text()[-2000:]}"

    async def dies(self, seconds: float) -> bool:
        """Wait until it has killed itself; kill it if it has not by then. Return whether it has."""
        try:
            await self.ends(seconds, -signal.SIGKILL)
        except TimeoutError:
            await self.kill()
            return False
        return True

    async def stop(self) -> None:
        """End it as a person does."""
        assert self.process is not None
        self.process.terminate()
        await self.ends(STOP_SECONDS, 0)

    async def kill(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


class Run:
    """One run: the peers, the proxy, what breaks, and the comparison of the books."""

    def __init__(self, folder: Path, seed: int, is_unsynced: bool = False, level: str = "WARNING") -> None:
        self.is_unsynced = is_unsynced
        self.luck = Random(f"{seed} deaths")
        self.moved = asyncio.Event()
        self.servers = [Server(peer, self.moved) for peer in (p.Peer.PRIMARY, p.Peer.SECONDARY)]
        self.luck_of_servers = [Random(f"{seed} {server.peer.value}") for server in self.servers]
        port = free_port()
        self.chargers = [Charger(number, port, seed) for number in range(CHARGERS)]
        forwarding = [charger.charger_id for charger in self.chargers if charger.forwards]
        primary, secondary = (server.port for server in self.servers)
        ini = INI.format(level=level, port=port, primary=primary, secondary=secondary)
        ini += "".join(f"[charger {name}]\nsecondary_replies = forward\n" for name in forwarding)
        self.process = Process(folder, ini, is_unsynced)
        self.deaths: list[float] = []
        self.kills: Counter[str] = Counter()

    async def play(self, kills: int, seconds: float = 0.0) -> Report:
        """Let everything break for so many kills and so long, then let everything arrive."""
        begun = now()
        for server in self.servers:
            await server.start()
        try:
            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(charger.live()) for charger in self.chargers]
                await self._break(group, kills, begun + seconds)
                for charger in self.chargers:
                    charger.winds_down.set()
                _, unfinished = await asyncio.wait(lives, timeout=FINISH_SECONDS)
                for life in unfinished:
                    life.cancel()
            # What was refused with CallErrors is tried again when the proxy starts; no charger is needed.
            await self.process.stop()
            await self.process.start()
            await self._settle()
        finally:
            await self.process.kill()
            for charger in self.chargers:
                charger.hang_up()
            for server in self.servers:
                await server.stop()
        return self._report(now() - begun)

    async def _break(self, group: asyncio.TaskGroup, kills: int, until: float) -> None:
        """Kill the proxy again and again while the servers have their troubles; leave all of them well."""
        is_over = asyncio.Event()
        troubles = [
            group.create_task(trouble(server, luck, is_over))
            for server, luck in zip(self.servers, self.luck_of_servers, strict=True)
            if not self.is_unsynced
        ]
        for point in self._points():
            if len(self.deaths) >= kills and now() >= until:
                break
            await self.process.start(point, self.luck.randint(1, MOST_PASSES))
            life = self.luck.uniform(*LIFE_SECONDS) if point == OUTSIDE else LONGEST_LIFE_SECONDS
            has_killed_itself = await self.process.dies(life)
            self.deaths.append(now())
            self.kills[point if has_killed_itself else OUTSIDE] += 1
        is_over.set()
        await asyncio.gather(*troubles)
        await self.process.start()

    def _points(self) -> Iterator[str]:
        """Yield how the proxy is to die, next time and next time."""
        points = [UNSYNCED] if self.is_unsynced else [OUTSIDE, *POINTS]
        while True:
            yield from self.luck.sample(points, len(points))

    async def _settle(self) -> None:
        """Wait until everything has arrived, or nothing moves any more."""
        accepted = {server.peer: server.accepted for server in self.servers}
        owed = [said for charger in self.chargers for s in charger.sessions for said in s.messages]
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while owed := [said for said in owed if said.key not in accepted[said.session.owner]]:
                    self.moved.clear()
                    await asyncio.wait_for(self.moved.wait(), QUIET_SECONDS)

    def _report(self, seconds: float) -> Report:
        sessions = [session for charger in self.chargers for session in charger.sessions]
        receipts = {server.peer: server.receipts for server in self.servers}
        report = Ledger(sessions, receipts, self.deaths).check()
        lines = self.process.log.read_text().splitlines()
        report.problems += [f"logged: {line}" for line in lines if " ERROR " in line]
        report.kills, report.seconds = self.kills, seconds
        report.faults = {server.peer.value: server.faults for server in self.servers}
        report.connects = sum(charger.connects for charger in self.chargers)
        return report


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break everything around the proxy; count what is lost.")
    parser.add_argument("--minutes", type=float, default=0.0, help="default: a short run")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="for the state and the DEBUG log")
    parser.add_argument("--unsynced", action="store_true", help="answer before anything is on disk")
    parser.add_argument("--run-proxy", metavar="INI", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the command; return its exit code."""
    options = arguments()
    if options.run_proxy:
        return run_proxy(options.run_proxy, options.point, options.number, options.unsynced)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        level = "DEBUG" if options.keep else "WARNING"
        run = Run(folder, options.seed, options.unsynced, level)
        report = asyncio.run(run.play(KILLS, options.minutes * 60))
    print(f"seed {options.seed}: {report}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
