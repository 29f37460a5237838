"""Who gets in: passwords, web pages, and what a newcomer cannot touch."""

from __future__ import annotations

import asyncio
import base64
import logging
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import warnings
from tests.play.peers import charger, deaf, eventually, house, running
from tests.play.plays import config_of
from tests.test_handshake import refused

LOCAL = "[ext-server]\nserver = local\n"
KEY = "0123456789abcdef01234567"  # An AuthorizationKey of OCPP 1.6, in hex digits.


def login(user: str, password: bytes | str) -> str:
    """Return the Authorization header of a charger."""
    shown = password.encode() if isinstance(password, str) else password
    return "Basic " + base64.b64encode(user.encode() + b":" + shown).decode()


# Passwords that the proxy itself checks.


@pytest.mark.parametrize(
    ("authorization", "password", "is_right"),
    [
        (login("CP1", "secret"), "secret", True),
        (login("CP1", "se:cret"), "se:cret", True),
        (login("CP1", "grün"), "grün", True),
        (login("CP1", KEY), KEY, True),
        (login("CP1", KEY.upper()), KEY, True),
        (login("CP1", bytes.fromhex(KEY)), KEY, True),
        (login("CP1", b"\x00\xff\x80:raw bytes!"), b"\x00\xff\x80:raw bytes!".hex(), True),
        ("basic " + login("CP1", "secret")[6:].rstrip("="), "secret", True),
        (login("CP1", "secret2"), "secret", False),
        (login("CP1", ""), "secret", False),
        (login("CP2", "secret"), "secret", False),
        (login("", "secret"), "secret", False),
        ("Bearer " + login("CP1", "secret")[6:], "secret", False),
        ("Basic %%%", "secret", False),
        ("Basic é", "secret", False),
        ("Basic", "secret", False),
        (None, "secret", False),
    ],
)
def test_a_charger_shows_its_id_and_its_password(
    authorization: str | None, password: str, is_right: bool
) -> None:
    """As raw bytes, as hex digits or as text (security profiles 1 and 2)."""
    assert p.shows_password("CP1", password, authorization) is is_right


def test_a_charger_id_may_hold_a_colon() -> None:
    """The password begins behind the id."""
    assert p.shows_password("A:B", "secret", login("A:B", "secret"))
    assert not p.shows_password("A", "secret", login("A:B", "secret"))
    assert p.shows_password("A", "B:secret", login("A", "B:secret"))


async def test_the_proxy_checks_the_password_where_the_ini_has_one(caplog: pytest.LogCaptureFixture) -> None:
    """401 tells the charger how to log in; the log does not tell the password.

    Ids that never got in share one line a minute: whoever makes them up does not fill the log.
    """
    ini = f"password = common\n{LOCAL}[charger CP2]\npassword = its-own\n"
    async with running(ini) as proxy:
        for name, password, status in (
            ("CP1", "wrong", 401),
            ("CP2", "common", 401),
            ("CP1", "common", 101),
            ("CP2", "its-own", 101),
        ):
            headers = {"Authorization": login(name, password)}
            if status == 101:
                async with charger(proxy, name, additional_headers=headers) as cp:
                    await cp.boots()
            else:
                got, sent = await refused(proxy, name, additional_headers=headers)
                assert (got, sent["WWW-Authenticate"]) == (401, 'Basic realm="ocpp"')
        assert (await refused(proxy, "CP3"))[0] == 401
    assert warnings(caplog, "it does not show the user") == [
        "CP1: refused: it does not show the user CP1 and the `password` of the ini",
    ]
    assert not any("wrong" in line or "common" in line for line in caplog.messages)


async def test_a_password_is_checked_before_the_primary_is_asked() -> None:
    """And then both have to let the charger in."""
    async with house(host="password = secret") as (proxy, primary, _):
        assert (await refused(proxy))[0] == 401
        assert primary.requests == []
        async with charger(proxy, additional_headers={"Authorization": login("CP1", "secret")}) as cp:
            await cp.boots()


@pytest.mark.parametrize(
    ("ini", "is_open"),
    [
        (LOCAL, True),
        ("[ext-server]\nserver = ws://home\nprimary_password = x\n", True),
        ("[ext-server]\nserver = ws://home\n", False),
        (f"[host]\npassword = x\n{LOCAL}", False),
        (f"[host]\naddr = 127.0.0.1\n{LOCAL}", False),
        (f"[host]\npassword = x\n{LOCAL}[charger A]\nserver = ws://home\nprimary_user = x\n", False),
        ("[ext-server]\nserver = ws://home\n[charger A]\nserver = local\n", True),
    ],
)
def test_a_port_that_nobody_guards_is_a_warning(ini: str, is_open: bool) -> None:
    """Where no primary checks the charger's own login, and it listens beyond this machine."""
    warned = [line for line in config_of(ini).warnings if "nobody checks who connects" in line]
    assert bool(warned) is is_open
    assert [p.REDACTOR.clean(line) for line in warned] == warned  # It names a password, and tells none.


async def test_a_wrong_password_is_answered_a_second_later() -> None:
    """However often; others do not wait meanwhile, and the right one gets in at once."""
    headers = {"Authorization": login("CP1", "secret")}
    async with running(f"password = secret\n{LOCAL}") as proxy:
        loop = asyncio.get_running_loop()
        began = loop.time()
        guesses = [asyncio.create_task(refused(proxy, f"CP{number}")) for number in range(20)]
        await eventually(lambda: len(proxy.handshakes) == 20)
        async with charger(proxy, additional_headers=headers) as cp:
            await cp.boots()
        assert loop.time() - began < p.WRONG_LOGIN_SECONDS
        assert {status for status, _ in await asyncio.gather(*guesses)} == {401}
        assert loop.time() - began >= p.WRONG_LOGIN_SECONDS


# What a newcomer cannot touch.


async def test_a_refused_newcomer_does_not_touch_a_charger_that_never_answers_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some never do; their silence proves nothing."""
    monkeypatch.setattr(p, "PROBE_SECONDS", 0.1)
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        await cp.boots()
        link = proxy.relays["CP1"].link
        assert link is not None
        link.has_ponged = False
        primary.refusal = (401, {})
        async with deaf(cp.connection):
            assert (await refused(proxy))[0] == 401
        await cp.calls("1", "Heartbeat")
        assert proxy.relays["CP1"].link is link


async def test_a_newcomer_with_a_wrong_password_does_not_touch_the_charger() -> None:
    """Neither it nor its servers notice."""
    headers = {"Authorization": login("CP1", "secret")}
    async with house(host="password = secret") as (proxy, primary, _):
        async with charger(proxy, additional_headers=headers) as cp:
            await cp.boots()
            assert (await refused(proxy))[0] == 401
            await cp.calls("1", "Heartbeat")
            assert len(primary.requests) == 1


# Web pages.


ORIGINS = [
    "https://github.com/tzapu",
    "http://127.0.0.1",
    "http://evil.example",
    "file://",
    "null",
    "http://[",
    "",
]
BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("agent", ["TinyWebsockets Client", "arduino-WebSocket-Client", None])
async def test_an_odd_origin_alone_keeps_no_charger_out(origin: str, agent: str | None) -> None:
    """Chargers' libraries send them (lbbrhzn/ocpp#442), and reverse proxies rewrite Host (steve#797)."""
    async with running(LOCAL) as proxy:
        headers = {"Origin": origin}
        async with charger(proxy, additional_headers=headers, user_agent_header=agent) as cp:
            await cp.boots()


@pytest.mark.parametrize("origin", ORIGINS)
async def test_a_web_page_does_not_get_in(origin: str) -> None:
    """A browser says what it is, and a page cannot change that: it sends an Origin, too."""
    async with house() as (proxy, primary, _):
        headers = {"Origin": origin}
        assert (await refused(proxy, additional_headers=headers, user_agent_header=BROWSER))[0] == 403
        assert primary.requests == []


async def test_a_charger_whose_library_calls_itself_mozilla_gets_in() -> None:
    """Without an Origin it is no web page."""
    async with running(LOCAL) as proxy, charger(proxy, user_agent_header="Mozilla/4.0") as cp:
        await cp.boots()


async def test_redirects_are_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is sent elsewhere with the charger's login; the log says what to change."""
    async with house() as (proxy, primary, secondary):
        for fake in (primary, secondary):
            fake.refusal = (302, {"Location": secondary.url})
        assert (await refused(proxy))[0] == 503
        assert secondary.requests == []
        primary.refusal = None
        async with charger(proxy) as cp:
            await cp.boots()
            await eventually(lambda: len(warnings(caplog, "nobody is followed")) == 2)


# Log lines.


async def test_chargers_that_come_and_go_and_are_refused_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line a minute each: no request, no id, no such charger, no websocket."""
    caplog.set_level(logging.INFO)
    async with running(f"chargers = CP*\n{LOCAL}") as proxy:
        for _ in range(5):
            for path in ("", "OTHER"):
                assert (await refused(proxy, path))[0] == 404
    assert len([line for line in caplog.messages if "refused" in line]) == 2


def test_a_visitors_address_is_known_for_as_long_as_it_is_there() -> None:
    """A link without a connection has none."""

    class Nowhere:
        transport: Any = None

    assert p.Link.address.fget(Nowhere()) == "unknown"  # type: ignore[attr-defined]
