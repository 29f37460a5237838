"""Handshakes over real websockets: who gets in, under which name, with which credentials."""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket

import pytest
from websockets.asyncio.client import connect
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, charger, deaf, eventually, house, running, server


async def refused(proxy: p.Proxy, charger_id: str = "CP1", **options: object) -> tuple[int, dict[str, str]]:
    """Return status and headers of the refusal that a charger gets."""
    uri = f"ws://127.0.0.1:{proxy.port}/{charger_id}"
    with pytest.raises(InvalidStatus) as caught:
        await connect(uri, subprotocols=[Subprotocol("ocpp1.6")], **options)  # type: ignore[arg-type]
    return caught.value.response.status_code, dict(caught.value.response.headers.raw_items())


async def knock(proxy: p.Proxy, path: str = "CP1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a handshake without waiting for what becomes of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    request = f"GET /{path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
    writer.write(request.encode())
    await writer.drain()
    return reader, writer


async def test_a_charger_gets_in_after_its_primary_has_accepted_it() -> None:
    """The primary sees its id, offer, User-Agent and Authorization; the secondary no credentials."""
    async with house() as (proxy, primary, secondary):
        headers = {"Authorization": "Basic Q1AxOnNlY3JldA=="}
        async with charger(
            proxy, "a/CP%201?token=x", additional_headers=headers, user_agent_header="Wallbox/1"
        ) as cp:
            await cp.boots()
            (seen,) = primary.requests
            assert seen.path == "/ocpp/CP%201"
            assert seen.headers["Authorization"] == "Basic Q1AxOnNlY3JldA=="
            assert seen.headers["User-Agent"] == "Wallbox/1"
            assert seen.headers["Sec-WebSocket-Protocol"] == "ocpp1.6"
            assert "Sec-WebSocket-Extensions" not in seen.headers
            await secondary.heard.call("BootNotification")
            (seen,) = secondary.requests
            assert seen.path == "/ocpp/CP%201"
            assert "Authorization" not in seen.headers
            assert seen.headers["User-Agent"] == "Wallbox/1"


@pytest.mark.parametrize("status", [401, 403, 404, 429])
async def test_the_primarys_refusal_is_the_chargers(status: int) -> None:
    """With its WWW-Authenticate and Retry-After, and no connection to the secondary."""
    async with house() as (proxy, primary, secondary):
        primary.refusal = (status, {"WWW-Authenticate": 'Basic realm="x"', "Retry-After": "9", "X-Else": "1"})
        got, headers = await refused(proxy)
        assert got == status
        assert headers["WWW-Authenticate"] == 'Basic realm="x"'
        assert headers["Retry-After"] == "9"
        assert "X-Else" not in headers
        assert secondary.requests == []
        assert proxy.relays == {}


@pytest.mark.parametrize("status", [302, 500, 503])
async def test_anything_else_but_101_is_503(status: int) -> None:
    """The charger comes back later."""
    async with house() as (proxy, primary, _):
        primary.refusal = (status, {"Location": "ws://127.0.0.1:1/evil"})
        assert (await refused(proxy))[0] == 503


async def test_a_primary_that_cannot_be_reached_is_503() -> None:
    """Nothing listens there."""
    async with server() as primary:
        url = primary.url
    async with running(f"[ext-server]\nserver = {url}") as proxy:
        assert (await refused(proxy))[0] == 503


async def test_a_primary_that_answers_garbage_is_503() -> None:
    """Not HTTP at all, or HTTP that is cut short."""
    for garbage in (b"SSH-2.0-hello\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\nno length", b""):

        async def talk(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, garbage: bytes = garbage
        ) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(garbage)
            writer.close()

        listener = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            async with running(f"[ext-server]\nserver = ws://127.0.0.1:{port}") as proxy:
                assert (await refused(proxy))[0] == (404 if b"404" in garbage else 503)


async def test_a_primary_that_never_answers_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charger is not left hanging."""
    monkeypatch.setattr(p, "DIAL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with running(f"[ext-server]\nserver = ws://127.0.0.1:{port}") as proxy:
            assert (await refused(proxy))[0] == 503


@pytest.mark.parametrize(
    "path", ["", "..", "%2e%2e", "a%2Fb%00", "CP%0d%0aEvil", "%C3%A9", "x" * 49, "CP1%3Cscript%3E", "CP\t1"]
)
async def test_a_path_without_a_charger_id_is_404_and_reaches_no_server(path: str) -> None:
    """Whatever would be read differently by a server or a log."""
    async with house() as (proxy, primary, _):
        reader, writer = await knock(proxy, path)
        async with asyncio.timeout(PATIENCE):
            assert (await reader.readline()).split()[1] == b"404"
        writer.close()
        assert primary.requests == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("CP1", "CP1"),
        ("//CP1/", "CP1"),
        ("ws://192.168.0.1:9000/CP_1/SERIAL-1234", "SERIAL-1234"),
        ("RDAM%7C123", "RDAM%7C123"),
        ("a:b*c=d+e@f.g%20h", "a%3Ab%2Ac%3Dd%2Be%40f.g%20h"),
    ],
)
async def test_the_last_segment_of_the_path_is_the_charger_id(path: str, name: str) -> None:
    """Decoded once, and encoded again for the server."""
    async with house() as (proxy, primary, _), charger(proxy, path):
        assert primary.requests[0].path == f"/ocpp/{name}"


async def test_only_the_chargers_of_the_ini_may_connect() -> None:
    """`chargers` is a list of patterns."""
    async with house(host="chargers = HOME-*, CP 1") as (proxy, primary, _):
        assert (await refused(proxy, "OTHER"))[0] == 404
        async with charger(proxy, "HOME-7"), charger(proxy, "CP%201"):
            assert len(primary.requests) == 2


async def test_each_server_may_know_the_charger_by_another_name_and_login() -> None:
    """`*_id`, `*_user`, `*_password`; a password alone logs in as the id."""
    more = "primary_id = HOME\nprimary_user = u\nprimary_password = p:w\n"
    more += "secondary_id = CAR 9\nsecondary_password = s\n"
    async with house(more) as (proxy, primary, secondary):
        headers = {"Authorization": "Basic Q1AxOnNlY3JldA=="}
        async with charger(proxy, additional_headers=headers):
            assert primary.requests[0].path == "/ocpp/HOME"
            assert primary.requests[0].headers.get_all("Authorization") == [
                "Basic " + base64.b64encode(b"u:p:w").decode()
            ]
            await secondary.connection()
            assert secondary.requests[0].path == "/ocpp/CAR%209"
            assert (
                secondary.requests[0].headers["Authorization"]
                == "Basic " + base64.b64encode(b"CAR 9:s").decode()
            )


async def test_the_chargers_login_is_shown_to_the_secondary_only_if_the_ini_says_so() -> None:
    """`secondary_auth = forward`; and `primary_auth = none` keeps it from the primary."""
    async with house("secondary_auth = forward\nprimary_auth = none") as (proxy, primary, secondary):
        async with charger(proxy, additional_headers={"Authorization": "Basic eHg="}):
            await secondary.connection()
            assert secondary.requests[0].headers["Authorization"] == "Basic eHg="
            assert "Authorization" not in primary.requests[0].headers


# Subprotocols.


async def test_the_subprotocol_is_the_primarys_choice() -> None:
    """The charger's offer, narrowed by `versions`; the secondary is offered the choice alone."""
    async with house("versions = ocpp2.0.1, ocpp1.6") as (proxy, primary, secondary):
        offer = ["ocpp2.1", "ocpp2.0.1", "ocpp1.6"]
        async with charger(proxy, versions=offer) as cp:
            assert primary.requests[0].headers["Sec-WebSocket-Protocol"] == "ocpp2.0.1, ocpp1.6"
            chosen = primary.connections[0].subprotocol
            assert cp.connection.subprotocol == chosen
            await secondary.connection()
            assert secondary.requests[0].headers["Sec-WebSocket-Protocol"] == chosen


async def test_a_charger_that_offers_nothing_is_taken_as_1_6() -> None:
    """Some chargers send no Sec-WebSocket-Protocol, or an empty or quoted one."""
    async with house() as (proxy, primary, _):
        uri = f"ws://127.0.0.1:{proxy.port}/CP1"
        for headers in ({}, {"Sec-WebSocket-Protocol": ""}):
            async with connect(uri, additional_headers=headers) as connection:
                assert connection.subprotocol is None
    assert {request.headers["Sec-WebSocket-Protocol"] for request in primary.requests} == {"ocpp1.6"}


def test_quotes_around_a_subprotocol_are_not_part_of_it() -> None:
    """The library would refuse such a header; it is put in proper form for it."""
    headers = Headers([("Sec-WebSocket-Protocol", '"ocpp1.6", ocpp2.0.1'), ("Sec-WebSocket-Protocol", "b@d")])
    assert p.offered_subprotocols(headers) == ["ocpp1.6", "ocpp2.0.1"]
    assert headers.get_all("Sec-WebSocket-Protocol") == ["ocpp1.6, ocpp2.0.1"]


async def test_a_charger_hears_its_own_spelling_of_the_subprotocol() -> None:
    """What is echoed is what was offered."""
    async with house() as (proxy, primary, _), charger(proxy, versions=["OCPP1.6"]) as cp:
        assert cp.connection.subprotocol == "OCPP1.6"
        assert primary.requests[0].headers["Sec-WebSocket-Protocol"] == "ocpp1.6"


async def test_a_charger_that_offers_no_version_we_know_is_accepted_and_closed() -> None:
    """OCPP-J 1.6 3.2: completed without a subprotocol, then closed."""
    async with house() as (proxy, primary, _), charger(proxy, versions=["ocpp1.5"]) as cp:
        assert await cp.closed() == 1002
        assert cp.connection.subprotocol is None
        assert primary.requests == []


async def test_a_primary_that_answers_without_a_subprotocol_is_taken_as_1_6() -> None:
    """Some servers do not say which version they speak."""
    async with server(versions=[]) as primary, running(f"[ext-server]\nserver = {primary.url}") as proxy:
        async with charger(proxy, versions=["ocpp2.0.1", "ocpp1.6"]) as cp:
            assert cp.connection.subprotocol == "ocpp1.6"
            assert proxy.relays["CP1"].version == "ocpp1.6"


async def test_a_local_primary_takes_the_chargers_first_version_that_we_know() -> None:
    """There is no server to ask."""
    async with running("[ext-server]\nserver = local") as proxy:
        async with charger(proxy, versions=["ocpp1.5", "ocpp2.0.1", "ocpp1.6"]) as cp:
            assert cp.connection.subprotocol == "ocpp2.0.1"
            assert (await cp.calls("1", "Heartbeat")).keys() == {"currentTime"}


async def test_a_secondary_that_does_not_speak_the_version_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A 101 without the one subprotocol that it was offered is no connection."""
    async with server() as primary, server(versions=[]) as secondary:
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {secondary.url}"
        async with running(ini) as proxy, charger(proxy, versions=["ocpp2.0.1"]):
            await eventually(
                lambda: any("check versions" in record.getMessage() for record in caplog.records)
            )


# Takeover.


async def test_a_charger_that_connects_again_replaces_its_old_connection() -> None:
    """At once, without waiting for the dead one to close."""
    async with house() as (proxy, primary, secondary), charger(proxy) as old:
        await old.boots()
        await secondary.connection()
        async with deaf(old.connection), charger(proxy) as new:
            await new.calls("1", "Heartbeat")
            assert len(primary.connections) == 2
            assert len(secondary.connections) == 1
        assert await old.closed() == 1001


async def test_a_newcomer_that_the_primary_refuses_does_not_touch_a_living_charger() -> None:
    """The old charger answers a Ping, and the refusal stands."""
    async with house() as (proxy, primary, _), charger(proxy) as old:
        primary.refusal = (401, {})
        assert (await refused(proxy))[0] == 401
        primary.refusal = None
        await old.calls("1", "Heartbeat")
        assert len(primary.connections) == 1


async def test_a_dead_charger_makes_room_at_a_primary_that_allows_one_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No Pong: its connections are closed and the primary is asked once more."""
    monkeypatch.setattr(p, "PROBE_SECONDS", 0.3)
    async with house() as (proxy, primary, _), charger(proxy) as old:
        primary.one_connection_per_charger = True
        async with deaf(old.connection), charger(proxy) as new:
            await new.calls("1", "Heartbeat")
        assert [request.path for request in primary.requests] == ["/ocpp/CP1"] * 3


async def test_a_dead_charger_whose_successor_is_refused_again_stays_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The primary has the last word."""
    monkeypatch.setattr(p, "PROBE_SECONDS", 0.3)
    async with house() as (proxy, primary, _), charger(proxy) as old:
        primary.refusal = (403, {})
        async with deaf(old.connection):
            assert (await refused(proxy))[0] == 403
        assert await old.closed() == 1001


async def test_a_probe_of_the_old_connection_does_not_close_a_newer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the old one is probed for a newcomer, another newcomer is let in."""
    monkeypatch.setattr(p, "PROBE_SECONDS", 0.5)
    async with house() as (proxy, primary, _), charger(proxy) as old:
        async with deaf(old.connection):
            primary.refusal = (403, {})
            probing = asyncio.create_task(refused(proxy))
            await eventually(lambda: len(primary.requests) == 2)
            primary.refusal = None
            async with charger(proxy) as new:
                primary.refusal = (403, {})
                assert (await probing)[0] == 403
                primary.refusal = None
                await new.calls("1", "Heartbeat")


async def test_a_redial_of_the_primary_does_not_replace_a_newer_connection() -> None:
    """The charger reconnects while the proxy redials its primary; one connection is left, and it works."""
    async with house() as (proxy, primary, _), charger(proxy) as old:
        outbox = proxy.relays["CP1"].outboxes[p.Peer.PRIMARY]
        await old.boots()
        await primary.connections[0].close()
        outbox.dial()
        async with charger(proxy) as new:
            await new.calls("1", "Heartbeat")
            await eventually(lambda: sum(c.state.name == "OPEN" for c in primary.connections) == 1)
            await new.calls("2", "Heartbeat")


async def test_a_newcomer_that_hung_up_during_its_handshake_replaces_nobody() -> None:
    """The primary accepts it too late; the charger that is here stays."""
    async with house() as (proxy, primary, _), charger(proxy) as old:
        primary.may_answer.clear()
        _, writer = await knock(proxy)
        await eventually(lambda: bool(proxy.handshakes))
        link = next(iter(proxy.handshakes))
        writer.close()
        await link.ended
        primary.may_answer.set()
        await eventually(lambda: not proxy.handshakes)
        await old.calls("1", "Heartbeat")


async def test_texts_before_the_handshake_is_answered_are_heard_and_bounded() -> None:
    """A hasty charger loses nothing, and one that floods is paused."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        _, writer = await knock(proxy)
        await eventually(lambda: bool(primary.requests))
        (link,) = proxy.handshakes
        assert link.transport is not None
        for number in itertools.count():
            text = f'[2,"{number}","DataTransfer",{{"vendorId":"{"x" * 1000}"}}]'.encode()
            writer.write(Frame(Opcode.TEXT, text).serialize(mask=True))
            await asyncio.sleep(0.001)  # The proxy reads it.
            if not link.transport.is_reading():
                break
        assert p.MAX_EARLY_BYTES < len(link.rest) <= p.MAX_EARLY_BYTES + len(p.RECEIVE_BUFFER)
        primary.may_answer.set()
        await primary.heard.until(lambda message: message[1] == str(number))
        assert [message[1] for message in primary.heard.messages] == [str(n) for n in range(number + 1)]
        writer.close()


async def test_an_older_handshake_does_not_take_over_a_newer_connection() -> None:
    """The primary was slow to answer the first; the charger has come again meanwhile."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        _, writer = await knock(proxy)
        await eventually(lambda: bool(primary.requests))
        held, primary.may_answer = primary.may_answer, asyncio.Event()
        primary.may_answer.set()
        async with charger(proxy) as new:
            held.set()
            await eventually(lambda: not proxy.handshakes)
            await new.calls("1", "Heartbeat")
        writer.close()


async def test_a_charger_gets_in_though_a_delivery_holds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that allows one connection per charger; the one that delivers without it gives way."""
    monkeypatch.setattr(p, "PROBE_SECONDS", 0.3)
    async with house("primary_user = u") as (proxy, primary, _):
        async with charger(proxy) as cp:
            await cp.boots()
        relay = p.Relay(
            "CP1",
            proxy.config.default,
            "ocpp1.6",
            proxy.config.host,
            proxy.dialer,
            proxy.journal,
            p.current_instant,
        )
        proxy.relays["CP1"] = relay
        outbox = relay.outboxes[p.Peer.PRIMARY]
        call = p.Call(p.Kind.STORED, "Heartbeat", "1", '[2,"1","Heartbeat",{}]', p.NOTHING)
        primary.answers = None
        outbox.put(call)
        outbox.dial()
        await primary.connection(1)
        primary.one_connection_per_charger = True
        async with charger(proxy):
            assert len(primary.connections) == 3


async def test_a_charger_that_hangs_up_while_its_primary_hangs_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its refusal finds nobody to hear it."""
    monkeypatch.setattr(p, "DIAL_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with running(f"[ext-server]\nserver = ws://127.0.0.1:{port}") as proxy:
            _, writer = await knock(proxy)
            writer.close()
            await eventually(lambda: bool(proxy.handshakes))
            await eventually(lambda: not proxy.handshakes)
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_redial_that_hangs_gives_way_to_a_newer_connection() -> None:
    """The primary leaves the redial waiting, and accepts the charger that has come again."""
    async with house() as (proxy, primary, _), charger(proxy):
        held, primary.may_answer = asyncio.Event(), asyncio.Event()
        primary.may_answer, open_door = held, primary.may_answer
        await primary.connections[0].close()
        await eventually(lambda: len(primary.requests) == 2)
        primary.may_answer = open_door
        open_door.set()
        async with charger(proxy) as new:
            held.set()
            await new.calls("1", "Heartbeat")
            await eventually(lambda: sum(c.state.name == "OPEN" for c in primary.connections) == 1)
            await new.calls("2", "Heartbeat")


async def test_a_charger_that_gives_up_during_the_handshake_leaves_nothing_behind() -> None:
    """Its primary's connection is closed again."""
    async with house() as (proxy, primary, _):
        _, writer = await knock(proxy)
        writer.transport.abort()
        await primary.connection()
        await eventually(
            lambda: proxy.relays == {} and all(c.state.name == "CLOSED" for c in primary.connections)
        )


@pytest.mark.parametrize("text", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.0\r\n\r\n", b""])
async def test_what_is_no_websocket_handshake_is_closed_quietly(
    text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A scanner or a browser is no event: one line, no traceback, no charger."""
    async with house() as (proxy, primary, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(text)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            await reader.read()
        writer.close()
        await eventually(lambda: not proxy.handshakes)
        assert primary.requests == []
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_handshake_that_never_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open connection without a request has ten seconds."""
    monkeypatch.setattr(p, "HANDSHAKE_SECONDS", 0.2)
    async with house() as (proxy, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /CP1 HTTP/1.1\r\n")
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b""
        writer.close()


async def test_a_handshake_without_a_key_is_refused() -> None:
    """The library says what is missing; the primary's connection is closed again."""
    async with house() as (proxy, primary, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /CP1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            assert (await reader.readline()).split()[1] == b"400"
        writer.close()
        await eventually(lambda: all(c.state.name == "CLOSED" for c in primary.connections))
        assert proxy.relays == {}


@pytest.mark.parametrize(
    "early",
    [
        b"\x88\x82\0\0\0\0\x03\xe8",  # A Close.
        b"\x81\x02[]",  # Without a mask.
        b"\xc1\x80\0\0\0\0",  # With a reserved bit.
        b"\xff" * 20,
    ],
)
async def test_what_ends_a_websocket_before_it_has_begun_leaves_nothing_at_the_primary(
    early: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A stranger could fill it with connections that nobody watches."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        reader, writer = await knock(proxy)
        writer.write(early)
        await eventually(lambda: bool(primary.requests) or not proxy.handshakes)
        primary.may_answer.set()
        async with asyncio.timeout(PATIENCE):
            await reader.read()
        await eventually(lambda: not proxy.handshakes)
        async with asyncio.timeout(PATIENCE):
            for connection in primary.connections:
                await connection.wait_closed()
        writer.close()
    assert not any(record.exc_info for record in caplog.records)
