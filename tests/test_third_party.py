"""
Others' software and words: the schemas of the PyPI package `ocpp`, HAProxy, the corpus, any handshake.

The corpus is what the field has sent, odd as it is. Its words for what a peer hears: `as it came`; `under
another id`; `CallError CODE` and `CallResult` under the message's own id; `{...`: the payload; `[...`: how
the text begins; else the Action.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ocpp.messages import Call, CallResult, validate_payload  # type: ignore[import-untyped]
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus

import ocpp_2w_proxy as p
from tests.corpus import WEBSOCKET, Entry, entries, request_of, text_of
from tests.play import peers
from tests.play.kills import Play
from tests.play.peers import PATIENCE, FakeCharger, FakeServer, charger, eventually, house, server
from tests.play.plays import Stage, StageLink
from tests.play.rig import House, haproxy
from tests.play.rig import house as proxy_process
from tests.play.script import goes_as_told, plays_of
from tests.play.wires import ROOT, at_the_door, has_traceback, open_connections, told, visitor

# The package `ocpp`: whatever a peer hears is valid by its schema.

DAYS = """
ocpp1.6
    charger returns, secondary comes, charger boots, charger is Available, primary takes, secondary takes,
    look, charger shows a PRIM1, charger starts b PRIM1, charger shows c, primary takes,
    charger starts d SECO1 2, charger reads e meterValue=VALUES, secondary takes,
    primary calls q ClearCache, charger answers q, secondary calls r ClearCache, charger answers r,
    secondary calls s RemoteStopTransaction transactionId=4711, charger stops f -1 PRIM1,
    charger stops g -1 SECO1, primary takes, secondary takes, look, secondary claims ONE-TIME,
    charger starts h ONE-TIME 2, charger stops i, secondary takes, charger starts j PRIM2, primary takes
    => primary: Status:Available|Authorize Start q Stop:7|Start;
    secondary: Status:Available|Authorize Start Meter:7 r s:Rejected Stop:7|Start Stop:8
ocpp2.0.1
    charger returns, secondary comes, charger sends boot BootNotification STATION reason=PowerUp,
    charger sends n StatusNotification connectorStatus=Available evseId=1 connectorId=1 NOW,
    primary takes, secondary takes, look,
    charger sends a TransactionEvent eventType=Started triggerReason=CablePluggedIn seqNo=0 NOW TX-P,
    charger sends b TransactionEvent eventType=Started triggerReason=CablePluggedIn seqNo=0 NOW TX-S,
    charger sends c Authorize TOKEN-PRIM1, charger sends d Authorize TOKEN-SECO1, primary takes,
    charger sends e TransactionEvent eventType=Updated triggerReason=Authorized seqNo=1 TOKEN-PRIM1 NOW TX-P,
    charger sends f TransactionEvent eventType=Updated triggerReason=Authorized seqNo=1 TOKEN-SECO1 NOW TX-S,
    primary takes, secondary takes, primary calls q ClearCache, charger answers q,
    secondary calls r ClearCache, charger answers r,
    secondary calls s RequestStopTransaction transactionId=P,
    charger sends g TransactionEvent eventType=Ended triggerReason=EVDeparted seqNo=2 NOW TX-P,
    charger sends h TransactionEvent eventType=Ended triggerReason=EVDeparted seqNo=2 NOW TX-S,
    primary takes, secondary takes, look, secondary asks RequestStartTransaction remoteStartId=1 TOKEN-ONCE,
    charger sends i TransactionEvent eventType=Started triggerReason=RemoteStart seqNo=0 TOKEN-ONCE NOW TX-O,
    secondary takes => primary: Status|Authorize Event:P0 Event:P1 q Event:P2|;
    secondary: Status|Authorize Event:S0 Event:S1 r s:Rejected Event:S2|Event:O0
"""
SHORT = {
    "STATION": 'chargingStation={"model":"M","vendorName":"V"}',
    "NOW": "timestamp=2026-01-01T00:00:00Z",
    "VALUES": '[{"timestamp":"2026-01-01T00:00:00Z","sampledValue":[{"value":"1.5"}]}]',
    r"TX-(\w)": r'transactionInfo={"transactionId":"\1"}',
    r"TOKEN-(\w+)": r'idToken={"idToken":"\1","type":"ISO14443"}',
}


@pytest.mark.parametrize(("steps", "heard"), plays_of(DAYS))
async def test_all_that_a_day_with_two_servers_brings_is_valid(
    play: Play, request: pytest.FixtureRequest, steps: str, heard: dict[str, str]
) -> None:
    """Two sessions at once, questions of both, a stop that is refused, a remote start; each at its owner."""
    version, texts, actions = request.node.callspec.id, list[tuple[str, str]](), dict[tuple[str, str], str]()
    says, send = StageLink.says, StageLink.send

    def noting_says(link: StageLink, text: str) -> None:
        kind, message_id, action, *_ = json.loads(text)
        actions.update({(link.name, message_id): action} if kind == 2 else {})
        says(link, text)

    def noting_send(link: StageLink, text: str) -> None:
        texts.append((link.name, text))
        send(link, text)

    for short, full in SHORT.items():
        steps = re.sub(short, full, steps)
    with patch.multiple(StageLink, says=noting_says, send=noting_send):
        goes_as_told(play(version=version, connect=False), steps, heard)
    for name, text in texts:
        kind, message_id, *rest = json.loads(text)
        asked = [] if kind == 2 else [actions[name, message_id]]
        message = (Call if kind == 2 else CallResult)(message_id, *rest, *asked)
        await validate_payload(message, version.removeprefix("ocpp"))
    assert len(texts) > 30


# HAProxy in front of two proxies.

NAMES = [f"CP-{number}" for number in range(8)]


@asynccontextmanager
async def arriving(port: int, name: str, proxies: list[House]) -> AsyncIterator[tuple[FakeCharger, House]]:
    """A charger that tries until it is in, and the proxy that has let it in."""

    def arrivals(own: House) -> int:
        return len(own.told(f"{name}: charger connected"))

    before, fake = [arrivals(own) for own in proxies], None
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(2 * peers.PATIENCE):
            while fake is None:
                try:
                    fake = await stack.enter_async_context(peers.charger(port, name))
                except (OSError, InvalidStatus):
                    await asyncio.sleep(0.1)
        await eventually(lambda: [arrivals(own) for own in proxies] != before)
        (home,) = [own for own, old in zip(proxies, before, strict=True) if arrivals(own) > old]
        yield fake, home


def between(front: int, proxies: list[House]) -> str:
    """Return the README's configuration, for HAProxy at this port in front of these two."""
    text = (ROOT / "README.md").read_text().partition("```haproxy\n")[2].partition("```")[0]
    for shown, port in ((8321, front), (8331, proxies[0].port), (8332, proxies[1].port)):
        text, count = re.subn(rf":{shown}\b", f":{port}", text)
        assert count
    return text


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="no HAProxy here; the gate installs one")
async def test_a_charger_behind_haproxy_has_a_home_and_comes_back_to_it(tmp_path: Path) -> None:
    """By its path, and not all have the same; the other takes it meanwhile, and sends nothing wrong."""
    zero, one, homes = tmp_path / "zero", tmp_path / "one", dict[str, list[House]]()
    port = peers.free_port()
    for folder in (zero, one):
        folder.mkdir()
    async with (
        server() as primary,
        server() as secondary,
        proxy_process(zero, primary.url, secondary.url) as killed,
        proxy_process(one, primary.url, secondary.url) as kept,
        haproxy(tmp_path, between(port, [killed, kept])),
    ):
        arrives = partial(arriving, port, proxies=[killed, kept])
        for name in NAMES * 2:
            async with arrives(name) as (_, home):
                homes.setdefault(name, []).append(home)
        assert all(first is second for first, second in homes.values())
        mover, stayer = (next(name for name in NAMES if homes[name][0] is own) for own in (killed, kept))
        await secondary.stop()
        async with arrives(stayer) as (neighbour, _):
            await neighbour.boots()
            async with arrives(mover) as (cp, _):
                await cp.boots()
                number = await cp.starts("SECO1")
                await killed.kill()
                await cp.closed()
            async with arrives(mover) as (cp, home):
                assert home is kept
                await cp.stops("SECO1", number)
                why = "StopTransaction is kept and not sent: its session is refused: its start is not"
                assert kept.told(why)
                await secondary.start()
                await killed.start()
                await cp.closed()
            assert "currentTime" in await neighbour.calls("h", "Heartbeat")
        await secondary.heard.call("StartTransaction")
        async with arrives(mover) as (_, home):
            assert home is killed
        assert "StopTransaction" not in primary.heard.actions() + secondary.heard.actions()


# The corpus.

PEERS = ("charger", "primary", "secondary")
MESSAGES = [entry for entry in entries("messages") + entries("servers") if "text" in entry]
FRAMES = [entry for entry in entries("messages") if "frames" in entry]
HANDSHAKES = entries("handshakes")


def name_of(entry: Entry) -> str:
    """Return what pytest shows of an entry."""
    return str(entry["name"])


def complains(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether a WARNING tells of a message that nobody gets; a fault of the proxy is none."""
    assert not has_traceback(caplog)
    return bool(told(caplog, "a message is dropped"))


def test_every_entry_says_where_it_comes_from() -> None:
    """And is told apart from all others by its name."""
    corpus = [*MESSAGES, *FRAMES, *HANDSHAKES]
    assert all(entry["source"] for entry in corpus)
    assert len({entry["name"] for entry in corpus}) == len(corpus)


SCENES: dict[str, Callable[[Stage], Any]] = {
    "": lambda _: None,
    "primary session": Stage.primary_session,
    "secondary session": Stage.secondary_session,
    "primary asks": lambda stage: stage.primary.calls("ask", "GetConfiguration"),
    "primary start": lambda stage: stage.starts("PRIM1", "s"),
    "boot": lambda stage: stage.charger.calls("b", "BootNotification", chargePointVendor="V"),
}


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


def check_heard(stage: Stage, words: dict[str, list[str]], sent: str) -> None:
    """Check what each peer hears; a peer that is not named hears nothing."""
    for peer in PEERS:
        texts, wanted = getattr(stage, peer).hears_texts(), words.get(peer, [])
        assert len(texts) == len(wanted), f"{peer} hears {texts}"
        for word, text in zip(wanted, texts, strict=True):
            assert is_told(word, text, sent), f"{peer} hears {text}, not {word}"


@pytest.mark.parametrize("entry", MESSAGES, ids=name_of)
def test_an_odd_message(entry: Entry, play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """It ends where the corpus says, and the next message as if nothing had been."""
    stage = play(version=entry.get("version", "ocpp1.6"))
    transaction = SCENES[entry.get("scene", "")](stage)
    for peer in PEERS:
        getattr(stage, peer).hears()
    text = text_of(entry["text"]).replace("{transaction}", str(transaction))
    for peer, before in entry.get("before", ()):
        getattr(stage, peer).says(before)
        stage.primary.hears_texts()
    getattr(stage, entry["sender"]).says(text)
    check_heard(stage, entry["hears"], text)
    if "later" in entry:
        stage.passes(30)
        check_heard(stage, entry["later"], text)
    assert complains(caplog) == entry.get("warns", False)
    stage.charger.calls("after", "Heartbeat")
    while call := stage.outbox("primary").in_flight:
        stage.primary.answers(call.message_id, currentTime="x")
    assert [3, "after", {"currentTime": "x"}] in stage.charger.hears()


def frame(opcode: int, payload: Any, fin: bool = True, rsv1: bool = False) -> bytes:
    """Return a masked frame, fit or not."""
    data = text_of(payload).encode("latin-1")
    size = len(data)
    length = bytes([0x80 | size]) if size < 126 else b"\xff" + size.to_bytes(8, "big")
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
    assert complains(caplog) == entry.get("warns", False)


@pytest.mark.parametrize("entry", HANDSHAKES, ids=name_of)
async def test_an_odd_handshake(entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    """It is answered, and seen by the primary, as the corpus says; a good charger gets in."""
    async with house() as (proxy, primary, _):
        async with visitor(proxy, request_of(entry)) as guest:
            if entry.get("ends"):
                guest.writer.write_eof()
            head = b""
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                head = await guest.hears_until(b"\r\n\r\n")
            status, _, lines = head.decode("latin-1").partition("\r\n")
            headers = Headers([tuple(line.split(": ", 1)) for line in lines.split("\r\n") if line])  # type: ignore[misc]
            assert (int(status.split(" ")[1]) if status else None) == entry["status"]
            assert headers.get("Sec-WebSocket-Protocol") == entry.get("subprotocol")
            assert "Sec-WebSocket-Extensions" not in headers
            if "closes" in entry:
                await guest.hears_until(b"\x88")  # Behind a Ping, perhaps.
                assert (await guest.reader.readexactly(3))[1:] == entry["closes"].to_bytes(2, "big")
            if "dials" in entry:
                assert [request.path for request in primary.requests] == entry["dials"]
            for name, values in entry.get("shows", {}).items():
                assert primary.requests[0].headers.get_all(name) == values
            async with charger(proxy, "GOOD") as good:
                assert "currentTime" in await good.calls("1", "Heartbeat")
        await at_the_door(proxy, 0)
        await eventually(lambda: open_connections(primary) == 0)
    assert not has_traceback(caplog)


# Any handshake at all.

SEGMENTS = [b"CP1", b"CP1", b"..", b"%2e", b"%00", b"%0d%0a", b"%1b[31m", b"%", b"?", b"#", b"\\", b"%C3%A9"]
HEADERS = b"""Authorization User-Agent Sec-WebSocket-Protocol Sec-WebSocket-Extensions Connection Host Origin
Content-Length Transfer-Encoding Upgrade Sec-WebSocket-Key""".split()
VALUES = [b"", b"x" * 9000, b"a\r\n b", b"0", b"ocpp1.6", b'"ocpp1.6", ocpp2.1,', b"Basic \xff", b"\0", b"["]
VALUES += [b"http://x", b"null", b"keep-alive, Upgrade", b'permessage-deflate; a="b']
paths = st.lists(st.sampled_from(SEGMENTS) | st.binary(max_size=2), max_size=4).map(b"/".join)
names = st.sampled_from(HEADERS * 3) | st.binary(max_size=8)
values = st.sampled_from(VALUES) | st.text(max_size=12).map(str.encode) | st.binary(max_size=3)


@st.composite
def handshakes(draw: st.DrawFn) -> bytes:
    """The bytes of a request, most of them of a websocket's."""
    path = draw(st.just(b"CP1") | paths)
    firsts = [b"GET /%b HTTP/1.1"] * 20 + [b"POST /%b HTTP/1.1", b"GET %b HTTP/1.0"]
    lines = [draw(st.sampled_from(firsts)) % path]
    lines += [line.encode() for line in WEBSOCKET if draw(st.integers(0, 30))]
    lines += [name + b": " + value for name, value in draw(st.lists(st.tuples(names, values), max_size=3))]
    return b"\r\n".join([*lines, b"", draw(st.binary(max_size=20))])


TOLD = {  # The headers that a server sees of a handshake.
    *("host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version"),
    *("sec-websocket-protocol", "authorization", "user-agent"),
}


async def knock(proxy: p.Proxy, primary: FakeServer, good: FakeCharger, request: bytes) -> None:
    """Send a request; check the answer, what the primary sees of it, and that a good charger is served."""
    primary.requests.clear()
    answer = b""
    async with visitor(proxy, request) as guest:
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                answer = await guest.reader.read(12)
    assert not answer or answer.startswith((b"HTTP/1.1 ", b"\x8a"))
    for seen in primary.requests:
        charger_id = urllib.parse.unquote(seen.path.removeprefix("/ocpp/"))
        assert p.is_charger_id(charger_id)
        assert seen.path == f"/ocpp/{urllib.parse.quote(charger_id, safe='')}"
        assert {name.lower() for name in seen.headers} <= TOLD
    await good.calls(f"m{len(good.heard.messages)}", "Heartbeat")


def test_any_handshake(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Answered or closed, never left hanging; no traceback, no unfit id at a server; good chargers get in."""
    monkeypatch.setattr(p, "HANDSHAKE_SECONDS", 0.5)
    stack = AsyncExitStack()
    with asyncio.Runner() as runner:
        proxy, primary, _ = runner.run(stack.enter_async_context(house()))
        good = runner.run(stack.enter_async_context(charger(proxy, "GOOD")))
        knocks = given(handshakes())(lambda request: runner.run(knock(proxy, primary, good, request)))
        fixed = settings(max_examples=300, deadline=None, derandomize=True, database=None)
        settings(fixed, suppress_health_check=list(HealthCheck))(knocks)()
        another = runner.run(stack.enter_async_context(charger(proxy, "GOOD2")))
        runner.run(another.calls("1", "Heartbeat"))
        runner.run(stack.aclose())
    assert not has_traceback(caplog)
