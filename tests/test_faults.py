"""Faults over real websockets: every peer closes, vanishes, goes deaf, or talks nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from functools import partial

import pytest

import ocpp_2w_proxy as p
from tests.play.peers import charger, cut, deaf, eventually, house, running, server

SHORT = "ping_interval = 0.2\nping_timeout = 0.6\nwatchdog_interval = 0.1\nwatchdog_stale = 1"


async def test_a_session_for_each_server() -> None:
    """The whole path: a charger, two badges, two servers, each with its own session and its own id."""
    async with house() as (proxy, primary, secondary), charger(proxy) as cp:
        await cp.boots()
        for badge in ("PRIM1", "SECO1"):
            assert await cp.calls(badge, "Authorize", idTag=badge) == {"idTagInfo": {"status": "Accepted"}}
            number = await cp.starts(badge, f"start-{badge}")
            await cp.calls(f"m-{badge}", "MeterValues", connectorId=1, transactionId=number, meterValue=[])
            await cp.calls(f"e-{badge}", "StopTransaction", transactionId=number, meterStop=9, timestamp="t")
        await secondary.heard.call("StopTransaction")
        session = ["Authorize", "StartTransaction", "MeterValues", "StopTransaction"]
        assert primary.heard.actions() == ["BootNotification", *session]
        assert secondary.heard.actions() == ["BootNotification", *session]
        for heard, badge in ((primary.heard, "PRIM1"), (secondary.heard, "SECO1")):
            assert (await heard.call("StartTransaction"))[3]["idTag"] == badge
            assert (await heard.call("StopTransaction"))[3]["transactionId"] == 7


def is_call(message_id: str, message: list[object]) -> bool:
    return message[:2] == [2, message_id]


async def test_texts_in_the_same_segment_as_the_101_are_not_lost() -> None:
    """Home Assistant calls at once, and hangs up if it is not answered."""
    async with house() as (proxy, primary, secondary):
        primary.greeting = ['[2,"p","GetConfiguration",{}]']
        secondary.greeting = ['[2,"s","GetConfiguration",{}]']
        async with charger(proxy) as cp:
            for message_id, heard in (("p", primary.heard), ("s", secondary.heard)):
                await cp.heard.call("GetConfiguration")
                await cp.heard.until(partial(is_call, message_id))
                await cp.connection.send(json.dumps([3, message_id, {"configurationKey": []}]))
                await heard.answer(message_id)


# The secondary never hurts.


async def test_a_secondary_that_is_down_is_not_noticed() -> None:
    """Its badge's session is answered, and delivered when it comes."""
    async with house() as (proxy, primary, secondary):
        await secondary.stop()
        async with charger(proxy) as cp:
            await cp.boots()
            number = await cp.starts("SECO1")
            await cp.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp="t")
            await secondary.start()
            await secondary.heard.call("StopTransaction")
        assert secondary.heard.actions() == ["BootNotification", "StartTransaction", "StopTransaction"]
        assert primary.heard.actions() == ["BootNotification"]


async def test_a_secondary_that_hangs_in_its_handshake_delays_nothing() -> None:
    """It accepts the TCP connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with server() as primary:
            ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = ws://127.0.0.1:{port}"
            async with running(ini) as proxy, charger(proxy) as cp:
                assert (await cp.boots())["status"] == "Accepted"


async def test_a_secondary_that_refuses_is_redialled() -> None:
    """For as long as the charger is here."""
    async with house() as (proxy, _, secondary):
        secondary.refusal = (401, {})
        async with charger(proxy) as cp:
            await cp.boots()
            await eventually(lambda: len(secondary.requests) >= 2)
            secondary.refusal = None
            await secondary.heard.call("BootNotification")


@pytest.mark.parametrize("payload", [b"\x00\x01", "\ud800".encode("utf-8", "surrogatepass"), b"x" * 3000])
async def test_an_unfit_frame_closes_that_connection_alone(payload: bytes) -> None:
    """Binary 1003, badly encoded 1007, oversized 1009; the others notice nothing."""
    async with house(host="max_size = 2048") as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        connection = await secondary.connection()
        await connection.send(payload, text=payload[:1] != b"\x00")
        await connection.wait_closed()
        assert connection.close_code == {0: 1003, 0xED: 1007, ord("x"): 1009}[payload[0]]
        await cp.calls("1", "Heartbeat")
        await secondary.connection(1)


@pytest.mark.parametrize(("payload", "code"), [(b"\x00", 1003), (b"\xff\xfe", 1007), (b"x" * 3000, 1009)])
async def test_a_charger_that_sends_an_unfit_frame_is_closed(payload: bytes, code: int) -> None:
    """And nobody else is."""
    async with house(host="max_size = 2048") as (proxy, primary, _):
        async with charger(proxy) as bad, charger(proxy, "CP2") as good:
            await bad.connection.send(payload, text=code != 1003)
            assert await bad.closed() == code
            await good.calls("1", "Heartbeat")
        assert len(primary.connections) == 2


async def test_a_fragmented_message_is_one_message() -> None:
    """With a Ping between its fragments."""
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        text = '[2,"frag","DataTransfer",{"vendorId":"é"}]'.encode()
        cut_at = text.index("é".encode()) + 1

        async def fragments() -> AsyncIterator[bytes]:
            yield text[:cut_at]
            await cp.connection.ping()
            yield text[cut_at:]

        await cp.connection.send(fragments(), text=True)
        await primary.heard.call("DataTransfer")
        assert (await cp.heard.answer("frag"))[0] == 3


async def test_a_deaf_secondary_is_cut_off_and_slows_nobody() -> None:
    """It does not read, so it is not seen; its connection alone is closed."""
    async with house(host=SHORT) as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        connection = await secondary.connection()
        async with deaf(connection):
            await secondary.connection(1)
            await cp.calls("1", "Heartbeat")


async def test_a_peer_that_leaves_too_much_unread_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write buffer has a bound, whoever fills it."""
    monkeypatch.setattr(p, "MAX_WRITE_BUFFER", 1000)
    async with house() as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        connection = await secondary.connection()
        await secondary.heard.call("BootNotification")
        async with deaf(connection):
            link = proxy.relays["CP1"].outboxes[p.Peer.SECONDARY].link
            assert link is not None
            for _ in range(400):
                link.send("x" * 100_000)
            await eventually(lambda: link.is_closed)
        await cp.calls("1", "Heartbeat")


# The primary.


@pytest.mark.parametrize("way", ["close", "cut"])
async def test_a_primary_that_comes_back_within_its_grace_keeps_the_charger(way: str) -> None:
    """Calls wait for it in order."""
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        await cp.boots()
        link = proxy.relays["CP1"].outboxes[p.Peer.PRIMARY].link
        assert link is not None
        if way == "cut":
            cut(primary.connections[0])
        else:
            await primary.connections[0].close(1012)
        await link.ended
        await cp.calls("1", "Heartbeat")
        assert len(primary.connections) == 2
        assert primary.heard.actions() == ["BootNotification", "BootNotification", "Heartbeat"]


async def test_a_primary_that_stays_away_closes_the_charger() -> None:
    """After `primary_grace`, with 1012: its own offline queue takes over."""
    async with house("primary_grace = 0.3") as (proxy, primary, _), charger(proxy) as cp:
        await cp.boots()
        await primary.stop()
        assert await cp.closed() == 1012


# The charger.


@pytest.mark.parametrize("way", ["close", "cut"])
async def test_a_charger_that_goes_takes_its_connections_with_it(way: str) -> None:
    """Nothing of it is left, however it went."""
    async with house() as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            await cp.boots()
            await secondary.heard.call("BootNotification")
            if way == "cut":
                cut(cp.connection)
            else:
                await cp.connection.close()
            for fake in (primary, secondary):
                connection = await fake.connection()
                await asyncio.wait_for(connection.wait_closed(), 5)
                assert connection.close_code == 1001
        await eventually(lambda: proxy.relays == {})


async def test_the_watchdog_looks_at_a_few_chargers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at all of them: those that are gone are let go, the others are pinged."""
    monkeypatch.setattr(p, "RELAYS_AT_ONCE", 1)
    monkeypatch.setattr(p, "TICK_SECONDS", 0.01)
    async with house(host="ping_interval = 0.1") as (proxy, *_):
        async with charger(proxy, "STAYS") as stays:
            for name in ("A", "B", "C"):
                async with charger(proxy, name):
                    pass
            await eventually(lambda: list(proxy.relays) == ["STAYS"])
            link = proxy.relays["STAYS"].link
            assert link is not None
            pinged = link.ping_at
            await eventually(lambda: link.ping_at > pinged)
            await stays.calls("h", "Heartbeat")


async def test_a_charger_that_is_not_seen_is_closed_by_the_watchdog() -> None:
    """It neither sends nor answers Pings."""
    async with house(host=SHORT) as (proxy, _, _), charger(proxy) as cp:
        await cp.connection.ping()
        await cp.boots()
        async with deaf(cp.connection):
            await eventually(lambda: "CP1" not in proxy.relays)


async def test_a_quiet_charger_that_answers_pings_is_never_closed() -> None:
    """A Pong is a sign of life."""
    async with house(host=SHORT) as (proxy, _, _), charger(proxy) as cp:
        link = proxy.relays["CP1"].link
        assert link is not None
        await eventually(lambda: link.has_ponged)
        opened = link.opened
        await eventually(lambda: link.loop.time() - opened > 1.5)
        assert link.is_open
        await cp.calls("1", "Heartbeat")


async def test_a_fault_of_the_proxy_closes_one_connection_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug that one charger's message finds is logged with its traceback; the process lives."""
    call = p.Router.charger_call

    def faulty(self: p.Router, message: p.Message, now: p.Instant) -> list[p.Decision]:
        if message.action == "DataTransfer":
            raise RuntimeError("a bug")
        return call(self, message, now)

    monkeypatch.setattr(p.Router, "charger_call", faulty)
    async with house() as (proxy, _, _), charger(proxy) as bad, charger(proxy, "CP2") as good:
        await bad.connection.send('[2,"1","DataTransfer",{"vendorId":"x"}]')
        await bad.closed()
        await good.calls("1", "Heartbeat")
    assert any(record.exc_info for record in caplog.records)


async def test_a_task_that_fails_is_reported_to_the_loop() -> None:
    """A bug in a dial or a handshake is seen, and ends nothing else."""
    reported: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["message"]))

    async def fails() -> None:
        raise RuntimeError("a bug")

    tasks = p.Tasks()
    await asyncio.wait([tasks.start(fails(), "CP1: primary: dial")])
    await eventually(lambda: not tasks.running)
    assert reported == ["CP1: primary: dial failed"]


async def test_a_peer_that_is_gone_before_its_last_word_is_cut_off() -> None:
    """The system knows it before asyncio does."""

    class GoneTransport(asyncio.Transport):
        was_cut = False

        def can_write_eof(self) -> bool:
            return True

        def write_eof(self) -> None:
            raise OSError(107, "Transport endpoint is not connected")

        def abort(self) -> None:
            self.was_cut = True

    link = p.incoming_link(1024, lambda _: None)
    link.transport = transport = GoneTransport()
    link._end()
    assert transport.was_cut


async def test_stopping_tells_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever restarts the proxy has to know which sessions did not get through."""
    async with house() as (proxy, _, secondary), charger(proxy) as cp:
        await secondary.stop()
        await cp.starts("SECO1")
        await proxy.stop()
    told = {record.getMessage() for record in caplog.records if "lost" in record.getMessage()}
    assert told == {f"CP1: 1 stored Calls for {secondary.url} are lost: StartTransaction"}


async def test_a_secondary_that_is_no_tls_server_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """An error without words is told all the same."""
    async with server() as primary, server() as secondary:
        wss = secondary.url.replace("ws:", "wss:")
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {wss}"
        async with running(ini) as proxy, charger(proxy):
            await eventually(lambda: any("cannot connect to wss" in r.getMessage() for r in caplog.records))


async def test_stopping_closes_everything_whatever_the_peers_do() -> None:
    """Even a peer that reads nothing does not hold it up."""
    async with server() as primary, server() as secondary:
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {secondary.url}"
        async with running(ini) as proxy, charger(proxy) as cp, charger(proxy, "CP2") as deaf_charger:
            await cp.boots()
            async with deaf(deaf_charger.connection):
                async with asyncio.timeout(p.STOP_SECONDS + 2):
                    await proxy.stop()
                assert await cp.closed() == 1001
