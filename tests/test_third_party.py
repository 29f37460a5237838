"""
Others' software and others' words: the schemas of the PyPI package `ocpp`, HAProxy, and the corpus.

The corpus is what the field has sent, odd as it is. Its words for what a peer hears: `as it came`; `under
another id`; `CallError CODE` and `CallResult` under the message's own id; `{...`: the payload; `[...`: how
the text begins; else the Action.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ocpp.messages import Call, CallResult, validate_payload  # type: ignore[import-untyped]
from websockets.asyncio.client import connect
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus

import ocpp_2w_proxy as p
from tests.corpus import Entry, entries, request_of, text_of
from tests.play.kills import Play
from tests.play.peers import (
    PATIENCE,
    FakeCharger,
    FakeServer,
    accepting,
    charger,
    eventually,
    free_port,
    house,
    server,
)
from tests.play.plays import Stage, StageLink
from tests.play.rig import House
from tests.play.rig import house as proxy_process
from tests.play.wires import ROOT, V16, at_the_door, has_traceback, open_connections, told, visitor

# The package `ocpp`: whatever a peer hears is valid by its schema.

ACCEPTED = {"status": "Accepted"}

# What the charger says of itself, and of a car's visit; what a server answers, and what it asks.
GREETING = {
    "ocpp1.6": """BootNotification {"chargePointVendor":"V","chargePointModel":"M"}
        StatusNotification {"connectorId":1,"errorCode":"NoError","status":"Available"}""",
    "ocpp2.0.1": """BootNotification {"chargingStation":{"model":"M","vendorName":"V"},"reason":"PowerUp"}
        StatusNotification {"timestamp":"<now>","connectorStatus":"Available","evseId":1,"connectorId":1}""",
}
VISIT = {
    "ocpp1.6": """Authorize {"idTag":"<badge>"}
        StartTransaction {"connectorId":<at>,"idTag":"<badge>","meterStart":0,"timestamp":"<now>"}
        MeterValues {"connectorId":<at>,"transactionId":<id>,"meterValue":<values>}
        StopTransaction {"transactionId":<id>,"meterStop":9,"timestamp":"<now>"}""",
    "ocpp2.0.1": """TransactionEvent {"eventType":"Started","triggerReason":"CablePluggedIn","seqNo":0,<tx>}
        Authorize {"idToken":<token>}
        TransactionEvent {"eventType":"Updated","triggerReason":"Authorized","seqNo":1,"idToken":<token>,<tx>}
        TransactionEvent {"eventType":"Ended","triggerReason":"EVDeparted","seqNo":2,<tx>}""",
}
SHORT = {
    "<tx>": '"timestamp":"<now>","transactionInfo":{"transactionId":"tx-<badge>"}',
    "<token>": '{"idToken":"<badge>","type":"ISO14443"}',
    "<values>": '[{"timestamp":"<now>","sampledValue":[{"value":"1.5"}]}]',
    "<now>": "2026-01-01T00:00:00Z",
}
ANSWERS: dict[str, dict[str, Any]] = {
    "ocpp1.6": {
        "Authorize": {"idTagInfo": ACCEPTED},
        "StartTransaction": {"transactionId": 7, "idTagInfo": ACCEPTED},
        "GetConfiguration": {"unknownKey": ["A"]},
    },
    "ocpp2.0.1": {"Authorize": {"idTokenInfo": ACCEPTED}, "GetBaseReport": ACCEPTED},
}
QUESTIONS = {  # A question, a stop of what is not the secondary's, a remote start.
    "ocpp1.6": """GetConfiguration {"key":["A"]}
        RemoteStopTransaction {"transactionId":4711}
        RemoteStartTransaction {"idTag":"ONE-TIME"}""",
    "ocpp2.0.1": """GetBaseReport {"requestId":1,"reportBase":"FullInventory"}
        RequestStopTransaction {"transactionId":"tx-PRIM1"}
        RequestStartTransaction {"remoteStartId":1,"idToken":{"idToken":"ONE-TIME","type":"Central"}}""",
}


def calls_of(texts: str) -> list[tuple[str, str]]:
    """Return Actions and payloads of texts that are written one below the other."""
    return re.findall(r"([A-Z]\w+) (\{.*?\})(?=\s*\n\s*[A-Z]|$)", texts, re.DOTALL)


class Cast:
    """A charger that speaks a version, and its two servers; knows which Action each message id is of."""

    def __init__(self, version: str, cp: FakeCharger, primary: FakeServer, secondary: FakeServer) -> None:
        self.version = version
        self.cp, self.primary, self.secondary = cp, primary, secondary
        self.actions: dict[str, str] = {}
        self.transactions: dict[str, Any] = {}  # By badge.
        self.answered: set[str] = set()  # Message ids of what the charger was asked.
        for fake in (primary, secondary):
            fake.answers = lambda action, said: ANSWERS[version].get(action, accepting(action, said))

    async def says(self, action: str, payload: str, badge: str = "", connector: int = 1) -> None:
        """Let the charger send a Call about a visit, and hear the answer."""
        known = {"<badge>": badge, "<at>": str(connector), "<id>": str(self.transactions.get(badge))}
        for short, full in (SHORT | known).items():
            payload = payload.replace(short, full)
        message_id = f"c{len(self.actions)}"
        self.actions[message_id] = action
        answer = await self.cp.calls(message_id, action, **json.loads(payload))
        self.transactions[badge] = answer.get("transactionId", self.transactions.get(badge))

    async def asks(self, fake: FakeServer, action: str, payload: str, is_passed: bool = True) -> Any:
        """Let a server ask the charger, which answers if it hears of it; return the answer."""
        message_id = f"s{len(self.actions)}"
        self.actions[message_id] = action
        await fake.calls(message_id, action, **json.loads(payload))
        if is_passed:
            heard = await self.cp.heard.until(lambda m: m[:3:2] == [2, action] and m[1] not in self.answered)
            self.answered.add(heard[1])
            answer = ANSWERS[self.version].get(action, ACCEPTED)
            await self.cp.connection.send(json.dumps([3, heard[1], answer]))
        return (await fake.heard.answer(message_id))[2]

    async def all_is_valid(self) -> int:
        """Check by its schema what everybody has heard; return how much it was."""
        messages = [m for peer in (self.cp, self.primary, self.secondary) for m in peer.heard.messages]
        for kind, message_id, *rest in messages:
            answer = [] if kind == 2 else [self.actions[message_id]]
            message = (Call if kind == 2 else CallResult)(message_id, *rest, *answer)
            await validate_payload(message, self.version.removeprefix("ocpp"))
        return len(messages)


@pytest.mark.parametrize("version", ["ocpp1.6", "ocpp2.0.1"])
async def test_all_that_a_day_with_two_servers_brings_is_valid(version: str) -> None:
    """Two sessions at once, questions of both, a stop that is refused, a remote start; each at its owner."""
    async with house() as (proxy, primary, secondary), charger(proxy, versions=[version]) as cp:
        on, visit = Cast(version, cp, primary, secondary), calls_of(VISIT[version])
        question, foreign_stop, remote_start = calls_of(QUESTIONS[version])
        for said in calls_of(GREETING[version]):
            await on.says(*said)
        await secondary.heard.call("StatusNotification")
        for said in visit:
            if said is visit[-1]:
                for fake in (primary, secondary):
                    assert await on.asks(fake, *question) == ANSWERS[version][question[0]]
                assert await on.asks(secondary, *foreign_stop, is_passed=False) == {"status": "Rejected"}
            for badge, connector in (("PRIM1", 1), ("SECO1", 2)):
                await on.says(*said, badge, connector)
        assert await on.asks(secondary, *remote_start) == ACCEPTED
        for badge in ("ONE-TIME", "PRIM2"):
            for said in visit:
                await on.says(*said, badge)
        for fake in (primary, secondary):
            await eventually(lambda fake=fake: len(fake.heard.actions()) >= 2 + 2 * len(visit))  # type: ignore[misc]
            assert fake.heard.actions()[:2] == ["BootNotification", "StatusNotification"]
            assert sorted(fake.heard.actions()[2:]) == sorted([action for action, _ in visit] * 2)
        assert await on.all_is_valid() > 40


# HAProxy in front of two proxies.

HAPROXY = shutil.which("haproxy")
NAMES = [f"CP-{number}" for number in range(8)]


class Farm(NamedTuple):
    """Two proxies behind HAProxy, and the servers behind them."""

    port: int  # Of HAProxy.
    proxies: list[House]
    primary: FakeServer
    secondary: FakeServer

    @asynccontextmanager
    async def arriving(self, name: str) -> AsyncIterator[tuple[FakeCharger, House]]:
        """A charger that tries until it is in, and the proxy that has let it in."""

        def arrivals() -> list[int]:
            return [len(own.told(f"{name}: charger connected")) for own in self.proxies]

        before, connection = arrivals(), None
        async with asyncio.timeout(2 * PATIENCE):
            while connection is None:
                await asyncio.sleep(0.1)
                with suppress(OSError, InvalidStatus):
                    connection = await connect(f"ws://127.0.0.1:{self.port}/{name}", subprotocols=V16)
        await eventually(lambda: arrivals() != before)
        fake = FakeCharger(connection)
        try:
            yield fake, self.proxies[arrivals()[0] == before[0]]
        finally:
            await connection.close()
            await fake.listener


@asynccontextmanager
async def farm(folder: Path) -> AsyncIterator[Farm]:
    """Two proxies, each with its own state file, behind HAProxy with the configuration of the README."""
    if HAPROXY is None:
        pytest.skip("no HAProxy here; the gate installs one")
    (text,) = re.findall(
        r"^```haproxy\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    async with AsyncExitStack() as stack:
        primary, secondary = [await stack.enter_async_context(server()) for _ in range(2)]
        front, proxies = free_port(), []
        for name in ("zero", "one"):
            (folder / name).mkdir()
            own = proxy_process(folder / name, primary.url, secondary.url)
            proxies.append(await stack.enter_async_context(own))
        for shown, port in ((8321, front), (8331, proxies[0].port), (8332, proxies[1].port)):
            text, count = re.subn(rf":{shown}\b", f":{port}", text)
            assert count
        (folder / "haproxy.cfg").write_text(text)
        process = await asyncio.create_subprocess_exec(
            HAPROXY, "-f", str(folder / "haproxy.cfg"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield Farm(front, proxies, primary, secondary)
        finally:
            process.kill()
            await process.wait()


async def test_a_charger_behind_haproxy_always_lands_on_the_same_proxy(tmp_path: Path) -> None:
    """By its path, and not all on one; it stays there while the other is killed and comes back."""
    async with farm(tmp_path) as where:
        homes: dict[str, set[int]] = {name: set() for name in NAMES}
        for name in NAMES * 2:
            async with where.arriving(name) as (_, home):
                homes[name].add(home.port)
        assert {len(ports) for ports in homes.values()} == {1}
        killed, kept = where.proxies
        by_port = {ports.pop(): name for name, ports in homes.items()}
        async with where.arriving(by_port[kept.port]) as (cp, _):
            await cp.boots()
            await killed.kill()
            async with where.arriving(by_port[killed.port]) as (refugee, _):
                await killed.start()
                await refugee.closed()
            assert "currentTime" in await cp.calls("h", "Heartbeat")


async def test_the_charger_of_a_killed_proxy_goes_to_the_other_and_comes_home(tmp_path: Path) -> None:
    """What was stored is delivered when its proxy is back; the other sends nothing to the wrong side."""
    async with farm(tmp_path) as where:
        await where.secondary.stop()
        async with where.arriving("CP-1") as (cp, home):
            await cp.boots()
            number = await cp.starts("SECO1")
            assert number >= p.FIRST_PROXY_ID
            await home.kill()
            await cp.closed()
        async with where.arriving("CP-1") as (cp, other):
            assert other is not home
            await cp.stops("SECO1", number)
            assert other.told(
                "StopTransaction is kept and not sent: its session is refused: its start is not"
            )
            assert "StopTransaction" not in where.primary.heard.actions()
            await where.secondary.start()
            await home.start()
            async with asyncio.timeout(2 * PATIENCE):
                await cp.connection.wait_closed()
        await where.secondary.heard.call("StartTransaction")
        async with where.arriving("CP-1") as (_, again):
            assert again is home
        assert "StopTransaction" not in where.secondary.heard.actions()


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


def check_heard(stage: Stage, words: dict[str, list[str]], sent: str) -> None:
    """Check what each peer hears; a peer that is not named hears nothing."""
    for peer in PEERS:
        texts, wanted = heard(stage, getattr(stage, peer)), words.get(peer, [])
        assert len(texts) == len(wanted), f"{peer} hears {texts}"
        for word, text in zip(wanted, texts, strict=True):
            assert is_told(word, text, sent), f"{peer} hears {text}, not {word}"


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
        stage.passes(30)
        check_heard(stage, entry["later"], text)
    assert complains(caplog) == entry.get("warns", False)
    stage.charger.calls("after", "Heartbeat")
    while call := stage.outbox(p.Peer.PRIMARY).in_flight:
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
