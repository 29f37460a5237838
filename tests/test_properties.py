"""
A machine that plays at random with one charger and its two servers, and what must hold whatever they do.

Invariants: a Call of the charger gets at most one answer; an answer reaches only the server that asked,
once, under its own id; at most one Call is outstanding at the charger; a transaction has one owner for
life; what a server gets belongs to it; forwarded text is the text received but for translated ids; a proxy
that is killed comes back as it was; tables are empty at rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ocpp_2w_proxy as p
from tests.play.kills import save
from tests.play.plays import Stage, StageLink

PEERS = st.sampled_from(["primary", "secondary"])
BADGES = st.sampled_from(["PRIM1", "PRIM2", "SECO1", "SECO2"])
CONNECTORS = st.integers(1, 2)
# Ids that collide: with each other, with the proxy's range, with what is not usable.
SERVER_IDS = st.sampled_from([1, 2, 7, 0, -1, p.FIRST_PROXY_ID, p.FIRST_PROXY_ID + 1])
MESSAGE_IDS = st.sampled_from(["1", "2", "3", "4"])


# A reading, or a start, changes them.
LATELY = {"touched", "meter_stop", "refused", "is_refused"}


def columns(row: p.Row) -> dict[str, Any]:
    """Return what the file is to hold of a row."""
    names = [name for name in p.COLUMNS[type(row)] if name not in LATELY]
    values = {name: getattr(row, name) for name in names}
    return {k: v.number if isinstance(v, p.Session) else p.to_column(v) for k, v in values.items()}


def remembered(memory: p.Memory) -> list[Any]:
    """Return all that is to survive of a charger's Memory."""
    sessions = sorted((s for s in memory.sessions.values() if s.number), key=lambda row: row.number)
    calls = sorted((*memory.stored, *memory.refused), key=lambda row: row.number)  # The refused wait again.
    return [columns(memory), *map(columns, sessions), *map(columns, calls)]


class OnePeerEach(RuleBasedStateMachine):
    """The charger, the servers and the world between them take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0
        self.charger_calls: dict[str, int] = {}  # Message id to answers heard.
        self.owners: dict[Any, p.Peer] = {}  # The charger's transaction id to its first owner.
        self.server_calls: dict[tuple[str, str], list[str]] = {}  # Answers that are due, by server and id.
        self.at_charger: list[tuple[str, str]] = []  # Calls that the charger has to answer.
        self.badge_of: dict[str, str] = {}  # StartTransaction texts by timestamp.
        self.unanswered: dict[str, list[list[Any]]] = {"primary": [], "secondary": []}

    @initialize(forward=st.booleans())
    def begin(self, forward: bool) -> None:
        more = "secondary_replies = forward" if forward else ""
        self.folder = TemporaryDirectory()
        self.stage = Stage(more, state=Path(self.folder.name, "state.db"), connect=False)
        self.come_alive()
        self.listen()

    def come_alive(self) -> None:
        """Connect everybody to a proxy that has just been started."""
        for name in ("primary", "secondary"):
            self.forget(name)
        self.at_charger = []
        self.stage.charger_connects()
        self.stage.secondary_connects(accepts=False)

    def server(self, name: str) -> StageLink:
        link: StageLink = getattr(self.stage, name)
        return link

    def new_id(self) -> str:
        """Return the id of a Call that the charger is about to send."""
        self.counter += 1
        self.charger_calls[f"c{self.counter}"] = 0
        return f"c{self.counter}"

    def listen(self) -> None:
        """Let everybody hear what there is, and check it."""
        for message in self.stage.charger.hears():
            if message[0] == 2:
                self.at_charger.append((message[1], message[2]))
            else:
                assert message[1] in self.charger_calls, "an answer that the charger did not ask for"
                self.charger_calls[message[1]] += 1
                assert self.charger_calls[message[1]] == 1, "a second answer to one Call"
        for name in ("primary", "secondary"):
            for message in self.server(name).hears():
                if message[0] == 2:
                    self.check_owner(name, message)
                    self.unanswered[name].append(message)
                else:
                    due = self.server_calls.get((name, message[1]), [])
                    assert due, f"{name} hears an answer that it did not ask for"
                    due.pop()

    def check_owner(self, name: str, message: list[Any]) -> None:
        """What names a badge or a session reaches its owner alone."""
        _, _, action, payload = message
        badge = payload.get("idTag") if action in ("Authorize", "StartTransaction") else None
        if badge:
            assert badge[:4].upper() == name[:4].upper()
        if action in ("MeterValues", "StopTransaction") and "marker" in payload:
            assert self.badge_of[payload["marker"]][:4] == name[:4].upper()

    @rule(badge=BADGES)
    def charger_authorizes(self, badge: str) -> None:
        message_id = self.new_id()
        self.stage.charger.calls(message_id, "Authorize", idTag=badge)

    @rule()
    def charger_boots(self) -> None:
        message_id = self.new_id()
        payload = {"chargePointVendor": "V", "chargePointModel": message_id}
        self.stage.charger.calls(message_id, "BootNotification", **payload)

    @rule()
    def charger_beats(self) -> None:
        message_id = self.new_id()
        text = f'[2,"{message_id}","Heartbeat",  {{ }}]'
        before = len(self.stage.primary.texts)
        self.stage.charger.says(text)
        for sent in self.stage.primary.texts[before:]:
            if f'"{message_id}"' in sent:
                assert sent == text, "forwarded text is not the text received"

    @rule(badge=BADGES, connector=CONNECTORS)
    def charger_starts(self, badge: str, connector: int) -> None:
        message_id = self.new_id()
        self.badge_of[message_id] = badge
        payload = {"connectorId": connector, "idTag": badge, "meterStart": 0, "timestamp": message_id}
        self.stage.charger.calls(message_id, "StartTransaction", **payload)

    @rule(data=st.data())
    def charger_repeats_a_start(self, data: st.DataObject) -> None:
        sessions = [s for s in self.stage.memory.sessions.values() if s.ended is None and s.start]
        opened = [s for s in sessions if not (s.is_used)]
        if opened:
            connector, badge, meter, timestamp = json.loads(data.draw(st.sampled_from(opened)).start)
            message_id = self.new_id()
            payload = {"connectorId": connector, "idTag": badge, "meterStart": meter, "timestamp": timestamp}
            before = len(self.stage.memory.sessions)
            self.stage.charger.calls(message_id, "StartTransaction", **payload)
            assert len(self.stage.memory.sessions) == before, "a repeated start began a session"

    @rule(data=st.data(), stops=st.booleans())
    def charger_reports(self, data: st.DataObject, stops: bool) -> None:
        named = [s for s in self.stage.memory.sessions.values() if s.transaction_id is not None and s.is_told]
        if named:
            session = data.draw(st.sampled_from(named))
            message_id = self.new_id()
            marker = json.loads(session.start)[3]
            action = "StopTransaction" if stops else "MeterValues"
            payload = {"transactionId": session.transaction_id, "connectorId": 1, "marker": marker}
            self.stage.charger.calls(message_id, action, **payload)

    @precondition(lambda self: bool(self.at_charger))
    @rule(errs=st.booleans())
    def charger_answers(self, errs: bool) -> None:
        message_id, _ = self.at_charger.pop(0)
        if errs:
            self.stage.charger.errs(message_id)
        else:
            self.stage.charger.answers(message_id, status="Accepted")

    @rule()
    def charger_answers_nobody(self) -> None:
        self.stage.charger.answers("nobody")

    @rule(name=PEERS, message_id=MESSAGE_IDS, server_id=SERVER_IDS, data=st.data())
    def server_calls_charger(self, name: str, message_id: str, server_id: int, data: st.DataObject) -> None:
        if self.server(name).is_open:
            badge = f"{name[:4].upper()}1"
            calls: dict[str, dict[str, Any]] = {
                "RemoteStopTransaction": {"transactionId": server_id},
                "RemoteStartTransaction": {"idTag": badge},
                "ReserveNow": {"idTag": badge, "reservationId": 5, "expiryDate": "x", "connectorId": 1},
                "CancelReservation": {"reservationId": 5},
                "GetDiagnostics": {},
                "GetLog": {"requestId": 3},
                "ClearCache": {},
            }
            action = data.draw(st.sampled_from(sorted(calls)))
            self.server_calls.setdefault((name, message_id), []).append(action)
            self.server(name).calls(message_id, action, **calls[action])

    @rule(connector=CONNECTORS, status=st.sampled_from(["Available", "Charging"]))
    def charger_tells_its_status(self, connector: int, status: str) -> None:
        message_id = self.new_id()
        payload = {"connectorId": connector, "errorCode": "NoError", "status": status}
        self.stage.charger.calls(message_id, "StatusNotification", **payload)

    @rule(name=PEERS, server_id=SERVER_IDS, errs=st.booleans())
    def server_answers(self, name: str, server_id: int, errs: bool) -> None:
        if self.unanswered[name] and self.server(name).is_open:
            _, message_id, action, _ = self.unanswered[name].pop(0)
            if errs and action != "BootNotification":
                self.server(name).errs(message_id)
                return
            answer: dict[str, Any] = {"idTagInfo": {"status": "Accepted"}, "status": "Accepted"}
            if action == "StartTransaction":
                answer["transactionId"] = server_id
            self.server(name).answers(message_id, **answer)

    @rule(name=PEERS)
    def server_answers_nobody(self, name: str) -> None:
        self.server(name).answers("nobody", status="Accepted")

    @rule(seconds=st.sampled_from([1, 6, 12, 35]))
    def time_passes(self, seconds: int) -> None:
        self.stage.passes(seconds)

    @rule(name=PEERS)
    def server_goes_and_comes(self, name: str) -> None:
        if self.server(name).is_open and self.stage.charger.is_open:
            self.listen()
            self.server(name).lost()
            self.forget(name)
            if name == "primary":
                self.stage.primary_connects()
            else:
                self.stage.secondary_connects(accepts=False)

    def forget(self, name: str) -> None:
        """A connection has ended with all that was due on it."""
        self.unanswered[name] = []
        self.server_calls = {key: due for key, due in self.server_calls.items() if key[0] != name}

    @rule()
    def charger_comes_again(self) -> None:
        self.listen()
        self.at_charger = []
        old = self.stage.primary
        self.stage.charger_connects()
        old.lost()
        self.forget("primary")
        if not self.stage.secondary.is_open:
            self.forget("secondary")
            self.stage.secondary_connects(accepts=False)

    @rule()
    def proxy_is_killed(self) -> None:
        self.listen()
        self.stage.journal.tick()
        self.stage.journal.save()
        before = remembered(self.stage.memory)
        self.stage.killed()
        after = remembered(self.stage.memory)
        assert after == before, "the proxy has come back as another"
        self.come_alive()

    @invariant()
    def the_disk_knows_it_all(self) -> None:
        if hasattr(self, "stage"):
            journal, memory = self.stage.journal, self.stage.memory
            journal.save()
            assert journal.pending == journal.writing == {}
            (row,) = journal.database.execute("SELECT * FROM chargers")
            assert columns(memory).items() <= dict(row).items()
            for session in memory.sessions.values():
                rows = journal.database.execute("SELECT * FROM sessions WHERE number = ?", [session.number])
                for row in rows:
                    stands = dict(row)
                    assert {name: stands[name] for name in columns(session)} == columns(session)

    @invariant()
    def everything_heard_is_right(self) -> None:
        if hasattr(self, "stage"):
            if not self.stage.charger.is_open or not self.stage.secondary.is_open:
                self.charger_comes_again()
            self.listen()
            assert len(self.at_charger) <= max(1, len(self.stage.relay.commands.sent)), "two outstanding"
            for session in self.stage.memory.sessions.values():
                if session.transaction_id is not None and session.owner is not None:
                    owner = self.owners.setdefault((session.begun, session.transaction_id), session.owner)
                    assert session.owner is owner, "a transaction changed its owner"

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        self.stage.charger.lost()
        for link in list(self.stage.relay.links()):
            link.on_closed(link)  # type: ignore[misc]
        memory, commands = self.stage.memory, self.stage.relay.commands
        for days in (31, 39, 47):
            self.stage.sweeps(days * p.DAY)
        assert memory.sessions == {}
        assert memory.claims == []
        assert self.stage.relay.router.waiting.keys() <= {
            (call.session, call.content.mark) for call in memory.stored
        }
        assert commands.outstanding is None
        assert commands.waiting == []
        for outbox in self.stage.relay.outboxes.values():
            assert outbox.live == []
            assert outbox.in_flight is None
            assert outbox.sent == {}
        self.stage.journal.database.close()
        self.folder.cleanup()


TestOnePeerEach = OnePeerEach.TestCase
TestOnePeerEach.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# What peers may send: whatever stands where a number or a text is expected, it breaks no save.

TEXTS = st.text(st.characters(), max_size=30) | st.sampled_from(["\ud800", "\x00", "\udfff\x00x", "😀"])
NUMBERS = st.integers() | st.sampled_from([10**30, -(10**30), 10**400, 2**63, 2**63 - 1, -(2**63) - 1])
VALUES = TEXTS | NUMBERS | st.floats() | st.none() | st.booleans() | st.lists(st.integers(), max_size=2)


def survives(stage: Stage) -> None:
    """Save, kill the proxy and start it again: it is as it was, and goes on saving."""
    save(stage)
    assert stage.journal.failure == ""
    before = repr(remembered(stage.memory))
    stage.killed()
    assert repr(remembered(stage.memory)) == before
    stage.charger_connects()
    save(stage)
    assert stage.journal.failure == ""


@contextmanager
def surviving(version: str = "ocpp1.6") -> Iterator[Stage]:
    """A play whose file lies in a folder of its own, and at whose end all is as it was after a kill."""
    with TemporaryDirectory() as folder:
        stage = Stage(version=version, state=Path(folder, "state.db"))
        yield stage
        survives(stage)
        stage.journal.database.close()


@settings(max_examples=60, deadline=None)
@given(badge=TEXTS, connector=VALUES, meter=VALUES, timestamp=VALUES, server_id=VALUES)
@example(badge="\ud800", connector=10**30, meter=10**400, timestamp=5, server_id=10**30)
def test_nothing_in_a_1_6_session_breaks_a_save(
    badge: str, connector: Any, meter: Any, timestamp: Any, server_id: Any
) -> None:
    """Whatever stands where a number or a text is expected."""
    with surviving() as stage:
        for name in (f"SECO{badge}", f"PRIM{badge}"):
            payload = {"connectorId": connector, "idTag": name, "meterStart": meter, "timestamp": timestamp}
            stage.charger.calls(name[:4], "StartTransaction", **payload)
            stage.charger.hears()
            for link in (stage.primary, stage.secondary):
                for _, message_id, _, _ in link.hears():
                    link.answers(message_id, transactionId=server_id, idTagInfo={"status": badge})
        stop = {"transactionId": server_id, "idTag": badge, "meterStop": meter, "timestamp": timestamp}
        stage.charger.calls("e", "StopTransaction", **stop, reason=badge)


@settings(max_examples=60, deadline=None)
@given(name=TEXTS, badge=TEXTS, number=VALUES, evse=VALUES, other=VALUES)
@example(name="\ud800", badge="\ud800", number=10**30, evse=10**30, other=5)
def test_nothing_in_a_2_x_transaction_breaks_a_save(
    name: str, badge: str, number: Any, evse: Any, other: Any
) -> None:
    """With its badge or before it."""
    with surviving("ocpp2.0.1") as stage:
        for token in (f"SECO{badge}", ""):
            info = {"transactionId": f"{name}{token}", "stoppedReason": other, "remoteStartId": number}
            payload = {"eventType": "Started", "seqNo": number, "timestamp": other, "evse": {"id": evse}}
            payload |= {"transactionInfo": info}
            payload |= {"idToken": {"idToken": token, "type": "ISO14443"}} if token else {}
            stage.charger.calls(f"x{token}", "TransactionEvent", **payload)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, number=VALUES, interval=VALUES)
@example(text="\ud800", number=10**30, interval=10**30)
def test_nothing_about_the_station_breaks_a_save(text: str, number: Any, interval: Any) -> None:
    """Boot, statuses, claims, requests."""
    with surviving() as stage:
        stage.charger.calls("b", "BootNotification", chargePointVendor=text, chargePointModel=number)
        stage.primary.answers("b", status="Accepted", currentTime=text, interval=interval)
        stage.charger.calls("s", "StatusNotification", connectorId=number, status=text)
        stage.primary.answers("s")
        for action, payload in (
            ("RemoteStartTransaction", {"idTag": text, "connectorId": number}),
            ("ReserveNow", {"idTag": text, "reservationId": number, "expiryDate": text}),
            ("ReserveNow", {"idTag": text, "expiryDate": "0001-01-01T00:00:00+14:00"}),
            ("GetLog", {"requestId": number}),
            ("GetDiagnostics", {}),
        ):
            stage.primary.calls(action, action, **payload)
            for message in stage.charger.hears():
                if message[0] == 2:
                    stage.charger.answers(message[1], status="Accepted")
