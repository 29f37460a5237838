"""Nothing is lost: a run of the ledger in which everything breaks, and the proof that the ledger bites."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ocpp_2w_proxy as p
from tests.proof.ledger import (
    CHARGER_AGAIN,
    FAULTS,
    KILLS,
    OUTSIDE,
    POINTS,
    PROXY_DIED,
    REFUSED,
    SERVER_DIED,
    UNSYNCED,
    Ledger,
    Receipt,
    Report,
    Run,
    Said,
    Session,
    Visit,
)

PRIMARY, SECONDARY = p.Peer.PRIMARY, p.Peer.SECONDARY
SEED = 1
UNSYNCED_KILLS = 6


async def test_nothing_is_lost_whatever_dies(tmp_path: Path) -> None:
    """What 50 chargers were told is recorded arrives at its owner: complete, in order, nowhere else."""
    report = await Run(tmp_path, SEED).play(KILLS)
    print(report)  # Shown if it fails.
    assert report.problems == []
    assert report.kills.total() >= 30
    assert report.kills.keys() == {OUTSIDE, *POINTS}
    for faults in report.faults.values():
        assert faults.keys() == {fault.__name__ for fault in FAULTS}


async def test_without_the_sync_before_the_answer_something_is_lost(tmp_path: Path) -> None:
    """The ledger sees it, so it would see a proxy that answers too early."""
    report = await Run(tmp_path, SEED, is_unsynced=True).play(UNSYNCED_KILLS)
    assert report.kills[UNSYNCED] > 0
    assert report.lost > 0


# What the ledger says to books that are made up.


@dataclass
class Books:
    """One session of OCPP 1.6, said at 1, 2 and 3 s; and what the servers have booked."""

    owner: p.Peer = SECONDARY
    receipts: dict[p.Peer, list[Receipt]] = field(default_factory=lambda: {PRIMARY: [], SECONDARY: []})
    deaths: list[float] = field(default_factory=list)  # Of the proxy.

    def __post_init__(self) -> None:
        self.session = Session("CP-1", self.owner, "BADGE")
        for at, action in enumerate(("StartTransaction", "MeterValues", "StopTransaction"), 1):
            payload = {"meter": at} if at == 1 else {"meter": at, "transactionId": 2_000_000_001}
            self.session.messages.append(Said(self.session, action, f"{at}", payload, False, [at], at))

    def receives(
        self, place: int, at: float, message_id: str = "", peer: p.Peer | None = None, answer: bool = True
    ) -> Receipt:
        """Let a server, its owner unless another is named, receive a message of the session."""
        said = self.session.messages[place]
        payload = {**said.payload, "transactionId": 7} if place else said.payload
        message_id = message_id or f"id-{place}"
        receipt = Receipt(Visit("CP-1"), said.key, message_id, said.action, payload, at)
        if answer:
            receipt.answer, receipt.answered = {} if place else {"transactionId": 7}, at + 0.1
        self.receipts[peer or self.owner].append(receipt)
        return receipt

    def receive_all(self) -> None:
        for place in range(3):
            self.receives(place, 10.0 + place)

    def check(self) -> Report:
        return Ledger([self.session], self.receipts, self.deaths).check()

    def problems(self) -> list[str]:
        """Return what kinds of problems there are."""
        return [problem.partition(":")[0] for problem in self.check().problems]


def test_a_session_that_has_arrived_is_no_problem() -> None:
    """Each message once, in order, under the owner's transaction id."""
    books = Books()
    books.receive_all()
    assert books.problems() == []


def test_what_was_answered_and_has_not_arrived_is_lost() -> None:
    """A server that has got it and not accepted it does not count."""
    books = Books()
    books.receives(0, 10)
    books.receives(1, 11)
    assert books.problems() == ["lost"]
    books.receives(2, 12, answer=False)
    assert books.problems() == ["lost"]


def test_a_charger_that_heard_no_answer_is_a_problem() -> None:
    """Even if its message has arrived."""
    books = Books()
    books.receive_all()
    books.session.messages[2].answered = None
    assert books.problems() == ["unanswered"]


def test_a_message_at_the_other_server_is_a_problem() -> None:
    """Nothing of a session is anybody else's business."""
    books = Books()
    books.receive_all()
    books.receives(1, 20, peer=PRIMARY)
    assert books.problems() == ["wrong server"]


def test_a_message_that_was_changed_is_a_problem() -> None:
    """Apart from the transaction id, which must be one that the start got."""
    books = Books()
    books.receive_all()
    books.receipts[SECONDARY][1].payload = {"meter": 99, "transactionId": 8}
    assert books.problems() == ["altered", "transaction"]


def test_a_message_that_no_charger_said_is_a_problem() -> None:
    """The proxy makes nothing up."""
    books = Books()
    books.receive_all()
    books.receipts[PRIMARY].append(Receipt(Visit("CP-9"), ("CP-9", "1"), "x", "MeterValues", {}, 20))
    assert books.problems() == ["unknown"]


def test_a_message_that_overtakes_another_is_a_problem() -> None:
    """Unless its owner has refused the other one, a reading, at once."""
    books = Books()
    books.receives(0, 10)
    books.receives(1, 11).is_refused = True
    books.receives(2, 14)
    books.receives(1, 15)
    assert books.problems() == []
    del books.receipts[SECONDARY][1]
    assert books.problems() == ["order", "order"]


def test_what_tells_an_owner_is_overtaken_after_three_refusals() -> None:
    """Each under an id of its own."""
    books = Books()
    books.session.messages[1].action = "TransactionEvent"
    books.receives(0, 10)
    for at in (11, 12, 13):
        books.receives(1, at, f"id-{at}").is_refused = True
    books.receives(2, 14)
    books.receives(1, 15, "id-15")
    assert books.problems() == []
    assert books.check().again == {REFUSED: 3}
    del books.receipts[SECONDARY][2]
    assert books.problems() == ["order", "order"]


def test_another_id_without_a_refusal_is_a_problem() -> None:
    """A stored message keeps its id, also for another connection."""
    books = Books()
    books.receives(0, 10, answer=False)
    books.receives(0, 11, "another id")
    books.receives(1, 12)
    books.receives(2, 13)
    assert books.problems() == ["double"]


def test_a_message_that_comes_twice_needs_a_death_in_between() -> None:
    """Of the proxy before it can have noted the answer, or of the server before it has answered."""
    books = Books()
    books.receives(0, 10)
    books.receives(0, 11)
    books.receives(1, 12)
    books.receives(2, 13)
    assert books.problems() == ["double"]
    books.deaths = [10.2]
    assert books.check().again == {PROXY_DIED: 1}
    books.deaths = [5.0, 11.5]
    assert books.problems() == ["double"]
    first = books.receipts[SECONDARY][0]
    first.answered, first.visit.cut = None, 10.05
    assert books.check().again == {SERVER_DIED: 1}


def test_a_message_that_comes_back_after_its_successors_is_a_problem() -> None:
    """Its answer has to be on disk before the next one goes out, so no death explains it."""
    books = Books(deaths=[12.5])
    books.receive_all()
    books.receives(1, 13)
    assert "order" in books.problems()


@pytest.mark.parametrize(
    ("owner", "place", "problems"),
    [(PRIMARY, 0, []), (SECONDARY, 0, ["double"]), (SECONDARY, 1, []), (SECONDARY, 2, ["double"])],
)
def test_a_message_that_the_charger_repeats_is_stored_once(
    owner: p.Peer, place: int, problems: list[str]
) -> None:
    """Only what is relayed, and meter values, may come once for each time that the charger has sent it."""
    books = Books(owner)
    books.session.messages[place].sent = [1, 9]
    for number in range(3):
        books.receives(number, 10 + number)
        if number == place:
            books.receives(number, 10.5 + number, "another id")
    assert books.problems() == problems
    assert books.check().again.total() == books.check().again[CHARGER_AGAIN]
