"""
The fleet: chargers with durable queues and their two servers, light enough for thousands, and what breaks.

A charger plays one session after the other and says each message again until it is answered. A server books
what it gets and accepts. The ledger compares these books, the soak looks at what grows meanwhile, and the
benchmark lets the same chargers say prepared frames.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tests.play.frames import Socket, connected
from tests.play.peers import accepting, free_port
from tests.play.rig import many_files

now = time.monotonic
PRIMARY, SECONDARY = SERVERS = ("primary", "secondary")
BADGES = {"PRIM": PRIMARY, "SECO": SECONDARY}  # What a badge begins with, and whose it is.
BOOTS: dict[str, dict[str, Any]] = {
    "ocpp1.6": {"chargePointVendor": "V", "chargePointModel": "M"},
    "ocpp2.0.1": {"reason": "PowerUp", "chargingStation": {"vendorName": "V", "model": "M"}},
}
STATUS = {"connectorId": 1, "evseId": 1, "status": "Charging", "connectorStatus": "Occupied"}
STRANGER = "STRANGER"  # Ids that begin so are refused by the primary.

Key = tuple[str, str]  # Charger id and timestamp: what a transaction message is recognised by.
T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """How fast a fleet lives, in seconds; a pair is drawn from."""

    messages: tuple[float, float] = (0.1, 0.9)  # Between two that a charger has to say.
    hurry: tuple[float, float] = (0.0, 0.0)  # The same, once it is to end its sessions.
    patience: float = 2.0  # A charger's, then it reconnects and says it again.
    again: tuple[float, float] = (0.05, 0.3)  # Until a charger tries again.
    fault: tuple[float, float] = (0.3, 2.0)  # How long a fault lasts that lasts.
    cut_share: float = 0.01  # Of a charger's Calls: its connection is lost before the answer.

    def hurried(self, haste: float) -> Pace:
        """Return a pace that is so many times as fast."""
        pairs = (
            (low / haste, high / haste) for low, high in (self.messages, self.hurry, self.again, self.fault)
        )
        messages, hurry, again, fault = pairs
        return Pace(messages, hurry, self.patience / haste, again, fault, self.cut_share)


# What is said.


@dataclass(slots=True, eq=False)
class Session:
    """A charging session as its charger played it."""

    charger_id: str
    owner: str
    badge: str
    version: str = "ocpp1.6"
    transaction_id: Any = None  # As the charger knows it.
    messages: list[Said] = field(default_factory=list)  # In order.


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
    def is_last(self) -> bool:
        return self.action == "StopTransaction" or self.payload.get("eventType") == "Ended"

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


@dataclass(slots=True, eq=False)
class Receipt:
    """A transaction message as a server got it."""

    visit: Any  # The connection; `cut` is when the server ended it, None = it did not.
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


class Books:
    """What all chargers have said, and all servers have got."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.receipts: dict[str, dict[Key, list[Receipt]]] = {name: defaultdict(list) for name in SERVERS}
        self.accepted: dict[str, set[Key]] = {name: set() for name in SERVERS}
        self.counts: Counter[str] = Counter()  # Of everything else that happened.
        self.moved = asyncio.Event()  # Something was received or accepted.

    def receive(self, server: str, receipt: Receipt) -> None:
        self.receipts[server][receipt.key].append(receipt)
        self.moved.set()

    def accept(self, server: str, receipt: Receipt) -> None:
        self.accepted[server].add(receipt.key)
        self.moved.set()

    def forget(self) -> bool:
        """Let go of the sessions that are over and have arrived; return whether none is left."""
        for session in list(self.sessions):
            keys = [said.key for said in session.messages]
            is_over = session.messages and session.messages[-1].is_last and session.messages[-1].answered
            if is_over and self.accepted[session.owner].issuperset(keys):
                self.sessions.remove(session)
                self.accepted[session.owner].difference_update(keys)
                for server, key in itertools.product(SERVERS, keys):
                    is_foreign = bool(self.receipts[server].pop(key, None)) and server != session.owner
                    self.counts["messages at the wrong server"] += is_foreign
                self.counts["sessions, complete at their servers"] += 1
        return not self.sessions

    def missing(self) -> list[str]:
        """Return what has not arrived."""
        said = (said for session in self.sessions for said in session.messages)
        return [one.name for one in said if one.key not in self.accepted[one.session.owner]]


# Chargers.


class Charger:
    """A charger with a queue that survives everything: one Call at a time, until it is answered."""

    def __init__(self, number: int, fleet: Fleet, seed: int) -> None:
        self.charger_id = f"CP-{number:04}"
        self.version = "ocpp2.0.1" if number % 3 == 2 else "ocpp1.6"
        self.fleet = fleet
        self.story_random = Random(f"{seed} {number} story")
        self.luck = Random(f"{seed} {number} luck")  # Apart, so that repeats do not change the story.
        self.ticks, self.message_ids = itertools.count(), itertools.count()
        self.may_come = asyncio.Event()
        self.may_come.set()
        self.socket: Socket | None = None  # The newest.
        self.sessions = 0  # Begun.
        self.rests = False  # It is online, or just lost, and has nothing to say.
        self.asked_badge = ""  # Of the last remote start.

    @property
    def is_online(self) -> bool:
        return self.socket is not None and self.socket.is_open

    async def live(self) -> None:
        """Say everything that there is to say, each when it is due or as soon as possible."""
        story, due = self.story(), now()
        said = next(story)
        while True:
            try:
                answer = await self.say(said)
            except (OSError, TimeoutError):
                self.hang_up()
                answer = None
            if answer is None or answer[0] != 3:
                self.rests = False
                await asyncio.sleep(self.luck.uniform(*self.fleet.pace.again))
                continue
            if said:
                said.answered = now()
                if said.action == "StartTransaction":
                    said.session.transaction_id = answer[2]["transactionId"]
            said = next(story)
            self.rests = said is None
            pace = self.fleet.pace.messages if self.fleet.plays else self.fleet.pace.hurry
            due = now() + 0.2 if said is None else due + self.story_random.uniform(*pace)
            if due > now() and self.socket:
                await asyncio.wait([self.socket.closed], timeout=due - now())

    # The sessions.

    def story(self) -> Iterator[Said | None]:
        """Yield the messages of sessions on two connectors, mixed; None where there is nothing to say."""
        playing: dict[int, Iterator[Said]] = {}
        while True:
            connector = self.story_random.choice((1, 2))
            if connector not in playing and self.fleet.plays:
                playing[connector] = self.session(connector)
            said = next(playing.get(connector, iter(())), None)
            if said:
                said.session.messages.append(said)
                yield said
            else:
                playing.pop(connector, None)
                if not playing and not self.fleet.plays:
                    yield None

    def session(self, connector: int) -> Iterator[Said]:
        name = self.story_random.choice(list(BADGES))
        badge, self.asked_badge = self.asked_badge or f"{name}{self.sessions:04}", ""
        session = Session(self.charger_id, BADGES[badge[:4]], badge, self.version)
        self.sessions += 1
        self.fleet.books.sessions.append(session)
        play = self.session_16 if self.version == "ocpp1.6" else self.session_2
        return play(session, connector, self.story_random.randint(1, 4))

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
        session.transaction_id = f"{self.charger_id}-{self.sessions}"
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

    async def say(self, said: Said | None) -> list[Any]:
        """Send a message, or be online; return the answer. Raises OSError or TimeoutError."""
        await self.may_come.wait()
        async with asyncio.timeout(self.fleet.pace.patience):
            socket = self.socket if self.is_online else await self.connect()
            assert socket is not None
            if said is None:
                return [3]
            said.sent.append(now())
            if self.luck.random() < self.fleet.pace.cut_share:
                asyncio.get_running_loop().call_soon(socket.transport.abort)
            return await self.call(socket, said.action, said.payload)

    async def connect(self) -> Socket:
        """Open a connection, whatever becomes of an older one, and boot."""
        self.fleet.books.counts["connections of chargers"] += 1
        self.socket = socket = await connected(self.fleet.port, self.charger_id, self.version, self.hear)
        await self.call(socket, "BootNotification", BOOTS[self.version])
        await self.call(socket, "StatusNotification", STATUS)
        return socket

    async def call(self, socket: Socket, action: str, payload: dict[str, Any]) -> list[Any]:
        return await socket.call(f"{self.charger_id}-{next(self.message_ids)}", action, payload)

    def hear(self, socket: Socket, text: bytes) -> None:
        """Answer a server's Call."""
        _, message_id, action, payload = json.loads(text)
        if action in ("RemoteStartTransaction", "RequestStartTransaction"):
            self.asked_badge = payload.get("idTag") or payload["idToken"]["idToken"]
        socket.send(json.dumps([3, message_id, {"status": "Accepted"}]))

    def hang_up(self) -> None:
        if self.socket:
            self.socket.transport.abort()


# Servers.


class Server:
    """A server that accepts everything, books it, and misbehaves when told to."""

    def __init__(self, name: str, books: Books, pace: Pace, seed: int = 0) -> None:
        self.name = name
        self.books = books
        self.pace = pace
        self.luck = Random(f"{seed} {name}")
        self.port = free_port()
        self.visits: set[Any] = set()  # Sockets.
        self.faults: Counter[str] = Counter()
        self.trouble = asyncio.Lock()  # One at a time.
        self.held: list[Callable[[], None]] | None = None  # What waits for it to wake up; None = it is awake.
        self.busy: set[Any] = set()  # Visits of which it has read a Call, while it is asleep.
        self.refusal = 0  # An HTTP status; 0 = handshakes are welcome.
        self.is_refusing = False  # Transaction messages, with CallErrors.
        self.deaths_due = 0  # So many Calls are booked and answered with the end of their connection.
        self.transaction_ids, self.numbers = itertools.count(1), itertools.count(1)  # The same at both.
        self.listener: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(self._visitor, "127.0.0.1", self.port, backlog=4096)

    def _visitor(self) -> Socket:
        return Socket(self.take, admit=lambda *who: self._when_awake(lambda: self._admit(*who)))

    async def stop(self) -> None:
        """Listen no more, and close all connections."""
        for visit in list(self.visits):
            visit.cut = now()
            visit.close()
        if self.listener:
            # Connections that asyncio accepts in the moment of close() are leaked (CPython 109564).
            for listening in self.listener.sockets:
                asyncio.get_running_loop().remove_reader(listening)
            await asyncio.sleep(0)
            self.listener.close()
            self.listener = None

    def cut(self, visits: Sequence[Any]) -> None:
        for visit in visits:
            visit.cut = now()
            visit.transport.abort()

    def sleep(self) -> None:
        """Answer nothing from now on, no handshake either."""
        self.held = []

    def wake(self) -> None:
        held, self.held = self.held or [], None
        self.busy.clear()
        for work in held:
            work()

    def _when_awake(self, work: Callable[[], None]) -> None:
        if self.held is None:
            work()
        else:
            self.held.append(work)

    def _admit(self, visit: Any, path: str) -> None:
        self.books.counts["connections to servers"] += 1
        visit.charger_id, visit.cut = path.rpartition("/")[2], None
        if self.refusal or visit.charger_id.startswith(STRANGER):
            visit.refuse(self.refusal or 401)
        elif not visit.transport.is_closing():
            self.visits.add(visit)
            visit.closed.add_done_callback(lambda _: self.visits.discard(visit))
            visit.accept()

    def take(self, visit: Any, text: bytes) -> None:
        """Book a Call and answer it, one after the other."""
        if visit in self.busy:
            self._when_awake(lambda: self.take(visit, text))
            return
        message = json.loads(text)
        if message[0] != 2 or visit.transport.is_closing():
            return
        _, message_id, action, payload = message
        receipt = Receipt(visit, (visit.charger_id, ""), message_id, action, payload, now())
        if timestamp := timestamp_of(payload, action):
            receipt.key = visit.charger_id, timestamp
            self.books.receive(self.name, receipt)
            if self.deaths_due:
                self.deaths_due -= 1
                self.cut([visit])
                return
        if self.held is not None:
            self.busy.add(visit)
        self._when_awake(lambda: self._answer(receipt))

    def _answer(self, receipt: Receipt) -> None:
        visit, message_id = receipt.visit, receipt.message_id
        if visit.transport.is_closing():
            return
        if receipt.key[1] and self.is_refusing:
            visit.send(json.dumps([4, message_id, "InternalError", "", {}]))
            receipt.is_refused, receipt.answered = True, now()
            return
        answer = accepting(receipt.action, receipt.payload)
        if receipt.action == "StartTransaction":
            answer["transactionId"] = next(self.transaction_ids)
        visit.send(json.dumps([3, message_id, answer]))
        receipt.answer, receipt.answered = answer, now()
        if receipt.key[1]:
            self.books.accept(self.name, receipt)

    async def pause(self) -> None:
        await asyncio.sleep(self.luck.uniform(*self.pace.fault))

    async def has(self, **trouble: int) -> None:
        """Let some of its attributes be other ones for a while."""
        before = {name: getattr(self, name) for name in trouble}
        vars(self).update(trouble)
        await self.pause()
        vars(self).update(before)


def timestamp_of(payload: dict[str, Any], action: str) -> str:
    """Return the timestamp of a transaction message, "" of any other."""
    holder = payload["meterValue"][0] if action == "MeterValues" else payload
    timestamp: str = holder.get("timestamp", "")
    return timestamp


def settings_of(port: int, servers: Sequence[Server]) -> dict[str, object]:
    """Return what the ini of a proxy with this port has to say of its servers."""
    primary, secondary = (f"ws://127.0.0.1:{server.port}/ocpp" for server in servers)
    addresses = {"addr": "127.0.0.1", "port": port, "server": primary, "secondary_server": secondary}
    return {**addresses, "primary_auth": "none", "primary_rfid": "PRIM*", "secondary_rfid": "SECO*"}


# What breaks at a server.


async def stop(server: Server) -> None:
    """Listen no more for a while, and close all connections."""
    await server.stop()
    await server.pause()
    await server.start()


async def hang(server: Server) -> None:
    """Answer nothing for a while; then cut all connections, or answer late."""
    server.sleep()
    await server.pause()
    if server.luck.random() < 0.5:
        server.cut(list(server.visits))
    server.wake()


async def reset(server: Server) -> None:
    """Cut half of the connections."""
    server.cut([visit for visit in list(server.visits) if server.luck.random() < 0.5])


async def die(server: Server) -> None:
    """Book the next few Calls and cut their connections instead of answering."""
    await server.has(deaths_due=server.luck.randint(3, 10))


async def refuse(server: Server) -> None:
    """Answer every transaction message with a CallError for a while."""
    await server.has(is_refusing=True)


class Fleet:
    """All peers of a proxy."""

    def __init__(self, chargers: int, seed: int, pace: Pace, books: Books) -> None:
        self.pace = pace
        self.books = books
        self.luck = Random(f"{seed} fleet")
        self.port = free_port()  # The proxy's.
        self.plays = True  # Else chargers end their sessions, and rest.
        self.servers = [Server(name, books, pace, seed) for name in SERVERS]
        self.chargers = [Charger(number, self, seed) for number in range(chargers)]

    @property
    def forwarding(self) -> str:
        """Return the sections of each fifth charger, whose secondary answers itself."""
        names = [charger.charger_id for charger in self.chargers[::5]]
        return "".join(f"[charger {name}]\nsecondary_replies = forward\n" for name in names)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Let the servers listen and the chargers live for as long as this lasts."""
        for server in self.servers:
            await server.start()
        lives = [asyncio.create_task(charger.live()) for charger in self.chargers]
        try:
            yield
        finally:
            for life in lives:
                life.cancel()
            ended = await asyncio.gather(*lives, return_exceptions=True)
            for charger in self.chargers:
                charger.hang_up()
            for server in self.servers:
                await server.stop()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def pause(self) -> None:
        await asyncio.sleep(self.luck.uniform(*self.pace.fault))

    async def rest(self, seconds: float) -> bool:
        """Let all sessions end; return whether they all have, in time."""
        self.plays = False
        return await within(seconds, lambda: all(c.rests and c.is_online for c in self.chargers))


async def within(seconds: float, is_true: Callable[[], bool]) -> bool:
    """Wait until something is so; return whether it is, in time."""
    until = now() + seconds
    while not is_true() and now() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return is_true()


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()) if number) or "-"


def table(rows: Sequence[tuple[object, ...]]) -> str:
    """Return a table in Markdown, its head first."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *rest = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def command(parser: argparse.ArgumentParser, play: Callable[[Path, Any], Coroutine[Any, Any, Any]]) -> int:
    """Play a run in a folder, print what it found, and return the exit code: 1 if there are problems."""
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="for the log and the state")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, many_files():
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        report = asyncio.run(play(folder, options))
    print(f"seed {options.seed}\n\n{report}")
    return 1 if report.problems else 0
