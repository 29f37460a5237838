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
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import os
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
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from http import HTTPStatus
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, Protocol, Self

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
    primary_copies: frozenset[str]  # Actions of the secondary's sessions: MeterValues, or none.
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
IN_BRACKETS_OR_MARK = re.compile(r"(\[[^\]]*\])|[:-]")


def normalized(badge: str) -> str:
    """Return a badge or a pattern as it is compared: without case, surrounding blanks, `:` and `-`.

    People write these, chargers do not; a `-` inside the brackets of a pattern stays.
    """
    return IN_BRACKETS_OR_MARK.sub(r"\1", badge.strip(BLANKS).casefold())


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


def reader_of_words(*choices: str) -> Callable[[str], tuple[str, ...]]:
    def read(value: str) -> tuple[str, ...]:
        words = read_words(value)
        if not set(words) <= set(choices):
            raise ValueError(f"expected {' or '.join(choices)}, or nothing")
        return words

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
    "primary_copies": Key("", reader_of_words("MeterValues")),
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
            primary_copies=frozenset(values["primary_copies"]),
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
# one value where it stands and leaves every other character as it came: signed meter values stay valid.
# ---------------------------------------------------------------------------------------------------------

MAX_MESSAGE_ID = 255  # Characters; OCPP-J allows 36, some peers use more.
DEEP = 500  # Brackets; Python's json refuses some 1,000 levels of them.

MessageId = str | int  # As its sender wrote it: some servers count in numbers (go-eCharger-API-v2#106).
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
    message_id: MessageId
    action: str  # Of a Call or a SEND; the error code of a CallError.
    payload: dict[str, Any]  # Of an error: its details.
    text: str


class MessageError(Exception):
    """A text that is no OCPP-J message. `message_id` is set if it is a Call whose id can be read."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(what)
        head = re.match(r'\s*\[\s*2\s*,\s*(?:"([^"\\\x00-\x1f]{1,255})"|(\d{1,20})\s*,)', text)
        self.message_id: MessageId | None = head and (head[1] or int(head[2]))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# Lenient with control characters in strings: chargers append them to badges. Its scanner is called directly,
# because `json.loads` takes as long again for a short text.
DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)
_scan: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]
_blanks = re.compile(r"[ \t\n\r]*").match


def _skip(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not white space."""
    match = _blanks(text, at)
    assert match is not None, "the pattern matches everywhere"
    return match.end()


def decoded(text: str) -> Any:
    """Return what JSON says. Raises ValueError or RecursionError."""
    try:
        value, end = _scan(text, 0 if text.startswith("[") else _skip(text, 0))
    except StopIteration as stop:
        raise ValueError(f"a value is expected at character {stop.value}") from None
    if end != len(text) and _skip(text, end) != len(text):
        raise ValueError(f"there is more behind character {end}")
    return value


def _deeper(frames: int, text: str) -> Any:
    return decoded(text) if frames == 0 else _deeper(frames - 1, text)


def parse(text: str) -> Message:
    """Return the text as a Message. Raises MessageError, and nothing else, for any other text."""
    try:
        # What json refuses as too deep must be refused here, and not by a patch further down the stack.
        is_large = text.count("[") + text.count("{") > DEEP
        parts = _deeper(100, text) if is_large else decoded(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {error}"[:200], text) from None
    if type(parts) is not list or len(parts) < 3:
        raise MessageError("no JSON array of three or more elements", text)
    kind = MESSAGE_TYPES.get(parts[0]) if type(parts[0]) is int else None
    if kind is None:
        raise MessageError("unknown message type", text)
    message_id, action, payload = parts[1], parts[2], parts[3] if len(parts) > 3 else []
    is_id = 1 <= len(message_id) <= MAX_MESSAGE_ID if type(message_id) is str else type(message_id) is int
    if kind is MessageType.CALLRESULT:
        payload = {} if parts[2] == [] else parts[2]  # PHP writes an empty answer so.
        action = ""
    elif kind is MessageType.CALLERROR or kind is MessageType.CALLRESULTERROR:
        payload = parts[4] if len(parts) > 4 and type(parts[4]) is dict else {}
    if payload is None:  # As good as {} (OCPP-J 1.6 4.2.1).
        payload = {}
    if not is_id or type(action) is not str or type(payload) is not dict:
        raise MessageError("no id, Action (or error code) and payload as OCPP-J has them", text)
    return Message(kind, message_id, action, payload, text)


def description_of(message: Message) -> str:
    """Return the description of a CallError, for people."""
    rest = decoded(message.text)[3:4]
    return rest[0][:100] if rest and type(rest[0]) is str else ""


def has_repeated_key(text: str) -> bool:
    """Whether a key stands twice in any object of the text, so that two readers could see two values."""
    repeated: list[int] = []  # Of each object.
    count = lambda pairs: repeated.append(len(pairs) - len(dict(pairs)))  # noqa: E731
    json.JSONDecoder(strict=False, object_pairs_hook=count).decode(text)
    return any(repeated)


def dump(value: Any) -> str:
    """Return the value as JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def call_text(message_id: MessageId, action: str, payload: str) -> str:
    """Return a Call; its payload is JSON already."""
    return f"[2,{dump(message_id)},{dump(action)},{payload}]"


def result_text(message_id: MessageId, payload: str) -> str:
    """Return a CallResult; its payload is JSON already."""
    return f"[3,{dump(message_id)},{payload}]"


def error_text(message_id: MessageId, code: str, description: str) -> str:
    """Return a CallError; its description has at most 255 characters (OCPP 2.0.1 part 4, 4.2.3)."""
    return dump([MessageType.CALLERROR, message_id, code, description[:255], {}])


def new_message_id() -> str:
    """Return an id of 36 characters that nobody else will pick."""
    return str(uuid.uuid4())


# Where a value stands in a text. The text has been parsed before, so it is known to be JSON.


def _start(text: str, at: int, step: str | int) -> int | None:
    """Return where the value of this key or index begins in the object or array at `at`."""
    if text[at] not in "{[":
        return None
    is_object, found, index = text[at] == "{", None, 0
    at = _skip(text, at + 1)
    while text[at] not in "}]" and (is_object or not found):  # What comes behind it in an array may be long.
        key: str | int = index
        if is_object:
            key, at = scanstring(text, at + 1, False)
            at = _skip(text, _skip(text, at) + 1)
        if key == step:
            found = at  # Of keys that stand twice the last counts, as for json.loads.
        at = _skip(text, _scan(text, at)[1])
        at = _skip(text, at + 1) if text[at] == "," else at
        index += 1
    return found


def start_of(text: str, path: TextPath) -> int | None:
    """Return where the value at the path begins; None if there is none."""
    at: int | None = _skip(text, 0)
    for step in path:
        at = None if at is None else _start(text, at, step)
    return at


def value_text(text: str, path: TextPath) -> str:
    """Return the value at the path as it stands in the text; "" if there is none."""
    start = start_of(text, path)
    return "" if start is None else text[start : _scan(text, start)[1]]


def patch(text: str, path: TextPath, value: str | int) -> str:
    """Return the text with the value at the path replaced, or added as its object's first key."""
    start = start_of(text, path)
    if start is not None:
        return text[:start] + dump(value) + text[_scan(text, start)[1] :]
    start = start_of(text, path[:-1])
    assert start is not None, "what a value is added to is there"
    if text[start] != "{":  # A payload of null is as good as {}.
        return text[:start] + dump({path[-1]: value}) + text[_scan(text, start)[1] :]
    comma = "" if text[_skip(text, start + 1)] == "}" else ","
    return f"{text[: start + 1]}{dump(path[-1])}:{dump(value)}{comma}{text[start + 1 :]}"


def under_id(message: Message, message_id: MessageId) -> str:
    """Return the text of a message under this id; as it came where it has it."""
    is_same = message.message_id == message_id and type(message.message_id) is type(message_id)
    return message.text if is_same else patch(message.text, (1,), message_id)


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
    AUTHORIZE = "authorize"
    BOOT = "boot"
    STATUS = "status"
    METER = "meter"
    START = "start"  # 1.6: the server picks the transaction id.
    STOP = "stop"
    EVENT = "event"  # 2.x: the station picks it.
    REMOTE_START = "remote-start"
    RESERVE = "reserve"
    CANCEL = "cancel"
    TRIGGER = "trigger"
    COMMAND = "command"  # Worth a line in the story of the day.


HEARTBEAT_INTERVAL = 300  # Seconds; given to chargers where the proxy itself is the server.

FieldPath = tuple[str, ...]  # From the payload down; "*" stands for the elements of an array.


@dataclass(frozen=True, slots=True)
class Facts:
    """Where one Action carries what, and its answer."""

    role: Role = Role.PLAIN
    is_16: bool = False  # A row of OCPP 1.6, whose transaction ids are whole numbers.
    badge: FieldPath = ()
    badge_type: FieldPath = ()
    transaction: FieldPath = ()
    connector: FieldPath = ()  # 2.x: the EVSE. Only where the routing asks for it.
    request: FieldPath = ()
    reservation: FieldPath = ()
    remote_start: FieldPath = ()
    state: FieldPath = ()  # The connector's status, or the charging state.
    meter: FieldPath = ()  # The energy register in Wh.
    samples: FieldPath = ()  # Sampled values, in which it may be found, too.
    reason: FieldPath = ()  # Why a session ended.
    asked_by: str = ""  # The Action that this one reports on where no request id says so.
    by_connector: bool = False  # Belongs to the session on its connector, if there is one.
    answer: str = "{}"  # The smallest that the schema allows, as JSON with $places.
    badge_answer: str = ""  # Instead, where the Call carries a badge.
    certificate_answer: str = ""  # Instead, where it carries a certificate, which only the server can check.
    rejects: bool = False  # A server's Action: the schema of its answer has a status Rejected.
    is_stations: bool = True  # Nothing in such a Call can tell of an owner.


PLAIN = Facts()
TELLS = {"badge", "transaction", "reservation", "request", "by_connector", "asked_by"}  # Of an owner.
STATUS_REJECTED = '{"status":"Rejected"}'
ANSWERS = {  # Those that the tables below have no room for.
    "badge-1.6": '{"idTagInfo":{"status":"$verdict"}}',
    "badge-2.x": '{"idTokenInfo":{"status":"$verdict"}}',
    "boot": f'{{"currentTime":"$now","interval":{HEARTBEAT_INTERVAL},"status":"Accepted"}}',
    "chain-status": '{"certificateStatus":[{"certificateHashData":{"hashAlgorithm":"SHA256","issuerNameHash":'
    '"","issuerKeyHash":"","serialNumber":""},"source":"OCSP","status":"Failed","nextUpdate":"$now"}]}',
    "no-contract": '{"idTokenInfo":{"status":"Invalid"},"certificateStatus":"NoCertificateAvailable"}',
    "start": '{"idTagInfo":{"status":"$verdict"},"transactionId":$transaction}',
}


def table(text: str, is_16: bool = False) -> dict[str, Facts]:
    """Read a table: Actions, with commas between, and `name=value` for each of their Facts.

    Indented lines go on with the Action above.
    """
    rows: dict[str, Facts] = {}
    for line in re.sub(r"\n +", " ", textwrap.dedent(text)).strip().splitlines():
        actions, *words = line.split()
        values: dict[str, Any] = {"is_16": is_16}
        for name, equals, value in (word.partition("=") for word in words):
            if name == "role":
                values[name] = Role(value)
            elif name.endswith("answer"):
                values[name] = ANSWERS.get(value, value)
            else:
                is_path = equals and name != "asked_by"
                values[name] = tuple(value.split(".")) if is_path else value or True
        facts = Facts(**values, is_stations=TELLS.isdisjoint(values))
        rows.update(dict.fromkeys(actions.split(","), facts))
    return rows


CHARGER_16 = table(
    """
    Authorize                        role=authorize badge=idTag connector=connectorId answer=badge-1.6
    BootNotification                 role=boot answer=boot
    DataTransfer                     answer={"status":"UnknownVendorId"}
    DiagnosticsStatusNotification    asked_by=GetDiagnostics
    FirmwareStatusNotification       asked_by=UpdateFirmware
    Heartbeat                        answer={"currentTime":"$now"}
    LogStatusNotification            request=requestId asked_by=GetLog
    MeterValues                      role=meter transaction=transactionId connector=connectorId by_connector
                                     samples=meterValue.*.sampledValue.*
    SecurityEventNotification
    SignCertificate                  answer={"status":"Rejected"}
    SignedFirmwareStatusNotification request=requestId asked_by=SignedUpdateFirmware
    StartTransaction                 role=start badge=idTag connector=connectorId
                                     reservation=reservationId meter=meterStart answer=start
    StatusNotification               role=status connector=connectorId state=status
    StopTransaction                  role=stop badge=idTag transaction=transactionId
                                     meter=meterStop reason=reason
    """,
    is_16=True,
)
SERVER_16 = table(
    """
    CancelReservation                role=cancel reservation=reservationId rejects
    ChangeAvailability,ChangeConfiguration,Reset role=command rejects
    CertificateSigned,ClearCache,DataTransfer,GetCompositeSchedule,InstallCertificate rejects
    ClearChargingProfile,GetConfiguration,GetDiagnostics,GetInstalledCertificateIds,GetLocalListVersion
    DeleteCertificate,UpdateFirmware
    ExtendedTriggerMessage,TriggerMessage role=trigger rejects
    GetLog,SignedUpdateFirmware      request=requestId rejects
    RemoteStartTransaction           role=remote-start badge=idTag connector=connectorId
                                     transaction=chargingProfile.transactionId rejects
    RemoteStopTransaction            role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idTag connector=connectorId
                                     reservation=reservationId rejects
    SendLocalList                    badge=localAuthorizationList.*.idTag
    SetChargingProfile               transaction=csChargingProfiles.transactionId rejects
    UnlockConnector                  role=command
    """,
    is_16=True,
)
CHARGER_201 = table("""
    Authorize                        role=authorize badge=idToken.idToken badge_type=idToken.type
                                     answer=badge-2.x certificate_answer=no-contract
    BootNotification                 role=boot answer=boot
    DataTransfer                     answer={"status":"UnknownVendorId"}
    FirmwareStatusNotification       request=requestId asked_by=UpdateFirmware
    ClearedChargingLimit,NotifyChargingLimit
    Get15118EVCertificate            answer={"status":"Failed","exiResponse":""}
    GetCertificateStatus             answer={"status":"Failed"}
    Heartbeat                        answer={"currentTime":"$now"}
    LogStatusNotification            request=requestId asked_by=GetLog
    MeterValues                      role=meter connector=evseId by_connector
                                     samples=meterValue.*.sampledValue.*
    NotifyCustomerInformation,NotifyMonitoringReport,NotifyReport request=requestId
    NotifyDisplayMessages            request=requestId transaction=messageInfo.*.transactionId
    NotifyEVChargingNeeds            connector=evseId by_connector answer={"status":"Processing"}
    NotifyEVChargingSchedule         connector=evseId by_connector answer={"status":"Accepted"}
    NotifyEvent                      transaction=eventData.*.transactionId
    PublishFirmwareStatusNotification request=requestId asked_by=PublishFirmware
    ReportChargingProfiles           request=requestId transaction=chargingProfile.*.transactionId
    ReservationStatusUpdate          reservation=reservationId
    SignCertificate                  answer={"status":"Rejected"}
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
    ChangeAvailability,Reset         role=command rejects
    CertificateSigned,ClearCache,DataTransfer,GetCompositeSchedule,InstallCertificate rejects
    ClearDisplayMessage,ClearVariableMonitoring,GetVariables,SetVariableMonitoring,SetVariables
    UnpublishFirmware
    CostUpdated,GetTransactionStatus transaction=transactionId
    CustomerInformation              badge=idToken.idToken request=requestId rejects
    GetBaseReport,GetLog,GetMonitoringReport,GetReport request=requestId rejects
    PublishFirmware,UpdateFirmware   request=requestId rejects
    GetChargingProfiles,GetDisplayMessages request=requestId
    RequestStartTransaction          role=remote-start badge=idToken.idToken connector=evseId
                                     remote_start=remoteStartId
                                     transaction=chargingProfile.transactionId rejects
    RequestStopTransaction           role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idToken.idToken connector=evseId
                                     reservation=id rejects
    SendLocalList                    badge=localAuthorizationList.*.idToken.idToken
    SetChargingProfile               transaction=chargingProfile.transactionId rejects
    SetDisplayMessage                transaction=message.transactionId rejects
    SetMonitoringBase,SetMonitoringLevel,SetNetworkProfile rejects
    TriggerMessage                   role=trigger rejects
    UnlockConnector                  role=command
    """)
CHARGER_21 = table("""
    BatterySwap                      badge=idToken.idToken request=requestId
    GetCertificateChainStatus        answer=chain-status
    ClosePeriodicEventStream,NotifyDERAlarm,NotifyDERStartStop,NotifyPeriodicEventStream
    NotifyWebPaymentStarted
    NotifyPriorityCharging,NotifySettlement transaction=transactionId
    OpenPeriodicEventStream,PullDynamicScheduleUpdate answer={"status":"Rejected"}
    ReportDERControl                 request=requestId
    VatNumberValidation              answer={"vatNumber":$vat_number,"status":"Rejected"}
    """)
SERVER_21 = table("""
    AFRRSignal,AdjustPeriodicEventStream,ClearDERControl,ClearDisplayMessage,GetTariffs rejects
    ClearTariffs,GetPeriodicEventStream
    ChangeTransactionTariff,NotifyAllowedEnergyTransfer,UsePriorityCharging transaction=transactionId rejects
    GetDERControl                    request=requestId rejects
    RequestBatterySwap               badge=idToken.idToken request=requestId rejects
    SetDERControl,SetDefaultTariff,UpdateDynamicSchedule rejects
    """)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tables of one OCPP version."""

    charger: dict[str, Facts]  # The charger's Actions; those of 1.6 that have no newer row, too.
    server: dict[str, Facts]  # The servers' Actions, likewise.
    malformed: str  # The error code for a Call that cannot be read.
    boot: str  # The BootNotification of a charger that never sent one.


BOOT_16 = '{"chargePointVendor":"unknown","chargePointModel":$model}'
BOOT_2X = '{"reason":"Unknown","chargingStation":{"vendorName":"unknown","model":$model}}'
CHARGER_2X, SERVER_2X = {**CHARGER_16, **CHARGER_201}, {**SERVER_16, **SERVER_201}
VOCABULARIES = {
    "ocpp1.6": Vocabulary(CHARGER_16, SERVER_16, "FormationViolation", BOOT_16),  # Spelt like that in 1.6.
    "ocpp2.0.1": Vocabulary(CHARGER_2X, SERVER_2X, "FormatViolation", BOOT_2X),
    "ocpp2.1": Vocabulary(
        {**CHARGER_2X, **CHARGER_21}, {**SERVER_2X, **SERVER_21}, "FormatViolation", BOOT_2X
    ),
}
# What only messages of 1.6 carry beside their Action: a FoxESS sends them over ocpp2.0.1 (lbbrhzn/ocpp#2050).
SHAPE_16 = {"idTag", "transactionId", "connectorId", "chargePointVendor", "errorCode"}
SHAPE_2X = {"evseId", "evse"}


def values_at(payload: Any, path: FieldPath) -> list[Any]:
    """Return all values at the path; none where it ends early."""
    found = [payload] if path else []
    for step in path:
        if step == "*":
            found = [element for value in found if type(value) is list for element in value]
        else:
            found = [value[step] for value in found if type(value) is dict and step in value]
    return found


def value_at(payload: Any, path: FieldPath) -> Any:
    """Return the first value at the path, or None."""
    if len(path) == 1 and type(payload) is dict:
        return payload.get(path[0])
    return next(iter(values_at(payload, path)), None)


def integer(value: Any) -> int | None:
    """Return the value if it is a whole number of 64 bits; true and 1.0 are none."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


@dataclass(frozen=True, slots=True)
class Content:
    """The payload of a Call, read by the facts of its Action; None for what it does not carry."""

    facts: Facts
    payload: dict[str, Any]

    @property
    def badge(self) -> str | None:
        """The RFID; None also where none is needed."""
        value = value_at(self.payload, self.facts.badge)
        if value is None or value_at(self.payload, self.facts.badge_type) == "NoAuthorization":
            return None
        return value if type(value) is str else str(value) if type(value) is int else None

    @property
    def transactions(self) -> list[TransactionId]:
        """The usable transaction ids that it names."""
        return [
            usable
            for value in values_at(self.payload, self.facts.transaction)
            if (usable := usable_id(value, self.facts.is_16)) is not None
        ]

    @property
    def connector(self) -> int | None:
        """The connector, in 2.x the EVSE; 0 is the whole station."""
        return integer(value_at(self.payload, self.facts.connector))

    @property
    def request(self) -> int | None:
        """The id of the request that it makes, or reports on."""
        return integer(value_at(self.payload, self.facts.request))

    @property
    def is_start(self) -> bool:
        """Whether it begins a session."""
        return self.facts.role is Role.START or self.payload.get("eventType") == "Started"

    @property
    def is_stop(self) -> bool:
        """Whether it ends a session."""
        return self.facts.role is Role.STOP or self.payload.get("eventType") == "Ended"

    @property
    def is_reading(self) -> bool:
        """Whether it only tells how a session goes on: neither begins nor ends it, nor says whose it is."""
        is_update = self.payload.get("eventType") == "Updated" and self.badge is None
        tells = value_at(self.payload, self.facts.remote_start) or self.payload.get("reservationId")
        return self.facts.role is Role.METER or (is_update and tells is None)

    @property
    def is_triggered(self) -> bool:
        """Whether it holds a reading that a server has asked for with TriggerMessage."""
        is_asked = self.payload.get("triggerReason") == "Trigger"
        samples = values_at(self.payload, self.facts.samples)
        return is_asked or any(value_at(sample, ("context",)) == "Trigger" for sample in samples)

    @property
    def mark(self) -> str:
        """What a Call of a session has in common with its repeat; "" = it is never one."""
        if self.facts.role is Role.EVENT:
            kind, number = self.payload.get("eventType"), integer(self.payload.get("seqNo"))
            when = self.timestamp or fingerprint([self.payload])
            return "" if number is None else f"{short(kind)} {number} {when}"
        return self.facts.role.value if self.facts.role in (Role.START, Role.STOP) else ""

    @property
    def stop(self) -> str:
        """What a StopTransaction and its repeats have in common."""
        names = ("transactionId", "idTag", "meterStop", "timestamp")
        return fingerprint([self.payload.get(name) for name in names])

    @property
    def register(self) -> float | None:
        """The last reading of the energy register, in Wh."""
        samples = reversed(values_at(self.payload, self.facts.samples))
        reading = next((wh for wh in map(watt_hours, samples) if wh is not None), None)
        return watt_hours({"value": value_at(self.payload, self.facts.meter)}) if reading is None else reading

    @property
    def timestamp(self) -> str:
        """The time by the charger's clock, as it writes it; "" = it does not say."""
        return short(self.payload.get("timestamp"))

    def answer(self, verdict: str, now: str, transaction: TransactionId | None) -> str:
        """Return the smallest answer that the schema allows, as JSON."""
        facts = self.facts
        if self.needs_server:
            return facts.certificate_answer
        has_badge = facts.badge_answer and value_at(self.payload, facts.badge) is not None
        vat_number = dump(short(self.payload.get("vatNumber")))
        answer = Template(facts.badge_answer if has_badge else facts.answer)
        return answer.substitute(verdict=verdict, now=now, transaction=transaction, vat_number=vat_number)

    @property
    def needs_server(self) -> bool:
        """Whether it carries a certificate of Plug & Charge, which only the server can check (2.0.1 C07)."""
        keys = {"certificate", "iso15118CertificateHashData"}
        return bool(self.facts.certificate_answer) and not keys.isdisjoint(self.payload)


def content_of(rows: dict[str, Facts], message: Message) -> Content:
    """Return a Call read by the row of its Action; by that of 1.6 where it has the shape of 1.6."""
    action, payload = message.action, message.payload
    facts = rows.get(action, PLAIN)
    if not facts.is_16 and payload.keys() & SHAPE_16 and not payload.keys() & SHAPE_2X:
        facts = CHARGER_16.get(action) or SERVER_16.get(action) or facts
    return Content(facts, payload)


MAX_ID = 2**31 - 1  # The largest transaction id that chargers and servers agree on (SteVe, MicroOcpp).
MAX_SHORT = 200  # Characters of what is kept of what a peer says of itself.
MAX_WATT_HOURS = 1e15  # More than any register shows, and still exact to the Wh.
REGISTER = "Energy.Active.Import.Register"
NOTHING = Content(PLAIN, {})
TransactionId = int | str


def usable_id(value: Any, is_16: bool) -> TransactionId | None:
    """Return a usable transaction id as it is kept in tables; None for null, 0 and the like."""
    if is_16 and type(value) is str and re.fullmatch(r"\d{1,10}", value, re.ASCII):
        value = int(value)
    if type(value) is int:
        return value if 1 <= value <= MAX_ID else None
    return value if type(value) is str and value else None


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


def verdict_of(payload: dict[str, Any]) -> Any:
    """Return the status that an answer gives to a badge; None = it says nothing of one."""
    return value_at(payload, ("idTagInfo", "status")) or value_at(payload, ("idTokenInfo", "status"))


def fingerprint(values: list[Any]) -> str:
    """Return a text of bounded length that equal values have in common, and others do not."""
    text = dump(values)
    return text if len(text) <= MAX_SHORT else hashlib.sha256(text.encode()).hexdigest()


def short(value: Any) -> str:
    """Return the beginning of a text; "" for what is none."""
    return value[:MAX_SHORT] if type(value) is str else ""


# What would move a charger to another server, cut it off from its own, or change its name or login is the
# primary's alone. Names of configuration keys (1.6) and variables (2.x) as shell patterns, without case: of
# OCPP itself, then of Alfen and Amina, Ecotap, EVBox, Growatt, EVerest, KEBA, Vestel, XCharge and Wallbox.
GUARDED_SETTINGS = """
    authorizationkey securityprofile* identity *passw* network*profile* networkconfiguration*
    activenetworkprofile *url url-* *uri *endpoint* *server* *backend* *centralsystem* *csms* *backoffice*
    protocolversion *chargebox* *chargepointidenti* *chargepointid *chargepointname *chargerid *ocppid
    com_prot* com_options com_ocppinfo evb_serialas* g_authentication hostname verifycsms* hostconnectortype
    *portal* *proxy* *chargepointaddress *chargepointport *secureoutgoing* *certificatevalidation
    *hostnameverification *ocppversion *websocketsettings* *websocketuser *apn* *gsm* *cellular* *wifi*
    *ethernet* eth_* *vpn* *firewall* g_4g* g_*net*
""".split()  # noqa: SIM905
GUARDED_COMPONENTS = {"networkconfiguration"}  # Of OCPP 2.1.
SETTING_ACTIONS = {"ChangeConfiguration", "SetVariables"}
# Certificates are logins, too (security profile 3), but for those of the car.
CERTIFICATE_ACTIONS = {"CertificateSigned", "DeleteCertificate", "InstallCertificate"}
CAR_CERTIFICATES = {"V2GCertificate", "V2G20Certificate", "V2GRootCertificate", "MORootCertificate"}


def guarded_by(action: str, payload: dict[str, Any]) -> str:
    """Return what only the primary may change of what a server's Call wants to change; "" = nothing."""
    if action in CERTIFICATE_ACTIONS:
        kind = value_at(payload, ("certificateType",))
        return "" if short(kind) in CAR_CERTIFICATES else short(kind) or "a certificate"
    if action not in SETTING_ACTIONS:
        return action if action == "SetNetworkProfile" else ""
    settings = [("", key) for key in values_at(payload, ("key",))]
    settings += [
        (value_at(change, ("component", "name")), value_at(change, ("variable", "name")))
        for change in values_at(payload, ("setVariableData", "*"))
    ]
    for component, name in settings:
        key = str(name)[: MAX_SHORT + 1].strip(BLANKS).casefold()
        is_guarded = any(fnmatchcase(key, pattern) for pattern in GUARDED_SETTINGS)
        is_odd = len(key) > MAX_SHORT or not key.isprintable() or not key.isascii()
        if is_guarded or is_odd or str(component).strip(BLANKS).casefold() in GUARDED_COMPONENTS:
            return short(str(name)) or short(str(component))
    return ""


def rejection_of(facts: Facts, payload: dict[str, Any]) -> str:
    """Return the Rejected that the schema of the answer to a server's Call has, as JSON; "" = none."""
    names = ("component", "variable")
    results = [
        {"attributeStatus": "Rejected", **{name: value_at(change, (name,)) for name in names}}
        for change in values_at(payload, ("setVariableData", "*"))
    ]
    return dump({"setVariableResult": results}) if results else STATUS_REJECTED if facts.rejects else ""


def concern_of(action: str) -> str:
    """Return whether an Action is about the "station", in some version about a "session", or "unknown"."""
    words = VOCABULARIES.values()
    rows = [word.charger.get(action, PLAIN) for word in words]
    is_known = any(action in word.charger or action in word.server for word in words)
    is_sessions = any(row.badge or row.transaction for row in rows)
    return "session" if is_sessions else "station" if is_known else "unknown"


# ---------------------------------------------------------------------------------------------------------
# Routing
#
# Whose a message is. A message goes in, decisions with their reasons come out; the sections below carry
# them out. Pure: no socket, no clock, no log. Time is passed in. Three classes of one job each: whose a Call
# of the charger is (Router), the servers' Calls and claims (Commands), what servers' answers tell (Answers).
# ---------------------------------------------------------------------------------------------------------

FIRST_PROXY_ID = 2_000_000_000  # From here on, transaction ids are the proxy's; Unix time gets there in 2033.
SESSION_SECONDS = 7 * DAY  # An ended session can still be named for so long.
SILENT_SECONDS = 30 * DAY  # A session that nothing was heard of for so long counts as ended.
CLAIM_SECONDS = 300.0  # A remote start that no session followed; a report that a reservation has expired.
TRIGGER_SECONDS = 60.0  # A reading that a server has asked for comes within so long.
READING_SECONDS = 60.0  # How often the readings of a relayed session are saved.
RETRY_SECONDS = (10.0, 60.0)  # Before the second and the third try of a stored Call that met a CallError.
REFUSED_SECONDS = 30 * DAY  # What CallErrors refused is tried once more a day for so long.

# The most of each kind that one charger may have; beyond it the oldest goes.
MAX_SESSIONS = 1000
MAX_CLAIMS = 32
MAX_ASKED = 64  # Requests that the charger may report on.
MAX_STATUSES = 64
MAX_SELF_DESCRIPTION = 2**14  # Characters of a boot, of an answer, or of all statuses, that are kept.
MAX_ANSWERS = 32  # That a 2.x transaction was given, to know a repeat by.
MAX_OWNERLESS = 100  # Stored Calls of one transaction whose owner is not known yet.
MAX_STORED = 10_000  # Calls of one charger;
MAX_STORED_TEXT = 2**26  # characters of them. Where no reading can go, nothing more is stored or answered.
MAX_REFUSED = 1000  # Refused Calls of one charger that are kept to be shown.
MAX_COMMANDS = 64  # Calls of one server for the charger;
MAX_COMMANDS_TEXT = 2**20  # characters of them; a single one may be longer.
MAX_SPENT_IDS = 16  # Calls given up, whose late answers must not be taken for others'.

CALL_ERROR = "CallError"  # Begins the words of what a CallError has refused: it is tried again.
ACTION = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # A charger's parser might end it at the first odd character.
UNKEPT = {"kept": False}  # Marks the attributes that the state file does not hold.


class Instant(NamedTuple):
    """A point in time, on both clocks."""

    seconds: float  # Monotonic. Deadlines are measured on this one.
    utc: float  # Seconds since 1970, for what outlives the process; may jump.

    @property
    def text(self) -> str:
        """The time as OCPP writes it (RFC 3339)."""
        return datetime.fromtimestamp(self.utc, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Kind(Enum):
    """What becomes of a Call on its way to a server. Nothing changes it on the way."""

    RELAYED = "relayed"  # Its server's answer is the charger's answer.
    STORED = "stored"  # On disk until its server has answered; the proxy answers the charger.
    PASSING = "passing"  # Gone with the connection: copies, notes, what is the proxy's own.


@dataclass(slots=True, eq=False)
class Call:
    """A Call on its way to a server. Its text stands under its message id."""

    kind: Kind = field(metadata=UNKEPT)
    action: str = field(metadata=UNKEPT)
    message_id: MessageId = field(metadata=UNKEPT)  # Towards its server.
    text: str
    content: Content = field(metadata=UNKEPT)
    peer: Peer | None = None  # None: a stored Call whose server is not known yet.
    session: Session | None = None
    server: str = ""  # The address that it is bound to; "" = not known yet.
    version: str = ""  # The subprotocol that it is written in.
    since: float = 0.0  # UTC seconds; when it came.
    tries: int = 0  # CallErrors that it met; at most three.
    refused: str = ""  # Its server's words; "" = it waits.
    has_error: bool = False  # CallErrors refused it, or its session: it is tried again.
    number: int = field(default=0, metadata=UNKEPT)  # Its row in the state file; 0 = none yet.
    reply_to: MessageId | None = field(default=None, metadata=UNKEPT)  # The charger's id that waits.
    own_answer: str = field(default="", metadata=UNKEPT)  # JSON; the proxy's own, until it is given.
    queued: float = field(default=0.0, metadata=UNKEPT)  # Monotonic seconds; 0 = before the process.
    was_kept: bool = field(default=False, metadata=UNKEPT)  # For the owner of its transaction.
    sent: float | None = field(default=None, metadata=UNKEPT)  # Monotonic; None = not on this connection.
    not_before: float = field(default=0.0, metadata=UNKEPT)  # Monotonic seconds; its next try.


@dataclass(slots=True, eq=False)
class Session:
    """A charging session. Its owner never changes."""

    owner: Peer | None  # None: a 2.x transaction whose badge has not come yet.
    badge: str  # As it came; "" = none.
    connector: int | None  # 2.x: the EVSE.
    begun: float  # UTC seconds.
    touched: float  # UTC seconds of its last message.
    server: str = ""  # Its owner's address as it stood when the session began; "" = not known.
    transaction_id: TransactionId | None = None  # As the charger knows it; None until there is one.
    server_id: TransactionId | None = None  # As its owner knows it, usable or not; None until it has told.
    start: str = ""  # 1.6: what a repeated StartTransaction has in common with this one's.
    stop: str = ""  # 1.6: what a repeated StopTransaction has in common with this one's.
    is_told: bool = False  # 1.6: the charger was told the transaction id,
    is_used: bool = False  # and has named it since.
    ended: float | None = None  # UTC seconds; by its stop, or because it can have none any more.
    has_stop: bool = False  # Its stop has come. Ended without: a label, a late stop completes it.
    started_at: str = ""  # By the charger's clock, as it wrote it; "" = not said.
    stopped_at: str = ""  # Likewise.
    meter_start: float | None = None  # Wh; the first reading.
    meter_stop: float | None = None  # Wh; the last reading so far.
    reason: str = ""  # Why it ended, in the charger's words.
    delivered: float | None = None  # UTC seconds; when its owner accepted its stop.
    is_rejected: bool = False  # Recorded here and delivered nowhere (`unknown_rfid = reject`).
    refused: str = ""  # The owner's words against its start.
    is_refused: bool = False  # The owner knows nothing of it: the rest is kept and not sent.
    answers: dict[str, str] = field(default_factory=dict)  # JSON by Content.mark; MAX_ANSWERS.
    number: int = field(default=0, metadata=UNKEPT)  # Its row in the state file; 0 = none yet.
    saved: float = field(default=0.0, metadata=UNKEPT)  # UTC seconds; when its readings were noted last.

    @property
    def is_turned_away(self) -> bool:
        """Whether there is no stop to wait for: the charger knows that its owner has refused it."""
        told = self.answers.get(Role.START.value) if self.refused and self.is_told else None
        return told is not None and verdict_of(decoded(told)) != "Accepted"

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
    until: float  # UTC seconds.
    reservation: int | None = None
    remote_start: int | None = None
    transaction: str = ""  # 2.x: as the charger's answer names it.


Row = Call | Session  # What has a number; the Memory is a row of its own.


@dataclass(slots=True, eq=False)
class Memory:
    """What is remembered of one charger from one connection to the next."""

    charger_id: str = field(default="", metadata=UNKEPT)
    version: str = ""  # The subprotocol of its last connection; "" = never connected.
    user_agent: str = ""  # What it called itself in its last handshake.
    seen: float = 0.0  # UTC seconds; when something was last seen of it; 0 = not known.
    boot: str = ""  # The text of the last BootNotification; "" = none seen.
    heartbeat_interval: int = HEARTBEAT_INTERVAL  # Seconds; what the charger was told.
    dropped: int = 0  # Stored readings that had to go, since it is known.
    statuses: dict[str, str] = field(default_factory=dict)  # The last of each connector; MAX_STATUSES.
    claims: list[Claim] = field(default_factory=list)  # The oldest first; MAX_CLAIMS.
    # By Session.key; MAX_SESSIONS.
    sessions: dict[TransactionId, Session] = field(default_factory=dict, metadata=UNKEPT)
    stored: dict[Call, None] = field(default_factory=dict, metadata=UNKEPT)  # In order; MAX_STORED.
    stored_text: int = field(default=0, metadata=UNKEPT)  # Characters of them; MAX_STORED_TEXT.
    refused: list[Call] = field(default_factory=list, metadata=UNKEPT)  # The oldest first; MAX_REFUSED.
    # Who has asked last for something: by request id, or by Action where there is none; MAX_ASKED.
    asked: dict[int | str, Peer] = field(default_factory=dict, metadata=UNKEPT)
    # Until when a reading may be the answer to a TriggerMessage, in monotonic seconds.
    triggers: dict[Peer, float] = field(default_factory=dict, metadata=UNKEPT)
    # The Journal's: rows that the disk does not know so, with their Memory; None = the row is gone.
    changed: dict[Row | Memory, Memory | None] = field(default_factory=dict, metadata=UNKEPT)
    is_in_use: bool = field(default=False, metadata=UNKEPT)  # A Relay holds it.

    @property
    def is_needed(self) -> bool:
        """Whether somebody uses it, or something is open or undelivered."""
        return self.is_in_use or bool(self.stored) or any(s.ended is None for s in self.sessions.values())

    def note(self, row: Row | Memory, is_there: bool = True) -> None:
        """Let the disk know how a row stands now, or that it is gone."""
        self.changed[row] = self if is_there else None

    # Sessions.

    def add(self, session: Session, transaction_id: TransactionId | None = None) -> None:
        """Let a session be found, by the id that the charger is told; beyond the bound the oldest goes."""
        if transaction_id is not None:
            if self.sessions.get(session.key) is session:
                del self.sessions[session.key]
            session.transaction_id = transaction_id
        self.sessions[session.key] = session
        if len(self.sessions) > MAX_SESSIONS:
            ended = (key for key, old in self.sessions.items() if old.ended is not None)
            del self.sessions[next(ended, next(iter(self.sessions)))]

    def on_connector(self, connector: int | None) -> Session | None:
        """Return the open session on a connector; 0 is the whole station."""
        found = [s for s in self.sessions.values() if s.connector == connector and s.ended is None]
        return found[-1] if found and connector else None

    def end(self, session: Session, utc: float) -> None:
        """Take note that nothing more is charged in a session."""
        session.ended = utc
        self.note(session)

    def repeated_start(self, start: str) -> Session | None:
        """Return the session that a StartTransaction repeats: the charger has not used its id yet."""
        fits = [session for session in self.sessions.values() if session.start == start]
        # What its owner has refused may be tried again.
        found = (s for s in reversed(fits) if not (s.has_stop or s.is_used or s.is_turned_away))
        return next(found, None)

    def stopped_by(self, said: Content) -> tuple[Session, str] | None:
        """Find the session of a StopTransaction without a usable id (OCPP 1.6 errata 3.18)."""
        stop, badge = said.stop, normalized(said.badge or "")
        sessions = [session for session in self.sessions.values() if session.owner]
        waiting = [s for s in sessions if not (s.has_stop or s.is_rejected or s.is_turned_away)]
        for fits, why in (
            ([s for s in sessions if s.stop == stop][:1], "it repeats a stop"),
            ([s for s in waiting if badge and normalized(s.badge) == badge], "the open session of its badge"),
            ([s for s in waiting if s.start and not s.is_told], "the only one whose start was not answered"),
            (waiting, "the only open session"),
        ):
            found = [session for session in fits if session.ended is None] or fits
            if len(found) > 1:
                last = {session.connector: session for session in sessions}  # Who holds each connector.
                found = [session for session in found if last[session.connector] is session]
            if fits:
                return (found[0], why) if len(found) == 1 else None
        return None

    def known_as(self, peer: Peer, server: str, server_id: Any) -> Session | None:
        """Return the session that a server knows by this id; of several an open one, the newest."""
        found = [
            session
            for session in self.sessions.values()
            if session.owner is peer and session.server == server
            if None not in (server_id, session.server_id) and str(session.server_id) == str(server_id)
        ]
        return max(found, key=lambda session: (session.ended is None, session.begun), default=None)

    def drop_claims(self, is_over: Callable[[Claim], bool]) -> None:
        """Forget the claims that are over."""
        left = [claim for claim in self.claims if not is_over(claim)]
        if len(left) < len(self.claims):
            self.claims = left
            self.note(self)

    # Stored Calls.

    @property
    def is_full(self) -> bool:
        """Whether something has to go before more can be stored."""
        return len(self.stored) >= MAX_STORED or self.stored_text > MAX_STORED_TEXT

    def keep(self, call: Call) -> None:
        """Take a stored Call, as the last."""
        self.stored[call] = None
        self.stored_text += len(call.text)

    def store(self, call: Call) -> list[Call]:
        """Keep a Call until its server has answered it; return the readings that had to go for it."""
        gone, is_ownerless = list[Call](), call.session is not None and call.session.owner is None
        mine = [other for other in self.stored if is_ownerless and other.session is call.session]
        surplus = mine if len(mine) >= MAX_OWNERLESS else []
        while reading := oldest_reading(surplus) or oldest_reading(self.stored if self.is_full else ()):
            gone.append(reading)
            self.remove(reading)
            surplus = []
        self.keep(call)
        self.note(call)
        if gone:
            self.dropped += len(gone)
            self.note(self)
        return gone

    def remove(self, call: Call) -> None:
        """Forget a Call that its server has answered, or that goes nowhere."""
        if call in self.stored:
            del self.stored[call]
            self.stored_text -= len(call.text)
            self.note(call, is_there=False)

    def refuse(self, call: Call, words: str) -> None:
        """Keep a Call as refused by its server."""
        self.remove(call)
        call.refused, call.has_error = words, words.startswith(CALL_ERROR)
        self.refused.append(call)
        self.note(call)
        while len(self.refused) > MAX_REFUSED or sum(len(old.text) for old in self.refused) > MAX_STORED_TEXT:
            oldest = next((old for old in self.refused if old.content.is_reading), self.refused[0])
            self.refused.remove(oldest)
            self.note(oldest, is_there=False)

    def retry(self, utc: float) -> None:
        """Let what CallErrors refused be tried once more, with the rest of its session."""
        again = [call for call in self.refused if call.has_error and utc - call.since < REFUSED_SECONDS]
        begun = {call.session for call in again if call.content.is_start}
        for call in again:
            if call.session and call.session.is_refused and call.session not in begun:
                continue  # Its server could not know what it belongs to.
            self.refused.remove(call)
            call.refused, call.has_error, call.sent = "", False, None
            call.message_id = new_message_id()  # The last one met a CallError.
            call.text = patch(call.text, (1,), call.message_id)
            if call.session and call.content.is_start:
                call.session.refused = ""
                self.note(call.session)
            self.store(call)
        for session in filter(None, begun):
            session.is_refused = False
        self.stored = dict.fromkeys(sorted(self.stored, key=lambda call: call.number or math.inf))


def oldest_reading(calls: Iterable[Call]) -> Call | None:
    """Return the first reading among stored Calls that is not on its way."""
    return next((call for call in calls if call.content.is_reading and call.sent is None), None)


# Decisions. Each carries its reason.


class ToServer(NamedTuple):
    """Put the Call into the queue of its server; a copy only while it is connected."""

    call: Call
    why: str
    is_copy: bool = False


class ToCharger(NamedTuple):
    """Send the text to the charger: now, or once the rows are on disk."""

    text: str
    why: str
    rows: tuple[Row | Memory, ...] = ()
    needs_disk: bool = True  # False: where the disk fails, it goes all the same.


class OwnAnswer(NamedTuple):
    """Give the charger the proxy's own answer to a Call, once all that was stored for it is on disk."""

    call: Call
    why: str


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
    call: Call | None = None  # The stored reading that it was.


class Told(NamedTuple):
    """Something that belongs into the story of the day."""

    what: str
    badge: str = ""
    is_unlisted: bool = False  # The badge is on no list, and no claim speaks for it.


Decision = ToServer | ToCharger | OwnAnswer | Answer | Dropped | Told


class Route(NamedTuple):
    """Whose a Call is, and by which rule."""

    owner: Peer | None
    why: str
    session: Session | None = None
    claim: Claim | None = None
    is_unlisted: bool = False  # Neither a list nor a claim speaks for its badge.
    is_rejected: bool = False  # On neither list, and the ini says reject.
    is_station: bool = False  # Nobody's in particular: the other server may have a copy.
    refused: str = ""  # It names an id of the proxy's whose session is forgotten: it is not sent.

    @property
    def whose(self) -> str:
        """The owner in a word."""
        return "rejected" if self.is_rejected else self.owner.value if self.owner else "nobody yet"


STATION = Route(Peer.PRIMARY, "concerns the station", is_station=True)
ENDED = Route(Peer.PRIMARY, "it ended without a badge")


def is_proxy_id(value: object) -> bool:
    """Whether a transaction id is one that only the proxy hands out."""
    return type(value) is int and FIRST_PROXY_ID <= value <= MAX_ID


def own_call(action: str, payload: str, peer: Peer | None = None) -> Call:
    """Return a passing Call of the proxy's own; its payload is JSON already."""
    message_id = new_message_id()
    return Call(Kind.PASSING, action, message_id, call_text(message_id, action, payload), NOTHING, peer)


def trim(table: dict[Any, Any], most: int) -> None:
    """Remove the oldest entries of a table beyond its bound."""
    while len(table) > most:
        del table[next(iter(table))]


class Router:
    """Whose a Call of the charger is (rule 1), and what becomes of it. Owns nothing but who waits."""

    def __init__(self, config: ChargerConfig, memory: Memory, version: str) -> None:
        self.config = config
        self.memory = memory
        self.version = version  # The subprotocol.
        self.vocabulary = VOCABULARIES[version]
        # By session and Content.mark: the Call whose answer the charger waits for, for its repeats.
        self.waiting: dict[tuple[Session, str], Call] = {}

    def charger_call(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of the charger."""
        said, told = content_of(self.vocabulary.charger, message), list[Decision]()
        role, badge = said.facts.role, said.badge
        if role is Role.START or (role is Role.EVENT and said.transactions):
            route = self._route_of_session(said, now, told)
        else:
            route = self._route(said, now)
            if badge is not None and not route.session:
                what = f"{message.action} is for {route.whose}: {route.why}"
                told.append(Told(what, badge, route.is_unlisted))
        if role in (Role.BOOT, Role.STATUS) and len(message.text) <= MAX_SELF_DESCRIPTION:
            self._remember(message, said, now)
        return told + self._dispatched(message, said, route, now)

    def _remember(self, message: Message, said: Content, now: Instant) -> None:
        """Keep what the charger says of itself and of its connectors."""
        memory, statuses = self.memory, self.memory.statuses
        memory.note(memory)
        if said.facts.role is Role.BOOT:
            memory.boot = message.text
            return
        where = fingerprint([said.connector, said.payload.get("connectorId")])
        statuses.pop(where, None)
        statuses[where] = message.text
        while len(statuses) > MAX_STATUSES or sum(map(len, statuses.values())) > MAX_SELF_DESCRIPTION:
            del statuses[next(iter(statuses))]
        session = memory.on_connector(said.connector)
        if session and value_at(said.payload, said.facts.state) == "Available":
            memory.end(session, now.utc)

    # Whose it is. The first rule that matches wins.

    def _route(self, said: Content, now: Instant) -> Route:
        facts = said.facts
        if facts.is_stations:
            return STATION  # As below, in one step: it is the most frequent.
        if route := self._by_transaction(said) or self._by_badge(said, said.connector, now):
            return route
        session = self.memory.on_connector(said.connector) if facts.by_connector else None
        if session and session.owner and not (session.is_rejected or session.is_turned_away):
            return Route(session.owner, f"the session on its connector {said.connector}", session)
        asker = self.memory.asked.get(facts.asked_by if said.request is None else said.request)
        return Route(asker, f"{asker.value} asked for it") if asker else STATION

    def _by_transaction(self, said: Content) -> Route | None:
        named = said.transactions
        sessions = [self.memory.sessions[value] for value in named if value in self.memory.sessions]
        owned = {session.owner: session for session in sessions if session.owner}
        if len(owned) > 1:
            return Route(Peer.PRIMARY, "names transactions of both servers")
        for owner, session in owned.items():
            return Route(owner, "its transaction", session)
        if named and not sessions:
            if not is_proxy_id(named[0]):
                return Route(Peer.PRIMARY, "an unknown transaction")
            owner = Peer.SECONDARY if int(named[0]) & 1 else Peer.PRIMARY  # The lowest bit names it.
            why = "a transaction id of the proxy, whose session is forgotten"
            return Route(owner, why, refused="its start is not known here")
        if said.facts.role is Role.STOP and (found := self.memory.stopped_by(said)):
            return Route(found[0].owner, found[1], found[0])
        return None

    def _by_badge(self, said: Content, connector: int | None, now: Instant) -> Route | None:
        """Find the server that asked for a session with this badge or under these ids; else ask the ini."""
        badge = None if said.badge is None else normalized(said.badge)
        reservation = value_at(said.payload, said.facts.reservation)
        remote_start = value_at(said.payload, said.facts.remote_start)

        def fit(claim: Claim) -> int:
            """Return how well a claim fits: 0 = not. Servers that count from 1 use the same remoteStartId."""
            is_named = type(reservation) is int and reservation == claim.reservation
            is_named = is_named or claim.transaction in said.transactions
            is_numbered = type(remote_start) is int and remote_start == claim.remote_start
            is_here = None in (connector, claim.connector) or connector == claim.connector
            is_fit = is_named or (badge == claim.badge and is_here) or (is_numbered and badge is None)
            return is_fit + 2 * (is_named or is_numbered) if is_fit else 0

        # A report on a reservation comes after its end.
        utc = now.utc - (CLAIM_SECONDS if badge is None else 0.0)
        claims = [claim for claim in reversed(self.memory.claims) if claim.server == self.address(claim.peer)]
        claim = max((c for c in claims if utc < c.until and fit(c)), key=fit, default=None)  # Or the newest.
        if claim is None:
            return None if said.badge is None else self.route_of_badge(said.badge)
        why = "its reservation" if claim.reservation is not None else "its remote start"
        return Route(claim.peer, f"{claim.peer.value} claimed it: {why}", claim=claim)

    def route_of_badge(self, badge: str) -> Route:
        """Return whose a badge is, by the ini alone."""
        peer, unknown = self.config.badges.find(badge), self.config.unknown_rfid
        if peer and self.address(peer):
            return Route(peer, f"its badge is on {peer.value}_rfid")
        owner = Peer.SECONDARY if unknown == "secondary" and self.config.secondary else Peer.PRIMARY
        why = f"its badge is on no list: unknown_rfid = {unknown}"
        return Route(owner, why, is_unlisted=peer is None, is_rejected=unknown == "reject")

    def address(self, peer: Peer | None) -> str:
        """Return the address of a server; "" = there is none."""
        server = self.config.server(peer) if peer else None
        return server.url if server else ""

    # Sessions.

    def _session_of(self, said: Content, now: Instant, told: list[Decision]) -> Session:
        """Find or begin the session of a StartTransaction (1.6) or of a TransactionEvent (2.x)."""
        memory, transaction_id, start = self.memory, next(iter(said.transactions), None), ""
        if said.facts.role is Role.START:
            reading = (said.payload.get("meterStart"), said.payload.get("timestamp"))
            start = fingerprint([said.connector, normalized(said.badge or ""), *reading])
            session = memory.repeated_start(start)
        else:
            session = memory.sessions.get(transaction_id or "")
            if session and said.is_start and session.started_at not in ("", said.timestamp):
                memory.end(session, now.utc)  # The station counts from the start again.
                told += [] if session.owner else self.settle(session, ENDED, "")
                session = None
        if session is None:
            session = Session(None, "", None, now.utc, now.utc, start=start)
            session.transaction_id = session.server_id = transaction_id
            memory.add(session)
        # Only the first event has to name it (E01.FR.16). What was open there can have no stop any more.
        if said.connector and session.connector is None and session.ended is None:
            if before := memory.on_connector(said.connector):
                memory.end(before, now.utc)
            session.connector = said.connector
        return session

    def _route_of_session(self, said: Content, now: Instant, told: list[Decision]) -> Route:
        """Return whose a session is; a new one's owner is found by its badge, which may come late (2.x)."""
        session = self._session_of(said, now, told)
        route = Route(session.owner, "its transaction", session)
        if session.owner:
            return route
        reasons = {
            "it carries no badge": said.facts.role is Role.START,
            "it needs no authorization": value_at(said.payload, said.facts.badge_type) == "NoAuthorization",
            "it charges without a badge": value_at(said.payload, said.facts.state) == "Charging",
            "it ends without a badge": said.is_stop,
        }
        why = next((why for why, holds in reasons.items() if holds), "")
        settled = self._by_badge(said, session.connector, now) or (Route(Peer.PRIMARY, why) if why else None)
        if settled:
            told += self.settle(session, settled, said.badge or "")
            route = settled._replace(session=session)
        return route

    def settle(self, session: Session, route: Route, badge: str) -> list[Decision]:
        """Give a session its owner, and the owner what was stored for it."""
        session.owner, session.badge, session.is_rejected = route.owner, badge, route.is_rejected
        session.server = "" if route.is_rejected else self.address(route.owner)
        self.memory.drop_claims(lambda claim: claim is route.claim)
        if session.transaction_id is not None or route.claim:  # Else a start is saved with its answer.
            self.memory.note(session)
        what = f"a session of {route.whose} begins on connector {session.connector}: {route.why}"
        decisions: list[Decision] = [Told(what, badge, route.is_unlisted)]
        for call in [call for call in self.memory.stored if call.session is session]:
            call.peer, call.server, call.was_kept = session.owner, session.server, True
            if session.server in ("", LOCAL):
                self.memory.remove(call)
            else:
                self.memory.note(call)
                decisions.append(ToServer(call, "was kept for its owner"))
        return decisions

    # What becomes of it.

    def _dispatched(self, message: Message, said: Content, route: Route, now: Instant) -> list[Decision]:
        """Relay the Call, or answer and store it; others get copies."""
        session, is_reading = route.session, said.facts.role is Role.METER
        if session and (answered := self._repeated(message, said.mark, session)):
            return answered
        triggers = self.memory.triggers.items()
        askers = {peer for peer, until in triggers if now.seconds < until and said.is_triggered}
        if is_reading and route.is_station and askers == {Peer.SECONDARY}:
            route = Route(Peer.SECONDARY, "secondary asked for it")
        is_primarys_alone = is_reading and route.owner is Peer.SECONDARY and askers == {Peer.PRIMARY}
        call = Call(Kind.PASSING, message.action, message.message_id, message.text, said, route.owner)
        call.session, call.version, call.since = session, self.version, now.utc
        call.reply_to = message.message_id
        if not (route.is_rejected or is_primarys_alone):
            call.server = session.server if session else self.address(route.owner)
        is_primarys = route.owner is Peer.PRIMARY and not route.refused
        if is_primarys and call.server == self.config.primary.url != LOCAL:
            call.kind = Kind.RELAYED
        elif session or said.facts.role is Role.STOP:
            call.kind = Kind.STORED
            if self.memory.is_full and oldest_reading(self.memory.stored) is None:
                return [Dropped("too much waits for its server; no more is taken", is_grave=True)]
        decisions = self._noted(session, said, now) if session else []
        decisions += self._copies(message, said, route, askers)
        if session and said.mark:
            self.waiting[session, said.mark] = call
        if call.kind is Kind.RELAYED:
            return [*decisions, ToServer(call, route.why)]
        call.message_id = new_message_id()
        call.text = under_id(message, call.message_id)
        return decisions + self._answered_here(call, route, now)

    def _repeated(self, message: Message, mark: str, session: Session) -> list[Decision]:
        """Answer what was answered before, or let it join what waits for its answer; [] = it is new."""
        if waiting := self.waiting.get((session, mark)):
            waiting.reply_to = message.message_id
            return [Told(f"a repeated {message.action} joins the one that waits for its answer")]
        if mark not in session.answers:
            return []
        if not session.is_told:
            session.is_told = True
            self.memory.note(session)
        text = result_text(message.message_id, session.answers[mark])
        return [ToCharger(text, f"repeats a {message.action}", (session,))]

    def _answered_here(self, call: Call, route: Route, now: Instant) -> list[Decision]:
        """Give a Call the proxy's own answer, and its server the Call."""
        said, session, memory = call.content, call.session, self.memory
        if session and said.facts.role is Role.START and session.transaction_id is None:
            memory.add(session, self.new_transaction_id(session.owner))
        refused = session.refused if session and session.is_refused else route.refused
        goes = call.server not in ("", LOCAL) and not refused
        waits = goes and self.is_awaited(call)
        is_rejected = session.is_rejected if session else route.is_rejected
        verdict = "Invalid" if is_rejected or (route.is_unlisted and waits) else "Accepted"
        call.own_answer = said.answer(verdict, now.text, session.transaction_id if session else None)
        decisions: list[Decision] = []
        if session:
            session.answers.update({said.mark: call.own_answer} if said.mark else {})
            trim(session.answers, MAX_ANSWERS)
            memory.note(session)
        if refused and call.kind is Kind.STORED:
            memory.refuse(call, refused)
            decisions = [Told(f"{call.action} is kept and not sent: its session is refused: {refused}")]
        elif call.kind is Kind.STORED and (goes or route.owner is None):
            decisions = [Dropped("too many Calls wait", call=reading) for reading in memory.store(call)]
        decisions += [ToServer(call, route.why)] if goes else []
        return decisions if waits else [*decisions, OwnAnswer(call, route.why)]

    def is_awaited(self, call: Call) -> bool:
        """Whether the charger's answer waits for the secondary's."""
        is_here = call.peer is Peer.SECONDARY and call.server == self.address(Peer.SECONDARY)
        return is_here and (self.config.secondary_replies == "forward" or call.content.needs_server)

    def new_transaction_id(self, owner: Peer | None) -> int:
        """Return an id that is not in use and names its owner in the lowest bit."""
        while True:
            transaction_id = random.randrange(FIRST_PROXY_ID, MAX_ID, 2) + (owner is Peer.SECONDARY)
            if transaction_id not in self.memory.sessions:
                return transaction_id

    def _noted(self, session: Session, said: Content, now: Instant) -> list[Decision]:
        """Keep what people want to know of a session: its times and readings."""
        register, is_start = said.register, said.facts.role is Role.START
        session.touched = now.utc
        is_new = bool(said.transactions) and not (is_start or session.is_used)
        session.is_used = session.is_used or is_new
        if register is not None:
            session.meter_start = register if session.meter_start is None else session.meter_start
            session.meter_stop = register
        if said.is_start:
            session.started_at = session.started_at or said.timestamp
        is_due = is_new or not said.is_reading or now.utc - session.saved >= READING_SECONDS
        if is_due and not is_start:
            session.saved = now.utc
            self.memory.note(session)
        if not said.is_stop or session.has_stop:
            return []
        session.stopped_at, session.reason = said.timestamp, short(value_at(said.payload, said.facts.reason))
        session.has_stop, session.stop = True, said.stop
        self.memory.end(session, now.utc)
        owner = session.owner.value if session.owner else "nobody"
        there = session.server_id if session.server_id not in (None, session.transaction_id) else ""
        what = f"session {session.transaction_id} of {owner}{there and f' (there: {there})'} ends"
        return [Told(f"{what} on connector {session.connector}", session.badge)]

    def _copies(self, message: Message, said: Content, route: Route, askers: set[Peer]) -> list[Decision]:
        """Return what the other server sees of a Call: a message of its own, without a transaction."""
        config, session, action = self.config, route.session, message.action
        if said.facts.role in (Role.METER, Role.EVENT):
            is_shown = route.owner is Peer.SECONDARY and "MeterValues" in config.primary_copies
            wanting = askers | ({Peer.PRIMARY} if is_shown else set())
            values = value_text(message.text, (3, "meterValue")) if wanting else ""
            connector = said.connector or (session and session.connector) or 0
            key = "connectorId" if said.facts.is_16 else "evseId"
            action, payload = "MeterValues", values and f'{{"{key}":{connector},"meterValue":{values}}}'
        else:
            is_named = said.facts.role is Role.BOOT or action in config.secondary_copies
            wanting = {Peer.SECONDARY} if is_named and route.is_station else set()
            payload = value_text(message.text, (3,)) if wanting else ""
        peers = wanting - {route.owner} if payload else set()
        return [ToServer(own_call(action, payload, peer), "is to be copied", is_copy=True) for peer in peers]

    # What time and lost connections do.

    def stop_waiting(self, call: Call) -> None:
        """Take note that the charger does not wait for a Call any more."""
        call.reply_to = None
        if call.session and self.waiting.get((call.session, call.content.mark)) is call:
            del self.waiting[call.session, call.content.mark]

    def charger_gone(self) -> None:
        """Take note that nobody waits any more."""
        for call in list(self.waiting.values()):
            call.reply_to = None  # What is stored may be joined by its repeat.
            if call.kind is Kind.RELAYED:
                self.stop_waiting(call)

    def sweep(self, now: Instant) -> list[Decision]:
        """Remove what has expired."""
        memory, told = self.memory, list[Decision]()
        memory.drop_claims(lambda claim: now.utc >= claim.until + CLAIM_SECONDS)
        for session in list(memory.sessions.values()):
            if session.ended is None and now.utc - session.touched > SILENT_SECONDS:
                told.append(Told(f"session {session.transaction_id} had no stop", session.badge))
                memory.end(session, now.utc)
                told += [] if session.owner else self.settle(session, ENDED, "")
            elif session.ended is not None and now.utc - session.ended > SESSION_SECONDS:
                told += [] if session.owner else self.settle(session, ENDED, "")
                del memory.sessions[session.key]
        return told


@dataclass(slots=True, eq=False)
class ServerCall:
    """A Call of a server for the charger."""

    peer: Peer
    action: str
    content: Content
    text: str  # As the charger gets it.
    wire_id: MessageId  # As the charger knows it.
    reply_to: MessageId | None  # The server's id that waits; None = nobody waits any more.
    since: float  # Monotonic seconds; when it came, and then, when it was sent.
    claim: Claim | None = None

    @property
    def report(self) -> int | str:
        """What the charger's report on it is found by (Memory.asked)."""
        return self.action if self.content.request is None else self.content.request


class Commands:
    """The servers' Calls to the charger, and its answers (rules 4 and 5). Owns the Calls that wait for it."""

    def __init__(self, router: Router, call_timeout: float) -> None:
        self.router = router
        self.memory = router.memory
        self.call_timeout = call_timeout  # Seconds.
        self.waiting: dict[Peer, deque[ServerCall]] = {}  # Unsent; MAX_COMMANDS each.
        self.outstanding: ServerCall | None = None  # The one Call that the charger has to answer.
        self.last_served = Peer.SECONDARY  # Whose Call the charger got last; the other comes first.
        self.spent: dict[str, ServerCall] = {}  # Given up, by wire id; MAX_SPENT_IDS.

    def server_call(self, peer: Peer, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of a server."""
        said, message_id = content_of(self.router.vocabulary.server, message), message.message_id
        call = ServerCall(peer, message.action, said, message.text, message_id, message_id, now.seconds)
        if why := self._forbidden(message, peer) or self._translated(call):
            rejection = rejection_of(said.facts, message.payload)
            error = error_text(message_id, "SecurityError", why)  # Not every schema has a Rejected.
            text = result_text(message_id, rejection) if rejection else error
            return [Answer(peer, text, f"refused: {why}", Outcome.REFUSED)]
        waiting = self.waiting.setdefault(peer, deque())
        if len(waiting) >= MAX_COMMANDS or sum(len(other.text) for other in waiting) > MAX_COMMANDS_TEXT:
            return self._given_up(call, "too many Calls wait for the charger already")
        if str(message_id) in {str(other.wire_id) for other in self._unanswered()}.union(self.spent):
            call.wire_id = new_message_id()
            call.text = patch(call.text, (1,), call.wire_id)
        waiting.append(call)
        return self._next(now)

    def _forbidden(self, message: Message, peer: Peer) -> str:
        """Return why the secondary, a guest, may not call this on the charger; "" = it may."""
        action = message.action
        if peer is Peer.PRIMARY:
            return ""
        if not ACTION.fullmatch(action):
            return "its Action has characters that no Action has"
        if action in self.router.config.secondary_refuse:
            return f"{action} is on secondary_refuse"
        if action in SETTING_ACTIONS and has_repeated_key(message.text):
            return f"{action}: a key stands twice"
        setting = guarded_by(action, message.payload)
        return f"{action}: {setting} is the primary's alone" if setting else ""

    def _translated(self, call: ServerCall) -> str:
        """Translate the transaction that a Call names; return why it must not reach the charger, or ""."""
        said, facts = call.content, call.content.facts
        value = value_at(said.payload, facts.transaction)
        named = usable_id(value, facts.is_16)
        session = self.memory.known_as(call.peer, self.router.address(call.peer), value)
        if session and session.transaction_id is not None:
            if named != session.transaction_id:
                call.text = patch(call.text, (3, *facts.transaction), session.transaction_id)
            return ""
        other = self.memory.sessions.get(named) if named is not None else None
        if other and other.owner is not None:
            return f"transaction {named} is not one of {call.peer.value}"
        # What names nothing passes, but for a stop.
        is_odd = named is not None or (facts.transaction != () and facts.role is Role.COMMAND)
        is_unknown = call.peer is Peer.SECONDARY and is_odd
        return f"nobody knows a transaction {str(value)[:40]} of secondary" if is_unknown else ""

    def _unanswered(self) -> list[ServerCall]:
        """Return all that wait for the charger, or for its answer."""
        return [*([self.outstanding] if self.outstanding else []), *itertools.chain(*self.waiting.values())]

    def _next(self, now: Instant) -> list[Decision]:
        """Send the next Call if the charger has none to answer; the servers take turns."""
        for peer in sorted(self.waiting, key=lambda peer: peer is self.last_served):
            if self.waiting[peer] and not self.outstanding:
                call = self.waiting[peer].popleft()
                self.outstanding, self.last_served, call.since = call, peer, now.seconds
                self._note_sent(call, now)
                rows = (self.memory,) if call.claim else ()  # The session may outlive the proxy.
                return [ToCharger(call.text, f"{peer.value} calls {call.action}", rows, needs_disk=False)]
        return []

    def _note_sent(self, call: ServerCall, now: Instant) -> None:
        """Take note of what the charger may say about a Call, from now on."""
        memory, said, peer = self.memory, call.content, call.peer
        memory.asked.pop(call.report, None)
        memory.asked[call.report] = peer
        trim(memory.asked, MAX_ASKED)
        wanted = said.payload.get("requestedMessage")
        if said.facts.role is Role.TRIGGER and wanted in ("MeterValues", "TransactionEvent"):
            memory.triggers[peer] = now.seconds + TRIGGER_SECONDS
        if said.facts.role not in (Role.REMOTE_START, Role.RESERVE) or said.badge is None:
            return
        badge, connector, until = normalized(said.badge), said.connector or None, now.utc + CLAIM_SECONDS
        if said.facts.role is Role.RESERVE:
            until = utc_of(said.payload.get("expiryDate", said.payload.get("expiryDateTime"))) or until
        call.claim = claim = Claim(peer, self.router.address(peer), badge, connector, until)
        claim.reservation = integer(value_at(said.payload, said.facts.reservation))
        claim.remote_start = integer(value_at(said.payload, said.facts.remote_start))
        memory.drop_claims(lambda old: (old.peer, old.badge, old.connector) == (peer, badge, connector))
        memory.claims = [*memory.claims, claim][-MAX_CLAIMS:]
        memory.note(memory)

    # Answers of the charger (rule 5).

    def charger_answer(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on the charger's answer to a Call of a server."""
        call, key = self.outstanding, str(message.message_id)
        if call and str(call.wire_id) == key:
            self.outstanding = None
        else:
            call = self.spent.pop(key, None)
        decisions = self._learn(call, message) if call else []
        if call is None or call.reply_to is None:
            return [*decisions, Dropped("an answer to a Call that nobody waits for"), *self._next(now)]
        if call.content.facts.role in (Role.REMOTE_START, Role.RESERVE, Role.CANCEL, Role.COMMAND):
            outcome = message.action or str(message.payload.get("status", "done"))[:40]
            decisions.append(Told(f"{call.peer.value} asked for {call.action}: {outcome}"))
        text = under_id(message, call.reply_to)
        answer = Answer(call.peer, text, "the charger answers", outcome_of(message))
        return [answer, *decisions, *self._next(now)]

    def _learn(self, call: ServerCall, message: Message) -> list[Decision]:
        """Void what the charger refuses; end what it cancels; own what it says has begun."""
        memory, claim, said = self.memory, call.claim, call.content
        status = str(message.payload.get("status", "Accepted"))
        if message.type is MessageType.CALLERROR or not status.startswith("Accepted"):  # Or AcceptedCanceled.
            if call.reply_to is not None and memory.asked.get(call.report) is call.peer:
                del memory.asked[call.report]  # A late refusal may be older than what stands there.
            memory.drop_claims(lambda other: other is claim)
        elif said.facts.role is Role.CANCEL:
            number = integer(value_at(said.payload, said.facts.reservation))
            memory.drop_claims(
                lambda old: old.peer is call.peer and number is not None and old.reservation == number
            )
        elif claim and claim in memory.claims:
            claim.transaction = short(message.payload.get("transactionId"))
            session = memory.sessions.get(claim.transaction)
            if session and session.owner is None:
                route = Route(call.peer, "its remote start", claim=claim)
                return self.router.settle(session, route, said.badge or "")
        return []

    # What time and lost connections do.

    def _given_up(self, call: ServerCall, why: str) -> list[Decision]:
        """Tell its server that a Call will not be answered."""
        if call.reply_to is None:
            return [Dropped(why)]
        text, call.reply_to = error_text(call.reply_to, "GenericError", why), None
        return [Answer(call.peer, text, why, Outcome.UNANSWERED)]

    def tick(self, now: Instant) -> list[Decision]:
        """Give up what has waited too long."""
        decisions, call = list[Decision](), self.outstanding
        if call and now.seconds >= call.since + self.call_timeout:
            self.outstanding, self.spent[str(call.wire_id)] = None, call
            trim(self.spent, MAX_SPENT_IDS)
            decisions += self._given_up(call, f"the charger did not answer within {self.call_timeout:g} s")
        for waiting in self.waiting.values():
            while waiting and now.seconds >= waiting[0].since + 2 * self.call_timeout:
                decisions += self._given_up(waiting.popleft(), "the charger was busy for too long")
        return decisions + self._next(now)

    def charger_gone(self) -> list[Decision]:
        """Give up all Calls that the charger's connection leaves unanswered."""
        calls = self._unanswered()
        self.outstanding, self.waiting = None, {}
        self.spent.clear()  # Whatever comes on its next connection answers none of them.
        return [decision for call in calls for decision in self._given_up(call, "the charger is gone")]

    def server_gone(self, peer: Peer) -> None:
        """Forget the Calls of a server's connection that was lost; it will not wait for their answers."""
        self.waiting.pop(peer, None)
        if self.outstanding and self.outstanding.peer is peer:
            self.outstanding.reply_to = None


def utc_of(date: Any) -> float | None:
    """Return the UTC seconds of a time as OCPP writes it; None for anything else."""
    try:
        moment = datetime.fromisoformat(date if type(date) is str else "")
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


class Answers:
    """What servers' answers tell, and what the charger hears of them (rules 2 and 3)."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.memory = router.memory

    def text_for_server(self, call: Call) -> str:
        """Return the Call's text with the transaction id that its owner knows by now."""
        session, path = call.session, call.content.facts.transaction
        if session is None or session.server_id is None or not (path and call.content.facts.is_16):
            return call.text  # In 2.x the station picks the ids.
        named = value_at(call.content.payload, path)
        if named == session.server_id and type(named) is type(session.server_id):
            return call.text
        return patch(call.text, (3, *path), session.server_id)

    def words_of(self, message: Message) -> str:
        """Return what a server's answer has against a Call; "" = nothing."""
        if message.type is MessageType.CALLERROR:
            return f"{CALL_ERROR} {message.action} {description_of(message)}".strip()
        status = verdict_of(message.payload)
        return "" if status in (None, "Accepted") else f"status {str(status)[:MAX_SHORT]}"

    def answered(self, call: Call, message: Message, now: Instant) -> list[Decision]:
        """Decide on a server's answer to a Call, late or not; only who still waits hears of it."""
        session, said, words = call.session, call.content, self.words_of(message)
        whose, is_start = call.peer.value if call.peer else "nobody", said.facts.role is Role.START
        badge = said.badge if words else None
        told = [Told(f"{whose} answers {call.action} with {words}", badge)] if badge is not None else []
        # Of a start that was sent twice the charger goes by the answer that came first.
        is_again = is_start and session is not None and session.server_id is not None
        if session and not is_again:
            self._learn(session, call, message, words, now)
        # Where nobody waits for it, the proxy's own answer is on its way to the charger.
        if call.own_answer and (message.type is MessageType.CALLERROR or not self.router.is_awaited(call)):
            return [*told, OwnAnswer(call, f"{whose} cannot answer")]
        reply_to, call.own_answer = call.reply_to, ""
        self.router.stop_waiting(call)
        repeat = self.router.waiting.get((session, said.mark)) if session and reply_to is None else None
        if repeat and repeat.kind is Kind.RELAYED and repeat.sent is None:
            reply_to = repeat.reply_to  # It needs not go out any more.
            self.router.stop_waiting(repeat)
        if reply_to is None:
            return [*told, Dropped("the charger has its answer, or waits no more")]
        if said.facts.role is Role.BOOT:
            self.memory.heartbeat_interval = integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL
            self.memory.note(self.memory)
        text, rows = under_id(message, reply_to), tuple[Row, ...]()
        if session and said.mark and message.type is MessageType.CALLRESULT:
            answer = session.answers.get(said.mark) if is_again else None
            text = result_text(reply_to, answer) if answer else self._told(session, message, text)
            if is_start:
                session.is_told = True
                self.memory.note(session)
            rows = (session,) if said.is_start or said.badge is not None else ()
        # The charger must not know of a session whose owner a restart would forget.
        return [*told, ToCharger(text, f"{whose} answers", rows, needs_disk=False)]

    def _told(self, session: Session, message: Message, text: str) -> str:
        """Return the text of an answer with the transaction id that the charger is told."""
        named, wanted = message.payload.get("transactionId"), session.transaction_id
        is_known = named is None or wanted in (None, named)
        return text if is_known else patch(text, (2, "transactionId"), session.key)

    def _learn(self, session: Session, call: Call, message: Message, words: str, now: Instant) -> None:
        """Note what its owner says to a Call of a session."""
        said, memory, is_16 = call.content, self.memory, call.content.facts.role is Role.START
        if said.mark and not said.is_reading:
            memory.note(session)
        session.refused = words if said.is_start else session.refused
        if message.type is MessageType.CALLERROR:
            return
        if is_16:
            raw = message.payload.get("transactionId")
            session.server_id = raw if type(raw) is str else integer(raw)
            usable, may_name = usable_id(raw, is_16=True), session.transaction_id is None
            is_free = usable is not None and usable not in memory.sessions and not is_proxy_id(usable)
            is_awaited = bool(call.own_answer) and self.router.is_awaited(call)
            if is_free and (may_name or (is_awaited and not session.is_told)):
                memory.add(session, usable)
            elif may_name:
                memory.add(session, self.router.new_transaction_id(session.owner))
        if said.is_stop:
            session.delivered = now.utc
        payload = value_text(self._told(session, message, message.text), (2,))
        if said.mark and not (is_16 and session.is_told) and len(payload) <= MAX_SELF_DESCRIPTION:
            session.answers[said.mark] = payload
            trim(session.answers, MAX_ANSWERS)

    def given(self, call: Call) -> str:
        """Return the proxy's own answer to a Call, for the charger, which waits no more then."""
        text = "" if call.reply_to is None else result_text(call.reply_to, call.own_answer)
        call.own_answer = ""
        self.router.stop_waiting(call)
        if text and call.session and call.content.facts.role is Role.START:
            call.session.is_told = True
            self.memory.note(call.session)
        return text  # "": its charger is gone; a repeat is answered again.

    def delivered(self, call: Call, message: Message, now: Instant) -> str:
        """Take the answer to a stored Call: forget it, or try it again, or keep it as refused.

        Return the server's words for a Call that is tried again or refused; "" = it is delivered.
        """
        memory, session, words = self.memory, call.session, self.words_of(message)
        is_error = message.type is MessageType.CALLERROR
        if is_error and not call.content.is_reading and call.tries < len(RETRY_SECONDS):
            call.not_before, call.sent = now.seconds + RETRY_SECONDS[call.tries], None
            call.tries += 1
            call.message_id = new_message_id()  # SteVe refuses ids that it has seen on the connection.
            call.text = patch(call.text, (1,), call.message_id)
            memory.note(call)
            return words
        named = session.server_id if session else None  # 0 stands for no id at all.
        is_known = named not in (None, "") and not (type(named) is int and named < 1)
        if not is_error and (is_known or call.content.facts.role is not Role.START):
            memory.remove(call)
            return ""
        words = words or "no transaction id"
        memory.refuse(call, words)
        if session and call.content.is_start:
            session.refused, session.is_refused = words, True
            memory.note(session)
            for rest in [other for other in memory.stored if other.session is session]:
                memory.refuse(rest, words)
        return words


# ---------------------------------------------------------------------------------------------------------
# Journal
#
# What outlives a connection and the process: the Memory of every charger, kept in sqlite (`state = none`: in
# memory only). What has changed is written by a thread of its own, all chargers' changes in one transaction
# and one sync: the loop never waits for the disk, and the file always shows a moment between two messages.
# ---------------------------------------------------------------------------------------------------------

MAX_MEMORIES = 10_000  # Chargers that are remembered; beyond it the oldest without anything open go.
MAX_UNLISTED = 100  # Badges that were shown and are on no list; beyond it the oldest goes.
KEEP_SECONDS = 400 * DAY  # Sessions stay in the file for so long.
SAVE_SECONDS = 5.0  # A disk that takes longer counts as failing.
LAST_SAVE_SECONDS = 1.0  # At the end.
LOCK_SECONDS = 2.0  # For another process to let go of the file.
COMPLAINT_SECONDS = 60.0  # Between two WARNINGs about the same trouble.

APPLICATION_ID = 0x6F327770  # "o2wp": marks the file as the proxy's.
SCHEMA_VERSION = 3
FIRST_EDITION = (1, 2)  # Schema versions.
OWED = """SELECT (SELECT count(*) FROM calls WHERE refused IS NULL)
    + (SELECT count(*) FROM sessions WHERE kept != '[]')"""  # Undelivered, in the first edition's tables.
UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # Not: in trouble.
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
MISSHAPEN = (MessageError, ValueError, LookupError, TypeError, AttributeError)  # Of rows of another making.

# Tables and columns are those of the dataclasses.
TABLES: dict[type, str] = {Memory: "chargers", Session: "sessions", Call: "calls"}
KEYS: dict[type, str] = {Memory: "charger TEXT PRIMARY KEY"}
COLUMNS = {kind: [f for f in fields(kind) if f.metadata.get("kept", True)] for kind in TABLES}
SCHEMA = [
    f"CREATE TABLE {table} ({KEYS.get(kind, 'number INTEGER PRIMARY KEY, charger')}, "
    f"{', '.join(column.name for column in COLUMNS[kind])})"
    for kind, table in TABLES.items()
]
SCHEMA += [
    "CREATE INDEX sessions_by_end ON sessions (ended)",
    "CREATE INDEX sessions_by_begin ON sessions (begun)",
    "CREATE INDEX calls_by_session ON calls (session)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
]
KNOWN_SESSIONS = """SELECT * FROM sessions
    WHERE ended IS NULL OR ended > ? OR number IN (SELECT session FROM calls) ORDER BY number"""
PURGE = (
    "DELETE FROM calls WHERE refused != '' AND since BETWEEN 1e9 AND ?",  # Not of a clock before it was set.
    "DELETE FROM sessions WHERE ended BETWEEN 1e9 AND ? AND number NOT IN (SELECT session FROM calls WHERE session)",  # noqa: E501
)
READERS: dict[str, Callable[[Any], Any]] = {  # By the type of an attribute: its value, of a column's.
    "bool": bool,
    "dict": json.loads,
    "list": lambda text: [Claim(**{**claim, "peer": Peer(claim["peer"])}) for claim in json.loads(text)],
    "Peer": lambda value: value and Peer(value),
}


class StateError(Exception):
    """The state file cannot be used, as one line for stderr."""


def to_column(value: Any) -> Any:
    """Return a value of a dataclass as sqlite takes it, whatever a peer has sent."""
    if isinstance(value, Peer):
        return value.value
    if isinstance(value, dict | list):
        return json.dumps(value, default=lambda item: item.value if isinstance(item, Peer) else asdict(item))
    # Half of a surrogate pair is JSON, but no text for sqlite.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def of_row(kind: type, row: Any) -> dict[str, Any]:
    """Return the values of a dataclass that a row holds. Raises one of MISSHAPEN."""
    types = {column.name: re.split(r"\W", str(column.type))[0] for column in COLUMNS[kind]}
    return {name: READERS.get(wanted, lambda value: value)(row[name]) for name, wanted in types.items()}


def prepare(database: sqlite3.Connection, path: Path | None) -> None:
    """Lock the database; make its tables, if it is new. Raises StateError or sqlite3.Error."""
    run = database.execute
    run("PRAGMA locking_mode = EXCLUSIVE")  # Taken with the first access, and held until the end.
    application, version = (
        run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    is_new = not run("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not is_new and application != APPLICATION_ID:
        raise StateError(f"state file {path}: is the database of another program")
    if version in FIRST_EDITION and (owed := run(OWED).fetchone()[0]):
        what = f"holds {owed} messages of version 1 that are not delivered yet"
        raise StateError(f"state file {path}: {what}; let that version deliver them first")
    if not is_new and version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it is of another version ({version}, not {SCHEMA_VERSION})")
    for setting in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 4194304"):
        run(f"PRAGMA {setting}")
    with database:
        run("BEGIN IMMEDIATE")
        for statement in SCHEMA if is_new else ():
            run(statement)


@dataclass(slots=True)
class News:
    """What has happened since the start, for those who look."""

    # By metric and labels, which are words of the proxy's own, or members of its Enums.
    counts: Counter[tuple[str | Enum, ...]] = field(default_factory=Counter)
    # By badge, charger id and UTC seconds of its last showing, the oldest first; MAX_UNLISTED.
    unlisted: dict[str, tuple[str, float]] = field(default_factory=dict)
    present: set[str] = field(default_factory=set)  # Ids of the chargers that are connected; MAX_CHARGERS.

    def count(self, metric: str, *labels: str | Enum) -> None:
        """Count one more."""
        self.counts[metric, *labels] += 1


class Journal:
    """Keeps the Memory of every charger, and saves what has changed in it."""

    def __init__(self, clock: Callable[[], Instant], path: Path | None = None) -> None:
        """Take what the file knows. Raises StateError, sqlite3.Error or one of MISSHAPEN."""
        self.clock = clock
        self.path = path  # None: in memory only.
        self.news = News()
        self.memories: dict[str, Memory] = {}  # By charger id; MAX_MEMORIES.
        # Rows that the disk does not know so, each with the Memory that it belongs to; None = it is gone.
        self.pending: dict[Row | Memory, Memory | None] = {}
        self.writing: dict[Row | Memory, Memory | None] = {}  # Those that the thread is at.
        self.waiters: dict[Callable[[], None], None] = {}  # Called after the next save, whatever came of it.
        self.is_closed = False  # There is no next save.
        self.failure = ""  # Why the last save failed; "" = it did not.
        self.begun = 0.0  # Monotonic seconds; when the last save began, of those that fail the first.
        self.complain_at = self.purge_at = 0.0  # Monotonic seconds.
        self.writer = ThreadPoolExecutor(1, "journal")
        self.database = sqlite3.connect(path or ":memory:", timeout=LOCK_SECONDS, check_same_thread=False)
        self.database.row_factory = sqlite3.Row
        with ExitStack() as to_undo:
            to_undo.callback(self.database.close)
            prepare(self.database, path)
            self._load(clock().utc)
            to_undo.pop_all()

    @classmethod
    def open(cls, path: Path, clock: Callable[[], Instant]) -> Self:
        """Return the journal in the file; one that is unreadable is set aside. Raises StateError."""
        words = ""
        try:
            path.touch(0o600)  # It holds badges.
            try:
                return cls(clock, path)
            except (sqlite3.Error, *MISSHAPEN) as error:
                code, words = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF, str(error)
            if code not in UNREADABLE:
                advice = "another process uses it; stop that one, or name another file with `state`"
                raise StateError(f"state file {path}: {advice if code in BUSY else words}")
            date = datetime.fromtimestamp(clock().utc, UTC).strftime("%Y%m%d-%H%M%S")
            aside = f"{path}.unreadable-{date}"
            for suffix in ("-wal", ""):
                if (part := Path(f"{path}{suffix}")).exists():
                    part.rename(aside + suffix)
        except OSError as error:
            raise StateError(f"state file {path}: {words and f'{words}; '}{error.strerror}") from None
        what = "state file %s cannot be used: %s; a new one is begun, the old one is kept as %s, undelivered"
        log.error(what, path, words, aside)
        return cls.open(path, clock)

    def _load(self, utc: float) -> None:
        read, sessions = self.database.execute, dict[int, Session]()
        for row in read("SELECT * FROM chargers"):
            memory = Memory(row["charger"], changed=self.pending, **of_row(Memory, row))
            self.memories[memory.charger_id] = memory
            for claim in memory.claims:  # None outlives a clock that was set back.
                if claim.reservation is None:
                    claim.until = min(claim.until, utc + CLAIM_SECONDS)
        for row in read(KNOWN_SESSIONS, [utc - SESSION_SECONDS]):
            session = sessions[row["number"]] = Session(number=row["number"], **of_row(Session, row))
            self.memory(row["charger"]).sessions[session.key] = session
        for row in read("SELECT * FROM calls ORDER BY number"):
            message, memory = parse(row["text"]), self.memory(row["charger"])
            said = content_of(VOCABULARIES[row["version"]].charger, message)
            call = Call(Kind.STORED, message.action, message.message_id, content=said, **of_row(Call, row))
            call.number, call.session = row["number"], sessions.get(row["session"])
            memory.refused.append(call) if call.refused else memory.keep(call)
        largest = (read(f"SELECT max(number) FROM {table}").fetchone()[0] for table in ("sessions", "calls"))
        self.numbers = itertools.count(1 + max(number or 0 for number in largest))  # Of rows that are new.
        for memory in self.memories.values():
            memory.retry(utc)

    # What is kept.

    def memory(self, charger_id: str) -> Memory:
        """Return the Memory of a charger, a new one if there is none."""
        if charger_id not in self.memories:
            self.has_room(charger_id)
            memory = self.memories[charger_id] = Memory(charger_id, changed=self.pending)
            memory.note(memory)
        return self.memories[charger_id]

    def has_room(self, charger_id: str) -> bool:
        """Whether a charger is remembered, or can be: the oldest idle one is forgotten for it."""
        if charger_id in self.memories or len(self.memories) < MAX_MEMORIES:
            return True
        idle = next((memory for memory in self.memories.values() if not memory.is_needed), None)
        if idle:
            del self.memories[idle.charger_id]
            idle.note(idle, is_there=False)
        return idle is not None

    # Saving.

    def has(self, *rows: Row | Memory | None) -> bool:
        """Whether the disk knows these rows as they are; None is no row."""
        return not any(row in self.pending or row in self.writing for row in rows)

    def wait(self, then: Callable[[], None]) -> None:
        """Call `then` after the next save, also if it fails; asked for twice, once."""
        if not (self.waiters or self.writing or self.failure):
            self._save_soon()
        self.waiters[then] = None

    def _save_soon(self) -> None:
        """Save at the end of this turn of the loop, when every message of it has been dealt with."""
        asyncio.get_running_loop().call_soon(self.save)

    def tick(self) -> None:
        """Save what nobody waits for; notice a disk that does not answer; remove what is too old."""
        now = self.clock()
        self.save()
        if self.writing and now.seconds >= self.begun + SAVE_SECONDS:
            self._tell(self.failure or f"no answer for {SAVE_SECONDS:g} s")
        if now.seconds >= self.purge_at:
            self.purge_at, old = now.seconds + DAY, (now.utc - KEEP_SECONDS,)
            self._run(partial(self._write, [(statement, old) for statement in PURGE]), lambda _: None)

    def save(self) -> None:
        """Hand over to the thread what has changed, unless it is still at the last save."""
        if self.writing or self.is_closed:
            return
        self.begun = self.begun if self.failure else self.clock().seconds
        self.writing = dict(self.pending)
        self.pending.clear()
        statements = [self._statement(row, memory) for row, memory in self.writing.items()]
        self._run(partial(self._write, statements), self._saved) if statements else self._saved("")

    def _statement(self, row: Row | Memory, memory: Memory | None) -> tuple[str, list[Any]]:
        is_memory, table = isinstance(row, Memory), TABLES[type(row)]
        key: list[Any] = [row.charger_id if isinstance(row, Memory) else self._numbered(row)]
        if memory is None:
            return f"DELETE FROM {table} WHERE {'charger' if is_memory else 'number'} = ?", key
        key += [] if is_memory else [memory.charger_id]
        values = [getattr(row, column.name) for column in COLUMNS[type(row)]]
        values = [self._numbered(v) if isinstance(v, Session) else to_column(v) for v in values]
        return f"INSERT OR REPLACE INTO {table} VALUES (?{', ?' * (len(key + values) - 1)})", key + values

    def _numbered(self, row: Row) -> int:
        row.number = row.number or next(self.numbers)
        return row.number

    def _run(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Let the thread do a job, and the loop then what follows."""
        done = asyncio.get_running_loop().run_in_executor(self.writer, job)
        done.add_done_callback(lambda done: then(done.result()))

    def _write(self, statements: list[tuple[str, Any]]) -> str:
        """Write it all and see it safely on disk, or nothing of it: return why. Runs in the thread."""
        try:
            with self.database:
                for statement, values in statements:
                    self.database.execute(statement, values)
        except sqlite3.Error as error:
            return str(error)
        return ""

    def _saved(self, error: str) -> None:
        """Take note of how a save went; what failed is merged back, for the next one."""
        if error:
            self.pending.update(self.writing | self.pending)
        elif self.failure:
            log.info("state file %s can be written again; what waited for it goes on", self.path)
        self.writing = {}
        self._tell(error)

    def _tell(self, error: str) -> None:
        """Let those who wait know that a save is over, or given up; "" = it went well."""
        self.failure, now = error, self.clock().seconds
        if error and now >= self.complain_at:
            self.complain_at = now + COMPLAINT_SECONDS
            what = "relayed traffic goes on, what the proxy itself would have to keep stays unanswered"
            log.warning("state file %s cannot be written: %s; %s", self.path, error, what)
        for then in list(self.waiters):
            del self.waiters[then]  # First: one that fails must not take the others' turn.
            then()

    def look_up(self, query: str, values: Any = ()) -> asyncio.Future[list[dict[str, Any]]]:
        """Return rows as they are on disk; the future may raise sqlite3.Error."""

        def job() -> list[dict[str, Any]]:
            return [dict(row) for row in self.database.execute(query, values)]

        return asyncio.get_running_loop().run_in_executor(self.writer, job)

    async def close(self) -> None:
        """Save the last changes and let go of the file; a disk that takes too long is left behind."""
        until = self.clock().seconds + LAST_SAVE_SECONDS
        while (self.pending or self.writing) and self.clock().seconds < until:
            self.save()
            await asyncio.sleep(LAST_SAVE_SECONDS / 100)
        if self.pending or self.writing:
            reason = self.failure or "the disk is too slow"
            log.error("state file %s: the last changes may be lost: %s", self.path, reason)
        if not self.is_closed:
            self.is_closed = True
            self.writer.submit(self.database.close)
            self.writer.shutdown(wait=False)


# ---------------------------------------------------------------------------------------------------------
# Link
#
# One websocket: bytes to texts and back, for all three peers alike. An asyncio.BufferedProtocol drives the
# Sans-I/O layer of websockets, so a message is handled in the callback that received it: no task waits for
# it and nothing is awaited between its arrival and the decision on it. The library gets whole frames only;
# the frame that nearly every message is, one whole text, is read and written here.
# ---------------------------------------------------------------------------------------------------------

DIAL_SECONDS = 8.0  # From the decision to dial a server to its 101; less than a charger's patience.
NEXT_ADDRESS_SECONDS = 2.0  # For one of a server's addresses, before the next is tried.
HANDSHAKE_SECONDS = 10.0  # From a charger's TCP connection to its complete request.
CLOSE_SECONDS = 3.0  # From a Close frame to the end of the TCP connection, then it is cut.
PROBE_SECONDS = 5.0  # For the Pong of a charger whose place a newcomer wants.
MAX_EARLY_BYTES = 2**16  # Before there is somebody to hear them; a charger's request must not be longer.
MAX_FRAGMENTS = 4096  # Of one message, empty ones, too; the Sans-I/O layer itself sets no limit.
MAX_WRITE_BUFFER = 2**20  # Bytes that a peer may leave unread before it is cut off, but for the last message.
MAX_SUBJECTS = 1000  # Of WARNINGs that are held back; beyond it the oldest is forgotten.
MAX_DIALS = {Peer.PRIMARY: 150, Peer.SECONDARY: 50}  # At a time: secondaries that hang delay no charger.

# For a peer whose machine is gone without a word; where the system knows them.
SOCKET_OPTIONS = {
    "TCP_USER_TIMEOUT": 60_000,  # Milliseconds until what is not acknowledged ends the connection.
    "TCP_KEEPIDLE": 60,  # Seconds of silence until the system asks whether the peer is there,
    "TCP_KEEPINTVL": 15,  # between two questions,
    "TCP_KEEPCNT": 4,  # and how many.
}

# One buffer for all links: it is read out in the same callback that filled it. A view, because asyncio's TLS
# fills slices of it, and slices of a bytearray are copies.
RECEIVE_BUFFER = memoryview(bytearray(2**16))

# Not a logger of the library's own, whose DEBUG lines would show credentials.
LIBRARY_LOG = logging.getLogger("proxy.websockets")
LIBRARY_LOG.setLevel(logging.WARNING)

# Frames (RFC 6455 5.2). A lone text is read and written here, in a quarter of the library's time.

TEXT_FRAME = 0x80 | Opcode.TEXT  # The first byte of a frame that holds a whole text.
IS_MASKED = 0x80  # A bit of the second byte; its others are the length,
LENGTH_16, LENGTH_64 = 126, 127  # or say that the length stands behind it, in 16 or 64 bits.
MASKS_AT_ONCE = 1024


def frame_in(data: bytearray) -> tuple[int, int] | None:
    """Return where the payload of the first frame begins and ends; None while its head is not complete."""
    if len(data) < 2:
        return None
    length, start = data[1] & ~IS_MASKED, 2
    if length >= LENGTH_16:
        start = 4 if length == LENGTH_16 else 10
        length = int.from_bytes(data[2:start], "big")
    start += 4 if data[1] & IS_MASKED else 0
    return (start, start + length) if len(data) >= start else None


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


# What to change in the ini when a server refuses the proxy's handshake.
ADVICE = {
    401: "check {peer}_user and {peer}_password, or {peer}_auth",
    403: "check {peer}_user and {peer}_password, or {peer}_auth",
    404: "check the address, and that the server knows this charger; {peer}_id replaces its id",
    400: "see versions: the server may not speak what it was offered",
    101: "check versions: the server does not speak this one",
    **dict.fromkeys((301, 302, 303, 307, 308), "nobody is followed: put its new address into the ini"),
}
CERTIFICATE_ADVICE = "set {peer}_ca to the server's certificate, or check the name in its address"


def advice_for(error: DialError, peer: Peer, otherwise: str) -> str:
    """Return what a person can do about a dial that failed."""
    advice = CERTIFICATE_ADVICE if error.is_certificate_unfit else ADVICE.get(error.status or 0, otherwise)
    return advice.format(peer=peer.value)


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
        self.max_size = protocol.max_message_size or 0  # Bytes of a message.
        self.is_client = protocol.side is Side.CLIENT  # What it sends is masked, what it gets is not.
        self.on_connected = on_connected
        self.loop = asyncio.get_running_loop()
        self.handshake: asyncio.Future[Request | Response] = self.loop.create_future()
        self.transport: asyncio.Transport | None = None  # Set by connection_made.
        self.user: LinkUser | None = None  # Set by attach; frames that come before it wait in `rest`.
        self.rest = bytearray()  # What has come in and is no whole frame yet; one frame, or MAX_EARLY_BYTES.
        self.is_past_head = False  # The head of the handshake that comes in is complete; until then it
        self.head = 0  # stays in `rest`, and the library has read so many bytes of it.
        self.fragments: list[bytes] = []  # Of the message that comes in; MAX_FRAGMENTS, max_size.
        self.arrived = self.loop.time()  # Monotonic seconds of the TCP connection.
        self.opened = 0.0  # Monotonic seconds of the handshake's end.
        self.seen = self.loop.time()  # Monotonic seconds of the last bytes that came in.
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
        return self.protocol.state is State.OPEN and not self.is_closed

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
        if self.handshake.done() and not self.handshake.exception():
            self.handshake.result().headers.clear()  # The library keeps them for as long as it lives.
        self._take()
        if self.is_closed:
            self._end_of_input()
            user.link_closed(self)
        elif self.transport and not self.transport.is_closing():
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
            if self.transport and not self.transport.is_closing():
                self.transport.resume_reading()  # To see the peer close it, too.
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
        self.seen = self.loop.time()
        self.rest += RECEIVE_BUFFER[:nbytes]
        self._take()

    def eof_received(self) -> None:
        if self.user or not self.handshake.done():
            self._end_of_input()

    def connection_lost(self, _exc: Exception | None) -> None:
        if self.user or not self.handshake.done():
            self._end_of_input()
        self.ended.set_result(None)
        if self.cutter:
            self.cutter.cancel()
        for waiter in self.pong_waiters:
            waiter.cancel()
        if self.user:
            self.user.link_closed(self)

    # What comes in and what goes out.

    def _take(self) -> None:
        """Take what has come in, by whole frames: the library never holds a part of one."""
        if not self.is_past_head:
            self._take_head()
        if self.is_past_head and not self.handshake.done():  # The body of a refusal.
            body, self.rest = self.rest, bytearray()
            self._feed(body)
        while self.user and (bounds := frame_in(self.rest)):
            start, end = bounds
            is_short = end - start <= self.max_size
            if end > len(self.rest) and is_short:
                break  # A longer one is refused by its head.
            frame = self.rest[:end]
            del self.rest[:end]
            is_lone = is_short and frame[0] == TEXT_FRAME and not self.fragments
            is_masked = bool(frame[1] & IS_MASKED)
            if is_lone and is_masked is not self.is_client and self.protocol.state is State.OPEN:
                self._text(
                    apply_mask(frame[start:], frame[start - 4 : start]) if is_masked else frame[start:]
                )
            else:
                self._feed(frame)
        if self.user is None and len(self.rest) > MAX_EARLY_BYTES and self.transport:
            self._mind_early(self.transport)

    def _take_head(self) -> None:
        """Let the library read what has come of a handshake's head, and nothing that stands behind it."""
        end = self.rest.find(b"\r\n\r\n", max(self.head - 3, 0)) + 4
        self.is_past_head = end > 3
        piece = self.rest[self.head : end if self.is_past_head else None]
        self.head += len(piece)
        if self.is_past_head:
            del self.rest[:end]
            self.head = 0
        self._feed(piece)

    def _mind_early(self, transport: asyncio.Transport) -> None:
        """Bound what a peer sends before there is somebody to hear it."""
        if self.handshake.done() and not transport.is_closing():
            transport.pause_reading()
        elif not self.handshake.done():
            self.abort(f"its handshake is longer than {MAX_EARLY_BYTES} bytes")

    def _feed(self, data: bytes | bytearray) -> None:
        """Let the library read, and do what it makes of it."""
        if not self.protocol.reader.eof:
            self.protocol.receive_data(data)
        self._process()

    def _end_of_input(self) -> None:
        """Let the library know that nothing more will come."""
        if not self.protocol.reader.eof:
            self.protocol.receive_data(self.rest[self.head :])
            self.protocol.receive_eof()
        self._process()

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
            self._fail_handshake(DialError(self.cut_because or self._what_came_instead()))
        self._flush()

    def _what_came_instead(self) -> str:
        """Say what a peer has sent that is no HTTP; all of it stands in `rest`."""
        if isinstance(self.protocol, ClientProtocol) and not self.protocol.uri.secure:
            if self.rest.startswith(b"\x15\x03"):  # An alert.
                return "that port speaks TLS: wss://"
            if not (self.rest or self.is_past_head):  # As OpenSSL does.
                return "it hangs up without a word; perhaps that port speaks TLS: wss://"
        return f"no HTTP: {self.protocol.handshake_exc}"

    def _frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.PONG:
            self.has_ponged = True
            waiters, self.pong_waiters = self.pong_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        elif frame.opcode is Opcode.BINARY:
            self._fail(1003, "OCPP-J is text")
        elif frame.opcode in (Opcode.TEXT, Opcode.CONT):
            self.fragments.append(bytes(frame.data))
            if len(self.fragments) > MAX_FRAGMENTS:
                self.fragments = []
                self._fail(1009, f"more than {MAX_FRAGMENTS} fragments")
            elif frame.fin:
                data, self.fragments = b"".join(self.fragments), []
                self._text(data)

    def _text(self, data: bytes | bytearray) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self._fail(1007, "text is not UTF-8")
            return
        if self.user and text and not text.isspace():  # Some chargers send empty texts to keep alive.
            self.user.link_received(self, text)

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


@contextmanager
def told_to_people(url: str) -> Iterator[None]:
    """Raise DialError, in a person's words, for what can go wrong with a connection."""
    try:
        yield
    except TimeoutError:
        raise DialError(f"no answer within {DIAL_SECONDS:g} s") from None
    except (OSError, UnicodeError) as error:
        words = str(error)
        if isinstance(error, ConnectionRefusedError):
            words = "nobody listens there"
        elif isinstance(error, socket.gaierror | UnicodeError):
            words = f"its name is not known ({error})"
        elif isinstance(error, ssl.SSLError) and error.reason in (
            "WRONG_VERSION_NUMBER",
            "RECORD_LAYER_FAILURE",
        ):
            words = "that port speaks no TLS: ws://"
        elif isinstance(error, ConnectionResetError) and url.startswith("wss:"):
            words = "it hangs up on TLS; perhaps that port speaks none: ws://"
        raise DialError(words, cause=error) from None


class Dialer:
    """Opens links to servers: a bounded number at a time, with one SSL context for all links of a server."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.places = {peer: asyncio.Semaphore(most) for peer, most in MAX_DIALS.items()}
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
        link = Link(protocol)
        with ExitStack() as to_undo, told_to_people(server.url):
            to_undo.callback(link.abort)
            async with asyncio.timeout(DIAL_SECONDS), self.places[peer]:
                await self._connect(lambda: link, server)
                link.request(self._request(protocol, server, name, credentials))
                await link.handshake
            to_undo.pop_all()
        return link

    async def _connect(
        self, make: Callable[[], asyncio.BaseProtocol], server: ServerConfig
    ) -> asyncio.BaseTransport:
        """Connect to the first of the server's addresses that answers. Raises OSError or UnicodeError."""
        uri, loop = uri_of(server.url), asyncio.get_running_loop()
        context = self._context(server) if uri.secure else None
        name = uri.host if context else None
        *others, last = await self.resolver.addresses(uri.host, uri.port)
        for address in others:
            with suppress(OSError):  # As if it were not there; what the last one says is told.
                async with asyncio.timeout(NEXT_ADDRESS_SECONDS):
                    place = address[4][:2]
                    transport, _ = await loop.create_connection(
                        make, *place, ssl=context, server_hostname=name
                    )
                return transport
        transport, _ = await loop.create_connection(make, *last[4][:2], ssl=context, server_hostname=name)
        return transport

    async def certificate(self, server: ServerConfig) -> dict[str, Any]:
        """Return the certificate that a wss:// server shows, as `ssl` reads it. Raises DialError."""
        with told_to_people(server.url):
            async with asyncio.timeout(DIAL_SECONDS):
                transport = await self._connect(asyncio.Protocol, server)
        certificate: dict[str, Any] = transport.get_extra_info("peercert")
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
        return certificate

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
# All that goes to one server of one charger: what waits, the one Call in flight, the boot, the connection.
# One link at a time: while it is being closed it still delivers answers; the next is dialled then.
# ---------------------------------------------------------------------------------------------------------

PASSING_SECONDS = 5.0  # What passes holds the place in flight for so long, anything else `call_timeout`.
ANSWER_SECONDS = 10.0  # `forward`: the charger waits for the secondary's answer for so long,
AWAITED_SECONDS = 5.0  # and for a secondary that has just gone, or is just connecting.
DELIVERY_SECONDS = 120.0  # A secondary that leaves a stored Call unanswered for so long is disconnected.
OWN_BOOT_SECONDS = 2.0  # A charger that has connected may send its BootNotification itself.
MADE_UP_BOOT_SECONDS = 10.0  # After that, an unknown charger's is made up; its own primary does without.
BOOT_RETRY_SECONDS = 60.0  # Where the server does not say when to ask again.
REDIAL_SECONDS = {Peer.PRIMARY: (0.0, 5.0), Peer.SECONDARY: (1.0, 60.0)}  # The first pause, the longest.
STEADY_SECONDS = 5.0  # A lost server is back when its connection has stood for so long.
STOOD_SECONDS = 60.0  # A connection that stood for so long makes the next redial a first one.
VERSION_SECONDS = 3600.0  # Between two tries of a version that the server has refused.
MAX_LATE = 64  # Calls on one connection whose answer, however late, may still tell something.
MAX_LIVE = 1000  # Calls that are not stored and wait for one server;
MAX_LIVE_TEXT = 2**22  # characters of them.


LATE = "%s: an answer that nobody waits for is dropped"


class OutboxOwner(Protocol):
    """What an Outbox needs of its Relay."""

    charger_id: str
    version: str
    credentials: Credentials
    host: HostConfig
    link: Link | None  # The charger's.
    memory: Memory
    journal: Journal
    router: Router
    commands: Commands
    answers: Answers
    dialer: Dialer
    tasks: Tasks
    complaints: Complaints
    now: Callable[[], Instant]
    deadline: float  # Monotonic seconds; 0 = `tick` is called soon.

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Do what the router has decided."""

    def server_said(self, peer: Peer, message: Message) -> None:
        """Take a message of the server that is no answer."""


def message_of(text: str, link: Link, version: str, name: str, owner: OutboxOwner) -> Message | None:
    """Return what a peer has sent; None = it is dropped with a WARNING, a Call with a CallError."""
    log.debug("%s > %s", name, text)
    try:
        return parse(text)
    except MessageError as error:
        owner.journal.news.count("dropped_messages", "malformed")
        what = "%s: a message is dropped: %s: %s"
        owner.complaints.say(logging.WARNING, f"{name} text", what, name, error, text)
        if error.message_id is not None:
            link.send(error_text(error.message_id, VOCABULARIES[version].malformed, str(error)))
        return None


class Outbox:
    """One server of one charger. Owns the server's link and the lists of what goes to it."""

    def __init__(self, owner: OutboxOwner, peer: Peer, server: ServerConfig) -> None:
        self.owner = owner
        self.peer = peer
        self.server = server
        self.news = owner.journal.news
        self.name = f"{owner.charger_id}: {peer.value}"
        self.version = owner.version  # That the link speaks, or the next one is to speak.
        self.own: list[Call] = []  # The proxy's: boot, statuses, Heartbeat; they go first. MAX_STATUSES.
        self.live: list[Call] = []  # Relayed and passing ones; MAX_LIVE.
        self.stored: list[Call] = []  # Those that this connection may carry; MAX_STORED.
        self.awaited: dict[Call, float] = {}  # `forward`: until when the charger waits; monotonic seconds.
        self.in_flight: Call | None = None  # Holds the one place; the next Call waits for its answer.
        # What may still be answered, by link and message id: also on a link that is being closed. MAX_LATE.
        self.sent: dict[Link, dict[str, Call]] = {}
        self.answered: Call | None = None  # The last stored one; the next goes when the disk knows it gone.
        self.is_silent = False  # It let an awaited Call time out and has answered nothing since.
        self.link: Link | None = None
        self.dialing: asyncio.Task[None] | None = None
        # Monotonic seconds of the next step: to dial; connected, to send it a boot; booted, a Heartbeat.
        self.next_at = math.inf
        self.redial_after = REDIAL_SECONDS[peer][0]  # Seconds; grows with each dial.
        self.trouble = ""  # Why it is not connected, as it was logged last.
        self.other_version_at = 0.0  # When another version than the charger's may be tried again; monotonic.
        self.lost_at = 0.0  # Monotonic seconds; when it was lost, or had to accept the charger anew.
        self.is_booted = False  # The server accepted a BootNotification on this connection.
        self.heartbeat_interval = 0.0  # Seconds, as the server asked for.
        self.fill()

    def waiting(self) -> list[Call]:
        """Return the stored Calls for this server, in whatever version."""
        address, stored = self.server.url, self.owner.memory.stored
        return [call for call in stored if call.peer is self.peer and call.server == address]

    def fill(self) -> None:
        """Take the stored Calls that this connection may carry."""
        self.stored = [call for call in self.waiting() if call.version == self.version]

    def put(self, call: Call) -> None:
        """Take a Call for this server."""
        call.queued = now = self.owner.now().seconds
        self.owner.deadline = 0.0
        if call.kind is Kind.STORED:
            self.stored += [call] if call.version == self.version else []
        elif len(self.live) < MAX_LIVE and sum(len(old.text) for old in self.live) <= MAX_LIVE_TEXT:
            self.live.append(call)
        else:
            self.owner.router.stop_waiting(call)
            self.news.count("dropped_messages", "queue-full")
            what = f"{self.name}: {len(self.live)} Calls wait for it; each new one is dropped, now"
            self.owner.complaints.say(logging.WARNING, "queue", "%s %s", what, call.action)
            return
        if call.own_answer and call.reply_to is not None and self.owner.router.is_awaited(call):
            self.awaited[call] = now + min(ANSWER_SECONDS, self.owner.host.call_timeout)
            self._answer_awaited(now)
        self.pump()

    def copy(self, call: Call) -> None:
        """Take a copy, which is made only while there is a connection; a boot waits for the next."""
        if self.version != self.owner.version or (self.link and not self.link.is_open):
            return
        if call.action == "BootNotification":
            self.own, self.is_booted = [call], False
            if self.link:
                self.next_at, self.lost_at = math.inf, self.owner.now().seconds
            self.pump()
        elif self.link:
            self.put(call)

    def _answer_awaited(self, now: float) -> None:
        """Let the proxy answer what the charger has waited for long enough."""
        is_away = not self.is_booted and now >= self.away_since + AWAITED_SECONDS
        for call, until in list(self.awaited.items()):
            is_late = now >= until
            older = self.stored[: self.stored.index(call)] if call in self.stored else self.stored
            has_older = any(not (old.own_answer or old.was_kept) for old in older)
            if not call.own_answer:
                del self.awaited[call]
            elif is_late or is_away or has_older or self.is_silent:
                self.is_silent = self.is_silent or (is_late and call.sent is not None)
                del self.awaited[call]
                self.owner.carry_out([OwnAnswer(call, f"{self.peer.value} does not answer in time")])

    # What goes out.

    @property
    def is_wanted(self) -> bool:
        """Whether a connection to this server is needed."""
        return self.owner.link is not None or (bool(self.waiting()) and not self.server.needs_charger_login)

    @property
    def is_the_chargers(self) -> bool:
        """Whether the link is the one that the primary accepted for the charger."""
        return self.peer is Peer.PRIMARY and self.owner.link is not None

    @property
    def away_since(self) -> float:
        """Since when the charger is without this server, if it is; in monotonic seconds."""
        return max(self.lost_at, self.owner.link.opened if self.owner.link else 0.0)

    def pump(self) -> None:
        """Send what may be sent now."""
        now = self.owner.now().seconds
        while self.link and self.link.is_open and self.in_flight is None:
            if now >= self.next_at and not self.is_booted:
                self._greet()
            call = self.own.pop(0) if self.own else self._next(now)
            if call is None and now >= self.next_at:  # Any other message tells as much as a Heartbeat.
                self.next_at, call = now + self.heartbeat_interval, own_call("Heartbeat", "{}")
            if call is None:
                return
            text = self.owner.answers.text_for_server(call)
            log.debug("%s < %s", self.name, text)
            self.link.send(text)
            call.sent, self.owner.deadline = now, 0.0
            self.in_flight = self.sent.setdefault(self.link, {})[str(call.message_id)] = call
            late = [name for name, old in self.sent[self.link].items() if old.kind is not Kind.STORED]
            if len(late) > MAX_LATE:
                del self.sent[self.link][late[0]]

    def _next(self, now: float) -> Call | None:
        """Return the first Call that may go, by time of arrival; a stored one may have to wait."""
        if self.peer is Peer.SECONDARY and not self.is_booted:
            return None
        owner, live, first = self.owner, self.live, self.stored[0] if self.stored else None
        silence = now - first.sent if first and first.sent is not None else 0.0
        patience, stuck = owner.host.call_timeout, set[Session | None]()
        if first and (now < first.not_before or silence >= patience):
            here = self.sent.get(self.link, {}).values() if self.link else ()  # Not what another one carried.
            late = [call for call in here if call.sent is not None and now >= call.sent + patience]
            stuck = {call.session for call in self.stored if now < call.not_before or call in late}
        if silence >= DELIVERY_SECONDS:
            first = next((call for call in self.stored if call.session not in stuck), None)
        head = first if first and self._may_deliver(first, now) else None
        # Within a session by arrival; but a stored Call that fails holds up no verdict.
        behind = {c.session for c in self.stored} - stuck if live and not owner.journal.failure else set()
        if live and self.answered and not (owner.journal.has(self.answered) or owner.journal.failure):
            behind.add(self.answered.session)  # A restart would send that one again.
            owner.journal.wait(self.pump)
        for call in list(live) if self.version == owner.version else ():
            if head and head.queued <= call.queued:
                break
            if call.session is None or call.session not in behind:
                live.remove(call)
                if call.kind is Kind.PASSING or call.reply_to is not None:
                    return call
        return head

    def _may_deliver(self, call: Call, now: float) -> bool:
        """Whether nothing is in the way of the next stored Call: the boot, the last one, the disk."""
        assert self.link is not None, "only what has a link sends"
        needs_no_boot = self.is_the_chargers and now >= self.link.opened + MADE_UP_BOOT_SECONDS
        if call.sent is not None or now < call.not_before or not (self.is_booted or needs_no_boot):
            return False
        is_saved = self.owner.journal.has(call, self.answered)
        if not is_saved:
            self.owner.journal.wait(self.pump)  # A restart must find this one here, and the last one gone.
        return is_saved

    def _greet(self) -> None:
        """Send the charger's last boot, or a made-up one."""
        self.next_at = math.inf
        memory, model = self.owner.memory, dump((self.server.id or self.owner.charger_id)[:20])
        payload = Template(VOCABULARIES[self.version].boot).substitute(model=model)
        if memory.boot and memory.version == self.version:
            payload = value_text(memory.boot, (3,))
        self.own.append(own_call("BootNotification", payload))

    def link_received(self, link: Link, text: str) -> None:
        message = message_of(text, link, self.version, self.name, self.owner)
        if message and message.type in (MessageType.CALLRESULT, MessageType.CALLERROR):
            self._answered(link, message)
        elif message and link is self.link:
            self.owner.server_said(self.peer, message)

    def _answered(self, link: Link, message: Message) -> None:
        call = self.sent.get(link, {}).pop(str(message.message_id), None)
        if call is self.in_flight:
            self.in_flight = None
        if call is None:
            self.news.count("dropped_messages", "nobody-waits")
            self.owner.complaints.say(logging.INFO, f"{self.peer} late", LATE, self.name)
            return
        self.is_silent = False
        if call.action == "BootNotification":
            self._boot_answered(message, is_own=call.content is NOTHING)
        if call.kind is Kind.RELAYED and call.reply_to is not None:
            self.news.count("calls", Peer.CHARGER, self.peer, outcome_of(message))
        if call.content is not NOTHING:
            self.owner.carry_out(self.owner.answers.answered(call, message, self.owner.now()))
        if call.kind is Kind.STORED:
            self._delivered(call, message)
        self.pump()

    def _delivered(self, call: Call, message: Message) -> None:
        """Take the answer to a stored Call."""
        memory = self.owner.memory
        words = self.owner.answers.delivered(call, message, self.owner.now())
        if call in memory.stored:
            log.warning("%s: %s got a %s; it is tried again", self.name, call.action, words)
            return
        self.answered = call
        self.owner.journal.wait(self.pump)  # A kill before that sends it again.
        for refused in (other for other in self.stored if other.refused):
            self.news.count("refused_calls", self.peer)
            what = "is refused" if refused is call else "is not sent: its session is refused"
            then = "; tried again at the next start, and once a day" if refused.has_error else ""
            values = (self.name, refused.action, what, words, then, refused.text)
            log.warning("%s: %s %s (%s) and kept%s: %s", *values)
        if words:
            self.stored = [other for other in self.stored if other in memory.stored]
        elif call in self.stored:  # Most often it is the first.
            self.stored.remove(call)
        if not words:
            self.news.count("delivered_calls", self.peer)
            kind = call.content.payload.get("eventType", "")  # Of a TransactionEvent.
            level = logging.DEBUG if call.content.is_reading else logging.INFO
            last = "" if self.stored or self.owner.link else "; it was the last"
            log.log(level, "%s: %s is delivered%s", self.name, f"{call.action} {kind}".strip(), last)

    def _boot_answered(self, message: Message, is_own: bool) -> None:
        now = self.owner.now().seconds
        status = message.payload.get("status") if message.type is MessageType.CALLRESULT else message.action
        interval = min(max(integer(message.payload.get("interval")) or 0, 0), DAY)
        if status != "Accepted":
            wait = interval or BOOT_RETRY_SECONDS
            self.is_booted = False
            if is_own:
                self.next_at = now + wait
                log.warning("%s: answers the boot with %s; asked again in %g s", self.name, status, wait)
            return
        log.info("%s: accepts the charger", self.name)
        self.is_booted, self.next_at = True, math.inf
        if self.peer is Peer.SECONDARY:
            self.heartbeat_interval = interval or HEARTBEAT_INTERVAL
            self.next_at = now + self.heartbeat_interval
        if is_own and self.owner.memory.version == self.version:
            statuses = [value_text(text, (3,)) for text in self.owner.memory.statuses.values()]
            self.own += [own_call("StatusNotification", payload) for payload in statuses]
            self.live = [c for c in self.live if c.action != "StatusNotification" or c.kind is Kind.RELAYED]

    # The connection.

    def connected(self, link: Link, needs_boot: bool) -> None:
        """Take a link that has just been opened; the one before it is closed."""
        now, charger = self.owner.now().seconds, self.owner.link
        if self.dialing:
            self.dialing.cancel()  # This link is not to be replaced by it.
            self.dialing = None
        if self.link:
            self._let_go(self.link)
        self.link, self.version = link, link.protocol.subprotocol or "ocpp1.6"
        self.trouble, self.next_at, self.owner.deadline = "", math.inf, 0.0
        self.fill()
        if needs_boot and not self.own:
            self.next_at = now
            if charger and self.peer is Peer.SECONDARY and self.version == self.owner.version:
                # The charger may be about to send one itself.
                patience = OWN_BOOT_SECONDS if self.owner.memory.boot else MADE_UP_BOOT_SECONDS
                self.next_at = max(now, charger.opened + patience)
        log.info("%s: connected to %s", self.name, self.server.url)
        self.news.count("connections", self.peer)
        link.keep_alive(now, self.owner.host.ping_interval)
        link.attach(self)
        self.pump()

    def _wanted_version(self) -> str:
        """Return the version to speak: the charger's, unless only Calls of another one are left."""
        owner, versions = self.owner, [call.version for call in self.waiting()]
        is_busy = self.live or self.own or any(s.ended is None for s in owner.memory.sessions.values())
        is_early = owner.now().seconds < self.other_version_at
        if not versions or (owner.link and (is_busy or is_early or owner.version in versions)):
            return owner.version
        return versions[0]

    def dial(self) -> None:
        """Begin to open a connection, unless one is there or being opened."""
        if self.link is None and self.dialing is None:
            self.next_at, self.version = math.inf, self._wanted_version()
            self.dialing = self.owner.tasks.start(self._dial(), f"{self.name}: dial")

    async def _dial(self) -> None:
        owner, version, link = self.owner, self.version, None
        try:
            link = await owner.dialer.dial(
                self.peer, self.server, owner.charger_id, [version], owner.credentials
            )
            if (link.protocol.subprotocol or "ocpp1.6") != version:
                link.close(1002, f"{version} is needed")
                raise DialError("it answered without a subprotocol; check versions")
        except DialError as error:
            self.news.count("failed_dials", self.peer)
            if version != owner.version and (link or (error.status or 0) // 100 == 4):
                self.other_version_at = owner.now().seconds + VERSION_SECONDS
            if self.trouble != str(error):
                self.trouble = str(error)
                advice = advice_for(error, self.peer, f"it was offered {version}; it is dialled again")
                log.warning("%s: cannot connect to %s: %s; %s", self.name, self.server.url, error, advice)
            link = None
        self.dialing = None
        if link and self.is_wanted:
            self.connected(link, needs_boot=self.peer is Peer.SECONDARY or bool(owner.memory.boot))
            return
        self._redial_later()
        if link:
            link.close(1001, "the charger is gone")

    def _redial_later(self) -> None:
        after, most = self.redial_after, REDIAL_SECONDS[self.peer][1]
        self.redial_after = min(max(after * 1.6, 0.5), most)
        if self.is_wanted:
            self.next_at = self.owner.now().seconds + after * random.uniform(0.8, 1.2)
            self.owner.deadline = 0.0
            if not after:
                self.dial()

    def link_closed(self, link: Link) -> None:
        for call in self.sent.pop(link, {}).values():
            if call.kind is Kind.STORED:
                call.sent = None  # It goes again, with the same text and id.
            elif call in self.awaited:
                self.live.insert(0, call)
            else:
                if call.kind is Kind.RELAYED and call.reply_to is not None:
                    self.news.count("calls", Peer.CHARGER, self.peer, Outcome.UNANSWERED)
                self.owner.router.stop_waiting(call)  # It may have been carried out; its sender repeats it.
        if link is self.link:
            now, self.trouble = self.owner.now().seconds, link.closed_by
            log.info("%s: disconnected (%s)", self.name, link.closed_by)
            self.lost_at = now if now >= link.opened + STEADY_SECONDS else self.lost_at
            if now >= link.opened + STOOD_SECONDS:
                self.redial_after = REDIAL_SECONDS[self.peer][0]
            self._let_go(link)
            self._redial_later()
            self.owner.commands.server_gone(self.peer)
        self.pump()

    def _let_go(self, link: Link) -> None:
        """Let go of the link and of all that ends with it, but for answers until it is closed."""
        self.link, self.in_flight, self.is_booted = None, None, False
        self.own, self.next_at = [], math.inf
        live, self.live = self.live, []
        for call in live:
            if call.kind is Kind.RELAYED or call in self.awaited:
                self.live.append(call)
            else:
                self.owner.router.stop_waiting(call)
        self.news.count("disconnections", self.peer)
        link.close(1001)

    def charger_left(self) -> None:
        """Drop what only the charger waited for; an answer in flight still tells its session."""
        live, self.live = self.live, []
        for call in live:
            self.owner.router.stop_waiting(call)
        for call in (*self.awaited, *itertools.chain(*map(dict.values, self.sent.values()))):
            call.reply_to = None
        self.awaited = {call: until for call, until in self.awaited.items() if call.kind is Kind.STORED}
        if self.link is None:
            self.own = []  # The boot that the next connection was to begin with.
        elif not self.is_wanted:
            self.link.close(1001, "the charger is gone")

    def tick(self) -> float:
        """Do what is due; return when to be called again, in monotonic seconds; 0 = each time."""
        now = self.owner.now().seconds
        if self.link:
            self.link.keep_alive(now, self.owner.host.ping_interval)
        elif now >= self.next_at and self.is_wanted:
            self.dial()
        self._answer_awaited(now)
        self._time_out(now)
        is_at_rest = self.link and not (self.in_flight or self.own)
        if self.link and is_at_rest and not (self.is_wanted and self._wanted_version() == self.version):
            self.link.close(1000, "nothing is left for it in this version")
        self.pump()
        waits = self.in_flight or self.awaited or (self.is_the_chargers and not self.link)
        if waits or (self.link and (self.own or self.live or self.stored)):
            return 0.0
        return min(self.link.ping_at, self.next_at) if self.link else self.next_at

    def _time_out(self, now: float) -> None:
        call, timeout = self.in_flight, self.owner.host.call_timeout
        patience = min(PASSING_SECONDS, timeout) if call and call.kind is Kind.PASSING else timeout
        if call and call.sent is not None and now >= call.sent + patience:
            self.in_flight = None
            log.warning("%s: %s was not answered; the next is sent", self.name, call.action)
            if call.content is NOTHING and call.action == "BootNotification":
                self.next_at = now + BOOT_RETRY_SECONDS
            if call.kind is Kind.RELAYED:
                self.news.count("calls", Peer.CHARGER, self.peer, Outcome.UNANSWERED)
                self.owner.router.stop_waiting(call)
        head = self.stored[0] if self.stored else None
        is_overdue = head and head.sent is not None and now >= head.sent + DELIVERY_SECONDS
        if self.link and self.link.is_open and is_overdue and not self.is_the_chargers:
            log.warning("%s: left a stored Call unanswered for %g s; redialled", self.name, DELIVERY_SECONDS)
            self.link.close(1000, "a Call was left unanswered")


# ---------------------------------------------------------------------------------------------------------
# Relay
#
# One charger: its link and an outbox for each of its servers. Hands every message to the router and carries
# out what the router decides.
# ---------------------------------------------------------------------------------------------------------

SWEEP_SECONDS = 3600.0  # How often what has expired is removed from memory.
MAX_HELD = 1000  # Answers of one charger that wait for the disk; of more, the oldest goes.


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
        self.host = host
        self.dialer = dialer
        self.journal = journal
        self.now = clock
        self.memory = journal.memory(charger_id)
        self.memory.is_in_use = True
        self.credentials = Credentials(user_agent=self.memory.user_agent or None)
        self.tasks = Tasks()  # Dials; at most one for each outbox.
        self.complaints = Complaints()
        self.link: Link | None = None  # The charger's.
        self.held: list[ToCharger | OwnAnswer] = []  # What waits for the disk; MAX_HELD.
        self.deadline = 0.0  # Monotonic seconds; when `tick` has something to do.
        self.sweep_at = 0.0  # Monotonic seconds; when what has expired is removed.
        self._speak(version)
        self.outboxes = {
            peer: Outbox(self, peer, server)
            for peer in SERVERS
            if (server := config.server(peer)) and not server.is_local
        }

    def _speak(self, version: str) -> None:
        """Route by the tables of this version."""
        self.version = version  # The subprotocol.
        self.router = Router(self.config, self.memory, version)
        self.commands = Commands(self.router, self.host.call_timeout)
        self.answers = Answers(self.router)

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten: neither a charger nor anything to deliver without one."""
        return not (self.link or any(o.link or o.dialing or o.is_wanted for o in self.outboxes.values()))

    def links(self) -> Iterator[Link]:
        """Yield all its connections."""
        yield from filter(None, [self.link, *(outbox.link for outbox in self.outboxes.values())])

    # What the outboxes ask for.

    def server_said(self, peer: Peer, message: Message) -> None:
        """Take a Call (or something as rare) of a server."""
        if message.type is not MessageType.CALL:
            log.debug("%s ! %s: a %s goes to nobody", self.charger_id, peer.value, message.type.name)
        elif self.link is None or self.outboxes[peer].version != self.version:
            why = (
                "the charger is not connected" if self.link is None else "the charger speaks another version"
            )
            text = error_text(message.message_id, "GenericError", why)
            self.carry_out([Answer(peer, text, why, Outcome.UNANSWERED)])
        else:
            self.carry_out(self.commands.server_call(peer, message, self.now()))

    # The charger's connection.

    def deliver(self) -> None:
        """Deliver what is left, without waiting for the charger; tell what has to wait."""
        self.tick()
        self.deadline = 0.0
        waiting = Counter(call.server for call in self.memory.stored if call.peer)
        for outbox in self.outboxes.values():
            outbox.fill()
            now, left = outbox.is_wanted, waiting.pop(outbox.server.url, 0)
            then = "delivered now" if now else "delivered when the charger connects: only it has the login"
            if left:
                log.info("%s: %d stored Calls are left from before; %s", outbox.name, left, then)
            if left and now:
                outbox.dial()
        for address, left in waiting.items():
            what = "%s: %d stored Calls are kept for %s, which the ini does not name"
            log.warning(what, self.charger_id, left, address)

    def connect(self, link: Link, primary: Link | None, version: str, credentials: Credentials) -> None:
        """Take the charger's new connection, and the one that its primary accepted for it."""
        if self.link:
            log.info("%s: charger connects again; its old connection is closed", self.charger_id)
            self.disconnect_charger(1001, "the charger has connected again", successor=link)
        memory, self.credentials = self.memory, credentials
        if memory.version != version:
            memory.boot, memory.statuses = "", {}
        memory.version, memory.user_agent = version, short(credentials.user_agent)
        memory.seen = self.now().utc
        memory.note(memory)
        if version != self.version:
            self._speak(version)
        self.link, self.deadline = link, 0.0
        link.keep_alive(self.now().seconds, self.host.ping_interval)
        log.info("%s: charger connected (%s)", self.charger_id, version)
        self.journal.news.count("connections", Peer.CHARGER)
        self.journal.news.present.add(self.charger_id)
        for peer, outbox in self.outboxes.items():
            if peer is Peer.PRIMARY and primary:
                outbox.connected(primary, needs_boot=False)
            else:
                outbox.dial()
        link.attach(self)

    def link_received(self, link: Link, text: str) -> None:
        if link is not self.link:
            return
        message = message_of(text, link, self.version, self.charger_id, self)
        if message is None:
            return
        if message.type is MessageType.CALL:
            if not (self.journal.failure and self._joins(message)):
                self.carry_out(self.router.charger_call(message, self.now()))
        elif message.type is MessageType.SEND:
            primary = self.outboxes.get(Peer.PRIMARY)
            if primary and primary.link:
                primary.link.send(text)  # Nobody answers it (OCPP 2.1 part 4, 4.2.5).
        elif message.type is MessageType.CALLRESULTERROR:
            log.debug("%s ! a CallResultError goes to nobody", self.charger_id)
        else:
            self.carry_out(self.commands.charger_answer(message, self.now()))

    def _joins(self, message: Message) -> bool:
        """Whether the charger repeats what has no answer because the disk fails: it joins what is pending."""
        for call in (held.call for held in self.held if isinstance(held, OwnAnswer)):
            if (call.action, call.content.payload) == (message.action, message.payload):
                call.reply_to = message.message_id
                return True
        return False

    def link_closed(self, link: Link) -> None:
        if link is self.link:
            log.info("%s: charger disconnected (%s)", self.charger_id, link.closed_by)
            self.disconnect_charger(1001)

    def disconnect_charger(self, code: int, reason: str = "", successor: Link | None = None) -> None:
        """Let go of the charger's connection and of all that ends with it."""
        link, self.link = self.link, successor
        self.journal.news.present.discard(self.charger_id)
        self.carry_out(self.commands.charger_gone())
        self.router.charger_gone()
        held, self.held = self.held, []
        for decision in held:
            if isinstance(decision, OwnAnswer):
                self.answers.given(decision.call)  # To nobody; a repeat is answered again.
        for outbox in self.outboxes.values():
            outbox.charger_left()
        if link:
            self.journal.news.count("disconnections", Peer.CHARGER)
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
        for decision in decisions:
            if isinstance(decision, ToServer):
                self._to_server(decision)
            elif isinstance(decision, ToCharger | OwnAnswer):
                self._to_charger(decision)
            elif isinstance(decision, Answer):
                self._answer(decision)
            elif isinstance(decision, Dropped):
                self._drop(decision)
            elif decision.is_unlisted:  # In full: it is the number to copy.
                self.journal.news.unlisted.pop(decision.badge, None)
                self.journal.news.unlisted[decision.badge] = (self.charger_id, self.now().utc)
                trim(self.journal.news.unlisted, MAX_UNLISTED)
                log.info("%s: %s; the badge is %s", self.charger_id, decision.what, decision.badge)
            else:
                badge = f"; badge {decision.badge}" if decision.badge else ""
                log.info("%s: %s%s", self.charger_id, decision.what, badge)

    def _drop(self, decision: Dropped) -> None:
        call, is_grave, news = decision.call, decision.is_grave, self.journal.news
        news.count("dropped_messages", "too-many-stored" if is_grave or call else "nobody-waits")
        if call:
            for outbox in self.outboxes.values():
                outbox.stored = [other for other in outbox.stored if other is not call]
            what = "%s: %d stored Calls wait; for each new one the oldest meter values are dropped: %d so far"
            values = (self.charger_id, len(self.memory.stored), self.memory.dropped)
            self.complaints.say(logging.WARNING, "dropped", what, *values)
        elif is_grave:
            self.complaints.say(logging.WARNING, "grave", "%s: %s", self.charger_id, decision.why)
        else:
            log.debug("%s ! %s", self.charger_id, decision.why)

    def _to_server(self, decision: ToServer) -> None:
        call, why, is_copy = decision
        log.debug("%s = %s: %s", self.charger_id, call.peer.value if call.peer else "nobody yet", why)
        outbox = self.outboxes.get(call.peer) if call.peer else None
        if is_copy and outbox:
            outbox.copy(call)
        elif outbox and call.server == outbox.server.url:
            outbox.put(call)
        elif call.kind is Kind.STORED and call.peer:
            level = logging.DEBUG if call.content.is_reading else logging.WARNING
            what = f"{call.action} is kept for {call.server}, which the ini no longer names"
            log.log(level, "%s: %s", self.charger_id, what)

    def _to_charger(self, decision: ToCharger | OwnAnswer) -> None:
        """Send a text to the charger: now, or once what was decided is on disk."""
        if len(self.held) >= MAX_HELD and isinstance(oldest := self.held.pop(0), OwnAnswer):
            oldest.call.reply_to = None
            self.answers.given(oldest.call)  # To nobody; a repeat is answered again.
        self.held.append(decision)
        self._release()

    def _release(self) -> None:
        """Send what no longer waits for the disk."""
        held, self.held, is_behind = self.held, [], False
        for decision in held:
            if isinstance(decision, OwnAnswer):
                call = decision.call
                waits = call.kind is Kind.STORED and not self.journal.has(call.session, call)
            else:
                may_go = self.journal.failure and not decision.needs_disk
                waits = not may_go and (is_behind or not self.journal.has(*decision.rows))
                # What comes behind it may name what the charger does not know yet.
                is_behind = is_behind or (waits and not decision.needs_disk)
            if waits:
                self.held.append(decision)
            else:
                self._send(decision)
        if self.held:
            self.journal.wait(self._release)

    def _send(self, decision: ToCharger | OwnAnswer) -> None:
        if isinstance(decision, ToCharger):
            text = decision.text
        elif decision.call.own_answer:
            text = self.answers.given(decision.call)
            if decision.call.peer:
                self.journal.news.count("calls", Peer.CHARGER, decision.call.peer, Outcome.RECORDED)
        else:
            return  # Its server has answered in the meantime.
        log.debug("%s < %s (%s)", self.charger_id, text, decision.why)
        if self.link and text:
            self.link.send(text)

    def _answer(self, decision: Answer) -> None:
        self.journal.news.count("calls", decision.peer, Peer.CHARGER, decision.outcome)
        outbox = self.outboxes.get(decision.peer)
        if outbox and outbox.link:
            log.debug("%s < %s (%s)", outbox.name, decision.text, decision.why)
            if decision.outcome is Outcome.REFUSED:
                what = "%s: a Call is %s"
                self.complaints.say(logging.INFO, decision.why, what, outbox.name, decision.why)
            outbox.link.send(decision.text)

    # What time does.

    def tick(self) -> None:
        """Do what is due, and find out when to be called again."""
        now = self.now()
        if self.link:
            self.link.keep_alive(now.seconds, self.host.ping_interval)
        grace, primary = self.config.primary_grace, self.outboxes.get(Peer.PRIMARY)
        if self.link and primary and not primary.link and now.seconds >= primary.away_since + grace:
            self._close_charger("primary stays away", "the primary server is away")
        if self.held and self.journal.failure and now.seconds >= self.journal.begun + grace:
            self._close_charger("the disk fails", "what it says cannot be kept")
        if now.seconds >= self.sweep_at:  # At random, so that not all chargers are looked at at once.
            self.sweep_at = now.seconds + SWEEP_SECONDS * random.uniform(0.5, 1.0)
            self.carry_out(self.router.sweep(now))
        times = [outbox.tick() for outbox in self.outboxes.values()]
        self.carry_out(self.commands.tick(now))
        times += [self.link.ping_at if self.link else math.inf, self.sweep_at]
        self.deadline = 0.0 if self.held or self.commands.outstanding else min(times)

    def _close_charger(self, what: str, reason: str) -> None:
        log.warning("%s: %s; the charger is closed, to keep its messages", self.charger_id, what)
        self.disconnect_charger(1012, reason)

    def watch(self) -> None:
        """Close the connections that nothing has been seen of for too long."""
        now, host = self.now(), self.host
        outboxes = self.outboxes.values()
        watched = [(outbox.name, outbox.link, host.ping_interval + host.ping_timeout) for outbox in outboxes]
        if self.link:
            self.memory.seen = now.utc - (now.seconds - self.link.seen)
            slow = 0 if self.link.has_ponged else 3 * self.memory.heartbeat_interval
            watched.append((self.charger_id, self.link, max(host.watchdog_stale, slow)))
        for name, link, patience in watched:
            if link and now.seconds - link.seen > patience:
                log.warning("%s: nothing seen for %d s; it is closed", name, now.seconds - link.seen)
                link.abort()


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
MAX_CHARGERS = MAX_MEMORIES  # That are here at once; a lower file limit of the process allows fewer:
MAX_FILES = 2**20  # Open at once, where the system sets no limit.
FILES_OF_OUR_OWN = 100  # of what is left each charger takes
FILES_OF_A_CHARGER = 3  # for itself and its servers.
MAX_HALF_OPEN = 5000  # Connections whose request is not complete, or an eighth of the files.
RETRY_AFTER_SECONDS = 10  # For a charger that finds no place, or no primary.
WRONG_LOGIN_SECONDS = 1.0  # So much later a wrong password is answered.
# Which OCPP's security profile 2 allows a charger to have alone (2.0.1 part 2, A00.FR.318).
CHARGERS_CIPHERS = ("AES128-GCM-SHA256", "AES256-GCM-SHA384")
TLS_ADVICE = {  # By OpenSSL's reason.
    "HTTP_REQUEST": "its address of this proxy has to begin with wss://",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "client_ca asks for a certificate of its own",
    "CERTIFICATE_VERIFY_FAILED": "its own certificate has to be of client_ca",
    None: "look whether it trusts the certificate in cert_chain",
}


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


class Proxy:
    """All chargers. Owns the listener and the relays."""

    def __init__(self, config: Config, journal: Journal | None = None) -> None:
        self.config = config
        self.journal = journal or Journal(current_instant)
        self.retry_at = time.monotonic() + DAY  # When what CallErrors refused is tried once more.
        self.dialer = Dialer(config.host.max_size)
        self.relays: dict[str, Relay] = {}  # By charger id.
        self.tasks = Tasks()  # The watchdog, and one for each handshake.
        self.handshakes: set[Link] = set()  # Not yet answered.
        self.half_open: dict[Link, None] = {}  # Those whose request is not complete, the oldest first.
        self.complaints = Complaints()
        self.tls: ssl.SSLContext | None = None  # The listener's.
        self.files = raised_file_limit()  # That the process may have open.
        self.max_half_open = min(MAX_HALF_OPEN, self.files // 8)
        self.max_chargers = min(MAX_CHARGERS, (self.files - FILES_OF_OUR_OWN) // FILES_OF_A_CHARGER)
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
            if memory.stored:
                self._deliver(memory)

    def _deliver(self, memory: Memory) -> None:
        """Deliver what an earlier run has left, without waiting for the charger."""
        charger_id = memory.charger_id
        oldest = next(iter(memory.stored), None)
        version = (oldest and oldest.version) or memory.version or "ocpp1.6"
        self._relay(charger_id, self.config.charger(charger_id), version).deliver()

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
        outcome, level = (
            ("stay in the state file", logging.INFO) if self.journal.path else ("are lost", logging.WARNING)
        )
        for charger_id, memory in self.journal.memories.items():
            for address in dict.fromkeys(call.server for call in memory.stored):
                left = [call.action for call in memory.stored if call.server == address]
                whose, names = address or "nobody yet", ", ".join(left[:10])
                log.log(
                    level, "%s: %d stored Calls for %s %s: %s", charger_id, len(left), whose, outcome, names
                )

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

    def _connected(self, link: Link) -> None:
        assert link.transport is not None
        if self.tls:
            link.transport.pause_reading()  # Until start_tls.
        self.handshakes.add(link)
        self.half_open[link] = None
        if len(self.half_open) > self.max_half_open:
            oldest = next(iter(self.half_open))
            del self.half_open[oldest]
            oldest.abort("too many connections wait for their request")
        self.tasks.start(self._admit(link), "handshake")

    async def _admit(self, link: Link) -> None:
        """Answer a charger's handshake."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if self.tls:
                    await link.start_tls(self.tls)
                request = await link.handshake
            self.half_open.pop(link, None)
            assert isinstance(request, Request)
            visitor = self._visitor(request)
            self._check_room(visitor)
            await self._check_login(visitor)
            await self._let_in(link, request, visitor)
        except RefusedError as refusal:
            self.journal.news.count("refused_handshakes", str(int(refusal.status)))
            link.respond(refusal.response())
        except TimeoutError:
            self.complaints.say(logging.INFO, "silent", "a connection without a handshake is closed")
        except DialError as error:
            what = "a connection that is no websocket is closed: %s"
            self.complaints.say(logging.INFO, "no websocket", what, error)
        except OSError as error:
            what, why = "%s: its TLS handshake failed: %s; %s", str(error) or "it hung up"
            advice = TLS_ADVICE.get(getattr(error, "reason", None), TLS_ADVICE[None])
            self.complaints.say(logging.INFO, f"TLS {link.address}", what, link.address, why, advice)
        finally:
            self.half_open.pop(link, None)
            self.handshakes.discard(link)
            if not link.is_answered:
                link.abort()

    def _subject(self, kind: str, charger_id: str) -> str:
        """Return the subject of a complaint: one for each charger, and one for all ids that never got in."""
        return f"{kind} {charger_id}" if charger_id in self.journal.memories else kind

    def _check_room(self, visitor: Visitor) -> None:
        """Refuse a charger that there is no room for. Raises RefusedError."""
        present, charger_id = self.journal.news.present, visitor.charger_id
        is_new = charger_id not in present  # One that comes again takes the place of its old one.
        if len(present) + is_new > self.max_chargers or not self.journal.has_room(charger_id):
            what = "%s: refused: there is no room; %d chargers are here, %d known, %d files may be open"
            values = (charger_id, len(present), len(self.journal.memories), self.files)
            self.complaints.say(logging.WARNING, "full", what, *values)
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "there is no room for it", RETRY_AFTER)

    async def _check_login(self, visitor: Visitor) -> None:
        """Refuse a charger that does not show the password that the ini may ask for. Raises RefusedError."""
        password = visitor.config.password
        if password and not shows_password(visitor.charger_id, password, visitor.credentials.authorization):
            what = "%s: refused: it does not show the user %s and the `password` of the ini"
            values = (visitor.charger_id, visitor.charger_id)
            self.complaints.say(logging.WARNING, self._subject("login", visitor.charger_id), what, *values)
            await asyncio.sleep(WRONG_LOGIN_SECONDS)
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "wrong login", [("WWW-Authenticate", BASIC)])

    def _fit_answer(self, link: Link, request: Request, visitor: Visitor) -> Response | None:
        """Return what a request that is worth asking the primary is answered with; answer any other."""
        response = link.answer_to(request)
        # The primary might drop the charger for it.
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
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

    async def _let_in(self, link: Link, request: Request, visitor: Visitor) -> None:
        """Let the charger in if its primary accepts it. Raises RefusedError."""
        response = self._fit_answer(link, request, visitor)
        if response is None:
            return
        versions = [o.lower() for o in visitor.offers if o.lower() in visitor.config.versions] or ["ocpp1.6"]
        primary: Link | None = None
        if not visitor.config.primary.is_local:
            primary = await self._dial_primary(visitor, versions)
            versions = [primary.protocol.subprotocol or "ocpp1.6"]
        standing = self.relays.get(visitor.charger_id)
        is_late = standing and standing.link and standing.link.arrived > link.arrived
        with ExitStack() as to_undo:
            if primary:
                to_undo.callback(primary.close, 1001, "the charger is gone")
            self._check_room(visitor)  # Others may have taken it meanwhile.
            if link.is_closed or is_late or not link.accept(response, visitor.chosen(versions[0])):
                return
            to_undo.pop_all()
        relay = self._relay(visitor.charger_id, visitor.config, versions[0])
        relay.connect(link, primary, versions[0], visitor.credentials)

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
        is_browser = (only(request.headers, "User-Agent") or "").startswith("Mozilla/")
        if is_browser and "Origin" in request.headers:  # Chargers' libraries send odd ones, and are let in.
            what = "%s: refused: a web page has opened this connection"
            self.complaints.say(logging.WARNING, self._subject("origin", charger_id), what, charger_id)
            raise RefusedError(HTTPStatus.FORBIDDEN, "a web page")
        if "Connection" not in request.headers and "Upgrade" in request.headers:
            request.headers["Connection"] = "Upgrade"  # An Autel leaves it out (lbbrhzn/ocpp#1933).
        offers = offered_subprotocols(request.headers)
        credentials = Credentials(*(only(request.headers, name) for name in ("Authorization", "User-Agent")))
        return Visitor(charger_id, self.config.charger(charger_id), offers, credentials)

    async def _dial_primary(self, visitor: Visitor, versions: list[str]) -> Link:
        """Return the primary's link for this charger. Raises RefusedError."""
        server, relay = visitor.config.primary, self.relays.get(visitor.charger_id)
        place = (Peer.PRIMARY, server, visitor.charger_id, versions, visitor.credentials)
        try:
            try:
                return await self.dialer.dial(*place)
            except DialError as error:
                if error.status is None or relay is None or not await self._makes_room(relay):
                    raise
                # Some primaries allow one connection per charger, and the old one is dead.
                log.info("%s: its old connection is closed; primary is asked again", visitor.charger_id)
                return await self.dialer.dial(*place)
        except DialError as error:
            raise self._refusal(visitor, error) from None

    async def _makes_room(self, relay: Relay) -> bool:
        """Close what stands at the primary for a charger whose old connection is dead or gone."""
        old = relay.link
        primary = relay.outboxes.get(Peer.PRIMARY)
        if old is None and not (primary and primary.link):
            return False
        if old and (not old.has_ponged or await old.probe(PROBE_SECONDS)):
            return False  # Where Pongs never come, the watchdog and the system tell the dead.
        if relay.link not in (old, None) or self.relays.get(relay.charger_id) is not relay:
            return False
        await relay.dismiss()
        return True

    def _refusal(self, visitor: Visitor, error: DialError) -> RefusedError:
        """Return the primary's refusal as the charger's; anything but a 4xx means: come back later."""
        is_refusal = error.status is not None and 400 <= error.status < 500
        what = "primary refuses it" if is_refusal else "primary cannot be reached"
        is_its_own = visitor.config.primary.needs_charger_login
        login = "the charger's own login" if is_its_own else "primary_password"
        advice = f"check {login}, and that primary knows it" if is_refusal else "it may come again"
        if error.is_certificate_unfit or not is_refusal:
            advice = advice_for(error, Peer.PRIMARY, advice)
        elif error.status == HTTPStatus.BAD_REQUEST:  # How many refuse a subprotocol.
            advice = f"it was offered {' and '.join(visitor.offers) or 'no version'}: see versions"
        values = (visitor.charger_id, what, error, advice)
        subject = self._subject(what, visitor.charger_id)
        self.complaints.say(logging.WARNING, subject, "%s: refused: %s: %s; %s", *values)
        if error.status is None or not is_refusal:
            return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the primary server is away", RETRY_AFTER)
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

    def _retry_refused(self) -> None:
        """Try once more what CallErrors have refused."""
        for memory in list(self.journal.memories.values()):
            if any(call.has_error for call in memory.refused):
                memory.retry(time.time())
                self._deliver(memory)

    async def _watchdog(self) -> None:
        """Wake the relays whose deadlines have come, for as long as the process lives."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            self.lags.append(max(0.0, now - due))
            self.journal.tick()
            if now >= self.retry_at:
                self.retry_at = now + DAY
                self._retry_refused()
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
    ciphers = [cipher["name"] for cipher in context.get_ciphers()]
    context.set_ciphers(":".join([*ciphers, *CHARGERS_CIPHERS]))
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
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


RETRY_AFTER = [("Retry-After", str(RETRY_AFTER_SECONDS))]
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
# The second port, for people and monitoring: a page that asks for its numbers, the ledger of
# sessions, health, metrics. It looks and changes nothing; what it shows comes from outside, and is always
# text. Nobody walks all chargers: those that have changed are looked at, a bounded number at a time.
# ---------------------------------------------------------------------------------------------------------

CHARGERS_AT_ONCE = 100  # That are looked at in one turn of the loop.
MAX_STATUS_LINKS = 32  # Requests and pages at a time; beyond it the oldest request is cut.
# A wrong password is answered so much later: with so few requests at a time, nobody guesses many. Nobody is
# shut out, because behind a proxy or in a container all come from one address.
WRONG_PASSWORD_SECONDS = 1.0
MAX_PAGE_TEXT = 1024  # Bytes of what a page may say; there is nothing that it has to.
MAX_EVENTS = 100  # Log lines that a page shows.
GONE_SECONDS = 7 * DAY  # A charger that was not seen for so long is not missed any more.
RECENT_SESSIONS = 50
RECENT_REFUSALS = 20
ENERGY_DAYS = 14
LEDGER_ROWS = 500  # Sessions that are read and written at once: a few milliseconds of the loop.
MAX_LEDGER_ROWS = 100_000  # Of one request, about 20 MB.
LEDGER_SECONDS = 20.0  # For the disk to answer.
DOWNLOAD_SECONDS = 60.0  # For whoever has asked to read the answer.

View = dict[str, Any]  # What a page is told of something, as JSON.
Record = dict[str, Any]  # A row of the ledger.

SESSIONS = """
SELECT sessions.*,
    (SELECT min(since) FROM calls WHERE session = sessions.number AND refused = '') AS waits_since,
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
WHERE refused != '' ORDER BY number DESC LIMIT {RECENT_REFUSALS}
"""
LOOK_UPS = {"sessions": RECENT, "refusals": REFUSALS, "energy": ENERGY}


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


def delivery_of(row: Record) -> Delivery:
    """Say whether a session of the ledger has reached its server."""
    states = {
        "rejected": row["is_rejected"],
        "refused": row["refused"] or row["refused_call"],
        "waiting": row["waits_since"] is not None,
        "open": row["ended"] is None,
        "recorded": row["server"] in ("", LOCAL),
        "delivered": row["delivered"] is not None,
        "no stop": not row["has_stop"],
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


def csv_row(row: Record) -> list[Any]:
    """Return a session of the ledger as a line of the CSV; its times by the charger's clock, if it told."""
    delivery = delivery_of(row)
    values = [
        *(row["charger"], row["connector"], row["badge"], "" if row["is_rejected"] else row["owner"]),
        *(row["started_at"] or time_text(row["begun"]), row["stopped_at"]),
        energy_of(row["meter_start"], row["meter_stop"]),
        *(row["transaction_id"], row["server_id"]),
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


def session_view(row: Record, shown: Callable[[str], str], clean: Callable[[str], str]) -> View:
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
    if not outbox.is_wanted:
        return {"state": "not needed"}
    next_try = None if outbox.next_at == math.inf else outbox.next_at - now.seconds + now.utc
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
    waiting = list(memory.stored)
    opened = [session for session in memory.sessions.values() if session.ended is None]
    return {
        "online": link.opened - now.seconds + now.utc if link else None,
        "seen": link.seen - now.seconds + now.utc if link else memory.seen or None,
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
    for call in memory.stored:
        share["stored_calls", call.peer.value if call.peer else "unknown"] += 1
    for peer, outbox in relay.outboxes.items() if relay else ():
        if outbox.link or outbox.is_wanted:
            share["servers", peer.value, "connected" if outbox.link else "down"] += 1
    return share


def state_of(session: Session) -> str:
    """Return the state of a session in a word."""
    if session.is_rejected or session.refused:
        return "rejected" if session.is_rejected else "refused"
    return "open" if session.ended is None else "ended"


# The page: one file, no outside resource. What it is told is put in as text (textContent), never as markup.
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
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

async function poll() {
  try {
    const response = await fetch("status.json");
    if (!response.ok) throw new Error(response.statusText);
    const news = await response.json();
    skew = Date.now() / 1000 - news.now;
    chargers.clear();
    for (const [id, view] of Object.entries(news.chargers)) chargers.set(id, view);
    for (const name of Object.keys(tables)) tables[name] = news[name] ?? tables[name];
    alarm(tables.summary.trouble);
    drawSoon();
  } catch {
    alarm("The proxy does not answer; trying again.");
  }
  setTimeout(poll, 2000);
}

at("filter").oninput = drawSoon;
setInterval(drawSoon, 10000);
poll();
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


class Status:
    """The second port. Owns its listener and its pages; reads what the proxy owns."""

    def __init__(self, proxy: Proxy, events: Events, clean: Callable[[str], str]) -> None:
        self.proxy = proxy
        self.events = events
        self.clean = clean  # Makes a peer's words fit to be shown.
        self.shown: Callable[[str], str] = str if proxy.config.full_badges else masked
        self.config = proxy.config.status
        self.links: dict[Link, None] = {}  # Requests, the oldest first; MAX_STATUS_LINKS.
        self.downloads = asyncio.Semaphore(1)  # Ledgers that are being written.
        self.complaints = Complaints()
        self.tasks = Tasks()
        self.server: asyncio.Server | None = None
        self.answers: dict[str, Callable[[Link, dict[str, str]], Coroutine[Any, Any, Response]]] = {
            "/": self._page,
            "/status.json": self._status,
            "/healthz": self._health,
            "/metrics": self._metrics,
            "/sessions.csv": self._ledger,
        }

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        self.server = await asyncio.get_running_loop().create_server(
            lambda: incoming_link(MAX_PAGE_TEXT, self._connected), self.config.addr, self.config.port
        )

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
        for link in list(self.links):
            link.abort()

    # Requests.

    def _connected(self, link: Link) -> None:
        self.links[link] = None
        if len(self.links) > MAX_STATUS_LINKS:
            next(iter(self.links)).abort("too many requests at a time")
        self.tasks.start(self._admit(link), "status request")

    async def _admit(self, link: Link) -> None:
        """Answer a request, and see its end."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                request = await link.handshake
            assert isinstance(request, Request)
            await self._answer(link, request)
            await asyncio.shield(link.ended)  # The link needs it still when this is cancelled.
        except RefusedError as refusal:
            self._respond(link, refusal.response())
            await asyncio.shield(link.ended)  # The link needs it still when this is cancelled.
        except (DialError, TimeoutError) as error:
            self.complaints.say(logging.INFO, "no request", "status: a connection is closed: %s", error)
        finally:
            self.links.pop(link, None)
            link.abort()

    async def _answer(self, link: Link, request: Request) -> None:
        """Answer a request. Raises RefusedError."""
        path, _, query = request.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        self._check_request(request)
        if path != "/healthz":  # It tells nothing that the port does not tell.
            await self._check_login(request, link.address)
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

    async def _check_login(self, request: Request, address: str) -> None:
        """Refuse whoever does not show the password that the ini may ask for. Raises RefusedError."""
        password = self.config.password
        if not password:
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
        return http_response(HTTPStatus.OK, PAGE, "text/html")

    async def _health(self, _link: Link, _asked: dict[str, str]) -> Response:
        trouble = self.proxy.trouble()
        status = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
        return http_response(status, f"{trouble or 'ok'}\n")

    async def _shares(self) -> tuple[Counter[tuple[str, ...]], float]:
        """Return what all chargers add up to, and the age of the oldest stored Call in seconds."""
        totals, now, oldest = Counter[tuple[str, ...]](), current_instant(), math.inf
        for number, (charger_id, memory) in enumerate(list(self.proxy.journal.memories.items())):
            if number % CHARGERS_AT_ONCE == 0:
                await asyncio.sleep(0)  # Let the others have a turn.
            is_expected = self.proxy.config.host.admits(charger_id)
            totals.update(share_of(memory, self.proxy.relays.get(charger_id), is_expected, now.utc))
            oldest = min([oldest, *(call.since for call in itertools.islice(memory.stored, 1))])
        return totals, max(0.0, now.utc - oldest)

    async def _metrics(self, _link: Link, _asked: dict[str, str]) -> Response:
        journal = self.proxy.journal
        totals, oldest = await self._shares()
        samples: dict[tuple[str, ...], float] = {
            ("info", __version__): 1,
            ("oldest_stored_call_age_seconds",): oldest,
            ("event_loop_lag_seconds",): max(self.proxy.lags, default=0.0),
            ("state_file_failing",): int(bool(journal.failure)),
        }
        for (metric, *labels), count in journal.news.counts.items():
            names = (label.value if isinstance(label, Enum) else label for label in labels)
            samples[f"{metric}_total", *names] = count
        return http_response(HTTPStatus.OK, exposition(samples | totals), "text/plain; version=0.0.4")

    async def _status(self, _link: Link, _asked: dict[str, str]) -> Response:
        """Return all that the page shows, as JSON."""
        journal, now = self.proxy.journal, current_instant()
        totals, oldest = await self._shares()
        counts = [[*key, count] for key, count in totals.items() if count and key[0] in SUMMARY]
        told: View = {
            "now": now.utc,
            "chargers": {},
            "unlisted": [[badge, *meeting] for badge, meeting in journal.news.unlisted.items()],
            "events": list(self.events.lines),
            "summary": {"counts": counts, "oldest": now.utc - oldest, "trouble": self.proxy.trouble()},
        }
        for number, (charger_id, memory) in enumerate(list(journal.memories.items())):
            if number % CHARGERS_AT_ONCE == 0:
                await asyncio.sleep(0)  # Let the others have a turn.
            relay = self.proxy.relays.get(charger_id)
            told["chargers"][charger_id] = charger_view(memory, relay, now, self.shown, self.clean)
        try:
            async with asyncio.timeout(LEDGER_SECONDS):
                for name, query in LOOK_UPS.items():
                    rows = await journal.look_up(query, {"since": now.utc - ENERGY_DAYS * DAY})
                    told[name] = [self._row_view(name, row) for row in rows]
        except (TimeoutError, sqlite3.Error) as error:
            self.complaints.say(
                logging.WARNING, "look up", "status: no ledger: %s", error or "no answer of the disk"
            )
        return http_response(HTTPStatus.OK, dump(told), "application/json")

    def _row_view(self, name: str, row: Record) -> View:
        """Return what the page shows of a row that was looked up."""
        if name == "sessions":
            return session_view(row, self.shown, self.clean)
        return row | {key: self.clean(row[key]) for key in ("words", "text") if key in row}

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
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the disk is busy", RETRY_AFTER) from None
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


SUMMARY = ("chargers", "servers", "stored_calls")  # Gauges that stand above the page.


def host_of(url: str) -> str | None:
    """Return the host that a URL names; None if it names none."""
    try:
        return urllib.parse.urlsplit(url).hostname
    except ValueError:
        return None


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
MAX_LOG_LINE = 2_000  # Characters.
DEMO_SECONDS = 14.0


class Redactor(logging.Filter):
    """Makes every log line safe to read and to keep: one line of ASCII, no credentials, badges masked.

    Badges are known by their keys; not where they stand in other people's prose.
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

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "is_clean", False):  # It may pass here twice.
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
            text = self.BADGE.sub(lambda found: found[1] + '"' + masked(found[2].strip('\\"')), text)
            text = self.TOLD_BADGE.sub(lambda found: found[1] + masked(found[2]), text)
        return escaped(text)[:MAX_LOG_LINE]


REDACTOR = Redactor()
log.addFilter(REDACTOR)


class SafeFormatter(logging.Formatter):
    """Writes tracebacks that are as safe to keep as any other line."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        return "\n".join(map(REDACTOR.clean, super().formatException(ei).splitlines()))


def set_up_logging(config: Config) -> None:
    """Write safe lines to stderr; one that finds no room there is lost."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.addFilter(REDACTOR)  # For the lines of other loggers.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    REDACTOR.full_badges = config.full_badges
    for name, level in config.levels.items():
        shows_credentials = "websockets" in name and level == "DEBUG"
        logging.getLogger(name).setLevel("INFO" if shows_credentials else level)
    for warning in config.warnings:
        log.warning("%s", warning)


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


ONE_VERSION = "both servers must speak one version: name it, as in versions = ocpp1.6"
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
    dialer, results, versions = Dialer(config.host.max_size), list[bool](), charger.versions
    for peer in SERVERS:
        server = charger.server(peer)
        if server is None:
            print(f"{peer.value}: none")
        elif server.is_local:
            print(f"{peer.value}: {LOCAL}: the proxy itself answers")
        else:
            chosen, answer = await checked(dialer, peer, server, name, versions, charger_id is not None)
            print(f"{peer.value}: {server.url}: {answer}")
            for line in await way_to(dialer, peer, server):
                print(f"    {line}")
            results.append(chosen is not None)
            versions = (chosen,) if chosen else versions  # The secondary is dialled with the primary's.
    if charger_id is None:
        print("To check the login of one charger, name it: --check CHARGER_ID")
    return EXIT_OK if all(results) else EXIT_FAILED


async def checked(
    dialer: Dialer, peer: Peer, server: ServerConfig, name: str, versions: tuple[str, ...], is_charger: bool
) -> tuple[str | None, str]:
    """Return the version that a server chose ("" = not known, None = it will not do), and what it said."""
    try:
        link = await dialer.dial(peer, server, name, versions, Credentials())
    except DialError as error:
        if error.status == HTTPStatus.UNAUTHORIZED and server.needs_charger_login:
            return "", f"answers; it wants the charger's own login, which only the charger has ({error})"
        if error.status == HTTPStatus.NOT_FOUND and not is_charger:
            return "", f"answers; it does not know a charger {name!r}, which is fine ({error})"
        if error.status == HTTPStatus.BAD_REQUEST:  # How many refuse a subprotocol.
            return None, f"{error}; it may not speak {' or '.join(versions)}; {ONE_VERSION}"
        otherwise = "check the address, and that it can be reached from here"
        return None, f"{error}; {advice_for(error, peer, otherwise)}"
    version = link.protocol.subprotocol
    link.close(1000)
    await asyncio.wait([link.ended], timeout=CLOSE_SECONDS)
    if version is None and "ocpp1.6" not in versions:
        return None, f"does not speak {' or '.join(versions)}; {ONE_VERSION}"
    spoken = version or "without a subprotocol: taken as ocpp1.6"
    return version or "ocpp1.6", f"accepts {server.id or name!r} ({spoken})"


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
    route = Router(charger, Memory(), "ocpp1.6").route_of_badge(badge)
    entry = None if route.is_unlisted else charger.badges.entry(badge)
    line = charger.lines.get("unknown_rfid") if entry is None else charger.badges.lines[entry]
    where = "by default" if line is None else f"{path}:{line}" + (f" ({entry})" if entry else "")
    near = difflib.get_close_matches(normalized(badge), charger.badges.lines, 1, 0.8) if entry is None else []
    miss = f"; {near[0]} in line {charger.badges.lines[near[0]]} is nearly the same" if near else ""
    return f"badge {badge}: {route.whose}: {route.why}, {where}{miss}"


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
            self.answerers[str(message.message_id)] = self.name
            print(f"    {self.name} gets {message.action} {dump(message.payload)}, answers {answer}")
            await connection.send(result_text(message.message_id, answer))
            if message.action == "StopTransaction":
                self.got_stop.set()

    def answer(self, message: Message) -> str:
        said = Content(CHARGER_16.get(message.action, PLAIN), message.payload)
        number = next(self.transactions) if said.facts.role is Role.START else None
        return said.answer("Accepted", DEMO_TIME, number)


async def demo_charger(port: int, answerers: dict[str, str], delivered: asyncio.Event) -> None:
    """Boot, then play one session with a badge of each server; stay until the last is delivered."""
    uri = f"ws://127.0.0.1:{port}/DEMO-1"
    async with websockets.connect(uri, subprotocols=[Subprotocol("ocpp1.6")]) as connection:

        async def call(action: str, **payload: Any) -> dict[str, Any]:
            print(f"charger sends {action} {dump(payload)}")
            message_id = new_message_id()
            await connection.send(call_text(message_id, action, dump(payload)))
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
    set_up_logging(config)
    try:
        if options.check is not None:
            return asyncio.run(check(config, options.config, options.check or None, options.badge))
        tune_garbage_collection()
        return asyncio.run(serve(config))
    except KeyboardInterrupt:
        return EXIT_OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)  # All is closed and written; a disk or a look-up that hangs must not hold up the end.
