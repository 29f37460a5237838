"""Anything at all, as a conversation of all three peers: what a Storm checks holds whatever they say."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ocpp_2w_proxy as p
from tests.corpus import texts
from tests.proof.storms import ODD, PEERS, SERVERS, Storm, edited, templates

MODES = pytest.mark.parametrize("more", ["", "secondary_replies = forward"], ids=["ignore", "forward"])
fixed = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
corpus = st.sampled_from([text for text in texts() if len(text) < 1000])
edits = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(ODD) | st.text(max_size=3)), max_size=3)
times = st.sampled_from([0.5, 5.0, 31.0, 130.0])

Step = tuple[tuple[str, str], list[tuple[int, str]], str] | float


def conversations(version: str) -> st.SearchStrategy[list[Step]]:
    """What three peers may say: who, what, how it is changed, and under which id; or time passes."""
    known = st.sampled_from(templates(version)) | st.tuples(st.sampled_from(PEERS), corpus)
    ids = st.sampled_from(["i", "j", "\\ud800"])
    return st.lists(st.tuples(known, edits, ids) | times, min_size=20, max_size=50)


@MODES
@pytest.mark.parametrize("version", p.VOCABULARIES)
def test_a_storm(version: str, more: str, tmp_path: Path) -> None:
    """Whatever all three peers say, what is promised holds, and a proxy that comes after it remembers it."""
    files = (tmp_path / f"{number}.db" for number in itertools.count())

    @settings(fixed, max_examples=100)
    @given(conversations(version))
    def play(said: list[Step]) -> None:
        storm = Storm(version, more, state=next(files))
        for step in said:
            if isinstance(step, float):
                storm.passes(step)
            else:
                (peer, text), changes, message_id = step
                storm.says(peer, edited(text, changes).replace('"i"', f'"{message_id}"', 1))
        storm.restart()
        storm.stage.journal.database.close()

    play()


# One peer each. `<a|b>` is one or the other. MY is a server's own badge, # a number of the step's own, @n a
# session that the charger was told; ids of servers collide with each other, the proxy's, and unusable ones.
FAIR = """
charger [2,"#","Heartbeat",{}]
charger [2,"#","BootNotification",{"chargePointVendor":"V","chargePointModel":"M"}]
charger [2,"#","Authorize",{"idTag":"<PRIM|SECO><1|2>"}]
charger [2,"#","StatusNotification",{"connectorId":<1|2>,"errorCode":"","status":"<Available|Charging>"}]
charger [2,"#","StartTransaction",{"connectorId":<1|2>,"idTag":"PRIM<1|2>","timestamp":"#"}]
charger [2,"#","StartTransaction",{"connectorId":<1|2>,"idTag":"SECO<1|2>","timestamp":"#"}]
charger [2,"#","MeterValues",{@<0|1|2|3>,"connectorId":<1|2>}]
charger [2,"#","StopTransaction",{@<0|1|2|3>,"idTag":"<PRIM|SECO>1"}]
charger [3,"{id}",{"status":"Accepted"}]
primary [3,"{id}",{"transactionId":ID,"idTagInfo":{"status":"Accepted"},"status":"Accepted"}]
secondary [3,"{id}",{"transactionId":ID,"idTagInfo":{"status":"Accepted"},"status":"Accepted"}]
<charger|primary|secondary> [4,"{id}","InternalError","",{}]
<primary|secondary> [2,"<1|2>","RemoteStopTransaction",{"transactionId":ID}]
<primary|secondary> [2,"<1|2>","RemoteStartTransaction",{"idTag":"MY1"}]
<primary|secondary> [2,"<1|2>","ReserveNow",{"idTag":"MY1","reservationId":5,"expiryDate":""}]
<primary|secondary> [2,"<1|2>","<CancelReservation|GetLog>",{"reservationId":5,"requestId":3}]
<charger is lost|primary is lost|secondary is lost|charger returns|proxy is killed|1 s|6 s|12 s|35 s>
""".replace("ID", "<1|2|7|0|-1|2000000000|2000000001>")


def chosen(line: str) -> st.SearchStrategy[str]:
    """Return the line with one of each choice."""
    choices = (st.sampled_from(part.split("|")) for part in re.split("[<>]", line))
    return st.tuples(*choices).map("".join)


def happen(storm: Storm, number: int, step: str) -> None:
    peer, _, text = step.partition(" ")
    if text == "s":
        storm.passes(float(peer))
    elif text == "returns":
        storm.stage.charger_connects()
        storm.settle("nobody")
    elif text == "is lost":
        storm.link(peer).lost()
        storm.settle("nobody")
    elif text == "is killed":
        storm.settle("nobody")
        storm.restart()
    elif text.startswith("[3"):  # Whatever there is to answer.
        while storm.due[peer]:
            storm.says(peer, text)
    elif "@" not in text or storm.told:
        for session in re.findall(r"@\d", text):
            known = list(storm.told.items())
            transaction_id, badge = known[-1 - int(session[1]) % len(known)]
            text = text.replace(session, f'"transactionId":{transaction_id},"session":"{badge}"')
        storm.says(peer, text.replace("#", f"c{number}").replace("MY", peer[:4].upper()))


@MODES
def test_each_badge_and_each_session_has_one_server(more: str, tmp_path: Path) -> None:
    """Over losses, returns and kills: what a server gets of them belongs to it; each Call has one answer."""
    files = (tmp_path / f"{number}.db" for number in itertools.count())

    @settings(fixed, max_examples=80)
    @given(st.lists(st.sampled_from(FAIR.strip().splitlines()).flatmap(chosen), min_size=30, max_size=60))
    def play(steps: list[str]) -> None:
        storm = Storm("ocpp1.6", more, is_fair=True, state=next(files))
        for number, step in enumerate(steps):
            happen(storm, number, step)
        storm.stage.journal.database.close()

    play()


# Other values where a number or a text is expected.
VALUES = ["\ud800", "\x00", "😀", 10**30, -(10**30), 2**63, -(2**63) - 1, 1.5, float("inf"), None, True, [1]]
VALUES += [10**400, "\udfff\x00x", "0001-01-01T00:00:00+14:00"]


def changed(node: Any, value: Any) -> Any:
    """Return what is said with another value in every place, but for those that say what it is about."""
    if isinstance(node, dict):
        return {key: inner if key == "eventType" else changed(inner, value) for key, inner in node.items()}
    if isinstance(node, list):
        return [changed(inner, value) for inner in node]
    return f"{node}{value}" if str(node)[:4] in ("PRIM", "SECO") else value


@pytest.mark.parametrize(("value", "answer"), [*zip(VALUES, VALUES[::-1], strict=True)])
@pytest.mark.parametrize("version", p.VOCABULARIES)
def test_whatever_is_said_the_proxy_goes_on_saving(
    version: str, value: Any, answer: Any, tmp_path: Path
) -> None:
    """And one that is killed knows what it knew."""
    storm = Storm(version, state=tmp_path / "state.db")
    for sender, text in templates(version):
        kind, message_id, *said = json.loads(text.replace("{transaction}", "7"))
        said[-1] = changed(said[-1], value if kind == 2 else answer)
        storm.says(sender, p.dump([kind, message_id, *said]))
        for name in SERVERS:
            storm.says(name, p.dump([3, "{id}", {"transactionId": answer, "idTagInfo": {"status": "A"}}]))
    storm.restart()
    storm.stage.journal.database.close()
