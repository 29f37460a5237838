"""Texts in frames of our own making: whatever comes, a link hears what the library alone would have heard."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

import ocpp_2w_proxy as p
from tests.play.peers import eventually
from tests.proof.fuzz import Pipe

URI = parse_uri("ws://server.example/CP1")
MAX_SIZE = 1024  # The least that the ini allows.
EDGES = [0, 1, 125, 126, 127, 128, 1000, 2**16 - 1, 2**16, 2**16 + 1]

texts = st.builds(
    bytes.__mul__,
    st.sampled_from([b"", b"x", b"[2,", "ä€".encode(), b"\xff", b"\r\n\r\n"]),
    st.integers(0, 400),
)
opcodes = st.sampled_from([Opcode.TEXT] * 6 + list(Opcode))


@dataclass
class Heard:
    """What the user of a link hears, and what its peer is sent."""

    texts: list[str] = field(default_factory=list)
    closed: int = 0
    written: list[bytes] = field(default_factory=list, compare=False)
    sent: bytes = b""  # All that was written before the peer hung up.
    state: str = ""

    def link_received(self, _link: p.Link, text: str) -> None:
        self.texts.append(text)

    def link_closed(self, _link: p.Link) -> None:
        self.closed += 1


class Recorder(Pipe):
    """A transport that notes what is written."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def write(self, data: Any) -> None:
        super().write(data)
        self.heard.written.append(bytes(data))


def feed(link: p.Link, pieces: Iterable[bytes]) -> None:
    """Let the bytes come in piece by piece, and no more at once than the buffer holds."""
    most = len(p.RECEIVE_BUFFER)
    for piece in pieces:
        for part in (piece[at : at + most] for at in range(0, len(piece), most)):
            link.get_buffer(-1)[: len(part)] = part
            link.buffer_updated(len(part))


@contextmanager
def masked_with_zeros() -> Iterator[None]:
    """Let the library's own masks be no difference between two plays."""
    with mock.patch("secrets.token_bytes", bytes):
        yield


@contextmanager
def only_the_library() -> Iterator[None]:
    """Let the library's parser alone find the frames in what comes in, and read them, byte by byte."""

    def take(link: p.Link) -> None:
        if not link.is_past_head:
            link._take_head()
        if link.user:
            came, link.rest = link.rest, bytearray()
            for byte in came:
                link._feed(bytes((byte,)))

    with mock.patch.object(p.Link, "_take", take):
        yield


@contextmanager
def library_watched() -> Iterator[list[bytes]]:
    """Note what the library is given to read behind the handshake."""
    frames: list[bytes] = []
    feed_library = p.Link._feed

    def spy(link: p.Link, data: bytes) -> None:
        if link.handshake.done():
            frames.append(bytes(data))
        feed_library(link, data)

    with mock.patch.object(p.Link, "_feed", spy):
        yield frames


async def heard(is_client: bool, pieces: list[bytes], early: int) -> Heard:
    """Play a connection on which these bytes come; so many of the first piece with the handshake."""
    result = Heard()
    peer: Any
    if is_client:
        link = p.Link(ClientProtocol(URI, max_size=MAX_SIZE, logger=p.LIBRARY_LOG))
        link.connection_made(Recorder(result))
        assert isinstance(link.protocol, ClientProtocol)
        link.request(link.protocol.connect())
        peer = ServerProtocol()
        peer.receive_data(b"".join(result.written))
        peer.send_response(peer.accept(peer.events_received()[0]))
        head = b"".join(peer.data_to_send())
    else:
        link = p.incoming_link(MAX_SIZE, lambda _: None)
        link.connection_made(Recorder(result))
        peer = ClientProtocol(URI)
        peer.send_request(peer.connect())
        head = b"".join(peer.data_to_send())
    feed(link, [head[:-2], head[-2:] + pieces[0][:early]])
    request: Any = link.handshake.result()
    if not is_client:
        link.accept(link.answer_to(request), None)
    result.written.clear()
    link.attach(result)
    feed(link, [pieces[0][early:], *pieces[1:]])
    result.state = f"{link.protocol.state.name} {link.closed_by}"
    result.sent = b"".join(result.written)
    link.connection_lost(None)
    return result


@st.composite
def frames(draw: st.DrawFn, is_masked: bool) -> bytes:
    """A frame as a peer may send it, fit or not, now and then badly spelt."""
    data, opcode = draw(texts), draw(opcodes)
    if opcode >= Opcode.CLOSE:
        data = data[:125]
    is_fit = draw(st.integers(0, 9)) > 0
    frame = Frame(opcode, data, draw(st.integers(0, 5)) > 0, rsv1=not is_fit and draw(st.booleans()))
    with mock.patch.object(Frame, "check"):  # It would not let an unfit one go out.
        spelt = frame.serialize(mask=is_masked is (is_fit or draw(st.booleans())))
    if len(data) < 126 and draw(st.integers(0, 9)) == 0:  # A longer length than needed (RFC 6455 5.2).
        spelt = spelt[:1] + bytes((spelt[1] & 0x80 | 126,)) + struct.pack("!H", len(data)) + spelt[2:]
    return spelt


@st.composite
def pieces_of_frames(draw: st.DrawFn, is_masked: bool) -> list[bytes]:
    """What comes in at once: most often a frame, else a part of one, or the end of one and the next."""
    pieces = [b""]
    for frame in draw(st.lists(frames(is_masked), min_size=1, max_size=8)):
        cut = draw(st.just(len(frame)) | st.integers(0, len(frame)))
        if draw(st.integers(0, 3)) == 0:
            pieces[-1] += frame[:cut]
        else:
            pieces.append(frame[:cut])
        pieces += filter(None, [frame[cut:]])
    return pieces


@given(st.data(), st.booleans(), st.just(0) | st.integers(0, 2000))
def test_a_link_hears_what_the_library_reads(data: st.DataObject, is_client: bool, early: int) -> None:
    """Whole, in pieces, between Pings and fragments, fit or not: the short way and the library's agree."""
    pieces = data.draw(pieces_of_frames(is_masked=not is_client))
    with masked_with_zeros():
        found = asyncio.run(heard(is_client, pieces, early))
        with only_the_library():
            assert found == asyncio.run(heard(is_client, pieces, early))


@pytest.mark.parametrize("is_client", [True, False])
def test_texts_that_come_whole_skip_the_parser(is_client: bool) -> None:
    """The library reads nothing but the Ping between them: in one piece with others, or in several."""
    one, ping, two, three = (
        Frame(opcode, data).serialize(mask=not is_client)
        for opcode, data in (
            (Opcode.TEXT, b"one"),
            (Opcode.PING, b""),
            (Opcode.TEXT, b"two"),
            (Opcode.TEXT, b"three"),
        )
    )
    with library_watched() as frames:
        found = asyncio.run(heard(is_client, [b"", one + ping + two[:2], two[2:], three], 0))
    assert found.texts == ["one", "two", "three"]
    assert frames == [ping]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"\x01\x04four", id="a fragment"),
        pytest.param(b"\xc1\x04four", id="a compressed text"),
        pytest.param(b"\x82\x04four", id="no text"),
        pytest.param(b"\x81\x84\x00\x00\x00\x00four", id="a masked text"),
    ],
)
def test_all_else_is_left_to_the_library(frame: bytes) -> None:
    """What is not one whole unmasked text of a server is not read the short way."""
    with library_watched() as frames:
        found = asyncio.run(heard(True, [b"", frame], 0))
    assert found.texts == []
    assert frames == [frame]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"\x81", id="a part of a head"),
        pytest.param(b"\x81\x7e\x00", id="a part of a long head"),
        pytest.param(b"\x81\x7f\x00\x00\x00\x00\x00\x00\x00", id="a part of the longest head"),
        pytest.param(b"\x81\x05four", id="a part of a text"),
        pytest.param(b"\x89\x05four", id="a part of a Ping"),
    ],
)
def test_a_part_of_a_frame_waits_for_the_rest(frame: bytes) -> None:
    """The library does not get it."""
    with library_watched() as frames:
        found = asyncio.run(heard(True, [b"", frame], 0))
    assert found.texts == []
    assert frames == []


@pytest.mark.parametrize("is_client", [True, False])
@pytest.mark.parametrize("most", [1, 7, 1000])
async def test_a_large_text_in_many_pieces_is_heard_once(is_client: bool, most: int) -> None:
    """As TCP cuts it; a text and a Ping behind it are not taken for parts of it."""
    data = "ä[2," * 200 + "x" * (MAX_SIZE - 1000)
    texts = [
        Frame(opcode, said).serialize(mask=not is_client)
        for opcode, said in ((Opcode.TEXT, data.encode()), (Opcode.PING, b"p"), (Opcode.TEXT, b"next"))
    ]
    stream = b"".join(texts)
    with library_watched() as frames:
        found = await heard(
            is_client, [b"", *(stream[at : at + most] for at in range(0, len(stream), most))], 0
        )
    assert found.texts == [data, "next"]
    assert frames == [texts[1]]


@pytest.mark.parametrize("is_client", [True, False])
async def test_several_texts_in_one_piece_are_heard_one_by_one(is_client: bool) -> None:
    """In their order, with the first half of one more, which comes with the next piece."""
    said = [f"text {number}" for number in range(9)]
    stream = b"".join(Frame(Opcode.TEXT, text.encode()).serialize(mask=not is_client) for text in said)
    found = await heard(is_client, [b"", stream[:-5], stream[-5:]], 0)
    assert found.texts == said


@pytest.mark.parametrize("is_client", [True, False])
async def test_a_text_just_above_max_size_closes_its_sender(is_client: bool) -> None:
    """1009; one of exactly `max_size` is heard."""
    fit, unfit = (
        Frame(Opcode.TEXT, b"x" * size).serialize(mask=not is_client) for size in (MAX_SIZE, MAX_SIZE + 1)
    )
    found = await heard(is_client, [b"", fit, unfit], 0)
    assert found.texts == ["x" * MAX_SIZE]
    assert "code 1009" in found.state


async def test_a_text_far_above_max_size_is_refused_by_its_head() -> None:
    """1009 at once: what it announces is not waited for, and what comes of it all the same is not kept."""
    user = Heard()
    link, _ = opened(user)
    feed(link, [b"\x81\xff" + struct.pack("!Q", 2**62) + b"mask"])
    assert user.written[0][0] == 0x80 | Opcode.CLOSE
    assert user.written[0][2:4] == struct.pack("!H", 1009)
    inner = Frame(Opcode.TEXT, b"inner").serialize(mask=True)
    feed(link, [inner * 100_000])
    assert user.texts == []
    assert len(link.rest) < MAX_SIZE + 14
    link.connection_lost(None)
    assert "code 1009" in link.closed_by


@pytest.mark.parametrize("is_client", [True, False])
def test_a_frame_that_began_with_the_handshake_ends_where_it_ends(is_client: bool) -> None:
    """The rest of a text is no text, though it may look like one."""
    with masked_with_zeros():
        inner = Frame(Opcode.TEXT, b"inner").serialize(mask=not is_client)
        outer = Frame(Opcode.TEXT, inner).serialize(mask=not is_client)
        found = asyncio.run(heard(is_client, [outer], len(outer) - len(inner)))
    assert found.texts == []
    assert "is not UTF-8" in found.state, "it has been read as what it is"


def test_a_text_between_fragments_is_a_mistake() -> None:
    """A text that comes whole in the middle of another ends the connection (RFC 6455 5.4)."""
    begun = Frame(Opcode.TEXT, b"begun", fin=False).serialize(mask=True)
    found = asyncio.run(heard(False, [begun, Frame(Opcode.TEXT, b"whole").serialize(mask=True)], 0))
    assert found.texts == []
    assert "code 1002" in found.state


class Answerer(Heard):
    """Answers every text at once."""

    def link_received(self, link: p.Link, text: str) -> None:
        super().link_received(link, text)
        link.send(f"answer to {text}")


def opened(user: Heard) -> tuple[p.Link, Recorder]:
    """Return the open link of a charger."""
    link, transport = p.incoming_link(MAX_SIZE, lambda _: None), Recorder(user)
    link.connection_made(transport)
    peer = ClientProtocol(URI)
    peer.send_request(peer.connect())
    feed(link, peer.data_to_send())
    request: Any = link.handshake.result()
    link.accept(link.answer_to(request), None)
    user.written.clear()
    link.attach(user)
    return link, transport


async def test_a_pong_goes_out_before_the_answer_to_what_came_behind_its_ping() -> None:
    """What the library has to say keeps its place."""
    user = Answerer()
    link, _ = opened(user)
    texts = [Frame(opcode, b"1").serialize(mask=True) for opcode in (Opcode.PING, Opcode.TEXT)]
    feed(link, [b"".join(texts)])
    assert user.written == [
        Frame(Opcode.PONG, b"1").serialize(mask=False),
        Frame(Opcode.TEXT, b"answer to 1").serialize(mask=False),
    ]


@pytest.mark.parametrize("unread", [1, 2 * p.MAX_WRITE_BUFFER])
async def test_a_peer_that_says_no_more_and_does_not_read_is_cut_off(
    unread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where it has left too much unread, else after what a closing may take."""
    monkeypatch.setattr(p, "CLOSE_SECONDS", 0.0)
    link, transport = opened(Heard())
    with mock.patch.object(Recorder, "get_write_buffer_size", return_value=unread):
        link.eof_received()
        assert transport.is_cut is (unread > 1)
    await eventually(lambda: transport.is_cut)
    link.connection_lost(None)


@given(st.booleans(), st.sampled_from(EDGES) | st.integers(0, 2**17), st.binary(min_size=1, max_size=9))
@example(is_client=True, length=0, pattern=b"x")
def test_a_text_goes_out_in_one_frame_that_the_library_reads(
    is_client: bool, length: int, pattern: bytes
) -> None:
    """What is sent is one whole text frame, masked where it goes to a server."""
    data = (pattern * (length // len(pattern) + 1))[:length]
    frame = p.text_frame(data, is_masked=is_client)
    reader: Any = ServerProtocol(state=State.OPEN, max_size=2**20) if is_client else ClientProtocol(URI)
    reader.parser = super(type(reader), reader).parse()
    next(reader.parser)
    reader.receive_data(frame)
    (read,) = reader.events_received()
    assert (read.opcode, bytes(read.data), read.fin) == (Opcode.TEXT, data, True)


def test_masks_are_not_used_twice() -> None:
    """Each frame to a server has a mask of its own (RFC 6455 5.3)."""
    frames = [p.text_frame(b"", is_masked=True) for _ in range(3000)]
    assert len(set(frames)) > 2990
