"""TLS on all three sides, with certificates of authorities that exist for the test only."""

from __future__ import annotations

import asyncio
import datetime
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from websockets.exceptions import InvalidHandshake, InvalidStatus

import ocpp_2w_proxy as p
from tests.play import wires
from tests.play.peers import FakeServer, charger, cut, eventually, running, server
from tests.play.wires import Log, Patch, at_the_door, has_traceback, refused, smaller, told, visitor


class Authority:
    """A certificate authority with its files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca = trustme.CA(organization_name=name)
        self.folder = folder / name
        self.folder.mkdir()
        self.file = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)

    def files(self, identity: str, **options: Any) -> tuple[Path, Path, Path]:
        """Return a new certificate, its key, and both in one file."""
        leaf = self.ca.issue_cert(identity, **options)
        cert, key, both = (self.folder / f"{identity}.{kind}" for kind in ("pem", "key", "both"))
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
        leaf.private_key_and_cert_chain_pem.write_to_path(both)
        return cert, key, both

    def listening(
        self, identity: str = "127.0.0.1", clients: Authority | None = None, **options: Any
    ) -> ssl.SSLContext:
        """Return what a server listens with; with `clients`, it wants a certificate of that authority."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ca.issue_cert(identity, **options).configure_cert(context)
        if clients:
            clients.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def calling(self, clients: Authority | None = None) -> ssl.SSLContext:
        """Return what a charger calls with; with `clients`, it shows a certificate of that authority."""
        context = ssl.create_default_context(cafile=self.file)
        if clients:
            clients.ca.issue_cert("charger.example").configure_cert(context)
        return context


class Authorities(NamedTuple):
    """Of the house, of the employer, and one that nobody trusts."""

    home: Authority
    work: Authority
    nobody: Authority


@pytest.fixture
def ca(tmp_path: Path) -> Authorities:
    return Authorities(*(Authority(tmp_path, name) for name in Authorities._fields))


def servers(primary: FakeServer, secondary: FakeServer | None = None, more: str = "") -> str:
    """Return the `[ext-server]` of an ini whose servers are reached by wss."""
    ini = f"[ext-server]\nserver = {primary.url}\nprimary_rfid = PRIM*\n"
    if secondary:
        ini += f"secondary_server = {secondary.url}\nsecondary_rfid = SECO*\n"
    return ini.replace("ws://", "wss://") + f"{more}\n"


# The charger's side.


@asynccontextmanager
async def locked_house(
    home: Authority, more: str = "", **options: Any
) -> AsyncIterator[tuple[p.Proxy, FakeServer]]:
    """A proxy that chargers reach by wss, with a primary in the same cupboard that needs none."""
    _, _, chain = home.files("127.0.0.1", **options)
    async with server() as primary:
        ini = f"cert_chain = {chain}\n{more}\n[ext-server]\nserver = {primary.url}\n"
        async with running(ini) as proxy:
            yield proxy, primary


async def is_turned_away(proxy: p.Proxy, **options: Any) -> None:
    """A charger tries to connect, and does not get as far as HTTP."""
    with pytest.raises((OSError, InvalidHandshake)) as refusal:
        async with charger(proxy, open_timeout=5, **options):
            pass
    assert not isinstance(refusal.value, InvalidStatus | TimeoutError)
    await at_the_door(proxy, 0)
    assert wires.known(proxy) == []


async def test_a_charger_speaks_wss(ca: Authorities) -> None:
    """Many TLS records make one message, or come as many in one piece; the proxy's goodbye is 1001."""
    async with locked_house(ca.home) as (proxy, primary), charger(proxy, ssl=ca.home.calling()) as cp:
        await cp.boots()
        primary.answers = lambda _, payload: payload
        data = {f"d{number}": "x" * (500_000 if number == 5 else number) for number in range(10)}
        sent = (cp.calls(name, "DataTransfer", vendorId="V", data=text) for name, text in data.items())
        assert [answer["data"] for answer in await asyncio.gather(*sent)] == list(data.values())
        async with charger(proxy, "CUT", ssl=ca.home.calling()) as other:
            cut(other.connection)
            await eventually(lambda: wires.open_connections(primary) == 1)
        assert primary.connections[1].close_code == 1001
        await proxy.stop()
        assert await cp.closed() == 1001


async def test_what_is_no_request_behind_the_tls_handshake_is_cut(ca: Authorities, caplog: Log) -> None:
    """Its first bytes may come before asyncio has handed the TLS over; nothing goes out in the clear."""
    async with locked_house(ca.home) as (proxy, _):
        for _ in range(20):
            async with visitor(proxy, b"GET /CP1 HTTP/1.1\r\nX\r\n\r\n", ssl=ca.home.calling()) as guest:
                assert b"101" not in await guest.hears()
        await at_the_door(proxy, 0)
    assert not has_traceback(caplog)


@pytest.mark.parametrize(
    "shown", ["client_ca", None, "the listener's own", "nobody's", "no TLS", "a hang-up"]
)
async def test_client_ca_lets_in_those_with_a_certificate_of_it(
    shown: str | None, ca: Authorities, caplog: Log
) -> None:
    """Nobody else reaches the primary; one INFO line says from where it came and what to look at."""
    clients = {"client_ca": ca.work, "the listener's own": ca.home, "nobody's": ca.nobody}
    options: dict[str, Any] = {} if shown == "no TLS" else {"ssl": ca.home.calling(clients.get(shown or ""))}
    is_in = shown == "client_ca"
    async with locked_house(ca.home, f"client_ca = {ca.work.file}") as (proxy, primary):
        if is_in:
            async with charger(proxy, **options) as cp:
                await cp.boots()
        elif shown == "a hang-up":
            async with visitor(proxy):
                await at_the_door(proxy)
        else:
            await is_turned_away(proxy, **options)
        await at_the_door(proxy, 0)
        assert bool(primary.requests) is is_in
    lines = told(caplog, "127.0.0.1: no handshake", "TLS", "wss://", "cert_chain", "client_ca")
    assert len(lines) == (not is_in)
    assert not has_traceback(caplog)


async def test_a_charger_that_does_not_trust_the_certificate_is_told_of_once_a_minute(
    ca: Authorities, caplog: Log, monkeypatch: Patch
) -> None:
    """One line for its address, with what to look at; the table of addresses is bounded."""
    smaller(monkeypatch, subjects=3)
    words = ("127.0.0.1: no handshake: ", "TLS", "certificate")
    async with locked_house(ca.home) as (proxy, primary):
        for seconds in (60, 60, 0):
            smaller(monkeypatch, seconds_between_lines=seconds)
            await is_turned_away(proxy, ssl=ca.nobody.calling())
        (_, line) = told(caplog, *words)
        assert line.endswith("(1 more like it since the last such line)")
        for number in range(2, 8):
            async with visitor(proxy, local_addr=(f"127.0.0.{number}", 0)):
                pass
            await eventually(lambda n=number: told(caplog, f"127.0.0.{n}: no handshake") != [])  # type: ignore[misc]
        assert len(proxy.complaints) == 3
        assert primary.requests == []


@pytest.mark.parametrize(
    ("version", "ciphers", "chosen"),
    [
        (ssl.TLSVersion.TLSv1_2, "AES128-GCM-SHA256", "AES128-GCM-SHA256"),
        (ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384", "AES256-GCM-SHA384"),
        (ssl.TLSVersion.TLSv1_2, "DEFAULT", "ECDHE-"),
        (ssl.TLSVersion.TLSv1_3, "DEFAULT", "TLS_"),
    ],
)
async def test_a_charger_may_know_one_cipher_of_security_profile_2_alone(
    ca: Authorities, version: ssl.TLSVersion, ciphers: str, chosen: str
) -> None:
    """TLS 1.2 with RSA key exchange (A00.FR.318; EVerest/libocpp#274); who knows better ones gets those."""
    context = ca.home.calling()
    context.maximum_version = version
    context.set_ciphers(ciphers)
    async with locked_house(ca.home, key_type=trustme.KeyType.RSA) as (proxy, _):
        async with charger(proxy, ssl=context) as cp:
            assert cp.connection.transport.get_extra_info("cipher")[0].startswith(chosen)


# The servers' side.


async def test_all_three_sides_speak_wss_each_with_its_own_certificates(ca: Authorities) -> None:
    """`*_ca`, `*_cert`, `*_key`, the key in a file of its own or not; the badge decides as ever."""
    (chain, key, _), (cert, cert_key, _) = ca.home.files("127.0.0.1"), ca.home.files("proxy.example")
    more = f"primary_ca = {ca.home.file}\nprimary_cert = {cert}\nprimary_key = {cert_key}\n"
    _, _, both = ca.work.files("proxy.example")
    more += f"secondary_ca = {ca.work.file}\nsecondary_cert = {both}\nsecondary_key ="
    async with (
        server(context=ca.home.listening(clients=ca.home)) as primary,
        server(context=ca.work.listening(clients=ca.work)) as secondary,
        running(f"cert_chain = {chain}\ncert_key = {key}\n{servers(primary, secondary, more)}") as proxy,
        charger(proxy, ssl=ca.home.calling()) as cp,
    ):
        await cp.boots()
        for badge, fake in (("PRIM1", primary), ("SECO1", secondary)):
            await cp.starts(badge, badge)
            assert (await fake.heard.call("StartTransaction"))[3]["idTag"] == badge
            shown = fake.connections[0].transport.get_extra_info("peercert")
            assert ("DNS", "proxy.example") in shown["subjectAltName"]


@pytest.mark.parametrize("fault", ["unknown authority", "other name", "no TLS", "no ca", "no certificate"])
async def test_a_primary_that_cannot_be_trusted_is_away(ca: Authorities, fault: str) -> None:
    """It hears nothing, and the charger's handshake gets 503; so does a primary that wants a certificate."""
    contexts = {
        "unknown authority": ca.nobody.listening(),
        "other name": ca.home.listening("primary.example"),
        "no TLS": None,
        "no certificate": ca.home.listening(clients=ca.home),
    }
    more = "" if fault == "no ca" else f"primary_ca = {ca.home.file}"
    async with server(context=contexts.get(fault, ca.home.listening())) as primary:
        async with running(servers(primary, more=more)) as proxy:
            assert (await refused(proxy))[0] == 503
        assert primary.requests == []


async def test_the_charger_notices_nothing_of_a_secondary_that_cannot_be_trusted(
    ca: Authorities, caplog: Log
) -> None:
    """The log says what is wrong; once the employer has renewed the certificate the session is delivered."""
    async with server(context=ca.nobody.listening()) as secondary:
        ini = f"[ext-server]\nserver = local\nsecondary_server = wss{secondary.url[2:]}\n"
        ini += f"secondary_ca = {ca.work.file}\nsecondary_rfid = SECO*\n"
        async with running(ini) as proxy, charger(proxy) as cp:
            await cp.boots()
            await eventually(lambda: told(caplog, "secondary", "CERTIFICATE_VERIFY_FAILED") != [])
            assert await cp.starts("SECO1") >= p.FIRST_PROXY_ID
            assert secondary.requests == []
            await secondary.stop()
            await secondary.start(ca.work.listening())
            assert (await secondary.heard.call("StartTransaction"))[3]["idTag"] == "SECO1"


# What people read of a server that cannot be reached.


WRONG: list[tuple[str, bytes | None, str]] = [
    ("ws://127.0.0.1:1", None, "nobody listens there"),  # Not [Errno 111],
    ("ws://localhost:1", None, "nobody listens there"),  # also where several addresses have been tried.
    ("ws://no-such-host.invalid", None, "its name is not known"),
    ("ws://127.0.0.1:{port}", b"\x15\x03\x03\x00\x02\x02\x0a", "that port speaks TLS: wss://"),  # Java.
    ("ws://127.0.0.1:{port}", b"", "it hangs up on HTTP; perhaps that port speaks TLS: wss://"),
    ("wss://127.0.0.1:{port}", b"HTTP/1.1 400 Bad Request\r\n\r\n", "that port speaks no TLS: ws://"),
    ("wss://127.0.0.1:{port}", b"", "perhaps that port speaks no TLS: ws://"),
    ("ws://127.0.0.1:{port}", b"SSH-2.0\r\n", "no HTTP"),
    ("ws://127.0.0.1:{port}", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "an unfit handshake"),
    ("ws://127.0.0.1:{port}", b"HTTP/1.1 404 Not Fou", "no HTTP"),
    ("ws://127.0.0.1:{port}", None, "no answer within"),
]


@pytest.mark.parametrize(("url", "words", "reason"), WRONG)
async def test_what_is_wrong_with_a_server_is_told_in_words(
    url: str,
    words: bytes | None,
    reason: str,
    monkeypatch: Patch,
    caplog: Log,
) -> None:
    """ws:// and wss:// are mixed up, or somebody else is there, or nobody: the charger gets 503."""
    smaller(monkeypatch, seconds_to_accept=0.3 if reason == "no answer within" else 8)
    async with (
        wires.stranger(words) as port,
        running(f"[ext-server]\nserver = {url.format(port=port)}") as proxy,
    ):
        assert (await refused(proxy))[0] == 503
    assert len(told(caplog, "CP1: refused: primary cannot be reached", reason)) == 1


# What `--check` says of a certificate.


async def test_check_says_how_long_a_certificate_is_valid(ca: Authorities, tmp_path: Path) -> None:
    """So that one that ends soon is renewed in time; and which key mends one that cannot be trusted."""
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=5)
    async with server(context=ca.home.listening(not_after=end)) as primary:
        code, said = await wires.check(tmp_path, servers(primary, more=f"primary_ca = {ca.home.file}"), "CP1")
        line = f"^    TLS: its certificate is valid until {end:%Y-%m-%dT%H:%M:%S}Z"
        assert code == 0
        assert re.search(line + "$", said, re.MULTILINE)
        code, said = await wires.check(tmp_path, servers(primary), "CP1")
        assert code == 1
        assert re.search(r"certificate verify failed.*; set primary_ca", said)
