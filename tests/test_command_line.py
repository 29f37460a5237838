"""The command as a person runs it: exit codes, messages, signals, what `--check` says, what the log tells."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeServer, deaf, server
from tests.play.wires import LOCAL, ROOT, as_logged, charger_at, check, command, line_with, port_of, run

V16, V201 = [Subprotocol("ocpp1.6")], [Subprotocol("ocpp2.0.1")]


def servers(primary: FakeServer, more: str = "") -> str:
    return f"[ext-server]\nserver = {primary.url}\n{more}\n"


@pytest.mark.parametrize(
    ("arguments", "ini", "code", "words"),
    [
        (["--version"], "", 0, f"ocpp-2w-proxy {p.__version__}\n"),
        (["--badge", "04AA"], "", 2, "ocpp-2w-proxy.ini: cannot be read: No such file or directory\n"),
        (["--config", "none.ini"], "", 2, "none.ini: cannot be read: No such file or directory\n"),
        ([], LOCAL.replace("0\n", "eight\n"), 2, "ocpp-2w-proxy.ini:3: port 'eight': expected a whole "),
        ([], LOCAL.replace("port = 0", "cert_chain = no.pem"), 2, "ocpp-2w-proxy.ini: cert_chain, "),
    ],
)
def test_a_wrong_use_is_told_as_one(
    arguments: list[str], ini: str, code: int, words: str, tmp_path: Path
) -> None:
    """With exit code 2; a mistake in the ini is one line, also where what it names is no certificate."""
    (tmp_path / "no.pem").write_text("no certificate")
    if ini:
        (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
    done = run(*arguments, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == code
    assert words in said
    assert not ini or (said.startswith(words), said.count("\n")) == (True, 1)


def test_demo_plays_two_sessions_and_ends_by_itself(tmp_path: Path) -> None:
    """It shows which message went where and who answered; it needs no ini and leaves no file."""
    done = run("--demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("charger hears ") == done.stdout.count("charger sends ") > 5
    assert re.search(r"secondary gets StopTransaction .*\"transactionId\":1,", done.stdout)
    assert "Each server has got its own session" in done.stdout
    assert list(tmp_path.iterdir()) == []


async def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The person who runs it has started it twice."""
    async with server() as other:
        async with command(LOCAL.replace("port = 0", f"port = {other.port}"), tmp_path) as process:
            async with asyncio.timeout(PATIENCE):
                _, stderr = await process.communicate()
            assert process.returncode == 2
            assert stderr.decode().startswith(f"cannot listen on 127.0.0.1:{other.port}: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_code_0_whatever_the_peers_do(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Within 5 s; all are closed with 1001, a peer that reads nothing does not hold it up."""
    async with server(None) as primary:
        async with command(LOCAL.replace("local", primary.url), tmp_path) as process:
            port = await port_of(process)
            async with charger_at(port, "A") as polite, charger_at(port, "B") as bad:
                async with deaf(bad.connection):
                    process.send_signal(number)
                    async with asyncio.timeout(5):
                        assert await process.wait() == 0
                    assert await polite.closed() == 1001


ELSEWHERE = """
import asyncio, runpy, signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Which a shell's background job ignores.
def refuse(*_):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
sys.modules["resource"] = None
for name in [name for name in dir(socket) if name.startswith("TCP_") and name != "TCP_NODELAY"]:
    delattr(socket, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


async def test_a_watchdog_that_fails_ends_it_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault that nobody foresaw: without deadlines it serves nobody; better a new start."""
    (tmp_path / "proxy.ini").write_text(f"{LOCAL}[status]\nport = 0\n")
    monkeypatch.setattr(p.Journal, "tick", Mock(side_effect=LookupError("nobody foresaw it")))
    async with asyncio.timeout(PATIENCE):
        assert await p.serve(p.load_config(tmp_path / "proxy.ini", {}, p.concern_of)) == p.EXIT_FAILED
    assert "nobody foresaw it" in caplog.text


async def test_it_runs_where_signal_handlers_and_socket_options_are_missing(tmp_path: Path) -> None:
    """As on Windows, and partly on macOS: it serves, and Ctrl-C ends it in good order."""
    async with command(LOCAL, tmp_path, before=(sys.executable, "-c", ELSEWHERE)) as process:
        async with charger_at(await port_of(process)) as cp:
            await cp.boots()
            process.send_signal(signal.SIGINT)
            assert await cp.closed() == 1001
        await line_with(process, "stopping")
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0


async def test_the_shipped_ini_serves_any_charger(tmp_path: Path) -> None:
    """`python ocpp_2w_proxy.py` is a working server at once."""
    ini = (ROOT / "ocpp-2w-proxy.ini").read_text().replace("port = 8321", "port = 0")
    async with command(ini, tmp_path) as process:
        port = await port_of(process)
        async with charger_at(port) as cp:
            assert (await cp.boots())["status"] == "Accepted"


# --check


async def test_check_says_what_each_server_answers(tmp_path: Path) -> None:
    """It dials both as the charger would, and touches no state."""
    async with server() as primary, server() as secondary:
        ini = servers(primary, f"secondary_server = {secondary.url}\nsecondary_id = CAR")
        code, said = await check(tmp_path, ini, "CP1")
        assert code == 0
        assert f"primary: {primary.url}: accepts 'CP1' (" in said
        assert f"secondary: {secondary.url}: accepts 'CAR' (" in said
        assert [fake.requests[0].path for fake in (primary, secondary)] == ["/ocpp/CP1", "/ocpp/CAR"]
        assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


@pytest.mark.parametrize(
    ("charger_id", "status", "more", "code", "words"),
    [
        ("CP1", 401, "", 0, "the charger's own login, which only the charger has"),
        ("CP1", 401, "primary_password = wrong", 1, "check primary_user and primary_password"),
        ("", 401, "primary_password = wrong", 1, "check primary_user and primary_password"),
        ("CP1", 404, "", 1, "HTTP 404 Not Found; check the address, and that the server knows this charger"),
        ("", 404, "", 0, "name it: --check CHARGER_ID"),
        ("CP1", 302, "", 1, "nobody is followed: put its new address into the ini"),
        ("CP1", 400, "versions = ocpp2.1", 1, "it may not speak ocpp2.1: all must speak one version"),
        ("CP 7/x", 404, "", 1, "the proxy refuses 'CP 7/x'"),
        ("OTHER", 404, "[host]\nchargers = CP*", 1, "the proxy refuses 'OTHER'"),
    ],
)
async def test_check_says_what_to_change(
    charger_id: str, status: int, more: str, code: int, words: str, tmp_path: Path
) -> None:
    """A refusal is exit code 1, but for one that only the charger itself could avoid."""
    async with server() as primary:
        primary.refusal = (status, {"Location": primary.url})
        outcome, said = await check(tmp_path, servers(primary, more), *filter(None, [charger_id]))
        assert outcome == code
        assert words in said
        assert len(primary.requests) == (not said.startswith("the proxy refuses"))


@pytest.mark.parametrize("spoken", [[], V16])
async def test_check_dials_the_secondary_with_the_version_that_the_primary_chose(
    spoken: list[Any], tmp_path: Path
) -> None:
    """As the proxy does; it says what to do where that server does not speak it."""
    async with server(versions=V201) as primary, server(versions=spoken) as secondary:
        code, said = await check(tmp_path, servers(primary, f"secondary_server = {secondary.url}"), "CP1")
        assert (code, "accepts 'CP1' (ocpp2.0.1)" in said) == (1, True)
        assert secondary.requests[0].headers["Sec-WebSocket-Protocol"] == "ocpp2.0.1"
        assert re.search(r"^secondary: .*versions = ocpp1.6$", said, re.MULTILINE)


async def test_check_says_where_a_name_leads(tmp_path: Path) -> None:
    """And what to look at where it leads nowhere, or where nobody listens."""
    async with server() as primary, server() as gone:
        await gone.stop()
        here = servers(primary).replace("127.0.0.1", "localhost")
        code, said = await check(tmp_path, f"{here}secondary_server = ws://no-such-host.invalid/\n", "CP1")
        assert code == 1
        assert re.search(r"^    DNS: localhost is .*127\.0\.0\.1", said, re.MULTILINE)
        assert "its name is not known ([Errno" in said
        code, said = await check(tmp_path, f"{here}secondary_server = {gone.url}\n", "CP1")
        assert code == 1
        assert "nobody listens there; check the address, and that it can be reached from here" in said


async def test_check_of_the_shipped_ini_needs_no_server(tmp_path: Path) -> None:
    """Both servers are the proxy itself; where there is no secondary, it says so."""
    code, said = await check(tmp_path, (ROOT / "ocpp-2w-proxy.ini").read_text())
    assert (code, said.count("the proxy itself answers")) == (0, 2)
    code, said = await check(tmp_path, LOCAL)
    assert (code, said.count("the proxy itself answers"), "secondary: none" in said) == (0, 1, True)


BADGES = "[ext-server]\nserver = local\nsecondary_server = local\n"
BADGES += "primary_rfid = 04AA\n  04BB, 04CC\n\n  04D*\n"
BADGES += "secondary_rfid =\n  ; Company cards.\n  04DD*\n  04A1B2C3\n"
NO_LIST = "its badge is on no list: unknown_rfid ="


@pytest.mark.parametrize(
    ("badge", "more", "answer"),
    [
        ("04aa", "", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:4 (04aa)"),
        ("04CC", "", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:5 (04cc)"),
        ("04D1", "", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:7 (04d*)"),
        ("04DD", "", "secondary: its badge is on secondary_rfid, ocpp-2w-proxy.ini:10 (04dd*)"),
        ("05", "", f"primary: {NO_LIST} primary, by default"),
        (
            "05",
            "[charger CP1]\nunknown_rfid = reject\n",
            f"nobody (rejected): {NO_LIST} reject, ocpp-2w-proxy.ini:13",
        ),
        ("04A1B2C8", "", f"primary: {NO_LIST} primary, by default; 04a1b2c3 in line 11 is nearly the same"),
    ],
)
async def test_check_says_whose_a_badge_is_and_by_which_line(
    badge: str, more: str, answer: str, tmp_path: Path
) -> None:
    """Before somebody stands at the charger with it; one that differs in a letter is mostly mistyped."""
    code, said = await check(tmp_path, BADGES + more, "CP1", "--badge", badge)
    assert (code, said.splitlines()[0]) == (0, f"badge {badge}: {answer}")


# Logging.


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"idTag":"04A1B2C3","x":1}', '{"idTag":"****B2C3","x":1}'),
        ('{"idToken": {"idToken" : "04A1B2C3"}}', '{"idToken": {"idToken" : "****B2C3"}}'),
        (r'{"data":"{\"idToken\":\"04A1B2C3\"}"}', r'{"data":"{\"idToken\":"****B2C3\"}"}'),
        ('{"idTag":"04A1B2C3', '{"idTag":"****B2C3'),
        ("begins; badge 04A1B2C3", "begins; badge ****B2C3"),
        ("begins; badge 04A1", "begins; badge ****"),
    ],
)
def test_badges_are_masked_unless_the_ini_says_otherwise(line: str, shown: str) -> None:
    """Known by their keys, in whatever dress."""
    assert (as_logged(line), as_logged(line, is_full=True)) == (shown, line)


@pytest.mark.parametrize(
    "line",
    [
        'CP1 > [2,"1","ChangeConfiguration",{"value":"s3cret","key":"AuthorizationKey"}]',
        r'[2,"1","ChangeConfiguration",{"key":"Authorization\u004bey","value":"s3cret"}]',
        '[2,"1","SetNetworkProfile",{"connectionData":{"apn":{"simPin":"s3cret"}}}]',
        "to ftp://user:s3cret@host/, ftp://me:a@s3cret@host/x, ftp://me:a/s3cret@host",
        "Authorization: Basic s3cret",
    ],
)
def test_every_line_is_one_of_ascii_without_credentials(line: str) -> None:
    """However long, and whatever terminals make of it."""
    assert "s3cret" not in as_logged(line, is_full=True)
    assert as_logged("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert len(as_logged(line * 10_000)) <= 2000
