"""What plays at the proxy's doors share: handshakes by hand, the command as a process, what the log says."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, charger, eventually, refusal

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "ocpp_2w_proxy.py")
LOCAL_SERVER = "[ext-server]\nserver = local\n"
LOCAL = f"[host]\naddr = 127.0.0.1\nport = 0\n{LOCAL_SERVER}"
V16 = [Subprotocol("ocpp1.6")]
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch

# The bounds that a play may make smaller, and what the script calls them.
BOUNDS = {
    "seconds_to_accept": "DIAL_SECONDS",
    "seconds_to_ask": "HANDSHAKE_SECONDS",
    "seconds_to_pong": "PROBE_SECONDS",
    "seconds_to_close": "CLOSE_SECONDS",
    "seconds_after_a_wrong_login": "WRONG_LOGIN_SECONDS",
    "unread": "MAX_WRITE_BUFFER",
    "half_open": "MAX_HALF_OPEN",
    "memories": "MAX_MEMORIES",
    "subjects": "MAX_SUBJECTS",
    "seconds_between_lines": "COMPLAINT_SECONDS",
}


def smaller(monkeypatch: Patch, **bounds: float) -> None:
    """Let these bounds be smaller for a play."""
    for name, value in bounds.items():
        monkeypatch.setattr(p, BOUNDS[name], value)


# Handshakes.


def login(user: str, password: bytes | str) -> str:
    shown = password.encode() if isinstance(password, str) else password
    return "Basic " + base64.b64encode(user.encode() + b":" + shown).decode()


async def refused(proxy: p.Proxy, charger_id: str = "CP1", **options: Any) -> tuple[int, dict[str, str]]:
    status, headers = await refusal(proxy.port, charger_id, **options)
    assert status != 101
    return status, headers


def request(path: str = "CP1", *more: str) -> bytes:
    lines = [f"GET /{path} HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==", *more, "", ""]
    return "\r\n".join(lines).encode()


class Visitor:
    """Somebody who says bytes at the proxy's port, as he likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def says(self, data: bytes) -> None:
        self.writer.write(data)

    async def hears_until(self, words: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(words)

    async def hears(self) -> bytes:
        """Return all that comes until the proxy hangs up, with or without a reset."""
        heard = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                while piece := await self.reader.read(2**16):
                    heard += piece
        return heard

    async def status(self) -> int:
        return int((await self.hears_until(b"\r\n\r\n")).split()[1])

    async def close_code(self) -> int:
        """Return the code of the Close frame that comes, past the Pings."""
        heard = await self.hears()
        return int.from_bytes(heard[heard.index(0x88) + 2 :][:2])


@asynccontextmanager
async def visitor(proxy: p.Proxy | int, data: bytes = b"", **options: Any) -> AsyncIterator[Visitor]:
    """Somebody at the port who begins with these bytes."""
    port = proxy if isinstance(proxy, int) else proxy.port
    guest = Visitor(*await asyncio.open_connection("127.0.0.1", port, **options))
    guest.says(data)
    try:
        yield guest
    finally:
        guest.writer.transport.abort()


async def at_the_door(proxy: p.Proxy, count: int = 1) -> None:
    """Wait until so many handshakes are under way; 0: until all have been answered or cut."""
    await eventually(lambda: len(proxy.handshakes) == count)


def unheard(proxy: p.Proxy) -> int:
    """Return how many bytes the proxy holds of those whose handshake is not answered; -1: nobody is there."""
    return max((len(link.rest) for link in proxy.handshakes), default=-1)


@asynccontextmanager
async def stranger(words: bytes | None) -> AsyncIterator[int]:
    """Somebody at a port who answers what comes with these words and hangs up; None: who never answers."""
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(2**16)
        if words is None:
            await gone.wait()
        writer.write(words or b"")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as listener:
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            gone.set()


def sockets(proxy: p.Proxy, charger_id: str = "CP1") -> list[Any]:
    """Return the sockets of a charger's connections: its own, and those to its servers."""
    links = proxy.relays[charger_id].links()
    return [link.transport.get_extra_info("socket") for link in links if link.transport]


def known(proxy: p.Proxy) -> list[str]:
    """Return the ids of the chargers that the proxy does something for."""
    return list(proxy.relays)


def present(proxy: p.Proxy) -> list[str]:
    return [charger_id for charger_id, relay in proxy.relays.items() if relay.link]


def open_connections(fake: Any) -> int:
    return sum(connection.state.name == "OPEN" for connection in fake.connections)


# What the log says.


def told(caplog: Log, *words: str) -> list[str]:
    return [line for line in caplog.messages if all(word in line for word in words)]


def has_traceback(caplog: Log) -> bool:
    """Whether anything went wrong that nobody had foreseen."""
    return any(record.exc_info for record in caplog.records)


def as_logged(text: str, is_full: bool = False) -> str:
    """Return the text as it stands in the log, where badges are masked or, if the ini says so, in full."""
    redactor = p.Redactor()
    redactor.full_badges = is_full
    return redactor.clean(text)


# The command.


def run(*arguments: str, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        command_line, cwd=cwd, capture_output=True, text=True, timeout=20, check=False, **options
    )


async def check(folder: Path, ini: str, *arguments: str) -> tuple[int, str]:
    """Run `--check` with this ini; return its exit code and what it says."""
    (folder / "ocpp-2w-proxy.ini").write_text(ini)
    done = await asyncio.to_thread(run, "--check", *arguments, cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@asynccontextmanager
async def command(
    ini: str, folder: Path, stderr: int | None = None, before: tuple[str, ...] = (sys.executable,)
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command, serving, without a second port unless the ini names one; killed if it has not ended."""
    without_status = "" if "[status]" in ini else "[status]\nport = 0\n"
    (folder / "ocpp-2w-proxy.ini").write_text(ini + without_status)
    process = await asyncio.create_subprocess_exec(
        *before, SCRIPT, cwd=folder, stderr=asyncio.subprocess.PIPE if stderr is None else stderr
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def line_with(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while line := await process.stderr.readline():
            if words in line.decode():
                return line.decode()
    raise AssertionError(f"stderr ended without {words!r}")


async def port_of(process: asyncio.subprocess.Process) -> int:
    port = re.search(r":(\d+)/", await line_with(process, "listens on"))
    assert port is not None
    return int(port[1])


charger_at = partial(charger, additional_headers={})  # Connected to the command's port, without a login.
