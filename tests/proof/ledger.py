"""
The ledger: what a charger was told is recorded arrives at its owner, complete and in order, whatever dies.

Chargers with durable queues play sessions through a proxy that is killed again and again, with two servers
that stop, hang, cut connections, die before they answer, and refuse. In the end the books are compared: what
the chargers were told with what the servers have accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.play.inside import POINTS
from tests.play.peers import eventually
from tests.play.rig import table
from tests.proof import fleet
from tests.proof.fleet import Books, Fleet, Pace, Receipt, Said, Server, Session, listed, now

CHARGERS = 50
KILLS = 34  # Of the proxy, in a short run.
GAP_SECONDS = (0.3, 1.2)  # Between two faults of a server.
LIFE_SECONDS = (0.3, 2.0)  # Of a proxy that is killed from outside.
LONGEST_LIFE_SECONDS = 3.0  # Of one that is to kill itself and does not come by the point.
MOST_PASSES = 50  # A proxy kills itself the first to 50th time that it comes by.
FINISH_SECONDS = 30.0  # For the chargers to say the rest, once nothing breaks any more.
STOP_SECONDS = 8.0  # For the proxy to end after SIGTERM.
SETTLE_SECONDS = 60.0  # For what has not arrived by then.
QUIET_SECONDS = 3.0  # Nothing arrived for so long: what has not arrived is not on its way.
NOTING_SECONDS = 5.0  # From an answer to its record at most, on a disk that others use, too.
FAULTS = [fleet.stop, fleet.hang, fleet.reset, fleet.die, fleet.refuse]
OUTSIDE = "at any moment"  # How a proxy dies, beside the POINTS.
TRIES = 3  # CallErrors until a stored message is put aside until the proxy starts again; of a reading 1.

# What the proxy waits for, in the time of a test.
TIMES = "TICK=0.1 PASSING=0.5 ANSWER=0.6 AWAITED=0.3 DELIVERY=0.8 DIAL=1.0 OWN_BOOT=0.1 MADE_UP_BOOT=0.5"
TIMES += " BOOT_RETRY=0.3 RETRY=(0.2,0.4) STEADY=0.3 CLOSE=0.5 REDIAL=((0,0.4),(0.1,0.4))"

# Why a server got a message again.
REFUSED = "the server had answered it with a CallError"
UNANSWERED = "the server had not answered it"
SERVER_DIED = "the server died before it answered"
CONNECTION_DIED = "the server died before the proxy had noted its answer"
PROXY_DIED = "the proxy died before it had noted the answer"
CHARGER_AGAIN = "the charger had heard no answer and sent it again"


@dataclass
class Report:
    """What a run found. All is well if there are no problems."""

    problems: list[str] = field(default_factory=list)  # A line each; what it is comes first.
    again: Counter[str] = field(default_factory=Counter)  # What was received before came again, by why.
    doubles: Counter[str] = field(default_factory=Counter)  # What was accepted before was accepted again.
    sessions: int = 0
    messages: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Counter[str]] = field(default_factory=dict)  # By server.
    seconds: float = 0.0

    def count(self, *kinds: str) -> int:
        return sum(problem.partition(":")[0] in kinds for problem in self.problems)

    def __str__(self) -> str:
        troubles = sum(self.faults.values(), Counter[str]())
        rows: list[tuple[object, ...]] = [
            ("played", f"in {self.seconds:.0f} s"),
            ("sessions, messages", f"{self.sessions:,}, {self.messages:,}"),
            ("the proxy killed with SIGKILL", f"{self.kills.total():,} times: {listed(self.kills)}"),
            ("servers broken", f"{troubles.total():,} times: {listed(troubles)}"),
            ("lost", self.count("lost", "unanswered")),
            ("at the wrong server", self.count("wrong server")),
            ("out of order", self.count("order")),
            ("received again, each explained", f"{self.again.total():,}: {listed(self.again)}"),
            ("of these, accepted again", f"{self.doubles.total():,}: {listed(self.doubles)}"),
            ("received again, not explained; altered; unknown", self.count("double", "altered", "unknown")),
            ("problems", len(self.problems)),
        ]
        return "\n".join([table(rows), *self.problems])


class Ledger:
    """Compares what the chargers were told with what the servers have got."""

    def __init__(self, books: Books, deaths: list[float]) -> None:
        self.sessions = books.sessions
        self.deaths = deaths  # Of the proxy.
        self.said = {said.key: said for session in self.sessions for said in session.messages}
        self.got = books.receipts  # In the order of their coming.
        self.report = Report(sessions=len(self.sessions), messages=len(self.said))

    def check(self) -> Report:
        for session in self.sessions:
            for said in session.messages:
                self._check_arrival(said)
                self._check_repeats(said)
            self._check_order(session)
            self._check_transaction_ids(session)
        for server, got in self.got.items():
            for key in got.keys() - self.said.keys():
                self._problem("unknown", f"{server} got {key}, which no charger said")
        return self.report

    def _problem(self, kind: str, what: str) -> None:
        self.report.problems.append(f"{kind}: {what}")

    def _at_owner(self, said: Said) -> list[Receipt]:
        return self.got[said.session.owner].get(said.key, [])

    def _accepted(self, said: Said) -> list[Receipt]:
        return [receipt for receipt in self._at_owner(said) if receipt.is_accepted]

    def _check_arrival(self, said: Said) -> None:
        """What is answered stands at the owner as it was said, and nowhere else."""
        receipts = self._at_owner(said)
        if said.answered is None:
            self._problem("unanswered", said.name)
        elif not self._accepted(said):
            self._problem("lost", f"{said.name}; its owner got it {len(receipts)} times")
        if any(said.key in got for server, got in self.got.items() if server != said.session.owner):
            self._problem("wrong server", said.name)
        if any((got.action, content(got)) != (said.action, content(said)) for got in receipts):
            self._problem("altered", said.name)

    def _check_order(self, session: Session) -> None:
        """Nothing comes before what was said before it is accepted, and nothing comes back."""
        places = enumerate(session.messages)
        arrivals = [(receipt.received, place) for place, said in places for receipt in self._at_owner(said)]
        newest = 0
        for at, place in sorted(arrivals):
            said, last, before = (session.messages[n] for n in (place, newest, max(place - 1, 0)))
            if place < newest and not self._is_passed_over(said, at):
                self._problem("order", f"{said.name} came again after {last.name}")
            times = [receipt.answered or at for receipt in self._accepted(before)]
            if place and min(times, default=at + 1) > at and not self._is_passed_over(before, at):
                self._problem("order", f"{said.name} came before {before.name} was accepted")
            newest = max(newest, place)

    def _is_passed_over(self, said: Said, at: float) -> bool:
        """Whether the rest of the session had not to wait for a message any more, which its owner missed."""
        messages = said.session.messages
        missed = self._missed(said, at)
        if said.is_kept and said.is_relayed:
            # The verdict on a badge waits for the events before it until the first of them fails.
            return any(self._missed(kept, at) for kept in messages[: messages.index(said) + 1])
        tries = 1 if said.is_reading else TRIES
        return said is not messages[0] and sum(receipt.is_refused for receipt in missed) >= tries

    def _missed(self, said: Said, at: float) -> list[Receipt]:
        return [r for r in self._at_owner(said) if r.received < at and not r.is_accepted]

    def _check_transaction_ids(self, session: Session) -> None:
        """What follows a start names an id that the owner gave for this very start."""
        if session.version == "ocpp1.6":
            given = [receipt.answer["transactionId"] for receipt in self._accepted(session.messages[0])]
            for said in session.messages[1:]:
                for named in {receipt.payload.get("transactionId") for receipt in self._at_owner(said)}:
                    if named not in given:
                        self._problem("transaction", f"{said.name} names {named}; its start got {given}")

    def _check_repeats(self, said: Said) -> None:
        receipts = self._at_owner(said)
        for number, receipt in enumerate(receipts[1:], 1):
            before = receipts[:number]
            why = self._why_again(said, before, receipt)
            if why:
                self.report.again[why] += 1
                self.report.doubles[why] += receipt.is_accepted and any(old.is_accepted for old in before)
            else:
                apart = receipt.received - before[-1].received
                self._problem("double", f"{said.name} came again after {apart:.2f} s, for no reason")

    def _why_again(self, said: Said, before: list[Receipt], receipt: Receipt) -> str:
        """Return why a message came again, "" for no reason."""
        same = [old for old in before if old.message_id == receipt.message_id]
        if same:
            return self._why_delivered_again(same[-1], receipt)
        # A repeat of what the proxy has stored is known to it; MeterValues are never taken for repeats.
        may_repeat = said.is_relayed or said.action == "MeterValues"
        times = sum(at <= receipt.received for at in said.sent) if may_repeat else 1
        # A stored message keeps its id until it meets a CallError.
        is_stored = said.is_kept or not said.is_relayed
        refused = sum(old.is_refused for old in before) if is_stored else 0
        ids = len({old.message_id for old in before})
        return CHARGER_AGAIN if times > ids else REFUSED if times + refused > ids else ""

    def _why_delivered_again(self, first: Receipt, second: Receipt) -> str:
        """Return why the proxy sent the same once more, "" for no reason."""
        if first.payload != second.payload or first.visit is second.visit:
            return ""
        if first.is_refused:
            return REFUSED
        if first.answered is None:
            return UNANSWERED if first.visit.cut is None else SERVER_DIED
        if first.visit.cut and abs(first.visit.cut - first.answered) <= NOTING_SECONDS:
            return CONNECTION_DIED
        deaths = [death for death in self.deaths if first.received <= death <= second.received]
        is_near = any(abs(death - first.answered) <= NOTING_SECONDS for death in deaths)
        return PROXY_DIED if is_near else ""


def content(message: Said | Receipt) -> dict[str, Any]:
    """Return the payload without what the proxy may have to translate."""
    return {key: value for key, value in message.payload.items() if key != "transactionId"}


async def trouble(server: Server, is_over: asyncio.Event) -> None:
    """Let a server have each fault in turn, in an order of its own, until it is over."""
    while True:
        for fault in server.luck.sample(FAULTS, len(FAULTS)):
            await asyncio.sleep(server.luck.uniform(*GAP_SECONDS))
            if is_over.is_set():
                return
            await fault(server)
            server.faults[fault.__name__] += 1


class Run(Fleet):
    """One run: the peers, the proxy, what breaks, and the comparison of the books."""

    def __init__(
        self, folder: Path, seed: int, is_unsynced: bool = False, level: str = "WARNING", haste: float = 1.0
    ) -> None:
        self.is_unsynced = is_unsynced  # Nothing is on disk: something is lost, and nothing else breaks.
        self.haste = haste  # Deaths come so many times as fast.
        state = "none" if is_unsynced else "state.db"
        settings = {"proxy": level, "rfid": "full", "call_timeout": 1, "primary_grace": 1, "state": state}
        super().__init__(folder, CHARGERS, seed, Pace(), settings)
        self.deaths: list[float] = []
        self.kills: Counter[str] = Counter()

    async def play(self, kills: int, seconds: float = 0.0) -> Report:
        """Let everything break for so many kills and so long, then let everything arrive."""
        begun = now()
        async with self.alive():
            await self._break(kills, begun + seconds)
            self.plays = False
            with suppress(TimeoutError):
                await eventually(self.has_come_to_rest, FINISH_SECONDS)
            for charger in self.chargers:
                charger.leave()
            # What was refused with CallErrors is tried again when the proxy starts; no charger is needed.
            await self.proxy.stop(STOP_SECONDS)
            await self._start()
            await self._settle()
        report = Ledger(self.books, self.deaths).check()
        report.problems += [f"logged: {line}" for line in self.proxy.told(" ERROR ")]
        report.kills, report.seconds = self.kills, now() - begun
        report.faults = {server.name: server.faults for server in self.servers}
        return report

    async def _start(self, point: str = "", number: int = 0) -> None:
        """Start the proxy; it is to kill itself when it comes by the point for the n-th time."""
        death = point, str(number), str(self.servers[1].port)
        await self.proxy.start("--times", TIMES, "--death", *death, is_awaited=False)

    async def _break(self, kills: int, until: float) -> None:
        """Kill the proxy again and again while the servers have their troubles; leave all of them well."""
        is_over = asyncio.Event()
        servers = [] if self.is_unsynced else self.servers
        troubles = [asyncio.create_task(trouble(server, is_over)) for server in servers]
        points = [OUTSIDE] if self.is_unsynced else [OUTSIDE, *POINTS]
        for point in (point for _ in count() for point in self.luck.sample(points, len(points))):
            if len(self.deaths) >= kills and now() >= until:
                break
            await self._start(point, self.luck.randint(1, round(MOST_PASSES / self.haste)))
            life = self.luck.uniform(*LIFE_SECONDS) if point == OUTSIDE else LONGEST_LIFE_SECONDS
            has_killed_itself = await self._ends(life / self.haste)
            self.deaths.append(now())
            self.kills[point if has_killed_itself else OUTSIDE] += 1
        is_over.set()
        await asyncio.gather(*troubles)
        await self._start()

    async def _ends(self, seconds: float) -> bool:
        """Wait until the proxy has killed itself; kill it if it has not by then. Return whether it has."""
        process = self.proxy.process
        assert process is not None
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
        has_ended = process.returncode is not None
        await self.proxy.kill()
        code = process.returncode
        assert code == -signal.SIGKILL, f"it ended with {code}: {self.proxy.told('')}"
        return has_ended

    async def _settle(self) -> None:
        """Wait until everything has arrived, or nothing arrives any more."""
        until, before = now() + SETTLE_SECONDS, -1
        while (left := len(self.books.missing())) not in (0, before) and now() < until:
            before = left
            await asyncio.sleep(QUIET_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break everything around the proxy; count what is lost.")
    parser.add_argument("--minutes", type=float, default=0.0, help="default: a short run")
    parser.add_argument("--unsynced", action="store_true", help="nothing on disk: something has to be lost")

    async def play(folder: Path, options: argparse.Namespace) -> Report:
        run = Run(folder, options.seed, options.unsynced, "DEBUG" if options.keep else "WARNING")
        return await run.play(KILLS, options.minutes * 60)

    return fleet.command(parser, play)


if __name__ == "__main__":
    sys.exit(main())
