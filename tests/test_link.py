"""One websocket: frames as TCP cuts them, what ends a connection and no other, and the bounds of each."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any
from unittest.mock import patch

import pytest
import websockets.frames
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from tests.play.peers import PATIENCE, charger, deaf, eventually, house, running, server
from tests.play.wires import LOCAL_SERVER, Log, Patch, known, request, smaller, sockets, told, visitor

EDGES = [60, 125, 126, 127, 1000, 2**16 - 1, 2**16, 2**16 + 1]  # Where a frame's head changes its form.


def call(message_id: str, length: int = 60) -> str:
    """Return a Call of so many bytes."""
    head = f'[2,"{message_id}","DataTransfer",{{"vendorId":"ä'
    return head + "x" * (length - len(head.encode()) - 3) + '"}]'


@st.composite
def pieces(draw: st.DrawFn, texts: list[str], is_masked: bool) -> list[bytes]:
    """The texts as they come in: whole or in fragments, between Pings, and cut anywhere by TCP."""
    stream = b""
    for text in texts:
        data = text.encode()
        ends = [*sorted(draw(st.lists(st.integers(1, len(data) - 1), max_size=2))), len(data)]
        for start, end in zip([0, *ends], ends, strict=False):
            opcode = Opcode.CONT if start else Opcode.TEXT
            stream += Frame(Opcode.PING, b"p").serialize(mask=is_masked) * draw(st.integers(0, 1))
            stream += Frame(opcode, data[start:end], end == len(data)).serialize(mask=is_masked)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


async def play(is_charger: bool, texts: list[str], stream: list[bytes]) -> None:
    """Let the charger or its primary send a stream, and the other hear the texts, and answer them."""
    calls = [json.loads(text) for text in texts]
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        primary.answers = lambda _, payload: payload
        connection = cp.connection if is_charger else primary.connections[0]
        for piece in stream:
            connection.transport.write(piece)
            await asyncio.sleep(0)  # The proxy reads it.
        for call in calls:
            _, message_id, _, payload = call
            if not is_charger:
                assert await cp.heard.until(lambda m, call=call: m[1] == call[1]) == call  # type: ignore[misc]
                await cp.connection.send(json.dumps([3, message_id, payload]))
            speaker = cp if is_charger else primary
            assert await speaker.heard.answer(message_id) == [3, message_id, payload]
        hearer = primary if is_charger else cp
        assert [message for message in hearer.heard.messages if message[0] == 2] == calls


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), st.lists(st.sampled_from(EDGES), min_size=1, max_size=5))
def test_texts_are_heard_whole_once_and_in_order(
    data: st.DataObject, is_charger: bool, sizes: list[int]
) -> None:
    """Whatever their lengths, however TCP cuts them; the library reads the frames of their answers."""
    texts = [call(f"n{number}", size) for number, size in enumerate(sizes)]
    asyncio.run(play(is_charger, texts, data.draw(pieces(texts, is_masked=is_charger))))


@pytest.mark.parametrize(
    ("behind", "code"),
    [
        (Frame(Opcode.TEXT, b"").serialize(mask=True), 1002),
        (Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 5000, 1009),
        (b"\x80\xff" + (2**62).to_bytes(8, "big") + b"mask", 1009),
        (b"\x80\x04four", 1002),
    ],
)
async def test_a_message_that_never_ends_closes_its_sender(behind: bytes, code: int) -> None:
    """Another in its midst, fragments for ever, 2^62 bytes that are not waited for, no mask."""
    async with running(LOCAL_SERVER) as proxy, visitor(proxy, request()) as guest:
        assert await guest.status() == 101
        guest.says(Frame(Opcode.TEXT, b"begun", fin=False).serialize(mask=True) + behind)
        assert await guest.close_code() == code


async def test_masks_are_not_used_twice() -> None:
    """Each frame to a server has a mask of its own that nobody can guess (RFC 6455 5.3)."""
    masks, apply_mask = list[bytes](), vars(websockets.frames)["apply_mask"]

    def noting(data: Any, mask: Any) -> bytes:
        read: bytes = apply_mask(data, mask)
        masks.extend([bytes(mask)] if read.startswith(b"[2,") else [])
        return read

    async with house() as (proxy, _, _), charger(proxy) as cp:
        with patch.object(websockets.frames, "apply_mask", noting):
            for number in range(100):
                await cp.calls(f"{number}", "Heartbeat")
    assert len(masks) == len(set(masks)) == 100


# Peers that do not read, or are gone.


async def test_a_peer_that_does_not_read_its_pongs_is_cut(monkeypatch: Patch, caplog: Log) -> None:
    """They would fill the memory."""
    smaller(monkeypatch, unread=50_000)
    pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 1000
    async with running(LOCAL_SERVER) as proxy, visitor(proxy, request()) as guest:
        assert await guest.status() == 101
        guest.writer.transport.pause_reading()  # type: ignore[attr-defined]

        def is_cut() -> bool:
            guest.says(pings)
            return bool(told(caplog, "it does not read what it is sent"))

        await eventually(is_cut)


async def test_one_long_message_to_a_slow_reader_is_no_reason_to_cut_it() -> None:
    """Only what piles up is: more than the system takes, and than a peer may leave unread."""
    async with house(host="max_size = 20000000") as (proxy, primary, _), charger(proxy, "GOOD") as good:
        async with charger(proxy, max_size=None) as cp:
            async with deaf(cp.connection):
                await primary.calls("long", "DataTransfer", data="x" * 12_000_000)
                for number in range(3):
                    await good.calls(f"{number}", "Heartbeat")
            assert len((await cp.heard.call("DataTransfer"))[3]["data"]) == 12_000_000


async def test_a_peer_that_says_no_more_and_does_not_read_is_cut(monkeypatch: Patch) -> None:
    """After what a closing may take."""
    smaller(monkeypatch, seconds_to_close=0.1)
    async with running(LOCAL_SERVER) as proxy, visitor(proxy, request()) as guest:
        assert await guest.status() == 101
        guest.writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert known(proxy) == ["CP1"]
        guest.writer.write_eof()
        await eventually(lambda: known(proxy) == [])


async def test_the_system_watches_for_dead_machines() -> None:
    """On every connection, of chargers and to servers."""
    async with house() as (proxy, _, secondary), charger(proxy):
        await secondary.connection()
        await eventually(lambda: len(sockets(proxy)) == 3)
        for connection in sockets(proxy):
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


# Look-ups. The system's own answers a play's names.


async def test_a_look_up_that_hangs_delays_no_other_server_and_not_the_end(monkeypatch: Patch) -> None:
    """Where nobody is at the first address, the next is tried."""
    look_up, asked, found = socket.getaddrinfo, [], threading.Event()

    def bent(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if host == "hangs.example":
            asked.append(host)
            found.wait(PATIENCE)
        nobody = look_up("127.0.0.1", 1, *more, **options) if host == "three.example" else []
        return [*nobody, *look_up("127.0.0.1", port, *more, **options), *nobody]

    monkeypatch.setattr(socket, "getaddrinfo", bent)
    async with server() as primary, server() as secondary:
        ini = f"[ext-server]\nserver = ws://three.example:{primary.port}\n"
        async with running(f"{ini}secondary_server = ws://hangs.example:{secondary.port}") as proxy:
            async with charger(proxy) as one, charger(proxy, "CP2") as other:
                await one.boots()
                await other.boots()
                await eventually(lambda: bool(asked))
                await proxy.stop()
                assert await one.closed() == await other.closed() == 1001
    assert (set(asked), secondary.requests) == ({"hangs.example"}, [])
    found.set()
