"""No credential and no full badge in what the proxy says, whatever the peers say to it.

A badge is known by its key: what stands in the prose of others is not looked through.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeCharger, FakeServer, accepting, server
from tests.play.planted import (
    BADGES,
    CHARGER_LOGIN,
    HOST_PASSWORD,
    NEW_KEY,
    PRIMARY_PASSWORD,
    SECONDARY_PASSWORD,
    SECRETS,
    URL_PASSWORD,
    Eavesdropper,
    told,
)
from tests.play.plays import config_of
from tests.test_admission import login
from tests.test_command_line import SCRIPT, command, port_of, run

INI = f"""[logging]
proxy = DEBUG
websockets.server = DEBUG
asyncio = DEBUG
[host]
addr = 127.0.0.1
port = 0
password = {HOST_PASSWORD}
[ext-server]
server = %s
primary_password = {PRIMARY_PASSWORD}
primary_rfid = {BADGES[0]}
secondary_server = %s
secondary_user = me
secondary_password = {SECONDARY_PASSWORD}
secondary_rfid = {BADGES[1]}
"""


def talkative(action: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer like a server that tells of a badge in JSON within a string."""
    if action == "DataTransfer":
        return {"status": "Rejected", "data": json.dumps({"idTag": BADGES[2].lower()})}
    return accepting(action, payload)


async def misbehave(port: int) -> None:
    """Knock with wrong logins, in all sorts of broken ways."""
    for name, header in (("CP1", CHARGER_LOGIN), ("CP9", login("CP9", NEW_KEY)), ("", CHARGER_LOGIN)):
        with pytest.raises(InvalidStatus):
            await connect(f"ws://127.0.0.1:{port}/{name}", additional_headers={"Authorization": header})
    with pytest.raises(InvalidStatus):
        await connect(f"ws://127.0.0.1:{port}/?token={URL_PASSWORD}")
    for line in (
        f"Authorization: {CHARGER_LOGIN}\x01",
        f"Authorization {CHARGER_LOGIN}",
        f" {CHARGER_LOGIN}",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /CP1?key={URL_PASSWORD} HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE):
            assert told((await reader.read()).decode()) == []
        writer.close()


async def play(cp: FakeCharger, primary: FakeServer, secondary: FakeServer) -> None:
    """Say everything that carries a badge or a key, well formed and not."""
    await cp.boots()
    await cp.calls("odd", "DataTransfer", vendorId="x", data=json.dumps({"idTag": BADGES[2]}))
    for count, badge in enumerate(BADGES):
        await cp.calls(f"a{count}", "Authorize", idTag=badge)
        number = await cp.starts(badge, f"s{count}")
        await cp.calls(f"e{count}", "StopTransaction", transactionId=number, meterStop=9, idTag=badge)
    await secondary.heard.call("StopTransaction")
    for fake in (primary, secondary):
        for key in ("AuthorizationKey", "x"):
            await fake.calls(key, "ChangeConfiguration", key=key, value=NEW_KEY if key != "x" else "y")
        await fake.calls("d", "GetDiagnostics", location=f"ftp://me:{URL_PASSWORD}@host/")
        await fake.connections[-1].send(
            f'[2,"u","GetDiagnostics",{{"location":"ftp:\\/\\/m:{URL_PASSWORD}@h"}}]'
        )
        await fake.calls("r", "RemoteStartTransaction", idTag=BADGES[2])
    for text in (
        f'[2,"m1","Authorize",{{"idTag":"{BADGES[0]}"',
        f'[2,"m2","ChangeConfiguration",["AuthorizationKey","{NEW_KEY}"]]',
        f'[4,"m3","InternalError","no such badge",{{"idTag":"{BADGES[0].lower()}"}}]',
        f'[9,"m4",{{"idToken":{{"idToken":"{BADGES[1]}","type":"ISO14443"}}}}]',
        f'[3,"nobody",{{"idTag":"{BADGES[1]}","password":"{NEW_KEY}"}}]',
    ):
        await cp.connection.send(text)
    await cp.calls("end", "Heartbeat")


@asynccontextmanager
async def process(folder: Path, primary: str, secondary: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The proxy, with everything planted in its ini, at DEBUG."""
    async with command(INI % (primary, secondary), folder) as proxy:
        yield proxy


async def test_a_process_at_debug_tells_no_planted_secret(tmp_path: Path) -> None:
    """Whatever chargers and servers say, and however broken their handshakes are."""
    async with server(talkative) as primary, server(talkative) as secondary:
        async with process(tmp_path, primary.url, secondary.url) as proxy:
            port = await port_of(proxy)
            await misbehave(port)
            connection = await connect(
                f"ws://127.0.0.1:{port}/CP1",
                subprotocols=[Subprotocol("ocpp1.6")],
                additional_headers={"Authorization": login("CP1", HOST_PASSWORD)},
            )
            cp = FakeCharger(connection)
            await play(cp, primary, secondary)
            await connection.close()
            await cp.listener
            proxy.terminate()
            _, stderr = await proxy.communicate()
        assert [request.headers["Authorization"] for request in primary.requests] == [
            login("CP1", PRIMARY_PASSWORD)
        ]
    said = stderr.decode()
    assert "CP1 > [2," in said, "it was not at DEBUG"
    telling = [line for line in said.splitlines() if told(line)]
    # But for the line that names a badge on no list: it is the number to copy.
    assert {tuple(told(line)) for line in telling} == {(BADGES[2],)}
    assert all(f"; the badge is {BADGES[2]}" in line for line in telling)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("*.db*")).decode("latin-1")
    passwords = [secret for secret in told(kept) if secret not in BADGES]
    assert passwords == []


@pytest.mark.parametrize(
    "ini",
    [
        f"[ext-server]\nserver = ws://me:{URL_PASSWORD}@host\n",
        f"[ext-server]\nserver = ws://host?token={URL_PASSWORD}\n",
        f"[ext-server]\nserver = local\nprimary_passwort = {PRIMARY_PASSWORD}\n",
        f"[ext-server]\nserver = local\nprimary_password {PRIMARY_PASSWORD}\n",
        f"[ext-server]\nserver = local\nprimary_password = ${{{PRIMARY_PASSWORD}\n",
        f"[ext-server]\nserver = local\nprimary_password = x\nprimary_password = {PRIMARY_PASSWORD}\n",
        f"[ext-server]\nserver = local\nprimary_rfid = {BADGES[0]}\nsecondary_rfid = {BADGES[0]}\n",
        f"[host]\npassword = {HOST_PASSWORD}\ncert_key = x\n[ext-server]\nserver = local\n",
        f"{PRIMARY_PASSWORD} = x\n",
    ],
)
def test_a_mistake_in_the_ini_tells_no_planted_secret(ini: str, tmp_path: Path) -> None:
    """The line number is enough to find it."""
    (tmp_path / "ocpp-2w-proxy.ini").write_text(ini)
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "ocpp-2w-proxy.ini:" in done.stderr
    assert told(done.stderr + done.stdout) == []


async def test_check_tells_no_planted_secret(tmp_path: Path) -> None:
    """Whatever the servers answer."""
    async with server() as primary, server() as secondary:
        primary.refusal, secondary.refusal = (
            (401, {"WWW-Authenticate": "Basic"}),
            (302, {"Location": "ws://x"}),
        )
        (tmp_path / "ocpp-2w-proxy.ini").write_text(INI % (primary.url, secondary.url))
        done = await asyncio.to_thread(run, "--check", "CP1", cwd=tmp_path)
    assert done.returncode == 1
    assert "primary: ws://" in done.stdout
    assert told(done.stderr + done.stdout) == []


def test_a_secret_in_an_environment_variable_is_not_told(tmp_path: Path) -> None:
    """Nor which of its values was wrong."""
    (tmp_path / "ocpp-2w-proxy.ini").write_text("[ext-server]\nserver = ws://u:${SECRET}@host\n")
    environment = {**os.environ, "SECRET": URL_PASSWORD}
    command_line = [sys.executable, SCRIPT]
    done = subprocess.run(
        command_line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 2
    assert told(done.stderr) == []


def test_a_traceback_tells_no_planted_secret(capfd: pytest.CaptureFixture[str]) -> None:
    """An exception may carry a message; a logger of another library may log it."""
    with patch.object(logging.getLogger(), "handlers", []):
        p.set_up_logging(config_of(INI % ("ws://one", "ws://two")))
        try:
            raise ValueError(f'[2,"1","Authorize",{{"idTag":"{BADGES[2]}"}}] {CHARGER_LOGIN}')
        except ValueError:
            logging.getLogger("asyncio").exception("it broke at %s", CHARGER_LOGIN)
    said = capfd.readouterr().err
    assert "ValueError" in said
    assert told(said) == []


@pytest.mark.parametrize(
    "text",
    [
        f"ftp://me:a@{URL_PASSWORD}@host/x",
        f"ftp://me:a/{URL_PASSWORD}@host",
        f'[2,"1","ChangeConfiguration",{{"key":"Authorization\\u004bey","value":"{NEW_KEY}"}}]',
        f'[2,"1","SetNetworkProfile",{{"connectionData":{{"apn":{{"simPin":"{NEW_KEY}"}}}}}}]',
    ],
)
def test_a_secret_in_an_odd_dress_is_not_told(text: str) -> None:
    """Behind a second @ or a slash, beside an escaped key."""
    assert told(p.REDACTOR.clean(text)) == []


def test_the_eavesdropper_hears_what_is_told() -> None:
    """Otherwise its silence would mean nothing."""
    ear = Eavesdropper()
    ear.filters = []
    for secret in SECRETS:
        record = logging.LogRecord("proxy", logging.INFO, "", 0, "said %s here", (secret,), None)
        record.msg, record.args = record.getMessage(), None
        ear.emit(record)
    assert len(ear.leaks) == len(SECRETS)


def test_it_listens_to_the_whole_run(nothing_planted_is_told: Eavesdropper) -> None:
    """To the proxy's lines and to those of everybody else."""
    before = nothing_planted_is_told.count
    p.log.info("something")
    logging.getLogger("another").warning("something")
    assert nothing_planted_is_told.count > before + 1
