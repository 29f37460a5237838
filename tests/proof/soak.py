"""
The soak: 500 chargers and two servers that break all the time, and nothing in the proxy may grow.

The proxy, in a process of its own, tells its memory, its file descriptors, its tasks, how many objects it has
and what they hold. Two quiet moments are compared, one before the first fault and one after the last. Between
them everything breaks but the proxy itself: what becomes of sessions when it dies is the ledger's business.

    python -m tests.proof.soak --minutes 60 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import resource
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import linear_regression
from typing import Any

import ocpp_2w_proxy as p
from tests.proof.fleet import FAULTS, HURRIED_SESSIONS, MAX_SIZE, Fault, Fleet
from tests.proof.ledger import ROOT, listed, now

CHARGERS = 500
FAULTS_EVERY = 3.0  # Seconds, in the middle.
SAMPLE_SECONDS = 5.0
SAMPLES_SHOWN = 12  # One of so many.
QUIET_SECONDS = 60.0  # At most until everything is said, delivered and forgotten.

# ---------------------------------------------------------------------------------------------------------
# Inside the proxy
# ---------------------------------------------------------------------------------------------------------

# What the proxy waits for, in the time of a soak; a week is a minute.
TIMES: dict[str, Any] = {
    "SESSION_SECONDS": 60.0,
    "CLAIM_SECONDS": 60.0,
    "SILENT_SECONDS": 60.0,
    "SWEEP_SECONDS": 20.0,
    "DIAL_SECONDS": 4.0,
    "HANDSHAKE_SECONDS": 3.0,
    "CLOSE_SECONDS": 1.0,
    "PROBE_SECONDS": 1.0,
    "PASSING_SECONDS": 1.0,
    "ANSWER_SECONDS": 2.0,
    "AWAITED_SECONDS": 1.0,
    "DELIVERY_SECONDS": 3.0,
    "BOOT_RETRY_SECONDS": 2.0,
    "STEADY_SECONDS": 1.0,
    "REDIAL_SECONDS": {p.Peer.PRIMARY: (0.0, 2.0), p.Peer.SECONDARY: (1.0, 4.0)},
}
# These are counted, with what each of their containers holds ...
COUNTED: tuple[type, ...] = (p.Proxy, p.Tasks, p.Dialer, p.Resolver, p.Journal, p.Memory)
COUNTED += (p.Relay, p.Complaints, p.Router, p.Commands, p.Outbox, p.Link)
# ... and these alone: a router remembers the last of some for as long as it lives.
PASSING: tuple[type, ...] = (p.Session, p.Call, p.ServerCall, p.Claim)
MEMORY, FILES, TASKS = "KiB of memory (RSS)", "file descriptors", "asyncio tasks"
LOOK, COLLECT = b"l", b"c"  # What the proxy is asked for.

Sample = dict[str, int]


def size(value: Any) -> int:
    """Return how many things a container holds, with those in the containers in it."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | set | deque):
        return 1
    return sum(map(size, value))


def contents() -> Counter[str]:
    """Count the proxy's objects, and what they hold."""
    found: Counter[str] = Counter()
    for item in gc.get_objects():
        if isinstance(item, COUNTED):
            kind = type(item).__name__
            for name in chain(getattr(item, "__dict__", ()), getattr(item, "__slots__", ())):
                value = getattr(item, name)
                if isinstance(value, dict | list | set | deque):
                    found[f"{kind}.{name}"] += size(value)
        if isinstance(item, COUNTED + PASSING):
            found[type(item).__name__] += 1
    return found


def sample() -> Sample:
    """Measure this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * resource.getpagesize() // 1024
    files = sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1  # Without the one that lists them.
    return {MEMORY: memory, FILES: files, TASKS: len(asyncio.all_tasks()), **contents()}


def collect(proxy: p.Proxy) -> Sample:
    """Measure once a week has passed for what expires, and Python has removed what nobody can reach."""
    now = p.current_instant()
    for relay in proxy.relays.values():
        relay.carry_out(relay.router.sweep(p.Instant(now.seconds + 8 * p.DAY, now.utc + 8 * p.DAY)))
    gc.collect()
    return sample()


async def serve_watched(config: p.Config) -> None:
    """Run the proxy, and answer what is asked on stdin until that is closed."""
    proxy = p.Proxy(config, p.opened_journal(config.host))
    await proxy.start()
    closed = asyncio.Event()

    def tell(measure: Callable[[], Sample]) -> None:
        print(json.dumps(measure()), flush=True)

    def asked() -> None:
        question = os.read(0, 1)
        if question == LOOK:
            tell(sample)
        elif question == COLLECT:
            # Once what waits for the disk is there.
            proxy.journal.wait(partial(tell, partial(collect, proxy)))
        else:
            asyncio.get_running_loop().remove_reader(0)
            closed.set()

    asyncio.get_running_loop().add_reader(0, asked)
    await closed.wait()
    await proxy.stop()


def run_proxy(ini: Path) -> int:
    """Run the proxy in this process; return its exit code."""
    for name, value in TIMES.items():
        assert hasattr(p, name), f"the proxy has no {name} any more"
        setattr(p, name, value)
    config = p.load_config(ini, os.environ, p.concern_of)
    p.set_up_logging(config)
    asyncio.run(serve_watched(config))
    return 0


# ---------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------

MAX_LINES = 4  # Of the log, for each thing that happened.
# So many more there may be at the end than at the start. Memory: what Python keeps of the worst moment, when
# there were twice as many relays and ten times as many sessions, and SQLite's cache; it is 2 to 7 MiB.
SPARE = {MEMORY: 8 * 1024}
SPARE_OF_A_CHARGER = {MEMORY: 16}
# The rest has bounds of its own, and stays.
SPARE |= {"Proxy.lags": p.LAG_TICKS}
SPARE_OF_A_CHARGER |= dict.fromkeys(("Complaints.told", "Complaints.held_back"), p.MAX_SUBJECTS)
SPARE_OF_A_CHARGER |= {
    "Commands.spent": p.MAX_SPENT_IDS,
    "Memory.asked": p.MAX_ASKED,
    **{kind.__name__: 2 for kind in PASSING},
}


def spare(name: str, chargers: int) -> int:
    return SPARE.get(name, 0) + SPARE_OF_A_CHARGER.get(name, 0) * chargers


def growth(start: Sample, end: Sample, chargers: int) -> list[str]:
    """Return what there is more of at the end than at the start."""
    return [
        f"{name}: {start.get(name, 0)} at the start, {number} at the end"
        for name, number in end.items()
        if number > start.get(name, 0) + spare(name, chargers)
    ]


@dataclass
class Report:
    """What a run found. All is well if there are no problems."""

    start: Sample = field(default_factory=dict)
    end: Sample = field(default_factory=dict)
    samples: list[tuple[float, Sample]] = field(default_factory=list)  # In between, with their times.
    counts: Counter[str] = field(default_factory=Counter)  # Of what happened.
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def slope(self) -> float:
        """The growth of memory after the first quarter, in MiB an hour."""
        late = self.samples[len(self.samples) // 4 :]
        if len(late) < 2:
            return 0.0
        hours, mebibytes = zip(*((at / 3600, found[MEMORY] / 1024) for at, found in late), strict=True)
        return linear_regression(hours, mebibytes).slope

    def most(self, name: str) -> int:
        samples = (self.start, self.end, *(found for _, found in self.samples))
        return max(found.get(name, 0) for found in samples)

    def table(self) -> str:
        """Return a table in Markdown of all that has ever moved."""
        names = {name for _, found in self.samples for name in found} - {MEMORY, FILES, TASKS}
        moved = sorted(name for name in names if self.most(name) > self.start.get(name, 0))
        rows = (
            (
                name,
                *(
                    f"{number:,}"
                    for number in (self.start.get(name, 0), self.end.get(name, 0), self.most(name))
                ),
            )
            for name in (MEMORY, FILES, TASKS, *moved)
        )
        return "\n".join(
            f"| {' | '.join(row)} |" for row in [("", "start", "end", "most"), ("---",) * 4, *rows]
        )

    def __str__(self) -> str:
        lines = [
            f"{self.seconds:.0f} s, memory grows by {self.slope:.1f} MiB/h",
            f"happened: {listed(self.counts)}",
            f"faults: {listed(self.faults)}\n",
            f"{self.table()}\n",
            f"problems: {len(self.problems)}",
        ]
        return "\n".join(lines + self.problems)


# ---------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------

INI = """\
[logging]
proxy = INFO
[host]
addr = 127.0.0.1
port = {port}
ping_interval = 3
ping_timeout = 6
call_timeout = 3
max_size = {max_size}
watchdog_stale = 10
watchdog_interval = 1
state = state.db
[status]
port = 0
[ext-server]
server = ws://127.0.0.1:{primary}/ocpp
primary_auth = none
primary_grace = 3
primary_rfid = primary-*
secondary_server = ws://127.0.0.1:{secondary}/ocpp
secondary_rfid = secondary-*
"""


class Process:
    """The proxy, in a process of its own that tells its sizes."""

    def __init__(self, folder: Path, ini: str) -> None:
        self.ini = folder / "proxy.ini"
        self.ini.write_text(ini)
        self.log = folder / "proxy.log"

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "tests.proof.soak", "--proxy", str(self.ini)]
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log
            )

    async def sample(self, question: bytes = LOOK) -> Sample:
        """Ask for its sizes. Raises TimeoutError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question)
        async with asyncio.timeout(QUIET_SECONDS):
            answer: Sample = json.loads(await self.process.stdout.readline())
        return answer

    async def stop(self) -> int:
        """End it; return its exit code. Raises TimeoutError."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(10):
            return await self.process.wait()


class Run:
    """One run: the fleet, the proxy, what breaks, and what is measured."""

    def __init__(
        self, folder: Path, seed: int, chargers: int = CHARGERS, every: float = FAULTS_EVERY
    ) -> None:
        self.every = every
        self.fleet = Fleet(chargers, seed)
        primary, secondary = (server.port for server in self.fleet.servers)
        ini = INI.format(port=self.fleet.port, primary=primary, secondary=secondary, max_size=MAX_SIZE)
        forwarding = [charger.charger_id for charger in self.fleet.chargers[::5]]
        ini += "".join(f"[charger {name}]\nsecondary_replies = forward\n" for name in forwarding)
        self.process = Process(folder, ini)
        self.report = Report(counts=self.fleet.books.counts)

    async def play(self, seconds: float) -> Report:
        """Measure, break everything for so long, let everything settle, and measure again."""
        begun, fleet = now(), self.fleet
        for server in fleet.servers:
            await server.start()
        await self.process.start()
        try:
            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(charger.live()) for charger in fleet.chargers]
                await self._prepare()
                await self._break(seconds)
                await self._settle()
                for life in lives:
                    life.cancel()
        finally:
            code = await self.process.stop()
            for server in fleet.servers:
                await server.stop()
        self._check(code)
        self.report.seconds = now() - begun
        return self.report

    async def _prepare(self) -> None:
        """Let everybody do everything once: what is kept of the last of its kind is there from now on."""
        fleet = self.fleet
        fleet.plays.set()
        await self._until(
            lambda: fleet.fewest_sessions >= HURRIED_SESSIONS, "each has a session at each server"
        )
        for server in fleet.servers:
            await server.call_some(1)
        await self._rest()
        self.report.start = await self.process.sample(COLLECT)

    async def _rest(self) -> None:
        self.fleet.plays.clear()
        await self._until(lambda: self.fleet.is_quiet, "everybody is online, everything said and delivered")

    async def _break(self, seconds: float) -> None:
        """Let everybody play, and one fault after the other begin; return when all have ended."""
        self.fleet.plays.set()
        until = now() + seconds
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(server.call_on()) for server in self.fleet.servers]
            helpers.append(group.create_task(self._watch()))
            async with asyncio.TaskGroup() as breaking:
                for fault in self._faults():
                    await asyncio.sleep(self.fleet.luck.uniform(0.5, 1.5) * self.every)
                    if now() >= until:
                        break
                    breaking.create_task(fault(self.fleet))
                    self.report.faults[fault.__name__] += 1
            for helper in helpers:
                helper.cancel()

    def _faults(self) -> Iterator[Fault]:
        """Yield every fault in turn, each time in another order."""
        while True:
            yield from self.fleet.luck.sample(FAULTS, len(FAULTS))

    async def _watch(self) -> None:
        while True:
            found = await self.process.sample()
            self.report.samples.append((now(), found))
            if len(self.report.samples) % SAMPLES_SHOWN == 1:
                print(", ".join(f"{found[name]:,} {name}" for name in (MEMORY, FILES, TASKS)), flush=True)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _settle(self) -> None:
        """Let all sessions end; measure until there is no more than at the start, or it took too long."""
        await self._rest()
        grown, until = ["not measured"], now() + QUIET_SECONDS / 2
        while grown and now() < until:
            await asyncio.sleep(1)
            self.report.end = await self.process.sample(COLLECT)
            grown = growth(self.report.start, self.report.end, len(self.fleet.chargers))
        self.report.problems += grown

    async def _until(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait until something is so; note a problem if that takes too long."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                while not is_true():  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        except TimeoutError:
            self.report.problems += [f"not within {QUIET_SECONDS:g} s: {what}", *self.fleet.missing()]

    def _check(self, code: int) -> None:
        """Look for what must not be in the log, nor among what happened."""
        lines, counts = self.process.log.read_text().splitlines(), self.report.counts
        problems = [f"logged: {line}" for line in lines if re.search(" ERROR |Traceback", line)]
        if len(lines) > MAX_LINES * counts.total():
            problems.append(f"the log has {len(lines)} lines")
        counts["lines of the log"] = len(lines)
        wrong = ("stops accepted by the wrong server", "strangers let in")
        problems += [f"{name}: {counts[name]}" for name in wrong if counts[name]]
        self.report.problems += problems + ([f"the proxy ended with {code}"] if code else [])


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def lift_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as they may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Break everything around the proxy; measure what grows in it."
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; default: %(default)s")
    parser.add_argument("--chargers", type=int, default=CHARGERS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--faults-every", metavar="SECONDS", type=float, default=FAULTS_EVERY)
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="for the log and the state")
    parser.add_argument("--proxy", metavar="INI", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the command; return its exit code."""
    options = arguments()
    lift_file_limit()
    if options.proxy:
        return run_proxy(options.proxy)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        run = Run(folder, options.seed, options.chargers, options.faults_every)
        report = asyncio.run(run.play(options.minutes * 60))
    print(f"seed {options.seed}: {report}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
