"""The ini: what loads, what is doubtful, and the one line that each mistake gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import ocpp_2w_proxy as p

Load = Callable[..., p.Config]

LOCAL = "[ext-server]\nserver = local\n"
OPEN = "nobody checks who connects: set `password` or `client_ca`, or listen on 127.0.0.1 alone"
TWO_SERVERS = "[ext-server]\nserver = ws://one\nsecondary_server = ws://two\n"
ORIGINAL = """\
[logging]
proxy = DEBUG
websockets.client = INFO
websockets.server = INFO

[host]
; Host to listen on (default: 0.0.0.0)
addr = 0.0.0.0
port = 8321
watchdog_stale = 500
watchdog_interval = 100
ping_timeout = 60

[ext-server]
; Primary CSMS external server
server = ws://localhost:9999/
;server = wss://abb.cdlink.chargedot.com:9043/
; (Optional) Secondary CSMS external server
secondary_server = ws://localhost:9998/
primary_rfid = 04A1B2C3
secondary_rfid = 04D5E6F7, 04D5E6F8
"""

SERVER_KEYS = (
    "server, primary_rfid, primary_id, primary_user, primary_password, primary_auth, primary_ca, "
    "primary_cert, primary_key, primary_copies, primary_grace, secondary_server, secondary_rfid, "
    "secondary_id, "
    "secondary_user, secondary_password, secondary_auth, secondary_ca, secondary_cert, secondary_key, "
    "secondary_replies, secondary_copies, secondary_refuse, unknown_rfid, versions"
)
CHARGER_KEYS = f"{SERVER_KEYS}, password"
HOST_KEYS = (
    "addr, port, cert_chain, cert_key, client_ca, password, chargers, watchdog_stale, watchdog_interval, "
    "ping_interval, ping_timeout, call_timeout, max_size, state"
)
SECTIONS = "expected [logging], [host], [ext-server], [status] or [charger ID]"
AN_ADDRESS = "expected ws://HOST[:PORT]/PATH, wss://HOST[:PORT]/PATH or local"
NO_CREDENTIALS = "credentials do not belong in the address: use the keys *_user and *_password"
NO_QUERY = "expected an address without a query: the charger's id is appended to it"
NO_SERVER = "server is missing in [ext-server]; expected an address or local"
NO_PAIR = "expected `key = value`, [section] or a comment"
NO_COMMENT = "a comment behind a value; expected it on a line of its own"
OWN_ADDRESS = "is the proxy's own address; expected that of another server, or local"
NO_COPY = "cannot be copied: it can carry a badge or a transaction, which concern one server only"
A_LEVEL = "expected DEBUG, INFO, WARNING, ERROR or CRITICAL"
AN_ID = "expected 1 to 48 of ASCII letters, digits, *-_=:+|@. and blanks, without quotes"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ini of a test stands."""
    return tmp_path / "test.ini"


@pytest.fixture
def load(path: Path) -> Load:
    """Write an ini and load it."""

    def load_text(text: str, **environment: str) -> p.Config:
        path.write_text(text, encoding="utf-8")
        return p.load_config(path, environment, p.concern_of)

    return load_text


def mistake(load: Load, text: str) -> str:
    """Return the line that the mistake in the ini gives."""
    with pytest.raises(p.ConfigError) as caught:
        load(text)
    return str(caught.value)


# What loads.


def test_original_ini_loads_unchanged(load: Load) -> None:
    """An ini of the original proxy means what it meant."""
    config = load(ORIGINAL)
    assert config.levels == {"proxy": "DEBUG", "websockets.client": "INFO", "websockets.server": "INFO"}
    assert (config.host.addr, config.host.port) == ("0.0.0.0", 8321)
    assert (config.host.watchdog_stale, config.host.watchdog_interval) == (500, 100)
    assert config.host.ping_timeout == 60
    charger = config.charger("any")
    assert charger.primary.url == "ws://localhost:9999"
    assert charger.secondary is not None
    assert charger.secondary.url == "ws://localhost:9998"
    assert charger.badges.exact == {
        "04a1b2c3": p.Peer.PRIMARY,
        "04d5e6f7": p.Peer.SECONDARY,
        "04d5e6f8": p.Peer.SECONDARY,
    }
    assert charger.badges.patterns == ()
    assert config.warnings == ()


def test_defaults_of_an_almost_empty_ini(load: Load, tmp_path: Path, path: Path) -> None:
    """A server is all that an ini must say."""
    config = load(LOCAL)
    assert config == p.Config(
        levels={"proxy": "INFO"},
        full_badges=False,
        host=p.HostConfig(
            addr="0.0.0.0",
            port=8321,
            cert_chain="",
            cert_key="",
            client_ca="",
            password="",
            chargers=("*",),
            watchdog_stale=500,
            watchdog_interval=10,
            ping_interval=30,
            ping_timeout=60,
            call_timeout=30,
            max_size=1048576,
            state=str(tmp_path / "ocpp-2w-proxy.db"),
        ),
        status=p.StatusConfig("127.0.0.1", 8322, ""),
        default=p.ChargerConfig(
            primary=p.ServerConfig("local", "", "", "", "forward", "", "", ""),
            secondary=None,
            badges=p.BadgeLists({}, ()),
            unknown_rfid="primary",
            secondary_replies="ignore",
            secondary_copies=frozenset({"StatusNotification"}),
            primary_copies=frozenset(),
            secondary_refuse=frozenset(),
            primary_grace=15,
            versions=("ocpp2.1", "ocpp2.0.1", "ocpp1.6"),
            password="",
        ),
        chargers={},
        warnings=(f"{path}:2: {OPEN}",),
    )


@pytest.mark.parametrize(
    ("section", "keys"),
    [("host", p.HOST_KEYS), ("status", p.STATUS_KEYS), ("logging", p.LOGGING_KEYS)],
)
def test_empty_value_is_the_default(load: Load, section: str, keys: dict[str, p.Key]) -> None:
    """A key without a value is as good as no key."""
    empty = "".join(f"{key} =\n" for key in keys)
    assert load(f"{LOCAL}[{section}]\n{empty}") == load(LOCAL)


def test_empty_value_in_ext_server_is_the_default(load: Load) -> None:
    """All keys of [ext-server] but the server may be empty."""
    empty = "".join(f"{key} =\n" for key in p.SERVER_KEYS if key != "server")
    assert load(LOCAL + empty) == load(LOCAL)


def test_keys_of_a_server(load: Load) -> None:
    """Each of the two servers has its own id, login and authorization."""
    config = load(
        TWO_SERVERS
        + "primary_id = A 1\nprimary_user = u\nprimary_password = p;w#=[x]\nprimary_auth = NONE\n"
        + "secondary_id = B\nsecondary_user = v\nsecondary_password = q\nsecondary_auth = Forward\n"
    )
    assert config.default.primary == p.ServerConfig("ws://one", "A 1", "u", "p;w#=[x]", "none", "", "", "")
    assert config.default.secondary == p.ServerConfig("ws://two", "B", "v", "q", "forward", "", "", "")


def test_server_of_a_peer(load: Load) -> None:
    """A charger's configuration hands out the server of either peer."""
    charger = load(TWO_SERVERS).default
    assert charger.server(p.Peer.PRIMARY) is charger.primary
    assert charger.server(p.Peer.SECONDARY) is charger.secondary


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        ("", True),
        ("primary_auth = none", False),
        ("primary_user = u", False),
        ("primary_password = p", False),
    ],
)
def test_charger_login_is_needed_where_nothing_else_is_shown(load: Load, more: str, needed: bool) -> None:
    """Only a server that gets the charger's own Authorization depends on the charger's login."""
    assert load(LOCAL + more).default.primary.needs_charger_login is needed


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("ws://h", "ws://h"),
        ("ws://h:80/a/b//", "ws://h:80/a/b"),
        ("wss://h/%20/", "wss://h/%20"),
        ("ws://[::1]:9000/", "ws://[::1]:9000"),
        ("Local", "local"),
    ],
)
def test_server_address(load: Load, written: str, url: str) -> None:
    """An address loses its trailing slashes; `local` is known in any case."""
    server = load(f"[ext-server]\nserver = {written}\n").default.primary
    assert server.url == url
    assert server.is_local is (url == "local")


def test_choices_and_lists_of_ext_server(load: Load) -> None:
    """Choices are read without case, lists are split at commas, blanks and lines."""
    charger = load(
        TWO_SERVERS
        + "unknown_rfid = REJECT\nsecondary_replies = Forward\nprimary_grace = 2.5 s\n"
        + "secondary_copies = StatusNotification, Heartbeat\n"
        + "secondary_refuse = Reset\n  ChangeConfiguration,\n\tClearCache\n"
        + "versions = OCPP1.6 ocpp2.1\n"
    ).default
    assert (charger.unknown_rfid, charger.secondary_replies, charger.primary_grace) == (
        "reject",
        "forward",
        2.5,
    )
    assert charger.secondary_copies == {"StatusNotification", "Heartbeat"}
    assert charger.secondary_refuse == {"Reset", "ChangeConfiguration", "ClearCache"}
    assert charger.versions == ("ocpp1.6", "ocpp2.1")


def test_charger_patterns_may_hold_blanks(load: Load) -> None:
    """The list of chargers is split at commas and lines only."""
    host = load(f"{LOCAL}[host]\nchargers = Box 1, Box 2\n  EV*\n").host
    assert host.chargers == ("Box 1", "Box 2", "EV*")


@pytest.mark.parametrize("written", ["500", "500.0", "500s", "500 s"])
def test_seconds(load: Load, written: str) -> None:
    """Seconds may have a fraction and a unit."""
    assert load(f"{LOCAL}[host]\nwatchdog_stale = {written}\n").host.watchdog_stale == 500


def test_levels_of_any_logger(load: Load) -> None:
    """Every key of [logging] but `rfid` is a logger; its case is kept, that of the level does not matter."""
    config = load(f"{LOCAL}[logging]\nwebsockets.client = debug\nMyLogger = Error\nrfid = FULL\n")
    assert config.levels == {"proxy": "INFO", "websockets.client": "DEBUG", "MyLogger": "ERROR"}
    assert config.full_badges


def test_continuation_lines(load: Load) -> None:
    """An indented line continues the value above, past comments and empty lines."""
    config = load(
        TWO_SERVERS
        + "secondary_rfid =\n  A,\n; a comment\n\n\tB\n  # another\n  C D\nprimary_rfid = E\n  F\n"
    )
    exact = config.default.badges.exact
    assert [badge for badge, peer in exact.items() if peer is p.Peer.SECONDARY] == ["a", "b", "c", "d"]
    assert [badge for badge, peer in exact.items() if peer is p.Peer.PRIMARY] == ["e", "f"]


def test_comments_are_full_lines_only(load: Load) -> None:
    """`;` and `#` begin a comment at the beginning of a line, not in a value."""
    config = load(f"# x\n;[host]\n  ; y\n{LOCAL}#server = ws://x\nprimary_password = a;b #c\n")
    assert config.default.primary.password == "a;b #c"


def test_byte_order_mark_and_windows_lines(path: Path) -> None:
    """An ini saved by a Windows editor loads."""
    path.write_bytes(b"\xef\xbb\xbf[ext-server]\r\nserver = local\r\nprimary_rfid = A\r\n  B\r\n")
    config = p.load_config(path, {}, p.concern_of)
    assert list(config.default.badges.exact) == ["a", "b"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${PW}", "s3cret"),
        ("<${PW}${PW}>", "<s3crets3cret>"),
        ("$${PW}", "${PW}"),
        ("$${", "${"),
        ("$PW $${PW", "$PW ${PW"),
        ("${WITH}", "${PW}"),
    ],
)
def test_environment_variable_in_a_value(load: Load, written: str, value: str) -> None:
    """${NAME} is the environment variable, once; $${ is a literal ${."""
    config = load(f"{LOCAL}primary_password = {written}\n", PW="s3cret", WITH="${PW}")
    assert config.default.primary.password == value


def test_unknown_action_is_doubted(load: Load) -> None:
    """A misspelt Action would silently not be refused."""
    config = load(f"{TWO_SERVERS}secondary_refuse = Rest, Reset\nsecondary_copies = StatusNotifications\n")
    (copies, refuse) = (warning.split(": ", 1)[1] for warning in config.warnings)
    assert copies == "secondary_copies: unknown Action 'StatusNotifications'"
    assert refuse == "secondary_refuse: unknown Action 'Rest'"


def test_charger_section_that_may_not_connect_is_doubted(load: Load) -> None:
    """A section for a charger that `chargers` keeps out is of no use."""
    config = load(f"[host]\nchargers = HOME-*\npassword = x\n{LOCAL}[charger CP-7]\n[charger HOME-1]\n")
    (warning,) = config.warnings
    assert "[charger CP-7] is not among `chargers`" in warning


def test_environment_variable_is_replaced_before_lists_are_split(load: Load) -> None:
    """A variable may hold a whole list."""
    config = load(f"{LOCAL}primary_rfid = A,\n  ${{BADGES}}\n", BADGES="B, C")
    assert list(config.default.badges.exact) == ["a", "b", "c"]


def test_empty_environment_variable_is_the_default(load: Load) -> None:
    """A variable that is set to nothing leaves the default."""
    assert load(f"{LOCAL}unknown_rfid = ${{UNKNOWN}}\n", UNKNOWN="").default.unknown_rfid == "primary"


def test_charger_section_overrides(load: Load) -> None:
    """A section of a charger's own replaces single keys for that charger alone."""
    config = load(
        TWO_SERVERS
        + "primary_rfid = A\nsecondary_rfid = B\n"
        + "[charger Box  1]\nserver = local\nsecondary_server =\nsecondary_rfid =\nVersions = ocpp1.6\n"
    )
    own, other = config.charger("Box 1"), config.charger("box 1")
    assert other is config.default
    assert (own.primary.url, own.secondary, own.versions) == ("local", None, ("ocpp1.6",))
    assert own.badges.exact == {"a": p.Peer.PRIMARY}
    assert other.badges.exact == {"a": p.Peer.PRIMARY, "b": p.Peer.SECONDARY}


def test_charger_section_may_hold_every_server_key(load: Load) -> None:
    """What [ext-server] says may stand in the charger's section instead."""
    text = f"{TWO_SERVERS}secondary_rfid = A*\nunknown_rfid = reject\nprimary_grace = 1\n"
    own = text.replace("[ext-server]", "[charger X]")
    assert load(LOCAL + own).charger("X") == load(text).default


def test_configuration_is_frozen(load: Load) -> None:
    """Nothing changes the configuration once it is read."""
    config = load(TWO_SERVERS)
    for part in (config, config.host, config.status, config.default, config.default.primary):
        with pytest.raises(AttributeError):
            setattr(part, fields(part)[0].name, None)


# Badge lists.


@pytest.mark.parametrize(
    ("badge", "found"),
    [
        ("04A1FF", p.Peer.SECONDARY),
        ("04a1b2c3", p.Peer.PRIMARY),
        ("04FF", p.Peer.PRIMARY),
        ("04FFX", p.Peer.SECONDARY),
        (" 04A1B2C3\r\n", p.Peer.PRIMARY),
        ("\x00\t04a1B2c3\x1f \x00", p.Peer.PRIMARY),
        ("STRASSE", p.Peer.PRIMARY),
        ("4A1B2C3", None),
        ("", None),
    ],
)
def test_badge_on_the_lists(load: Load, badge: str, found: p.Peer | None) -> None:
    """Exact beats pattern, longer beats shorter; case, blanks and control characters around do not count."""
    config = load(
        f"{TWO_SERVERS}primary_rfid = 04*, 04A1B2C3, Straße\nsecondary_rfid = 04A1*, 04A1B2C?, 04F?[X-Z]\n"
    )
    assert config.default.badges.find(badge) == found


def test_badge_twice_on_one_list_is_no_mistake(load: Load) -> None:
    """Only the other list makes an entry ambiguous."""
    assert load(f"{LOCAL}primary_rfid = A, a\n").default.badges.exact == {"a": p.Peer.PRIMARY}


# What is doubtful.


def test_any_card_charges_is_a_warning(load: Load, path: Path) -> None:
    """Unknown badges for a secondary whose verdict does not count are doubtful."""
    text = f"{TWO_SERVERS}unknown_rfid = secondary\n"
    assert load(text).warnings == (
        f"{path}:4: unknown_rfid = secondary without secondary_replies = forward: any card charges",
    )
    assert load(f"{text}secondary_replies = forward\n").warnings == ()


@pytest.mark.parametrize("badges", ["A", "A*"])
def test_badges_without_their_server_are_a_warning(load: Load, path: Path, badges: str) -> None:
    """Badges of a secondary that is not there are doubtful."""
    assert load(f"{LOCAL}secondary_rfid = {badges}\n[host]\naddr = ::1\n").warnings == (
        f"{path}:3: secondary_rfid without secondary_server: these badges go to the primary",
    )
    assert load(f"{TWO_SERVERS}secondary_rfid = {badges}\n").warnings == ()


def test_doubt_shared_by_chargers_is_told_once(load: Load) -> None:
    """A line of [ext-server] warns once, however many chargers inherit it."""
    text = f"{TWO_SERVERS}unknown_rfid = secondary\n[charger A]\n[charger B]\nprimary_rfid = X\n"
    assert len(load(text).warnings) == 1


# Mistakes.


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", f"1: {NO_SERVER}"),
        ("[logging]\n[ext-server]\n", f"2: {NO_SERVER}"),
        ("[logging]\n[ext-server]\nprimary_rfid = A\n", f"2: {NO_SERVER}"),
        ("[ext-server]\nserver =\n", f"2: {NO_SERVER}"),
        (f"{LOCAL}[charger A]\nserver =\n", f"4: {NO_SERVER}"),
        (f"{LOCAL}[servers]\n", f"3: unknown section '[servers]'; {SECTIONS}"),
        (f"{LOCAL}[Host]\n", f"3: unknown section '[Host]'; {SECTIONS}"),
        (f"{LOCAL}[host\n", f"3: unknown section '[host'; {SECTIONS}"),
        (f"{LOCAL}[host] ; x\n", f"3: unknown section '[host] ; x'; {SECTIONS}"),
        (f"{LOCAL}[charger ]\n", f"3: unknown section '[charger ]'; {SECTIONS}"),
        (
            f"{LOCAL}[charger A/B]\n",
            f"3: '[charger A/B]' names no charger id; {AN_ID}",
        ),
        (
            f"{LOCAL}[charger ..]\n",
            f"3: '[charger ..]' names no charger id; {AN_ID}",
        ),
        (f"{LOCAL}[ext-server]\n", "3: section [ext-server] stands twice, first at line 1"),
        (f"{LOCAL}[charger A]\n[charger  A]\n", "4: section [charger A] stands twice, first at line 3"),
        (f"{LOCAL}port = 1\n", f"3: unknown key 'port' in [ext-server]; expected {SERVER_KEYS}"),
        (f"{LOCAL}[charger A]\nport = 1\n", f"4: unknown key 'port' in [charger A]; expected {CHARGER_KEYS}"),
        (f"{LOCAL}[host]\nwho = x\n", f"4: unknown key 'who' in [host]; expected {HOST_KEYS}"),
        (
            f"{LOCAL}[status]\nstate = x\n",
            "4: unknown key 'state' in [status]; expected addr, port, password",
        ),
        (f"{LOCAL}= x\n", f"3: unknown key '' in [ext-server]; expected {SERVER_KEYS}"),
        (f"{LOCAL}[logging]\n= INFO\n", "4: unknown key '' in [logging]; expected proxy, rfid"),
        (f"{LOCAL}Server = local\n", "3: server stands twice in [ext-server], first at line 2"),
        (
            f"{LOCAL}primary_rfid = A\n  B\n\nprimary_rfid = C\n",
            "6: primary_rfid stands twice in [ext-server], first at line 3",
        ),
        (f"{LOCAL}primary_rfid\n", f"3: 'primary_rfid': {NO_PAIR}"),
        ("server = local\n", "1: a key before the first section; expected [logging], [host], ..."),
        ("\n  x\n", "2: an indented line continues a value, and no value stands above it"),
        ("[host]\n  x\n", "2: an indented line continues a value, and no value stands above it"),
        (f"{LOCAL}primary_rfid = ${{NO}}\n", "3: environment variable 'NO' is not set"),
        (f"{LOCAL}primary_rfid = A\n  ${{}}\n", "3: environment variable '' is not set"),
        (f"{LOCAL}[logging]\nproxy = LOUD\n", f"4: proxy 'LOUD': {A_LEVEL}"),
        (f"{LOCAL}[logging]\nwebsockets = 10\n", f"4: websockets '10': {A_LEVEL}"),
        (f"{LOCAL}[logging]\nrfid = no\n", "4: rfid 'no': expected masked or full"),
        (f"{LOCAL}[host]\nport = 65536\n", "4: port '65536': expected a whole number from 0 to 65535"),
        (f"{LOCAL}[host]\nport = -1\n", "4: port '-1': expected a whole number from 0 to 65535"),
        (f"{LOCAL}[host]\nport = \u0661\n", "4: port '\\u0661': expected a whole number from 0 to 65535"),
        (
            f"{LOCAL}[host]\nmax_size = 1 MB\n",
            "4: max_size '1 MB': expected a whole number from 1024 to 67108864",
        ),
        (
            f"{LOCAL}[host]\nwatchdog_stale = 0\n",
            "4: watchdog_stale '0': expected seconds from 1 to 604800",
        ),
        (
            f"{LOCAL}[host]\nping_timeout = 5 m\n",
            "4: ping_timeout '5 m': expected seconds from 0.1 to 86400",
        ),
        (
            f"{LOCAL}[host]\nping_interval = nan\n",
            "4: ping_interval 'nan': expected seconds from 0.1 to 86400",
        ),
        (
            f"{LOCAL}[host]\ncert_chain = no.pem\n",
            "4: cert_chain: '{folder}/no.pem' cannot be read; expected a file",
        ),
        (f"{LOCAL}primary_ca = /no/ca\n", "3: primary_ca: '/no/ca' cannot be read; expected a file"),
        (f"{LOCAL}primary_ca = .\n", "3: primary_ca: '{folder}' cannot be read; expected a file"),
        (f"{LOCAL}[host]\ncert_key = test.ini\n", "4: cert_key needs cert_chain"),
        (f"{LOCAL}[host]\nclient_ca = test.ini\n", "4: client_ca needs cert_chain and cert_key"),
        (
            f"{LOCAL}secondary_key = test.ini\nsecondary_server = ws://h\n",
            "3: secondary_key needs secondary_cert",
        ),
        ("[ext-server]\nserver = http://h/\n", f"2: server 'http://h/': {AN_ADDRESS}"),
        ("[ext-server]\nserver = localhost:9999\n", f"2: server 'localhost:9999': {AN_ADDRESS}"),
        ("[ext-server]\nserver = ws:///path\n", f"2: server 'ws:///path': {AN_ADDRESS}"),
        ("[ext-server]\nserver = ws://h:99999\n", f"2: server 'ws://h:99999': {AN_ADDRESS}"),
        ("[ext-server]\nserver = ws://[::1/\n", f"2: server 'ws://[::1/': {AN_ADDRESS}"),
        ("[ext-server]\nserver = ws://h/#x\n", f"2: server 'ws://h/#x': {AN_ADDRESS}"),
        (
            "[ext-server]\nserver = ws://h/ ; home\n",
            "2: server: a comment behind a value; expected it on a line of its own",
        ),
        (f"{LOCAL}primary_rfid = 04A1 # home\n", f"3: primary_rfid: {NO_COMMENT}"),
        (
            f"{LOCAL}primary_user = ${{USER\n",
            "3: ${ without }; expected ${NAME}, or $${ for the two characters",
        ),
        ("[ext-server]\nserver = ws://localhost:8321/x\n", f"2: server {OWN_ADDRESS}"),
        (
            "[host]\naddr = 10.0.0.7\n[ext-server]\nserver = local\nsecondary_server = ws://10.0.0.7:8321\n",
            f"5: secondary_server {OWN_ADDRESS}",
        ),
        (
            f"{LOCAL}secondary_rifd = A\n",
            "3: unknown key 'secondary_rifd' in [ext-server]; did you mean secondary_rfid?",
        ),
        ("[ext-server]\nserver = ws://h/\n  x\n", f"2: server 'ws://h/\\nx': {AN_ADDRESS}"),
        (
            "[ext-server]\nserver = ws://h/?id=\n",
            f"2: server: {NO_QUERY}",
        ),
        (f"{LOCAL}secondary_server = ws://u:pw@h/\n", f"3: secondary_server: {NO_CREDENTIALS}"),
        (f"{LOCAL}primary_id = a/b\n", f"3: primary_id 'a/b': {AN_ID}"),
        (f"{LOCAL}secondary_id = {49 * 'a'}\n", f"3: secondary_id '{49 * 'a'}': {AN_ID}"),
        (f"{LOCAL}primary_auth = basic\n", "3: primary_auth 'basic': expected forward or none"),
        (
            f"{LOCAL}unknown_rfid = both\n",
            "3: unknown_rfid 'both': expected primary or secondary or reject",
        ),
        (f"{LOCAL}secondary_replies = yes\n", "3: secondary_replies 'yes': expected ignore or forward"),
        (
            f"{LOCAL}versions = ocpp1.6, ocpp1.5\n",
            "3: versions 'ocpp1.6, ocpp1.5': expected some of ocpp2.1, ocpp2.0.1, ocpp1.6",
        ),
        (f"{LOCAL}versions = ,\n", "3: versions ',': expected some of ocpp2.1, ocpp2.0.1, ocpp1.6"),
        (f"{LOCAL}secondary_copies = Authorize\n", f"3: secondary_copies: 'Authorize' {NO_COPY}"),
        (
            f"{LOCAL}[charger A]\nsecondary_copies = Heartbeat, MeterValues\n",
            f"4: secondary_copies: 'MeterValues' {NO_COPY}",
        ),
        (
            f"{LOCAL}secondary_rfid = 04A1\nprimary_rfid = x, 04a1\n",
            "3: badge '****' is on primary_rfid and on secondary_rfid",
        ),
        (
            f"{LOCAL}primary_rfid = A*\n[charger A]\nsecondary_rfid = B, a*\n",
            "5: badge '****' is on primary_rfid and on secondary_rfid",
        ),
        (
            f"{LOCAL}[status]\nport = 8322\naddr = 0.0.0.0\n",
            "5: addr '0.0.0.0' is not loopback: [status] needs a password",
        ),
        (
            f"{LOCAL}[status]\naddr = example.org\n",
            "4: addr 'example.org' is not loopback: [status] needs a password",
        ),
    ],
)
def test_mistake_is_one_line(load: Load, path: Path, text: str, where: str) -> None:
    """Every mistake names the file, the line, what is wrong and what is expected, in one line."""
    assert mistake(load, text) == f"{path}:{where.replace('{folder}', str(path.parent))}"


@pytest.mark.parametrize("addr", ["127.0.0.1", "127.9.9.9", "::1", "LocalHost"])
def test_status_on_loopback_needs_no_password(load: Load, addr: str) -> None:
    """Only this machine can see the status page at a loopback address."""
    assert load(f"{LOCAL}[status]\naddr = {addr}\n").status.addr == addr


@pytest.mark.parametrize("more", ["port = 0", "password = x"])
def test_status_elsewhere_is_off_or_has_a_password(load: Load, more: str) -> None:
    """A status page that others can reach has a password, or is off."""
    assert load(f"{LOCAL}[status]\naddr = 0.0.0.0\n{more}\n").status.addr == "0.0.0.0"


@pytest.mark.parametrize(
    "line",
    [
        "primary_password hunter2",
        "primary_password hunter2=",
        "primary_password:hunter2",
        "primary_pasword = hunter2",
        "primary_password = x\nprimary_password = hunter2",
        "primary_password = hunter2 ${NO}",
        "server = ws://user:hunter2@h/",
        "server = http://user:hunter2@h/",
        "server = ws://user:hunter2@h:x/",
    ],
)
def test_password_is_never_shown(load: Load, line: str) -> None:
    """No mistake brings a password onto the screen or into a log."""
    assert "hunter2" not in mistake(load, f"[ext-server]\n{line}\n")


def test_continued_password_is_never_shown(load: Load) -> None:
    """A password on a line of its own that continues nothing stays hidden, too."""
    assert "hunter2" not in mistake(load, "[ext-server]\n  hunter2\n")


# Files.


def test_paths_are_relative_to_the_ini(load: Load, path: Path) -> None:
    """A relative path counts from the folder of the ini, an absolute one stands."""
    (path.parent / "certs").mkdir()
    chain = path.parent / "certs" / "chain.pem"
    chain.touch()
    config = load(
        f"{LOCAL}primary_ca = certs/chain.pem\n[host]\ncert_chain = certs/chain.pem\ncert_key = {chain}\n"
    )
    assert config.default.primary.ca == config.host.cert_chain == config.host.cert_key == str(chain)


def test_missing_ini(path: Path) -> None:
    """An ini that is not there is a mistake."""
    with pytest.raises(p.ConfigError) as caught:
        p.load_config(path, {}, p.concern_of)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_ini_in_another_encoding(path: Path) -> None:
    """An ini that is not UTF-8 is a mistake."""
    path.write_bytes("[ext-server]\nserver = ws://h/\xe4\n".encode("latin-1"))
    with pytest.raises(p.ConfigError) as caught:
        p.load_config(path, {}, p.concern_of)
    assert str(caught.value) == f"{path}: is not UTF-8 text"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("A", True),
        ("Box 1", True),
        ("az09*-_=:+|@. ", True),
        (48 * "x", True),
        (49 * "x", False),
        ("", False),
        (".", False),
        ("..", False),
        ("...", True),
        ("a/b", False),
        ("a\n", False),
        ("\xe4", False),
        ("\u0661", False),
    ],
)
def test_charger_id(text: str, valid: bool) -> None:
    """A charger id is 1 to 48 of some ASCII characters, and no folder's name."""
    assert p.is_charger_id(text) is valid
