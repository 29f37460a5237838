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

Read it from top to bottom: each section uses only those above it. Text passes as it came; the proxy
changes a message only where an id has to be translated, and then nothing else in it.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import textwrap
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NamedTuple

import websockets
from websockets.exceptions import InvalidHandshake
from websockets.uri import parse_uri

__version__ = "1.0.0"

log = logging.getLogger("proxy")


class Peer(Enum):
    """Who sends a message."""

    CHARGER = "charger"
    PRIMARY = "primary"
    SECONDARY = "secondary"
    PROXY = "proxy"


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

    def find(self, badge: str) -> tuple[Peer, str] | None:
        """Return the server that has the badge on its list, and the entry that says so."""
        name = normalized(badge)
        if name in self.exact:
            return self.exact[name], name
        return next(((peer, entry) for entry, peer in self.patterns if fnmatchcase(name, entry)), None)


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

    def server(self, peer: Peer) -> ServerConfig | None:
        return self.primary if peer is Peer.PRIMARY else self.secondary


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The section `[host]`: what chargers meet. Times in seconds."""

    addr: str
    port: int
    cert_chain: str
    cert_key: str
    client_ca: str
    chargers: tuple[str, ...]
    watchdog_stale: float
    watchdog_interval: float
    ping_interval: float
    ping_timeout: float
    call_timeout: float
    max_size: int
    state: str


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
        return self.chargers.get(charger_id, self.default)


BLANKS = "".join(map(chr, range(33)))  # Some readers append control characters to a badge.


def normalized(badge: str) -> str:
    """Return the badge as it is compared: without surrounding blanks and without case."""
    return badge.strip(BLANKS).casefold()


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
        raise ValueError("expected 1 to 48 of ASCII letters, digits and *-_=:+|@. and blank")
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


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as it stands in the ini, and the number of its line."""

    value: str
    line: int


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
                entries[name] = Entry(self._substituted(entry), entry.line)

    def _open(self, line: str, number: int) -> str:
        name = " ".join(line[1:-1].split())
        if not line.endswith("]") or not (name in SECTIONS or name.startswith(CHARGER_SECTION)):
            known = ", ".join(f"[{known}]" for known in SECTIONS)
            raise self.error(number, f"unknown section {line!a}; expected {known} or [charger ID]")
        if name in self.sections:
            raise self.error(number, f"section [{name}] stands twice, first at line {self.lines[name]}")
        if name.startswith(CHARGER_SECTION) and not is_charger_id(name.removeprefix(CHARGER_SECTION)):
            raise self.error(number, f"{line!a} names no charger id; expected letters, digits, *-_=:+|@. ")
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
        keys = SERVER_KEYS if section.startswith(CHARGER_SECTION) else SECTIONS[section]
        if key not in keys and (section != "logging" or not key):
            expected = ", ".join(keys)
            raise self.error(number, f"unknown key {first_word(key)!a} in [{section}]; expected {expected}")
        if key in self.sections[section]:
            first = self.sections[section][key].line
            raise self.error(number, f"{key} stands twice in [{section}], first at line {first}")
        self.sections[section][key] = Entry(value.strip(), number)
        return key

    def _continue(self, section: str, key: str, line: str, number: int) -> None:
        if not key:
            raise self.error(number, "an indented line continues a value, and no value stands above it")
        above = self.sections[section][key]
        self.sections[section][key] = Entry(f"{above.value}\n{line}".strip(), above.line)

    def _substituted(self, entry: Entry) -> str:
        def value_of(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if match[1] not in self.environment:
                raise self.error(entry.line, f"environment variable {match[1]!a} is not set")
            return self.environment[match[1]]

        return re.sub(r"\$\$\{|\$\{([^}]*)\}", value_of, entry.value)


class ConfigLoader:
    """Turns an Ini into a Config."""

    def __init__(self, ini: Ini, is_copyable: Callable[[str], bool]) -> None:
        self.ini = ini
        self.is_copyable = is_copyable
        self.warnings: list[str] = []

    def load(self) -> Config:
        """Return the checked configuration. Raises ConfigError."""
        sections = self.ini.sections
        logging_section = sections.get("logging", {})
        general = sections.get("ext-server", {})
        host = HostConfig(**self._values(sections.get("host", {}), HOST_KEYS))
        status = StatusConfig(**self._values(sections.get("status", {}), STATUS_KEYS))
        self._check_host(host, sections.get("host", {}))
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
                name.removeprefix(CHARGER_SECTION): self._charger({**general, **own})
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

    def _line(self, section: Section, *names: str) -> int:
        return next((section[name].line for name in names if name in section), 1)

    def _check_host(self, host: HostConfig, section: Section) -> None:
        if host.cert_key and not host.cert_chain:
            raise self.ini.error(self._line(section, "cert_key"), "cert_key needs cert_chain")
        if host.client_ca and not host.cert_chain:
            raise self.ini.error(self._line(section, "client_ca"), "client_ca needs cert_chain and cert_key")

    def _check_status(self, status: StatusConfig, section: Section) -> None:
        if status.port and not status.password and not is_loopback(status.addr):
            line = self._line(section, "addr")
            raise self.ini.error(line, f"addr {status.addr!a} is not loopback: [status] needs a password")

    def _charger(self, section: Section) -> ChargerConfig:
        values = self._values(section, SERVER_KEYS)
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
        )
        self._check_charger(section, config)
        return config

    def _check_server(self, section: Section, peer: Peer, server: ServerConfig | None) -> None:
        if server and server.key and not server.cert:
            name = f"{peer.value}_key"
            raise self.ini.error(self._line(section, name), f"{name} needs {peer.value}_cert")

    def _server(self, url: str, name: str, values: dict[str, Any]) -> ServerConfig:
        keys = ("id", "user", "password", "auth", "ca", "cert", "key")
        return ServerConfig(url, **{key: values[f"{name}_{key}"] for key in keys})

    def _badges(self, section: Section, values: dict[str, Any]) -> BadgeLists:
        owners: dict[str, Peer] = {}
        for peer in (Peer.PRIMARY, Peer.SECONDARY):
            for badge in map(normalized, values[f"{peer.value}_rfid"]):
                if owners.setdefault(badge, peer) is not peer:
                    line = self._line(section, "secondary_rfid")
                    raise self.ini.error(line, f"{badge!a} is on primary_rfid and on secondary_rfid")
        patterns = sorted((entry for entry in owners if re.search(r"[*?[]", entry)), key=len, reverse=True)
        exact = {entry: peer for entry, peer in owners.items() if entry not in patterns}
        return BadgeLists(exact, tuple((entry, owners[entry]) for entry in patterns))

    def _check_charger(self, section: Section, config: ChargerConfig) -> None:
        for peer in (Peer.PRIMARY, Peer.SECONDARY):
            self._check_server(section, peer, config.server(peer))
        for action in sorted(config.secondary_copies):
            if not self.is_copyable(action):
                line = self._line(section, "secondary_copies")
                why = "it can carry a badge or a transaction, which concern one server only"
                raise self.ini.error(line, f"secondary_copies: {action!a} cannot be copied: {why}")
        doubts = {
            "secondary_rfid": not config.secondary
            and any(peer is Peer.SECONDARY for peer in self._listed(config.badges))
            and "secondary_rfid without secondary_server: these badges go to the primary",
            "unknown_rfid": config.unknown_rfid == "secondary"
            and config.secondary_replies == "ignore"
            and "unknown_rfid = secondary without secondary_replies = forward: any card charges",
        }
        for name, doubt in doubts.items():
            if doubt:
                self.warnings.append(f"{self.ini.path}:{self._line(section, name)}: {doubt}")

    def _listed(self, badges: BadgeLists) -> Iterable[Peer]:
        return [*badges.exact.values(), *(peer for _, peer in badges.patterns)]


def load_config(path: Path, environment: Mapping[str, str], is_copyable: Callable[[str], bool]) -> Config:
    """
    Read the ini at `path`. Raises ConfigError.

    `is_copyable` tells of an Action whether `secondary_copies` may name it.

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    ini = Ini(path, environment)
    ini.parse(text)
    return ConfigLoader(ini, is_copyable).load()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
MAX_DEPTH = 64  # Brackets in brackets; OCPP 2.1 needs 12.

TextPath = tuple[str | int, ...]  # From the message's array down, as (3, "transactionId").


class MessageType(IntEnum):
    """The first element of an OCPP-J message (OCPP 2.1 part 4, 4.1.3)."""

    CALL = 2
    CALLRESULT = 3
    CALLERROR = 4
    CALLRESULTERROR = 5
    SEND = 6


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


# Lenient with control characters in strings: chargers append them to badges.
DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def parse(text: str) -> Message:
    """Return the text as a Message. Raises MessageError, and nothing else, for any other text."""
    try:
        parts = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {error}"[:200], text) from None
    if type(parts) is not list or len(parts) < 3:
        raise MessageError("no JSON array of three or more elements", text)
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise MessageError(f"nested more than {MAX_DEPTH} levels deep", text)
    number, message_id, *rest = parts
    if type(number) is not int or not 2 <= number <= 6:
        raise MessageError(f"unknown message type {str(number)[:20]!a}", text)
    if type(message_id) is not str or not 1 <= len(message_id) <= MAX_MESSAGE_ID:
        raise MessageError("the message id is no string of 1 to 255 characters", text)
    kind = MessageType(number)
    action, payload = _body(kind, rest, text)
    return Message(kind, message_id, action, payload, text)


def depth(text: str) -> int:
    """Return how deep the brackets of a JSON text are nested."""
    level = deepest = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        deepest = max(deepest, level)
    return deepest


def _body(kind: MessageType, rest: list[Any], text: str) -> tuple[str, dict[str, Any]]:
    """Return the Action (or error code) and the payload (or error details) of a message."""
    if kind is MessageType.CALLRESULT:
        action, payload = "", rest[0]
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


def dump(value: Any) -> str:
    """Return the value as JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def call_text(message_id: str, action: str, payload: dict[str, Any]) -> str:
    return dump([MessageType.CALL, message_id, action, payload])


def result_text(message_id: str, payload: dict[str, Any]) -> str:
    return dump([MessageType.CALLRESULT, message_id, payload])


def error_text(message_id: str, code: str, description: str) -> str:
    return dump([MessageType.CALLERROR, message_id, code, description[:255], {}])


def new_message_id() -> str:
    return str(uuid.uuid4())


# Where a value stands in a text. The text has been parsed before, so it is known to be JSON.

_scan: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]
_blanks = re.compile(r"[ \t\n\r]*").match


def _skip(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not white space."""
    match = _blanks(text, at)
    assert match is not None, "the pattern matches everywhere"
    return match.end()


def _children(text: str, at: int) -> Iterator[tuple[str | int, int, int]]:
    """Yield key or index, start and end of each value of the object or array that begins at `at`."""
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
        _, end = _scan(text, at)
        yield key, at, end
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def spans(text: str, path: TextPath) -> list[tuple[int, int]]:
    """Return start and end of every value at the path; several where a key stands twice in an object."""
    found = [(_skip(text, 0), len(text))]
    for step in path:
        found = [span for at, _ in found for key, *span in _children(text, at) if key == step]  # type: ignore[misc]
    return found


def repeats(text: str, path: TextPath) -> bool:
    """Whether a key of the path stands twice, so that two readers could see two different values."""
    if "\\u" not in text and all(text.count(f'"{key}"') < 2 for key in path):
        return False  # The short way out for nearly all messages.
    return any(len(spans(text, path[:end])) > 1 for end in range(1, len(path) + 1))


def patch(text: str, path: TextPath, value: str | int) -> str:
    """Return the text with the value at the path replaced, or added as its object's first key."""
    found = spans(text, path)
    if found:
        start, end = found[-1]  # Of repeated keys the last counts, as for json.loads.
        return text[:start] + dump(value) + text[end:]
    ((start, end),) = spans(text, path[:-1])
    if text[start] != "{":  # A payload of null is as good as {}.
        return text[:start] + dump({path[-1]: value}) + text[end:]
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
    asked_by: str = ""  # The Action that this one reports on where no request id says so.
    by_connector: bool = False  # Belongs to the session on its connector, if there is one.
    answer: dict[str, Any] = field(default_factory=dict)  # The smallest that the schema allows.
    badge_answer: dict[str, Any] | None = None  # Instead, where the Call carries a badge.
    rejects: bool = False  # A server's Action: the schema of its answer has a status Rejected.

    @property
    def single_paths(self) -> tuple[FieldPath, ...]:
        """The paths whose value the routing takes for the only one."""
        paths = (self.badge, self.transaction, self.reservation, self.remote_start, self.request)
        return tuple(path for path in paths if path and "*" not in path)


PLAIN = Facts()
STATUS_REJECTED = {"status": "Rejected"}
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
    SignCertificate                  answer=rejected
    SignedFirmwareStatusNotification request=requestId asked_by=SignedUpdateFirmware
    StartTransaction                 role=start badge=idTag connector=connectorId
                                     reservation=reservationId answer=start
    StatusNotification               role=status connector=connectorId state=status
    StopTransaction                  role=stop badge=idTag transaction=transactionId
""")
SERVER_16 = table("""
    CancelReservation                role=cancel reservation=reservationId rejects
    CertificateSigned                rejects
    ChangeAvailability               connector=connectorId rejects
    ChangeConfiguration              rejects
    ClearCache                       rejects
    ClearChargingProfile             connector=connectorId
    DataTransfer                     rejects
    ExtendedTriggerMessage           connector=connectorId rejects
    GetCompositeSchedule             connector=connectorId rejects
    GetLog                           request=requestId rejects
    InstallCertificate               rejects
    RemoteStartTransaction           role=remote-start badge=idTag connector=connectorId
                                     transaction=chargingProfile.transactionId rejects
    RemoteStopTransaction            transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idTag connector=connectorId
                                     reservation=reservationId rejects
    Reset                            rejects
    SendLocalList                    badge=localAuthorizationList.*.idTag
    SetChargingProfile               transaction=csChargingProfiles.transactionId
                                     connector=connectorId rejects
    SignedUpdateFirmware             request=requestId rejects
    TriggerMessage                   connector=connectorId rejects
    UnlockConnector                  connector=connectorId
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
""")
SERVER_201 = table("""
    CancelReservation                role=cancel reservation=reservationId rejects
    CertificateSigned                rejects
    ChangeAvailability               connector=evse.id rejects
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
    RequestStopTransaction           transaction=transactionId rejects
    ReserveNow                       role=reserve badge=idToken.idToken connector=evseId
                                     reservation=id rejects
    Reset                            connector=evseId rejects
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
    UnlockConnector                  connector=evseId
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


def values_at(payload: Any, path: FieldPath) -> list[Any]:
    """Return all values at the path; none where it ends early."""
    found = [payload]
    for step in path:
        if step == "*":
            found = [element for value in found if type(value) is list for element in value]
        else:
            found = [value[step] for value in found if type(value) is dict and step in value]
    return found if path else []


def value_at(payload: Any, path: FieldPath) -> Any:
    """Return the first value at the path, or None."""
    return next(iter(values_at(payload, path)), None)


def filled(answer: Any, values: dict[Fill, Any]) -> Any:
    """Return a copy of a table's answer with its places filled in."""
    if isinstance(answer, Fill):
        return values[answer]
    if isinstance(answer, dict):
        return {key: filled(value, values) for key, value in answer.items()}
    if isinstance(answer, list):
        return [filled(value, values) for value in answer]
    return answer


def may_copy(action: str) -> bool:
    """Whether the Action never carries a badge or a transaction, in no version."""
    entries = [vocabulary.charger.get(action, PLAIN) for vocabulary in VOCABULARIES.values()]
    return not any(entry.badge or entry.transaction for entry in entries)
