"""Who gets in, under which name and with which login; who is refused, and what people read of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode

from tests.play.peers import FakeServer, charger, deaf, eventually, house, running, server
from tests.play.wires import (
    LOCAL,
    LOCAL_SERVER,
    V16,
    at_the_door,
    charger_at,
    command,
    has_traceback,
    known,
    line_with,
    login,
    open_connections,
    port_of,
    present,
    refused,
    request,
    smaller,
    told,
    unheard,
    visitor,
)

KEY = "0123456789abcdef01234567"  # An AuthorizationKey of OCPP 1.6, in hex digits.
BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"

# Primary first.


async def test_a_charger_gets_in_after_its_primary_has_accepted_it() -> None:
    """The primary sees its id, offer, User-Agent and Authorization; the secondary no credentials."""
    async with house() as (proxy, primary, secondary):
        shown = {"Authorization": login("CP1", "secret")}
        path = "a/CP%201?token=x"
        async with charger(proxy, path, additional_headers=shown, user_agent_header="Wallbox/1"):
            await secondary.connection()
        (at_home,), (at_work,) = primary.requests, secondary.requests
        assert at_home.path == at_work.path == "/ocpp/CP%201"
        assert at_home.headers["User-Agent"] == at_work.headers["User-Agent"] == "Wallbox/1"
        assert at_home.headers["Authorization"] == shown["Authorization"]
        assert "Authorization" not in at_work.headers
        assert "Sec-WebSocket-Extensions" not in at_home.headers


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429])
async def test_the_primarys_refusal_is_the_chargers(status: int) -> None:
    """With its WWW-Authenticate and Retry-After, and no connection to the secondary."""
    async with house() as (proxy, primary, secondary):
        primary.refusal = (status, {"WWW-Authenticate": 'Basic realm="x"', "Retry-After": "9", "X-Else": "1"})
        got, headers = await refused(proxy)
        assert (got, headers["WWW-Authenticate"], headers["Retry-After"]) == (status, 'Basic realm="x"', "9")
        assert "X-Else" not in headers
        assert secondary.requests == []
        assert known(proxy) == []


@pytest.mark.parametrize("status", [302, 500, 503])
async def test_anything_else_but_101_is_503(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """The charger comes back later. Nobody follows a redirect with its login; the log says what to change."""
    async with house() as (proxy, primary, secondary):
        primary.refusal = secondary.refusal = (status, {"Location": secondary.url})
        got, headers = await refused(proxy)
        assert (got, headers["Retry-After"], secondary.requests) == (503, "10", [])
        primary.refusal = None
        async with charger(proxy):
            await eventually(lambda: len(told(caplog, f"HTTP {status}")) == 2)
        assert bool(told(caplog, "nobody is followed: put its new address into the ini")) is (status == 302)


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_charger_that_gives_up_during_its_handshake_leaves_nothing_behind(
    is_silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The primary accepts it too late, or never."""
    smaller(monkeypatch, seconds_to_accept=0.3 if is_silent else 8)
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        async with visitor(proxy, request()):
            await eventually(lambda: bool(primary.requests))
        if not is_silent:
            primary.may_answer.set()
        await at_the_door(proxy, 0)
        primary.may_answer.set()
        await eventually(lambda: open_connections(primary) == 0)
        assert known(proxy) == []
    assert not has_traceback(caplog)


# Names and logins.


async def test_each_server_may_know_the_charger_by_another_name_and_login() -> None:
    """`*_id`, `*_user`, `*_password`; a password alone logs in as the id."""
    more = "primary_id = HOME\nprimary_user = u\nprimary_password = p:w\n"
    more += "secondary_id = CAR 9\nsecondary_password = s\n"
    async with house(more) as (proxy, primary, secondary), charger(proxy):
        await secondary.connection()
        for fake, path, shown in (
            (primary, "/ocpp/HOME", login("u", "p:w")),
            (secondary, "/ocpp/CAR%209", login("CAR 9", "s")),
        ):
            assert fake.requests[0].path == path
            assert fake.requests[0].headers.get_all("Authorization") == [shown]


async def test_the_chargers_login_is_shown_to_the_secondary_only_if_the_ini_says_so() -> None:
    """`secondary_auth = forward`; and `primary_auth = none` keeps it from the primary."""
    async with house("secondary_auth = forward\nprimary_auth = none") as (proxy, primary, secondary):
        async with charger(proxy, additional_headers={"Authorization": "Basic eHg="}):
            await secondary.connection()
            assert secondary.requests[0].headers["Authorization"] == "Basic eHg="
            assert "Authorization" not in primary.requests[0].headers


@pytest.mark.parametrize(
    ("shown", "password", "status"),
    [
        *((login("CP1", word), word, 101) for word in ("secret", "grün", KEY)),
        *((login("CP1", word), KEY, 101) for word in (KEY.upper(), bytes.fromhex(KEY))),
        (login("CP1", b"\x00\xff\x80:raw bytes!"), b"\x00\xff\x80:raw bytes!".hex(), 101),
        ("basic " + login("CP1", "secret")[6:].rstrip("="), "secret", 101),
        *((login("CP1", word), "secret", 401) for word in ("secret2", "")),
        *((login(user, "secret"), "secret", 401) for user in ("CP2", "")),
        (login("CP1:se", "cret"), "cret", 401),
        *((f"Bearer {login('CP1', 'secret')[6:]}", "secret", 401), (None, "secret", 401)),
        *(("Basic %%%", "secret", 401), ("Basic é", "secret", 401)),
    ],
)
async def test_a_charger_shows_its_id_and_its_password(
    shown: str | None, password: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As raw bytes, as hex digits or as text (security profiles 1 and 2)."""
    smaller(monkeypatch, seconds_after_a_wrong_login=0)
    header = [f"Authorization: {shown}"] if shown else []
    async with running(f"password = {password}\n{LOCAL_SERVER}") as proxy:
        async with visitor(proxy, request("CP1", *header)) as guest:
            assert await guest.status() == status


async def test_the_password_is_checked_before_the_primary_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A charger may have its own. 401 says how to log in, the log what is wrong; nobody else notices."""
    smaller(monkeypatch, seconds_after_a_wrong_login=0)
    async with house("[charger A:B]\npassword = own\n", "password = common") as (proxy, primary, _):
        async with (
            charger(proxy, additional_headers={"Authorization": login("CP1", "common")}) as cp,
            charger(proxy, "A:B", additional_headers={"Authorization": login("A:B", "own")}),
        ):
            for name, password in (("CP1", "wrong"), ("A:B", "common"), ("CP3", "wrong"), ("CP4", "wrong")):
                shown = {"Authorization": login(name, password)}
                status, headers = await refused(proxy, name, additional_headers=shown)
                assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="ocpp"')
            await cp.calls("1", "Heartbeat")
        assert len(primary.requests) == 2
    lines = told(caplog, "refused: it does not show the user")
    assert [line.partition(":")[0] for line in lines] == ["CP1", "A", "CP3"], (
        "ids that never got in share one"
    )
    assert told(caplog, "wrong") == told(caplog, "common") == []


async def test_a_wrong_password_is_answered_later_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However often; the right one gets in meanwhile."""
    smaller(monkeypatch, seconds_after_a_wrong_login=2)
    async with running(f"password = secret\n{LOCAL_SERVER}") as proxy:
        guesses = [asyncio.create_task(refused(proxy, f"CP{number}")) for number in range(20)]
        await at_the_door(proxy, 20)
        async with charger(proxy, additional_headers={"Authorization": login("CP1", "secret")}) as cp:
            await cp.boots()
            assert not any(guess.done() for guess in guesses)
        assert {status for status, _ in await asyncio.gather(*guesses)} == {401}


@pytest.mark.parametrize(
    ("origin", "agent", "is_let_in"),
    [
        ("https://github.com/tzapu", "TinyWebsockets Client", True),
        ("http://[", None, True),
        ("", None, True),
        (None, BROWSER, True),
        ("http://evil.example", BROWSER, False),
        ("null", BROWSER, False),
        ("", BROWSER, False),
    ],
)
async def test_a_web_page_does_not_get_in(origin: str | None, agent: str | None, is_let_in: bool) -> None:
    """A browser says what it is; an odd Origin alone is a charger's library, or a reverse proxy's doing."""
    headers = {} if origin is None else {"Origin": origin}
    async with house() as (proxy, primary, _):
        if is_let_in:
            async with charger(proxy, additional_headers=headers, user_agent_header=agent) as cp:
                await cp.boots()
        else:
            assert (await refused(proxy, additional_headers=headers, user_agent_header=agent))[0] == 403
        assert bool(primary.requests) is is_let_in


# Versions.


async def test_the_subprotocol_is_the_primarys_choice() -> None:
    """Of the charger's offer, narrowed by `versions`; the secondary is offered the choice alone."""
    async with house("versions = ocpp2.0.1, ocpp1.6") as (proxy, primary, secondary):
        async with charger(proxy, versions=["ocpp2.1", "OCPP2.0.1", "ocpp1.6"]) as cp:
            assert primary.requests[0].headers["Sec-WebSocket-Protocol"] == "ocpp2.0.1, ocpp1.6"
            chosen = primary.connections[0].subprotocol
            assert str(cp.connection.subprotocol).lower() == chosen
            await secondary.connection()
            assert secondary.requests[0].headers["Sec-WebSocket-Protocol"] == chosen


async def test_a_primary_that_answers_without_a_subprotocol_is_taken_as_1_6() -> None:
    """Some servers do not say which version they speak."""
    async with server(versions=[]) as primary, running(f"[ext-server]\nserver = {primary.url}") as proxy:
        async with charger(proxy, versions=["ocpp2.0.1", "ocpp1.6"]) as cp:
            assert cp.connection.subprotocol == "ocpp1.6"


async def test_a_local_primary_takes_the_chargers_first_version_that_we_know() -> None:
    """There is no server to ask."""
    async with running(LOCAL_SERVER) as proxy:
        async with charger(proxy, versions=["ocpp1.5", "ocpp2.0.1", "ocpp1.6"]) as cp:
            assert cp.connection.subprotocol == "ocpp2.0.1"
            assert (await cp.calls("1", "Heartbeat")).keys() == {"currentTime"}


async def test_a_primary_that_refuses_the_version_is_not_blamed_on_the_login(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Many answer 400; the log names what was offered, and the key."""
    async with server(versions=V16) as primary, running(f"[ext-server]\nserver = {primary.url}") as proxy:
        with pytest.raises(InvalidStatus, match="400"):
            async with charger(proxy, versions=["ocpp2.0.1"]):
                pass
    (line,) = told(caplog, "CP1: refused")
    assert "it was offered ocpp2.0.1: see versions" in line
    assert "login" not in line


@pytest.mark.parametrize("spoken", [[], V16])
async def test_a_secondary_that_does_not_speak_the_version_is_told_of(
    spoken: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It answers without a subprotocol, or 400: the WARNING names what was offered, and the key."""
    async with server() as primary, server(versions=spoken) as secondary:
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {secondary.url}"
        async with running(ini) as proxy, charger(proxy, versions=["ocpp2.0.1"]):
            await eventually(lambda: bool(told(caplog, "CP1: secondary: cannot connect")))
    assert len(told(caplog, "CP1: secondary: cannot connect", "versions", "ocpp2.0.1")) == 1


# Bounds at the door.


@pytest.mark.parametrize("more", [b"", (b"Y: " + b"y" * 7000 + b"\r\n") * 20])
async def test_a_request_that_never_ends_is_cut(more: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten seconds, or 64 KiB, though each of its headers is short enough."""
    smaller(monkeypatch, seconds_to_ask=5 if more else 0.2)
    async with running(LOCAL_SERVER) as proxy, visitor(proxy, b"GET /CP1 HTTP/1.1\r\n" + more) as guest:
        assert await guest.hears() == b""
        await at_the_door(proxy, 0)


async def test_half_open_connections_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has waited longest for its request goes first."""
    smaller(monkeypatch, half_open=3)
    async with running(LOCAL_SERVER) as proxy, AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(visitor(proxy)) for _ in range(5)]
        async with charger(proxy) as cp:
            await cp.boots()
        assert [await guest.hears() for guest in idle[:2]] == [b"", b""]
        await at_the_door(proxy, 2)


async def test_what_comes_before_the_handshake_is_answered_is_bounded() -> None:
    """A hasty charger may be heard later (as the corpus shows), but what it says does not fill the memory."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        async with visitor(proxy, request()) as guest:
            await eventually(lambda: bool(primary.requests))
            guest.says(Frame(Opcode.TEXT, b"x" * 500_000).serialize(mask=True) * 10)
            await eventually(lambda: not 0 <= unheard(proxy) < 2**16)
            for _ in range(10):
                await refused(proxy, "")
            assert unheard(proxy) <= 2**17


async def test_those_who_are_refused_do_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line a minute for each kind: no id, not among `chargers`; with the number of those held back."""
    async with running(f"chargers = HOME-*, CP 1\n{LOCAL_SERVER}") as proxy, charger(proxy, "CP%201"):
        for path in ("", "OTHER") * 5:
            assert (await refused(proxy, path))[0] == 404
        assert len(told(caplog, "refused")) == 2
        smaller(monkeypatch, seconds_between_lines=0)
        await refused(proxy, "OTHER")
    assert len(told(caplog, "refused", "(4 more like it since the last such line)")) == 1


# Room for chargers: (limit - 100) / 3, once the process has asked for as many as it may have.

FEW_FILES = ("sh", "-c", 'ulimit -Sn 60; ulimit -Hn 106; exec "$0" "$@"', sys.executable)


@asynccontextmanager
async def small_house(folder: Path) -> AsyncIterator[tuple[Any, int, FakeServer, FakeServer]]:
    """The command with room for two chargers; its process, its port and its servers."""
    async with server() as primary, server() as secondary:
        servers = f"{primary.url}\nsecondary_server = {secondary.url}\nsecondary_rfid = SECO*"
        async with command(LOCAL.replace("local", servers), folder, before=FEW_FILES) as process:
            yield process, await port_of(process), primary, secondary


async def test_beyond_the_file_limit_newcomers_get_503_and_the_others_stay(tmp_path: Path) -> None:
    """One line a minute tells of it; a charger that is here may come again."""
    async with small_house(tmp_path) as (process, port, *_):
        async with charger_at(port, "CP1") as first, charger_at(port, "CP2"):
            for _ in range(3):
                with pytest.raises(InvalidStatus) as caught:
                    await connect(f"ws://127.0.0.1:{port}/CP3", subprotocols=V16)
                assert caught.value.response.status_code == 503
                assert caught.value.response.headers["Retry-After"] == "10"
            await first.calls("1", "Heartbeat")
            async with charger_at(port, "CP1") as again:
                await again.calls("2", "Heartbeat")
        process.terminate()
        _, stderr = await process.communicate()
        assert stderr.decode().count("CP3: refused: there is no room") == 1


async def test_of_newcomers_that_come_at_once_no_more_are_let_in_than_there_is_room_for(
    tmp_path: Path,
) -> None:
    """Though there was room for each when its primary was asked; the primary is told that the rest left."""
    async with small_house(tmp_path) as (_, port, primary, _), AsyncExitStack() as stack:
        primary.may_answer.clear()
        guests = [await stack.enter_async_context(visitor(port, request(f"CP{n}"))) for n in range(6)]
        await eventually(lambda: len(primary.requests) == 6)
        primary.may_answer.set()
        assert sorted([await guest.status() for guest in guests]) == [101] * 2 + [503] * 4
        await eventually(lambda: open_connections(primary) == 2)


async def test_connections_that_the_system_cannot_open_wait_and_are_told_of_once(tmp_path: Path) -> None:
    """asyncio would tell of each, and of what it tries on a port that is closed meanwhile."""
    async with command(f"{LOCAL}[charger A]\npassword = x\n", tmp_path, before=FEW_FILES) as process:
        port = await port_of(process)
        async with charger_at(port) as cp, deaf(cp.connection), AsyncExitStack() as stack:
            waits = asyncio.create_task(line_with(process, "connections have to wait: [Errno 24] Too many"))
            while not waits.done():
                for _ in range(10):  # Each holds its place for a second.
                    await stack.enter_async_context(visitor(port, request("A")))
                async with visitor(port, request("")) as guest:
                    answered = asyncio.ensure_future(guest.status())
                    await asyncio.wait({waits, answered}, return_when=asyncio.FIRST_COMPLETED)
                    answered.cancel()
            await waits
            process.terminate()
            _, stderr = await process.communicate()
    assert b"connections have to wait" not in stderr
    assert b"Traceback" not in stderr


async def test_beyond_the_chargers_that_can_be_remembered_newcomers_get_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody with an open session is forgotten; the oldest without one is."""
    smaller(monkeypatch, memories=2)
    async with running(LOCAL_SERVER) as proxy:
        for name in ("CP1", "CP2"):
            async with charger(proxy, name) as cp:
                number = await cp.starts("ANY")
        await eventually(lambda: present(proxy) == [])
        assert (await refused(proxy, "CP3"))[0] == 503
        async with charger(proxy, "CP2") as cp:
            await cp.calls("e", "StopTransaction", transactionId=number, meterStop=1, timestamp="x")
        await eventually(lambda: "CP2" not in known(proxy))
        async with charger(proxy, "CP3"):
            assert (await refused(proxy, "CP2"))[0] == 503
