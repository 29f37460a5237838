"""Who gets in: passwords, refusals that are remembered, web pages, and what a newcomer cannot touch."""

from __future__ import annotations

import base64
import logging
from typing import Any

import pytest
from websockets.datastructures import Headers

import ocpp_2w_proxy as p
from tests.kills import warnings
from tests.peers import charger, deaf, eventually, house, running
from tests.plays import config_of
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


# Refusals.


async def test_a_charger_that_is_refused_again_and_again_is_not_asked_for_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """429 and Retry-After, for its id from its address alone; another id there gets in."""
    async with house() as (proxy, primary, _):
        primary.refusal = (401, {})
        for _ in range(p.FREE_REFUSALS):
            assert (await refused(proxy))[0] == 401
        for _ in range(2):
            status, headers = await refused(proxy)
            assert status == 429
            assert 1 <= int(headers["Retry-After"]) <= p.REFUSAL_SECONDS
        assert len(primary.requests) == p.FREE_REFUSALS
        primary.refusal = None
        async with charger(proxy, "CP2") as other:
            await other.boots()
    assert len(warnings(caplog, "CP1: refused too often from 127.0.0.1")) == 1


def test_refusals_are_forgotten_after_a_minute() -> None:
    """Whoever has corrected the password gets in."""
    keeper, who = p.Doorkeeper(), ("CP1", "192.0.2.1")
    for _ in range(p.FREE_REFUSALS):
        assert keeper.wait_of(who, 100.0) == 0
        keeper.refused(who, 100.0)
    assert keeper.wait_of(who, 100.0) == p.REFUSAL_SECONDS
    assert keeper.wait_of(("CP2", "192.0.2.1"), 100.0) == 0
    assert keeper.wait_of(("CP1", "192.0.2.2"), 100.0) == 0
    assert keeper.wait_of(who, 100.0 + p.REFUSAL_SECONDS) == 0
    keeper.refused(who, 100.0 + p.REFUSAL_SECONDS)
    assert keeper.wait_of(who, 100.0 + p.REFUSAL_SECONDS) == 0


def test_what_is_known_of_refusals_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and addresses are free to choose."""
    monkeypatch.setattr(p, "MAX_REFUSED_VISITORS", 3)
    keeper = p.Doorkeeper()
    for number in range(10):
        keeper.refused((f"CP{number}", "192.0.2.1"), 0.0)
    assert list(keeper.refusals) == [(f"CP{number}", "192.0.2.1") for number in (7, 8, 9)]


def test_one_charger_does_not_knock_many_times_at_once() -> None:
    """Each handshake is a dial to the primary."""
    keeper, who = p.Doorkeeper(), ("CP1", "192.0.2.1")
    with keeper.visit(who), keeper.visit(who):
        assert keeper.wait_of(who, 0.0) == 0
        with keeper.visit(who):
            assert keeper.wait_of(who, 0.0) == 1
            assert keeper.wait_of(("CP2", "192.0.2.1"), 0.0) == 0
    assert keeper.visits == {}


async def test_a_charger_that_got_in_begins_anew() -> None:
    """Its earlier refusals do not count any more."""
    async with house() as (proxy, primary, _):
        for _ in range(2):
            primary.refusal = (403, {})
            for _ in range(p.FREE_REFUSALS - 1):
                assert (await refused(proxy))[0] == 403
            primary.refusal = None
            async with charger(proxy) as cp:
                await cp.boots()
            await eventually(lambda: not proxy.handshakes)


async def test_a_charger_that_is_closed_for_its_version_stays_refused() -> None:
    """An unknown subprotocol does not wash away what was refused before."""
    async with house(host="password = x") as (proxy, _, _):
        for _ in range(p.FREE_REFUSALS - 1):
            assert (await refused(proxy))[0] == 401
            async with charger(
                proxy, versions=["ocpp9"], additional_headers={"Authorization": login("CP1", "x")}
            ) as cp:
                assert await cp.closed() == 1002
        assert (await refused(proxy))[0] == 401
        assert (await refused(proxy))[0] == 429


async def test_a_primary_that_is_away_is_no_refusal() -> None:
    """The charger may come again at once."""
    async with house() as (proxy, primary, _):
        primary.refusal = (500, {})
        for _ in range(p.FREE_REFUSALS + 1):
            assert (await refused(proxy))[0] == 503


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
            for _ in range(p.FREE_REFUSALS):
                assert (await refused(proxy))[0] == 401
            await cp.calls("1", "Heartbeat")
            assert len(primary.requests) == 1


# Web pages.


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        ("http://127.0.0.1", True),
        ("https://127.0.0.1:8321", True),
        ("ws://127.0.0.1:1", True),
        ("127.0.0.1", True),
        ("file://", True),
        ("http://evil.example", False),
        ("evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("null", False),
        ("http://[", False),
        ("", False),
        ("http://127.0.0.1:x", True),
    ],
)
async def test_a_web_page_of_another_host_does_not_get_in(origin: str, is_let_in: bool) -> None:
    """Some chargers' libraries send an Origin, with the host that they connect to."""
    async with running(LOCAL) as proxy:
        if is_let_in:
            async with charger(proxy, additional_headers={"Origin": origin}) as cp:
                await cp.boots()
        else:
            assert (await refused(proxy, additional_headers={"Origin": origin}))[0] == 403


@pytest.mark.parametrize(
    ("hosts", "origins", "is_elsewhere"),
    [
        (["a"], [], False),
        (["a"], ["http://A:80"], False),
        (["a"], ["http://a", "http://b"], True),
        (["a", "b"], ["http://a", "http://b"], True),
        ([], ["null"], True),
        ([""], ["null"], True),
        (["["], ["http://["], True),
    ],
)
def test_an_origin_and_a_host_that_do_not_name_one_host_are_elsewhere(
    hosts: list[str], origins: list[str], is_elsewhere: bool
) -> None:
    """Nothing equals nothing, but proves nothing."""
    pairs = [("Host", host) for host in hosts] + [("Origin", origin) for origin in origins]
    assert p.comes_from_elsewhere(Headers(pairs)) is is_elsewhere


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
