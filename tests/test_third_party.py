"""The PyPI package `ocpp`, which checks every message by its schema, as the charger and as both servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import pytest
from ocpp import routing, v16, v201  # type: ignore[import-untyped]
from ocpp.charge_point import ChargePoint, remove_nones, serialize_as_dict  # type: ignore[import-untyped]
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.play.peers import PATIENCE, FakeServer, eventually, running

NOW = "2026-01-01T00:00:00Z"

Said = tuple[str, dict[str, Any]]  # Action and payload, with the package's names.
Handler = Callable[..., Any]


@dataclass
class Visit:
    """A car's visit, and what the charger has said of it."""

    badge: str
    connector: int
    transaction: Any = None  # As the charger knows it.
    said: list[Said] = field(default_factory=list)
    remote_start_id: int | None = None


def accepts(action: str) -> Callable[[Handler], Handler]:
    """Let a method answer the Calls of this Action; they are valid by their schema, and are noted."""

    def decorate(handler: Handler) -> Handler:
        @routing.on(action)  # type: ignore[untyped-decorator]
        @wraps(handler)
        def noting(self: Peer, **payload: Any) -> Any:
            self.noted.append((action, payload))
            return handler(self, **payload)

        return noting  # type: ignore[no-any-return]

    return decorate


class Peer(ChargePoint):  # type: ignore[misc]
    """Either side of a connection: notes the Calls that arrive, and those that it accepts."""

    def __init__(self, charger_id: str, connection: Any, first_transaction: int = 1) -> None:
        super().__init__(charger_id, connection, response_timeout=PATIENCE)
        self.arrived: list[str] = []  # The Actions of all Calls.
        self.noted: list[Said] = []  # The Calls that are valid;
        self.accepted: list[Said] = []  # they are accepted once they are answered.
        self.next_transaction = first_transaction
        self.stoppable: set[Any] = set()  # A charger stops these transactions when it is asked to.

    async def route_message(self, raw_msg: str) -> None:
        message = json.loads(raw_msg)
        if message[0] == 2:
            self.arrived.append(message[2])
        await super().route_message(raw_msg)
        self.accepted += self.noted
        self.noted = []

    async def says(self, call: Any, said: list[Said] | None = None, message_id: str | None = None) -> Any:
        """Call the other side; return its answer, which is valid by its schema."""
        if said is not None:
            said.append((type(call).__name__, remove_nones(serialize_as_dict(call))))
        return await self.call(call, suppress=False, unique_id=message_id)

    async def has_accepted(self, count: int) -> list[Said]:
        """Return what it has accepted, once that is so many Calls."""
        await eventually(lambda: len(self.accepted) >= count)
        return self.accepted


# OCPP 1.6.


class Station16(Peer, v16.ChargePoint):  # type: ignore[misc]
    """A charger."""

    async def boots(self, said: list[Said]) -> str:
        call = v16.call.BootNotification(charge_point_model="M", charge_point_vendor="V")
        status: str = (await self.says(call, said)).status
        return status

    async def shows(self, connector: int, said: list[Said]) -> None:
        await self.says(v16.call.StatusNotification(connector, "NoError", "Available"), said)

    async def starts(self, visit: Visit) -> None:
        answer = await self.says(v16.call.Authorize(visit.badge), visit.said)
        assert answer.id_tag_info["status"] == "Accepted"
        call = v16.call.StartTransaction(visit.connector, visit.badge, 100 * visit.connector, NOW)
        answer = await self.says(call, visit.said)
        assert answer.id_tag_info["status"] == "Accepted"
        visit.transaction = answer.transaction_id

    async def meters(self, visit: Visit) -> None:
        sample = {"value": f"{visit.connector}.5", "measurand": "Energy.Active.Import.Register"}
        values = [{"timestamp": NOW, "sampled_value": [sample]}]
        await self.says(v16.call.MeterValues(visit.connector, values, visit.transaction), visit.said)

    async def stops(self, visit: Visit) -> None:
        call = v16.call.StopTransaction(900, NOW, visit.transaction, "Local", visit.badge)
        await self.says(call, visit.said)

    @accepts("RemoteStartTransaction")
    def starts_remotely(self, **_: Any) -> Any:
        return v16.call_result.RemoteStartTransaction("Accepted")

    @accepts("RemoteStopTransaction")
    def stops_remotely(self, transaction_id: int) -> Any:
        is_mine = transaction_id in self.stoppable
        return v16.call_result.RemoteStopTransaction("Accepted" if is_mine else "Rejected")

    @accepts("GetConfiguration")
    def tells_configuration(self, key: list[str]) -> Any:
        found = [{"key": name, "readonly": False, "value": f"{name} of this charger"} for name in key]
        return v16.call_result.GetConfiguration(configuration_key=found)

    @accepts("ChangeConfiguration")
    def changes_configuration(self, key: str, **_: Any) -> Any:
        return v16.call_result.ChangeConfiguration("NotSupported" if key == "Odd" else "Accepted")


class Central16(Peer, v16.ChargePoint):  # type: ignore[misc]
    """A server's side of a charger."""

    @accepts("BootNotification")
    def welcomes(self, **_: Any) -> Any:
        return v16.call_result.BootNotification(NOW, 300, "Accepted")

    @accepts("StatusNotification")
    def takes_status(self, **_: Any) -> Any:
        return v16.call_result.StatusNotification()

    @accepts("Authorize")
    def authorizes(self, **_: Any) -> Any:
        return v16.call_result.Authorize({"status": "Accepted"})

    @accepts("StartTransaction")
    def begins(self, **_: Any) -> Any:
        self.next_transaction += 1
        return v16.call_result.StartTransaction(self.next_transaction - 1, {"status": "Accepted"})

    @accepts("MeterValues")
    def takes_values(self, **_: Any) -> Any:
        return v16.call_result.MeterValues()

    @accepts("StopTransaction")
    def ends(self, **_: Any) -> Any:
        return v16.call_result.StopTransaction({"status": "Accepted"})

    async def asks_for(self, name: str, message_id: str) -> str:
        answer = await self.says(v16.call.GetConfiguration(key=[name]), message_id=message_id)
        (found,) = answer.configuration_key
        value: str = found["value"]
        return value

    async def asks_to_start(self, visit: Visit) -> str:
        call = v16.call.RemoteStartTransaction(visit.badge, visit.connector)
        status: str = (await self.says(call)).status
        return status

    async def asks_to_stop(self, transaction: int, message_id: str | None = None) -> str:
        call = v16.call.RemoteStopTransaction(transaction)
        status: str = (await self.says(call, message_id=message_id)).status
        return status

    async def changes(self, name: str, value: str, message_id: str) -> str:
        call = v16.call.ChangeConfiguration(name, value)
        status: str = (await self.says(call, message_id=message_id)).status
        return status


# OCPP 2.0.1.


def token(badge: str) -> dict[str, Any]:
    return {"id_token": badge, "type": "ISO14443"}


class Station201(Peer, v201.ChargePoint):  # type: ignore[misc]
    """A charger."""

    async def boots(self, said: list[Said]) -> str:
        call = v201.call.BootNotification({"model": "M", "vendor_name": "V"}, "PowerUp")
        status: str = (await self.says(call, said)).status
        return status

    async def shows(self, connector: int, said: list[Said]) -> None:
        await self.says(v201.call.StatusNotification(NOW, "Available", connector, 1), said)

    async def event(self, visit: Visit, kind: str, trigger: str, has_badge: bool, **info: Any) -> None:
        """Tell of a visit; where a badge is shown it must be accepted."""
        number = sum(action == "TransactionEvent" for action, _ in visit.said)
        call = v201.call.TransactionEvent(
            event_type=kind,
            timestamp=NOW,
            trigger_reason=trigger,
            seq_no=number,
            transaction_info={"transaction_id": visit.transaction, **info},
            evse={"id": visit.connector, "connector_id": 1} if number == 0 else None,
            id_token=token(visit.badge) if has_badge else None,
        )
        answer = await self.says(call, visit.said)
        assert not has_badge or answer.id_token_info["status"] == "Accepted"

    async def authorizes(self, visit: Visit) -> None:
        answer = await self.says(v201.call.Authorize(token(visit.badge)), visit.said)
        assert answer.id_token_info["status"] == "Accepted"
        visit.transaction = visit.transaction or f"tx-{visit.badge}-{visit.connector}"

    async def starts(self, visit: Visit) -> None:
        await self.authorizes(visit)
        info = {"remote_start_id": visit.remote_start_id} if visit.remote_start_id else {}
        trigger = "RemoteStart" if visit.remote_start_id else "Authorized"
        await self.event(visit, "Started", trigger, has_badge=True, **info)

    async def is_plugged_in(self, visit: Visit) -> None:
        visit.transaction = f"cable-{visit.connector}"
        await self.event(visit, "Started", "CablePluggedIn", has_badge=False, charging_state="EVConnected")

    async def is_shown_the_badge(self, visit: Visit) -> None:
        await self.authorizes(visit)
        await self.event(visit, "Updated", "Authorized", has_badge=True)

    async def meters(self, visit: Visit) -> None:
        await self.event(visit, "Updated", "ChargingStateChanged", has_badge=False, charging_state="Charging")

    async def stops(self, visit: Visit) -> None:
        await self.event(visit, "Ended", "StopAuthorized", has_badge=True, stopped_reason="Local")

    @accepts("RequestStartTransaction")
    def starts_remotely(self, **_: Any) -> Any:
        return v201.call_result.RequestStartTransaction("Accepted")

    @accepts("RequestStopTransaction")
    def stops_remotely(self, transaction_id: str) -> Any:
        is_mine = transaction_id in self.stoppable
        return v201.call_result.RequestStopTransaction("Accepted" if is_mine else "Rejected")

    @accepts("GetVariables")
    def tells_variables(self, get_variable_data: list[dict[str, Any]]) -> Any:
        return v201.call_result.GetVariables(
            [
                {
                    **asked,
                    "attribute_status": "Accepted",
                    "attribute_value": f"{asked['variable']['name']} of this charger",
                }
                for asked in get_variable_data
            ]
        )


class Central201(Peer, v201.ChargePoint):  # type: ignore[misc]
    """A server's side of a charger."""

    @accepts("BootNotification")
    def welcomes(self, **_: Any) -> Any:
        return v201.call_result.BootNotification(NOW, 300, "Accepted")

    @accepts("StatusNotification")
    def takes_status(self, **_: Any) -> Any:
        return v201.call_result.StatusNotification()

    @accepts("Authorize")
    def authorizes(self, **_: Any) -> Any:
        return v201.call_result.Authorize({"status": "Accepted"})

    @accepts("TransactionEvent")
    def takes_event(self, **payload: Any) -> Any:
        verdict = {"status": "Accepted"} if "id_token" in payload else None
        return v201.call_result.TransactionEvent(id_token_info=verdict)

    async def asks_for(self, name: str, message_id: str) -> str:
        asked = {"component": {"name": "Controller"}, "variable": {"name": name}}
        answer = await self.says(v201.call.GetVariables([asked]), message_id=message_id)
        (found,) = answer.get_variable_result
        value: str = found["attribute_value"]
        return value

    async def asks_to_start(self, visit: Visit) -> str:
        visit.remote_start_id = 1
        call = v201.call.RequestStartTransaction(token(visit.badge), 1, visit.connector)
        status: str = (await self.says(call)).status
        return status

    async def asks_to_stop(self, transaction: str, message_id: str | None = None) -> str:
        call = v201.call.RequestStopTransaction(transaction)
        status: str = (await self.says(call, message_id=message_id)).status
        return status


# The stage.


class CentralServer(FakeServer):
    """A server whose side of the charger is one of the package."""

    def __init__(self, kind: type[Peer], version: str, first_transaction: int) -> None:
        super().__init__(versions=[Subprotocol(version)])
        self.kind = kind
        self.first_transaction = first_transaction
        self.side: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def _talk(self, connection: ServerConnection) -> None:
        side = self.kind("CP1", connection, self.first_transaction)
        self.side.set_result(side)
        with suppress(ConnectionClosed):
            await side.start()


@dataclass
class Cast:
    """Who is on the stage: the charger has booted and shown its two connectors."""

    station: Any
    primary: Any
    secondary: Any
    greeting: list[Said]  # What the charger has said so far.


KINDS: dict[str, tuple[type[Peer], type[Peer]]] = {
    "ocpp1.6": (Station16, Central16),
    "ocpp2.0.1": (Station201, Central201),
}


@asynccontextmanager
async def central(version: str, first_transaction: int) -> AsyncIterator[CentralServer]:
    """A server that listens."""
    server = CentralServer(KINDS[version][1], version, first_transaction)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def stage(version: str, first_transactions: tuple[int, int] = (1, 1)) -> AsyncIterator[Cast]:
    """A charger, its proxy and two servers; at the end nobody may have refused any Call."""
    first, second = first_transactions
    async with central(version, first) as primary, central(version, second) as secondary:
        ini = f"""
[ext-server]
server = {primary.url}
secondary_server = {secondary.url}
primary_rfid = PRIM*
secondary_rfid = SECO*
"""
        async with (
            running(ini) as proxy,
            connect(
                f"ws://127.0.0.1:{proxy.port}/CP1", subprotocols=[Subprotocol(version)], close_timeout=0.5
            ) as connection,
            asyncio.timeout(3 * PATIENCE),
        ):
            station = KINDS[version][0]("CP1", connection)
            listener = asyncio.create_task(station.start())
            cast = Cast(station, await primary.side, await secondary.side, [])
            assert await cast.station.boots(cast.greeting) == "Accepted"
            for connector in (1, 2):
                await cast.station.shows(connector, cast.greeting)
            yield cast
            for peer in (cast.station, cast.primary, cast.secondary):
                assert [action for action, _ in await peer.has_accepted(len(peer.arrived))] == peer.arrived
            await connection.close()
            with suppress(ConnectionClosed):
                await listener


def renamed(said: list[Said], transaction: Any) -> list[Said]:
    """Return the same Calls with the transaction as a server knows it; OCPP 2.0.1 has one name for it."""
    return [
        (action, {**payload, "transaction_id": transaction} if "transaction_id" in payload else payload)
        for action, payload in said
    ]


async def sessions_heard(cast: Cast, by_primary: list[Said], by_secondary: list[Said]) -> None:
    """Each server must have heard the greeting and exactly this, in order, before a last word to both."""
    last_word: list[Said] = []
    for peer, said in ((cast.primary, by_primary), (cast.secondary, by_secondary)):
        await peer.has_accepted(len(cast.greeting + said))
    await cast.station.shows(3, last_word)
    for peer, said in ((cast.primary, by_primary), (cast.secondary, by_secondary)):
        wanted = cast.greeting + said + last_word
        assert await peer.has_accepted(len(wanted)) == wanted


async def both_start(cast: Cast) -> tuple[Visit, Visit]:
    """Start a session of the primary at connector 1 and one of the secondary at connector 2."""
    home, work = Visit("PRIM1", 1), Visit("SECO1", 2)
    for visit in (home, work):
        await cast.station.starts(visit)
    return home, work


versions = pytest.mark.parametrize("version", list(KINDS))


# Sessions.


@versions
@pytest.mark.parametrize(("badge", "is_secondarys"), [("PRIM1", False), ("SECO1", True)])
async def test_a_session_is_heard_by_its_owner_alone(version: str, badge: str, is_secondarys: bool) -> None:
    """Boot and statuses are heard by both servers, the session whole and in order by the badge's."""
    async with stage(version) as cast:
        visit = Visit(badge, 1)
        await cast.station.starts(visit)
        await cast.station.meters(visit)
        await cast.station.stops(visit)
        said = renamed(visit.said, 1)
        await sessions_heard(cast, *(([], said) if is_secondarys else (said, [])))


@versions
async def test_two_sessions_at_once_stay_apart(version: str) -> None:
    """Each server hears its own session with its own transaction id, though both hand out the same."""
    async with stage(version) as cast:
        home, work = await both_start(cast)
        assert home.transaction != work.transaction
        for visit in (home, work, home, work):
            await cast.station.meters(visit)
        await cast.station.stops(work)
        await cast.station.stops(home)
        await sessions_heard(cast, renamed(home.said, 1), renamed(work.said, 1))


async def test_the_primarys_transaction_id_reaches_the_charger_unchanged() -> None:
    """In OCPP 1.6 the server picks it; a stored session has an id of the proxy's own range."""
    async with stage("ocpp1.6", (41, 41)) as cast:
        home, work = await both_start(cast)
        assert home.transaction == 41
        assert 2_000_000_000 <= work.transaction < 2**31


@versions
async def test_sessions_one_after_the_other_at_one_connector_change_sides(version: str) -> None:
    """Guest, employee and guest again at the same connector: three sessions, two servers."""
    async with stage(version) as cast:
        visits = [Visit("PRIM1", 1), Visit("SECO1", 1), Visit("PRIM2", 1)]
        for visit in visits:
            await cast.station.starts(visit)
            await cast.station.meters(visit)
            await cast.station.stops(visit)
        first, second, third = visits
        guests = renamed(first.said, 1) + renamed(third.said, 2)
        await sessions_heard(cast, guests, renamed(second.said, 1))


async def test_cable_first_the_badge_decides_later() -> None:
    """In OCPP 2.0.1 the events before the badge reach its server, too, and first."""
    async with stage("ocpp2.0.1") as cast:
        home, work = Visit("PRIM1", 1), Visit("SECO1", 2)
        for visit in (work, home):
            await cast.station.is_plugged_in(visit)
        for visit in (work, home):
            await cast.station.is_shown_the_badge(visit)
        for visit in (home, work):
            await cast.station.meters(visit)
            await cast.station.stops(visit)
        await sessions_heard(cast, authorized_first(home.said), authorized_first(work.said))


def authorized_first(said: list[Said]) -> list[Said]:
    """Return the Calls with the Authorize first: events are kept until a badge settles their owner."""
    return sorted(said, key=lambda call: call[0] != "Authorize")


# Calls of the servers.


@versions
async def test_both_servers_ask_at_once_and_under_one_message_id(version: str) -> None:
    """Each gets the answer to its own question."""
    async with stage(version) as cast:
        answers = await asyncio.gather(
            cast.primary.asks_for("Alpha", "same"), cast.secondary.asks_for("Beta", "same")
        )
        assert list(answers) == ["Alpha of this charger", "Beta of this charger"]
        assert len(await cast.station.has_accepted(2)) == 2


async def test_both_servers_change_the_configuration_at_once() -> None:
    """In OCPP 1.6, too, each gets the answer to its own ChangeConfiguration."""
    async with stage("ocpp1.6") as cast:
        answers = await asyncio.gather(
            cast.primary.changes("MeterValueSampleInterval", "60", "same"),
            cast.secondary.changes("Odd", "1", "same"),
        )
        assert list(answers) == ["Accepted", "NotSupported"]
        changed = {payload["key"]: payload["value"] for _, payload in await cast.station.has_accepted(2)}
        assert changed == {"MeterValueSampleInterval": "60", "Odd": "1"}


@versions
async def test_both_servers_stop_their_own_session_at_once(version: str) -> None:
    """By the id that each of them knows; the charger hears its own, and each hears its verdict."""
    async with stage(version) as cast:
        home, work = await both_start(cast)
        is_translated = version == "ocpp1.6"
        await cast.secondary.has_accepted(len(cast.greeting + work.said))
        cast.station.stoppable = {work.transaction}
        answers = await asyncio.gather(
            cast.primary.asks_to_stop(1 if is_translated else home.transaction, "same"),
            cast.secondary.asks_to_stop(1 if is_translated else work.transaction, "same"),
        )
        assert list(answers) == ["Rejected", "Accepted"]
        heard = [payload["transaction_id"] for _, payload in await cast.station.has_accepted(2)]
        assert sorted(heard) == sorted([home.transaction, work.transaction])
        await cast.station.stops(work)
        await sessions_heard(cast, home.said, renamed(work.said, 1))


@versions
async def test_the_secondary_cannot_stop_the_primarys_session(version: str) -> None:
    """It is Rejected, and the charger never hears of it; nor of a transaction that nobody knows."""
    async with stage(version, (41, 1)) as cast:
        home, work = await both_start(cast)
        await cast.secondary.has_accepted(len(cast.greeting + work.said))
        cast.station.stoppable = {home.transaction, work.transaction}
        nobodys = 4711 if version == "ocpp1.6" else "nobody's"
        assert await cast.secondary.asks_to_stop(home.transaction) == "Rejected"
        assert await cast.secondary.asks_to_stop(nobodys) == "Rejected"
        assert cast.station.arrived == []
        assert await cast.primary.asks_to_stop(home.transaction) == "Accepted"
        assert len(cast.station.arrived) == 1


@versions
async def test_a_session_that_the_secondary_starts_remotely_is_the_secondarys(version: str) -> None:
    """Whatever the lists say of its badge; that session alone, the same badge is the primary's again."""
    async with stage(version) as cast:
        visit, later = Visit("ONE-TIME-4711", 2), Visit("ONE-TIME-4711", 1)
        assert await cast.secondary.asks_to_start(visit) == "Accepted"
        for each in (visit, later):
            await cast.station.starts(each)
            await cast.station.meters(each)
            await cast.station.stops(each)
        await sessions_heard(cast, renamed(later.said, 1), renamed(visit.said, 1))
