"""
The benchmark: what the proxy costs, beside HAProxy and beside no relay at all, all measured in the same run.

    chargers ──────────────────► servers       direct: what this process and the machine cost
    chargers ───► HAProxy ─────► primary       a relay in C that does not look into a message
    chargers ───► the proxy ───► primary, secondary

Absolute figures are the machine's, and other work on it disturbs them. So all ways stand at the same time and
take turns in rounds, and what counts is the median of the ratios of rounds that took turns. CPU is what
the system counts for the relay's process, which has a core for itself: so it is right even where this
process, with all chargers and servers in it, is the bottleneck. Two versions of the script can be compared:

    python -m tests.proof.benchmark [--quick] [--only cpu ...] [--script PATH --script OTHER]
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from websockets.version import version as websockets_version

from tests.play.frames import MASK, TEXT, Socket, connected, framed
from tests.play.peers import accepting, free_port
from tests.play.processes import let_go
from tests.play.rig import SCRIPT, House, check, cpu_seconds, many_files, megabytes
from tests.proof.fleet import BOOTS, PRIMARY, SECONDARY, Books, Pace, Server, settings_of, table, within

# The relays have a core for themselves; this process has what is left.
CORES = sorted(os.sched_getaffinity(0))
OTHER_CORES = set(CORES[1:]) or set(CORES)
PINNED = ("taskset", "-c", str(CORES[0]))

PATIENCE = 60.0  # Seconds for anything that must happen.
BATCH = 200  # Chargers that connect at once where that is not what is measured.
IN_FLIGHT = 16  # Calls at a time in a closed loop: enough to keep a relay busy, with any number of chargers.
RATE = 1000.0  # Calls a second in the open loop: far below what any relay can do.
PREPARED = 16  # Different readings.
VERSION = "ocpp1.6"
DIRECT, HAPROXY = "direct", "HAProxy"
PERCENTILES = (0.5, 0.99, 0.999)
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
    calls: int  # In a round of a closed loop.
    seconds: float  # Of a round of the open loop.
    herd: int  # Chargers that come at once.


FULL = Size((100, 1000), (250, 500, 1000, 2000, 8000), 5, 5000, 4.0, 2000)
QUICK = Size((20,), (250, 2000), 1, 100, 0.2, 50)


def call(action: str, payload: dict[str, Any]) -> tuple[str, bytes]:
    """Return message id and frame of a Call that is ready to be sent, as often as wanted."""
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
        check(await within(PATIENCE, lambda: self.answered >= calls), f"a server has answered {calls} Calls")


class Charger:
    """A charger that says prepared Calls, each once the last one is answered."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.calls = [call("Heartbeat", {})]  # What it says, in turns.
        self.turns = itertools.count()
        self.transaction_id = 0  # Of its session.

    async def says(self) -> Any:
        answer = await self.socket.ask(*self.calls[next(self.turns) % len(self.calls)])
        check(answer[0] == 3, f"a charger hears {answer}")
        return answer[2]


@dataclass
class Round:
    """What a round measured."""

    calls: int
    seconds: float
    latencies: list[float]  # Of the Calls, in seconds, sorted.
    cpu: float  # Of the relay, in seconds.

    @property
    def micros(self) -> float:
        """Microseconds of the relay's CPU for a Call."""
        return self.cpu / self.calls * 1e6

    def latency(self, share: float) -> float:
        """Return the latency that this share of the Calls stays below, in ms."""
        return self.latencies[int(share * (len(self.latencies) - 1))] * 1e3


class Way:
    """Servers and a relay, and whatever chargers come to it."""

    def __init__(self, name: str, pid: int, port: int, servers: list[QuickServer]) -> None:
        self.name = name
        self.pid = pid  # The relay's; 0 = there is none.
        self.port = port
        self.primary, self.secondary = servers
        self.numbers = itertools.count()

    @property
    def is_proxy(self) -> bool:
        return self.name not in (DIRECT, HAPROXY)

    async def come(self, number: int) -> list[Charger]:
        """Let so many connect at once; return them when all have booted."""

        async def comes() -> Charger:
            charger = Charger(await connected(self.port, f"CP-{next(self.numbers):05}", VERSION, unasked))
            charger.calls = [call("BootNotification", BOOTS[VERSION])]
            await charger.says()
            return charger

        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*(comes() for _ in range(number)))

    async def charging(self, number: int, badge: str = "PRIM1") -> list[Charger]:
        """Let so many come, in batches, and begin a session each."""
        batches = [min(BATCH, number - first) for first in range(0, number, BATCH)]
        chargers = [charger for batch in batches for charger in await self.come(batch)]
        start = {"connectorId": 1, "idTag": badge, "meterStart": 0, "timestamp": "2026-01-01T00:00:00Z"}
        for charger in chargers:
            charger.calls = [call("StartTransaction", start)]
        async with asyncio.timeout(PATIENCE):
            answers = await asyncio.gather(*(charger.says() for charger in chargers))
        for charger, answer in zip(chargers, answers, strict=True):
            charger.transaction_id = answer["transactionId"]
        return chargers

    async def played(self, calls: int, play: Callable[[], Awaitable[list[float]]]) -> Round:
        """Play a round; return what it cost."""
        gc.collect()
        cpu, begun = self.cpu(), time.perf_counter()
        async with asyncio.timeout(PATIENCE):
            latencies = await play()
        return Round(calls, time.perf_counter() - begun, sorted(latencies), self.cpu() - cpu)

    def cpu(self) -> float:
        return cpu_seconds(self.pid) if self.pid else 0.0

    def kilobytes(self) -> float:
        return megabytes(self.pid) * 2**20 / 1000 if self.pid else 0.0


def unasked(_: Socket, text: bytes) -> None:
    raise AssertionError(f"a charger hears {text!r}")


def prepare(chargers: list[Charger], length: int) -> None:
    """Let chargers say readings of this length from now on."""
    # A server may give one id to all of them.
    numbers = {charger.transaction_id for charger in chargers}
    prepared = {number: [reading(number, length) for _ in range(PREPARED)] for number in numbers}
    for charger in chargers:
        charger.calls = prepared[charger.transaction_id]


async def closed_loop(chargers: list[Charger], calls: int, in_flight: int = IN_FLIGHT) -> list[float]:
    """Call in turns, so many at a time, each as soon as an earlier one is answered; return the latencies."""
    idle, left, latencies = deque(chargers), iter(range(calls)), list[float]()

    async def work() -> None:
        for _ in left:
            charger = idle.popleft()
            begun = time.perf_counter()
            await charger.says()
            latencies.append(time.perf_counter() - begun)
            idle.append(charger)

    await asyncio.gather(*(work() for _ in range(min(in_flight, len(chargers)))))
    return latencies


async def open_loop(chargers: list[Charger], calls: int) -> list[float]:
    """Call in turns, RATE times a second, answered or not; return the latencies."""
    idle, latencies = asyncio.Queue[Charger](), list[float]()
    for charger in chargers:
        idle.put_nowait(charger)

    async def say(charger: Charger, since: float) -> None:
        await charger.says()
        latencies.append(time.perf_counter() - since)
        idle.put_nowait(charger)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(calls):
            due = begun + number / RATE
            while (early := due - time.perf_counter()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(early)
            # Where nobody is idle, it counts from when it should have been sent.
            since = due if idle.empty() else time.perf_counter()
            group.create_task(say(await idle.get(), since))
    return latencies


# Measurements.


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
        """One way that stands."""
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers = [QuickServer(PRIMARY), QuickServer(SECONDARY)]
            for server in servers:
                await server.start()
                stack.push_async_callback(server.stop)
            pid, port = 0, servers[0].port
            if name == HAPROXY:
                port = free_port()
                (folder / "haproxy.cfg").write_text(HAPROXY_INI.format(port, servers[0].port))
                command = (*PINNED, "haproxy", "-q", "-db", "-f", str(folder / "haproxy.cfg"))
                process = await asyncio.create_subprocess_exec(*command, preexec_fn=let_go)
                stack.push_async_callback(process.wait)
                stack.callback(process.kill)
                pid = process.pid
                check(await within(PATIENCE, lambda: listens(port)), "HAProxy does not listen")
            elif name in self.scripts:
                program = (str(self.scripts[name].resolve()),)
                relay = House(folder, settings_of(free_port(), servers), before=PINNED, program=program)
                stack.push_async_callback(relay.kill)
                await relay.start()
                pid, port = relay.pid, relay.port
            yield Way(name, pid, port, servers)
            if name in self.scripts:
                complaints = relay.told("WARNING") + relay.told("ERROR")
                check(not complaints, f"then it has not done what is measured: {complaints[:1]}")

    async def in_turns(
        self, names: Sequence[str], level: int, lengths: Sequence[int], calls: int, loop: Loop
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
                    rounds[way.name].append(await way.played(calls, partial(loop, chargers, calls)))
        return found

    async def cpu(self) -> None:
        """CPU of a relayed Call, by chargers and by length, as a ratio."""
        relays, calls = self.names[1:], self.size.calls
        heads = [f"{name}, us" for name in relays] + [f"{name}, times HAProxy's" for name in self.scripts]
        rows: Rows = [("chargers", "bytes of a reading", *heads)]
        for level in self.size.levels:
            found = await self.in_turns(relays, level, self.size.lengths, calls, closed_loop)
            for length, rounds in found.items():
                cells = [f"{median(one.micros for one in rounds[name]):.1f}" for name in relays]
                for name in self.scripts:
                    pairs = zip(rounds[name], rounds[HAPROXY], strict=True)
                    cells.append(f"{median(one.micros / other.micros for one, other in pairs):.2f}")
                rows.append((f"{level:,}", f"{length:,}", *cells))
        tell("CPU of a relayed Call, closed loop", rows)

    async def latency(self) -> None:
        """What a relay adds to a Call at 1,000 Calls a second."""
        rows: Rows = [("chargers", "way", "p50 / p99 / p99.9, ms")]
        for level in self.size.levels:
            calls = int(RATE * self.size.seconds)
            rounds = (await self.in_turns(self.names, level, [500], calls, open_loop))[500]
            rows += [(f"{level:,}", name, percentiles(rounds[name], rounds[DIRECT])) for name in self.names]
        tell(f"Latency at {RATE:,.0f} Calls a second, 500 bytes; of a relay, what it adds", rows)

    async def herd(self) -> None:
        """How fast many chargers that come at once are all let in, and what they hold of memory."""
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.names}
        number = self.size.herd
        for _ in range(self.size.rounds):
            for name in self.names:
                async with self.way(name) as way:
                    memory, cpu, begun = way.kilobytes(), way.cpu(), time.perf_counter()
                    chargers = await way.come(number)
                    seconds = time.perf_counter() - begun
                    if way.is_proxy:
                        await way.secondary.until_answered(number)
                    micros = (way.cpu() - cpu) / number * 1e6
                    found[name].append((number / seconds, micros, (way.kilobytes() - memory) / number))
                    for charger in chargers:
                        charger.socket.transport.abort()
        rows: Rows = [("way", "boots a second", "CPU of a boot, us", "kB a charger")]
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
            async with self.way(name) as way:
                relayed, stored = await way.charging(level), await way.charging(level, "SECO1")
                await way.secondary.until_answered(3 * level)  # The boots of all, the starts of half.
                prepare(relayed, 500)
                prepare(stored, 500)

                async def play_stored(way: Way = way, stored: list[Charger] = stored) -> list[float]:
                    goal = way.secondary.answered + calls
                    latencies = await closed_loop(stored, calls, level)
                    await way.secondary.until_answered(goal)
                    return latencies

                plays = partial(closed_loop, relayed, calls, level), play_stored
                turns = [[await way.played(calls, play) for play in plays] for _ in range(self.size.rounds)]
                times = median(other.micros / one.micros for one, other in turns)
                for place, (kind, ratio) in enumerate((("relayed", "1"), ("stored", f"{times:.2f}"))):
                    micros = median(turn[place].micros for turn in turns)
                    rate = calls / median(turn[place].seconds for turn in turns)
                    rows.append((name, kind, f"{micros:.1f}", ratio, f"{rate:,.0f}"))
        tell(f"Stored Calls: {level} chargers, each with a Call in flight", rows)


def percentiles(rounds: list[Round], direct: list[Round]) -> str:
    """Return the percentiles in ms; of a relay, what it adds to the direct way's."""
    cells = []
    for share in PERCENTILES:
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
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, OTHER_CORES)
    gc.disable()
    try:
        with many_files():
            yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, cores)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the proxy costs.")
    parser.add_argument("--quick", action="store_true", help="small numbers, a few seconds")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument(
        "--script", type=Path, action="append", help="of a version; more than one are compared"
    )
    options = parser.parse_args()
    print(machine(), flush=True)
    with undisturbed():
        bench = Bench(QUICK if options.quick else FULL, options.script or [SCRIPT])
        for name in options.only:
            asyncio.run(getattr(bench, name)())


if __name__ == "__main__":
    main()
