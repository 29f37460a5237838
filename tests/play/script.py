"""
Plays in words: the steps, such as "charger starts 1, secondary leaves, 6 s", and what everybody has heard.

A Call is noted by its name with the transaction that it names ("Stop:7"), its seqNo ("Event:0"), its status
or its model; an answer by its id with its verdict ("1:Accepted"); "|" stands where the play says "look".
What a message says besides is written as `idTag=SECO1 connectorId=1`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from logging.handlers import BufferingHandler
from typing import Any
from unittest.mock import patch

import pytest

import ocpp_2w_proxy as p
from tests.play import kills
from tests.play.kills import come_back, killed, reads, save, stops, waits
from tests.play.plays import INI, Stage, StageLink

NAMES = {"StartTransaction": "Start", "StopTransaction": "Stop", "MeterValues": "Meter"}
NAMES |= {"TransactionEvent": "Event", "StatusNotification": "Status", "BootNotification": "Boot"}
TAKEN = ("BootNotification", "Heartbeat")  # Accepted at once, and noted only where the play says "all noted".


def payload_of(words: tuple[str, ...]) -> dict[str, Any]:
    """Read `name=value` words; a value is JSON, or else a text."""
    payload: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            payload[name] = json.loads(value)
        except ValueError:
            payload[name] = value
    return payload


class Script:
    """Lets steps happen on a stage, and notes what is heard."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.heard: dict[str, list[str]] = {"charger": [], "primary": [], "secondary": []}
        self.due: dict[str, list[list[Any]]] = {"primary": [], "secondary": []}  # Unanswered Calls.
        self.numbers = {"primary": 7, "secondary": 7}  # The next transaction id of each server.
        self.number: Any = -1  # The transaction id that the charger was told last.
        self.asked: dict[str, p.MessageId] = {}  # What the charger was asked, by Action and id.
        self.boots = {"primary": ("Accepted", "300"), "secondary": ("Accepted", "300")}  # What they answer.
        self.notes_all = False
        self.disk, self.limit = ExitStack(), ExitStack()
        self.log = BufferingHandler(1_000_000)
        self.listen()
        self.heard = {name: [] for name in self.heard}

    def plays(self, steps: str) -> Script:
        steps = re.sub(r"(\d+) times \((.*?)\)", lambda m: ", ".join([m[2]] * int(m[1])), steps)
        for step in re.split(r",\s+", steps.strip()):
            words = [*step.split(), ""]
            who, verb, more = words[0], words[1], words[2:-1]
            if who == "proxy" and verb != "retries":
                self.due = {"primary": [], "secondary": []}
            if verb == "s":
                waits(self.stage, float(who))
            elif verb == "days":  # All at once.
                self.stage.time += float(who) * p.DAY
                self.stage.relay.carry_out(self.stage.relay.router.sweep(self.stage.now()))
                save(self.stage)
            elif who == "clock":  # Of the wall; such as "clock + 30".
                self.stage.utc += float(f"{verb}{more[0]}") * p.DAY
            elif who == "look":
                for heard in self.heard.values():
                    heard.append("|")
            elif who in ("primary", "secondary"):
                self.server(who, verb, *more)
            else:
                act = VERBS.get(f"{who} {verb}") or getattr(Script, f"{who}_{verb}")
                act(self, *more)
            self.listen()
        return self

    def found(self, name: str) -> str:
        """Return what a peer has heard; or what is stored, refused, claimed, closed, or how many sessions."""
        memory = self.stage.memory
        if name.startswith("told "):  # How many lines of the log have these words in them.
            return str(sum(name[5:] in p.REDACTOR.clean(record.getMessage()) for record in self.log.buffer))
        if name.startswith("file "):  # The columns that are named, of the sessions on disk.
            save(self.stage)
            columns = ", ".join(name.split()[1:])
            rows = self.stage.journal.database.execute(f"SELECT {columns} FROM sessions ORDER BY number")
            return "|".join(" ".join(map(str, row)).strip() for row in rows)
        if name == "refused at":
            return " ".join(c.peer or "nobody" for c in memory.calls if c.refused)
        if name == "claims":
            return " ".join(claim.badge for claim in memory.claims)
        if name == "closed":
            links = (self.stage.charger, self.stage.primary, self.stage.secondary)
            return " ".join(f"{link.name}:{link.closed_with[0]}" for link in links if link.closed_with)
        if name == "sessions":
            return str(len(memory.sessions))
        if name in ("stored", "refused"):
            calls = memory.stored if name == "stored" else [c for c in memory.calls if c.refused]
            return " ".join(NAMES.get(call.action, call.action) for call in calls)
        return re.sub(r" ?\| ?", "|", " ".join(self.heard[name]))

    # The charger, the proxy and its disk: what VERBS does not have.

    def sends(self, message_id: str, action: str, **payload: Any) -> None:
        self.stage.charger.calls(message_id, action, **payload)

    def charger_stops(self, message_id: str, *more: str) -> None:
        """Stop the transaction whose id is told, or else the one that the charger was told last."""
        number, badge, *_ = [word for word in more if "=" not in word] + ["", ""]
        told = payload_of(tuple(word for word in more if "=" in word))
        if badge:
            told["idTag"] = badge
        stops(self.stage, int(number) if number else self.number, message_id, **told)

    def charger_tells(
        self, number: str, kind: str = "Updated", badge: str = "", name: str = "T", *more: str
    ) -> None:
        told = payload_of(more)
        outside: dict[str, Any] = {key: told.pop(key) for key in ("timestamp", "evse") if key in told}
        if badge not in ("", "-"):
            outside["idToken"] = {"idToken": badge, "type": "ISO14443"}
        event = {"eventType": kind, "seqNo": int(number), "transactionInfo": {**told, "transactionId": name}}
        self.sends(f"{name}{number}", "TransactionEvent", **event, **outside)

    def charger_returns(self, version: str = "") -> None:
        self.stage.charger_connects(version)
        self.due["primary"] = []

    def proxy_with(self, *more: str) -> None:
        """Started again with these lines in its ini, such as `primary_grace=2`; the others come back."""
        killed(self.stage, INI.format(more="\n".join(more)))

    def proxy_forgets(self) -> None:
        """Its Relay, which is idle, and makes another for a charger that comes."""
        assert self.stage.relay.is_idle
        self.stage.begin(self.stage.relay.version)

    def proxy_dies(self) -> None:
        """Killed as it is, with what the disk has."""
        self.stage.killed()
        come_back(self.stage)

    def proxy_starts(self, ini: str = "NORMAL") -> None:
        """Killed and started again with an ini of tests.play.kills; nobody comes back by himself."""
        save(self.stage)
        self.stage.killed(getattr(kills, ini))
        self.stage.relay.deliver()

    def disk_hangs(self) -> None:
        self.run, self.jobs = self.stage.journal._run, list[Any]()
        hangs = patch.object(self.stage.journal, "_run", lambda *job: self.jobs.append(job))
        self.disk.enter_context(hangs)

    def disk_well(self) -> None:
        self.disk.close()
        save(self.stage)

    # The servers.

    def server(self, name: p.Peer, verb: str, *more: str) -> None:
        link: StageLink = getattr(self.stage, name)
        if verb == "leaves":
            link.lost()
            self.due[name] = []
        elif verb in ("comes", "returns"):
            setattr(self.stage, name, self.stage.connects(name))
            self.listen()
            self.stage.passes(2.5 if verb == "returns" else 0)
        elif verb == "boots":  # What it answers to a BootNotification from now on; "-" is nothing.
            self.boots[name] = (more[0], more[-1])
        elif verb == "asks":  # The charger, which accepts.
            self.stage.asks(name, more[0], **payload_of(more[1:]))
        elif verb == "takes":  # All that comes, one after the other.
            while self.due[name]:
                self.server(name, "accepts")
                self.listen()
        elif verb == "calls":
            link.calls(*more[:2], **payload_of(more[2:]))
        elif verb == "claims":  # With a remote start.
            self.stage.asks(name, "RemoteStartTransaction", idTag=more[0])
        elif verb == "forgets":  # What it has heard first, for ever.
            self.due[name].pop(0)
        else:
            self.answers(link, verb, *self.due[name].pop(0)[1:])

    def answers(
        self, link: StageLink, verb: str, message_id: str, action: str, payload: dict[str, Any]
    ) -> None:
        """Let a server accept, refuse, block (with a transaction id) or fail what it has heard first."""
        if verb == "fails":
            link.errs(message_id)
            return
        verdict = {"status": "Accepted" if verb == "accepts" else "Blocked"}
        answer: dict[str, Any] = {}
        if action == "StartTransaction":
            answer["transactionId"] = 0 if verb == "refuses" else self.numbers[link.name]
            self.numbers[link.name] += 1
        if "idTag" in payload:
            answer["idTagInfo"] = verdict
        if "idToken" in payload:
            answer["idTokenInfo"] = verdict
        link.answers(message_id, **answer)

    # What is heard.

    def listen(self) -> None:
        for name in ("primary", "secondary"):
            link: StageLink = getattr(self.stage, name)
            while heard := link.hears():
                for message in heard:
                    self.server_hears(link, message)
        for kind, message_id, payload, *_ in self.stage.charger.hears():
            if kind == 2:
                self.asked[payload] = self.asked[message_id] = message_id
                self.heard["charger"].append(payload)
            if kind == 2 or message_id == "boot":
                continue
            self.number = payload.get("transactionId", self.number) if kind == 3 else self.number
            verdict = "error" if kind == 4 else payload.get("certificateStatus") or p.verdict_of(payload)
            self.heard["charger"].append(f"{message_id}:{verdict}" if verdict else message_id)

    def server_hears(self, link: StageLink, message: list[Any]) -> None:
        """Note a message, and answer what a server accepts by itself."""
        if message[0] != 2:  # An answer to its own Call.
            rejected = ":Rejected" * (message[2] == {"status": "Rejected"})
            self.heard[link.name].append(message[1] + (rejected if message[0] == 3 else ":error"))
            return
        if message[2] not in TAKEN or self.notes_all:
            self.heard[link.name].append(self.name_of(*message[2:]))
        if message[2] not in TAKEN:
            self.due[link.name].append(message)
        elif self.boots[link.name][0] != "-":
            status, interval = self.boots[link.name]
            link.answers(message[1], status=status, currentTime="x", interval=int(interval))

    def name_of(self, action: str, payload: dict[str, Any]) -> str:
        named = payload.get("transactionId", payload.get("seqNo", payload.get("chargePointModel")))
        if action == "StatusNotification":
            named = payload.get("status")
        if action == "TransactionEvent":
            named = f"{payload['transactionInfo']['transactionId']}{named}".removeprefix("T")
        number = f"/{payload['n']}" if "n" in payload else ""
        return NAMES.get(action, action) + ("" if named is None else f":{named}") + number


# What the rest of a step says, as arguments; what it need not say has a default.
VERBS: dict[str, Callable[..., Any]] = {
    "charger sends": lambda s, name, action, *more: s.sends(name, action, **payload_of(more)),
    "charger beats": lambda s, name: s.sends(name, "Heartbeat"),
    "charger shows": lambda s, name, badge="SECO1": s.sends(name, "Authorize", idTag=badge),
    "charger boots": lambda s, model="M": s.sends(
        "boot", "BootNotification", chargePointVendor="V", chargePointModel=model
    ),
    "charger is": lambda s, status, connector=1, name="n": s.sends(
        name, "StatusNotification", connectorId=int(connector), errorCode="NoError", status=status
    ),
    "charger starts": lambda s, name, badge="SECO1", connector=1, meter=0: s.stage.starts(
        badge, name, int(connector), int(meter)
    ),
    "charger reads": lambda s, name, *more: reads(s.stage, s.number, name, **payload_of(more)),
    "charger answers": lambda s, name, status="Accepted", *more: s.stage.charger.answers(
        s.asked[name], status=status, **payload_of(more)
    ),
    "charger fails": lambda s, name: s.stage.charger.errs(s.asked[name]),
    "charger leaves": lambda s: s.stage.charger.lost(),
    # Once all is on disk; started again, maybe with an ini of tests.play.kills, and the others come back.
    "proxy killed": lambda s: killed(s.stage),
    "proxy given": lambda s, ini: killed(s.stage, getattr(kills, ini)),
    "proxy retries": lambda s: (s.stage.memory.retry(s.stage.now().utc), s.stage.relay.deliver()),
    "all noted": lambda s: setattr(s, "notes_all", True),
    "limit is": lambda s, name, most: s.limit.enter_context(patch.object(p, name, int(most))),
    "limit ends": lambda s: s.limit.close(),
    "disk full": lambda s: s.disk.enter_context(
        patch.object(s.stage.journal, "_write", lambda _: "database or disk is full")
    ),
    "disk finishes": lambda s: s.run(*s.jobs.pop(0)),  # The save that hangs; the next one hangs.
}


def plays_of(text: str) -> list[Any]:
    """Read plays: a sentence, then the steps, then "=>" and who has heard what."""
    found = []
    for block in re.split(r"\n(?=\S)", textwrap.dedent(text).strip()):
        sentence, _, rest = block.partition("\n")
        steps, _, outcome = " ".join(rest.split()).partition(" =>")
        pairs = ((pair.strip() + " ").rpartition(": ") for pair in outcome.split(";"))
        heard = {name: words.strip() for name, _, words in pairs}
        found.append(pytest.param(steps, heard, id=sentence))
    return found


def plays(
    text: str,
    more: str = "",
    before: str = "",
    then: Iterable[str] = ("",),
    versions: Iterable[str] = ("ocpp1.6",),
    **options: Any,
) -> Callable[..., None]:
    """Return a test of plays with a state file, which stand below a line that says what has to be so.

    `more` stands in the ini, `before` in front of each play, and one of `then` where a play says THEN.
    """
    about, _, rows = textwrap.dedent(text).strip().partition("\n\n")

    @pytest.mark.parametrize("version", versions)
    @pytest.mark.parametrize("now", then)
    @pytest.mark.parametrize(("steps", "heard"), plays_of(rows))
    def test(play: kills.Play, version: str, now: str, steps: str, heard: dict[str, str]) -> None:
        goes_as_told(play(more, version=version, **options), before + steps.replace("THEN", now), heard)

    test.__doc__ = about
    return test


def goes_as_told(stage: Stage, steps: str, heard: dict[str, str]) -> None:
    script = Script(stage)
    p.log.addHandler(script.log)
    try:
        with script.disk, script.limit:
            script.plays(steps)
    finally:
        p.log.removeHandler(script.log)
        found = {name: script.found(name) for name in heard}
    assert found == heard, f"heard was {found}, and not {heard}"
