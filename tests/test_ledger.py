"""Nothing is lost: a run of the ledger in which everything breaks, and the proof that the ledger bites."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.play.inside import POINTS
from tests.proof import ledger
from tests.proof.fleet import PRIMARY, SECONDARY, Books, Receipt, Said, Session
from tests.proof.ledger import CHARGER_AGAIN, PROXY_DIED, REFUSED, SERVER_DIED, Ledger, Run

SEED = 1
EVENT = "TransactionEvent"


async def test_nothing_is_lost_whatever_dies(tmp_path: Path) -> None:
    """What 50 chargers were told is recorded arrives at its owner: complete, in order, nowhere else."""
    report = await Run(tmp_path, SEED, haste=2.5).play(ledger.KILLS)
    print(report)  # Shown if it fails.
    assert report.problems == []
    assert report.kills.total() >= 30
    assert report.kills.keys() == {ledger.OUTSIDE, *POINTS}
    for faults in report.faults.values():
        assert faults.keys() == {fault.__name__ for fault in ledger.FAULTS}


async def test_a_proxy_that_keeps_nothing_on_disk_loses_something(tmp_path: Path) -> None:
    """The ledger sees it, so it would see a proxy that answers before the disk has it."""
    report = await Run(tmp_path, SEED, is_unsynced=True).play(3)
    assert report.kills[ledger.OUTSIDE] == 3
    assert report.count("lost") > 0


# What the ledger says to books that are made up.

ARRIVED = "0@10 1@11 2@12"
THRICE = "1@11a! 1@12b! 1@13c!"
PROBLEMS: list[tuple[str, dict[str, Any], str, dict[str, int]]] = [
    (ARRIVED, {}, "", {}),
    ("0@10 1@11", {}, "lost", {}),
    ("0@10 1@11 2@12?", {}, "lost", {}),  # It has arrived, but was not accepted.
    # Nothing overtakes, unless the owner has refused the other one: a reading once, an event three times.
    ("0@10 1@11! 2@14 1@15", {}, "", {REFUSED: 1}),
    ("0@10 2@14 1@15", {}, "order order", {}),
    (f"0@10 {THRICE} 2@14 1@15d", {"action": EVENT}, "", {REFUSED: 3}),
    ("0@10 1@11a! 1@13c! 2@14 1@15d", {"action": EVENT}, "order order", {REFUSED: 2}),
    # A stored message keeps its id, also for another connection.
    ("0@10? 0@11b 1@12 2@13", {}, "double", {}),
    # What comes twice needs a death in between, before the proxy can have noted the answer,
    ("0@10 0@11 1@12 2@13", {}, "double", {}),
    ("0@10 0@11 1@12 2@13", {"deaths": [10.2]}, "", {PROXY_DIED: 1}),
    ("0@10 0@11 1@12 2@13", {"deaths": [5.0, 11.5]}, "double", {}),
    ("0@10+ 0@11 1@12 2@13", {}, "", {SERVER_DIED: 1}),  # or of the server, before it answered.
    # An answer has to be on disk before the next one goes out, so no death explains it.
    ("0@10 1@11 2@12 1@13", {"deaths": [12.5]}, "order", {PROXY_DIED: 1}),
    # What is elsewhere or altered is a problem, even where it has arrived as well.
    (f"{ARRIVED} 0@20>", {}, "wrong server", {}),
    ("0@10 1@11~ 2@12", {}, "altered transaction", {}),
    # What the charger repeats is stored once; what is relayed, and readings, may come each time.
    ("0@10 0@10.5x 1@11 2@12", {"owner": PRIMARY, "again": 0}, "", {CHARGER_AGAIN: 1}),
    ("0@10 0@10.5x 1@11 2@12", {"again": 0}, "double", {}),
    ("0@10 1@11 1@11.5x 2@12", {"again": 1}, "", {CHARGER_AGAIN: 1}),
    ("0@10 1@11 2@12 2@12.5x", {"again": 2}, "double", {}),
]


def made_up(owner: str = SECONDARY, action: str = "MeterValues", again: int | None = None) -> Books:
    """Return books with one session of OCPP 1.6, said at 1, 2 and 3 s; one message perhaps again."""
    books, session = Books(), Session("CP-1", owner, "BADGE")
    books.sessions.append(session)
    for at, name in enumerate(("StartTransaction", action, "StopTransaction"), 1):
        payload = {"meter": at} if at == 1 else {"meter": at, "transactionId": 2_000_000_001}
        sent = [float(at), 9.0] if again == at - 1 else [float(at)]
        session.messages.append(Said(session, name, f"{at}", payload, False, sent, at))
    return books


def receive(books: Books, steps: str) -> None:
    """Let the owner receive messages: place, time, an id if it is new; `?` unanswered, `!` refused.

    `+`: it died before its answer; `>`: the other server receives it; `~`: it is altered.
    """
    for step in steps.split():
        place, at, message_id, mark = re.fullmatch(r"(\d)@([\d.]+)(\w*)([?!+>~]?)", step).groups()  # type: ignore[union-attr]
        said, moment, is_start = books.sessions[0].messages[int(place)], float(at), place == "0"
        payload = said.payload if is_start else {**said.payload, "transactionId": 7}
        payload = {"meter": 99, "transactionId": 8} if mark == "~" else payload
        visit = SimpleNamespace(cut=moment + 0.05 if mark == "+" else None)
        receipt = Receipt(visit, said.key, message_id or f"id-{place}", said.action, payload, moment)
        if mark != "?":
            receipt.answer = {"transactionId": 7} if is_start else {}
            receipt.answered = None if mark == "+" else moment + 0.1
        receipt.is_refused = mark == "!"
        books.receive(PRIMARY if mark == ">" else books.sessions[0].owner, receipt)


@pytest.mark.parametrize(("steps", "how", "problems", "again"), PROBLEMS)
def test_what_the_ledger_says(steps: str, how: dict[str, Any], problems: str, again: dict[str, int]) -> None:
    """Each message once, in order, at its owner; or it says what is wrong, or why."""
    books = made_up(**{name: value for name, value in how.items() if name != "deaths"})
    receive(books, steps)
    report = Ledger(books, how.get("deaths", [])).check()
    assert " ".join(problem.partition(":")[0] for problem in report.problems) == problems
    assert report.again == again


def test_what_is_unanswered_or_unknown_is_a_problem() -> None:
    """Even where all has arrived."""
    books = made_up()
    receive(books, ARRIVED)
    books.sessions[0].messages[2].answered = None
    books.receive(PRIMARY, Receipt(None, ("CP-9", "1"), "x", "MeterValues", {}, 20))
    problems = Ledger(books, []).check().problems
    assert [problem.partition(":")[0] for problem in problems] == ["unanswered", "unknown"]
