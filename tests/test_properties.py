"""
A machine that plays at random with one charger and its two servers, and what must hold whatever they do.

Invariants: a Call of the charger gets at most one answer; an answer reaches only the server that asked, once,
under its own id; the charger has one Call to answer; what a server gets of a badge or a session belongs to
it, over kills of the proxy, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ocpp_2w_proxy as p
from tests.play.kills import save
from tests.play.plays import Stage, StageLink
from tests.proof.storms import SERVERS, Storm, templates

PEERS = st.sampled_from(SERVERS)
BADGES = st.sampled_from(["PRIM1", "PRIM2", "SECO1", "SECO2"])
CONNECTORS = st.sampled_from([1, 2])
# Ids that collide: with each other, with the proxy's range, with what is not usable.
SERVER_IDS = st.sampled_from([1, 2, 7, 0, -1, 2_000_000_000, 2_000_000_001])
MESSAGE_IDS = st.sampled_from(["1", "2", "3", "4"])


class OnePeerEach(RuleBasedStateMachine):
    """The charger, the servers and the world between them take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}  # The charger's message ids, and the answers that it heard.
        self.starts: dict[str, str] = {}  # The badges of its starts, by message id,
        self.told: dict[int, str] = {}  # and by the transaction id that it was told.
        self.server_calls: dict[tuple[str, str], int] = {}  # Answers that are due, by server and id.
        self.at_charger: list[tuple[str, float]] = []  # What it has to answer, and since when.
        self.unanswered: dict[str, list[list[Any]]] = {}
        self.folder = TemporaryDirectory()

    @initialize(more=st.sampled_from(["", "secondary_replies = forward"]))
    def begin(self, more: str) -> None:
        self.stage = Stage(more, state=Path(self.folder.name, "state.db"), connect=False)
        self.come_alive()

    def come_alive(self) -> None:
        """Connect everybody to a proxy that has just been started."""
        self.forget(*SERVERS)
        self.at_charger = []
        self.stage.charger_connects()
        self.stage.secondary_connects(accepts=False)

    def forget(self, *names: str) -> None:
        """Connections have ended with all that was due on them."""
        self.unanswered |= {name: [] for name in names}
        self.server_calls = {key: due for key, due in self.server_calls.items() if key[0] not in names}

    def server(self, name: str) -> StageLink:
        link: StageLink = getattr(self.stage, name)
        return link

    def calls(self, action: str, **payload: Any) -> str:
        """Let the charger send a Call; return its message id."""
        message_id = f"c{len(self.asked)}"
        self.asked[message_id] = 0
        self.stage.charger.calls(message_id, action, timestamp=message_id, **payload)
        return message_id

    def listen(self) -> None:
        """Let everybody hear what there is, and check it."""
        for kind, message_id, *more in self.stage.charger.hears():
            if kind == 2:
                assert all(self.stage.time - since >= 29 for _, since in self.at_charger), "two at once"
                self.at_charger.append((message_id, self.stage.time))
                continue
            self.asked[message_id] += 1
            assert self.asked[message_id] == 1, "a second answer to one Call"
            if message_id in self.starts and kind == 3:
                self.told[more[0]["transactionId"]] = self.starts[message_id]
        for name in SERVERS:
            for message in self.server(name).hears():
                if message[0] == 2:
                    badge = message[3].get("session", message[3].get("idTag", name))
                    assert badge[:4].upper() == name[:4].upper(), f"{name} hears of {badge}"
                    self.unanswered[name].append(message)
                else:
                    self.server_calls[name, message[1]] -= 1
                    assert self.server_calls[name, message[1]] >= 0, f"{name} did not ask for an answer"

    @rule(badge=BADGES, connector=CONNECTORS, status=st.sampled_from(["Available", "Charging"]))
    def charger_tells(self, badge: str, connector: int, status: str) -> None:
        self.calls("Heartbeat")
        self.calls("Authorize", idTag=badge)
        self.calls("StatusNotification", connectorId=connector, errorCode="NoError", status=status)

    @rule()
    def charger_boots(self) -> None:
        self.calls("BootNotification", chargePointVendor="V", chargePointModel="M")

    @rule(badge=BADGES, connector=CONNECTORS)
    def charger_starts(self, badge: str, connector: int) -> None:
        message_id = self.calls("StartTransaction", connectorId=connector, idTag=badge, meterStart=0)
        self.starts[message_id] = badge

    @precondition(lambda self: bool(self.told))
    @rule(data=st.data(), action=st.sampled_from(["MeterValues", "StopTransaction"]), badge=BADGES)
    def charger_reports(self, data: st.DataObject, action: str, badge: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.told)))
        self.calls(action, transactionId=number, connectorId=1, idTag=badge, session=self.told[number])

    @precondition(lambda self: bool(self.at_charger))
    @rule(errs=st.booleans())
    def charger_answers(self, errs: bool) -> None:
        message_id, _ = self.at_charger.pop(0)
        if errs:
            self.stage.charger.errs(message_id)
        else:
            self.stage.charger.answers(message_id, status="Accepted")

    @rule(name=PEERS, message_id=MESSAGE_IDS, server_id=SERVER_IDS, data=st.data())
    def server_calls_charger(self, name: str, message_id: str, server_id: int, data: st.DataObject) -> None:
        badge = f"{name[:4].upper()}1"
        calls: dict[str, dict[str, Any]] = {
            "RemoteStopTransaction": {"transactionId": server_id},
            "RemoteStartTransaction": {"idTag": badge},
            "ReserveNow": {"idTag": badge, "reservationId": 5, "expiryDate": "x", "connectorId": 1},
            "CancelReservation": {"reservationId": 5},
            "GetLog": {"requestId": 3},
        }
        action = data.draw(st.sampled_from(sorted(calls)))
        if self.server(name).is_open:
            self.server_calls[name, message_id] = self.server_calls.get((name, message_id), 0) + 1
            self.server(name).calls(message_id, action, **calls[action])

    @rule(name=PEERS, server_id=SERVER_IDS, errs=st.booleans())
    def server_answers(self, name: str, server_id: int, errs: bool) -> None:
        if self.unanswered[name] and self.server(name).is_open:
            _, message_id, action, _ = self.unanswered[name].pop(0)
            answer: dict[str, Any] = {"idTagInfo": {"status": "Accepted"}, "status": "Accepted"}
            if action == "StartTransaction":
                answer["transactionId"] = server_id
            if errs and action != "BootNotification":
                self.server(name).errs(message_id)
            else:
                self.server(name).answers(message_id, **answer)

    @rule(seconds=st.sampled_from([1, 6, 12, 35]))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.stage.passes(1)
            self.listen()

    @rule(name=PEERS)
    def server_goes_and_comes(self, name: str) -> None:
        if self.server(name).is_open and self.stage.charger.is_open:
            self.listen()
            self.server(name).lost()
            self.forget(name)
            setattr(self.stage, name, self.stage.connects(p.Peer(name)))

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
        save(self.stage)
        self.stage.killed()
        self.come_alive()

    @invariant()
    def everything_heard_is_right(self) -> None:
        if hasattr(self, "stage"):
            if not self.stage.charger.is_open or not self.stage.secondary.is_open:
                self.charger_comes_again()
            self.listen()

    def teardown(self) -> None:
        if hasattr(self, "stage"):
            self.stage.journal.database.close()
        self.folder.cleanup()


TestOnePeerEach = OnePeerEach.TestCase
TestOnePeerEach.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


TEXTS = st.text(st.characters(), max_size=30) | st.sampled_from(["\ud800", "\x00", "\udfff\x00x", "😀"])
NUMBERS = st.integers() | st.sampled_from([10**30, -(10**30), 10**400, 2**63, 2**63 - 1, -(2**63) - 1])
OTHERS = st.floats() | st.none() | st.booleans() | st.lists(st.integers(), max_size=2)
VALUES = TEXTS | NUMBERS | OTHERS | st.just("0001-01-01T00:00:00+14:00")


def changed(node: Any, value: Any) -> Any:
    """Return what is said with another value in every place, but for those that say what it is about."""
    if isinstance(node, dict):
        return {key: inner if key == "eventType" else changed(inner, value) for key, inner in node.items()}
    if isinstance(node, list):
        return [changed(inner, value) for inner in node]
    return f"{node}{value}" if str(node)[:4] in ("PRIM", "SECO") else value


def saved(stage: Stage) -> int:
    """Save; return how many sessions there are, but for starts that nobody has answered."""
    save(stage)
    assert stage.journal.failure == ""
    return sum(session.transaction_id is not None for session in stage.memory.sessions.values())


@pytest.mark.parametrize("version", p.VOCABULARIES)
def test_whatever_is_said_the_proxy_goes_on_saving(version: str) -> None:
    """Also where a number or a text is expected; and one that is killed knows what it knew."""

    @settings(max_examples=15, deadline=None)
    @given(VALUES, VALUES)
    @example("\ud800", 10**30)
    @example(10**400, "\ud800")
    @example("x", float("inf"))  # No JSON: the answer is dropped.
    def play(value: Any, answer: Any) -> None:
        verdict = p.dump([3, "{id}", {"transactionId": answer, "idTagInfo": {"status": "A"}}])
        with TemporaryDirectory() as folder:
            storm = Storm(version, state=Path(folder, "state.db"))
            for sender, text in templates(version):
                kind, message_id, *said = json.loads(text.replace("{transaction}", "7"))
                said[-1] = changed(said[-1], value if kind == 2 else answer)
                storm.says(sender, p.dump([kind, message_id, *said]))
                for name in SERVERS:
                    storm.says(name, verdict)
            known = saved(storm.stage)
            storm.stage.killed()
            storm.stage.charger_connects()
            assert saved(storm.stage) == known
            storm.stage.journal.database.close()

    play()
