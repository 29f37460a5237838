"""Connections from the first to the last: greetings, redial, grace, takeover, the watchdog, faults."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

import ocpp_2w_proxy as p
from tests.play.kills import Play
from tests.play.peers import charger, cut, deaf, eventually, house, running, server
from tests.play.plays import Stage, StageLink
from tests.play.script import goes_as_told, plays_of
from tests.play.wires import at_the_door, open_connections, present, refused, request, smaller, visitor

PRIMARY, SECONDARY = p.Peer.PRIMARY, p.Peer.SECONDARY
SHORT = "ping_interval = 0.2\nping_timeout = 0.6\nwatchdog_interval = 0.1\nwatchdog_stale = 1"


def seconds_to_dial(stage: Stage, name: str, happening: Callable[[], object]) -> float:
    """Let something happen, and time pass until a server is dialled; return how long it was."""
    tasks: Any = stage.relay.tasks
    begun, tasks.started = stage.time, []
    happening()
    while f"CP1: {name}: dial" not in tasks.started:
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


GREETINGS = """
A new connection to the secondary gets the boot and each connector's last status first, under new ids.
    2 s, charger is Available 0, charger is Preparing, charger is Charging, primary takes, secondary takes,
    look, secondary leaves, secondary returns, secondary takes, look, 60 s
    => secondary: Status:Available Status:Preparing Status:Charging|Boot:M Status:Available Status:Charging|;
    charger: n n n||
A charger that boots itself within two seconds is not repeated; the statuses come behind its boot.
    charger leaves, secondary leaves, charger returns, secondary comes, 1 s, look, charger boots New,
    charger is Available, charger is Charging, secondary takes, 5 s, look, secondary leaves, secondary comes
    => secondary: |Boot:New Status:Available Status:Charging|Boot:New Status:Charging
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
An answer to a connection that is being closed still tells its session, whose start the charger repeats.
    charger starts 1 PRIM1, charger leaves, primary accepts, charger returns, charger starts 2 PRIM1
    => primary: Start; charger: 2:Accepted; sessions: 1
"""
STRANGERS = """
The boot of an unknown charger is made up after ten seconds; some hang up if they are called before theirs.
    charger returns, secondary comes, 9 s, look, 2 s => secondary: |Boot:CP1; charger: |; primary: |
The secondary gets Heartbeats at the interval that it has asked for, and the charger's own are the primary's.
    charger returns, secondary boots Accepted 60, secondary comes, charger boots, charger beats h, 59 s, look,
    2 s, look, 57 s, look, 2 s => secondary: Boot:M|Heartbeat||Heartbeat
A boot that the secondary leaves unanswered goes again.
    charger returns, secondary boots -, secondary comes, charger boots, 25 s, secondary boots Accepted 300,
    60 s => secondary: Boot:M Boot:M
"""


@pytest.mark.parametrize(("steps", "heard"), plays_of(GREETINGS))
def test_a_new_connection_starts_whole(play: Play, steps: str, heard: dict[str, str]) -> None:
    """With what the charger has said of itself."""
    goes_as_told(play(), f"all noted, {steps}", heard)


@pytest.mark.parametrize(("steps", "heard"), plays_of(STRANGERS))
def test_a_charger_that_is_new_here(play: Play, steps: str, heard: dict[str, str]) -> None:
    """Nothing is known of it yet."""
    goes_as_told(play(connect=False), f"all noted, {steps}", heard)


def test_what_a_charger_says_of_itself_is_remembered_up_to_a_bound() -> None:
    """All of it passes; the oldest is not repeated at the next connection, nor what is too long."""
    stage = Stage()
    for connector, length in ((0, 5_000), (1, 5_000), (2, 5_000), (3, 5_000), (4, 20_000)):
        told = {"connectorId": connector, "status": "Available", "info": "x" * length}
        stage.charger.calls("n", "StatusNotification", **told)
        stage.primary.answers("n")
        assert len(stage.delivers()) == 1
    stage.secondary.lost()
    stage.secondary_connects(accepts=False)
    stage.passes(2)
    assert [said.get("connectorId") for _, said in stage.delivers()] == [None, 1, 2, 3]


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
    """After 1 s, times 1.6, at most 60 s, each +-20 %; again 1 s after it has stood a minute."""
    stage = Stage()
    happening: Callable[[], object] = stage.secondary.lost
    for number in range(13):
        wanted = min(1.6**number, 60)
        assert 0.79 * wanted <= seconds_to_dial(stage, "secondary", happening) <= 1.21 * wanted + 0.5
        happening = partial(stage.cannot_dial, SECONDARY, p.DialError("no"))
    stage.secondary_connects(accepts=False)
    stage.passes(61)
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


def test_a_primary_that_is_back_in_time_is_given_a_moment_to_stand() -> None:
    """However short the grace is."""
    stage = Stage("primary_grace = 2", connect=False)
    stage.charger_connects()
    for _ in range(2):
        stage.primary.lost()
        stage.passes(1)
        stage.primary_connects()
        stage.passes(20)
        assert stage.charger.closed_with is None


# The charger goes, and comes again.


def test_an_answer_to_the_connection_before_a_takeover_still_tells_its_session() -> None:
    """Whatever else is said there goes nowhere; the charger repeats its start and hears its id."""
    stage = Stage()
    stage.starts("PRIM1", "1")
    old = stage.primary
    stage.charger_connects()
    old.says("gibberish")
    old.answers("other", x=1)
    old.answers("1", transactionId=7, idTagInfo={"status": "Accepted"})
    old.lost()
    assert stage.charger.hears() == []
    stage.starts("PRIM1", "2")
    assert stage.charger.hears()[0][2]["transactionId"] == 7


def test_a_takeover_replaces_the_old_connection_and_answers_what_it_left_unanswered() -> None:
    """Its end and its late words touch nothing of the new one; servers must not wait for its answers."""
    stage = Stage()
    old_charger, old_primary, secondary = stage.charger, stage.primary, stage.secondary
    for message_id in ("1", "2"):
        secondary.calls(message_id, "ClearCache")
    stage.charger_connects()
    assert None not in (old_charger.closed_with, old_primary.closed_with)
    assert secondary.closed_with is None
    assert [said[:3] for said in secondary.hears()] == [[4, "1", "GenericError"], [4, "2", "GenericError"]]
    old_charger.calls("late", "Heartbeat")
    old_charger.lost()
    old_primary.lost()
    stage.charger.calls("1", "Heartbeat")
    assert stage.primary.hears_call()[0] == "1"


def test_the_secondary_is_redialled_when_the_charger_comes_back_with_another_version() -> None:
    """Both servers must speak the charger's version."""
    stage = Stage()
    old = stage.secondary
    assert seconds_to_dial(stage, "secondary", partial(stage.charger_connects, "ocpp2.0.1")) <= 2.5
    assert old.closed_with is not None


def test_message_ids_are_not_reused_on_a_connection_that_outlives_the_charger() -> None:
    """Chargers count from 1 again; SteVe refuses an id that it has seen on the connection."""
    stage, used = Stage("secondary_replies = forward"), set()
    for _ in range(2):
        stage.charger.calls("1", "Authorize", idTag="SECO1")
        message_id, *_ = stage.secondary.hears_call()
        stage.secondary.answers(message_id, idTagInfo={"status": "Accepted"})
        assert stage.charger.hears() == [[3, "1", {"idTagInfo": {"status": "Accepted"}}]]
        used.add(message_id)
        stage.charger_connects()
    assert len(used) == 2


# Takeover over real websockets.


async def test_a_charger_that_connects_again_replaces_its_old_connection() -> None:
    """At once, without waiting for a dead one to close; the secondary's connection stays."""
    async with house() as (proxy, primary, secondary), charger(proxy) as first:
        await first.boots()
        await secondary.connection()
        async with deaf(first.connection), charger(proxy) as second:
            await second.calls("1", "Heartbeat")
            async with charger(proxy) as third:
                assert await second.closed() == 1001
                await third.calls("1", "Heartbeat")
        assert await first.closed() == 1001
        assert (len(primary.connections), len(secondary.connections)) == (3, 1)


async def test_a_newcomer_that_the_primary_refuses_does_not_touch_a_living_charger() -> None:
    """One answers a Ping; of one that never has, silence proves nothing."""
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
    is_refused_again: bool, monkeypatch: pytest.MonkeyPatch
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


async def test_a_probe_of_the_old_connection_does_not_close_a_newer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the old one is probed for a newcomer, another newcomer is let in."""
    smaller(monkeypatch, seconds_to_pong=1.5)
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
    async with house() as (proxy, primary, _), charger(proxy) as old:
        held, primary.may_answer = asyncio.Event(), asyncio.Event()
        primary.may_answer, at_once = held, primary.may_answer
        at_once.set()
        async with visitor(proxy, request()):
            await eventually(lambda: len(primary.requests) == 2)
            primary.may_answer = at_once
            if not hangs_up:
                async with charger(proxy) as new:
                    held.set()
                    await at_the_door(proxy, 0)
                    await new.calls("1", "Heartbeat")
        held.set()
        await at_the_door(proxy, 0)
        if hangs_up:
            await old.calls("1", "Heartbeat")


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
            await eventually(lambda: open_connections(primary) == 1)
            await new.calls("2", "Heartbeat")


async def test_a_charger_gets_in_though_a_delivery_holds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
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
        await eventually(lambda: present(proxy) == [])
        assert open_connections(primary) == 1
        primary.one_connection_per_charger = True
        async with charger(proxy, versions=["ocpp2.0.1"]):
            assert len(primary.connections) == 2


# The watchdog.


def test_all_peers_are_pinged_right_away_and_every_interval() -> None:
    """A charger that hangs up on silence does not."""
    stage = Stage()
    links = [stage.charger, stage.primary, stage.secondary]
    assert [link.pings for link in links] == [1, 1, 1]
    stage.passes(61)
    assert [link.pings for link in links] == [3, 3, 3]


def test_who_is_not_seen_is_closed() -> None:
    """A server after `ping_interval` and `ping_timeout`, 90 s; a charger after `watchdog_stale`, 500 s."""
    stage = Stage()
    charger, primary, secondary = stage.charger, stage.primary, stage.secondary
    looks(stage, 0, charger, primary, secondary)
    assert looks(stage, 89, charger, primary) == []
    assert looks(stage, 2, charger, primary) == [secondary]
    assert looks(stage, 499, primary) == [secondary]
    assert looks(stage, 2, primary) == [charger, secondary]


def test_a_charger_that_never_answers_pings_has_three_heartbeat_intervals() -> None:
    """Some firmwares do not know Pongs, and send a Heartbeat an hour."""
    stage = Stage(connect=False)
    stage.charger_connects()
    stage.charger.has_ponged = False
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    stage.primary.answers("b", status="Accepted", currentTime="t", interval=3600)
    assert looks(stage, 10_000, stage.primary) == []
    assert looks(stage, 1_000, stage.primary) == [stage.charger]


# Faults, over real websockets.


async def test_a_secondary_that_hangs_in_its_handshake_delays_nothing() -> None:
    """It accepts the TCP connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with server() as primary:
            ini = f"[ext-server]\nserver = {primary.url}\nsecondary_server = ws://127.0.0.1:{port}"
            async with running(ini) as proxy, charger(proxy) as cp:
                assert (await cp.boots())["status"] == "Accepted"


@pytest.mark.parametrize("payload", [b"\x00\x01", "\ud800".encode("utf-8", "surrogatepass"), b"x" * 3000])
async def test_an_unfit_frame_closes_that_connection_alone(payload: bytes) -> None:
    """Binary 1003, badly encoded 1007, oversized 1009; the others notice nothing."""
    async with house(host="max_size = 2048") as (proxy, _, secondary), charger(proxy) as cp:
        await cp.boots()
        connection = await secondary.connection()
        await connection.send(payload, text=payload[:1] != b"\x00")
        await connection.wait_closed()
        assert connection.close_code == {0: 1003, 0xED: 1007, ord("x"): 1009}[payload[0]]
        await cp.calls("1", "Heartbeat")
        await secondary.connection(1)


@pytest.mark.parametrize("way", ["close", "cut"])
async def test_a_primary_that_comes_back_within_its_grace_keeps_the_charger(way: str) -> None:
    """Calls wait for it in order."""
    async with house() as (proxy, primary, _), charger(proxy) as cp:
        await cp.boots()
        link = proxy.relays["CP1"].outboxes[p.Peer.PRIMARY].link
        assert link is not None
        if way == "cut":
            cut(primary.connections[0])
        else:
            await primary.connections[0].close(1012)
        await link.ended
        await cp.calls("1", "Heartbeat")
        assert len(primary.connections) == 2
        assert primary.heard.actions() == ["BootNotification", "BootNotification", "Heartbeat"]


@pytest.mark.parametrize("way", ["close", "cut"])
async def test_a_charger_that_goes_takes_its_connections_with_it(way: str) -> None:
    """Nothing of it is left, however it went."""
    async with house() as (proxy, primary, secondary):
        async with charger(proxy) as cp:
            await cp.boots()
            await secondary.heard.call("BootNotification")
            if way == "cut":
                cut(cp.connection)
            else:
                await cp.connection.close()
            for fake in (primary, secondary):
                connection = await fake.connection()
                await asyncio.wait_for(connection.wait_closed(), 5)
                assert connection.close_code == 1001
        await eventually(lambda: proxy.relays == {})


async def test_the_watchdog_looks_at_a_few_chargers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at all of them: those that are gone are let go, the others are pinged."""
    monkeypatch.setattr(p, "RELAYS_AT_ONCE", 1)
    monkeypatch.setattr(p, "TICK_SECONDS", 0.01)
    async with house(host="ping_interval = 0.1") as (proxy, *_):
        async with charger(proxy, "STAYS") as stays:
            for name in ("A", "B", "C"):
                async with charger(proxy, name):
                    pass
            await eventually(lambda: list(proxy.relays) == ["STAYS"])
            link = proxy.relays["STAYS"].link
            assert link is not None
            pinged = link.ping_at
            await eventually(lambda: link.ping_at > pinged)
            await stays.calls("h", "Heartbeat")


async def test_a_peer_that_is_not_seen_is_cut_off_and_slows_nobody() -> None:
    """It neither sends nor answers Pings."""
    async with house(host=SHORT) as (proxy, _, secondary):
        async with charger(proxy) as cp, deaf(await secondary.connection()):
            await cp.connection.ping()
            await secondary.connection(1)
            await cp.calls("1", "Heartbeat")
            async with deaf(cp.connection):
                await eventually(lambda: "CP1" not in proxy.relays)


async def test_a_quiet_charger_that_answers_pings_is_never_closed() -> None:
    """A Pong is a sign of life."""
    async with house(host=SHORT) as (proxy, _, _), charger(proxy) as cp:
        link = proxy.relays["CP1"].link
        assert link is not None
        await eventually(lambda: link.has_ponged)
        opened = link.opened
        await eventually(lambda: link.loop.time() - opened > 1.5)
        assert link.is_open
        await cp.calls("1", "Heartbeat")


async def test_a_fault_of_the_proxy_closes_one_connection_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    assert any(record.exc_info for record in caplog.records)


async def test_a_task_that_fails_is_reported_to_the_loop() -> None:
    """A bug in a dial or a handshake is seen, and ends nothing else."""
    reported: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["message"]))

    async def fails() -> None:
        raise RuntimeError("a bug")

    tasks = p.Tasks()
    await asyncio.wait([tasks.start(fails(), "CP1: primary: dial")])
    await eventually(lambda: not tasks)
    assert reported == ["Task exception was never retrieved"]


async def test_stopping_tells_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever restarts the proxy has to know which sessions did not get through."""
    async with house() as (proxy, _, secondary), charger(proxy) as cp:
        await secondary.stop()
        await cp.starts("SECO1")
        await proxy.stop()
    told = {record.getMessage() for record in caplog.records if "lost" in record.getMessage()}
    assert told == {"CP1: 1 stored Calls are lost"}
