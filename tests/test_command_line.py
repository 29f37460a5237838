"""The command as a person runs it: exit codes, messages, signals."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeCharger, deaf, server
from tests.play.plays import config_of

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "ocpp_2w_proxy.py")
LOCAL = "[host]\naddr = 127.0.0.1\nport = 0\n[ext-server]\nserver = local\n"


def run(*arguments: str, cwd: Path = ROOT, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@asynccontextmanager
async def command(
    ini: str, folder: Path, stderr: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command, serving, without a second port unless the ini names one; killed if it has not ended."""
    without_status = "" if "[status]" in ini else "[status]\nport = 0\n"
    (folder / "ocpp-2w-proxy.ini").write_text(ini + without_status)
    process = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, cwd=folder, stderr=asyncio.subprocess.PIPE if stderr is None else stderr
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def line_with(process: asyncio.subprocess.Process, words: str) -> str:
    """Return the first line of stderr that contains the words."""
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while line := await process.stderr.readline():
            if words in line.decode():
                return line.decode()
    raise AssertionError(f"stderr ended without {words!r}")


async def port_of(process: asyncio.subprocess.Process) -> int:
    line = await line_with(process, "listens on")
    port = re.search(r":(\d+)/", line)
    assert port is not None
    return int(port[1])


def test_version_is_told() -> None:
    """--version names the product and its version."""
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"ocpp-2w-proxy {p.__version__}\n")


def test_demo_and_check_exclude_each_other() -> None:
    """A wrong use is told as one, with exit code 2."""
    done = run("--demo", "--check")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


def test_demo_plays_two_sessions_and_ends_by_itself() -> None:
    """It shows which message went where and who answered."""
    done = run("--demo")
    assert done.returncode == 0, done.stderr
    assert "charger hears from primary" in done.stdout
    assert "charger hears from the proxy" in done.stdout
    assert re.search(r"secondary gets StopTransaction .*\"transactionId\":1,", done.stdout)
    assert "Each server has got its own session" in done.stdout


@pytest.mark.parametrize(
    ("ini", "message"),
    [
        (None, "ocpp-2w-proxy.ini: cannot be read: No such file or directory\n"),
        ("[hots]\n", "ocpp-2w-proxy.ini:1: unknown section '[hots]'; expected "),
        ("[host]\nport = eight\n", "ocpp-2w-proxy.ini:2: port 'eight': expected a whole number"),
        ("[ext-server]\n", "ocpp-2w-proxy.ini:1: server is missing"),
    ],
)
def test_a_mistake_in_the_ini_is_one_line_and_exit_code_2(
    ini: str | None, message: str, tmp_path: Path
) -> None:
    """No port is opened, no traceback shown."""
    if ini is not None:
        (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_unfit_certificates_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """A file that is there but is no certificate."""
    (tmp_path / "x.pem").write_text("no certificate")
    (tmp_path / "ocpp-2w-proxy.ini").write_text(LOCAL.replace("port = 0\n", "port = 0\ncert_chain = x.pem\n"))
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "cert_chain" in done.stderr
    assert done.stderr.count("\n") == 1


async def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The person who runs it has started it twice."""
    async with (
        server() as other,
        command(LOCAL.replace("port = 0", f"port = {other.port}"), tmp_path) as process,
    ):
        async with asyncio.timeout(PATIENCE):
            _, stderr = await process.communicate()
        assert process.returncode == 2
        assert stderr.decode().startswith(f"cannot listen on 127.0.0.1:{other.port}: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_code_0_whatever_the_peers_do(
    number: signal.Signals, tmp_path: Path
) -> None:
    """All connections are closed with 1001; a peer that reads nothing does not hold it up."""
    async with server(None) as primary:
        async with command(LOCAL.replace("local", primary.url), tmp_path) as process:
            uri = f"ws://127.0.0.1:{await port_of(process)}"
            options = {"subprotocols": [Subprotocol("ocpp1.6")], "ping_interval": None, "close_timeout": 1}
            async with connect(f"{uri}/A", **options) as good, connect(f"{uri}/B", **options) as bad:  # type: ignore[arg-type]
                polite = FakeCharger(good)
                async with deaf(bad):
                    process.send_signal(number)
                    async with asyncio.timeout(5):
                        assert await process.wait() == 0
                    assert await polite.closed() == 1001
                await polite.listener


async def connected(uri: str) -> ClientConnection:
    """Connect as soon as somebody listens."""
    while True:
        try:
            return await connect(uri, subprotocols=[Subprotocol("ocpp1.6")])
        except OSError:
            await asyncio.sleep(0.05)


ELSEWHERE = """
import asyncio, runpy, socket, sys
def refuse(*_):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
sys.modules["resource"] = None
for name in [name for name in dir(socket) if name.startswith("TCP_") and name != "TCP_NODELAY"]:
    delattr(socket, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


async def test_it_runs_where_signal_handlers_and_socket_options_are_missing(tmp_path: Path) -> None:
    """As on Windows, and partly on macOS: it serves, and Ctrl-C ends it in good order."""
    (tmp_path / "ocpp-2w-proxy.ini").write_text(f"{LOCAL}[status]\nport = 0\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ELSEWHERE, SCRIPT), cwd=tmp_path, stderr=asyncio.subprocess.PIPE
    )
    uri = f"ws://127.0.0.1:{await port_of(process)}/CP1"
    async with connect(uri, subprotocols=[Subprotocol("ocpp1.6")]) as connection:
        fake = FakeCharger(connection)
        await fake.boots()
        process.send_signal(signal.SIGINT)
        assert await fake.closed() == 1001
    await fake.listener
    await line_with(process, "stopping")
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 0
    process._transport.close()  # type: ignore[attr-defined]


# --check


def check(tmp_path: Path, ini: str, *charger_id: str) -> tuple[int, str]:
    (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
    done = run("--check", *charger_id, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


async def test_check_says_what_each_server_answers(tmp_path: Path) -> None:
    """It dials both as the charger would, and touches no state."""
    async with server() as primary, server() as secondary:
        ini = (
            f"[ext-server]\nserver = {primary.url}\nsecondary_server = {secondary.url}\nsecondary_id = CAR\n"
        )
        code, told = await asyncio.to_thread(check, tmp_path, ini, "CP1")
        assert code == 0
        assert f"primary: {primary.url}: accepts 'CP1' (" in told
        assert f"secondary: {secondary.url}: accepts 'CAR' (" in told
        assert primary.requests[0].path == "/ocpp/CP1"
        assert [path.name for path in tmp_path.iterdir()] == ["ocpp-2w-proxy.ini"]


async def test_check_is_well_if_only_the_chargers_own_login_is_missing(tmp_path: Path) -> None:
    """A 401 of the primary, whose login only the charger has."""
    async with server() as primary:
        primary.refusal = (401, {})
        code, told = await asyncio.to_thread(
            check, tmp_path, f"[ext-server]\nserver = {primary.url}\n", "CP1"
        )
        assert code == 0
        assert "the charger's own login" in told


async def test_check_fails_with_advice(tmp_path: Path) -> None:
    """A refusal, or a server that cannot be reached, is exit code 1 and says what to change."""
    async with server() as primary, server() as secondary:
        url = secondary.url
        await secondary.stop()
        primary.refusal = (404, {})
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {url}\n"
        code, told = await asyncio.to_thread(check, tmp_path, ini, "CP1")
        assert code == 1
        assert "HTTP 404 Not Found; check the address, and that the server knows this charger" in told
        assert "check the address, and that it can be reached from here" in told


async def test_check_names_a_wrong_login_even_without_a_charger(tmp_path: Path) -> None:
    """A login that stands in the ini can be checked for nobody in particular."""
    async with server() as primary:
        primary.refusal = (401, {})
        ini = f"[ext-server]\nserver = {primary.url}\nprimary_password = wrong\n"
        code, told = await asyncio.to_thread(check, tmp_path, ini)
        assert code == 1
        assert "check primary_user and primary_password" in told


@pytest.mark.parametrize("charger_id", ["CP 7/x", "OTHER"])
def test_check_says_what_the_proxy_itself_refuses(charger_id: str, tmp_path: Path) -> None:
    """No server is asked for a charger that may not connect."""
    code, told = check(tmp_path, f"[host]\nchargers = CP*\n{LOCAL.replace('[host]', '')}", charger_id)
    assert code == 1
    assert told.startswith(f"the proxy refuses '{charger_id}'")


async def test_check_without_a_charger_is_well_if_the_servers_answer(tmp_path: Path) -> None:
    """Nobody knows a charger of that name; that they say so is enough."""
    async with server() as primary:
        primary.refusal = (404, {})
        code, told = await asyncio.to_thread(check, tmp_path, f"[ext-server]\nserver = {primary.url}\n")
        assert code == 0
        assert "name it: --check CHARGER_ID" in told


BADGES = """\
[ext-server]
server = local
secondary_server = local
primary_rfid = 04AA
  04BB, 04CC

  04D*
secondary_rfid =
  ; Company cards.
  04DD*
"""


@pytest.mark.parametrize(
    ("badge", "answer"),
    [
        ("04aa", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:4 (04aa)"),
        ("04CC", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:5 (04cc)"),
        ("04D1", "primary: its badge is on primary_rfid, ocpp-2w-proxy.ini:7 (04d*)"),
        ("04DD", "secondary: its badge is on secondary_rfid, ocpp-2w-proxy.ini:10 (04dd*)"),
        ("05", "primary: its badge is on no list: unknown_rfid = primary, by default"),
    ],
)
def test_check_says_whose_a_badge_is_and_by_which_line(badge: str, answer: str, tmp_path: Path) -> None:
    """Before somebody stands at the charger with it."""
    code, told = check(tmp_path, BADGES, "CP1", "--badge", badge)
    assert code == 0
    assert told.splitlines()[0] == f"badge {badge}: {answer}"


def test_check_says_which_line_rejects_a_badge(tmp_path: Path) -> None:
    """The one of unknown_rfid, in the section of the charger if it has one."""
    ini = f"{BADGES}[charger CP1]\nunknown_rfid = reject\n"
    _, told = check(tmp_path, ini, "CP1", "--badge", "05")
    assert told.startswith(
        "badge 05: rejected: its badge is on no list: unknown_rfid = reject, ocpp-2w-proxy.ini:12\n"
    )


def test_check_points_out_a_near_miss(tmp_path: Path) -> None:
    """A badge that differs in a letter is most often a typing mistake."""
    _, told = check(tmp_path, f"{BADGES}  04A1B2C3\n", "CP1", "--badge", "04A1B2C8")
    assert "; 04a1b2c3 in line 11 is nearly the same" in told.splitlines()[0]


async def test_check_dials_the_secondary_with_the_version_that_the_primary_chose(tmp_path: Path) -> None:
    """As the proxy does; it says what to do where that server does not speak it."""
    new, old = [Subprotocol("ocpp2.0.1")], [Subprotocol("ocpp1.6")]
    async with server(versions=new) as primary, server(versions=old) as secondary:
        ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = {secondary.url}\n"
        code, told = await asyncio.to_thread(check, tmp_path, ini, "CP1")
        assert code == 1
        assert "accepts 'CP1' (ocpp2.0.1)" in told
        (line,) = [line for line in told.splitlines() if line.startswith("secondary")]
        assert "versions = ocpp1.6" in line


def test_a_badge_is_looked_up_by_check_alone() -> None:
    """A wrong use is told as one."""
    done = run("--badge", "04AA")
    assert done.returncode == 2
    assert "--badge goes with --check" in done.stderr


async def test_check_says_where_a_name_leads(tmp_path: Path) -> None:
    """And what to look at where it leads nowhere."""
    async with server() as primary:
        here = primary.url.replace("127.0.0.1", "localhost")
        ini = f"[ext-server]\nserver = {here}\nsecondary_server = ws://no-such-host.invalid/\n"
        code, told = await asyncio.to_thread(check, tmp_path, ini, "CP1")
        assert code == 1
        assert re.search(r"^    DNS: localhost is .*127\.0\.0\.1", told, re.MULTILINE)
        assert "    DNS: the look-up of no-such-host.invalid fails: " in told
        assert "check the name in the address, and the name server of this machine" in told


def test_check_of_the_shipped_ini_needs_no_server(tmp_path: Path) -> None:
    """Both servers are the proxy itself."""
    code, told = check(tmp_path, (ROOT / "ocpp-2w-proxy.ini").read_text())
    assert code == 0
    assert told.count("the proxy itself answers") == 2


async def test_the_shipped_ini_serves_any_charger(tmp_path: Path) -> None:
    """`python ocpp_2w_proxy.py` is a working server at once."""
    ini = (ROOT / "ocpp-2w-proxy.ini").read_text().replace("port = 8321", "port = 0")
    async with command(ini, tmp_path) as process:
        port = await port_of(process)
        async with connect(f"ws://127.0.0.1:{port}/A", subprotocols=[Subprotocol("ocpp1.6")]) as connection:
            fake = FakeCharger(connection)
            assert (await fake.boots())["status"] == "Accepted"
        await fake.listener
        with pytest.raises(InvalidStatus):
            await connect(f"ws://127.0.0.1:{port}/")


# Logging.


async def test_the_log_tells_the_story_with_badges_masked(tmp_path: Path) -> None:
    """INFO: who connected, which badge chose which server, sessions; never a credential."""
    async with server() as primary:
        ini = LOCAL.replace("local", f"{primary.url}\nprimary_password = hunter2\nprimary_rfid = 04A1B2C3")
        async with command(ini, tmp_path) as process:
            port = await port_of(process)
            headers = {"Authorization": "Basic c2VjcmV0OnNlY3JldA=="}
            uri = f"ws://127.0.0.1:{port}/CP1"
            async with connect(
                uri, subprotocols=[Subprotocol("ocpp1.6")], additional_headers=headers
            ) as connection:
                fake = FakeCharger(connection)
                number = await fake.starts("04A1B2C3")
                await fake.calls("e", "StopTransaction", transactionId=number, meterStop=1, timestamp="t")
            await fake.listener
            process.terminate()
            _, stderr = await process.communicate()
        told = stderr.decode()
        assert "CP1: charger connected (ocpp1.6)" in told
        assert (
            "CP1: a session of primary begins on connector 1: its badge is on primary_rfid; badge ****B2C3"
            in told
        )
        assert "CP1: session 7 of primary ends on connector 1; badge ****B2C3" in told
        for secret in ("hunter2", "c2VjcmV0", "04A1B2C3"):
            assert secret not in told


@pytest.mark.parametrize("full", [False, True])
def test_every_line_is_redacted(full: bool) -> None:
    """One line of ASCII, no credentials, badges masked unless the ini says otherwise."""
    redactor = p.Redactor()
    redactor.full_badges = full
    lines = {
        '{"idTag":"04A1B2C3","x":1}': '{"idTag":"****B2C3","x":1}',
        '{"idToken": {"idToken" : "04A1B2C3"}}': '{"idToken": {"idToken" : "****B2C3"}}',
        r'{"data":"{\"idToken\":\"04A1B2C3\"}"}': r'{"data":"{\"idToken\":"****B2C3\"}"}',
        '{"idTag":"04A1B2C3': '{"idTag":"****B2C3',
        '{"parentIdTag":12345678}': '{"parentIdTag":"****5678}',
        "begins; badge 04A1B2C3": "begins; badge ****B2C3",
        "begins; badge 04A1": "begins; badge ****",
    }
    for line, shown in lines.items():
        assert redacted(redactor, line) == (line if full else shown)
    hidden = 'CP1 > [2,"1","ChangeConfiguration",{"value":"s3cret","key":"AuthorizationKey"}]'
    assert "s3cret" not in redacted(redactor, hidden)
    assert "s3cret" not in redacted(redactor, "to ftp://user:s3cret@host/")
    assert redacted(redactor, "a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert len(redacted(redactor, "x" * 10_000)) == p.MAX_LOG_LINE


def redacted(redactor: p.Redactor, text: str) -> str:
    """Return the text as it stands in the log."""
    record = logging.LogRecord("proxy", logging.INFO, "", 0, "%s", (text,), None)
    assert redactor.filter(record)
    line: str = record.getMessage()
    return line


def test_the_librarys_debug_lines_are_never_shown() -> None:
    """They would show credentials, whatever the ini says."""
    levels = {"proxy": "INFO", "websockets.client": "DEBUG", "proxy.websockets": "DEBUG", "asyncio": "DEBUG"}
    before = {name: logging.getLogger(name).level for name in levels}
    handlers = logging.getLogger().handlers[:]
    config = config_of(LOCAL)
    p.set_up_logging(replace(config, levels=levels))
    assert logging.getLogger("websockets.client").level == logging.INFO
    assert p.LIBRARY_LOG.level == logging.INFO
    assert logging.getLogger("asyncio").level == logging.DEBUG
    logging.getLogger().handlers = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
