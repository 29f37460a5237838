"""
The fleet: chargers with durable queues and their two servers, light enough for thousands, and what breaks.

A charger plays one session after the other and says each message again until it is answered. A server books
what it gets and accepts. The ledger compares these books; the soak looks at what grows meanwhile.
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
from typing import Any, NamedTuple

from tests.play import rig
from tests.play.frames import Socket, connected
from tests.play.peers import accepting, free_port

now = time.monotonic
PRIMARY, SECONDARY = SERVERS = ("primary", "secondary")
BADGES = {"PRIM": PRIMARY, "SECO": SECONDARY}  # What a badge begins with, and whose it is.
BOOTS: dict[str, dict[str, Any]] = {
    "ocpp1.6": {"chargePointVendor": "V", "chargePointModel": "M"},
    "ocpp2.0.1": {"reason": "PowerUp", "chargingStation": {"vendorName": "V", "model": "M"}},
}
STATUS = {"connectorId": 1, "evseId": 1, "status": "Charging", "connectorStatus": "Occupied"}
CUT_SHARE = 0.01  # Of a charger's Calls: its connection is lost before the answer.
STRANGER = "STRANGER"  # Ids that begin so are refused by the primary.

Key = tuple[str, str]  # Charger id and timestamp: what a transaction message is recognised by.


class Pace(NamedTuple):
    """How fast a fleet lives: seconds, in the middle."""

    messages: float = 0.5  # Between two that a charger has to say.
    hurry: float = 0.0  # The same, once it is to end its sessions.
    patience: float = 2.0  # A charger's, then it reconnects and says it again.
    again: float = 0.17  # Until a charger tries again.
    fault: float = 1.1  # How long a fault lasts that lasts.


def around(luck: Random, seconds: float) -> float:
    return seconds * luck.uniform(0.2, 1.8)


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
    def is_relayed(self) -> bool:
        """Whether it is not stored, unless it is kept; also what `forward` lets the secondary answer is."""
        return self.session.owner == PRIMARY

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

    def receive(self, server: str, receipt: Receipt) -> None:
        self.receipts[server][receipt.key].append(receipt)

    def forget(self) -> bool:
        """Let go of the sessions that are over and have arrived; return whether none is left."""
        for session in list(self.sessions):
            keys = [said.key for said in session.messages]
            last = session.messages[-1] if session.messages else None
            is_end = last and (last.action == "StopTransaction" or last.payload.get("eventType") == "Ended")
            if last and is_end and last.answered and self.accepted[session.owner].issuperset(keys):
                self.sessions.remove(session)
                self.accepted[session.owner].difference_update(keys)
                for server, key in itertools.product(SERVERS, keys):
                    is_foreign = bool(self.receipts[server].pop(key, None)) and server != session.owner
                    self.counts["messages at the wrong server"] += is_foreign
                self.counts["sessions, complete at their servers"] += 1
        return not self.sessions

    def missing(self) -> list[str]:
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
                answer = [4]
            if answer[0] != 3:
                self.rests = False
                await asyncio.sleep(around(self.luck, self.fleet.pace.again))
                continue
            if said:
                said.answered = now()
                if said.action == "StartTransaction":
                    said.session.transaction_id = answer[2]["transactionId"]
            said = next(story)
            self.rests = said is None
            pace = self.fleet.pace.messages if self.fleet.plays else self.fleet.pace.hurry
            due = now() + 0.2 if said is None else due + around(self.story_random, pace)
            if due > now() and self.socket:
                await asyncio.wait([self.socket.closed], timeout=due - now())

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

    async def say(self, said: Said | None) -> list[Any]:
        """Send a message, or be online; return the answer. Raises OSError or TimeoutError."""
        await self.may_come.wait()
        async with asyncio.timeout(self.fleet.pace.patience):
            socket = self.socket if self.socket and self.socket.is_open else await self.connect()
            if said is None:
                return [3]
            said.sent.append(now())
            if self.luck.random() < CUT_SHARE:
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
        _, message_id, action, payload = json.loads(text)
        if action in ("RemoteStartTransaction", "RequestStartTransaction"):
            self.asked_badge = payload.get("idTag") or payload["idToken"]["idToken"]
        socket.send([3, message_id, {"status": "Accepted"}])

    def hang_up(self) -> None:
        if self.socket:
            self.socket.transport.abort()

    def leave(self) -> None:
        """Hang up, and stay away until it may come."""
        self.may_come.clear()
        self.hang_up()


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
        def visitor() -> Socket:
            return Socket(self.take, admit=lambda *who: self._when_awake(lambda: self._admit(*who)))

        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(visitor, "127.0.0.1", self.port, backlog=4096)

    async def stop(self) -> None:
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
        timestamp = (payload["meterValue"][0] if action == "MeterValues" else payload).get("timestamp", "")
        receipt = Receipt(visit, (visit.charger_id, timestamp), message_id, action, payload, now())
        if timestamp:
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
        receipt.answered = now()
        if receipt.key[1] and self.is_refusing:
            visit.send([4, message_id, "InternalError", "", {}])
            receipt.is_refused = True
            return
        receipt.answer = accepting(receipt.action, receipt.payload)
        if receipt.action == "StartTransaction":
            receipt.answer["transactionId"] = next(self.transaction_ids)
        visit.send([3, message_id, receipt.answer])
        if receipt.key[1]:
            self.books.accepted[self.name].add(receipt.key)

    async def pause(self) -> None:
        await asyncio.sleep(around(self.luck, self.pace.fault))

    async def has(self, **trouble: int) -> None:
        """Let some of its attributes be other ones for a while."""
        before = {name: getattr(self, name) for name in trouble}
        vars(self).update(trouble)
        await self.pause()
        vars(self).update(before)


def settings_of(port: int, servers: Sequence[Server]) -> dict[str, object]:
    """Return what the ini of a proxy with this port has to say of its servers."""
    primary, secondary = (f"ws://127.0.0.1:{server.port}/ocpp" for server in servers)
    addresses = {"addr": "127.0.0.1", "port": port, "server": primary, "secondary_server": secondary}
    return {**addresses, "primary_auth": "none", "primary_rfid": "PRIM*", "secondary_rfid": "SECO*"}


# What breaks at a server.


async def stop(server: Server) -> None:
    await server.stop()
    await server.pause()
    await server.start()


async def hang(server: Server) -> None:
    """Answer nothing for a while, no handshake either; then cut all connections, or answer late."""
    server.held = []
    await server.pause()
    if server.luck.random() < 0.5:
        server.cut(list(server.visits))
    held, server.held = server.held, None
    server.busy.clear()
    for work in held:
        work()


async def reset(server: Server) -> None:
    server.cut([visit for visit in list(server.visits) if server.luck.random() < 0.5])


async def die(server: Server) -> None:
    """Book the next few Calls and cut their connections instead of answering."""
    await server.has(deaths_due=server.luck.randint(3, 10))


async def refuse(server: Server) -> None:
    """Answer every transaction message with a CallError for a while."""
    await server.has(is_refusing=True)


class Fleet:
    """All peers of a proxy, and the proxy, with what the tools look for inside it."""

    def __init__(
        self, folder: Path, chargers: int, seed: int, pace: Pace, settings: dict[str, object]
    ) -> None:
        self.pace = pace
        self.books = Books()
        self.luck = Random(f"{seed} fleet")
        self.port = free_port()  # The proxy's.
        self.plays = True  # Else chargers end their sessions, and rest.
        self.servers = [Server(name, self.books, pace, seed) for name in SERVERS]
        self.chargers = [Charger(number, self, seed) for number in range(chargers)]
        # The secondary of each fifth charger answers itself.
        names = [charger.charger_id for charger in self.chargers[::5]]
        more = "".join(f"[charger {name}]\nsecondary_replies = forward\n" for name in names)
        settings = {**settings_of(self.port, self.servers), **settings}
        self.proxy = rig.House(folder, settings, program=rig.INSIDE, more=more)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Let the servers listen and the chargers live for as long as this lasts, and the proxy no longer."""
        for server in self.servers:
            await server.start()
        async with asyncio.TaskGroup() as group:
            lives = [group.create_task(charger.live()) for charger in self.chargers]
            try:
                yield
            finally:
                for life, charger in zip(lives, self.chargers, strict=True):
                    life.cancel()
                    charger.hang_up()
                for server in self.servers:
                    await server.stop()
                await self.proxy.kill()

    async def pause(self) -> None:
        await asyncio.sleep(around(self.luck, self.pace.fault))

    def has_come_to_rest(self) -> bool:
        return all(charger.rests and charger.is_online for charger in self.chargers)


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()) if number) or "-"


def command(parser: argparse.ArgumentParser, play: Callable[[Path, Any], Coroutine[Any, Any, Any]]) -> int:
    """Play a run in a folder, print what it found, and return the exit code: 1 if there are problems."""
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="for the log and the state")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, rig.many_files():
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty; what an earlier run has left would count as lost")
        report = asyncio.run(play(folder, options))
    print(f"seed {options.seed}\n\n{report}")
    return 1 if report.problems else 0
