"""Bounds against peers that send too much: of a message, of frames, of handshakes, of what is remembered."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

import ocpp_2w_proxy as p
from tests.play.kills import warnings
from tests.play.peers import PATIENCE, charger, deaf, eventually, house, running
from tests.play.plays import Stage, actions, config_of
from tests.test_handshake import knock

LOCAL = "[ext-server]\nserver = local\n"

# One message.


def call_with(data: str) -> str:
    return f'[2,"1","DataTransfer",{{"vendorId":"x","data":{data}}}]'


@pytest.mark.parametrize("data", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_a_message_that_json_refuses_is_answered_with_a_call_error(data: str) -> None:
    """It is dropped; the connection stands, and the Call is answered by its id."""
    stage = Stage()
    stage.charger.says(call_with(data))
    assert [answer[:3] for answer in stage.charger.hears()] == [[4, "1", "FormationViolation"]]
    assert stage.primary.hears() == []
    assert stage.charger.closed_with is None


@pytest.mark.parametrize("value", ["3", "idTag", "transactionId"])
def test_a_long_stop_reaches_its_server_whatever_its_readings_say(value: str) -> None:
    """A night of readings, among whose values is what may also be a key, is no riddle and no mistake."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stop = {"transactionId": transaction_id, "meterStop": 9, "timestamp": "t"}
    readings = [{"timestamp": "t", "sampledValue": [{"value": value, "context": "Sample.Periodic"}]}] * 1500
    stage.charger.calls("9", "StopTransaction", **stop, transactionData=readings)
    assert stage.charger.hears() == [[3, "9", {}]]
    assert actions(stage.secondary.hears()) == ["StopTransaction"]


@pytest.mark.parametrize("version", ["ocpp1.6", "ocpp2.0.1"])
def test_the_longest_last_message_of_a_session_reaches_its_server(version: str) -> None:
    """As long as `max_size` allows, with nine values a reading: what it says is not held against it."""
    stage, unit = Stage(version=version), {"unitOfMeasure": {"unit": "V"}}
    value = {"value": 231.4, "measurand": "Voltage", "phase": "L1", **unit}
    if version == "ocpp1.6":
        transaction_id = stage.secondary_session()
        value |= {"value": "231.4", "unit": "V"}
        del value["unitOfMeasure"]
        action, readings = "StopTransaction", "transactionData"
        payload: dict[str, Any] = {"transactionId": transaction_id, "meterStop": 9, "timestamp": "t"}
    else:
        payload = {"eventType": "Ended", "timestamp": "t", "triggerReason": "EVDeparted", "seqNo": 0}
        payload |= {"transactionInfo": {"transactionId": "T1"}, "idToken": {"idToken": "SECO1", "type": "x"}}
        action, readings = "TransactionEvent", "meterValue"
    reading = {"timestamp": "2026-01-01T00:00:00Z", "sampledValue": [value] * 9}
    room = 2**20 - len(p.call_text("9", action, p.dump(payload))) - 30
    payload[readings] = [reading] * (room // (len(p.dump(reading)) + 1))
    text = p.call_text("9", action, p.dump(payload))
    assert 2**20 - 1000 < len(text) <= 2**20
    stage.charger.says(text)
    assert [answer[:2] for answer in stage.charger.hears()] == [[3, "9"]]
    assert actions(stage.secondary.hears()) == [action]


def test_a_long_last_event_reaches_its_server_with_its_badge() -> None:
    """In OCPP 2.x a badge stands at idToken.idToken: that this key is there twice means nothing."""
    stage = Stage(version="ocpp2.0.1")
    readings = [{"timestamp": "t", "sampledValue": [{"value": 3, "context": "Sample.Periodic"}]}] * 1500
    token = {"idToken": "PRIM1", "type": "ISO14443"}
    for number, kind in enumerate(("Started", "Ended")):
        payload = {"eventType": kind, "timestamp": "t", "triggerReason": "Authorized", "seqNo": number}
        payload |= {"transactionInfo": {"transactionId": "T1"}, "idToken": token, "meterValue": readings}
        stage.charger.calls(str(number), "TransactionEvent", **payload)
        stage.primary.answers(str(number))
    assert [answer[0] for answer in stage.charger.hears()] == [3, 3]


def test_calls_that_wait_for_the_charger_are_bounded_in_length_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends long ones is told so."""
    monkeypatch.setattr(p, "MAX_COMMANDS_TEXT", 1000)
    stage = Stage()
    for number in range(5):
        stage.primary.calls(str(number), "DataTransfer", vendorId="v", data="x" * 600)
    assert stage.charger.hears_call()[0] == "0"
    assert [answer[:3] for answer in stage.primary.hears()] == [
        [4, "3", "GenericError"],
        [4, "4", "GenericError"],
    ]


def test_calls_that_wait_for_a_server_are_bounded_in_length_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charger sends what is dropped again."""
    monkeypatch.setattr(p, "MAX_LIVE_TEXT", 1000)
    stage = Stage()
    for number in range(5):
        stage.charger.calls(str(number), "DataTransfer", vendorId="v", data="x" * 600)
    assert [call.message_id for call in stage.outbox(p.Peer.PRIMARY).live] == ["1", "2"]
    assert stage.journal.news.counts["dropped_messages", "queue-full"] == 2


def test_statuses_are_bounded_together() -> None:
    """The oldest goes."""
    stage = Stage()
    info = "x" * (p.MAX_SELF_DESCRIPTION // 3)
    for connector in range(4):
        stage.charger.calls(
            str(connector), "StatusNotification", connectorId=connector, status="Available", info=info
        )
    assert list(stage.memory.statuses) == ["[2,2]", "[3,3]"]


def test_starts_and_stops_are_known_again_however_long_they_are(play: Any) -> None:
    """What they are known by is kept short."""
    stage = play()
    told = []
    for message_id in ("a", "b"):
        stage.charger.calls(
            message_id, "StartTransaction", connectorId=1, idTag="SECO1", meterStart=0, timestamp="9" * 1000
        )
        told += [answer[2]["transactionId"] for answer in stage.charger.hears()]
    assert told[0] == told[1]
    (session,) = stage.memory.sessions.values()
    assert len(session.start) <= p.MAX_SHORT


def test_a_boot_or_status_that_is_too_long_passes_but_is_not_remembered() -> None:
    """It would be repeated at every connection."""
    stage = Stage()
    boot, padding = stage.memory.boot, "x" * p.MAX_SELF_DESCRIPTION
    stage.charger.calls("1", "StatusNotification", connectorId=1, status="Available", info=padding)
    stage.primary.answers("1")
    stage.charger.calls("2", "BootNotification", chargePointVendor=padding)
    assert actions(stage.primary.hears()) == ["StatusNotification", "BootNotification"]
    assert stage.memory.boot == boot
    assert stage.memory.statuses == {}


def test_refused_calls_are_bounded_in_length_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes, as with too many of them."""
    stage = Stage()
    text = '[2,"1","Heartbeat",{}]'
    monkeypatch.setattr(p, "MAX_STORED_TEXT", 2 * len(text))
    for _ in range(3):
        stage.memory.refuse(p.Call(p.Kind.STORED, "Heartbeat", "1", text, p.NOTHING), "no")
    assert len(stage.memory.refused) == 2


# Frames.


def masked(opcode: Opcode, data: bytes = b"", fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


@asynccontextmanager
async def raw_charger(proxy: p.Proxy, name: str = "RAW") -> AsyncIterator[tuple[Any, Any]]:
    """A charger that sends bytes, as it likes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    request = f"GET /{name} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
    writer.write(request.encode())
    async with asyncio.timeout(PATIENCE):
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def close_code(reader: asyncio.StreamReader) -> int:
    """Return the code of the Close frame that comes, past the Pings."""
    async with asyncio.timeout(PATIENCE):
        data = await reader.read()
    code: int = struct.unpack("!H", data[data.index(0x88) + 2 :][:2])[0]
    return code


async def test_a_message_of_too_many_fragments_closes_its_sender() -> None:
    """Empty ones cost nothing to send, and memory to keep."""
    async with running(LOCAL) as proxy, charger(proxy) as good, raw_charger(proxy) as (reader, writer):
        writer.write(masked(Opcode.TEXT, fin=False) + masked(Opcode.CONT, fin=False) * p.MAX_FRAGMENTS)
        assert await close_code(reader) == 1009
        await good.boots()


async def test_a_frame_that_announces_too_much_closes_its_sender_at_once() -> None:
    """Its 2^62 bytes are not waited for."""
    async with running(LOCAL) as proxy, raw_charger(proxy) as (reader, writer):
        writer.write(b"\x81\xff" + struct.pack("!Q", 2**62) + b"mask")
        assert await close_code(reader) == 1009


async def test_a_ping_flood_of_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Pongs would fill the memory."""
    monkeypatch.setattr(p, "MAX_WRITE_BUFFER", 50_000)
    async with running(LOCAL) as proxy, raw_charger(proxy) as (_, writer):
        writer.transport.pause_reading()
        link = proxy.relays["RAW"].link
        assert link is not None
        assert link.transport is not None
        link.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
        pings = masked(Opcode.PING, b"x" * 125) * 1000
        async with asyncio.timeout(PATIENCE):
            while not link.is_closed:
                writer.write(pings)
                await asyncio.sleep(0)
        assert link.closed_by == "it does not read what it is sent"


async def test_one_long_message_to_a_slow_reader_is_no_reason_to_cut_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what piles up is."""
    monkeypatch.setattr(p, "MAX_WRITE_BUFFER", 1000)
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        await cp.boots()
        link = proxy.relays["CP1"].outboxes[p.Peer.PRIMARY].link
        assert link is not None
        assert link.transport is not None
        link.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
        async with deaf(primary.connections[0]):
            await cp.connection.send(call_with('"' + "x" * 900_000 + '"'))
            await eventually(lambda: bool(link.transport and link.transport.get_write_buffer_size() > 1000))
        await cp.heard.answer("1")


async def test_the_system_watches_for_dead_machines() -> None:
    """On every connection, of chargers and to servers."""
    async with house() as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        await secondary.heard.call("BootNotification")
        links = list(proxy.relays["CP1"].links())
        assert len(links) == 3
        for link in links:
            assert link.transport is not None
            connection = link.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


# Handshakes.


async def test_half_open_connections_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has waited longest for its request goes first."""
    monkeypatch.setattr(p, "MAX_HALF_OPEN", 3)
    async with running(LOCAL) as proxy:
        idle = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(5)]
        async with charger(proxy) as cp:
            await cp.boots()
        async with asyncio.timeout(PATIENCE):
            assert [await reader.read() for reader, _ in idle[:2]] == [b"", b""]
        await eventually(lambda: len(proxy.half_open) <= 3)
        for _, writer in idle:
            writer.close()


def test_half_open_connections_leave_room_for_chargers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take an eighth of the files at most, and chargers a third of what is not the proxy's own."""
    for files, half_open, chargers in ((1024, 128, 308), (65536, 5000, 10_000)):
        monkeypatch.setattr(p, "raised_file_limit", lambda files=files: files)
        proxy = p.Proxy(config_of(LOCAL))
        assert (proxy.max_half_open, proxy.max_chargers) == (half_open, chargers)


async def test_a_request_that_is_too_long_is_cut_off() -> None:
    """Also one of many headers that are each short enough."""
    async with running(LOCAL) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /CP1 HTTP/1.1\r\n" + b"X: " + b"x" * 7000 + b"\r\n")
        writer.write((b"Y: " + b"y" * 7000 + b"\r\n") * 20)
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionResetError):  # Cut without a word, or with a reset: both will do.
                assert await reader.read() == b""
        writer.close()
        await eventually(lambda: not proxy.handshakes)


async def test_what_comes_before_the_handshake_is_answered_is_bounded_in_bytes() -> None:
    """A charger may speak early; what it says waits in its own buffers, not in the proxy's."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        request = "GET /CP1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
        long = masked(Opcode.TEXT, call_with('"' + "x" * 500_000 + '"').encode())
        writer.write(request.encode() + long)
        await eventually(lambda: any(len(link.rest) > p.MAX_EARLY_BYTES for link in proxy.handshakes))
        (link,) = proxy.handshakes
        assert len(link.rest) <= p.MAX_EARLY_BYTES + len(p.RECEIVE_BUFFER)
        primary.may_answer.set()
        await primary.heard.call("DataTransfer")
        writer.close()
        async with asyncio.timeout(PATIENCE):
            await reader.read()


# All chargers.


async def test_beyond_the_file_limit_newcomers_get_503_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line a minute tells of it; a charger that is known may still come again."""
    enough = p.FILES_OF_OUR_OWN + 3 * p.FILES_OF_A_CHARGER - 1
    monkeypatch.setattr(p, "raised_file_limit", lambda: enough)
    async with running(LOCAL) as proxy:
        async with charger(proxy) as first, charger(proxy, "CP2"):
            for _ in range(3):
                with pytest.raises(Exception, match="503"):
                    async with charger(proxy, "CP3"):
                        pass
            await first.calls("1", "Heartbeat")
            async with charger(proxy) as again:
                await again.calls("2", "Heartbeat")
    (line,) = warnings(caplog, "there is no room")
    assert line.startswith("CP3: refused: there is no room; 2 chargers are here, 2 known, ")


async def test_of_newcomers_that_come_at_once_no_more_are_let_in_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though there was room for each when its primary was asked; the primary's connection is closed again."""
    monkeypatch.setattr(p, "raised_file_limit", lambda: p.FILES_OF_OUR_OWN + 2 * p.FILES_OF_A_CHARGER)
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        visits = [asyncio.create_task(knock(proxy, f"CP{number}")) for number in range(6)]
        streams = [await visit for visit in visits]
        await eventually(lambda: len(primary.requests) == 6)
        primary.may_answer.set()
        async with asyncio.timeout(PATIENCE):
            answers = [(await reader.readline()).split()[1] for reader, _ in streams]
        assert sorted(answers) == [b"101"] * 2 + [b"503"] * 4
        await eventually(lambda: sum(c.state.name == "OPEN" for c in primary.connections) == 2)
        for _, writer in streams:
            writer.close()


async def test_a_charger_that_has_left_takes_no_place_while_its_server_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However much waits for the secondary: what is open counts, not what is remembered."""
    limit = p.FILES_OF_OUR_OWN + 36
    monkeypatch.setattr(p, "raised_file_limit", lambda: limit)
    async with house() as (proxy, _, secondary):
        await secondary.stop()
        for number in range(20):
            async with charger(proxy, f"CP{number}") as cp:
                await cp.starts("SECO1")
        assert len(proxy.relays) > proxy.max_chargers


async def test_beyond_the_chargers_that_can_be_remembered_newcomers_get_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody with an open session is forgotten; the oldest without one is."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 2)
    async with running(LOCAL) as proxy:
        for name in ("CP1", "CP2"):
            async with charger(proxy, name) as cp:
                number = await cp.starts("ANY")
        await eventually(lambda: not proxy.journal.news.present)
        with pytest.raises(Exception, match="503"):
            async with charger(proxy, "CP3"):
                pass
        async with charger(proxy, "CP2") as cp:
            await cp.calls("e", "StopTransaction", transactionId=number, meterStop=1, timestamp="x")
        await eventually(lambda: "CP2" not in proxy.relays)
        async with charger(proxy, "CP3"):
            assert list(proxy.journal.memories) == ["CP1", "CP3"]


def test_the_oldest_idle_charger_is_forgotten_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is idle, no other is let in."""
    monkeypatch.setattr(p, "MAX_MEMORIES", 3)
    journal = p.Journal(p.current_instant)
    for name in "abc":
        journal.memory(name).is_in_use = name == "a"
    assert journal.has_room("d")
    assert set(journal.memories) == {"a", "c"}
    for name in "cd":
        journal.memory(name).is_in_use = True
    assert not journal.has_room("e")
    assert journal.has_room("a")


def test_the_process_may_open_as_many_files_as_the_system_allows() -> None:
    """The soft limit is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        limit = p.raised_file_limit()
        assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 500
        assert p.raised_file_limit() == limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connections_that_the_system_cannot_open_are_told_of_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other failures of the loop are, too; what asyncio does with a closed port is no failure."""
    async with running(LOCAL) as proxy:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            message = "socket.accept() out of system resource"
            proxy.loop_failed(loop, {"message": message, "exception": OSError(24, "Too many open files")})
        for _ in range(3):
            proxy.loop_failed(loop, {"message": "a bug", "exception": ValueError("x")})
        late = "<TimerHandle BaseSelectorEventLoop._start_serving(...)>"
        proxy.loop_failed(loop, {"message": "late", "exception": ValueError("-1"), "handle": late})
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings(caplog, "connections have to wait: [Errno 24] Too many open files")) == 1
    assert [line.partition("\n")[0] for line in told if "connections" not in line] == ["a bug"]


# Log lines.


def test_a_line_that_peers_can_cause_at_will_comes_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the number of those that were held back."""
    seconds = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    complaints = p.Complaints()
    for subject in ("a", "a", "b", "a"):
        complaints.say(logging.WARNING, subject, "about %s", subject)
    seconds += p.COMPLAINT_SECONDS
    complaints.say(logging.WARNING, "a", "about %s", "a")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["about a", "about b", "about a (2 more like it since the last such line)"]


def test_what_is_known_of_complaints_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subjects are made of what peers say."""
    monkeypatch.setattr(p, "MAX_SUBJECTS", 3)
    complaints = p.Complaints()
    for number in range(10):
        for _ in range(2):
            complaints.say(logging.DEBUG, str(number), "text")
    assert len(complaints.told) == len(complaints.held_back) == 3


# Look-ups.


async def test_a_look_up_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who ask for the same name wait together, in one thread."""
    asked: list[str] = []
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    look_up = socket.getaddrinfo

    def slow(host: str, *more: Any, **options: Any) -> Any:
        asked.append(host)
        if host == "hangs.example":
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(PATIENCE)
        return look_up("127.0.0.1", *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = p.Resolver()
    first, second = (asyncio.create_task(resolver.addresses("hangs.example", 1)) for _ in range(2))
    assert await resolver.addresses("quick.example", 1)
    first.cancel()
    release.set()
    assert await second
    assert sorted(asked) == ["hangs.example", "quick.example"]
    assert resolver.asked == {}


async def test_a_name_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As told by the system."""

    def fails(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(OSError, match="not known"):
        await p.Resolver().addresses("nowhere.example", 1)


async def test_each_address_of_a_server_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first does not answer, the next may."""
    async with house() as (_, primary, _):
        dialer = p.Dialer(1024)

        async def addresses(_: str, port: int) -> list[Any]:
            places = [("127.0.0.1", 1), ("127.0.0.1", port)]
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in places]

        monkeypatch.setattr(dialer.resolver, "addresses", addresses)
        server = config_of(f"[ext-server]\nserver = {primary.url}").default.primary
        link = await dialer.dial(p.Peer.PRIMARY, server, "CP1", ["ocpp1.6"], p.Credentials())
        link.abort()
        await link.ended
