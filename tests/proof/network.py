"""
Every fault that the proxy promises to survive, on a real network, with the script in a process of its own.

Each row of the table is one fault, the promise, and a play that breaks things and says what was seen. A
promise that is not kept raises. Rows that need network namespaces or mounts are tried where there are some.

    python -m tests.proof.network --only secondary_down
    python -m tests.proof.network --readme
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from websockets.asyncio.connection import Connection
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.protocol import State

from tests.play.peers import FakeCharger, FakeServer, accepting, deaf, eventually
from tests.play.rig import (
    HERE,
    PING_SECONDS,
    REDIAL_SECONDS,
    ROOT,
    SETTINGS,
    SLACK,
    House,
    Stopwatch,
    attempts,
    away,
    bend_clock,
    charger,
    chargers,
    charges,
    check,
    connected,
    delivered,
    ends,
    full_disk,
    full_house,
    house,
    is_asked,
    is_root_here,
    lookup,
    many_files,
    of_badge,
    peer_process,
    refusal,
    reset,
    server,
    silence,
    small_disk,
    start_of,
    starts,
    stops,
    two_places,
    unplugged,
    wire,
    within,
)
from tests.proof.ledger import free_port

STALE = 2.0  # watchdog_stale
GRACE = 2.0  # primary_grace
CALL_TIMEOUT = 2.0
DIAL_SECONDS = 8.0  # For a server to answer the proxy's handshake.
PROBE_SECONDS = 5.0  # For an old connection to answer a Ping, if the primary allows one a charger.
FRAGMENT_SECONDS = 30.0  # To take as many of one message as are allowed, at the pace of a flood.
MEGABYTES = 16.0  # By which a peer that floods may make the proxy grow, at most.
AT_ONCE = 10  # Rows that are played at the same time.

Play = Callable[[Path], Awaitable[str]]


class Row(NamedTuple):
    """A fault, what is promised, and the play that returns what was seen. It raises if that is not kept."""

    fault: str
    promise: str
    play: Play
    needs_root: bool = False  # For network namespaces or mounts.
    is_slow: bool = False  # Takes longer than the gate has time for.
    is_alone: bool = False  # Compares times or memory.

    @property
    def name(self) -> str:
        return self.play.__name__


ROWS: list[Row] = []


def row(fault: str, promise: str, **traits: bool) -> Callable[[Play], Play]:
    """Make a play a row of the table."""

    def noted(play: Play) -> Play:
        ROWS.append(Row(fault, promise, play, **traits))
        return play

    return noted


# What several rows share.


async def goes_on(cp: FakeCharger, badge: str, connector: int = 1) -> Stopwatch:
    """Play a session that must not be held up; return how long it took."""
    async with within(SLACK, f"a charge with badge {badge}") as watch:
        await charges(cp, badge, connector)
    return watch


async def gets_in(proxy: House, charger_id: str = "GOOD") -> Stopwatch:
    """Let a charger boot; return how long it took."""
    async with within(SLACK, f"{charger_id} boots") as watch:
        async with charger(proxy, charger_id):
            pass
    return watch


async def gets_in_again(proxy: House) -> Stopwatch:
    """Let a charger come again and again until it is in."""
    async with within(DIAL_SECONDS + SLACK, "a charger gets in") as watch:
        while (await refusal(proxy))[0] != 101:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return watch


async def is_told(proxy: House, words: str, seconds: float) -> Stopwatch:
    """Wait until the log has these words."""
    async with within(seconds, f"the log says {words!r}") as watch:
        while not proxy.told(words):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return watch


async def is_closed(connection: Connection, code: int | None, seconds: float) -> Stopwatch:
    """Wait until the proxy has closed a connection, with this code if there is one."""
    async with within(seconds, "the connection is closed") as watch:
        await connection.wait_closed()
    check(code in (None, connection.close_code), f"closed with {connection.close_code}, not {code}")
    return watch


def is_untouched(fake: FakeServer, number: int = 1) -> None:
    """Check that the proxy has opened so many connections to the server and no more."""
    check(len(fake.connections) == number, f"the server saw {len(fake.connections)} connections")


def at_their_own(primary: FakeServer, secondary: FakeServer) -> None:
    """Check that no server has heard of a badge of the other."""
    for fake, foreign in ((primary, "SECO"), (secondary, "PRIM")):
        badges = {m[3].get("idTag", "") for m in fake.heard.messages if m[0] == 2}
        check(not any(badge.startswith(foreign) for badge in badges), f"a server got {badges}")


async def floods_pings(proxy: House, connection: Connection, frame: bytes) -> str:
    """Send Pings without reading for a while; a good charger must not notice. Return what was seen."""
    before = proxy.megabytes
    async with deaf(connection):
        watch = Stopwatch()
        while watch.seconds < 3.0 and not connection.transport.is_closing():
            if connection.transport.get_write_buffer_size() < 2**20:
                connection.transport.write(frame * (2**20 // len(frame)))
            await asyncio.sleep(0.01)
        seen = await gets_in(proxy)
    reset(connection)
    grown = proxy.megabytes - before
    check(grown < MEGABYTES, f"the proxy has grown by {grown:.0f} MB")
    return f"the proxy grew by {max(grown, 0):.1f} MB; another charger booted in {seen}"


def frames(mask: bytes) -> dict[int, bytes]:
    """Return frames that nobody may send, by the code that closes the connection."""
    masked = 0x80 if mask else 0
    return {
        1003: bytes([0x82, masked | 1]) + mask + b"x",
        1007: bytes([0x81, masked | 1]) + mask + b"\xff",
        1009: bytes([0x81, masked | 127]) + (2**24).to_bytes(8, "big") + mask,
    }


NO_MASK, MASK = b"", bytes(4)  # A mask of zeros changes nothing.
PING = bytes([0x89, 125]) + bytes(125)
MASKED_PING = bytes([0x89, 0x80 | 125]) + MASK + bytes(125)
GARBAGE = [
    "nonsense",
    "{}",
    "[2]",
    '[3,"nobody has asked",{}]',
    '[4,"nobody has asked","InternalError","",{}]',
    '[9,"x",{}]',
    '[3,"x",NaN]',
    '[2,"x","Reset",' + "[" * 5000,
    '[3,"x",' + "9" * 5000 + "]",
]


# ---------------------------------------------------------------------------------------------------------
# The secondary
# ---------------------------------------------------------------------------------------------------------

NOTHING = "the charger notices nothing; its session is delivered once the secondary is back"


@row("secondary down", NOTHING)
async def secondary_down(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary):
        async with away(secondary), charger(proxy) as cp:
            seen = await goes_on(cp, "SECO1")
        return f"a charge took {seen}; delivered {await delivered(secondary, 'SECO1')} after it was back"


@row("secondary refuses the login (401)", f"{NOTHING}; a WARNING says what to change")
async def secondary_refuses(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary):
        secondary.refusal = (401, {})
        async with charger(proxy) as cp:
            seen = await goes_on(cp, "SECO1")
            await is_told(proxy, "check secondary_user", SLACK)
            await eventually(lambda: len(secondary.requests) > 1)
            secondary.refusal = None
            return f"a charge took {seen}; delivered {await delivered(secondary, 'SECO1')} after it let us in"


@row("secondary hangs in the handshake", NOTHING)
async def secondary_hangs(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary):
        secondary.may_answer.clear()
        boot = await gets_in(proxy)
        async with charger(proxy) as cp:
            seen = await goes_on(cp, "SECO1")
            secondary.may_answer.set()
            told = f"booted in {boot}, a charge took {seen}"
            return f"{told}; delivered {await delivered(secondary, 'SECO1')} after it answered"


@row("look-up of the secondary's name fails", NOTHING)
async def secondary_lookup_fails(folder: Path) -> str:
    return await _looked_up(folder, "fails", 1)


@row(
    "look-ups of the secondary's name hang, 40 chargers", f"{NOTHING}; the primary's name is still looked up"
)
async def secondary_lookup_hangs(folder: Path) -> str:
    return await _looked_up(folder, "hangs", 40)


async def _looked_up(folder: Path, trouble: str, number: int) -> str:
    bend_clock(folder, 0)
    async with server() as primary, server() as secondary:
        named = [fake.url.replace("127.0.0.1", name) for fake, name in ((primary, HOME), (secondary, WORK))]
        async with house(folder, *named) as proxy:
            with lookup(folder, trouble, WORK):
                async with within(SLACK + DIAL_SECONDS, f"{number} chargers boot") as boots:
                    async with chargers(proxy, number):
                        pass
                async with charger(proxy) as cp:
                    seen = await goes_on(cp, "SECO1")
            told = f"{number} booted in {boots}, a charge took {seen}"
            return f"{told}; delivered {await delivered(secondary, 'SECO1')} after the look-up worked"


HOME, WORK = "home.example", "work.example"


@row(
    "secondary resets the connection: in the handshake, with a stored Call unanswered, between Calls", NOTHING
)
async def secondary_resets(folder: Path) -> str:
    async with server() as primary, server() as secondary, wire(secondary.port) as bad:
        async with house(folder, primary.url, bad.url) as proxy, charger(proxy) as cp:
            await secondary.heard.call("BootNotification")
            secondary.answers = None
            number = await starts(cp, "SECO1")
            await secondary.heard.call("StartTransaction")
            bad.left, bad.resets = 400, True
            bad.cut()
            await eventually(lambda: bad.connects > 1)
            secondary.heard.messages.clear()
            secondary.answers, bad.left, bad.resets = accepting, None, False
            await is_told(proxy, "StartTransaction is delivered", REDIAL_SECONDS)
            bad.cut()
            async with within(SLACK, "the session ends") as seen:
                await ends(cp, "SECO1", number)
            return (
                f"its end took {seen}; delivered {await delivered(secondary, 'SECO1')} after the last reset"
            )


@row(
    "secondary takes a stored Call and never answers",
    "disconnected after 2 min; the same text goes again",
    is_slow=True,
)
async def secondary_mute(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary), charger(proxy) as cp:
        await secondary.heard.call("BootNotification")
        await is_told(proxy, "secondary: accepts the charger", SLACK)
        secondary.answers = None
        seen = await goes_on(cp, "SECO1")
        first = await secondary.heard.call("StartTransaction")
        gone = await is_closed(secondary.connections[0], None, 120 + SLACK)
        secondary.heard.messages.clear()
        secondary.answers = accepting
        again = await secondary.heard.call("StartTransaction")
        check(again == first, f"{again} is not {first}")
        await delivered(secondary, "SECO1")
        return f"a charge took {seen}; disconnected after {gone}, the same text came again"


@row("secondary's process is stopped (SIGSTOP)", f"closed after `ping_interval` + `ping_timeout`; {NOTHING}")
async def secondary_asleep(folder: Path) -> str:
    port = free_port()
    async with server() as primary, peer_process("server", port) as secondary:
        async with house(folder, primary.url, f"ws://127.0.0.1:{port}") as proxy, charger(proxy) as cp:
            await secondary.heard.call("BootNotification")
            with secondary.asleep():
                gone = await is_told(proxy, "secondary: nothing seen", PING_SECONDS + SLACK)
                seen = await goes_on(cp, "SECO1")
            back = await delivered(secondary, "SECO1")
            return f"closed after {gone}; a charge took {seen}; delivered {back} after it went on"


@row(
    "cable to the secondary is pulled (half-open TCP)",
    f"closed after `ping_interval` + `ping_timeout`; {NOTHING}",
    needs_root=True,
)
async def secondary_half_open(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(near) as primary, server(far) as secondary:
            async with house(folder, primary.url, secondary.url, place=near) as proxy, charger(proxy) as cp:
                await secondary.heard.call("BootNotification")
                with unplugged(far):
                    gone = await is_told(proxy, "secondary: nothing seen", PING_SECONDS + SLACK)
                    seen = await goes_on(cp, "SECO1")
                back = await delivered(secondary, "SECO1")
                return f"closed after {gone}; a charge took {seen}; delivered {back} after it was plugged in"


@row("secondary sends garbage", "dropped; the charger hears none of it, the connection stands")
async def secondary_garbage(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary), charger(proxy) as cp:
        connection = await secondary.connection()
        for text in GARBAGE:
            await connection.send(text)
        seen = await goes_on(cp, "SECO1")
        await delivered(secondary, "SECO1")
        check({m[0] for m in cp.heard.messages} == {3}, f"the charger heard {cp.heard.messages}")
        is_untouched(secondary)
        return f"{len(GARBAGE)} texts; a charge took {seen}, the connection stood"


@row(
    "secondary sends a binary frame, bad UTF-8, an oversized message",
    "that connection is closed (1003, 1007, 1009) and dialled again; the charger notices nothing",
)
async def secondary_frames(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        for number, (code, frame) in enumerate(frames(NO_MASK).items()):
            connection = await secondary.connection(number)
            connection.transport.write(frame)
            await is_closed(connection, code, SLACK)
            seen = await goes_on(cp, f"SECO{number}")
        is_untouched(primary)
        return (
            f"closed with these codes; a charge took {seen}; {await delivered(secondary, 'SECO2')} to deliver"
        )


@row("secondary floods Pings and reads nothing", "bounded memory; others notice nothing", is_alone=True)
async def secondary_floods(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary), charger(proxy):
        return await floods_pings(proxy, await secondary.connection(), PING)


@row("secondary floods Calls", "bounded memory; others are served", is_alone=True)
async def secondary_floods_calls(folder: Path) -> str:
    port = free_port()
    async with server() as primary, peer_process("server", port):
        async with house(folder, primary.url, f"ws://127.0.0.1:{port}") as proxy:
            async with charger(proxy, "OTHER") as cp:
                before = await latency(cp)
                async with charger(proxy, "FLOOD") as flooded:
                    await flooded.heard.call("GetLocalListVersion")
                    return await beside_a_flood(proxy, cp, before)


async def beside_a_flood(proxy: House, cp: FakeCharger, before: float) -> str:
    """Measure another's Calls, and what the proxy uses, while somebody sends what it can."""
    processor, memory, watch = processor_seconds(proxy), proxy.megabytes, Stopwatch()
    during = await latency(cp)
    share = (processor_seconds(proxy) - processor) / watch.seconds
    grown = max(proxy.megabytes - memory, 0)
    check(grown < MEGABYTES, f"the proxy has grown by {grown:.0f} MB")
    took = f"another's Call took {during * 1000:.1f} ms in the middle, {before * 1000:.1f} without"
    return f"{took}; the proxy used {share:.0%} of a core and grew by {grown:.1f} MB"


@row("secondary redirects the handshake (302)", f"not followed; a WARNING says what to change; {NOTHING}")
async def secondary_redirects(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, secondary), server() as other:
        secondary.refusal = (302, {"Location": other.url})
        async with charger(proxy) as cp:
            seen = await goes_on(cp, "SECO1")
            await is_told(proxy, "HTTP 302", SLACK)
        advice = proxy.told("HTTP 302")[0].partition("; ")[2]
        check("address" in advice, f"the advice is {advice!r}")
        check(not other.requests, "the other server was dialled")
        return f"a charge took {seen}; not followed; {advice!r}"


@row("wire to the secondary: 300 ms each way, or black in mid-session", NOTHING)
async def secondary_far(folder: Path) -> str:
    async with server() as primary, server() as secondary, wire(secondary.port) as bad:
        bad.delay = 0.3
        async with house(folder, primary.url, bad.url, ping_timeout=2) as proxy, charger(proxy) as cp:
            seen = await goes_on(cp, "SECO1")
            far = await delivered(secondary, "SECO1")
            number = await starts(cp, "SECO2")
            bad.left = 0
            gone = await is_told(proxy, "secondary: nothing seen", 2.5 + SLACK)
            await ends(cp, "SECO2", number)
            bad.left = None
            bad.cut()
            back = await delivered(secondary, "SECO2")
            told = f"a charge took {seen}, {far} more to deliver"
            return f"{told}; black: closed after {gone}, delivered {back} after it was good again"


# ---------------------------------------------------------------------------------------------------------
# The primary
# ---------------------------------------------------------------------------------------------------------

BACK_LATER = "the charger gets 503 and keeps its messages"


async def is_refused(proxy: House, status: int, seconds: float) -> Stopwatch:
    """Check that a charger is refused with this status."""
    async with within(seconds, f"the charger is answered {status}") as watch:
        answer, _ = await refusal(proxy)
    check(answer == status, f"the charger was answered {answer}")
    return watch


@row("primary down at the handshake", BACK_LATER)
async def primary_down(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary):
        async with away(primary):
            seen = await is_refused(proxy, 503, SLACK)
        check(not secondary.requests, "the secondary was dialled")
        return f"503 after {seen}; in {await gets_in(proxy)} once it was back"


@row(
    "primary refuses the charger (403)",
    "its refusal is the charger's, with Retry-After; the secondary is not dialled",
)
async def primary_refuses(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary):
        primary.refusal = (403, {"Retry-After": "7"})
        async with within(SLACK, "the charger is answered") as seen:
            status, headers = await refusal(proxy)
        check((status, headers.get("Retry-After")) == (403, "7"), f"answered {status} {headers}")
        check(not secondary.requests, "the secondary was dialled")
        return f"403 and Retry-After: 7 after {seen}"


@row("primary redirects the handshake (302)", f"not followed; {BACK_LATER}; a WARNING says what to change")
async def primary_redirects(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), server() as other:
        primary.refusal = (302, {"Location": other.url})
        seen = await is_refused(proxy, 503, SLACK)
        await is_told(proxy, "HTTP 302", SLACK)
        advice = proxy.told("HTTP 302")[0].partition("; ")[2]
        check("address" in advice, f"the advice is {advice!r}")
        check(not other.requests, "the other server was dialled")
        return f"503 after {seen}; not followed"


@row("primary takes the connection and is silent", f"{BACK_LATER}, after 8 s at most")
async def primary_hangs(folder: Path) -> str:
    with silence() as url:
        async with house(folder, url) as proxy:
            return f"503 after {await is_refused(proxy, 503, DIAL_SECONDS + 2)}"


@row("look-up of the primary's name fails", BACK_LATER)
async def primary_lookup_fails(folder: Path) -> str:
    bend_clock(folder, 0)
    async with server() as primary:
        async with house(folder, primary.url.replace("127.0.0.1", HOME)) as proxy:
            with lookup(folder, "fails", HOME):
                seen = await is_refused(proxy, 503, SLACK)
            return f"503 after {seen}; in {await gets_in(proxy)} once the look-up worked"


@row(
    "look-ups of one primary's name hang, 40 chargers",
    "503 after 8 s at most; a charger of another primary gets in meanwhile",
)
async def primary_lookup_hangs(folder: Path) -> str:
    bend_clock(folder, 0)
    async with server() as hanging, server() as good:
        more = f"[charger GOOD]\nserver = {good.url.replace('127.0.0.1', WORK)}\n"
        async with house(folder, hanging.url.replace("127.0.0.1", HOME), more=more) as proxy:
            with lookup(folder, "hangs", HOME):
                async with attempts(refusal(proxy, f"MANY-{n}") for n in range(40)) as attempted:
                    await is_asked(folder, HOME)
                    seen = await gets_in(proxy)
                    async with within(DIAL_SECONDS + SLACK, "40 chargers are answered") as refused:
                        answers = Counter(status for status, _ in await attempted)
            check(answers == {503: 40}, f"answered {answers}")
            return f"503 to all after {refused}; the other charger booted in {seen}"


@row("primary resets the connection in the handshake", BACK_LATER)
async def primary_resets_handshake(folder: Path) -> str:
    async with server() as primary, wire(primary.port) as bad:
        async with house(folder, bad.url) as proxy:
            bad.resets = True
            for bad.left in (1, 400):
                seen = await is_refused(proxy, 503, SLACK)
            bad.left = None
            return f"503 after {seen}; in {await gets_in(proxy)} once it was back"


@row(
    "primary resets the connection with a Call unanswered",
    "dialled again at once; the Call is not sent twice, its repeat is answered",
)
async def primary_resets_call(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        await secondary.connection()
        primary.answers = None
        await say(cp, "first", "DataTransfer", vendorId="V")
        await primary.heard.call("DataTransfer")
        reset(primary.connections[0])
        async with within(GRACE + SLACK, "the primary is dialled again") as back:
            await primary.connection(1)
        primary.answers = accepting
        await cp.calls("second", "DataTransfer", vendorId="V")
        heard = [m[1] for m in primary.heard.messages if m[0] == 2 and m[2] == "DataTransfer"]
        check(heard == ["first", "second"], f"the primary heard {heard}")
        is_untouched(secondary)
        return f"dialled again after {back}; the repeat was answered"


@row("primary resets the connection in mid-session", "dialled again at once; the session goes on there")
async def primary_resets_session(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        number = await starts(cp, "PRIM1")
        reset(primary.connections[0])
        async with within(GRACE + SLACK, "the session ends") as back:
            await primary.connection(1)
            await ends(cp, "PRIM1", number)
        await delivered(primary, "PRIM1")
        at_their_own(primary, secondary)
        return f"the session ended {back} after the reset"


@row("primary gone for good in mid-session", "the charger is closed (1012) after `primary_grace`")
async def primary_gone(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        await starts(cp, "PRIM1")
        await secondary.connection()
        async with away(primary):
            seen = await is_closed(cp.connection, 1012, GRACE + SLACK)
            both = await is_closed(secondary.connections[0], None, SLACK)
        return f"1012 after {seen}; the secondary closed {both} later"


@row(
    "primary's process is stopped (SIGSTOP)",
    "closed after `ping_interval` + `ping_timeout`, the charger (1012) `primary_grace` later",
)
async def primary_asleep(folder: Path) -> str:
    port = free_port()
    async with peer_process("server", port) as primary:
        async with house(folder, f"ws://127.0.0.1:{port}") as proxy, charger(proxy) as cp:
            with primary.asleep():
                gone = await is_told(proxy, "primary: nothing seen", PING_SECONDS + SLACK)
                closed = await is_closed(cp.connection, 1012, GRACE + SLACK)
            return (
                f"closed after {gone}, the charger {closed} later; in {await gets_in(proxy)} after it went on"
            )


@row(
    "cable to the primary is pulled (half-open TCP)",
    "closed after `ping_interval` + `ping_timeout`, the charger (1012) `primary_grace` later",
    needs_root=True,
)
async def primary_half_open(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(far) as primary, house(folder, primary.url, place=near) as proxy:
            async with charger(proxy) as cp:
                with unplugged(far):
                    gone = await is_told(proxy, "primary: nothing seen", PING_SECONDS + SLACK)
                    closed = await is_closed(cp.connection, 1012, GRACE + SLACK)
            back = await gets_in_again(proxy)
            return f"closed after {gone}, the charger {closed} later; in {back} after it was plugged in"


@row(
    "cable to the primary is pulled for less than `primary_grace`",
    "the session goes on there; nothing is sent twice",
    needs_root=True,
)
async def primary_unplugged(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(far) as primary:
            async with (
                house(folder, primary.url, place=near, primary_grace=30) as proxy,
                charger(proxy) as cp,
            ):
                number = await starts(cp, "PRIM1")
                with unplugged(far):
                    gone = await is_told(proxy, "primary: nothing seen", PING_SECONDS + SLACK)
                async with within(30, "the session ends") as back:
                    await ends(cp, "PRIM1", number)
                await delivered(primary, "PRIM1")
                return f"closed after {gone}; the session ended {back} after it was plugged in"


@row("primary sends garbage", "dropped; the charger hears none of it, the connection stands")
async def primary_garbage(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), charger(proxy) as cp:
        for text in GARBAGE:
            await primary.connections[0].send(text)
        seen = await goes_on(cp, "PRIM1")
        check({m[0] for m in cp.heard.messages} == {3}, f"the charger heard {cp.heard.messages}")
        is_untouched(primary)
        return f"{len(GARBAGE)} texts; a charge took {seen}, the connection stood"


@row(
    "primary sends a binary frame, bad UTF-8, an oversized message",
    "that connection is closed (1003, 1007, 1009) and dialled again; the charger stays",
)
async def primary_frames(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), charger(proxy) as cp:
        for number, (code, frame) in enumerate(frames(NO_MASK).items()):
            connection = await primary.connection(number)
            connection.transport.write(frame)
            await is_closed(connection, code, SLACK)
            seen = await goes_on(cp, f"PRIM{number}")
        return f"closed with these codes; the next charge took {seen}"


@row(
    "primary never answers a Call",
    "no answer is made up; the next Call goes after `call_timeout`; the secondary's go on",
)
async def primary_mute(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), charger(proxy) as cp:
        primary.answers = None
        await say(cp, "first", "DataTransfer", vendorId="V")
        await primary.heard.call("DataTransfer")
        await say(cp, "next", "FirmwareStatusNotification", status="Idle")
        async with within(CALL_TIMEOUT + SLACK, "the next Call goes") as seen:
            await primary.heard.call("FirmwareStatusNotification")
        charge = await goes_on(cp, "SECO1")
        answered = {m[1] for m in cp.heard.messages}
        check(not answered & {"first", "next"}, f"the charger was answered {answered}")
        return f"the next Call went after {seen}; a charge of the secondary took {charge}"


@row("primary floods Pings and reads nothing", "bounded memory; others notice nothing", is_alone=True)
async def primary_floods(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), charger(proxy):
        return await floods_pings(proxy, primary.connections[0], PING)


async def say(cp: FakeCharger, message_id: str, action: str, **payload: Any) -> None:
    """Send a Call whose answer is not waited for."""
    await cp.connection.send(json.dumps([2, message_id, action, payload]))


# ---------------------------------------------------------------------------------------------------------
# The charger
# ---------------------------------------------------------------------------------------------------------


@row("charger resets the connection in the handshake", "nothing of it stays; it gets in again")
async def charger_resets_handshake(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), wire(proxy.port) as bad:
        bad.resets = True
        for bad.left in (1, 100):
            with suppress(WebSocketException, OSError):
                await connected(proxy, "CP1", port=bad.port)
        primary.may_answer.clear()
        bad.left = None
        async with attempts([refusal(proxy, "CP1", port=bad.port)]):
            await eventually(lambda: len(primary.requests) == 1)
            bad.cut()
            primary.may_answer.set()
        connection = await primary.connection()
        seen = await is_closed(connection, 1001, SLACK)
        return f"the primary was closed after {seen}; booted in {await gets_in(proxy, 'CP1')}"


@row(
    "charger resets the connection with a server's Call unanswered, in a session",
    "both servers are closed; the session goes on when it is back",
)
async def charger_resets_session(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            number = await starts(cp, "SECO1")
            await secondary.heard.call("StartTransaction")
            await primary.calls("ask", "ClearCache")
            await cp.heard.call("ClearCache")
            reset(cp.connection)
            seen = await is_closed(primary.connections[0], None, SLACK)
            await is_closed(secondary.connections[0], None, SLACK)
        async with charger(proxy) as cp:
            await ends(cp, "SECO1", number)
            back = await delivered(secondary, "SECO1")
        return f"servers closed after {seen}; the rest of the session delivered {back} after it was said"


@row("charger's process is stopped (SIGSTOP)", "closed after `watchdog_stale`, with its servers")
async def charger_asleep(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _):
        async with peer_process("charger", proxy.port) as cp:
            await is_pinged(proxy)
            with cp.asleep():
                seen = await is_closed(primary.connections[0], None, STALE + SLACK)
        return f"closed after {seen}"


@row(
    "cable to the charger is pulled (half-open TCP)",
    "closed after `watchdog_stale`, with its servers",
    needs_root=True,
)
async def charger_half_open(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(near) as primary, house(folder, primary.url, place=near) as proxy:
            async with charger(proxy, place=far):
                await is_pinged(proxy)
                with unplugged(far):
                    seen = await is_closed(primary.connections[0], None, STALE + SLACK)
    return f"closed after {seen}"


@row(
    "the same where `watchdog_stale` is 500 s",
    "cut after 60 s in which nothing that was sent arrived",
    needs_root=True,
    is_slow=True,
)
async def charger_half_open_long(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(near) as primary:
            async with house(folder, primary.url, place=near, watchdog_stale=500) as proxy:
                async with charger(proxy, place=far):
                    with unplugged(far):
                        seen = await is_closed(primary.connections[0], None, 60 + 3 * SLACK)
    return f"closed after {seen}"


async def is_pinged(proxy: House) -> None:
    """Wait until a charger has answered a Ping, so that its silence means something."""
    # Nobody tells of a Pong; in twice the interval there has been one.
    await asyncio.sleep(2 * float(str(SETTINGS["ping_interval"])))
    check(not proxy.told("nothing seen"), "a charger that is well was closed")


@row(
    "charger comes back while its old connection is half-open",
    "the new one is in at once; the end of the old one does not touch it",
    needs_root=True,
)
async def charger_returns(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(near) as primary, server(near) as secondary:
            async with house(folder, primary.url, secondary.url, place=near) as proxy:
                async with charger(proxy, place=far) as old, AsyncExitStack() as stack:
                    number = await starts(old, "SECO1")
                    await secondary.heard.call("StartTransaction")
                    with unplugged(far):
                        async with within(SLACK, "the new connection is in") as seen:
                            cp = await stack.enter_async_context(charger(proxy))
                        await asyncio.sleep(STALE + 1)
                        await ends(cp, "SECO1", number)
                        await delivered(secondary, "SECO1")
    return f"in after {seen}; {STALE + 1:g} s later the session ended well"


@row(
    "the same where the primary allows one connection a charger (409)",
    "in once the old one has not answered a Ping for 5 s",
    needs_root=True,
)
async def charger_returns_409(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(near) as primary:
            primary.one_connection_per_charger = True
            async with house(folder, primary.url, place=near, watchdog_stale=500) as proxy:
                async with charger(proxy, place=far):
                    await is_pinged(proxy)
                    with unplugged(far):
                        async with within(PROBE_SECONDS + SLACK, "the new connection is in") as seen:
                            async with charger(proxy):
                                pass
    return f"in after {seen}"


@row(
    "charger never answers a server's Call",
    "a CallError to that server after `call_timeout`; the next one goes",
)
async def charger_mute(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        await secondary.connection()
        await primary.calls("first", "ClearCache")
        await cp.heard.call("ClearCache")
        await secondary.calls("next", "GetLocalListVersion")
        async with within(CALL_TIMEOUT + SLACK, "the Call is answered") as seen:
            answer = await primary.heard.answer("first")
        check(answer[0] == 4, f"the primary heard {answer}")
        _, message_id, _, _ = await cp.heard.call("GetLocalListVersion")
        await cp.connection.send(json.dumps([3, message_id, {"listVersion": 1}]))
        await secondary.heard.answer("next")
        return f"{answer[2]} after {seen}; the other server's Call went and was answered"


@row(
    "both servers call at once under the same message id",
    "one Call at a time; each gets its own answer, once",
)
async def same_message_id(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary), charger(proxy) as cp:
        await secondary.connection()
        await primary.calls("same", "GetLocalListVersion")
        await secondary.calls("same", "GetLocalListVersion")
        for version in (1, 2):
            await hears_calls(cp, version)
            await cp.calls(f"beat {version}", "Heartbeat")
            message_id = calls_of(cp)[-1][1]
            await cp.connection.send(json.dumps([3, message_id, {"listVersion": version}]))
        answers = [await fake.heard.answer("same") for fake in (primary, secondary)]
        check(sorted(a[2]["listVersion"] for a in answers) == [1, 2], f"the servers heard {answers}")
        await goes_on(cp, "PRIM1")
        for fake in (primary, secondary):
            check(len([m for m in fake.heard.messages if m[0] == 3]) == 1, "a server was answered twice")
        return f"each its own, under {len({m[1] for m in calls_of(cp)})} ids at the charger"


def calls_of(cp: FakeCharger) -> list[Any]:
    return [m for m in cp.heard.messages if m[0] == 2]


async def hears_calls(cp: FakeCharger, number: int) -> None:
    """Wait until the charger has heard so many Calls, not more."""
    await eventually(lambda: len(calls_of(cp)) >= number)
    check(len(calls_of(cp)) == number, f"the charger heard {calls_of(cp)}")


@row("charger sends garbage", "dropped, or a CallError where it has an id; the connection stands")
async def charger_garbage(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), charger(proxy) as cp:
        for text in GARBAGE:
            await cp.connection.send(text)
        seen = await goes_on(cp, "PRIM1")
        heard = [m[0] for m in cp.heard.messages]
        check(set(primary.heard.actions()) == {"BootNotification", *CHARGE}, f"{primary.heard.actions()}")
        return f"{len(GARBAGE)} texts, {heard.count(4)} CallErrors; a charge took {seen}"


CHARGE = ("StartTransaction", "MeterValues", "StopTransaction")


@row("charger sends a binary frame, bad UTF-8, an oversized message", "it alone is closed (1003, 1007, 1009)")
async def charger_frames(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, _), charger(proxy, "GOOD") as good:
        for code, frame in frames(MASK).items():
            async with charger(proxy) as cp:
                cp.connection.transport.write(frame)
                seen = await is_closed(cp.connection, code, SLACK)
        await goes_on(good, "PRIM1")
        return f"closed with these codes, the last after {seen}; another charger went on"


@row("charger sends a message of endless fragments", "it alone is closed (1009)", is_slow=True)
async def charger_fragments(folder: Path) -> str:
    fragments = bytes([1, 0x80]) + MASK + (bytes([0, 0x80]) + MASK) * 50_000
    async with full_house(folder, watchdog_stale=500) as (proxy, _, _), charger(proxy, "GOOD") as good:
        async with charger(proxy) as cp:
            cp.connection.transport.write(fragments)
            seen = await is_closed(cp.connection, 1009, FRAGMENT_SECONDS)
        await goes_on(good, "PRIM1")
        return f"1009 after {seen}; another charger went on"


@row("charger floods Pings and reads nothing", "bounded memory; others notice nothing", is_alone=True)
async def charger_floods_pings(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, _), charger(proxy) as cp:
        return await floods_pings(proxy, cp.connection, MASKED_PING)


@row(
    "charger reads nothing while much is sent to it", "cut off at 1 MiB; others notice nothing", is_alone=True
)
async def charger_deaf(folder: Path) -> str:
    async with full_house(folder, watchdog_stale=500) as (proxy, primary, _), charger(proxy) as cp:
        before = proxy.megabytes
        primary.answers = verbose
        async with deaf(cp.connection):
            async with within(SLACK, "it is cut off") as seen:
                await asks_until_closed(cp, primary)
            other = await gets_in(proxy)
        grown = max(proxy.megabytes - before, 0)
        check(grown < MEGABYTES, f"the proxy has grown by {grown:.0f} MB")
        return f"cut off after {seen}; the proxy grew by {grown:.1f} MB; another charger booted in {other}"


def verbose(action: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Answer with much text."""
    return (
        {"status": "Accepted", "data": "x" * 500_000}
        if action == "DataTransfer"
        else accepting(action, payload)
    )


async def asks_until_closed(cp: FakeCharger, primary: FakeServer) -> None:
    """Ask for much, each time the server has the last question, and never read it."""
    closed = asyncio.create_task(primary.connections[0].wait_closed())
    for number in itertools.count():
        await say(cp, f"{number}", "DataTransfer", vendorId="V")
        async with attempts([primary.heard.until(is_message(f"{number}"))]) as heard:
            either: list[asyncio.Future[Any]] = [closed, heard]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if closed.done():
            return


def is_message(message_id: str) -> Callable[[Any], bool]:
    return lambda message: message[1] == message_id


@row("charger floods Calls", "bounded memory; others are served", is_alone=True)
async def charger_floods_calls(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, _), charger(proxy) as cp:
        before = await latency(cp)
        async with peer_process("flood", proxy.port):
            return await beside_a_flood(proxy, cp, before)


async def latency(cp: FakeCharger) -> float:
    """Return how long a Call takes in the middle, in seconds."""
    took = []
    for number in range(60):
        async with within(SLACK, "a Call is answered") as watch:
            await cp.calls(f"{watch.begun} {number}", "DataTransfer", vendorId="V")
        took.append(watch.seconds)
        await asyncio.sleep(0.02)
    return statistics.median(took)


def processor_seconds(proxy: House) -> float:
    fields = Path(f"/proc/{proxy.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@row("2,000 handshakes that are never finished", "a charger gets in all the same", is_alone=True)
async def unfinished_handshakes(folder: Path) -> str:
    with many_files():
        async with full_house(folder) as (proxy, _, _), AsyncExitStack() as stack:
            before = proxy.megabytes
            for _ in range(2000):
                under = stack.enter_context(closing(HERE.socket()))
                await asyncio.get_running_loop().sock_connect(under, (HERE.address, proxy.port))
                under.send(b"GET /SLOW HTTP/1.1\r\n")
            seen = await gets_in(proxy)
            return f"booted in {seen}; the proxy grew by {proxy.megabytes - before:.0f} MB"


@row(
    "2,500 chargers come at the same moment, after a power cut",
    "all are in within 30 s",
    is_slow=True,
    is_alone=True,
)
async def herd(folder: Path) -> str:
    with many_files():
        async with house(folder, "local", watchdog_stale=500, ping_interval=30) as proxy:
            async with within(30, "all are in") as seen:
                came = await asyncio.gather(*(comes_until_in(proxy, f"HERD-{n}") for n in range(2500)))
            memory = proxy.megabytes
            for connection, _ in came:
                reset(connection)
    again = sum(tries > 1 for _, tries in came)
    return f"all in after {seen}, {again} of them not at the first try; the proxy had {memory:.0f} MB"


async def comes_until_in(proxy: House, charger_id: str) -> tuple[Connection, int]:
    """Return a charger's connection, and how many tries it took, a second apart."""
    tries = 1
    while True:
        try:
            return await connected(proxy, charger_id), tries
        except (OSError, WebSocketException):
            await asyncio.sleep(1.0)
            tries += 1


@row("charger never finishes its handshake", "cut after 10 s", is_slow=True)
async def unfinished_handshake(folder: Path) -> str:
    async with full_house(folder) as (proxy, _, _):
        reader, writer = await asyncio.open_connection(HERE.address, proxy.port)
        writer.write(b"GET /SLOW HTTP/1.1\r\n")
        async with within(10 + SLACK, "it is cut") as seen:
            with suppress(ConnectionError):
                await reader.read()
        writer.close()
        return f"cut after {seen}"


@row("wire to the charger: byte by byte, or 300 ms each way", "it charges")
async def charger_trickles(folder: Path) -> str:
    async with full_house(folder, call_timeout=30) as (proxy, _, secondary), wire(proxy.port) as bad:
        bad.piece, bad.delay = 1, 0.001
        async with charger(proxy, port=bad.port) as cp:
            seen = await goes_on(cp, "SECO1")
        bad.piece, bad.delay = 2**16, 0.3
        async with charger(proxy, port=bad.port) as cp:
            far = await goes_on(cp, "SECO2")
        await delivered(secondary, "SECO2")
        return f"a charge took {seen} and {far}"


@row("charger stops a session with an id that says nothing (-1)", "it goes to the session of its badge")
async def offline_session(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            await starts(cp, "SECO1")
            await secondary.heard.call("StartTransaction")
            await is_told(proxy, "StartTransaction is delivered", SLACK)
        await proxy.stop()
        await proxy.start()
        async with charger(proxy) as cp:
            await stops(cp, "SECO1", -1)
            await delivered(secondary, "SECO1")
        stop = await secondary.heard.call("StopTransaction")
        check(stop[3]["transactionId"] == 7, f"the secondary heard {stop}")
        at_their_own(primary, secondary)
        return "after a restart, too, and under the server's own id"


# ---------------------------------------------------------------------------------------------------------
# The process and its machine
# ---------------------------------------------------------------------------------------------------------


@row(
    "SIGTERM in a session, while one charger reads nothing and another's process is stopped",
    "1001 to the others; ended within 5 s with exit code 0",
)
async def sigterm(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, _), peer_process("charger", proxy.port) as asleep:
        async with charger(proxy) as cp, charger(proxy, "DEAF") as bad:
            await starts(cp, "PRIM1")
            with asleep.asleep():
                async with deaf(bad.connection):
                    seen = await proxy.stop()
                    await is_closed(cp.connection, 1001, SLACK)
            await is_closed(primary.connections[0], None, SLACK)
        return f"1001 to the others; ended after {seen} with exit code 0"


@row(
    "SIGTERM while the look-ups of both servers' names hang",
    "ended within 5 s with exit code 0",
)
async def sigterm_in_lookup(folder: Path) -> str:
    bend_clock(folder, 0)
    async with server() as primary:
        named = (f"ws://{HOME}:{primary.port}", f"ws://{WORK}:{primary.port}")
        async with house(folder, primary.url, named[1]) as proxy:
            with lookup(folder, "hangs", HOME, WORK):
                async with charger(proxy):
                    await is_asked(folder, WORK)
                    seen = await proxy.stop()
        async with house(folder, named[0]) as proxy:
            with lookup(folder, "hangs", HOME):
                async with attempts([refusal(proxy)]):
                    await is_asked(folder, HOME)
                    other = await proxy.stop()
    return f"ended after {seen} (secondary) and {other} (primary)"


@row("SIGTERM while the cables to all peers are pulled", "ended within 5 s with exit code 0", needs_root=True)
async def sigterm_half_open(folder: Path) -> str:
    with two_places() as (near, far):
        async with server(far) as primary, server(far) as secondary:
            async with house(folder, primary.url, secondary.url, place=near) as proxy:
                async with charger(proxy, place=far):
                    await secondary.connection()
                    with unplugged(far):
                        return f"ended after {await proxy.stop()} with exit code 0"


@row("SIGKILL in a session of each server", "after a restart both end at their own server, complete")
async def sigkill(folder: Path) -> str:
    async with full_house(folder) as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            numbers = [await starts(cp, badge, n) for n, badge in enumerate(("PRIM1", "SECO1"), 1)]
            await is_told(proxy, "StartTransaction is delivered", SLACK)
            await proxy.kill()
        async with within(SLACK, "it serves again") as seen:
            await proxy.start()
        async with charger(proxy) as cp:
            for n, (badge, number) in enumerate(zip(("PRIM1", "SECO1"), numbers, strict=True), 1):
                await ends(cp, badge, number, n)
            await delivered(primary, "PRIM1")
            await ended_after_kill(secondary)
        at_their_own(primary, secondary)
        return f"served again after {seen}; both sessions complete at their own server"


async def ended_after_kill(secondary: FakeServer) -> None:
    """Wait for the stop; the start may have come again if the kill came before its record."""
    await secondary.heard.call("StopTransaction")
    told = of_badge(secondary.heard, "SECO1")
    check(told[0] == "StartTransaction" and told[-1] == "StopTransaction", f"the secondary has {told}")


@row(
    "wall clock is set one day ahead, then two days back, in a session of each server",
    "no timer moves; the sessions keep their servers, over a restart, too",
)
async def clock_steps(folder: Path) -> str:
    bend_clock(folder, 0)
    async with full_house(folder) as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            numbers = [await starts(cp, badge, n) for n, badge in enumerate(("PRIM1", "SECO1"), 1)]
            await secondary.heard.call("StartTransaction")
            for days in (1, -1):
                await primary.calls(f"{days}", "ClearCache")
                await cp.heard.until(is_message(f"{days}"))
                async with within(CALL_TIMEOUT + SLACK, "an unanswered Call is given up") as seen:
                    bend_clock(folder, days * 86400.0)
                    await primary.heard.answer(f"{days}")
                check(seen.seconds > CALL_TIMEOUT / 2, f"a Call was given up after {seen}")
                await asyncio.sleep(STALE)
                await goes_on(cp, f"PRIM-DAY{days}", 3)
            for fake in (primary, secondary):
                is_untouched(fake)
        await proxy.stop()
        bend_clock(folder, 86400.0)
        await proxy.start()
        async with charger(proxy) as cp:
            for n, (badge, number) in enumerate(zip(("PRIM1", "SECO1"), numbers, strict=True), 1):
                await ends(cp, badge, number, n)
            await delivered(primary, "PRIM1")
            await delivered(secondary, "SECO1")
        at_their_own(primary, secondary)
        told = f"all connections stood, a Call was given up after {seen}"
        return f"{told}; both sessions ended at their own server"


@row(
    "limit of open files reached (256)", "503 beyond it; those connected are untouched; one log line a minute"
)
async def files(folder: Path) -> str:
    before = ("sh", "-c", 'ulimit -n 256; exec "$0" "$@"')
    async with full_house(folder, before=before) as (proxy, _, secondary), chargers(proxy, 10) as first:
        lines = len(proxy.told("WARNING"))
        async with crowd(proxy, 150) as answers:
            charge = await goes_on(first[0], "SECO1")
            check(set(answers) == {101, 503}, f"answered {dict(answers)}")
            check(all(cp.connection.state is State.OPEN for cp in first), "one that was in was closed")
        told = len(proxy.told("WARNING")) - lines
        check(told <= 2, f"{told} WARNINGs")
        seen = await gets_in_again(proxy)
        await delivered(secondary, "SECO1")
        held = f"{answers[101] + 10} in, {answers[503]} times 503, {told} WARNING"
        return f"{held}; a charge took {charge}; another booted in {seen} when they had gone"


@asynccontextmanager
async def crowd(proxy: House, number: int) -> AsyncIterator[Counter[int]]:
    """Many chargers that come, ten at once, and stay; how each was answered, 0 = not at all."""

    async def come(name: str) -> Any:
        try:
            return await asyncio.wait_for(connected(proxy, name), DIAL_SECONDS + SLACK)
        except InvalidStatus as error:
            return error.response.status_code
        except (OSError, WebSocketException, TimeoutError):
            return 0

    came: list[Any] = []
    for first in range(0, number, 10):
        came += await asyncio.gather(*(come(f"CROWD-{first + n}") for n in range(10)))
    try:
        yield Counter(answer if isinstance(answer, int) else 101 for answer in came)
    finally:
        await asyncio.gather(*(answer.close() for answer in came if not isinstance(answer, int)))


@row("disk of the log is full", "nothing is held up; the log goes on when there is room", needs_root=True)
async def log_disk_full(folder: Path) -> str:
    before = small_disk(folder, 'exec "$0" "$@" 2>> disk/log')
    async with full_house(folder, before=before, proxy="DEBUG") as (proxy, _, _), charger(proxy) as cp:
        proxy.log = Path(f"/proc/{proxy.pid}/root{folder}/disk/log")
        with full_disk(proxy):
            async with within(SLACK, "300 Calls are answered") as seen:
                for number in range(300):
                    await cp.calls(str(number), "DataTransfer", vendorId="x" * 1000)
            check(not proxy.told('"299"'), "the disk was not full")
        async with within(SLACK, "the log goes on") as back:
            await say(cp, "room", "DataTransfer", vendorId="V")
            await is_told(proxy, '"room"', SLACK)
        return f"300 Calls took {seen}; the log went on after {back}; ended after {await proxy.stop()}"


@row(
    "disk of the state file is full",
    "what is relayed goes on; what would have to be recorded is answered when there is room",
    needs_root=True,
)
async def state_disk_full(folder: Path) -> str:
    before = small_disk(folder)
    async with full_house(folder, before=before, state="disk/state.db") as (proxy, _, secondary):
        async with charger(proxy) as cp:
            await goes_on(cp, "SECO1")
            await delivered(secondary, "SECO1")
            with full_disk(proxy):
                await say(cp, "lasting", "StartTransaction", **start_of("SECO2"))
                seen = await goes_on(cp, "PRIM1", 2)
                await is_told(proxy, "disk is full", SLACK)
                answered = [m[1] for m in cp.heard.messages]
                check("lasting" not in answered, "it was answered and is on no disk")
            async with within(SLACK, "it is answered") as back:
                _, _, answer = await cp.heard.answer("lasting")
            await ends(cp, "SECO2", answer["transactionId"])
            await delivered(secondary, "SECO2")
            return f"a relayed charge took {seen}; the other was answered {back} after there was room"


# ---------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------

BEGIN = "<!-- faults: made by python -m tests.proof.network --readme -->"
END = "<!-- end of faults -->"
NOT_TRIED = "not tried here: needs root"
NOT_KEPT = "**not kept:** "


class Seen(NamedTuple):
    """What became of a row."""

    row: Row
    text: str
    is_kept: bool


async def played(row: Row) -> Seen:
    """Play a row."""
    if row.needs_root and not is_root_here():
        return Seen(row, NOT_TRIED, False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Seen(row, await row.play(Path(folder)), True)
        except (AssertionError, LookupError, OSError, TimeoutError, WebSocketException) as error:
            return Seen(row, f"{NOT_KEPT}{error or type(error).__name__}", False)


async def play_all(rows: list[Row]) -> list[Seen]:
    """Play rows, some at a time; those that measure alone."""
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(row: Row) -> Seen:
        async with places:
            return await told(row)

    together = await asyncio.gather(*(in_turn(row) for row in rows if not row.is_alone))
    alone = [await told(row) for row in rows if row.is_alone]
    by_row = {seen.row.name: seen for seen in [*together, *alone]}
    return [by_row[row.name] for row in rows]


async def told(row: Row) -> Seen:
    """Play a row, and say on stderr what was seen."""
    watch = Stopwatch()
    seen = await played(row)
    print(f"{row.name} ({watch}): {seen.text}", file=sys.stderr, flush=True)
    return seen


def table(all_seen: list[Seen]) -> str:
    """Return the table in Markdown, with what the words in it stand for."""
    short = ", ".join(f"`{name}` {value} s" for name, value in SETTINGS.items() if "rfid" not in name)
    kept = sum(seen.is_kept for seen in all_seen)
    lines = [f"{kept} of {len(all_seen)} kept. Tried with {short}.", ""]
    lines += ["| fault | promise | observed |", "|---|---|---|"]
    lines += [f"| {seen.row.fault} | {seen.row.promise} | {escaped(seen.text)} |" for seen in all_seen]
    return "\n".join(lines)


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def into_readme(text: str) -> None:
    """Replace the table of the README."""
    path = ROOT / "README.md"
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", path.read_text()))


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Break everything around the proxy; print what was seen.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=[row.name for row in ROWS])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    all_seen = asyncio.run(play_all(rows))
    print(table(all_seen))
    if options.readme and not options.only:
        into_readme(table(all_seen))
    return 0 if all(seen.is_kept or seen.text == NOT_TRIED for seen in all_seen) else 1


if __name__ == "__main__":
    sys.exit(main())
