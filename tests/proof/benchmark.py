"""
The benchmark: what the proxy costs, beside HAProxy and beside no proxy at all, all measured in the same run.

    chargers ──────────────────► servers       direct: what the generators and the machine cost
    chargers ───► HAProxy ─────► primary       a relay in C that does not look into a message
    chargers ───► the proxy ───► primary, secondary

Absolute figures are the machine's, and other work on it disturbs them. So all three ways stand at the same
time and take turns in rounds, and what counts is the median of the ratios of rounds that took turns. CPU is
the system's count for the relay's process, so it is right also where the generators are the bottleneck; how
busy those were is told. Chargers and servers are processes of their own that send prepared frames.

    python -m tests.proof.benchmark [--quick] [--only relayed herd ...]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import multiprocessing
import operator
import os
import platform
import re
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import trustme
from websockets.sync.client import connect
from websockets.version import version as websockets_version

import ocpp_2w_proxy as p
from tests.play.peers import accepting
from tests.play.rig import SCRIPT, check, ini_of, many_files
from tests.proof.ledger import BOOTS, free_port

# The relays have a core for themselves; all generators share what is left.
CORES = sorted(os.sched_getaffinity(0))
RELAY_CORES = set(CORES[:1])
GENERATOR_CORES = set(CORES[1:]) or RELAY_CORES

PATIENCE = 60.0  # Seconds for anything that must happen.
BATCH = 500  # Chargers that connect at once where that is not what is measured: fewer than listeners queue.
IN_FLIGHT = 16  # Calls at a time in a closed loop: enough to keep a relay busy, with any number of chargers.
OPEN_RATE = 1000.0  # Calls a second in the open loop: far below what any relay can do.
ONE_RATE = 100.0  # Likewise of one charger alone,
ONE_CALLS = 150  # so that a round of one charger is short.
PREPARED = 16  # Different Calls of each kind.
VERSION = "ocpp1.6"

# Targets, printed beside what was measured.
MOST_CPU = 2.5  # Times HAProxy's, per relayed Call.
MOST_GROWTH = 1.3  # Times HAProxy's, of CPU per Call from SMALL to the largest number of chargers.
MOST_KILOBYTES = 25.0  # Of memory for a charger and its three connections, plain.
LEAST_BOOTS = 1200.0  # A second, of a herd.
MOST_NEIGHBOUR = 2.0  # Times the p99 that others have without it.
MOST_START = 2.0  # Seconds.
MOST_WATCHING = 1.1  # Times the CPU per Call without a page, metrics and INFO lines.
LEAST_TWO = 1.7  # Times the Calls a second of one proxy.
SMALL = 100  # Chargers at the lower end of the growth, and beside a bad neighbour.
SCRAPE_SECONDS = 5.0  # Between two looks at the metrics; Prometheus takes 15 and more.
# Proxies of a farm run in turns, one slice of so many each, so that generators and HAProxy have room for two.
SLICE_SECONDS, SLICES = 0.005, 4
FARM_IN_FLIGHT = 64  # Calls: enough for two proxies, of which one is stopped most of the time.


class Size(NamedTuple):
    """How much is measured."""

    levels: tuple[int, ...]  # Chargers.
    rounds: int
    calls: int  # In a round of the closed loop.
    seconds: float  # Of a round of the open loop.
    herds: int
    herd: int  # Chargers that come at once, and whose memory is measured.
    secure: int  # Chargers whose memory is measured with wss.
    stored: int  # Calls in a round.
    sessions: int  # In the state file of a start.


FULL = Size((1, 100, 1000, 5000), 5, 10_000, 3.0, 3, 2000, 500, 2000, 10_000)
QUICK = Size((1, 100, 500), 3, 3000, 1.0, 1, 500, 50, 500, 10_000)


# ---------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------

MASK = bytes.fromhex("37fa213d")  # Of all frames of the chargers.
TEXT, PING = 1, 9
PONG = b"\x8a\x80" + MASK
PONG_OF_SERVER = b"\x8a\x00"
GREETING = (
    "GET /{} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Protocol: {VERSION}\r\n\r\n"
)
WELCOME = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Accept: {{}}\r\nSec-WebSocket-Protocol: {VERSION}\r\n\r\n"
)
END_OF_HEAD = b"\r\n\r\n"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3.


def masked(data: bytes, key: bytes) -> bytes:
    """Mask or unmask."""
    mask = (key * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(len(data), "big")


def framed(text: bytes, key: bytes = b"") -> bytes:
    """Return a frame with this text, masked if there is a key."""
    size, is_masked = len(text), 0x80 if key else 0
    head = bytes([0x80 | TEXT, is_masked | min(size, 126)]) + (size.to_bytes(2, "big") if size > 125 else b"")
    return head + key + (masked(text, key) if key else text)


def unframed(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return opcode and payload of each complete frame, and what is left."""
    frames, at = [], 0
    while at + 2 <= len(data):
        second = data[at + 1]
        size, head = second & 127, at + 2
        if size == 126:
            size, head = int.from_bytes(data[head : head + 2], "big"), head + 2
        start = head + 4 if second & 128 else head
        if start + size > len(data):
            break
        payload = data[start : start + size]
        frames.append((data[at] & 15, masked(payload, data[head:start]) if second & 128 else payload))
        at = start + size
    return frames, data[at:]


class Said(NamedTuple):
    """A Call that a charger can send."""

    message_id: bytes
    frame: bytes


def said(action: str, payload: dict[str, Any]) -> Said:
    message_id = str(uuid.uuid4())
    text = json.dumps([2, message_id, action, payload], separators=(",", ":"))
    return Said(message_id.encode(), framed(text.encode(), MASK))


def reading(transaction_id: int) -> Said:
    values = [
        {"value": "1234567", "context": "Sample.Periodic", "measurand": p.REGISTER, "unit": "Wh"},
        {"value": "16.02", "context": "Sample.Periodic", "measurand": "Current.Import", "unit": "A"},
    ]
    value = [{"timestamp": "2026-01-01T00:00:00Z", "sampledValue": values}]
    payload = {"connectorId": 1, "transactionId": transaction_id, "meterValue": value}
    return said("MeterValues", payload)


def said_in_session(transaction_id: int, is_mixed: bool) -> list[Said]:
    """Return a reading, or with it what else a charger says that is neither copied nor stored."""
    if not is_mixed:
        return [reading(transaction_id)]
    transfer = said("DataTransfer", {"vendorId": "org.example", "data": "0123456789" * 8})
    return [reading(transaction_id), transfer, reading(transaction_id), said("Heartbeat", {})]


# ---------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------


class Server:
    """Answers every Call on one port."""

    def __init__(self, listener: socket.socket, answered: Any) -> None:
        self.listener = listener
        self.answered = answered  # How many Calls; shared with the process that measures.
        self.ends: dict[bytes, bytes] = {}  # What an answer ends with, by Action.

    def take(self, connection: socket.socket, data: bytes) -> bytes:
        """Answer what has come; return what is not complete yet."""
        if data.startswith(b"GET "):
            if END_OF_HEAD in data:
                connection.send(self._welcome(data))
                return b""
            return data
        frames, rest = unframed(data)
        answers = [self._answer(opcode, payload) for opcode, payload in frames]
        connection.send(b"".join(answers))
        self.answered.value += sum(len(answer) > len(PONG_OF_SERVER) for answer in answers)
        return rest

    def _welcome(self, request: bytes) -> bytes:
        key = re.search(rb"(?i)sec-websocket-key: *(\S+)", request)
        assert key, "every client sends one"
        return WELCOME.format(base64.b64encode(hashlib.sha1(key[1] + GUID).digest()).decode()).encode()

    def _answer(self, opcode: int, payload: bytes) -> bytes:
        if opcode != TEXT:
            return PONG_OF_SERVER if opcode == PING else b""
        _, message_id, _, action, _ = payload.split(b'"', 4)
        if action not in self.ends:
            self.ends[action] = b'",' + json.dumps(accepting(action.decode(), {})).encode() + b"]"
        return framed(b'[3,"' + message_id + self.ends[action])


def be_servers(listeners: list[socket.socket], counts: list[Any]) -> None:
    """Serve until the process is ended."""
    epoll = select.epoll()
    servers = {one.fileno(): Server(one, answered) for one, answered in zip(listeners, counts, strict=True)}
    visits: dict[int, tuple[socket.socket, Server]] = {}
    rests: dict[int, bytes] = {}
    for number in servers:
        epoll.register(number, select.EPOLLIN)
    while True:
        for number, _ in epoll.poll():
            if number in servers:
                visitor, _ = servers[number].listener.accept()
                visits[visitor.fileno()] = visitor, servers[number]
                visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                epoll.register(visitor, select.EPOLLIN)
                continue
            connection, server = visits[number]
            data = b""
            with suppress(OSError):
                if data := connection.recv(2**16):
                    rests[number] = server.take(connection, rests.get(number, b"") + data)
            if not data:
                rests.pop(number, None)
                del visits[number]
                connection.close()


# ---------------------------------------------------------------------------------------------------------
# Chargers
# ---------------------------------------------------------------------------------------------------------


class Charger:
    """One charger. It never sends a Call before its last one is answered."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self.socket = connection
        self.step = self.greet  # What it does when the socket is ready; returns whether it is done.
        self.rest = b""  # Of what came, what is not complete yet.
        self.calls: list[Said] = []  # What it says in a session, in turns.
        self.message_id = b""  # Of its Call that waits for the answer.
        self.since = 0.0  # When that Call was sent, or should have been.
        self.answer = b""  # To its last Call.

    def greet(self) -> bool:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.send(GREETING.format(self.name).encode())
        self.step = self.enter
        return False

    def enter(self) -> bool:
        self.rest += self._read()
        head, end, rest = self.rest.partition(END_OF_HEAD)
        if end:
            check(b" 101 " in head, f"a charger is refused: {head!r}")
            self.rest, self.step = rest, self.hear
            self.call(said("BootNotification", BOOTS[VERSION]), 0.0)
        return False

    def call(self, said: Said, since: float) -> None:
        self.message_id, self.since = said.message_id, since
        self.socket.send(said.frame)

    def hear(self) -> bool:
        """Return whether its Call is answered."""
        frames, self.rest = unframed(self.rest + self._read())
        is_answered = False
        for opcode, payload in frames:
            if opcode == PING:
                self.socket.send(PONG)
                continue
            is_answered = payload.startswith(b"[3") and payload[4:40] == self.message_id
            check(is_answered, f"a charger waits for {self.message_id!r} and hears {payload!r}")
            self.answer = payload
        return is_answered

    def _read(self) -> bytes:
        data = self.socket.recv(2**16)
        check(bool(data), "a charger was closed")
        return data


Times = tuple[float, list[float]]  # Seconds that a round took, and the latency of each of its Calls.


class Chargers:
    """All chargers of one way. What they are told to do is done when all that was sent is answered."""

    def __init__(self, port: int, name: str) -> None:
        self.port = port
        self.name = name  # What their ids begin with.
        self.epoll = select.epoll()
        self.chargers: dict[int, Charger] = {}  # By file descriptor.
        self.turns = count()  # Numbers chargers, and the Calls that they take in turns.
        self.until = 0.0  # When what they are at has to be done.

    def come(self, number: int) -> float:
        """Connect so many at once; return the seconds until all BootNotifications were answered."""
        begun, booted = self._now_begins(), 0
        for _ in range(number):
            charger = self._new(socket.socket())
            charger.socket.setblocking(False)
            charger.socket.connect_ex(("127.0.0.1", self.port))
            self.epoll.register(charger.socket, select.EPOLLOUT)
        while booted < number:
            for descriptor in self._ready():
                charger = self.chargers[descriptor]
                if charger.step == charger.greet:
                    self.epoll.modify(descriptor, select.EPOLLIN)
                booted += charger.step()
        return time.perf_counter() - begun

    def come_securely(self, number: int, authority: str) -> None:
        """Connect so many over TLS, one after the other."""
        context = ssl.create_default_context(cafile=authority)
        for _ in range(number):
            plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
            charger = self._new(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            while not charger.step():
                pass

    def _new(self, connection: socket.socket) -> Charger:
        charger = Charger(f"{self.name}-{next(self.turns):05}", connection)
        self.chargers[connection.fileno()] = charger
        return charger

    def start_sessions(self, badge: str, is_mixed: bool = True) -> None:
        """Begin a session at each; prepare what they say in it."""
        prepared: dict[int, list[Said]] = {}  # By transaction id, which a server may give to all of them.
        payload = {"connectorId": 1, "idTag": badge, "meterStart": 0, "timestamp": "2026-01-01T00:00:00Z"}
        start = said("StartTransaction", payload)
        for charger in self.chargers.values():
            charger.calls = [start]
        self.play_closed(len(self.chargers), IN_FLIGHT)
        for charger in self.chargers.values():
            number = json.loads(charger.answer)[2]["transactionId"]
            if number not in prepared:
                turns = (said_in_session(number, is_mixed) for _ in range(PREPARED))
                prepared[number] = list(itertools.chain.from_iterable(turns))
            charger.calls = prepared[number]

    def play_closed(self, calls: int, in_flight: int) -> Times:
        """Call in turns, so many at a time, each as soon as an earlier one is answered."""
        idle, latencies, sent = deque(self.chargers.values()), list[float](), 0
        begun = self._now_begins()
        while len(latencies) < calls:
            while sent < min(calls, len(latencies) + in_flight) and idle:
                self._call(idle.popleft(), time.perf_counter())
                sent += 1
            self._hear(PATIENCE, idle, latencies)
        return time.perf_counter() - begun, latencies

    def play_open(self, calls: int, rate: float) -> Times:
        """Call in turns, so many times a second; latencies count from when a Call should have been sent."""
        idle, latencies, sent = deque(self.chargers.values()), list[float](), 0
        begun = self._now_begins()
        while len(latencies) < calls:
            due = begun + sent / rate
            early = due - time.perf_counter()
            if sent < calls and idle and early <= 0:
                self._call(idle.popleft(), due)
                sent += 1
            else:
                self._hear(early if sent < calls and idle else PATIENCE, idle, latencies)
        return time.perf_counter() - begun, latencies

    def _call(self, charger: Charger, since: float) -> None:
        charger.call(charger.calls[next(self.turns) % len(charger.calls)], since)

    def _hear(self, seconds: float, idle: deque[Charger], latencies: list[float]) -> None:
        for descriptor in self._ready(seconds):
            charger = self.chargers[descriptor]
            if charger.hear():
                latencies.append(time.perf_counter() - charger.since)
                idle.append(charger)

    def _now_begins(self) -> float:
        """Return the time, from which what begins now has PATIENCE."""
        begun = time.perf_counter()
        self.until = begun + PATIENCE
        return begun

    def _ready(self, seconds: float = PATIENCE) -> list[int]:
        """Return whose sockets are ready; waits to the microsecond, which epoll alone cannot."""
        select.select([self.epoll], [], [], seconds)
        check(time.perf_counter() < self.until, f"not done within {PATIENCE:g} s")
        return [descriptor for descriptor, _ in self.epoll.poll(0)]


def be_chargers(pipe: Connection, port: int, name: str) -> None:
    """Do what is asked for until the process is ended."""
    chargers = Chargers(port, name)
    while True:
        action, arguments = pipe.recv()
        pipe.send(getattr(chargers, action)(*arguments))


def be_bad(port: int, reads: bool) -> None:
    """Be one charger that calls as fast as it is let, and may read no answer, until it is cut."""
    chargers = Chargers(port, "BAD")
    chargers.come(1)
    bad = next(iter(chargers.chargers.values())).socket
    left = flood = said("DataTransfer", {"vendorId": "flood"}).frame * 100
    with suppress(OSError):
        while True:
            readable, writable, _ = select.select([bad] if reads else [], [bad], [])
            if readable:
                check(bool(bad.recv(2**16)), "a flood is cut")
            if writable:
                left = left[bad.send(left) :] or flood


# ---------------------------------------------------------------------------------------------------------
# Ways
# ---------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")  # Generators inherit sockets.
WAYS = DIRECT, HAPROXY, PROXY = "direct", "HAProxy", "proxy"
FARMS = {"one proxy": 1, "two proxies": 2}  # Behind HAProxy, each charger by its path.
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
FARM_INI = """defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout tunnel 1h
frontend chargers
    bind 127.0.0.1:{}
    use_backend proxy-%[path,crc32(1),mod({})]
"""
PROXY_INI: dict[str, object] = {"addr": "127.0.0.1", "primary_rfid": "PRIM*", "secondary_rfid": "SECO*"}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, to the nanosecond; 0 if there is none."""
    # What clock_getcpuclockid(3) returns, for which Python has no name.
    return 0.0 if not pid else time.clock_gettime(~pid << 3 | 2)


def memory_bytes(pid: int) -> int:
    """Return what a process holds of the machine's memory; 0 if there is none."""
    return 0 if not pid else int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def generator(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """A process beside the relays; yields its id."""
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    os.sched_setaffinity(process.pid, GENERATOR_CORES)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def started(command: list[str], port: int, log: Path) -> Iterator[int]:
    """A relay that listens, on a core for itself; yields its process id."""
    pin = partial(os.sched_setaffinity, 0, RELAY_CORES)
    with log.open("wb") as file, subprocess.Popen(command, preexec_fn=pin, stderr=file) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not listens(port):
                check(process.poll() is None and time.monotonic() < until, f"{command[0]} does not listen")
                time.sleep(0.005)
            yield process.pid
        finally:
            process.kill()


@contextmanager
def relay(name: str, folder: Path, servers: list[int], **settings: Any) -> Iterator[tuple[int, int]]:
    """What stands between chargers and servers; yields its process id, 0 = nothing, and its port."""
    if name == DIRECT:
        yield 0, servers[0]
        return
    if name in FARMS:
        with farm(FARMS[name], folder, servers) as front:
            yield front
        return
    port, ini = free_port(), folder / f"{name}.ini"
    if name == HAPROXY:
        ini.write_text(HAPROXY_INI.format(port, servers[0]))
        command = ["haproxy", "-db", "-f", str(ini)]
    else:
        status = settings.pop("status_port", 0)
        primary, secondary = (f"ws://127.0.0.1:{server}" for server in servers)
        named = {"port": port, "server": primary, "secondary_server": secondary}
        ini.write_text(ini_of({**PROXY_INI, **named, **settings}, status))
        command = [sys.executable, str(SCRIPT), "--config", str(ini)]
    with started(command, port, folder / "log") as pid:
        yield pid, port


@contextmanager
def farm(size: int, folder: Path, servers: list[int]) -> Iterator[tuple[int, int]]:
    """Proxies behind HAProxy, in turns; yields its process id and its port."""
    with ExitStack() as stack:
        front, ini, pids = free_port(), FARM_INI, list[int]()
        for number in range(size):
            (folder / str(number)).mkdir()
            pid, port = stack.enter_context(relay(PROXY, folder / str(number), servers))
            ini += f"backend proxy-{number}\n    server proxy 127.0.0.1:{port}\n"
            pids.append(pid)
        (folder / "haproxy.ini").write_text(ini.format(front, size))
        stack.enter_context(in_turns(pids))
        command = ["haproxy", "-db", "-f", str(folder / "haproxy.ini")]
        with started(command, front, folder / "log") as pid:
            os.sched_setaffinity(pid, GENERATOR_CORES)
            yield pid, front


@contextmanager
def in_turns(pids: list[int]) -> Iterator[None]:
    """Let processes run a slice each, and nobody in the slices that are left."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            for pid in [*pids, *[0] * (SLICES - len(pids))]:
                if pid:
                    os.kill(pid, signal.SIGCONT)
                time.sleep(SLICE_SECONDS)
                if pid:
                    os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=run)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@dataclass
class Round:
    """What a round measured."""

    calls: int
    seconds: float
    latencies: list[float]  # Of the Calls, in seconds, sorted.
    cpu: float  # Of the relay, in seconds.
    busy: float  # The generators' share of the time of their cores.

    @property
    def micros(self) -> float:
        """Microseconds of the relay's CPU for a Call."""
        return self.cpu / self.calls * 1e6

    def latency(self, share: float) -> float:
        """Return the latency that this share of the Calls stays below, in ms."""
        return self.latencies[int(share * (len(self.latencies) - 1))] * 1e3


class Way:
    """Servers and a relay, and whatever chargers come to it."""

    def __init__(self, name: str, stack: ExitStack, **settings: object) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = ("127.0.0.1", 0)
        listeners = [stack.enter_context(socket.create_server(address, backlog=4096)) for _ in p.SERVERS]
        ports = [listener.getsockname()[1] for listener in listeners]
        self.name = name
        self.stack = stack
        self.folder = folder
        self.answered = [FORK.RawValue("Q", 0) for _ in p.SERVERS]  # Calls that each server has answered.
        self.generators = [stack.enter_context(generator(be_servers, listeners, self.answered))]
        self.pid, self.port = stack.enter_context(relay(name, folder, ports, **settings))

    def chargers(self, name: str = "CP") -> Callable[..., Any]:
        """Start a process for chargers; return what asks it for one of its actions."""
        ours, theirs = FORK.Pipe()
        self.generators.append(self.stack.enter_context(generator(be_chargers, theirs, self.port, name)))
        theirs.close()

        def ask(action: str, *arguments: object) -> Any:
            ours.send((action, arguments))
            return ours.recv()

        return ask

    def played(self, calls: int, play: Callable[[], Times]) -> Round:
        """Play a round; return what it cost."""
        cpu, busy = self._cpu()
        seconds, latencies = play()
        cpu_after, busy_after = self._cpu()
        busy = (busy_after - busy) / seconds / len(GENERATOR_CORES)
        return Round(calls, seconds, sorted(latencies), cpu_after - cpu, busy)

    def _cpu(self) -> tuple[float, float]:
        """Return the CPU time of the relay and of the generators."""
        return cpu_seconds(self.pid), sum(map(cpu_seconds, self.generators))

    def grown(self, before: int, chargers: int) -> float:
        """Return the kB that each charger has added to the relay's memory, with its secondary connected."""
        if self.name == PROXY:
            self.until_answered(SECONDARY, chargers)
        return (memory_bytes(self.pid) - before) / 1000 / chargers if self.pid else 0.0

    def tell_warnings(self) -> None:
        """Print what a relay has to complain about: then it has not done what is measured."""
        for line in (self.folder / "log").read_text().splitlines():
            if "WARNING" in line or "ERROR" in line:
                print(f"{self.name} says: {line}")

    def until_answered(self, peer: int, calls: int) -> None:
        """Wait until a server has answered so many Calls."""
        until = time.monotonic() + PATIENCE
        while self.answered[peer].value < calls:
            check(time.monotonic() < until, f"a server has answered {calls} Calls")
            time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------

PRIMARY, SECONDARY = range(2)  # As in Way.answered.
PERCENTILES = (0.5, 0.99, 0.999)
Played = dict[str, list[Round]]  # By way, or by what else takes turns.
Figure = Callable[[Round], float]


def micros(played: Round) -> float:
    return played.micros


def p99(played: Round) -> float:
    return played.latency(0.99)


def ratio(above: list[Round], below: list[Round], figure: Figure = micros) -> float:
    """Return the median of the ratios of rounds that took turns."""
    return median(figure(one) / figure(other) for one, other in zip(above, below, strict=True))


def latencies(rounds: list[Round], direct: list[Round]) -> str:
    """Return the percentiles in ms; of a relay, what it adds to the direct way's."""
    cells = []
    for share in PERCENTILES:
        own, others = ([one.latency(share) for one in played] for played in (rounds, direct))
        added = median(map(operator.sub, own, others))
        cells.append(f"{median(own):.2f}" if rounds is direct else f"{added:+.2f}")
    return " / ".join(cells)


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table, its head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], tuple("-" * width for width in widths), *rows[1:]]:
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), "|")
    print(flush=True)


def tell(what: str, value: float, unit: str = "", most: float = 0.0, least: float = 0.0) -> None:
    """Print a figure, and whether it is as promised."""
    is_kept = value >= least and (not most or value <= most)
    promise = f"; target <= {most:,g}{unit}" if most else f"; target >= {least:,g}{unit}" if least else ""
    verdict = (": kept" if is_kept else ": MISSED") if promise else ""
    print(f"- {what}: {value:,.3g}{unit}{promise}{verdict}", flush=True)


def settled(way: Way, chargers: int, name: str = "CP", *session: object) -> Callable[..., Any]:
    """Let chargers connect and begin a session each; return what asks them for more."""
    ask = way.chargers(name)
    for come in range(0, chargers, BATCH):
        ask("come", min(BATCH, chargers - come))
    ask("start_sessions", *(session or ("PRIM-1",)))
    return ask


def played_level(chargers: int, size: Size) -> tuple[Played, Played]:
    """Return the rounds of the closed and of the open loop, played with so many chargers."""
    calls, rate = (ONE_CALLS, ONE_RATE) if chargers == 1 else (size.calls, OPEN_RATE)
    closed, opened = Played(), Played()
    with ExitStack() as stack:
        ways = [Way(name, stack) for name in WAYS]
        asks = [settled(way, chargers) for way in ways]
        for _ in range(size.rounds):
            for way, ask in zip(ways, asks, strict=True):
                play = way.played(calls, partial(ask, "play_closed", calls, IN_FLIGHT))
                closed.setdefault(way.name, []).append(play)
            for way, ask in zip(ways, asks, strict=True):
                number = int(rate * size.seconds)
                play = way.played(number, partial(ask, "play_open", number, rate))
                opened.setdefault(way.name, []).append(play)
        ways[-1].tell_warnings()
    return closed, opened


def measure_relayed(size: Size) -> None:
    """CPU and latency of relayed Calls, and how CPU grows with the number of chargers."""
    head = ("chargers", "way", "CPU us/Call", "x HAProxy", "Calls/s", "generators busy")
    rows: list[tuple[str, ...]] = [(*head, "closed loop, ms", "open loop, ms", "CPU us/Call", "x HAProxy")]
    levels: dict[int, Played] = {}
    for chargers in size.levels:
        levels[chargers], opened = played_level(chargers, size)
        rows += [row_of(chargers, name, levels[chargers], opened) for name in WAYS]
    print("Relayed Calls: p50 / p99 / p99.9; of a relay, what it adds to the direct way's.")
    table(rows)
    most, small = levels[size.levels[-1]], levels[SMALL]
    for chargers, played in levels.items():
        what = f"CPU per relayed Call at {chargers:,} chargers, times HAProxy's"
        tell(what, ratio(played[PROXY], played[HAPROXY]), most=MOST_CPU)
    for name in (HAPROXY, PROXY):
        growth = median(map(micros, most[name])) / median(map(micros, small[name]))
        tell(f"growth of CPU per Call from {SMALL} to {size.levels[-1]:,} chargers, {name}", growth)
    # Of rounds that took turns: what slows both down on a busy machine falls out.
    growth = ratio(most[PROXY], most[HAPROXY]) / ratio(small[PROXY], small[HAPROXY])
    tell("growth of the proxy, times HAProxy's", growth, most=MOST_GROWTH)


def row_of(chargers: int, name: str, closed: Played, opened: Played) -> tuple[str, ...]:
    rounds = closed[name]
    cpu: list[str] = []
    for played in (closed, opened):
        is_relay = name != DIRECT
        cpu.append(f"{median(map(micros, played[name])):.1f}" if is_relay else "-")
        cpu.append(f"{ratio(played[name], played[HAPROXY]):.2f}" if is_relay else "-")
    rate = f"{median(one.calls / one.seconds for one in rounds):,.0f}"
    busy = f"{median(one.busy for one in rounds):.0%}"
    both = (latencies(rounds, closed[DIRECT]), latencies(opened[name], opened[DIRECT]))
    return (f"{chargers:,}", name, *cpu[:2], rate, busy, *both, *cpu[2:])


def measure_herd(size: Size) -> None:
    """How fast many chargers that come at once are all let in, and what they hold of memory."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
    for _ in range(size.herds):
        for name in WAYS:
            with ExitStack() as stack:
                way = Way(name, stack)
                before, cpu = memory_bytes(way.pid), cpu_seconds(way.pid)
                rate = size.herd / way.chargers()("come", size.herd)
                memory = way.grown(before, size.herd)
                found[name].append((rate, (cpu_seconds(way.pid) - cpu) / size.herd * 1e6, memory))
    figures = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    print(f"{size.herd:,} chargers come at once. HAProxy has two connections for each, the proxy three.")
    rows = [("way", "boots/s", "CPU us a charger", "memory, kB a charger")]
    table(rows + [(name, f"{r:,.0f}", f"{c:,.0f}", f"{m:.1f}") for name, (r, c, m) in figures.items()])
    rate, _, memory = figures[PROXY]
    tell("boots of a herd", rate, " a second", least=LEAST_BOOTS)
    tell("memory for a charger, plain", memory, " kB", most=MOST_KILOBYTES)


def measure_secure(size: Size) -> None:
    """What chargers hold of memory that come over wss; the servers stay plain."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "chain.pem")
        way = Way(PROXY, stack, cert_chain=folder / "chain.pem")
        before = memory_bytes(way.pid)
        way.chargers()("come_securely", size.secure, str(folder / "ca.pem"))
        tell(f"memory for a charger of {size.secure}, wss", way.grown(before, size.secure), " kB")


def measure_stored(size: Size) -> None:
    """What a stored Call costs, from the charger to the secondary's answer, beside a relayed one."""
    played: Played = {"relayed": [], "stored": []}
    with ExitStack() as stack:
        way = Way(PROXY, stack)
        relayed, stored = settled(way, SMALL, "P", "PRIM-1", False), settled(way, SMALL, "S", "SECO-1", False)
        secondary = way.answered[SECONDARY]
        way.until_answered(SECONDARY, 3 * SMALL)  # The boots of all, the starts of half.

        def play_stored() -> Times:
            goal = secondary.value + size.stored
            result: Times = stored("play_closed", size.stored, SMALL)
            way.until_answered(SECONDARY, goal)
            return result

        for _ in range(size.rounds):
            play = partial(relayed, "play_closed", size.stored, SMALL)
            played["relayed"].append(way.played(size.stored, play))
            played["stored"].append(way.played(size.stored, play_stored))
        way.tell_warnings()
    print(f"Stored Calls: {SMALL} chargers, all with a Call in flight, state file on {way.folder}.")
    rows = [("Calls", "CPU us/Call", "Calls/s", "p50 / p99 / p99.9, ms")]
    for name, rounds in played.items():
        rate = f"{median(one.calls / one.seconds for one in rounds):,.0f}"
        rows.append((name, f"{median(map(micros, rounds)):.1f}", rate, latencies(rounds, rounds)))
    table(rows)
    tell("CPU of a stored Call, times a relayed one's", ratio(played["stored"], played["relayed"]))


def measure_neighbours(size: Size) -> None:
    """Whether a charger that floods, and one that floods and reads nothing, slow others down."""
    played: Played = {"none": [], "flooding": [], "flooding, reads nothing": []}
    calls = int(OPEN_RATE * size.seconds)
    with ExitStack() as stack:
        way = Way(PROXY, stack)
        ask = settled(way, SMALL)
        for _ in range(size.rounds):
            for rounds, reads in zip(played.values(), (None, True, False), strict=True):
                with ExitStack() as beside:
                    if reads is not None:
                        # A new one each time: what it may send at once is the worst of it.
                        beside.enter_context(generator(be_bad, way.port, reads))
                    rounds.append(way.played(calls, partial(ask, "play_open", calls, OPEN_RATE)))
    print(f"A bad neighbour of {SMALL} chargers in the open loop.")
    rows = [("neighbour", "p50 / p99 / p99.9, ms")]
    table(rows + [(name, latencies(rounds, rounds)) for name, rounds in played.items()])
    for name in list(played)[1:]:
        times = ratio(played[name], played["none"], p99)
        tell(f"p99 beside one that is {name}", times, " x", most=MOST_NEIGHBOUR)


def be_watching(port: int) -> None:
    """Have a page open, and look at the metrics now and then, until the process is ended."""

    def scrape() -> None:
        while True:
            with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
                connection.request("GET", "/metrics")
                check(connection.getresponse().status == 200, "the metrics are told")
            time.sleep(SCRAPE_SECONDS)

    threading.Thread(target=scrape, daemon=True).start()
    with connect(f"ws://127.0.0.1:{port}/live", max_size=None) as page:
        for _ in page:
            pass


def measure_watched(size: Size) -> None:
    """What a page, metrics and INFO lines cost: at the open loop's rate, as on a busy day."""
    played: Played = {"unwatched": [], "watched": []}
    calls = int(OPEN_RATE * size.seconds * 2)
    with ExitStack() as stack:
        port = free_port()
        ways = [Way(PROXY, stack, proxy="WARNING"), Way(PROXY, stack, proxy="INFO", status_port=port)]
        asks = [settled(way, SMALL) for way in ways]
        stack.enter_context(generator(be_watching, port))
        for _ in range(size.rounds):
            for way, ask, rounds in zip(ways, asks, played.values(), strict=True):
                rounds.append(way.played(calls, partial(ask, "play_open", calls, OPEN_RATE)))
    print(
        f"A page open, metrics looked at every {SCRAPE_SECONDS:g} s, INFO lines: {SMALL} chargers, open loop."
    )
    rows = [("", "CPU us/Call", "p50 / p99 / p99.9, ms")]
    for name, rounds in played.items():
        rows.append((name, f"{median(map(micros, rounds)):.1f}", latencies(rounds, rounds)))
    table(rows)
    tell("CPU per Call, watched", ratio(played["watched"], played["unwatched"]), " x", most=MOST_WATCHING)


def measure_farm(size: Size) -> None:
    """How much more two proxies behind HAProxy carry than one, each a quarter of the time."""
    rates: dict[str, list[float]] = {name: [] for name in FARMS}
    with ExitStack() as stack:
        asks = {name: settled(Way(name, stack), SMALL) for name in FARMS}
        for _ in range(size.rounds):
            for name, ask in asks.items():
                seconds, _ = ask("play_closed", size.stored, FARM_IN_FLIGHT)
                rates[name].append(size.stored / seconds)
    print(
        f"Behind HAProxy, each proxy runs {SLICE_SECONDS * 1000:g} of {SLICES * SLICE_SECONDS * 1000:g} ms."
    )
    rows = [("proxies", "Calls/s")] + [(name, f"{median(found):,.0f}") for name, found in rates.items()]
    table(rows)
    more = median(two / one for one, two in zip(*rates.values(), strict=True))
    tell("Calls a second of two proxies, times one's", more, least=LEAST_TWO)


def write_state(path: Path, sessions: int) -> None:
    """Write a state file as a proxy leaves it behind: ten sessions a charger, one of them open."""
    now, journal = p.current_instant(), p.Journal(p.current_instant, path)
    for number in range(sessions):
        memory = journal.memory(f"CP-{number // 10:05}")
        memory.version = VERSION
        session = p.Session(p.Peer.SECONDARY, "SECO-1", 1, now.utc, now.utc, transaction_id=number + 1)
        session.ended, session.start = now.utc if number % 10 else None, p.fingerprint([number])
        memory.note(session)
    asyncio.run(journal.close())


def measure_start(size: Size) -> None:
    """How long a start takes with many sessions in the state file, and with none."""
    seconds: dict[int, list[float]] = {0: [], size.sessions: []}
    for _ in range(size.rounds):
        for sessions, taken in seconds.items():
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                write_state(Path(folder) / "state.db", sessions)
                begun = time.monotonic()
                way = Way(PROXY, stack, state=Path(folder) / "state.db")
                taken.append(time.monotonic() - begun)
                way.tell_warnings()
    tell("start with an empty state file", median(seconds[0]), " s")
    tell(f"start with {size.sessions:,} sessions", median(seconds[size.sessions]), " s", most=MOST_START)


MEASUREMENTS = {
    "relayed": measure_relayed,
    "herd": measure_herd,
    "secure": measure_secure,
    "stored": measure_stored,
    "neighbours": measure_neighbours,
    "watched": measure_watched,
    "farm": measure_farm,
    "start": measure_start,
}


def machine() -> str:
    """Say where this was measured, and when."""
    haproxy = subprocess.run(["haproxy", "-v"], capture_output=True, check=True, text=True).stdout.split()[2]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {len(CORES)} cores: relays on {RELAY_CORES},"
        f" generators on {GENERATOR_CORES}; CPython {platform.python_version()},"
        f" websockets {websockets_version}, HAProxy {haproxy}, loopback, load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the proxy costs.")
    parser.add_argument("--quick", action="store_true", help="smaller numbers, less than a minute")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    chosen = parser.parse_args()
    os.sched_setaffinity(0, GENERATOR_CORES)
    print(machine(), end="\n\n")
    with many_files():
        for name in chosen.only:
            MEASUREMENTS[name](QUICK if chosen.quick else FULL)
            print(flush=True)


if __name__ == "__main__":
    main()
