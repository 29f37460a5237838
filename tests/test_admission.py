"""Who gets in, under which name and with which login; who is refused, and what people read of it."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from tests.play import wires
from tests.play.peers import VERSIONS, charger, deaf, eventually, house, refusal, running, server
from tests.play.wires import Log, Patch, at_the_door, login, refused, request, smaller, told, visitor

KEY = "0123456789abcdef01234567"  # An AuthorizationKey of OCPP 1.6, in hex digits.
BROWSER = "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"

# Primary first.


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 429, 500, 503])
async def test_anything_else_but_101_is_503(status: int, caplog: Log) -> None:
    """But for a refusal, which is the charger's. Nobody follows a redirect; the log says what to change."""
    wanted = {"WWW-Authenticate": 'Basic realm="x"', "Retry-After": "9"}
    async with house() as (proxy, primary, secondary):
        primary.refusal = secondary.refusal = (status, {"Location": secondary.url, "X-Else": "1", **wanted})
        got, headers = await refused(proxy)
        shown = {name: headers[name] for name in ("X-Else", *wanted) if name in headers}
        assert (got, shown) == ((status, wanted) if 400 <= status < 500 else (503, {"Retry-After": "10"}))
        assert (secondary.requests, wires.known(proxy)) == ([], [])
        primary.refusal = None
        async with charger(proxy):
            await eventually(lambda: len(told(caplog, f"HTTP {status}")) == 2)
        assert bool(told(caplog, "nobody is followed: put its new address into the ini")) is (status == 302)


async def test_a_charger_that_gives_up_during_its_handshake_leaves_nothing_behind(caplog: Log) -> None:
    """The primary accepts it too late."""
    async with house() as (proxy, primary, _):
        primary.may_answer.clear()
        async with visitor(proxy, request()):
            await eventually(lambda: bool(primary.requests))
        primary.may_answer.set()
        await at_the_door(proxy, 0)
        await eventually(lambda: wires.open_connections(primary) == 0)
        assert wires.known(proxy) == []
    assert not wires.has_traceback(caplog)


# Names and logins.


OTHER_NAMES = """primary_id = HOME
primary_user = u
primary_password = p:w
secondary_id = CAR 9
secondary_password = s"""  # Logs in as the id.


@pytest.mark.parametrize(
    ("more", "at_home", "at_work"),
    [
        ("", ("CP1", "Basic eHg="), ("CP1", None)),
        ("primary_auth = none\nsecondary_auth = forward", ("CP1", None), ("CP1", "Basic eHg=")),
        (OTHER_NAMES, ("HOME", login("u", "p:w")), ("CAR%209", login("CAR 9", "s"))),
    ],
)
async def test_each_server_may_know_the_charger_by_another_name_and_login(
    more: str, at_home: tuple[str, str | None], at_work: tuple[str, str | None]
) -> None:
    """`*_id`, `*_user`, `*_password`; its own login is shown where `*_auth` says so."""
    shown = {"additional_headers": {"Authorization": "Basic eHg="}, "user_agent_header": "Wallbox/1"}
    async with house(more) as (proxy, primary, secondary), charger(proxy, **shown):  # type: ignore[arg-type]
        await secondary.connection()
        for fake, wanted in ((primary, at_home), (secondary, at_work)):
            (asked,) = fake.requests
            assert (asked.path.removeprefix("/ocpp/"), asked.headers.get("Authorization")) == wanted
            assert asked.headers["User-Agent"] == "Wallbox/1"
            assert "Sec-WebSocket-Extensions" not in asked.headers


async def test_a_login_that_no_server_could_read_is_told(caplog: Log) -> None:
    """HTTP has a colon between user and password; where the ini has no user, the charger's id is it."""
    async with house("secondary_password = s") as (proxy, primary, _), charger(proxy, "DE:1"):
        await eventually(lambda: "DE:1: secondary: cannot connect" in caplog.text)
        assert "user DE:1, with a colon: set secondary_user" in caplog.text
        assert len(primary.connections) == 1


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
    shown: str | None, password: str, status: int, monkeypatch: Patch
) -> None:
    """As raw bytes, as hex digits or as text (security profiles 1 and 2)."""
    smaller(monkeypatch, seconds_after_a_wrong_login=0)
    header = [f"Authorization: {shown}"] if shown else []
    async with running(f"password = {password}\n{wires.LOCAL_SERVER}") as proxy:
        async with visitor(proxy, request("CP1", *header)) as guest:
            assert await guest.status() == status


async def test_the_password_is_checked_before_the_primary_is_asked(monkeypatch: Patch, caplog: Log) -> None:
    """A charger may have its own. 401 says how to log in, the log what is wrong; nobody else notices."""
    smaller(monkeypatch, seconds_after_a_wrong_login=0)
    shown = {name: {"Authorization": login(name, word)} for name, word in (("CP1", "common"), ("A:B", "own"))}
    async with house("[charger A:B]\npassword = own\n", "password = common") as (proxy, primary, _):
        async with (
            charger(proxy, additional_headers=shown["CP1"]) as cp,
            charger(proxy, "A:B", additional_headers=shown["A:B"]),
        ):
            for name, password in (("CP1", "wrong"), ("A:B", "common"), ("CP3", "wrong"), ("CP4", "wrong")):
                header = {"Authorization": login(name, password)}
                status, headers = await refused(proxy, name, additional_headers=header)
                assert (status, headers["WWW-Authenticate"][:12]) == (401, "Basic realm=")
            await cp.calls("1", "Heartbeat")
        assert len(primary.requests) == 2
    lines = [line.partition(": ")[0] for line in told(caplog, "it does not show the user")]
    assert lines == ["CP1", "A:B", "CP3"], "ids that never got in share one"
    assert told(caplog, "wrong") == told(caplog, "common") == []


async def test_a_wrong_password_is_answered_later_and_holds_up_nobody(monkeypatch: Patch) -> None:
    """However often; the right one gets in meanwhile."""
    smaller(monkeypatch, seconds_after_a_wrong_login=1)
    async with running(f"password = secret\n{wires.LOCAL_SERVER}") as proxy:
        guesses = [asyncio.create_task(refused(proxy, f"CP{number}")) for number in range(20)]
        await at_the_door(proxy, 20)
        async with charger(proxy, additional_headers={"Authorization": login("CP1", "secret")}) as cp:
            await cp.boots()
            assert not any(guess.done() for guess in guesses)
        assert {status for status, _ in await asyncio.gather(*guesses)} == {401}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Origin: https://github.com/tzapu", "User-Agent: TinyWebsockets Client"], 101),
        *((["Origin: http://["], 101), (["Origin:"], 101), ([BROWSER], 101)),
        *(([f"Origin:{origin}", BROWSER], 403) for origin in (" http://evil.example", " null", "")),
    ],
)
async def test_a_web_page_does_not_get_in(headers: list[str], status: int) -> None:
    """A browser says what it is; an odd Origin alone is a charger's library, or a reverse proxy's doing."""
    async with house() as (proxy, primary, _), visitor(proxy, request("CP1", *headers)) as guest:
        assert await guest.status() == status
        assert bool(primary.requests) is (status == 101)


# Versions.


@pytest.mark.parametrize(
    ("spoken", "offered", "chosen"),
    [
        (VERSIONS[1:], "ocpp2.1 OCPP2.0.1 ocpp1.6", "OCPP2.0.1"),
        ([], "ocpp2.0.1 ocpp1.6", "ocpp1.6"),  # Some servers do not say which version they speak.
        (None, "ocpp1.5 ocpp2.0.1 ocpp1.6", "ocpp2.0.1"),  # There is no server to ask.
    ],
)
async def test_the_subprotocol_is_the_primarys_choice(
    spoken: list[Any] | None, offered: str, chosen: str
) -> None:
    """Of the charger's offer, narrowed by `versions`; the secondary is offered the choice alone."""
    async with server(versions=spoken or []) as primary, server() as secondary:
        ini = f"server = {primary.url if spoken is not None else 'local'}\nversions = ocpp2.0.1, ocpp1.6\n"
        ini += f"secondary_server = {secondary.url}"
        async with running(f"[ext-server]\n{ini}") as proxy, charger(proxy, versions=offered.split()) as cp:
            assert cp.connection.subprotocol == chosen
            await secondary.connection()
            assert secondary.requests[0].headers["Sec-WebSocket-Protocol"] == chosen.lower()
    offers = [asked.headers["Sec-WebSocket-Protocol"] for asked in primary.requests]
    assert offers == ([] if spoken is None else ["ocpp2.0.1, ocpp1.6"])


@pytest.mark.parametrize(
    ("spoken", "ini", "words"),
    [
        (wires.V16, "server = {url}", "CP1: refused"),
        (wires.V16, "server = local\nsecondary_server = {url}", "CP1: secondary: cannot connect"),
        ([], "server = local\nsecondary_server = {url}", "CP1: secondary: cannot connect"),
    ],
)
async def test_a_server_that_does_not_speak_the_version_is_not_blamed_on_the_login(
    spoken: list[Any], ini: str, words: str, caplog: Log
) -> None:
    """It answers without a subprotocol, or 400: the WARNING names what was offered, and the key."""
    async with server(versions=spoken) as fake, running(f"[ext-server]\n{ini.format(url=fake.url)}") as proxy:
        assert (await refusal(proxy.port, versions=["ocpp2.0.1"]))[0] == (400 if "refused" in words else 101)
        await eventually(lambda: bool(told(caplog, words)))
    assert len(told(caplog, words, "versions", "ocpp2.0.1")) == 1
    assert told(caplog, "login") == []


# Bounds at the door.


@pytest.mark.parametrize("more", [b"", (b"Y: " + b"y" * 7000 + b"\r\n") * 20])
async def test_a_request_that_never_ends_is_cut(more: bytes, monkeypatch: Patch) -> None:
    """After ten seconds, or 64 KiB, though each of its headers is short enough."""
    smaller(monkeypatch, seconds_to_ask=60 if more else 0.2)
    async with running(wires.LOCAL_SERVER) as proxy, visitor(proxy, b"GET /CP1 HTTP/1.1\r\n" + more) as guest:
        assert await guest.hears() == b""
        await at_the_door(proxy, 0)


async def test_half_open_connections_make_room_for_new_ones(monkeypatch: Patch) -> None:
    """The one that has waited longest for its request goes first."""
    smaller(monkeypatch, half_open=3)
    async with running(wires.LOCAL_SERVER) as proxy, AsyncExitStack() as stack:
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
            await eventually(lambda: not 0 <= wires.unheard(proxy) < 2**16)
            for _ in range(10):
                await refused(proxy, "")
            assert wires.unheard(proxy) <= 2**17
        primary.may_answer.set()


async def test_those_who_are_refused_do_not_fill_the_log(monkeypatch: Patch, caplog: Log) -> None:
    """One line a minute, whether it has no id or is not among `chargers`; with the number held back."""
    async with running(f"chargers = HOME-*, CP 1\n{wires.LOCAL_SERVER}") as proxy, charger(proxy, "CP%201"):
        for path in ("", "OTHER") * 5:
            assert (await refused(proxy, path))[0] == 404
        assert len(told(caplog, "refused")) == 1
        smaller(monkeypatch, seconds_between_lines=0)
        await refused(proxy, "OTHER")
    assert len(told(caplog, "refused", "(9 more like it since the last such line)")) == 1


# Room for chargers: (limit - 100) / 3, once the process has asked for as many as it may have.

FEW_FILES = ("sh", "-c", 'ulimit -Sn 60; ulimit -Hn 106; exec "$0" "$@"', sys.executable)


async def test_beyond_the_file_limit_newcomers_get_503_and_the_others_stay(tmp_path: Path) -> None:
    """Though there was room for each when its primary was asked, which is told that the rest left."""
    async with (
        server() as primary,
        wires.command(wires.LOCAL.replace("local", primary.url), tmp_path, before=FEW_FILES) as process,
        AsyncExitStack() as stack,
    ):
        port = await wires.port_of(process)
        primary.may_answer.clear()
        guests = [await stack.enter_async_context(visitor(port, request(f"CP{n}"))) for n in range(6)]
        await eventually(lambda: len(primary.requests) == 6)
        primary.may_answer.set()
        heads = [await guest.hears_until(b"\r\n\r\n") for guest in guests]
        assert sorted(int(head.split()[1]) for head in heads) == [101] * 2 + [503] * 4
        assert sum(b"Retry-After: 10\r\n" in head for head in heads) == 4
        await eventually(lambda: wires.open_connections(primary) == 2)
        (here, _) = (f"CP{n}" for n in range(6) if b" 101 " in heads[n])
        async with wires.charger_at(port, here) as again:
            await again.calls("1", "Heartbeat")
        await stack.aclose()
        process.terminate()
        _, stderr = await process.communicate()
    assert stderr.count(b": refused: there is no room") == 1, "one line a minute"


async def test_what_a_charger_has_left_to_deliver_takes_no_place_of_another() -> None:
    """Its server may be down for days."""
    async with house() as (proxy, _, secondary):
        proxy.files, secondary.refusal = 103, (503, {})
        async with charger(proxy, "CP1") as cp:
            await cp.starts("SECO1234")
        await at_the_door(proxy, 0)
        await eventually(lambda: proxy.relays["CP1"].link is None)
        async with charger(proxy, "CP2"):
            assert (await refusal(proxy.port, "CP3"))[0] == 503


async def test_connections_that_the_system_cannot_open_wait_and_are_told_of_once(tmp_path: Path) -> None:
    """asyncio would tell of each, and of what it tries on a port that is closed meanwhile."""
    async with wires.command(
        f"{wires.LOCAL}[charger A]\npassword = x\n", tmp_path, before=FEW_FILES
    ) as process:
        port = await wires.port_of(process)
        async with wires.charger_at(port) as cp, deaf(cp.connection), AsyncExitStack() as stack:
            waits = asyncio.create_task(
                wires.line_with(process, "connections have to wait: [Errno 24] Too many")
            )
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


async def test_beyond_the_chargers_that_can_be_remembered_newcomers_get_503(monkeypatch: Patch) -> None:
    """Nobody with an open session is forgotten; the oldest without one is."""
    smaller(monkeypatch, memories=2)
    async with running(wires.LOCAL_SERVER) as proxy:
        async with charger(proxy, "CP1") as one, charger(proxy, "CP2") as two:
            for cp in (one, two):
                number = await cp.starts("ANY")
        await eventually(lambda: wires.present(proxy) == [])
        assert (await refused(proxy, "CP3"))[0] == 503
        async with charger(proxy, "CP2") as cp:
            await cp.stops("ANY", number)
        await eventually(lambda: "CP2" not in wires.known(proxy))
        async with charger(proxy, "CP3"):
            assert (await refused(proxy, "CP2"))[0] == 503
