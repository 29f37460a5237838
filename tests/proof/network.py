"""
Every fault that the proxy promises to survive, on a real network, with the script in a process of its own.

Each row of the table is one fault, the promise, and a play that breaks things and says what was seen. It
raises where that is not kept. Rows that need network namespaces or mounts are tried where there are some.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from websockets.asyncio.connection import Connection
from websockets.exceptions import WebSocketException

from tests.play import rig
from tests.play.peers import FakeCharger, FakeServer, deaf, eventually, server
from tests.play.rig import SLACK, House, Stopwatch, charger, delivered, refusal, table, within

STALE, GRACE, CALL_TIMEOUT = 2.0, 2.0, 2.0  # watchdog_stale, primary_grace, call_timeout
DIAL_SECONDS = 8.0  # For a server to answer the proxy's handshake.
PROBE_SECONDS = 5.0  # For an old connection to answer a Ping, if the primary allows one a charger.
AT_ONCE = 12  # Rows that are played at the same time.
HOME, WORK = "home.example", "work.example"  # The servers' names, which the rig looks up.

Play = Callable[..., Awaitable[str]]


class Row(NamedTuple):
    """A play of one fault, which returns what was seen, and raises where the promise is not kept."""

    name: str
    play: Play
    about: tuple[Any, ...] = ()  # What else the play is told.
    needs_root: bool = False  # For network namespaces or mounts.
    is_slow: bool = False  # Takes longer than the gate has time for.


ROWS: list[Row] = []


def row(name: str, *about: Any, needs_root: bool = False, **traits: bool) -> Callable[[Play], Play]:
    """Make a play a row of the table; README.md has its fault and its promise."""

    def noted(play: Play) -> Play:
        ROWS.append(Row(name, play, about, needs_root or unplug in about, **traits))
        return play

    return noted


class World(NamedTuple):
    """The proxy between its two servers, and the cable to who is elsewhere."""

    proxy: House
    primary: FakeServer
    secondary: FakeServer
    far: rig.Place


@asynccontextmanager
async def world(folder: Path, away: str = "", **options: Any) -> AsyncIterator[World]:
    """All are well. The servers have names, or addresses where somebody is `away`, at the end of a cable."""
    rig.bend_clock(folder, 0)
    async with AsyncExitStack() as stack:
        near, far = stack.enter_context(rig.two_places()) if away else (rig.HERE, rig.HERE)
        places = (far if "primary" in away else near, far if "secondary" in away else near)
        primary, secondary = [await stack.enter_async_context(server(place=place)) for place in places]
        urls = [primary.url, secondary.url]
        if not away:
            urls = [url.replace("127.0.0.1", name) for url, name in zip(urls, (HOME, WORK), strict=True)]
        proxy = await stack.enter_async_context(rig.house(folder, *urls, place=near, **options))
        yield World(proxy, primary, secondary, far)


async def took(work: Awaitable[Any], what: str, seconds: float = SLACK) -> Stopwatch:
    async with within(seconds, what) as watch:
        await work
    return watch


async def goes_on(cp: FakeCharger, badge: str, connector: int = 1) -> Stopwatch:
    return await took(cp.charges(badge, connector), f"a charge with badge {badge}")


async def gets_in(proxy: House) -> Stopwatch:
    """Let another charger come again and again until it has booted."""
    async with within(DIAL_SECONDS + SLACK, "another charger boots") as watch:
        while (await refusal(proxy, "GOOD"))[0] != 101:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        async with charger(proxy, "GOOD"):
            pass
    return watch


async def is_told(proxy: House, words: str, seconds: float = SLACK) -> Stopwatch:
    told = eventually(lambda: bool(proxy.told(words)), seconds + SLACK)
    return await took(told, f"the log says {words!r}", seconds)


async def is_closed(connection: Connection, code: int | None = None, seconds: float = SLACK) -> Stopwatch:
    """Wait until the proxy has closed a connection, with this code if there is one."""
    watch = await took(connection.wait_closed(), "the connection is closed", seconds)
    assert code in (None, connection.close_code), f"closed with {connection.close_code}, not {code}"
    return watch


async def is_pinged(proxy: House) -> None:
    """Wait until a charger has answered a Ping, so that its silence means something."""
    # Nobody tells of a Pong; in twice the interval there has been one.
    await asyncio.sleep(2 * float(str(rig.SETTINGS["ping_interval"])))
    assert not proxy.told("nothing seen"), "a charger that is well was closed"


# What a server, or a charger, may have for as long as a block lasts.

Trouble = Callable[[World, FakeServer], Any]


@asynccontextmanager
async def down(_: World, fake: FakeServer) -> AsyncIterator[None]:
    await fake.stop()
    yield
    await fake.start()


@asynccontextmanager
async def hang(_: World, fake: FakeServer) -> AsyncIterator[None]:
    fake.may_answer.clear()
    yield
    fake.may_answer.set()


def refuse(status: int, **headers: str) -> Trouble:
    """A status refuses handshakes; 0 is a reset."""

    @asynccontextmanager
    async def trouble(w: World, fake: FakeServer) -> AsyncIterator[None]:
        to = {"Location": w.primary.url.replace("/ocpp", "/elsewhere")} if status == 302 else {}
        fake.refusal = (status, {**headers, **to})
        yield
        fake.refusal = None
        assert not any("elsewhere" in request.path for request in w.primary.requests), "it was followed"

    return trouble


def look_up(how: str) -> Trouble:
    @asynccontextmanager
    async def trouble(w: World, fake: FakeServer) -> AsyncIterator[None]:
        with rig.lookup(w.proxy.folder, how, HOME if fake is w.primary else WORK):
            yield

    return trouble


@asynccontextmanager
async def fall_silent(w: World, fake: FakeServer) -> AsyncIterator[None]:
    async with deaf(fake.connections[-1]), hang(w, fake):
        yield


@asynccontextmanager
async def unplug(w: World, _: FakeServer) -> AsyncIterator[None]:
    with rig.unplugged(w.far):
        yield


# The secondary.


@row("secondary_down", down)
@row("secondary_refuses", refuse(401), "check secondary_user")
@row("secondary_redirects", refuse(302), "put its new address")
@row("secondary_hangs", hang)
@row("secondary_resets", refuse(0))
@row("secondary_lookup_fails", look_up("fails"))
@row("secondary_lookup_hangs", look_up("hangs"), "", 40)
async def secondary_not_there(folder: Path, trouble: Trouble, words: str = "", number: int = 1) -> str:
    async with world(folder) as w, AsyncExitStack() as stack:
        async with trouble(w, w.secondary):
            come = [stack.enter_async_context(charger(w.proxy, f"MANY-{n}")) for n in range(number)]
            async with within(SLACK + DIAL_SECONDS, f"{number} chargers boot") as boots:
                first, *_ = await asyncio.gather(*come)
            seen = await goes_on(first, "SECO1")
            await is_told(w.proxy, words)
        back = await delivered(w.secondary, "SECO1")
    return f"{number} booted in {boots}, a charge took {seen}; delivered {back} after it was well"


@row("secondary_asleep", fall_silent)
@row("secondary_half_open", unplug)
async def secondary_falls_silent(folder: Path, trouble: Trouble) -> str:
    async with world(folder, "secondary" * (trouble is unplug)) as w, charger(w.proxy) as cp:
        await w.secondary.heard.call("BootNotification")
        async with trouble(w, w.secondary):
            gone = await is_told(w.proxy, "secondary: disconnected (nothing seen", rig.PING_SECONDS + SLACK)
            seen = await goes_on(cp, "SECO1")
        back = await delivered(w.secondary, "SECO1")
    return f"closed after {gone}; a charge took {seen}; delivered {back} after it was well"


# The primary.


@row("primary_down", down)
@row("primary_refuses", refuse(403, **{"Retry-After": "7"}), 403)
@row("primary_redirects", refuse(302), 503, "put its new address")
@row("primary_hangs", hang)
@row("primary_resets", refuse(0))
@row("primary_lookup_fails", look_up("fails"))
@row("primary_lookup_hangs", look_up("hangs"))
async def primary_not_there(folder: Path, trouble: Trouble, status: int = 503, words: str = "") -> str:
    async with world(folder) as w:
        async with trouble(w, w.primary):
            async with within(DIAL_SECONDS + 2, "the charger is answered") as seen:
                answer, headers = await refusal(w.proxy)
            assert answer == status, f"the charger was answered {answer}"
            assert "Retry-After" in headers, f"answered {headers}"
            await is_told(w.proxy, words)
        assert not w.secondary.requests, "the secondary was dialled"
        told = f"{status} and Retry-After: {headers['Retry-After']} after {seen}"
        return f"{told}; booted in {await gets_in(w.proxy)} once it was well"


@row("primary_gone", down)
@row("primary_asleep", fall_silent)
@row("primary_half_open", unplug)
async def primary_lost(folder: Path, trouble: Trouble) -> str:
    async with world(folder, "primary" * (trouble is unplug)) as w, charger(w.proxy) as cp:
        await cp.starts("PRIM1")
        await w.secondary.connection()
        async with trouble(w, w.primary):
            words = "primary: " if trouble is down else "primary: disconnected (nothing seen"
            gone = await is_told(w.proxy, words, rig.PING_SECONDS + SLACK)
            closed = await is_closed(cp.connection, 1012, GRACE + SLACK)
        told = f"lost after {gone}, the charger closed {closed} later"
        return f"{told}; booted in {await gets_in(w.proxy)} after it was well"


@row("primary_unplugged", needs_root=True)
async def primary_unplugged(folder: Path) -> str:
    async with world(folder, "primary", primary_grace=30) as w, charger(w.proxy) as cp:
        number = await cp.starts("PRIM1")
        with rig.unplugged(w.far):
            gone = await is_told(w.proxy, "primary: disconnected (nothing seen", rig.PING_SECONDS + SLACK)
        back = await took(cp.ends("PRIM1", number), "the session ends", 30)
        await delivered(w.primary, "PRIM1")
    return f"closed after {gone}; the session ended {back} after it was plugged in"


# The charger.


@row("charger_asleep", False, STALE, STALE + SLACK)
@row("charger_half_open", True, STALE, STALE + SLACK, needs_root=True)
@row("charger_half_open_long", True, 500.0, 60 + 3 * SLACK, is_slow=True, needs_root=True)
async def charger_lost(folder: Path, is_away: bool, stale: float, seconds: float) -> str:
    where = world(folder, "charger" * is_away, watchdog_stale=stale)
    async with where as w, charger(w.proxy, place=w.far) as cp:
        await is_pinged(w.proxy)
        async with unplug(w, w.primary) if is_away else deaf(cp.connection):
            return f"closed after {await is_closed(w.primary.connections[0], None, seconds)}"


@row("charger_returns", False, STALE, needs_root=True)
@row("charger_returns_409", True, 500.0, needs_root=True)
async def charger_returns(folder: Path, is_one: bool, stale: float) -> str:
    async with world(folder, "charger", watchdog_stale=stale) as w, charger(w.proxy, place=w.far) as old:
        w.primary.one_connection_per_charger = is_one
        number = await old.starts("SECO1")
        await w.secondary.heard.call("StartTransaction")
        await is_pinged(w.proxy)
        async with AsyncExitStack() as stack:
            with rig.unplugged(w.far):
                async with within(PROBE_SECONDS + SLACK, "the new connection is in") as seen:
                    cp = await stack.enter_async_context(charger(w.proxy))
                await asyncio.sleep(STALE + 1)
                await cp.ends("SECO1", number)
                await delivered(w.secondary, "SECO1")
    return f"in after {seen}; {STALE + 1:g} s later the session ended well"


@asynccontextmanager
async def trying(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """Let work go on in the background, until it is over or cancelled."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# The process and its machine.


@row("sigterm_in_lookup", WORK)
@row("sigterm_in_handshake", HOME)
async def sigterm_in_lookup(folder: Path, name: str) -> str:
    async with world(folder) as w:
        with rig.lookup(folder, "hangs", name):
            async with trying(refusal(w.proxy)):
                await eventually((folder / "bent" / f"{name}.asked").exists)
                return f"ended after {await w.proxy.stop()} with exit code 0"


@row("sigterm_half_open", needs_root=True)
async def sigterm_half_open(folder: Path) -> str:
    async with world(folder, "primary, secondary") as w, charger(w.proxy, place=w.far):
        await w.secondary.connection()
        with rig.unplugged(w.far):
            return f"ended after {await w.proxy.stop()} with exit code 0"


@row("clock_steps")
async def clock_steps(folder: Path) -> str:
    badges = {"PRIM1": 1, "SECO1": 2}  # And their connectors.
    async with world(folder) as w:
        async with charger(w.proxy) as cp:
            numbers = {badge: await cp.starts(badge, badge, n) for badge, n in badges.items()}
            await is_told(w.proxy, "StartTransaction is delivered")
            for days in (1, -1):
                await w.primary.calls(f"{days}", "ClearCache")
                await cp.heard.until(lambda message: message[1] == f"{days}")  # noqa: B023
                rig.bend_clock(folder, days * 86400.0)
                answer = w.primary.heard.answer(f"{days}")
                seen = await took(answer, "an unanswered Call is given up", CALL_TIMEOUT + SLACK)
                assert seen.seconds > CALL_TIMEOUT / 2, f"a Call was given up after {seen}"
                await asyncio.sleep(STALE)
                await goes_on(cp, f"PRIM-DAY{days}", 3)
            told = [len(fake.connections) for fake in (w.primary, w.secondary)]
            assert told == [1, 1], f"the servers saw {told} connections"
        await w.proxy.stop()
        rig.bend_clock(folder, 86400.0)
        await w.proxy.start()
        async with charger(w.proxy) as cp:
            for badge, connector in badges.items():
                await cp.ends(badge, numbers[badge], connector)
            for fake, badge, foreign in ((w.primary, "PRIM1", "SECO"), (w.secondary, "SECO1", "PRIM")):
                await delivered(fake, badge)
                wrong = [message for message in fake.heard.messages if f'"{foreign}' in json.dumps(message)]
                assert not wrong, f"a server got {wrong}"
    told_up = f"all connections stood, a Call was given up after {seen}"
    return f"{told_up}; both sessions ended at their own server"


@row("log_disk_full", needs_root=True)
async def log_disk_full(folder: Path) -> str:
    before = rig.small_disk(folder, 'exec "$0" "$@" 2>> disk/log')
    async with world(folder, before=before, proxy="DEBUG") as w, charger(w.proxy) as cp:
        w.proxy.log = Path(f"/proc/{w.proxy.pid}/root{folder}/disk/log")
        with rig.full_disk(w.proxy):
            async with within(SLACK, "300 Calls are answered") as seen:
                for number in range(300):
                    await cp.calls(str(number), "DataTransfer", vendorId="x" * 1000)
            assert not w.proxy.told('"299"'), "the disk was not full"
        await cp.connection.send('[2,"room","DataTransfer",{"vendorId":"V"}]')
        back = await is_told(w.proxy, '"room"')
        return f"300 Calls took {seen}; the log went on after {back}; ended after {await w.proxy.stop()}"


@row("state_disk_full", needs_root=True)
async def state_disk_full(folder: Path) -> str:
    before = rig.small_disk(folder)
    async with world(folder, before=before, state="disk/state.db") as w, charger(w.proxy) as cp:
        await goes_on(cp, "SECO1")
        await delivered(w.secondary, "SECO1")
        with rig.full_disk(w.proxy):
            async with trying(cp.starts("SECO2", "lasting")) as lasting:
                seen = await goes_on(cp, "PRIM1", 2)
                await is_told(w.proxy, "disk is full")
                assert not lasting.done(), "it was answered and is on no disk"
        back = await took(cp.heard.answer("lasting"), "it is answered")
        await cp.ends("SECO2", (await cp.heard.answer("lasting"))[2]["transactionId"])
        await delivered(w.secondary, "SECO2")
    return f"a relayed charge took {seen}; the other was answered {back} after there was room"


# The table.

README = rig.ROOT / "tests" / "README.md"
BEGIN = "<!-- faults: made by python -m tests.proof.network --readme -->"
END = "<!-- end of faults -->"
NOT_TRIED = "not tried here: needs root"


class Seen(NamedTuple):
    name: str
    text: str
    is_kept: bool


async def played(row: Row, places: asyncio.Semaphore) -> Seen:
    """Play a row when there is a place, and say on stderr what was seen."""
    if row.needs_root and not rig.is_root_here():
        return Seen(row.name, NOT_TRIED, False)
    async with places:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen = Seen(row.name, await row.play(Path(folder), *row.about), True)
            except (AssertionError, LookupError, OSError, TimeoutError, WebSocketException) as error:
                seen = Seen(row.name, f"**not kept:** {error or type(error).__name__}", False)
    print(f"{row.name} ({watch}): {seen.text}", file=sys.stderr, flush=True)
    return seen


async def play_all(rows: list[Row]) -> list[Seen]:
    """Play rows, some at a time."""
    places = asyncio.Semaphore(AT_ONCE)
    return await asyncio.gather(*(played(row, places) for row in rows))


def promised() -> dict[str, list[str]]:
    """Return name, fault, promise, and what was seen last, of each row of the README, by name."""
    text = README.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in rows}


def told(all_seen: list[Seen]) -> str:
    short = ", ".join(f"`{name}` {value} s" for name, value in rig.SETTINGS.items() if "rfid" not in name)
    seen = {one.name: one.text for one in all_seen}
    cells = [(*row[:3], seen[name]) for name, row in promised().items() if name in seen]
    head = f"{sum(one.is_kept for one in all_seen)} of {len(cells)} kept. Tried with {short}."
    return f"{head}\n\n{table([('name', 'fault', 'promise', 'observed'), *cells])}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break everything around the proxy; print what was seen.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=[row.name for row in ROWS])
    parser.add_argument("--readme", action="store_true", help="put the table into tests/README.md")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    all_seen = asyncio.run(play_all(rows))
    print(told(all_seen))
    if options.readme and not options.only:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{told(all_seen)}\n\n{END}{rest.partition(END)[2]}")
    return 0 if all(seen.is_kept or seen.text == NOT_TRIED for seen in all_seen) else 1


if __name__ == "__main__":
    sys.exit(main())
