"""The script in a process of its own, real peers around it, and what a `with` block can break."""

from __future__ import annotations

import asyncio
import functools
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.play import peers
from tests.play.peers import FakeCharger, FakeServer, free_port
from tests.play.processes import call_linux, let_go

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ocpp_2w_proxy.py"
INSIDE = ("-m", "tests.play.inside")  # The script with something inside.

REDIAL_SECONDS = 72.0  # The longest pause between two dials of the secondary.
SLACK = 10.0  # Seconds that a machine with other work may take on top of what is promised.
STOP_SECONDS = 5.0  # For the proxy to end, whatever its peers do.

# What the promises name, short enough to be waited for.
SETTINGS: dict[str, object] = {"watchdog_stale": 2, "watchdog_interval": 0.2}
SETTINGS |= {"ping_interval": 0.5, "ping_timeout": 1, "call_timeout": 2, "primary_grace": 2}
SETTINGS |= {"primary_rfid": "PRIM*", "secondary_rfid": "SECO*"}
PING_SECONDS = 1.5  # ping_interval + ping_timeout.


def table(rows: Sequence[tuple[object, ...]]) -> str:
    """Return a table in Markdown, its head first."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    head, *rest = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


class Stopwatch:
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
        raise AssertionError(f"not within {watch}: {what}") from None
    watch.stopped = time.monotonic()


# Places: this machine, or a network namespace of its own.

CLONE_NEWNET = 0x40000000


@contextmanager
def home() -> Iterator[None]:
    """Come back to the network namespace that the tests run in."""
    with Path("/proc/thread-self/ns/net").open() as file:
        try:
            yield
        finally:
            call_linux("setns", file.fileno(), CLONE_NEWNET)


class Place:
    """Where peers have their sockets, and the proxy runs."""

    def __init__(self, address: str, namespace: int | None = None) -> None:
        self.address = address
        self.namespace = namespace  # A file descriptor; None = the one that the tests run in.
        self.path = f"/proc/{os.getpid()}/fd/{namespace}"
        # What a command begins with that is to run here.
        self.prefix = [] if namespace is None else ["nsenter", f"--net={self.path}"]

    def run(self, command: str) -> None:
        subprocess.run([*self.prefix, "sh", "-c", command], check=True, capture_output=True)

    def socket(self, port: int = 0) -> socket.socket:
        """Return a socket of this place, at this port; it stays one wherever it is used."""
        if self.namespace is None:
            fresh = socket.socket()
        else:
            with home():
                call_linux("setns", self.namespace, CLONE_NEWNET)
                fresh = socket.socket()
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fresh.setblocking(False)
        fresh.bind((self.address, port))
        return fresh


HERE = Place("127.0.0.1")


def new_namespace() -> int:
    """Return a network namespace, which lives as long as this file descriptor. Raises OSError."""
    with home():
        call_linux("unshare", CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


@contextmanager
def two_places() -> Iterator[tuple[Place, Place]]:
    """Two network namespaces with a cable between them: where the proxy is, and where it is not."""
    namespaces = new_namespace(), new_namespace()
    near, far = Place("10.77.0.1", namespaces[0]), Place("10.77.0.2", namespaces[1])
    near.run(f"ip link add cable type veth peer name cable netns {far.path}")
    for place in (near, far):
        place.run(f"ip link set lo up; ip address add {place.address}/24 dev cable; ip link set cable up")
    try:
        yield near, far
    finally:
        for namespace in namespaces:
            os.close(namespace)


@contextmanager
def unplugged(far: Place) -> Iterator[None]:
    """Pull the cable: nothing gets through and nobody is told."""
    far.run("ip link set cable down")
    try:
        yield
    finally:
        far.run("ip link set cable up")


@functools.cache
def is_root_here() -> bool:
    """Return whether namespaces and mounts can be made."""
    command = "mount -t tmpfs none /mnt && ip link add cable type veth peer name other"
    with suppress(OSError):
        return not subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", command], capture_output=True
        ).returncode
    return False


# The proxy.


class House:
    """The script in a process of its own; its ini, its log and its state file are in one folder."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, object],
        place: Place = HERE,
        before: tuple[str, ...] = (),
        program: tuple[str, ...] = (str(SCRIPT),),
        more: str = "",
    ) -> None:
        self.folder = folder
        self.place = place
        self.before = before  # A command that runs the one that follows it.
        self.program = program
        self.log = folder / "proxy.log"
        self.bent = folder / "bent"  # For tests/play/shims: filled by those who bend something.
        self.port = int(str(settings.get("port") or free_port()))
        self.process: asyncio.subprocess.Process | None = None
        (folder / "proxy.ini").write_text(ini_of({**settings, "port": self.port}) + more)

    async def start(self, *arguments: str, is_awaited: bool = True) -> None:
        """Start it and wait until it listens."""
        command = [*self.place.prefix, *self.before, sys.executable, *self.program]
        command += ["--config", str(self.folder / "proxy.ini"), *arguments]
        paths = [str(ROOT / "tests" / "play" / "shims")] * self.bent.exists() + [str(ROOT)]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.folder,
                stdout=asyncio.subprocess.PIPE if self.program is INSIDE else None,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "BENT": str(self.bent)},
                preexec_fn=let_go,
                limit=2**20,
            )
        if is_awaited:
            async with within(10, "the proxy listens"):
                while not await self._listens():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    async def _listens(self) -> bool:
        with closing(self.place.socket()) as probe, suppress(OSError):
            await asyncio.get_running_loop().sock_connect(probe, (self.place.address, self.port))
            return True
        return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def told(self, words: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if words in line]

    async def stop(self, seconds: float = STOP_SECONDS) -> Stopwatch:
        """End it as a person does; it has to end in time, with exit code 0."""
        assert self.process is not None
        async with within(seconds, "the proxy ends after SIGTERM") as watch:
            self.process.terminate()
            code = await self.process.wait()
        assert code == 0, f"the proxy ended with exit code {code}"
        return watch

    async def kill(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def haproxy(folder: Path, config: str, before: tuple[str, ...] = ()) -> AsyncIterator[int]:
    """HAProxy with this configuration; its process id."""
    (folder / "haproxy.cfg").write_text(config)
    command = (*before, "haproxy", "-db", "-f", str(folder / "haproxy.cfg"))
    silent = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=silent, stderr=silent, preexec_fn=let_go)
    try:
        yield process.pid
    finally:
        process.kill()
        await process.wait()


def kibibytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, to the nanosecond."""
    # What clock_getcpuclockid(3) returns, for which Python has no name.
    return time.clock_gettime(~pid << 3 | 2)


def ini_of(settings: dict[str, object]) -> str:
    """Return an ini with these settings, each in its section, and without a status page."""
    lines = {"status": "port = 0\n"}
    for key, value in settings.items():
        section = "logging" if key in ("proxy", "rfid") else "host"
        section = "ext-server" if key.startswith(("server", "primary_", "secondary_")) else section
        lines[section] = lines.get(section, "") + f"{key} = {value}\n"
    return "".join(f"[{section}]\n{told}" for section, told in lines.items())


@asynccontextmanager
async def house(folder: Path, primary: str, secondary: str = "", **options: Any) -> AsyncIterator[House]:
    """The proxy, between servers of these addresses; what it did not expect breaks a promise."""
    where = {name: options.pop(name) for name in ("place", "before") if name in options}
    address = where.get("place", HERE).address
    servers = {"server": primary, "secondary_server": secondary}
    proxy = House(folder, {"addr": address, **SETTINGS, **servers, **options}, **where)
    try:
        await proxy.start()
        yield proxy
        errors = proxy.told(" ERROR ") + proxy.told("Traceback")
        assert not errors, f"the log says: {errors[:1]}"
    finally:
        await proxy.kill()


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process, and the proxy that it starts, have many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def small_disk(folder: Path, command: str = 'exec "$0" "$@"') -> tuple[str, ...]:
    """Return what a command begins with that is to find a disk of 1 MB in its folder."""
    (folder / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1m none '{folder}/disk'"
    return "unshare", "--mount", "sh", "-c", f"{mount} && {command}"


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


@contextmanager
def lookup(folder: Path, trouble: str, host: str) -> Iterator[None]:
    """Let the look-up of a name of `example` hang or fail, in a proxy that is started with a bent clock."""
    (folder / "bent" / host).write_text(trouble)
    try:
        yield
    finally:
        (folder / "bent" / host).unlink()
        (folder / "bent" / f"{host}.asked").unlink(missing_ok=True)


def bend_clock(folder: Path, seconds: float) -> None:
    """Set the wall clock of a proxy that is, or has been, started with it."""
    (folder / "bent").mkdir(exist_ok=True)
    fresh = folder / "bent" / "clock.new"
    fresh.write_text(str(seconds))
    fresh.replace(folder / "bent" / "clock")


# Peers.


async def reached(proxy: House, place: Place | None = None) -> dict[str, Any]:
    """Return how a charger at this place, or else the proxy's own, connects to it."""
    address, under = proxy.place.address, (place or proxy.place).socket()
    try:
        await asyncio.get_running_loop().sock_connect(under, (address, proxy.port))
    except BaseException:
        under.close()
        raise
    return {"at": address, "sock": under, "open_timeout": 30}


@asynccontextmanager
async def charger(
    proxy: House, charger_id: str = "CP1", place: Place | None = None
) -> AsyncIterator[FakeCharger]:
    """A charger that is connected to the proxy and has booted."""
    async with peers.charger(proxy, charger_id, **await reached(proxy, place)) as fake:
        await fake.boots()
        yield fake


async def refusal(proxy: House, charger_id: str = "CP1") -> tuple[int, dict[str, str]]:
    return await peers.refusal(proxy.port, charger_id, **await reached(proxy))


async def delivered(peer: FakeServer, badge: str) -> Stopwatch:
    """Wait until a server has a whole session: once, in order. Return how long it took."""
    end = {"idTag": badge, "meterStop": 5}
    async with within(REDIAL_SECONDS + SLACK, f"the session of {badge} arrives") as watch, peer.heard.changed:
        while not any(m[0] == 2 and m[3].items() >= end.items() for m in peer.heard.messages):
            await peer.heard.changed.wait()
    told = [m[2] for m in peer.heard.messages if m[0] == 2 and m[3].get("idTag") == badge]
    assert told == ["StartTransaction", "StopTransaction"], f"the server has {told} of the session"
    return watch
