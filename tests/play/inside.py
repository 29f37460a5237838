"""
The proxy with something inside: shorter times, a death at a chosen moment, and a count of its objects.

    python -m tests.play.inside --config INI [--times WORDS] [--death POINT NUMBER PORT]

It dies by its own hand where the system is called (a commit of sqlite, a socket's send and recv), so that it
needs nothing of the script's own code. On SIGUSR1 it prints what there is of the script's objects, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
import socket
import sqlite3
import sys
from ast import literal_eval
from collections import Counter, deque
from itertools import chain, count
from typing import Any

import ocpp_2w_proxy as p
from tests.play.frames import texts

COMMITTED = "between commit and answer"
ANSWERED = "between answer and delivery"
DELIVERED = "between the server's answer and its record"
POINTS = [COMMITTED, ANSWERED, DELIVERED]
STORED = {"StartTransaction", "StopTransaction", "MeterValues", "TransactionEvent"}  # At a secondary.
TASKS = "asyncio tasks"


def hurry(times: str) -> None:
    """Set what the proxy waits for, such as `TICK=0.1 RETRY=(1,2)`; a table of times keeps its keys."""
    for name, _, text in (word.partition("=") for word in times.split()):
        old, new = getattr(p, f"{name}_SECONDS"), literal_eval(text)
        setattr(p, f"{name}_SECONDS", dict(zip(old, new, strict=True)) if isinstance(old, dict) else new)


def die_at_commit(number: int) -> None:
    """Die when the n-th commit is on disk, and nobody has heard of it."""
    passes, connect = count(1), sqlite3.connect

    class Mortal(sqlite3.Connection):
        def __exit__(self, *error: Any) -> Any:
            result = super().__exit__(*error)
            self._passed()
            return result

        def commit(self) -> None:
            super().commit()
            self._passed()

        def _passed(self) -> None:
            if next(passes) == number:
                signal.raise_signal(signal.SIGKILL)

    sqlite3.connect = lambda *where, **how: connect(*where, **{**how, "factory": Mortal})


def die_on_the_wire(point: str, number: int, port: int) -> None:
    """Die before the n-th stored Call is sent to this port, or when the n-th answer to one has been read."""
    passes, delivered = count(1), set[str]()
    send, recv_into = socket.socket.send, socket.socket.recv_into

    def is_server(end: socket.socket) -> bool:
        try:
            return bool(end.getpeername()[1] == port)
        except (OSError, IndexError):
            return False

    def passing_send(self: socket.socket, data: Any, *more: Any) -> int:
        for text in texts(bytes(data)) if is_server(self) else ():
            message = json.loads(text)
            if message[0] == 2 and message[2] in STORED:
                delivered.add(message[1])
                if point == ANSWERED and next(passes) == number:
                    signal.raise_signal(signal.SIGKILL)
        return send(self, data, *more)

    def passing_recv(self: socket.socket, buffer: Any, *more: Any) -> int:
        size = recv_into(self, buffer, *more)
        for text in texts(bytes(memoryview(buffer)[:size])) if is_server(self) else ():
            message = json.loads(text)
            if message[0] != 2 and message[1] in delivered and point == DELIVERED and next(passes) == number:
                signal.raise_signal(signal.SIGKILL)
        return size

    socket.socket.send, socket.socket.recv_into = passing_send, passing_recv  # type: ignore


def size(value: Any) -> int:
    """Return how many things a container holds, with those in the containers in it."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | set | deque):
        return 1
    return sum(map(size, value))


def contents() -> Counter[str]:
    found: Counter[str] = Counter()
    for item in gc.get_objects():
        kind = type(item)
        if kind.__module__ == p.__name__ and not issubclass(kind, BaseException):
            found[kind.__name__] += 1
            for name in chain(getattr(item, "__dict__", ()), getattr(kind, "__slots__", ())):
                value = getattr(item, name, None)
                if isinstance(value, dict | list | set | deque):
                    found[f"{kind.__name__}.{name}"] += size(value)
    return found


def tell(*_: Any) -> None:
    """Print what there is, once Python has removed what nobody can reach."""
    gc.collect()
    print(json.dumps({TASKS: len(asyncio.all_tasks()), **contents()}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--times", default="")
    parser.add_argument("--death", nargs=3, metavar=("POINT", "NUMBER", "PORT"), default=("", 0, 0))
    options = parser.parse_args()
    hurry(options.times)
    point, number, port = options.death
    if point == COMMITTED:
        die_at_commit(int(number))
    elif point in POINTS:
        die_on_the_wire(point, int(number), int(port))
    signal.signal(signal.SIGUSR1, tell)
    sys.argv[1:] = ["--config", options.config]
    return p.main()


if __name__ == "__main__":
    sys.exit(main())
