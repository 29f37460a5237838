"""A websocket as bare as it gets, light enough for thousands, and frames that no library would send."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from websockets.utils import accept_key, apply_mask

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # Opcodes.
MASK = bytes.fromhex("37fa213d")
UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\n"
REQUEST = (
    f"GET /{{}} HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}Sec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Protocol: {}\r\n\r\n"
)
WELCOME = (
    f"HTTP/1.1 101 Switching Protocols\r\n{UPGRADE}"
    "Sec-WebSocket-Accept: {}\r\nSec-WebSocket-Protocol: {}\r\n\r\n"
)


def framed(payload: bytes, opcode: int = TEXT, key: bytes = b"") -> bytes:
    size = len(payload)
    wide = 0 if size < 126 else 2 if size < 2**16 else 8
    second = (0x80 if key else 0) | {0: size, 2: 126, 8: 127}[wide]
    head = bytes([0x80 | opcode, second]) + (size.to_bytes(wide, "big") if wide else b"")
    return head + key + (apply_mask(payload, key) if key else payload)


def unframed(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return opcode and payload of each complete frame, and what is left."""
    frames, at = [], 0
    while at + 2 <= len(data):
        second = data[at + 1]
        size, head = second & 127, at + 2
        if size > 125:
            wide = 2 if size == 126 else 8
            size, head = int.from_bytes(data[head : head + wide], "big"), head + wide
        start = head + 4 if second & 128 else head
        if start + size > len(data):
            break
        payload = data[start : start + size]
        frames.append((data[at] & 15, apply_mask(payload, data[head:start]) if second & 128 else payload))
        at = start + size
    return frames, data[at:]


def texts(data: bytes) -> list[bytes]:
    return [payload for opcode, payload in unframed(data)[0] if opcode == TEXT]


class Socket(asyncio.Protocol):
    """One end of a websocket; whoever calls waits for the answer, and everything else that comes is heard."""

    def __init__(
        self,
        hear: Callable[[Socket, bytes], None],
        request: str = "",
        admit: Callable[[Socket, str], None] | None = None,
    ) -> None:
        self.hear = hear  # Gets what is no answer to a Call of ours.
        self.request = request  # What a client begins with.
        self.admit = admit  # A server's: accepts or refuses the client that asks for a path.
        self.key = MASK if request else b""
        self.data = b""  # What is not complete yet.
        self.head = ""  # Of the other end.
        self.is_open = False
        self.waiting: dict[str, asyncio.Future[list[Any]]] = {}  # For answers, by message id.
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        transport.write(self.request.encode())

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.is_open:
            self._take()
        elif not self.head and b"\r\n\r\n" in self.data:
            head, _, self.data = self.data.partition(b"\r\n\r\n")
            self.head = head.decode(errors="replace")
            if self.admit:
                self.admit(self, self.head.split()[1])
            elif " 101 " in self.head:
                self._open()

    def accept(self) -> None:
        """Let the client in, in the first version that it offers."""
        key, self.version = (
            match[1] if (match := re.search(f"(?i){name}: *([^\\s,]+)", self.head)) else ""
            for name in ("sec-websocket-key", "sec-websocket-protocol")
        )
        self.transport.write(WELCOME.format(accept_key(key), self.version).encode())
        self._open()

    def refuse(self, status: int) -> None:
        self.transport.write(f"HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\n\r\n".encode())
        self.transport.close()

    def _open(self) -> None:
        self.is_open = True
        self.opened.set_result(None)
        self._take()

    def _take(self) -> None:
        frames, self.data = unframed(self.data)
        for opcode, payload in frames:
            if opcode == TEXT and payload[:3] in (b"[3,", b"[4,"):
                answer = json.loads(payload)
                if (waiting := self.waiting.get(answer[1])) and not waiting.done():
                    waiting.set_result(answer)
            elif opcode == TEXT:
                self.hear(self, payload)
            elif opcode in (PING, CLOSE):
                self.transport.write(framed(payload, PONG if opcode == PING else CLOSE, self.key))
                if opcode == CLOSE:
                    self.transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_open = False
        self.closed.set_result(None)
        futures: list[asyncio.Future[Any]] = [self.opened, *self.waiting.values()]
        for future in futures:
            if not future.done():
                future.set_exception(ConnectionResetError(self.head.partition("\r\n")[0] or "no answer"))
        self.opened.exception()  # Whoever did not wait for it does not miss it.

    def send(self, message: Any) -> None:
        """Send a text, or a message as JSON."""
        text = message if isinstance(message, str) else json.dumps(message)
        if self.is_open:
            self.transport.write(framed(text.encode(), TEXT, self.key))

    async def ask(self, message_id: str, frame: bytes) -> list[Any]:
        """Send a Call that is framed already; return its answer. Raises ConnectionError."""
        if not self.is_open:
            raise ConnectionResetError("it is closed")
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.waiting[message_id] = answer
        self.transport.write(frame)
        try:
            return await answer
        finally:
            del self.waiting[message_id]

    async def call(self, message_id: str, action: str, payload: dict[str, Any]) -> list[Any]:
        text = json.dumps([2, message_id, action, payload])
        return await self.ask(message_id, framed(text.encode(), TEXT, self.key))

    def close(self) -> None:
        self.transport.write(framed((1001).to_bytes(2, "big"), CLOSE, self.key))
        self.transport.close()


async def connected(port: int, path: str, version: str, hear: Callable[[Socket, bytes], None]) -> Socket:
    """Return a client's end once it is open. Raises OSError, also for a refusal."""
    request = REQUEST.format(path, version)
    loop = asyncio.get_running_loop()
    _, end = await loop.create_connection(lambda: Socket(hear, request), "127.0.0.1", port)
    try:
        await end.opened
    except BaseException:
        end.transport.abort()
        raise
    return end
