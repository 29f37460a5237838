"""A fleet of chargers and their two servers, light enough for hundreds of them, and what can break in it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import chain, count
from random import Random
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import accepting, deaf
from tests.proof import ledger
from tests.proof.ledger import BOOTS, PLAIN, Key, free_port

PACE_SECONDS = (1.0, 4.0)  # Between two messages of a charger.
HURRY_SECONDS = (0.1, 0.5)  # The same, in its first sessions, and when it is to end one.
HURRIED_SESSIONS = 2  # One at each server.
PATIENCE_SECONDS = 6.0  # A charger's, then it reconnects and says it again.
AGAIN_SECONDS = (0.2, 2.0)  # Until a charger tries again.
FAULT_SECONDS = (1.0, 5.0)  # How long a fault lasts that lasts.
CALLS_EVERY = 0.5  # Seconds; then each server calls CALLED_SHARE of its chargers.
CALLED_SHARE = 0.02
STRANGER = "STRANGER"  # Ids that begin so are refused by the primary.
STRANGERS = 20
MAX_SIZE = 2**16  # Bytes; the longest message that the proxy is to accept.

T = TypeVar("T")
Said = tuple[str, dict[str, Any]]  # Action and payload.
Play = Generator[Said | None, dict[str, Any], None]  # Yields what to say, gets the answers; None = rest.


def some(luck: Random, items: Sequence[T], share: float) -> list[T]:
    """Return a random share of the items, at least one if there are any."""
    return luck.sample(items, min(len(items), max(1, round(share * len(items)))))


class Books:
    """Which sessions have ended at their chargers and at their owners; forgets what has ended at both."""

    def __init__(self) -> None:
        self.owners: dict[Key, p.Peer] = {}  # Whose the stops are that have not arrived yet.
        self.heard: set[Key] = set()  # Of these, the charger knows that it is recorded.
        self.arrived: set[Key] = set()  # Of these, the owner has accepted it.
        self.counts: Counter[str] = Counter()  # Of everything that happened.

    def hear(self, stop: Key) -> None:
        self.counts["stops that their chargers know to be recorded"] += 1
        self.heard.add(stop)
        self._settle(stop)

    def accept(self, stop: Key, peer: p.Peer) -> None:
        if stop in self.arrived or stop not in self.owners:
            self.counts["stops accepted again"] += 1
            return
        at = "their owners" if peer is self.owners[stop] else "the wrong server"
        self.counts[f"stops accepted by {at}"] += 1
        self.arrived.add(stop)
        self._settle(stop)

    def _settle(self, stop: Key) -> None:
        if stop in self.heard and stop in self.arrived:
            del self.owners[stop]
            self.heard.discard(stop)
            self.arrived.discard(stop)


class Charger:
    """A charger that is always online, or tries to be, and plays one session after the other."""

    def __init__(self, number: int, fleet: Fleet, seed: int) -> None:
        self.charger_id = f"CP-{number:04}"
        self.version = "ocpp2.0.1" if number % 3 == 2 else "ocpp1.6"
        self.url = f"ws://127.0.0.1:{fleet.port}/{self.charger_id}"
        self.luck = Random(f"{seed} {number}")
        self.books = fleet.books
        self.plays = fleet.plays
        self.rests = False  # It is online and has nothing to say.
        self.may_come = asyncio.Event()
        self.may_come.set()
        self.connection: ClientConnection | None = None
        self.listener: asyncio.Task[None] | None = None  # To the newest connection.
        self.listeners = p.Tasks()
        self.waiting: dict[str, tuple[ClientConnection, asyncio.Future[list[Any]]]] = {}  # By message id.
        self.message_ids, self.ticks = count(), count()
        self.sessions = 0  # Played to their end.
        self.asked_badge = ""  # Of the last remote start.

    async def live(self) -> None:
        """Say one thing after the other, each until it is answered."""
        story = self.story()
        said = next(story)
        while True:
            try:
                connection = self.connection or await self.connect()
                answer = await self.call(connection, *said) if said else {}
            except (OSError, TimeoutError, WebSocketException):
                self.rests = False
                self.hang_up()
                await asyncio.sleep(self.luck.uniform(*AGAIN_SECONDS))
                continue
            self.rests = said is None
            said = story.send(answer)
            is_hurried = self.sessions < HURRIED_SESSIONS or not self.plays.is_set()
            pace = self.luck.uniform(*(HURRY_SECONDS if is_hurried else PACE_SECONDS))
            assert self.listener is not None
            await asyncio.wait([self.listener], timeout=pace)

    # What it says.

    def story(self) -> Play:
        while True:
            if self.plays.is_set():
                yield "Heartbeat", {}
                yield from self.session()
            else:
                yield None

    def session(self) -> Play:
        is_hurried = self.sessions < HURRIED_SESSIONS
        owner = p.SERVERS[self.sessions % 2] if is_hurried else self.luck.choice(p.SERVERS)
        badge, self.asked_badge = self.asked_badge or f"{owner.value}-{self.sessions}", ""
        owner = next(peer for peer in p.SERVERS if badge.startswith(peer.value))
        self.books.counts["sessions"] += 1
        stops_at = self.timestamp()
        self.books.owners[self.charger_id, stops_at] = owner
        play = self.session_16 if self.version == "ocpp1.6" else self.session_2
        yield from play(badge, stops_at)
        self.books.hear((self.charger_id, stops_at))
        self.sessions += 1

    def session_16(self, badge: str, stops_at: str) -> Play:
        start = {"connectorId": 1, "idTag": badge, "meterStart": 0, "timestamp": self.timestamp()}
        answer = yield "StartTransaction", start
        named = {"transactionId": answer["transactionId"]}
        for number in self.readings():
            value = [{"timestamp": self.timestamp(), "sampledValue": [{"value": str(number)}]}]
            yield "MeterValues", {"connectorId": 1, **named, "meterValue": value}
        yield "StopTransaction", {**named, "meterStop": 9, "timestamp": stops_at}

    def session_2(self, badge: str, stops_at: str) -> Play:
        kinds = chain(["Started", "Updated"], ("Updated" for _ in self.readings()), ["Ended"])
        transaction, badge_at = {"transactionId": f"T-{self.sessions}"}, self.luck.choice((0, 0, 1))
        for number, kind in enumerate(kinds):
            token = {"idToken": {"idToken": badge, "type": "ISO14443"}} if number == badge_at else {}
            at = stops_at if kind == "Ended" else self.timestamp()
            event = {"eventType": kind, "timestamp": at, "triggerReason": "MeterValuePeriodic"}
            where = {"seqNo": number, "transactionInfo": transaction, "evse": {"id": 1}}
            yield "TransactionEvent", {**event, **where, **token}

    def readings(self) -> Generator[int]:
        for number in range(self.luck.randint(0, 4)):
            if self.plays.is_set():
                yield number

    def timestamp(self) -> str:
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self.ticks))
        return at.strftime("%Y-%m-%dT%H:%M:%SZ")

    # The wire.

    async def connect(self) -> ClientConnection:
        """Open a connection, whatever becomes of an older one, and boot."""
        await self.may_come.wait()
        self.books.counts["connections of chargers"] += 1
        versions = [Subprotocol(self.version)]
        connection = await connect(self.url, subprotocols=versions, proxy=None, close_timeout=1, **PLAIN)
        self.connection = connection
        self.listener = self.listeners.start(self._listen(connection), self.charger_id)
        await self.call(connection, "BootNotification", BOOTS[self.version])
        status = {"connectorId": 1, "evseId": 1, "status": "Available", "connectorStatus": "Available"}
        await self.call(connection, "StatusNotification", status)
        return connection

    async def call(self, connection: ClientConnection, action: str, payload: dict[str, Any]) -> Any:
        """Send a Call; return its answer's payload. Raises OSError, TimeoutError or ConnectionClosed."""
        message_id = f"{self.charger_id}-{next(self.message_ids)}"
        answer = asyncio.get_running_loop().create_future()
        self.waiting[message_id] = connection, answer
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await connection.send(json.dumps([2, message_id, action, payload]))
                kind, _, *rest = await answer
        finally:
            del self.waiting[message_id]
        if kind != 3:
            raise ConnectionError(f"{action}: {rest}")
        return rest[0]

    async def _listen(self, connection: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            async for text in connection:
                await self._hear(connection, json.loads(text))
        if self.connection is connection:
            self.connection, self.rests = None, False
        for used, answer in self.waiting.values():
            if used is connection and not answer.done():
                answer.set_result([None, "", "the connection was lost"])

    async def _hear(self, connection: ClientConnection, message: list[Any]) -> None:
        if message[0] != 2:
            _, answer = self.waiting.get(message[1], (None, None))
            if answer and not answer.done():
                answer.set_result(message)
            return
        _, message_id, action, payload = message
        if action in ("RemoteStartTransaction", "RequestStartTransaction"):
            self.asked_badge = payload.get("idTag") or payload["idToken"]["idToken"]
        await connection.send(json.dumps([3, message_id, {"status": "Accepted"}]))

    def write(self, data: bytes) -> None:
        """Send what no library would."""
        if self.connection:
            self.connection.transport.write(data)

    def hang_up(self) -> None:
        if self.connection:
            self.connection.transport.abort()
        self.connection = None


def calls_of(peer: p.Peer, version: str, number: int) -> list[Said]:
    """Return what a server asks of a charger."""
    badge = f"{peer.value}-remote-{number}"
    if version != "ocpp1.6":
        token = {"idToken": badge, "type": "ISO14443"}
        return [
            ("RequestStartTransaction", {"idToken": token, "remoteStartId": number}),
            ("GetLog", {"requestId": number, "logType": "SecurityLog", "log": {"remoteLocation": "ftp://x"}}),
            ("TriggerMessage", {"requestedMessage": "Heartbeat"}),
        ]
    until = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    return [
        ("ReserveNow", {"connectorId": 1, "idTag": badge, "reservationId": number, "expiryDate": until}),
        ("CancelReservation", {"reservationId": number}),
        ("RemoteStartTransaction", {"idTag": badge}),
        ("GetDiagnostics", {"location": "ftp://x"}),
        ("ChangeConfiguration", {"key": "HeartbeatInterval", "value": "300"}),
        ("TriggerMessage", {"requestedMessage": "Heartbeat"}),
    ]


class Server(ledger.Server):
    """A server that accepts everything, calls chargers, and misbehaves when told to."""

    def __init__(self, peer: p.Peer, books: Books, seed: int) -> None:
        super().__init__(peer, asyncio.Event())
        self.books = books
        self.luck = Random(f"{seed} {peer.value}")
        self.refusal = 0  # An HTTP status; 0 = handshakes are welcome.
        self.trouble = asyncio.Lock()  # One at a time.
        self.numbers = count(1)

    async def start(self) -> None:
        options = {"process_request": self._admit, "close_timeout": 1, **PLAIN}
        versions = [Subprotocol(version) for version in BOOTS]
        self.listener = await serve(self._talk, "127.0.0.1", self.port, subprotocols=versions, **options)

    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.books.counts["connections to servers"] += 1
        await self.awake.wait()
        status = HTTPStatus.UNAUTHORIZED if STRANGER in request.path else self.refusal
        return connection.respond(HTTPStatus(status), "refused") if status else None

    async def _take(self, visit: ledger.Visit, message: list[Any]) -> None:
        """Answer a Call."""
        if message[0] != 2:
            return
        await self.awake.wait()
        _, message_id, action, payload = message
        answer = accepting(action, payload)
        if action == "StartTransaction":
            answer["transactionId"] = next(self.transaction_ids)
        await visit.connection.send(json.dumps([3, message_id, answer]))
        if action == "StopTransaction" or payload.get("eventType") == "Ended":
            self.books.accept((visit.charger_id, payload["timestamp"]), self.peer)

    async def call_some(self, share: float) -> None:
        """Call some of the chargers, each with one thing; all of them with everything."""
        for visit in some(self.luck, list(self.visits), share):
            calls = calls_of(self.peer, visit.connection.subprotocol, next(self.numbers))
            for call in calls if share == 1 else [self.luck.choice(calls)]:
                with suppress(ConnectionClosed, TimeoutError):
                    async with asyncio.timeout(1):
                        await visit.connection.send(json.dumps([2, f"s{next(self.numbers)}", *call]))

    async def call_on(self) -> None:
        """Call some of the chargers again and again."""
        while True:
            await asyncio.sleep(CALLS_EVERY)
            await self.call_some(CALLED_SHARE)


class Fleet:
    """All peers of a proxy."""

    def __init__(self, chargers: int, seed: int) -> None:
        self.luck = Random(f"{seed} faults")
        self.port = free_port()  # The proxy's.
        self.books = Books()
        self.plays = asyncio.Event()  # Cleared: chargers end their sessions and rest.
        self.servers = [Server(peer, self.books, seed) for peer in p.SERVERS]
        self.chargers = [Charger(number, self, seed) for number in range(chargers)]

    @property
    def is_quiet(self) -> bool:
        """Whether everybody is online and everything is said and delivered."""
        is_complete = all(len(server.visits) == len(self.chargers) for server in self.servers)
        return is_complete and not self.books.owners and all(charger.rests for charger in self.chargers)

    @property
    def fewest_sessions(self) -> int:
        return min(charger.sessions for charger in self.chargers)

    def missing(self) -> list[str]:
        """Say who is offline and what has not arrived."""
        lines = [f"{charger.charger_id} does not rest" for charger in self.chargers if not charger.rests]
        lines += [f"{server.peer.value} has {len(server.visits)} connections" for server in self.servers]
        return lines + [f"the stop of {stop} is not recorded" for stop in self.books.owners]

    # What faults need.

    def some(self, share: float) -> list[Charger]:
        return some(self.luck, [charger for charger in self.chargers if charger.connection], share)

    def nonsense(self) -> str:
        self.books.counts["nonsense"] += 1
        return self.luck.choice(NONSENSE)

    async def pause(self) -> None:
        await asyncio.sleep(self.luck.uniform(*FAULT_SECONDS))

    @asynccontextmanager
    async def server_in_trouble(self) -> AsyncIterator[Server]:
        """Yield one of the servers, once it has no other trouble."""
        server = self.luck.choice(self.servers)
        async with server.trouble:
            yield server


# ---------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------

# Frames of a client whose mask changes nothing.
MASK = bytes(4)
TEXT = b"\x81\x96" + MASK + b'[2,"f","Heartbeat",{}]'
PING = b"\x89\xfd" + MASK + bytes(125)
FRAGMENTS = b"\x01\x80" + MASK + (b"\x00\x80" + MASK) * 10_000
BINARY = b"\x82\x80" + MASK
NO_UTF_8 = b"\x81\x81" + MASK + b"\xff"
TOO_LARGE = b"\x81\xff" + (MAX_SIZE + 1).to_bytes(8, "big") + MASK + b" " * (MAX_SIZE + 1)
ENDLESS = b"\x81\xff\x7f" + b"\xff" * 7 + MASK
NONSENSE = ["", "{", "[]", "null", "[2]", '[2,"m"]', '[2,"m","Heartbeat",[]]', '[9,"m","X",{}]', "[" * 5000]
NONSENSE += ['[3,"never asked",{}]', '[4,"never asked","","",{}]', '[2,"m","X",{"a":NaN}]', f"[{'9' * 5000}]"]
NONSENSE += ['[2,"m","X",' + '{"a":' * 200 + "1" + "}" * 200 + "]", '[2,"m","\\ud800",{}]', "\x00\x1b[2J\r\n"]
BEGINNINGS = [b"", b"G", b"GET /CP-0001 HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01"]  # Of handshakes.


async def reset_chargers(fleet: Fleet) -> None:
    """Cut the connections of some chargers, or of all."""
    for charger in fleet.some(fleet.luck.choice((0.1, 0.5, 1.0))):
        charger.hang_up()


async def reset_server(fleet: Fleet) -> None:
    """Cut some connections of a server, or all."""
    server = fleet.luck.choice(fleet.servers)
    server.cut(some(fleet.luck, list(server.visits), fleet.luck.choice((0.1, 0.5, 1.0))))


async def stop_server(fleet: Fleet) -> None:
    """Let a server be away for a while."""
    async with fleet.server_in_trouble() as server:
        await server.stop()
        await fleet.pause()
        await server.start()


async def hang_server(fleet: Fleet) -> None:
    """Let a server answer nothing for a while, no handshake either."""
    async with fleet.server_in_trouble() as server:
        server.awake.clear()
        await fleet.pause()
        server.awake.set()


async def deafen_server(fleet: Fleet) -> None:
    """Let a server read nothing for a while."""
    async with fleet.server_in_trouble() as server, AsyncExitStack() as stack:
        for visit in list(server.visits):
            await stack.enter_async_context(deaf(visit.connection))
        await fleet.pause()


async def refuse_handshakes(fleet: Fleet) -> None:
    """Let a server refuse handshakes for a while; cut some connections, so that there are handshakes."""
    async with fleet.server_in_trouble() as server:
        server.refusal = fleet.luck.choice((401, 403, 500, 503))
        server.cut(some(fleet.luck, list(server.visits), 0.3))
        await fleet.pause()
        server.refusal = 0


async def babble(fleet: Fleet) -> None:
    """Let some chargers, and a server on some connections, send nonsense."""
    server = fleet.luck.choice(fleet.servers)
    ends = [visit.connection for visit in some(fleet.luck, list(server.visits), 0.05)]
    ends += [charger.connection for charger in fleet.some(0.05)]
    for end in ends:
        with suppress(ConnectionClosed):
            await end.send(fleet.nonsense())


async def break_rules(fleet: Fleet) -> None:
    """Let some chargers send what nobody may send on a websocket."""
    for charger in fleet.some(0.04):
        charger.write(fleet.luck.choice((FRAGMENTS, BINARY, NO_UTF_8, TOO_LARGE, ENDLESS)))


async def flood(fleet: Fleet) -> None:
    """Let some chargers send Calls or Pings without end, some of them without reading the answers."""
    async with AsyncExitStack() as stack:
        for charger in fleet.some(0.008):
            if charger.connection and fleet.luck.random() < 0.7:
                await stack.enter_async_context(deaf(charger.connection))
            charger.write(fleet.luck.choice((TEXT * 5_000, PING * 30_000)))
        await fleet.pause()


async def connect_halfway(fleet: Fleet) -> None:
    """Open connections and say nothing on them, or the beginning of a handshake."""
    writers = []
    with suppress(OSError):
        for _ in range(fleet.luck.randint(50, 200)):
            _, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
            writer.write(fleet.luck.choice(BEGINNINGS))
            writers.append(writer)
    fleet.books.counts["connections without a handshake"] += len(writers)
    await fleet.pause()
    for writer in writers:
        writer.transport.abort()


async def take_over(fleet: Fleet) -> None:
    """Let some chargers connect while their old connections stand."""

    async def connect_again(charger: Charger) -> None:
        with suppress(OSError, TimeoutError, WebSocketException):
            await charger.connect()

    await asyncio.gather(*map(connect_again, fleet.some(0.1)))


async def deafen_chargers(fleet: Fleet) -> None:
    """Let some chargers read nothing for a while."""
    async with AsyncExitStack() as stack:
        for charger in fleet.some(0.1):
            if charger.connection:
                await stack.enter_async_context(deaf(charger.connection))
        await fleet.pause()


async def leave(fleet: Fleet) -> None:
    """Let some chargers go away for a while, whatever they are at."""
    chargers = fleet.some(0.1)
    for charger in chargers:
        charger.may_come.clear()
        charger.hang_up()
    await fleet.pause()
    for charger in chargers:
        charger.may_come.set()


async def knock(fleet: Fleet) -> None:
    """Let strangers ask to come in, some of them again and again."""
    for _ in range(50):
        fleet.books.counts["strangers"] += 1
        url = f"ws://127.0.0.1:{fleet.port}/{STRANGER}-{fleet.luck.randrange(STRANGERS)}"
        with suppress(OSError, TimeoutError, WebSocketException):
            async with connect(url, proxy=None, **PLAIN):
                fleet.books.counts["strangers let in"] += 1


Fault = Callable[[Fleet], Coroutine[Any, Any, None]]
FAULTS: list[Fault] = [reset_chargers, reset_server, stop_server, hang_server, deafen_server]
FAULTS += [refuse_handshakes, babble, break_rules, flood, connect_halfway, take_over, deafen_chargers]
FAULTS += [leave, knock]
