"""Connections from the first to the last: greetings, redial, grace, takeover, the watchdog, faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from unittest.mock import Mock

import pytest
from websockets.frames import Frame, Opcode

import ocpp_2w_proxy as p
from tests.play import wires
from tests.play.kills import Play, killed
from tests.play.peers import charger, deaf, eventually, house
from tests.play.plays import Stage, StageLink
from tests.play.script import goes_as_told, plays
from tests.play.wires import Log, Patch, at_the_door, refused, request, smaller, visitor

PRIMARY, SECONDARY = p.SERVERS


def seconds_to_dial(stage: Stage, name: str, happening: Callable[[], object]) -> float:
    """Let something happen, and time pass until a server is dialled; return how long it was."""
    begun, stage.dialled = stage.time, []
    happening()
    while f"CP1: {name}: dial" not in stage.dialled:
        assert stage.time < begun + 100
        stage.passes(0.5)
    return stage.time - begun


def looks(stage: Stage, after: float, *seen: StageLink) -> list[StageLink]:
    """Let the watchdog look, these having been seen just now; return whom it has closed."""
    stage.time += after
    for link in seen:
        link.seen = stage.time
    stage.relay.watch()
    links = (stage.charger, stage.primary, stage.secondary)
    return [link for link in links if link.closed_with is not None]


test_a_new_connection_starts_whole = plays(
    """
With what the charger has said of itself.

A new connection to the secondary gets the boot and each connector's last status first, under new ids.
    2 s, charger is Available 0, charger is Preparing, charger is Charging, primary takes, secondary takes,
    look, secondary leaves, secondary returns, secondary takes, look, 60 s
    => secondary: Status:Available Status:Preparing Status:Charging|Boot:M Status:Available Status:Charging|;
    charger: n n n||
A charger that boots itself within two seconds is not repeated; the statuses come behind its boot.
    charger leaves, secondary leaves, charger returns, secondary comes, 1 s, look, charger boots New,
    charger is Available, charger is Charging, secondary takes, 5 s, look, secondary leaves, secondary comes
    => secondary: |Boot:New Status:Available Status:Charging|Boot:New Status:Charging
What it said in another version is not repeated, for nobody would understand it: a boot is made up.
    secondary leaves, charger returns ocpp2.0.1, secondary comes, 9 s, look, 2 s => secondary: |Boot
A copy frees its place after five seconds: a secondary that ignores copies still gets its sessions.
    charger is Charging, charger starts 1, look, 5 s => secondary: Status:Charging|Start
A lost primary is greeted with the boot, and Calls wait in order; what was sent, its sender repeats.
    charger starts 1 PRIM1, primary leaves, charger beats 2, charger starts 3 PRIM1, primary returns
    => primary: Start Boot:M Heartbeat Start
One that does not accept the repeated boot still gets the Calls of the charger, which has been let in,
    primary leaves, charger shows 1 PRIM1, primary boots Pending 600, primary comes
    => primary: Boot:M Authorize
nor need it answer.
    primary leaves, charger shows 1 PRIM1, primary boots -, primary returns, look, 29 s
    => primary: Boot:M|Authorize
A charger that boots itself ends the repeated boot: the primary has accepted it.
    primary leaves, primary boots Pending 30, primary comes, primary boots Accepted 300, charger boots, 60 s
    => primary: Boot:M Boot:M
A charger that goes takes its connections along, and what waits: its sender repeats it.
    charger shows 1 PRIM1, charger shows 2 PRIM1, charger leaves, look, charger returns, 60 s
    => primary: Authorize|; closed: secondary:1001
A primary that comes and goes without an answer does not hold the charger: the grace runs on,
    primary boots -, 8 times (primary leaves, 1 s, primary comes, 1 s) => closed: charger:1012 secondary:1001
and begins anew once it has stood a moment, even if a quiet charger says nothing.
    2 times (primary leaves, 12 s, primary comes, 20 s) => closed:
So it is however short the grace is.
    proxy with primary_grace=2, 3 s, 2 times (primary leaves, 1 s, primary comes, 20 s) => closed:
A takeover answers the servers' Calls that the old connection has left unanswered: they must not wait.
    secondary calls a ClearCache, secondary calls b ClearCache, charger returns
    => secondary: a:error b:error; closed:
An answer to a connection that is being closed still tells its session, whose start the charger repeats.
    charger starts 1 PRIM1, charger leaves, primary accepts, charger returns, charger starts 2 PRIM1
    => primary: Start; charger: 2:Accepted; sessions: 1
""",
    before="all noted, ",
)


test_a_charger_that_is_new_here = plays(
    """
Nothing is known of it yet.

The boot of an unknown charger is made up after ten seconds; some hang up if they are called before theirs.
    charger returns, secondary comes, 9 s, look, 2 s => secondary: |Boot:CP1; charger: |; primary: |
The secondary gets Heartbeats at the interval that it has asked for, and the charger's own are the primary's.
    charger returns, secondary boots Accepted 60, secondary comes, charger boots, charger beats h, 59 s, look,
    2 s, look, 57 s, look, 2 s => secondary: Boot:M|Heartbeat||Heartbeat
A boot that the secondary leaves unanswered goes again.
    charger returns, secondary boots -, secondary comes, charger boots, 25 s, secondary boots Accepted 300,
    60 s => secondary: Boot:M Boot:M
""",
    connect=False,
    before="all noted, ",
)


def test_what_a_charger_says_of_itself_is_remembered_up_to_a_bound(play: Play) -> None:
    """All of it passes; the oldest is not repeated at the next connection, nor what is too long."""
    sizes = ((0, 5_000), (1, 5_000), (4, 20_000))
    steps = ", ".join(f"charger sends n StatusNotification connectorId={n} info={'x' * s}" for n, s in sizes)
    steps += ", primary takes, secondary takes, look, secondary leaves, secondary returns, secondary takes"
    goes_as_told(play(), steps, {"secondary": " ".join(["Status"] * 3) + "|Status Status"})


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_calls_that_wait_for_a_server_are_bounded_in_number_and_length(size: int) -> None:
    """1,000 and 4 MiB; what is dropped is told, and the charger sends it again."""
    stage, most = Stage(), 1000 if size == 10 else 4
    for number in range(most + 10):
        stage.charger.calls(str(number), "DataTransfer", vendorId="v", data="x" * size)
    heard = 0
    while said := stage.primary.hears():
        stage.primary.answers(said[0][1])
        heard += 1
    assert most < heard <= most + 2, "and the one that was in flight"


# Redial.


def test_the_secondary_is_redialled_with_growing_delays() -> None:
    """After 1 s, times 1.6, at most 60 s, each +-20 %; again 1 s after it has stood five seconds."""
    stage = Stage()
    happening: Callable[[], object] = stage.secondary.lost
    for number in range(13):
        wanted = min(1.6**number, 60)
        assert 0.79 * wanted <= seconds_to_dial(stage, "secondary", happening) <= 1.21 * wanted + 0.5
        happening = partial(stage.cannot_dial, SECONDARY, p.DialError("no"))
    stage.secondary_connects(accepts=False)
    stage.passes(6)
    assert seconds_to_dial(stage, "secondary", stage.secondary.lost) <= 2


def test_a_primary_that_stays_away_is_dialled_ever_more_rarely_and_the_charger_closed() -> None:
    """After 0.5 s, times 1.6, at most 5 s; 1012 after 15 s, so that the charger's own queue takes over."""
    stage = Stage()
    gone, waits = stage.time, [seconds_to_dial(stage, "primary", stage.primary.lost)]
    while stage.time < gone + 9:
        fails = partial(stage.cannot_dial, PRIMARY, p.DialError("no"))
        waits.append(seconds_to_dial(stage, "primary", fails))
    assert waits[0] == 0
    assert waits[1] <= 1
    assert max(waits) <= 5.5 * 1.2
    assert stage.charger.closed_with is None
    stage.passes(gone + 16 - stage.time)
    assert stage.charger.closed_with is not None
    assert stage.charger.closed_with[0] == 1012


# The charger goes, and comes again.


def test_what_an_old_connection_says_late_is_not_heard_but_for_the_answer_to_a_start() -> None:
    """Which tells its session."""
    stage = Stage()
    old_charger, old_primary = stage.charger, stage.primary
    stage.starts("PRIM1", "1")
    stage.charger_connects()
    assert None not in (old_charger.closed_with, old_primary.closed_with)
    old_primary.says("gibberish")
    old_primary.answers("other", x=1)
    old_primary.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    old_charger.calls("late", "Heartbeat")
    for old in (old_charger, old_primary):
        old.lost()
    assert stage.charger.hears() == stage.primary.hears() == []
    stage.starts("PRIM1", "2")
    assert stage.charger.hears()[0][2]["transactionId"] == 7


@pytest.mark.parametrize("more", ["", "secondary_replies = forward"])
def test_message_ids_are_not_reused_on_a_connection_that_outlives_the_charger(more: str) -> None:
    """Chargers count from 1 again; SteVe refuses an id that it has seen on the connection."""
    stage, used = Stage(more), set()
    for _ in range(2):
        stage.charger.calls("1", "Authorize", idTag="SECO1")
        message_id, *_ = stage.secondary.hears_call()
        stage.secondary.answers(message_id, idTagInfo={"status": "Accepted"})
        assert stage.charger.hears() == [[3, "1", {"idTagInfo": {"status": "Accepted"}}]]
        used.add(message_id)
        stage.charger_connects()
    assert len(used) == 2


# The end, and who never comes back, over real websockets.


async def test_nobody_is_dialled_any_more_at_the_end(monkeypatch: Patch) -> None:
    """A Call that waits would reach the primary, and its answer nobody."""
    monkeypatch.setattr(p, "STOP_SECONDS", 0.5)
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        primary.answers = None
        for number in ("1", "2"):
            await cp.connection.send(json.dumps([2, number, "Heartbeat", {}]))
        await primary.heard.call("Heartbeat")
        async with deaf(cp.connection):
            await proxy.stop()
        assert (len(primary.requests), primary.heard.actions()) == (1, ["Heartbeat"])


async def test_what_a_charger_never_ended_is_delivered_without_it() -> None:
    """A transaction without a badge is the primary's after thirty silent days."""
    async with house("primary_user = u") as (proxy, primary, _):
        async with charger(proxy, versions=["ocpp2.0.1"]) as cp:
            await cp.boots()
            start = {
                "eventType": "Started",
                "seqNo": 0,
                "timestamp": "t",
                "transactionInfo": {"transactionId": "T"},
            }
            await cp.calls("s", "TransactionEvent", triggerReason="CablePluggedIn", **start)
        await eventually(lambda: not proxy.relays)
        after = p.current_instant().utc + 31 * p.DAY
        proxy.journal.clock = lambda: p.current_instant()._replace(utc=after)
        proxy.retry_at = 0.0
        assert (await primary.heard.call("TransactionEvent"))[3] == {
            "triggerReason": "CablePluggedIn",
            **start,
        }


# Takeover over real websockets.


async def test_a_charger_that_connects_again_replaces_its_old_connection(monkeypatch: Patch) -> None:
    """At once, without waiting for a dead one to close, which is cut; the secondary's connection stays."""
    smaller(monkeypatch, seconds_to_close=0.2)
    async with house() as (proxy, primary, secondary), charger(proxy) as first:
        await first.boots()
        await secondary.connection()
        old = proxy.relays["CP1"].link
        assert old is not None
        async with deaf(first.connection), charger(proxy) as second:
            await second.calls("1", "Heartbeat")
            await eventually(old.ended.done)
            async with charger(proxy) as third:
                assert await second.closed() == 1001
                await third.calls("1", "Heartbeat")
        assert (len(primary.connections), len(secondary.connections)) == (3, 1)


async def test_a_newcomer_that_the_primary_refuses_does_not_touch_a_living_charger(
    monkeypatch: Patch,
) -> None:
    """One answers a Ping; of one that never has, silence proves nothing."""
    smaller(monkeypatch, seconds_to_pong=0.3)
    async with house() as (proxy, primary, _), charger(proxy) as old, visitor(proxy, request("MUTE")) as mute:
        assert await mute.status() == 101
        primary.refusal = (401, {})
        for name in ("CP1", "MUTE"):
            assert (await refused(proxy, name))[0] == 401
        await old.calls("1", "Heartbeat")
        mute.says(Frame(Opcode.TEXT, b'[2,"1","Heartbeat",{}]').serialize(mask=True))
        await mute.hears_until(b'[3, "1"')


@pytest.mark.parametrize("is_refused_again", [False, True])
async def test_a_dead_charger_makes_room_at_a_primary_that_allows_one_connection(
    is_refused_again: bool, monkeypatch: Patch
) -> None:
    """No Pong: its connections are closed and the primary is asked once more; it has the last word."""
    smaller(monkeypatch, seconds_to_pong=0.3)
    async with house() as (proxy, primary, _), charger(proxy) as old:
        primary.one_connection_per_charger = True
        primary.refusal = (403, {}) if is_refused_again else None
        async with deaf(old.connection):
            if is_refused_again:
                assert (await refused(proxy))[0] == 403
            else:
                async with charger(proxy) as new:
                    await new.calls("1", "Heartbeat")
        assert await old.closed() == 1001
        assert len(primary.requests) == 3


async def test_a_probe_of_the_old_connection_does_not_close_a_newer_one(monkeypatch: Patch) -> None:
    """While the old one is probed for a newcomer, another newcomer is let in."""
    smaller(monkeypatch, seconds_to_pong=0.7)
    async with house() as (proxy, primary, _), charger(proxy) as old, deaf(old.connection):
        primary.refusal = (403, {})
        probing = asyncio.create_task(refused(proxy))
        await eventually(lambda: len(primary.requests) == 2)
        primary.refusal = None
        async with charger(proxy) as new:
            primary.refusal = (403, {})
            assert (await probing)[0] == 403
            await new.calls("1", "Heartbeat")


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_a_newcomer_that_comes_too_late_replaces_nobody(hangs_up: bool) -> None:
    """It has hung up while the primary thought about it, or the charger has come again meanwhile."""
    async with house() as (proxy, primary, _), charger(proxy) as old, AsyncExitStack() as others:
        at_once, held = primary.may_answer, asyncio.Event()
        primary.may_answer = held
        async with visitor(proxy, request()):
            await eventually(lambda: len(primary.requests) == 2)
            primary.may_answer, stands = at_once, old
            if not hangs_up:
                stands = await others.enter_async_context(charger(proxy))
                held.set()
                await at_the_door(proxy, 0)
        held.set()
        await at_the_door(proxy, 0)
        await stands.calls("1", "Heartbeat")


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_redial_of_the_primary_gives_way_to_a_newer_connection(hangs: bool) -> None:
    """The charger comes again while the proxy redials; one connection is left, and it works."""
    async with house() as (proxy, primary, _), charger(proxy):
        at_once, held = primary.may_answer, asyncio.Event()
        primary.may_answer = held if hangs else at_once
        await primary.connections[0].close()
        await eventually(lambda: len(primary.requests) == 2)
        primary.may_answer = at_once
        async with charger(proxy) as new:
            held.set()
            await new.calls("1", "Heartbeat")
            await eventually(lambda: wires.open_connections(primary) == 1)
            await new.calls("2", "Heartbeat")


async def test_a_charger_gets_in_though_a_delivery_holds_its_place(monkeypatch: Patch) -> None:
    """A primary that allows one connection per charger; the one that delivers without it gives way."""
    smaller(monkeypatch, seconds_to_pong=0.3)
    event = {"timestamp": "t", "triggerReason": "Authorized", "transactionInfo": {"transactionId": "T"}}
    async with house("primary_user = u") as (proxy, primary, _):
        async with charger(proxy, versions=["ocpp2.0.1"]) as cp:
            await cp.boots()
            primary.answers = None
            await cp.calls("s", "TransactionEvent", eventType="Started", seqNo=0, **event)
            end = {"eventType": "Ended", "seqNo": 1, **event}
            await cp.connection.send(json.dumps([2, "e", "TransactionEvent", end]))
            await primary.heard.call("TransactionEvent")
        await eventually(lambda: wires.present(proxy) == [])
        assert wires.open_connections(primary) == 1
        primary.one_connection_per_charger = True
        async with charger(proxy, versions=["ocpp2.0.1"]):
            assert len(primary.connections) == 2


# The watchdog.


def test_a_charger_is_pinged_right_away_and_all_every_interval_and_who_is_not_seen_is_closed() -> None:
    """A server after `ping_interval` and `ping_timeout`, 90 s; a charger after `watchdog_stale`, 500 s."""
    stage = Stage()
    charger, primary, secondary = links = (stage.charger, stage.primary, stage.secondary)
    assert [link.pings for link in links] == [1, 0, 0]
    stage.passes(61)
    assert [link.pings for link in links] == [3, 2, 2]
    looks(stage, 0, *links)
    assert looks(stage, 89, charger, primary) == []
    assert looks(stage, 2, charger, primary) == [secondary]
    assert looks(stage, 499, primary) == [secondary]
    assert looks(stage, 2, primary) == [charger, secondary]


def test_a_charger_that_never_answers_pings_has_three_heartbeat_intervals(play: Play) -> None:
    """Some firmwares do not know Pongs, and send a Heartbeat an hour; after a kill that is known, too."""
    stage = play()
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=3600)
    killed(stage)
    stage.charger.has_ponged = False
    servers = (stage.primary, stage.secondary)
    assert looks(stage, 10_000, *servers) == []
    assert looks(stage, 1_000, *servers) == [stage.charger]


# Faults, over real websockets.


@pytest.mark.parametrize("payload", [b"\x00\x01", "\ud800".encode("utf-8", "surrogatepass"), b"x" * 2049])
async def test_an_unfit_frame_closes_that_connection_alone(payload: bytes) -> None:
    """Binary 1003, badly encoded 1007, oversized 1009; the others notice nothing."""
    async with house(host="max_size = 2048") as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        connection = await secondary.connection()
        await connection.send("x" * 2048)  # No message, but not too long.
        await connection.send(payload, text=payload[:1] != b"\x00")
        await connection.wait_closed()
        assert connection.close_code == {0: 1003, 0xED: 1007, ord("x"): 1009}[payload[0]]
        await cp.calls("1", "Heartbeat")


async def test_a_quiet_charger_that_answers_pings_is_never_closed(monkeypatch: Patch) -> None:
    """A Pong is a sign of life; the watchdog looks at a few chargers at a time, and at all of them."""
    monkeypatch.setattr(p, "RELAYS_AT_ONCE", 1)
    monkeypatch.setattr(p, "TICK_SECONDS", 0.01)
    short = "ping_interval = 0.2\nping_timeout = 0.6\nwatchdog_interval = 0.1\nwatchdog_stale = 1"
    async with house(host=short) as (proxy, *_), charger(proxy) as cp:
        for name in ("A", "B", "C"):
            async with charger(proxy, name):
                pass
        await eventually(lambda: wires.known(proxy) == ["CP1"])
        link = proxy.relays["CP1"].link
        assert link is not None
        await eventually(lambda: link.has_ponged and link.loop.time() > link.opened + 1.4)
        await cp.calls("1", "Heartbeat")


async def test_a_fault_of_the_proxy_closes_one_connection_and_no_other(
    monkeypatch: Patch, caplog: Log
) -> None:
    """A bug that one charger's message finds is logged with its traceback; the process lives."""
    call = p.Router.charger_call

    def faulty(self: p.Router, message: p.Message, now: p.Instant) -> list[p.Decision]:
        if message.action == "DataTransfer":
            raise RuntimeError("a bug")
        return call(self, message, now)

    monkeypatch.setattr(p.Router, "charger_call", faulty)
    async with house() as (proxy, _, _), charger(proxy) as bad, charger(proxy, "CP2") as good:
        await bad.connection.send('[2,"1","DataTransfer",{"vendorId":"x"}]')
        await bad.closed()
        await good.calls("1", "Heartbeat")
    assert wires.has_traceback(caplog)


async def test_a_task_that_fails_is_reported_to_the_loop(monkeypatch: Patch) -> None:
    """A bug in a handshake, or where all deadlines are looked at, is seen, and ends nothing else."""
    reported, fails = list[str](), Mock(side_effect=RuntimeError("a bug"))
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    async with house() as (proxy, _, _), charger(proxy, "GOOD") as good:
        monkeypatch.setattr(p, "taken_offers", fails)
        async with visitor(proxy, request()) as guest:
            assert await guest.hears() == b""
        await eventually(lambda: reported == ["a bug"])
        monkeypatch.setattr(p.Journal, "tick", fails)
        await eventually(lambda: reported == ["a bug"] * 2)
        await good.calls("1", "Heartbeat")
