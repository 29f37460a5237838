"""The ini: what each key means, its default, what is doubtful, and the one line that a mistake gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import ocpp_2w_proxy as p

Load = Callable[..., p.Config]

EXT = "[ext-server]\nserver = "
LOCAL = f"{EXT}local\n"
TWO_SERVERS = "[ext-server]\nserver = ws://one\nsecondary_server = ws://two\n"
HOST = f"{TWO_SERVERS}[host]\n"
ORIGINAL = """\
[logging]
proxy = DEBUG
websockets.client = INFO

[host]
; Host to listen on (default: 0.0.0.0)
addr = 0.0.0.0
watchdog_interval = 100

[ext-server]
server = ws://localhost:9999/
;server = wss://abb.cdlink.chargedot.com:9043/
; (Optional) Secondary CSMS external server
secondary_server = ws://localhost:9998/
primary_rfid = 04A1B2C3
secondary_rfid = 04D5E6F7, 04D5E6F8
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ini of a test stands."""
    return tmp_path / "test.ini"


@pytest.fixture
def load(path: Path) -> Load:
    """Write an ini and read it."""

    def load_text(text: str, **environment: str) -> p.Config:
        path.write_bytes(text.encode())
        return p.load_config(path, environment, p.concern_of)

    return load_text


def mistake(load: Load, text: str) -> str:
    """Return the line that the mistake in the ini gives."""
    with pytest.raises(p.ConfigError) as caught:
        load(text)
    return str(caught.value)


# What the keys mean.


KEYS = """
logging: proxy INFO DEBUG, rfid masked full
host: addr 0.0.0.0 127.0.0.1, port 8321 8320, cert_chain - test.ini, password - x, chargers * CP-*
host: watchdog_stale 500 501, watchdog_interval 10 11, ping_interval 30 31, ping_timeout 60 61
host: call_timeout 30 31, max_size 1048576 1048577, state ocpp-2w-proxy.db none
ext-server: primary_rfid - A*, primary_id - A, primary_user - u, primary_password - p, primary_ca - test.ini
ext-server: secondary_rfid - A*, secondary_id - A, secondary_user - u, secondary_password - p
ext-server: secondary_ca - test.ini, secondary_cert - test.ini, primary_cert - test.ini
ext-server: primary_auth forward none, primary_copies - MeterValues, primary_grace 15 14
ext-server: secondary_auth none forward, secondary_replies ignore forward, secondary_refuse - Reset
ext-server: secondary_copies StatusNotification Heartbeat, unknown_rfid primary reject
ext-server: versions ocpp2.1,ocpp2.0.1,ocpp1.6 ocpp1.6
status: addr 127.0.0.1 ::1, port 8322 0, password - x
"""


@pytest.mark.parametrize("line", KEYS.strip().splitlines())
def test_a_key_has_its_default(load: Load, line: str) -> None:
    """A key that is left out, or empty, means its default; another value means something else."""
    section, _, keys = line.partition(": ")
    without, place = load(TWO_SERVERS), TWO_SERVERS + (f"[{section}]\n" if section != "ext-server" else "")
    for key, default, other in (words.split() for words in keys.split(", ")):
        default = default.removeprefix("-")
        assert load(f"{place}{key} = {default}\n") == load(f"{place}{key} =\n") == without
        assert load(f"{place}{key} = {other}\n") != without


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (f"{HOST}watchdog_stale = 500.0\n", TWO_SERVERS),
        (f"{HOST}chargers = Box 1, Box 2\n  EV*\n", f"{HOST}chargers = Box 1\n  Box 2, EV*\n"),
        *((TWO_SERVERS.replace("one", "one//"), TWO_SERVERS), (LOCAL.replace("local", "Local"), LOCAL)),
        (f"{TWO_SERVERS}unknown_rfid = REJECT\n", f"{TWO_SERVERS}unknown_rfid = reject\n"),
        (f"{TWO_SERVERS}Versions = OCPP1.6 ocpp2.1\n", f"{TWO_SERVERS}versions = ocpp1.6, ocpp2.1\n"),
        (f"{TWO_SERVERS}secondary_refuse = A\n  B,\n\tC\n", f"{TWO_SERVERS}secondary_refuse = A, B, C\n"),
        (
            f"# x\n;[host]\n  ; y\n{TWO_SERVERS}#port = x\nprimary_rfid =\n  A,\n; z\n\n\tB\n # z\n  C D\n",
            f"{TWO_SERVERS}primary_rfid = A, B, C, D\n",
        ),
        (f"\ufeff{TWO_SERVERS}primary_id = A\n".replace("\n", "\r\n"), f"{TWO_SERVERS}primary_id = A\n"),
        (f"{TWO_SERVERS}primary_rfid = A,\n  ${{MORE}}\n", f"{TWO_SERVERS}primary_rfid = A, B, C\n"),
        (f"{TWO_SERVERS}unknown_rfid = ${{EMPTY}}\n", TWO_SERVERS),
        (f"{TWO_SERVERS}primary_rfid = a 04:A1-B2\n", f"{TWO_SERVERS}primary_rfid = A, 04a1b2\n"),
        (f"{TWO_SERVERS}[logging]\nMyLog = debug\n", f"[logging]\nMyLog = DEBUG\n{TWO_SERVERS}"),
    ],
)
def test_two_spellings_mean_the_same(load: Load, written: str, meant: str) -> None:
    """Units, case, slashes, lists, comments, lines of Windows, and what stands in the environment."""
    assert load(written, MORE="B, C", EMPTY="") == load(meant)


def test_original_ini_loads_unchanged(load: Load) -> None:
    """An ini of the original proxy means what it meant."""
    config = load(ORIGINAL)
    meant = TWO_SERVERS.replace("one", "localhost:9999").replace("two", "localhost:9998")
    meant += "primary_rfid = 04a1b2c3\nsecondary_rfid = 04d5e6f7 04d5e6f8\n[host]\nwatchdog_interval = 100\n"
    meant += "[logging]\nproxy = DEBUG\nwebsockets.client = INFO\n"
    assert config == load(meant)
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("p;w#=[x] ;y", "p;w#=[x] ;y"), ("<${PW}${PW}>", "<s3crets3cret>")),
        *(("$PW $$", "$PW $$"), ("${WITH}", "${PW}")),
    ],
)
def test_a_password_may_hold_anything(load: Load, written: str, value: str) -> None:
    """Also what begins a comment elsewhere; ${NAME} is the environment's, once, and may hold a literal ${."""
    config = load(f"{TWO_SERVERS}primary_password = {written}\n", PW="s3cret", WITH="${PW}")
    assert config.default.servers["primary"].password == value


def test_paths_are_relative_to_the_ini(load: Load, path: Path) -> None:
    """An absolute path stands."""
    (path.parent / "certs").mkdir()
    (path.parent / "certs" / "ca.pem").touch()
    relative = load(f"{TWO_SERVERS}primary_ca = certs/ca.pem\n")
    assert relative == load(f"{TWO_SERVERS}primary_ca = {path.parent}/certs/ca.pem\n") != load(TWO_SERVERS)


def test_a_charger_section_overrides_single_keys_for_that_charger_alone(load: Load) -> None:
    """Any key of [ext-server] may stand there; ids are told apart by case."""
    badges = "primary_rfid = A\nsecondary_rfid = B\n"
    own = "server = ws://own\nsecondary_server =\nsecondary_rfid =\nVersions = ocpp1.6\n"
    config = load(f"{TWO_SERVERS}{badges}[charger Box  1]\n{own}")
    assert config.charger("box 1") == load(TWO_SERVERS + badges).default
    alone = load("[ext-server]\nserver = ws://own\nversions = ocpp1.6\nprimary_rfid = A\n")
    assert config.charger("Box 1") == alone.default
    other = load(LOCAL + TWO_SERVERS.replace("ext-server", "charger X"))
    assert other.charger("X") == load(TWO_SERVERS).default


@pytest.mark.parametrize(
    ("badge", "found"),
    [
        *(("04A1FF", "secondary"), ("04a1b2c3", "primary"), ("04:A1-B2:C3", "primary"), ("04FF", "primary")),
        *(("04FFX", "secondary"), (" 04A1B2C3\r\n", "primary"), ("\x00\t04a1B2c3\x1f \x00", "primary")),
        *(("STRASSE", "primary"), ("4A1B2C3", None), ("", None)),
    ],
)
def test_badge_on_the_lists(load: Load, badge: str, found: str | None) -> None:
    """Exact beats pattern, longer beats shorter; case, `:`, `-` and what surrounds it do not count."""
    lists = "primary_rfid = 04*, 04A1B2C3, Straße\nsecondary_rfid = 04A1*, 04A1B2C?, 04F?[X-Z]\n"
    config = load(TWO_SERVERS + lists).default
    assert config.badges.get(config.entry(badge)) == found


# What is doubtful.

OPEN = "server lets nobody check who connects"


@pytest.mark.parametrize(
    ("text", "doubts"),
    [
        ("[ext-server]\nserver = ws://h\nsecondary_rfid = A*\n", ["3: secondary_rfid stands without"]),
        (
            f"{TWO_SERVERS}secondary_refuse = Rest, Reset\n",
            ["4: secondary_refuse names an unknown Action: 'Rest'"],
        ),
        (f"{LOCAL}[charger A]\n[charger B]\n", [f"2: {OPEN}"]),
        (f"{TWO_SERVERS}primary_password = x\n", [f"2: {OPEN}"]),
        (f"{TWO_SERVERS}[charger A]\nserver = local\n", [f"5: {OPEN}"]),
        (f"{LOCAL}[host]\npassword = x\n[charger A]\nserver = ws://home\nprimary_user = x\n", []),
        (f"{LOCAL}[host]\naddr = 127.0.0.1\n", []),
        (f"{LOCAL}[host]\ncert_chain = test.ini\nclient_ca = test.ini\n", []),
        (f"{TWO_SERVERS}[status]\naddr = 0.0.0.0\nport = 0\n", []),
        *((f"{TWO_SERVERS}[status]\naddr = {addr}\n", []) for addr in ("0.0.0.0\npassword = x", "LocalHost")),
    ],
)
def test_what_is_doubtful_is_a_warning(load: Load, path: Path, text: str, doubts: list[str]) -> None:
    """It names the line, once, however many chargers inherit it; what is well is no warning."""
    warnings = load(text).warnings
    for warning, doubt in zip(warnings, doubts, strict=True):
        assert warning.startswith(f"{path}:{doubt}")
    assert [p.REDACTOR.clean(warning) for warning in warnings] == list(warnings), "the log says it in full"


# Mistakes.


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "server is missing"),
        (f"{LOCAL}[charger A]\nserver =\n", 4, "server is missing"),
        ("[ext-server]\nserver = ws://localhost:8321/x\n", 2, "server is the proxy's own address; expected"),
        (f"[host]\naddr = 10.0.0.7\n{LOCAL}secondary_server = ws://10.0.0.7:8321\n", 5, "own address"),
        (f"{LOCAL}[Host]\n", 3, "unknown section '[Host]'; expected [logging], [host], [ext-server], "),
        (f"{LOCAL}[charger A/B]\n", 3, "'[charger A/B]'; expected [logging], [host], "),
        (f"{LOCAL}port = 1\n", 3, "unknown key 'port' in [ext-server]; expected "),
        (f"{LOCAL}secondary_rifd = A\n", 3, "'secondary_rifd' in [ext-server]; did you mean secondary_rfid?"),
        (f"{LOCAL}primary_rfid = A\n  B\n\nprimary_rfid = C\n", 6, "twice in [ext-server], first at line 3"),
        (f"{LOCAL}primary_rfid\n", 3, "'primary_rfid': expected a [section], and in it `key = "),
        ("server = local\n", 1, "'server': expected a [section], and in it `key = value`"),
        ("[host]\n  x\n", 2, "an indented line continues a value, and no value stands above it"),
        (f"{LOCAL}primary_rfid = ${{NO}}\n", 3, "environment variable 'NO' is not set"),
        (f"{LOCAL}primary_user = ${{USER\n", 3, "environment variable '' is not set; expected ${NAME}"),
        (f"{LOCAL}[logging]\nwebsockets = 10\n", 4, "websockets '10': expected DEBUG or INFO or WARNING"),
        (f"{LOCAL}[logging]\nrfid = no\n", 4, "rfid 'no': expected masked or full"),
        (f"{LOCAL}[host]\nport = \u2460\n", 4, "port '\\u2460': expected a whole number"),
        (f"{LOCAL}[host]\nwatchdog_stale = 0\n", 4, "watchdog_stale '0': expected seconds from 1 to 604800"),
        (f"{LOCAL}[host]\nping_timeout = 5 m\n", 4, "ping_timeout '5 m': expected seconds from 0.1 to 86400"),
        (f"{LOCAL}[host]\ncert_chain = no.pem\n", 4, "cert_chain '{folder}/no.pem': it cannot be read; "),
        (f"{LOCAL}primary_ca = .\n", 3, "primary_ca '{folder}': it cannot be read; expected a"),
        (f"{LOCAL}[host]\nclient_ca = test.ini\n", 4, "client_ca needs cert_chain"),
        (f"{EXT}http://h/\n", 2, "server 'http://h/': expected ws://HOST[:PORT]/PATH, wss://"),
        ("[ext-server]\nserver = ws://h:99999\n", 2, "server 'ws://h:99999': expected ws://"),
        ("[ext-server]\nserver = ws://[::1/\n", 2, "server 'ws://[::1/': expected ws://"),
        ("[ext-server]\nserver = ws://h/\n  x\n", 2, "server 'ws://h/\\nx': expected ws://"),
        ("[ext-server]\nserver = ws://h/?id=\n", 2, "server is unfit: expected ws://"),
        ("[ext-server]\nserver = ws://u:pw@h/\n", 2, "without a login: that goes into *_user"),
        (f"{EXT}ws://h/ ; home\n", 2, "a comment behind a value; expected it on a line of its own"),
        (f"{LOCAL}unknown_rfid = both\n", 3, "unknown_rfid 'both': expected primary"),
        (f"{LOCAL}versions = ocpp1.6, ocpp1.5\n", 3, "ocpp2.1 or ocpp2.0.1"),
        (f"{LOCAL}primary_copies = Heartbeat\n", 3, "primary_copies 'Heartbeat': expected "),
        (f"{LOCAL}secondary_copies = Heartbeat, MeterValues\n", 3, "'MeterValues' cannot be copied"),
        (f"{LOCAL}secondary_copies = Status\n", 3, "'Status' cannot be copied"),
        (f"{LOCAL}primary_rfid = A*\n[charger A]\nsecondary_rfid = B, a*\n", 5, "primary_rfid"),
        (f"{LOCAL}[status]\nport = 8322\naddr = 0.0.0.0\n", 5, "is not loopback: [status] needs a password"),
    ],
)
def test_mistake_is_one_line(load: Load, path: Path, text: str, line: int, words: str) -> None:
    """It names the file, the line, what is wrong and what is expected."""
    told = mistake(load, text)
    assert told.startswith(f"{path}:{line}: ")
    assert words.replace("{folder}", str(path.parent)) in told
    assert told.isprintable()


def test_a_badge_on_both_lists_is_named_with_both_lines(load: Load) -> None:
    """In whatever spelling: it is the number to look for. Twice on one list it is one badge."""
    told = mistake(load, f"{LOCAL}secondary_rfid = 04A1B2C3\nprimary_rfid = x,\n  04:a1:b2:c3\n")
    assert re.search(r"04:?a1:?b2:?c3", told, re.IGNORECASE)
    assert {"3", "5", "primary_rfid", "secondary_rfid"} <= set(re.findall(r"\w+", told))
    twice = load(f"{TWO_SERVERS}primary_rfid = 04A1, 04:a1\n")
    assert twice.default == load(f"{TWO_SERVERS}primary_rfid = 04A1\n").default


@pytest.mark.parametrize(
    "line",
    [
        *("primary_password hunter2", "primary_password:hunter2", "primary_pasword = hunter2", "  hunter2"),
        *("primary_password = x\nprimary_password = hunter2", "primary_password = hunter2 ${NO}"),
        *(
            "primary_password = ${hunter2",
            "server = ws://user:hunter2@h:x/",
            "server = http://user:hunter2@h/",
        ),
        *("server = ws://h?token=hunter2", "server = ws://u:${PW}@host"),
    ],
)
def test_a_mistake_tells_no_password(load: Load, line: str) -> None:
    """The line number is enough to find it."""
    with pytest.raises(p.ConfigError) as caught:
        load(f"[ext-server]\n{line}\n", PW="hunter2")
    assert "hunter2" not in str(caught.value)


def test_an_ini_in_another_encoding_is_a_mistake(path: Path) -> None:
    """It is UTF-8."""
    path.write_bytes(b"[ext-server]\nserver = ws://h/\xe4\n")
    with pytest.raises(p.ConfigError, match="it is not UTF-8 text"):
        p.load_config(path, {}, p.concern_of)
