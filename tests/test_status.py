"""The second port: what the page is told, the ledger, the report, health, metrics, and who may look."""

from __future__ import annotations

import asyncio
import csv
import http.client
import io
import itertools
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, FakeCharger, accepting, charger, eventually, free_port, house
from tests.play.planted import PASSWORDS, SECONDARY_PASSWORD, told
from tests.play.wires import LOCAL, Log, Patch, command, line_with, login

PASSWORD = "let-me-look"
LOGIN = {"Authorization": login("me", PASSWORD)}
TEN = p.utc_of("2026-05-04T10:00:00Z") or 0.0
NUMBERS = itertools.count(1)
Watched = tuple[p.Status, p.Proxy, Any, Any]  # With its servers.


@asynccontextmanager
async def watched(more: str = "", status: str = "", host: str = "") -> AsyncIterator[Watched]:
    """A proxy between two servers, with its second port."""
    ini = f"{more}\n[status]\nport = {free_port()}\n{status}"
    async with house(ini, host) as (proxy, primary, secondary):
        port = p.Status(proxy, p.REDACTOR.clean)
        await port.start()
        assert port.server is not None
        try:
            yield port, proxy, primary, secondary
        finally:
            p.log.removeHandler(port)
            port.server.close()
            await port.server.wait_closed()


class Reply(NamedTuple):
    """What an HTTP request was answered with."""

    status: int
    text: str
    headers: http.client.HTTPMessage


async def get(status: p.Status, path: str, method: str = "GET", **headers: str) -> Reply:
    """Ask the second port for something."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", status.config.port)
        lines = [f"{name}: {value}\r\n" for name, value in ({"Host": "127.0.0.1"} | headers).items()]
        writer.write(f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    first, _, rest = head.partition(b"\r\n")
    fields = http.client.parse_headers(io.BytesIO(rest + b"\r\n\r\n"))
    return Reply(int(first.split()[1]), body.decode(), fields)


async def shown(status: p.Status, query: str = "", **headers: str) -> dict[str, Any]:
    """Return what the page is told."""
    reply = await get(status, f"/status.json{query}", **headers)
    assert reply.status == 200, reply.text
    news: dict[str, Any] = json.loads(reply.text)
    return news


async def sees(status: p.Status, is_wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Ask until something is to be seen; return what the page is told then."""
    async with asyncio.timeout(PATIENCE):
        while not is_wanted(news := await shown(status)):
            pass
    return news


async def ledger(status: p.Status, query: str = "") -> list[dict[str, str]]:
    """Return the ledger."""
    reply = await get(status, f"/sessions.csv{query}")
    assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(reply.text)))


async def samples(status: p.Status) -> dict[tuple[str, ...], float]:
    """Return the samples as Prometheus reads them: name and label values to the value."""
    reply = await get(status, "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        assert family.documentation
        assert (f"{family.name}_total" in reply.text) == (family.type == "counter")
        for sample in family.samples:
            found[sample.name.removeprefix("ocpp_proxy_"), *sample.labels.values()] = sample.value
    return found


def booked(proxy: p.Proxy, charger_id: str = "CP1", **told: Any) -> p.Session:
    """Book a session of the secondary, 4.2 kWh from 10 to 12, delivered; but for what is told otherwise."""
    values: p.Record = {"owner": "secondary", "badge": "SECO1234", "connector": 1}
    values |= {"begun": TEN, "touched": TEN, "server": "ws://x", "ended": TEN + 7200}
    values |= {"delivered": TEN + 7200, "stop": "stop"}
    values |= {"meter_start": 1000.0, "meter_stop": 5200.0, "server_id": 7, "reason": "Local"}
    values |= {"started_at": "2026-05-04T10:00:00Z", "stopped_at": "2026-05-04T12:00:00Z"}
    session, memory = p.Session(charger=charger_id, **(values | told)), proxy.journal.memory(charger_id)
    memory.seen = time.time()
    memory.add(session, next(NUMBERS))
    memory.note(session)
    return session


def blocking(number: int) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Answer as a server that blocks every badge, and takes what follows all the same."""

    def answers(action: str, payload: dict[str, Any]) -> dict[str, Any]:
        verdict = {"transactionId": number, "idTagInfo": {"status": "Blocked"}}
        return verdict if action == "StartTransaction" else accepting(action, payload)

    return answers


async def reads(cp: FakeCharger, number: int, wh: int, when: str = "2026-01-01T00:00:00Z") -> None:
    """Let a charger read its meter."""
    values = [{"timestamp": when, "sampledValue": [{"value": str(wh)}]}]
    await cp.calls(f"{when} {wh}", "MeterValues", connectorId=1, transactionId=number, meterValue=values)


def in_zone(monkeypatch: Patch, name: str) -> None:
    """Let this machine be in a time zone."""
    monkeypatch.setenv("TZ", name)
    time.tzset()


# What the page is told.


async def test_an_open_session_has_one_number_everywhere() -> None:
    """Card, sessions, sums, CSV and report tell the live reading, also the one that is not on disk."""
    async with watched() as (status, *_), charger(status.proxy) as cp:
        await cp.boots()
        number = await cp.starts("PRIM1234", meter=1000, when=p.Instant(0.0, time.time()).text)
        await reads(cp, number, 1500)
        await shown(status)
        await reads(cp, number, 3345)
        news = await sees(status, lambda news: news["energy"]["months"][0]["primary"] == 2345)
        (card,) = news["chargers"][0]["sessions"]
        assert (card["badge"], card["owner"], card["wh"]) == ("****1234", "primary", 2345)
        assert [(row["wh"], row["ended"]) for row in news["sessions"]] == [(2345, None)]
        assert news["energy"]["days"][-1]["primary"] == 2345
        (row,) = await ledger(status)
        assert (row["wh"], row["badge"], row["transaction_id"]) == ("2345", "PRIM1234", str(number))
        assert "<td>1.000<td>3.345<td>2.345" in (await get(status, "/report")).text
        await cp.stops("PRIM1234", number, 3600)
        news = await sees(status, lambda news: news["sessions"][0]["state"] == "delivered")
        assert (news["sessions"][0]["wh"], news["chargers"][0]["sessions"]) == (2600, [])
        await sees(status, lambda news: news["energy"]["months"][0]["primary"] == 2600)


async def test_power_goes_by_the_chargers_clock(monkeypatch: Patch) -> None:
    """Two readings that came late, one behind the other, tell of the time that they were taken at."""
    monkeypatch.setattr(p, "POWER_SECONDS", 0.0)
    async with watched() as (status, *_), charger(status.proxy) as cp:
        number = await cp.starts("PRIM1")
        for wh, minute, kw in ((1000, 0, 0.0), (2100, 6, 11.0), (2100, 7, 0.0)):
            await reads(cp, number, wh, f"2026-05-04T10:0{minute}:00Z")
            assert (await shown(status))["chargers"][0]["sessions"][0]["kw"] == pytest.approx(kw, abs=0.001)


async def test_what_keeps_somebody_out_is_a_trouble_with_what_to_do() -> None:
    """A login that the secondary refuses; a charger that is gone. A primary is fine without a second boot."""
    async with watched() as (status, proxy, _, secondary):
        secondary.refusal = (401, {})
        async with charger(proxy):
            news = await sees(status, lambda news: news["trouble"])
            assert news["trouble"][0]["what"] == "secondary is down for 1 charger: HTTP 401 Unauthorized."
            assert news["trouble"][0]["todo"].startswith("Check secondary_user and secondary_password")
            assert news["chargers"][0]["servers"][0]["state"] == "connected"
        news = await sees(status, lambda news: news["offline"])
        assert news["trouble"][-1]["what"] == "Not connected, of the chargers seen lately: 1."


async def test_what_waits_for_its_server_is_a_trouble(monkeypatch: Patch) -> None:
    """Since when, how many messages, after a minute with what is done about it; an alarm can watch it."""
    async with watched() as (status, _, _, secondary), charger(status.proxy) as cp:
        await secondary.stop()
        await cp.stops("SECO1", await cp.starts("SECO1"))
        news = await sees(status, lambda news: news["trouble"])
        assert news["waiting"] == news["chargers"][0]["waiting"] == 2
        assert re.fullmatch(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", news["sessions"][0]["words"])
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        assert "Messages wait: 2, the oldest for 60 min." in str((await shown(status))["trouble"])
        found = await samples(status)
        assert (found["stored_calls", "secondary"], found["servers", "secondary", "down"]) == (2, 1)
        assert found["oldest_stored_call_age_seconds",] == pytest.approx(3600, abs=60)
        assert found["failed_dials_total", "secondary"] >= 1


@pytest.mark.parametrize(
    ("number", "state", "words"),
    [
        (0, "refused", "status Blocked; its server does not have the stop"),
        (5, "delivered", "its start was answered with status Blocked; its server has the stop"),
    ],
)
async def test_a_blocked_session_says_who_has_its_stop(number: int, state: str, words: str) -> None:
    """A start that is refused and a stop that is taken are two facts; refused, it is a trouble to take up."""
    async with watched("secondary_name = Employer AG") as (status, _, _, secondary):
        secondary.answers = blocking(number)
        async with charger(status.proxy) as cp:
            await cp.boots()
            await cp.stops("SECO1234", await cp.starts("SECO1234"), 8400)
            news = await sees(status, lambda news: news["sessions"][0]["state"] == state)
            (row,) = await ledger(status)
            assert (row["words"], bool(row["delivered"])) == (words, number > 0)
            refusal = "Employer AG refuses the session of badge ****1234 at CP1 of 8.40 kWh: status Blocked"
            trouble = str(news["trouble"])
            assert (refusal in trouble) == ("Ask who runs" in trouble) == (number == 0)


async def test_one_finds_a_charger_and_asks_for_more_sessions() -> None:
    """`find` is a part of an id; at most 200 sessions and 100 chargers, trouble first, then those in use."""
    async with watched() as (status, proxy, *_):
        for number in range(230):
            booked(proxy, f"HOME-{number % 110}")
        booked(proxy, "Z-IN-USE", ended=None)
        booked(proxy, "Z-OWES").owner = None
        call = p.Call("[]", since=time.time(), kind="stored", action="", message_id="x", content=p.NOTHING)
        proxy.journal.memories["Z-OWES"].calls[call] = None
        news = await shown(status)
        cards = [card["id"] for card in news["chargers"]]
        assert (len(cards), cards[:3], len(news["sessions"])) == (100, ["Z-OWES", "Z-IN-USE", "HOME-0"], 10)
        for wanted, count in (("50", 50), ("1000", 200), ("-1", 10), ("%D9%A3", 10), ("", 10)):
            assert len((await shown(status, f"?sessions={wanted}"))["sessions"]) == count
        for find, count in (("-10", 11), ("IN-u", 1), ("x", 0)):
            assert len((await shown(status, f"?find={find}"))["chargers"]) == count


async def test_a_fleet_is_looked_at_in_pieces() -> None:
    """Whatever else there is to do gets its turn meanwhile, with 10,000 chargers, too."""
    looked, turns = 0, [0]

    class Relays(dict[str, p.Relay]):
        def get(self, *key: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().get(*key)

    async def takes_its_turns() -> None:
        while looked < 10_000:
            turns.append(looked)
            await asyncio.sleep(0)

    async with watched() as (status, proxy, *_):
        proxy.journal.memories |= {f"C{n}": p.Memory(f"C{n}", has_charged=True) for n in range(10_000)}
        proxy.relays = Relays()
        others = asyncio.create_task(takes_its_turns())
        assert (await shown(status))["offline"] == 0  # They were not seen for a week.
        await others
        assert max(after - before for before, after in itertools.pairwise(turns)) < 500


# The ledger.


async def test_the_ledger_tells_all_of_a_session() -> None:
    """What it takes to prove a bill; what a spreadsheet would take for a formula is text in it."""
    async with watched() as (status, proxy, *_):
        number = booked(proxy).transaction_id
        heads, row = (await get(status, "/sessions.csv")).text.splitlines()
        assert heads == (
            "charger,connector,badge,owner,start,stop,meter_start,meter_stop,wh,"
            "transaction_id,server_transaction_id,reason,delivered,state,words"
        )
        assert row == (
            "CP1,1,SECO1234,secondary,2026-05-04T10:00:00Z,2026-05-04T12:00:00Z,1000,5200,4200,"
            f"{number},7,Local,2026-05-04T12:00:00Z,delivered,"
        )
        booked(proxy, badge="=1+1", reason='@SUM(A1),"x"')
        booked(proxy, badge="A;=1+1", reason="x\n -1")
        rows = [(row["badge"], row["reason"]) for row in await ledger(status)]
        assert rows[1:] == [("'=1+1", '\'@SUM(A1),"x"'), ("A'=1+1", "x' -1")]
        booked(proxy, ended=TEN + p.DAY)  # Its stop came late.
        assert (await shown(status))["sessions"][0]["ended"] == TEN + 7200


SOME = (
    " ABCDE; from=2026-05-04&to=2026-05-04 AB; from=2026-05-05 CDE; to=2026-05-03 ; owner=primary B; "
    "owner=Employer+AG ACDE; charger=CP2 CDE; "
    "badge=%3Ac- C; owner=secondary&charger=CP2&badge=d&to=2026-06-01 D"
)


async def test_the_ledger_of_some(monkeypatch: Patch) -> None:
    """By days, badge, owner, charger, however they are spelled; it is read in pieces, and none is lost."""
    in_zone(monkeypatch, "UTC")
    monkeypatch.setattr(p, "AT_ONCE", 2)
    async with watched("secondary_name = Employer AG") as (status, proxy, *_):
        booked(proxy, badge="A")
        booked(proxy, badge="B", owner="primary", begun=TEN + 3600)
        for badge in "CDE":
            booked(proxy, "CP2", badge=badge, begun=TEN + p.DAY)
        for query, _, badges in (some.rpartition(" ") for some in SOME.split("; ")):
            found = [row["badge"] for row in await ledger(status, f"?{query.strip()}")]
            assert (query, found) == (query, list(badges))


@pytest.mark.parametrize(
    ("own", "day"), [("2026-05-04T23:00:00Z", "2026-05-04"), ("1970-01-01T00:00:09Z", ""), ("2126-01-01", "")]
)
async def test_a_session_stands_on_the_day_of_its_own_start(own: str, day: str) -> None:
    """Where the charger tells one between 2020 and tomorrow, however late it comes; else today."""
    async with watched() as (status, *_), charger(status.proxy) as cp:
        await cp.starts("SECO1", when=own)
        day = day or time.strftime("%Y-%m-%d")
        (row,) = await ledger(status, f"?from={day}&to={day}")
        assert row["start"] == own
        assert time.strftime("%Y-%m-%d", time.localtime((await shown(status))["sessions"][0]["begun"])) == day
        assert "1 sessions" in (await get(status, f"/report?month={day[:7]}")).text


async def test_what_cannot_be_told_is_said_with_what_to_do(monkeypatch: Patch) -> None:
    """400 where the days are none, or too many; 503 while the disk hangs, for which nobody else waits."""
    days, month = "from and to: expected days, as 2026-01-31\n", "month: expected one, as 2026-01\n"
    async with watched() as (status, proxy, *_):
        for query in ("from=yesterday", "to=2026-13-01", "from=0001-01-01", "from=2026-01-01T0"):
            reply = await get(status, f"/sessions.csv?{query}")
            assert reply[:2] == (400, days)
        for named in ("May", "2026-13", "9999-12"):
            assert (await get(status, f"/report?month={named}"))[:2] == (400, month)
        booked(proxy)
        monkeypatch.setattr(p, "MAX_LEDGER_ROWS", 0)
        reply = await get(status, "/sessions.csv")
        assert reply[:2] == (400, "too many sessions; ask for fewer days\n")
        monkeypatch.setattr(p, "LOOK_UP_SECONDS", 0.05)
        monkeypatch.setattr(status.proxy.journal, "look_up", lambda *_: asyncio.Event().wait())
        for path in ("/sessions.csv", "/report", "/status.json"):
            reply = await get(status, path)
            assert (reply.status, reply.headers["Retry-After"]) == (503, "10")


STATES: list[tuple[p.Record, str]] = [  # Changes, and what is said then.
    *(({}, "delivered"), ({"server": ""}, "rejected"), ({"ended": None, "meter_stop": None}, "open")),
    *(({"server": p.LOCAL}, "recorded"), ({"delivered": None, "stop": ""}, "no stop")),
    *(({"delivered": None}, "unconfirmed"), ({"refused": "X", "is_refused": True}, "refused")),
]


async def test_the_state_of_a_session_in_a_word() -> None:
    """Of one at a server that has answered its stop, but for one change."""
    async with watched() as (status, proxy, *_):
        for changes, _ in STATES:
            session = booked(proxy, **changes)
        assert [row["state"] for row in await ledger(status)] == [state for _, state in STATES]
        call = p.own_call("StopTransaction", "{}")
        call.session, call.since = session, time.time()
        call.refused, (memory := proxy.journal.memory("CP1")).calls[call] = "CallError Y", None
        memory.note(call)
        assert (await ledger(status))[-1]["words"] == "CallError Y; its server has the stop"
        trouble = str((await shown(status))["trouble"])
        assert re.search(r"CallError Y; its server has the stop\..*It is tried again once a day\.", trouble)


# The report.


async def test_a_report_is_a_month_to_print(monkeypatch: Patch) -> None:
    """By owner and badge on A4, each session with both readings, and sums; by the names of the ini."""
    in_zone(monkeypatch, "Europe/Berlin")
    async with watched("primary_name = Home\nsecondary_name = Employer <AG>") as (status, proxy, *_):
        for number in range(300):
            badge = ("SECO1234", "seco:12-34")[number % 2]  # One badge, however a charger writes it.
            booked(proxy, f"CP{number % 3}", begun=TEN + number * 1800, badge=badge)
        booked(proxy, owner="primary", badge="<b>=1+1")
        booked(proxy, badge="LATE", begun=TEN + 27.6 * p.DAY)  # In June, here; in May by UTC.
        booked(proxy, badge="NOBODY", server="")
        reply = await get(status, "/report?month=2026-05")
        assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        for text in (
            *("@page { size: A4", "May 2026", "<h2>Employer &lt;AG&gt;: badge SECO1234</h2>"),
            "<td>2026-05-04 12:00<td>2026-05-04 14:00<td>CP0<td>delivered<td>1.000<td>5.200<td>4.200",
            "<td>300 sessions<td><td><td><td><td>1260.000",
            *("<h2>Home: badge &lt;b&gt;=1+1</h2>", "<td>1 sessions<td><td><td><td><td>4.200"),
        ):
            assert text in reply.text
        assert not re.search("LATE|NOBODY", reply.text)
        assert "<h2>Employer &lt;AG&gt;: badge LATE" in (await get(status, "/report?month=2026-06")).text
        for query in ("&owner=primary", "&owner=Home", "&badge=%3CB%3E%3D1%2B1"):
            assert (await get(status, f"/report?month=2026-05{query}")).text.count("<h2>") == 1
        assert "No session began in this month." in (await get(status, "/report?month=2020-01")).text


# Health and metrics.


async def test_health_is_200_or_503_with_the_reason(monkeypatch: Patch) -> None:
    """While the disk fails, and when the listener is gone; the page tells it first. It needs no login."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, proxy, *_):
        assert (await get(status, "/healthz"))[:2] == (200, "ok\n")
        monkeypatch.setattr(proxy.journal, "_write", lambda _: "disk full")
        proxy.journal.memory("CP2")  # Something to save.
        await eventually(lambda: bool(proxy.journal.failure))
        reason = "the state file cannot be written: disk full"
        assert (await get(status, "/healthz"))[:2] == (503, f"{reason}\n")
        assert reason in (await shown(status, **LOGIN))["trouble"][0]["what"]
        proxy.server.close()
        assert (await get(status, "/healthz"))[:2] == (503, "the port for chargers is closed\n")
        assert "is closed" in (await shown(status, **LOGIN))["trouble"][0]["what"]


COUNTED = (
    "chargers online 1; chargers offline 0; servers secondary connected 1; sessions primary open 1; "
    "sessions secondary open 1; calls_total charger primary result 2; connections_total charger 1; "
    "calls_total charger secondary recorded 1; calls_total primary charger error 1; state_file_failing 0; "
    "calls_total secondary charger refused 1; delivered_calls_total secondary 1; stored_calls secondary 0; "
    "dropped_messages_total malformed 1; refused_handshakes_total 401 1; oldest_stored_call_age_seconds 0"
)


async def test_metrics_count_a_day() -> None:
    """Chargers, servers, sessions, refusals, and what became of the Calls both ways; 0 from the start."""
    async with watched("secondary_refuse = Reset") as (status, proxy, primary, secondary):
        found = await samples(status)
        assert (found["refused_calls_total", "secondary"], found["servers", "primary", "down"]) == (0, 0)
        assert (found["info", p.__version__], found["oldest_stored_call_age_seconds",]) == (1, 0)
        primary.refusal = (401, {})
        with pytest.raises(InvalidStatus):
            async with charger(proxy):
                pass
        primary.refusal = None
        async with charger(proxy) as cp:
            await cp.boots()
            await cp.starts("PRIM1")
            await cp.starts("SECO1", "start2", connector=2)
            await cp.connection.send("garbage")
            await primary.calls("r", "Reset", type="Soft")
            await cp.heard.call("Reset")
            await cp.connection.send(json.dumps([4, "r", "NotSupported", "", {}]))
            await primary.heard.until(lambda message: message[0] == 4)
            await secondary.calls("r", "Reset", type="Soft")
            await secondary.heard.until(lambda message: message[0] == 3)
            await eventually(lambda: not proxy.journal.memories["CP1"].stored)
            found = await samples(status)
            for *name, count in map(str.split, COUNTED.split("; ")):
                assert (name, found[tuple(name)]) == (name, int(count))
            assert found["event_loop_lag_seconds",] >= 0
            async with charger(proxy):  # Comes again: the books of connections balance.
                await cp.closed()
        async with asyncio.timeout(PATIENCE):
            while (found := await samples(status))["disconnections_total", "primary"] < 2:
                pass
        names = itertools.product(("connections_total", "disconnections_total"), ("charger", "primary"))
        assert [found[name] for name in names] == [2, 2, 2, 2]


MISSED = [("*", False, 0.9, "offline"), ("*", False, 1.1, ""), ("*", True, 6.9, "offline")]
MISSED += [("*", True, 7.1, "gone"), ("OTHER", True, 0.1, "gone")]


@pytest.mark.parametrize(("chargers", "has_charged", "days", "state"), MISSED)
async def test_a_charger_is_not_missed_for_ever(
    chargers: str, has_charged: bool, days: float, state: str
) -> None:
    """A week, while the ini admits it; an id that was mistyped once, a day."""
    async with watched(host=f"chargers = {chargers}") as (status, proxy, *_):
        if has_charged:
            booked(proxy)
        proxy.journal.memory("CP1").seen = time.time() - days * p.DAY
        found = await samples(status)
        assert {name for name in ("offline", "gone") if found["chargers", name]} == ({state} - {""})
        assert len((await shown(status))["chargers"]) == (state == "offline")


# Who may look.


async def test_without_the_password_there_is_nothing_to_see() -> None:
    """Nothing but health; and with it, nothing tells a password: of neither server, and not its own."""
    more, own = f"secondary_password = {SECONDARY_PASSWORD}", f"password = {PASSWORDS[0]}\n"
    async with watched(more, own) as (status, *_), charger(status.proxy) as cp:
        await cp.boots()
        for path in ("/", "/metrics", "/sessions.csv", "/report", "/status.json"):
            reply = await get(status, path)
            assert (reply.status, reply.headers["WWW-Authenticate"][:12]) == (401, "Basic realm=")
            reply = await get(status, path, Host="proxy:8322", Authorization=login("me", PASSWORDS[0]))
            assert (reply.status, told(str(reply))) == (200, [])


async def test_wrong_passwords_are_answered_slowly_and_shut_nobody_out(caplog: Log) -> None:
    """A second later, eight at a time; the log tells of them, and not what they said."""
    caplog.set_level(logging.INFO, "proxy")
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        begun, wrong = time.monotonic(), {"Authorization": login("me", "guess-work")}
        guesses = [asyncio.create_task(get(status, "/", **wrong)) for _ in range(20)]
        await eventually(lambda: "a wrong password from 127.0.0.1" in caplog.text)
        for path in ("/", "/sessions.csv", "/report", "/status.json"):
            assert (await get(status, path, **LOGIN)).status == 200
        assert not all(guess.done() for guess in guesses)
        assert {reply.status for reply in await asyncio.gather(*guesses)} == {401}
        assert time.monotonic() - begun > 2.9
    assert "guess-work" not in caplog.text


async def test_a_name_that_was_made_to_lead_here_shows_nothing() -> None:
    """A web page could read what its own name leads to (DNS rebinding); nor does one of another host."""
    async with watched() as (status, *_):
        for host in ("localhost:8322", "127.0.0.1", "[::1]:8322", "192.0.2.7:8322", socket.gethostname()):
            assert (await get(status, "/", Host=host)).status == 200
        for host in ("evil.example", "", "["):
            assert (await get(status, "/", Host=host)).status == 403
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        assert (await get(status, "/", Host="proxy:8322", Authorization=login("x", PASSWORD))).status == 200


async def test_there_is_nothing_to_change() -> None:
    """Only GET and HEAD are answered."""
    async with watched() as (status, *_):
        for method in ("POST", "PUT", "DELETE"):
            reply = await get(status, "/", method)
            assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")
        head = await get(status, "/healthz", "HEAD")
        assert (head.status, head.text, head.headers["Content-Length"]) == (200, "", "3")


async def test_every_answer_forbids_what_nobody_needs() -> None:
    """To be framed, kept, sniffed, read by another page; the page is one file that may load nothing else."""
    async with watched() as (status, *_):
        for path in ("/", "/healthz", "/metrics", "/sessions.csv", "/report", "/status.json", "/nothing"):
            reply = await get(status, path)
            assert reply.status == (404 if path == "/nothing" else 200)
            told = [
                reply.headers[name] for name in ("Referrer-Policy", "X-Content-Type-Options", "Cache-Control")
            ]
            assert told == ["no-referrer", "nosniff", "no-store"]
            assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            policy = reply.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'sha256-")
            assert ("unsafe" in policy, "frame-ancestors 'none'" in policy) == (False, True)
        page = (await get(status, "/")).text
        assert re.findall(r"https?://[^\"]+|innerHTML", page) == ["http://www.w3.org/2000/svg"]


async def test_what_is_no_request_is_closed_and_harms_nobody() -> None:
    """Garbage, a request that is far too long, and what would open a websocket."""
    async with watched() as (status, *_), asyncio.timeout(PATIENCE):
        for text in (b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 2**17):
            reader, writer = await asyncio.open_connection("127.0.0.1", status.config.port)
            writer.write(text)
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
        asks = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        assert (await get(status, "/", **asks, **{"Sec-WebSocket-Key": "x" * 22 + "=="})).status == 200


# The command.


async def test_the_command_opens_the_second_port(tmp_path: Path) -> None:
    """And says where; if it is taken, or turned off (`port = 0`), chargers are served all the same."""
    port = free_port()
    ini = f"{LOCAL}[status]\nport = {port}\n"
    async with command(ini, tmp_path) as process:
        await line_with(process, f"status page on http://127.0.0.1:{port}/")
    with closing(socket.create_server(("127.0.0.1", port))):
        async with command(ini, tmp_path) as process:
            line = await line_with(process, "no status page: cannot listen on 127.0.0.1")
            assert "WARNING" in line
            assert line.endswith("chargers are served\n")
    async with house("[status]\nport = 0") as (proxy, *_):
        status = p.Status(proxy, p.REDACTOR.clean)
        await status.start()
        assert status.server is None
