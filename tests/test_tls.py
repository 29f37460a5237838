"""TLS on all three sides, with certificates of authorities that exist for the test only."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.exceptions import InvalidHandshake, InvalidStatus

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeServer, charger, cut, eventually, running, server
from tests.play.plays import config_of

SERVER, CLIENT = ssl.Purpose.SERVER_AUTH, ssl.Purpose.CLIENT_AUTH  # Whom a context verifies.


class Authority:
    """A certificate authority with its files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca = trustme.CA(organization_name=name)
        self.folder = folder / name
        self.folder.mkdir()
        self.file = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)

    def files(self, identity: str) -> tuple[Path, Path]:
        """Return a new certificate and its key as two files."""
        leaf = self.ca.issue_cert(identity)
        cert, key = self.folder / f"{identity}.pem", self.folder / f"{identity}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(key)
        return cert, key

    def one_file(self, identity: str) -> Path:
        """Return a new certificate and its key as one file."""
        file = self.folder / f"{identity}-both.pem"
        self.ca.issue_cert(identity).private_key_and_cert_chain_pem.write_to_path(file)
        return file

    def listening(self, identity: str = "127.0.0.1", clients: Authority | None = None) -> ssl.SSLContext:
        """Return what a server listens with; with `clients`, it wants a certificate of that authority."""
        context = ssl.create_default_context(CLIENT)
        self.ca.issue_cert(identity).configure_cert(context)
        if clients:
            clients.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def calling(self, clients: Authority | None = None) -> ssl.SSLContext:
        """Return what a charger calls with; with `clients`, it shows a certificate of that authority."""
        context = ssl.create_default_context(SERVER, cafile=self.file)
        if clients:
            clients.ca.issue_cert("charger.example").configure_cert(context)
        return context


@pytest.fixture
def home(tmp_path: Path) -> Authority:
    """The authority of the house: the proxy's listener, the primary."""
    return Authority(tmp_path, "home")


@pytest.fixture
def work(tmp_path: Path) -> Authority:
    """The authority of the employer: the secondary."""
    return Authority(tmp_path, "work")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path, "stranger")


def listener(home: Authority, more: str = "") -> str:
    """Return the `[host]` keys of a proxy that chargers reach by wss."""
    cert, key = home.files("127.0.0.1")
    return f"cert_chain = {cert}\ncert_key = {key}\n{more}\n"


def secure(fake: FakeServer) -> str:
    return fake.url.replace("ws://", "wss://")


def servers(primary: FakeServer, secondary: FakeServer | None = None, more: str = "") -> str:
    """Return the `[ext-server]` of an ini; servers are reached as their certificates demand."""
    ini = f"[ext-server]\nserver = {secure(primary)}\nprimary_rfid = PRIM*\n"
    if secondary:
        ini += f"secondary_server = {secure(secondary)}\nsecondary_rfid = SECO*\n"
    return f"{ini}{more}\n"


# The charger's side.


@asynccontextmanager
async def locked_house(
    home: Authority, more: str = "", host: str | None = None
) -> AsyncIterator[tuple[p.Proxy, FakeServer]]:
    """A proxy that chargers reach by wss, with a primary in the same cupboard that needs none."""
    async with server() as primary:
        ini = host if host is not None else listener(home, more)
        async with running(f"{ini}[ext-server]\nserver = {primary.url}\n") as proxy:
            yield proxy, primary


async def is_refused(proxy: p.Proxy, context: ssl.SSLContext | None) -> None:
    """A charger tries to connect, and does not get as far as HTTP."""
    options: dict[str, Any] = {"ssl": context} if context else {}
    with pytest.raises((OSError, InvalidHandshake)) as refusal:
        async with charger(proxy, open_timeout=5, **options):
            pass
    assert not isinstance(refusal.value, InvalidStatus | TimeoutError)
    assert proxy.relays == {}


async def test_what_is_no_request_behind_the_tls_handshake_is_cut(
    home: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first bytes may come before asyncio has handed the TLS over; nothing goes out in the clear."""
    async with locked_house(home) as (proxy, _):
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, ssl=home.calling())
            writer.write(b"GET /CP1 HTTP/1.1\r\nX\r\n\r\n")
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), PATIENCE)
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
        await eventually(lambda: not proxy.handshakes)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_charger_speaks_wss(home: Authority) -> None:
    """With cert_chain and cert_key the proxy listens with TLS."""
    async with (
        locked_house(home) as (proxy, primary),
        charger(proxy, ssl=home.calling()) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"
        assert await cp.starts("PRIM1") == 7
        assert primary.heard.actions() == ["BootNotification", "StartTransaction"]


async def test_certificate_and_key_stand_in_one_file(home: Authority) -> None:
    """Then cert_key is left empty."""
    host = f"cert_chain = {home.one_file('127.0.0.1')}\ncert_key =\n"
    async with (
        locked_house(home, host=host) as (proxy, _),
        charger(proxy, ssl=home.calling()) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"


async def test_a_large_message_passes_through_tls(home: Authority) -> None:
    """Many TLS records make one message, in both directions."""
    async with (
        locked_house(home) as (proxy, primary),
        charger(proxy, ssl=home.calling()) as cp,
    ):
        primary.answers = lambda _, payload: payload
        data = "x" * 500_000
        assert await cp.calls("1", "DataTransfer", vendorId="V", data=data) == {"vendorId": "V", "data": data}


async def test_messages_that_come_in_one_piece_through_tls_stay_apart(home: Authority) -> None:
    """A charger empties its queue: many TLS records in one read are as many messages."""
    async with (
        locked_house(home) as (proxy, primary),
        charger(proxy, ssl=home.calling()) as cp,
    ):
        primary.answers = lambda _, payload: {"status": "Accepted", **payload}
        ids = [f"d{number}" for number in range(10)]
        answers = await asyncio.gather(*(cp.calls(each, "DataTransfer", data=each) for each in ids))
        assert [answer["data"] for answer in answers] == ids


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_charger_that_hangs_up_on_tls_takes_its_primary_along(home: Authority, is_cut: bool) -> None:
    """With a goodbye or without one."""
    async with locked_house(home) as (proxy, primary):
        async with charger(proxy, ssl=home.calling()) as cp:
            await cp.boots()
            if is_cut:
                cut(cp.connection)
        connection = await primary.connection()
        async with asyncio.timeout(PATIENCE):
            await connection.wait_closed()
        assert connection.close_code == 1001


async def test_a_proxy_that_stops_says_goodbye_through_tls(home: Authority) -> None:
    """With 1001, as without TLS."""
    async with (
        locked_house(home) as (proxy, _),
        charger(proxy, ssl=home.calling()) as cp,
    ):
        await cp.boots()
        await proxy.stop()
        assert await cp.closed() == 1001


async def test_a_charger_that_speaks_no_tls_is_refused(home: Authority) -> None:
    """On a port with TLS; others are served."""
    async with locked_house(home) as (proxy, primary):
        await is_refused(proxy, None)
        assert primary.requests == []
        async with charger(proxy, ssl=home.calling()) as cp:
            assert (await cp.boots())["status"] == "Accepted"


async def test_a_charger_without_a_certificate_is_refused_where_client_ca_asks_for_one(
    home: Authority, work: Authority
) -> None:
    """It never reaches the primary."""
    async with locked_house(home, f"client_ca = {work.file}") as (proxy, primary):
        await is_refused(proxy, home.calling())
        assert primary.requests == []


async def test_a_charger_with_a_certificate_of_client_ca_is_let_in(home: Authority, work: Authority) -> None:
    """The listener's own certificate may be of another authority."""
    async with (
        locked_house(home, f"client_ca = {work.file}") as (proxy, _),
        charger(proxy, ssl=home.calling(clients=work)) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"


async def test_a_charger_with_a_certificate_of_another_authority_is_refused(
    home: Authority, work: Authority, stranger: Authority
) -> None:
    """Even of the listener's own."""
    async with locked_house(home, f"client_ca = {work.file}") as (proxy, primary):
        await is_refused(proxy, home.calling(clients=stranger))
        await is_refused(proxy, home.calling(clients=home))
        assert primary.requests == []


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "AES256-GCM-SHA384"])
async def test_a_charger_may_know_one_cipher_of_security_profile_2_alone(
    home: Authority, cipher: str
) -> None:
    """TLS 1.2 with RSA key exchange (2.0.1 part 2, A00.FR.318; EVerest/libocpp#274)."""
    cert = home.folder / "rsa.pem"
    home.ca.issue_cert(
        "127.0.0.1", key_type=trustme.KeyType.RSA
    ).private_key_and_cert_chain_pem.write_to_path(cert)
    context = home.calling()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    async with (
        locked_house(home, host=f"cert_chain = {cert}\n") as (proxy, _),
        charger(proxy, ssl=context) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"
        assert cp.connection.transport.get_extra_info("cipher")[0] == cipher


async def test_the_ciphers_of_security_profile_2_are_no_charger_s_first_choice(home: Authority) -> None:
    """Whoever knows better ones gets those, with TLS 1.2, too."""
    context = home.calling()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with locked_house(home) as (proxy, _), charger(proxy, ssl=context) as cp:
        assert cp.connection.transport.get_extra_info("cipher")[0].startswith("ECDHE-")
    async with locked_house(home) as (proxy, _), charger(proxy, ssl=home.calling()) as cp:
        assert cp.connection.transport.get_extra_info("cipher")[0].startswith("TLS_")


async def test_a_charger_that_does_not_trust_the_certificate_is_told_of_once_a_minute(
    home: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """One INFO line with its address, and what to look at (lbbrhzn/ocpp#1599)."""
    caplog.set_level("INFO", "proxy")
    async with locked_house(home) as (proxy, primary):

        def told() -> list[str]:
            return [
                r.getMessage() for r in caplog.records if r.levelname == "INFO" and "TLS" in r.getMessage()
            ]

        for _ in range(2):
            await is_refused(proxy, stranger.calling())
            await eventually(lambda: not proxy.handshakes)
            (line,) = told()
            assert line.startswith("127.0.0.1: its TLS handshake failed: ")
            assert "certificate" in line
        proxy.complaints.told.clear()  # A minute later.
        await is_refused(proxy, stranger.calling())
        await eventually(lambda: len(told()) == 2)
        assert told()[1].endswith("(1 more like it since the last such line)")
        assert primary.requests == []
    assert not [record for record in caplog.records if record.exc_info]


async def test_what_else_can_be_wrong_with_a_charger_s_tls_is_told_in_words(
    home: Authority, work: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """It speaks none, hangs up, shows no certificate where one is wanted, or one of somebody else."""
    caplog.set_level("INFO", "proxy")
    async with locked_house(home, f"client_ca = {work.file}") as (proxy, _):

        async def told() -> str:
            await eventually(lambda: not proxy.handshakes and "TLS handshake failed" in caplog.text)
            (line,) = [text for text in caplog.messages if "TLS handshake failed" in text]
            caplog.clear()
            proxy.complaints.told.clear()  # A minute later.
            return line

        await is_refused(proxy, None)
        assert (await told()).endswith("; its address of this proxy has to begin with wss://")
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.close()
        assert (await told()).endswith(": it hung up; look whether it trusts the certificate in cert_chain")
        await is_refused(proxy, home.calling())
        assert (await told()).endswith("; client_ca asks for a certificate of its own")
        await is_refused(proxy, home.calling(clients=home))
        assert (await told()).endswith("; its own certificate has to be of client_ca")


# The servers' side.


async def test_both_servers_speak_wss_each_with_its_own_authority(home: Authority, work: Authority) -> None:
    """primary_ca and secondary_ca; the badge decides as ever."""
    async with (
        server(context=home.listening()) as primary,
        server(context=work.listening()) as secondary,
        running(
            servers(primary, secondary, f"primary_ca = {home.file}\nsecondary_ca = {work.file}")
        ) as proxy,
        charger(proxy) as cp,
    ):
        await cp.boots()
        await cp.starts("PRIM1", "s1")
        await cp.starts("SECO1", "s2")
        assert (await secondary.heard.call("StartTransaction"))[3]["idTag"] == "SECO1"
        assert (await primary.heard.call("StartTransaction"))[3]["idTag"] == "PRIM1"
        assert len(proxy.dialer.contexts) == 2


async def test_all_three_sides_speak_wss(home: Authority, work: Authority) -> None:
    """A Call of the secondary reaches the charger, and its answer the secondary."""
    more = f"primary_ca = {home.file}\nsecondary_ca = {work.file}"
    async with (
        server(context=home.listening()) as primary,
        server(context=work.listening()) as secondary,
        running(listener(home) + servers(primary, secondary, more)) as proxy,
        charger(proxy, ssl=home.calling()) as cp,
    ):
        await cp.boots()
        await secondary.heard.call("BootNotification")
        await secondary.calls("q", "GetConfiguration", key=["A"])
        question = await cp.heard.call("GetConfiguration")
        await cp.connection.send(f'[3, "{question[1]}", {{"unknownKey": ["A"]}}]')
        assert await secondary.heard.answer("q") == [3, "q", {"unknownKey": ["A"]}]


async def test_a_call_that_comes_with_the_handshake_of_a_tls_server_is_not_lost(home: Authority) -> None:
    """Some servers ask as soon as they have accepted."""
    async with server(context=home.listening()) as primary:
        primary.greeting = [f'[2, "g{number}", "ClearCache", {{}}]' for number in range(3)]
        async with (
            running(servers(primary, more=f"primary_ca = {home.file}")) as proxy,
            charger(proxy) as cp,
        ):
            for number in range(3):
                await cp.heard.until(lambda m, name=f"g{number}": m[1] == name)  # type: ignore[misc]
                await cp.connection.send(f'[3, "g{number}", {{"status": "Accepted"}}]')
                assert (await primary.heard.answer(f"g{number}"))[2] == {"status": "Accepted"}


async def test_the_proxy_shows_each_server_the_certificate_for_it(home: Authority, work: Authority) -> None:
    """primary_cert with primary_key; secondary_cert alone where its file contains the key."""
    cert, key = home.files("proxy.example")
    more = f"""primary_ca = {home.file}
primary_cert = {cert}
primary_key = {key}
secondary_ca = {work.file}
secondary_cert = {work.one_file("proxy.example")}
secondary_key ="""
    async with (
        server(context=home.listening(clients=home)) as primary,
        server(context=work.listening(clients=work)) as secondary,
        running(servers(primary, secondary, more)) as proxy,
        charger(proxy) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"
        await secondary.heard.call("BootNotification")
        for fake in (primary, secondary):
            shown = (await fake.connection()).transport.get_extra_info("peercert")
            assert ("DNS", "proxy.example") in shown["subjectAltName"]


async def test_a_primary_that_misses_the_proxys_certificate_is_away(home: Authority) -> None:
    """The charger's handshake gets 503, and it comes back later."""
    async with (
        server(context=home.listening(clients=home)) as primary,
        running(servers(primary, more=f"primary_ca = {home.file}")) as proxy,
    ):
        with pytest.raises(InvalidStatus) as refusal:
            async with charger(proxy):
                pass
        assert refusal.value.response.status_code == 503
        assert primary.requests == []


@pytest.mark.parametrize("fault", ["unknown authority", "other name", "no TLS"])
async def test_a_primary_that_cannot_be_trusted_is_away(
    home: Authority, stranger: Authority, fault: str
) -> None:
    """Its certificate is verified, the name too: it hears nothing, and the charger's handshake gets 503."""
    contexts = {
        "unknown authority": stranger.listening(),
        "other name": home.listening("primary.example"),
        "no TLS": None,
    }
    async with (
        server(context=contexts[fault]) as primary,
        running(servers(primary, more=f"primary_ca = {home.file}")) as proxy,
    ):
        with pytest.raises(InvalidStatus) as refusal:
            async with charger(proxy):
                pass
        assert refusal.value.response.status_code == 503
        assert primary.requests == []


async def test_without_a_ca_of_its_own_a_server_needs_a_publicly_known_authority(home: Authority) -> None:
    """An empty primary_ca is the system's list, not trust in everybody."""
    async with (
        server(context=home.listening()) as primary,
        running(servers(primary)) as proxy,
    ):
        with pytest.raises(InvalidStatus) as refusal:
            async with charger(proxy):
                pass
        assert refusal.value.response.status_code == 503
        assert primary.requests == []


async def test_the_charger_notices_nothing_of_a_secondary_that_cannot_be_trusted(
    home: Authority, work: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """It is served as ever, also the secondary's badges; the log says what is wrong with the secondary."""
    more = f"primary_ca = {home.file}\nsecondary_ca = {work.file}"
    async with (
        server(context=home.listening()) as primary,
        server(context=stranger.listening()) as secondary,
        running(servers(primary, secondary, more)) as proxy,
        charger(proxy) as cp,
    ):
        assert (await cp.boots())["status"] == "Accepted"
        await eventually(lambda: "secondary" in caplog.text and "CERTIFICATE_VERIFY_FAILED" in caplog.text)
        assert await cp.starts("PRIM1", "s1") == 7
        assert await cp.starts("SECO1", "s2") >= 2_000_000_000
        assert primary.heard.actions() == ["BootNotification", "StartTransaction"]
        assert secondary.requests == []


async def test_what_was_stored_reaches_a_secondary_once_it_can_be_trusted(
    home: Authority, work: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """The employer renews a wrong certificate; nothing of the session is lost."""
    more = f"primary_ca = {home.file}\nsecondary_ca = {work.file}"
    async with (
        server(context=home.listening()) as primary,
        server(context=stranger.listening()) as secondary,
        running(servers(primary, secondary, more)) as proxy,
        charger(proxy) as cp,
    ):
        await cp.boots()
        await eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
        await cp.starts("SECO1")
        await secondary.stop()
        await secondary.start(work.listening())
        assert (await secondary.heard.call("StartTransaction"))[3]["idTag"] == "SECO1"


# What people read of a server that cannot be reached.


async def trouble_with(url: str, more: str = "") -> str:
    """Return what a dial to this address comes to."""
    dialer = p.Dialer(1024)
    place = config_of(f"[ext-server]\nserver = {url}\n{more}\n").default.primary
    with pytest.raises(p.DialError) as refusal:
        await dialer.dial(p.Peer.PRIMARY, place, "CP1", ["ocpp1.6"], p.Credentials())
    return str(refusal.value)


async def test_a_port_at_which_nobody_listens_is_told_in_words() -> None:
    """Not as [Errno 111]; also where several addresses have been tried."""
    async with server() as gone:
        url = gone.url
    assert await trouble_with(url) == "nobody listens there"
    assert await trouble_with(url.replace("127.0.0.1", "localhost")) == "nobody listens there"


async def hanging_up(words: bytes) -> asyncio.Server:
    """Listen, and answer what comes with these words."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(2**16)
        writer.write(words)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def test_a_port_that_speaks_tls_is_told_in_words(home: Authority) -> None:
    """ws:// was written where wss:// was meant. Java sends an alert, OpenSSL hangs up without a word."""
    async with await hanging_up(b"\x15\x03\x03\x00\x02\x02\x0a") as listener:
        port = listener.sockets[0].getsockname()[1]
        assert await trouble_with(f"ws://127.0.0.1:{port}") == "that port speaks TLS: wss://"
    async with server(context=home.listening()) as primary:
        told = await trouble_with(primary.url)
        assert told == "it hangs up without a word; perhaps that port speaks TLS: wss://"


async def test_a_port_that_speaks_no_tls_is_told_in_words(home: Authority) -> None:
    """wss:// was written where ws:// was meant. Most answer in HTTP, Home Assistant hangs up."""
    more = f"primary_ca = {home.file}"
    async with await hanging_up(b"HTTP/1.1 400 Bad Request\r\n\r\n") as listener:
        port = listener.sockets[0].getsockname()[1]
        assert await trouble_with(f"wss://127.0.0.1:{port}", more) == "that port speaks no TLS: ws://"
    async with server() as primary:
        told = await trouble_with(secure(primary), more)
        assert told == "it hangs up on TLS; perhaps that port speaks none: ws://"


# One context for all chargers: it is megabytes, and its files are read once.


async def test_all_chargers_share_one_context_for_each_server(home: Authority) -> None:
    """Of the ini: five chargers, one certificate."""
    async with (
        server(context=home.listening()) as primary,
        running(servers(primary, more=f"primary_ca = {home.file}")) as proxy,
    ):
        for number in range(5):
            async with charger(proxy, f"CP{number}") as cp:
                assert (await cp.boots())["status"] == "Accepted"
        assert len(proxy.dialer.contexts) == 1


async def test_servers_without_tls_need_no_context() -> None:
    """None is made."""
    async with (
        server() as primary,
        running(f"[ext-server]\nserver = {primary.url}") as proxy,
        charger(proxy) as cp,
    ):
        await cp.boots()
        assert not proxy.dialer.contexts


# What `--check` says of a certificate.


async def test_check_says_how_long_a_certificate_is_valid(
    home: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it will do when the charger comes."""
    async with server(context=home.listening()) as primary:
        config = config_of(servers(primary, more=f"primary_ca = {home.file}"))
        assert await p.check(config, tmp_path / "ini", "CP1", None) == p.EXIT_OK
        assert re.search(
            r"^    TLS: its certificate is valid until \d{4}-\d\d-\d\dT",
            capsys.readouterr().out,
            re.MULTILINE,
        )


async def test_check_says_what_is_wrong_with_a_certificate(
    home: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And which key of the ini mends it."""
    async with server(context=home.listening()) as primary:
        assert await p.check(config_of(servers(primary)), tmp_path / "ini", "CP1", None) == p.EXIT_FAILED
        told = capsys.readouterr().out
        assert re.search(r"^    TLS: .*certificate verify failed.*; set primary_ca", told, re.MULTILINE)


def test_a_certificate_that_ends_soon_is_told_with_its_days() -> None:
    """So that somebody renews it in time."""
    certificate = {"notAfter": "Jan  5 00:00:00 2027 GMT"}
    end = 1_799_107_200.0
    assert (
        p.validity_of(certificate, end - 40 * p.DAY) == "its certificate is valid until 2027-01-05T00:00:00Z"
    )
    assert p.validity_of(certificate, end - 7 * p.DAY).endswith("Z: only 7 days")
