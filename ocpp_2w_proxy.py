#!/usr/bin/env python3
"""
ocpp-2w-proxy: one EV charger, two OCPP servers; the badge that starts a session decides whose it is.

                                                ┌───────────────┐
                       ┌───────────────┐  ┌────►│    primary    │  home, site: every Call that is
    ┌─────────┐        │ ocpp-2w-proxy │  │     └───────────────┘  not the secondary's, and its answers
    │ charger │◄──────►│    routing    │◄─┤
    └─────────┘        │     table     │  │     ┌───────────────┐
      its only         └───────────────┘  └────►│   secondary   │  employer: the sessions of its badges,
      server                                    └───────────────┘  recorded here, delivered in order

The five rules (OCPP-J: a Call is type 2, a CallResult 3, a CallError 4)

    | # | from      | what      | goes to                                                            |
    |---|-----------|-----------|--------------------------------------------------------------------|
    | 1 | charger   | Call      | its owner: by transaction, remote start, badge, connector, request;|
    |   |           |           | else the primary                                                   |
    | 2 | primary   | answer    | the charger                                                        |
    | 3 | secondary | answer    | nobody: the proxy has answered (or the charger, with `forward`)    |
    | 4 | servers   | Call      | the charger, one at a time, its message id noted                   |
    | 5 | charger   | answer    | the server that sent the Call                                      |

Lifetimes

    Proxy    the process         listens, admits chargers, wakes the relays whose deadlines have come
    Relay    one charger         its link and an outbox for each of its servers; outlives a reconnect
    Outbox   one server of it    one queue, one Call in flight, redialled for as long as it is needed
    Link     one websocket       bytes in, texts out; says once that it is closed
    Router   one charger         decides, and does nothing else: no socket, no clock, no log
    Memory   one charger         sessions, claims, stored Calls; in the Journal, whatever else dies
    Status   the process         looks at all of this on a second port, and changes none of it

Read it from top to bottom: each section uses only those above it. Text passes as it came; the proxy
changes a message only where an id has to be translated, and then nothing else in it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import difflib
import gc
import hashlib
import heapq
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import sys
import textwrap
import threading
import time
import urllib.parse
import uuid
from collections import Counter, deque
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from http import HTTPStatus
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, SupportsIndex

try:
    import resource
except ImportError:  # Windows.
    resource = None  # type: ignore[assignment]

import websockets
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.frames import Frame, Opcode, apply_mask  # type: ignore[attr-defined]
from websockets.http11 import Request, Response
from websockets.protocol import SEND_EOF, Side, State
from websockets.server import ServerProtocol
from websockets.streams import StreamReader
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI, parse_uri

__version__ = "1.0.0"

log = logging.getLogger("proxy")


class Peer(Enum):
    """Who sends a message."""

    CHARGER = "charger"
    PRIMARY = "primary"
    SECONDARY = "secondary"
    PROXY = "proxy"

    __hash__ = object.__hash__  # Enum's own is slow, and this one is looked up for every message.


SERVERS = (Peer.PRIMARY, Peer.SECONDARY)

# ---------------------------------------------------------------------------------------------------------
# Configuration
#
# The ini, read once into frozen dataclasses. Every mistake is a ConfigError of one line that names the
# file, the line, what is wrong and what is expected.
# ---------------------------------------------------------------------------------------------------------

LOCAL = "local"  # As a server's address: the proxy itself is the server.
VERSIONS = ("ocpp2.1", "ocpp2.0.1", "ocpp1.6")


class ConfigError(Exception):
    """A mistake in the ini, as one line for stderr."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One of the two servers, as one charger uses it."""

    url: str  # ws:// or wss:// without a trailing slash, or LOCAL.
    id: str  # Replaces the charger's id towards this server; "" = the charger's own.
    user: str  # Basic login; "" = the id, if there is a password.
    password: str
    auth: str  # "forward": the charger's own Authorization is shown to this server; "none".
    ca: str  # Path of the certificates that this server is verified against; "" = the system's.
    cert: str  # Path of the proxy's client certificate.
    key: str  # Path of its key; "" = in the same file.

    @property
    def is_local(self) -> bool:
        """Whether the proxy itself is this server."""
        return self.url == LOCAL

    @property
    def needs_charger_login(self) -> bool:
        """Whether only the charger's own login opens this server."""
        return self.auth == "forward" and not self.user and not self.password


@dataclass(frozen=True, slots=True)
class BadgeLists:
    """The lists `primary_rfid` and `secondary_rfid`."""

    exact: dict[str, Peer]  # By normalized badge.
    patterns: tuple[tuple[str, Peer], ...]  # Normalized shell patterns, the longest first.
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)  # Where each stands in the ini.

    def find(self, badge: str) -> Peer | None:
        """Return the server that has the badge on its list."""
        entry = self.entry(badge)
        return None if entry is None else self.exact.get(entry) or dict(self.patterns)[entry]

    def entry(self, badge: str) -> str | None:
        """Return the entry of the lists that speaks for the badge."""
        name = normalized(badge)
        matching = (entry for entry, _ in self.patterns if fnmatchcase(name, entry))
        return name if name in self.exact else next(matching, None)


@dataclass(frozen=True, slots=True)
class ChargerConfig:
    """What `[ext-server]` and the charger's own section say for one charger."""

    primary: ServerConfig
    secondary: ServerConfig | None
    badges: BadgeLists
    unknown_rfid: str  # "primary", "secondary" or "reject".
    secondary_replies: str  # "ignore" or "forward".
    secondary_copies: frozenset[str]  # Actions.
    secondary_refuse: frozenset[str]  # Actions.
    primary_grace: float  # Seconds.
    versions: tuple[str, ...]  # Subprotocols.
    password: str  # What the charger itself has to show; "" = nothing.
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)  # Where each key stands in the ini.

    def server(self, peer: Peer) -> ServerConfig | None:
        """Return one of the two servers."""
        return self.primary if peer is Peer.PRIMARY else self.secondary


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The section `[host]`: what chargers meet. Times in seconds."""

    addr: str
    port: int
    cert_chain: str
    cert_key: str
    client_ca: str
    password: str
    chargers: tuple[str, ...]
    watchdog_stale: float
    watchdog_interval: float
    ping_interval: float
    ping_timeout: float
    call_timeout: float
    max_size: int
    state: str

    def admits(self, charger_id: str) -> bool:
        """Whether a charger of this id may connect."""
        return any(fnmatchcase(charger_id, pattern) for pattern in self.chargers)


@dataclass(frozen=True, slots=True)
class StatusConfig:
    """The section `[status]`: the second port."""

    addr: str
    port: int
    password: str


@dataclass(frozen=True, slots=True)
class Config:
    """The whole ini."""

    levels: dict[str, str]  # Logger name to level name.
    full_badges: bool  # Badges are logged in full.
    host: HostConfig
    status: StatusConfig
    default: ChargerConfig
    chargers: dict[str, ChargerConfig]  # By charger id: those that have a section of their own.
    warnings: tuple[str, ...]  # What is doubtful but no mistake, a line each.

    def charger(self, charger_id: str) -> ChargerConfig:
        """Return what is valid for one charger."""
        return self.chargers.get(charger_id, self.default)


BLANKS = "".join(map(chr, range(33)))  # Some readers append control characters to a badge.


def normalized(badge: str) -> str:
    """Return the badge as it is compared: without surrounding blanks and without case."""
    return badge.strip(BLANKS).casefold()


def masked(badge: str) -> str:
    """Return what may be logged of a badge: enough to tell one's own cards apart."""
    return f"****{badge[-4:]}" if len(badge) >= 8 else "****"


UNPRINTABLE = re.compile(r"[^ -~]")


def escaped(text: str) -> str:
    """Return the text as one line of printable ASCII."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


# Readers of one value each. They raise ValueError with what was expected.


def read_text(value: str) -> str:
    return value


def read_words(value: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[,\s]+", value) if word)


def read_patterns(value: str) -> tuple[str, ...]:
    """Read a list split at commas and lines only, because charger ids may hold blanks."""
    return tuple(word.strip() for word in re.split(r"[,\n]", value) if word.strip())


def read_level(value: str) -> str:
    level = value.upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError("expected DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return level


def read_url(value: str) -> str:
    """Read a server's address; return it without trailing slashes."""
    if value.lower() in ("", LOCAL):
        return value.lower()
    try:
        uri = parse_uri(value if value.split() == [value] else "")
    except (ValueError, InvalidHandshake, websockets.InvalidURI):
        raise ValueError(f"expected ws://HOST[:PORT]/PATH, wss://HOST[:PORT]/PATH or {LOCAL}") from None
    if uri.user_info or "@" in urllib.parse.urlsplit(value).netloc:
        raise ValueError("credentials do not belong in the address: use the keys *_user and *_password")
    if uri.query:
        raise ValueError("expected an address without a query: the charger's id is appended to it")
    return value.rstrip("/")


def read_id(value: str) -> str:
    if value and not is_charger_id(value):
        raise ValueError(f"expected {CHARGER_ID}")
    return value


def read_versions(value: str) -> tuple[str, ...]:
    versions = read_words(value.lower())
    if not versions or not set(versions) <= set(VERSIONS):
        raise ValueError(f"expected some of {', '.join(VERSIONS)}")
    return versions


def reader_of_choice(*choices: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in choices:
            raise ValueError(f"expected {' or '.join(choices)}")
        return value.lower()

    return read


def reader_of_number(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"\d{1,10}", value, re.ASCII) or not low <= int(value) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(value)

    return read


def reader_of_seconds(low: float, high: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        number = re.fullmatch(r"(\d{1,10}(?:\.\d{1,6})?)\s*s?", value, re.ASCII)
        if not number or not low <= float(number[1]) <= high:
            raise ValueError(f"expected seconds from {low:g} to {high:g}")
        return float(number[1])

    return read


class Key(NamedTuple):
    """One key of the ini: its default as it would be written, and its reader."""

    default: str
    read: Callable[[str], Any]
    is_path: bool = False  # Relative to the ini's folder.


FILE = Key("", read_text, is_path=True)
STATE = Key("ocpp-2w-proxy.db", read_text, is_path=True)
TEXT = Key("", read_text)
DAY = 86400.0

HOST_KEYS = {
    "addr": Key("0.0.0.0", read_text),
    "port": Key("8321", reader_of_number(0, 65535)),
    "cert_chain": FILE,
    "cert_key": FILE,
    "client_ca": FILE,
    "password": TEXT,
    "chargers": Key("*", read_patterns),
    "watchdog_stale": Key("500", reader_of_seconds(1, 7 * DAY)),
    "watchdog_interval": Key("10", reader_of_seconds(0.1, DAY)),
    "ping_interval": Key("30", reader_of_seconds(0.1, DAY)),
    "ping_timeout": Key("60", reader_of_seconds(0.1, DAY)),
    "call_timeout": Key("30", reader_of_seconds(0.1, DAY)),
    "max_size": Key("1048576", reader_of_number(1024, 2**26)),
    "state": STATE,
}
SERVER_KEYS = {
    "server": Key("", read_url),
    "primary_rfid": Key("", read_words),
    "primary_id": Key("", read_id),
    "primary_user": TEXT,
    "primary_password": TEXT,
    "primary_auth": Key("forward", reader_of_choice("forward", "none")),
    "primary_ca": FILE,
    "primary_cert": FILE,
    "primary_key": FILE,
    "primary_grace": Key("15", reader_of_seconds(0, 3600)),
    "secondary_server": Key("", read_url),
    "secondary_rfid": Key("", read_words),
    "secondary_id": Key("", read_id),
    "secondary_user": TEXT,
    "secondary_password": TEXT,
    "secondary_auth": Key("none", reader_of_choice("forward", "none")),
    "secondary_ca": FILE,
    "secondary_cert": FILE,
    "secondary_key": FILE,
    "secondary_replies": Key("ignore", reader_of_choice("ignore", "forward")),
    "secondary_copies": Key("StatusNotification", read_words),
    "secondary_refuse": Key("", read_words),
    "unknown_rfid": Key("primary", reader_of_choice("primary", "secondary", "reject")),
    "versions": Key(", ".join(VERSIONS), read_versions),
}
CHARGER_KEYS = {**SERVER_KEYS, "password": TEXT}
STATUS_KEYS = {
    "addr": Key("127.0.0.1", read_text),
    "port": Key("8322", reader_of_number(0, 65535)),
    "password": TEXT,
}
LOGGING_KEYS = {
    "proxy": Key("INFO", read_level),
    "rfid": Key("masked", reader_of_choice("masked", "full")),
}
SECTIONS = {"logging": LOGGING_KEYS, "host": HOST_KEYS, "ext-server": SERVER_KEYS, "status": STATUS_KEYS}
CHARGER_SECTION = "charger "
CHARGER_ID = "1 to 48 of ASCII letters, digits, *-_=:+|@. and blanks, without quotes"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as it stands in the ini, and the number of its line."""

    value: str
    line: int
    pieces: tuple[int, ...] = ()  # The line of each line of the value.

    def numbered(self) -> Iterator[tuple[str, int]]:
        """Yield each line of the value with its number in the ini."""
        numbers = itertools.chain(self.pieces, itertools.repeat(self.line))  # A variable may hold more lines.
        return zip(self.value.split("\n"), numbers, strict=False)


Section = dict[str, Entry]


def first_word(line: str) -> str:
    """Return what may be shown of a line: behind a forgotten `=` there may be a password."""
    match = re.match(r"[\w.]*", line)
    return match[0] if match else ""


class Ini:
    """The text of an ini as sections of entries; raises ConfigError for what it cannot read."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.environment = environment
        self.sections: dict[str, Section] = {}
        self.lines: dict[str, int] = {}  # Where each section begins.

    def error(self, line: int, what: str) -> ConfigError:
        """Return a mistake at this line."""
        return ConfigError(f"{self.path}:{line}: {what}")

    def parse(self, text: str) -> None:
        """Fill `sections`. Raises ConfigError."""
        section = key = ""
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip() or line.lstrip().startswith((";", "#")):
                continue
            if line[0] in " \t":
                self._continue(section, key, line.strip(), number)
            elif line.startswith("["):
                section, key = self._open(line.strip(), number), ""
            else:
                key = self._add(section, line, number)
        for entries in self.sections.values():
            for name, entry in entries.items():
                entries[name] = replace(entry, value=self._substituted(entry))

    def _open(self, line: str, number: int) -> str:
        name = " ".join(line[1:-1].split())
        if not line.endswith("]") or not (name in SECTIONS or name.startswith(CHARGER_SECTION)):
            known = ", ".join(f"[{known}]" for known in SECTIONS)
            raise self.error(number, f"unknown section {line!a}; expected {known} or [charger ID]")
        if name in self.sections:
            raise self.error(number, f"section [{name}] stands twice, first at line {self.lines[name]}")
        if name.startswith(CHARGER_SECTION) and not is_charger_id(name.removeprefix(CHARGER_SECTION)):
            raise self.error(number, f"{line!a} names no charger id; expected {CHARGER_ID}")
        self.sections[name] = {}
        self.lines[name] = number
        return name

    def _add(self, section: str, line: str, number: int) -> str:
        name, equals, value = line.partition("=")
        if not equals:
            raise self.error(number, f"{first_word(line)!a}: expected `key = value`, [section] or a comment")
        if not section:
            raise self.error(number, "a key before the first section; expected [logging], [host], ...")
        key = name.strip() if section == "logging" else name.strip().lower()
        keys = CHARGER_KEYS if section.startswith(CHARGER_SECTION) else SECTIONS[section]
        if key not in keys and (section != "logging" or not key):
            near = difflib.get_close_matches(key, keys, 1)
            expected = f"did you mean {near[0]}?" if near else f"expected {', '.join(keys)}"
            raise self.error(number, f"unknown key {first_word(key)!a} in [{section}]; {expected}")
        if key in self.sections[section]:
            first = self.sections[section][key].line
            raise self.error(number, f"{key} stands twice in [{section}], first at line {first}")
        if re.search(r"\s[;#]", value) and not key.endswith("password"):
            raise self.error(number, f"{key}: a comment behind a value; expected it on a line of its own")
        self.sections[section][key] = Entry(value.strip(), number, (number,) if value.strip() else ())
        return key

    def _continue(self, section: str, key: str, line: str, number: int) -> None:
        if not key:
            raise self.error(number, "an indented line continues a value, and no value stands above it")
        above = self.sections[section][key]
        value, pieces = f"{above.value}\n{line}".strip(), (*above.pieces, number)
        self.sections[section][key] = Entry(value, above.line, pieces)

    def _substituted(self, entry: Entry) -> str:
        def value_of(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if match[1] is None:
                raise self.error(entry.line, "${ without }; expected ${NAME}, or $${ for the two characters")
            if match[1] not in self.environment:
                raise self.error(entry.line, f"environment variable {match[1]!a} is not set")
            return self.environment[match[1]]

        return re.sub(r"\$\$\{|\$\{([^}]*)\}|\$\{", value_of, entry.value)


class ConfigLoader:
    """Turns an Ini into a Config."""

    def __init__(self, ini: Ini, concern: Callable[[str], str]) -> None:
        self.ini = ini
        self.concern = concern
        self.warnings: list[str] = []

    def load(self) -> Config:
        """Return the checked configuration. Raises ConfigError."""
        sections = self.ini.sections
        logging_section = sections.get("logging", {})
        general = sections.get("ext-server", {})
        host = HostConfig(**self._values(sections.get("host", {}), HOST_KEYS))
        status = StatusConfig(**self._values(sections.get("status", {}), STATUS_KEYS))
        self._check_host(host, sections.get("host", {}))
        self.host = host
        self._check_status(status, sections.get("status", {}))
        return Config(
            levels={
                name: self._value(name, LOGGING_KEYS["proxy"], logging_section.get(name))
                for name in {"proxy", *logging_section} - {"rfid"}
            },
            full_badges=self._value("rfid", LOGGING_KEYS["rfid"], logging_section.get("rfid")) == "full",
            host=host,
            status=status,
            default=self._charger(general),
            chargers={
                name.removeprefix(CHARGER_SECTION): self._charger_section(name, {**general, **own})
                for name, own in sections.items()
                if name.startswith(CHARGER_SECTION)
            },
            warnings=tuple(dict.fromkeys(self.warnings)),
        )

    def _value(self, name: str, key: Key, entry: Entry | None) -> Any:
        value = entry.value if entry and entry.value else key.default
        try:
            result = key.read(value)
        except ValueError as error:
            assert entry is not None, "defaults are well"
            is_secret = name.endswith("password") or "@" in value or "?" in value
            raise self.ini.error(entry.line, f"{name}{'' if is_secret else f' {value!a}'}: {error}") from None
        if not key.is_path or value in ("", "none"):
            return result
        path = self.ini.path.parent / value
        if key is FILE and entry and not (path.is_file() and os.access(path, os.R_OK)):
            raise self.ini.error(entry.line, f"{name}: {str(path)!a} cannot be read; expected a file")
        return str(path)

    def _values(self, section: Section, keys: dict[str, Key]) -> dict[str, Any]:
        return {name: self._value(name, key, section.get(name)) for name, key in keys.items()}

    def _line(self, section: Section, name: str) -> int:
        return section[name].line if name in section else 1

    def _check_host(self, host: HostConfig, section: Section) -> None:
        if host.cert_key and not host.cert_chain:
            raise self.ini.error(self._line(section, "cert_key"), "cert_key needs cert_chain")
        if host.client_ca and not host.cert_chain:
            raise self.ini.error(self._line(section, "client_ca"), "client_ca needs cert_chain and cert_key")

    def _check_status(self, status: StatusConfig, section: Section) -> None:
        if status.port and not status.password and not is_loopback(status.addr):
            line = self._line(section, "addr")
            raise self.ini.error(line, f"addr {status.addr!a} is not loopback: [status] needs a password")

    def _charger_section(self, name: str, section: Section) -> ChargerConfig:
        if not self.host.admits(name.removeprefix(CHARGER_SECTION)):
            doubt = f"[{name}] is not among `chargers` in [host], so that it may not connect"
            self.warnings.append(f"{self.ini.path}:{self.ini.lines[name]}: {doubt}")
        return self._charger(section)

    def _charger(self, section: Section) -> ChargerConfig:
        values = self._values(section, CHARGER_KEYS)
        if not values["server"]:
            line = section["server"].line if "server" in section else self.ini.lines.get("ext-server", 1)
            raise self.ini.error(line, f"server is missing in [ext-server]; expected an address or {LOCAL}")
        config = ChargerConfig(
            primary=self._server(values["server"], "primary", values),
            secondary=self._server(values["secondary_server"], "secondary", values)
            if values["secondary_server"]
            else None,
            badges=self._badges(section, values),
            unknown_rfid=values["unknown_rfid"],
            secondary_replies=values["secondary_replies"],
            secondary_copies=frozenset(values["secondary_copies"]),
            secondary_refuse=frozenset(values["secondary_refuse"]),
            primary_grace=values["primary_grace"],
            versions=values["versions"],
            password=values["password"] or self.host.password,
            lines={name: entry.line for name, entry in section.items()},
        )
        self._check_charger(section, config)
        return config

    def _check_server(self, section: Section, peer: Peer, server: ServerConfig | None) -> None:
        if server and server.key and not server.cert:
            name = f"{peer.value}_key"
            raise self.ini.error(self._line(section, name), f"{name} needs {peer.value}_cert")
        if server and not server.is_local:
            uri = parse_uri(server.url)
            listens_on_loopback = self.host.addr in ("0.0.0.0", "::") or is_loopback(self.host.addr)
            is_own_host = uri.host == self.host.addr or (is_loopback(uri.host) and listens_on_loopback)
            if is_own_host and uri.port == self.host.port:
                name = "server" if peer is Peer.PRIMARY else "secondary_server"
                what = f"{name} is the proxy's own address; expected that of another server, or {LOCAL}"
                raise self.ini.error(self._line(section, name), what)

    def _server(self, url: str, name: str, values: dict[str, Any]) -> ServerConfig:
        keys = ("id", "user", "password", "auth", "ca", "cert", "key")
        return ServerConfig(url, **{key: values[f"{name}_{key}"] for key in keys})

    def _badges(self, section: Section, values: dict[str, Any]) -> BadgeLists:
        owners: dict[str, Peer] = {}
        for peer in SERVERS:
            for badge in map(normalized, values[f"{peer.value}_rfid"]):
                if owners.setdefault(badge, peer) is not peer:
                    line = self._line(section, "secondary_rfid")
                    what = f"badge {masked(badge)!a} is on primary_rfid and on secondary_rfid"
                    raise self.ini.error(line, what)
        patterns = sorted((entry for entry in owners if re.search(r"[*?[]", entry)), key=len, reverse=True)
        exact = {entry: peer for entry, peer in owners.items() if entry not in patterns}
        lines = {
            normalized(word): number
            for name in ("primary_rfid", "secondary_rfid")
            if name in section
            for text, number in section[name].numbered()
            for word in read_words(text)
        }
        return BadgeLists(exact, tuple((entry, owners[entry]) for entry in patterns), lines)

    def _check_charger(self, section: Section, config: ChargerConfig) -> None:
        for peer in SERVERS:
            self._check_server(section, peer, config.server(peer))
        for action in sorted(config.secondary_copies):
            if self.concern(action) == "session":
                line = self._line(section, "secondary_copies")
                why = "it can carry a badge or a transaction, which concern one server only"
                raise self.ini.error(line, f"secondary_copies: {action!a} cannot be copied: {why}")
        doubts: dict[str, str | bool] = {
            "server": self._is_open(config)
            and "nobody checks who connects: set `password` or `client_ca`, or listen on 127.0.0.1 alone",
            "secondary_rfid": not config.secondary
            and any(peer is Peer.SECONDARY for peer in self._listed(config.badges))
            and "secondary_rfid without secondary_server: these badges go to the primary",
            "unknown_rfid": config.unknown_rfid == "secondary"
            and config.secondary_replies == "ignore"
            and "unknown_rfid = secondary without secondary_replies = forward: any card charges",
        }
        for name in ("secondary_copies", "secondary_refuse"):
            unknown = [
                action for action in sorted(getattr(config, name)) if self.concern(action) == "unknown"
            ]
            doubts[name] = f"{name}: unknown Action {', '.join(map(ascii, unknown))}" if unknown else ""
        for name, doubt in doubts.items():
            if doubt:
                self.warnings.append(f"{self.ini.path}:{self._line(section, name)}: {doubt}")

    def _is_open(self, config: ChargerConfig) -> bool:
        """Whether anybody who can reach the port may be this charger, by the ini alone."""
        is_checked = config.password or self.host.client_ca or is_loopback(self.host.addr)
        has_login = bool(config.primary.user or config.primary.password)
        return not is_checked and (config.primary.is_local or has_login)

    def _listed(self, badges: BadgeLists) -> Iterable[Peer]:
        return [*badges.exact.values(), *(peer for _, peer in badges.patterns)]


def load_config(path: Path, environment: Mapping[str, str], concern: Callable[[str], str]) -> Config:
    """
    Read the ini at `path`. Raises ConfigError.

    `concern` says of an Action whether it is about the "station", about a "session", or "unknown".

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    ini = Ini(path, environment)
    ini.parse(text)
    return ConfigLoader(ini, concern).load()


@lru_cache(256)  # Of the hosts of the ini, mostly: each is asked for with every dial.
def is_ip_address(host: str) -> bool:
    """Whether it is an address in figures, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether the address can be reached from this machine alone."""
    return ipaddress.ip_address(host).is_loopback if is_ip_address(host) else host.lower() == "localhost"


def is_charger_id(text: str) -> bool:
    """Whether the text may be a charger's identity (OCPP 2.0.1 identifierString, and the blank of 1.6)."""
    return bool(re.fullmatch(r"[A-Za-z0-9*\-_=:+|@. ]{1,48}", text)) and text not in (".", "..")


# ---------------------------------------------------------------------------------------------------------
# Messages
#
# Text to Message, or one error type; and the few changes of a text that the proxy makes. A patch replaces
# one value where it stands and leaves every other character as it came.
# ---------------------------------------------------------------------------------------------------------

MAX_MESSAGE_ID = 255  # Characters; OCPP-J allows 36, some peers use more.
MAX_ACTION = 64  # Characters; the longest of OCPP 2.1 has 34.
MAX_DESCRIPTION = 100  # Characters of a CallError's that are kept for people; it may have 255.
MAX_DEPTH = 64  # Brackets in brackets; OCPP 2.1 needs 12.
# What makes a message of 1 MiB costly is not its length: within these it holds the loop for some 30 ms, and
# as long again where a key might stand twice. But a stop of 1 MiB has to pass, for it must not be lost: with
# nine values a reading it has 18,000 objects and 60,000 commas in OCPP 1.6, and 26,000 and 48,000 in 2.x.
MAX_CONTAINERS = 30_000  # Objects and arrays.
MAX_COMMAS = 65_000
MAX_KEYS = 256  # Of one object; the largest of OCPP 2.1 has 15.
MAX_DIGITS = 40  # Of a whole number; OCPP's have 10.

TextPath = tuple[str | int, ...]  # From the message's array down, as (3, "transactionId").


class MessageType(IntEnum):
    """The first element of an OCPP-J message (OCPP 2.1 part 4, 4.1.3)."""

    CALL = 2
    CALLRESULT = 3
    CALLERROR = 4
    CALLRESULTERROR = 5
    SEND = 6


MESSAGE_TYPES = {kind.value: kind for kind in MessageType}


class Message(NamedTuple):
    """One OCPP-J message. Its text is what is forwarded."""

    type: MessageType
    message_id: str
    action: str  # Of a Call or a SEND; the error code of a CallError.
    payload: dict[str, Any]  # Of an error: its details.
    text: str


class MessageError(Exception):
    """A text that is no OCPP-J message. `message_id` is set if it is a Call whose id can be read."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(what)
        head = re.match(r'\s*\[\s*2\s*,\s*"([^"\\\x00-\x1f]{1,255})"', text)
        self.message_id = head[1] if head else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


class Fraction(str):
    """A number with a fraction or an exponent, as it stands in the text: to read 45,000 took 30 ms."""

    __slots__ = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object of more than {MAX_KEYS} keys")
    return dict(pairs)


# Lenient with control characters in strings: chargers append them to badges.
decoder = partial(
    json.JSONDecoder,
    strict=False,
    parse_constant=_no_constant,
    parse_int=_whole_number,
    parse_float=Fraction,
)
DECODER = decoder()
DECODER_OF_LARGE = decoder(object_pairs_hook=_object)  # Slower; for texts that might have that many keys.


_scan: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]
_scan_large: Callable[[str, int], tuple[Any, int]] = DECODER_OF_LARGE.scan_once  # type: ignore[attr-defined]
_blanks = re.compile(r"[ \t\n\r]*").match


def decoded(text: str, scan: Callable[[str, int], tuple[Any, int]]) -> Any:
    """Return what JSON says, without the detours of `json.loads`. Raises ValueError or RecursionError."""
    try:
        value, end = scan(text, 0 if text.startswith("[") else _skip(text, 0))
    except StopIteration as stop:
        raise ValueError(f"a value is expected at character {stop.value}") from None
    if end != len(text) and _skip(text, end) != len(text):
        raise ValueError(f"there is more behind character {end}")
    return value


def _skip(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not white space."""
    match = _blanks(text, at)
    assert match is not None, "the pattern matches everywhere"
    return match.end()


def parse(text: str) -> Message:
    """Return the text as a Message. Raises MessageError, and nothing else, for any other text."""
    commas, containers = text.count(","), text.count("[") + text.count("{")
    if commas > MAX_COMMAS or containers > MAX_CONTAINERS:
        raise MessageError(f"more than {MAX_CONTAINERS} objects or {MAX_COMMAS} commas", text)
    try:
        parts = decoded(text, _scan if commas <= MAX_KEYS else _scan_large)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {error}"[:200], text) from None
    if type(parts) is not list or not 3 <= len(parts) <= MAX_KEYS:
        raise MessageError("no JSON array of three or more elements", text)
    if containers > MAX_DEPTH and is_too_deep(parts):
        raise MessageError(f"nested more than {MAX_DEPTH} levels deep", text)
    number, message_id, *rest = parts
    kind = MESSAGE_TYPES.get(number) if type(number) is int else None
    if kind is None:
        shown = str(number)[:20] if type(number) in (int, str) else "none"  # Else it may be long.
        raise MessageError(f"unknown message type {shown!a}", text)
    if type(message_id) is not str or not 1 <= len(message_id) <= MAX_MESSAGE_ID:
        raise MessageError("the message id is no string of 1 to 255 characters", text)
    action, payload = _body(kind, rest, text)
    return Message(kind, message_id, action, payload, text)


def is_too_deep(value: Any) -> bool:
    """Whether arrays and objects are nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (outer.values() if type(outer) is dict else outer for outer in level)
        level = [child for children in inside for child in children if type(child) in (list, dict)]
    return bool(level)


def _body(kind: MessageType, rest: list[Any], text: str) -> tuple[str, dict[str, Any]]:
    """Return the Action (or error code) and the payload (or error details) of a message."""
    if kind is MessageType.CALLRESULT:
        action, payload = "", {} if rest[0] == [] else rest[0]  # PHP writes an empty answer so.
    elif kind is MessageType.CALL or kind is MessageType.SEND:
        if len(rest) < 2:
            raise MessageError("a Call without a payload", text)
        action, payload = rest[:2]
    else:
        action, payload = rest[0], rest[2] if len(rest) > 2 and type(rest[2]) is dict else {}
    if type(action) is not str or len(action) > MAX_ACTION:
        raise MessageError("the Action or error code is no string of up to 64 characters", text)
    if payload is None:  # As good as {} (OCPP-J 1.6 4.2.1).
        payload = {}
    if type(payload) is not dict:
        raise MessageError("the payload is no JSON object", text)
    return action, payload


def description_of(message: Message) -> str:
    """Return the beginning of a CallError's description."""
    _, _, _, *rest = decoded(message.text, _scan)
    return rest[0][:MAX_DESCRIPTION] if rest and type(rest[0]) is str else ""


def dump(value: Any) -> str:
    """Return the value as JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def call_text(message_id: str, action: str, payload: dict[str, Any]) -> str:
    """Return a Call."""
    return dump([MessageType.CALL, message_id, action, payload])


def result_text(message_id: str, payload: dict[str, Any]) -> str:
    """Return a CallResult."""
    return dump([MessageType.CALLRESULT, message_id, payload])


def error_text(message_id: str, code: str, description: str) -> str:
    """Return a CallError; its description has at most 255 characters (OCPP 2.0.1 part 4, 4.2.3)."""
    return dump([MessageType.CALLERROR, message_id, code, description[:255], {}])


def new_message_id() -> str:
    """Return an id of 36 characters that nobody else will pick."""
    return str(uuid.uuid4())


# Where a value stands in a text. The text has been parsed before, so it is known to be JSON.


def _starts(text: str, at: int, step: str | int) -> Iterator[int]:
    """Yield where the values begin that have this key or index in the object or array at `at`."""
    if text[at] not in "{[":
        return
    is_object = text[at] == "{"
    key: str | int = -1
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        if isinstance(key, int) and not is_object:
            key += 1
        else:
            key, at = scanstring(text, at + 1, False)
            at = _skip(text, _skip(text, at) + 1)
        if key == step:
            yield at
            if not is_object:
                return  # What comes behind it in an array is not read: it may be long.
        at = _skip(text, _scan(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)


def starts(text: str, path: TextPath) -> list[int]:
    """Return where every value at the path begins; several where a key stands twice in an object."""
    found = [_skip(text, 0)]
    for step in path:
        found = [start for at in found for start in _starts(text, at, step)]
    return found


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the text, with the keys that stand twice."""


DECODER_OF_PAIRS = decoder(object_pairs_hook=Pairs)
ESCAPED_LETTER = re.compile(r"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA])")  # Only who hides something writes it.


def repeated(text: str, paths: Iterable[TextPath]) -> TextPath | None:
    """Return a path on which a key stands twice, so that two readers could see two different values."""
    hides = ESCAPED_LETTER.search(text) is not None
    suspects = [path for path in paths if hides or any(text.count(f'"{key}"') > 1 for key in path[1:])]
    whole = DECODER_OF_PAIRS.decode(text) if suspects else None  # Only badges of OCPP 2.x often need it.
    for path in suspects:
        found: list[Any] = [whole]
        for step in path:
            inside = (value for value in found if isinstance(value, list))
            pairs = (value if type(value) is Pairs else enumerate(value) for value in inside)
            found = [value for children in pairs for key, value in children if key == step]
            if len(found) > 1:
                return path
    return None


def repeats_anywhere(text: str) -> bool:
    """Whether in any object of the text a key stands twice."""
    is_repeated = False

    def note(pairs: list[tuple[str, Any]]) -> None:
        nonlocal is_repeated
        is_repeated = is_repeated or len({key for key, _ in pairs}) < len(pairs)

    decoder(object_pairs_hook=note).decode(text)
    return is_repeated


def patch(text: str, path: TextPath, value: str | int) -> str:
    """Return the text with the value at the path replaced, or added as its object's first key."""
    found = starts(text, path)
    if found:
        start = found[-1]  # Of repeated keys the last counts, as for json.loads.
        return text[:start] + dump(value) + text[_scan(text, start)[1] :]
    (start,) = starts(text, path[:-1])
    if text[start] != "{":  # A payload of null is as good as {}.
        return text[:start] + dump({path[-1]: value}) + text[_scan(text, start)[1] :]
    comma = "" if text[_skip(text, start + 1)] == "}" else ","
    return f"{text[: start + 1]}{dump(path[-1])}:{dump(value)}{comma}{text[start + 1 :]}"


def with_message_id(text: str, message_id: str) -> str:
    """Return the text under another message id."""
    return patch(text, (1,), message_id)


# ---------------------------------------------------------------------------------------------------------
# Vocabulary
#
# What the proxy knows of OCPP, as tables: where the Actions of each version carry a badge, a transaction, a
# connector or EVSE, a request; and the smallest answers where {} will not do. An Action that is not in a
# table is a station's matter with the answer {}.
# ---------------------------------------------------------------------------------------------------------


class Role(Enum):
    """Actions that the router treats in a way of their own."""

    PLAIN = "plain"
    BOOT = "boot"
    STATUS = "status"
    START = "start"  # 1.6: the server picks the transaction id.
    STOP = "stop"
    EVENT = "event"  # 2.x: the station picks it.
    REMOTE_START = "remote-start"
    RESERVE = "reserve"
    CANCEL = "cancel"
    COMMAND = "command"  # Worth a line in the story of the day.


class Fill(Enum):
    """Places in an answer that are filled in when it is given."""

    NOW = "current time"
    STATUS = "Accepted or Invalid"
    TRANSACTION = "transaction id"
    VAT_NUMBER = "vatNumber of the Call"
    MODEL = "charger id"


HEARTBEAT_INTERVAL = 300  # Seconds; given to chargers where the proxy itself is the server.

FieldPath = tuple[str, ...]  # From the payload down.


@dataclass(frozen=True, slots=True)
class Facts:
    """Where one Action carries what (paths; "*" stands for the elements of an array), and its answer."""

    role: Role = Role.PLAIN
    badge: FieldPath = ()
    badge_type: FieldPath = ()
    transaction: FieldPath = ()
    connector: FieldPath = ()  # 2.x: the EVSE.
    request: FieldPath = ()
    reservation: FieldPath = ()
    remote_start: FieldPath = ()
    state: FieldPath = ()  # The connector's status, or the charging state.
    meter: FieldPath = ()  # The energy register in Wh.
    samples: FieldPath = ()  # Sampled values, in which it may be found, too.
    reason: FieldPath = ()  # Why a session ended.
    asked_by: str = ""  # The Action that this one reports on where no request id says so.
    by_connector: bool = False  # Belongs to the session on its connector, if there is one.
    answer: dict[str, Any] = field(default_factory=dict)  # The smallest that the schema allows.
    badge_answer: dict[str, Any] | None = None  # Instead, where the Call carries a badge.
    rejects: bool = False  # A server's Action: the schema of its answer has a status Rejected.
    # What follows from these.
    single_paths: tuple[FieldPath, ...] = field(init=False)  # Whose value the routing takes for the only one.
    single_places: tuple[TextPath, ...] = field(init=False)  # The same, from a Call's array down.
    is_stations: bool = field(init=False)  # Nothing in such a Call can tell of an owner.

    def __post_init__(self) -> None:
        paths = (self.badge, self.transaction, self.reservation, self.remote_start, self.request)
        single = tuple(path for path in (*paths, self.badge_type) if path and "*" not in path)
        derived = {
            "single_paths": single,
            "single_places": tuple((3, *path) for path in single),
            "is_stations": not (any(paths) or self.by_connector or self.asked_by),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # The class is frozen, but for these.


PLAIN = Facts()
STATUS_REJECTED = {"status": "Rejected"}
STATUS_OF_VARIABLE = {"attributeStatus": "Rejected"}
BADGE_ANSWER_16 = {"idTagInfo": {"status": Fill.STATUS}}
BADGE_ANSWER_2X = {"idTokenInfo": {"status": Fill.STATUS}}
HASH_DATA = {"hashAlgorithm": "SHA256", "issuerNameHash": "", "issuerKeyHash": "", "serialNumber": ""}
CHAIN_STATUS = {
    "certificateHashData": HASH_DATA,
    "source": "OCSP",
    "status": "Failed",
    "nextUpdate": Fill.NOW,
}
ANSWERS: dict[str, dict[str, Any]] = {  # The names that the tables below use.
    "accepted": {"status": "Accepted"},
    "badge-1.6": BADGE_ANSWER_16,
    "badge-2.x": BADGE_ANSWER_2X,
    "boot": {"currentTime": Fill.NOW, "interval": HEARTBEAT_INTERVAL, "status": "Accepted"},
    "chain-status": {"certificateStatus": [CHAIN_STATUS]},
    "failed": {"status": "Failed"},
    "no-certificate": {"status": "Failed", "exiResponse": ""},
    "processing": {"status": "Processing"},
    "rejected": STATUS_REJECTED,
    "start": {**BADGE_ANSWER_16, "transactionId": Fill.TRANSACTION},
    "time": {"currentTime": Fill.NOW},
    "unknown-vendor": {"status": "UnknownVendorId"},
    "vat-rejected": {"vatNumber": Fill.VAT_NUMBER, "status": "Rejected"},
}


def table(text: str) -> dict[str, Facts]:
    """Read a table: an Action and `name=value` for each of its Facts; indented lines go on with an Action."""
    readers: dict[str, Callable[[str], Any]] = {
        "role": Role,
        "asked_by": str,
        "answer": ANSWERS.__getitem__,
        "badge_answer": ANSWERS.__getitem__,
    }
    rows: dict[str, Facts] = {}
    for line in re.sub(r"\n +", " ", textwrap.dedent(text)).strip().splitlines():
        action, *words = line.split()
        values: dict[str, Any] = {}
        for name, equals, value in (word.partition("=") for word in words):
            read = readers.get(name, _field_path)
            values[name] = read(value) if equals else True
        rows[action] = Facts(**values)
    return rows


def _field_path(value: str) -> FieldPath:
    return tuple(value.split("."))


CHARGER_16 = table("""
    Authorize                        badge=idTag connector=connectorId answer=badge-1.6
    BootNotification                 role=boot answer=boot
    DataTransfer                     answer=unknown-vendor
    DiagnosticsStatusNotification    asked_by=GetDiagnostics
    FirmwareStatusNotification       asked_by=UpdateFirmware
    Heartbeat                        answer=time
    LogStatusNotification            request=requestId asked_by=GetLog
    MeterValues                      transaction=transactionId connector=connectorId by_connector
                                     samples=meterValue.*.sampledValue.*
    SignCertificate                  answer=rejected
    SignedFirmwareStatusNotification request=requestId asked_by=SignedUpdateFirmware
    StartTransaction                 role=start badge=idTag connector=connectorId
                                     reservation=reservationId meter=meterStart answer=start
    StatusNotification               role=status connector=connectorId state=status
    StopTransaction                  role=stop badge=idTag transaction=transactionId
                                     meter=meterStop reason=reason
""")
SERVER_16 = table("""
    CancelReservation                role=cancel reservation=reservationId rejects
    CertificateSigned                rejects
    ChangeAvailability               role=command connector=connectorId rejects
    ChangeConfiguration              role=command rejects
    ClearCache                       rejects
    ClearChargingProfile             connector=connectorId
    DataTransfer                     rejects
    ExtendedTriggerMessage           connector=connectorId rejects
    GetCompositeSchedule             connector=connectorId rejects
    GetLog                           request=requestId rejects
    InstallCertificate               rejects
    RemoteStartTransaction           role=remote-start badge=idTag connector=connectorId
                                     transaction=chargingProfile.transactionId rejects
    RemoteStopTransaction            role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idTag connector=connectorId
                                     reservation=reservationId rejects
    Reset                            role=command rejects
    SendLocalList                    badge=localAuthorizationList.*.idTag
    SetChargingProfile               transaction=csChargingProfiles.transactionId
                                     connector=connectorId rejects
    SignedUpdateFirmware             request=requestId rejects
    TriggerMessage                   connector=connectorId rejects
    UnlockConnector                  role=command connector=connectorId
""")
CHARGER_201 = table("""
    Authorize                        badge=idToken.idToken badge_type=idToken.type answer=badge-2.x
    BootNotification                 role=boot answer=boot
    ClearedChargingLimit             connector=evseId
    DataTransfer                     answer=unknown-vendor
    FirmwareStatusNotification       request=requestId asked_by=UpdateFirmware
    Get15118EVCertificate            answer=no-certificate
    GetCertificateStatus             answer=failed
    Heartbeat                        answer=time
    LogStatusNotification            request=requestId asked_by=GetLog
    MeterValues                      connector=evseId
    NotifyChargingLimit              connector=evseId
    NotifyCustomerInformation        request=requestId
    NotifyDisplayMessages            request=requestId transaction=messageInfo.*.transactionId
                                     connector=messageInfo.*.display.evse.id
    NotifyEVChargingNeeds            connector=evseId by_connector answer=processing
    NotifyEVChargingSchedule         connector=evseId by_connector answer=accepted
    NotifyEvent                      transaction=eventData.*.transactionId
                                     connector=eventData.*.component.evse.id
    NotifyMonitoringReport           request=requestId connector=monitor.*.component.evse.id
    NotifyReport                     request=requestId connector=reportData.*.component.evse.id
    PublishFirmwareStatusNotification request=requestId asked_by=PublishFirmware
    ReportChargingProfiles           request=requestId transaction=chargingProfile.*.transactionId
                                     connector=evseId
    ReservationStatusUpdate          reservation=reservationId
    SignCertificate                  answer=rejected
    StatusNotification               role=status connector=evseId state=connectorStatus
    TransactionEvent                 role=event badge=idToken.idToken badge_type=idToken.type
                                     transaction=transactionInfo.transactionId connector=evse.id
                                     reservation=reservationId
                                     remote_start=transactionInfo.remoteStartId
                                     state=transactionInfo.chargingState badge_answer=badge-2.x
                                     samples=meterValue.*.sampledValue.*
                                     reason=transactionInfo.stoppedReason
""")
SERVER_201 = table("""
    CancelReservation                role=cancel reservation=reservationId rejects
    CertificateSigned                rejects
    ChangeAvailability               role=command connector=evse.id rejects
    ClearCache                       rejects
    ClearChargingProfile             connector=chargingProfileCriteria.evseId
    CostUpdated                      transaction=transactionId
    CustomerInformation              badge=idToken.idToken request=requestId rejects
    DataTransfer                     rejects
    GetBaseReport                    request=requestId rejects
    GetChargingProfiles              connector=evseId request=requestId
    GetCompositeSchedule             connector=evseId rejects
    GetDisplayMessages               request=requestId
    GetLog                           request=requestId rejects
    GetMonitoringReport              connector=componentVariable.*.component.evse.id
                                     request=requestId rejects
    GetReport                        connector=componentVariable.*.component.evse.id
                                     request=requestId rejects
    GetTransactionStatus             transaction=transactionId
    GetVariables                     connector=getVariableData.*.component.evse.id
    InstallCertificate               rejects
    PublishFirmware                  request=requestId rejects
    RequestStartTransaction          role=remote-start badge=idToken.idToken connector=evseId
                                     remote_start=remoteStartId
                                     transaction=chargingProfile.transactionId rejects
    RequestStopTransaction           role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idToken.idToken connector=evseId
                                     reservation=id rejects
    Reset                            role=command connector=evseId rejects
    SendLocalList                    badge=localAuthorizationList.*.idToken.idToken
    SetChargingProfile               transaction=chargingProfile.transactionId connector=evseId rejects
    SetDisplayMessage                transaction=message.transactionId
                                     connector=message.display.evse.id rejects
    SetMonitoringBase                rejects
    SetMonitoringLevel               rejects
    SetNetworkProfile                rejects
    SetVariableMonitoring            connector=setMonitoringData.*.component.evse.id
    SetVariables                     connector=setVariableData.*.component.evse.id
    TriggerMessage                   connector=evse.id rejects
    UnlockConnector                  role=command connector=evseId
    UpdateFirmware                   request=requestId rejects
""")
CHARGER_21 = table("""
    BatterySwap                      badge=idToken.idToken connector=batteryData.*.evseId request=requestId
    GetCertificateChainStatus        answer=chain-status
    NotifyPriorityCharging           transaction=transactionId
    NotifySettlement                 transaction=transactionId
    NotifyWebPaymentStarted          connector=evseId
    OpenPeriodicEventStream          answer=rejected
    PullDynamicScheduleUpdate        answer=rejected
    ReportDERControl                 request=requestId
    VatNumberValidation              connector=evseId answer=vat-rejected
""")
SERVER_21 = table("""
    AFRRSignal                       rejects
    AdjustPeriodicEventStream        rejects
    ChangeTransactionTariff          transaction=transactionId rejects
    ClearDERControl                  rejects
    ClearDisplayMessage              rejects
    ClearTariffs                     connector=evseId
    GetDERControl                    request=requestId rejects
    GetTariffs                       connector=evseId rejects
    NotifyAllowedEnergyTransfer      transaction=transactionId rejects
    RequestBatterySwap               badge=idToken.idToken request=requestId rejects
    SetDERControl                    rejects
    SetDefaultTariff                 connector=evseId rejects
    UpdateDynamicSchedule            rejects
    UsePriorityCharging              transaction=transactionId rejects
""")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tables of one OCPP version."""

    charger: dict[str, Facts]  # The charger's Actions.
    server: dict[str, Facts]  # The servers' Actions.
    malformed: str  # The error code for a Call that cannot be read.
    boot: dict[str, Any]  # The BootNotification of a charger that never sent one.


BOOT_16 = {"chargePointVendor": "unknown", "chargePointModel": Fill.MODEL}
BOOT_2X = {"reason": "Unknown", "chargingStation": {"vendorName": "unknown", "model": Fill.MODEL}}

# The 2.x tables hold the older Actions, too: a FoxESS sends 1.6 messages over ocpp2.0.1 (lbbrhzn/ocpp).
CHARGER_2X = {**CHARGER_16, **CHARGER_201}
VOCABULARIES = {
    "ocpp1.6": Vocabulary(CHARGER_16, SERVER_16, "FormationViolation", BOOT_16),  # Spelt like that in 1.6.
    "ocpp2.0.1": Vocabulary(CHARGER_2X, SERVER_201, "FormatViolation", BOOT_2X),
    "ocpp2.1": Vocabulary(
        {**CHARGER_2X, **CHARGER_21}, {**SERVER_201, **SERVER_21}, "FormatViolation", BOOT_2X
    ),
}


ASKED_BY = {row.asked_by for rows in VOCABULARIES.values() for row in rows.charger.values()} - {""}


def values_at(payload: Any, path: FieldPath) -> list[Any]:
    """Return all values at the path; none where it ends early."""
    if not path:
        return []
    found = [payload]
    for step in path:
        if step == "*":
            found = [element for value in found if type(value) is list for element in value]
        else:
            found = [value[step] for value in found if type(value) is dict and step in value]
    return found


def value_at(payload: Any, path: FieldPath) -> Any:
    """Return the first value at the path, or None."""
    if not path:
        return None
    if len(path) == 1 and type(payload) is dict:
        return payload.get(path[0])
    return next(iter(values_at(payload, path)), None)


def integer(value: Any) -> int | None:
    """Return the value if it is a whole number; true and 1.0 are none."""
    return value if type(value) is int else None


@dataclass(frozen=True, slots=True)
class Content:
    """The payload of a Call, read by the facts of its Action; None for what it does not carry."""

    facts: Facts
    payload: dict[str, Any]

    @property
    def badge(self) -> str | None:
        """The RFID; None also where none is needed."""
        value = value_at(self.payload, self.facts.badge)
        if value_at(self.payload, self.facts.badge_type) == "NoAuthorization":
            return None
        if type(value) is int:
            return str(value)
        return value if type(value) is str else None

    @property
    def connector(self) -> int | None:
        """The connector, in 2.x the EVSE; 0 is the whole station."""
        return integer(value_at(self.payload, self.facts.connector))

    @property
    def request(self) -> int | None:
        """The id of the request that it makes, or reports on."""
        return integer(value_at(self.payload, self.facts.request))

    @property
    def reservation(self) -> int | None:
        """The id of a reservation."""
        return integer(value_at(self.payload, self.facts.reservation))

    @property
    def remote_start(self) -> int | None:
        """The remoteStartId of 2.x."""
        return integer(value_at(self.payload, self.facts.remote_start))

    @property
    def state(self) -> Any:
        """The connector's status, or the charging state."""
        return value_at(self.payload, self.facts.state)

    @property
    def is_start(self) -> bool:
        """Whether it begins a session."""
        return self.facts.role is Role.START or self.payload.get("eventType") == "Started"

    @property
    def is_stop(self) -> bool:
        """Whether it ends a session."""
        return self.facts.role is Role.STOP or self.payload.get("eventType") == "Ended"

    @property
    def register(self) -> float | None:
        """The last reading of the energy register, in Wh."""
        for sample in values_at(self.payload, self.facts.samples)[: -MAX_SAMPLES - 1 : -1]:
            reading = watt_hours(sample)
            if reading is not None:
                return reading
        return watt_hours({"value": value_at(self.payload, self.facts.meter)})

    @property
    def reason(self) -> str:
        """Why the session ended; "" = it does not say."""
        return short(value_at(self.payload, self.facts.reason))

    @property
    def timestamp(self) -> str:
        """The time by the charger's clock, as it writes it; "" = it does not say."""
        return short(self.payload.get("timestamp"))


NOTHING = Content(PLAIN, {})
REGISTER = "Energy.Active.Import.Register"
MAX_WATT_HOURS = 1e15  # More than any register shows, and still exact to the Wh.
MAX_SAMPLES = 1000  # Sampled values, the last of a message, among which the register is looked for.
MAX_SHORT = 200  # Characters of what is kept of what a charger says of itself.


def watt_hours(sample: Any) -> float | None:
    """Return the reading of the energy register, if it is in this SampledValue (1.6 7.43, 2.0.1 2.45)."""
    if type(sample) is not dict or sample.get("measurand", REGISTER) != REGISTER or sample.get("phase"):
        return None
    unit, multiplier = sample.get("unit", "Wh"), 0
    if measure := sample.get("unitOfMeasure"):  # 2.x; 1.6 has the unit in the sample, and values as text.
        unit = value_at(measure, ("unit",)) or unit
        multiplier = integer(value_at(measure, ("multiplier",))) or 0
    if unit not in ("Wh", "kWh") or not -9 <= multiplier <= 9 or type(sample.get("value")) is bool:
        return None
    try:
        reading = float(sample.get("value", "")) * 10 ** (multiplier + 3 * (unit == "kWh"))
    except (TypeError, ValueError, OverflowError):
        return None
    return round(reading, 3) if abs(reading) <= MAX_WATT_HOURS else None


def short(value: Any) -> str:
    """Return the beginning of a text; "" for what is none."""
    return value[:MAX_SHORT] if type(value) is str else ""


def filled(answer: Any, values: dict[Fill, Any]) -> Any:
    """Return a copy of a table's answer with its places filled in."""
    if isinstance(answer, Fill):
        return values[answer]
    if isinstance(answer, dict):
        return {key: filled(value, values) for key, value in answer.items()}
    if isinstance(answer, list):
        return [filled(value, values) for value in answer]
    return answer


# What would move a charger to another server, cut it off from its own, or change its name or login is the
# primary's alone. Names of configuration keys (1.6) and variables (2.x) as shell patterns, without case.
GUARDED_ACTIONS = {"SetNetworkProfile"}
GUARDED_SETTINGS = (
    *("authorizationkey", "securityprofile*", "identity", "*passw*"),  # Of OCPP itself.
    *("network*profile*", "networkconfiguration*", "activenetworkprofile"),  # Likewise; Alfen, Amina.
    *("*url", "url-*", "*uri", "*endpoint*", "*server*", "*backend*", "*centralsystem*", "*csms*"),
    *("*backoffice*", "protocolversion"),  # Alfen.
    *("*chargebox*", "*chargepointidenti*", "*chargepointid", "*chargepointname", "*chargerid", "*ocppid"),
    *("com_prot*", "com_options", "com_ocppinfo"),  # Ecotap.
    *("evb_serialas*", "g_authentication"),  # EVBox, Growatt.
    *("hostname", "verifycsms*"),  # EVerest.
    *("hostconnectortype", "*portal*", "*proxy*", "*chargepointaddress", "*chargepointport"),  # KEBA.
    *("*secureoutgoing*", "*certificatevalidation", "*hostnameverification"),  # KEBA.
    *("*ocppversion", "*websocketsettings*", "*websocketuser"),  # Vestel, XCharge, Wallbox.
    *("*apn*", "*gsm*", "*cellular*", "*wifi*", "*ethernet*", "eth_*", "*vpn*", "*firewall*"),
    *("g_4g*", "g_*net*"),  # Growatt.
)
GUARDED_COMPONENTS = {"networkconfiguration"}  # Of OCPP 2.1.
SETTING_ACTIONS = {"ChangeConfiguration", "SetVariables"}
# Certificates are logins, too (security profile 3), but for those of the car.
CERTIFICATE_ACTIONS = {"CertificateSigned", "DeleteCertificate", "InstallCertificate"}
CAR_CERTIFICATES = {"V2GCertificate", "V2G20Certificate", "V2GRootCertificate", "MORootCertificate"}


def guarded_by(action: str, payload: dict[str, Any]) -> str:
    """Return what only the primary may change of what a server's Call wants to change; "" = nothing."""
    if action in CERTIFICATE_ACTIONS:
        kind = value_at(payload, ("certificateType",))
        return "" if kind in CAR_CERTIFICATES else short(kind) or "a certificate"
    if action in GUARDED_ACTIONS or action not in SETTING_ACTIONS:
        return action if action in GUARDED_ACTIONS else ""
    settings = [("", key) for key in values_at(payload, ("key",))]
    settings += [
        (value_at(change, ("component", "name")), value_at(change, ("variable", "name")))
        for change in values_at(payload, ("setVariableData", "*"))
    ]
    if len(settings) > MAX_KEYS:
        return f"a change of more than {MAX_KEYS} settings at once"
    for component, name in settings:
        key = normalized(str(name)[: MAX_SHORT + 1])
        is_guarded = any(fnmatchcase(key, pattern) for pattern in GUARDED_SETTINGS)
        is_odd = len(key) > MAX_SHORT or not key.isprintable() or not key.isascii()
        if is_guarded or is_odd or normalized(str(component)) in GUARDED_COMPONENTS:
            return short(str(name)) or short(str(component))
    return ""


def rejection_of(facts: Facts, payload: dict[str, Any]) -> dict[str, Any] | None:
    """Return the Rejected that the schema of the answer to a server's Call has; None = it has none."""
    changes = values_at(payload, ("setVariableData", "*"))
    results = [
        {**STATUS_OF_VARIABLE, **{name: value_at(change, (name,)) for name in ("component", "variable")}}
        for change in changes
    ]
    return {"setVariableResult": results} if results else STATUS_REJECTED if facts.rejects else None


OTHER_ACTIONS = {  # Those that no table needs to name.
    *("ClearDisplayMessage", "ClearVariableMonitoring", "ClosePeriodicEventStream", "DeleteCertificate"),
    *("GetConfiguration", "GetDiagnostics", "GetInstalledCertificateIds", "GetLocalListVersion"),
    *("GetPeriodicEventStream", "NotifyDERAlarm", "NotifyDERStartStop", "NotifyPeriodicEventStream"),
    *("SecurityEventNotification", "UnpublishFirmware", "UpdateFirmware"),
}


def concern_of(action: str) -> str:
    """Return whether an Action is about the "station", in some version about a "session", or "unknown"."""
    tables = [table for words in VOCABULARIES.values() for table in (words.charger, words.server)]
    rows = [words.charger.get(action, PLAIN) for words in VOCABULARIES.values()]
    if any(row.badge or row.transaction for row in rows):
        return "session"
    return "station" if action in OTHER_ACTIONS or any(action in table for table in tables) else "unknown"


# ---------------------------------------------------------------------------------------------------------
# Routing
#
# Whose a message is. A message goes in, decisions with their reasons come out; the sections below carry
# them out. Pure: no socket, no clock, no log. Time is passed in.
# ---------------------------------------------------------------------------------------------------------

MAX_ID = 2**31 - 1  # The largest transaction id that chargers and servers agree on (SteVe, MicroOcpp).
FIRST_PROXY_ID = 2_000_000_000  # From here on, transaction ids are the proxy's; Unix time gets there in 2033.
SESSION_SECONDS = 7 * DAY  # An ended session can still be named for so long; a silent one counts as ended.
CLAIM_SECONDS = 300.0  # A remote start that no session followed.
RESERVATION_SECONDS = 300.0  # For the charger to report that a reservation has expired.
REQUEST_SECONDS = DAY  # Reports on a request may come for so long.
ACCEPTED_SECONDS = 3600.0  # A server's last word on a badge stands in for it for so long.
SWEEP_SECONDS = 3600.0  # How often what has expired is removed from memory.

OF_ITS_STOP = "its stop: "  # What a server's words against the stop of a session begin with.
MAX_FIELD = 255  # Characters of a badge or an id; those of OCPP 2.1 have at most so many.
MAX_SELF_DESCRIPTION = 2**14  # Characters of a boot or start's answer, or of all statuses, that are kept.

# The most of each kind that one charger may have; beyond it the oldest goes.
MAX_SESSIONS = 1000
MAX_CLAIMS = 32
MAX_REQUESTS = 64
MAX_ACCEPTED = 256
MAX_STATUSES = 64
MAX_OWNERLESS = 16  # 2.x transactions; one more is given to the primary.
MAX_KEPT_EVENTS = 100  # Of one transaction without an owner; the last gives it to the primary.
MAX_KEPT_TEXT = 2**18  # Characters of them; likewise.
MAX_SEEN_EVENTS = 256  # Sequence numbers of a transaction, to know a repeat by.
# Undelivered Calls of one charger; beyond it the oldest readings go, and where there are none to go, nothing
# more is stored or answered, so that the charger keeps it.
MAX_STORED = 10_000
MAX_STORED_TEXT = 2**26  # Characters of them; beyond it likewise nothing.
MAX_WAITING = 64  # Calls of one server for the charger, or the reverse.
MAX_WAITING_TEXT = 2**20  # Characters of them; a single one may be longer.
MAX_SPENT_IDS = 16  # Calls given up, whose late answers must not be taken for others'.

# Of OCPP, with room for vendors: a charger's parser might end an Action at the first odd character.
ACTION = re.compile(r"[A-Za-z0-9_.:-]+")

TransactionId = int | str


class Instant(NamedTuple):
    """A point in time, on both clocks."""

    seconds: float  # Monotonic. All deadlines are measured on this one.
    utc: float  # Seconds since 1970, for people and other machines; may jump.

    @property
    def text(self) -> str:
        """The time as OCPP writes it (RFC 3339)."""
        return datetime.fromtimestamp(self.utc, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Kind(Enum):
    """What becomes of a Call on its way to a server."""

    RELAYED = "relayed"  # Its answer goes to the charger.
    STORED = "stored"  # The charger has its answer; delivered until the server has answered.
    NOTED = "noted"  # The charger has its answer; the server gets it soon or not at all.
    COPY = "copy"  # The other server's matter; dropped with the connection.
    OWN = "own"  # The proxy's: boot, heartbeat.
    SEND = "send"  # A message that nobody answers (OCPP 2.1 part 4, 4.2.5).


@dataclass(slots=True, eq=False)
class Call:
    """A Call on its way to a server. Its text stands under its message id, for life."""

    kind: Kind
    action: str
    message_id: str
    text: str
    content: Content
    reply_to: str | None = None  # The charger's message id that waits for the answer.
    session: Session | None = None
    is_vouched: bool = False  # A list or a claim speaks for its badge.
    is_kept: bool = False  # A 2.x event that waited for its transaction's owner.
    is_pending: bool = True  # Until it is answered, given up or dropped.
    queued: float = 0.0  # Monotonic seconds.
    sent: float | None = None  # Monotonic seconds; None = not on this connection.
    tries: int = 0  # CallErrors that a stored Call met.
    not_before: float = 0.0  # Monotonic seconds; the next try of a stored Call.
    server: str = ""  # The address that it is bound to; "" = any.
    version: str = ""  # The subprotocol that it is written in; "" = any.
    since: float = 0.0  # UTC seconds; when it was stored.
    number: int = 0  # Its place among all stored Calls in the state file; 0 = none yet.
    is_on_disk: bool = False

    @property
    def is_reading(self) -> bool:
        """Whether it only tells how a session goes on: neither begins nor ends it, nor says whose it is."""
        said = self.content
        tells_whose = said.badge is not None or said.remote_start is not None
        is_update = said.payload.get("eventType") == "Updated" and not tells_whose
        return self.action == "MeterValues" or is_update


@dataclass(slots=True, eq=False)
class Session:
    """A charging session. Its owner never changes."""

    owner: Peer | None  # None: a 2.x transaction whose badge has not come yet.
    badge: str  # As it came; "" = none.
    connector: int | None  # 2.x: the EVSE.
    begun: float  # UTC seconds.
    touched: float  # Monotonic seconds of its last message.
    server: str = ""  # Its owner's address as it stood when the session began; "" = not known.
    transaction_id: TransactionId | None = None  # As the charger knows it; None until it was told.
    server_id: TransactionId | None = None  # As its owner knows it, usable or not; None until it has told.
    start: str = ""  # 1.6: what a repeated StartTransaction has in common with this one's.
    start_call: Call | None = None  # 1.6: the relayed StartTransaction.
    start_answer: dict[str, Any] | None = None  # 1.6: what the charger is told.
    is_told: bool = False  # 1.6: the charger knows the transaction id.
    is_vouched: bool = False  # A list or a claim speaks for its badge.
    has_verdict: bool = False  # 1.6: what the charger is told is its owner's own word.
    ended: float | None = None  # Monotonic seconds.
    started_at: str = ""  # By the charger's clock, as it wrote it; "" = not said.
    stopped_at: str = ""  # Likewise.
    meter_start: float | None = None  # Wh; the first reading.
    meter_stop: float | None = None  # Wh; the last reading so far.
    reason: str = ""  # Why it ended, in the charger's words.
    delivered: float | None = None  # UTC seconds; when its owner accepted its stop.
    is_rejected: bool = False  # Recorded here and delivered nowhere (`unknown_rfid = reject`).
    refused: str = ""  # The owner's words, when it refused the start; or the stop, with a CallError.
    is_undeliverable: bool = False  # The owner refused the start and knows no id for the rest.
    has_error: bool = False  # The refusal was a CallError: it is tried once more when the proxy starts again.
    stop: str = ""  # 1.6: what a repeated StopTransaction has in common with this one's.
    is_stop_stored: bool = False  # 1.6: a repeated StopTransaction is answered here.
    kept: list[Call] = field(default_factory=list)  # 2.x: events without an owner, at most MAX_KEPT_EVENTS.
    seen: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_SEEN_EVENTS))  # 2.x: answered here.
    remote_start: tuple[int, int] | None = None  # 2.x: its remoteStartId at the charger, at the server.
    number: int = 0  # Its row in the state file; 0 = none yet.

    @property
    def key(self) -> TransactionId:
        """What the session is found by: its transaction id, or until there is one, its start."""
        return self.start if self.transaction_id is None else self.transaction_id


@dataclass(slots=True, eq=False)
class Claim:
    """A server's word that the next session of a badge is its own (remote start, reservation)."""

    peer: Peer
    server: str  # Its address.
    badge: str  # Normalized.
    connector: int | None  # None = any.
    until: float  # Monotonic seconds.
    reservation: int | None = None
    remote_start: tuple[int, int] | None = None  # The remoteStartId at the charger, at the server.


@dataclass(frozen=True, slots=True)
class Asked:
    """A server's request that the charger reports on later."""

    peer: Peer
    server: str  # Its address.
    request_id: int  # As the server knows it.
    until: float  # Monotonic seconds.


class Refusal(NamedTuple):
    """A stored Call that its server has refused."""

    peer: Peer
    call: Call
    words: str  # The server's.
    is_error: bool  # They were CallErrors: it is tried once more when the proxy starts again.


@dataclass(slots=True, eq=False)
class Memory:
    """What is remembered of one charger from one connection to the next."""

    charger_id: str = ""
    version: str = ""  # The subprotocol of its last connection; "" = never connected.
    user_agent: str = ""  # What it called itself in its last handshake.
    seen: float = (
        0.0  # UTC seconds; when something was last seen of it, to the watchdog_interval; 0 = not known.
    )
    sessions: dict[TransactionId, Session] = field(default_factory=dict)  # By Session.key; MAX_SESSIONS.
    connectors: dict[int, Session] = field(default_factory=dict)  # The open session on each.
    claims: list[Claim] = field(default_factory=list)  # The oldest first; MAX_CLAIMS.
    requests: dict[int, Asked] = field(default_factory=dict)  # By request id at the charger; MAX_REQUESTS.
    askers: dict[str, Asked] = field(default_factory=dict)  # The last of each Action of Facts.asked_by.
    accepted: dict[tuple[Peer, str], float] = field(default_factory=dict)  # When; MAX_ACCEPTED.
    boot: str = ""  # The text of the last BootNotification; "" = none seen.
    heartbeat_interval: int = HEARTBEAT_INTERVAL  # Seconds; what the charger was told.
    statuses: dict[str, str] = field(default_factory=dict)  # The last of each connector; MAX_STATUSES.
    stored: dict[Peer, list[Call]] = field(default_factory=dict)  # Undelivered, in order; MAX_STORED.
    refused: list[Refusal] = field(default_factory=list)  # The oldest first; MAX_REFUSED.
    stored_text: int = 0  # Characters of them; MAX_STORED_TEXT.
    is_full: bool = False  # Nothing more can be stored until something of it is delivered.
    dropped: int = 0  # Stored readings that had to go, since it is known.
    unsaved: dict[Session, None] = field(default_factory=dict)  # Sessions that the disk does not know so.
    is_unsaved: bool = False  # The disk does not know the rest so: all but sessions and Calls.
    saved_with: int = 0  # The last save that something of it went into.
    is_in_use: bool = False  # A Relay holds it.

    @property
    def is_owed(self) -> bool:
        """Whether a server is still to get something."""
        return any(self.stored.values()) or any(session.kept for session in self.sessions.values())

    @property
    def is_needed(self) -> bool:
        """Whether somebody uses it, or something is open or undelivered."""
        is_open = any(session.ended is None for session in self.sessions.values())
        return self.is_in_use or is_open or any(self.stored.values())


def follow_addresses(memory: Memory, config: ChargerConfig) -> None:
    """Let all that is bound to a server's address follow it where the ini has changed the two places."""
    addresses = {peer: server.url for peer in SERVERS if (server := config.server(peer))}

    def place(peer: Peer, address: str) -> Peer | None:
        return next((place for place in (peer, *SERVERS) if addresses.get(place) == address), None)

    def followed(table: dict[Any, Asked]) -> dict[Any, Asked]:
        moves = ((key, asked, place(asked.peer, asked.server)) for key, asked in table.items())
        return {key: replace(asked, peer=peer) for key, asked, peer in moves if peer}

    stored = [(peer, call) for peer, calls in memory.stored.items() for call in calls]
    for session in [*memory.sessions.values(), *(call.session for _, call in stored if call.session)]:
        owner = place(session.owner, session.server) if session.owner else None
        if owner and owner is not session.owner:
            session.owner = owner
            memory.unsaved[session] = None
    memory.stored = {}
    for peer, call in sorted(stored, key=lambda kept: (kept[1].number == 0, kept[1].number)):
        memory.stored.setdefault(place(peer, call.server) or peer, []).append(call)
    # What a server has asked for ends with it.
    memory.claims = [
        replace(claim, peer=there)
        for claim in memory.claims
        if (there := place(claim.peer, claim.server)) is not None
    ]
    memory.requests, memory.askers = followed(memory.requests), followed(memory.askers)


def by_address(memory: Memory) -> dict[str, list[Call]]:
    """Return what servers are still to get, by their addresses."""
    found: dict[str, list[Call]] = {}
    for call in itertools.chain(*memory.stored.values()):
        found.setdefault(call.server, []).append(call)
    return found


# Decisions. Each carries its reason.


class ToServer(NamedTuple):
    """Put the Call into the queue of this server."""

    peer: Peer
    call: Call
    why: str


class After(Enum):
    """What a text for the charger waits for."""

    NOTHING = "nothing"
    SAVE = "what has been decided is on disk; where the disk fails, nothing"
    SAVED = "what has been decided is on disk"


class ToCharger(NamedTuple):
    """Send the text to the charger."""

    text: str
    why: str
    after: After = After.NOTHING
    instead_of: Peer | None = None  # The server in whose place the proxy answers.


class Outcome(Enum):
    """What became of a Call."""

    RESULT = "result"
    ERROR = "error"
    UNANSWERED = "unanswered"
    REFUSED = "refused"  # By the proxy.
    RECORDED = "recorded"  # Answered by the proxy in the place of its server.

    __hash__ = object.__hash__  # As for Peer.


def outcome_of(message: Message) -> Outcome:
    """Return what an answer makes of its Call."""
    return Outcome.RESULT if message.type is MessageType.CALLRESULT else Outcome.ERROR


class Answer(NamedTuple):
    """Send the text to this server: it answers a Call of the server's."""

    peer: Peer
    text: str
    why: str
    outcome: Outcome


class Dropped(NamedTuple):
    """The message goes to nobody."""

    why: str
    is_grave: bool = False  # A person should know.


class Told(NamedTuple):
    """Something that belongs into the story of the day."""

    what: str
    badge: str = ""
    is_unlisted: bool = False  # The badge is on no list, and no claim speaks for it.


FULL = Dropped("too much waits for its server; no more is taken", is_grave=True)
Decision = ToServer | ToCharger | Answer | Dropped | Told


class Route(NamedTuple):
    """Whose a Call is, and by which rule."""

    owner: Peer
    why: str
    session: Session | None = None
    claim: Claim | None = None
    is_vouched: bool = False  # A list or a claim speaks for the badge.
    is_rejected: bool = False  # On neither list, and the ini says reject.
    is_station: bool = False  # Nobody's in particular: the other server may have a copy.


STATION = Route(Peer.PRIMARY, "concerns the station", is_station=True)


@dataclass(slots=True, eq=False)
class ServerCall:
    """A Call of a server for the charger."""

    peer: Peer
    message_id: str  # As the server knows it.
    wire_id: str  # As the charger knows it.
    action: str
    content: Content
    text: str  # As the charger gets it.
    queued: float  # Monotonic seconds.
    sent: float = 0.0  # Monotonic seconds.
    claim: Claim | None = None
    request_id: int | None = None  # At the charger.
    asked: Asked | None = None  # What was noted of its request.
    asked_before: Asked | None = None  # The request that this one's id has taken the place of.
    is_abandoned: bool = False  # Its server is gone; nobody waits for the answer.


def is_proxy_id(value: object) -> bool:
    """Whether a transaction id is one that only the proxy hands out."""
    return type(value) is int and FIRST_PROXY_ID <= value <= MAX_ID


def owner_of_proxy_id(transaction_id: int) -> Peer:
    """Return the owner that a transaction id of the proxy names in its lowest bit."""
    return Peer.SECONDARY if transaction_id & 1 else Peer.PRIMARY


def answered_kind(content: Content, session: Session | None) -> Kind:
    """Return what a Call is that the proxy answers: what belongs to a session must not be lost."""
    return Kind.STORED if session or content.facts.role is Role.STOP else Kind.NOTED


def fingerprint(values: list[Any]) -> str:
    """Return a text of bounded length that equal values have in common, and others do not."""
    text = dump(values)
    return text if len(text) <= MAX_FIELD else hashlib.sha256(text.encode()).hexdigest()


def stop_fingerprint(payload: dict[str, Any]) -> str:
    """Return what a StopTransaction and its repeats have in common."""
    return fingerprint([payload.get(name) for name in ("transactionId", "idTag", "meterStop", "timestamp")])


def trim(table: dict[Any, Any], most: int) -> None:
    """Remove the oldest entries of a table beyond its bound."""
    while len(table) > most:
        del table[next(iter(table))]


def verdict(payload: dict[str, Any]) -> Any:
    """Return the status that an answer gives to a badge; None = it says nothing of one."""
    for name in ("idTagInfo", "idTokenInfo"):
        if name in payload and (status := value_at(payload, (name, "status"))) is not None:
            return status
    return None


class Router:
    """Decides for one charger. Owns the Calls of the servers that wait for it; the rest is in its Memory."""

    def __init__(self, config: ChargerConfig, memory: Memory, version: str, call_timeout: float) -> None:
        self.config = config
        self.memory = memory
        self.version = version  # The subprotocol.
        self.vocabulary = VOCABULARIES[version]
        self.call_timeout = call_timeout  # Seconds.
        self.waiting: dict[Peer, deque[ServerCall]] = {}  # For the charger, unsent; MAX_WAITING each.
        self.outstanding: ServerCall | None = None  # The one Call that the charger has to answer.
        self.last_served = Peer.SECONDARY  # Whose Call the charger got last; the others come first.
        self.spent: dict[str, ServerCall] = {}  # Given up, by wire id; MAX_SPENT_IDS.
        # For a CallResultError: the server whose Call was answered last, its message id there, and here;
        self.last_answered: tuple[Peer, str, str] | None = None
        # likewise the server that has answered last, and the Call's message id there and at the charger.
        self.last_relayed: tuple[Peer, str, str] | None = None
        self.next_sweep = 0.0  # Monotonic seconds.

    # Calls of the charger: whose they are (rule 1).

    def charger_call(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of the charger. Raises MessageError if it can be read in two ways."""
        said = self._content(self.vocabulary.charger, message)
        if said.facts.role is Role.START:
            return self._start(message, said, now)
        if said.facts.role is Role.EVENT and type(value_at(said.payload, said.facts.transaction)) is str:
            return self._event(message, said, now)
        route = self._route(said, now)
        decisions = self._remembered(message, said, route, now)
        return decisions + self._dispatched(message, said, route, now) + self._copies(message, said, route)

    def charger_send(self, message: Message) -> list[Decision]:
        """Decide on a message of the charger that nobody answers."""
        call = Call(Kind.SEND, message.action, message.message_id, message.text, NOTHING)
        return [ToServer(Peer.PRIMARY, call, "is a SEND")]

    def _content(self, table: dict[str, Facts], message: Message) -> Content:
        facts = table.get(message.action, PLAIN)
        if facts.single_places and (twice := repeated(message.text, facts.single_places)):
            raise MessageError(f"{'.'.join(map(str, twice[1:]))} stands twice", message.text)
        for path in facts.single_paths:
            if len(str(value_at(message.payload, path))) > MAX_FIELD:
                raise MessageError(f"{'.'.join(path)} is longer than {MAX_FIELD} characters", message.text)
        return Content(facts, message.payload)

    def _route(self, said: Content, now: Instant) -> Route:
        """Return the owner. The first rule that matches wins."""
        if said.facts.is_stations:
            return STATION  # As below, in one step: it is the most frequent.
        return (
            self._by_transaction(said)
            or self._by_claim(said, now)
            or self._by_badge(said)
            or self._by_connector(said)
            or self._by_request(said, now)
            or STATION
        )

    def _by_transaction(self, said: Content) -> Route | None:
        named = [self._transaction_id(value) for value in values_at(said.payload, said.facts.transaction)]
        usable = [value for value in named if value is not None]
        sessions = [self.memory.sessions[value] for value in usable if value in self.memory.sessions]
        owners = {session.owner for session in sessions if session.owner}
        if len(owners) > 1:
            return Route(Peer.PRIMARY, "names transactions of both servers")
        for session in sessions:
            if session.owner:
                return Route(session.owner, "its transaction", session)
        if usable and not sessions:
            return self._by_lost_id(usable[0])
        if said.facts.role is Role.STOP:
            return self._by_only_session(said)
        return None

    def _by_lost_id(self, transaction_id: TransactionId) -> Route:
        """Return the route of a transaction that nobody here remembers."""
        if type(transaction_id) is not int or not is_proxy_id(transaction_id):
            return Route(Peer.PRIMARY, "an unknown transaction")
        owner = owner_of_proxy_id(transaction_id)
        session = Session(owner, "", None, 0.0, 0.0, transaction_id=transaction_id)
        session.refused, session.is_undeliverable = "its start is not known here", True
        return Route(owner, "a transaction id of the proxy, whose session is forgotten", session)

    def _by_only_session(self, said: Content) -> Route | None:
        """Find the session of a StopTransaction without a usable id (OCPP 1.6 errata 3.18)."""
        sessions = self.memory.sessions.values()
        opened = [session for session in sessions if session.ended is None]
        accepted = [s for s in opened if verdict(s.start_answer or {}) in (None, "Accepted")]
        # Another one may have lost its stop, and with it its connector, to a power cut.
        plugged = [s for s in accepted if s in self.memory.connectors.values()]
        badge = normalized(said.badge or "")
        stop = stop_fingerprint(said.payload)
        for found, why in (
            ([session for session in sessions if session.stop == stop], "it repeats a stop"),
            ([s for s in opened if badge and normalized(s.badge) == badge], "the open session of its badge"),
            ([s for s in plugged if badge and normalized(s.badge) == badge], "the last session of its badge"),
            ([s for s in opened if s.start and not s.is_told], "the only one whose start was never answered"),
            (accepted, "the only open session"),
            (opened, "the only open session"),
            (plugged, "the only open session on a connector"),
        ):
            if len(found) == 1 and found[0].owner:
                return Route(found[0].owner, why, found[0])
        return None

    def _by_claim(self, said: Content, now: Instant) -> Route | None:
        badge, connector = said.badge, said.connector

        def is_named(claim: Claim) -> bool:
            by_reservation = said.reservation is not None and claim.reservation == said.reservation
            return by_reservation or (
                claim.remote_start is not None and claim.remote_start[0] == said.remote_start
            )

        def matches(claim: Claim) -> bool:
            if badge is None or (said.reservation is not None and claim.reservation == said.reservation):
                return is_named(claim)
            return claim.badge == normalized(badge) and (
                connector is None or claim.connector in (None, connector)
            )

        reports = badge is None and said.reservation is not None
        seconds = now.seconds - (RESERVATION_SECONDS if reports else 0.0)
        live = [claim for claim in reversed(self.memory.claims) if seconds < claim.until and matches(claim)]
        for claim in sorted(live, key=is_named, reverse=True):
            why = "its reservation" if claim.reservation is not None else "its remote start"
            return Route(claim.peer, f"{claim.peer.value} claimed it: {why}", claim=claim, is_vouched=True)
        return None

    def _by_badge(self, said: Content) -> Route | None:
        return None if said.badge is None else self.route_of_badge(said.badge)

    def route_of_badge(self, badge: str) -> Route:
        """Return whose a badge is, by the ini alone."""
        peer = self.config.badges.find(badge)
        if peer is Peer.PRIMARY or (peer and self.config.secondary):
            return Route(peer, f"its badge is on {peer.value}_rfid", is_vouched=True)
        if self.config.unknown_rfid == "reject":
            return Route(Peer.PRIMARY, "its badge is on no list", is_rejected=True)
        if self.config.unknown_rfid == "secondary" and self.config.secondary:
            return Route(Peer.SECONDARY, "its badge is on no list: unknown_rfid = secondary")
        return Route(Peer.PRIMARY, "its badge is on no list: unknown_rfid = primary")

    def _by_connector(self, said: Content) -> Route | None:
        if not said.facts.by_connector or said.connector is None:
            return None
        session = self.memory.connectors.get(said.connector)
        if session is None or session.owner is None:
            return None
        return Route(session.owner, f"the session on its connector {said.connector}", session)

    def _by_request(self, said: Content, now: Instant) -> Route | None:
        asked = self._asked(said)
        if asked and now.seconds < asked.until:
            return Route(asked.peer, f"{asked.peer.value} asked for it")
        last = self.memory.askers.get(said.facts.asked_by)
        if last and said.request is None:
            return Route(last.peer, f"{last.peer.value} sent the last {said.facts.asked_by}")
        return None

    def _asked(self, said: Content) -> Asked | None:
        """Return the request that a Call reports on by its id."""
        return None if said.request is None else self.memory.requests.get(said.request)

    def _transaction_id(self, value: Any) -> TransactionId | None:
        """Return a usable transaction id as it is kept in tables, or None."""
        if self.version == "ocpp1.6" and type(value) is str and re.fullmatch(r"\d{1,10}", value, re.ASCII):
            value = int(value)
        if type(value) is int:
            return value if 1 <= value <= MAX_ID else None
        return value if type(value) is str and value else None

    # Calls of the charger: what becomes of them.

    def _is_relayed(self, route: Route) -> bool:
        """Whether the owner itself answers. Otherwise the proxy does."""
        session = route.session
        if route.is_rejected or self._address(route.owner) in ("", LOCAL):
            return False
        if session and (session.is_rejected or not self._is_here(session)):
            return False
        if session and session.is_undeliverable and is_proxy_id(session.transaction_id):
            return False
        return route.owner is Peer.PRIMARY or self.config.secondary_replies == "forward"

    def _is_delivered(self, route: Route) -> bool:
        """Whether the owner gets what the proxy answered, or would, if the ini still named it."""
        session = route.session
        if route.is_rejected or (session and session.is_rejected):
            return False
        address = session.server if session and session.server else self._address(route.owner)
        return address not in ("", LOCAL)

    def _address(self, peer: Peer) -> str:
        """Return the address of a server; "" if there is none."""
        server = self.config.server(peer)
        return server.url if server else ""

    def _is_here(self, session: Session) -> bool:
        """Whether the session's owner still has the address that it began at."""
        return session.owner is None or session.server in ("", self._address(session.owner))

    def _dispatched(self, message: Message, said: Content, route: Route, now: Instant) -> list[Decision]:
        """Relay the Call, or answer it and deliver it."""
        session = route.session
        is_rejected = route.is_rejected or (session is not None and session.is_rejected)
        if session and session.is_stop_stored and said.facts.role is Role.STOP:
            text = result_text(message.message_id, {})
            return [ToCharger(text, "repeats a stop", After.SAVED, route.owner)]
        if session:
            self._note(session, said)
        if self._is_relayed(route):
            call = self._call(Kind.RELAYED, message, said, route)
            if session and said.facts.role is Role.START:
                session.start_call = call
            return [ToServer(route.owner, call, route.why)]
        kind = answered_kind(said, session)
        if kind is Kind.STORED and self.memory.is_full:
            return [FULL]
        decisions: list[Decision] = []
        if self._is_delivered(route):
            decisions.append(ToServer(route.owner, self._call(kind, message, said, route), route.why))
        answer = self._answer(said, session, not is_rejected, now)
        text = result_text(message.message_id, answer)
        after = After.SAVED if kind is Kind.STORED else After.NOTHING
        return [*decisions, ToCharger(text, route.why, after, route.owner)]

    def _note(self, session: Session, said: Content) -> None:
        """Keep what people want to know of a session: its times and readings."""
        register = said.register
        if register is not None:
            session.meter_start = register if session.meter_start is None else session.meter_start
            session.meter_stop = register
        if said.is_start:
            session.started_at = said.timestamp
        elif said.is_stop:
            session.stopped_at, session.reason = said.timestamp, said.reason

    def _call(self, kind: Kind, message: Message, said: Content, route: Route) -> Call:
        """Return the charger's Call as its server gets it."""
        text = message.text
        asked = self._asked(said)
        if asked and asked.request_id != said.request:
            text = patch(text, (3, *said.facts.request), asked.request_id)
        call = Call(kind, message.action, message.message_id, text, said)
        call.session, call.is_vouched = route.session, route.is_vouched
        call.server = (route.session and route.session.server) or self._address(route.owner)
        call.version = self.version
        if kind is Kind.RELAYED:
            call.reply_to = message.message_id
        else:
            call.message_id = new_message_id()
            call.text = with_message_id(text, call.message_id)
        return self._restored(call)

    def _answer(self, said: Content, session: Session | None, accepted: bool, now: Instant) -> dict[str, Any]:
        """Return the smallest answer that the schema allows; note in the session what the charger is told."""
        facts = said.facts
        if session and facts.role is Role.START:
            self._name(session, self._new_transaction_id(session.owner))
        has_badge = facts.badge_answer is not None and value_at(said.payload, facts.badge) is not None
        values = {
            Fill.NOW: now.text,
            Fill.STATUS: "Accepted" if accepted else "Invalid",
            Fill.TRANSACTION: session.transaction_id if session else None,
            Fill.VAT_NUMBER: str(said.payload.get("vatNumber", "")),
        }
        answer: dict[str, Any] = filled(facts.badge_answer if has_badge else facts.answer, values)
        if session and facts.role is Role.START:
            session.start_answer, session.is_told = answer, True
        elif session and facts.role is Role.STOP:
            session.is_stop_stored = True
        elif session and facts.role is Role.EVENT:
            number = integer(said.payload.get("seqNo"))
            session.seen.extend(() if number is None else (number,))
        if session and facts.role is not Role.PLAIN:
            self._save(session)
        return answer

    def _remembered(self, message: Message, said: Content, route: Route, now: Instant) -> list[Decision]:
        """Keep what the Call says about the station and its sessions."""
        session, role = route.session, said.facts.role
        if session:
            session.touched = now.seconds
        is_short = len(message.text) <= MAX_SELF_DESCRIPTION
        if role is Role.BOOT and is_short:
            self.memory.boot, self.memory.is_unsaved = message.text, True
        elif role is Role.STATUS and is_short:
            self._remember_status(message, said)
        elif role is Role.STOP and session and session.ended is None:
            session.stop = stop_fingerprint(message.payload)
            return [self._end(session, now)]
        elif said.badge is not None and not session:
            whose = "is rejected" if route.is_rejected else f"belongs to {route.owner.value}"
            return [self._told_of(f"{message.action} {whose}: {route.why}", said.badge, route)]
        return []

    def _told_of(self, what: str, badge: str, route: Route) -> Told:
        is_listed = route.is_vouched or self.config.badges.find(badge) is not None
        return Told(what, badge, is_unlisted=bool(badge) and not is_listed)

    def _remember_status(self, message: Message, said: Content) -> None:
        where = fingerprint([said.connector, said.payload.get("connectorId")])
        statuses = self.memory.statuses
        statuses.pop(where, None)
        statuses[where], self.memory.is_unsaved = message.text, True
        while len(statuses) > MAX_STATUSES or sum(map(len, statuses.values())) > MAX_SELF_DESCRIPTION:
            del statuses[next(iter(statuses))]
        if said.connector in self.memory.connectors and said.state == "Available":
            self._leave_connector(self.memory.connectors[said.connector])

    def _copies(self, message: Message, said: Content, route: Route) -> list[Decision]:
        """Let the secondary see what concerns the station."""
        secondary = self.config.secondary
        if not route.is_station or secondary is None or secondary.is_local:
            return []
        if said.facts.role is Role.BOOT:
            return [ToServer(Peer.SECONDARY, self._call(Kind.OWN, message, said, route), "is a boot")]
        if message.action in self.config.secondary_copies:
            return [ToServer(Peer.SECONDARY, self._call(Kind.COPY, message, said, route), "is to be copied")]
        return []

    # Sessions of OCPP 1.6: StartTransaction, whose answer names the transaction.

    def _start(self, message: Message, said: Content, now: Instant) -> list[Decision]:
        badge = said.badge or ""
        reading = (said.payload.get("meterStart"), said.payload.get("timestamp"))
        start = fingerprint([said.connector, normalized(badge), *reading])
        for session in self.memory.sessions.values():
            if session.start == start and session.ended is None and session.owner:
                if not self._is_refused(session):
                    return self._repeated_start(message, said, session, now)
                self._end(session, now)  # Tried again; this one has no stop to wait for.
        route = (
            self._by_claim(said, now) or self._by_badge(said) or Route(Peer.PRIMARY, "it carries no badge")
        )
        if self.memory.is_full and not self._is_relayed(route):
            return [FULL]
        session = Session(route.owner, badge, said.connector, now.utc, now.seconds, start=start)
        session.is_rejected, session.server = route.is_rejected, self._address(route.owner)
        session.is_vouched = route.is_vouched
        self._keep(session)
        told = self._begin(session, route)
        return [told, *self._dispatched(message, said, route._replace(session=session), now)]

    def _is_refused(self, session: Session) -> bool:
        """Whether the owner itself has refused the start, and the charger knows."""
        return session.has_verdict and verdict(session.start_answer or {}) not in (None, "Accepted")

    def _repeated_start(
        self, message: Message, said: Content, session: Session, now: Instant
    ) -> list[Decision]:
        """Join the session that the StartTransaction repeats: one Call at its owner, one answer."""
        session.touched = now.seconds
        if session.start_answer is not None:
            session.is_told = True
            self._save(session)
            text = result_text(message.message_id, session.start_answer)
            after = After.SAVE if session.has_verdict else After.SAVED
            return [ToCharger(text, "repeats a start", after, session.owner)]
        if session.start_call and session.start_call.is_pending:
            session.start_call.reply_to = message.message_id
            return [Told("a repeated StartTransaction joins the one that waits for its answer")]
        assert session.owner is not None, "only sessions with an owner are repeated"
        why = "repeats a start that was never answered"
        route = Route(session.owner, why, session, is_vouched=session.is_vouched)
        return self._dispatched(message, said, route, now)

    def _begin(self, session: Session, route: Route) -> Told:
        """Let the session take its connector and its claim."""
        if session.start:
            self._take_connector(session)
        if route.claim in self.memory.claims:
            self.memory.claims.remove(route.claim)
            self.memory.is_unsaved = True
        where = f"on connector {session.connector}: {route.why}"
        whose = "is rejected" if route.is_rejected else f"of {route.owner.value} begins"
        return self._told_of(f"a session {whose} {where}", session.badge, route)

    def _end(self, session: Session, now: Instant) -> Told:
        session.ended = now.seconds
        self._leave_connector(session)
        self._save(session)
        owner = session.owner.value if session.owner else "nobody"
        is_translated = session.server_id not in (None, session.transaction_id)
        there = f" (there: {session.server_id})" if is_translated else ""
        where = f"on connector {session.connector}"
        return Told(f"session {session.transaction_id} of {owner}{there} ends {where}", session.badge)

    def _keep(self, session: Session) -> None:
        self.memory.sessions[session.key] = session
        self._save(session)
        if len(self.memory.sessions) > MAX_SESSIONS:
            ended = (key for key, old in self.memory.sessions.items() if old.ended is not None)
            self._forget(self.memory.sessions[next(ended, next(iter(self.memory.sessions)))])

    def _forget(self, session: Session) -> None:
        self.memory.sessions.pop(session.key, None)
        self._leave_connector(session)

    def _save(self, session: Session) -> None:
        """Let the disk know how the session stands; a stand-in for a forgotten one has no place there."""
        if session.number or self.memory.sessions.get(session.key) is session:
            self.memory.unsaved[session] = None

    def _take_connector(self, session: Session) -> None:
        if session.connector is not None and session.connector > 0:
            before = self.memory.connectors.get(session.connector)
            if before:
                self._leave_connector(before)
            self.memory.connectors[session.connector] = session
            self._save(session)

    def _leave_connector(self, session: Session) -> None:
        if session.connector is not None and self.memory.connectors.get(session.connector) is session:
            del self.memory.connectors[session.connector]
            self._save(session)

    def _name(self, session: Session, transaction_id: TransactionId) -> None:
        """Let the session be found by the id that the charger is told."""
        self.memory.sessions.pop(session.key, None)
        session.transaction_id = transaction_id
        self._keep(session)

    def _new_transaction_id(self, owner: Peer | None) -> int:
        """Return an id that is not in use and names its owner in the lowest bit."""
        bit = int(owner is Peer.SECONDARY)
        while True:
            transaction_id = random.randrange(FIRST_PROXY_ID, MAX_ID, 2) + bit
            if transaction_id not in self.memory.sessions:
                return transaction_id

    def _learn_start(self, session: Session, payload: dict[str, Any]) -> None:
        """Take the owner's transaction id, and choose the one that the charger is told."""
        self._save(session)
        if session.server_id is not None:
            return  # A start that was sent twice is answered twice; the charger goes by the first that came.
        raw = payload.get("transactionId")
        server_id = self._transaction_id(raw)
        session.server_id = raw if type(raw) is int or type(raw) is str else None
        if session.transaction_id is None:
            is_free = server_id not in self.memory.sessions and not is_proxy_id(server_id)
            named = (
                server_id if server_id is not None and is_free else self._new_transaction_id(session.owner)
            )
            self._name(session, named)
        if not session.is_told:
            is_long = len(dump(payload)) > MAX_SELF_DESCRIPTION
            kept = {"idTagInfo": {"status": str(verdict(payload))[:MAX_ACTION]}} if is_long else payload
            session.start_answer = {**kept, "transactionId": session.transaction_id}

    # Transactions of OCPP 2.x: TransactionEvent, whose badge may come late.

    def _event(self, message: Message, said: Content, now: Instant) -> list[Decision]:
        payload = said.payload
        transaction_id = value_at(payload, said.facts.transaction)
        session = self.memory.sessions.get(transaction_id)
        if session is None or self._is_another(session, said):
            session = Session(None, "", None, now.utc, now.seconds, transaction_id=transaction_id)
            session.server_id = transaction_id
            self._keep(session)
        session.touched = now.seconds
        self._occupy(session, said.connector)
        if integer(payload.get("seqNo")) is not None and payload["seqNo"] in session.seen:
            answer = self._answer(said, None, not session.is_rejected, now)
            text = result_text(message.message_id, answer)
            return [ToCharger(text, "repeats an event", After.SAVED, session.owner)]
        decisions: list[Decision] = []
        if session.owner is None:
            settled = self._settled(session, said, now)
            if settled is None:
                return self._kept(message, said, session, now)
            decisions = self._own(session, settled, said.badge or "")
            route = settled._replace(session=session)
        else:
            route = Route(session.owner, "its transaction", session, is_vouched=True)
        decisions += self._dispatched(message, said, route, now)
        if payload.get("eventType") == "Ended" and session.ended is None:
            decisions.append(self._end(session, now))
        return decisions

    def _is_another(self, session: Session, said: Content) -> bool:
        """Whether an event begins another transaction under the id of one that has ended.

        Some stations count from the start again when they reboot. A repeated Started has its time repeated.
        """
        return said.is_start and session.ended is not None and said.timestamp != session.started_at

    def _occupy(self, session: Session, evse: int | None) -> None:
        """Let the transaction take its EVSE; only its first events name it (2.0.1 E01.FR.16)."""
        if evse is not None and evse > 0 and session.connector is None and session.ended is None:
            session.connector = evse
            self._take_connector(session)

    def _settled(self, session: Session, said: Content, now: Instant) -> Route | None:
        """Return whose a transaction without an owner is, once this event tells."""
        if said.connector is None and session.connector is not None:  # Claims may name the EVSE.
            said = Content(said.facts, {**said.payload, "evse": {"id": session.connector}})
        route = self._by_claim(said, now) or self._by_badge(said)
        if route:
            return route
        badge_type = value_at(said.payload, said.facts.badge_type)
        for is_settled, why in (
            (badge_type == "NoAuthorization", "it needs no authorization"),
            (said.state == "Charging", "it charges without a badge"),
            (said.payload.get("eventType") == "Ended", "it ends without a badge"),
            (len(session.kept) + 1 >= MAX_KEPT_EVENTS, f"{MAX_KEPT_EVENTS} events without a badge"),
            (sum(len(call.text) for call in session.kept) > MAX_KEPT_TEXT, "long events without a badge"),
            (self._ownerless() > MAX_OWNERLESS, f"more than {MAX_OWNERLESS} transactions without a badge"),
        ):
            if is_settled:
                return Route(Peer.PRIMARY, why)
        return None

    def _ownerless(self) -> int:
        return sum(session.owner is None for session in self.memory.sessions.values())

    def _kept(self, message: Message, said: Content, session: Session, now: Instant) -> list[Decision]:
        """Answer an event that nobody owns yet, and keep it for whom it will belong to."""
        if self.memory.is_full:
            return [FULL]
        route = Route(Peer.PRIMARY, "its transaction has no owner yet", session)
        self._note(session, said)
        call = self._call(Kind.STORED, message, said, route)
        call.is_kept = True
        session.kept.append(call)
        answer = self._answer(said, session, True, now)
        return [ToCharger(result_text(message.message_id, answer), route.why, After.SAVED)]

    def _own(self, session: Session, route: Route, badge: str) -> list[Decision]:
        """Give the transaction its owner, and the owner what was kept for it."""
        session.owner, session.badge, session.is_rejected = route.owner, badge, route.is_rejected
        session.server = self._address(route.owner)
        self._save(session)
        if route.claim:
            session.remote_start = route.claim.remote_start
        told = self._begin(session, route)
        kept, session.kept = session.kept, []
        for call in kept:
            call.server, call.version = session.server, self.version
        if not self._is_delivered(route._replace(session=session)):
            return [told]
        return [
            told,
            *(ToServer(route.owner, self._restored(call), "was kept for its owner") for call in kept),
        ]

    def _restored(self, call: Call) -> Call:
        """Give an event the remoteStartId that its owner knows."""
        session = call.session
        if session and session.remote_start:
            at_charger, at_server = session.remote_start
            if at_charger != at_server and call.content.remote_start == at_charger:
                call.text = patch(call.text, (3, *call.content.facts.remote_start), at_server)
        return call

    # Answers of the servers (rules 2 and 3).

    def text_for_server(self, call: Call) -> str:
        """Return the Call's text with the transaction id that its owner knows by now."""
        session, path = call.session, call.content.facts.transaction
        if session is None or session.server_id is None or not path or "*" in path:
            return call.text
        if value_at(call.content.payload, path) == session.server_id:
            return call.text
        return patch(call.text, (3, *path), session.server_id)

    def server_answer(self, peer: Peer, call: Call, message: Message, now: Instant) -> list[Decision]:
        """Decide on a server's answer to a Call of the charger that is still waited for."""
        call.is_pending = False
        words = self.learn(peer, call, message, now)
        self._note_refusal(call, message, words)
        badge = call.content.badge if words else None
        told = [Told(f"{peer.value} answers {call.action} with {words}", badge)] if badge else []
        if call.reply_to is None:
            return [*told, Dropped("the charger has its answer from the proxy")]
        self.last_relayed = (peer, call.message_id, call.reply_to)
        if call.content.facts.role is Role.BOOT:
            self.memory.heartbeat_interval = integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL
            self.memory.is_unsaved = True
        session, text = call.session, message.text
        if call.content.facts.role is Role.START and session and message.type is MessageType.CALLRESULT:
            session.is_told = True
            self._save(session)
            if message.payload.get("transactionId") != session.server_id and session.start_answer:
                other = str(message.payload.get("transactionId"))[:40]
                again = (
                    f"{peer.value} answers a start twice: {session.server_id} counts, {other} gets no stop"
                )
                text = result_text(call.reply_to, session.start_answer)
                return [Told(again), ToCharger(text, again, After.SAVE)]
            text = self._as_told(message, session)
        if call.reply_to != message.message_id:
            text = with_message_id(text, call.reply_to)
        # The charger must not know of a transaction whose owner a restart would forget.
        is_first_word = session is not None and call.content.facts.role in (Role.START, Role.EVENT)
        after = After.SAVE if is_first_word else After.NOTHING
        return [*told, ToCharger(text, f"{peer.value} answers", after)]

    def _note_refusal(self, call: Call, message: Message, words: str) -> None:
        """Keep for people what a server has against a session; a badge that it blocks at a stop is none."""
        session, is_error = call.session, message.type is MessageType.CALLERROR
        if session and call.content.is_start:
            session.refused = words
            self._save(session)
        elif session and call.content.is_stop and is_error and not (session.delivered or session.refused):
            session.refused = f"{OF_ITS_STOP}{words}"
            self._save(session)

    def _as_told(self, message: Message, session: Session) -> str:
        """Return the answer to a start with the transaction id that the charger is told."""
        text = message.text
        if repeated(text, [(2, "transactionId")]):
            text = result_text(message.message_id, message.payload)  # One reading for everybody.
        if message.payload.get("transactionId") != session.transaction_id:
            assert session.transaction_id is not None, "an answered start names its session"
            text = patch(text, (2, "transactionId"), session.transaction_id)
        return text

    def learn(self, peer: Peer, call: Call, message: Message, now: Instant) -> str:
        """Take what a server's answer tells, late or not. Return its words if it is a refusal, else ""."""
        if message.type is MessageType.CALLERROR:
            return f"CallError {message.action} {description_of(message)}".strip()
        if call.session:
            self._learn_of(call.session, call, message, now)
        status = verdict(message.payload)
        badge = None if status is None else call.content.badge
        if badge is None:
            return ""
        self.memory.accepted.pop((peer, normalized(badge)), None)
        if status != "Accepted":
            return f"status {str(status)[:MAX_ACTION]}"
        self.memory.accepted[peer, normalized(badge)] = now.seconds
        trim(self.memory.accepted, MAX_ACCEPTED)
        return ""

    def _learn_of(self, session: Session, call: Call, message: Message, now: Instant) -> None:
        """Note what its owner says to a Call of a session."""
        if call.content.facts.role is Role.START:
            session.has_verdict = session.has_verdict or call.kind is Kind.RELAYED
            self._learn_start(session, message.payload)
        if call.content.is_stop:
            if session.refused.startswith(OF_ITS_STOP):
                session.refused = ""  # It was sent again, and accepted.
            session.delivered = now.utc
            self._save(session)

    def stand_in(self, peer: Peer, call: Call, now: Instant) -> list[Decision]:
        """Answer the charger in the place of a server that cannot; the Call is delivered to it later."""
        session, reply_to = call.session, call.reply_to
        if self.memory.is_full and answered_kind(call.content, session) is Kind.STORED:
            call.kind, call.is_pending, call.reply_to = Kind.NOTED, False, None
            return [FULL]
        is_repeat = session is not None and self._is_stored_already(session, call.content)
        if is_repeat or (reply_to is None and call.action == "MeterValues"):
            call.is_pending = False  # Stored before; or its charger is gone, and sends it again.
        call.kind = answered_kind(call.content, session) if call.is_pending else Kind.NOTED
        call.reply_to = None
        if not call.is_pending and reply_to is None:
            return []
        accepted = self._is_trusted(peer, call, now)
        answer = self._answer(call.content, None if is_repeat else session, accepted, now)
        if reply_to is None:
            if session:
                session.is_told = False  # Its charger is gone, and hears the answer when it repeats the Call.
            return []
        why = f"{peer.value} cannot answer: the proxy stands in for it"
        after = After.SAVED if call.kind is Kind.STORED or is_repeat else After.NOTHING
        return [ToCharger(result_text(reply_to, answer), why, after, peer), Told(why)]

    def _is_stored_already(self, session: Session, said: Content) -> bool:
        """Whether a StopTransaction or TransactionEvent repeats one that the proxy has answered."""
        if said.facts.role is Role.STOP:
            return session.is_stop_stored
        number = integer(said.payload.get("seqNo"))
        return said.facts.role is Role.EVENT and number is not None and number in session.seen

    def _is_trusted(self, peer: Peer, call: Call, now: Instant) -> bool:
        """Whether the proxy accepts a badge in the place of a server whose verdict counts."""
        badge = call.content.badge
        accepted = self.memory.accepted.get((peer, normalized(badge or "")))
        return (
            badge is None
            or call.is_vouched
            or (accepted is not None and now.seconds - accepted <= ACCEPTED_SECONDS)
        )

    def refuse(self, call: Call, words: str, is_error: bool) -> None:
        """Note that its owner refused a stored Call; a refused start may refuse the rest of its session."""
        session = call.session
        if session and call.content.is_start:
            self._save(session)
            session.refused, session.has_error = words, is_error
            session.is_undeliverable = is_error or self._transaction_id(session.server_id) is None

    # Calls of the servers (rule 4).

    def server_call(self, peer: Peer, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of a server. Raises MessageError if it can be read in two ways."""
        if not ACTION.fullmatch(message.action):
            raise MessageError("the Action has characters that no Action has", message.text)
        said = self._content(self.vocabulary.server, message)
        if why := self._forbidden(message) if peer is Peer.SECONDARY else "":
            return [self._refusal(peer, message, said, why)]
        call = ServerCall(
            peer, message.message_id, message.message_id, message.action, said, message.text, now.seconds
        )
        for value in values_at(said.payload, said.facts.transaction):
            why = self._translated(call, value)
            if why:
                return [self._refusal(peer, message, said, why)]
        self._translate_request(call, now)
        self._claim(call, now)
        if call.message_id in self._wire_ids():
            call.wire_id = new_message_id()
            call.text = with_message_id(call.text, call.wire_id)
        return self._queued(call, now)

    def proxy_call(self, action: str, payload: dict[str, Any], now: Instant) -> list[Decision]:
        """Ask the charger something in the proxy's own name; its answer is dropped."""
        message_id = new_message_id()
        text = call_text(message_id, action, payload)
        said = Content(self.vocabulary.server.get(action, PLAIN), payload)
        call = ServerCall(Peer.PROXY, message_id, message_id, action, said, text, now.seconds)
        return self._queued(call, now)

    def _queued(self, call: ServerCall, now: Instant) -> list[Decision]:
        waiting = self.waiting.setdefault(call.peer, deque())
        if len(waiting) >= MAX_WAITING or sum(len(other.text) for other in waiting) > MAX_WAITING_TEXT:
            return self._given_up(call, "too many Calls wait for the charger already")
        waiting.append(call)
        return self._next(now)

    def _forbidden(self, message: Message) -> str:
        """Return why the secondary may not call this on the charger; "" = it may."""
        if message.action in self.config.secondary_refuse:
            return f"{message.action} is on secondary_refuse"
        if message.action in SETTING_ACTIONS and repeats_anywhere(message.text):
            raise MessageError("a key stands twice", message.text)
        setting = guarded_by(message.action, message.payload)
        return f"{message.action}: {setting} is the primary's alone" if setting else ""

    def _refusal(self, peer: Peer, message: Message, said: Content, why: str) -> Answer:
        """Return the schema's Rejected; not every schema has one."""
        rejection = rejection_of(said.facts, said.payload)
        if rejection is not None:
            text = result_text(message.message_id, rejection)
        else:
            text = error_text(message.message_id, "SecurityError", why)
        return Answer(peer, text, f"refused: {why}", Outcome.REFUSED)

    def _translated(self, call: ServerCall, value: Any) -> str:
        """Translate the transaction that the Call names; return why it must not reach the charger, or ""."""
        named = self._transaction_id(value)
        session = self._session_of(call.peer, value if named is None else named)
        if session and session.transaction_id is not None:
            if session.transaction_id != named:
                call.text = patch(call.text, (3, *call.content.facts.transaction), session.transaction_id)
            return ""
        other = self.memory.sessions.get(named) if named is not None else None
        if other and other.owner is not None:
            return f"transaction {named} is not one of {call.peer.value}"
        if call.peer is Peer.SECONDARY:
            return f"nobody knows a transaction {str(value)[:40]} of secondary"
        return ""

    def _session_of(self, peer: Peer, server_id: Any) -> Session | None:
        """Return the session that a server knows by this id; of several an open one, the newest."""
        if type(server_id) is not int and type(server_id) is not str:
            return None
        found = [
            session
            for session in self.memory.sessions.values()
            if session.owner is peer and session.server_id is not None and not session.is_rejected
            if self._is_here(session)
            if server_id in (session.server_id, self._transaction_id(session.server_id))
        ]
        return max(found, key=lambda session: (session.ended is None, session.begun), default=None)

    def _translate_request(self, call: ServerCall, now: Instant) -> None:
        """Note who asks for a report; give a request id that the other server still uses another value."""
        path, request_id = call.content.facts.request, call.content.request
        if request_id is None:
            return
        call.request_id = request_id
        asked = self.memory.requests.get(request_id)
        if asked and asked.peer is not call.peer and now.seconds < asked.until:
            call.request_id = self._new_number(self.memory.requests)
            call.text = patch(call.text, (3, *path), call.request_id)
        call.asked_before = self.memory.requests.pop(call.request_id, None)
        until = now.seconds + REQUEST_SECONDS
        call.asked = Asked(call.peer, self._address(call.peer), request_id, until)
        self.memory.requests[call.request_id] = call.asked
        self.memory.is_unsaved = True
        trim(self.memory.requests, MAX_REQUESTS)

    def _claim(self, call: ServerCall, now: Instant) -> None:
        """Prepare the claim of a remote start or a reservation, for when the Call is sent."""
        said = call.content
        if said.facts.role not in (Role.REMOTE_START, Role.RESERVE) or said.badge is None:
            return
        badge, connector = normalized(said.badge), said.connector or None
        claim = Claim(call.peer, self._address(call.peer), badge, connector, 0.0)
        claim.reservation, remote_start = said.reservation, said.remote_start
        if remote_start is not None:
            calls = itertools.chain(*self.waiting.values(), [self.outstanding] if self.outstanding else [])
            live = [other for other in self.memory.claims if now.seconds < other.until]
            live += [waiting.claim for waiting in calls if waiting.claim]
            others = {
                other.remote_start[0] for other in live if other.remote_start and other.peer is not call.peer
            }
            claim.remote_start = (
                self._new_number(others) if remote_start in others else remote_start,
                remote_start,
            )
            if remote_start in others:
                call.text = patch(call.text, (3, *said.facts.remote_start), claim.remote_start[0])
        call.claim = claim

    def _new_number(self, used: Container[int]) -> int:
        while True:
            number = random.randrange(1, MAX_ID)
            if number not in used:
                return number

    def _wire_ids(self) -> set[str]:
        """Return the message ids of servers' Calls that the charger may still answer."""
        calls = itertools.chain(*self.waiting.values(), [self.outstanding] if self.outstanding else [])
        return {call.wire_id for call in calls}.union(self.spent)

    def _next(self, now: Instant) -> list[Decision]:
        """Send the next Call if the charger has none to answer; the servers take turns."""
        if self.outstanding:
            return []
        turns = sorted(self.waiting, key=lambda peer: peer is self.last_served)
        for peer in turns:
            if self.waiting[peer]:
                call = self.waiting[peer].popleft()
                self.outstanding, self.last_served, call.sent = call, peer, now.seconds
                self._note_sent(call, now)
                # What the charger does about it may outlive the proxy.
                after = After.SAVE if call.claim or call.asked else After.NOTHING
                return [ToCharger(call.text, f"{peer.value} calls {call.action}", after)]
        return []

    def _note_sent(self, call: ServerCall, now: Instant) -> None:
        if call.claim:
            call.claim.until = now.seconds + self._claim_seconds(call, now)
            self.memory.claims.append(call.claim)
            self.memory.is_unsaved = True
            del self.memory.claims[:-MAX_CLAIMS]

    def _claim_seconds(self, call: ServerCall, now: Instant) -> float:
        """Return for how long the claim holds: a reservation until its expiry date."""
        if call.content.facts.role is not Role.RESERVE:
            return CLAIM_SECONDS
        date = call.content.payload.get("expiryDate", call.content.payload.get("expiryDateTime"))
        try:
            expiry = datetime.fromisoformat(date if type(date) is str else "")
        except ValueError:
            return CLAIM_SECONDS
        return max(0.0, expiry.replace(tzinfo=expiry.tzinfo or UTC).timestamp() - now.utc)

    # Answers of the charger (rule 5).

    def charger_answer(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on the charger's answer to a Call of a server."""
        call = self.outstanding
        if call is None or call.wire_id != message.message_id:
            late = self.spent.pop(message.message_id, None)
            told = self._settle_claim(late, message) if late else []
            return [*told, Dropped("an answer to a Call that nobody waits for")]
        self.outstanding, self.last_answered = None, (call.peer, call.message_id, call.wire_id)
        decisions = self._settle_claim(call, message)
        if call.is_abandoned or call.peer is Peer.PROXY:
            return [*decisions, Dropped(f"the {call.peer.value} does not wait for it"), *self._next(now)]
        text = message.text
        if call.wire_id != call.message_id:
            text = with_message_id(text, call.message_id)
        if call.content.facts.role in (Role.REMOTE_START, Role.RESERVE, Role.CANCEL, Role.COMMAND):
            outcome = message.action or str(message.payload.get("status", "done"))[:40]
            decisions.append(Told(f"{call.peer.value} asked for {call.action}: {outcome}"))
        answer = Answer(call.peer, text, "the charger answers", outcome_of(message))
        return [answer, *decisions, *self._next(now)]

    def _settle_claim(self, call: ServerCall, message: Message) -> list[Decision]:
        """Void what the charger refused; end what it cancelled; own what it says has begun."""
        status = str(message.payload.get("status", "Accepted"))
        if message.type is MessageType.CALLERROR or not status.startswith("Accepted"):  # Or AcceptedCanceled.
            self._void(call)
        elif call.action in ASKED_BY:
            self.memory.askers[call.action] = Asked(call.peer, self._address(call.peer), 0, math.inf)
            self.memory.is_unsaved = True
        elif call.content.facts.role is Role.CANCEL:
            self.memory.is_unsaved = True
            reservation = call.content.reservation
            self.memory.claims = [
                claim
                for claim in self.memory.claims
                if claim.peer is not call.peer
                or claim.reservation is None
                or claim.reservation != reservation
            ]
        elif call.claim and call.claim.remote_start:
            session = self.memory.sessions.get(str(message.payload.get("transactionId", "")))
            if session and session.owner is None:
                badge = call.content.badge or ""
                return self._own(session, Route(call.peer, "its remote start", claim=call.claim), badge)
        return []

    def _void(self, call: ServerCall) -> None:
        """Undo what a Call has noted that the charger refuses."""
        self.memory.is_unsaved = True
        if call.claim in self.memory.claims:
            self.memory.claims.remove(call.claim)
        if call.request_id is not None and self.memory.requests.get(call.request_id) is call.asked:
            self.memory.requests.pop(call.request_id)
            if call.asked_before:
                self.memory.requests[call.request_id] = call.asked_before

    def result_error(self, sender: Peer, message: Message) -> list[Decision]:
        """Decide on a CallResultError (OCPP 2.1): it goes to whoever gave the last answer."""
        if sender is Peer.CHARGER:
            if self.last_relayed and self.last_relayed[2] == message.message_id:
                peer, message_id, _ = self.last_relayed
                text = with_message_id(message.text, message_id)
                return [Answer(peer, text, "an answer was unfit", Outcome.ERROR)]
        elif self.last_answered and self.last_answered[:2] == (sender, message.message_id):
            return [ToCharger(with_message_id(message.text, self.last_answered[2]), "an answer was unfit")]
        return [Dropped("a CallResultError for an answer that nobody gave")]

    # What time and lost connections do.

    def _given_up(self, call: ServerCall, why: str) -> list[Decision]:
        """Tell its server that a Call will not be answered."""
        if call.peer is Peer.PROXY or call.is_abandoned:
            return [Dropped(why)]
        text = error_text(call.message_id, "GenericError", why)
        return [Answer(call.peer, text, why, Outcome.UNANSWERED)]

    def tick(self, now: Instant) -> list[Decision]:
        """Give up what has waited too long."""
        decisions: list[Decision] = []
        call = self.outstanding
        if call and now.seconds >= call.sent + self.call_timeout:
            self.outstanding = None
            self.spent[call.wire_id] = call
            trim(self.spent, MAX_SPENT_IDS)
            decisions += self._given_up(call, f"the charger did not answer within {self.call_timeout:g} s")
        for waiting in self.waiting.values():
            while waiting and now.seconds >= waiting[0].queued + 2 * self.call_timeout:
                decisions += self._given_up(waiting.popleft(), "the charger was busy for too long")
        if now.seconds >= self.next_sweep:
            # At random, so that not all chargers' sessions are written at once.
            self.next_sweep = now.seconds + SWEEP_SECONDS * random.uniform(0.5, 1.0)
            decisions += self.sweep(now)
        return decisions + self._next(now)

    def due(self) -> float:
        """Return when `tick` has something to do, in monotonic seconds."""
        if not (self.outstanding or self.waiting):
            return self.next_sweep
        times = [self.next_sweep]
        if self.outstanding:
            times.append(self.outstanding.sent + self.call_timeout)
        times += [calls[0].queued + 2 * self.call_timeout for calls in self.waiting.values() if calls]
        return min(times)

    def sweep(self, now: Instant) -> list[Decision]:
        """Remove what has expired."""
        memory, told = self.memory, list[Decision]()
        memory.claims = [claim for claim in memory.claims if now.seconds < claim.until + RESERVATION_SECONDS]
        memory.requests = {key: asked for key, asked in memory.requests.items() if now.seconds < asked.until}
        memory.accepted = {
            key: when for key, when in memory.accepted.items() if now.seconds - when <= ACCEPTED_SECONDS
        }
        memory.is_unsaved = True
        for session in list(memory.sessions.values()):
            if session.ended is None and now.seconds - session.touched <= SWEEP_SECONDS:
                self._save(session)  # So that a restart knows when it was last heard of.
            if session.ended is None and now.seconds - session.touched > SESSION_SECONDS:
                told.append(Told(f"session {session.transaction_id} had no stop", session.badge))
                if session.owner is None:
                    told += self._own(session, Route(Peer.PRIMARY, "a week without a badge"), "")
                told.append(self._end(session, now))
            elif session.ended is not None and now.seconds - session.ended > SESSION_SECONDS:
                self._forget(session)
        return told

    def charger_gone(self) -> list[Decision]:
        """Give up all Calls that the charger's connection leaves unanswered."""
        calls = [self.outstanding] if self.outstanding else []
        calls += itertools.chain(*self.waiting.values())
        self.outstanding, self.waiting = None, {}
        self.spent.clear()  # Whatever comes on its next connection answers none of them.
        return [decision for call in calls for decision in self._given_up(call, "the charger is gone")]

    def server_gone(self, peer: Peer) -> None:
        """Forget the Calls of a server's connection that was lost; it will not wait for their answers."""
        self.waiting.pop(peer, None)
        if self.outstanding and self.outstanding.peer is peer:
            self.outstanding.is_abandoned = True
        if self.last_answered and self.last_answered[0] is peer:
            self.last_answered = None
        if self.last_relayed and self.last_relayed[0] is peer:
            self.last_relayed = None


# ---------------------------------------------------------------------------------------------------------
# Journal
#
# What outlives a connection and, unless `state = none`, the process: the Memory of every charger with its
# stored Calls. What has changed is written by a thread of its own, all chargers' changes in one transaction
# and one sync: the loop never waits for the disk, and the file always shows a moment between two messages.
# ---------------------------------------------------------------------------------------------------------

MAX_MEMORIES = 10_000  # Chargers that are remembered; beyond it the oldest without anything open go.
MAX_LOOKED_THROUGH = 100  # Chargers, at a time, for one that can be forgotten.
MAX_REFUSED = 1_000  # Refused Calls of one charger that are kept to be shown.
MAX_PROMISES = 10_000  # Answers that wait for the disk; beyond it chargers have to ask again.
KEEP_SECONDS = 400 * DAY  # Sessions stay in the file for so long.
PURGE_SECONDS = float(DAY)  # How often those that are older are removed.
SAVE_SECONDS = 5.0  # A disk that takes longer counts as failing.
SAVE_RETRY_SECONDS = 1.0  # After a save that failed.
CLOCK_STEP_SECONDS = 60.0  # A wall clock that was set by more: all times on disk are written again.
COMPLAINT_SECONDS = 60.0  # Between two WARNINGs about the same trouble.
LOCK_SECONDS = 2.0  # For another process to let go of the file.
MAX_LOG_BYTES = 4 * 2**20  # Of sqlite's write-ahead log, once its contents are in the file.
LAST_SAVE_SECONDS = 1.0  # At the end.
LET_GO_SECONDS = 0.5  # For sqlite to close the file after it; what it leaves undone, the next start does.
MAX_UNLISTED = 100  # Badges that were shown and are on no list; beyond it the oldest goes.
MAX_LOOKED_AT = 2_000  # Sessions, the newest, that can be looked up where there is no file:
ROWS_AT_ONCE = 50  # put into a database so many at a time.
RETRY_SECONDS = (10.0, 60.0)  # Before the second and the third try of a stored Call that met a CallError.

UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # Not: in trouble.
MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError)  # What rows of another making raise.
APPLICATION_ID = 0x6F327770  # "o2wp": marks the file as the proxy's.
SCHEMA_VERSION = 2
# What makes of a file of this version one of the next.
MIGRATIONS = {
    1: (
        "ALTER TABLE chargers ADD COLUMN seen REAL NOT NULL DEFAULT 0",
        "UPDATE chargers SET seen = coalesce("
        "(SELECT max(touched) FROM sessions WHERE sessions.charger = chargers.charger), strftime('%s') + 0)",
        # It was set by the start, too.
        "UPDATE sessions SET delivered = NULL WHERE ended IS NULL OR delivered < ended",
    )
}
SCHEMA = """
CREATE TABLE chargers (
    charger TEXT PRIMARY KEY,
    version TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    seen REAL NOT NULL,      -- by the proxy's clock, in seconds since 1970
    boot TEXT NOT NULL,
    heartbeat_interval INTEGER NOT NULL,
    dropped INTEGER NOT NULL,
    statuses TEXT NOT NULL,  -- JSON, like all that follows: connector to the text of its last status
    claims TEXT NOT NULL,
    requests TEXT NOT NULL,
    askers TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY,
    charger TEXT NOT NULL,
    owner TEXT,              -- NULL: not known yet
    server TEXT NOT NULL,    -- the owner's address when the session began
    badge TEXT NOT NULL,
    connector INTEGER,       -- OCPP 2.x: the EVSE
    transaction_id TEXT,     -- JSON; as the charger knows it
    server_id TEXT,          -- JSON; as its owner knows it
    begun REAL NOT NULL,     -- by the proxy's clock, in seconds since 1970, like touched, ended, delivered
    touched REAL NOT NULL,
    ended REAL,
    delivered REAL,          -- when its owner accepted the stop
    started_at TEXT NOT NULL,  -- by the charger's clock
    stopped_at TEXT NOT NULL,
    meter_start REAL,        -- Wh
    meter_stop REAL,
    reason TEXT NOT NULL,
    refused TEXT NOT NULL,   -- the owner's words
    is_rejected INTEGER NOT NULL,
    is_undeliverable INTEGER NOT NULL,
    has_error INTEGER NOT NULL,
    is_told INTEGER NOT NULL,
    is_vouched INTEGER NOT NULL,
    has_verdict INTEGER NOT NULL,
    is_stop_stored INTEGER NOT NULL,
    has_connector INTEGER NOT NULL,  -- it is the open session there
    start TEXT NOT NULL,
    stop TEXT NOT NULL,
    start_answer TEXT,       -- JSON, like all that follows
    remote_start TEXT,
    seen TEXT NOT NULL,
    kept TEXT NOT NULL
);
CREATE INDEX sessions_by_end ON sessions (ended);
CREATE TABLE calls (
    number INTEGER PRIMARY KEY,
    charger TEXT NOT NULL,
    peer TEXT NOT NULL,
    session INTEGER,
    server TEXT NOT NULL,    -- the address that it is for
    version TEXT NOT NULL,
    since REAL NOT NULL,
    text TEXT NOT NULL,
    is_kept INTEGER NOT NULL,
    refused TEXT,            -- NULL: it waits; else the server's words
    is_error INTEGER NOT NULL,
    tries INTEGER NOT NULL   -- CallErrors that it met itself before it was refused
);
CREATE INDEX calls_by_session ON calls (session);
"""
# Attributes of a Session whose columns have their names; what a flag's column holds becomes a bool again.
SESSION_TEXTS = ("server", "badge", "started_at", "stopped_at", "reason", "refused", "start", "stop")
SESSION_NUMBERS = ("number", "connector", "begun", "delivered", "meter_start", "meter_stop")
SESSION_FLAGS = (
    *("is_rejected", "is_undeliverable", "has_error", "is_told", "is_vouched", "has_verdict"),
    "is_stop_stored",
)
SESSION_JSON = ("transaction_id", "server_id", "start_answer")
MAX_COLUMN = 2**63 - 1  # The largest number that sqlite holds.

Row = dict[str, Any]  # Column to value.
Statement = tuple[str, Row]


class StateError(Exception):
    """The state file cannot be used, as one line for stderr."""


class KeptCall(NamedTuple):
    """Where a stored Call stands in the file."""

    memory: Memory
    peer: Peer
    refused: str | None = None  # The server's words; None = it waits.
    is_error: bool = False
    is_gone: bool = False  # The server has accepted it.


def storable(value: Any) -> Any:
    """Return the value as sqlite takes it, whatever a peer has sent."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "backslashreplace").decode()  # A lone surrogate is no text for sqlite.
    if isinstance(value, int):
        return max(-MAX_COLUMN, min(value, MAX_COLUMN))
    return value


def upsert(table: str, row: Row) -> Statement:
    """Return the statement that writes a row, in the place of the one of the same key."""
    columns = ", ".join(row)
    places = ", ".join(f":{column}" for column in row)
    values = {column: storable(value) for column, value in row.items()}
    return f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({places})", values


# Rows. Times are monotonic in memory, UTC on disk; a clock that was set back makes nothing younger than now.


def to_utc(seconds: float, now: Instant) -> float:
    """Return monotonic seconds as UTC seconds."""
    return seconds - now.seconds + now.utc


def from_utc(utc: float, now: Instant, most: float) -> float:
    """Return UTC seconds as monotonic ones, at most so many seconds from now."""
    return now.seconds + min(utc - now.utc, most)


def pair(values: list[int] | None) -> tuple[int, int] | None:
    """Return what JSON has made a list of."""
    return (values[0], values[1]) if values else None


def charger_row(memory: Memory, now: Instant) -> Row:
    claims = [
        {**asdict(claim), "peer": claim.peer.value, "until": to_utc(claim.until, now)}
        for claim in memory.claims
    ]
    return {
        "charger": memory.charger_id,
        "version": memory.version,
        "user_agent": memory.user_agent,
        "seen": memory.seen,
        "boot": memory.boot,
        "heartbeat_interval": memory.heartbeat_interval,
        "dropped": memory.dropped,
        "statuses": dump(memory.statuses),
        "claims": dump(claims),
        "requests": dump([(key, *asked_row(asked, now)) for key, asked in memory.requests.items()]),
        "askers": dump([(action, *asked_row(asked, now)) for action, asked in memory.askers.items()]),
    }


def asked_row(asked: Asked, now: Instant) -> tuple[Any, ...]:
    return asked.peer.value, asked.server, asked.request_id, to_utc(asked.until, now)


def asked_of(values: list[Any], now: Instant) -> Asked:
    peer, server, request_id, until = values
    most = REQUEST_SECONDS if until < math.inf else math.inf
    return Asked(Peer(peer), server, request_id, from_utc(until, now, most))


def memory_of(row: Any, now: Instant) -> Memory:
    """Return what a charger's row says; sessions and Calls are still missing."""
    memory = Memory(row["charger"], row["version"], row["user_agent"], row["seen"], boot=row["boot"])
    memory.heartbeat_interval, memory.dropped = row["heartbeat_interval"], row["dropped"]
    memory.statuses = json.loads(row["statuses"])
    for values in json.loads(row["claims"]):
        claim = Claim(**values)
        claim.peer, claim.remote_start = Peer(values["peer"]), pair(values["remote_start"])
        most = CLAIM_SECONDS if claim.reservation is None else math.inf
        claim.until = from_utc(claim.until, now, most)
        memory.claims.append(claim)
    for key, *values in json.loads(row["requests"]):
        memory.requests[key] = asked_of(values, now)
    for action, *values in json.loads(row["askers"]):
        memory.askers[action] = asked_of(values, now)
    return memory


def session_row(memory: Memory, session: Session, now: Instant) -> Row:
    held = memory.connectors.get(session.connector) if session.connector is not None else None
    return {
        "charger": memory.charger_id,
        "owner": session.owner.value if session.owner else None,
        "touched": to_utc(session.touched, now),
        "ended": None if session.ended is None else to_utc(session.ended, now),
        "has_connector": held is session,
        "remote_start": dump(session.remote_start),
        "seen": dump(list(session.seen)),
        "kept": dump([call.text for call in session.kept]),
        **{name: getattr(session, name) for name in SESSION_TEXTS + SESSION_NUMBERS + SESSION_FLAGS},
        **{name: dump(getattr(session, name)) for name in SESSION_JSON},
    }


def session_of(row: Any, memory: Memory, now: Instant) -> Session:
    """Return the session that a row tells of. Raises ValueError."""
    owner = Peer(row["owner"]) if row["owner"] else None
    touched = from_utc(row["touched"], now, 0.0)
    session = Session(owner, row["badge"], row["connector"], row["begun"], touched)
    for name in SESSION_TEXTS + SESSION_NUMBERS:
        setattr(session, name, row[name])
    for name in SESSION_FLAGS:
        setattr(session, name, bool(row[name]))
    for name in SESSION_JSON:
        setattr(session, name, json.loads(row[name]))
    session.remote_start = pair(json.loads(row["remote_start"]))
    session.seen.extend(json.loads(row["seen"]))
    session.kept = [stored_call(text, memory.version, session) for text in json.loads(row["kept"])]
    for call in session.kept:
        call.is_kept = True
    if row["ended"] is not None:
        session.ended = from_utc(row["ended"], now, 0.0)
    elif session.owner and now.seconds - touched > SESSION_SECONDS:
        session.ended = touched + SESSION_SECONDS
        memory.unsaved[session] = None
    return session


def stored_call(text: str, version: str, session: Session | None) -> Call:
    """Return the stored Call that a text is. Raises MessageError."""
    message = parse(text)
    vocabulary = VOCABULARIES.get(version, VOCABULARIES["ocpp1.6"])
    facts = vocabulary.charger.get(message.action, PLAIN)
    said = Content(facts, message.payload)
    return Call(Kind.STORED, message.action, message.message_id, text, said, session=session, version=version)


def recall(memory: Memory, row: Any, session: Session | None) -> None:
    """Put a stored Call back into its charger's Memory; what met CallErrors is tried once more."""
    call, is_error = stored_call(row["text"], row["version"], session), bool(row["is_error"])
    call.number, call.since, call.server = row["number"], float(row["since"]), row["server"]
    call.is_kept, call.is_on_disk, peer = bool(row["is_kept"]), True, Peer(row["peer"])
    if row["refused"] is not None and not is_error:
        memory.refused.append(Refusal(peer, call, row["refused"], False))
        return
    memory.stored.setdefault(peer, []).append(call)
    memory.stored_text += len(call.text)
    if is_error:
        call.tries = row["tries"]
        if session and call.content.is_start:
            session.refused, session.is_undeliverable, session.has_error = "", False, False


def call_row(kept: KeptCall, call: Call) -> Row:
    return {
        "number": call.number,
        "charger": kept.memory.charger_id,
        "peer": kept.peer.value,
        "session": call.session.number or None if call.session else None,
        "server": call.server,
        "version": call.version,
        "since": call.since,
        "text": call.text,
        "is_kept": call.is_kept,
        "refused": kept.refused,
        "is_error": kept.is_error,
        "tries": call.tries,
    }


class StateFile:
    """The sqlite file. Locked by the process that has opened it; written by one thread."""

    def __init__(self, path: Path) -> None:
        """Open the file, a new one if there is none. Raises StateError."""
        self.path = path
        try:
            path.touch(0o600)  # It holds badges.
        except OSError as error:
            raise StateError(f"state file {path}: {error.strerror}") from None
        self.connection = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False)
        self.connection.row_factory = sqlite3.Row

    def prepare(self) -> None:
        """Lock it, and make sure that it can be read. Raises StateError or sqlite3.Error."""
        run = self.connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # Taken with the first access, and held until the end.
        ((version,),) = run("PRAGMA user_version")
        ((application,),) = run("PRAGMA application_id")
        ((tables,),) = run("SELECT count(*) FROM sqlite_master")
        if tables and application != APPLICATION_ID:
            raise StateError(f"state file {self.path}: is the database of another program")
        if tables and version not in (SCHEMA_VERSION, *MIGRATIONS):
            raise sqlite3.DatabaseError(f"it has schema version {version}, not {SCHEMA_VERSION}")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
        run("BEGIN IMMEDIATE")
        if not tables:
            for statement in SCHEMA.split(";\n")[:-1]:
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION_ID}")
        for older in range(version, SCHEMA_VERSION) if tables else ():
            for statement in MIGRATIONS[older]:
                run(statement)
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("CREATE INDEX IF NOT EXISTS sessions_by_begin ON sessions (begun)")
        run("COMMIT")

    def load(self, now: Instant) -> dict[str, Memory]:
        """Return the Memory of every charger. Raises sqlite3.Error, MessageError or one of MISSHAPEN."""
        memories = {row["charger"]: memory_of(row, now) for row in self.rows("SELECT * FROM chargers")}
        sessions: dict[int, Session] = {}
        recent = "ended IS NULL OR ended > :since OR number IN (SELECT session FROM calls)"
        values = {"since": now.utc - SESSION_SECONDS}
        for row in self.rows(f"SELECT * FROM sessions WHERE {recent} ORDER BY +number", values):
            memory = memories.setdefault(row["charger"], Memory(row["charger"]))
            session = sessions[row["number"]] = session_of(row, memory, now)
            memory.sessions[session.key] = session
            if row["has_connector"] and session.ended is None and session.connector is not None:
                memory.connectors[session.connector] = session
        for row in self.rows("SELECT * FROM calls ORDER BY number"):
            memory = memories.setdefault(row["charger"], Memory(row["charger"]))
            recall(memory, row, sessions.get(row["session"]))
        return memories

    def rows(self, query: str, values: Row | None = None) -> list[Row]:
        """Return what a query finds. Raises sqlite3.Error."""
        return list(map(dict, self.connection.execute(query, values or {})))

    def last_number(self, table: str) -> int:
        """Return the largest number that a session or a Call has got."""
        (row,) = self.rows(f"SELECT coalesce(max(number), 0) AS number FROM {table}")
        return int(row["number"])

    def write(self, statements: list[Statement]) -> None:
        """Write it all and see it safely on disk, or nothing of it. Raises sqlite3.Error."""
        with self.connection:
            for statement, values in statements:
                self.connection.execute(statement, values)

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()


async def database_of(memories: list[Memory], now: Instant) -> sqlite3.Connection:
    """Return a database of what is remembered, made in small steps; for look-ups where there is no file."""
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    database.executescript(SCHEMA)
    sessions = ((session, memory) for memory in memories for session in memory.sessions.values())
    newest = heapq.nlargest(MAX_LOOKED_AT, sessions, key=lambda entry: entry[0].begun)
    for number, (session, memory) in enumerate(newest):
        database.execute(*upsert("sessions", session_row(memory, session, now)))
        if number % ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
    of_these = {session for session, _ in newest}
    for number, (call, kept) in enumerate(calls_of(memories), 1):
        if call.session in of_these or not (call.session and call.session.number):
            database.execute(*upsert("calls", {**call_row(kept, call), "number": number}))
    return database


def calls_of(memories: Iterable[Memory]) -> Iterator[tuple[Call, KeptCall]]:
    """Yield all stored and refused Calls."""
    for memory in memories:
        for peer, calls in memory.stored.items():
            yield from ((call, KeptCall(memory, peer)) for call in calls)
        for refusal in memory.refused:
            yield refusal.call, KeptCall(memory, refusal.peer, refusal.words, refusal.is_error)


def set_aside(path: Path, now: Instant) -> Path:
    """Rename a file that cannot be read, with its log; return its new path. Raises OSError."""
    date = datetime.fromtimestamp(now.utc, UTC).strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.unreadable-{date}")
    for suffix in ("-wal", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside


PURGE = (
    "DELETE FROM calls WHERE refused IS NOT NULL AND since < :since",
    "DELETE FROM sessions WHERE ended < :since"
    " AND NOT EXISTS (SELECT 1 FROM calls WHERE session = sessions.number)",
)


class Meeting(NamedTuple):
    """When and where a badge was shown last."""

    charger_id: str
    utc: float  # Seconds since 1970.


class News:
    """What has happened since the start, for those who look: counts, and which chargers have changed."""

    def __init__(self) -> None:
        # By metric and labels, which are words of the proxy's own, or members of its Enums.
        self.counts: Counter[tuple[str | Enum, ...]] = Counter()
        self.changed: dict[str, None] = {}  # Charger ids, since somebody looked last; MAX_MEMORIES.
        self.unlisted: dict[str, Meeting] = {}  # By badge, the oldest first; MAX_UNLISTED.
        self.present: set[str] = set()  # Ids of the chargers that are connected; MAX_CHARGERS.

    def count(self, metric: str, *labels: str | Enum) -> None:
        """Count one more."""
        self.counts[metric, *labels] += 1

    def touch(self, charger_id: str) -> None:
        """Take note that a charger has changed."""
        if charger_id not in self.changed:
            self.changed[charger_id] = None
            trim(self.changed, MAX_MEMORIES)

    def meet(self, badge: str, charger_id: str, utc: float) -> None:
        """Take note of a badge that is on no list."""
        self.unlisted.pop(badge, None)
        self.unlisted[badge] = Meeting(charger_id, utc)
        trim(self.unlisted, MAX_UNLISTED)


class Promise(NamedTuple):
    """What is done once a save has succeeded, or failed."""

    then: Callable[[], None]
    otherwise: Callable[[], None] | None  # None = it waits for a save that succeeds.


@dataclass(slots=True)
class Save:
    """What one transaction writes. If it fails, the next one writes it."""

    number: int
    begun: float  # Monotonic seconds.
    memories: dict[Memory, None]  # All that have something in it.
    chargers: dict[Memory, None]  # Those whose own row is in it.
    sessions: dict[Session, Memory]
    calls: dict[Call, KeptCall]
    forgotten: dict[str, None]  # Charger ids.
    is_purge: bool
    promises: list[Promise]
    wakes: dict[Callable[[], None], None]  # One for each outbox.


class Journal:
    """Keeps the Memory of every charger, and saves what has changed in it."""

    def __init__(self, clock: Callable[[], Instant], file: StateFile | None = None) -> None:
        """Take what the file knows. Raises sqlite3.Error, MessageError or one of MISSHAPEN."""
        self.clock = clock
        self.file = file  # None: in memory only.
        self.news = News()
        self.memories: dict[str, Memory] = {}  # By charger id.
        self.changed: dict[Memory, None] = {}  # With something unsaved.
        self.calls: dict[Call, KeptCall] = {}  # Unsaved.
        self.forgotten: dict[str, None] = {}  # Charger ids; unsaved.
        self.promises: list[Promise] = []  # For after the next save; MAX_PROMISES.
        self.wakes: dict[Callable[[], None], None] = {}  # For after the next save; one for each outbox.
        self.next_save = 1  # The number of the save that what changes now is a part of.
        self.saved = 0  # The number of the last save that succeeded.
        self.saving: Save | None = None  # The one that the thread is at.
        self.is_due = False  # The next save is about to begin.
        self.failure = ""  # Why the last save failed; "" = it did not.
        self.retry_at = 0.0  # Monotonic seconds.
        self.complain_at = 0.0  # Monotonic seconds.
        self.has_complained = False  # Of this failure.
        self.purge_at = 0.0  # Monotonic seconds.
        self.offset = self._offset()  # UTC less monotonic seconds, as the times on disk have it.
        # For the thread: each job returns what the loop does then; one save, the look-ups, None = the end.
        self.jobs: queue.SimpleQueue[Callable[[], Callable[[], None]] | None] = queue.SimpleQueue()
        self.last_session = self.last_call = 0  # The largest numbers given.
        self.writer: threading.Thread | None = None
        if file:
            self.memories = file.load(clock())
            for memory in self.memories.values():
                self.note(memory)
            self.last_session, self.last_call = file.last_number("sessions"), file.last_number("calls")

    @classmethod
    def open(cls, path: Path, clock: Callable[[], Instant]) -> Self:
        """Return the journal in the file; one that is unreadable is set aside. Raises StateError."""
        try:
            return cls._opened(path, clock)
        except (sqlite3.Error, MessageError, *MISSHAPEN) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                advice = "stop that one, or name another file with `state`"
                raise StateError(f"state file {path}: another process uses it; {advice}") from None
            if code not in UNREADABLE:
                raise StateError(f"state file {path}: {error}") from None
            words = str(error)
        try:
            aside = set_aside(path, clock())
            journal = cls._opened(path, clock)
        except (OSError, sqlite3.Error) as error:
            raise StateError(f"state file {path}: {words}; {error}") from None
        log.error("state file %s cannot be read: %s; a new one is begun", path, words)
        log.error("the unreadable one is kept as %s; the sessions in it are not delivered", aside)
        return journal

    @classmethod
    def _opened(cls, path: Path, clock: Callable[[], Instant]) -> Self:
        with ExitStack() as opened:
            file = StateFile(path)
            opened.callback(file.close)
            file.prepare()
            journal = cls(clock, file)
            opened.pop_all()
        return journal

    # What is kept.

    def memory(self, charger_id: str) -> Memory:
        """Return the Memory of a charger, a new one if there is none."""
        memory = self.memories.get(charger_id)
        if memory is None:
            self._make_room(MAX_MEMORIES - 1)
            memory = self.memories[charger_id] = Memory(charger_id, is_unsaved=True)
            self.forgotten.pop(charger_id, None)
        return memory

    def has_room(self, charger_id: str) -> bool:
        """Whether a charger is remembered, or can be without forgetting one that is needed."""
        return charger_id in self.memories or self._make_room(MAX_MEMORIES - 1)

    def _make_room(self, most: int) -> bool:
        """Forget idle chargers, the oldest first, beyond so many; return whether there are no more then."""
        for name in list(itertools.islice(self.memories, MAX_LOOKED_THROUGH)):
            if len(self.memories) <= most:
                break
            memory = self.memories.pop(name)
            if memory.is_needed:
                self.memories[name] = memory  # Last, so that the next look begins with others.
            else:
                self.forgotten[name] = None
                self.news.touch(name)
        return len(self.memories) <= most

    def note(self, memory: Memory) -> None:
        """Save what has changed in a Memory, soon."""
        self.news.touch(memory.charger_id)
        if self.file is None:
            self._number(memory.unsaved)
            memory.unsaved.clear()
            memory.is_unsaved = False
        elif memory.unsaved or memory.is_unsaved:
            self.changed[memory] = None

    def store(self, memory: Memory, peer: Peer, call: Call) -> Call | None:
        """Keep a Call until its server has answered it. Return a reading that had to go for it."""
        memory.stored.setdefault(peer, []).append(call)
        memory.stored_text += len(call.text)
        self._save_call(call, KeptCall(memory, peer))
        has_many = sum(map(len, memory.stored.values())) > MAX_STORED
        dropped = self._drop_oldest_reading(memory) if has_many else None
        memory.is_full = memory.stored_text > MAX_STORED_TEXT or (has_many and dropped is None)
        return dropped

    def _drop_oldest_reading(self, memory: Memory) -> Call | None:
        oldest: list[tuple[Peer, Call]] = []
        for peer, calls in memory.stored.items():
            readings = (call for call in calls if call.is_reading and call.sent is None)
            oldest += [(peer, call) for call in itertools.islice(readings, 1)]
        if not oldest:
            return None
        peer, reading = min(oldest, key=lambda kept: kept[1].since)
        memory.dropped, memory.is_unsaved = memory.dropped + 1, True
        self.remove(memory, peer, reading)
        return reading

    def repeats_unsaved(self, memory: Memory, peer: Peer, call: Call) -> bool:
        """Whether the charger repeats what it has no answer to, because the disk fails."""
        saving = self.saving.calls if self.saving else {}
        for calls in (memory.stored.get(peer, []), [refusal.call for refusal in memory.refused]):
            for old in reversed(calls if self.failure else []):
                if old not in self.calls and old not in saving:
                    break
                if (old.action, old.content.payload) == (call.action, call.content.payload):
                    return True
        return False

    def remove(self, memory: Memory, peer: Peer, call: Call) -> None:
        """Forget a Call that its server has answered."""
        if call in memory.stored.get(peer, []):
            memory.stored[peer].remove(call)
            memory.stored_text -= len(call.text)
            memory.is_full = memory.stored_text > MAX_STORED_TEXT
            self._save_call(call, KeptCall(memory, peer, is_gone=True))

    def refuse(self, memory: Memory, refusal: Refusal) -> None:
        """Keep a Call as refused by its server."""
        peer, call, words, is_error = refusal
        self.remove(memory, peer, call)
        memory.refused.append(refusal)
        self._save_call(call, KeptCall(memory, peer, words, is_error))
        length = sum(len(old.call.text) for old in memory.refused)
        while len(memory.refused) > MAX_REFUSED or length > MAX_STORED_TEXT:
            oldest = memory.refused.pop(0)
            length -= len(oldest.call.text)
            self._save_call(oldest.call, KeptCall(memory, oldest.peer, is_gone=True))
            log.warning("%s: of more than %d refused Calls the oldest goes", memory.charger_id, MAX_REFUSED)

    def _save_call(self, call: Call, kept: KeptCall) -> None:
        call.since = call.since or self.clock().utc
        if self.file is None:
            return
        self.changed[kept.memory] = None
        is_being_saved = self.saving is not None and call in self.saving.calls
        if kept.is_gone and not (call.is_on_disk or is_being_saved):
            self.calls.pop(call, None)
        else:
            self.calls[call] = kept

    # Saving.

    def is_saved(self, memory: Memory) -> bool:
        """Whether all that is kept of a charger is on disk."""
        self.note(memory)
        return self.file is None or (memory not in self.changed and memory.saved_with <= self.saved)

    def commit(
        self, memory: Memory, then: Callable[[], None], otherwise: Callable[[], None] | None = None
    ) -> bool:
        """Call `then` once all that is kept of a charger so far is on disk; for each charger in order.

        Where the disk fails, `otherwise` is called in its place; without it, `then` waits until it is back.
        Return False, and call neither, if too many wait already.
        """
        is_saved = self.is_saved(memory)
        is_being_saved = memory not in self.changed
        promises = self.saving.promises if self.saving and is_being_saved else self.promises
        if is_saved:
            then()
        elif self.failure and otherwise:
            otherwise()
        elif otherwise or len(promises) < MAX_PROMISES:
            promises.append(Promise(then, otherwise))
            self._save_soon()
        else:
            return False
        return True

    def wake(self, then: Callable[[], None]) -> None:
        """Call `then` after the next save, and when it turns out to fail; asked for twice, once."""
        if self.file:
            self.wakes[then] = None
            self._save_soon()

    def _save_soon(self) -> None:
        """Save at the end of this turn of the loop, when every message of it has been dealt with."""
        if not self.is_due and self.saving is None and not self.failure:
            self.is_due = True
            asyncio.get_running_loop().call_soon(self.save)

    def tick(self) -> None:
        """Save what nobody waits for; complain of a disk that fails."""
        now = self.clock().seconds
        if self.file is None:
            return
        if abs(self._offset() - self.offset) > CLOCK_STEP_SECONDS:
            self._write_all_again()
        if self.saving and now >= self.saving.begun + SAVE_SECONDS:
            self._fail(f"no answer for {SAVE_SECONDS:g} s")
            self.saving.promises = self._broken(self.saving.promises)
            self.promises = self._broken(self.promises)
            for then in [*self.saving.wakes, *self.wakes]:
                then()
        elif self.saving is None and now >= self.retry_at:
            self.save()

    def _offset(self) -> float:
        now = self.clock()
        return now.utc - now.seconds

    def _write_all_again(self) -> None:
        """Let the times on disk follow a wall clock that was set: a restart must find no session too old."""
        self.offset = self._offset()
        for memory in self.memories.values():
            memory.unsaved.update(dict.fromkeys(memory.sessions.values()))
            memory.is_unsaved = True
            self.note(memory)

    def save(self) -> None:
        """Hand over to the thread what has changed, unless it is still at the last save."""
        self.is_due = False
        if self.file is None or self.saving:
            return
        save = self._collected()
        statements = self._statements(save)
        if not statements:
            self._saved(save)
            return
        self.saving = save
        self._hand_over(partial(self._written, save, statements))

    def _hand_over(self, job: Callable[[], Callable[[], None]]) -> None:
        """Let the thread do a job, and the loop then what it returns."""
        if self.writer is None:
            loop = asyncio.get_running_loop()
            self.writer = threading.Thread(target=self._work, args=(loop,), name="journal", daemon=True)
            self.writer.start()
        self.jobs.put(job)

    def _collected(self) -> Save:
        """Take all that is unsaved out of the Memories and out of the journal."""
        now = self.clock().seconds
        is_purge = now >= self.purge_at
        calls, forgotten, promises, wakes = self.calls, self.forgotten, self.promises, self.wakes
        memories, self.changed = self.changed, {}
        save = Save(self.next_save, now, memories, {}, {}, calls, forgotten, is_purge, promises, wakes)
        self.calls, self.forgotten, self.promises, self.wakes = {}, {}, [], {}
        self.next_save += 1
        if is_purge:
            self.purge_at = now + PURGE_SECONDS
        for memory in memories:
            if memory.is_unsaved:
                save.chargers[memory] = None
            save.sessions.update(dict.fromkeys(memory.unsaved, memory))
            memory.unsaved, memory.is_unsaved, memory.saved_with = {}, False, save.number
        return save

    def _statements(self, save: Save) -> list[Statement]:
        now = self.clock()
        self._number(save.sessions)
        for call, kept in save.calls.items():
            if not call.number and not kept.is_gone:
                call.number = self.last_call = self.last_call + 1
        statements = [upsert("chargers", charger_row(memory, now)) for memory in save.chargers]
        statements += [
            upsert("sessions", session_row(memory, session, now)) for session, memory in save.sessions.items()
        ]
        for call, kept in save.calls.items():
            if not kept.is_gone:
                statements.append(upsert("calls", call_row(kept, call)))
            else:
                statements.append(("DELETE FROM calls WHERE number = :number", {"number": call.number}))
        for charger_id in save.forgotten:
            statements.append(("DELETE FROM chargers WHERE charger = :charger", {"charger": charger_id}))
        if save.is_purge:
            statements += [(statement, {"since": now.utc - KEEP_SECONDS}) for statement in PURGE]
        return statements

    def _number(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            if not session.number:
                session.number = self.last_session = self.last_session + 1

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do one job after another, and let go of the file in the end; runs in the thread."""
        assert self.file is not None, "only what has a file has a thread"
        while job := self.jobs.get():
            then = job()
            try:
                loop.call_soon_threadsafe(then)
            except RuntimeError:
                break  # The loop is closed: nobody waits any more.
        self.file.close()

    def _written(self, save: Save, statements: list[Statement]) -> Callable[[], None]:
        """Write, in the thread; return what the loop makes of it."""
        assert self.file is not None, "only what has a file is saved"
        try:
            self.file.write(statements)
        except sqlite3.Error as error:
            return partial(self._not_saved, save, str(error))
        return partial(self._saved, save)

    async def look_up(self, query: str, values: Row) -> list[Row]:
        """Return rows of the state file, as they are on disk. Raises sqlite3.Error."""
        if self.file is None:
            with closing(await database_of(list(self.memories.values()), self.clock())) as database:
                return list(map(dict, database.execute(query, values)))
        found: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        self._hand_over(partial(self._looked_up, query, values, found))
        return await found

    def _looked_up(self, query: str, values: Row, found: asyncio.Future[list[Row]]) -> Callable[[], None]:
        """Look up, in the thread; return what the loop makes of it."""
        assert self.file is not None, "only what has a file is looked into by the thread"
        if found.done():
            return lambda: None  # Nobody waits any more.
        tell: Callable[[], None]
        try:
            tell = partial(found.set_result, self.file.rows(query, values))
        except sqlite3.Error as error:
            tell = partial(found.set_exception, error)
        return lambda: None if found.done() else tell()  # Nobody may be waiting any more.

    def _saved(self, save: Save) -> None:
        """Keep the promises of a save that is on disk."""
        self.saving, self.saved = None, save.number
        if self.failure and self.has_complained:
            log.info("state file %s can be written again; what waited for it goes on", self._path())
        self.failure, self.has_complained = "", False
        for call, kept in save.calls.items():
            call.is_on_disk = not kept.is_gone
        for promise in save.promises:
            promise.then()
        for then in save.wakes:
            then()
        if self.promises or self.wakes:
            self._save_soon()

    def _not_saved(self, save: Save, error: str) -> None:
        """Take back what could not be saved, for the next save."""
        self.saving = None
        self._fail(error)
        self.calls = {**save.calls, **self.calls}
        forgotten = [name for name in save.forgotten if name not in self.memories]
        self.forgotten = {**dict.fromkeys(forgotten), **self.forgotten}
        self.changed = {**save.memories, **self.changed}
        for memory in save.chargers:
            memory.is_unsaved = True
        for session, memory in save.sessions.items():
            memory.unsaved[session] = None
        if save.is_purge:
            self.purge_at = 0.0
        self.promises = self._broken([*save.promises, *self.promises])
        self.wakes = {**save.wakes, **self.wakes}
        for then in list(self.wakes):
            then()

    def _fail(self, why: str) -> None:
        now = self.clock().seconds
        self.failure, self.retry_at = why, now + SAVE_RETRY_SECONDS
        if now >= self.complain_at:
            self.complain_at, self.has_complained = now + COMPLAINT_SECONDS, True
            log.warning(
                "state file %s cannot be written: %s; relayed traffic goes on, what the proxy itself would"
                " have to keep stays unanswered, for the charger to keep",
                *(self._path(), why),
            )

    def _path(self) -> str:
        return str(self.file.path) if self.file else "none"

    def _broken(self, promises: list[Promise]) -> list[Promise]:
        """Do what goes on without the disk; return the rest."""
        for promise in promises:
            if promise.otherwise:
                promise.otherwise()
        return [promise for promise in promises if not promise.otherwise]

    async def close(self) -> None:
        """Save the last changes and let go of the file; a disk that takes too long is left behind."""
        if self.file is None:
            return
        is_saved = asyncio.Event()
        self.promises.append(Promise(is_saved.set, None))
        self.save()
        try:
            await asyncio.wait_for(is_saved.wait(), LAST_SAVE_SECONDS)
        except TimeoutError:
            why = self.failure or "the disk is too slow"
            log.error("state file %s: the last changes may be lost: %s", self._path(), why)
        if self.writer is None:
            self.file.close()
            return
        self.jobs.put(None)
        self.writer.join(LET_GO_SECONDS)


# ---------------------------------------------------------------------------------------------------------
# Link
#
# One websocket: bytes to texts and back, for all three peers alike. An asyncio.BufferedProtocol drives the
# Sans-I/O layer of websockets, so a message is handled in the callback that received it: no task waits for
# it and nothing is awaited between its arrival and the decision on it. Only the frame that nearly every
# message is, one whole text, is read and written here.
# ---------------------------------------------------------------------------------------------------------

DIAL_SECONDS = 8.0  # From the decision to dial a server to its 101; less than a charger's patience.
NEXT_ADDRESS_SECONDS = 2.0  # For one of a server's addresses, before the next is tried.
HANDSHAKE_SECONDS = 10.0  # From a charger's TCP connection to its complete request.
CLOSE_SECONDS = 3.0  # From a Close frame to the end of the TCP connection, then it is cut.
PROBE_SECONDS = 5.0  # For the Pong of a charger whose place a newcomer wants.
MAX_EARLY = 16  # Texts that a peer may send before there is somebody to hear them.
MAX_EARLY_BYTES = 2**16  # Likewise; a charger's request must not be longer.
MAX_FRAGMENTS = 4096  # Of one message, empty ones, too; the Sans-I/O layer itself sets no limit.
MAX_WRITE_BUFFER = 2**20  # Bytes that a peer may leave unread before it is cut off, but for the last message.
# What a peer may send for long, and at once. Beyond it the proxy reads no more for a while, so that a flood
# fills the buffers of its sender, and slows nobody else. Chargers wait for each answer, and so do servers.
FRAMES_PER_SECOND = 200.0
FRAMES_AHEAD = 300.0
BYTES_PER_FRAME = 4096  # Longer ones count as several.
MAX_SUBJECTS = 1000  # Of WARNINGs that are held back; beyond it the oldest is forgotten.
MAX_FILES = 2**20  # Open at once, where the system sets no limit.
MAX_PRIMARY_DIALS = 150  # At the same time, in the whole process; apart from the secondaries',
MAX_SECONDARY_DIALS = 50  # so that secondaries that hang never keep a charger waiting.
STAND_BACK_SECONDS = 2.0  # For a secondary at most, while chargers that come all at once are being let in:
CALM_SECONDS = 0.1  # until no primary has been dialled for so long.

# For a peer whose machine is gone without a word; where the system knows them.
SOCKET_OPTIONS = {
    "TCP_USER_TIMEOUT": 60_000,  # Milliseconds until what is not acknowledged ends the connection.
    "TCP_KEEPIDLE": 60,  # Seconds of silence until the system asks whether the peer is there,
    "TCP_KEEPINTVL": 15,  # between two questions,
    "TCP_KEEPCNT": 4,  # and how many.
}

# One buffer for all links: it is read out in the same callback that filled it. A view, because asyncio's TLS
# fills slices of it, and slices of a bytearray are copies. Small, because what is in it is dealt with in one
# go, while all others wait: some 7 short Calls, or 80 empty frames, less than a millisecond.
RECEIVE_BUFFER = memoryview(bytearray(2**9))

# Not a logger of the library's own, whose DEBUG lines would show credentials.
LIBRARY_LOG = logging.getLogger("proxy.websockets")
LIBRARY_LOG.setLevel(logging.WARNING)


# Nearly every frame is a text that comes whole and alone, and every text goes out in one frame. To read or to
# write one here takes a quarter of the time of the library's way, which is for all frames (RFC 6455 5.2).

TEXT_FRAME = 0x80 | Opcode.TEXT  # The first byte of a frame that holds a whole text.
IS_MASKED = 0x80  # A bit of the second byte; its others are the length,
LENGTH_16, LENGTH_64 = 126, 127  # or say that the length stands behind it, in 16 or 64 bits.
MASKS_AT_ONCE = 1024


def lone_text(data: bytes, is_masked: bool) -> bytes | None:
    """Return the text of the one frame that this is; None if it is anything else, or not all of a frame.

    It is as short as RECEIVE_BUFFER, and so below any `max_size`.
    """
    if len(data) < 6 or data[0] != TEXT_FRAME:
        return None
    length, start = data[1] - is_masked * IS_MASKED, 2
    if length == LENGTH_16:
        length, start = int.from_bytes(data[2:4], "big"), 4
    elif length >= LENGTH_64:
        return None
    start += 4 * is_masked
    if start + length != len(data):
        return None
    return apply_mask(data[start:], data[start - 4 : start]) if is_masked else data[start:]


def text_frame(data: bytes, is_masked: bool) -> bytes:
    """Return the frame of a text."""
    length, bit = len(data), is_masked * IS_MASKED
    if length < LENGTH_16:
        head = bytes((TEXT_FRAME, bit | length))
    elif length < 2**16:
        head = bytes((TEXT_FRAME, bit | LENGTH_16)) + length.to_bytes(2, "big")
    else:
        head = bytes((TEXT_FRAME, bit | LENGTH_64)) + length.to_bytes(8, "big")
    if not is_masked:
        return head + data
    mask = next(MASKS)
    return head + mask + apply_mask(data, mask)


def is_between_frames(protocol: ClientProtocol | ServerProtocol) -> bool:
    """Whether the library waits for the first byte of a frame: where its parser looks for the end of all."""
    waiting: Any = protocol.parser
    while waiting.gi_yieldfrom is not None:
        waiting = waiting.gi_yieldfrom
    return waiting.gi_code is StreamReader.at_eof.__code__


def masks() -> Iterator[bytes]:
    """Yield four bytes that nobody can guess (RFC 6455 5.3), for ever; asks the system for many at once."""
    while True:
        random_bytes = secrets.token_bytes(4 * MASKS_AT_ONCE)
        yield from (random_bytes[at : at + 4] for at in range(0, len(random_bytes), 4))


MASKS = masks()  # Of all links.


class DialError(Exception):
    """A server cannot be reached or does not want this connection."""

    def __init__(self, what: str, response: Response | None = None, cause: Exception | None = None) -> None:
        super().__init__(what or f"the connection was closed ({type(cause).__name__})")
        self.is_certificate_unfit = isinstance(cause, ssl.SSLCertVerificationError)
        self.status = response.status_code if response else None
        self.headers = response.headers if response else Headers()


class Complaints:
    """Log lines that peers could cause as often as they like: one a minute about each subject."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}  # Subject to monotonic seconds of its last line; MAX_SUBJECTS.
        self.held_back: dict[str, int] = {}  # Lines since then.

    def say(self, level: int, subject: str, text: str, *values: object) -> None:
        """Log the text, unless the subject had its line within COMPLAINT_SECONDS; then count it."""
        if self.is_due(subject):
            count = self.held_back.pop(subject, 0)
            more = f" ({count} more like it since the last such line)" if count else ""
            log.log(level, text + more, *values)

    def is_due(self, subject: str) -> bool:
        """Whether a subject may have a line now, and take note of it."""
        now = time.monotonic()
        if now < self.told.get(subject, -math.inf) + COMPLAINT_SECONDS:
            self.held_back[subject] = self.held_back.get(subject, 0) + 1
            trim(self.held_back, MAX_SUBJECTS)
            return False
        self.told.pop(subject, None)
        self.told[subject] = now
        trim(self.told, MAX_SUBJECTS)
        return True


class LinkUser(Protocol):
    """Who hears what a Link receives."""

    def link_received(self, link: Link, text: str) -> None:
        """Take a text. It is not empty."""

    def link_closed(self, link: Link) -> None:
        """Take note that nothing more will come; called once."""


class Link(asyncio.BufferedProtocol):
    """One websocket, from handshake to end. Never waits for a peer that does not read: cuts it off."""

    def __init__(
        self,
        protocol: ServerProtocol | ClientProtocol,
        on_connected: Callable[[Link], None] | None = None,
    ) -> None:
        self.protocol = protocol
        self.is_client = protocol.side is Side.CLIENT  # What it sends is masked, what it gets is not.
        self.on_connected = on_connected
        self.loop = asyncio.get_running_loop()
        self.handshake: asyncio.Future[Request | Response] = self.loop.create_future()
        self.transport: asyncio.Transport | None = None  # Set by connection_made.
        self.user: LinkUser | None = None  # Set by attach; texts that come before it wait in `early`.
        self.early: list[str] = []  # From MAX_EARLY on, reading is paused.
        self.early_bytes = 0  # All that has come in before it; from MAX_EARLY_BYTES on, too.
        self.is_between_frames = False  # The library waits for the first byte of a frame.
        self.fragments: list[bytes] = []  # Of the message that comes in; MAX_FRAGMENTS, max_size.
        self.budget = FRAMES_AHEAD  # Frames that may come before reading is paused; grows with time.
        self.budget_at = self.loop.time()  # Monotonic seconds; when it was that.
        self.slowed: asyncio.TimerHandle | None = None  # Reads on when a flood has been waited out.
        self.floods = 0  # How often it had to; whoever tells of it sets it to 0.
        self.arrived = self.loop.time()  # Monotonic seconds of the TCP connection.
        self.opened = 0.0  # Monotonic seconds of the handshake's end.
        self.seen = self.loop.time()  # Monotonic seconds of the last frame that came in.
        self.ping_at = 0.0  # Monotonic seconds of the next Ping.
        self.has_ponged = False
        self.pong_waiters: list[asyncio.Future[None]] = []
        self.is_starting_tls = False  # What is sent now would go out in the clear.
        self.is_answered = False  # A charger's handshake has its response.
        self.ended: asyncio.Future[None] = self.loop.create_future()  # Done when nothing more will come.
        self.close_seconds = CLOSE_SECONDS  # From a Close frame or an HTTP answer to the end.
        self.cutter: asyncio.TimerHandle | None = None  # Cuts a connection whose closing takes too long.
        self.cut_because = ""  # Why the proxy itself has cut it.

    # What its user does with it.

    @property
    def address(self) -> str:
        """The peer's IP address."""
        peer = self.transport.get_extra_info("peername") if self.transport else None
        return str(peer[0]) if peer else "unknown"

    @property
    def is_open(self) -> bool:
        """Whether texts can be sent."""
        return self.protocol.state is State.OPEN

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come."""
        return self.ended.done()

    @property
    def closed_by(self) -> str:
        """Say with which code and reason the connection was closed, for a log line."""
        sent, received = self.protocol.close_sent, self.protocol.close_rcvd
        if self.cut_because:
            return self.cut_because
        if sent and not self.protocol.close_rcvd_then_sent:
            return f"closed by the proxy, code {sent.code} {sent.reason!a}"
        if received is None:
            return str(self.protocol.parser_exc or "connection lost")
        return f"code {received.code} {received.reason!a}" if received.reason else f"code {received.code}"

    def attach(self, user: LinkUser) -> None:
        """Let the user hear what has come in and what will come in."""
        self.user = user
        self._forget_headers()
        early, self.early = self.early, []
        for text in early:
            user.link_received(self, text)
        if self.is_closed:
            user.link_closed(self)
        self._read_on()

    def _forget_headers(self) -> None:
        """Let go of the headers of the handshake: the library keeps them for as long as it lives."""
        if self.handshake.done() and not self.handshake.exception():
            self.handshake.result().headers.clear()

    def _read_on(self) -> None:
        """Read what comes in, unless there is nobody to hear more, or too much has come."""
        is_full = len(self.early) >= MAX_EARLY or self.early_bytes > MAX_EARLY_BYTES
        is_heard = self.user is not None or self.protocol.state is not State.OPEN or not is_full
        if self.transport and is_heard and not self.slowed and not self.transport.is_closing():
            self.transport.resume_reading()

    def send(self, text: str) -> None:
        """Send a text, if the connection is open."""
        if self.protocol.state is State.OPEN:
            if self.protocol.writes:
                self._flush()  # What the library had to say before it, as a Pong.
            self._write(text_frame(text.encode(), self.is_client))

    def keep_alive(self, now: float, interval: float) -> None:
        """Send a Ping if it is time for one."""
        if now >= self.ping_at and self.is_open:
            self.ping_at = now + interval
            self.protocol.send_ping(b"")
            self._flush()

    async def probe(self, seconds: float) -> bool:
        """Return whether the peer answers a Ping within so many seconds."""
        waiter = self.loop.create_future()
        self.pong_waiters.append(waiter)
        self.keep_alive(self.ping_at, seconds)
        done, _ = await asyncio.wait([waiter], timeout=seconds)
        return bool(done) and not self.is_closed

    def close(self, code: int, reason: str = "") -> None:
        """Close the connection; it is cut if that takes more than CLOSE_SECONDS."""
        if self.protocol.state is State.OPEN:
            self.protocol.send_close(code, reason)
            self._flush()
            self._read_on()  # To see the peer close it, too.
        elif self.protocol.state is State.CONNECTING:
            self.abort()

    def abort(self, because: str = "") -> None:
        """Cut the connection."""
        self.cut_because = self.cut_because or because
        if self.transport:
            self.transport.abort()

    # The handshake.

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on, as a server. Raises OSError."""
        assert self.transport is not None
        limit, self.is_starting_tls = HANDSHAKE_SECONDS, True
        transport = await self.loop.start_tls(
            self.transport, self, context, server_side=True, ssl_handshake_timeout=limit
        )
        self.is_starting_tls = False
        if transport is None:
            raise OSError("the connection was closed")
        self.transport = transport

    def request(self, request: Request) -> None:
        """Send the handshake request of a client; `handshake` has the result."""
        assert isinstance(self.protocol, ClientProtocol)
        self.protocol.send_request(request)
        self._flush()

    def answer_to(self, request: Request) -> Response:
        """Return the library's answer to a handshake, without a subprotocol; one that is unfit has no 101."""
        assert isinstance(self.protocol, ServerProtocol)
        return self.protocol.accept(request)

    def accept(self, response: Response, subprotocol: str | None) -> bool:
        """Answer a handshake with the library's answer; return False if it is no 101, or the peer gone."""
        if subprotocol:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        self.respond(response)
        return self.is_open

    def respond(self, response: Response) -> None:
        """Answer a charger's handshake."""
        assert isinstance(self.protocol, ServerProtocol)
        if self.transport is None or self.is_closed or self.protocol.eof_sent:
            return  # It has closed the connection, or sent something unfit, before it was answered.
        self.is_answered = True
        self.opened = self.seen = self.loop.time()
        self.protocol.send_response(response)
        self._flush()

    def _fail_handshake(self, error: DialError) -> None:
        if not self.handshake.done():
            self.handshake.set_exception(error)
            self.handshake.exception()  # Nobody may be waiting any more.

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        watch_for_death(transport.get_extra_info("socket"))
        if self.on_connected:
            self.on_connected(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return RECEIVE_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(RECEIVE_BUFFER[:nbytes])
        self.budget -= nbytes / BYTES_PER_FRAME
        is_lone = self.is_between_frames and not self.fragments and self.protocol.state is State.OPEN
        text = lone_text(data, not self.is_client) if is_lone else None
        if text is not None:
            self._note_frame()
            self._text(text)
        else:
            self.protocol.receive_data(data)
            self.is_between_frames = is_between_frames(self.protocol)
            self._process()
        if self.budget < 0:
            self._slow_down()
        if self.user is None:
            self._mind_early(nbytes)

    def _slow_down(self) -> None:
        """Read no more for as long as too much has come."""
        now = self.loop.time()
        self.budget = min(FRAMES_AHEAD, self.budget + (now - self.budget_at) * FRAMES_PER_SECOND)
        self.budget_at = now
        if self.budget < 0 and self.transport and not self.slowed and not self.transport.is_closing():
            self.transport.pause_reading()
            self.floods += 1
            self.slowed = self.loop.call_later(-self.budget / FRAMES_PER_SECOND, self._waited)

    def _waited(self) -> None:
        self.slowed, self.seen = None, self.loop.time()  # Nothing was seen because nobody looked.
        self._read_on()

    def _mind_early(self, nbytes: int) -> None:
        """Bound what a peer sends before there is somebody to hear it."""
        self.early_bytes += nbytes
        if self.early_bytes <= MAX_EARLY_BYTES or self.transport is None or self.transport.is_closing():
            return
        if self.handshake.done():
            self.transport.pause_reading()
        elif self.on_connected:
            self.abort(f"its handshake is longer than {MAX_EARLY_BYTES} bytes")

    def eof_received(self) -> None:
        self.protocol.receive_eof()
        self._process()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.protocol.receive_eof()
        self._process()
        self.ended.set_result(None)
        for timer in (self.cutter, self.slowed):
            if timer:
                timer.cancel()
        for waiter in self.pong_waiters:
            waiter.cancel()
        why = self.cut_because or "the connection was closed during the handshake"
        self._fail_handshake(DialError(why))
        if self.user:
            self.user.link_closed(self)

    # What comes in and what goes out.

    def _process(self) -> None:
        for event in self.protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event)
            elif self.protocol.handshake_exc is None and not self.handshake.done():
                self.opened = self.loop.time()
                self.handshake.set_result(event)
            elif isinstance(event, Response):
                phrase = ascii(event.reason_phrase[:80]).strip("'")
                what = f"HTTP {event.status_code} {phrase}"
                if event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                    what = f"an unfit handshake: {ascii(str(self.protocol.handshake_exc))[1:-1]}"
                self._fail_handshake(DialError(what, event))
        if self.protocol.handshake_exc is not None:
            self._fail_handshake(DialError(f"no HTTP: {self.protocol.handshake_exc}"))
        self._flush()

    def _note_frame(self) -> None:
        self.seen = self.loop.time()
        self.budget -= 1.0

    def _frame(self, frame: Frame) -> None:
        self._note_frame()
        if frame.opcode is Opcode.PONG:
            self.has_ponged = True
            waiters, self.pong_waiters = self.pong_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        elif frame.opcode is Opcode.BINARY:
            self._fail(1003, "OCPP-J is text")
        elif frame.opcode is Opcode.TEXT and frame.fin:
            self._text(bytes(frame.data))
        elif frame.opcode is Opcode.TEXT or frame.opcode is Opcode.CONT:
            self.fragments.append(bytes(frame.data))
            if len(self.fragments) > MAX_FRAGMENTS:
                self.fragments = []
                self._fail(1009, f"more than {MAX_FRAGMENTS} fragments")
            elif frame.fin:
                data, self.fragments = b"".join(self.fragments), []
                self._text(data)

    def _text(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self._fail(1007, "text is not UTF-8")
            return
        if not text or text.isspace():
            return  # Some chargers send empty texts to keep the connection alive.
        if self.user:
            self.user.link_received(self, text)
            return
        self.early.append(text)
        if self.transport and len(self.early) >= MAX_EARLY:
            self.transport.pause_reading()

    def _fail(self, code: int, reason: str) -> None:
        if self.protocol.state is State.OPEN:
            self.protocol.fail(code, reason)
            self._flush()

    def _flush(self) -> None:
        """Write what the protocol has to say; cut off a peer that does not read."""
        chunks = self.protocol.data_to_send()
        if not chunks and self.protocol.state is State.OPEN:
            return
        if self.transport is None or self.transport.is_closing():
            return
        if chunks and self.is_starting_tls:  # Its first bytes may come before `start_tls` returns.
            self.abort("its handshake is unfit")
            return
        self._write(b"".join(chunks))
        is_end = SEND_EOF in chunks
        if is_end and not self.transport.is_closing():
            self._end()
        if self.cutter is None and (is_end or self.protocol.close_expected()):
            self.cutter = self.loop.call_later(self.close_seconds, self.abort)

    def _write(self, data: bytes) -> None:
        """Write what there is; cut off a peer that does not read."""
        if self.transport and not self.transport.is_closing():
            if data:
                self.transport.write(data)
            if self.transport.get_write_buffer_size() - len(data) > MAX_WRITE_BUFFER:
                self.abort("it does not read what it is sent")

    def _end(self) -> None:
        assert self.transport is not None
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # The peer is gone already, and asyncio has not been told yet.
            self.transport.abort()


DEATH_WATCH = [(int(socket.SOL_SOCKET), int(socket.SO_KEEPALIVE), 1)]
DEATH_WATCH += [
    (int(socket.IPPROTO_TCP), int(getattr(socket, name)), value)
    for name, value in SOCKET_OPTIONS.items()
    if hasattr(socket, name)
]


def watch_for_death(connection: Any) -> None:
    """Let the system end the connection of a peer whose machine does not answer any more."""
    for level, option, value in DEATH_WATCH:
        connection.setsockopt(level, option, value)


def incoming_link(max_size: int, on_connected: Callable[[Link], None]) -> Link:
    """Return the link of a peer that connects; `handshake` will have its request."""
    return Link(ServerProtocol(max_size=max_size, logger=LIBRARY_LOG), on_connected)


class Credentials(NamedTuple):
    """What a charger said of itself in its handshake."""

    authorization: str | None = None
    user_agent: str | None = None


class Resolver:
    """Looks host names up, each in a thread of its own: one that hangs delays no other, and not the end."""

    def __init__(self) -> None:
        # By host and port; as many as the ini names servers: those who ask for the same wait together.
        self.asked: dict[tuple[str, int], asyncio.Future[list[Any]]] = {}

    async def addresses(self, host: str, port: int) -> list[Any]:
        """Return what `socket.getaddrinfo` finds, at least one. Raises OSError or UnicodeError."""
        if is_ip_address(host):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        key = (host, port)
        if key not in self.asked:
            loop = asyncio.get_running_loop()
            self.asked[key] = found = loop.create_future()
            found.add_done_callback(partial(self._forget, key))
            threading.Thread(target=self._look_up, args=(loop, key, found), name="dns", daemon=True).start()
        return await asyncio.shield(self.asked[key])

    def _forget(self, key: tuple[str, int], found: asyncio.Future[list[Any]]) -> None:
        del self.asked[key]
        found.exception()  # Nobody may be waiting any more.

    def _look_up(
        self, loop: asyncio.AbstractEventLoop, key: tuple[str, int], found: asyncio.Future[list[Any]]
    ) -> None:
        """Look up, in the thread, and let the loop know."""
        outcome: Callable[[], None]
        try:
            addresses = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            outcome = partial(found.set_exception, error)
        else:
            outcome = partial(found.set_result, addresses)
        try:
            loop.call_soon_threadsafe(outcome)
        except RuntimeError:
            return  # The loop is closed: nobody waits any more.


@lru_cache(256)  # Of the servers of the ini: each is dialled again and again.
def uri_of(url: str) -> WebSocketURI:
    """Return the parts of a server's address."""
    return parse_uri(url)


class Dialer:
    """Opens links to servers: a bounded number at a time, with one SSL context for all links of a server."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.places = {
            Peer.PRIMARY: asyncio.Semaphore(MAX_PRIMARY_DIALS),
            Peer.SECONDARY: asyncio.Semaphore(MAX_SECONDARY_DIALS),
        }
        self.primary_at = -math.inf  # Monotonic seconds; when a primary was dialled last.
        self.open = 0  # Connections to servers, with those that are being opened.
        self.most = MAX_FILES  # Of them; beyond it no secondary is dialled.
        self.contexts: dict[tuple[str, str, str], ssl.SSLContext] = {}  # One for each server of the ini.
        self.resolver = Resolver()

    async def dial(
        self,
        peer: Peer,
        server: ServerConfig,
        charger_id: str,
        offers: Iterable[str],
        credentials: Credentials,
    ) -> Link:
        """Return an open link that waits for its user. Raises DialError."""
        name = server.id or charger_id
        base = uri_of(server.url)
        uri = replace(base, path=f"{base.path.rstrip('/')}/{urllib.parse.quote(name, safe='')}")
        subprotocols = [Subprotocol(offer) for offer in offers]
        protocol = ClientProtocol(uri, subprotocols=subprotocols, max_size=self.max_size, logger=LIBRARY_LOG)
        if peer is Peer.SECONDARY and self.open >= self.most:
            raise DialError(f"{self.open} connections to servers are open; more files cannot be opened")
        link = Link(protocol)
        link.ended.add_done_callback(self._closed)
        self.open += 1
        is_done = False
        try:
            await self._turn(peer)
            async with asyncio.timeout(DIAL_SECONDS), self.places[peer]:
                await self._open(link, server, uri)
                link.request(self._request(protocol, server, name, credentials))
                await link.handshake
            is_done = True
        except TimeoutError:
            raise DialError(f"no answer within {DIAL_SECONDS:g} s") from None
        except (OSError, UnicodeError) as error:
            raise DialError(str(error), cause=error) from None
        finally:
            if link.transport is None:
                self._closed(link.ended)  # It never was open, so that nobody tells of its end.
            elif not is_done:
                link.abort()
        return link

    async def _turn(self, peer: Peer) -> None:
        """Let chargers in first: of a herd, those who wait for their primary go before the secondaries."""
        loop = asyncio.get_running_loop()
        if peer is Peer.PRIMARY:
            self.primary_at = loop.time()
            return
        for _ in range(round(STAND_BACK_SECONDS / CALM_SECONDS)):
            if loop.time() >= self.primary_at + CALM_SECONDS:
                return
            await asyncio.sleep(CALM_SECONDS)

    async def _open(self, link: Link, server: ServerConfig, uri: WebSocketURI) -> None:
        """Open the link's TCP or TLS connection. Raises OSError or UnicodeError."""
        context = self._context(server) if uri.secure else None
        connection = await self._connection(uri.host, uri.port)
        name = uri.host if context else None
        await link.loop.create_connection(lambda: link, sock=connection, ssl=context, server_hostname=name)

    def _closed(self, _ended: asyncio.Future[None]) -> None:
        self.open -= 1

    async def certificate(self, server: ServerConfig) -> dict[str, Any]:
        """Return the certificate that a wss:// server shows, as `ssl` reads it. Raises DialError."""
        uri, loop = parse_uri(server.url), asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                connection = await self._connection(uri.host, uri.port)
                transport, _ = await loop.create_connection(
                    asyncio.Protocol, sock=connection, ssl=self._context(server), server_hostname=uri.host
                )
        except TimeoutError:
            raise DialError(f"no answer within {DIAL_SECONDS:g} s") from None
        except (OSError, UnicodeError) as error:
            raise DialError(str(error), cause=error) from None
        certificate: dict[str, Any] = transport.get_extra_info("peercert")
        transport.abort()
        return certificate

    async def _connection(self, host: str, port: int) -> socket.socket:
        """Return a TCP connection to the first of the host's addresses that answers. Raises OSError."""
        *others, last = await self.resolver.addresses(host, port)
        for address in others:
            try:
                return await self._connection_to(address, NEXT_ADDRESS_SECONDS)
            except OSError:
                continue  # As if it were not there; what the last one says is told.
        return await self._connection_to(last, None)

    async def _connection_to(self, address: Any, seconds: float | None) -> socket.socket:
        family, kind, protocol, _, place = address
        with ExitStack() as opened:
            connection = opened.enter_context(socket.socket(family, kind, protocol))
            connection.setblocking(False)
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_connect(connection, place)
            opened.pop_all()
        return connection

    def _request(
        self, protocol: ClientProtocol, server: ServerConfig, name: str, credentials: Credentials
    ) -> Request:
        """Return the handshake request, with the ini's login or the charger's own."""
        request = protocol.connect()
        if credentials.user_agent:
            request.headers["User-Agent"] = credentials.user_agent
        if server.user or server.password:
            login = f"{server.user or name}:{server.password}".encode()
            request.headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        elif server.auth == "forward" and credentials.authorization:
            request.headers["Authorization"] = credentials.authorization
        return request

    def _context(self, server: ServerConfig) -> ssl.SSLContext:
        key = (server.ca, server.cert, server.key)
        if key not in self.contexts:
            context = ssl.create_default_context(cafile=server.ca or None)
            if server.cert:
                context.load_cert_chain(server.cert, server.key or None)
            self.contexts[key] = context
        return self.contexts[key]


class Tasks:
    """The tasks that somebody owns: kept until they end, a failure reported to the loop's handler."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run the work in a task of its own."""
        task = asyncio.create_task(work, name=name)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """Cancel all that run."""
        for task in self.running:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            context = {"message": f"{task.get_name()} failed", "exception": error}
            task.get_loop().call_exception_handler(context)


# ---------------------------------------------------------------------------------------------------------
# Outbox
#
# All that goes to one server of one charger: one queue, one Call in flight. Whether an item is relayed,
# stored, a copy or the proxy's own, it waits here for the server's boot and for its place, and is answered,
# timed out, retried, stood in for or dropped here.
# ---------------------------------------------------------------------------------------------------------

COPY_SECONDS = 5.0  # A copy holds the place in flight for so long.
STAND_IN_SECONDS = 10.0  # `forward`: a server that is silent for so long does not answer itself.
AWAITED_SECONDS = 5.0  # `forward`: a server that has just gone may come back.
DELIVERY_SECONDS = 120.0  # A server that leaves a stored Call unanswered for so long is disconnected.
OWN_BOOT_SECONDS = 2.0  # A charger that has connected may send its BootNotification itself.
MADE_UP_BOOT_SECONDS = 10.0  # After that, an unknown charger's is made up.
BOOT_RETRY_SECONDS = 60.0  # Where the server does not say when to ask again.
STOOD_SECONDS = 60.0  # A connection that stood for so long makes the next redial a first one.
MAX_LATE = 16  # Calls given up whose late answer may still tell something.


@dataclass(frozen=True, slots=True)
class Redial:
    """How long to wait before each next dial, in seconds; each time 1.6 times as long, +-20 %."""

    at_once: bool
    first: float
    most: float


REDIAL = {Peer.PRIMARY: Redial(True, 0.5, 5.0), Peer.SECONDARY: Redial(False, 1.0, 60.0)}

# What to change in the ini when a server refuses the proxy's handshake.
ADVICE = {
    401: "check {peer}_user and {peer}_password, or {peer}_auth",
    403: "check {peer}_user and {peer}_password, or {peer}_auth",
    404: "check the address, and that the server knows this charger; {peer}_id replaces its id",
    101: "check versions: the server does not speak this one",
    **dict.fromkeys((301, 302, 303, 307, 308), "nobody is followed: put its new address into the ini"),
}
CERTIFICATE_ADVICE = "set {peer}_ca to the server's certificate, or check the name in its address"


def advice_for(error: DialError, peer: Peer, otherwise: str) -> str:
    """Return what a person can do about a dial that failed."""
    advice = CERTIFICATE_ADVICE if error.is_certificate_unfit else ADVICE.get(error.status or 0, otherwise)
    return advice.format(peer=peer.value)


class OutboxOwner(Protocol):
    """What an Outbox needs of its Relay."""

    charger_id: str
    version: str
    credentials: Credentials
    host: HostConfig
    memory: Memory
    journal: Journal
    router: Router
    dialer: Dialer
    tasks: Tasks
    complaints: Complaints
    news: News
    now: Callable[[], Instant]

    @property
    def has_charger(self) -> bool:
        """Whether the charger is connected."""

    def wake(self, at: float) -> None:
        """Call `tick` at this time, in monotonic seconds, or before."""

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Do what the router has decided."""

    def store(self, peer: Peer, call: Call) -> bool:
        """Keep a Call until its server has answered it; return False if it is kept already."""

    def refuse(self, peer: Peer, call: Call, words: str, is_error: bool, is_sent: bool) -> None:
        """Keep a Call as refused by its server."""

    def server_said(self, peer: Peer, message: Message) -> None:
        """Take a message of the server that is no answer. Raises MessageError."""

    def server_lost(self, peer: Peer) -> None:
        """Take note that the server's connection was lost."""

    def server_answered(self, peer: Peer) -> None:
        """Take note that the server does its work."""


class CallQueue(list[Call]):
    """The Calls that wait for one server, in order; knows how many of them are not stored.

    A list, because nearly all are empty, and an empty deque takes 600 bytes.
    """

    __slots__ = ("others",)

    def __init__(self, stored: Iterable[Call]) -> None:
        super().__init__(stored)
        self.others = 0  # Those that are not stored.

    def append(self, call: Call) -> None:
        super().append(call)
        self.others += call.kind is not Kind.STORED

    def insert(self, place: SupportsIndex, call: Call) -> None:
        super().insert(place, call)
        self.others += call.kind is not Kind.STORED

    def remove(self, call: Call) -> None:
        super().remove(call)
        self.others -= call.kind is not Kind.STORED

    def of_kind(self, *kinds: Kind) -> list[Call]:
        """Return the Calls of these kinds, none of them stored, without a walk along the stored ones."""
        return [call for call in self if call.kind in kinds] if self.others else []

    @property
    def has_stored(self) -> bool:
        """Whether a stored Call is among them."""
        return len(self) > self.others


class Outbox:
    """One server of one charger. Owns the server's link and the queue of what goes to it."""

    def __init__(self, owner: OutboxOwner, peer: Peer, server: ServerConfig, forwards: bool) -> None:
        self.owner = owner
        self.peer = peer
        self.server = server
        self.stands_in = peer is Peer.SECONDARY and forwards  # The proxy answers when the server cannot.
        self.name = f"{owner.charger_id}: {peer.value}"
        self.queue = self._left_over()  # MAX_WAITING of each kind, and MAX_STORED.
        self.in_flight: Call | None = None  # Holds the one place; the next Call waits for its answer.
        self.unanswered: dict[str, Call] = {}  # Stored Calls that this connection has to answer, by id.
        self.answered: set[Session | None] = set()  # Sessions whose last delivery may not be on record yet.
        self.late: dict[str, Call] = {}  # Relayed Calls given up, by message id; MAX_LATE.
        self.link: Link | None = None
        self.dialing: asyncio.Task[None] | None = None
        self.dial_at: float | None = None  # Monotonic seconds; None = nothing to dial for.
        self.redial_after = 0.0  # Seconds; grows with each dial that fails.
        self.trouble = ""  # Why it is not connected, as it was logged last.
        self.is_booted = False  # The server accepted a BootNotification on this connection.
        self.boot_at: float | None = None  # Monotonic seconds; when to send it one.
        self.charger_came_at = 0.0  # Monotonic seconds; it may be about to send its boot itself.
        self.has_own_boot = False  # It has sent it.
        self.has_asked_for_boot = False
        self.owes_statuses = False  # This connection has not seen the connectors' statuses yet.
        self.heartbeat_at: float | None = None  # Monotonic seconds.
        self.heartbeat_interval = 0.0  # Seconds, as the server asked for.
        self.awaited_until = 0.0  # Monotonic seconds; until then a server that is away is waited for.
        self.is_silent = False  # It left a Call unanswered and has answered nothing since.
        # A link that is being closed, and what it still has to answer, by message id.
        self.farewell: tuple[Link, dict[str, Call]] | None = None
        self.has_older_ids = False  # Its link carried message ids of an earlier connection of the charger.

    # What goes in.

    def _left_over(self) -> CallQueue:
        return CallQueue(filter(self.serves, self.owner.memory.stored.get(self.peer, ())))

    def serves(self, call: Call) -> bool:
        """Whether a Call is for this server; a stored one is bound to an address and a version."""
        is_here = call.server in ("", self.server.url) and call.version in ("", self.owner.version)
        return call.kind is not Kind.STORED or is_here

    def put(self, call: Call) -> None:
        """Take a Call for this server."""
        now = self.owner.now()
        call.queued = now.seconds
        if call.kind is Kind.RELAYED and self._is_free():
            self._send(call, now)
            self.owner.wake(now.seconds + self._patience(call))  # All else was told when it was set.
            return
        if self.stands_in:
            self._stand_in_where_due(now)  # Those that waited longer keep their place before this one.
        if call.kind is Kind.OWN:
            self.has_own_boot, self.is_booted, self.boot_at = True, False, now.seconds
            self.awaited_until = now.seconds + AWAITED_SECONDS
        elif call.kind is Kind.COPY:
            self._put_copy(call)
        elif call.kind is not Kind.RELAYED or self._may_relay(call):
            self.queue.append(call)
            if call.kind is Kind.STORED:
                self._store(call)
            elif call.kind is Kind.RELAYED and self._must_stand_in(call, now):
                self._stand_in(call, now)
        self._pump(now)

    def _is_free(self) -> bool:
        """Whether a Call can go at once, as nearly all do: nothing is before it, and it needs no other id."""
        is_busy = self.in_flight or self.queue or self.answered or self.is_silent or self.has_older_ids
        return self.is_booted and self.boot_at is None and not is_busy and self._is_open()

    def _is_open(self) -> bool:
        return self.link is not None and self.link.is_open

    def _put_copy(self, call: Call) -> None:
        """Queue a copy while there is a connection; of too many the oldest goes."""
        copies = self.queue.of_kind(Kind.COPY)
        if len(copies) >= MAX_WAITING:
            self.queue.remove(copies[0])
        if self.link and self.link.is_open:
            self.queue.append(call)

    def _may_relay(self, call: Call) -> bool:
        """Put a Call that is repeated while its server is away into its predecessor's place; drop a flood."""
        relayed = self.queue.of_kind(Kind.RELAYED)
        for old in relayed if self.link is None and call.action != "MeterValues" else []:
            if (old.action, old.content.payload) == (call.action, call.content.payload):
                old.is_pending = False
                self.queue[self.queue.index(old)] = call
                return False
        if len(relayed) >= MAX_WAITING or sum(len(old.text) for old in relayed) > MAX_WAITING_TEXT:
            call.is_pending = False
            self.owner.news.count("dropped_messages", "queue-full")
            what = f"{self.name}: {len(relayed)} Calls wait for it; each new one is dropped, now"
            self.owner.complaints.say(logging.WARNING, "queue", "%s %s", what, call.action)
            return False
        if self.has_older_ids:
            call.message_id = new_message_id()
            call.text = with_message_id(call.text, call.message_id)
        return True

    def has_work(self) -> bool:
        """Whether something is left that this server is to get, with or without its charger."""
        return self.queue.has_stored

    def is_wanted(self) -> bool:
        """Whether a connection to this server is needed."""
        return self.owner.has_charger or (self.has_work() and not self.server.needs_charger_login)

    def deliver(self) -> None:
        """Begin to deliver what an earlier run has left."""
        left = len(self.queue) - self.queue.others
        if left and self.is_wanted():
            log.info("%s: %d stored Calls are left from before; delivered now", self.name, left)
            self.dial()
        elif left:
            where = "delivered when the charger connects: only it has the login"
            log.info("%s: %d stored Calls are left from before; %s", self.name, left, where)

    # What goes out.

    def pump(self) -> None:
        """Send what may be sent now."""
        self._pump(self.owner.now())

    def _pump(self, now: Instant) -> None:
        while self.link and self.link.is_open and self.in_flight is None:
            if self.boot_at is not None and now.seconds >= self.boot_at:
                self._send_boot(now)
            call = self._next(now) if self.is_booted and self.in_flight is None else None
            if call is None:
                break
            if call.kind is not Kind.STORED:
                self.queue.remove(call)
            self._send(call, now)
        if self.link and self.in_flight is None and not self.is_wanted():
            self.link.close(1001, "the charger is gone")
        self.owner.wake(self.due())

    def _next(self, now: Instant) -> Call | None:
        """Return the first Call that may go; a stored one, and what follows it in its session, may wait."""
        held = self._unrecorded() if self.answered else set()
        is_first, others = True, self.queue.others
        for call in self.queue:
            if call.kind is not Kind.STORED:
                if call.session is None or call.session not in held:
                    return call
                others -= 1
            elif self._is_leaving(call):
                is_first = False
                held.add(call.session)
            elif call.sent is None or not self._is_the_chargers():
                if is_first and self._may_deliver(call, now):
                    return self._delivery(call)
                is_first = False
                has_failed = call.is_kept and call.sent is not None
                if not has_failed:  # A kept event that failed holds up no verdict.
                    held.add(call.session)
            if not (others or is_first):
                break  # Stored ones that have to wait for this one, however many.
        return None

    def _is_leaving(self, call: Call) -> bool:
        """Whether a Call may still be answered on a link that is being closed."""
        return self.farewell is not None and call.sent is not None and call.message_id in self.farewell[1]

    def _unrecorded(self) -> set[Session | None]:
        """Return the sessions whose next Call must not go before the answer to the last one is on disk."""
        if self.owner.journal.failure or self.owner.journal.is_saved(self.owner.memory):
            self.answered.clear()
        return set(self.answered)

    def _may_deliver(self, call: Call, now: Instant) -> bool:
        """Whether nothing is in the way of a stored Call: the one before it, its delay, the disk."""
        if (self.unanswered and not self._is_the_chargers()) or now.seconds < call.not_before:
            return False
        journal, memory = self.owner.journal, self.owner.memory
        if not journal.is_saved(memory):  # A restart must find the Call here, and the one before it gone.
            journal.wake(self.pump)
            return False
        return True

    def _delivery(self, call: Call) -> Call | None:
        """Return a Call that is to be delivered; one that met a CallError needs another connection."""
        if call.sent is None:
            return call
        assert self.link is not None, "only what has a link sends"
        self.link.close(1000, "to try again")  # A message id is used once per connection.
        return None

    def _is_the_chargers(self) -> bool:
        """Whether the link is the one that the primary accepted for the charger: never closed for a retry."""
        return self.peer is Peer.PRIMARY and self.owner.has_charger

    def _send(self, call: Call, now: Instant) -> None:
        assert self.link is not None
        text = self.owner.router.text_for_server(call)
        log.debug("%s < %s", self.name, text)
        self.link.send(text)
        call.sent = now.seconds
        if call.kind is Kind.STORED:
            self.unanswered[call.message_id] = call
        if call.kind is not Kind.SEND:
            self.in_flight = call

    def _send_own(self, action: str, text: str, now: Instant) -> None:
        """Send a Call of the proxy's own past the queue."""
        call = Call(Kind.OWN, action, new_message_id(), "", NOTHING)
        call.text = with_message_id(text, call.message_id)
        self._send(call, now)

    def _send_boot(self, now: Instant) -> None:
        """Send the charger's BootNotification; ask an unknown charger for it, then make one up."""
        router, boot = self.owner.router, self.owner.memory.boot if self._knows_version() else ""
        if not boot and not self.has_asked_for_boot and self.owner.has_charger:
            self.has_asked_for_boot = True
            self.boot_at = now.seconds + MADE_UP_BOOT_SECONDS - OWN_BOOT_SECONDS
            self.owner.carry_out(
                router.proxy_call("TriggerMessage", {"requestedMessage": "BootNotification"}, now)
            )
            return
        self.boot_at = None
        model = {Fill.MODEL: (self.server.id or self.owner.charger_id)[:20]}
        text = boot or call_text("", "BootNotification", filled(router.vocabulary.boot, model))
        self._send_own("BootNotification", text, now)

    # What comes back.

    def link_received(self, link: Link, text: str) -> None:
        log.debug("%s > %s", self.name, text)
        if link is not self.link:
            self._last_word(link, text)
            return
        try:
            message = parse(text)
            if message.type in (MessageType.CALLRESULT, MessageType.CALLERROR):
                self._answered(message)
            else:
                self.owner.server_said(self.peer, message)
        except MessageError as error:
            what = "%s: a message is dropped: %s: %s"
            self.owner.news.count("dropped_messages", "malformed")
            self.owner.complaints.say(logging.WARNING, f"{self.peer} text", what, self.name, error, text)
            if error.message_id:
                code = self.owner.router.vocabulary.malformed
                link.send(error_text(error.message_id, code, str(error)))

    def _last_word(self, link: Link, text: str) -> None:
        """Learn from an answer that comes while its connection is being closed."""
        if self.farewell and self.farewell[0] is link:
            try:
                message = parse(text)
            except MessageError:
                return  # Nobody waits for it.
            call = self.farewell[1].get(message.message_id)
            if call and call.kind is not Kind.STORED:
                self._learn(call, message, self.owner.now())
            elif call and call.is_pending:
                self.in_flight = None if self.in_flight is call else self.in_flight
                self._delivered(call, message, self.owner.now())
                self.pump()

    def _answered(self, message: Message) -> None:
        now, call = self.owner.now(), self._waiting_for(message.message_id)
        if call is None:
            late = self.late.pop(message.message_id, None)
            if late:
                self._learn(late, message, now)
            which = "a late" if late else "an unasked"
            self.owner.news.count("dropped_messages", "nobody-waits")
            say = self.owner.complaints.say
            say(logging.INFO, f"{self.peer} {which}", "%s: %s answer is dropped", self.name, which)
            return
        self.is_silent = False
        self.owner.server_answered(self.peer)
        if call is self.in_flight:
            self.in_flight = None
        if call.kind is Kind.RELAYED:
            self._relayed_answered(call, message, now)
            if self._is_free() and self.is_wanted():
                return  # Nothing waits, and all that is due was told when it was set.
        elif call.kind is Kind.NOTED:
            if words := self._learn(call, message, now):
                log.warning("%s: answers %s to what the proxy accepted: %s", self.name, words, call.text)
        elif call.kind is Kind.STORED:
            self._delivered(call, message, now)
        elif call.action == "BootNotification" and call.kind is Kind.OWN:
            self._boot_answered(message, now)
        self._pump(now)

    def _relayed_answered(self, call: Call, message: Message, now: Instant) -> None:
        """Let the router decide on the answer to a relayed Call."""
        if call.action == "BootNotification":
            self.boot_at = None  # The charger's own has taken the place of a repeated one.
        self._count(outcome_of(message))
        self.owner.carry_out(self.owner.router.server_answer(self.peer, call, message, now))

    def _count(self, outcome: Outcome) -> None:
        """Count a relayed Call of the charger."""
        self.owner.news.count("calls", Peer.CHARGER, self.peer, outcome)

    def _waiting_for(self, message_id: str) -> Call | None:
        if self.in_flight and self.in_flight.message_id == message_id:
            return self.in_flight
        return self.unanswered.get(message_id)

    def _learn(self, call: Call, message: Message, now: Instant) -> str:
        """Take what an answer tells that goes to nobody; return its words if it is a refusal."""
        words = self.owner.router.learn(self.peer, call, message, now)
        self.owner.journal.note(self.owner.memory)
        return words

    def _delivered(self, call: Call, message: Message, now: Instant) -> None:
        """Take the answer to a stored Call."""
        self.unanswered.pop(call.message_id, None)
        words = self._learn(call, message, now)
        is_error = message.type is MessageType.CALLERROR
        if is_error and call.tries < len(RETRY_SECONDS):
            delay = RETRY_SECONDS[call.tries]
            call.not_before = now.seconds + delay
            call.tries += 1
            log.warning("%s: %s got a %s; tried again in %g s", self.name, call.action, words, delay)
            return
        self.forget(call)
        if words:
            self.owner.router.refuse(call, words, is_error)
            self.owner.refuse(self.peer, call, words, is_error, is_sent=True)
        else:
            self._finish(call)
        session = call.session
        if session and session.is_undeliverable:
            for rest in [
                other for other in self.queue if other.session is session and other.kind is Kind.STORED
            ]:
                self.queue.remove(rest)
                self.owner.refuse(self.peer, rest, session.refused, is_error, is_sent=False)
        self.answered.add(session)
        self.owner.journal.wake(self.pump)  # Soon: a kill before that sends it again.

    def _finish(self, call: Call) -> None:
        call.is_pending = False
        self.owner.journal.remove(self.owner.memory, self.peer, call)
        self.owner.news.count("delivered_calls", self.peer)
        level = logging.DEBUG if call.is_reading else logging.INFO
        event = call.content.payload.get("eventType", "")  # Of a TransactionEvent.
        log.log(level, "%s: %s is delivered", self.name, f"{call.action} {event}".strip())
        if not (self.queue.has_stored or self.owner.has_charger):
            log.info("%s: all that was left is delivered", self.name)

    def _boot_answered(self, message: Message, now: Instant) -> None:
        self.owner.news.touch(self.owner.charger_id)
        status = message.payload.get("status") if message.type is MessageType.CALLRESULT else message.action
        interval = integer(message.payload.get("interval")) or 0
        if status != "Accepted":
            wait = min(max(interval, 1), DAY) if interval else BOOT_RETRY_SECONDS
            log.warning("%s: answers the boot with %s; asked again in %g s", self.name, status, wait)
            self._boot_again(now.seconds + wait)
            return
        log.info("%s: accepts the charger", self.name)
        self.is_booted = True
        self.heartbeat_interval = min(max(interval, 1), DAY) if interval else HEARTBEAT_INTERVAL
        self.heartbeat_at = now.seconds + self.heartbeat_interval
        if self.owes_statuses:
            self._send_statuses(now)

    def _send_statuses(self, now: Instant) -> None:
        """Put the last status of each connector first; copies that have waited are among them."""
        self.owes_statuses = False
        for call in self.queue.of_kind(Kind.COPY):
            if call.action == "StatusNotification":
                self.queue.remove(call)
        for text in reversed(self.owner.memory.statuses.values() if self._knows_version() else ()):
            call = Call(Kind.COPY, "StatusNotification", new_message_id(), "", NOTHING, queued=now.seconds)
            call.text = with_message_id(text, call.message_id)
            self.queue.insert(0, call)

    def _knows_version(self) -> bool:
        """Whether the charger's boot and statuses are of the version that this connection speaks."""
        return self.owner.memory.version in ("", self.owner.version)

    def _boot_again(self, at: float) -> None:
        """Ask again for what the server has not accepted; the charger's Calls to its primary do not wait."""
        if self.boot_at is None:
            self.boot_at = at
        self.is_booted = self.peer is Peer.PRIMARY

    # `forward`: answering in the server's place.

    def _must_stand_in(self, call: Call, now: Instant) -> bool:
        if not self.stands_in:
            return False
        is_away = not self.is_booted and now.seconds >= self.awaited_until
        older = itertools.takewhile(lambda old: old is not call, self.queue)
        has_older = any(old.kind is Kind.STORED and not old.is_kept for old in older)
        flying = self.in_flight  # What is older in its session is stored first.
        is_behind = flying is not None and flying is not call and flying.session is call.session is not None
        is_late = now.seconds >= call.queued + STAND_IN_SECONDS and not is_behind
        return is_away or has_older or self.is_silent or is_late

    def _stand_in(self, call: Call, now: Instant) -> None:
        """Let the proxy answer; the Call goes on as a stored one where it stands."""
        is_queued = call in self.queue
        decisions = self.owner.router.stand_in(self.peer, call, now)
        self.queue.others -= is_queued and call.kind is Kind.STORED
        if call.sent is None:
            call.message_id = new_message_id()  # The charger may use its own again before this one is sent.
            call.text = with_message_id(call.text, call.message_id)
        if not call.is_pending:
            self.forget(call)
        elif call.kind is Kind.STORED:
            self._store(call)
        self.owner.carry_out(decisions)

    def _stand_in_where_due(self, now: Instant) -> None:
        for call in self.queue.of_kind(Kind.RELAYED):
            if self._must_stand_in(call, now):
                self._stand_in(call, now)

    def _store(self, call: Call) -> None:
        if not self.owner.store(self.peer, call):
            call.is_pending = False
            self.forget(call)

    def forget(self, call: Call) -> None:
        """Let go of a Call that is not kept any more."""
        if call in self.queue:
            self.queue.remove(call)

    # The connection.

    def connected(self, link: Link, needs_boot: bool) -> None:
        """Take a link that has just been opened."""
        now = self.owner.now().seconds
        self.link, self.trouble, self.dial_at, self.has_older_ids = link, "", None, False
        self.is_booted, self.owes_statuses, self.has_asked_for_boot = not needs_boot, needs_boot, False
        self.boot_at = self.heartbeat_at = None
        if needs_boot:
            self.boot_at = now if self.has_own_boot else max(now, self.charger_came_at + OWN_BOOT_SECONDS)
        log.info("%s: connected to %s", self.name, self.server.url)
        self._changed("connections")
        link.keep_alive(now, self.owner.host.ping_interval)
        link.attach(self)
        self.pump()

    def _changed(self, metric: str) -> None:
        """Count what has become of the connection, and let it be seen."""
        self.owner.news.count(metric, self.peer)
        self.owner.news.touch(self.owner.charger_id)

    def dial(self) -> None:
        """Begin to open a connection, unless one is there or being opened."""
        self.dial_at = None
        if self.link is None and self.dialing is None:
            self.dialing = self.owner.tasks.start(self._dial(), f"{self.name}: dial")

    async def _dial(self) -> None:
        owner = self.owner
        version = owner.version
        try:
            link = await owner.dialer.dial(
                self.peer, self.server, owner.charger_id, [version], owner.credentials
            )
            if (link.protocol.subprotocol or "ocpp1.6") != version:
                link.close(1002, f"{version} is needed")
                raise DialError("it answered without a subprotocol; check versions")
        except DialError as error:
            self._dial_failed(error)
            return
        finally:
            if self.dialing is asyncio.current_task():
                self.dialing = None
        if self.is_wanted() and self.link is None:
            self.connected(link, needs_boot=self.peer is Peer.SECONDARY or bool(owner.memory.boot))
        else:
            link.close(1001, "the charger is gone")

    def _dial_failed(self, error: DialError) -> None:
        self._changed("failed_dials")
        if self.trouble != str(error):
            self.trouble = str(error)
            advice = advice_for(error, self.peer, "it is dialled again")
            log.warning("%s: cannot connect to %s: %s; %s", self.name, self.server.url, error, advice)
        self._redial_later()

    def _redial_later(self) -> None:
        if not self.is_wanted():
            return
        redial = REDIAL[self.peer]
        if self.redial_after == 0.0 and not redial.at_once:
            self.redial_after = redial.first
        self.dial_at = self.owner.now().seconds + self.redial_after * random.uniform(0.8, 1.2)
        self.redial_after = min(max(self.redial_after * 1.6, redial.first), redial.most)
        self.owner.wake(self.dial_at)

    def link_closed(self, link: Link) -> None:
        if self.farewell and link is self.farewell[0]:
            for call in self.farewell[1].values():
                call.sent = None  # It will not be answered there any more.
            self.farewell = None
            self.pump()
        if link is not self.link:
            return
        now = self.owner.now().seconds
        self.trouble = link.closed_by
        log.info("%s: disconnected (%s)", self.name, link.closed_by)
        if now - link.opened >= STOOD_SECONDS:
            self.redial_after = 0.0
        self.disconnect()
        self.awaited_until = now + AWAITED_SECONDS
        self._redial_later()
        self.owner.server_lost(self.peer)

    def change_version(self) -> None:
        """Let go of the link, and of what only a connection of the former version can deliver."""
        self.disconnect()
        before, self.queue = len(self.queue), self._left_over()
        if len(self.queue) < before:
            what = f"{before - len(self.queue)} stored Calls of its former version wait for the next start"
            log.warning("%s: %s", self.name, what)

    def disconnect(self) -> None:
        """Let go of the link and of all that ends with it."""
        call, self.in_flight = self.in_flight, None
        link, self.link = self.link, None
        if self.dialing:
            self.dialing.cancel()  # Whoever comes next is not to be replaced by it.
            self.dialing = None
        self.is_booted, self.boot_at, self.heartbeat_at = False, None, None
        self.late.clear()
        if call and call.kind is Kind.RELAYED and self.stands_in and call.reply_to is not None:
            self._requeue(call)
        elif call and call.kind is not Kind.STORED:
            call.is_pending = False  # It may have been carried out; its sender repeats it.
            if call.reply_to is not None:
                self._count(Outcome.UNANSWERED)
        unanswered = {**self.unanswered, **({call.message_id: call} if call else {})}
        self.unanswered = {}
        self.farewell = (link, unanswered) if link and unanswered and not link.is_closed else None
        for waiting in self.queue:
            if not (link and link.is_open and waiting.message_id in unanswered):
                waiting.sent = None
        for copy in self.queue.of_kind(Kind.COPY):
            self.queue.remove(copy)
        self.owner.router.server_gone(self.peer)
        if link:
            self._changed("disconnections")
            link.close(1001)

    def _requeue(self, call: Call) -> None:
        """Put a Call that was sent back into its place: first, but behind what its session stored before."""
        older = [old.session is call.session and old.queued <= call.queued for old in self.queue]
        place = len(older) - older[::-1].index(True) if call.session and True in older else 0
        self.queue.insert(place, call)

    def charger_came(self) -> None:
        """Take note of a new connection of the charger."""
        now = self.owner.now().seconds
        self.has_older_ids, self.has_own_boot, self.charger_came_at = self.link is not None, False, now
        if self.link is None:
            self.awaited_until = now + AWAITED_SECONDS
            self.dial()

    def charger_left(self) -> None:
        """Drop what only the charger waited for; an answer in flight still tells its session."""
        for call in self.queue.of_kind(*(kind for kind in Kind if kind is not Kind.STORED)):
            call.is_pending = False
            self.queue.remove(call)
        if self.in_flight:
            self.in_flight.reply_to = None
        if self.link and self.peer is Peer.PRIMARY and not self.is_wanted():
            self.link.close(1001, "the charger is gone")
        self.pump()

    # What time does.

    def tick(self) -> None:
        """Do what is due."""
        now = self.owner.now()
        if self.link:
            self.link.keep_alive(now.seconds, self.owner.host.ping_interval)
        elif self.dial_at is not None and now.seconds >= self.dial_at and self.is_wanted():
            self.dial()
        if self.heartbeat_at is not None and now.seconds >= self.heartbeat_at and self.in_flight is None:
            self.heartbeat_at = now.seconds + self.heartbeat_interval
            if self.peer is Peer.SECONDARY and self.is_booted and self.link and self.link.is_open:
                self._send_own("Heartbeat", call_text("", "Heartbeat", {}), now)
        self._time_out(now)
        for call in self.queue.of_kind(Kind.NOTED):
            if now.seconds >= call.queued + self.owner.host.call_timeout:
                self.queue.remove(call)
        if self.stands_in:
            self._stand_in_where_due(now)
        self.pump()

    def _time_out(self, now: Instant) -> None:
        call = self.in_flight
        if call and call.sent is not None:
            is_relayed = call.kind is Kind.RELAYED
            if is_relayed and self.stands_in and now.seconds >= call.sent + STAND_IN_SECONDS:
                self.is_silent = True
                self._stand_in(call, now)
                if call.kind is Kind.STORED and call.is_pending:
                    self._requeue(call)
                    self.unanswered[call.message_id] = call
            limit = COPY_SECONDS if call.kind is Kind.COPY else self.owner.host.call_timeout
            if now.seconds >= call.sent + limit:
                self._give_up(call, now)
        oldest = min((stored.sent or 0.0 for stored in self.unanswered.values()), default=now.seconds)
        is_overdue = now.seconds >= oldest + DELIVERY_SECONDS and not self._is_the_chargers()
        if self.link and self.link.is_open and is_overdue:
            log.warning("%s: left a stored Call unanswered for %g s; redialled", self.name, DELIVERY_SECONDS)
            self.link.close(1000, "a Call was left unanswered")

    def _give_up(self, call: Call, now: Instant) -> None:
        """Free the place of a Call that its server leaves unanswered."""
        self.in_flight = None
        if call.kind is Kind.STORED:
            return
        call.is_pending = False
        if call.kind is Kind.OWN and call.action == "BootNotification":
            self._boot_again(now.seconds + BOOT_RETRY_SECONDS)
            log.warning("%s: does not answer the boot; asked again in %g s", self.name, BOOT_RETRY_SECONDS)
            return
        if call.kind is Kind.RELAYED:
            self._count(Outcome.UNANSWERED)
            self.late[call.message_id] = call
            trim(self.late, MAX_LATE)
        log.warning("%s: %s was not answered; the next is sent", self.name, call.action)

    def due(self) -> float:
        """Return when `tick` has something to do, in monotonic seconds."""
        times = [self.heartbeat_at, self.boot_at, self.link.ping_at] if self.link else [self.dial_at]
        flying = self.in_flight
        if flying and flying.sent is not None:
            times.append(flying.sent + self._patience(flying))
        if self.unanswered and not self._is_the_chargers():
            times += [call.sent + DELIVERY_SECONDS for call in self.unanswered.values() if call.sent]
        if self.queue:
            times += self._due_of_queue()
        return min((time for time in times if time is not None), default=float("inf"))

    def _patience(self, flying: Call) -> float:
        """Return for how many seconds the Call in flight is waited for."""
        timeout = self.owner.host.call_timeout
        if flying.kind is Kind.COPY:
            return min(COPY_SECONDS, timeout)
        return min(STAND_IN_SECONDS, timeout) if self.stands_in and flying.kind is Kind.RELAYED else timeout

    def _due_of_queue(self) -> Iterator[float]:
        """Yield when something is to be done with what waits."""
        timeout = self.owner.host.call_timeout
        first = next((call for call in self.queue if call.kind is Kind.STORED), None)
        if first and first.tries and self.link and (first.sent is None or not self._is_the_chargers()):
            yield first.not_before
        yield from (call.queued + timeout for call in self.queue.of_kind(Kind.NOTED))
        for call in self.queue.of_kind(Kind.RELAYED) if self.stands_in else ():
            is_away = not self.is_booted and self.awaited_until
            yield self.awaited_until if is_away else call.queued + STAND_IN_SECONDS


# ---------------------------------------------------------------------------------------------------------
# Relay
#
# One charger: its link and an outbox for each of its servers. Hands every message to the router and carries
# out what the router decides.
# ---------------------------------------------------------------------------------------------------------


STEADY_SECONDS = 5.0  # A lost primary is back when it has stood for so long, or answered something.


class Relay:
    """One charger, from its first connection until nothing is left to be done for it."""

    def __init__(
        self,
        charger_id: str,
        config: ChargerConfig,
        version: str,
        host: HostConfig,
        dialer: Dialer,
        journal: Journal,
        clock: Callable[[], Instant],
    ) -> None:
        self.charger_id = charger_id
        self.config = config
        self.version = version  # The subprotocol.
        self.host = host
        self.dialer = dialer
        self.journal = journal
        self.now = clock
        self.news = journal.news
        self.memory = journal.memory(charger_id)
        self.memory.is_in_use = True
        follow_addresses(self.memory, config)
        journal.note(self.memory)
        self.credentials = Credentials(user_agent=self.memory.user_agent or None)
        self.tasks = Tasks()  # Dials; at most one for each outbox.
        self.complaints = Complaints()
        self.router = Router(config, self.memory, version, host.call_timeout)
        self.link: Link | None = None  # The charger's.
        self.held = 0  # Texts that wait for the disk on the charger's connection.
        self.deadline = 0.0  # Monotonic seconds; when `tick` has something to do.
        self.grace_until: float | None = None  # Monotonic seconds; the charger is closed then.
        self.grace_limit = 0.0  # Monotonic seconds; no connection of its primary makes it longer.
        forwards = config.secondary_replies == "forward"
        self.outboxes = {
            peer: Outbox(self, peer, server, forwards)
            for peer in SERVERS
            if (server := config.server(peer)) and not server.is_local
        }

    # What the outboxes ask for.

    @property
    def has_charger(self) -> bool:
        return self.link is not None

    @property
    def has_primary(self) -> bool:
        """Whether a connection to the primary stands, with or without its charger."""
        primary = self.outboxes.get(Peer.PRIMARY)
        return primary is not None and primary.link is not None

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten: neither a charger nor anything to deliver without one."""
        outboxes = self.outboxes.values()
        if self.link or any(outbox.link or outbox.dialing or outbox.is_wanted() for outbox in outboxes):
            return False
        return not any(session.kept for session in self.memory.sessions.values())

    def wake(self, at: float) -> None:
        self.deadline = min(self.deadline, at)

    def store(self, peer: Peer, call: Call) -> bool:
        """Keep a Call until its server has answered it; return False if it is kept already."""
        if self.journal.repeats_unsaved(self.memory, peer, call):
            return False
        dropped = self.journal.store(self.memory, peer, call)
        if dropped:
            self._let_go(dropped)
        return True

    def _let_go(self, dropped: Call) -> None:
        self.news.count("dropped_messages", "too-many-stored")
        for outbox in self.outboxes.values():
            outbox.forget(dropped)
        what = "%s: %d stored Calls wait; for each new one the oldest meter values are dropped: %d so far"
        values = (self.charger_id, MAX_STORED, self.memory.dropped)
        self.complaints.say(logging.WARNING, "dropped", what, *values)

    def refuse(self, peer: Peer, call: Call, words: str, is_error: bool, is_sent: bool) -> None:
        """Keep a Call as refused by its server, or with its session, whose start was refused."""
        call.is_pending = False
        self.journal.refuse(self.memory, Refusal(peer, call, words, is_error))
        self.news.count("refused_calls", peer)
        what = f"is refused ({words})" if is_sent else f"is not sent (its session is refused: {words})"
        then = "; tried once more at the next start" if is_error else ""
        name = f"{self.charger_id}: {peer.value}"
        log.warning("%s: %s %s and kept%s: %s", name, call.action, what, then, call.text)

    def deliver(self) -> None:
        """Deliver what an earlier run has left, without waiting for the charger; tell what has to wait."""
        self.tick()
        for outbox in self.outboxes.values():
            outbox.deliver()
        named = {outbox.server.url for outbox in self.outboxes.values()}
        for address, calls in by_address(self.memory).items():
            if address not in named:
                what = f"{len(calls)} stored Calls are kept for {address}, which the ini does not name"
                log.warning("%s: %s", self.charger_id, what)

    def server_said(self, peer: Peer, message: Message) -> None:
        """Take a Call (or something as rare) of a server. Raises MessageError."""
        if message.type is MessageType.CALLRESULTERROR:
            self.carry_out(self.router.result_error(peer, message))
        elif message.type is MessageType.SEND:
            self.carry_out([ToCharger(message.text, f"{peer.value} sends {message.action}")])
        elif self.link is None:
            why = "the charger is not connected"
            text = error_text(message.message_id, "GenericError", why)
            self.carry_out([Answer(peer, text, why, Outcome.UNANSWERED)])
        else:
            self.carry_out(self.router.server_call(peer, message, self.now()))

    def server_lost(self, peer: Peer) -> None:
        """Take note that a server's connection was lost."""
        if peer is Peer.PRIMARY and self.link and self.grace_until is None:
            self.grace_until = self.now().seconds + self.config.primary_grace
            self.grace_limit = self.grace_until + 2 * STEADY_SECONDS
            self.wake(self.grace_until)

    def server_answered(self, peer: Peer) -> None:
        """Take note that a server does its work."""
        if peer is Peer.PRIMARY:
            self.grace_until = None

    # The charger's connection.

    def connect(self, link: Link, primary: Link | None, version: str, credentials: Credentials) -> None:
        """Take the charger's new connection, and the one that its primary accepted for it."""
        if self.link:
            log.info("%s: charger connects again; its old connection is closed", self.charger_id)
            self.disconnect_charger(1001, "the charger has connected again", link)
        if version != self.version:
            self._change_version(version)
        self._remember(version, credentials)
        self.link, self.held, self.deadline = link, 0, 0.0
        link.keep_alive(self.now().seconds, self.host.ping_interval)
        log.info("%s: charger connected (%s)", self.charger_id, version)
        self.news.count("connections", Peer.CHARGER)
        self.news.present.add(self.charger_id)
        for peer, outbox in self.outboxes.items():
            if peer is Peer.PRIMARY and primary:
                outbox.disconnect()
                outbox.connected(primary, needs_boot=False)
            else:
                outbox.charger_came()
        link.attach(self)

    def _remember(self, version: str, credentials: Credentials) -> None:
        """Keep what a connection without the charger will need."""
        memory, self.credentials = self.memory, credentials
        if memory.version != version:
            memory.boot = ""
            memory.statuses.clear()
        memory.version, memory.user_agent = version, short(credentials.user_agent)
        memory.seen = self.now().utc
        memory.is_unsaved = True
        self.journal.note(memory)

    def _change_version(self, version: str) -> None:
        self.version = version
        for outbox in self.outboxes.values():
            outbox.change_version()
        self.router = Router(self.config, self.memory, version, self.host.call_timeout)

    def link_received(self, link: Link, text: str) -> None:
        if link is not self.link:
            return
        log.debug("%s > %s", self.charger_id, text)
        try:
            message = parse(text)
            self.carry_out(self._decided(message))
        except MessageError as error:
            what = "%s: a message is dropped: %s: %s"
            self.news.count("dropped_messages", "malformed")
            self.complaints.say(logging.WARNING, "text", what, self.charger_id, error, text)
            if error.message_id:
                link.send(error_text(error.message_id, self.router.vocabulary.malformed, str(error)))

    def _decided(self, message: Message) -> list[Decision]:
        """Return what becomes of a message of the charger. Raises MessageError."""
        if message.type is MessageType.CALL:
            return self.router.charger_call(message, self.now())
        if message.type is MessageType.SEND:
            return self.router.charger_send(message)
        if message.type is MessageType.CALLRESULTERROR:
            return self.router.result_error(Peer.CHARGER, message)
        return self.router.charger_answer(message, self.now())

    def link_closed(self, link: Link) -> None:
        if link is self.link:
            log.info("%s: charger disconnected (%s)", self.charger_id, link.closed_by)
            self.disconnect_charger(1001)

    def disconnect_charger(self, code: int, reason: str = "", successor: Link | None = None) -> None:
        """Let go of the charger's connection and of all that ends with it."""
        link, self.link, self.grace_until = self.link, successor, None
        self.news.present.discard(self.charger_id)
        self.carry_out(self.router.charger_gone())
        for outbox in self.outboxes.values():
            outbox.charger_left()
        if link:
            self.news.count("disconnections", Peer.CHARGER)
            link.close(code, reason)

    async def dismiss(self) -> None:
        """Let go of a charger that does not answer, and of its primary; wait until the primary knows."""
        primary = self.outboxes.get(Peer.PRIMARY)
        link = primary.link if primary else None
        self.disconnect_charger(1001, "the charger does not answer")
        if link:
            link.close(1001, "the charger does not answer")
            await asyncio.wait([link.ended], timeout=CLOSE_SECONDS)

    # Decisions.

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Do what the router has decided."""
        self.journal.note(self.memory)
        for decision in decisions:
            if isinstance(decision, ToServer):
                self._to_server(decision)
            elif isinstance(decision, ToCharger):
                self._to_charger(decision)
            elif isinstance(decision, Answer):
                self._answer(decision)
            elif isinstance(decision, Dropped):
                self._drop(decision)
            else:
                self._tell(decision)
        self.wake(self.router.due())

    def _drop(self, decision: Dropped) -> None:
        if decision.is_grave:
            self.news.count("dropped_messages", "too-many-stored")
            self.complaints.say(logging.WARNING, "grave", "%s: %s", self.charger_id, decision.why)
        else:
            self.news.count("dropped_messages", "nobody-waits")
            log.debug("%s ! %s", self.charger_id, decision.why)

    def _tell(self, decision: Told) -> None:
        if decision.is_unlisted:
            self.news.meet(decision.badge, self.charger_id, self.now().utc)
        if decision.badge:
            log.info("%s: %s; badge %s", self.charger_id, decision.what, decision.badge)
        else:
            log.info("%s: %s", self.charger_id, decision.what)

    def _to_server(self, decision: ToServer) -> None:
        call, outbox = decision.call, self.outboxes.get(decision.peer)
        log.debug("%s = %s: %s", self.charger_id, decision.peer.value, decision.why)
        if call.kind is Kind.STORED and self.journal.repeats_unsaved(self.memory, decision.peer, call):
            return
        session = call.session
        if call.kind is Kind.STORED and session and session.is_undeliverable:
            self.refuse(decision.peer, call, session.refused, session.has_error, is_sent=False)
        elif outbox and outbox.serves(call):
            outbox.put(call)
        elif call.kind is Kind.STORED:
            where = f"{call.server}, which the ini no longer names"
            level = logging.DEBUG if call.is_reading else logging.WARNING
            log.log(level, "%s: %s is kept for %s", self.charger_id, call.action, where)
            self.store(decision.peer, call)

    def _to_charger(self, decision: ToCharger) -> None:
        """Send a text to the charger; what waits for the disk is not overtaken."""
        link = self.link
        if decision.instead_of:
            self.news.count("calls", Peer.CHARGER, decision.instead_of, Outcome.RECORDED)
        if link is None:
            return
        if decision.after is After.NOTHING and not self.held:
            self._send(link, decision)
            return

        def send_in_turn() -> None:
            self.held -= link is self.link
            self._send(link, decision)

        self.held += 1
        otherwise = None if decision.after is After.SAVED else send_in_turn
        if not self.journal.commit(self.memory, send_in_turn, otherwise):
            self.held -= 1

    def _send(self, link: Link, decision: ToCharger) -> None:
        log.debug("%s < %s (%s)", self.charger_id, decision.text, decision.why)
        link.send(decision.text)

    def _answer(self, decision: Answer) -> None:
        self.news.count("calls", decision.peer, Peer.CHARGER, decision.outcome)
        outbox = self.outboxes.get(decision.peer)
        name = f"{self.charger_id}: {decision.peer.value}"
        if outbox and outbox.link:
            log.debug("%s < %s (%s)", name, decision.text, decision.why)
            if decision.outcome is Outcome.REFUSED:
                self.complaints.say(logging.INFO, decision.why, "%s: a Call is %s", name, decision.why)
            outbox.link.send(decision.text)

    # What time does.

    def tick(self) -> None:
        """Do what is due, and find out when to be called again."""
        now = self.now()
        self.deadline = float("inf")
        if self.link:
            self.link.keep_alive(now.seconds, self.host.ping_interval)
            self.wake(self.link.ping_at)
        if self.grace_until is not None and now.seconds >= self.grace_until:
            self._end_grace(now)
        for outbox in self.outboxes.values():
            outbox.tick()
        self.carry_out(self.router.tick(now))
        self.wake(self.grace_until or float("inf"))

    def _end_grace(self, now: Instant) -> None:
        """Close the charger if its primary has not come back for good."""
        self.grace_until = None
        primary = self.outboxes[Peer.PRIMARY].link
        steady = primary.opened + STEADY_SECONDS if primary else 0.0
        if primary and now.seconds < min(steady, self.grace_limit):
            self.grace_until = min(steady, self.grace_limit)
        elif now.seconds < steady or primary is None:
            log.warning(
                "%s: primary stays away; the charger is closed, to keep its messages", self.charger_id
            )
            self.disconnect_charger(1012, "the primary server is away")

    def watch(self) -> None:
        """Close the connections that nothing has been seen of for too long; tell of floods."""
        now = self.now().seconds
        for noisy in filter(lambda link: link.floods, self.links()):
            noisy.floods = 0
            peer = "the charger" if noisy is self.link else "a server"
            what = f"{self.charger_id}: {peer} sends more than {FRAMES_PER_SECOND:g} frames a second"
            self.complaints.say(logging.WARNING, f"flood {peer}", f"{what}; it is read more slowly")
        link = self.link
        if link:
            self.memory.seen = to_utc(link.seen, self.now())
            patience = self.host.watchdog_stale
            if not link.has_ponged:
                patience = max(patience, 3 * self.memory.heartbeat_interval)
            if now - link.seen > patience:
                log.warning(
                    "%s: nothing seen of the charger for %d s; it is closed", self.charger_id, now - link.seen
                )
                link.abort()
        for outbox in self.outboxes.values():
            patience = self.host.ping_interval + self.host.ping_timeout
            if outbox.link and now - outbox.link.seen > patience:
                log.warning("%s: nothing seen for %d s; it is closed", outbox.name, now - outbox.link.seen)
                outbox.link.abort()

    def links(self) -> Iterator[Link]:
        """Yield all its connections."""
        if self.link:
            yield self.link
        for outbox in self.outboxes.values():
            if outbox.link:
                yield outbox.link


# ---------------------------------------------------------------------------------------------------------
# Proxy
#
# The process: listens, admits chargers, keeps the relays by charger id, wakes those that have something to
# do, and ends it all.
# ---------------------------------------------------------------------------------------------------------

TICK_SECONDS = 0.5  # How often deadlines are looked at,
RELAYS_AT_ONCE = 100  # those of so many chargers in one turn of the loop.
LAG_TICKS = 120  # A minute of them.
STOP_SECONDS = 3.0  # For all connections to be closed, then they are cut.
BACKLOG = 4096  # Connections that the system takes ahead of the proxy; the next try again a second later.
ACCEPTS_AT_ONCE = 64  # Where files are short, asyncio tries so many in vain, and complains of each.
MAX_CHARGERS = MAX_MEMORIES  # That are here at once; a lower file limit of the process allows fewer.
# Connections whose request is not complete; beyond it the oldest is cut. They may take the places of chargers
# that are not here, so that many chargers can come at once; one in eight files is theirs alone.
MAX_HALF_OPEN = 5000
FILES_OF_OUR_OWN = 96  # The state file, the log, the listeners, look-ups, the second port.
SERVERS_OF_A_CHARGER = 2  # Connections that are kept free for each charger that is here, or about to be.
RETRY_AFTER_SECONDS = 10  # For a charger that finds no place.
# A charger that its primary refuses is refused by the proxy itself for a while: by id and address together,
# so that a wrong password shuts out nobody else behind that address, and not that id from elsewhere.
FREE_REFUSALS = 5  # Within REFUSAL_SECONDS.
REFUSAL_SECONDS = 60.0
MAX_VISITS = 3  # Handshakes of one charger id from one address at the same time.
MAX_REFUSED_VISITORS = 10_000  # That are remembered; beyond it the oldest is forgotten.


class RefusedError(Exception):
    """A charger's handshake is answered with an HTTP error."""

    def __init__(self, status: int, what: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(what)
        self.status = status
        self.headers = list(headers)

    def response(self) -> Response:
        return http_response(self.status, escaped(str(self)) + "\n", headers=self.headers)


def http_response(
    status: int, text: str, kind: str = "text/plain", headers: Iterable[tuple[str, str]] = ()
) -> Response:
    """Return an answer to a request that opens no websocket."""
    body = text.encode()
    full = Headers(headers)
    full["Connection"] = "close"
    full["Content-Length"] = str(len(body))
    full["Content-Type"] = f"{kind}; charset=utf-8"
    phrase = next((known.phrase for known in HTTPStatus if known == status), "Refused")
    return Response(status, phrase, full, body)


class Visitor(NamedTuple):
    """What a charger's handshake says."""

    charger_id: str
    config: ChargerConfig
    offers: list[str]  # Subprotocols, as it spells them.
    credentials: Credentials

    def chosen(self, version: str) -> str | None:
        """Return a version in the charger's own spelling; None if it did not offer it."""
        return next((offer for offer in self.offers if offer.lower() == version), None)


class Doorkeeper:
    """Knows who was refused lately, by charger id and address together."""

    def __init__(self) -> None:
        # Number of refusals, and monotonic seconds of the first of them; MAX_REFUSED_VISITORS.
        self.refusals: dict[tuple[str, str], tuple[int, float]] = {}
        self.visits: dict[tuple[str, str], int] = {}  # Handshakes under way.

    def wait_of(self, who: tuple[str, str], now: float) -> int:
        """Return for how many seconds this visitor has to stay away; 0 = it may try."""
        count, since = self.refusals.get(who, (0, 0.0))
        wait = since + REFUSAL_SECONDS - now if count >= FREE_REFUSALS else 0.0
        if wait <= 0 and self.visits.get(who, 0) >= MAX_VISITS:
            wait = 1.0
        return math.ceil(max(wait, 0.0))

    def refused(self, who: tuple[str, str], now: float) -> None:
        """Take note of a refusal."""
        count, since = self.refusals.pop(who, (0, now))
        self.refusals[who] = (count + 1, since) if now < since + REFUSAL_SECONDS else (1, now)
        trim(self.refusals, MAX_REFUSED_VISITORS)

    @contextmanager
    def visit(self, who: tuple[str, str]) -> Iterator[None]:
        """Count a handshake for as long as it lasts."""
        self.visits[who] = self.visits.get(who, 0) + 1
        try:
            yield
        finally:
            self.visits[who] -= 1
            if not self.visits[who]:
                del self.visits[who]


class Proxy:
    """All chargers. Owns the listener and the relays."""

    def __init__(self, config: Config, journal: Journal | None = None) -> None:
        self.config = config
        self.journal = journal or Journal(current_instant)
        self.dialer = Dialer(config.host.max_size)
        self.relays: dict[str, Relay] = {}  # By charger id.
        self.tasks = Tasks()  # The watchdog, and one for each handshake.
        self.handshakes: set[Link] = set()  # Not yet answered.
        self.half_open: dict[Link, None] = {}  # Those whose request is not complete, the oldest first.
        self.doorkeeper = Doorkeeper()
        self.complaints = Complaints()
        self.tls: ssl.SSLContext | None = None  # The listener's.
        self.files = raised_file_limit()  # That the process may have open.
        self.dialer.most = (self.files - FILES_OF_OUR_OWN) * 2 // 3
        self.incoming = 0  # Connections of chargers, and of whoever else has found the port.
        self.server: asyncio.Server | None = None
        self.watch_at = 0.0  # Monotonic seconds; when stale connections are looked for.
        self.lags: deque[float] = deque(maxlen=LAG_TICKS)  # Seconds that the watchdog woke too late.

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        host = self.config.host
        loop = asyncio.get_running_loop()
        self.tls = server_context(host)
        self.server = await loop.create_server(
            lambda: incoming_link(host.max_size, self._connected),
            host.addr,
            host.port,
            backlog=ACCEPTS_AT_ONCE,
        )
        for listener in self.server.sockets:
            with closing(listener.dup()) as same:
                same.listen(BACKLOG)
        self.tasks.start(self._watchdog(), "watchdog")
        for memory in list(self.journal.memories.values()):
            if memory.is_owed:
                self._deliver(memory)

    def _deliver(self, memory: Memory) -> None:
        """Deliver what an earlier run has left, without waiting for the charger."""
        charger_id = memory.charger_id
        oldest = next((call for calls in memory.stored.values() for call in calls), None)
        version = (oldest and oldest.version) or memory.version or "ocpp1.6"
        relay = self._relay(charger_id, self.config.charger(charger_id), version)
        relay.deliver()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self.server is not None
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Close everything; what does not end by itself is cut."""
        if self.server:
            self.server.close()
        self.tasks.cancel()
        links = [link for relay in self.relays.values() for link in relay.links()]
        for relay in self.relays.values():
            relay.tasks.cancel()
        for link in links:
            link.close(1001, "the proxy is stopping")
        if links:
            await asyncio.wait([link.ended for link in links], timeout=STOP_SECONDS)
        for link in [*links, *self.handshakes]:
            link.abort()
        self._say_what_is_left()
        await self.journal.close()

    def _say_what_is_left(self) -> None:
        outcome = "stay in the state file" if self.journal.file else "are lost"
        level = logging.INFO if self.journal.file else logging.WARNING
        for charger_id, memory in self.journal.memories.items():
            for address, calls in by_address(memory).items():
                names = ", ".join(call.action for call in calls[:10])
                what = f"{len(calls)} stored Calls for {address} {outcome}: {names}"
                log.log(level, "%s: %s", charger_id, what)

    def trouble(self) -> str:
        """Say why it cannot serve; "" = it can."""
        if self.server is None or not self.server.is_serving():
            return "the port for chargers is closed"
        failure = self.journal.failure
        return f"the state file cannot be written: {failure}" if failure else ""

    def loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tell what asyncio could not do; it would tell of each connection that it cannot accept."""
        error = context.get("exception")
        if isinstance(error, OSError) and "accept" in context.get("message", ""):
            what = "connections have to wait: %s"
            self.complaints.say(logging.WARNING, "accept", what, error)
        elif "_start_serving" in str(context.get("handle")):
            log.debug("asyncio would accept again on a port that is closed: %s", error)
        elif self.complaints.is_due(f"{type(error).__name__} {error}"):
            loop.default_exception_handler(context)

    # Admission: a charger is let in if its primary lets it in.

    def _free_files(self) -> int:
        """Return how many files are left, not counting those whose request is not complete."""
        guests = len(self.handshakes) - len(self.half_open)
        needed = SERVERS_OF_A_CHARGER * (len(self.journal.news.present) + guests)
        used = self.incoming - len(self.half_open) + max(self.dialer.open, needed)
        return self.files - FILES_OF_OUR_OWN - used

    @property
    def max_half_open(self) -> int:
        """How many connections may be without a request."""
        return min(MAX_HALF_OPEN, max(self.files // 8, self._free_files()))

    def _has_room(self, charger_id: str) -> bool:
        """Whether a charger can be let in without running out of files."""
        present = self.journal.news.present
        is_new = charger_id not in present  # One that comes again takes the place of its old one.
        free = self._free_files() + (0 if is_new else SERVERS_OF_A_CHARGER)
        has_files = free >= min(MAX_HALF_OPEN, self.files // 8)
        return has_files and len(present) + is_new <= MAX_CHARGERS and self.journal.has_room(charger_id)

    def _connected(self, link: Link) -> None:
        assert link.transport is not None
        if self.tls:
            link.transport.pause_reading()  # Until start_tls.
        self.handshakes.add(link)
        self.half_open[link] = None
        self.incoming += 1
        link.ended.add_done_callback(self._left)
        if len(self.half_open) > self.max_half_open:
            oldest = next(iter(self.half_open))
            del self.half_open[oldest]
            oldest.abort("too many connections wait for their request")
        self.tasks.start(self._admit(link), "handshake")

    def _left(self, _ended: asyncio.Future[None]) -> None:
        self.incoming -= 1

    async def _admit(self, link: Link) -> None:
        """Answer a charger's handshake."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if self.tls:
                    await link.start_tls(self.tls)
                request = await link.handshake
            self.half_open.pop(link, None)
            assert isinstance(request, Request)
            await self._welcome(link, request)
        except RefusedError as refusal:
            self.journal.news.count("refused_handshakes", str(int(refusal.status)))
            link.respond(refusal.response())
        except TimeoutError:
            self.complaints.say(logging.INFO, "silent", "a connection without a handshake is closed")
        except (DialError, OSError) as error:
            what = "a connection that is no websocket is closed: %s"
            self.complaints.say(logging.INFO, "no websocket", what, error)
        finally:
            self.half_open.pop(link, None)
            self.handshakes.discard(link)
            if not link.is_answered:
                link.abort()

    async def _welcome(self, link: Link, request: Request) -> None:
        """Let the charger in if its primary does. Raises RefusedError."""
        visitor = self._visitor(request)
        who = (visitor.charger_id, link.address)
        self._check_visitor(who)
        with self.doorkeeper.visit(who):
            try:
                is_in = await self._let_in(link, request, visitor)
            except RefusedError as refusal:
                if refusal.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                    self.doorkeeper.refused(who, link.loop.time())
                raise
        if is_in:
            self.doorkeeper.refusals.pop(who, None)

    def _subject(self, kind: str, charger_id: str) -> str:
        """Return the subject of a complaint: one for each charger, and one for all ids that never got in."""
        return f"{kind} {charger_id}" if charger_id in self.journal.memories else kind

    def _check_visitor(self, who: tuple[str, str]) -> None:
        """Refuse a charger that comes too often, or that there is no room for. Raises RefusedError."""
        charger_id, address = who
        if wait := self.doorkeeper.wait_of(who, time.monotonic()):
            what = "%s: refused too often from %s; not asked again for %d s"
            self.complaints.say(
                logging.WARNING, self._subject("often", charger_id), what, charger_id, address, wait
            )
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "refused too often", retry_after(wait))
        if not self._has_room(charger_id):
            what = "%s: refused: there is no room; %d chargers are here, %d known, %d files may be open"
            present, known = len(self.journal.news.present), len(self.journal.memories)
            self.complaints.say(logging.WARNING, "full", what, charger_id, present, known, self.files)
            headers = retry_after(RETRY_AFTER_SECONDS)
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "there is no room for it", headers)

    def _check_login(self, visitor: Visitor) -> None:
        """Refuse a charger that does not show the password that the ini may ask for. Raises RefusedError."""
        password = visitor.config.password
        if password and not shows_password(visitor.charger_id, password, visitor.credentials.authorization):
            what = "%s: refused: it does not show the user %s and the `password` of the ini"
            values = (visitor.charger_id, visitor.charger_id)
            self.complaints.say(logging.WARNING, self._subject("login", visitor.charger_id), what, *values)
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "wrong login", [("WWW-Authenticate", BASIC)])

    def _fit_answer(self, link: Link, request: Request, visitor: Visitor) -> Response | None:
        """Return what a request that is worth asking the primary is answered with; answer any other."""
        response = link.answer_to(request)
        if (
            response.status_code != HTTPStatus.SWITCHING_PROTOCOLS
        ):  # The primary might drop the charger for it.
            what = "%s: no websocket handshake: answered with HTTP %d"
            self.complaints.say(logging.INFO, "unfit", what, visitor.charger_id, response.status_code)
            link.respond(response)
            return None
        if visitor.offers and not any(offer.lower() in visitor.config.versions for offer in visitor.offers):
            what = "%s: closed: it speaks %s, `versions` allows %s"
            values = (visitor.charger_id, ", ".join(visitor.offers), ", ".join(visitor.config.versions))
            self.complaints.say(logging.WARNING, self._subject("versions", values[0]), what, *values)
            if link.accept(response, None):  # OCPP-J 1.6 3.2: completed without a subprotocol, then closed.
                link.close(1002, "no common subprotocol")
            return None
        return response

    async def _let_in(self, link: Link, request: Request, visitor: Visitor) -> bool:
        """Let the charger in if its login is right and its primary accepts it; return whether it is in.

        Raises RefusedError.
        """
        self._check_login(visitor)
        response = self._fit_answer(link, request, visitor)
        if response is None:
            return False
        versions = [o.lower() for o in visitor.offers if o.lower() in visitor.config.versions] or ["ocpp1.6"]
        primary: Link | None = None
        if not visitor.config.primary.is_local:
            primary = await self._dial_primary(visitor, versions)
            versions = [primary.protocol.subprotocol or "ocpp1.6"]
        standing = self.relays.get(visitor.charger_id)
        is_late = standing and standing.link and standing.link.arrived > link.arrived
        if link.is_closed or is_late or not link.accept(response, visitor.chosen(versions[0])):
            if primary:
                primary.close(1001, "the charger is gone")
            return False
        relay = self._relay(visitor.charger_id, visitor.config, versions[0])
        relay.connect(link, primary, versions[0], visitor.credentials)
        return True

    def _visitor(self, request: Request) -> Visitor:
        """Read a handshake. Raises RefusedError for a charger that is not expected here."""
        segments = [segment for segment in request.path.partition("?")[0].split("/") if segment]
        charger_id = urllib.parse.unquote(segments[-1]) if segments else ""
        if not is_charger_id(charger_id):
            what = "a charger is refused: %s ends in no charger id"
            self.complaints.say(logging.WARNING, "no id", what, request.path.partition("?")[0])
            raise RefusedError(HTTPStatus.NOT_FOUND, "the path does not end in a charger id")
        if not self.config.host.admits(charger_id):
            what = "%s: refused: not among `chargers` in [host]"
            self.complaints.say(logging.WARNING, self._subject("unknown", charger_id), what, charger_id)
            raise RefusedError(HTTPStatus.NOT_FOUND, "unknown charger")
        if comes_from_elsewhere(request.headers):
            what = "%s: refused: a web page of another host has opened this connection"
            self.complaints.say(logging.WARNING, self._subject("origin", charger_id), what, charger_id)
            raise RefusedError(HTTPStatus.FORBIDDEN, "a web page of another host")
        if "Connection" not in request.headers and "Upgrade" in request.headers:
            request.headers["Connection"] = "Upgrade"  # An Autel leaves it out (lbbrhzn/ocpp#1933).
        offers = offered_subprotocols(request.headers)
        credentials = Credentials(*(only(request.headers, name) for name in ("Authorization", "User-Agent")))
        return Visitor(charger_id, self.config.charger(charger_id), offers, credentials)

    async def _dial_primary(self, visitor: Visitor, versions: list[str]) -> Link:
        """Return the primary's link for this charger. Raises RefusedError."""
        try:
            return await self._dial(visitor, versions)
        except DialError as error:
            relay = self.relays.get(visitor.charger_id)
            if error.status is not None and relay and await self._makes_room(relay):
                # Some primaries allow one connection per charger, and the old one is dead.
                log.info("%s: its old connection is closed; primary is asked again", visitor.charger_id)
                return await self._dial_again(visitor, versions)
            raise self._refusal(visitor, error) from None

    async def _makes_room(self, relay: Relay) -> bool:
        """Close what stands at the primary for a charger whose old connection is dead or gone."""
        old = relay.link
        if old is None and not relay.has_primary:
            return False
        if old and (not old.has_ponged or await old.probe(PROBE_SECONDS)):
            return False  # Where Pongs never come, the watchdog and the system tell the dead.
        if relay.link not in (old, None) or self.relays.get(relay.charger_id) is not relay:
            return False
        await relay.dismiss()
        return True

    async def _dial_again(self, visitor: Visitor, versions: list[str]) -> Link:
        try:
            return await self._dial(visitor, versions)
        except DialError as error:
            raise self._refusal(visitor, error) from None

    async def _dial(self, visitor: Visitor, versions: list[str]) -> Link:
        server = visitor.config.primary
        return await self.dialer.dial(Peer.PRIMARY, server, visitor.charger_id, versions, visitor.credentials)

    def _refusal(self, visitor: Visitor, error: DialError) -> RefusedError:
        """Return the primary's refusal as the charger's; anything but a 4xx means: come back later."""
        is_refusal = error.status is not None and 400 <= error.status < 500
        what = "primary refuses it" if is_refusal else "primary cannot be reached"
        login = (
            "the charger's own login" if visitor.config.primary.needs_charger_login else "primary_password"
        )
        advice = f"check {login}, and that primary knows it" if is_refusal else "it may come again"
        if error.is_certificate_unfit or not is_refusal:
            advice = advice_for(error, Peer.PRIMARY, advice)
        values = (visitor.charger_id, what, error, advice)
        self.complaints.say(
            logging.WARNING, self._subject(what, visitor.charger_id), "%s: refused: %s: %s; %s", *values
        )
        if error.status is None or not is_refusal:
            return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the primary server is away")
        passed_on = ("WWW-Authenticate", "Retry-After")
        headers = [(name, value) for name in passed_on for value in error.headers.get_all(name)]
        return RefusedError(error.status, "refused by the primary server", headers)

    def _relay(self, charger_id: str, config: ChargerConfig, version: str) -> Relay:
        relay = self.relays.get(charger_id)
        if relay is None:
            host, dialer, journal = self.config.host, self.dialer, self.journal
            relay = Relay(charger_id, config, version, host, dialer, journal, current_instant)
            self.relays[charger_id] = relay
        return relay

    # The watchdog.

    async def _watchdog(self) -> None:
        """Wake the relays whose deadlines have come, for as long as the process lives."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            self.lags.append(max(0.0, now - due))
            self.journal.tick()
            is_watching = now >= self.watch_at
            if is_watching:
                self.watch_at = now + self.config.host.watchdog_interval
            for number, (charger_id, relay) in enumerate(list(self.relays.items()), 1):
                if number % RELAYS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # Let the others have a turn.
                if relay.is_idle and self.relays.get(charger_id) is relay:
                    relay.memory.is_in_use = False
                    del self.relays[charger_id]
                    continue
                # As callbacks of the loop: a fault in one relay is logged there and harms no other.
                if relay.deadline <= now:
                    loop.call_soon(relay.tick)
                if is_watching:
                    loop.call_soon(relay.watch)


def current_instant() -> Instant:
    """Return what both clocks say."""
    return Instant(time.monotonic(), time.time())


def server_context(host: HostConfig) -> ssl.SSLContext | None:
    """Return the TLS side of the listener; None = plain. Raises OSError for unfit files."""
    if not host.cert_chain:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(host.cert_chain, host.cert_key or None)
    if host.client_ca:
        context.load_verify_locations(host.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def raised_file_limit() -> int:
    """Let the process open as many files as the system allows it; return how many."""
    if resource is None:
        return MAX_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def retry_after(seconds: int) -> list[tuple[str, str]]:
    """Return the header that tells a client when to come again."""
    return [("Retry-After", str(seconds))]


CHARGERS_ORIGIN = "file://"  # What a library of many chargers sends (arduinoWebSockets); no web page's.


def comes_from_elsewhere(headers: Headers) -> bool:
    """Whether a web page of another host opens the connection; some chargers send an Origin, too."""
    shown = [origin for origin in headers.get_all("Origin") if origin != CHARGERS_ORIGIN]
    origins = {host_of(origin if "://" in origin else f"//{origin}") for origin in shown}
    hosts = {host_of(f"//{host}") for host in headers.get_all("Host")}
    return bool(origins) and (origins != hosts or len(hosts) != 1 or None in hosts)


def host_of(url: str) -> str | None:
    """Return the host that a URL names; None if it names none."""
    try:
        return urllib.parse.urlsplit(url).hostname
    except ValueError:
        return None


BASIC = 'Basic realm="ocpp"'


def shows_password(charger_id: str, password: str, authorization: str | None) -> bool:
    """Whether a charger shows its id and its password (OCPP security profiles 1 and 2).

    The key of OCPP 1.6 is bytes, which the ini may have in hex; many chargers send the digits as they stand.
    """
    login, name = basic_login(authorization), f"{charger_id}:".encode()  # Ids may hold colons.
    user, shown = login[: len(name)], login[len(name) :]
    wanted = (password.encode(), unhexed(password.encode()))
    given = (shown, unhexed(shown))
    # Every comparison is made, and each takes the same time whatever it compares.
    equal = [hmac.compare_digest(one, other) for one in wanted for other in given]
    is_charger = hmac.compare_digest(user, name)
    return is_charger and bool(shown) and any(equal)


def basic_login(authorization: str | None) -> bytes:
    """Return `user:password` of a Basic header; empty for any other."""
    scheme, _, encoded = (authorization or "").partition(" ")
    try:
        login = base64.b64decode(encoded.strip().encode() + b"==")  # Some leave out the padding.
    except ValueError:
        return b""
    return login if scheme.lower() == "basic" else b""


def unhexed(text: bytes) -> bytes:
    """Return the bytes that hex digits stand for; other text as it is."""
    return bytes.fromhex(text.decode()) if re.fullmatch(rb"([0-9A-Fa-f]{2}){8,}", text) else text


def only(headers: Headers, name: str) -> str | None:
    """Return the header's value if it stands there once."""
    values = headers.get_all(name)
    return values[0] if len(values) == 1 else None


def offered_subprotocols(headers: Headers) -> list[str]:
    """Take the offer out of the headers, put it back in proper form, and return it."""
    name = "Sec-WebSocket-Protocol"
    offers = [offer.strip(' \t"') for value in headers.get_all(name) for offer in value.split(",")]
    offers = [offer for offer in offers if re.fullmatch(r"[-\w.!#$%&'*+^`|~]{1,64}", offer, re.ASCII)]
    if headers.get_all(name):
        del headers[name]
        if offers:
            headers[name] = ", ".join(offers)
    return offers


# ---------------------------------------------------------------------------------------------------------
# Status
#
# The second port, for people and monitoring: a page that is told of changes over a websocket, the ledger of
# sessions, health, metrics. It looks and changes nothing; what it shows comes from outside, and is always
# text. Nobody walks all chargers: those that have changed are looked at, a bounded number at a time.
# ---------------------------------------------------------------------------------------------------------

LOOK_SECONDS = 1.0  # How often changes are looked at.
LOOK_BUDGET_SECONDS = 0.005  # That a look may hold the loop; the next one goes on with the other chargers,
BEHIND_SECONDS = 0.05  # so much later.
CHARGERS_A_LOOK = 500  # That a page is told of at a time.
MAX_STATUS_LINKS = 32  # Requests and pages at a time; beyond it the oldest request is cut.
MAX_PAGES = 16  # Open at a time.
# A wrong password is answered so much later: with so few requests at a time, nobody guesses many. Nobody is
# shut out, because behind a proxy or in a container all come from one address.
WRONG_PASSWORD_SECONDS = 1.0
MAX_PAGE_TEXT = 1024  # Bytes of what a page may say; there is nothing that it has to.
MAX_UNREAD = 2**18  # Bytes that a page has not read yet; beyond it, it is told nothing for a while.
MAX_EVENTS = 100  # Log lines that a page shows.
GONE_SECONDS = 7 * DAY  # A charger that was not seen for so long is not missed any more.
GAUGES_SECONDS = 3600.0  # How often all gauges are looked at anew, a few chargers at a time.
RECENT_SESSIONS = 50
RECENT_REFUSALS = 20
ENERGY_DAYS = 14
LEDGER_ROWS = 500  # Sessions that are read and written at once: a few milliseconds of the loop.
MAX_LEDGER_ROWS = 100_000  # Of one request, about 20 MB.
LEDGER_SECONDS = 20.0  # For the disk to answer.
DOWNLOAD_SECONDS = 60.0  # For whoever has asked to read the answer.

View = dict[str, Any]  # What a page is told of something, as JSON.

SESSIONS = """
SELECT sessions.*,
    (SELECT min(since) FROM calls WHERE session = sessions.number AND refused IS NULL) AS waits_since,
    (SELECT max(refused) FROM calls WHERE session = sessions.number) AS refused_call
FROM sessions
"""
LEDGER = f"""{SESSIONS} WHERE begun < :until AND (begun, number) > (:begun, :number)
ORDER BY begun, number LIMIT {LEDGER_ROWS}"""
RECENT = f"{SESSIONS} WHERE owner IS NOT NULL ORDER BY number DESC LIMIT {RECENT_SESSIONS}"
ENERGY = """
SELECT date(begun, 'unixepoch', 'localtime') AS day, owner, sum(max(meter_stop - meter_start, 0)) AS wh
FROM sessions WHERE begun > :since AND owner IS NOT NULL AND meter_stop IS NOT NULL AND NOT is_rejected
GROUP BY day, owner
"""
REFUSALS = f"""
SELECT charger, peer AS server, since, refused AS words, text FROM calls
WHERE refused IS NOT NULL ORDER BY number DESC LIMIT {RECENT_REFUSALS}
"""
# Query, and seconds to the next.
LOOK_UPS = {"sessions": (RECENT, 2.0), "refusals": (REFUSALS, 2.0), "energy": (ENERGY, 30.0)}


def time_text(utc: float | None) -> str:
    """Return a time as OCPP writes it; "" for none."""
    return "" if utc is None else Instant(0.0, utc).text


def energy_of(meter_start: float | None, meter_stop: float | None) -> float | None:
    """Return the Wh between two readings, whole if they are; None if one is missing."""
    if meter_start is None or meter_stop is None:
        return None
    energy = round(meter_stop - meter_start, 3)
    return int(energy) if energy.is_integer() else energy


# Sessions, as the ledger and the page show them.


class Delivery(NamedTuple):
    """What has become of a session, in a word and in more words."""

    state: str
    words: str = ""


def delivery_of(row: Row) -> Delivery:
    """Say whether a session of the ledger has reached its server."""
    states = {
        "rejected": row["is_rejected"],
        "refused": row["refused"] or row["refused_call"],
        "waiting": row["waits_since"] is not None,
        "open": row["ended"] is None,
        "recorded": row["server"] in ("", LOCAL),
        "delivered": row["delivered"] is not None,
        "no stop": not row["stopped_at"],
        "unconfirmed": True,  # Its stop was passed on, and no answer has come.
    }
    state = next(name for name, holds in states.items() if holds)
    words = {
        "refused": str(row["refused"] or row["refused_call"]),
        "waiting": f"since {time_text(row['waits_since'])}",
    }
    return Delivery(state, words.get(state, ""))


CSV_COLUMNS = (
    *("charger", "connector", "badge", "owner", "start", "stop", "wh", "transaction_id"),
    *("server_transaction_id", "reason", "delivered", "state", "words"),
)


def csv_row(row: Row) -> list[Any]:
    """Return a session of the ledger as a line of the CSV; its times by the charger's clock, if it told."""
    delivery = delivery_of(row)
    values = [
        *(row["charger"], row["connector"], row["badge"], "" if row["is_rejected"] else row["owner"]),
        *(row["started_at"] or time_text(row["begun"]), row["stopped_at"]),
        energy_of(row["meter_start"], row["meter_stop"]),
        *(json.loads(row["transaction_id"]), json.loads(row["server_id"])),
        *(row["reason"], time_text(row["delivered"]), *delivery),
    ]
    return [cell(value) for value in values]


def cell(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula, wherever it may split a line."""
    if not isinstance(value, str):
        return value
    text = re.sub(r"[;\t\r\n]+(?=\s*[=+\-@])", " ", value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return lines of CSV (RFC 4180)."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def time_of(text: str, days: int) -> float:
    """Return the UTC seconds of a date or time, a day of this machine's clock; `days` is added to a date.

    Raises ValueError.
    """
    moment = datetime.fromisoformat(text)
    is_date = len(text) <= len("2026-01-01")
    return (moment + timedelta(days=days if is_date else 0)).astimezone(UTC).timestamp()


def session_view(row: Row, shown: Callable[[str], str], clean: Callable[[str], str]) -> View:
    """Return what the page shows of a session of the ledger."""
    state, words = delivery_of(row)
    return {
        "charger": row["charger"],
        "connector": row["connector"],
        "badge": shown(row["badge"]),
        "owner": "" if row["is_rejected"] else row["owner"],
        "begun": row["begun"],
        "ended": row["ended"],
        "wh": energy_of(row["meter_start"], row["meter_stop"]),
        "state": state,
        "words": clean(words),
    }


def open_session_view(session: Session, shown: Callable[[str], str]) -> View:
    """Return what the page shows of a session that has not ended."""
    return {
        "connector": session.connector,
        "badge": shown(session.badge),
        "owner": session.owner.value if session.owner else "not known yet",
        "begun": session.begun,
        "wh": energy_of(session.meter_start, session.meter_stop),
        "id": session.transaction_id,
    }


# Chargers, as the page shows them.


def server_view(relay: Relay, peer: Peer, now: Instant, clean: Callable[[str], str]) -> View | None:
    """Return how a server of a charger does; None if there is none."""
    server, outbox = relay.config.server(peer), relay.outboxes.get(peer)
    if server is None or outbox is None:
        return {"state": LOCAL} if server else None
    if outbox.link:
        return {"state": "connected" if outbox.is_booted else "has not accepted the boot yet"}
    if not outbox.is_wanted():
        return {"state": "not needed"}
    next_try = None if outbox.dial_at is None else to_utc(outbox.dial_at, now)
    return {"state": "down", "words": clean(outbox.trouble), "next": next_try}


def charger_view(
    memory: Memory,
    relay: Relay | None,
    now: Instant,
    shown: Callable[[str], str],
    clean: Callable[[str], str],
) -> View:
    """Return what the page shows of a charger."""
    link = relay.link if relay else None
    waiting = [call for calls in memory.stored.values() for call in calls]
    opened = [session for session in memory.sessions.values() if session.ended is None]
    return {
        "online": to_utc(link.opened, now) if link else None,
        "seen": to_utc(link.seen, now) if link else memory.seen or None,
        "version": memory.version,
        "servers": {peer.value: server_view(relay, peer, now, clean) for peer in SERVERS} if relay else {},
        "waiting": len(waiting),
        "oldest": min((call.since for call in waiting), default=None),
        "sessions": [open_session_view(session, shown) for session in opened],
    }


# Metrics.


class Metric(NamedTuple):
    """One metric, as Prometheus knows it (text format 0.0.4)."""

    kind: str  # "counter" or "gauge".
    labels: tuple[str, ...]
    help: str
    known: tuple[
        tuple[str, ...], ...
    ] = ()  # Told from the start, as 0, so that the first one is an increase.


BOTH = tuple((peer.value,) for peer in SERVERS)
METRICS = {
    "info": Metric("gauge", ("version",), "The proxy's version."),
    "chargers": Metric(
        *(
            "gauge",
            ("state",),
            "Chargers that are known; gone = not seen for a week, or not admitted any more.",
        ),
        (("online",), ("offline",), ("gone",)),
    ),
    "servers": Metric(
        *("gauge", ("server", "state"), "Connections to servers that are needed, by state."),
        tuple((peer.value, state) for peer in SERVERS for state in ("connected", "down")),
    ),
    "sessions": Metric("gauge", ("owner", "state"), "Sessions of the last seven days, by state."),
    "stored_calls": Metric("gauge", ("server",), "Calls that are answered and not delivered yet.", BOTH),
    "oldest_stored_call_age_seconds": Metric("gauge", (), "How long the oldest of them has been waiting."),
    "event_loop_lag_seconds": Metric("gauge", (), "The longest delay of the event loop in the last minute."),
    "state_file_failing": Metric("gauge", (), "1 while the state file cannot be written."),
    "calls_total": Metric("counter", ("sender", "receiver", "outcome"), "Calls, by what became of them."),
    "delivered_calls_total": Metric("counter", ("server",), "Stored Calls that their server accepted.", BOTH),
    "refused_calls_total": Metric("counter", ("server",), "Stored Calls that their server refused.", BOTH),
    "dropped_messages_total": Metric("counter", ("reason",), "Messages that went to nobody, by reason."),
    "connections_total": Metric("counter", ("peer",), "Connections opened; a charger's next is a reconnect."),
    "disconnections_total": Metric("counter", ("peer",), "Connections that ended."),
    "failed_dials_total": Metric("counter", ("server",), "Dials of a server that failed.", BOTH),
    "refused_handshakes_total": Metric("counter", ("status",), "Handshakes of chargers that were refused."),
}


def exposition(samples: Mapping[tuple[str, ...], float]) -> str:
    """Return the samples, by metric and labels, in the text format of Prometheus."""
    lines = []
    for name, metric in METRICS.items():
        lines += [f"# HELP ocpp_proxy_{name} {metric.help}", f"# TYPE ocpp_proxy_{name} {metric.kind}"]
        found = dict.fromkeys(metric.known, 0.0)
        found |= {sample[1:]: value for sample, value in samples.items() if sample[0] == name}
        for labels, value in found.items():
            named = ",".join(f'{label}="{text}"' for label, text in zip(metric.labels, labels, strict=True))
            lines.append(f"ocpp_proxy_{name}{{{named}}} {value}" if named else f"ocpp_proxy_{name} {value}")
    return "\n".join([*lines, ""])


def share_of(memory: Memory, relay: Relay | None, is_expected: bool, utc: float) -> Counter[tuple[str, ...]]:
    """Return what one charger adds to the gauges."""
    share: Counter[tuple[str, ...]] = Counter()
    is_missed = is_expected and utc - memory.seen < GONE_SECONDS
    share["chargers", "online" if relay and relay.link else "offline" if is_missed else "gone"] = 1
    states = Counter((session.owner, state_of(session)) for session in memory.sessions.values())
    for (owner, state), count in states.items():
        share["sessions", owner.value if owner else "unknown", state] = count
    for peer, calls in memory.stored.items():
        share["stored_calls", peer.value] += len(calls)
    for peer, outbox in relay.outboxes.items() if relay else ():
        if outbox.link or outbox.is_wanted():
            share["servers", peer.value, "connected" if outbox.link else "down"] += 1
    return share


def state_of(session: Session) -> str:
    """Return the state of a session in a word."""
    if session.is_rejected or session.refused:
        return "rejected" if session.is_rejected else "refused"
    return "open" if session.ended is None else "ended"


class Gauges:
    """What all chargers add up to; kept up to date charger by charger."""

    def __init__(self) -> None:
        self.shares: dict[str, Counter[tuple[str, ...]]] = {}  # By charger id; MAX_MEMORIES.
        self.totals: Counter[tuple[str, ...]] = Counter()  # By metric and labels.
        self.oldest: dict[str, float] = {}  # UTC seconds of the oldest stored Call, where there is one.

    def update(self, charger_id: str, share: Counter[tuple[str, ...]] | None, memory: Memory | None) -> None:
        """Take in how a charger is now; None = it is not remembered any more."""
        self.totals.subtract(self.shares.pop(charger_id, ()))
        self.oldest.pop(charger_id, None)
        if memory and share:
            self.shares[charger_id] = share
            self.totals.update(share)
            times = [call.since for calls in memory.stored.values() for call in calls[:1]]
            self.oldest.update({charger_id: min(times)} if times else {})

    def age_of_oldest(self, utc: float) -> float:
        """Return for how many seconds the oldest stored Call has been waiting; 0 = there is none."""
        return max(0.0, utc - min(self.oldest.values(), default=utc))


# The page: one file, no outside resource. What it is told is put in as text (textContent), never as markup.
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="token" content="{token}">
<link rel="icon" href="data:,">
<title>ocpp-2w-proxy</title>
<style>
:root {
  --ground: #f6f7f9; --paper: #fff; --ink: #1c2430; --faint: #5d6878; --line: #dfe3e9;
  --primary: #2563c9; --secondary: #b4540a; --good: #1b7a3d; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12161c; --paper: #1b2129; --ink: #e4e8ee; --faint: #98a3b3; --line: #303945;
    --primary: #78aaff; --secondary: #f0a05a; --good: #6fcf8e; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header, main { max-width: 1100px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 16px; }
h1 { font-size: 20px; margin: 0; }
h2 { font-size: 15px; margin: 0 0 8px; }
#summary { color: var(--faint); margin: 4px 0 12px; }
#alarm { background: var(--bad); color: var(--paper); padding: 8px 12px; border-radius: 8px; }
section {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px; margin: 0 0 14px; overflow-x: auto;
}
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: 13px; }
th, td { padding: 5px 10px 5px 0; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; }
.primary { color: var(--primary); }
.secondary { color: var(--secondary); }
.good { color: var(--good); }
.bad { color: var(--bad); overflow-wrap: anywhere; }
.faint, .note { color: var(--faint); }
.note { margin: 8px 0 0; font-size: 13px; }
.when { color: var(--faint); white-space: nowrap; }
.text { overflow-wrap: anywhere; }
.copy { font-family: ui-monospace, monospace; user-select: all; overflow-wrap: anywhere; }
input {
  font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 8px; margin: 0 0 8px; width: 100%; max-width: 260px;
}
a { color: var(--primary); }
svg { width: 100%; max-width: 720px; display: block; }
svg text { fill: var(--faint); font-size: 11px; text-anchor: middle; }
@media (max-width: 700px) {
  thead { display: none; }
  tr { display: block; border-top: 1px solid var(--line); padding: 6px 0; }
  td { display: flex; gap: 12px; border: 0; padding: 1px 0; overflow-wrap: anywhere; }
  td::before { content: attr(data-label); flex: 0 0 84px; color: var(--faint); font-size: 13px; }
  td:empty { display: none; }
}
</style>
</head>
<body>
<header>
<h1>ocpp-2w-proxy</h1>
<p id="summary">...</p>
<p id="alarm" role="alert" hidden></p>
</header>
<main>
<section>
<h2>Chargers</h2>
<input id="filter" type="search" placeholder="Find a charger" aria-label="Find a charger">
<table id="chargers"></table>
<p class="note" id="more"></p>
</section>
<section><h2>Open sessions</h2><table id="open"></table></section>
<section>
<h2>Last sessions</h2>
<table id="sessions"></table>
<p class="note"><a href="sessions.csv">All sessions as CSV</a>;
of some days: sessions.csv?from=2026-01-01&amp;to=2026-01-31</p>
</section>
<section id="trouble" hidden><h2>Refused messages</h2><table id="refusals"></table></section>
<section><h2>Energy per day, kWh</h2><div id="energy"></div></section>
<section>
<h2>Badges on no list</h2>
<table id="unlisted"></table>
<p class="note">Copy the number to primary_rfid or secondary_rfid in the ini, and restart the proxy.</p>
</section>
<section><h2>What happened</h2><table id="events"></table></section>
</main>
<script>
"use strict";
const MOST_ROWS = 100;  // Of a table; the filter finds the other chargers.
const OWNERS = ["primary", "secondary"];
const DELIVERY = {
  "delivered": ["delivered", "good"],
  "recorded": ["recorded here", "good"],
  "open": ["open", "faint"],
  "waiting": ["waits for its server", "bad"],
  "refused": ["refused", "bad"],
  "rejected": ["rejected: its badge is on no list", "bad"],
  "no stop": ["no stop was sent", "bad"],
  "unconfirmed": ["its stop was not answered", "bad"],
};
const chargers = new Map();  // By id; what the proxy told last.
const tables = {
  sessions: [], refusals: [], energy: [], unlisted: [], events: [],
  summary: {counts: [], oldest: null, trouble: ""},
};
let skew = 0;  // This clock less the proxy's, in seconds.
let isDrawn = true;

const at = id => document.getElementById(id);
const now = () => Date.now() / 1000 - skew;
const format = {month: "short", day: "numeric", hour: "2-digit", minute: "2-digit"};
const time = utc => utc === null ? "" : new Date(utc * 1000).toLocaleString([], format);
const kwh = wh => wh === null ? "" : (wh / 1000).toFixed(2);

function ago(utc) {
  if (utc === null) return "";
  const seconds = Math.max(0, now() - utc);
  const units = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([size]) => seconds >= 1.5 * size) || [1, "s"];
  return `${Math.round(seconds / size)} ${unit} ago`;
}

// Fill a table: a cell is a text, or a text and its class.
function fill(id, columns, rows, nothing) {
  const table = at(id), text = JSON.stringify(rows);
  if (table.shown === text) return;  // What somebody has marked stays marked.
  table.shown = text;
  table.replaceChildren();
  if (!rows.length) {
    table.insertRow().insertCell().textContent = nothing;
    return;
  }
  const head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of columns) head.append(Object.assign(document.createElement("th"), {textContent: name}));
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((value, place) => {
      const [text, kind] = Array.isArray(value) ? value : [value, ""];
      const cell = line.insertCell();
      cell.dataset.label = columns[place];
      cell.textContent = text ?? "";
      cell.className = kind;
    });
  }
}

function serverCell(view) {
  if (!view) return "";
  if (view.state !== "down") return [view.state, view.state === "connected" ? "good" : "faint"];
  const wait = view.next === null ? null : Math.max(0, Math.round(view.next - now()));
  return [`down: ${view.words || "not reached yet"}${wait === null ? "" : `; next try in ${wait} s`}`, "bad"];
}

function deliveryCell(session) {
  const [state, kind] = DELIVERY[session.state];
  const since = Date.parse(session.words.replace("since ", "")) / 1000;
  const words = session.state === "waiting" ? `since ${time(since)}` : session.words;
  return [words ? `${state}: ${words}` : state, kind];
}

function drawChargers() {
  const wanted = at("filter").value.toLowerCase();
  const found = [...chargers].filter(([id]) => id.toLowerCase().includes(wanted));
  found.sort(([a], [b]) => a < b ? -1 : 1);
  const rows = found.slice(0, MOST_ROWS).map(([id, view]) => [
    id,
    view.online === null ? ["offline", "bad"] : [`since ${time(view.online)}`, "good"],
    ago(view.seen),
    view.version,
    ...OWNERS.map(owner => serverCell(view.servers[owner])),
    view.waiting ? [`${view.waiting}, the oldest came ${ago(view.oldest)}`, "bad"] : "",
  ]);
  const columns = ["Charger", "Online", "Last seen", "Version", "Primary", "Secondary", "Waiting"];
  fill("chargers", columns, rows, "None yet.");
  at("more").textContent = found.length > MOST_ROWS ? `${found.length - MOST_ROWS} more` : "";
}

function drawOpen() {
  const open = [...chargers].flatMap(([id, view]) => view.sessions.map(session => [id, session]));
  open.sort(([, a], [, b]) => b.begun - a.begun);
  const rows = open.slice(0, MOST_ROWS).map(([id, session]) => [
    id, session.connector, session.badge, [session.owner, session.owner],
    [time(session.begun), "when"], kwh(session.wh), session.id,
  ]);
  const columns = ["Charger", "Connector", "Badge", "Owner", "Begun", "kWh", "Transaction"];
  fill("open", columns, rows, "None.");
}

function drawSessions() {
  const rows = tables.sessions.map(session => [
    session.charger, session.connector, session.badge, [session.owner, session.owner],
    [time(session.begun), "when"], [time(session.ended), "when"], kwh(session.wh), deliveryCell(session),
  ]);
  const columns = ["Charger", "Connector", "Badge", "Owner", "Begun", "Ended", "kWh", "Delivery"];
  fill("sessions", columns, rows, "None yet.");
}

function drawRefusals() {
  const rows = tables.refusals.map(({charger, server, since, words, text}) => [
    charger, [server, server], [time(since), "when"], [words, "bad"], [text, "text"],
  ]);
  fill("refusals", ["Charger", "Server", "Since", "Refused with", "Message"], rows, "None.");
  at("trouble").hidden = !rows.length;
}

function drawEnergy() {
  const days = [...new Set(tables.energy.map(row => row.day))].sort();
  const place = at("energy"), text = JSON.stringify(tables.energy);
  if (place.shown === text) return;
  place.shown = text;
  const width = 720, height = 110, step = width / Math.max(days.length, 7);
  const of = (day, owner) =>
    tables.energy.filter(row => row.day === day && row.owner === owner)
      .reduce((sum, row) => sum + row.wh / 1000, 0);
  const sum = day => of(day, "primary") + of(day, "secondary");
  const most = Math.max(...days.map(sum), 0.001);
  const make = (name, attributes, text, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    parent?.append(node);
    return node;
  };
  const label = "Energy per day and server";
  const svg = make("svg", {viewBox: `0 0 ${width} ${height + 20}`, role: "img", "aria-label": label}, "");
  days.forEach((day, number) => {
    const x = number * step + 4, middle = number * step + step / 2;
    let y = height;
    for (const owner of OWNERS) {
      const size = of(day, owner) / most * (height - 16);
      y -= size;
      const fill = `var(--${owner})`;
      const bar = make("rect", {x, y, width: step - 8, height: size, fill}, "", svg);
      make("title", {}, `${day}, ${owner}: ${of(day, owner).toFixed(2)} kWh`, bar);
    }
    make("text", {x: middle, y: y - 3}, sum(day).toFixed(1), svg);
    make("text", {x: middle, y: height + 14}, day.slice(5), svg);
  });
  const legend = Object.assign(document.createElement("p"), {className: "note"});
  for (const owner of OWNERS) {
    const textContent = `\\u25a0 ${owner} `;
    legend.append(Object.assign(document.createElement("span"), {className: owner, textContent}));
  }
  place.replaceChildren(...(days.length ? [svg, legend] : ["None yet."]));
}

function drawSummary() {
  const {counts, oldest} = tables.summary;
  const count = (...key) => counts.find(row => key.every((word, at) => row[at] === word))?.at(-1) || 0;
  const online = count("chargers", "online");
  const parts = [`${online} of ${online + count("chargers", "offline")} chargers online`];
  for (const owner of OWNERS) {
    const up = count("servers", owner, "connected"), down = count("servers", owner, "down");
    if (up + down) parts.push(`${owner}: ${up} connected${down ? `, ${down} down` : ""}`);
  }
  const waiting = OWNERS.reduce((sum, owner) => sum + count("stored_calls", owner), 0);
  parts.push(waiting ? `${waiting} messages wait, the oldest came ${ago(oldest)}` : "nothing waits");
  at("summary").textContent = parts.join(" \\u00b7 ");
}

function draw() {
  isDrawn = true;
  drawSummary();
  drawChargers();
  drawOpen();
  drawSessions();
  drawRefusals();
  drawEnergy();
  const badges = tables.unlisted.map(([badge, charger, utc]) => [[badge, "copy"], charger, time(utc)]);
  fill("unlisted", ["Badge", "Charger", "Shown"], badges.reverse(), "None was shown since the start.");
  const lines = tables.events.map(([utc, level, text]) => [
    [time(utc), "when"], [text, level === "INFO" ? "text" : "bad"],
  ]);
  fill("events", ["When", "What"], lines.reverse(), "Nothing yet.");
}

function drawSoon() {
  if (!isDrawn) return;
  isDrawn = false;
  setTimeout(draw, 100);
}

function alarm(text) {
  at("alarm").textContent = text;
  at("alarm").hidden = !text;
}

function listen() {
  const url = new URL("live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("token", document.querySelector("meta[name=token]").content);
  const socket = new WebSocket(url);
  socket.onmessage = event => {
    const news = JSON.parse(event.data);
    skew = Date.now() / 1000 - news.now;
    for (const [id, view] of Object.entries(news.chargers)) {
      if (view) chargers.set(id, view); else chargers.delete(id);
    }
    for (const name of Object.keys(tables)) tables[name] = news[name] ?? tables[name];
    alarm(tables.summary.trouble);
    drawSoon();
  };
  socket.onclose = () => {
    alarm("The proxy does not answer; trying again.");
    setTimeout(comeBack, 3000);
  };
}

// Load the page anew once the proxy is back: it may be another version, and has another token.
function comeBack() {
  fetch("healthz").then(() => location.reload(), () => setTimeout(comeBack, 3000));
}

at("filter").oninput = drawSoon;
setInterval(drawSoon, 10000);
listen();
</script>
</body>
</html>
"""


def policy_for(page: str) -> str:
    """Return the Content-Security-Policy that lets a page use its own script and style, and nothing else."""
    own = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("script", "style")}
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        )
        for tag, texts in own.items()
    }
    allowed = f"script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


STATUS_HEADERS = {
    "Content-Security-Policy": policy_for(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


# The port.


class Events(logging.Handler):
    """Keeps the last log lines, for the page: the story of the day."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[tuple[float, str, str]] = deque(maxlen=MAX_EVENTS)  # UTC, level, text.

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.created, record.levelname, record.getMessage()))


class Page:
    """A page that somebody looks at. What it says is not listened to."""

    def __init__(self, link: Link, charger_ids: Iterable[str]) -> None:
        self.link = link
        self.owed = dict.fromkeys(charger_ids)  # Charger ids that it has to be told of; MAX_MEMORIES.
        self.told: dict[str, str] = {}  # The tables, as it was told them.

    def link_received(self, link: Link, text: str) -> None:
        """Ignore it."""

    def link_closed(self, link: Link) -> None:
        """Ignore it; the next look finds out."""

    def is_behind(self) -> bool:
        """Whether it has still to read what it was told before."""
        assert self.link.transport is not None
        return self.link.transport.get_write_buffer_size() > MAX_UNREAD

    def tell(self, chargers: Mapping[str, str], tables: Mapping[str, str], utc: float) -> None:
        """Tell it of chargers, each with its view, and of tables that have changed; all in JSON."""
        news = {name: text for name, text in tables.items() if self.told.get(name) is not text}
        for charger_id in chargers:
            self.owed.pop(charger_id, None)
        self.told.update(news)
        rows = ",".join(f"{dump(charger_id)}:{view}" for charger_id, view in chargers.items())
        parts = [
            f'"now":{utc}',
            f'"chargers":{{{rows}}}',
            *(f'"{name}":{text}' for name, text in news.items()),
        ]
        self.link.send(f"{{{','.join(parts)}}}")


class Status:
    """The second port. Owns its listener and its pages; reads what the proxy owns."""

    def __init__(self, proxy: Proxy, events: Events, clean: Callable[[str], str]) -> None:
        self.proxy = proxy
        self.events = events
        self.clean = clean  # Makes a peer's words fit to be shown.
        self.shown: Callable[[str], str] = str if proxy.config.full_badges else masked
        self.config = proxy.config.status
        self.token = secrets.token_urlsafe()  # Lets a page in that has been let in before (Safari).
        self.links: dict[Link, None] = {}  # Requests, the oldest first; with the pages MAX_STATUS_LINKS.
        self.pages: dict[Link, Page] = {}  # MAX_PAGES.
        self.gauges = Gauges()
        self.stale: dict[
            str, None
        ] = {}  # Charger ids whose share in the gauges is out of date; MAX_MEMORIES.
        self.tables: dict[str, str] = {}  # What pages show beside the chargers, in JSON, by name.
        self.gauges_at = 0.0  # Monotonic seconds; when all of them are looked at anew.
        self.look_up_at = dict.fromkeys(LOOK_UPS, 0.0)  # Monotonic seconds.
        self.looking_up: set[str] = set()  # The look-ups that are under way.
        self.downloads = asyncio.Semaphore(1)  # Ledgers that are being written.
        self.complaints = Complaints()
        self.tasks = Tasks()
        self.server: asyncio.Server | None = None
        self.answers: dict[str, Callable[[Link, dict[str, str]], Coroutine[Any, Any, Response]]] = {
            "/": self._page,
            "/healthz": self._health,
            "/metrics": self._metrics,
            "/sessions.csv": self._ledger,
        }

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        self.server = await asyncio.get_running_loop().create_server(
            lambda: incoming_link(MAX_PAGE_TEXT, self._connected), self.config.addr, self.config.port
        )
        self.tasks.start(self._look(), "status")

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self.server is not None
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Cut all connections; pages come again by themselves."""
        if self.server:
            self.server.close()
        self.tasks.cancel()
        for link in [*self.links, *self.pages]:
            link.abort()

    # Requests.

    def _connected(self, link: Link) -> None:
        self.links[link] = None
        if len(self.links) + len(self.pages) > MAX_STATUS_LINKS:
            next(iter(self.links)).abort("too many requests at a time")
        self.tasks.start(self._admit(link), "status request")

    async def _admit(self, link: Link) -> None:
        """Answer a request, and see its end."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                request = await link.handshake
            assert isinstance(request, Request)
            await self._answer(link, request)
            if link not in self.pages:
                await link.ended
        except RefusedError as refusal:
            self._respond(link, refusal.response())
            await link.ended
        except (DialError, TimeoutError) as error:
            self.complaints.say(logging.INFO, "no request", "status: a connection is closed: %s", error)
        finally:
            self.links.pop(link, None)
            if link not in self.pages:
                link.abort()

    async def _answer(self, link: Link, request: Request) -> None:
        """Answer a request. Raises RefusedError."""
        path, _, query = request.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        self._check_request(request)
        if path != "/healthz":  # It tells nothing that the port does not tell.
            await self._check_login(request, asked, link.address)
        if path == "/live":
            self._open(link, request)
            return
        if path not in self.answers:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there are {', '.join(self.answers)}")
        response = await self.answers[path](link, asked)
        if request.method == "HEAD":
            response.body = b""
        link.close_seconds = DOWNLOAD_SECONDS
        self._respond(link, response)

    def _respond(self, link: Link, response: Response) -> None:
        for name, value in STATUS_HEADERS.items():
            response.headers[name] = value
        link.respond(response)

    def _check_request(self, request: Request) -> None:
        """Refuse what no person's browser asks for of its own accord. Raises RefusedError."""
        if request.method not in ("GET", "HEAD"):
            allow = [("Allow", "GET, HEAD")]
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "there is nothing to change here", allow)
        host = host_of(f"//{only(request.headers, 'Host') or ''}")
        # Any name can be made to lead here (DNS rebinding); but its page has not the password.
        if not (self.config.password or (host and is_own_name(host, self.config.addr))):
            raise RefusedError(HTTPStatus.FORBIDDEN, "not a name of this machine; use its address")
        origins = {origin.lower().partition("://")[2] for origin in request.headers.get_all("Origin")}
        if origins - {host.lower() for host in request.headers.get_all("Host")}:  # With the port.
            raise RefusedError(HTTPStatus.FORBIDDEN, "a web page of another host")

    async def _check_login(self, request: Request, asked: dict[str, str], address: str) -> None:
        """Refuse whoever does not show the password that the ini may ask for. Raises RefusedError."""
        password = self.config.password
        if not password or hmac.compare_digest(asked.get("token", "").encode(), self.token.encode()):
            return
        shown = basic_login(only(request.headers, "Authorization"))
        if hmac.compare_digest(shown.partition(b":")[2], password.encode()):
            return
        if shown:  # Browsers ask once without.
            self.complaints.say(logging.WARNING, "login", "status: a wrong password from %s", address)
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        challenge = [("WWW-Authenticate", 'Basic realm="ocpp-2w-proxy", charset="UTF-8"')]
        raise RefusedError(HTTPStatus.UNAUTHORIZED, "the password of [status]; any user", challenge)

    async def _page(self, _link: Link, _asked: dict[str, str]) -> Response:
        return http_response(HTTPStatus.OK, PAGE.replace("{token}", self.token), "text/html")

    async def _health(self, _link: Link, _asked: dict[str, str]) -> Response:
        trouble = self.proxy.trouble()
        status = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
        return http_response(status, f"{trouble or 'ok'}\n")

    async def _metrics(self, _link: Link, _asked: dict[str, str]) -> Response:
        self._take_in()
        return http_response(HTTPStatus.OK, exposition(self._samples()), "text/plain; version=0.0.4")

    def _samples(self) -> dict[tuple[str, ...], float]:
        """Return what is measured, by metric and labels."""
        journal = self.proxy.journal
        samples: dict[tuple[str, ...], float] = {
            ("info", __version__): 1,
            ("oldest_stored_call_age_seconds",): self.gauges.age_of_oldest(time.time()),
            ("event_loop_lag_seconds",): max(self.proxy.lags, default=0.0),
            ("state_file_failing",): int(bool(journal.failure)),
        }
        for (metric, *labels), count in journal.news.counts.items():
            names = (label.value if isinstance(label, Enum) else label for label in labels)
            samples[f"{metric}_total", *names] = count
        return samples | self.gauges.totals

    async def _ledger(self, link: Link, asked: dict[str, str]) -> Response:
        """Return the sessions that began within the days that are asked for. Raises RefusedError."""
        try:
            since, until = (
                time_of(asked.get("from", "2000-01-01"), 0),
                time_of(asked.get("to", "2999-12-31"), 1),
            )
        except (ValueError, OverflowError):
            what = "from and to: expected days, as 2026-01-31, or times, as 2026-01-31T12:00:00Z"
            raise RefusedError(HTTPStatus.BAD_REQUEST, what) from None
        try:
            async with asyncio.timeout(LEDGER_SECONDS), self.downloads:
                text = await self._ledger_text(link, since, until)
        except (TimeoutError, sqlite3.Error) as error:
            words = str(error) or "no answer of the disk in time"
            self.complaints.say(logging.WARNING, "ledger", "status: no ledger: %s", words)
            headers = retry_after(RETRY_AFTER_SECONDS)
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the disk is busy", headers) from None
        attachment = [("Content-Disposition", 'attachment; filename="sessions.csv"')]
        return http_response(HTTPStatus.OK, text, "text/csv", attachment)

    async def _ledger_text(self, link: Link, since: float, until: float) -> str:
        """Return the CSV, or part of it if nobody waits any more.

        Raises sqlite3.Error, or RefusedError for too many sessions.
        """
        parts, count = [csv_text([CSV_COLUMNS])], 0
        place = {"begun": since, "number": -1, "until": until}
        while not link.is_closed and (rows := await self.proxy.journal.look_up(LEDGER, place)):
            parts.append(csv_text(map(csv_row, rows)))
            count += len(rows)
            if count >= MAX_LEDGER_ROWS:
                raise RefusedError(HTTPStatus.BAD_REQUEST, "too many sessions; ask for fewer days")
            place |= {"begun": rows[-1]["begun"], "number": rows[-1]["number"]}
        return "".join(parts)

    # Pages.

    def _open(self, link: Link, request: Request) -> None:
        """Let a page be told what happens. Raises RefusedError."""
        if len(self.pages) >= MAX_PAGES:
            headers = retry_after(RETRY_AFTER_SECONDS)
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open", headers)
        if link.accept(link.answer_to(request), None):
            self.pages[link] = page = Page(link, self.proxy.journal.memories)
            link.attach(page)

    async def _look(self) -> None:
        """Look at what has changed, for as long as the process lives."""
        while True:
            await asyncio.sleep(BEHIND_SECONDS if self.stale else LOOK_SECONDS)
            self._take_in()
            self.pages = {link: page for link, page in self.pages.items() if not link.is_closed}
            if self.pages:
                self._refresh()
                self._tell_pages()

    def _take_in(self) -> None:
        """Take in which chargers have changed, and bring the gauges up to date."""
        journal, news = self.proxy.journal, self.proxy.journal.news
        changed, news.changed = news.changed, {}
        self.stale.update(changed)
        if time.monotonic() >= self.gauges_at:
            self.gauges_at = time.monotonic() + GAUGES_SECONDS
            self.stale.update(dict.fromkeys(journal.memories))
        for page in self.pages.values():
            page.owed.update(changed)
        now, until = current_instant(), time.monotonic() + LOOK_BUDGET_SECONDS
        while self.stale and time.monotonic() < until:
            charger_id = next(iter(self.stale))
            del self.stale[charger_id]
            memory, relay = journal.memories.get(charger_id), self.proxy.relays.get(charger_id)
            is_expected = self.proxy.config.host.admits(charger_id)
            self.gauges.update(
                charger_id, share_of(memory, relay, is_expected, now.utc) if memory else None, memory
            )

    def _refresh(self) -> None:
        """Bring the tables up to date."""
        news, totals, now = self.proxy.journal.news, self.gauges.totals, time.monotonic()
        self._set("unlisted", [[badge, *meeting] for badge, meeting in news.unlisted.items()])
        self._set("events", list(self.events.lines))
        summary = [[*key, count] for key, count in totals.items() if count and key[0] in SUMMARY]
        oldest = min(self.gauges.oldest.values(), default=None)
        self._set("summary", {"counts": summary, "oldest": oldest, "trouble": self.proxy.trouble()})
        for name, (query, pace) in LOOK_UPS.items():
            if now >= self.look_up_at[name] and name not in self.looking_up:
                self.look_up_at[name] = now + pace
                self.looking_up.add(name)
                self.tasks.start(self._look_up(name, query), f"status: {name}")

    def _set(self, name: str, value: Any) -> None:
        text = dump(value)
        if self.tables.get(name) != text:
            self.tables[name] = text

    async def _look_up(self, name: str, query: str) -> None:
        """Bring a table of the past up to date."""
        since = {"since": time.time() - ENERGY_DAYS * DAY}
        try:
            async with asyncio.timeout(LEDGER_SECONDS):
                rows = await self.proxy.journal.look_up(query, since)
        except (TimeoutError, sqlite3.Error) as error:
            words = str(error) or "no answer of the disk"
            self.complaints.say(logging.WARNING, name, "status: no %s: %s", name, words)
            return
        finally:
            self.looking_up.discard(name)
        self._set(name, [self._row_view(name, row) for row in rows])

    def _row_view(self, name: str, row: Row) -> View:
        """Return what the page shows of a row that was looked up."""
        if name == "sessions":
            return session_view(row, self.shown, self.clean)
        return (
            {**row, "words": self.clean(row["words"]), "text": self.clean(row["text"])}
            if name == "refusals"
            else row
        )

    def _tell_pages(self) -> None:
        """Tell each page what it has not been told."""
        now, host, views = current_instant(), self.proxy.config.host, dict[str, str]()
        for link, page in self.pages.items():
            link.keep_alive(now.seconds, host.ping_interval)
            if now.seconds - link.seen > host.ping_interval + host.ping_timeout:
                link.abort("nothing is seen of it")
            elif not page.is_behind():
                owed = list(itertools.islice(page.owed, CHARGERS_A_LOOK))
                for charger_id in owed:
                    views[charger_id] = views.get(charger_id) or self._view(charger_id, now)
                page.tell({charger_id: views[charger_id] for charger_id in owed}, self.tables, now.utc)

    def _view(self, charger_id: str, now: Instant) -> str:
        """Return in JSON what a page shows of a charger; null = it is not remembered any more."""
        memory, relay = self.proxy.journal.memories.get(charger_id), self.proxy.relays.get(charger_id)
        return dump(charger_view(memory, relay, now, self.shown, self.clean) if memory else None)


SUMMARY = ("chargers", "servers", "stored_calls")  # Gauges that stand above the page.


def is_own_name(host: str, addr: str) -> bool:
    """Whether a request names this machine by an address, or by a name that it has itself."""
    name = socket.gethostname().lower()
    return is_ip_address(host) or host in ("localhost", addr.lower(), name, f"{name}.local")


# ---------------------------------------------------------------------------------------------------------
# Command line
#
# Arguments, logging, exit codes, and two commands that help to set it up: `--check` dials the servers as a
# charger would, `--demo` plays two sessions between built-in peers.
# ---------------------------------------------------------------------------------------------------------

EXIT_OK, EXIT_FAILED, EXIT_MISTAKE = 0, 1, 2
MAX_LOG_RECORDS = 10_000  # That wait for a stderr that does not take them; beyond it they are counted.
LINES_AT_ONCE = 100  # That are written with one call.
MAX_LOG_LINE = 2_000  # Characters.
MAX_MET_BADGES = 500  # That are masked wherever they stand.
MIN_MET_BADGE = 6  # Characters.
FLUSH_SECONDS = 1.0  # For the last log lines at the end.
DEMO_SECONDS = 14.0


class Redactor(logging.Filter):
    """Makes every log line safe to read and to keep: one line of ASCII, no credentials, badges masked.

    Badges are known by their keys; those met so are masked wherever else they stand, as in a server's words.
    """

    BADGE = re.compile(
        r"""(\\?"\w*[iI]d(?:Tag|Token)\\?"\s*:\s*)  # The key, perhaps in a string that holds JSON.
            (\\"[^"\\]*|"(?:[^"\\]|\\.)*|[\d.]+)  # The value, perhaps cut short.""",
        re.VERBOSE,
    )
    TOLD_BADGE = re.compile(r"(; badge )(.*)$", re.DOTALL)
    SECRETS = ("password", "authorizationkey", "simpin")
    URL_LOGIN = re.compile(r"\\?/\\?/[^\s\"]*@")  # JSON may write each slash with a backslash.
    ESCAPE = re.compile(r"\\u00([0-7][0-9a-f])", re.IGNORECASE)
    HEADER_LOGIN = re.compile(r"\b(basic|bearer)\s+[^\s,\"]+", re.IGNORECASE)

    def __init__(self) -> None:
        super().__init__()
        self.full_badges = False
        self.met: dict[str, None] = {}  # Badges in lower case, the oldest first; MAX_MET_BADGES.

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(
            record, "is_clean", False
        ):  # It may pass here twice: as a line, and as one to be written.
            record.msg, record.args, record.is_clean = self.clean(record.getMessage()), None, True
        return True

    def clean(self, text: str) -> str:
        """Return the text as it may be logged."""
        lower = self.ESCAPE.sub(lambda found: chr(int(found[1], 16)), text).lower()
        start = text.find("{") if "{" in text else text.find("[")
        if start >= 0 and any(secret in lower for secret in self.SECRETS):
            text = text[:start] + "{hidden: it may hold a password}"
        text = self.URL_LOGIN.sub("//hidden@", text[: 2 * MAX_LOG_LINE])
        text = self.HEADER_LOGIN.sub(r"\1 hidden", text)
        if not self.full_badges:
            text = self.BADGE.sub(lambda found: found[1] + '"' + self._masked(found[2].strip('\\"')), text)
            text = self.TOLD_BADGE.sub(lambda found: found[1] + self._masked(found[2]), text)
            name, blank, rest = text.partition(" ")  # Nobody's badge hides a charger's id.
            text = name + blank + self._without_met(rest)
        return escaped(text)[:MAX_LOG_LINE]

    def meet(self, badge: str) -> None:
        """Know a badge from now on, wherever it stands; short ones are words, too."""
        if len(badge) >= MIN_MET_BADGE and not badge.startswith("****"):
            self.met[badge.lower()] = None
            trim(self.met, MAX_MET_BADGES)

    def _masked(self, badge: str) -> str:
        self.meet(badge)
        return masked(badge)

    def _without_met(self, text: str) -> str:
        lower = text.lower()
        for badge in [badge for badge in self.met if badge in lower]:
            text = re.sub(re.escape(badge), lambda found: masked(found[0]), text, flags=re.IGNORECASE)
        return text


REDACTOR = Redactor()
log.addFilter(REDACTOR)


class SafeFormatter(logging.Formatter):
    """Writes tracebacks that are as safe to keep as any other line."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        return "\n".join(map(REDACTOR.clean, super().formatException(ei).splitlines()))


class LogWriter(logging.Handler):
    """Writes log lines to stderr from its own thread, so that a stderr that nobody reads stops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(SafeFormatter("%(asctime)s %(levelname)-7s %(message)s"))
        self.addFilter(REDACTOR)  # For the lines of other loggers.
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # MAX_LOG_RECORDS.
        self.lost = 0  # Lines that found the queue full, or stderr failing.
        self.thread = threading.Thread(target=self._write, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self.lines.qsize() < MAX_LOG_RECORDS:
            self.lines.put(self.format(record))
        else:
            self.lost += 1

    def _write(self) -> None:
        while (line := self.lines.get()) is not None:
            lines = [line]
            while self.lines.qsize() and len(lines) < LINES_AT_ONCE:  # A herd writes thousands.
                if (line := self.lines.get()) is None:
                    self.lines.put(None)  # The end, for the loop above.
                    break
                lines.append(line)
            self._write_lines(lines)

    def _write_lines(self, lines: list[str]) -> None:
        told = self.lost
        lost = [f"({told} log lines were lost: stderr was not read)"] if told else []
        data = "\n".join([*lines, *lost, ""]).encode()
        try:
            while data:  # Not all of it may be taken at once.
                # Straight to the descriptor: sys.stderr's lock would be held for as long as nobody reads.
                data = data[os.write(2, data) :]
        except OSError:  # A full disk; there may be room again for the next ones.
            self.lost += data.count(b"\n") - len(lost)
        else:
            self.lost -= told

    def close(self) -> None:
        """Give the last lines a moment to be written."""
        self.lines.put(None)
        self.thread.join(FLUSH_SECONDS)
        super().close()


def set_up_logging(config: Config) -> LogWriter:
    writer = LogWriter()
    logging.basicConfig(level=logging.WARNING, handlers=[writer], force=True)
    REDACTOR.full_badges = config.full_badges
    for badge in config.default.badges.exact:
        REDACTOR.meet(badge)
    for name, level in config.levels.items():
        shows_credentials = "websockets" in name and level == "DEBUG"
        logging.getLogger(name).setLevel("INFO" if shows_credentials else level)
    for warning in config.warnings:
        log.warning("%s", warning)
    return writer


# What a proxy holds lives as long as its chargers do, so that looking through it for cycles finds hardly
# anything and stops everybody: for half a second with 5,000 chargers, at Python's own thresholds.
GARBAGE_THRESHOLDS = (20_000, 50, 50)


def tune_garbage_collection() -> None:
    """Look for garbage more rarely, and never among what is there from the start."""
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


async def serve(config: Config) -> int:
    """Run the proxy until SIGTERM or SIGINT; return the exit code."""
    try:
        proxy = Proxy(config, opened_journal(config.host))
        await proxy.start()
    except StateError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    except OSError as error:
        print(f"cannot listen on {config.host.addr}:{config.host.port}: {error}", file=sys.stderr)
        await proxy.stop()
        return EXIT_MISTAKE
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(proxy.loop_failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stopped.set)
        except NotImplementedError:  # Windows; there, Ctrl-C cancels this task.
            break
    scheme = "wss" if config.host.cert_chain else "ws"
    log.info("ocpp-2w-proxy %s listens on %s://%s:%d/", __version__, scheme, config.host.addr, proxy.port)
    log.info("primary %s, secondary %s", *server_names(config.default))
    status = await opened_status(proxy)
    with suppress(asyncio.CancelledError):  # By Ctrl-C, where there are no signal handlers.
        await stopped.wait()
    log.info("stopping")
    if status:
        status.stop()
    await proxy.stop()
    return EXIT_OK


async def opened_status(proxy: Proxy) -> Status | None:
    """Return the second port, open; None if there is none: chargers are served all the same."""
    config = proxy.config.status
    if not config.port:
        return None
    events = Events()
    events.addFilter(REDACTOR)
    status = Status(proxy, events, REDACTOR.clean)
    try:
        await status.start()
    except OSError as error:
        what = "no status page: cannot listen on %s:%d: %s; chargers are served"
        log.warning(what, config.addr, config.port, error)
        return None
    log.addHandler(events)
    log.info("status page on http://%s:%d/", config.addr, config.port)
    return status


def opened_journal(host: HostConfig) -> Journal:
    """Return the journal that the ini names. Raises StateError."""
    if host.state == "none":
        log.warning("state = none: sessions and stored Calls are lost with the process")
        return Journal(current_instant)
    return Journal.open(Path(host.state), current_instant)


def server_names(config: ChargerConfig) -> tuple[str, str]:
    return config.primary.url, config.secondary.url if config.secondary else "none"


# --check


EXPIRY_DAYS = 30  # A certificate that is valid for less is worth a warning.


async def check(config: Config, path: Path, charger_id: str | None, badge: str | None) -> int:
    """Dial both servers as the charger would, print what each answers, and whose a badge is.

    Return the exit code.
    """
    name = charger_id or "check"
    if charger_id and not (is_charger_id(charger_id) and config.host.admits(charger_id)):
        print(f"the proxy refuses {charger_id!a}: it is no charger id, or not among `chargers` in [host]")
        return EXIT_FAILED
    charger = config.charger(name)
    if badge is not None:
        print(whose_badge(charger, path, badge))
    dialer = Dialer(config.host.max_size)
    results = []
    for peer in SERVERS:
        server = charger.server(peer)
        if server is None:
            print(f"{peer.value}: none")
        elif server.is_local:
            print(f"{peer.value}: {LOCAL}: the proxy itself answers")
        else:
            is_well, answer = await checked(
                dialer, peer, server, name, charger.versions, charger_id is not None
            )
            print(f"{peer.value}: {server.url}: {answer}")
            for line in await way_to(dialer, peer, server):
                print(f"    {line}")
            results.append(is_well)
    if charger_id is None:
        print("To check the login of one charger, name it: --check CHARGER_ID")
    return EXIT_OK if all(results) else EXIT_FAILED


async def checked(
    dialer: Dialer, peer: Peer, server: ServerConfig, name: str, versions: tuple[str, ...], is_charger: bool
) -> tuple[bool, str]:
    """Return whether a server is well, and what it answered."""
    try:
        link = await dialer.dial(peer, server, name, versions, Credentials())
    except DialError as error:
        if error.status == HTTPStatus.UNAUTHORIZED and server.needs_charger_login:
            return True, f"answers; it wants the charger's own login, which only the charger has ({error})"
        if error.status == HTTPStatus.NOT_FOUND and not is_charger:
            return True, f"answers; it does not know a charger {name!r}, which is well ({error})"
        otherwise = "check the address, and that it can be reached from here"
        return False, f"{error}; {advice_for(error, peer, otherwise)}"
    version = link.protocol.subprotocol or "without a subprotocol: taken as ocpp1.6"
    link.close(1000)
    await asyncio.wait([link.ended], timeout=CLOSE_SECONDS)
    return True, f"accepts {server.id or name!r} ({version})"


async def way_to(dialer: Dialer, peer: Peer, server: ServerConfig) -> list[str]:
    """Say where a server's name leads, and how long its certificate is valid."""
    uri = parse_uri(server.url)
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            found = await dialer.resolver.addresses(uri.host, uri.port)
    except (OSError, UnicodeError, TimeoutError) as error:
        what = f"the look-up of {uri.host} fails: {error or 'no answer'}"
        return [f"DNS: {what}; check the name in the address, and the name server of this machine"]
    addresses = ", ".join(dict.fromkeys(str(place[0]) for *_, place in found))
    lines = [] if is_ip_address(uri.host) else [f"DNS: {uri.host} is {addresses}"]
    if not uri.secure:
        return lines
    try:
        certificate = await dialer.certificate(server)
    except DialError as error:
        advice = advice_for(error, peer, "check the address, and that it is one for wss://")
        return [*lines, f"TLS: {error}; {advice}"]
    return [*lines, f"TLS: {validity_of(certificate, time.time())}"]


def validity_of(certificate: Mapping[str, Any], utc: float) -> str:
    """Say until when a certificate is valid."""
    end = ssl.cert_time_to_seconds(certificate["notAfter"])
    soon = f": only {(end - utc) / DAY:.0f} days" if end - utc < EXPIRY_DAYS * DAY else ""
    return f"its certificate is valid until {time_text(end)}{soon}"


def whose_badge(charger: ChargerConfig, path: Path, badge: str) -> str:
    """Say which server a badge goes to, and by which line of the ini."""
    route = Router(charger, Memory(), "ocpp1.6", 0.0).route_of_badge(badge)
    entry = charger.badges.entry(badge) if route.is_vouched else None
    line = charger.lines.get("unknown_rfid") if entry is None else charger.badges.lines[entry]
    where = "by default" if line is None else f"{path}:{line}" + (f" ({entry})" if entry else "")
    whose = "rejected" if route.is_rejected else route.owner.value
    return f"badge {badge}: {whose}: {route.why}, {where}"


# --demo


DEMO_INI = """\
[host]
addr = 127.0.0.1
port = 0
state = none
[ext-server]
server = ws://127.0.0.1:{primary}/ocpp
primary_rfid = 04A1B2C3
secondary_server = ws://127.0.0.1:{secondary}/ocpp
secondary_rfid = 04D5E6F7
[status]
port = 0
"""


DEMO_TIME = "2026-01-01T00:00:00Z"


class DemoServer:
    """A server that accepts everything and tells what it gets."""

    def __init__(self, name: str, answerers: dict[str, str]) -> None:
        self.name = name
        self.answerers = answerers  # Message id to who answered it.
        self.transactions = itertools.count(1)
        self.got_stop = asyncio.Event()

    async def start(self) -> websockets.Server:
        return await websockets.serve(self.talk, "127.0.0.1", 0, subprotocols=[Subprotocol("ocpp1.6")])

    async def talk(self, connection: websockets.ServerConnection) -> None:
        async for text in connection:
            message = parse(str(text))
            if message.type is not MessageType.CALL:
                continue
            answer = self.answer(message)
            self.answerers[message.message_id] = self.name
            print(f"    {self.name} gets {message.action} {dump(message.payload)}, answers {dump(answer)}")
            await connection.send(result_text(message.message_id, answer))
            if message.action == "StopTransaction":
                self.got_stop.set()

    def answer(self, message: Message) -> dict[str, Any]:
        facts = CHARGER_16.get(message.action, PLAIN)
        values: dict[Fill, Any] = {Fill.NOW: DEMO_TIME, Fill.STATUS: "Accepted"}
        if facts.role is Role.START:
            values[Fill.TRANSACTION] = next(self.transactions)
        answer: dict[str, Any] = filled(facts.answer, values)
        return answer


async def demo_charger(port: int, answerers: dict[str, str], delivered: asyncio.Event) -> None:
    """Boot, then play one session with a badge of each server; stay until the last is delivered."""
    uri = f"ws://127.0.0.1:{port}/DEMO-1"
    async with websockets.connect(uri, subprotocols=[Subprotocol("ocpp1.6")]) as connection:

        async def call(action: str, **payload: Any) -> dict[str, Any]:
            print(f"charger sends {action} {dump(payload)}")
            message_id = new_message_id()
            await connection.send(call_text(message_id, action, payload))
            answer = parse(str(await connection.recv()))
            print(f"charger hears from {answerers.get(message_id, 'the proxy')}: {dump(answer.payload)}")
            return answer.payload

        await call("BootNotification", chargePointVendor="Demo", chargePointModel="One")
        await call("StatusNotification", connectorId=1, errorCode="NoError", status="Available")
        for badge, owner in (("04A1B2C3", "primary"), ("04D5E6F7", "secondary")):
            print(f"\n--- a session with badge {badge}, which is on {owner}_rfid ---")
            await call("Authorize", idTag=badge)
            start = {"connectorId": 1, "idTag": badge, "meterStart": 100, "timestamp": DEMO_TIME}
            number = (await call("StartTransaction", **start))["transactionId"]
            sample = [{"timestamp": DEMO_TIME, "sampledValue": [{"value": "150"}]}]
            await call("MeterValues", connectorId=1, transactionId=number, meterValue=sample)
            await call("StopTransaction", transactionId=number, meterStop=200, timestamp=DEMO_TIME)
        await delivered.wait()


async def demo() -> int:
    """Play one session per badge through a proxy between two servers, all of them here."""
    answerers: dict[str, str] = {}
    primary, secondary = DemoServer("primary", answerers), DemoServer("secondary", answerers)
    print("Two servers, a proxy and a charger, on free ports of this machine.\n")
    async with (
        asyncio.timeout(DEMO_SECONDS),
        await primary.start() as first,
        await secondary.start() as second,
    ):
        ini = Ini(Path("demo.ini"), {})
        ini.parse(DEMO_INI.format(primary=port_of(first), secondary=port_of(second)))
        proxy = Proxy(ConfigLoader(ini, concern_of).load())
        await proxy.start()
        await demo_charger(proxy.port, answerers, secondary.got_stop)
        await proxy.stop()
    print("\nEach server has got its own session, complete and in order, under its own transaction id.")
    return EXIT_OK


def port_of(server: websockets.Server) -> int:
    port: int = next(iter(server.sockets)).getsockname()[1]
    return port


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One EV charger, two OCPP servers: the badge decides which of them a session belongs to."
    )
    parser.add_argument("--version", action="version", version=f"ocpp-2w-proxy {__version__}")
    parser.add_argument(
        "--config", metavar="FILE", default="ocpp-2w-proxy.ini", type=Path, help="default: %(default)s"
    )
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument(
        "--check",
        metavar="CHARGER_ID",
        nargs="?",
        const="",
        help="check the configuration, and dial both servers as this charger would",
    )
    commands.add_argument("--demo", action="store_true", help="play two sessions between built-in peers")
    parser.add_argument("--badge", metavar="TAG", help="with --check: say which server gets this badge")
    options = parser.parse_args()
    if options.badge is not None and options.check is None:
        parser.error("--badge goes with --check")
    return options


def main() -> int:
    """Run the command; return its exit code."""
    options = arguments()
    if options.demo:
        return asyncio.run(demo())
    try:
        config = load_config(options.config, os.environ, concern_of)
        server_context(config.host)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    except OSError as error:
        print(f"{options.config}: cert_chain, cert_key or client_ca cannot be used: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    writer = set_up_logging(config)
    try:
        if options.check is not None:
            return asyncio.run(check(config, options.config, options.check or None, options.badge))
        tune_garbage_collection()
        return asyncio.run(serve(config))
    except KeyboardInterrupt:
        return EXIT_OK
    finally:
        writer.close()


if __name__ == "__main__":
    sys.exit(main())
