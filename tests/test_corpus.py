"""
The corpus, played: what becomes of every odd message and every odd handshake that the field has sent.

The words in which an entry tells what a peer hears: `as it came`; `under another id`; `CallError CODE` and
`CallResult` under the message's own id; `{...`: the payload; `[...`: how the text begins; else the Action.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from websockets.datastructures import Headers

import ocpp_2w_proxy as p
from tests.corpus import Entry, entries, request_of, text_of
from tests.play.kills import Play
from tests.play.peers import PATIENCE, FakeCharger, charger, eventually, house
from tests.play.plays import Stage, StageLink

MESSAGES = [entry for entry in entries("messages") if "text" in entry]
FRAMES = [entry for entry in entries("messages") if "frames" in entry]
HANDSHAKES = entries("handshakes")
PEERS = ("charger", "primary", "secondary")


def name_of(entry: Entry) -> str:
    """Return what pytest shows of an entry."""
    return str(entry["name"])


def test_every_entry_says_where_it_comes_from() -> None:
    """And is told apart from all others by its name."""
    corpus = [*MESSAGES, *FRAMES, *HANDSHAKES]
    assert all(entry["source"] for entry in corpus)
    assert len({entry["name"] for entry in corpus}) == len(corpus)


def set_the_scene(stage: Stage, scene: str) -> Any:
    """Let happen what an entry presupposes; return the transaction id, if there is one."""
    transaction: Any = None
    if scene == "primary session":
        transaction = stage.primary_session()
    elif scene == "secondary session":
        transaction = stage.secondary_session()
    elif scene == "primary asks":
        stage.primary.calls("ask", "GetConfiguration")
    elif scene == "primary start":
        stage.starts("PRIM1", "s")
    elif scene == "boot":
        stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    for peer in PEERS:
        getattr(stage, peer).hears()
    return transaction


def heard(stage: Stage, link: StageLink) -> list[str]:
    """Return the texts that a peer was sent since the last look."""
    stage.journal.settle()
    texts, link.texts = link.texts, []
    return texts


def is_told(word: str, text: str, sent: str) -> bool:
    """Whether a text that a peer hears is what the corpus says of it."""
    kind, message_id, *rest = json.loads(text, strict=False)
    first, _, code = word.partition(" ")
    if word == "as it came":
        return text == sent
    if word == "under another id":
        return text == p.patch(sent, (1,), message_id) != sent
    if first in ("CallError", "CallResult"):
        outcome = [4, code] if code else [3]
        return [kind, *rest[:1]][: len(outcome)] == outcome and f'"{message_id}"' in sent
    if word.startswith("{"):
        return text.endswith(f"{word}]")
    return text.startswith(word) or word in rest


def check_heard(stage: Stage, told: dict[str, list[str]], sent: str) -> None:
    """Check what each peer hears; a peer that is not named hears nothing."""
    for peer in PEERS:
        texts, words = heard(stage, getattr(stage, peer)), told.get(peer, [])
        assert len(texts) == len(words), f"{peer} hears {texts}"
        for word, text in zip(words, texts, strict=True):
            assert is_told(word, text, sent), f"{peer} hears {text}, not {word}"


def check_serving(stage: Stage) -> None:
    """Let the charger send one more Call, and its primary answer all that it has heard."""
    stage.charger.calls("after", "Heartbeat")
    while call := stage.outbox(p.Peer.PRIMARY).in_flight:
        stage.primary.answers(call.message_id, currentTime="x")
    assert [3, "after", {"currentTime": "x"}] in stage.charger.hears()


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the WARNINGs about messages that nobody gets."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [text for text in warnings if "a message is dropped" in text]


def has_traceback(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether anything went wrong that nobody had foreseen."""
    return any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("entry", MESSAGES, ids=name_of)
def test_an_odd_message(entry: Entry, play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """It ends where the corpus says, and the next message as if nothing had been."""
    stage = play(version=entry.get("version", "ocpp1.6"))
    transaction = set_the_scene(stage, entry.get("scene", ""))
    text = text_of(entry["text"]).replace("{transaction}", str(transaction))
    for peer, before in entry.get("before", ()):
        getattr(stage, peer).says(before)
        heard(stage, stage.primary)
    getattr(stage, entry["sender"]).says(text)
    check_heard(stage, entry["hears"], text)
    if "later" in entry:
        stage.passes(stage.config.host.call_timeout)
        check_heard(stage, entry["later"], text)
    assert bool(complaints(caplog)) == entry.get("warns", False)
    check_serving(stage)
    assert not has_traceback(caplog)


# Over real sockets.


def frame(opcode: int, payload: Any, fin: bool = True, rsv1: bool = False) -> bytes:
    """Return a masked frame, fit or not."""
    data = text_of(payload).encode("latin-1")
    size = len(data)
    length = bytes([0x80 | size]) if size < 126 else b"\xff" + size.to_bytes(8)
    return bytes([fin << 7 | rsv1 << 6 | opcode]) + length + bytes(4) + data


@pytest.mark.parametrize("entry", FRAMES, ids=name_of)
async def test_odd_frames(entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    """They are ignored, or close their own connection; another charger notices nothing."""
    async with house() as (proxy, primary, _), charger(proxy) as good, charger(proxy, "ODD") as odd:
        for parts in entry["frames"]:
            odd.connection.transport.write(frame(**parts))
        if "closed" in entry:
            assert await odd.closed() == entry["closed"]
        else:
            await odd.calls("after", "Heartbeat")
            assert primary.heard.actions() == [*entry["hears"].get("primary", []), "Heartbeat"]
        await good.calls("1", "Heartbeat")
    assert bool(complaints(caplog)) == entry.get("warns", False)
    assert not has_traceback(caplog)


async def test_all_odd_messages_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    """From all three peers, over one connection each; both chargers are still served."""
    async with house() as (proxy, primary, secondary), charger(proxy) as good, charger(proxy, "ODD") as odd:
        await odd.boots()
        await secondary.connection(1)
        peers = {
            "charger": odd.connection,
            "primary": primary.connections[1],
            "secondary": secondary.connections[1],
        }
        for number, entry in enumerate(MESSAGES):
            text = text_of(entry["text"])
            if text.isprintable():  # The fake servers read strict JSON.
                await peers[entry["sender"]].send(text)
            await good.calls(f"g{number}", "Heartbeat")
        await odd.calls("after", "Heartbeat")
        assert "ODD" in proxy.relays
    assert complaints(caplog)
    assert not has_traceback(caplog)


class Visit:
    """What a handshake of the corpus is answered with."""

    def __init__(self, head: bytes) -> None:
        status, _, lines = head.decode("latin-1").partition("\r\n")
        self.status = int(status.split(" ")[1]) if status else None
        pairs = (line.partition(": ") for line in lines.splitlines() if line)
        self.headers = Headers([(name, value) for name, _, value in pairs])


async def visit(port: int, entry: Entry) -> tuple[Visit, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a handshake of the corpus, and return its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_of(entry))
    if entry.get("ends"):
        writer.write_eof()
    try:
        async with asyncio.timeout(PATIENCE):
            head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        head = b""
    return Visit(head), reader, writer


async def welcomed(good: FakeCharger) -> None:
    """Check that a good charger is served."""
    assert "currentTime" in await good.calls("1", "Heartbeat")


@pytest.mark.parametrize("entry", HANDSHAKES, ids=name_of)
async def test_an_odd_handshake(entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    """It is answered, and seen by the primary, as the corpus says; a good charger gets in."""
    async with house() as (proxy, primary, _):
        answer, reader, writer = await visit(proxy.port, entry)
        assert answer.status == entry["status"]
        assert answer.headers.get("Sec-WebSocket-Protocol") == entry.get("subprotocol")
        assert "Sec-WebSocket-Extensions" not in answer.headers
        if "closes" in entry:
            await reader.readuntil(b"\x88")  # Behind a Ping, perhaps.
            assert (await reader.readexactly(3))[1:] == entry["closes"].to_bytes(2)
        if "dials" in entry:
            assert [request.path for request in primary.requests] == entry["dials"]
        for name, values in entry.get("shows", {}).items():
            assert primary.requests[0].headers.get_all(name) == values
        async with charger(proxy, "GOOD") as good:
            await welcomed(good)
        writer.close()
        await eventually(lambda: not proxy.handshakes)
        await eventually(lambda: all(c.state.name == "CLOSED" for c in primary.connections))
    assert not has_traceback(caplog)
