"""No credential and no full badge in what the proxy says, whatever the peers say to it.

A badge is known by its key: what stands in the prose of others is not looked through.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ocpp_2w_proxy as p
from tests.play.peers import FakeCharger, FakeServer, accepting, server
from tests.play.planted import BADGES, CHARGER_LOGIN, PASSWORDS, SECRETS, Eavesdropper, told
from tests.play.plays import config_of
from tests.play.wires import LOCAL, charger_at, check, command, login, port_of, request, visitor

HOST_PASSWORD, PRIMARY_PASSWORD, SECONDARY_PASSWORD, _, NEW_KEY, URL_PASSWORD = PASSWORDS
INI = f"""[logging]
proxy = DEBUG
websockets.server = DEBUG
proxy.websockets = DEBUG
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
    shown = f"Authorization: {CHARGER_LOGIN}"
    for path, line in (
        ("CP1", shown),
        ("CP9", f"Authorization: {login('CP9', NEW_KEY)}"),
        ("", shown),
        (f"?token={URL_PASSWORD}", "X: x"),
        (f"CP1?key={URL_PASSWORD}", f"{shown}\x01"),
        (f"CP1?key={URL_PASSWORD}", f"Authorization {CHARGER_LOGIN}"),
        (f"CP1?key={URL_PASSWORD}", f" {CHARGER_LOGIN}"),
    ):
        async with visitor(port, request(path, line)) as guest:
            heard = await guest.hears()
            assert b" 101 " not in heard
            assert told(heard.decode()) == []


async def say_everything(cp: FakeCharger, primary: FakeServer, secondary: FakeServer) -> None:
    """Say all that carries a badge or a key, well formed and not."""
    await cp.boots()
    await cp.calls("odd", "DataTransfer", vendorId="x", data=json.dumps({"idTag": BADGES[2]}))
    for count, badge in enumerate(BADGES):
        await cp.calls(f"a{count}", "Authorize", idTag=badge)
        number = await cp.starts(badge, f"s{count}")
        await cp.calls(f"e{count}", "StopTransaction", transactionId=number, meterStop=9, idTag=badge)
    await secondary.heard.call("StopTransaction")
    for fake in (primary, secondary):
        await fake.calls("AuthorizationKey", "ChangeConfiguration", key="AuthorizationKey", value=NEW_KEY)
        await fake.calls("d", "GetDiagnostics", location=f"ftp://me:{URL_PASSWORD}@host/")
        escaped = f'[2,"u","GetDiagnostics",{{"location":"ftp:\\/\\/m:{URL_PASSWORD}@h"}}]'
        await fake.connections[-1].send(escaped)
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


async def test_a_process_at_debug_tells_no_planted_secret(tmp_path: Path) -> None:
    """Whatever is said, and however brokenly; but for the badge on no list, the number to copy."""
    async with server(talkative) as primary, server(talkative) as secondary:
        async with command(INI % (primary.url, secondary.url), tmp_path) as proxy:
            port = await port_of(proxy)
            await misbehave(port)
            shown = {"Authorization": login("CP1", HOST_PASSWORD)}
            async with charger_at(port, additional_headers=shown) as cp:
                await say_everything(cp, primary, secondary)
            proxy.terminate()
            _, stderr = await proxy.communicate()
        (seen,) = primary.requests
        assert seen.headers["Authorization"] == login("CP1", PRIMARY_PASSWORD)
    said = stderr.decode()
    assert "CP1 > [2," in said, "it was not at DEBUG"
    assert "Sec-WebSocket" not in said, "the library's DEBUG lines would show credentials"
    telling = [line for line in said.splitlines() if told(line)]
    assert {tuple(told(line)) for line in telling} == {(BADGES[2],)}
    assert all(f"; the badge is {BADGES[2]}" in line for line in telling)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("*.db*")).decode("latin-1")
    assert [secret for secret in told(kept) if secret not in BADGES] == []


async def test_check_tells_no_planted_secret(tmp_path: Path) -> None:
    """Whatever the servers answer."""
    async with server() as primary, server() as secondary:
        primary.refusal, secondary.refusal = (
            (401, {"WWW-Authenticate": "Basic"}),
            (302, {"Location": "ws://x"}),
        )
        code, said = await check(tmp_path, INI % (primary.url, secondary.url), "CP1")
    assert (code, told(said)) == (1, [])
    assert "primary: ws://" in said


def test_a_traceback_tells_no_planted_secret(capfd: pytest.CaptureFixture[str]) -> None:
    """An exception may carry a message; a logger of another library may log it."""
    with patch.object(logging.getLogger(), "handlers", []):
        p.set_up_logging(config_of(LOCAL))
        try:
            raise ValueError(f'[2,"1","Authorize",{{"idTag":"{BADGES[2]}"}}] {CHARGER_LOGIN}')
        except ValueError:
            logging.getLogger("asyncio").exception("it broke at %s", CHARGER_LOGIN)
    said = capfd.readouterr().err
    assert "ValueError" in said
    assert told(said) == []


def test_the_eavesdropper_hears_what_is_told(nothing_planted_is_told: Eavesdropper) -> None:
    """Otherwise its silence would mean nothing: it listens to the proxy's lines and to everybody's."""
    ear = Eavesdropper()
    ear.filters = []
    for secret in SECRETS:
        ear.emit(logging.LogRecord("proxy", logging.INFO, "", 0, f"said {secret} here", None, None))
    assert len(ear.leaks) == len(SECRETS)
    before = nothing_planted_is_told.count
    p.log.info("something")
    logging.getLogger("another").warning("something")
    assert nothing_planted_is_told.count > before + 1
