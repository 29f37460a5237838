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

    | # | from      | what   | goes to                                                                    |
    |---|-----------|--------|----------------------------------------------------------------------------|
    | 1 | charger   | Call   | its owner: by transaction, claim, badge, connector, request; or primary    |
    | 2 | primary   | answer | the charger                                                                |
    | 3 | secondary | answer | nobody: the proxy has answered (or the charger, with `forward`)            |
    | 4 | servers   | Call   | the charger, one at a time, its message id noted                           |
    | 5 | charger   | answer | the server that sent the Call                                              |

Who lives for how long

    Proxy    the process         listens, admits chargers, wakes the relays whose deadlines have come
    Relay    one charger         its link and an outbox for each of its servers; outlives a reconnect
    Outbox   one server of it    what waits, one Call in flight; redialled for as long as it is needed
    Link     one websocket       bytes in, texts out; says once that it is closed
    Router   one charger         decides, and does nothing else: no socket, no clock, no log
    Memory   one charger         sessions, claims, stored Calls; in the Journal, whatever else dies
    Status   the process         looks at all of this on a second port, and changes none of it

Each section uses only those above it. Text passes as it came, but for ids that have to be translated.
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
import html
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sqlite3
import ssl
import sys
import textwrap
import time
import urllib.parse
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from http import HTTPStatus
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple, Self

import websockets
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode, apply_mask  # type: ignore[attr-defined]
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, SEND_EOF, Side
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

__version__ = "2.0.0"
log = logging.getLogger("proxy")


Peer = Literal["charger", "primary", "secondary"]  # Who sends a message.
SERVERS: tuple[Peer, ...] = ("primary", "secondary")

# ---------------------------------------------------------------------------------------------------------
# Configuration
#
# The ini, read once into frozen dataclasses. Each key is declared once, where its value ends up: the default
# as it would be written, the reader of its value, and what it means. Every mistake is a ConfigError of one
# line that names the file, the line, what is wrong and what is expected.
# ---------------------------------------------------------------------------------------------------------

LOCAL = "local"  # As a server's address: the proxy itself is the server.
VERSIONS = ("ocpp2.1", "ocpp2.0.1", "ocpp1.6")
CHARGER_ID = "1 to 48 of ASCII letters, digits, *-_=:+|@. and blanks, without quotes"
DAY = 86400.0
BLANKS = "".join(map(chr, range(33)))  # Some readers append control characters to a badge.
IN_BRACKETS_OR_MARK = re.compile(r"(\[[^\]]*\])|[:-]")
UNPRINTABLE = re.compile(r"[^ -~]")


class ConfigError(Exception):
    """A mistake in the ini, as one line for stderr."""


def normalized(badge: str) -> str:
    """Return a badge or a pattern as it is compared: without case, surrounding blanks, `:` and `-`.

    People write these, chargers do not; a `-` inside the brackets of a pattern stays.
    """
    return IN_BRACKETS_OR_MARK.sub(r"\1", badge.strip(BLANKS).casefold())


def masked(badge: str) -> str:
    """Return what may be logged of a badge: enough to tell one's own cards apart."""
    return f"****{badge[-4:]}" if len(badge) >= 8 else "****"


def escaped(text: str) -> str:
    """Return the text as one line of printable ASCII."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


@lru_cache(256)  # Each dial asks.
def is_ip_address(host: str) -> bool:
    """Whether it is an address in figures, not a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host) is not None
    return False


def is_loopback(host: str) -> bool:
    """Whether the address can be reached from this machine alone."""
    return ipaddress.ip_address(host).is_loopback if is_ip_address(host) else host.lower() == "localhost"


def is_charger_id(text: str) -> bool:
    """Whether the text may be a charger's identity (OCPP 2.0.1 identifierString, and the blank of 1.6)."""
    return bool(re.fullmatch(r"[A-Za-z0-9*\-_=:+|@. ]{1,48}", text)) and text not in (".", "..")


# Readers of one value each, which stands behind what they expect. They raise ValueError with that.


def words(value: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[,\s]+", value) if word)


def patterns(value: str) -> tuple[str, ...]:
    """Read a list split at commas and lines only, because charger ids may hold blanks."""
    return tuple(word.strip() for word in re.split(r"[,\n]", value) if word.strip())


def address(value: str) -> str:
    """Read a server's address; return it without trailing slashes."""
    if value.lower() in ("", LOCAL):
        return value.lower()
    with suppress(ValueError, websockets.InvalidURI):
        uri = parse_uri(value)
        if value.split() == [value] and not uri.query and uri.username is None:
            return value.rstrip("/")
    what = f"expected ws://HOST[:PORT]/PATH, wss://HOST[:PORT]/PATH or {LOCAL}"
    raise ValueError(f"{what}, without a query, and without a login: that goes into *_user and *_password")


def choice(choices: tuple[str, ...], value: str) -> str:
    for word in choices:
        if word.lower() == value.lower():
            return word
    raise ValueError(f"expected {' or '.join(choices)}")


def some_of(choices: tuple[str, ...], value: str) -> tuple[str, ...]:
    return tuple(choice(choices, word) for word in words(value))


def number(kind: type[float], low: float, high: float, value: str) -> float:
    with suppress(ValueError):
        if low <= kind(value) <= high:
            return kind(value)
    what = "seconds" if kind is float else "a whole number"
    raise ValueError(f"expected {what} from {low:g} to {high:.0f}")


def readable(path: str) -> str:
    if path and not (Path(path).is_file() and os.access(path, os.R_OK)):
        raise ValueError("it cannot be read; expected a file")
    return path


def key(default: str, read: Callable[..., Any] = str, *bounds: Any) -> Any:
    """Declare a key of the ini: its default as it would be written, its reader, and what that expects."""
    return field(metadata={"default": default, "read": partial(read, *bounds)})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One of the two servers, as one charger uses it: the keys that begin with `primary_` or `secondary_`."""

    url: str  # ws:// or wss:// without a trailing slash, or LOCAL; the keys `server`, `secondary_server`.
    name: str = key("")  # What page, log and report call it.
    id: str = key("")  # Replaces the charger's id towards this server; "" = the charger's own.
    user: str = key("")  # Basic login; "" = the id, if there is a password.
    password: str = key("")
    auth: str = key("none", choice, ("forward", "none"))  # "forward": gets the charger's Authorization.
    ca: str = key("", readable)  # What this server is verified against; "" = the system's.
    cert: str = key("", readable)  # The proxy's client certificate.
    key: str = key("", readable)  # Its key; "" = in the same file.

    @property
    def needs_charger_login(self) -> bool:
        """Whether only the charger's own login opens this server."""
        return self.auth == "forward" and not self.user and not self.password


@dataclass(frozen=True, slots=True)
class ChargerConfig:
    """What `[ext-server]` and the charger's own section say for one charger."""

    servers: dict[Peer, ServerConfig]  # The primary, and the secondary if there is one.
    badges: dict[str, Peer]  # By normalized badge or shell pattern, the longest first: whose list it is on.
    lines: Mapping[str, int] = field(compare=False)  # Where each key and each badge stands in the ini.
    password: str  # What the charger itself has to show; "" = nothing. Only in [charger ID], or in [host].
    unknown_rfid: str = key("primary", choice, ("primary", "secondary", "reject"))
    secondary_replies: str = key("ignore", choice, ("ignore", "forward"))
    secondary_copies: tuple[str, ...] = key("StatusNotification", words)
    primary_copies: tuple[str, ...] = key("", some_of, ("MeterValues",))  # Of the secondary's sessions.
    secondary_refuse: tuple[str, ...] = key("", words)
    primary_grace: float = key("15", number, float, 0, 3600)  # Seconds.
    versions: tuple[str, ...] = key(", ".join(VERSIONS), some_of, VERSIONS)

    def entry(self, badge: str) -> str:
        """Return the entry of the lists that speaks for the badge; "" = none."""
        name = normalized(badge)
        matching = (entry for entry in self.badges if not entry.isalnum() and fnmatchcase(name, entry))
        return name if name in self.badges else next(matching, "")

    def name(self, peer: Peer | None) -> str:
        """Return what people call a server."""
        return self.servers[peer].name if peer in self.servers else peer or "nobody yet"


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The section `[host]`: what chargers meet. Times in seconds."""

    addr: str = key("0.0.0.0")
    port: int = key("8321", number, int, 0, 65535)
    cert_chain: str = key("", readable)
    cert_key: str = key("", readable)  # "" = in the same file.
    client_ca: str = key("", readable)
    password: str = key("")
    chargers: tuple[str, ...] = key("*", patterns)
    watchdog_stale: float = key("500", number, float, 1, 7 * DAY)
    watchdog_interval: float = key("10", number, float, 0.1, DAY)
    ping_interval: float = key("30", number, float, 0.1, DAY)
    ping_timeout: float = key("60", number, float, 0.1, DAY)
    call_timeout: float = key("30", number, float, 0.1, DAY)
    max_size: int = key("1048576", number, int, 1024, 2**26)  # Bytes.
    state: str = key("ocpp-2w-proxy.db", os.fspath)

    def admits(self, charger_id: str) -> bool:
        """Whether a charger of this id may connect."""
        return is_charger_id(charger_id) and any(map(partial(fnmatchcase, charger_id), self.chargers))


@dataclass(frozen=True, slots=True)
class StatusConfig:
    """The section `[status]`: the second port."""

    addr: str = key("127.0.0.1")
    port: int = key("8322", number, int, 0, 65535)
    password: str = key("")


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


Keys = dict[str, Mapping[str, Any]]  # By name, what `key` has declared.
Section = dict[str, list[tuple[int, str]]]  # By key: each line of its value, with its number.


def keys_of(kind: type, prefix: str = "") -> Keys:
    """Return the keys of the ini that a dataclass declares."""
    return {prefix + each.name: each.metadata for each in fields(kind) if each.metadata}


URL, RFID = key("", address).metadata, key("", words).metadata
LEVEL = key("INFO", choice, ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")).metadata  # Of any logger.
SERVER_KEYS = keys_of(ServerConfig, "primary_") | keys_of(ServerConfig, "secondary_")
SERVER_KEYS |= {"primary_auth": key("forward", choice, ("forward", "none")).metadata}
LISTS = {"server": URL, "secondary_server": URL, "primary_rfid": RFID, "secondary_rfid": RFID}
SECTIONS: dict[str, Keys] = {
    "logging": {"proxy": LEVEL, "rfid": key("masked", choice, ("masked", "full")).metadata},
    "host": keys_of(HostConfig),
    "ext-server": LISTS | SERVER_KEYS | keys_of(ChargerConfig),
    "status": keys_of(StatusConfig),
}
CHARGER_KEYS = SECTIONS["ext-server"] | {"password": key("").metadata}


def made_of(kind: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return a dataclass of those of the values that are named as its fields, behind the prefix."""
    return kind(**{each.name: values[prefix + each.name] for each in fields(kind)})  # type: ignore[arg-type]


class Ini:
    """Reads an ini into a Config. Raises ConfigError."""

    def __init__(self, path: Path, environment: Mapping[str, str], concern: Callable[[str], str]) -> None:
        self.path = path
        self.environment = environment
        self.concern = concern  # Says of an Action whether it is about a "session", or "unknown".
        self.sections: dict[str, Section] = {}
        self.warnings: list[str] = []

    def _error(self, line: int, what: str) -> ConfigError:
        return ConfigError(f"{self.path}:{line}: {what}")

    def _parse(self, text: str) -> None:
        section = name = ""
        for number, line in enumerate(text.split("\n"), 1):
            value = line.strip()
            if not value or value.startswith((";", "#")):
                continue
            if line.startswith("["):
                section, name = " ".join(value[1:-1].split()), ""
                kind, _, charger_id = section.partition(" ")
                is_known = section in SECTIONS or (kind == "charger" and is_charger_id(charger_id))
                if not (is_known and value.endswith("]")):
                    expected = f"[{'], ['.join(SECTIONS)}] or [charger ID], its ID being {CHARGER_ID}"
                    raise self._error(number, f"unknown section {value!a}; expected {expected}")
                self.sections.setdefault(section, {})
                continue
            if line[0] not in " \t":
                name, value = self._key(section, line, number)
                self.sections[section][name] = []
            elif not name:
                raise self._error(number, "an indented line continues a value, and no value stands above it")
            self.sections[section][name].append((number, self._substituted(value.strip(), number)))

    def _key(self, section: str, line: str, number: int) -> tuple[str, str]:
        """Split a line into a key and its value; of what is neither, show no more than the first word."""
        name, equals, value = line.partition("=")
        word = ascii("".join(re.findall(r"\A[\w.]*", line)))  # Behind it there may be a password.
        if not equals or not section:
            raise self._error(number, f"{word}: expected a [section], and in it `key = value` or a comment")
        name = name.strip() if section == "logging" else name.strip().lower()
        keys = SECTIONS.get(section, CHARGER_KEYS)
        if name not in keys and section != "logging":
            near = difflib.get_close_matches(name, keys, 1)
            expected = f"did you mean {near[0]}?" if near else f"expected {', '.join(keys)}"
            raise self._error(number, f"unknown key {word} in [{section}]; {expected}")
        if name in self.sections[section]:
            first = self.sections[section][name][0][0]
            raise self._error(number, f"{name} stands twice in [{section}], first at line {first}")
        if re.search(r"\s[;#]", value) and not name.endswith("password"):
            raise self._error(number, f"{name}: a comment behind a value; expected it on a line of its own")
        return name, value

    def _substituted(self, text: str, number: int) -> str:
        try:
            return re.sub(r"\$\{(\w+\}|)", lambda found: self.environment[found[1].rstrip("}")], text)
        except KeyError as name:
            what = f"environment variable {name} is not set; expected ${{NAME}} of one that is"
            raise self._error(number, what) from None

    def _values(self, section: Section, keys: Keys) -> dict[str, Any]:
        """Return the values of a section, also those that it leaves to their defaults."""
        values = dict[str, Any]()
        for name, declared in keys.items():
            read = declared["read"]
            value = "\n".join(text for _, text in section.get(name, [])).strip() or declared["default"]
            if read.func in (os.fspath, readable) and value not in ("", "none"):  # Paths.
                value = str(self.path.parent / value)
            try:
                values[name] = read(value)
            except ValueError as error:
                is_secret = name.endswith("password") or "@" in value or "?" in value
                self._refuse(section, name, True, f"{'is unfit' if is_secret else ascii(value)}: {error}")
        return values

    def _place(self, section: Section, name: str) -> str:
        return f"{self.path}:{section[name][0][0] if name in section else 1}: {name}"

    def _refuse(self, section: Section, name: str, is_mistake: object, what: str) -> None:
        if is_mistake:
            raise ConfigError(f"{self._place(section, name)} {what}")

    def _doubt(self, section: Section, name: str, is_doubtful: object, what: str) -> None:
        if is_doubtful:
            self.warnings.append(f"{self._place(section, name)} {what}")

    def load(self, text: str) -> Config:
        """Return what the text says, checked. Raises ConfigError."""
        self._parse(text)
        logs, host, general, status = (self.sections.get(name, {}) for name in SECTIONS)
        levels = self._values(logs, dict.fromkeys(logs, LEVEL) | SECTIONS["logging"])
        is_full = levels.pop("rfid") == "full"
        self.host: HostConfig = made_of(HostConfig, self._values(host, SECTIONS["host"]))
        is_idle = self.host.client_ca and not self.host.cert_chain
        self._refuse(host, "client_ca", is_idle, "needs cert_chain: without TLS nobody shows a certificate")
        second = made_of(StatusConfig, self._values(status, SECTIONS["status"]))
        is_open = second.port and not second.password and not is_loopback(second.addr)
        self._refuse(status, "addr", is_open, f"{second.addr!a} is not loopback: [status] needs a password")
        own = {name: section for name, section in self.sections.items() if name not in SECTIONS}
        chargers = {name.partition(" ")[2]: self._charger(general | section) for name, section in own.items()}
        default, doubts = self._charger(general), tuple(dict.fromkeys(self.warnings))
        return Config(levels, is_full, self.host, second, default, chargers, doubts)

    def _charger(self, section: Section) -> ChargerConfig:
        values = self._values(section, CHARGER_KEYS)
        lines = {name: at[0][0] for name, at in section.items()}
        values["password"] = values["password"] or self.host.password
        missing = f"is missing in [ext-server]; expected an address or {LOCAL}"
        self._refuse(section, "server", not values["server"], missing)
        values |= {"servers": {}, "lines": lines, "badges": self._badges(section, lines)}
        for peer, name in zip(SERVERS, ("server", "secondary_server"), strict=True):
            prefix, url = f"{peer}_", values[name]
            uri = parse_uri(url if url not in ("", LOCAL) else "ws://elsewhere")
            is_own = uri.port == self.host.port and (is_loopback(uri.host) or uri.host == self.host.addr)
            self._refuse(section, name, is_own, f"is the proxy's own address; expected another, or {LOCAL}")
            values |= {f"{prefix}url": url, f"{prefix}name": values[f"{prefix}name"] or peer}
            if url:
                values["servers"][peer] = made_of(ServerConfig, values, prefix)
        config: ChargerConfig = made_of(ChargerConfig, values)
        self._check(config, section)
        return config

    def _check(self, config: ChargerConfig, section: Section) -> None:
        for action in config.secondary_copies:
            what = f"{action!a} cannot be copied: it may be about a badge or transaction, or nobody knows it"
            self._refuse(section, "secondary_copies", self.concern(action) != "station", what)
        for action in config.secondary_refuse:
            what = f"names an unknown Action: {action!a}"
            self._doubt(section, "secondary_refuse", self.concern(action) == "unknown", what)
        primary, is_checked = config.servers["primary"], config.password or self.host.client_ca
        is_open = primary.url == LOCAL or not primary.needs_charger_login
        what = "lets nobody check who connects: set `password` or `client_ca`, or listen on 127.0.0.1 alone"
        self._doubt(section, "server", is_open and not (is_checked or is_loopback(self.host.addr)), what)
        is_alone = "secondary" not in config.servers and "secondary" in config.badges.values()
        what = "stands without secondary_server: its badges are the primary's"
        self._doubt(section, "secondary_rfid", is_alone, what)

    def _badges(self, section: Section, lines: dict[str, int]) -> dict[str, Peer]:
        """Return whose list each badge is on; note where."""
        owners = dict[str, Peer]()
        for peer in SERVERS:
            pieces = section.get(f"{peer}_rfid", [])
            for number, badge in ((number, word) for number, text in pieces for word in words(text)):
                name = normalized(badge)
                where = f"badge {badge!a} stands in line {lines.get(name)}, too"
                if owners.get(name, peer) is not peer:
                    raise self._error(number, f"{where}: on primary_rfid and on secondary_rfid")
                if name in owners:
                    self.warnings.append(f"{self.path}:{number}: {where}: it counts once")
                owners[name], lines[name] = peer, number
        return {name: owners[name] for name in sorted(owners, key=len, reverse=True)}


def load_config(path: Path, environment: Mapping[str, str], concern: Callable[[str], str]) -> Config:
    """Read the ini at `path`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "it is not UTF-8 text")
        raise ConfigError(f"{path}: cannot be read: {why}") from None
    return Ini(path, environment, concern).load(text)


# ---------------------------------------------------------------------------------------------------------
# Messages
#
# Text to Message, or one error type; and the few changes of a text that the proxy makes. A patch replaces
# one value where it stands and leaves every other character as it came: signed meter values stay valid.
# ---------------------------------------------------------------------------------------------------------

MAX_MESSAGE_ID = 255  # Characters; OCPP-J allows 36, some peers use more.

# The first element of a message (OCPP 2.1 part 4, 4.1.3).
CALL, CALLRESULT, CALLERROR, CALLRESULTERROR, SEND = MESSAGE_TYPES = range(2, 7)
MessageId = str | int  # As its sender wrote it: some servers count in numbers (go-eCharger-API-v2#106).
TextPath = tuple[str | int, ...]  # From the message's array down, as (3, "transactionId").


class Message(NamedTuple):
    """One OCPP-J message. Its text is what is forwarded."""

    type: int  # One of MESSAGE_TYPES.
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


# Lenient with control characters in strings: chargers append them to badges; not with NaN and Infinity, which
# int() refuses. Its scanner is called directly: `json.loads` takes as long again for a short text.
DECODER = json.JSONDecoder(strict=False, parse_constant=int)
_scan: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]
_blanks = re.compile(r"[ \t\n\r]*").match


def _skip(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not white space."""
    return _blanks(text, at).end()  # type: ignore[union-attr]  # It matches everywhere.


def decoded(text: str) -> Any:
    """Return what JSON says. Raises ValueError or RecursionError."""
    try:
        value, end = _scan(text, 0 if text.startswith("[") else _skip(text, 0))
    except StopIteration as stop:
        raise ValueError(f"a value is expected at character {stop.value}") from None
    if end != len(text) and _skip(text, end) != len(text):
        raise ValueError(f"there is more behind character {end}")
    return value


def parse(text: str) -> Message:
    """Return the text as a Message. Raises MessageError, and nothing else, for any other text."""
    try:
        parts = decoded(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {error}"[:200], text) from None
    if type(parts) is not list or len(parts) < 3:
        raise MessageError("no JSON array of three or more elements", text)
    parts += ["", ""]  # A CallResult has three parts, a Call four.
    kind, message_id, action, payload, details, *_ = parts
    if type(kind) is not int or kind not in MESSAGE_TYPES:
        raise MessageError("unknown message type", text)
    is_id = 1 <= len(message_id) <= MAX_MESSAGE_ID if type(message_id) is str else type(message_id) is int
    if kind == CALLRESULT:
        payload, action = {} if action == [] else action, ""  # PHP writes an empty answer so.
    elif kind in (CALLERROR, CALLRESULTERROR):
        payload = details if type(details) is dict else {}
    if payload is None:  # As good as {} (OCPP-J 1.6 4.2.1).
        payload = {}
    if not is_id or type(action) is not str or type(payload) is not dict:
        raise MessageError("no id, Action (or error code) and payload as OCPP-J has them", text)
    return Message(kind, message_id, action, payload, text)


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
    return dump([CALLERROR, message_id, code, description[:255], {}])


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

# What the router treats in a way of its own.
Role = Literal[
    "plain", "boot", "status", "meter", "remote-start", "reserve", "cancel", "trigger",
    "start", "stop",  # 1.6: the server picks the transaction id.
    "event",  # 2.x: the station picks it.
    "command",  # Worth a line in the story of the day.
]  # fmt: skip
HEARTBEAT_INTERVAL = 300  # Seconds; given to chargers where the proxy itself is the server.

FieldPath = tuple[str, ...]  # From the payload down; "*" stands for the elements of an array.


@dataclass(frozen=True, slots=True)
class Facts:
    """Where one Action carries what, and its answer."""

    role: Role = "plain"
    is_16: bool = False  # A row of OCPP 1.6, whose transaction ids are whole numbers.
    badge: FieldPath = ()
    badge_type: FieldPath = ()
    transaction: FieldPath = ()
    connector: FieldPath = ()  # 2.x: the EVSE. Only where the routing asks for it.
    request: FieldPath = ()
    reservation: FieldPath = ()
    remote_start: FieldPath = ()
    state: FieldPath = ()  # The connector's status, or the charging state.
    meter: FieldPath = ()  # The energy register in Wh; it may stand in a sampled value, too.
    reason: FieldPath = ()  # Why a session ended.
    asked_by: str = ""  # The Action that this one reports on where no request id says so.
    by_connector: bool = False  # Belongs to the session on its connector, if there is one.
    answer: str = "{}"  # The smallest that the schema allows, as JSON with $places.
    badge_answer: str = ""  # Instead, where the Call carries a badge.
    certificate_answer: str = ""  # Instead, where it carries a certificate, which only the server can check.
    rejects: bool = False  # A server's Action: the schema of its answer has a status Rejected.


PLAIN = Facts()
SAMPLES = ("meterValue", "*", "sampledValue", "*")
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
            if name.endswith("answer"):
                values[name] = ANSWERS.get(value, value)
            else:
                is_path = equals and name not in ("role", "asked_by")
                values[name] = tuple(value.split(".")) if is_path else value or True
        rows.update(dict.fromkeys(actions.split(","), Facts(**values)))
    return rows


table_16 = partial(table, is_16=True)
CHARGER_16 = table_16("""
    Authorize                        badge=idTag connector=connectorId answer=badge-1.6
    BootNotification                 role=boot answer=boot
    DataTransfer                     answer={"status":"UnknownVendorId"}
    DiagnosticsStatusNotification    asked_by=GetDiagnostics
    FirmwareStatusNotification       asked_by=UpdateFirmware
    Heartbeat                        answer={"currentTime":"$now"}
    LogStatusNotification            request=requestId asked_by=GetLog
    MeterValues                      role=meter transaction=transactionId connector=connectorId by_connector
    SecurityEventNotification
    SignCertificate                  answer={"status":"Rejected"}
    SignedFirmwareStatusNotification request=requestId asked_by=SignedUpdateFirmware
    StartTransaction                 role=start badge=idTag connector=connectorId
                                     reservation=reservationId meter=meterStart answer=start
    StatusNotification               role=status connector=connectorId state=status
    StopTransaction                  role=stop badge=idTag transaction=transactionId
                                     meter=meterStop reason=reason
    """)
SERVER_16 = table_16("""
    CancelReservation                role=cancel reservation=reservationId rejects
    ChangeAvailability,ChangeConfiguration,Reset role=command rejects
    CertificateSigned,ClearCache,DataTransfer,GetCompositeSchedule,InstallCertificate rejects
    ClearChargingProfile,GetConfiguration,GetDiagnostics,GetInstalledCertificateIds,GetLocalListVersion
    DeleteCertificate,SendLocalList,UpdateFirmware
    ExtendedTriggerMessage,TriggerMessage role=trigger rejects
    GetLog,SignedUpdateFirmware      request=requestId rejects
    RemoteStartTransaction           role=remote-start badge=idTag connector=connectorId
                                     transaction=chargingProfile.transactionId rejects
    RemoteStopTransaction            role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idTag connector=connectorId
                                     reservation=reservationId rejects
    SetChargingProfile               transaction=csChargingProfiles.transactionId rejects
    UnlockConnector                  role=command
    """)
# Where 2.x has the same as 1.6, it is not said again.
CHARGER_201 = CHARGER_16 | table("""
    Authorize                        badge=idToken.idToken badge_type=idToken.type answer=badge-2.x
                                     certificate_answer=no-contract
    FirmwareStatusNotification       request=requestId asked_by=UpdateFirmware
    ClearedChargingLimit,NotifyChargingLimit
    Get15118EVCertificate            answer={"status":"Failed","exiResponse":""}
    GetCertificateStatus             answer={"status":"Failed"}
    MeterValues                      role=meter connector=evseId by_connector
    NotifyCustomerInformation,NotifyMonitoringReport,NotifyReport request=requestId
    NotifyDisplayMessages            request=requestId transaction=messageInfo.*.transactionId
    NotifyEVChargingNeeds            connector=evseId by_connector answer={"status":"Processing"}
    NotifyEVChargingSchedule         connector=evseId by_connector answer={"status":"Accepted"}
    NotifyEvent                      transaction=eventData.*.transactionId
    PublishFirmwareStatusNotification request=requestId asked_by=PublishFirmware
    ReportChargingProfiles           request=requestId transaction=chargingProfile.*.transactionId
    ReservationStatusUpdate          reservation=reservationId
    StatusNotification               role=status connector=evseId state=connectorStatus
    TransactionEvent                 role=event badge=idToken.idToken badge_type=idToken.type
                                     transaction=transactionInfo.transactionId connector=evse.id
                                     reservation=reservationId remote_start=transactionInfo.remoteStartId
                                     state=transactionInfo.chargingState badge_answer=badge-2.x
                                     reason=transactionInfo.stoppedReason
    """)
SERVER_201 = SERVER_16 | table("""
    ClearDisplayMessage,ClearVariableMonitoring,GetVariables,SetVariableMonitoring,SetVariables
    UnpublishFirmware
    CostUpdated,GetTransactionStatus transaction=transactionId
    CustomerInformation              badge=idToken.idToken request=requestId rejects
    GetBaseReport,GetMonitoringReport,GetReport,PublishFirmware,UpdateFirmware request=requestId rejects
    GetChargingProfiles,GetDisplayMessages request=requestId
    RequestStartTransaction          role=remote-start badge=idToken.idToken connector=evseId
                                     remote_start=remoteStartId
                                     transaction=chargingProfile.transactionId rejects
    RequestStopTransaction           role=command transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idToken.idToken connector=evseId
                                     reservation=id rejects
    SetChargingProfile               transaction=chargingProfile.transactionId rejects
    SetDisplayMessage                transaction=message.transactionId rejects
    SetMonitoringBase,SetMonitoringLevel,SetNetworkProfile rejects
    """)
CHARGER_21 = CHARGER_201 | table("""
    BatterySwap                      badge=idToken.idToken request=requestId
    GetCertificateChainStatus        answer=chain-status
    ClosePeriodicEventStream,NotifyDERAlarm,NotifyDERStartStop,NotifyPeriodicEventStream
    NotifyWebPaymentStarted
    NotifyPriorityCharging,NotifySettlement transaction=transactionId
    OpenPeriodicEventStream,PullDynamicScheduleUpdate answer={"status":"Rejected"}
    ReportDERControl                 request=requestId
    VatNumberValidation              answer={"vatNumber":$vat_number,"status":"Rejected"}
    """)
SERVER_21 = SERVER_201 | table("""
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

    charger: dict[str, Facts]  # The charger's Actions; those of older versions that have no newer row, too.
    server: dict[str, Facts]  # The servers' Actions, likewise.
    malformed: str  # The error code for a Call that cannot be read.
    boot: str  # The BootNotification of a charger that never sent one.


BOOT_16 = '{"chargePointVendor":"unknown","chargePointModel":$model}'
BOOT_2X = '{"reason":"Unknown","chargingStation":{"vendorName":"unknown","model":$model}}'
VOCABULARIES = {
    "ocpp1.6": Vocabulary(CHARGER_16, SERVER_16, "FormationViolation", BOOT_16),  # Spelt like that in 1.6.
    "ocpp2.0.1": Vocabulary(CHARGER_201, SERVER_201, "FormatViolation", BOOT_2X),
    "ocpp2.1": Vocabulary(CHARGER_21, SERVER_21, "FormatViolation", BOOT_2X),
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
    """Return the value at a path without "*", or None."""
    for step in path:
        payload = payload.get(step) if type(payload) is dict else None
    return payload if path else None


def integer(value: Any) -> int | None:
    """Return the value if it is a whole number of 64 bits; true and 1.0 are none."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


class Content(NamedTuple):
    """What a Call says, read by the facts of its Action; None for what it does not carry."""

    facts: Facts
    payload: dict[str, Any]
    badge: str | None = None  # The RFID; None also where none is needed.
    transactions: tuple[TransactionId, ...] = ()  # The usable ids that it names.
    connector: int | None = None  # In 2.x the EVSE; 0 is the whole station.
    request: int | None = None  # The id of the request that it makes, or reports on.
    timestamp: str = ""  # By the charger's clock, as it writes it; "" = it does not say.
    is_start: bool = False  # Of a session.
    is_stop: bool = False
    is_reading: bool = False  # It only tells how a session goes on, and does not settle whose it is.
    mark: str = ""  # What a Call of a session has in common with its repeat; "" = it is never one.

    @property
    def is_triggered(self) -> bool:
        """Whether it holds a reading that a server has asked for with TriggerMessage."""
        is_asked = self.payload.get("triggerReason") == "Trigger"
        samples = values_at(self.payload, SAMPLES)
        return is_asked or any(value_at(sample, ("context",)) == "Trigger" for sample in samples)

    @property
    def stop(self) -> str:
        """What a StopTransaction and its repeats have in common."""
        names = ("transactionId", "idTag", "meterStop", "timestamp")
        return fingerprint([self.payload.get(name) for name in names])

    @property
    def register(self) -> float | None:
        """The last reading of the energy register, in Wh."""
        samples = [sample for sample in values_at(self.payload, SAMPLES) if type(sample) is dict]
        for sample in reversed([s for s in samples if s.get("measurand", REGISTER) == REGISTER]):
            if (reading := watt_hours(sample)) is not None:
                return reading
        return watt_hours({"value": value_at(self.payload, self.facts.meter)}) if self.facts.meter else None

    @property
    def needs_server(self) -> bool:
        """Whether it carries a certificate of Plug & Charge, which only the server can check (2.0.1 C07)."""
        keys = {"certificate", "iso15118CertificateHashData"}
        return bool(self.facts.certificate_answer) and not keys.isdisjoint(self.payload)

    def answer(self, verdict: str, now: str, transaction: TransactionId | None) -> str:
        """Return the smallest answer that the schema allows, as JSON."""
        facts = self.facts
        if self.needs_server:
            return facts.certificate_answer
        has_badge = facts.badge_answer and value_at(self.payload, facts.badge) is not None
        vat_number = dump(short(self.payload.get("vatNumber")))
        answer = Template(facts.badge_answer if has_badge else facts.answer)
        return answer.substitute(verdict=verdict, now=now, transaction=transaction, vat_number=vat_number)


def content_of(rows: dict[str, Facts], message: Message) -> Content:
    """Return a Call read by the row of its Action; by that of 1.6 where it has the shape of 1.6."""
    action, payload = message.action, message.payload
    facts = rows.get(action, PLAIN)
    if not facts.is_16 and payload.keys() & SHAPE_16 and not payload.keys() & SHAPE_2X:
        facts = CHARGER_16.get(action) or SERVER_16.get(action) or facts
    role, get, event, mark, settles = facts.role, payload.get, "", "", True
    badge = value_at(payload, facts.badge) if facts.badge else None
    if type(badge) is int:
        badge = str(badge)
    if type(badge) is not str or value_at(payload, facts.badge_type) == "NoAuthorization":
        badge = None
    when = short(get("timestamp"))
    if role == "event":
        event, number = short(get("eventType")), integer(get("seqNo"))
        mark = "" if number is None else f"{event} {number} {when or fingerprint([payload])}"
        settles = bool(badge or value_at(payload, facts.remote_start) or get("reservationId"))
    elif role == "start" or role == "stop":
        mark = role
    named = values_at(payload, facts.transaction) if facts.transaction else ()
    usable = tuple([usable for value in named if (usable := usable_id(value, facts.is_16)) is not None])
    connector = integer(value_at(payload, facts.connector)) if facts.connector else None
    request = integer(value_at(payload, facts.request)) if facts.request else None
    is_start, is_stop = role == "start" or event == "Started", role == "stop" or event == "Ended"
    is_reading = role == "meter" or (event == "Updated" and not settles)
    return Content(
        facts, payload, badge, usable, connector, request, when, is_start, is_stop, is_reading, mark
    )


MAX_ID = 2**31 - 1  # The largest transaction id that chargers and servers agree on (SteVe, MicroOcpp).
MAX_SHORT = 200  # Characters of what is kept of what a peer says of itself.
MAX_WATT_HOURS = 1e15  # More than any register shows, and still exact to the Wh.
REGISTER = "Energy.Active.Import.Register"
CALL_ERROR = "CallError"  # Begins the words of what a CallError has refused: it is tried again.
NOTHING = Content(PLAIN, {})
TransactionId = int | str


def usable_id(value: Any, is_16: bool) -> TransactionId | None:
    """Return a usable transaction id as it is kept in tables; None for null, 0 and the like."""
    if is_16 and type(value) is str and re.fullmatch(r"\d{1,10}", value, re.ASCII):
        value = int(value)
    if type(value) is int:
        return value if 1 <= value <= MAX_ID else None
    return value if type(value) is str and value else None


def watt_hours(sample: dict[str, Any]) -> float | None:
    """Return what a SampledValue of the energy register says of all phases (1.6 7.43, 2.0.1 2.45)."""
    if sample.get("phase"):
        return None
    # 2.x; 1.6 has the unit in the sample, and values as text.
    unit = value_at(sample, ("unitOfMeasure", "unit")) or sample.get("unit", "Wh")
    multiplier = integer(value_at(sample, ("unitOfMeasure", "multiplier"))) or 0
    if unit not in ("Wh", "kWh") or not -9 <= multiplier <= 9 or type(sample.get("value")) is bool:
        return None
    try:
        reading = float(sample.get("value", "")) * 10 ** (multiplier + 3 * (unit == "kWh"))
    except (TypeError, ValueError, OverflowError):
        return None
    return round(reading, 3) if abs(reading) <= MAX_WATT_HOURS else None


def utc_of(date: Any) -> float | None:
    """Return the UTC seconds of a time as OCPP writes it; None for anything else."""
    try:
        moment = datetime.fromisoformat(date if type(date) is str else "")
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def verdict_of(payload: dict[str, Any]) -> Any:
    """Return the status that an answer gives to a badge; None = it says nothing of one."""
    return value_at(payload, ("idTagInfo", "status")) or value_at(payload, ("idTokenInfo", "status"))


def words_of(answer: Message) -> str:
    """Return what a server's answer has against a Call; "" = nothing."""
    if answer.type == CALLERROR:
        described = next(iter(decoded(answer.text)[3:]), "")
        return f"{CALL_ERROR} {answer.action} {short(described)}".strip()
    status = verdict_of(answer.payload) if answer.payload else None
    return "" if status in (None, "Accepted") else f"status {str(status)[:MAX_SHORT]}"


def fingerprint(values: list[Any]) -> str:
    """Return a text of bounded length that equal values have in common, and others do not."""
    text = dump(values)
    return text if len(text) <= MAX_SHORT else hashlib.sha256(text.encode()).hexdigest()


def short(value: Any) -> str:
    """Return the beginning of a text; "" for what is none."""
    return value[:MAX_SHORT] if type(value) is str else ""


# What would move a charger to another server, cut it off from its own, or change its name or login is the
# primary's alone. Names of configuration keys (1.6), of components and variables (2.x), as shell patterns: of
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
SETTING_ACTIONS = {"ChangeConfiguration", "SetVariables"}
CHANGES = ("setVariableData", "*")
NAMES_OF_SETTINGS = [("key",), (*CHANGES, "component", "name"), (*CHANGES, "variable", "name")]
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
    for name in (str(value) for path in NAMES_OF_SETTINGS for value in values_at(payload, path)):
        key = name[: MAX_SHORT + 1].strip(BLANKS).casefold()
        is_odd = len(key) > MAX_SHORT or not key.isprintable() or not key.isascii()
        if is_odd or any(fnmatchcase(key, pattern) for pattern in GUARDED_SETTINGS):
            return short(name)
    return ""


def rejection_of(facts: Facts, payload: dict[str, Any]) -> str:
    """Return the Rejected that the schema of the answer to a server's Call has, as JSON; "" = none."""
    names = ("component", "variable")
    results = [
        {"attributeStatus": "Rejected", **{name: value_at(change, (name,)) for name in names}}
        for change in values_at(payload, CHANGES)
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
# them out. Pure: no socket, clock or log. One job a class: whose a Call of the charger is (Router), the
# servers' Calls and claims (Commands), what servers' answers tell (Answers).
# ---------------------------------------------------------------------------------------------------------

FIRST_PROXY_ID = 2_000_000_000  # From here on, transaction ids are the proxy's; Unix time gets there in 2033.
FIRST_DAY = 1_577_836_800.0  # 2020: a charger's clock that is set is later.
SESSION_SECONDS = 7 * DAY  # An ended session can still be named for so long.
SILENT_SECONDS = 30 * DAY  # A session that nothing was heard of for so long counts as ended.
CLAIM_SECONDS = 300.0  # A remote start that no session followed; a report that a reservation has expired.
TRIGGER_SECONDS = 60.0  # A reading that a server has asked for comes within so long.
READING_SECONDS = 60.0  # How often the readings of a session are reckoned up and saved, if nobody looks.
POWER_SECONDS = 30.0  # Between two readings that kW are reckoned from, at least.
RETRY_SECONDS = (10.0, 60.0)  # Before the second and the third try of a stored Call that met a CallError.
REFUSED_SECONDS = 30 * DAY  # What CallErrors refused is tried once more a day for so long.

# The most of each kind that one charger may have; beyond it the oldest goes.
MAX_SESSIONS = 1000
MAX_FEW = 64  # Claims, reports, statuses, a session's answers; a server's Calls for it, waiting or sent.
MAX_SELF_DESCRIPTION = 2**14  # Characters of a boot, of a status, or of an answer, that are kept.
MAX_OWNERLESS = 100  # Stored Calls of one transaction whose owner is not known yet.
MAX_STORED = 10_000  # Calls of one charger, with those that are refused;
MAX_STORED_TEXT = 2**26  # characters of them. Where nothing can go, nothing more is stored or answered.

ACTION = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # A charger's parser might end it at the first odd character.


class Instant(NamedTuple):
    """A point in time, on both clocks."""

    seconds: float  # Monotonic. Deadlines are measured on this one.
    utc: float  # Seconds since 1970, for what outlives the process; may jump.

    @property
    def text(self) -> str:
        """The time as OCPP writes it (RFC 3339)."""
        return datetime.fromtimestamp(self.utc, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# What becomes of a Call on its way to a server. Nothing changes it on the way.
Kind = Literal[
    "relayed",  # Its server's answer is the charger's answer.
    "stored",  # On disk until its server has answered; the proxy answers the charger.
    "passing",  # Gone with the connection: copies, notes, what is the proxy's own.
]

# Of a Call, a Session and a Memory the state file holds what stands above the KW_ONLY.


@dataclass(slots=True, eq=False)
class Call:
    """A Call on its way to a server, or from one to the charger. Its text stands under its message id."""

    text: str
    peer: Peer | None = None  # The server. None: a stored Call whose server is not known yet.
    charger: str = ""  # Its id.
    session: Session | None = None
    server: str = ""  # The address that it is bound to; "" = not known yet.
    version: str = ""  # The subprotocol that it is written in.
    since: float = 0.0  # UTC seconds; when it came.
    tries: int = 0  # CallErrors that it met; at most three.
    refused: str = ""  # Its server's words; "" = it waits.
    _: KW_ONLY
    kind: Kind = "passing"
    action: str
    message_id: MessageId  # As its receiver knows it.
    content: Content
    number: int = 0  # Its row in the state file; 0 = none yet.
    reply_to: MessageId | None = None  # Its sender's id that waits; None = nobody waits any more.
    claim: Claim | None = None  # What a server's Call claims.
    own_answer: str = ""  # JSON; the proxy's own, until it is given.
    why: str = "the proxy's own, or left from before"  # Whose it is, by which rule.
    is_awaited: bool = False  # The charger waits for the secondary's answer first.
    queued: float = 0.0  # Monotonic seconds, when it came; 0 = before the process.
    was_kept: bool = False  # For the owner of its transaction.
    sent: float | None = None  # Monotonic; None = not on this connection.
    not_before: float = 0.0  # Monotonic seconds; its next try.

    def rename(self) -> None:
        """Take a new message id: SteVe refuses ids that it has seen on the connection."""
        self.message_id = new_message_id()
        self.text = patch(self.text, (1,), self.message_id)


@dataclass(slots=True, eq=False)
class Session:
    """A charging session. Its owner never changes."""

    owner: Peer | None  # None: a 2.x transaction whose badge has not come yet.
    badge: str  # As it came; "" = none.
    connector: int | None  # 2.x: the EVSE.
    begun: float  # UTC seconds.
    touched: float  # UTC seconds, to the minute: its last message; when its readings were reckoned up.
    charger: str = ""  # Its id.
    server: str = ""  # Its owner's address when it began; "" = no owner yet, or the ini rejects its badge.
    transaction_id: TransactionId | None = None  # As the charger knows it; None until there is one.
    server_id: TransactionId | None = None  # As its owner knows it, usable or not; None until it has told.
    # 1.6: what a repeated StartTransaction has in common with this one's; "" = it would be another session:
    # the charger has named the id since, or may try again because its owner has refused it.
    start: str = ""
    stop: str = ""  # What a repeated stop has in common with this one's; "" = it has not come.
    is_told: bool = False  # 1.6: the charger was told the transaction id.
    ended: float | None = None  # UTC seconds. Without a stop this is a label: a late stop completes it.
    started_at: str = ""  # By the charger's clock, as it wrote it; "" = not said.
    stopped_at: str = ""  # Likewise.
    meter_start: float | None = None  # Wh; the first reading.
    meter_stop: float | None = None  # Wh; the last reading so far.
    reason: str = ""  # Why it ended, in the charger's words.
    delivered: float | None = None  # UTC seconds; when its owner accepted its stop.
    refused: str = ""  # The owner's words against its start.
    is_refused: bool = False  # The owner knows nothing of it: the rest is kept and not sent.
    answers: dict[str, str] = field(default_factory=dict)  # JSON by Content.mark; MAX_FEW.
    _: KW_ONLY
    number: int = 0  # Its row in the state file; 0 = none yet.
    measured: tuple[float, float] | None = None  # By the charger's clock: UTC seconds and Wh,
    power: float | None = None  # and the W up to that reading.

    @property
    def key(self) -> TransactionId:
        """What the session is found by: its transaction id, or until there is one, its start."""
        return self.start if self.transaction_id is None else self.transaction_id


@dataclass(slots=True)
class Claim:
    """A server's word that the next session of a badge is its own; one session ends all that are equal."""

    peer: Peer
    server: str  # Its address.
    badge: str  # Normalized.
    connector: int | None  # None = any.
    until: float = field(compare=False)  # UTC seconds.
    transaction: str | None = field(default=None, compare=False)  # 2.x: as the charger's answer names it.
    reservation: int | None = field(default=None, compare=False)
    remote_start: int | None = field(default=None, compare=False)


@dataclass(slots=True, eq=False)
class Memory:
    """What is remembered of one charger from one connection to the next."""

    charger: str = ""  # Its id.
    version: str = ""  # The subprotocol of its last connection; "" = never connected.
    user_agent: str = ""  # What it called itself in its last handshake.
    seen: float = 0.0  # UTC seconds; when something was last seen of it; 0 = not known.
    boot: str = ""  # The text of the last BootNotification; "" = none seen.
    heartbeat_interval: int = HEARTBEAT_INTERVAL  # Seconds; what the charger was told.
    has_charged: bool = False  # It has had a session: not only an id that somebody has mistyped.
    statuses: dict[str, str] = field(default_factory=dict)  # The last of each connector; MAX_FEW.
    claims: list[Claim] = field(default_factory=list)  # The oldest first; MAX_FEW.
    _: KW_ONLY
    number: int = 0  # Its row in the state file; 0 = none yet.
    sessions: dict[TransactionId, Session] = field(default_factory=dict)  # By Session.key; MAX_SESSIONS.
    calls: dict[Call, None] = field(default_factory=dict)  # Stored, also refused; by arrival; MAX_STORED.
    # Who has asked last for something, under which message id: by request id, or else by Action; MAX_FEW.
    asked: dict[int | str, tuple[Peer, MessageId]] = field(default_factory=dict)
    triggers: dict[Peer, float] = field(default_factory=dict)  # Monotonic seconds; until when readings come.
    changed: dict[Row, bool] = field(default_factory=dict)  # Journal.pending.
    later: dict[Session, Callable[[], None]] = field(default_factory=dict)  # Journal.later.

    def note(self, row: Row, is_there: bool = True) -> None:
        """Let the disk know how a row stands now, or that it is gone."""
        self.changed[row] = is_there

    def add(self, session: Session, transaction_id: TransactionId | None = None) -> None:
        """Let a session be found, by the id that the charger is told; beyond the bound the oldest goes."""
        if transaction_id is not None:
            if self.sessions.get(session.key) is session:
                del self.sessions[session.key]
            session.transaction_id = transaction_id
        self.sessions[session.key] = session
        self.has_charged = True
        self.note(self)
        if len(self.sessions) > MAX_SESSIONS:
            ended = (key for key, old in self.sessions.items() if old.ended is not None)
            del self.sessions[next(ended, next(iter(self.sessions)))]

    @property
    def stored(self) -> list[Call]:
        """Its stored Calls, but for those that were refused."""
        return [call for call in self.calls if not call.refused]

    def on_connector(self, connector: int | None) -> Session | None:
        """Return the open session on a connector; 0 is the whole station."""
        found = [s for s in self.sessions.values() if s.connector == connector and s.ended is None]
        return found[-1] if found and connector else None

    def end(self, session: Session, utc: float) -> None:
        """Take note that nothing more is charged in a session."""
        session.ended = utc
        self.note(session)

    def stopped_by(self, said: Content) -> Route | None:
        """Find the session of a StopTransaction without a usable id (OCPP 1.6 errata 3.18)."""
        stop, badge = said.stop, normalized(said.badge or "")
        sessions = self.sessions.values()
        waiting = [session for session in sessions if session.server and not session.stop]
        holders = {session.connector: session for session in sessions}.values()  # Of each connector.
        for fits, why in (
            ([s for s in sessions if s.stop == stop][:1], "it repeats a stop"),
            ([s for s in waiting if badge and normalized(s.badge) == badge], "the open session of its badge"),
            ([s for s in waiting if s.start and not s.is_told], "the only one whose start was not answered"),
            (waiting, "the only open session"),
        ):
            found = [session for session in fits if session.ended is None] or fits
            if len(found) > 1:
                found = [session for session in found if session in holders]
            if fits:
                return Route(found[0].owner, why, found[0]) if len(found) == 1 else None
        return None

    def drop_claims(self, is_over: Callable[[Claim], bool]) -> None:
        if any(map(is_over, self.claims)):
            self.claims = [claim for claim in self.claims if not is_over(claim)]
            self.note(self)

    def make_room(self, call: Call) -> list[Decision] | None:
        """Let the oldest readings go for one more stored Call; None = there are not enough of them."""
        told = list[Decision]()
        kept = [c for c in self.calls if c.session is call.session] if call.peer is None else []
        surplus = kept if len(kept) >= MAX_OWNERLESS else []
        while True:
            size = sum([len(c.text) for c in self.calls], len(call.text))
            is_full = len(self.calls) >= MAX_STORED or size > MAX_STORED_TEXT
            calls = itertools.chain(surplus, self.calls if is_full else ())
            oldest = next((c for c in calls if c.content.is_reading and c.sent is None), None)
            if oldest is None:
                return None if is_full else told
            what = "stored Calls are kept; for each new one the oldest meter values are dropped"
            told.append(Told(f"{len(self.calls)} {what}", dropped=TOO_MANY))
            self.remove(oldest)
            surplus = []

    def remove(self, call: Call) -> None:
        """Forget a Call that its server has answered, or that goes nowhere."""
        self.calls.pop(call, None)
        self.note(call, is_there=False)

    def retry(self, utc: float) -> None:
        """Let what CallErrors refused be tried once more, with the rest of its session."""
        for call in self.calls:  # A start comes before its rest.
            session, is_recent = call.session, utc - call.since < REFUSED_SECONDS
            if not (is_recent and call.refused.startswith(CALL_ERROR)):
                continue
            if session and call.content.is_start:
                session.refused, session.is_refused = "", False
                self.note(session)
            if not (session and session.is_refused):  # Else its server could not know what it belongs to.
                call.refused = ""
                call.rename()
                self.note(call)


# Decisions. Each carries its reason. A Call is one: it is put into the queue of its server.


class ToPeer(NamedTuple):
    """Send the text: now, or once the rows are on disk."""

    peer: Peer  # The charger, or a server whose Call it answers.
    text: str
    why: str
    rows: tuple[Row | None, ...] = ()
    needs_disk: bool = False  # It waits for them also while the disk fails.
    call: Call | None = None  # It is the proxy's own answer to this one, which is given when it goes.
    outcome: str = ""  # Of a server's Call: result, error, refused (by the proxy) or unanswered.


class Told(NamedTuple):
    """Something that belongs into the story of the day, or into the books of what goes to nobody."""

    what: str
    badge: str = ""
    is_unlisted: bool = False  # The badge is on no list, and no claim speaks for it.
    dropped: str = ""  # The reason in a word: NOBODY_WAITS, TOO_MANY; "" = nothing was dropped.


NOBODY_WAITS, TOO_MANY = "nobody-waits", "too-many-stored"
Decision = Call | ToPeer | Told
Row = Call | Session | Memory  # Of the state file.


class Route(NamedTuple):
    """Whose a Call is, and by which rule."""

    owner: Peer | None
    why: str
    session: Session | None = None
    claim: Claim | None = None
    unlisted: str = ""  # What decides where neither a list nor a claim speaks for its badge: unknown_rfid.
    refused: str = ""  # It names an id of the proxy's whose session is forgotten: it is not sent.


STATION = Route("primary", "concerns the station")  # Only of what it says may the secondary have copies.
NO_BADGE = Route("primary", "no badge came with it")


def reckon(session: Session, said: Content) -> None:
    """Take the energy that a Call tells of, and by the charger's clock the power: it may come late."""
    times = values_at(said.payload, ("meterValue", "*", "timestamp"))
    register, measured = said.register, utc_of(times[-1] if times else said.timestamp)
    if register is None or (session.stop and register < (session.meter_stop or 0.0)):  # It comes late.
        return
    session.meter_start = register if session.meter_start is None else session.meter_start
    session.meter_stop = register
    before, wh = session.measured or (math.inf, 0.0)
    if measured is not None and not 0 <= measured - before < POWER_SECONDS:
        passed = measured - before
        session.power = max(0.0, register - wh) * 3600 / passed if passed > 0 else None
        session.measured = measured, register


def own_call(action: str, payload: str, peer: Peer | None = None) -> Call:
    """Return a passing Call of the proxy's own; its payload is JSON already."""
    name = new_message_id()
    return Call(call_text(name, action, payload), peer, action=action, message_id=name, content=NOTHING)


def put_newest(table: dict[Any, Any], key: Any, value: Any, most: int | None = None) -> None:
    """Take an entry as the newest of a table; beyond its bound the oldest goes."""
    table.pop(key, None)
    table[key] = value
    if len(table) > (most or MAX_FEW):
        del table[next(iter(table))]


class Router:
    """Whose a Call of the charger is (rule 1), and what becomes of it. Owns nothing but who waits."""

    def __init__(self, config: ChargerConfig, memory: Memory, version: str) -> None:
        self.config = config
        self.memory = memory
        self.vocabulary = VOCABULARIES[version]
        # By session and Content.mark: the Call whose answer the charger waits for, for its repeats.
        self.waiting: dict[tuple[Session, str], Call] = {}

    def charger_call(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of the charger."""
        said, memory = content_of(self.vocabulary.charger, message), self.memory
        role = said.facts.role
        told: list[Decision] = []
        if role == "start" or (role == "event" and said.transactions):
            route = self._route_of_session(said, now, told)
        else:
            route = self._route(said, now)
            if not route.session and (badge := said.badge) is not None:
                what = f"{message.action} is for {self.whose(route)}: {route.why}"
                told.append(Told(what, badge, bool(route.unlisted)))
        if role in ("boot", "status") and len(message.text) <= MAX_SELF_DESCRIPTION:
            memory.note(memory)
            if role == "boot":
                memory.boot = message.text
            else:
                where = fingerprint([said.connector, said.payload.get("connectorId")])
                put_newest(memory.statuses, where, message.text)
        is_free = role == "status" and value_at(said.payload, said.facts.state) == "Available"
        if is_free and (session := memory.on_connector(said.connector)):
            memory.end(session, now.utc)
        return told + self._dispatched(message, said, route, now)

    def _route(self, said: Content, now: Instant) -> Route:
        """Return whose a Call is that begins no session. The first rule that matches wins."""
        memory, named = self.memory, said.transactions
        sessions = [session for value in named if (session := memory.sessions.get(value))]
        owned = {session.owner: session for session in sessions if session.owner}
        if len(owned) > 1:
            return Route("primary", "names transactions of both servers")
        for owner, session in owned.items():
            return Route(owner, "its transaction", session)
        if named and not sessions:
            if not (isinstance(named[0], int) and named[0] >= FIRST_PROXY_ID):
                return Route("primary", "an unknown transaction")
            owner = "secondary" if named[0] & 1 else "primary"  # The lowest bit names it.
            return Route(owner, "a forgotten id of the proxy's", refused="its start is not known here")
        stopped = memory.stopped_by(said) if said.facts.role == "stop" else None
        if route := stopped or self._by_badge(said, said.connector, now):
            return route
        here = memory.on_connector(said.connector) if said.facts.by_connector else None
        if here and here.server:
            return Route(here.owner, f"the session on its connector {said.connector}", here)
        about = said.facts.asked_by if said.request is None else said.request
        asker, _ = memory.asked.get(about, (None, ""))
        return Route(asker, f"{asker} asked for it") if asker else STATION

    def _by_badge(self, said: Content, connector: int | None, now: Instant) -> Route | None:
        """Find the server that asked for a session with this badge or under these ids; else ask the ini."""
        payload, facts, badge = said.payload, said.facts, normalized(said.badge or "")
        named = {integer(value_at(payload, facts.reservation)), *said.transactions} - {None}
        remote_start = integer(value_at(payload, facts.remote_start))
        # A report on a reservation comes after its end.
        utc = now.utc - (CLAIM_SECONDS if said.badge is None else 0.0)
        claims = [c for c in self.memory.claims[::-1] if utc < c.until and c.server == self.address(c.peer)]
        its = numbered = [c for c in claims if remote_start is not None and remote_start == c.remote_start]
        if said.badge is not None:  # Servers that count from 1 use the same remoteStartId for others.
            here = [c for c in claims if None in (connector, c.connector) or connector == c.connector]
            its = sorted((c for c in here if badge == c.badge), key=lambda c: c not in numbered)
        by_id = (c for c in claims if named & {c.reservation, c.transaction})
        claim = next(itertools.chain(by_id, its), None)  # Of several the newest.
        if claim is None:
            return None if said.badge is None else self.route_of_badge(said.badge)
        why = "its reservation" if claim.reservation is not None else "its remote start"
        return Route(claim.peer, f"{self.config.name(claim.peer)} claimed it: {why}", claim=claim)

    def whose(self, route: Route) -> str:
        """Return what people call the owner."""
        return "nobody (rejected)" if route.unlisted == "reject" else self.config.name(route.owner)

    def route_of_badge(self, badge: str) -> Route:
        """Return whose a badge is, by the ini alone."""
        peer, unknown = self.config.badges.get(self.config.entry(badge)), self.config.unknown_rfid
        if peer and self.address(peer):
            return Route(peer, f"its badge is on {peer}_rfid")
        owner: Peer = "secondary" if unknown == "secondary" and self.address("secondary") else "primary"
        why = f"its badge is on no list: unknown_rfid = {unknown}"
        return Route(owner, why, unlisted="" if peer else unknown)

    def address(self, peer: Peer | None) -> str:
        """Return the address of a server; "" = there is none."""
        return self.config.servers[peer].url if peer in self.config.servers else ""

    def _session_of(self, said: Content, now: Instant, told: list[Decision]) -> Session:
        """Find or begin the session of a StartTransaction (1.6) or of a TransactionEvent (2.x)."""
        memory, transaction_id, start = self.memory, next(iter(said.transactions), None), ""
        if said.facts.role == "start":
            reading = (said.payload.get("meterStart"), said.payload.get("timestamp"))
            start = fingerprint([said.connector, normalized(said.badge or ""), *reading])
            session = next((s for s in memory.sessions.values() if s.start == start and not s.stop), None)
        else:
            session = memory.sessions.get(transaction_id or "")
            if session and said.is_start and session.started_at not in ("", said.timestamp):
                memory.end(session, now.utc)  # The station counts from the start again.
                told += self.settle(session, NO_BADGE)
                session = None
        if session is None:
            session = Session(None, "", None, now.utc, now.utc, memory.charger, start=start)
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
        if session.owner:
            return Route(session.owner, "its transaction", session)
        facts = said.facts
        kind, state = (value_at(said.payload, path) for path in (facts.badge_type, facts.state))
        is_late = facts.role == "start" or said.is_stop or kind == "NoAuthorization" or state == "Charging"
        if route := self._by_badge(said, session.connector, now) or (NO_BADGE if is_late else None):
            told += self.settle(session, route, said.badge or "")
        return (route or Route(None, "nobody's yet"))._replace(session=session)

    def settle(self, session: Session, route: Route, badge: str = "") -> list[Decision]:
        """Give a session that has none its owner, and the owner what was stored for it."""
        if session.owner:
            return []
        session.owner, session.badge = route.owner, badge
        session.server = "" if route.unlisted == "reject" else self.address(route.owner)
        self.memory.drop_claims(lambda claim: claim == route.claim)
        self.memory.note(session)
        what = f"a session of {self.whose(route)} begins on connector {session.connector}: {route.why}"
        decisions: list[Decision] = [Told(what, badge, bool(route.unlisted))]
        for call in [call for call in self.memory.stored if call.session is session]:
            call.peer, call.server, call.was_kept = session.owner, session.server, True
            if session.server in ("", LOCAL):
                self.memory.remove(call)
            else:
                self.memory.note(call)
                decisions.append(call)
        return decisions

    def _dispatched(self, message: Message, said: Content, route: Route, now: Instant) -> list[Decision]:
        """Relay the Call, or answer and store it; others get copies."""
        session, mark, is_reading = route.session, said.mark, said.facts.role == "meter"
        if session and mark and (answered := self._repeated(message, mark, session)):
            return answered
        memory, name, dropped = self.memory, message.message_id, None
        askers = {who for who in memory.triggers if now.seconds < memory.triggers[who] and said.is_triggered}
        if is_reading and route is STATION and askers == {"secondary"}:
            route = Route("secondary", "secondary asked for it")
        is_primarys_alone = is_reading and route.owner == "secondary" and askers == {"primary"}
        call = Call(message.text, route.owner, action=message.action, message_id=name, content=said)
        call.charger, call.version, call.since = memory.charger, memory.version, now.utc
        call.session, call.reply_to, call.why = session, name, route.why
        if not (route.unlisted == "reject" or route.refused or is_primarys_alone):
            call.server = session.server if session else self.address(route.owner)
        if call.peer == "primary" and call.server == self.config.servers["primary"].url != LOCAL:
            call.kind = "relayed"
        elif (session and not is_primarys_alone) or said.facts.role == "stop":
            call.kind = "stored"
            if (dropped := memory.make_room(call)) is None:
                return [Told("too much waits for its server; no more is taken", dropped=TOO_MANY)]
        decisions = self._noted(session, said, message.text, now) if session else []
        if askers or route is STATION or route.owner != "primary":
            decisions += self._copies(message, said, route, askers)
        if session and mark:
            self.waiting[session, mark] = call
        answered = [call] if call.kind == "relayed" else self._answered_here(call, route, now)
        return decisions + answered + (dropped or [])

    def _repeated(self, message: Message, mark: str, session: Session) -> list[Decision]:
        """Answer what was answered before, or let it join what waits for its answer; [] = it is new."""
        if waiting := self.waiting.get((session, mark)):
            waiting.reply_to = message.message_id
            return [Told(f"a repeated {message.action} joins the one that waits for its answer")]
        if mark not in session.answers:
            return []
        if not session.is_told:  # Else a disk that fails need not hold up the answer.
            session.is_told = True
            self.memory.note(session)
        text = result_text(message.message_id, session.answers[mark])
        return [ToPeer("charger", text, f"repeats a {message.action}", (session,), True)]

    def _answered_here(self, call: Call, route: Route, now: Instant) -> list[Decision]:
        """Give a Call the proxy's own answer, and its server the Call."""
        said, session, memory = call.content, call.session, self.memory
        call.rename()
        if session and said.facts.role == "start" and session.transaction_id is None:
            memory.add(session, self.new_transaction_id(session.owner))
        call.refused = session.refused if session and session.is_refused else route.refused
        goes = call.server not in ("", LOCAL) and not call.refused
        if goes and call.peer == "secondary" and call.server == self.address("secondary"):
            call.is_awaited = self.config.secondary_replies == "forward" or said.needs_server
        is_rejected = call.peer is not None and not call.server
        verdict = "Invalid" if is_rejected or (route.unlisted and call.is_awaited) else "Accepted"
        call.own_answer = said.answer(verdict, now.text, session.transaction_id if session else None)
        if session:
            memory.note(session)
            if said.mark:
                put_newest(session.answers, said.mark, call.own_answer)
        decisions: list[Decision] = [call] if goes else []
        if call.kind == "stored" and (goes or call.refused or route.owner is None):
            memory.calls[call] = None
            memory.note(call)
            if call.refused:
                what = f"{call.action} is kept and not sent: its session is refused: {call.refused}"
                decisions.append(Told(what))
        # Once all that was stored for it is on disk.
        return [*decisions, ToPeer("charger", "", route.why, (session, call), needs_disk=True, call=call)]

    def new_transaction_id(self, owner: Peer | None) -> int:
        """Return an id that is not in use and names its owner in the lowest bit."""
        while True:
            transaction_id = random.randrange(FIRST_PROXY_ID, MAX_ID, 2) + (owner == "secondary")
            if transaction_id not in self.memory.sessions:
                return transaction_id

    def _noted(self, session: Session, said: Content, text: str, now: Instant) -> list[Decision]:
        """Keep what people want to know of a session: its times and readings."""
        later, is_first = self.memory.later, session.start != "" and bool(said.transactions)
        session.start = "" if is_first else session.start
        is_due = is_first or now.utc - session.touched >= READING_SECONDS or len(text) > MAX_SELF_DESCRIPTION
        if said.is_reading and not is_due:
            later[session] = lambda: reckon(session, content_of(self.vocabulary.charger, parse(text)))
            return []
        if session in later:
            later.pop(session)()
        reckon(session, said)
        session.touched = now.utc
        if said.is_start:
            session.started_at, told = session.started_at or said.timestamp, utc_of(said.timestamp)
            if told and FIRST_DAY <= told <= now.utc + DAY:  # Else its clock is not set.
                session.begun = told
        self.memory.note(session)
        if not said.is_stop or session.stop:
            return []
        session.stopped_at, session.reason = said.timestamp, short(value_at(said.payload, said.facts.reason))
        session.stop = said.stop
        self.memory.end(session, now.utc)
        whose = self.config.name(session.owner) if session.server else "nobody (rejected)"
        what = f"session {session.transaction_id} of {whose} ends on connector {session.connector}"
        return [Told(what, session.badge)]

    def _copies(self, message: Message, said: Content, route: Route, askers: set[Peer]) -> list[Decision]:
        """Return what the other server sees of a Call: a message of its own, without a transaction."""
        config, session, action = self.config, route.session, message.action
        if said.facts.role in ("meter", "event"):
            is_shown = route.owner == "secondary" and "MeterValues" in config.primary_copies
            wanting: set[Peer] = askers | ({"primary"} if is_shown else set())
            values = value_text(message.text, (3, "meterValue")) if wanting else ""
            connector = said.connector or (session and session.connector) or 0
            key = "connectorId" if said.facts.is_16 else "evseId"
            action, payload = "MeterValues", values and f'{{"{key}":{connector},"meterValue":{values}}}'
        else:
            is_named = said.facts.role == "boot" or action in config.secondary_copies
            wanting = {"secondary"} if is_named and route is STATION else set()
            payload = value_text(message.text, (3,)) if wanting else ""
        return [own_call(action, payload, peer) for peer in wanting - {route.owner} if payload]

    def stop_waiting(self, call: Call) -> MessageId | None:
        """Take note that the charger does not wait for a Call any more; return the id that waited."""
        reply_to, call.reply_to = call.reply_to, None
        if call.session and self.waiting.get(key := (call.session, call.content.mark)) is call:
            del self.waiting[key]
        return reply_to

    def charger_gone(self) -> None:
        """Take note that nobody waits any more; what is stored may be joined by its repeat."""
        self.waiting = {key: call for key, call in self.waiting.items() if call.kind == "stored"}

    def sweep(self, now: Instant) -> list[Decision]:
        """Remove what has expired."""
        memory, told = self.memory, list[Decision]()
        memory.drop_claims(lambda claim: now.utc >= claim.until + CLAIM_SECONDS)
        for session in list(memory.sessions.values()):
            if session.ended is None and now.utc - session.touched > SILENT_SECONDS:
                told.append(Told(f"session {session.transaction_id} had no stop", session.badge))
                memory.end(session, now.utc)
                told += self.settle(session, NO_BADGE)
            elif session.ended is not None and now.utc - session.ended > SESSION_SECONDS:
                told += self.settle(session, NO_BADGE)
                del memory.sessions[session.key]
        return told


class Commands:
    """The servers' Calls to the charger, and its answers (rules 4 and 5). Owns the Calls that wait for it."""

    def __init__(self, router: Router, call_timeout: float) -> None:
        self.router = router
        self.memory = router.memory
        self.call_timeout = call_timeout  # Seconds.
        self.waiting: list[Call] = []  # Unsent, by time of arrival; MAX_FEW of each server.
        self.sent: dict[str, Call] = {}  # What the charger may still answer, by message id; MAX_FEW.
        self.outstanding: Call | None = None  # The one of them that is not given up.
        self.last_served = "secondary"  # Whose Call the charger got last; the other comes first.

    def server_call(self, peer: Peer, message: Message, now: Instant) -> list[Decision]:
        """Decide on a Call of a server."""
        said, name = content_of(self.router.vocabulary.server, message), message.message_id
        call = Call(message.text, peer, action=message.action, message_id=name, content=said, reply_to=name)
        call.queued = now.seconds
        forbidden = self._forbidden(message) if peer == "secondary" else ""
        if why := forbidden or self._translated(call, peer):
            rejection = rejection_of(said.facts, message.payload)  # Not every schema has one.
            text = result_text(name, rejection) if rejection else error_text(name, "SecurityError", why)
            return [ToPeer(peer, text, f"refused: {why}", outcome="refused")]
        if sum(other.peer == peer for other in self.waiting) >= MAX_FEW:
            return self._given_up(call, "too many Calls wait for the charger already")
        self.waiting.append(call)
        return self._next(now)

    def _forbidden(self, message: Message) -> str:
        """Return why the secondary, a guest, may not call this on the charger; "" = it may."""
        action = message.action
        if not ACTION.fullmatch(action):
            return "its Action has characters that no Action has"
        if action in self.router.config.secondary_refuse:
            return f"{action} is on secondary_refuse"
        if action in SETTING_ACTIONS and has_repeated_key(message.text):
            return f"{action}: a key stands twice"
        setting = guarded_by(action, message.payload)
        return f"{action}: {setting} is the primary's alone" if setting else ""

    def _translated(self, call: Call, peer: Peer) -> str:
        """Translate the transaction that a Call names; return why it must not reach the charger, or ""."""
        said, path, memory = call.content, call.content.facts.transaction, self.memory
        value, address = value_at(said.payload, path), self.router.address(peer)
        named = usable_id(value, said.facts.is_16)
        its = (s for s in memory.sessions.values() if s.owner == peer and s.server == address)
        known = (s for s in its if str(s.server_id) == str(value) != "None")  # null names nothing.
        # Of several an open one, the newest.
        session = max(known, key=lambda session: (session.ended is None, session.begun), default=None)
        if session and session.transaction_id is not None:
            if named != session.transaction_id:
                call.text = patch(call.text, (3, *path), session.transaction_id)
            return ""
        other = memory.sessions.get(named or "")
        # What names nothing passes, but for a guest's stop.
        is_odd = named is not None or (path != () and said.facts.role == "command")
        is_foreign = (other and other.owner) or (peer == "secondary" and is_odd)
        return f"transaction {str(value)[:40]} is not one of {peer}" if is_foreign else ""

    def _next(self, now: Instant) -> list[Decision]:
        """Send the next Call if the charger has none to answer; the servers take turns."""
        if self.outstanding or not self.waiting:
            return []
        others = (call for call in self.waiting if call.peer != self.last_served)
        call = next(others, self.waiting[0])
        self.waiting.remove(call)
        memory, said, facts, peer = self.memory, call.content, call.content.facts, call.peer
        assert peer, "a server has sent it"
        self.outstanding, self.last_served, call.sent = call, peer, now.seconds
        if str(call.message_id) in self.sent:
            call.rename()
        put_newest(self.sent, str(call.message_id), call)
        # From now on the charger may say something about it.
        about = call.action if said.request is None else said.request
        put_newest(memory.asked, about, (peer, call.message_id))
        wanted = said.payload.get("requestedMessage")
        if facts.role == "trigger" and wanted in ("MeterValues", "TransactionEvent"):
            memory.triggers[peer] = now.seconds + TRIGGER_SECONDS
        if facts.role in ("remote-start", "reserve") and said.badge is not None:
            badge, connector = normalized(said.badge), said.connector or None
            expiry = said.payload.get("expiryDate", said.payload.get("expiryDateTime"))  # Of a reservation.
            until = utc_of(expiry) or now.utc + CLAIM_SECONDS
            ids = (integer(value_at(said.payload, path)) for path in (facts.reservation, facts.remote_start))
            call.claim = Claim(peer, self.router.address(peer), badge, connector, until, None, *ids)
            memory.claims = [*memory.claims, call.claim][-MAX_FEW:]
            memory.note(memory)
        why, rows = f"{peer} calls {call.action}", (memory,) if call.claim else ()
        return [ToPeer("charger", call.text, why, rows)]  # The session may outlive the proxy.

    def charger_answer(self, message: Message, now: Instant) -> list[Decision]:
        """Decide on the charger's answer to a Call of a server."""
        call = self.sent.pop(str(message.message_id), None)
        if call is self.outstanding:
            self.outstanding = None
        decisions = self._learn(call, message) if call else []
        if call is None or call.reply_to is None or not call.peer:
            return [*decisions, Told("an answer to a Call", dropped=NOBODY_WAITS), *self._next(now)]
        if call.content.facts.role in ("remote-start", "reserve", "cancel", "command"):
            outcome = message.action or str(message.payload.get("status", "done"))[:40]
            decisions.append(Told(f"{self.router.config.name(call.peer)} asked for {call.action}: {outcome}"))
        done = "result" if message.type == CALLRESULT else "error"
        answer = ToPeer(call.peer, under_id(message, call.reply_to), "the charger answers", outcome=done)
        return [answer, *decisions, *self._next(now)]

    def _learn(self, call: Call, message: Message) -> list[Decision]:
        """Void what the charger refuses; end what it cancels; own what it says has begun."""
        memory, claim, said = self.memory, call.claim, call.content
        status = str(message.payload.get("status", "Accepted"))
        if message.type == CALLERROR or not status.startswith("Accepted"):  # Or AcceptedCanceled.
            memory.asked = {k: by for k, by in memory.asked.items() if by != (call.peer, call.message_id)}
            memory.drop_claims(lambda other: other is claim)
        elif said.facts.role == "cancel":
            key = call.peer, integer(value_at(said.payload, said.facts.reservation)) or 0
            memory.drop_claims(lambda other: (other.peer, other.reservation) == key)
        elif claim and any(other is claim for other in memory.claims):
            memory.drop_claims(lambda older: older == claim and older is not claim)
            claim.transaction = short(message.payload.get("transactionId"))
            if session := memory.sessions.get(claim.transaction):
                route = Route(call.peer, "its remote start", claim=claim)
                return self.router.settle(session, route, said.badge or "")
        return []

    def _given_up(self, call: Call, why: str) -> list[Decision]:
        if call.reply_to is None or not call.peer:
            return []
        text, call.reply_to = error_text(call.reply_to, "GenericError", why), None
        return [ToPeer(call.peer, text, why, outcome="unanswered")]

    def tick(self, now: Instant) -> list[Decision]:
        """Give up what has waited too long."""
        decisions, call = list[Decision](), self.outstanding
        if call and call.sent is not None and now.seconds >= call.sent + self.call_timeout:
            self.outstanding = None
            decisions += self._given_up(call, f"the charger did not answer within {self.call_timeout:g} s")
        while self.waiting and now.seconds >= self.waiting[0].queued + 2 * self.call_timeout:
            decisions += self._given_up(self.waiting.pop(0), "the charger was busy for too long")
        return decisions + self._next(now)

    def charger_gone(self) -> list[Decision]:
        """Give up all Calls that the charger's connection leaves unanswered."""
        calls = [*self.sent.values(), *self.waiting]
        # Whatever comes on its next connection answers none of them.
        self.outstanding, self.waiting, self.sent = None, [], {}
        return [decision for call in calls for decision in self._given_up(call, "the charger is gone")]

    def server_gone(self, peer: Peer) -> None:
        """Forget the Calls of a server's connection that was lost; it will not wait for their answers."""
        self.waiting = [call for call in self.waiting if call.peer != peer]
        for call in self.sent.values():
            call.reply_to = None if call.peer == peer else call.reply_to


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
        is_same = named == session.server_id and type(named) is type(session.server_id)
        return call.text if is_same else patch(call.text, (3, *path), session.server_id)

    def answered(self, call: Call, message: Message, now: Instant) -> list[Decision]:
        """Decide on a server's answer to a Call, late or not; only who still waits hears of it."""
        session, said, words = call.session, call.content, words_of(message)
        what = words and f"{self.router.config.name(call.peer)} answers {call.action} with {words}"
        is_told = what and not (call.kind == "stored" and message.type == CALLERROR)  # That is a WARNING.
        told = [Told(what, said.badge)] if is_told and said.badge is not None else []
        if session and said.facts.role != "meter":
            message = self._learned(session, call, message, words, now)
        if call.own_answer and (message.type == CALLERROR or not call.is_awaited):
            call.is_awaited = False  # The proxy's own answer goes to the charger.
            return [*told]
        call.own_answer, reply_to = "", self.router.stop_waiting(call)
        repeat = self.router.waiting.get((session, said.mark)) if session and reply_to is None else None
        if repeat and repeat.kind == "relayed" and message.type == CALLRESULT:
            reply_to = self.router.stop_waiting(repeat)  # If it is not sent yet, it needs not be.
        if reply_to is None:
            return [*told, Told("the charger has its answer, or waits no more", dropped=NOBODY_WAITS)]
        if said.facts.role == "boot":
            self.memory.heartbeat_interval = integer(message.payload.get("interval")) or HEARTBEAT_INTERVAL
            self.memory.note(self.memory)
        if session and said.facts.role == "start" and message.type == CALLRESULT:
            session.is_told, session.start = True, "" if words else session.start
        # The charger must not know of a session whose owner a restart would forget.
        rows = (session,) if session and not said.is_reading else ()
        return [*told, ToPeer("charger", under_id(message, reply_to), "its server answers", rows)]

    def _learned(self, session: Session, call: Call, message: Message, words: str, now: Instant) -> Message:
        """Keep what an answer tells of a session; return it as the charger is to hear it."""
        said, memory, is_16 = call.content, self.memory, call.content.facts.role == "start"
        if is_16 and session.server_id is not None:
            return message  # It was sent twice; the answer that came first counts.
        if not said.is_reading:
            memory.note(session)
        session.refused = words if said.is_start else session.refused
        if message.type == CALLERROR:
            return message
        if is_16:
            raw = message.payload.get("transactionId")
            session.server_id = raw if type(raw) is str else integer(raw)
            usable = usable_id(raw, is_16=True)
            if type(usable) is not int or usable in memory.sessions or usable >= FIRST_PROXY_ID:
                usable = self.router.new_transaction_id(session.owner)
            if session.transaction_id is None:
                memory.add(session, usable)
            if raw != session.transaction_id:
                message = message._replace(text=patch(message.text, (2, "transactionId"), session.key))
        if said.is_stop:
            session.delivered = now.utc
        is_ignored = call.peer == "secondary" and self.router.config.secondary_replies == "ignore"
        is_heard = not (is_ignored or (is_16 and session.is_told))
        if said.mark and is_heard and len(payload := value_text(message.text, (2,))) <= MAX_SELF_DESCRIPTION:
            put_newest(session.answers, said.mark, payload)
        return message

    def given(self, call: Call) -> str:
        """Return the proxy's own answer to a Call, for the charger, which waits no more then."""
        reply_to = self.router.stop_waiting(call)
        text = "" if reply_to is None else result_text(reply_to, call.own_answer)
        call.own_answer = ""
        if text and call.session and call.content.facts.role == "start":
            call.session.is_told = True
            self.memory.note(call.session)
        return text  # "": its charger is gone; a repeat is answered again.

    def delivered(self, call: Call, message: Message, now: Instant) -> str:
        """Forget a stored Call, or try it again, or keep it as refused: return the words against it."""
        memory, session, words = self.memory, call.session, words_of(message)
        is_error = message.type == CALLERROR
        if is_error and not call.content.is_reading and call.tries < len(RETRY_SECONDS):
            call.not_before, call.sent = now.seconds + RETRY_SECONDS[call.tries], None
            call.tries += 1
            call.rename()
            memory.note(call)
            return words
        named = session.server_id if session else None  # 0 stands for no id at all.
        is_known = named not in (None, "") and not (type(named) is int and named < 1)
        if not is_error and (is_known or call.content.facts.role != "start"):
            memory.remove(call)
            return ""
        words, refused = words or "no transaction id", [call]
        if session and call.content.is_start:
            session.refused, session.is_refused = words, True
            memory.note(session)
            refused = [other for other in memory.stored if other.session is session]
        for other in refused:
            other.refused, other.sent = words, None
            memory.note(other)
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
RECKONED_AT_ONCE = 100  # Readings, when somebody looks, before others have a turn.
SAVE_SECONDS = 5.0  # A disk that takes longer counts as failing.
LAST_SAVE_SECONDS = 1.0  # At the end.
LOCK_SECONDS = 2.0  # For another process to let go of the file.
COMPLAINT_SECONDS = 60.0  # Between two WARNINGs about the same trouble.

APPLICATION_ID = 0x6F327770  # "o2wp": marks the file as the proxy's.
SCHEMA_VERSION = 7
OWED = """SELECT (SELECT count(*) FROM calls WHERE refused IS NULL)
    + (SELECT count(*) FROM sessions WHERE kept != '[]')"""  # Undelivered, in the first edition's tables.
UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # Not: in trouble.
MISSHAPEN = (MessageError, ValueError, LookupError, TypeError, AttributeError)  # Of rows of another making.

# Tables and columns, and how each column is read, are those of the dataclasses.
TABLES: dict[type, str] = {Memory: "chargers", Session: "sessions", Call: "calls"}
COLUMNS = {k: {f.name: re.split(r"\W", str(f.type))[0] for f in fields(k) if not f.kw_only} for k in TABLES}
SCHEMA = [
    *(f"CREATE TABLE {TABLES[k]} (number INTEGER PRIMARY KEY, {', '.join(COLUMNS[k])})" for k in TABLES),
    "CREATE INDEX sessions_by_begin ON sessions (begun, number, owner, meter_start, meter_stop, server)",
    "CREATE INDEX calls_by_session ON calls (session, refused, since)",
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
    "list": lambda text: [Claim(**claim) for claim in json.loads(text)],
    "Peer": lambda name: name and SERVERS[SERVERS.index(name)],  # Raises ValueError for any other.
}


class StateError(Exception):
    """The state file cannot be used, as one line for stderr."""


def to_column(value: Any) -> Any:
    """Return a value of a dataclass as sqlite takes it, whatever a peer has sent."""
    if isinstance(value, Session):
        return value.number
    if isinstance(value, dict | list):
        return json.dumps(value, default=asdict)
    # Half of a surrogate pair is JSON, but no text for sqlite.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def of_row(kind: type, row: Any) -> dict[str, Any]:
    """Return the values of a dataclass that a row holds. Raises one of MISSHAPEN."""
    return {name: READERS.get(of, lambda value: value)(row[name]) for name, of in COLUMNS[kind].items()}


def prepare(database: sqlite3.Connection, path: Path | None) -> None:
    """Lock the database; make its tables, if it is new. Raises StateError or sqlite3.Error."""
    run = database.execute
    run("PRAGMA locking_mode = EXCLUSIVE")  # Taken with the first access, and held until the end.
    questions = ("PRAGMA application_id", "PRAGMA user_version", "SELECT NOT count(*) FROM sqlite_master")
    application, version, is_new = (run(question).fetchone()[0] for question in questions)
    if not is_new and application != APPLICATION_ID:
        raise StateError(f"state file {path}: is the database of another program")
    if version in (1, 2) and (owed := run(OWED).fetchone()[0]):
        what = f"holds {owed} messages of version 1 that are not delivered yet"
        raise StateError(f"state file {path}: {what}; let that version deliver them first")
    if not is_new and version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it is of another version ({version}, not {SCHEMA_VERSION})")
    for setting in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 4194304"):
        run(f"PRAGMA {setting}")
    with database:
        for statement in ("BEGIN IMMEDIATE", *(SCHEMA if is_new else ())):
            run(statement)


class Journal:
    """Keeps the Memory of every charger, and saves what has changed in it."""

    def __init__(self, clock: Callable[[], Instant], path: Path | None = None) -> None:
        """Take what the file knows. Raises StateError, sqlite3.Error or one of MISSHAPEN."""
        self.clock = clock
        self.path = path  # None: in memory only.
        # What has happened since the start, by metric and labels: words of the proxy's own, or Peers.
        self.counts = Counter[tuple[str, ...]]()
        # By badge, charger id and UTC seconds of its last showing, the oldest first; MAX_UNLISTED.
        self.unlisted: dict[str, tuple[str, float]] = {}
        self.memories: dict[str, Memory] = {}  # By charger id; MAX_MEMORIES.
        self.pending: dict[Row, bool] = {}  # Rows that the disk does not know so: are they still there?
        # Sessions whose last reading is not reckoned up yet: with the next one, or when somebody looks.
        self.later: dict[Session, Callable[[], None]] = {}
        self.writing: dict[Row, bool] = {}  # Those that the thread is at.
        self.waiters: dict[Callable[[], None], None] = {}  # Called after the next save, whatever came of it.
        self.is_closed = False  # There is no next save.
        self.failure = ""  # Why the last save failed; "" = it did not.
        self.begun = 0.0  # Monotonic seconds; when the last save began, of those that fail the first.
        self.complain_at = self.purge_at = 0.0  # Monotonic seconds.
        self.number = self.on_disk = 0  # The newest row's, and of those that the disk may know.
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
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                words = "another process uses it; stop that one, or name another file with `state`"
            if code not in UNREADABLE:
                raise StateError(f"state file {path}: {words}")
            aside = f"{path}.unreadable-{datetime.fromtimestamp(clock().utc, UTC):%Y%m%d-%H%M%S}"
            for suffix in ("-wal", ""):
                with suppress(FileNotFoundError):
                    Path(f"{path}{suffix}").rename(aside + suffix)
        except OSError as error:
            raise StateError(f"state file {path}: {words and f'{words}; '}{error.strerror}") from None
        what = "state file %s cannot be used: %s; a new one is begun, the old one is kept as %s, undelivered"
        log.error(what, path, words, aside)
        return cls.open(path, clock)

    def _load(self, utc: float) -> None:
        read, sessions = self.database.execute, dict[int, Session]()
        for row in read("SELECT * FROM chargers ORDER BY number"):
            memory = Memory(**of_row(Memory, row), changed=self.pending, later=self.later)
            memory.number, self.memories[memory.charger] = row["number"], memory
            for claim in memory.claims:  # None outlives a clock that was set back.
                until = utc + CLAIM_SECONDS if claim.reservation is None else math.inf
                claim.until = min(claim.until, until)
        for row in read(KNOWN_SESSIONS, [utc - SESSION_SECONDS]):
            session = sessions[row["number"]] = Session(number=row["number"], **of_row(Session, row))
            self.memory(session.charger).sessions[session.key] = session
        for row in read("SELECT * FROM calls ORDER BY number"):
            message, said = parse(row["text"]), of_row(Call, row)
            content = content_of(VOCABULARIES[row["version"]].charger, message)
            said |= {"session": sessions.get(row["session"]), "number": row["number"], "content": content}
            call = Call(**said, kind="stored", action=message.action, message_id=message.message_id)
            self.memory(call.charger).calls[call] = None
        newest = [read(f"SELECT max(number) FROM {table}").fetchone()[0] for table in TABLES.values()]
        self.number = self.on_disk = max(number or 0 for number in newest)

    def memory(self, charger_id: str) -> Memory:
        """Return the Memory of a charger, a new one if there is none."""
        if charger_id not in self.memories:
            memory = self.memories[charger_id] = Memory(charger_id, changed=self.pending, later=self.later)
            memory.note(memory)
        return self.memories[charger_id]

    def has_room(self, charger_id: str, in_use: Container[str]) -> bool:
        """Whether a charger is remembered, or can be: the oldest idle one is forgotten for it."""
        if charger_id in self.memories or len(self.memories) < MAX_MEMORIES:
            return True
        unused = (m for m in self.memories.values() if not (m.charger in in_use or m.calls))
        idle = next((m for m in unused if all(s.ended is not None for s in m.sessions.values())), None)
        if idle:
            idle.note(self.memories.pop(idle.charger), is_there=False)
        return idle is not None

    def has(self, *rows: Row | None) -> bool:
        """Whether the disk knows these rows as they are; None is no row."""
        return not any(row in self.pending or row in self.writing for row in rows)

    def wait(self, then: Callable[[], None]) -> None:
        """Call `then` after the next save, also if it fails; asked for twice, once."""
        if not (self.waiters or self.writing or self.failure):
            # At the end of this turn of the loop, when every message of it has been dealt with.
            asyncio.get_running_loop().call_soon(self.save)
        self.waiters[then] = None

    def tick(self) -> None:
        """Save what nobody waits for; notice a disk that hangs; once a day remove what is too old."""
        now = self.clock()
        self.save()
        if self.writing and now.seconds >= self.begun + SAVE_SECONDS:
            self._tell(self.failure or f"no answer for {SAVE_SECONDS:g} s")
        if now.seconds >= self.purge_at:  # Not with a save: nobody is to take the one for the other.
            self.purge_at, old = now.seconds + DAY, [now.utc - KEEP_SECONDS]
            self._run(partial(self._write, [(statement, old) for statement in PURGE]), lambda _: None)

    def save(self) -> None:
        """Hand over to the thread what has changed, unless it is still at the last save."""
        if self.writing or self.is_closed:
            return
        statements = list[tuple[str, list[Any]]]()
        self.begun = self.begun if self.failure else self.clock().seconds
        for row, is_there in self.pending.items():
            if not row.number:
                row.number = self.number = self.number + 1
            if is_there or row.number <= self.on_disk:  # Else it has come and gone since the last save.
                self.writing[row] = is_there
        self.pending.clear()
        for row, is_there in self.writing.items():
            table, columns = TABLES[type(row)], COLUMNS[type(row)] if is_there else {}
            values = [row.number, *(to_column(getattr(row, name)) for name in columns)]
            insert = f"INSERT OR REPLACE INTO {table} VALUES (?{', ?' * len(columns)})"
            statements.append((insert if is_there else f"DELETE FROM {table} WHERE number = ?", values))
        self._run(partial(self._write, statements), self._saved) if statements else self._saved("")

    def _run(self, job: Callable[[], str], then: Callable[[str], None]) -> None:
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
        if error:  # It is merged back, for the next save: what has changed since then counts.
            self.pending.update(self.writing | self.pending)
        elif self.failure:
            log.info("state file %s can be written again; what waited for it goes on", self.path)
        self.on_disk = self.on_disk if error else self.number
        self.writing.clear()
        self._tell(error)

    def _tell(self, error: str) -> None:
        """Let those who wait know that a save is over, or given up; "" = it went well."""
        self.failure, now = error, self.clock().seconds
        if error and now >= self.complain_at:
            self.complain_at = now + COMPLAINT_SECONDS
            what = "relayed traffic goes on, what the proxy itself would have to keep stays unanswered"
            log.warning("state file %s cannot be written: %s; %s", self.path, error, what)
        waiters, self.waiters = list(self.waiters), {}  # They may wait again.
        with ExitStack() as turns:  # One that fails does not take the others'.
            for then in reversed(waiters):
                turns.callback(then)

    async def look_up(self, query: str, values: Any = ()) -> list[dict[str, Any]]:
        """Return rows, with all that has happened until now. Raises sqlite3.Error."""
        for _ in range(0, len(self.later), RECKONED_AT_ONCE):
            for session in list(itertools.islice(self.later, RECKONED_AT_ONCE)):
                self.later.pop(session)()
                self.pending[session] = True
            await asyncio.sleep(0)
        ask = partial(asyncio.get_running_loop().run_in_executor, self.writer)
        await ask(int)  # The thread does one job after the other: the last save is over.
        self.save()
        return await ask(lambda: list(map(dict, self.database.execute(query, values))))

    async def close(self) -> None:
        """Save the last changes and let go of the file; a disk that takes too long is left behind."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SAVE_SECONDS):
                while self.later or self.pending or self.writing:
                    await self.look_up("SELECT 1")
        if self.pending or self.writing:
            reason = self.failure or "the disk is too slow"
            log.error("state file %s: the last changes may be lost: %s", self.path, reason)
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
CLOSE_SECONDS = 3.0  # From a Close frame or a refusal to the end of the TCP connection, then it is cut.
PROBE_SECONDS = 5.0  # For a sign of life of a charger whose place a newcomer wants.
MAX_EARLY_BYTES = 2**16  # Before there is somebody to hear them; a handshake must not be longer.
MAX_FRAGMENTS = 4096  # Of one message, empty ones, too; the Sans-I/O layer itself sets no limit.
MAX_WRITE_BUFFER = 2**20  # Bytes that a peer may leave unread, beside one message, before it is cut off.
MAX_SUBJECTS = 1000  # Of WARNINGs that are held back; beyond it the oldest is forgotten.
MAX_LOOK_UPS = 500  # Of names, at a time, each in a thread: one that hangs delays no other.
MAX_DIALS = {"primary": 150, "secondary": 50}  # At a time: secondaries that hang delay no charger.
UNACKNOWLEDGED_MS = 60_000  # Then the system, where it can, ends the connection to a machine that is gone.
# One for all links: it is read out in the callback that filled it. A view: asyncio's TLS fills slices of it.
RECEIVE_BUFFER = memoryview(bytearray(2**16))
# No level of the ini reaches it: its DEBUG lines would show credentials.
LIBRARY_LOG = logging.Logger("websockets", logging.WARNING)
LIBRARY_LOG.parent = log
Protocol = ServerProtocol | ClientProtocol
Shown = Mapping[str, str]  # What servers see of a charger's handshake: Authorization, User-Agent.
uri_of = lru_cache(256)(parse_uri)  # Each server of the ini is dialled again and again.
TEXT_FRAME = 0x80 | Opcode.TEXT  # The first byte of a frame that holds a whole text (RFC 6455 5.2).
IS_MASKED = 0x80  # A bit of the second byte; its others are the length,
LENGTH_16, LENGTH_64 = 126, 127  # or say that the length stands behind it, in 16 or 64 bits.

OTHER_VERSION = "it may not speak {version}: all must speak one version, named as in versions = ocpp1.6"
# What to change in the ini, by the status of a server's refusal or the class of what went wrong.
ADVICE: dict[object, str] = {
    **dict.fromkeys((401, 403), "check {peer}_user and {peer}_password, or its own login ({peer}_auth)"),
    404: "check the address, and that the server knows this charger; {peer}_id replaces its id",
    **dict.fromkeys((101, 400), OTHER_VERSION),
    **dict.fromkeys((301, 302, 303, 307, 308), "nobody is followed: put its new address into the ini"),
    ssl.SSLCertVerificationError: "set {peer}_ca to its certificate, or check the name in its address",
}
NO_TLS = "it does not answer with TLS; perhaps that port speaks no TLS: ws://"
# What went wrong with a connection, for people; by its class, or OpenSSL's reason.
IN_WORDS: dict[object, str] = {
    TimeoutError: f"no answer within {DIAL_SECONDS:g} s",
    ConnectionRefusedError: "nobody listens there",
    **dict.fromkeys((socket.gaierror, UnicodeError), "its name is not known ({})"),
    **dict.fromkeys(("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", ConnectionResetError), NO_TLS),
}


class DialError(Exception):
    """A server cannot be reached or does not want this connection, or a visitor sends no handshake."""

    def __init__(self, cause: str | Exception, response: Response | None = None) -> None:
        what = IN_WORDS.get(getattr(cause, "reason", type(cause)), "{}").format(cause)
        super().__init__(escaped(what) or f"the connection was closed ({type(cause).__name__})")
        self.status = response.status_code if response else None  # Of an answer in HTTP.
        self.headers = response.headers if response else Headers()
        self.known = ADVICE.get(self.status or type(cause), "")  # What to change; "" = not known.

    def advice(self, peer: Peer, otherwise: str, version: str = "any version") -> str:
        """Return what a person can do about it, after an offer of this version."""
        return (self.known or otherwise).format(peer=peer, version=version)


# By subject: monotonic seconds of its last line, and how many were held back since; MAX_SUBJECTS.
class Complaints(dict[str, tuple[float, int]]):
    """Log lines that peers could cause as often as they like: one a minute about each subject."""

    def say(self, level: int, subject: str, text: str, *values: object, **more: Any) -> None:
        """Log the text, unless the subject had its line within COMPLAINT_SECONDS; then count it."""
        now = time.monotonic()
        last, held_back = self.pop(subject, (-math.inf, 0))
        is_due = now >= last + COMPLAINT_SECONDS
        put_newest(self, subject, (now, 0) if is_due else (last, held_back + 1), MAX_SUBJECTS)
        if is_due:
            count = f" ({held_back} more like it since the last such line)" if held_back else ""
            log.log(level, text + count, *values, **more)


class Link(asyncio.BufferedProtocol):
    """One websocket, from handshake to end. Never waits for a peer that does not read: cuts it off."""

    def __init__(self, protocol: Protocol, on_connected: Callable[[Link], None] | None = None) -> None:
        self.protocol = protocol  # The Sans-I/O layer.
        self.max_size = protocol.max_message_size or 0  # Bytes of a message.
        self.is_client = protocol.side is Side.CLIENT  # What it sends is masked, what it gets is not.
        self.on_connected = on_connected
        self.loop = asyncio.get_running_loop()
        self.handshake: asyncio.Future[Request | Response] = self.loop.create_future()
        self.transport: asyncio.Transport | None = None  # While there is a connection.
        # Set by attach: who takes a text, which is never empty. Frames that come before wait in `rest`.
        self.on_text: Callable[[Link, str], None] | None = None
        self.on_closed: Callable[[Link], None] | None = None  # Called once.
        self.rest = bytearray()  # What has come in and is no whole frame yet; one frame, or `early`.
        self.early = 0  # Bytes that came before `attach`; MAX_EARLY_BYTES.
        self.fragments: tuple[bytes, ...] = ()  # Of the message that comes in; MAX_FRAGMENTS, max_size.
        self.arrived = time.monotonic()  # Of the TCP connection.
        self.opened = 0.0  # Monotonic seconds of the handshake's end; 0 = it has not ended.
        self.is_open = False  # Texts can be sent.
        self.seen = self.arrived  # Monotonic seconds of the last bytes that came in.
        self.ping_at = 0.0  # Monotonic seconds of the next Ping.
        self.has_ponged = False
        self.ended: asyncio.Future[None] = self.loop.create_future()  # Done when nothing more will come.
        self.cut_because = ""  # Why the proxy itself has cut it.

    @property
    def closed_by(self) -> str:
        """Say with which code and reason the connection was closed, for a log line."""
        protocol = self.protocol
        if protocol.close_sent and not (protocol.close_rcvd_then_sent or self.cut_because):
            return f"closed by the proxy: {protocol.close_sent}"
        return self.cut_because or str(protocol.close_rcvd or protocol.parser_exc or "connection lost")

    def attach(self, on_text: Callable[[Link, str], None], on_closed: Callable[[Link], None]) -> None:
        """Let somebody hear what has come in and what will come in."""
        self.on_text, self.on_closed = on_text, on_closed
        self.handshake.result().headers.clear()  # The library keeps them for as long as it lives.
        if self.transport:
            self.transport.set_write_buffer_limits(MAX_WRITE_BUFFER + self.max_size)
        self._take(self.rest)

    def send(self, text: str) -> None:
        """Send a text, if the connection is open."""
        if self.transport is None or not self.is_open:
            return
        if self.protocol.writes:
            self.flush()  # What the library had to say before it, as a Pong.
        data = text.encode()
        length, bit = len(data), self.is_client * IS_MASKED
        if length < LENGTH_16:
            head = bytes((TEXT_FRAME, bit | length))
        elif length < 2**16:
            head = bytes((TEXT_FRAME, bit | LENGTH_16, length >> 8, length & 0xFF))
        else:
            head = bytes((TEXT_FRAME, bit | LENGTH_64)) + length.to_bytes(8, "big")
        if self.is_client:  # Whose text it is never sees a mask, so cannot guess the next (RFC 6455 10.3).
            mask = random.randbytes(4)
            head, data = head + mask, apply_mask(data, mask)
        self.transport.write(head + data)

    def keep_alive(self, now: float, interval: float) -> None:
        """Send a Ping if it is time for one."""
        if now >= self.ping_at and self.is_open:
            self.ping_at = now + interval
            self.protocol.send_ping(b"")
            self.flush()

    async def probe(self, seconds: float) -> bool:
        """Return whether anything comes from the peer within so many seconds of a Ping."""
        seen = self.seen
        self.keep_alive(self.ping_at, seconds)
        await asyncio.wait([self.ended], timeout=seconds)
        return self.seen > seen and not self.ended.done()

    def close(self, code: int, reason: str = "") -> None:
        """Close the connection; it is cut if that takes more than CLOSE_SECONDS."""
        if self.protocol.state is OPEN:
            self.protocol.send_close(code, reason)
            self.flush()
            self.on_text = self.on_text or (lambda *_: None)  # To see the peer close it, too.

    def abort(self, because: str = "") -> None:
        """Cut the connection."""
        self.cut_because, self.is_open = self.cut_because or because, False
        if self.transport:
            self.transport.abort()
            self.transport = None  # Nothing more is written to it.

    # The handshake.

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on, as a server. Raises OSError."""
        assert self.transport is not None
        self.transport = await self.loop.start_tls(self.transport, self, context, server_side=True)
        self.flush()

    def respond(self, response: Response, subprotocol: str | None = None) -> bool:
        """Answer a charger's handshake; return whether the connection is open now."""
        assert isinstance(self.protocol, ServerProtocol)
        if self.transport is None or self.transport.is_closing() or self.protocol.eof_sent:
            return False  # It was closed, or something unfit was sent, before it was answered.
        if subprotocol:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        self.opened = self.seen = time.monotonic()
        self.protocol.send_response(response)
        self.flush()
        return self.is_open

    # Callbacks of asyncio.

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        if self.on_connected:
            self.on_connected(self)

    def pause_writing(self) -> None:
        self.abort("it does not read what it is sent")

    def get_buffer(self, _sizehint: int) -> memoryview:
        return RECEIVE_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        self.seen = time.monotonic()
        data: memoryview | bytearray = RECEIVE_BUFFER[:nbytes]
        if self.rest or self.on_text is None:
            self.rest += data
            data = self.rest
        if self.on_text:
            self._take(data)
            return
        self.early += nbytes
        # A handshake is read at once or line by line, and nothing that stands behind it.
        while self.rest and not self.handshake.done():
            blank = self.rest.find(b"\r\n\r\n") + 4
            end = blank if blank > 3 else self.rest.find(b"\n") + 1 or len(self.rest)
            self._feed(self.rest[:end])
            del self.rest[:end]
        if self.early > MAX_EARLY_BYTES:
            self.abort(f"it sends more than {MAX_EARLY_BYTES} bytes before it is answered")

    def eof_received(self) -> None:
        if self.on_text or not self.handshake.done():  # Else frames wait for somebody who will not come.
            self._feed(b"")

    def connection_lost(self, _exc: Exception | None) -> None:
        self.transport, self.is_open = None, False
        self.eof_received()
        self.ended.set_result(None)
        if self.on_closed:
            self.on_closed(self)

    # What comes in and what goes out.

    def _take(self, data: memoryview | bytearray) -> None:
        """Take what has come in, by whole frames; what is none yet stays in `rest`."""
        at, size = 0, len(data)
        while at + 2 <= size:
            is_masked = data[at + 1] >= IS_MASKED
            length, start = data[at + 1] & ~IS_MASKED, at + 2
            if length >= LENGTH_16:
                start += 2 if length == LENGTH_16 else 8
                length = int.from_bytes(data[at + 2 : start], "big")
            start += 4 if is_masked else 0
            end, is_short = start + length, length <= self.max_size
            if start > size or (end > size and is_short):
                break  # A longer one is refused by its head.
            is_lone = is_short and data[at] == TEXT_FRAME and not self.fragments
            if is_lone and is_masked is not self.is_client and self.is_open:
                text = data[start:end]
                self._text(apply_mask(text, data[start - 4 : start]) if is_masked else text)  # type: ignore[arg-type]
            else:
                self._feed(data[at:end])
            at = end
        if at < size or self.rest:
            self.rest = data if data is self.rest and not at else bytearray(data[at:])

    def _feed(self, data: bytes | bytearray | memoryview) -> None:
        """Let the library read, or know that nothing more will come, and do what it makes of it."""
        response = None
        self.protocol.receive_data(data) if data else self.protocol.receive_eof()  # type: ignore[arg-type]
        for event in self.protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event)
            elif self.protocol.handshake_exc is None:
                self.opened = time.monotonic() if self.is_client else 0.0
                self.handshake.set_result(event)
            elif isinstance(event, Response):
                response = event
        if self.protocol.handshake_exc is not None and not self.handshake.done():
            self.handshake.set_exception(self._unfit(response))
            self.handshake.exception()  # Nobody may be waiting any more.
        self.flush()

    def _unfit(self, response: Response | None) -> DialError:
        """Say what came in place of a handshake."""
        protocol, what = self.protocol, self.cut_because or f"no HTTP: {self.protocol.handshake_exc}"
        if response and response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            what = f"an unfit handshake: {protocol.handshake_exc}"
        elif response:
            what = f"HTTP {response.status_code} {response.reason_phrase[:80]}"
        elif isinstance(protocol, ClientProtocol) and not protocol.uri.secure:
            is_alert = (self.rest or protocol.reader.buffer).startswith(b"\x15\x03")
            if is_alert or not self.early:  # OpenSSL hangs up without a word.
                what = "it hangs up on HTTP; perhaps that port speaks TLS: wss://"
        return DialError(what, response)

    def _frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.PONG:
            self.has_ponged = True
        elif frame.opcode is Opcode.BINARY:
            self.protocol.fail(1003, "OCPP-J is text")
        elif frame.opcode in (Opcode.TEXT, Opcode.CONT):
            self.fragments += (bytes(frame.data),)
            if len(self.fragments) > MAX_FRAGMENTS:
                self.protocol.fail(1009, f"more than {MAX_FRAGMENTS} fragments")
            elif frame.fin:
                data, self.fragments = b"".join(self.fragments), ()
                self._text(data)

    def _text(self, data: bytes | bytearray | memoryview) -> None:
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self.protocol.fail(1007, "text is not UTF-8")
            self.flush()
            return
        if self.on_text and text and not text.isspace():  # Some chargers send empty texts to keep alive.
            self.on_text(self, text)

    def flush(self) -> None:
        """Write what the library has to say."""
        if self.transport is None or self.transport.get_protocol() is not self:
            return  # TLS is starting: it would go out in the clear.
        chunks, was_open = self.protocol.data_to_send(), self.is_open
        self.is_open = self.protocol.state is OPEN
        if data := b"".join(chunks):
            self.transport.write(data)
        if SEND_EOF in chunks or (was_open and not self.is_open):
            self.loop.call_later(CLOSE_SECONDS, self.abort)
        if SEND_EOF in chunks:
            self.transport.close()


@lru_cache(256)
def context_of(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """Return the TLS side of all connections to a server, of its keys in the ini."""
    context = ssl.create_default_context(cafile=ca or None)
    if cert:
        context.load_cert_chain(cert, key or None)
    return context


class Dialer:
    """Opens links to servers: a bounded number at a time."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size  # Bytes of a message.
        self.places = {peer: asyncio.Semaphore(most) for peer, most in MAX_DIALS.items()}
        self.look_ups = ThreadPoolExecutor(MAX_LOOK_UPS, "look-up")  # Of names.
        self.begin: Callable[..., Any] = asyncio.create_task  # Begins a dial; a play only notes it.

    async def dial(
        self, peer: Peer, server: ServerConfig, charger_id: str, offers: Iterable[str], shown: Shown
    ) -> Link:
        """Return an open link that waits for its user. Raises DialError."""
        name, base = server.id or charger_id, uri_of(server.url)
        path = f"{base.path.rstrip('/')}/{urllib.parse.quote(name, safe='')}"
        user = (server.user or name) if server.user or server.password else None
        if ":" in (user or ""):
            raise DialError(f"a login cannot have the user {user}, with a colon: set {peer}_user to another")
        uri = replace(base, path=path, username=user, password=server.password)
        subprotocols = [Subprotocol(offer) for offer in offers]
        protocol = ClientProtocol(uri, subprotocols=subprotocols, max_size=self.max_size, logger=LIBRARY_LOG)
        link, request = Link(protocol), protocol.connect()
        for header, value in shown.items():
            if header != "Authorization" or server.needs_charger_login:
                request.headers[header] = value
        with ExitStack() as to_undo:
            to_undo.callback(link.abort)
            try:
                async with asyncio.timeout(DIAL_SECONDS), self.places[peer]:
                    await self._connect(link, server)
                    protocol.send_request(request)
                    link.flush()
                    await link.handshake
            except (OSError, UnicodeError) as error:
                raise DialError(error) from None
            to_undo.pop_all()
        return link

    async def _connect(self, link: Link, server: ServerConfig) -> None:
        """Connect to the first of the server's addresses that answers. Raises OSError or UnicodeError."""
        uri, files = uri_of(server.url), (server.ca, server.cert, server.key)
        tls = {"ssl": context_of(*files), "server_hostname": uri.host} if uri.secure else {}
        connect: Callable[..., Any] = partial(link.loop.create_connection, lambda: link, **tls)
        *others, last = await self.addresses(uri.host, uri.port)
        for place in others:
            with suppress(OSError):  # As if it were not there; what the last one says is told.
                async with asyncio.timeout(NEXT_ADDRESS_SECONDS):
                    await connect(*place)
                return
        await connect(*last)

    async def addresses(self, host: str, port: int) -> list[tuple[str, int]]:
        """Return where a name leads: at least one address and port. Raises OSError or UnicodeError."""
        if is_ip_address(host):
            return [(host, port)]
        job = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self.look_ups, job)
        return [(str(place[0]), int(place[1])) for *_, place in found]


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
BOOT_RETRY_SECONDS = 60.0  # Where the server does not answer, or does not say when to ask again.
REDIAL_SECONDS = {"primary": (0.0, 5.0), "secondary": (1.0, 60.0)}  # The first pause, the longest.
STEADY_SECONDS = 5.0  # A lost server is back when its connection has stood for so long.
VERSION_SECONDS = 3600.0  # Between two tries of a version that the server has refused.
MAX_LATE = 64  # Calls on one connection whose answer, however late, may still tell something.
MAX_LIVE = 1000  # Calls that are not stored and wait for one server;
MAX_LIVE_TEXT = 2**22  # characters of them.


def is_overdue(call: Call, now: float, seconds: float) -> bool:
    """Whether a Call was sent so long ago and still waits for its answer."""
    return call.sent is not None and now >= call.sent + seconds


def message_of(text: str, link: Link, version: str, name: str, relay: Relay) -> Message | None:
    """Return what a peer has sent; None = it is dropped with a WARNING, a Call with a CallError."""
    log.debug("%s > %s", name, text)
    try:
        return parse(text)
    except MessageError as error:
        relay.journal.counts["dropped_messages", "malformed"] += 1
        what = "%s: a message is dropped: %s: %s"
        relay.complaints.say(logging.WARNING, f"{name} text", what, name, error, text)
        if error.message_id is not None:
            link.send(error_text(error.message_id, VOCABULARIES[version].malformed, str(error)))
        return None


class Outbox:
    """One server of one charger. Owns the server's link and the lists of what goes to it."""

    def __init__(self, relay: Relay, peer: Peer, server: ServerConfig) -> None:
        self.relay, self.peer, self.server = relay, peer, server
        self.name = f"{relay.charger_id}: {relay.config.name(peer)}"
        self.version = relay.version  # That the link speaks, or the next one is to speak.
        self.own: list[Call] = []  # The proxy's: boot, statuses, Heartbeat; they go first. MAX_FEW.
        self.live: list[Call] = []  # Relayed and passing ones; MAX_LIVE.
        self.stored: list[Call] = []  # Those that this connection may carry; MAX_STORED.
        self.leaving: Call | None = None  # The stored one that was answered last, until the disk knows.
        self.in_flight: Call | None = None  # Holds the one place; the next Call waits for its answer.
        # What may still be answered, by link and message id: also on a link that is being closed. MAX_LATE,
        # beside those that are stored.
        self.sent: dict[tuple[Link, str], Call] = {}
        self.is_silent = False  # It let an awaited Call time out and has answered nothing since.
        self.link: Link | None = None
        self.dialing: asyncio.Task[None] | None = None
        # Monotonic seconds of the next step: to dial; connected, to send it a boot; booted, a Heartbeat.
        self.next_at = math.inf
        self.redial_after = REDIAL_SECONDS[peer][0]  # Seconds; grows with each dial.
        self.trouble = ""  # Why it is not connected, as it was logged last,
        self.advice = ""  # and what to do about it; "" = nothing.
        self.other_version_at = 0.0  # When another version than the charger's may be tried again; monotonic.
        self.away_since = 0.0  # Monotonic seconds; since when the charger is without it, if it is.
        self.is_booted = False  # The server accepted a BootNotification on this connection.
        self.boot_at = 0.0  # Monotonic seconds; until then the charger may send one itself.
        self.heartbeat_interval = math.inf  # Seconds, as the secondary asked for.
        self.fill()

    def waiting(self) -> Iterator[Call]:
        """Yield the stored Calls for this server, in whatever version."""
        peer, address, calls = self.peer, self.server.url, self.relay.memory.calls
        return (c for c in calls if c.peer == peer and c.server == address and not c.refused)

    def fill(self) -> None:
        """Take the stored Calls that this connection may carry."""
        mine = [call for call in self.waiting() if call.version == self.version]
        self.stored = sorted(mine, key=lambda call: call.sent is None)  # What is on its way comes first.

    def put(self, call: Call) -> None:
        """Take a Call for this server."""
        call.queued = now = self.relay.now().seconds
        if call.kind != "relayed":
            self.relay.deadline = 0.0
        if call.kind == "stored":
            self.stored += [call] if call.version == self.version else []
        elif len(self.live) >= MAX_LIVE or sum([len(c.text) for c in self.live]) > MAX_LIVE_TEXT:
            if call.kind == "relayed":  # Others have the proxy's own answer.
                self.relay.router.stop_waiting(call)
            self.relay.journal.counts["dropped_messages", "queue-full"] += 1
            what = f"{self.name}: {len(self.live)} Calls wait for it; each new one is dropped, now"
            self.relay.complaints.say(logging.WARNING, "queue", "%s %s", what, call.action)
        else:
            self.live.append(call)
        self.pump(now)

    def copy(self, call: Call) -> None:
        """Take a copy, which is made only while there is a connection; the next begins with the last boot."""
        is_fit = self.version == self.relay.version and (self.link is None or self.link.is_open)
        if is_fit and call.action == "BootNotification":
            self.is_booted, self.boot_at = False, 0.0
            if self.link:
                self.own, self.away_since = [call], self.relay.now().seconds
                self.next_at = self.away_since + BOOT_RETRY_SECONDS
            self.pump()
        elif is_fit and self.link:
            self.put(call)

    @property
    def has_backlog(self) -> bool:
        """Whether it has not got yet what the proxy has answered in its place."""
        return any(not (call.own_answer or call.was_kept) for call in self.stored)

    def stands_in(self, call: Call, now: float, has_backlog: bool) -> bool:
        """Whether the charger has waited long enough for this server: the proxy answers in its place."""
        is_late = now >= call.queued + min(ANSWER_SECONDS, self.relay.host.call_timeout)
        self.is_silent = self.is_silent or (is_late and call.sent is not None)
        is_away = not self.is_booted and now >= self.away_since + AWAITED_SECONDS
        is_behind = has_backlog and not call.content.needs_server
        call.is_awaited = not (is_late or self.is_silent or is_away or is_behind)
        return not call.is_awaited

    # What goes out.

    @property
    def is_wanted(self) -> bool:
        """Whether a connection to this server is needed."""
        return self.relay.link is not None or (not self.server.needs_charger_login and any(self.waiting()))

    @property
    def is_the_chargers(self) -> bool:
        """Whether the link is the one that the primary accepted for the charger."""
        return self.peer == "primary" and self.relay.link is not None

    def pump(self, now: float | None = None) -> None:
        """Send what may be sent now."""
        now = self.relay.now().seconds if now is None else now
        while self.in_flight is None and (link := self.link) and link.is_open:
            if now >= self.next_at and not self.is_booted:  # The charger's last boot, or a made-up one.
                memory, model = self.relay.memory, dump((self.server.id or self.relay.charger_id)[:20])
                payload = Template(VOCABULARIES[self.version].boot).substitute(model=model)
                if memory.boot and memory.version == self.version:
                    payload = value_text(memory.boot, (3,))
                self.own = [own_call("BootNotification", payload)]
                self.next_at = now + BOOT_RETRY_SECONDS  # Unless it is answered.
            call = self.own.pop(0) if self.own else self._next(now)
            if call is None and now >= self.next_at:  # Any other message tells as much as a Heartbeat.
                self.next_at, call = now + self.heartbeat_interval, own_call("Heartbeat", "{}")
            if call is None:
                return
            text = self.relay.answers.text_for_server(call)
            log.debug("%s < %s (%s)", self.name, text, call.why)
            link.send(text)
            # Chargers that are answered in time are not looked at: they are many.
            due = now + self.relay.host.call_timeout if call.kind == "relayed" else 0.0
            call.sent, self.relay.deadline = now, min(self.relay.deadline, due)
            self.in_flight = self.sent[link, str(call.message_id)] = call
            if len(self.sent) > MAX_LATE:
                late = [key for key, old in self.sent.items() if old.kind != "stored"]
                for key in late[:-MAX_LATE]:
                    del self.sent[key]

    def _next(self, now: float) -> Call | None:
        """Return the first Call that may go, by time of arrival; a stored one may have to wait."""
        if self.leaving and self.relay.journal.has(self.leaving):
            self.leaving = None  # A restart would not send it again.
        elif self.leaving:
            self.relay.journal.wait(self.pump)
        if not (self.live or self.stored) or (self.peer == "secondary" and not self.is_booted):
            return None
        head, is_alone = self._first_stored(now) if self.stored else None, not (self.stored or self.leaving)
        for call in list(self.live) if self.version == self.relay.version else ():
            if head and head.queued <= call.queued:
                break
            if is_alone or not (call.session and self._is_behind(call.session, now)):
                self.live.remove(call)
                if call.kind == "passing" or call.reply_to is not None:
                    return call
        return head

    def _first_stored(self, now: float) -> Call | None:
        """Return the first stored Call, unless something is in its way: boot, last one, disk, version."""
        journal, link, call = self.relay.journal, self.link, self.stored[0]
        if is_overdue(call, now, DELIVERY_SECONDS):  # Only at the primary: a secondary is disconnected.
            call = next((other for other in self.stored if not self._fails(other, now)), call)
        needs_no_boot = self.is_the_chargers and link and now >= link.opened + MADE_UP_BOOT_SECONDS
        is_barred = bool(self.leaving) or not (self.is_booted or needs_no_boot)
        if is_barred or call.sent is not None or now < call.not_before:
            return None
        if self.version != self.relay.version and self.version != self._wanted_version():
            return None
        if journal.has(call):
            return call
        journal.wait(self.pump)  # A restart must find it.
        return None

    def _fails(self, call: Call, now: float) -> bool:
        """Whether a stored Call has met a CallError, or gets no answer on this connection."""
        is_here = (self.link, str(call.message_id)) in self.sent
        return now < call.not_before or (is_here and is_overdue(call, now, self.relay.host.call_timeout))

    def _is_behind(self, session: Session, now: float) -> bool:
        """Whether a stored Call of the session goes before its others; one that fails holds up no verdict."""
        before = [call for call in (self.leaving, *self.stored) if call and call.session is session]
        holds = not (self.relay.journal.failure or any(self._fails(call, now) for call in before))
        return holds and bool(before)

    def link_received(self, link: Link, text: str) -> None:
        message = message_of(text, link, self.version, self.name, self.relay)
        if message and message.type in (CALLRESULT, CALLERROR):
            self._answered(link, message)
        elif message and link is self.link:
            self.relay.server_said(self.peer, message)

    def _answered(self, link: Link, message: Message) -> None:
        call = self.sent.pop((link, str(message.message_id)), None)
        if call is self.in_flight:
            self.in_flight = None
        if call is None:
            self.relay.journal.counts["dropped_messages", "nobody-waits"] += 1
            what = "%s: an answer that nobody waits for is dropped"
            self.relay.complaints.say(logging.INFO, f"{self.peer} late", what, self.name)
            return
        self.is_silent, now = False, self.relay.now()
        if call.action == "BootNotification":
            self._boot_answered(message, is_own=call.content is NOTHING)
        if call.kind == "relayed" and call.reply_to is not None:
            outcome = "result" if message.type == CALLRESULT else "error"
            self.relay.journal.counts["calls", "charger", self.peer, outcome] += 1
        decisions = self.relay.answers.answered(call, message, now) if call.content is not NOTHING else []
        if call.kind == "stored":  # First: what is delivered is in nobody's way any more.
            self._delivered(call, message, now)
        self.relay.carry_out(decisions)
        if self.own or self.live or self.stored or self.leaving:
            self.pump(now.seconds)

    def _delivered(self, call: Call, message: Message, now: Instant) -> None:
        """Take the answer to a stored Call."""
        words = self.relay.answers.delivered(call, message, now)
        if call in self.relay.memory.calls and not call.refused:
            log.warning("%s: %s got a %s; it is tried again", self.name, call.action, words)
            return
        self.leaving, refused = call, list[Call]()
        if words:  # With the call the rest of its session, perhaps.
            refused = [other for other in self.stored if other.refused]
            self.fill()
        elif call in self.stored:
            self.stored.remove(call)
        for other in refused:
            self.relay.journal.counts["refused_calls", self.peer] += 1
            what = "is refused" if other is call else "is not sent: its session is refused"
            log.warning("%s: %s %s (%s) and kept: %s", self.name, other.action, what, words, other.text)
        if not words:
            self.relay.journal.counts["delivered_calls", self.peer] += 1
            kind = call.content.payload.get("eventType", "")  # Of a TransactionEvent.
            level = logging.DEBUG if call.content.is_reading else logging.INFO
            last = "" if self.relay.link or any(self.waiting()) else "; it was the last"
            log.log(level, "%s: %s is delivered%s", self.name, f"{call.action} {kind}".strip(), last)

    def _boot_answered(self, message: Message, is_own: bool) -> None:
        now = self.relay.now().seconds
        status = message.payload.get("status") if message.type == CALLRESULT else message.action
        interval = min(max(integer(message.payload.get("interval")) or 0, 0), DAY)
        self.is_booted = status == "Accepted"
        if not self.is_booted:
            wait = interval or BOOT_RETRY_SECONDS
            if is_own:
                self.next_at = now + wait
                log.warning("%s: answers the boot with %s; asked again in %g s", self.name, status, wait)
            return
        log.log(logging.INFO if is_own else logging.DEBUG, "%s: accepts the charger", self.name)
        if self.peer == "secondary":  # The primary hears the charger's own.
            self.heartbeat_interval = interval or HEARTBEAT_INTERVAL
        self.next_at = now + self.heartbeat_interval
        if is_own and self.relay.memory.version == self.version:
            statuses = [value_text(text, (3,)) for text in self.relay.memory.statuses.values()]
            self.own += [own_call("StatusNotification", payload) for payload in statuses]
            self.live = [c for c in self.live if c.action != "StatusNotification" or c.kind == "relayed"]

    # The connection.

    def connected(self, link: Link, needs_boot: bool) -> None:
        """Take a link that has just been opened; the one before it is closed."""
        if self.dialing:
            self.dialing.cancel()  # This link is not to be replaced by it.
            self.dialing = None
        if self.link:
            self._let_go(self.link)
        self.link, self.version = link, link.protocol.subprotocol or "ocpp1.6"
        self.trouble, self.relay.deadline = "", 0.0
        if self.version != self.relay.version:
            self.boot_at = 0.0  # The charger's own would not go.
        self.next_at = self.boot_at if needs_boot else math.inf
        self.fill()
        self.relay.journal.counts["connections", self.peer] += 1
        link.ping_at = self.relay.now().seconds + self.relay.host.ping_interval
        link.attach(self.link_received, self.link_closed)
        self.pump()

    def _wanted_version(self) -> str:
        """Return the version to speak: the charger's, unless only Calls of another one are left."""
        relay = self.relay
        is_busy = self.live or self.own or any(s.ended is None for s in relay.memory.sessions.values())
        is_early = relay.now().seconds < self.other_version_at
        versions = [] if relay.link and (is_busy or is_early) else [call.version for call in self.waiting()]
        return relay.version if not versions or (relay.link and relay.version in versions) else versions[0]

    def dial(self) -> None:
        """Begin to open a connection, unless one is there or being opened."""
        if self.link is None and self.dialing is None:
            self.next_at, self.version = math.inf, self._wanted_version()
            self.dialing = self.relay.dialer.begin(self._dial(), name=f"{self.name}: dial")

    async def _dial(self) -> None:
        relay, version, link = self.relay, self.version, None
        try:
            link = await relay.dialer.dial(self.peer, self.server, relay.charger_id, [version], relay.shown)
            if (link.protocol.subprotocol or "ocpp1.6") != version:
                link.close(1002, f"{version} is needed")
                raise DialError(f"it answered without a subprotocol to {version}: see versions")
        except DialError as error:
            self.relay.journal.counts["failed_dials", self.peer] += 1
            if version != relay.version and (link or (error.status or 0) // 100 == 4):
                self.other_version_at = relay.now().seconds + VERSION_SECONDS
            if self.trouble != str(error):
                self.trouble, self.advice = str(error), error.advice(self.peer, "", version)
                advice = self.advice or "it is dialled again"
                log.warning("%s: cannot connect to %s: %s; %s", self.name, self.server.url, error, advice)
            link = None
        self.dialing = None
        if link and self.is_wanted:
            log.info("%s: connected to %s", self.name, self.server.url)
            self.connected(link, needs_boot=self.peer == "secondary" or bool(relay.memory.boot))
            return
        self._redial_later()
        if link:
            link.close(1001, "the charger is gone")

    def _redial_later(self) -> None:
        after, most = self.redial_after, REDIAL_SECONDS[self.peer][1]
        self.redial_after = min(max(after * 1.6, 0.5), most)
        if self.is_wanted:
            self.next_at = self.relay.now().seconds + after * random.uniform(0.8, 1.2)
            self.relay.deadline = 0.0

    def link_closed(self, link: Link) -> None:
        for key in [key for key in self.sent if key[0] is link]:
            call = self.sent.pop(key)
            call.sent = None  # What is stored goes again, with the same text and id;
            if call.kind == "passing" and call.reply_to is not None:  # so does what `forward` waits for.
                self.live.insert(0, call)
            elif call.kind == "relayed" and self.relay.router.stop_waiting(call) is not None:
                # Not sent again: it may have been carried out, and its sender repeats it.
                self.relay.journal.counts["calls", "charger", self.peer, "unanswered"] += 1
        if link is self.link:
            now, self.trouble, self.advice = self.relay.now().seconds, link.closed_by, ""
            level = logging.INFO if self.is_wanted else logging.DEBUG
            log.log(level, "%s: disconnected (%s)", self.name, link.closed_by)
            if self.relay.link and now >= link.opened + STEADY_SECONDS:
                self.away_since, self.redial_after = now, REDIAL_SECONDS[self.peer][0]
            self._let_go(link)
            self._redial_later()
            self.relay.commands.server_gone(self.peer)
        self.tick()

    def _let_go(self, link: Link) -> None:
        """Let go of the link and of all that ends with it, but for answers until it is closed."""
        self.link, self.in_flight, self.is_booted = None, None, False
        self.own, self.next_at = [], math.inf
        self.live = [call for call in self.live if call.reply_to is not None]
        self.relay.journal.counts["disconnections", self.peer] += 1
        link.close(1001)

    def charger_left(self) -> None:
        """Drop what only the charger waited for; an answer in flight still tells its session."""
        for call in self.sent.values():
            call.reply_to = None
        self.live = []
        if self.link and not self.is_wanted:
            self.link.close(1001, "the charger is gone")

    def tick(self) -> float:
        """Do what is due; return when to be called again, in monotonic seconds; 0 = each time."""
        now = self.relay.now().seconds
        if not self.link and now >= self.next_at and self.is_wanted:
            self.dial()
        self._time_out(now)
        is_at_rest = not (self.in_flight or self.own)
        if self.link and is_at_rest and not (self.is_wanted and self._wanted_version() == self.version):
            self.link.close(1000, "nothing is left for it in this version")
        self.pump()
        waits = (self.own or self.live or self.stored) if self.link else self.is_the_chargers
        return 0.0 if self.in_flight or waits else self.next_at

    def _time_out(self, now: float) -> None:
        call, timeout = self.in_flight, self.relay.host.call_timeout
        patience = min(PASSING_SECONDS, timeout) if call and call.kind == "passing" else timeout
        if call and is_overdue(call, now, patience):
            self.in_flight = None
            log.warning("%s: %s was not answered; the next is sent", self.name, call.action)
            if call.kind == "relayed" and self.relay.router.stop_waiting(call) is not None:
                self.relay.journal.counts["calls", "charger", self.peer, "unanswered"] += 1
        is_left = bool(self.stored) and is_overdue(self.stored[0], now, DELIVERY_SECONDS)
        if is_left and self.link and self.link.is_open and not self.is_the_chargers:
            log.warning("%s: left a stored Call unanswered for %g s; redialled", self.name, DELIVERY_SECONDS)
            self.link.close(1000, "a Call was left unanswered")


# ---------------------------------------------------------------------------------------------------------
# Relay
#
# One charger: its link and an outbox for each of its servers. Hands every message to the router and carries
# out what the router decides.
# ---------------------------------------------------------------------------------------------------------

MAX_HELD = 1000  # Answers of one charger that wait for the disk; of more, the oldest goes.


class Relay:
    """One charger, from its first connection until nothing is left to be done for it."""

    def __init__(
        self, charger_id: str, config: Config, version: str, dialer: Dialer, journal: Journal
    ) -> None:
        self.charger_id = charger_id
        self.config = config.charger(charger_id)
        self.host = config.host
        self.dialer = dialer
        self.journal = journal
        self.now = journal.clock
        self.memory = journal.memory(charger_id)
        self.shown: Shown = {"User-Agent": agent} if (agent := self.memory.user_agent) else {}
        self.complaints = Complaints()
        self.link: Link | None = None  # The charger's.
        self.held: list[ToPeer] = []  # What waits for the disk, or for the secondary's answer; MAX_HELD.
        self.deadline = 0.0  # Monotonic seconds; when `tick` has something to do.
        self._speak(version)
        self.outboxes = {
            peer: Outbox(self, peer, server)
            for peer, server in self.config.servers.items()
            if server.url != LOCAL
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
        if message.type != CALL:
            return  # It has been logged.
        if self.link and self.outboxes[peer].version == self.version:
            self.deadline = 0.0  # `call_timeout` runs.
            self.carry_out(self.commands.server_call(peer, message, self.now()))
        else:
            why = "the charger speaks another version" if self.link else "the charger is not connected"
            text = error_text(message.message_id, "GenericError", why)
            self.carry_out([ToPeer(peer, text, why, outcome="unanswered")])

    # The charger's connection.

    def deliver(self) -> None:
        """Deliver what is left, without waiting for the charger; tell what has to wait."""
        self.carry_out(self.router.sweep(self.now()))  # It may never come back.
        waiting = Counter(call.server for call in self.memory.stored if call.peer)
        for outbox in self.outboxes.values():
            outbox.fill()
            when = "now" if outbox.is_wanted else "when the charger connects: only it has the login"
            if left := waiting.pop(outbox.server.url, 0):
                log.info("%s: %d stored Calls are left from before; delivered %s", outbox.name, left, when)
            if left and outbox.is_wanted:
                outbox.dial()
        for address, left in waiting.items():
            what = "%s: %d stored Calls are kept for %s, which the ini does not name"
            log.warning(what, self.charger_id, left, address)
        self.tick()

    def connect(self, link: Link, primary: Link | None, version: str, shown: Shown) -> None:
        """Take the charger's new connection, and the one that its primary accepted for it."""
        if self.link:
            log.info("%s: charger connects again; its old connection is closed", self.charger_id)
            self.disconnect_charger(1001, "the charger has connected again", successor=link)
        memory, now = self.memory, self.now()
        if memory.version != version:
            memory.boot, memory.statuses = "", {}
        memory.version, memory.user_agent, memory.seen = version, short(shown.get("User-Agent")), now.utc
        memory.note(memory)
        if version != self.version:
            self._speak(version)
        self.link, self.shown, self.deadline = link, shown, 0.0
        link.keep_alive(now.seconds, self.host.ping_interval)
        log.info("%s: charger connected (%s)", self.charger_id, version)
        self.journal.counts["connections", "charger"] += 1
        for peer, outbox in self.outboxes.items():
            outbox.away_since = link.opened
            if peer == "primary" and primary:
                outbox.connected(primary, needs_boot=False)
            else:
                outbox.boot_at = link.opened + (OWN_BOOT_SECONDS if memory.boot else MADE_UP_BOOT_SECONDS)
                outbox.dial()
        link.attach(self.link_received, self.link_closed)

    def link_received(self, link: Link, text: str) -> None:
        message = message_of(text, link, self.version, self.charger_id, self) if link is self.link else None
        if message is None:
            return
        if message.type == CALL:
            if not (self.journal.failure and self._joins(message)):
                self.carry_out(self.router.charger_call(message, self.now()))
        elif message.type == SEND:
            if (primary := self.outboxes.get("primary")) and primary.link:
                primary.link.send(text)  # Nobody answers it (OCPP 2.1 part 4, 4.2.5).
        elif message.type != CALLRESULTERROR:
            self.carry_out(self.commands.charger_answer(message, self.now()))

    def _joins(self, message: Message) -> bool:
        """Whether the charger repeats what has no answer because the disk fails: it joins what is pending."""
        for call in (held.call for held in self.held if held.call):
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
        self.held = [held for held in self.held if held.call]
        for call in (held.call for held in self.held if held.call):
            call.reply_to = None  # What its server may still answer is joined by its repeat.
        self.carry_out(self.commands.charger_gone())
        self.router.charger_gone()
        for outbox in self.outboxes.values():
            outbox.charger_left()
        if link:
            self.journal.counts["disconnections", "charger"] += 1
            link.close(code, reason)

    async def dismiss(self) -> None:
        """Let go of a charger that does not answer, and of its primary; wait until the primary knows."""
        outbox = self.outboxes["primary"]
        link, outbox.redial_after = outbox.link, REDIAL_SECONDS["primary"][1]  # The newcomer goes first.
        self.disconnect_charger(1001, "the charger does not answer")
        if link:
            link.close(1001, "the charger does not answer")
            await asyncio.wait([link.ended], timeout=CLOSE_SECONDS)

    # Decisions.

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Do what the router has decided."""
        for decision in decisions:
            match decision:
                case Call():
                    self._to_server(decision)
                case Told():
                    self._tell(decision)
                case ToPeer() if decision.peer != "charger":
                    self._answer(decision)
                case _ if not (self.held or decision.rows or decision.call):
                    self._send(decision.text, decision.why)
                case _:
                    self.held.append(decision)
        if self.held:
            self._release()

    def _tell(self, told: Told) -> None:
        text = f"{self.charger_id}: {told.what}"
        if told.dropped:
            self.journal.counts["dropped_messages", told.dropped] += 1
        if told.dropped == TOO_MANY:
            for outbox in self.outboxes.values():
                outbox.fill()  # Without those that had to go.
            self.complaints.say(logging.WARNING, told.dropped, "%s", text)
        elif told.is_unlisted:  # In full: it is the number to copy.
            put_newest(self.journal.unlisted, told.badge, (self.charger_id, self.now().utc), MAX_UNLISTED)
            log.info("%s; the badge is %s", text, told.badge)
        else:
            badge = f"; badge {told.badge}" if told.badge else ""
            log.log(logging.DEBUG if told.dropped else logging.INFO, "%s%s", text, badge)

    def _to_server(self, call: Call) -> None:
        outbox = self.outboxes.get(call.peer) if call.peer else None
        if outbox and call.content is NOTHING:
            outbox.copy(call)
        elif outbox and call.server == outbox.server.url:
            outbox.put(call)
        elif call.kind == "stored" and call.peer:
            level = logging.DEBUG if call.content.is_reading else logging.WARNING
            what = "%s: %s is kept for %s, which the ini no longer names"
            log.log(level, what, self.charger_id, call.action, call.server)

    def _release(self) -> None:
        """Send the charger what does not wait any more, for its server or for the disk."""
        held, self.held, is_after, now = self.held, [], False, self.now().seconds
        secondary = self.outboxes.get("secondary")
        has_backlog = secondary is not None and secondary.has_backlog
        for cut in (old.call for old in held[:-MAX_HELD] if old.call):
            cut.reply_to = None
            self.answers.given(cut)
        for decision in held[-MAX_HELD:]:
            call, needs_disk = decision.call, decision.needs_disk
            if call and not call.own_answer:
                continue  # Its server has answered in the meantime.
            if call and call.is_awaited and secondary and not secondary.stands_in(call, now, has_backlog):
                self.held.append(decision)
                continue
            is_known = self.journal.has(*decision.rows) and not (is_after and not call)
            is_for_nobody = call and call.reply_to is None  # A repeat is answered again.
            if is_known or is_for_nobody or (self.journal.failure and not needs_disk):
                self._send(self.answers.given(call) if call else decision.text, decision.why)
                if call and call.peer:
                    self.journal.counts["calls", "charger", call.peer, "recorded"] += 1
            else:
                self.held.append(decision)
                self.journal.wait(self._release)
                # What comes behind it may name what the charger does not know yet.
                is_after = is_after or not needs_disk

    def _send(self, text: str, why: str) -> None:
        log.debug("%s < %s (%s)", self.charger_id, text, why)
        if self.link and text:
            self.link.send(text)

    def _answer(self, decision: ToPeer) -> None:
        """Send a server the answer to its Call."""
        outbox, outcome = self.outboxes[decision.peer], decision.outcome
        self.journal.counts["calls", decision.peer, "charger", outcome] += 1
        log.debug("%s < %s (%s)", outbox.name, decision.text, decision.why)
        if outcome == "refused":
            self.complaints.say(logging.INFO, decision.why, "%s: a Call is %s", outbox.name, decision.why)
        if outbox.link:
            outbox.link.send(decision.text)

    # What time does.

    def tick(self) -> None:
        """Do what is due, and find out when to be called again."""
        now = self.now()
        for link in self.links():
            link.keep_alive(now.seconds, self.host.ping_interval)
        grace, primary, why = self.config.primary_grace, self.outboxes.get("primary"), ""
        stuck = [held for held in self.held if not (held.call and held.call.is_awaited)]
        if stuck and self.journal.failure and now.seconds >= self.journal.begun + grace:
            why = "what it says cannot be kept"
        elif self.link and primary and not primary.link and now.seconds >= primary.away_since + grace:
            why = "the primary server is away"
        if why:
            log.warning("%s: the charger is closed, so that it keeps its messages: %s", self.charger_id, why)
            self.disconnect_charger(1012, why)
        times = [outbox.tick() for outbox in self.outboxes.values()]
        self.carry_out(self.commands.tick(now))
        times += [link.ping_at for link in self.links()]
        self.deadline = 0.0 if self.held or self.commands.outstanding else min(times, default=math.inf)

    def watch(self) -> None:
        """Close the connections that nothing has been seen of for too long; forget what has expired."""
        now, host = self.now(), self.host
        self.carry_out(self.router.sweep(now))
        if self.link:
            self.memory.seen = now.utc - (now.seconds - self.link.seen)
        servers = host.ping_interval + host.ping_timeout
        for link in self.links():
            slow = 0 if link.has_ponged else 3 * self.memory.heartbeat_interval
            patience = max(host.watchdog_stale, slow) if link is self.link else servers
            if now.seconds - link.seen > patience:
                link.abort(f"nothing seen for {now.seconds - link.seen:.0f} s")


# ---------------------------------------------------------------------------------------------------------
# Proxy
#
# The process: listens, admits chargers, keeps the relays by charger id, wakes those that have something to
# do, and ends it all.
# ---------------------------------------------------------------------------------------------------------

TICK_SECONDS = 0.5  # How often deadlines are looked at,
RELAYS_AT_ONCE = 5  # those of so many chargers in one turn of the loop: so no Call waits for more.
STOP_SECONDS = 3.0  # For all connections to be closed, then they are cut.
BACKLOG = 4096  # Connections that the system takes ahead of the proxy; the next try again a second later.
MAX_FILES = 2**20  # Open at once, where the system sets no limit.
MAX_HALF_OPEN = 5000  # Connections whose request is not complete, or an eighth of the files.
WRONG_LOGIN_SECONDS = 1.0  # So much later a wrong password is answered.
Pairs = Iterable[tuple[str, str]]  # Names and values of headers.
RETRY_AFTER = [("Retry-After", "10")]  # Seconds; for a charger that finds no place, or no primary.
BASIC = [("WWW-Authenticate", 'Basic realm="ocpp-2w-proxy", charset="UTF-8"')]
# Which OCPP's security profile 2 allows a charger to have alone (2.0.1 part 2, A00.FR.318).
CHARGERS_CIPHERS = ("AES128-GCM-SHA256", "AES256-GCM-SHA384")
TLS_ADVICE = "; TLS needs wss://, trust in the certificate of cert_chain, and one of its own for client_ca"


class RefusedError(Exception):
    """A request is answered with an HTTP error."""

    def __init__(self, status: int, what: str, headers: Pairs = (), detail: str = "") -> None:
        super().__init__(what + detail)
        self.what = what  # The visitor hears this; the log has the detail, too.
        self.response = http_response(status, f"{escaped(what)}\n", headers=headers)


def http_response(status: int, text: str, kind: str = "text/plain", headers: Pairs = ()) -> Response:
    """Return an answer to a request that opens no websocket."""
    phrase = next((known.phrase for known in HTTPStatus if known == status), "Refused")
    full = Headers([*headers, ("Connection", "close"), ("Content-Type", f"{kind}; charset=utf-8")])
    full["Content-Length"] = str(len(body := text.encode()))
    return Response(status, phrase, full, body)


def only(headers: Headers, name: str) -> str | None:
    """Return the header's value if it stands there once."""
    values = headers.get_all(name)
    return values[0] if len(values) == 1 else None


def basic_login(authorization: str | None) -> bytes:
    """Return `user:password` of a Basic header; empty for any other."""
    scheme, _, encoded = (authorization or "").partition(" ")
    with suppress(ValueError):
        if scheme.lower() == "basic":
            return base64.b64decode(encoded.strip().encode() + b"==")  # Some leave out the padding.
    return b""


def unhexed(text: bytes) -> bytes:
    """Return the bytes that hex digits stand for; other text as it is."""
    return bytes.fromhex(text.decode()) if re.fullmatch(rb"([0-9A-Fa-f]{2}){8,}", text) else text


def shows_password(charger_id: str, password: str, authorization: str | None) -> bool:
    """Whether a charger shows its id and its password (OCPP security profiles 1 and 2)."""
    # The key of OCPP 1.6 is bytes, which the ini may have in hex; many chargers send the digits.
    login, name = basic_login(authorization), f"{charger_id}:".encode()
    shown = login[len(name) :]  # Ids may hold colons.
    return hmac.compare_digest(unhexed(shown), unhexed(password.encode())) and login.startswith(name)


def taken_offers(headers: Headers) -> list[str]:
    """Take the subprotocols out of a handshake: the library would find fault with how some spell them."""
    name = "Sec-WebSocket-Protocol"
    offers = [offer.strip(' \t"') for offer in ",".join(headers.get_all(name)).split(",")]
    if name in headers:
        del headers[name]
    return [offer for offer in offers if len(offer.split()) == 1]  # Two words are none.


def refusal_of(error: DialError, versions: list[str]) -> RefusedError:
    """Return the primary's refusal as the charger's; anything but a 4xx means: come back later."""
    status, passed_on = error.status or 503, ("WWW-Authenticate", "Retry-After")
    advice = error.advice("primary", "it may come again", " or ".join(versions))
    if not 400 <= status < 500:
        return RefusedError(503, "primary cannot be reached", RETRY_AFTER, f": {error}; {advice}")
    headers = [(name, value) for name in passed_on for value in error.headers.get_all(name)]
    return RefusedError(status, "primary refuses it", headers, f": {error}; {advice}")


class Proxy:
    """All chargers. Owns the listener and the relays."""

    def __init__(self, config: Config, journal: Journal | None = None) -> None:
        self.config = config
        self.journal = journal or Journal(current_instant)
        self.retry_at = 0.0  # Monotonic seconds; when what CallErrors refused is tried once more.
        self.dialer = Dialer(config.host.max_size)
        self.relays: dict[str, Relay] = {}  # By charger id.
        self.handshakes: dict[Link, asyncio.Task[None]] = {}  # Not yet answered; the oldest first.
        self.complaints = Complaints()
        self.tls = server_context(config.host)  # The listener's.
        self.files = raised_file_limit()  # That the process may have open.
        self.server: asyncio.Server  # From `start` on,
        self.watchdog: asyncio.Task[None]  # and this.
        self.port = config.host.port  # That it listens on, once it does.
        self.lags: deque[float] = deque(maxlen=120)  # Seconds that the watchdog woke too late: a minute.

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        host = self.config.host
        protocol = partial(ServerProtocol, max_size=host.max_size, logger=LIBRARY_LOG)
        listen = partial(asyncio.get_running_loop().create_server, backlog=BACKLOG)
        self.server = await listen(lambda: Link(protocol(), self._connected), host.addr, host.port)
        self.port = self.server.sockets[0].getsockname()[1]
        self.watchdog = asyncio.create_task(self._watchdog(), name="watchdog")
        self.watchdog.add_done_callback(lambda done: done.cancelled() or done.result())  # To be reported.

    async def _deliver(self) -> None:
        """Deliver what is stored, also what was refused or never ended, without waiting for the chargers."""
        async for memory in in_turns(self.journal.memories.values(), RELAYS_AT_ONCE):
            memory.retry(utc := current_instant().utc)
            if memory.stored or any(utc - s.touched > SILENT_SECONDS for s in memory.sessions.values()):
                self._relay(memory.charger, memory.version or "ocpp1.6").deliver()

    async def stop(self) -> None:
        """Close everything; what does not end by itself is cut."""
        self.server.close()
        self.dialer.begin = lambda work, **_: work.close()  # Nobody is dialled any more.
        links = [link for relay in self.relays.values() for link in relay.links()]
        dials = [outbox.dialing for relay in self.relays.values() for outbox in relay.outboxes.values()]
        for task in filter(None, [self.watchdog, *dials, *self.handshakes.values()]):
            task.cancel()
        for link in links:
            link.close(1001, "the proxy is stopping")
        await asyncio.wait([self.watchdog, *(link.ended for link in links)], timeout=STOP_SECONDS)
        for link in [*links, *self.handshakes]:
            link.abort()
        await self.journal.close()

    def trouble(self) -> str:
        """Say why it cannot serve; "" = it can."""
        failure = self.journal.failure and f"the state file cannot be written: {self.journal.failure}"
        return failure if self.server.is_serving() else "the port for chargers is closed"

    def loop_failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tell what asyncio could not do; it would tell of each connection that it cannot accept."""
        error, is_over = context.get("exception"), "_start_serving" in str(context.get("handle"))
        if isinstance(error, OSError) and "accept" in context.get("message", ""):
            self.complaints.say(logging.WARNING, "accept", "connections have to wait: %s", error)
        elif not is_over:
            self.complaints.say(logging.ERROR, f"{type(error)} {error}", "%s", context, exc_info=error)

    # Admission: a charger is let in if its primary lets it in.

    def _connected(self, link: Link) -> None:
        if self.tls and link.transport:
            link.transport.pause_reading()  # Until start_tls.
        self.handshakes[link] = asyncio.create_task(self._admit(link), name="handshake")
        if len(self.handshakes) > (most := min(MAX_HALF_OPEN, self.files // 8)):
            half_open = [each for each in self.handshakes if not each.handshake.done()]
            if len(half_open) > most:
                half_open[0].abort("too many connections wait for their request")

    async def _admit(self, link: Link) -> None:
        charger_id = ""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if self.tls:
                    await link.start_tls(self.tls)
                request = await link.handshake
            assert isinstance(request, Request)
            path = request.path.partition("?")[0].rstrip("/")
            charger_id = urllib.parse.unquote(path.rpartition("/")[2])
            await self._let_in(link, request, charger_id)
        except RefusedError as refusal:
            self.journal.counts["refused_handshakes", str(int(refusal.response.status_code))] += 1
            # Once a minute of each charger that is known, and of all ids that never got in together.
            subject = f"{refusal.what} {charger_id if charger_id in self.journal.memories else ''}"
            who = charger_id or "a visitor"
            self.complaints.say(logging.WARNING, subject, "%s: refused: %s", who, refusal)
            if not link.opened:
                link.respond(refusal.response)
        except (OSError, DialError) as error:
            who = link.transport.get_extra_info("peername")[0] if link.transport else "a visitor"
            why, advice = str(error) or "nothing more came", TLS_ADVICE if self.tls else ""
            self.complaints.say(logging.INFO, f"at {who}", "%s: no handshake: %s%s", who, why, advice)
        finally:
            self.handshakes.pop(link, None)
            if not link.opened:
                link.abort()

    def _check_room(self, charger_id: str) -> None:
        """Refuse a charger that there is no room for. Raises RefusedError."""
        here, known, most = self.relays, len(self.journal.memories), (self.files - 100) // 3  # Three each.
        if len(here) >= most:  # Some are not here: what they have left is delivered.
            here = {name: relay for name, relay in here.items() if relay.link}
        if len(here) - (charger_id in here) >= most or not self.journal.has_room(charger_id, self.relays):
            detail = f"; {len(here)} chargers are here, {known} known, {self.files} files may be open"
            raise RefusedError(503, "there is no room for it", RETRY_AFTER, detail)

    async def _check(self, charger_id: str, headers: Headers) -> None:
        """Refuse a charger that is not expected here. Raises RefusedError."""
        if not self.config.host.admits(charger_id):
            raise RefusedError(404, "the path names no charger that may connect", detail=": see `chargers`")
        is_browser = (only(headers, "User-Agent") or "").startswith("Mozilla/")
        if is_browser and "Origin" in headers:  # Chargers' libraries send odd ones, and are let in.
            raise RefusedError(403, "a web page has opened this connection")
        self._check_room(charger_id)
        password = self.config.charger(charger_id).password
        if password and not shows_password(charger_id, password, only(headers, "Authorization")):
            await asyncio.sleep(WRONG_LOGIN_SECONDS)
            detail = f": it does not show the user {charger_id} and the `password` of the ini"
            raise RefusedError(401, "its login is not right", BASIC, detail)

    async def _let_in(self, link: Link, request: Request, charger_id: str) -> None:
        """Let the charger in if its primary accepts it. Raises RefusedError."""
        headers, config, protocol = request.headers, self.config.charger(charger_id), link.protocol
        await self._check(charger_id, headers)
        shown = {name: value for name in ("Authorization", "User-Agent") if (value := only(headers, name))}
        offers = taken_offers(headers)
        versions = [offer.lower() for offer in offers if offer.lower() in config.versions]
        if "Connection" not in headers and "Upgrade" in headers:
            headers["Connection"] = "Upgrade"  # An Autel leaves it out (lbbrhzn/ocpp#1933).
        assert isinstance(protocol, ServerProtocol)
        response = protocol.accept(request)  # Without a subprotocol.
        if response.status_code != 101:  # The primary might drop the charger for it.
            raise RefusedError(response.status_code, "no websocket handshake")
        if offers and not versions:  # OCPP-J 1.6 3.2: completed without a subprotocol, then closed.
            if link.respond(response):
                link.close(1002, "no common subprotocol")
            detail = f": it speaks {', '.join(offers)}, `versions` allows {', '.join(config.versions)}"
            raise RefusedError(101, "no common version", detail=detail)
        primary = await self._dial_primary(charger_id, versions or ["ocpp1.6"], shown)
        version = (primary.protocol.subprotocol if primary else next(iter(versions), None)) or "ocpp1.6"
        chosen = next((offer for offer in offers if offer.lower() == version), None)  # As it spells it.
        with ExitStack() as to_undo:
            if primary:
                to_undo.callback(primary.close, 1001, "the charger is gone")
            self._check_room(charger_id)  # Others may have taken it meanwhile.
            old = charger_id in self.relays and self.relays[charger_id].link
            if not (old and old.arrived > link.arrived) and link.respond(response, chosen):
                to_undo.pop_all()
                self._relay(charger_id, version).connect(link, primary, version, shown)

    async def _dial_primary(self, charger_id: str, versions: list[str], shown: Shown) -> Link | None:
        """Return the primary's link for this charger; None = it is local. Raises RefusedError."""
        primary = self.config.charger(charger_id).servers["primary"]
        while primary.url != LOCAL:
            try:
                return await self.dialer.dial("primary", primary, charger_id, versions, shown)
            except DialError as error:
                refusal, relay = refusal_of(error, versions), self.relays.get(charger_id)
                if not (error.status and relay):
                    raise refusal from None
            # Some primaries allow one connection a charger: what is dead or left there is closed for it.
            # Where Pongs never come, the watchdog tells the dead.
            old, left = relay.link, relay.outboxes["primary"].link
            is_over = old.has_ponged and not await old.probe(PROBE_SECONDS) if old else left
            if not is_over or relay.link not in (old, None) or self.relays.get(charger_id) is not relay:
                raise refusal
            await relay.dismiss()
            log.info("%s: its old connection is closed; primary is asked again", charger_id)
        return None

    def _relay(self, charger_id: str, version: str) -> Relay:
        if charger_id not in self.relays:
            self.relays[charger_id] = Relay(charger_id, self.config, version, self.dialer, self.journal)
        return self.relays[charger_id]

    # The watchdog.

    async def _watchdog(self) -> None:
        """Wake the relays whose deadlines have come, for as long as the process lives."""
        loop, watch_at = asyncio.get_running_loop(), 0.0
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            self.lags.append(max(0.0, now - due))
            self.journal.tick()
            if now >= self.retry_at:
                self.retry_at = now + DAY
                await self._deliver()
            if is_watching := now >= watch_at:
                watch_at = now + self.config.host.watchdog_interval
            async for relay in in_turns(self.relays.values(), RELAYS_AT_ONCE):
                if relay.is_idle:
                    del self.relays[relay.charger_id]
                    continue
                # As callbacks of the loop: a fault in one relay is logged there and harms no other.
                if relay.deadline <= now:
                    loop.call_soon(relay.tick)
                if is_watching:
                    loop.call_soon(relay.watch)


async def in_turns(things: Iterable[Any], at_once: int) -> AsyncIterator[Any]:
    """Yield things as they are now; the loop runs after so many of them."""
    for number, thing in enumerate(list(things)):
        if number % at_once == 0:
            await asyncio.sleep(0)
        yield thing


def current_instant() -> Instant:
    """Return what both clocks say."""
    return Instant(time.monotonic(), time.time())


def server_context(host: HostConfig) -> ssl.SSLContext | None:
    """Return the TLS side of the listener; None = plain. Raises OSError for unfit files."""
    if not host.cert_chain:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=host.client_ca or None)
    context.load_cert_chain(host.cert_chain, host.cert_key or None)
    context.set_ciphers(":".join([*(cipher["name"] for cipher in context.get_ciphers()), *CHARGERS_CIPHERS]))
    context.verify_mode = ssl.CERT_REQUIRED if host.client_ca else ssl.CERT_NONE
    return context


def raised_file_limit() -> int:
    """Let the process open as many files as the system allows it; return how many."""
    files = MAX_FILES
    with suppress(ImportError, ValueError, OSError):  # Windows; macOS allows less than it says.
        import resource

        files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        files = most
    return files


# ---------------------------------------------------------------------------------------------------------
# Status
#
# The second port: a page, the ledger of sessions, a report, health, metrics. It looks and changes nothing.
# What it shows comes from outside, and is text, never markup; pages need no outside resource. Each number
# of a session comes from one ledger, the database: whoever looks has saved first what has happened.
# ---------------------------------------------------------------------------------------------------------

SESSIONS, MOST_SESSIONS, MOST_CHARGERS, MOST_TROUBLES, MOST_EVENTS = 10, 200, 100, 30, 100  # On a page.
AT_ONCE = 200  # Sessions that are written or drawn before others have a turn.
MAX_LEDGER_ROWS = 50_000  # Of one request, about 10 MB: read at once, while saves wait.
LOOK_UP_SECONDS = 20.0  # For the disk to answer; for a request to be complete and answered, three times that.
MAX_GUESSES_AT_ONCE = 8  # Wrong passwords that are answered later: nobody guesses many, nobody is shut out.
LATE_SECONDS = 60.0  # Calls that wait for so long are a trouble.
GONE_SECONDS = {False: DAY, True: 7 * DAY}  # A charger that was not seen for so long; by whether it charged.
Record = dict[Any, Any]  # A session of the ledger, or what a page is told of something, as JSON.

LEDGER_COLUMNS = (  # Of the CSV; behind them, for programs, `number`, `begun` and `ended`.
    *("charger", "connector", "badge", "owner", "start", "stop", "meter_start", "meter_stop", "wh"),
    *("transaction_id", "server_transaction_id", "reason", "delivered", "state", "words"),
)
# Where a spreadsheet would take what follows for a formula, at the start or where it may split a line.
FORMULA = re.compile(r"(?:^|[;\t\r\n]+)(?=\s*[=+\-@])")
BY_DAYS = "begun >= :since AND begun < :until"  # Which sessions.
BY_NUMBERS = "number IN (SELECT value FROM json_each(:numbers))"
BY_REFUSAL = f"""number IN (SELECT session FROM calls
    WHERE refused != '' AND since > strftime('%s', 'now') - {REFUSED_SECONDS})"""
LEDGER = """
WITH found AS (
    SELECT *, strftime('%s', stopped_at) + 0 AS stopped,
        ifnull((SELECT max(refused) FROM calls WHERE session = sessions.number), '') AS refused_call,
        (SELECT min(since) FROM calls WHERE session = sessions.number AND refused = '') AS waits_since
    FROM sessions WHERE {} AND :owner IN ('', owner) AND :charger IN ('', charger)
        AND :badge IN ('', replace(replace(lower(trim(badge)), ':', ''), '-', ''))
    ORDER BY begun DESC, number DESC LIMIT :rows
)
SELECT charger, connector, badge, iif(owner != '' AND server = '', '', owner) AS owner,
    ifnull(nullif(started_at, ''), strftime('%Y-%m-%dT%H:%M:%SZ', begun, 'unixepoch')) AS start,
    stopped_at AS stop, CAST(round(meter_start) AS INTEGER) AS meter_start,
    CAST(round(meter_stop) AS INTEGER) AS meter_stop,
    CAST(round(meter_stop) - round(meter_start) AS INTEGER) AS wh,
    transaction_id, server_id AS server_transaction_id, reason,
    ifnull(strftime('%Y-%m-%dT%H:%M:%SZ', delivered, 'unixepoch'), '') AS delivered,
    CASE
        WHEN owner != '' AND server = '' THEN 'rejected'
        WHEN refused_call != '' OR is_refused THEN 'refused'
        WHEN waits_since IS NOT NULL THEN 'waiting'
        WHEN ended IS NULL THEN 'open'
        WHEN server = 'local' THEN 'recorded'
        WHEN delivered THEN 'delivered'
        WHEN stop = '' THEN 'no stop'
        ELSE 'unconfirmed'  -- Its stop was passed on, and no answer has come.
    END AS state,
    trim(
        ifnull(strftime('since %Y-%m-%dT%H:%M:%SZ; ', waits_since, 'unixepoch'), '')
        || iif(refused_call != '', refused_call,
            iif(refused = '' OR is_refused, '', 'its start was answered with ') || refused)
        || iif(refused_call || refused = '' OR stop = '', '', '; its server '
            || iif(delivered, 'has', 'does not have') || ' the stop'), '; ') AS words,
    number, begun, iif(stopped BETWEEN begun AND ended + 86400, stopped, ended) AS ended  -- As told, if sane.
FROM found ORDER BY begun DESC, number DESC
"""
ENERGY = """
WITH RECURSIVE back (n) AS (SELECT 0 UNION SELECT n + 1 FROM back WHERE n < 29),
dates (date, first, next) AS (  -- This and the last month, and the last 30 days.
    SELECT strftime('%Y-%m', first), first, date(first, '+1 month')
    FROM (SELECT date('now', 'localtime', 'start of month', -n || ' months') AS first FROM back WHERE n < 2)
    UNION SELECT first, first, date(first, '+1 day')
    FROM (SELECT date('now', 'localtime', -n || ' days') AS first FROM back)
)
SELECT date, total(round(meter_stop) - round(meter_start)) FILTER (WHERE owner = 'primary') AS "primary",
    total(round(meter_stop) - round(meter_start)) FILTER (WHERE owner = 'secondary') AS secondary
FROM dates LEFT JOIN sessions ON meter_stop > meter_start AND server != ''
    AND begun >= strftime('%s', first, 'utc') + 0 AND begun < strftime('%s', next, 'utc') + 0
GROUP BY date ORDER BY length(date), date  -- The months first. The index by begin holds all of it.
"""

BOTH, UP_DOWN = "primary|secondary", "primary connected|primary down|secondary connected|secondary down"
METRICS = {  # As in version 1: labels, help, what is told from the start, as 0: the first is an increase.
    "info": ("version", "The proxy's version.", ""),
    "chargers": ("state", "Chargers; gone = not seen for a week, or not admitted.", "online|offline|gone"),
    "servers": ("server state", "Connections to servers that are needed.", UP_DOWN),
    "sessions": ("owner state", "Sessions of the last seven days, by state.", ""),
    "stored_calls": ("server", "Calls that are answered and not delivered yet.", BOTH),
    "oldest_stored_call_age_seconds": ("", "How long the oldest of them has been waiting.", ""),
    "event_loop_lag_seconds": ("", "The longest delay of the event loop in the last minute.", ""),
    "state_file_failing": ("", "1 while the state file cannot be written.", ""),
    "calls_total": ("sender receiver outcome", "Calls, by what became of them.", ""),
    "delivered_calls_total": ("server", "Stored Calls that their server accepted.", BOTH),
    "refused_calls_total": ("server", "Stored Calls that their server refused.", BOTH),
    "dropped_messages_total": ("reason", "Messages that went to nobody, by reason.", ""),
    "connections_total": ("peer", "Connections opened; a charger's next is a reconnect.", ""),
    "disconnections_total": ("peer", "Connections that ended.", ""),
    "failed_dials_total": ("server", "Dials of a server that failed.", BOTH),
    "refused_handshakes_total": ("status", "Handshakes of chargers that were refused.", ""),
}

HEAD = """\
<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { --ground: #f4f6f8; --paper: #fff; --ink: #18212c; --faint: #566274; --line: #dde2e8; }
:root { --mark: #fdecea; --primary: #1f5fc4; --secondary: #a84a00; --good: #17703a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #10141a; --paper: #1a2028; --ink: #e6eaf0; --faint: #9aa6b6; --line: #2e3742; }
  :root { --mark: #3a1d1b; --primary: #7fb0ff; --secondary: #f0a660; --good: #74d193; --bad: #ff8d82; }
}
* { box-sizing: border-box; } :root { color-scheme: light dark; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.4 system-ui, sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 14px; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: 0 14px; align-items: baseline; padding-top: 14px; }
h1, .big { font-size: 19px; } h2, h3 { font-size: 15px; } h2 { margin: 18px 0 6px; } h1, h3 { margin: 0; }
p { margin: 2px 0; } .small { font-size: 13px; } .big { font-weight: 600; }
.faint { color: var(--faint); } .good { color: var(--good); } .bad { color: var(--bad); }
.primary, a { color: var(--primary); } .secondary { color: var(--secondary); }
.box { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; }
.trouble { background: var(--mark); border-color: var(--bad); margin-top: 8px; }
.cards { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.row { display: flex; justify-content: space-between; gap: 10px; }
.list > * { padding: 6px 0; } .list > * + * { border-top: 1px solid var(--line); }
.session { display: grid; gap: 0 14px; grid-template-columns: 1fr auto; }
.session > :nth-child(n + 3) { grid-column: 1 / 3; }
@media print, (min-width: 700px) {
  td:not(:nth-child(3)) { white-space: nowrap; }
  .list > .session { grid-template-columns: 15em 6em 1fr 1.3fr; } .list > .session > * { grid-column: auto; }
}
.number { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.copy { font-family: monospace; user-select: all; } #events { max-height: 24em; overflow: auto; }
button, input { font: inherit; } input { width: 100%; max-width: 260px; margin-bottom: 8px; }
svg { width: 100%; max-width: 520px; display: block; } svg text { fill: var(--faint); font-size: 11px; }
@page { size: A4; margin: 18mm; } tr { break-inside: avoid; } h2 { break-after: avoid; }
table { border-collapse: collapse; width: 100%; font-size: clamp(9px, 2.4vw, 13px); overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 4px 4px 0; text-align: left; }
th:nth-child(n + 5), td:nth-child(n + 5) { text-align: right; font-variant-numeric: tabular-nums; }
td { vertical-align: top; } td:nth-child(3) { overflow-wrap: anywhere; } .sum { font-weight: 600; }
</style>
"""
PAGE = """\
<title>ocpp-2w-proxy</title>
<header><h1>ocpp-2w-proxy</h1><p id="summary" class="faint" aria-live="polite">loading ...</p></header>
<main hidden>
<div id="trouble" role="alert"></div>
<h2>Chargers</h2>
<input id="find" type="search" placeholder="Find a charger" aria-label="Find a charger" hidden>
<div id="chargers" class="cards"></div>
<h2>Last sessions</h2>
<div id="sessions" class="box list"></div>
<p class="small faint"><button id="more">More sessions</button> <a href="sessions.csv">all as CSV</a>,
<a href="report">this month to print</a></p>
<h2>Energy</h2>
<div class="box"><div id="months" class="cards"></div><div id="days"></div></div>
<h2>What happened</h2>
<div id="events" class="box list small" tabindex="0"></div>
</main>
<script>
let told = null, sessions = 10;
const at = id => document.getElementById(id);
const kwh = wh => wh === null ? "" : `${(wh / 1000).toFixed(2)} kWh`;
const waits = count => count === 1 ? "1 message waits" : `${count} messages wait`;
const two = {hour: "2-digit", minute: "2-digit"}, day = {month: "short", day: "numeric"};
const when = (utc, more) => new Date(utc * 1000).toLocaleString([], {...day, ...two, ...more});

// An element, of a class or with attributes; those of a drawing are SVG.
function make(tag, more, ...parts) {
  const isDrawn = ["svg", "line", "text", "rect", "title"].includes(tag), svg = "http://www.w3.org/2000/svg";
  const node = isDrawn ? document.createElementNS(svg, tag) : document.createElement(tag);
  if (typeof more === "string") more = {class: more};
  for (const key in more) node.setAttribute(key, more[key]);
  node.append(...parts);
  return node;
}

// Draw a place anew if what it shows has changed: what somebody has marked stays marked.
function draw(id, list, each, none = make("p", "faint", "None yet.")) {
  const text = JSON.stringify([list, told.names]);
  if (at(id).shown === text) return;
  at(id).shown = text;
  at(id).replaceChildren(...(list.length ? list.map(one => each(one)) : [none]));
}

const named = key => key === "" ? "rejected" : told.names[key] ?? key ?? "nobody yet";
const owner = key => make("span", key ?? "", named(key));

const event = ({at: utc, level, text}) => make("p", level === "INFO" ? "" : "bad",
  make("span", "faint number", when(utc, {second: "2-digit"})), " ", text);
const trouble = ({what, todo, copy}) => make("div", "box trouble",
  make("p", "", what, " ", copy ? make("span", "copy", copy) : ""), make("p", "faint small", todo));

function server({name, peer, state, words, next}) {
  const wait = next === null ? "" : `; next try at ${new Date(next * 1000).toLocaleTimeString()}`;
  const kind = state === "connected" ? "good" : state === "down" ? "bad" : "faint";
  const text = make("span", kind, words ? `${state}: ${words}${wait}` : state);
  return make("p", "small", make("span", peer, name), " ", text);
}

function session(one, place = one.charger) {
  const end = one.ended ? ` \\u2013 ${new Date(one.ended * 1000).toLocaleTimeString([], two)}` : "";
  const energy = [kwh(one.wh), one.kw == null ? "" : ` ${one.kw.toFixed(1)} kW`];
  const fine = ["delivered", "recorded", "open"].includes(one.state) && !one.words;
  const state = make("span", fine ? "" : "bad", one.state, one.words && `: ${one.words}`);
  return make("div", "session", make("span", "", when(one.begun) + end), make("span", "number", ...energy),
    make("span", "", owner(one.owner), ` badge ${one.badge || "none"}`),
    make("span", "faint", `${place}, `, state));
}

function charger(one) {
  const seen = one.since ? `${one.online ? "online since" : "last seen"} ${when(one.since)}` : "never seen";
  const words = one.connectors.map(({connector, status}) => `${connector}: ${status}`).join(", ");
  return make("article", "box", make("div", "row", make("h3", "", one.id),
    make("span", one.online ? "good" : "bad", one.online ? "online" : "offline")),
    make("p", "faint small", [seen, one.version, words].filter(Boolean).join(" \\u00b7 ")),
    ...one.servers.map(server), make("p", "bad small", one.waiting ? waits(one.waiting) : ""),
    ...one.sessions.map(each => session(each, `connector ${each.connector ?? "?"}`)));
}

function nobody() {
  if (told.find) return make("p", "box", "No charger has such an id.");
  const isHere = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  const here = isHere ? "THIS-MACHINE" : location.hostname;
  const host = ["0.0.0.0", "::"].includes(told.addr) ? here : told.addr;
  const text = "No charger has connected yet. Type this address into it, and its id behind: ";
  return make("p", "box", text, make("span", "copy", `${told.scheme}://${host}:${told.port}/`));
}

function month(sums) {
  const name = new Date(`${sums.date}-15T12:00`).toLocaleDateString([], {month: "long", year: "numeric"});
  return make("div", "", make("p", "faint small", name), ...Object.keys(told.names).map(key =>
    make("p", "row", owner(key), make("span", "number big", kwh(sums[key])))));
}

function chart(days) {
  const most = Math.max(...days.map(one => one.primary + one.secondary), 1000), height = 120, foot = 138;
  const unit = 10 ** Math.floor(Math.log10(most)), top = Math.ceil(most / unit) * unit;
  const parts = [make("text", {x: 34, y: 10}, "kWh a day")];
  for (const share of [0, 0.5, 1]) {
    const y = foot - height * share;
    parts.push(make("line", {x1: 34, x2: 334, y1: y, y2: y, stroke: "var(--line)"}),
      make("text", {x: 30, y: y + 4, "text-anchor": "end"}, share * top / 1000));
  }
  days.forEach((one, number) => {
    const x = 35 + 10 * number;
    for (const [key, sum] of [["secondary", one.primary + one.secondary], ["primary", one.primary]]) {
      const size = sum / top * height, fill = `var(--${key})`;
      const title = make("title", "", `${one.date}, ${named(key)}: ${kwh(one[key])}`);
      parts.push(make("rect", {x, y: foot - size, width: 8, height: size, fill}, title));
    }
    const text = number % 7 === 2 ? new Date(`${one.date}T12:00`).toLocaleDateString([], day) : "";
    parts.push(make("text", {x: x + 4, y: foot + 15, "text-anchor": "middle"}, text));
  });
  return make("svg", {viewBox: "0 0 334 158", role: "img", "aria-label": "Energy by day"}, ...parts);
}

async function poll() {
  const asked = new URLSearchParams({find: at("find").value, sessions});
  const news = await fetch(`status.json?${asked}`).then(answer => answer.json()).catch(() => null);
  if (!news) at("summary").textContent = "The proxy does not answer; what you see may be old. Trying again.";
  if (news?.find !== at("find").value.trim().toLowerCase()) return;  // Or somebody has typed on.
  told = news;
  const known = told.online + told.offline, wait = told.waiting ? `, ${waits(told.waiting)}` : "";
  at("summary").textContent = `${told.online} of ${known} chargers online${wait}`;
  at("find").hidden = !told.find && known < 8;
  at("more").hidden = told.sessions.length < sessions || sessions >= 200;
  draw("trouble", told.trouble, trouble, "");
  draw("chargers", told.chargers, charger, nobody());
  draw("sessions", told.sessions, session);
  draw("months", told.energy.months, month);
  draw("days", [told.energy.days], chart);
  draw("events", told.events.reverse(), event);
  document.querySelector("main").hidden = false;
}

at("find").oninput = poll;
at("more").onclick = () => { sessions = Math.min(sessions + 40, 200); poll(); };
setInterval(poll, 2000);
poll();
</script>
"""

REPORT = """\
{0}<title>Charging report {1:%B %Y}</title>
<header><h1>Charging report {1:%B %Y}</h1></header><main>
<p class="small faint">Sessions that began from {1:%Y-%m-%d} to {2:%Y-%m-%d}; times of zone {3:%Z}.
Made {3:%Y-%m-%d %H:%M} by ocpp-2w-proxy {4}.</p>
{5}</main>
"""
REPORT_PART = """\
<h2>{}: badge {}</h2><table>
<thead><tr><th>Begin<th>End<th>Charger<th>State<th>Meter, begin<th>Meter, end<th>kWh
<tbody>{}<tr class=sum><td>Sum<td>{} sessions<td><td><td><td><td>{:.3f}</table>
"""
STYLE_HASH, SCRIPT_HASH = (
    base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    for text in re.findall(r"<(?:style|script)>(.*?)</", HEAD + PAGE, re.DOTALL)
)
AGE = ("oldest_stored_call_age_seconds",)
STATUS_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{SCRIPT_HASH}'; "
    f"style-src 'sha256-{STYLE_HASH}'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class Status(logging.Handler):
    """The second port. Owns its listener; reads what the proxy owns, and hears what is logged."""

    def __init__(self, proxy: Proxy, clean: Callable[[str], str]) -> None:
        super().__init__(logging.INFO)
        self.proxy = proxy
        self.journal = proxy.journal
        self.events: deque[Record] = deque(maxlen=MOST_EVENTS)  # The last log lines: the story of the day.
        self.clean = clean  # Makes a peer's words fit to be shown.
        self.shown: Callable[[str], str] = str if proxy.config.full_badges else masked
        self.config = proxy.config.status
        self.guesses = asyncio.Semaphore(MAX_GUESSES_AT_ONCE)
        self.server: websockets.Server | None = None

    async def start(self) -> None:
        """Listen, if the ini wants it; chargers are served whatever comes of it."""
        place, nobody = (self.config.addr, self.config.port), websockets.ServerConnection.close
        if not self.config.port:
            return
        listen = partial(websockets.serve, process_request=self._answer, logger=LIBRARY_LOG)
        try:
            self.server = await listen(nobody, *place, open_timeout=3 * LOOK_UP_SECONDS)
        except OSError as error:
            log.warning("no status page: cannot listen on %s:%d: %s; chargers are served", *place, error)
            return
        log.addHandler(self)
        log.info("status page on http://%s:%d/", *place)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.clean(record.getMessage())
        self.events.append({"at": record.created, "level": record.levelname, "text": text})

    async def _answer(self, connection: websockets.ServerConnection, request: Request) -> Response:
        path, _, query = request.path.partition("?")
        try:
            await self._check(request, path, str(connection.remote_address[0]))
            async with asyncio.timeout(LOOK_UP_SECONDS):
                kind, text = await self._page(path, dict(urllib.parse.parse_qsl(query)))
            response = http_response(200, text, kind)
        except RefusedError as refusal:
            response = refusal.response
        except (TimeoutError, sqlite3.Error) as error:
            why = f"the state file does not answer: {error or 'it takes too long'}"
            response = RefusedError(503, why, RETRY_AFTER).response
        response.headers.update(STATUS_HEADERS)
        response.body = b"" if request.method == "HEAD" else response.body
        return response

    async def _check(self, request: Request, path: str, visitor: str) -> None:
        """Refuse what no person asks for, or who does not show the password. Raises RefusedError."""
        if request.method not in ("GET", "HEAD"):
            raise RefusedError(405, "there is nothing to change here", [("Allow", "GET, HEAD")])
        password, own = self.config.password.encode(), socket.gethostname().lower()
        if not password:  # Any name can be made to lead here (DNS rebinding).
            host = re.sub(r":\d*$", "", (only(request.headers, "Host") or "").lower()).strip("[]")
            if is_ip_address(host) or host in ("localhost", self.config.addr.lower(), own, f"{own}.local"):
                return
            raise RefusedError(403, "not a name of this machine; use its address")
        shown = basic_login(only(request.headers, "Authorization"))
        # Health tells nothing that the port does not tell.
        if path == "/healthz" or hmac.compare_digest(shown.partition(b":")[2], password):
            return
        if shown:  # Browsers ask once without.
            self.proxy.complaints.say(logging.WARNING, "status", "status: a wrong password from %s", visitor)
            async with self.guesses:
                await asyncio.sleep(WRONG_LOGIN_SECONDS)
        raise RefusedError(401, "the password of [status]; any user", BASIC)

    async def _page(self, path: str, asked: dict[str, str]) -> tuple[str, str]:
        """Return the media type and text of a path. Raises RefusedError, TimeoutError or sqlite3.Error."""
        match path:
            case "/":
                return "text/html", HEAD + PAGE
            case "/status.json":
                return "application/json", dump(await self._told(asked))
            case "/sessions.csv":
                return "text/csv", await self._csv(asked)
            case "/report":
                return "text/html", await self._report(asked)
            case "/metrics":
                return "text/plain; version=0.0.4", await self._metrics()
            case "/healthz" if trouble := self.proxy.trouble():
                raise RefusedError(503, trouble)
            case "/healthz":
                return "text/plain", "ok\n"
        raise RefusedError(404, "there are /, /status.json, /sessions.csv, /report, /healthz and /metrics")

    async def ledger(self, asked: Record, most: int = 0, which: str = BY_DAYS) -> list[Record]:
        """Return sessions as they stand now, the newest first. Raises sqlite3.Error or RefusedError."""
        names = {self.proxy.config.default.name(peer): peer for peer in SERVERS}
        place = Record(owner="", charger="", badge="") | asked | {"rows": most or MAX_LEDGER_ROWS + 1}
        place |= {"owner": names.get(place["owner"], place["owner"]), "badge": normalized(place["badge"])}
        try:  # Days of this machine's clock, to the last microsecond.
            place["since"] = datetime.fromisoformat(f"{asked.get('from', '2000-01-01')}T00:00").timestamp()
            until = f"{asked.get('to', '2999-12-31')}T23:59:59.999999"
            place["until"] = datetime.fromisoformat(until).timestamp()
        except (ValueError, OverflowError):
            raise RefusedError(400, "from and to: expected days, as 2026-01-31") from None
        rows = await self.journal.look_up(LEDGER.format(which), place)
        if len(rows) > MAX_LEDGER_ROWS:
            raise RefusedError(400, "too many sessions; ask for fewer days")
        return rows

    async def _csv(self, asked: dict[str, str]) -> str:
        """Return the ledger as CSV (RFC 4180)."""
        text = io.StringIO()
        table = csv.DictWriter(text, LEDGER_COLUMNS, extrasaction="ignore")
        table.writeheader()
        async for row in in_turns(reversed(await self.ledger(asked)), AT_ONCE):
            table.writerow({k: FORMULA.sub("'", v) if isinstance(v, str) else v for k, v in row.items()})
        return text.getvalue()

    async def _report(self, asked: dict[str, str]) -> str:
        """Return a month's sessions by owner and badge, to be printed for who pays for them."""
        try:
            first = datetime.fromisoformat(f"{asked.get('month') or time.strftime('%Y-%m')}-01")
            last = (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
        except (ValueError, OverflowError):
            raise RefusedError(400, "month: expected one, as 2026-01") from None
        days = {"from": f"{first:%Y-%m-%d}", "to": f"{last:%Y-%m-%d}"}
        parts, sums, badges = dict[tuple[str, str], list[str]](), Counter[tuple[str, str]](), dict[str, str]()
        async for row in in_turns(reversed(await self.ledger(asked | days)), AT_ONCE):
            if row["owner"]:
                server = self.proxy.config.charger(row["charger"]).name(row["owner"])
                badge = badges.setdefault(normalized(row["badge"]), row["badge"] or "none")
                place = (html.escape(server), html.escape(badge))
                times = (time.localtime(row[at]) if row[at] else None for at in ("begun", "ended"))
                told = [time.strftime("%Y-%m-%d %H:%M", at) if at else "" for at in times]
                told += [row["charger"], row["state"]]
                energies = (row[at] for at in ("meter_start", "meter_stop", "wh"))
                told += ["" if wh is None else f"{wh / 1000:.3f}" for wh in energies]
                parts.setdefault(place, []).append("<tr><td>" + "<td>".join(map(html.escape, told)))
                sums[place] += row["wh"] or 0
        text = "" if parts else "<p>No session began in this month.</p>"
        for place, lines in sorted(parts.items()):
            text += REPORT_PART.format(*place, "".join(lines), len(lines), sums[place] / 1000)
        return REPORT.format(HEAD, first, last, datetime.now().astimezone(), __version__, text)

    async def _look(self, find: str = "") -> tuple[Any, list[Any]]:
        """Return what is counted, and who is to be shown, by rank; the loop runs in between."""
        totals: Any = Counter()
        found, utc, admits = list[Any](), time.time(), self.proxy.config.host.admits
        async for memory in in_turns(self.journal.memories.values(), RELAYS_AT_ONCE):
            relay, stored = self.proxy.relays.get(memory.charger), memory.stored
            is_known = memory.has_charged or bool(stored)
            is_missed = utc < memory.seen + GONE_SECONDS[is_known] and admits(memory.charger)
            state = "online" if relay and relay.link else "offline" if is_missed else "gone"
            if state == "gone" and not is_known:
                continue  # Somebody has mistyped an id.
            totals["chargers", state] += 1
            wanted = [o for o in relay.outboxes.values() if o.link or o.is_wanted] if relay else []
            totals.update(("servers", o.peer, "connected" if o.link else "down") for o in wanted)
            totals.update(("down", o.server.name, o.trouble, o.advice) for o in wanted if o.trouble)
            totals.update(("stored_calls", to_column(call.peer) or "unknown") for call in stored)
            totals[AGE] = max([totals[AGE], *(utc - call.since for call in stored)])
            recent = [s for s in memory.sessions.values() if (s.ended or utc) >= utc - SESSION_SECONDS]
            opened = [session for session in recent if session.ended is None]
            refused = {call.session for call in memory.calls if call.refused}
            for s in recent:
                what = "refused" if s in refused else "ended" if s.ended else "open"
                what = "rejected" if s.owner and not s.server else what
                totals["sessions", to_column(s.owner) or "unknown", what] += 1
            is_well = all(outbox.link for outbox in wanted) and not stored
            if (state != "gone" or stored) and find in memory.charger.lower():
                found.append((is_well, not opened, state != "online", memory.charger, memory, opened))
        return totals, found

    async def _metrics(self) -> str:
        """Return what is counted, in the text format of Prometheus (0.0.4)."""
        samples, _ = await self._look()
        samples["info", __version__] = 1
        samples["state_file_failing",] = int(bool(self.journal.failure))
        samples["event_loop_lag_seconds",] = max(self.proxy.lags, default=0.0)
        samples.update({tuple(map(to_column, key)): count for key, count in self.journal.counts.items()})
        lines = []
        for metric, (labels, words_of_help, known) in METRICS.items():
            name, kind = f"ocpp_proxy_{metric}", "counter" if metric.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {words_of_help}", f"# TYPE {name} {kind}"]
            found = {tuple(one.split()): 0 for one in known.split("|") if one or not labels}
            found |= {key[1:]: n for key, n in samples.items() if key[0] == metric.removesuffix("_total")}
            for values, count in found.items():
                named = (f'{label}="{text}"' for label, text in zip(labels.split(), values, strict=True))
                lines.append(f"{name}{{{','.join(named)}}} {count}" if values else f"{name} {count}")
        return "\n".join([*lines, ""])

    async def _told(self, asked: dict[str, str]) -> Record:
        """Return all that the page shows; the README tells its fields."""
        config, wanted, find = self.proxy.config, asked.get("sessions", ""), asked.get("find", "")
        most = min(int(wanted), MOST_SESSIONS) if re.fullmatch(r"[0-9]{1,6}", wanted) else SESSIONS
        named = [peer for each in (config.default, *config.chargers.values()) for peer in each.servers]
        told: Record = {"now": time.time(), "version": __version__, "find": find.strip().lower()}
        told |= {"scheme": "wss" if config.host.cert_chain else "ws", "addr": config.host.addr}
        told |= {"port": self.proxy.port, "names": {p: config.default.name(p) for p in named}}
        told["sessions"], energy = await self.ledger({}, most), await self.journal.look_up(ENERGY)
        told["energy"] = {"months": energy[1::-1], "days": energy[2:]}
        totals, found = await self._look(told["find"])
        ranked = sorted(found)[:MOST_CHARGERS]
        kw = {s.number: s.power and s.power / 1000 for *_, charging in ranked for s in charging}
        rows = await self.ledger({"numbers": dump([*kw])}, which=BY_NUMBERS)
        opened = [row | {"kw": kw[row["number"]]} for row in rows]
        refused = await self.ledger({}, MOST_TROUBLES, BY_REFUSAL)
        for row in (*told["sessions"], *opened, *refused):
            row |= {"badge": self.shown(row["badge"]), "words": self.clean(row["words"])}
        told["chargers"] = [self._charger(memory, opened) async for *_, memory, _ in in_turns(ranked, 1)]
        told |= {name: totals["chargers", name] for name in ("online", "offline")}
        told["waiting"] = sum(count for key, count in totals.items() if key[0] == "stored_calls")
        told["trouble"] = list(self._troubles(totals, told["waiting"], refused))
        return told | {"events": list(self.events)}

    def _charger(self, memory: Memory, opened: list[Record]) -> Record:
        """Return what the page shows of a charger."""
        relay, skew = self.proxy.relays.get(memory.charger), time.time() - time.monotonic()
        link, outboxes = (relay.link, relay.outboxes) if relay else (None, {})
        connectors, servers, config = [], [], self.proxy.config.charger(memory.charger)
        for text in memory.statuses.values():
            said = content_of(VOCABULARIES[memory.version].charger, parse(text))
            place = said.payload.get("connectorId") if said.connector is None else said.connector
            connectors.append({"connector": place, "status": short(value_at(said.payload, said.facts.state))})
        for peer in config.servers if relay else ():
            outbox, state, why, next_at = outboxes.get(peer), LOCAL, "", math.inf
            if outbox and outbox.link:
                is_ready = outbox.is_booted or outbox.next_at == math.inf  # No boot is due.
                state = "connected" if is_ready else "has not accepted the boot yet"
            elif outbox:
                state, why = "down" if outbox.is_wanted else "not needed", self.clean(outbox.trouble)
                next_at = outbox.next_at + skew
            server = {"peer": peer, "name": config.name(peer), "state": state, "words": why}
            servers.append(server | {"next": next_at if next_at < math.inf else None})
        told = {"id": memory.charger, "online": link is not None, "version": memory.version}
        told |= {"since": link.opened + skew if link else memory.seen or None, "servers": servers}
        told |= {"connectors": connectors, "waiting": len(memory.stored)}
        return told | {"sessions": [row for row in opened if row["charger"] == memory.charger]}

    def _troubles(self, totals: Record, waiting: int, refused: list[Record]) -> Iterator[Record]:
        """Yield what a person should look at, with what to do."""
        if trouble := self.proxy.trouble():
            yield {"what": f"The proxy cannot serve: {trouble}.", "todo": "See the disk, and the log."}
        downs = Counter({key: count for key, count in totals.items() if key[0] == "down"})
        for (_, server, why, advice), count in downs.most_common(MOST_TROUBLES):
            what = f"{server} is down for {count} charger{'s' * (count > 1)}: {self.clean(why)}."
            todo = advice[:1].upper() + advice[1:] or "It is dialled again"
            yield {"what": what, "todo": f"{todo}. What belongs to it waits here."}
        if totals["chargers", "offline"]:
            what = f"Not connected, of the chargers seen lately: {totals['chargers', 'offline']}."
            yield {"what": what, "todo": "If it was refused, the log says why; else look at its network."}
        if totals[AGE] > LATE_SECONDS:
            what = f"Messages wait: {waiting}, the oldest for {totals[AGE] / 60:.0f} min."
            yield {"what": what, "todo": "Each goes once its server is connected and accepts the charger."}
        for row in refused:
            name = self.proxy.config.charger(row["charger"]).name(row["owner"])
            what = f"{name} refuses the session of badge {row['badge']} at {row['charger']}"
            what += f" of {(row['wh'] or 0) / 1000:.2f} kWh: {row['words']}."
            todo = f"Ask who runs {name} to accept this badge and charger; the ledger has the session."
            todo += " It is tried again once a day." if CALL_ERROR in row["words"] else ""
            yield {"what": what, "todo": todo}
        for badge, (charger_id, _) in list(self.journal.unlisted.items())[-MOST_TROUBLES:]:
            what = f"A badge that is on no list was shown at {charger_id}:"
            todo = "Copy the number to primary_rfid or secondary_rfid in the ini, and restart the proxy."
            yield {"what": what, "todo": todo, "copy": badge}


# ---------------------------------------------------------------------------------------------------------
# Command line
#
# Arguments, logging, exit codes, and two commands that help to set it up: `--check` dials the servers as a
# charger would, `--demo` plays two sessions between built-in peers.
# ---------------------------------------------------------------------------------------------------------

EXIT_OK, EXIT_FAILED, EXIT_MISTAKE = 0, 1, 2
MAX_LOG_LINE = 2_000  # Characters.
DEMO_SECONDS = 14.0


class Redactor(logging.Formatter):
    """Makes every log line safe to read and to keep: one line of ASCII, no credentials, badges masked."""

    # Badges are known by their keys; not where they stand in other people's prose.
    BADGE = re.compile(
        r"""(\\?"\w*[iI]d(?:Tag|Token)\\?"\s*:\s*)  # The key, perhaps in a string that holds JSON.
            (\\"[^"\\]*|"(?:[^"\\]|\\.)*|[\d.]+)  # The value, perhaps cut short.""",
        re.VERBOSE,
    )
    TOLD_BADGE = re.compile(r"(; badge )(.*)$", re.DOTALL)
    SECRET = re.compile(r"password|authorizationkey|simpin|\\u00[4-7]", re.IGNORECASE)  # Or in disguise.
    URL_LOGIN = re.compile(r"\\?/\\?/[^\s\"]*@")  # JSON may write each slash with a backslash.
    HEADER_LOGIN = re.compile(r"\b(basic|bearer)\s+[^\s,\"]+", re.IGNORECASE)
    full_badges = False

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return self.clean(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(self.clean, super().formatException(ei).splitlines()))

    def clean(self, text: str) -> str:
        """Return the text as it may be logged."""
        start = text.find("{") if "{" in text else text.find("[")
        if start >= 0 and self.SECRET.search(text):
            text = text[:start] + "{hidden: it may hold a password}"
        text = self.URL_LOGIN.sub("//hidden@", text[: 2 * MAX_LOG_LINE])
        text = self.HEADER_LOGIN.sub(r"\1 hidden", text)
        if not self.full_badges:
            text = self.BADGE.sub(lambda found: found[1] + '"' + masked(found[2].strip('\\"')), text)
            text = self.TOLD_BADGE.sub(lambda found: found[1] + masked(found[2]), text)
        return escaped(text)[:MAX_LOG_LINE]


REDACTOR = Redactor("%(asctime)s %(levelname)-7s %(message)s")


def set_up_logging(config: Config) -> None:
    """Write safe lines to stderr; one that finds no room there is lost."""
    logging.raiseExceptions = logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.getLogger().handlers[0].setFormatter(REDACTOR)
    REDACTOR.full_badges = config.full_badges
    for name, level in config.levels.items():
        logging.getLogger(name).setLevel(level)
    for warning in config.warnings:
        log.warning("%s", warning)


async def serve(config: Config) -> int:
    """Run the proxy until SIGTERM or SIGINT; return the exit code."""
    host, stopped, loop = config.host, asyncio.Future[None](), asyncio.get_running_loop()
    try:
        if host.state == "none":
            log.warning("state = none: sessions and stored Calls are lost with the process")
        journal = None if host.state == "none" else Journal.open(Path(host.state), current_instant)
        proxy = Proxy(config, journal)
        await proxy.start()
    except (StateError, OSError) as error:
        what = f"cannot listen on {host.addr}:{host.port}: " if isinstance(error, OSError) else ""
        print(f"{what}{error}", file=sys.stderr)
        return EXIT_MISTAKE
    loop.set_exception_handler(proxy.loop_failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # Windows; there, Ctrl-C cancels this task.
            loop.add_signal_handler(number, stopped.cancel)
    place = f"{'wss' if host.cert_chain else 'ws'}://{host.addr}:{proxy.port}/"
    log.info("ocpp-2w-proxy %s listens on %s", __version__, place)
    status = Status(proxy, REDACTOR.clean)
    await status.start()
    with suppress(asyncio.CancelledError):
        await asyncio.wait([stopped, proxy.watchdog], return_when=asyncio.FIRST_COMPLETED)
    code = EXIT_FAILED if proxy.watchdog.done() else EXIT_OK  # Without it no deadline ever comes.
    log.info("stopping")
    if status.server:
        status.server.close()
    await proxy.stop()
    return code


# --check
async def check(config: Config, path: Path, charger_id: str, badge: str | None) -> int:
    """Dial both servers as the charger ("" = any) would, print what each answers; return the exit code."""
    if charger_id and not config.host.admits(charger_id):
        print(f"the proxy refuses {charger_id!a}: it is no charger id, or not among `chargers` in [host]")
        return EXIT_FAILED
    charger, dialer, code = config.charger(charger_id), Dialer(config.host.max_size), EXIT_OK
    if badge is not None:
        print(whose_badge(charger, path, badge))
    versions = charger.versions
    for peer in SERVERS:
        server = charger.servers.get(peer)
        if server is None or server.url == LOCAL:
            print(f"{charger.name(peer)}: {f'{LOCAL}: the proxy itself answers' if server else 'none'}")
            continue
        spoken, answer = await checked(dialer, peer, server, charger_id, versions)
        print(f"{server.name}: {server.url}: {answer}")
        await tell_way(dialer, server)
        code, versions = (code, spoken) if spoken else (EXIT_FAILED, versions)
    if not charger_id:
        print("To check the login of one charger, name it: --check CHARGER_ID")
    return code


async def checked(
    dialer: Dialer, peer: Peer, server: ServerConfig, charger_id: str, versions: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """Return the versions that a server may speak (none = it will not do), and what it said."""
    name, wanted = charger_id or "check", " or ".join(versions)
    try:
        link = await dialer.dial(peer, server, name, versions, {})
    except DialError as error:
        if error.status == HTTPStatus.UNAUTHORIZED and server.needs_charger_login:
            return versions, f"wants the charger's own login, which only the charger has ({error})"
        if error.status == HTTPStatus.NOT_FOUND and not charger_id:
            return versions, f"does not know a charger {name!r}, which is fine ({error})"
        otherwise = "check the address, and that it can be reached from here"
        return (), f"{error}; {error.advice(peer, otherwise, wanted)}"
    version = link.protocol.subprotocol
    link.close(1000)
    await asyncio.wait([link.ended], timeout=CLOSE_SECONDS)
    if version is None and "ocpp1.6" not in versions:
        return (), OTHER_VERSION.format(version=wanted)
    return (version or "ocpp1.6",), f"accepts {server.id or name!r} ({version or 'ocpp1.6: it names none'})"


async def tell_way(dialer: Dialer, server: ServerConfig) -> None:
    """Print where a server's name leads, and how long its certificate is valid."""
    uri = uri_of(server.url)
    with suppress(OSError, UnicodeError):  # The dial has told of it.
        async with asyncio.timeout(DIAL_SECONDS):
            found = dict.fromkeys(host for host, _ in await dialer.addresses(uri.host, uri.port))
            if list(found) != [uri.host]:
                print(f"    DNS: {uri.host} is {', '.join(found)}")
            if uri.secure:
                context = context_of(server.ca, server.cert, server.key)
                _, writer = await asyncio.open_connection(uri.host, uri.port, ssl=context)
                end = ssl.cert_time_to_seconds(writer.get_extra_info("peercert")["notAfter"])
                writer.close()
                print(f"    TLS: its certificate is valid until {Instant(0.0, end).text}")


def whose_badge(charger: ChargerConfig, path: Path, badge: str) -> str:
    """Say which server a badge goes to, and by which line of the ini."""
    router, lines = Router(charger, Memory(), "ocpp1.6"), charger.lines
    route = router.route_of_badge(badge)
    entry = "" if route.unlisted else charger.entry(badge)
    line = lines.get(entry or "unknown_rfid")
    where = "by default" if line is None else f"{path}:{line}" + (f" ({entry})" if entry else "")
    near = [] if entry else difflib.get_close_matches(normalized(badge), charger.badges, 1, 0.8)
    miss = f"; {near[0]} in line {lines[near[0]]} is nearly the same" if near else ""
    return f"badge {badge}: {router.whose(route)}: {route.why}, {where}{miss}"


# --demo

DEMO_TIME = "2026-01-01T00:00:00Z"
DEMO = (("primary", "server", "04A1B2C3"), ("secondary", "secondary_server", "04D5E6F7"))
DEMO_INI = "[host]\naddr = 127.0.0.1\nport = 0\n[ext-server]\n"


async def demo_server(peer: str, ended: asyncio.Event, connection: websockets.ServerConnection) -> None:
    """Accept everything, and tell what comes."""
    async for text in connection:
        message = parse(str(text))
        answer = content_of(CHARGER_16, message).answer("Accepted", DEMO_TIME, 1)
        print(f"    {peer} gets {message.action} {dump(message.payload)}, answers {answer}")
        await connection.send(result_text(message.message_id, answer))
        if message.action == "StopTransaction" and peer == "secondary":
            ended.set()


async def demo_charger(connection: websockets.ClientConnection) -> None:
    """Boot, then play one session with a badge of each server."""

    async def call(action: str, **payload: Any) -> dict[str, Any]:
        print(f"charger sends {action} {dump(payload)}")
        await connection.send(call_text(new_message_id(), action, dump(payload)))
        answer = parse(str(await connection.recv())).payload
        print(f"charger hears {dump(answer)}")
        return answer

    await call("BootNotification", chargePointVendor="Demo", chargePointModel="One")
    for peer, _, badge in DEMO:
        print(f"\n--- a session with badge {badge}, which is on {peer}_rfid ---")
        start = {"connectorId": 1, "idTag": badge, "meterStart": 100, "timestamp": DEMO_TIME}
        number = (await call("StartTransaction", **start))["transactionId"]
        sample = [{"timestamp": DEMO_TIME, "sampledValue": [{"value": "150"}]}]
        await call("MeterValues", connectorId=1, transactionId=number, meterValue=sample)
        await call("StopTransaction", transactionId=number, meterStop=200, timestamp=DEMO_TIME)


async def demo() -> int:
    """Play one session per badge through a proxy between two servers, all of them here."""
    print("Two servers, a proxy and a charger, on free ports of this machine.\n")
    ended, offers, ini = asyncio.Event(), [Subprotocol("ocpp1.6")], DEMO_INI
    async with asyncio.timeout(DEMO_SECONDS):
        for peer, key, badge in DEMO:
            play = partial(demo_server, peer, ended)
            server = await websockets.serve(play, "127.0.0.1", 0, subprotocols=offers)
            port = next(iter(server.sockets)).getsockname()[1]
            ini += f"{key} = ws://127.0.0.1:{port}/ocpp\n{peer}_rfid = {badge}\n"
        proxy = Proxy(Ini(Path("demo.ini"), {}, concern_of).load(ini))
        await proxy.start()
        async with websockets.connect(f"ws://127.0.0.1:{proxy.port}/DEMO-1", subprotocols=offers) as charger:
            await demo_charger(charger)
            await ended.wait()
        await proxy.stop()
    print("\nEach server has got its own session, complete and in order, under its own transaction id.")
    return EXIT_OK


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="One charger, two OCPP servers: badges decide.")
    parser.add_argument("--version", action="version", version=f"ocpp-2w-proxy {__version__}")
    parser.add_argument("--config", metavar="FILE", default="ocpp-2w-proxy.ini", type=Path, help="the ini")
    what = "check the ini, and dial both servers as this charger would"
    parser.add_argument("--check", metavar="CHARGER_ID", nargs="?", const="", help=what)
    parser.add_argument("--badge", metavar="TAG", help="check, and say which server gets this badge")
    parser.add_argument("--demo", action="store_true", help="play two sessions between built-in peers")
    options = parser.parse_args()
    if options.demo:
        return asyncio.run(demo())
    try:
        config = load_config(options.config, os.environ, concern_of)
        server_context(config.host)
    except (ConfigError, OSError) as error:
        what = f"{options.config}: cert_chain, cert_key or client_ca cannot be used: "
        print(f"{what if isinstance(error, OSError) else ''}{error}", file=sys.stderr)
        return EXIT_MISTAKE
    set_up_logging(config)
    # Looking for cycles among what lives as long as its chargers finds hardly anything, and stops everybody:
    # for half a second with 5,000 chargers, at Python's own thresholds.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    with suppress(KeyboardInterrupt):
        if options.check is not None or options.badge is not None:
            return asyncio.run(check(config, options.config, options.check or "", options.badge))
        return asyncio.run(serve(config))
    return EXIT_OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)  # All is closed and written; a disk or a look-up that hangs must not hold up the end.
