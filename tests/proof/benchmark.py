"""
The benchmark: what the proxy costs, beside HAProxy and beside no relay at all, all measured in the same run.

    chargers ──────────────────► servers       direct: what this process and the machine cost
    chargers ───► HAProxy ─────► primary       a relay in C that does not look into a message
    chargers ───► the proxy ───► primary, secondary

Absolute figures are the machine's, and other work on it disturbs them. So all ways stand at the same time and
take turns in rounds, and what counts is the median of the ratios of rounds that took turns. CPU is what
the system counts for the relay's process, which has a core for itself: so it is right even where this
process, with all chargers and servers in it, is the bottleneck.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import json
import operator
import os
import platform
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from websockets.version import version as websockets_version

from tests.play.frames import MASK, TEXT, Socket, connected, framed
from tests.play.peers import accepting, eventually, free_port
from tests.play.rig import SCRIPT, House, cpu_seconds, haproxy, kibibytes, many_files, table
from tests.proof.fleet import BOOTS, PRIMARY, SECONDARY, Books, Pace, Server, settings_of

# The relays have a core for themselves; this process has what is left.
CORES = sorted(os.sched_getaffinity(0))
PINNED = ("taskset", "-c", str(CORES[0]))

PATIENCE = 60.0  # Seconds for anything that must happen.
IN_FLIGHT = 16  # Calls at a time in a closed loop: enough to keep a relay busy, with any number of chargers.
RATE = 1000.0  # Calls a second in the open loop: far below what any relay can do.
PREPARED = 16  # Different readings.
VERSION = "ocpp1.6"
DIRECT, HAPROXY = "direct", "HAProxy"
HAPROXY_INI = """global
    nbthread 1
    maxconn 6000
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout tunnel 1h
frontend chargers
    bind 127.0.0.1:{}
    default_backend primary
backend primary
    server primary 127.0.0.1:{}
"""


class Size(NamedTuple):
    """How much is measured."""

    levels: tuple[int, ...]  # Chargers.
    lengths: tuple[int, ...]  # Bytes of a reading.
    rounds: int
    calls: int  # In a round.
    herd: int  # Chargers that come at once.


FULL = Size((100, 1000), (250, 500, 1000, 2000, 8000), 9, 5000, 2000)
QUICK = Size((20,), (250, 2000), 1, 100, 50)


def call(action: str, payload: dict[str, Any]) -> tuple[str, bytes]:
    message_id = str(uuid.uuid4())
    text = json.dumps([2, message_id, action, payload], separators=(",", ":"))
    return message_id, framed(text.encode(), TEXT, MASK)


def reading(transaction_id: int, length: int) -> tuple[str, bytes]:
    """Return MeterValues of so many bytes: as many samples as fit, the last one filled up."""
    sample = {"value": "16.02", "context": "Sample.Periodic", "measurand": "Current.Import", "unit": "A"}
    last = {"value": "1", "unit": "Wh"}
    value = [{"timestamp": "2026-01-01T00:00:00Z", "sampledValue": [last]}]
    payload: dict[str, Any] = {"connectorId": 1, "transactionId": transaction_id, "meterValue": value}
    size = len(call("MeterValues", payload)[1]) - 8  # Without the head and the key of its frame.
    samples = max(length - size, 0) // (len(json.dumps(sample, separators=(",", ":"))) + 1)
    value[0]["sampledValue"] = [sample] * samples + [last]
    last["value"] = "1".zfill(1 + length - (len(call("MeterValues", payload)[1]) - 8))
    return call("MeterValues", payload)


class QuickServer(Server):
    """A server that answers each Call without a look at more than its Action."""

    def __init__(self, name: str) -> None:
        super().__init__(name, Books(), Pace())
        self.answered = 0
        self.ends: dict[bytes, bytes] = {}  # What an answer ends with, by Action.

    def take(self, visit: Socket, text: bytes) -> None:
        _, message_id, _, action, _ = text.split(b'"', 4)
        if action not in self.ends:
            self.ends[action] = b'",' + json.dumps(accepting(action.decode(), {})).encode() + b"]"
        visit.transport.write(framed(b'[3,"' + message_id + self.ends[action]))
        self.answered += 1

    async def until_answered(self, calls: int) -> None:
        await eventually(lambda: self.answered >= calls, PATIENCE)


class Charger:
    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.calls = itertools.cycle([call("BootNotification", BOOTS[VERSION])])  # What it says, in turns.
        self.transaction_id = 0  # Of its session.

    async def says(self) -> Any:
        answer = await self.socket.ask(*next(self.calls))
        assert answer[0] == 3, f"a charger hears {answer}"
        return answer[2]

    async def timed(self) -> float:
        """Say something; return the seconds until it is answered."""
        begun = time.perf_counter()
        await self.says()
        return time.perf_counter() - begun


@dataclass
class Round:
    seconds: float
    latencies: list[float]  # Of the Calls, in seconds, sorted.
    micros: float  # Of the relay's CPU, for a Call.

    def latency(self, share: float) -> float:
        return self.latencies[int(share * (len(self.latencies) - 1))] * 1e3


class Way:
    """Servers and a relay, and whatever chargers come to it."""

    def __init__(self, name: str, servers: list[QuickServer]) -> None:
        self.name = name
        self.primary, self.secondary = servers
        self.port = self.primary.port  # A relay has its own.
        self.pid = os.getpid()  # Likewise.
        self.numbers = itertools.count()

    async def come(self, number: int) -> list[Charger]:
        """Let so many connect at once; return them when all have booted."""

        def unasked(_: Socket, text: bytes) -> None:
            raise AssertionError(f"a charger hears {text!r}")

        async def comes() -> Charger:
            charger = Charger(await connected(self.port, f"CP-{next(self.numbers):05}", VERSION, unasked))
            await charger.says()
            return charger

        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*(comes() for _ in range(number)))

    async def charging(self, number: int, badge: str = "PRIM1") -> list[Charger]:
        """Let so many come and begin a session each."""
        start = {"connectorId": 1, "idTag": badge, "meterStart": 0, "timestamp": "2026-01-01T00:00:00Z"}

        async def starts(charger: Charger) -> Charger:
            charger.calls = itertools.cycle([call("StartTransaction", start)])
            charger.transaction_id = (await charger.says())["transactionId"]
            return charger

        chargers = await self.come(number)
        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*map(starts, chargers))

    async def played(self, play: Callable[[], Awaitable[list[float]]]) -> Round:
        gc.collect()
        cpu, begun = cpu_seconds(self.pid), time.perf_counter()
        async with asyncio.timeout(PATIENCE):
            latencies = sorted(await play())
        return Round(
            time.perf_counter() - begun, latencies, (cpu_seconds(self.pid) - cpu) / len(latencies) * 1e6
        )


@functools.cache
def readings(transaction_id: int, length: int) -> list[tuple[str, bytes]]:
    return [reading(transaction_id, length) for _ in range(PREPARED)]


def prepare(chargers: list[Charger], length: int) -> None:
    """Let chargers say readings of this length from now on."""
    for charger in chargers:
        charger.calls = itertools.cycle(readings(charger.transaction_id, length))


async def closed_loop(chargers: list[Charger], calls: int, in_flight: int = IN_FLIGHT) -> list[float]:
    """Call in turns, so many at a time, each as soon as an earlier one is answered; return the latencies."""
    left, latencies = iter(range(calls)), list[float]()

    async def work(own: list[Charger]) -> None:
        for _, charger in zip(left, itertools.cycle(own), strict=False):
            latencies.append(await charger.timed())

    at_once = min(in_flight, len(chargers))
    await asyncio.gather(*(work(chargers[first::at_once]) for first in range(at_once)))
    return latencies


async def open_loop(chargers: list[Charger], calls: int) -> list[float]:
    """Call in turns, RATE times a second, answered or not; return the latencies."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, charger in zip(range(calls), itertools.cycle(chargers), strict=False):
            while (early := begun + number / RATE - time.perf_counter()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(early)
            tasks.append(group.create_task(charger.timed()))
    return [task.result() for task in tasks]


Rows = list[tuple[object, ...]]
Loop = Callable[[list[Charger], int], Awaitable[list[float]]]


class Bench:
    """Measures the ways: none, HAProxy, and each script."""

    def __init__(self, size: Size, scripts: list[Path]) -> None:
        self.size = size
        names = ["proxy"] if len(scripts) == 1 else [str(script) for script in scripts]
        self.scripts = dict(zip(names, scripts, strict=True))
        self.names = [DIRECT, HAPROXY, *self.scripts]

    @asynccontextmanager
    async def way(self, name: str) -> AsyncIterator[Way]:
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers = [QuickServer(PRIMARY), QuickServer(SECONDARY)]
            for server in servers:
                await server.start()
                stack.push_async_callback(server.stop)
            way = Way(name, servers)
            if name != DIRECT:
                way.port = free_port()
            if name == HAPROXY:
                config = HAPROXY_INI.format(way.port, servers[0].port)
                way.pid = await stack.enter_async_context(haproxy(folder, config, PINNED))
                await eventually(lambda: listens(way.port), PATIENCE)
            elif name in self.scripts:
                program = (str(self.scripts[name].resolve()),)
                relay = House(folder, settings_of(way.port, servers), before=PINNED, program=program)
                stack.push_async_callback(relay.kill)
                await relay.start()
                way.pid = relay.pid
            yield way
            if name in self.scripts:
                complaints = relay.told("WARNING") + relay.told("ERROR")
                assert not complaints, f"then it has not done what is measured: {complaints[:1]}"

    async def in_turns(
        self, names: Sequence[str], level: int, lengths: Sequence[int], loop: Loop
    ) -> dict[int, dict[str, list[Round]]]:
        """Let ways stand and take turns; return their rounds, by bytes of a reading and by way."""
        async with AsyncExitStack() as stack:
            ways = [await stack.enter_async_context(self.way(name)) for name in names]
            fleets = [(way, await way.charging(level)) for way in ways]
            found: dict[int, dict[str, list[Round]]] = {
                length: {name: [] for name in names} for length in lengths
            }
            for length, rounds in found.items():
                for _, chargers in fleets:
                    prepare(chargers, length)
                for _, (way, chargers) in itertools.product(range(self.size.rounds), fleets):
                    rounds[way.name].append(
                        await way.played(functools.partial(loop, chargers, self.size.calls))
                    )
        return found

    async def cpu(self) -> None:
        """CPU of a relayed Call, by chargers and by length, as a ratio."""
        relays = self.names[1:]
        heads = [f"{name}, us" for name in relays] + [f"{name}, times HAProxy's" for name in self.scripts]
        rows: Rows = [("chargers", "bytes of a reading", *heads)]
        for level in self.size.levels:
            found = await self.in_turns(relays, level, self.size.lengths, closed_loop)
            for length, rounds in found.items():
                cells = [f"{median(one.micros for one in rounds[name]):.1f}" for name in relays]
                cells += [f"{times(rounds[name], rounds[HAPROXY]):.2f}" for name in self.scripts]
                rows.append((f"{level:,}", f"{length:,}", *cells))
        tell("CPU of a relayed Call, closed loop", rows)

    async def latency(self) -> None:
        """What a relay adds to a Call at 1,000 Calls a second."""
        rows: Rows = [("chargers", "way", "p50 / p99 / p99.9, ms")]
        for level in self.size.levels:
            rounds = (await self.in_turns(self.names, level, [500], open_loop))[500]
            rows += [(f"{level:,}", name, percentiles(rounds[name], rounds[DIRECT])) for name in self.names]
        tell(f"Latency at {RATE:,.0f} Calls a second, 500 bytes; of a relay, what it adds", rows)

    async def herd(self) -> None:
        """How fast many chargers that come at once are all let in, and what they hold of memory."""
        number = self.size.herd
        rows: Rows = [("way", "boots a second", "CPU of a boot, us", "kB a charger")]
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.names}
        for _, name in itertools.product(range(self.size.rounds), self.names):
            async with self.way(name) as way:
                memory, cpu, begun = kibibytes(way.pid), cpu_seconds(way.pid), time.perf_counter()
                chargers = await way.come(number)
                seconds = time.perf_counter() - begun
                if name in self.scripts:
                    await way.secondary.until_answered(number)
                micros = (cpu_seconds(way.pid) - cpu) / number * 1e6
                kilobytes = (kibibytes(way.pid) - memory) * 1.024 / number
                found[name].append((number / seconds, micros, kilobytes))
                for charger in chargers:
                    charger.socket.transport.abort()
        for name, rounds in found.items():
            rate, cpu, memory = (median(column) for column in zip(*rounds, strict=True))
            cost = ("-", "-") if name == DIRECT else (f"{cpu:,.0f}", f"{memory:.1f}")
            rows.append((name, f"{rate:,.0f}", *cost))
        tell(f"{number:,} chargers come at once; the proxy has three connections for each, HAProxy two", rows)

    async def stored(self) -> None:
        """What a stored Call costs, with both records and its delivery, beside a relayed one."""
        level, calls = min(self.size.levels[0], 100), self.size.calls
        rows: Rows = [("script", "Calls", "CPU, us", "times a relayed one's", "Calls/s")]
        for name in self.scripts:
            relayed, stored = list[Round](), list[Round]()
            async with self.way(name) as way:
                fleets = await way.charging(level), await way.charging(level, "SECO1")
                await way.secondary.until_answered(3 * level)  # The boots of all, the starts of half.
                for chargers in fleets:
                    prepare(chargers, 500)
                for _ in range(self.size.rounds):
                    relayed.append(await way.played(functools.partial(closed_loop, fleets[0], calls, level)))
                    stored.append(
                        await way.played(functools.partial(delivered_loop, way, fleets[1], calls, level))
                    )
            for kind, rounds in (("relayed", relayed), ("stored", stored)):
                micros = median(one.micros for one in rounds)
                rate = calls / median(one.seconds for one in rounds)
                rows.append((name, kind, f"{micros:.1f}", f"{times(rounds, relayed):.2f}", f"{rate:,.0f}"))
        tell(f"Stored Calls: {level} chargers, each with a Call in flight", rows)


async def delivered_loop(way: Way, chargers: list[Charger], calls: int, in_flight: int) -> list[float]:
    """Call in a closed loop, until the secondary has all of it."""
    goal = way.secondary.answered + calls
    latencies = await closed_loop(chargers, calls, in_flight)
    await way.secondary.until_answered(goal)
    return latencies


def times(rounds: list[Round], others: list[Round]) -> float:
    """Return how many times as much CPU a Call took as in the rounds of another way."""
    return median(one.micros / other.micros for one, other in zip(rounds, others, strict=True))


def percentiles(rounds: list[Round], direct: list[Round]) -> str:
    """Return the percentiles in ms; of a relay, what it adds to the direct way's."""
    cells = []
    for share in (0.5, 0.99, 0.999):
        own, others = ([one.latency(share) for one in played] for played in (rounds, direct))
        added = median(map(operator.sub, own, others))
        cells.append(f"{median(own):.2f}" if rounds is direct else f"{added:+.2f}")
    return " / ".join(cells)


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tell(title: str, rows: Rows) -> None:
    print(f"{title}:\n\n{table(rows)}\n", flush=True)


def machine() -> str:
    """Say where this was measured, and when."""
    version = subprocess.run(["haproxy", "-v"], capture_output=True, check=True, text=True).stdout.split()[2]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {len(CORES)} cores, one for the relay;"
        f" CPython {platform.python_version()}, websockets {websockets_version},"
        f" HAProxy {version}, plain ws:// on the loopback, load {os.getloadavg()[0]:.1f}\n"
    )


MEASUREMENTS = ["cpu", "latency", "herd", "stored"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep this process off the relays' core, and its garbage to the pauses between rounds."""
    os.sched_setaffinity(0, CORES[1:] or CORES)
    gc.disable()
    try:
        with many_files():
            yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, CORES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the proxy costs.")
    parser.add_argument("--quick", action="store_true", help="small numbers, a few seconds")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--script", type=Path, action="append", help="more than one version are compared")
    options = parser.parse_args()
    print(machine(), flush=True)
    with undisturbed():
        bench = Bench(QUICK if options.quick else FULL, options.script or [SCRIPT])
        for name in options.only:
            asyncio.run(getattr(bench, name)())


if __name__ == "__main__":
    main()
