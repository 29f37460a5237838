"""Several proxies behind a real HAProxy, with the configuration of the README: each charger has its own."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import FakeCharger, FakeServer, eventually, server
from tests.play.rig import ROOT, SLACK, House, house, starts, stops, within
from tests.proof.ledger import free_port

HAPROXY = shutil.which("haproxy")
SECONDS = 10.0  # For HAProxy to see that a proxy is gone or back, and for chargers to come again.
NAMES = [f"CP-{number}" for number in range(8)]

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="no HAProxy here; the gate installs one")


def configuration(front: int, proxies: list[House]) -> str:
    """Return the README's, for these ports."""
    text = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"^```haproxy\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for port, own in ((8321, front), (8331, proxies[0].port), (8332, proxies[1].port)):
        assert f":{port} " in shown or f":{port}\n" in shown
        shown = shown.replace(f":{port}", f":{own}")
    return str(shown)


class Farm(SimpleNamespace):
    """HAProxy in front of two proxies, and the servers behind them."""

    port: int  # Of HAProxy.
    proxies: list[House]
    primary: FakeServer
    secondary: FakeServer
    arrivals: Counter[str]  # By charger id.

    async def home(self, name: str) -> House:
        """Return the proxy that a charger has connected to last, once its log tells of it."""
        words = f"{name}: charger connected"

        def told() -> list[str]:
            return [max(own.told(words), default="")[:23] for own in self.proxies]

        def count() -> int:
            return sum(len(own.told(words)) for own in self.proxies)

        await eventually(lambda: count() >= self.arrivals[name])
        return self.proxies[told().index(max(told()))]


@asynccontextmanager
async def farm(folder: Path) -> AsyncIterator[Farm]:
    """Two proxies, each with its own state file, behind HAProxy."""
    for name in ("zero", "one"):
        (folder / name).mkdir()
    async with server() as primary, server() as secondary:
        async with (
            house(folder / "zero", primary.url, secondary.url) as zero,
            house(folder / "one", primary.url, secondary.url) as one,
        ):
            front, file = free_port(), folder / "haproxy.cfg"
            file.write_text(configuration(front, [zero, one]))
            assert HAPROXY is not None
            process = await asyncio.create_subprocess_exec(
                HAPROXY, "-f", str(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                proxies = [zero, one]
                yield Farm(
                    port=front, proxies=proxies, primary=primary, secondary=secondary, arrivals=Counter()
                )
            finally:
                process.kill()
                await process.wait()


@asynccontextmanager
async def arriving(where: Farm, name: str) -> AsyncIterator[FakeCharger]:
    """A charger that tries until it is in."""
    async with within(SECONDS + SLACK, f"{name} gets in"):
        while True:
            try:
                connection = await connect(
                    f"ws://127.0.0.1:{where.port}/{name}", subprotocols=[Subprotocol("ocpp1.6")]
                )
            except (OSError, InvalidStatus):
                await asyncio.sleep(0.2)
            else:
                break
    where.arrivals[name] += 1
    fake = FakeCharger(connection)
    try:
        yield fake
    finally:
        await connection.close()
        await fake.listener


async def test_a_charger_always_lands_on_the_same_proxy(tmp_path: Path) -> None:
    """By its path; and not all on one."""
    async with farm(tmp_path) as where:
        homes = []
        for _ in range(2):
            for name in NAMES:
                async with arriving(where, name) as cp:
                    await cp.boots()
                homes.append(await where.home(name))
        assert homes[: len(NAMES)] == homes[len(NAMES) :]
        assert {own.port for own in homes} == {own.port for own in where.proxies}


async def test_the_chargers_of_a_killed_proxy_go_to_the_other_and_come_home(tmp_path: Path) -> None:
    """What it had stored is delivered when it is back; the other sends nothing to the wrong side."""
    async with farm(tmp_path) as where:
        await where.secondary.stop()
        async with arriving(where, "CP-1") as cp:
            await cp.boots()
            number = await starts(cp, "SECO1")
            assert number >= p.FIRST_PROXY_ID
            home = await where.home("CP-1")
            await home.kill()
            await cp.closed()
        async with arriving(where, "CP-1") as cp:
            other = await where.home("CP-1")
            assert other is not home
            await stops(cp, "SECO1", number)
            assert other.told(
                "StopTransaction is kept and not sent: its session is refused: its start is not known here"
            )
            assert "StopTransaction" not in where.primary.heard.actions()
            await where.secondary.start()
            await home.start()
            async with within(SECONDS + SLACK, "it is sent home"):
                await cp.closed()
        await where.secondary.heard.call("StartTransaction")
        async with arriving(where, "CP-1"):
            assert await where.home("CP-1") is home
        assert "StopTransaction" not in where.secondary.heard.actions()


async def test_a_charger_of_another_proxy_does_not_notice(tmp_path: Path) -> None:
    """It stays where it is when the other is killed, and when that one is back."""
    async with farm(tmp_path) as where:
        homes = {}
        for name in NAMES:
            async with arriving(where, name):
                homes[(await where.home(name)).port] = name
        killed, kept = where.proxies
        async with arriving(where, homes[kept.port]) as cp:
            await cp.boots()
            await killed.kill()
            async with arriving(where, homes[killed.port]) as refugee:
                await killed.start()
                await refugee.closed()
            assert "currentTime" in await cp.calls("h", "Heartbeat")
