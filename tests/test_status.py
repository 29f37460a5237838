"""The second port: what the page is told, the ledger, health, metrics, and who may look."""

from __future__ import annotations

import asyncio
import base64
import csv
import http.client
import io
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
from tests.play.peers import PATIENCE, FakeServer, accepting, charger, eventually, house, running
from tests.play.planted import PASSWORDS, SECONDARY_PASSWORD, told
from tests.play.plays import Stage, config_of
from tests.proof.ledger import free_port
from tests.sections import SCRIPT
from tests.test_command_line import LOCAL, command, line_with

PASSWORD = "let-me-look"


@asynccontextmanager
async def status_of(proxy: p.Proxy) -> AsyncIterator[p.Status]:
    """The second port of a proxy."""
    events = p.Events()
    status = p.Status(proxy, events, p.REDACTOR.clean)
    await status.start()
    p.log.addHandler(events)
    try:
        yield status
    finally:
        p.log.removeHandler(events)
        status.stop()


@asynccontextmanager
async def watched(
    more: str = "", status: str = ""
) -> AsyncIterator[tuple[p.Status, p.Proxy, FakeServer, FakeServer]]:
    """A proxy between two servers, with its second port."""
    async with house(f"{more}\n[status]\nport = {free_port()}\n{status}") as (proxy, primary, secondary):
        async with status_of(proxy) as port:
            yield port, proxy, primary, secondary


class Reply(NamedTuple):
    """What an HTTP request was answered with."""

    status: int
    headers: http.client.HTTPMessage
    text: str


def asked(port: int, path: str, method: str, headers: dict[str, str]) -> Reply:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read().decode())


async def get(status: p.Status, path: str, method: str = "GET", **headers: str) -> Reply:
    """Ask the second port for something."""
    return await asyncio.to_thread(asked, status.port, path, method, headers)


@asynccontextmanager
async def raw(status: p.Status) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to the second port, for as long as it may take at most."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", status.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def login(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


class Viewer:
    """A page that asks again and again."""

    def __init__(self, status: p.Status, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self.chargers: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}

    async def sees(self, is_wanted: Callable[[Viewer], object]) -> None:
        """Ask until something is to be seen."""
        async with asyncio.timeout(PATIENCE):
            while not is_wanted(self):
                reply = await get(self.status, "/status.json", **self.headers)
                assert reply.status == 200
                news = json.loads(reply.text)
                self.chargers, self.tables = news.pop("chargers"), news

    async def sees_session(self, **wanted: Any) -> dict[str, Any]:
        """Return the last session once it is as wanted."""

        def is_there(viewer: Viewer) -> bool:
            sessions = viewer.tables.get("sessions", [])
            return bool(sessions) and wanted.items() <= sessions[0].items()

        await self.sees(is_there)
        session: dict[str, Any] = self.tables["sessions"][0]
        return session


@asynccontextmanager
async def viewer(status: p.Status, **headers: str) -> AsyncIterator[Viewer]:
    """Somebody who has the page open."""
    yield Viewer(status, headers)


# The page.


async def test_the_page_is_one_file_that_may_load_nothing_else() -> None:
    """Its policy allows its own script and style by their hashes, and a connection back."""
    async with watched() as (status, *_):
        page = await get(status, "/")
        assert page.status == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = page.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert re.findall(r"https?://[^\"]+", page.text) == ["http://www.w3.org/2000/svg"]
        assert "innerHTML" not in page.text


async def test_a_page_hears_that_a_charger_comes_and_goes() -> None:
    """With its version, when it came, when it was seen, and how each server does."""
    async with watched() as (status, *_), viewer(status) as page:
        async with charger(status.proxy) as cp:
            await cp.boots()
            await page.sees(
                lambda page: (
                    page.chargers.get("CP1", {}).get("servers", {}).get("secondary") == {"state": "connected"}
                )
            )
            view = page.chargers["CP1"]
            assert view["online"] is not None
            assert view["seen"] >= view["online"]
            assert view["version"] == "ocpp1.6"
            assert view["servers"]["primary"] == {"state": "connected"}
        await page.sees(lambda page: page.chargers["CP1"]["online"] is None)


async def test_a_page_hears_why_a_server_is_down_and_when_it_is_tried_again() -> None:
    """In the words of the log."""
    async with watched() as (status, _, _, secondary):
        secondary.refusal = (401, {})
        async with charger(status.proxy), viewer(status) as page:
            await page.sees(lambda page: page.chargers.get("CP1", {}).get("servers"))
            await page.sees(lambda page: page.chargers["CP1"]["servers"]["secondary"].get("words"))
            view = page.chargers["CP1"]["servers"]["secondary"]
            assert (view["state"], view["words"]) == ("down", "HTTP 401 Unauthorized")
            assert view["next"] > page.tables["now"] - 1


async def test_a_page_sees_a_session_from_its_start_to_its_delivery() -> None:
    """Open with the energy so far, then among the last ones, delivered."""
    async with watched() as (status, *_), charger(status.proxy) as cp, viewer(status) as page:
        await cp.boots()
        number = await cp.starts("SECO1234")
        reading = [{"timestamp": "2026-01-01T00:00:00Z", "sampledValue": [{"value": "1500"}]}]
        await cp.calls("m", "MeterValues", connectorId=1, transactionId=number, meterValue=reading)
        await page.sees(lambda page: page.chargers.get("CP1", {}).get("sessions"))
        await page.sees(lambda page: page.chargers["CP1"]["sessions"][0]["wh"] == 1500)
        session = page.chargers["CP1"]["sessions"][0]
        assert (session["connector"], session["badge"], session["owner"]) == (1, "****1234", "secondary")
        assert session["id"] == number
        await cp.calls("e", "StopTransaction", transactionId=number, meterStop=2500, timestamp="x")
        ended = await page.sees_session(state="delivered")
        assert (ended["charger"], ended["wh"], ended["words"]) == ("CP1", 2500, "")
        await page.sees(lambda page: page.chargers["CP1"]["sessions"] == [])
        await page.sees(lambda page: [row["wh"] for row in page.tables["energy"]] == [2500])


async def test_a_page_sees_a_session_that_waits_for_its_server() -> None:
    """Since when, and how many messages wait."""
    async with watched() as (status, _, _, secondary):
        await secondary.stop()
        async with charger(status.proxy) as cp, viewer(status) as page:
            number = await cp.starts("SECO1")
            await cp.calls("e", "StopTransaction", transactionId=number, meterStop=9, timestamp="x")
            session = await page.sees_session(state="waiting")
            assert re.fullmatch(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", session["words"])
            await page.sees(lambda page: page.chargers["CP1"]["waiting"] == 2)
            assert page.chargers["CP1"]["oldest"] <= page.tables["now"]


async def test_a_page_sees_that_a_session_was_refused_and_in_which_words() -> None:
    """What the person has to take up with the server's owner."""

    def blocking(action: str, payload: dict[str, Any]) -> dict[str, Any]:
        if action == "StartTransaction":
            return {"transactionId": 0, "idTagInfo": {"status": "Blocked"}}
        return accepting(action, payload)

    async with watched() as (status, _, _, secondary):
        secondary.answers = blocking
        async with charger(status.proxy) as cp, viewer(status) as page:
            await cp.boots()
            await cp.starts("SECO1")
            session = await page.sees_session(state="refused")
            assert session["words"] == "status Blocked"


async def test_a_page_sees_that_a_session_was_rejected() -> None:
    """Its badge is on no list, and the ini says reject."""
    async with watched("unknown_rfid = reject") as (status, *_), charger(status.proxy) as cp:
        async with viewer(status) as page:
            await cp.starts("NOBODY")
            await page.sees_session(state="rejected")


async def test_a_page_shows_badges_on_no_list_in_full() -> None:
    """The number to copy into the ini, with the charger; listed ones are not among them."""
    async with watched() as (status, *_), charger(status.proxy) as cp, viewer(status) as page:
        await cp.calls("a", "Authorize", idTag="04A1B2C3D4")
        await cp.calls("b", "Authorize", idTag="PRIM1")
        await page.sees(lambda page: page.tables.get("unlisted"))
        ((badge, charger_id, utc),) = page.tables["unlisted"]
        assert (badge, charger_id) == ("04A1B2C3D4", "CP1")
        assert utc <= page.tables["now"]


def test_a_badge_that_a_remote_start_brings_is_on_no_list_and_not_shown() -> None:
    """Apps make them up; nobody is to copy them."""
    stage = Stage()
    stage.primary.calls("r", "RemoteStartTransaction", idTag="APP-1", connectorId=1)
    ((_, call, *_),) = stage.charger.hears()
    stage.charger.answers(call, status="Accepted")
    stage.starts("APP-1")
    stage.starts("CARD-1", connector=2)
    assert list(stage.journal.news.unlisted) == ["CARD-1"]


async def test_a_page_tells_the_last_events_with_badges_masked(caplog: pytest.LogCaptureFixture) -> None:
    """They are the lines of the log."""
    caplog.set_level(logging.INFO, "proxy")
    async with watched() as (status, *_), charger(status.proxy) as cp, viewer(status) as page:
        await cp.calls("a", "Authorize", idTag="PRIM123456")
        await page.sees(lambda page: "PRIM" not in str(page.tables.get("events", "PRIM")))
        await page.sees(
            lambda page: any(
                line[1:] == ["INFO", "CP1: charger connected (ocpp1.6)"] for line in page.tables["events"]
            )
        )


async def test_a_page_sees_what_a_primary_has_against_a_session() -> None:
    """It answers the charger itself; people want to know all the same."""

    def blocking(action: str, payload: dict[str, Any]) -> dict[str, Any]:
        if action == "StartTransaction":
            return {"transactionId": 5, "idTagInfo": {"status": "Blocked"}}
        return accepting(action, payload)

    async with watched() as (status, _, primary, _), charger(status.proxy) as cp, viewer(status) as page:
        primary.answers = blocking
        await cp.starts("PRIM1")
        session = await page.sees_session(state="refused")
        assert session["words"] == "status Blocked"


async def test_a_page_shows_the_messages_that_were_refused() -> None:
    """Also those of a session that nobody here knows: kept, shown, and sent to nobody."""
    async with watched() as (status, *_, secondary), charger(status.proxy) as cp, viewer(status) as page:
        await cp.boots()
        stop = {"transactionId": 2_000_000_001, "meterStop": 1, "timestamp": "t", "idTag": "SECO123456"}
        await cp.calls("e", "StopTransaction", **stop)
        await page.sees(lambda page: page.tables.get("refusals"))
        (row,) = page.tables["refusals"]
        assert (row["charger"], row["server"], row["words"]) == (
            *("CP1", "secondary", "its start is not known here"),
        )
        assert "StopTransaction" in row["text"]
        assert "SECO" not in row["text"]
        assert "StopTransaction" not in secondary.heard.actions()


# The ledger.


def table_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def session_of_stage(stage: Stage, badge: str, reason: str = "Local") -> None:
    """Play a session of the secondary to its end."""
    number = stage.secondary_session(server_id=7, badge=badge)
    stage.charger.calls(
        "stop",
        "StopTransaction",
        transactionId=number,
        meterStop=4200,
        timestamp="2026-01-01T01:00:00Z",
        reason=reason,
    )
    stage.delivers()


async def ledger_of(stage: Stage, days: str = "") -> list[dict[str, str]]:
    """Return what the second port of a stage's proxy says of its sessions."""
    stage.journal.save()
    proxy = p.Proxy(config_of(f"{LOCAL}[status]\nport = {free_port()}\n"), stage.journal)
    async with status_of(proxy) as status:
        reply = await get(status, f"/sessions.csv{days}")
        assert reply.status == 200, reply.text
        assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
        return table_of(reply.text)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_the_ledger_tells_all_of_a_session(is_kept: bool, tmp_path: Path) -> None:
    """What it takes to prove a bill; out of the state file, or out of memory where there is none."""
    stage = Stage(state=tmp_path / "state.db" if is_kept else None)
    session_of_stage(stage, "SECO1234")
    stage.journal.settle()
    stage.journal.save()
    (row,) = await ledger_of(stage)
    assert int(row.pop("transaction_id")) >= p.FIRST_PROXY_ID
    assert row.pop("delivered").startswith("2027-01-15T")
    assert row == {
        "charger": "CP1",
        "connector": "1",
        "badge": "SECO1234",
        "owner": "secondary",
        "start": "2026-01-01T00:00:00Z",
        "stop": "2026-01-01T01:00:00Z",
        "wh": "4200",
        "server_transaction_id": "7",
        "reason": "Local",
        "state": "delivered",
        "words": "",
    }


@pytest.mark.parametrize(
    ("days", "count"),
    [
        ("?from=2027-01-15&to=2027-01-15", 1),
        ("?from=2027-01-16", 0),
        ("?to=2027-01-14", 0),
        ("?to=2027-01-15", 1),
        ("?from=2027-01-15T08:00:00Z&to=2027-01-15T09:00:00Z", 1),
        ("?from=2027-01-15T09:00:00Z", 0),
    ],
)
async def test_the_ledger_of_some_days(days: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both days are part of it; the session began on 2027-01-15 at 08:16:40 UTC."""
    monkeypatch.setenv("TZ", "UTC")
    stage = Stage()
    session_of_stage(stage, "SECO1234")
    assert len(await ledger_of(stage, days)) == count


async def test_the_ledger_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None is missing between two, and none stands twice."""
    monkeypatch.setattr(p, "LEDGER", p.LEDGER.replace(f"LIMIT {p.LEDGER_ROWS}", "LIMIT 2"))
    stage = Stage(state=tmp_path / "state.db")
    for number in range(5):
        session_of_stage(stage, f"SECO{number}")
    stage.journal.settle()
    stage.journal.save()
    assert [row["badge"] for row in await ledger_of(stage)] == [f"SECO{number}" for number in range(5)]


async def test_what_a_spreadsheet_would_take_for_a_formula_is_text_in_the_ledger() -> None:
    """Badges and reasons are whatever a charger says."""
    stage = Stage("unknown_rfid = secondary")
    session_of_stage(stage, "=1+1", reason='@SUM(A1),"x"')
    (row,) = await ledger_of(stage)
    assert (row["badge"], row["reason"]) == ("'=1+1", '\'@SUM(A1),"x"')


@pytest.mark.parametrize("days", ["?from=yesterday", "?to=2026-13-01", "?from=9999-12-31&to=9999-12-31"])
async def test_a_ledger_of_days_that_are_none_is_400(days: str) -> None:
    """With what is expected."""
    async with watched() as (status, *_):
        reply = await get(status, f"/sessions.csv{days}")
        assert reply.status == 400
        assert "expected days, as 2026-01-31" in reply.text


async def test_a_ledger_of_too_many_sessions_is_400(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for fewer days."""
    monkeypatch.setattr(p, "MAX_LEDGER_ROWS", 1)
    async with watched() as (status, *_), charger(status.proxy) as cp:
        await cp.starts("SECO1")
        reply = await get(status, "/sessions.csv")
        assert (reply.status, reply.text) == (400, "too many sessions; ask for fewer days\n")


async def test_a_ledger_on_a_disk_that_hangs_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not wait for it."""
    monkeypatch.setattr(p, "LEDGER_SECONDS", 0.05)

    async def hangs(*_: object) -> list[p.Record]:
        await asyncio.Event().wait()
        raise AssertionError

    async with watched() as (status, *_):
        monkeypatch.setattr(status.proxy.journal, "look_up", hangs)
        reply = await get(status, "/sessions.csv")
        assert (reply.status, reply.headers["Retry-After"]) == (503, "10")


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"is_rejected": 1}, "rejected"),
        ({"refused": "status Blocked"}, "refused"),
        ({"refused_call": "CallError InternalError"}, "refused"),
        ({"waits_since": 5.0}, "waiting"),
        ({"ended": None}, "open"),
        ({"server": p.LOCAL}, "recorded"),
        ({}, "delivered"),
        ({"delivered": None, "has_stop": 0}, "no stop"),
        ({"delivered": None}, "unconfirmed"),
    ],
)
def test_the_delivery_of_a_session_in_a_word(changes: p.Record, state: str) -> None:
    """From 10 to 20 s at a server that has answered its stop, but for one change."""
    row = {"is_rejected": 0, "refused": "", "refused_call": None, "waits_since": None, "server": "ws://x"}
    row |= {"begun": 10.0, "ended": 20.0, "delivered": 20.1, "has_stop": 1}
    assert p.delivery_of({**row, **changes}).state == state


# Health.


async def test_health_is_200_while_it_serves() -> None:
    """For the image's HEALTHCHECK; nobody has to log in for it."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        assert (await get(status, "/healthz"))[::2] == (200, "ok\n")


async def test_health_is_503_with_the_reason_while_the_disk_fails() -> None:
    """Chargers are still served, but what has to be recorded is not."""
    async with watched() as (status, *_):
        status.proxy.journal.failure = "database or disk is full"
        reply = await get(status, "/healthz")
        assert reply[::2] == (503, "the state file cannot be written: database or disk is full\n")


async def test_health_is_503_when_the_listener_is_gone() -> None:
    """No charger gets in any more."""
    async with watched() as (status, proxy, *_):
        assert proxy.server is not None
        proxy.server.close()
        assert (await get(status, "/healthz"))[::2] == (503, "the port for chargers is closed\n")


# Metrics.


async def samples(status: p.Status) -> dict[tuple[str, ...], float]:
    """Return the samples as Prometheus reads them: name and label values to the value."""
    reply = await get(status, "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found[sample.name.removeprefix("ocpp_proxy_"), *sample.labels.values()] = sample.value
    return found


async def test_metrics_are_what_prometheus_reads() -> None:
    """Each with help and type; counters end in _total, and those that alarms watch begin at 0."""
    async with watched() as (status, *_):
        families = list(text_string_to_metric_families((await get(status, "/metrics")).text))
        named = {f"ocpp_proxy_{name.removesuffix('_total')}": metric for name, metric in p.METRICS.items()}
        assert {family.name: family.type for family in families} == {
            name: metric.kind for name, metric in named.items()
        }
        assert all(family.documentation for family in families)
        for name, metric in p.METRICS.items():
            assert name.endswith("_total") == (metric.kind == "counter")
        found = await samples(status)
        assert found["refused_calls_total", "secondary"] == 0
        assert found["servers", "primary", "down"] == 0
        assert found["info", p.__version__] == 1


async def test_metrics_count_a_day() -> None:
    """Chargers, servers, sessions, and what became of the Calls of both directions."""
    async with watched() as (status, *_, primary, _), charger(status.proxy) as cp:
        await cp.boots()
        await cp.starts("PRIM1")
        start = {"connectorId": 2, "idTag": "SECO1", "meterStart": 0, "timestamp": "2026-01-01T00:00:00Z"}
        await cp.calls("start2", "StartTransaction", **start)
        await cp.connection.send("garbage")
        await primary.calls("r", "Reset", type="Soft")
        await cp.heard.call("Reset")
        await cp.connection.send(json.dumps([4, "r", "NotSupported", "", {}]))
        await primary.heard.until(lambda message: message[0] == 4)
        await eventually(lambda: not status.proxy.journal.memories["CP1"].stored)
        found = await samples(status)
        assert found["chargers", "online"] == 1
        assert found["chargers", "offline"] == 0
        assert found["servers", "secondary", "connected"] == 1
        assert found["sessions", "primary", "open"] == found["sessions", "secondary", "open"] == 1
        assert found["calls_total", "charger", "primary", "result"] == 2
        assert found["calls_total", "charger", "secondary", "recorded"] == 1
        assert found["calls_total", "primary", "charger", "error"] == 1
        assert found["delivered_calls_total", "secondary"] == 1
        assert found["dropped_messages_total", "malformed"] == 1
        assert found["connections_total", "charger"] == 1
        assert found["stored_calls", "secondary"] == 0
        assert found["oldest_stored_call_age_seconds",] == 0
        assert found["state_file_failing",] == 0
        assert found["event_loop_lag_seconds",] >= 0


async def test_metrics_tell_what_waits_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an alarm watches: a stop that waits is money that waits."""
    async with watched() as (status, _, _, secondary):
        await secondary.stop()
        async with charger(status.proxy) as cp:
            await cp.starts("SECO1")
            counts = status.proxy.journal.news.counts
            await eventually(lambda: counts["failed_dials", p.Peer.SECONDARY] > 0)
            now = time.time()
            monkeypatch.setattr(time, "time", lambda: now + 3600)
            found = await samples(status)
            assert found["stored_calls", "secondary"] == 1
            assert found["oldest_stored_call_age_seconds",] == pytest.approx(3600, abs=60)
            assert found["servers", "secondary", "down"] == 1
            assert found["failed_dials_total", "secondary"] >= 1
        await eventually(lambda: not status.proxy.relays["CP1"].link)
        assert (await samples(status))["disconnections_total", "charger"] == 1


async def test_a_charger_that_comes_again_counts_as_gone_and_come() -> None:
    """With its connection to the primary; otherwise the books of connections would not balance."""
    async with house() as (proxy, *_):
        async with charger(proxy) as old, charger(proxy):
            await old.closed()
        await eventually(lambda: not proxy.journal.news.present)
        await eventually(
            lambda: not any(relay.outboxes[p.Peer.PRIMARY].link for relay in proxy.relays.values())
        )
        counts = proxy.journal.news.counts
        for peer in (p.Peer.CHARGER, p.Peer.PRIMARY):
            assert counts["connections", peer] == counts["disconnections", peer] == 2


@pytest.mark.parametrize(
    ("chargers", "days", "state"),
    [("*", 1, "offline"), ("*", 8, "gone"), ("OTHER", 1, "gone")],
)
def test_a_charger_that_has_moved_away_is_not_missed_for_ever(chargers: str, days: int, state: str) -> None:
    """After a week, or once the ini does not admit it any more."""
    stage = Stage()
    stage.charger.lost()
    stage.memory.seen = stage.now().utc - days * p.DAY
    is_expected = config_of(f"[host]\nchargers = {chargers}\n[ext-server]\nserver = local\n").host.admits(
        "CP1"
    )
    share = p.share_of(stage.memory, stage.relay, is_expected, stage.now().utc)
    assert share["chargers", state] == 1


async def test_a_ledger_that_nobody_waits_for_any_more_is_not_made() -> None:
    """Whoever has asked for it is gone."""
    async with watched() as (status, *_):
        link = p.incoming_link(1024, lambda _: None)
        link.ended.set_result(None)
        assert await status._ledger_text(link, 0, 1e10) == p.csv_text([p.CSV_COLUMNS])


async def test_metrics_count_refusals() -> None:
    """Of handshakes, by status; of Calls that the secondary may not make."""
    async with watched("secondary_refuse = Reset") as (status, _, primary, secondary):
        primary.refusal = (401, {})
        with pytest.raises(InvalidStatus):
            async with charger(status.proxy):
                pass
        primary.refusal = None
        async with charger(status.proxy) as cp:
            await cp.boots()
            await secondary.connection()
            await secondary.calls("r", "Reset", type="Soft")
            await secondary.heard.until(lambda message: message[0] == 3)
        found = await samples(status)
        assert found["refused_handshakes_total", "401"] == 1
        assert found["calls_total", "secondary", "charger", "refused"] == 1


def test_whatever_is_counted_is_a_metric() -> None:
    """What the script counts under a name that is none would be seen by nobody."""
    script = SCRIPT.read_text()
    counted = set(re.findall(r'news\.count\(\s*"(\w+)"', script))
    assert len(counted) > 5
    assert {f"{name}_total" for name in counted} == {
        name for name, metric in p.METRICS.items() if metric.kind == "counter"
    }


# Who may look.


async def test_without_the_password_there_is_nothing_to_see() -> None:
    """Neither the page, nor the ledger, nor metrics, nor what happens live."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        for path in ("/", "/metrics", "/sessions.csv", "/status.json", "/nothing"):
            reply = await get(status, path)
            assert reply.status == 401
            assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert (await get(status, "/", **login("wrong"))).status == 401
        assert (await get(status, "/", **login(PASSWORD))).status == 200


async def test_wrong_passwords_are_answered_slowly_and_shut_nobody_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who knows it may come from the same address; the log tells of the others, and not what they said."""
    waits = asyncio.Event()

    async def sleep(seconds: float) -> None:
        assert seconds == p.WRONG_PASSWORD_SECONDS
        await waits.wait()

    caplog.set_level(logging.INFO, "proxy")
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        monkeypatch.setattr(p, "WRONG_PASSWORD_SECONDS", 0.125)
        true_sleep = asyncio.sleep
        monkeypatch.setattr(
            asyncio, "sleep", lambda seconds: sleep(seconds) if seconds == 0.125 else true_sleep(seconds)
        )
        wrong = [asyncio.create_task(get(status, "/", **login("guess-work"))) for _ in range(3)]
        await eventually(lambda: len(status.links) == len(wrong))
        assert (await get(status, "/", **login(PASSWORD))).status == 200
        waits.set()
        assert {reply.status for reply in await asyncio.gather(*wrong)} == {401}
    assert "a wrong password from 127.0.0.1" in caplog.text
    assert "guess-work" not in caplog.text


@pytest.mark.parametrize(
    ("host", "status_code"),
    [
        ("localhost:8322", 200),
        ("127.0.0.1", 200),
        ("[::1]:8322", 200),
        ("192.0.2.7:8322", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("", 403),
    ],
)
async def test_a_name_that_was_made_to_lead_here_shows_nothing(host: str, status_code: int) -> None:
    """A web page could read what its own name leads to (DNS rebinding)."""
    async with watched() as (status, *_):
        assert (await get(status, "/", Host=host)).status == status_code


async def test_where_a_password_guards_it_any_name_may_lead_here() -> None:
    """A web page that has made its name lead here does not know it."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, *_):
        assert (await get(status, "/", Host="proxy:8322", **login(PASSWORD))).status == 200


async def test_a_web_page_of_another_host_hears_nothing() -> None:
    """It says where it is from."""
    async with watched() as (status, *_):
        for other in ("http://evil.example", "http://127.0.0.1:3000", "file://", "null"):
            assert (await get(status, "/status.json", Origin=other)).status == 403
        own = f"http://127.0.0.1:{status.port}"
        assert (await get(status, "/status.json", Origin=own)).status == 200


async def test_there_is_nothing_to_change() -> None:
    """Only GET and HEAD are answered."""
    async with watched() as (status, *_):
        for method in ("POST", "PUT", "DELETE"):
            reply = await get(status, "/", method)
            assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")
        head = await get(status, "/healthz", "HEAD")
        assert (head.status, head.text, head.headers["Content-Length"]) == (200, "", "3")


async def test_every_answer_forbids_what_nobody_needs() -> None:
    """To be framed, kept, sniffed, or read by another page."""
    async with watched() as (status, *_):
        for path in ("/", "/healthz", "/metrics", "/sessions.csv", "/nothing"):
            reply = await get(status, path)
            for name, value in p.STATUS_HEADERS.items():
                assert reply.headers[name] == value


async def test_what_is_no_request_is_closed_and_harms_nobody() -> None:
    """Garbage, a request that is never finished, one that is far too long."""
    async with watched() as (status, *_):
        for text in (b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 2**17):
            async with raw(status) as (reader, writer):
                writer.write(text)
                with suppress(ConnectionResetError):
                    await reader.read()
        assert (await get(status, "/healthz")).status == 200


async def test_of_too_many_requests_the_oldest_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds connections open shuts nobody out."""
    monkeypatch.setattr(p, "MAX_STATUS_LINKS", 2)
    async with watched() as (status, *_):
        async with raw(status) as (reader, _), raw(status):
            await eventually(lambda: len(status.links) == 2)
            assert (await get(status, "/healthz")).status == 200
            assert await reader.read() == b""


async def test_no_answer_of_the_second_port_tells_a_password() -> None:
    """Of neither server, and not its own."""
    more = f"secondary_password = {SECONDARY_PASSWORD}"
    async with watched(more, f"password = {PASSWORDS[0]}\n") as (status, *_):
        async with charger(status.proxy), viewer(status, **login(PASSWORDS[0])) as page:
            await page.sees(lambda page: page.chargers and "summary" in page.tables)
            seen = str((page.chargers, page.tables))
        for path in ("/", "/metrics", "/sessions.csv", "/healthz"):
            seen += str(await get(status, path, **login(PASSWORDS[0])))
        assert told(seen) == []


# The command.


async def test_a_second_port_that_is_taken_is_a_warning(tmp_path: Path) -> None:
    """Chargers are served all the same."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        async with command(f"{LOCAL}[status]\nport = {port}\n", tmp_path) as process:
            await line_with(process, "listens on")
            line = await line_with(process, "no status page: cannot listen on 127.0.0.1")
            assert "WARNING" in line
            assert line.endswith("chargers are served\n")


async def test_the_command_opens_the_second_port(tmp_path: Path) -> None:
    """And says where."""
    port = free_port()
    async with command(f"{LOCAL}[status]\nport = {port}\n", tmp_path) as process:
        await line_with(process, f"status page on http://127.0.0.1:{port}/")
        assert (await asyncio.to_thread(asked, port, "/healthz", "GET", {}))[::2] == (200, "ok\n")


async def test_a_proxy_without_a_second_port_works() -> None:
    """`port = 0` turns it off."""
    ini = "[ext-server]\nserver = local\n[status]\nport = 0\n"
    async with running(ini) as proxy:
        assert await p.opened_status(proxy) is None
