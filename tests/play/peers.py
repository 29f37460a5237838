"""Real websockets around a real proxy, all on free ports of the loopback; every wait is bounded."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.planted import CHARGER_LOGIN
from tests.play.plays import config_of

PATIENCE = 10.0  # Seconds; for anything that must happen.
VERSIONS = [Subprotocol("ocpp1.6"), Subprotocol("ocpp2.0.1"), Subprotocol("ocpp2.1")]

Answers = Callable[[str, dict[str, Any]], dict[str, Any]]


def free_port() -> int:
    """Return a free port that no outgoing connection takes while its server is down."""
    while True:
        port = random.randrange(20_000, 32_000)  # Below the range that Linux takes its own from.
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def accepting(action: str, _: dict[str, Any]) -> dict[str, Any]:
    """Answer a Call of a charger as a server does that accepts everything."""
    answers: dict[str, dict[str, Any]] = {
        "BootNotification": {"status": "Accepted", "currentTime": "2026-01-01T00:00:00Z", "interval": 300},
        "Heartbeat": {"currentTime": "2026-01-01T00:00:00Z"},
        "Authorize": {"idTagInfo": {"status": "Accepted"}},
        "StartTransaction": {"transactionId": 7, "idTagInfo": {"status": "Accepted"}},
    }
    return answers.get(action, {})


class Hearing:
    """What a peer has heard, in order."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.changed = asyncio.Condition()

    async def add(self, message: Any) -> None:
        async with self.changed:
            self.messages.append(message)
            self.changed.notify_all()

    async def until(self, is_wanted: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(PATIENCE), self.changed:
            while not any(map(is_wanted, self.messages)):
                await self.changed.wait()
        return next(filter(is_wanted, self.messages))

    async def call(self, action: str) -> list[Any]:
        message: list[Any] = await self.until(lambda m: m[0] == 2 and m[2] == action)
        return message

    async def answer(self, message_id: str) -> list[Any]:
        message: list[Any] = await self.until(lambda m: m[0] in (3, 4) and m[1] == message_id)
        return message

    def actions(self) -> list[str]:
        return [message[2] for message in self.messages if message[0] == 2]


class FakeServer:
    """A server that notes everything and answers as it is told, or misbehaves on request."""

    def __init__(
        self, answers: Answers | None = accepting, versions: list[Subprotocol] = VERSIONS, place: Any = None
    ) -> None:
        self.answers = answers  # None: it never answers.
        self.place = place  # A Place of the rig; None = here.
        self.versions = versions
        self.heard = Hearing()
        self.requests: list[Request] = []
        self.connections: list[ServerConnection] = []
        self.may_answer = asyncio.Event()  # Until it is set, handshakes wait.
        self.may_answer.set()
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.one_connection_per_charger = False
        self.server: Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://{self.place.address if self.place else '127.0.0.1'}:{self.port}/ocpp"

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        here: dict[str, Any] = {"host": "127.0.0.1", "port": self.port}
        self.server = await serve(
            self._talk,
            **({"sock": self.place.socket(self.port)} if self.place else here),
            process_request=self._process_request,
            subprotocols=self.versions or None,
            ssl=context,
            ping_interval=None,
            close_timeout=0.5,
        )
        self.port = next(iter(self.server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self.server:
            self.server.close()
            await self.server.wait_closed()
            self.server = None

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        await self.may_answer.wait()
        refusal = self.refusal
        if self.one_connection_per_charger and any(c.state is not c.state.CLOSED for c in self.connections):
            refusal = (409, {})
        if refusal and not refusal[0]:  # A reset.
            connection.transport.abort()
        elif refusal:
            response = connection.respond(HTTPStatus(refusal[0]), "refused\n")
            for name, value in refusal[1].items():
                response.headers[name] = value
            return response
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        with suppress(ConnectionClosed):
            async for text in connection:
                message = json.loads(text)
                await self.heard.add(message)
                if message[0] == 2 and self.answers:
                    await connection.send(json.dumps([3, message[1], self.answers(message[2], message[3])]))

    async def connection(self, number: int = 0) -> ServerConnection:
        await eventually(lambda: len(self.connections) > number)
        return self.connections[number]

    async def calls(self, message_id: str, action: str, **payload: Any) -> None:
        await self.connections[-1].send(json.dumps([2, message_id, action, payload]))


class FakeCharger:
    """A charger on a real websocket; notes everything that it hears."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.heard = Hearing()
        self.listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        with suppress(ConnectionClosed):
            async for text in self.connection:
                await self.heard.add(json.loads(text))

    async def calls(self, message_id: str, action: str, **payload: Any) -> Any:
        await self.connection.send(json.dumps([2, message_id, action, payload]))
        return (await self.heard.answer(message_id))[2]

    async def boots(self) -> Any:
        return await self.calls("boot", "BootNotification", chargePointVendor="V", chargePointModel="M")

    async def starts(
        self,
        badge: str,
        message_id: str = "start",
        connector: int = 1,
        meter: int = 0,
        when: str = "2026-01-01T00:00:00Z",
    ) -> int:
        """Start a session; return the transaction id."""
        start = {"connectorId": connector, "idTag": badge, "meterStart": meter, "timestamp": when}
        transaction_id: int = (await self.calls(message_id, "StartTransaction", **start))["transactionId"]
        return transaction_id

    async def stops(self, badge: str, number: int, meter: int = 5) -> None:
        told = {
            "transactionId": number,
            "idTag": badge,
            "meterStop": meter,
            "timestamp": "2026-01-01T01:00:00Z",
        }
        await self.calls(f"stop {badge}", "StopTransaction", **told)

    async def ends(self, badge: str, number: int, connector: int = 1) -> None:
        """Read the meter and stop the session."""
        told = {"connectorId": connector, "transactionId": number, "meterValue": []}
        await self.calls(f"meter {badge}", "MeterValues", **told)
        await self.stops(badge, number)

    async def charges(self, badge: str, connector: int = 1) -> None:
        number = await self.starts(badge, f"start {badge}", connector)
        await self.ends(badge, number, connector)

    async def closed(self) -> int | None:
        async with asyncio.timeout(PATIENCE):
            await self.connection.wait_closed()
        return self.connection.close_code


async def connected(
    port: int, charger_id: str, versions: list[str] | None = None, at: str = "127.0.0.1", **options: Any
) -> ClientConnection:
    """Return a charger's websocket. Raises InvalidStatus for a refusal."""
    url = f"{'wss' if 'ssl' in options else 'ws'}://{at}:{port}/{charger_id}"
    offered = [Subprotocol(version) for version in versions or ["ocpp1.6"]]
    options = {"ping_interval": None, "close_timeout": 0.5, **options}
    return await connect(url, subprotocols=offered, **options)


@asynccontextmanager
async def charger(
    proxy: Any, charger_id: str = "CP1", versions: list[str] | None = None, **options: Any
) -> AsyncIterator[FakeCharger]:
    """A charger that is connected to the proxy, to whatever has its port, or to a port; closed in the end."""
    options = {"additional_headers": {"Authorization": CHARGER_LOGIN}, **options}
    port = proxy if isinstance(proxy, int) else proxy.port
    fake = FakeCharger(await connected(port, charger_id, versions, **options))
    try:
        yield fake
    finally:
        await fake.connection.close()
        await fake.listener


async def refusal(port: int, charger_id: str = "CP1", **options: Any) -> tuple[int, dict[str, str]]:
    """Return status and headers that refuse a charger; 101 if it gets in."""
    try:
        connection = await connected(port, charger_id, **options)
    except InvalidStatus as error:
        return error.response.status_code, dict(error.response.headers.raw_items())
    await connection.close()
    return 101, {}


@asynccontextmanager
async def server(
    answers: Answers | None = accepting, context: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[FakeServer]:
    fake = FakeServer(answers, **options)
    await fake.start(context)
    try:
        yield fake
    finally:
        await fake.stop()


@asynccontextmanager
async def running(ini: str, state: Path | None = None) -> AsyncIterator[p.Proxy]:
    """A proxy with this ini on a free port, with a state file or without."""
    journal = p.Journal.open(state, p.current_instant) if state else None
    proxy = p.Proxy(config_of(f"[host]\naddr = 127.0.0.1\nport = 0\n{ini}"), journal)
    await proxy.start()
    try:
        yield proxy
    finally:
        if not proxy.journal.is_closed:
            await proxy.stop()


@asynccontextmanager
async def house(
    more: str = "", host: str = "", state: Path | None = None
) -> AsyncIterator[tuple[p.Proxy, FakeServer, FakeServer]]:
    """A proxy between a primary (badges PRIM*) and a secondary (badges SECO*)."""
    async with server() as primary, server() as secondary:
        ini = f"""{host}
[ext-server]
server = {primary.url}
secondary_server = {secondary.url}
primary_rfid = PRIM*
secondary_rfid = SECO*
{more}"""
        async with running(ini, state) as proxy:
            yield proxy, primary, secondary


async def eventually(is_true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is so; for state that has no event of its own."""
    async with asyncio.timeout(seconds):
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def cut(connection: Connection) -> None:
    """Cut a connection with a reset, without a word."""
    connection.transport.abort()


@asynccontextmanager
async def deaf(*ends: Any) -> AsyncIterator[None]:
    """Let peers read nothing for a while."""
    for end in ends:
        end.transport.pause_reading()
    try:
        yield
    finally:
        for end in ends:
            if not end.transport.is_closing():
                end.transport.resume_reading()
