"""Nothing is lost: a run of the ledger in which everything breaks, and the proof that the ledger bites."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.play.inside import POINTS
from tests.proof.fleet import PRIMARY, SECONDARY, Books, Receipt, Said, Session
from tests.proof.ledger import (
    CHARGER_AGAIN,
    FAULTS,
    KILLS,
    OUTSIDE,
    PROXY_DIED,
    REFUSED,
    SERVER_DIED,
    Ledger,
    Report,
    Run,
)

SEED = 1
EVENT = "TransactionEvent"
THRICE = "1@11a! 1@12b! 1@13c!"


async def test_nothing_is_lost_whatever_dies(tmp_path: Path) -> None:
    """What 50 chargers were told is recorded arrives at its owner: complete, in order, nowhere else."""
    report = await Run(tmp_path, SEED, haste=2.5).play(KILLS)
    print(report)  # Shown if it fails.
    assert report.problems == []
    assert report.kills.total() >= 30
    assert report.kills.keys() == {OUTSIDE, *POINTS}
    for faults in report.faults.values():
        assert faults.keys() == {fault.__name__ for fault in FAULTS}


async def test_a_proxy_that_keeps_nothing_on_disk_loses_something(tmp_path: Path) -> None:
    """The ledger sees it, so it would see a proxy that answers before the disk has it."""
    report = await Run(tmp_path, SEED, is_unsynced=True).play(3)
    assert report.kills[OUTSIDE] == 3
    assert report.count("lost") > 0


# What the ledger says to books that are made up.


class Made:
    """One session of OCPP 1.6, said at 1, 2 and 3 s; and what the servers have booked."""

    def __init__(self, owner: str = SECONDARY) -> None:
        self.books = Books()
        self.deaths: list[float] = []  # Of the proxy.
        self.session = Session("CP-1", owner, "BADGE")
        self.books.sessions.append(self.session)
        for at, action in enumerate(("StartTransaction", "MeterValues", "StopTransaction"), 1):
            payload = {"meter": at} if at == 1 else {"meter": at, "transactionId": 2_000_000_001}
            self.session.messages.append(Said(self.session, action, f"{at}", payload, False, [at], at))

    def receives(
        self, place: int, at: float, message_id: str = "", server: str = "", answer: bool = True
    ) -> Receipt:
        """Let a server, its owner unless another is named, receive a message of the session."""
        said = self.session.messages[place]
        payload = {**said.payload, "transactionId": 7} if place else said.payload
        visit = SimpleNamespace(cut=None)
        receipt = Receipt(visit, said.key, message_id or f"id-{place}", said.action, payload, at)
        if answer:
            receipt.answer, receipt.answered = {} if place else {"transactionId": 7}, at + 0.1
        self.books.receive(server or self.session.owner, receipt)
        return receipt

    def check(self) -> Report:
        return Ledger(self.books, self.deaths).check()

    def problems(self) -> list[str]:
        """Return what kinds of problems there are."""
        return [problem.partition(":")[0] for problem in self.check().problems]


def plays(made: Made, steps: str) -> None:
    """Let a server receive messages: place, time, an id if it is new; "?" unanswered, "!" refused."""
    for step in steps.split():
        place, at, message_id, answer = re.fullmatch(r"(\d)@([\d.]+)(\w*)([?!]?)", step).groups()  # type: ignore[union-attr]
        made.receives(int(place), float(at), message_id, answer=answer != "?").is_refused = answer == "!"


@pytest.mark.parametrize(
    ("steps", "deaths", "action", "problems", "again"),
    [
        pytest.param("0@10 1@11 2@12", [], "", [], {}, id="arrived"),
        pytest.param("0@10 1@11", [], "", ["lost"], {}, id="not arrived"),
        pytest.param("0@10 1@11 2@12?", [], "", ["lost"], {}, id="arrived, but not accepted"),
        # Nothing overtakes, unless the owner has refused the other one: a reading once, an event three times.
        pytest.param("0@10 1@11! 2@14 1@15", [], "", [], {REFUSED: 1}, id="a refused reading is overtaken"),
        pytest.param("0@10 2@14 1@15", [], "", ["order", "order"], {}, id="overtaken"),
        pytest.param(f"0@10 {THRICE} 2@14 1@15d", [], EVENT, [], {REFUSED: 3}, id="refused three times"),
        pytest.param(
            "0@10 1@11a! 1@13c! 2@14 1@15d", [], EVENT, ["order"] * 2, {REFUSED: 2}, id="twice only"
        ),
        # A stored message keeps its id, also for another connection.
        pytest.param("0@10? 0@11b 1@12 2@13", [], "", ["double"], {}, id="another id"),
        # What comes twice needs a death in between, before the proxy can have noted the answer.
        pytest.param("0@10 0@11 1@12 2@13", [], "", ["double"], {}, id="twice"),
        pytest.param("0@10 0@11 1@12 2@13", [10.2], "", [], {PROXY_DIED: 1}, id="the proxy died"),
        pytest.param("0@10 0@11 1@12 2@13", [5.0, 11.5], "", ["double"], {}, id="it died at another time"),
        # An answer has to be on disk before the next one goes out, so no death explains it.
        pytest.param("0@10 1@11 2@12 1@13", [12.5], "", ["order"], {PROXY_DIED: 1}, id="it came back"),
    ],
)
def test_what_the_ledger_says(
    steps: str, deaths: list[float], action: str, problems: list[str], again: dict[str, int]
) -> None:
    """Each message once, in order, at its owner; or it says what is wrong, or why."""
    made = Made()
    made.deaths = deaths
    made.session.messages[1].action = action or "MeterValues"
    plays(made, steps)
    assert made.problems() == problems
    assert made.check().again == again


def test_a_server_that_dies_before_it_answers_explains_a_repeat() -> None:
    """Not one that dies later."""
    made = Made()
    first = made.receives(0, 10)
    plays(made, "0@11 1@12 2@13")
    first.answered, first.visit.cut = None, 10.05
    assert made.problems() == []
    assert made.check().again == {SERVER_DIED: 1}


def test_what_is_unanswered_elsewhere_altered_or_unknown_is_a_problem() -> None:
    """Even where it has arrived as well; a transaction id has to be one that the start got."""
    made = Made()
    receipts = [made.receives(place, 10.0 + place) for place in range(3)]
    made.session.messages[2].answered = None
    made.receives(0, 20, server=PRIMARY)
    receipts[1].payload = {"meter": 99, "transactionId": 8}
    made.books.receive(PRIMARY, Receipt(None, ("CP-9", "1"), "x", "MeterValues", {}, 20))
    assert made.problems() == ["wrong server", "altered", "unanswered", "transaction", "unknown"]


@pytest.mark.parametrize(
    ("owner", "place", "problems"),
    [(PRIMARY, 0, []), (SECONDARY, 0, ["double"]), (SECONDARY, 1, []), (SECONDARY, 2, ["double"])],
)
def test_a_message_that_the_charger_repeats_is_stored_once(
    owner: str, place: int, problems: list[str]
) -> None:
    """Only what is relayed, and meter values, may come once for each time that the charger has sent it."""
    made = Made(owner)
    made.session.messages[place].sent = [1, 9]
    for number in range(3):
        made.receives(number, 10 + number)
        if number == place:
            made.receives(number, 10.5 + number, "another id")
    assert made.problems() == problems
    assert made.check().again.total() == made.check().again[CHARGER_AGAIN]
