"""
The script in a process of its own, real peers around it, and what can be broken between them.

The rows of tests/proof/network.py are played with it. What is broken is broken as long as a `with` block
lasts. `python -m tests.play.rig` is a peer that can be stopped like any process.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import ocpp_2w_proxy as p
from tests.play.peers import Answers, FakeCharger, FakeServer, Hearing, accepting, eventually
from tests.proof.ledger import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ocpp_2w_proxy.py"
SHIMS = ROOT / "tests" / "play" / "shims"
T = TypeVar("T")

REDIAL_SECONDS = 72.0  # The longest pause between two dials of the secondary.
SLACK = 10.0  # Seconds that a machine with other work may take on top of what is promised.
STOP_SECONDS = 5.0  # For the proxy to end, whatever its peers do.

# What the promises name, short enough to be waited for.
SETTINGS: dict[str, object] = {
    "watchdog_stale": 2,
    "watchdog_interval": 0.2,
    "ping_interval": 0.5,
    "ping_timeout": 1,
    "call_timeout": 2,
    "primary_grace": 2,
    "primary_rfid": "PRIM*",
    "secondary_rfid": "SECO*",
}
PING_SECONDS = 1.5  # ping_interval + ping_timeout.


class BrokenPromiseError(AssertionError):
    """Says what was promised and did not come true."""


def check(is_kept: bool, otherwise: str) -> None:
    """Raise BrokenPromiseError if something is not as promised."""
    if not is_kept:
        raise BrokenPromiseError(otherwise)


class Stopwatch:
    """Measures seconds."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.stopped: float | None = None

    @property
    def seconds(self) -> float:
        return (self.stopped or time.monotonic()) - self.begun

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s" if self.seconds >= 0.1 else f"{self.seconds * 1000:.0f} ms"


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[Stopwatch]:
    """Measure how long something takes, which is promised for so many seconds at most."""
    watch = Stopwatch()
    try:
        async with asyncio.timeout(seconds):
            yield watch
    except TimeoutError:
        raise BrokenPromiseError(f"not within {watch}: {what}") from None
    watch.stopped = time.monotonic()


# ---------------------------------------------------------------------------------------------------------
# Places: this machine, or a network namespace of its own
# ---------------------------------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


class Place:
    """Where peers have their sockets, and the proxy runs."""

    def __init__(self, address: str, namespace: int | None = None) -> None:
        self.address = address
        self.namespace = namespace  # A file descriptor; None = the one that the tests run in.

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.namespace}"

    @property
    def prefix(self) -> list[str]:
        """Return what a command begins with that is to run here."""
        return [] if self.namespace is None else ["nsenter", f"--net={self.path}"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def socket(self) -> socket.socket:
        """Return a socket of this place; it stays one wherever it is used."""
        if self.namespace is None:
            return unblocked_socket()
        with home():
            setns(self.namespace)
            return unblocked_socket()


HERE = Place("127.0.0.1")


def unblocked_socket() -> socket.socket:
    fresh = socket.socket()
    fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    fresh.setblocking(False)
    return fresh


def setns(namespace: int) -> None:
    """Let this thread make its sockets in a network namespace. Raises OSError."""
    call_linux("setns", namespace, CLONE_NEWNET)


def call_linux(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


@contextmanager
def home() -> Iterator[None]:
    """Come back to the network namespace that the tests run in."""
    with Path("/proc/thread-self/ns/net").open() as file:
        try:
            yield
        finally:
            setns(file.fileno())


def new_namespace() -> int:
    """Return a network namespace, which lives as long as this file descriptor. Raises OSError."""
    with home():
        call_linux("unshare", CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


@contextmanager
def two_places() -> Iterator[tuple[Place, Place]]:
    """Two network namespaces with a cable between them: where the proxy is, and where it is not."""
    near, far = Place("10.77.0.1", new_namespace()), Place("10.77.0.2", new_namespace())
    near.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far.path)
    for place in (near, far):
        place.run("ip", "link", "set", "lo", "up")
        place.run("ip", "address", "add", f"{place.address}/24", "dev", "cable")
        place.run("ip", "link", "set", "cable", "up")
    try:
        yield near, far
    finally:
        for place in (near, far):
            assert place.namespace is not None
            os.close(place.namespace)


@contextmanager
def unplugged(far: Place) -> Iterator[None]:
    """Pull the cable: nothing gets through and nobody is told."""
    far.run("ip", "link", "set", "cable", "down")
    try:
        yield
    finally:
        far.run("ip", "link", "set", "cable", "up")


@functools.cache
def is_root_here() -> bool:
    """Return whether namespaces and mounts can be made."""
    command = "mount -t tmpfs none /mnt && ip link add cable type veth peer name other"
    try:
        done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", command], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


# ---------------------------------------------------------------------------------------------------------
# A bad wire
# ---------------------------------------------------------------------------------------------------------


class Wire:
    """A TCP relay in front of a port: slow, byte by byte, black, or reset."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0  # Seconds before each piece.
        self.piece = 2**16  # Bytes that are passed on at a time.
        self.left: int | None = None  # Bytes that still pass; then it is black, or reset; None = all.
        self.resets = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self.ends: list[asyncio.StreamWriter] = []
        self.connects = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ocpp"

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connects += 1
        self.ends.append(writer)
        with suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self.ends.append(there_writer)
            try:
                await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))
            finally:
                reset(there_writer)
        reset(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(self.piece):
            await asyncio.sleep(self.delay)
            if self.left is not None:
                data, self.left = data[: self.left], max(self.left - len(data), 0)
                if self.resets and not self.left:
                    raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def cut(self) -> None:
        """Reset all connections."""
        for end in self.ends:
            reset(end)


def reset(end: Any) -> None:
    """Cut a connection with a RST: what a StreamWriter or a websocket of the library stands on."""
    under = end.transport.get_extra_info("socket")
    if not end.transport.is_closing():
        under.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.transport.abort()


@asynccontextmanager
async def wire(target: int) -> AsyncIterator[Wire]:
    """A wire that is good until it is told otherwise."""
    bad = Wire(target)
    listener = await asyncio.start_server(bad.carry, "127.0.0.1", 0)
    bad.port = listener.sockets[0].getsockname()[1]
    try:
        yield bad
    finally:
        listener.close()
        bad.cut()
        await asyncio.gather(*bad.tasks)


@contextmanager
def silence() -> Iterator[str]:
    """The address of a server that takes every connection and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=512)) as listener:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/ocpp"


# ---------------------------------------------------------------------------------------------------------
# The proxy
# ---------------------------------------------------------------------------------------------------------


class House:
    """The script in a process of its own; its ini, its log and its state file are in one folder."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, object],
        place: Place = HERE,
        before: tuple[str, ...] = (),
        stderr: int | None = None,
        more: str = "",
    ) -> None:
        self.folder = folder
        self.place = place
        self.before = before  # A command that runs the one that follows it.
        self.stderr = stderr  # None: the log file.
        self.log = folder / "proxy.log"
        self.bent = folder / "bent"  # For tests/play/shims: filled by those who bend something.
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None
        (folder / "proxy.ini").write_text(ini_of({"port": self.port, **SETTINGS, **settings}) + more)

    async def start(self) -> None:
        """Start it and wait until it listens."""
        command = [*self.place.prefix, *self.before, sys.executable, str(SCRIPT)]
        command += ["--config", str(self.folder / "proxy.ini")]
        with self.log.open("ab") as log:
            stderr = log.fileno() if self.stderr is None else self.stderr
            self.process = await asyncio.create_subprocess_exec(
                *command, cwd=self.folder, stderr=stderr, env=self._environment()
            )
        async with within(10, "the proxy listens"):
            while not await self._listens():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        if not self.bent.exists():
            return dict(os.environ)
        path = os.pathsep.join([str(SHIMS), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "BENT": str(self.bent)}

    async def _listens(self) -> bool:
        probe = self.place.socket()
        with closing(probe):
            try:
                await asyncio.get_running_loop().sock_connect(probe, (self.place.address, self.port))
            except OSError:
                return False
            return True

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def megabytes(self) -> float:
        """Return what it holds of the machine's memory."""
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, check=True)
        return int(done.stdout) / 1024

    def told(self, words: str) -> list[str]:
        """Return the lines of the log that have these words in them."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if words in line]

    async def stop(self) -> Stopwatch:
        """End it as a person does; it has to end in time, with exit code 0."""
        assert self.process is not None
        async with within(STOP_SECONDS, "the proxy ends after SIGTERM") as watch:
            self.process.terminate()
            code = await self.process.wait()
        check(code == 0, f"the proxy ended with exit code {code}")
        return watch

    async def kill(self) -> None:
        """Kill it; nothing happens if it has ended already."""
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


def ini_of(settings: dict[str, object], status_port: int = 0) -> str:
    """Return an ini with these settings, each in its section."""
    text = f"[status]\nport = {status_port}\n"
    for section in ("logging", "host", "ext-server"):
        named = [name for name in settings if name in p.SECTIONS[section]]
        text += f"[{section}]\n" + "".join(f"{name} = {settings[name]}\n" for name in named)
    return text


@asynccontextmanager
async def house(folder: Path, primary: str, secondary: str = "", **options: Any) -> AsyncIterator[House]:
    """The proxy, between servers of these addresses; what it did not expect breaks a promise."""
    where = {name: options.pop(name) for name in ("place", "before", "stderr", "more") if name in options}
    settings = {"server": primary, "secondary_server": secondary, **options}
    proxy = House(folder, settings, **where)
    try:
        await proxy.start()
        yield proxy
        errors = proxy.told(" ERROR ") + proxy.told("Traceback")
        check(not errors, f"the log says: {errors[:1]}")
    finally:
        await proxy.kill()


@asynccontextmanager
async def full_house(folder: Path, **options: Any) -> AsyncIterator[tuple[House, FakeServer, FakeServer]]:
    """The proxy between a primary and a secondary that are well."""
    async with server() as primary, server() as secondary:
        async with house(folder, primary.url, secondary.url, **options) as proxy:
            yield proxy, primary, secondary


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process, and the proxy that it starts, have many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def full_disk(proxy: House) -> Iterator[None]:
    """Let the small disk of a proxy that has one be full."""
    filler = Path(f"/proc/{proxy.pid}/root{proxy.folder}/disk/filler")
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    try:
        yield
    finally:
        filler.unlink()


def small_disk(folder: Path, command: str = 'exec "$0" "$@"') -> tuple[str, ...]:
    """Return what a command begins with that is to find a disk of 1 MB in its folder."""
    (folder / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1m none '{folder}/disk'"
    return "unshare", "--mount", "sh", "-c", f"{mount} && {command}"


@contextmanager
def lookup(folder: Path, trouble: str, *hosts: str) -> Iterator[None]:
    """Let the look-up of these names of `example` hang or fail, in a proxy that is started with it."""
    bend_clock(folder, 0)
    for host in hosts:
        (folder / "bent" / host).write_text(trouble)
    try:
        yield
    finally:
        for host in hosts:
            (folder / "bent" / host).unlink()
            (folder / "bent" / f"{host}.asked").unlink(missing_ok=True)


async def is_asked(folder: Path, host: str) -> None:
    """Wait until a look-up of this name hangs."""
    await eventually((folder / "bent" / f"{host}.asked").exists)


def bend_clock(folder: Path, seconds: float) -> None:
    """Set the wall clock of a proxy that is, or has been, started with it."""
    (folder / "bent").mkdir(exist_ok=True)
    fresh = folder / "bent" / "clock.new"
    fresh.write_text(str(seconds))
    fresh.replace(folder / "bent" / "clock")


# ---------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------


class PlacedServer(FakeServer):
    """A server in a place."""

    def __init__(self, place: Place = HERE, answers: Answers | None = accepting) -> None:
        super().__init__(answers)
        self.place = place

    @property
    def url(self) -> str:
        return f"ws://{self.place.address}:{self.port}/ocpp"

    def where(self) -> dict[str, Any]:
        listening = self.place.socket()
        listening.bind((self.place.address, self.port))
        return {"sock": listening}


@asynccontextmanager
async def server(place: Place = HERE, answers: Answers | None = accepting) -> AsyncIterator[PlacedServer]:
    """A server that listens."""
    fake = PlacedServer(place, answers)
    await fake.start()
    try:
        yield fake
    finally:
        await fake.stop()


@asynccontextmanager
async def away(fake: FakeServer) -> AsyncIterator[None]:
    """Let nobody listen at the server's port for a while."""
    await fake.stop()
    try:
        yield
    finally:
        await fake.start()


async def connected(
    proxy: House, charger_id: str, place: Place | None = None, port: int = 0
) -> ClientConnection:
    """Return a charger's websocket. Raises InvalidStatus for a refusal."""
    address = (place or proxy.place) and proxy.place.address
    under = (place or proxy.place).socket()
    try:
        await asyncio.get_running_loop().sock_connect(under, (address, port or proxy.port))
    except BaseException:
        under.close()
        raise
    return await connect(
        f"ws://{address}/{charger_id}",
        sock=under,
        subprotocols=[Subprotocol("ocpp1.6")],
        ping_interval=None,
        close_timeout=0.5,
        open_timeout=30,
    )


@asynccontextmanager
async def charger(proxy: House, charger_id: str = "CP1", **where: Any) -> AsyncIterator[FakeCharger]:
    """A charger that is connected to the proxy and has booted."""
    connection = await connected(proxy, charger_id, **where)
    fake = FakeCharger(connection)
    try:
        await fake.boots()
        yield fake
    finally:
        await connection.close()
        await fake.listener


async def refusal(proxy: House, charger_id: str = "CP1", **where: Any) -> tuple[int, dict[str, str]]:
    """Return status and headers that refuse a charger; 101 if it gets in."""
    try:
        connection = await connected(proxy, charger_id, **where)
    except InvalidStatus as error:
        return error.response.status_code, dict(error.response.headers.raw_items())
    await connection.close()
    return 101, {}


@asynccontextmanager
async def attempts(work: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[asyncio.Future[list[T]]]:
    """Let work go on in the background; yield what waits for all of it. Whatever is left is cancelled."""
    all_of_it = asyncio.gather(*work)
    try:
        yield all_of_it
    finally:
        all_of_it.cancel()
        await asyncio.gather(all_of_it, return_exceptions=True)


@asynccontextmanager
async def chargers(proxy: House, number: int) -> AsyncIterator[list[FakeCharger]]:
    """Many chargers at once."""
    async with AsyncExitStack() as stack:
        names = [f"MANY-{n}" for n in range(number)]
        yield await asyncio.gather(*(stack.enter_async_context(charger(proxy, name)) for name in names))


def start_of(badge: str, connector: int = 1) -> dict[str, Any]:
    return {"connectorId": connector, "idTag": badge, "meterStart": 0, "timestamp": "2026-01-01T00:00:00Z"}


async def starts(fake: FakeCharger, badge: str, connector: int = 1) -> int:
    """Start a session; return the transaction id."""
    answer = await fake.calls(f"start {badge}", "StartTransaction", **start_of(badge, connector))
    number: int = answer["transactionId"]
    return number


async def ends(fake: FakeCharger, badge: str, number: int, connector: int = 1) -> None:
    """Read the meter and stop the session."""
    await fake.calls(
        f"meter {badge}", "MeterValues", connectorId=connector, transactionId=number, meterValue=[]
    )
    await stops(fake, badge, number)


async def stops(fake: FakeCharger, badge: str, number: int) -> None:
    told = {"transactionId": number, "idTag": badge, "meterStop": 5, "timestamp": "2026-01-01T01:00:00Z"}
    await fake.calls(f"stop {badge}", "StopTransaction", **told)


async def charges(fake: FakeCharger, badge: str, connector: int = 1) -> None:
    """Play a whole session."""
    await ends(fake, badge, await starts(fake, badge, connector), connector)


def of_badge(heard: Hearing, badge: str) -> list[str]:
    """Return the Actions with this badge that a server has heard."""
    return [m[2] for m in heard.messages if m[0] == 2 and m[3].get("idTag") == badge]


async def delivered(peer: FakeServer | PeerProcess, badge: str) -> Stopwatch:
    """Wait until a server has a whole session: once, in order. Return how long it took."""
    end = {"idTag": badge, "meterStop": 5}
    async with within(REDIAL_SECONDS + SLACK, f"the session of {badge} arrives") as watch, peer.heard.changed:
        while not any(m[0] == 2 and m[3].items() >= end.items() for m in peer.heard.messages):
            await peer.heard.changed.wait()
    told = of_badge(peer.heard, badge)
    check(told == ["StartTransaction", "StopTransaction"], f"the server has {told} of the session")
    return watch


# ---------------------------------------------------------------------------------------------------------
# A peer in a process of its own
# ---------------------------------------------------------------------------------------------------------


class PeerProcess:
    """A server or a charger that can be stopped like any process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.heard = Hearing()

    async def listen(self) -> None:
        """Take note of what it hears."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            await self.heard.add(json.loads(line))

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let it do nothing for a while; the system goes on answering for it."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def peer_process(kind: str, port: int) -> AsyncIterator[PeerProcess]:
    """A `server` at a port, or a `charger` or `flood` towards one, once it is at work."""
    command = [sys.executable, "-m", "tests.play.rig", kind, str(port)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    peer = PeerProcess(process)
    listening = asyncio.create_task(peer.listen())
    try:
        await peer.heard.until(lambda m: m == ["ready"])
        yield peer
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await listening


class ToldHearing(Hearing):
    """Tells the tests of the Calls that a peer in a process of its own hears."""

    async def add(self, message: Any) -> None:
        if message[0] not in (3, 4):
            print(json.dumps(message), flush=True)


class CallingServer(FakeServer):
    """A server that calls chargers of one name as often as is taken."""

    async def _talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        is_one = connection.request.path.endswith("FLOOD")
        async with attempts([self._flood(connection)] if is_one else []):
            await super()._talk(connection)

    async def _flood(self, connection: ServerConnection) -> None:
        for number in itertools.count():
            await connection.send(json.dumps([2, f"{number}", "GetLocalListVersion", {}]))


async def be_server(port: int) -> None:
    fake = CallingServer()
    fake.port, fake.heard = port, ToldHearing()
    await fake.start()
    await fake.heard.add(["ready"])
    await asyncio.Event().wait()


async def be_charger(port: int) -> None:
    """Boot, and listen until it is killed."""
    fake = FakeCharger(await connect(f"ws://127.0.0.1:{port}/ASLEEP", subprotocols=[Subprotocol("ocpp1.6")]))
    await fake.boots()
    fake.heard = ToldHearing()
    await fake.heard.add(["ready"])
    await fake.connection.wait_closed()


async def be_flood(port: int) -> None:
    """Call the server as often as is taken, until it is killed or closed."""
    fake = FakeCharger(await connect(f"ws://127.0.0.1:{port}/FLOOD", subprotocols=[Subprotocol("ocpp1.6")]))
    fake.heard = ToldHearing()
    await fake.heard.add(["ready"])
    for number in itertools.count():
        await fake.connection.send(json.dumps([2, f"{number}", "DataTransfer", {"vendorId": "flood"}]))


KINDS = {"server": be_server, "charger": be_charger, "flood": be_flood}

if __name__ == "__main__":
    asyncio.run(KINDS[sys.argv[1]](int(sys.argv[2])))
