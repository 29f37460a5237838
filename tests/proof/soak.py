"""
The soak: 500 chargers and two servers that break all the time, and nothing in the proxy may grow.

The proxy tells its tasks, how many objects of the script it has and what they hold; the system tells its
memory and its file descriptors. Two quiet moments are compared, one before the first fault and one after the
last. Between them everything breaks but the proxy itself: that is the ledger's part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from tests.corpus import entries, text_of
from tests.play.frames import BINARY, MASK, PING, TEXT, Socket, connected, framed
from tests.play.inside import TASKS
from tests.play.peers import deaf, eventually
from tests.play.rig import kibibytes, table
from tests.proof import fleet
from tests.proof.fleet import STRANGER, Charger, Fleet, Pace, Server, listed, now

CHARGERS = 500
FAULTS_EVERY = 3.0  # Seconds, in the middle.
CALLS_EVERY = 0.5  # Seconds; then each server calls CALLED_SHARE of its chargers.
CALLED_SHARE = 0.02
QUIET_SECONDS = 60.0  # At most until everything is said, delivered and forgotten.
MAX_SIZE = 2**16  # Bytes; the longest message that the proxy is to accept.
MAX_LINES = 4  # Of the log, for each thing that happened.
STOP_SECONDS = 10.0
PACE = Pace(messages=2.5, hurry=0.3, patience=6.0, again=1.1, fault=3.0)
SETTINGS = {"ping_interval": 3, "ping_timeout": 6, "call_timeout": 3, "watchdog_stale": 10}
SETTINGS |= {"watchdog_interval": 1, "primary_grace": 3}  # All of them seconds.

# What the proxy waits for, in the time of a soak; a week is 16 s.
TIMES = {"READING": 3, "SESSION": 30, "CLAIM": 20, "SILENT": 60, "DIAL": 4, "HANDSHAKE": 3}
TIMES |= {"CLOSE": 1, "PROBE": 1, "PASSING": 1, "ANSWER": 2, "AWAITED": 1, "DELIVERY": 3, "BOOT_RETRY": 2}
TIMES |= {"STEADY": 1}
WEEK_SECONDS = 32.0  # Until a session and a claim are forgotten, and swept.

# So many more there may be at the end than at the start. Memory: what Python keeps of the worst moment, when
# there were twice as many relays and ten times as many sessions, and SQLite's cache; it is 2 to 7 MiB.
MEMORY, FILES = "KiB of memory (RSS)", "file descriptors"
SPARE = {MEMORY: 8 * 1024, "Proxy.lags": 120, "Journal.counts": 50}
# The last of some is remembered for as long as a charger is known, and each of these tables has its bound.
SPARE_OF_A_CHARGER = {MEMORY: 16, "Session": 2, "Call": 4, "Claim": 2}
SPARE_OF_A_CHARGER |= {"Relay.complaints": 1000, "Proxy.complaints": 1000}
SPARE_OF_A_CHARGER |= {"Commands.sent": 16, "Memory.asked": 64}

Sample = dict[str, int]


def spare(name: str, chargers: int) -> int:
    return SPARE.get(name, 0) + SPARE_OF_A_CHARGER.get(name, 0) * chargers


def growth(start: Sample, end: Sample, chargers: int) -> list[str]:
    """Return what there is more of at the end than at the start."""
    return [
        f"{name}: {start.get(name, 0)} at the start, {number} at the end"
        for name, number in end.items()
        if number > start.get(name, 0) + spare(name, chargers)
    ]


# What breaks.

FLOODS = [(b'[2,"f","Heartbeat",{}]', TEXT, 5_000), (bytes(125), PING, 30_000)]
ENDLESS = bytes([0x81, 0xFF]) + (2**24).to_bytes(8, "big") + MASK  # The head of a frame.
ILLEGAL = [framed(b"x", BINARY, MASK), framed(b"\xff", TEXT, MASK), framed(b" " * (MAX_SIZE + 1), TEXT, MASK)]
NONSENSE = [text_of(entry["text"]) for entry in entries("messages") if "text" in entry and entry.get("warns")]
BEGINNINGS = [b"", b"G", b"GET /CP-0001 HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01"]  # Of handshakes.


def some(where: Fleet, share: float) -> list[Charger]:
    """Return a random share of the chargers that are online, at least one if there are any."""
    online = [charger for charger in where.chargers if charger.is_online]
    return where.luck.sample(online, min(len(online), max(1, round(share * len(online)))))


def sockets(chargers: Sequence[Charger]) -> list[Socket]:
    return [charger.socket for charger in chargers if charger.socket]


def ends(where: Fleet, share: float) -> list[Socket]:
    """Return the ends of some connections: chargers', and servers'."""
    found = sockets(some(where, share))
    for server in where.servers:
        visits = sorted(server.visits, key=id)
        found += where.luck.sample(visits, min(len(visits), max(1, round(share * len(visits)))))
    return found


async def deafen(server: Server) -> None:
    async with deaf(*server.visits):
        await server.pause()


async def refuse_handshakes(server: Server) -> None:
    """Let a server refuse handshakes for a while; cut some connections, so that there are handshakes."""
    await fleet.reset(server)
    await server.has(refusal=server.luck.choice((401, 403, 500, 503)))


async def reset_chargers(where: Fleet) -> None:
    for charger in some(where, where.luck.choice((0.1, 0.5, 1.0))):
        charger.hang_up()


async def babble(where: Fleet) -> None:
    for end in ends(where, 0.05):
        end.send(where.luck.choice(NONSENSE))


async def break_rules(where: Fleet) -> None:
    for end in sockets(some(where, 0.04)):
        end.transport.write(where.luck.choice([ENDLESS, *ILLEGAL]))


async def flood(where: Fleet) -> None:
    """Let chargers and servers send Calls or Pings without end, most of them without reading the answers."""
    flooders = ends(where, 0.008)
    async with deaf(*(end for end in flooders if where.luck.random() < 0.7)):
        for end in flooders:
            payload, opcode, times = where.luck.choice(FLOODS)
            end.transport.write(framed(payload, opcode, end.key) * times)
        await where.pause()


async def connect_halfway(where: Fleet) -> None:
    """Open connections and say nothing on them, or the beginning of a handshake."""
    with ExitStack() as stack, suppress(OSError):
        for _ in range(where.luck.randint(50, 200)):
            _, writer = await asyncio.open_connection("127.0.0.1", where.port)
            stack.callback(writer.close)
            writer.write(where.luck.choice(BEGINNINGS))
            where.books.counts["connections without a handshake"] += 1
        await where.pause()


async def take_over(where: Fleet) -> None:
    """Let some chargers connect while their old connections stand."""

    async def connect_again(charger: Charger) -> None:
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(charger.connect(), where.pace.patience)

    await asyncio.gather(*map(connect_again, some(where, 0.1)))


async def deafen_chargers(where: Fleet) -> None:
    async with deaf(*sockets(some(where, 0.1))):
        await where.pause()


async def leave(where: Fleet) -> None:
    chargers = some(where, 0.1)
    for charger in chargers:
        charger.leave()
    await where.pause()
    for charger in chargers:
        charger.may_come.set()


async def knock(where: Fleet) -> None:
    """Let strangers ask to come in, some of them again and again."""
    for number in range(50):
        where.books.counts["strangers"] += 1
        with suppress(OSError, TimeoutError):
            name = f"{STRANGER}-{number % 20}"
            opening = connected(where.port, name, "ocpp1.6", lambda *_: None)
            (await asyncio.wait_for(opening, where.pace.patience)).transport.abort()
            where.books.counts["strangers let in"] += 1


Fault = Callable[[Any], Awaitable[None]]
SERVER_FAULTS: list[Fault] = [fleet.stop, fleet.hang, fleet.reset, deafen, refuse_handshakes]
FAULTS = [*SERVER_FAULTS, reset_chargers, babble, break_rules, flood, connect_halfway, take_over]
FAULTS += [deafen_chargers, leave, knock]


def calls_of(server: Server, version: str) -> list[tuple[str, dict[str, Any]]]:
    number = next(server.numbers)
    badge = f"{server.name[:4].upper()}-R{number}"
    until = (datetime.now(UTC) + timedelta(seconds=2 * server.pace.patience)).isoformat()
    reservation = {"connectorId": 1, "idTag": badge, "reservationId": number, "expiryDate": until}
    token = {"idToken": badge, "type": "ISO14443"}
    log = {"requestId": number, "logType": "SecurityLog", "log": {"remoteLocation": "ftp://x"}}
    calls: dict[str, dict[str, Any]] = {"TriggerMessage": {"requestedMessage": "Heartbeat"}}
    if version == "ocpp1.6":
        calls |= {"ReserveNow": reservation, "CancelReservation": {"reservationId": number}}
        calls |= {"RemoteStartTransaction": {"idTag": badge}, "GetDiagnostics": {"location": "ftp://x"}}
        calls["ChangeConfiguration"] = {"key": "HeartbeatInterval", "value": "300"}
    else:
        calls |= {"GetLog": log, "RequestStartTransaction": {"idToken": token, "remoteStartId": number}}
    return list(calls.items())


def call_some(server: Server, share: float) -> None:
    """Let a server call some of its chargers, each with one thing; all of them with everything."""
    visits = sorted(server.visits, key=id)
    for visit in server.luck.sample(visits, round(share * len(visits))):
        calls = calls_of(server, visit.version)
        for call in calls if share == 1 else [server.luck.choice(calls)]:
            visit.send([2, f"s{next(server.numbers)}", *call])


@dataclass
class Report:
    """What a run found. All is well if there are no problems."""

    counts: Counter[str]  # Of what happened.
    start: Sample = field(default_factory=dict)
    end: Sample = field(default_factory=dict)
    most: Sample = field(default_factory=dict)  # In between.
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = [("", "start", "end", "most")]
        for name in (MEMORY, FILES, TASKS, *sorted(self.end.keys() - {MEMORY, FILES, TASKS})):
            start, end = self.start.get(name, 0), self.end.get(name, 0)
            if name in (MEMORY, FILES, TASKS) or ("." not in name and start != end):
                most = self.most.get(name)
                rows.append((name, f"{start:,}", f"{end:,}", f"{most:,}" if most else ""))
        lines = [table(rows), "", f"{self.seconds:.0f} s; faults: {listed(self.faults)}"]
        lines += [f"happened: {listed(self.counts)}", f"problems: {len(self.problems)}"]
        return "\n".join([*lines, *self.problems])


class Run(Fleet):
    """One run: the fleet, the proxy, what breaks and what is measured, all of it `haste` times as fast."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        chargers: int = CHARGERS,
        every: float = FAULTS_EVERY,
        haste: float = 1.0,
    ) -> None:
        self.every = every
        self.haste = haste
        seconds = {name: value / haste for name, value in SETTINGS.items()}
        settings = {**seconds, "proxy": "INFO", "max_size": MAX_SIZE, "state": "state.db"}
        super().__init__(folder, chargers, seed, Pace(*(value / haste for value in PACE)), settings)
        self.report = Report(self.books.counts)

    async def play(self, seconds: float) -> Report:
        """Measure, break everything for so long and at least once, let all settle, and measure again."""
        begun = now()
        times = [f"{name}={value / self.haste}" for name, value in TIMES.items()]
        async with self.alive():
            await self.proxy.start("--times", " ".join([*times, "REDIAL=((0,2),(1,4))"]))
            await self._prepare()
            await self._break(seconds)
            await self._settle()
            await self.proxy.stop(STOP_SECONDS)
        self._check()
        self.report.seconds = now() - begun
        return self.report

    def _look(self) -> Sample:
        files = sum(1 for _ in Path(f"/proc/{self.proxy.pid}/fd").iterdir())
        return {MEMORY: round(kibibytes(self.proxy.pid)), FILES: files}

    async def _count(self) -> Sample:
        """Let the proxy count its objects. Raises TimeoutError."""
        process = self.proxy.process
        assert process is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGUSR1)
        answer: Sample = json.loads(await asyncio.wait_for(process.stdout.readline(), QUIET_SECONDS))
        return {**self._look(), **answer}

    async def _prepare(self) -> None:
        """Let everybody do everything once: what is kept of the last of its kind is there from now on."""
        await self._until(
            lambda: min(charger.sessions for charger in self.chargers) >= 2, "each has sessions"
        )
        for server in self.servers:
            call_some(server, 1)
        await self._rest()
        await asyncio.sleep(WEEK_SECONDS / self.haste)
        self.report.start = await self._count()

    async def _rest(self) -> None:
        self.plays = False
        number = len(self.chargers)
        await self._until(self.has_come_to_rest, "all chargers rest")
        await self._until(lambda: all(len(s.visits) == number for s in self.servers), "all are online")
        await self._until(self.books.forget, "everything is said and delivered")

    async def _break(self, seconds: float) -> None:
        """Let everybody play, and one fault after the other begin; return when all have ended."""
        self.plays = True
        until = now() + seconds
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch())
            async with asyncio.TaskGroup() as breaking:
                for fault in (f for _ in count() for f in self.luck.sample(FAULTS, len(FAULTS))):
                    await asyncio.sleep(self.luck.uniform(0.5, 1.5) * self.every)
                    if now() >= until and len(self.report.faults) == len(FAULTS):
                        break
                    breaking.create_task(self._suffer(fault))
                    self.report.faults[fault.__name__] += 1
            watch.cancel()

    async def _suffer(self, fault: Fault) -> None:
        """Have a fault; a server has one at a time."""
        if fault in SERVER_FAULTS:
            server = self.luck.choice(self.servers)
            async with server.trouble:
                await fault(server)
        else:
            await fault(self)

    async def _watch(self) -> None:
        """Meanwhile, let servers call chargers, and note the most of what there is."""
        while True:
            await asyncio.sleep(CALLS_EVERY)
            for server in self.servers:
                call_some(server, CALLED_SHARE)
            for name, number in self._look().items():
                self.report.most[name] = max(number, self.report.most.get(name, 0))
            self.books.forget()

    async def _settle(self) -> None:
        """Let all sessions end; measure until there is no more than at the start, or it took too long."""
        await self._rest()
        grown, until = ["not measured"], now() + QUIET_SECONDS
        while grown and now() < until:
            await asyncio.sleep(1)
            self.report.end = await self._count()
            grown = growth(self.report.start, self.report.end, len(self.chargers))
        self.report.problems += grown

    async def _until(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait until something is so; note a problem if that takes too long."""
        try:
            await eventually(is_true, QUIET_SECONDS)
        except TimeoutError:
            busy = [charger.charger_id for charger in self.chargers if not charger.rests]
            self.report.problems += [f"not within {QUIET_SECONDS:g} s: {what}; busy: {busy}"]
            self.report.problems += self.books.missing()

    def _check(self) -> None:
        """Look for what must not be in the log, nor among what happened."""
        lines, counts = self.proxy.told(""), self.report.counts
        # asyncio says so of each; after a flood of Pings there are a thousand.
        counts["writes to lost connections"] = len(self.proxy.told("socket.send() raised exception"))
        problems = [f"logged: {line}" for line in lines if re.search(" ERROR |Traceback", line)]
        if len(lines) > MAX_LINES * counts.total():
            problems.append(f"the log has {len(lines)} lines")
        counts["lines of the log"] = len(lines)
        wrong = ("messages at the wrong server", "strangers let in")
        self.report.problems += problems + [f"{name}: {counts[name]}" for name in wrong if counts[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Break everything around the proxy; measure what grows.")
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; default: %(default)s")
    parser.add_argument("--chargers", type=int, default=CHARGERS, help="default: %(default)s")
    parser.add_argument("--faults-every", metavar="SECONDS", type=float, default=FAULTS_EVERY)

    async def play(folder: Path, options: argparse.Namespace) -> Report:
        run = Run(folder, options.seed, options.chargers, options.faults_every)
        return await run.play(options.minutes * 60)

    return fleet.command(parser, play)


if __name__ == "__main__":
    sys.exit(main())
