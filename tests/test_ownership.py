"""Rule 1: whose a Call of the charger is. Plays in OCPP 1.6; test_transactions.py has those in 2.x."""

from __future__ import annotations

import pytest

import ocpp_2w_proxy as p
from tests.play.plays import Stage, actions

FIRST = 2_000_000_000
LAST = 2**31 - 1


def test_a_heartbeat_concerns_the_station_and_goes_to_the_primary() -> None:
    """What nobody owns goes to the primary, and its answer to the charger, both as they came."""
    stage = Stage()
    text = '[2, "1",  "Heartbeat", {} ]'
    stage.charger.says(text)
    assert stage.primary.hears_text() == text
    answer = '[3,"1",{"currentTime" : "2026-01-01T00:00:00Z"}]'
    stage.primary.says(answer)
    assert stage.charger.hears_text() == answer
    assert stage.secondary.hears() == []


def test_an_unknown_action_concerns_the_station() -> None:
    """An Action in no table goes to the primary."""
    stage = Stage()
    stage.charger.calls("1", "Frobnicate", idTag="SECO1")
    assert stage.primary.hears_call()[1] == "Frobnicate"


def test_a_badge_of_the_primary_is_the_primarys() -> None:
    """An Authorize goes to the server that has the badge on its list."""
    stage = Stage()
    stage.charger.calls("1", "Authorize", idTag=" prim7 ")
    assert stage.primary.hears_call() == ("1", "Authorize", {"idTag": " prim7 "})
    assert stage.charger.hears() == []


def test_a_badge_of_the_secondary_is_the_secondarys_and_the_proxy_answers() -> None:
    """The charger hears the proxy, and the secondary's own answer goes nowhere."""
    stage = Stage()
    stage.charger.calls("1", "Authorize", idTag="seco9")
    assert stage.charger.hears() == [[3, "1", {"idTagInfo": {"status": "Accepted"}}]]
    message_id, action, payload = stage.secondary.hears_call()
    assert (action, payload) == ("Authorize", {"idTag": "seco9"})
    stage.secondary.answers(message_id, idTagInfo={"status": "Blocked"})
    assert stage.charger.hears() == []
    assert stage.primary.hears() == []


@pytest.mark.parametrize(
    ("unknown", "owner", "status"),
    [("primary", "primary", None), ("secondary", "secondary", "Accepted"), ("reject", None, "Invalid")],
)
def test_a_badge_on_neither_list_follows_unknown_rfid(unknown: str, owner: str, status: str) -> None:
    """`unknown_rfid` says whose a badge is that no list names."""
    stage = Stage(f"unknown_rfid = {unknown}")
    stage.charger.calls("1", "Authorize", idTag="STRANGER")
    heard = {"primary": actions(stage.primary.hears()), "secondary": actions(stage.secondary.hears())}
    assert heard == {name: ["Authorize"] if name == owner else [] for name in heard}
    answers = [message[2]["idTagInfo"]["status"] for message in stage.charger.hears()]
    assert answers == ([status] if status else [])


def test_an_exact_entry_wins_over_a_pattern_and_a_longer_pattern_over_a_shorter() -> None:
    """The lists are compared from the most to the least definite entry."""
    ini = """[ext-server]
server = ws://a
secondary_server = ws://b
primary_rfid = 04*, 0412FF
secondary_rfid = 0412*
{more}"""
    stage = Stage(ini=ini)
    for badge, owner in (("0499", stage.primary), ("041234", stage.secondary), ("0412ff", stage.primary)):
        stage.charger.calls(badge, "Authorize", idTag=badge)
        assert owner.hears_call()[2] == {"idTag": badge}
        if owner is stage.primary:
            stage.primary.answers(badge, idTagInfo={"status": "Accepted"})
        stage.charger.hears()


def test_without_a_secondary_every_badge_is_the_primarys() -> None:
    """A list for a server that the ini does not name sends nothing anywhere else."""
    stage = Stage(ini="[ext-server]\nserver = ws://a\nsecondary_rfid = SECO*\n{more}")
    stage.charger.calls("1", "Authorize", idTag="SECO1")
    assert stage.primary.hears_call()[1] == "Authorize"


def test_a_numeric_badge_is_compared_as_its_digits() -> None:
    """A charger that sends its badge as a number is routed all the same."""
    stage = Stage(
        ini="[ext-server]\nserver = ws://a\nsecondary_server = ws://b\nsecondary_rfid = 1234\n{more}"
    )
    stage.charger.calls("1", "Authorize", idTag=1234)
    assert stage.secondary.hears_call()[2] == {"idTag": 1234}


# The transaction.


def test_a_session_of_the_primary_stays_with_the_primary() -> None:
    """Its meter values and its stop follow the transaction id, and a stop badge never changes the owner."""
    stage = Stage()
    assert stage.primary_session(server_id=7) == 7
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=7, meterValue=[])
    assert stage.primary.hears_call()[1] == "MeterValues"
    stage.primary.answers("m")
    stage.charger.calls("e", "StopTransaction", transactionId=7, idTag="SECO1", meterStop=1, timestamp="t")
    assert stage.primary.hears_call() == (
        "e",
        "StopTransaction",
        {"transactionId": 7, "idTag": "SECO1", "meterStop": 1, "timestamp": "t"},
    )
    assert stage.secondary.hears() == []


def test_a_session_of_the_secondary_is_answered_here_and_delivered_there() -> None:
    """The charger gets an id of the proxy with the owner in its lowest bit; the secondary its own id."""
    stage = Stage()
    transaction_id = stage.secondary_session(server_id=7)
    assert FIRST <= transaction_id <= LAST
    assert transaction_id % 2 == 1
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    assert stage.charger.hears() == [[3, "m", {}]]
    message_id, action, payload = stage.secondary.hears_call()
    assert (action, payload["transactionId"]) == ("MeterValues", 7)
    stage.secondary.answers(message_id)
    stage.charger.calls("e", "StopTransaction", transactionId=transaction_id, idTag="PRIM1", meterStop=5)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.secondary.hears_call()[2] == {"transactionId": 7, "idTag": "PRIM1", "meterStop": 5}
    assert stage.primary.hears() == []


def test_an_ended_session_can_be_named_for_seven_days() -> None:
    """Meter values that come after the stop still find their owner; a week later nobody knows them."""
    stage = Stage()
    transaction_id = stage.secondary_session()
    stage.charger.calls("e", "StopTransaction", transactionId=transaction_id, meterStop=5, timestamp="t")
    assert [action for action, _ in stage.delivers()] == ["StopTransaction"]
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    assert [action for action, _ in stage.delivers()] == ["MeterValues"]
    stage.sweeps(p.SESSION_SECONDS + 1)
    assert stage.memory.sessions == {}


def test_a_session_without_a_stop_counts_as_ended_after_thirty_silent_days() -> None:
    """It is told as one without a stop, and forgotten seven days later."""
    stage = Stage()
    stage.primary_session()
    assert stage.sweeps(29 * p.DAY) == []
    told = stage.sweeps(p.SILENT_SECONDS + 1)
    assert any(isinstance(decision, p.Told) and "no stop" in decision.what for decision in told)
    assert len(stage.memory.sessions) == 1
    assert stage.memory.on_connector(1) is None
    stage.sweeps(p.SILENT_SECONDS + p.SESSION_SECONDS + 2)
    assert stage.memory.sessions == {}


def test_an_unknown_transaction_is_never_guessed() -> None:
    """A stop with an id that nobody here knows goes to the primary, whatever its badge."""
    stage = Stage()
    stage.secondary_session()
    stage.charger.calls("e", "StopTransaction", transactionId=4711, idTag="SECO1", meterStop=5, timestamp="t")
    assert stage.primary.hears_call()[2]["transactionId"] == 4711


@pytest.mark.parametrize("bit", [0, 1])
def test_a_forgotten_id_of_the_proxy_is_kept_and_sent_to_nobody(bit: int) -> None:
    """The owner stands in the id's lowest bit; its own id is lost, so nothing is delivered."""
    stage = Stage()
    stage.charger.calls("e", "StopTransaction", transactionId=FIRST + bit, meterStop=5, timestamp="t")
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.primary.hears() == []
    assert stage.secondary.hears() == []
    (refusal,) = stage.memory.refused
    assert (refusal.action, refusal.refused) == ("StopTransaction", "its start is not known here")


def test_two_sessions_on_two_connectors_are_independent() -> None:
    """Each connector's session has its own owner."""
    stage = Stage()
    stage.primary_session(server_id=1, connector=1)
    other = stage.secondary_session(server_id=1, connector=2)
    stage.charger.calls("a", "MeterValues", connectorId=1, transactionId=1, meterValue=[])
    assert stage.primary.hears_call()[0] == "a"
    stage.primary.answers("a")
    stage.charger.calls("b", "MeterValues", connectorId=2, transactionId=other, meterValue=[])
    assert stage.secondary.hears_call()[2]["transactionId"] == 1


def test_a_transaction_that_two_servers_share_in_one_message_is_the_primarys() -> None:
    """A report that names transactions of both servers cannot be split."""
    stage = Stage(version="ocpp2.0.1")
    for number, badge in ((1, "PRIM1"), (2, "SECO1")):
        stage.charger.calls(
            str(number),
            "TransactionEvent",
            eventType="Started",
            seqNo=0,
            transactionInfo={"transactionId": f"T{number}"},
            idToken={"idToken": badge, "type": "ISO14443"},
        )
    stage.primary.answers("1")
    stage.primary.hears()
    items = [{"transactionId": "T1"}, {"transactionId": "T2"}]
    stage.charger.calls("n", "NotifyEvent", eventData=items)
    assert stage.primary.hears_call()[0] == "n"


# Ids that are not usable.


@pytest.mark.parametrize("unusable", [-1, 0, 2**63 - 1, 2**31, None, "x" * 0, [], True])
def test_a_stop_without_a_usable_id_belongs_to_the_open_session_of_its_badge(unusable: object) -> None:
    """The owner's transaction id is written in where the unusable one stood."""
    stage = Stage()
    stage.primary_session(server_id=7, connector=1)
    stage.secondary_session(server_id=9, badge="SECO1", connector=2)
    stage.charger.calls("e", "StopTransaction", transactionId=unusable, idTag="seco1", meterStop=5)
    assert stage.secondary.hears_call()[2] == {"transactionId": 9, "idTag": "seco1", "meterStop": 5}


def test_a_missing_transaction_id_is_written_in_as_the_payloads_first_key() -> None:
    """Meter values of a connector with an open session get the owner's id, and nothing else changes."""
    stage = Stage()
    stage.primary_session(server_id=7)
    stage.charger.says('[2,"m","MeterValues", {"connectorId":1, "more": [] }]')
    text = stage.primary.hears_text()
    assert text == '[2,"m","MeterValues", {"transactionId":7,"connectorId":1, "more": [] }]'


def test_meter_values_without_an_id_belong_to_the_session_on_their_connector() -> None:
    """The owner is the session's, not the primary by default."""
    stage = Stage()
    stage.secondary_session(server_id=9, connector=2)
    stage.charger.calls("m", "MeterValues", connectorId=2, transactionId=0, meterValue=[])
    assert stage.secondary.hears_call()[2]["transactionId"] == 9


@pytest.mark.parametrize("connector", [0, 1, None, "1"])
def test_meter_values_of_a_connector_without_a_session_concern_the_station(connector: object) -> None:
    """The main meter and idle connectors are the primary's matter."""
    stage = Stage()
    stage.secondary_session(connector=2)
    stage.charger.calls("m", "MeterValues", connectorId=connector, meterValue=[])
    assert stage.primary.hears_call()[0] == "m"


def test_a_stop_without_an_id_finds_the_only_session_whose_start_was_never_answered() -> None:
    """OCPP 1.6 errata 3.18: such a session is stopped with -1."""
    stage = Stage()
    stage.secondary_session(connector=2)
    stage.starts("PRIM1", "lost", connector=1)
    stage.primary.hears()
    stage.passes(31)
    stage.charger.calls("e", "StopTransaction", transactionId=-1, meterStop=5, timestamp="t")
    assert "StopTransaction" in actions(stage.primary.hears())


def test_a_rejected_session_does_not_keep_a_stop_from_the_only_accepted_one() -> None:
    """A card that was turned away days ago has no stop to wait for."""
    stage = Stage("unknown_rfid = reject")
    stage.starts("STRANGER", "s", connector=2)
    stage.secondary_session(server_id=9)
    stage.charger.calls("e", "StopTransaction", transactionId=-1, meterStop=5, timestamp="t")
    assert stage.secondary.hears_call()[2]["transactionId"] == 9


def test_a_late_answer_to_a_start_is_not_forwarded_but_tells_the_session_its_id() -> None:
    """The charger never heard the id; its stop with -1 reaches the primary with it."""
    stage = Stage()
    stage.starts("PRIM1", "slow")
    stage.primary.hears()
    stage.passes(31)
    stage.primary.answers("slow", transactionId=7, idTagInfo={"status": "Accepted"})
    assert stage.charger.hears() == []
    stage.charger.calls("e", "StopTransaction", transactionId=-1, meterStop=5, timestamp="t")
    assert stage.primary.hears_call()[2]["transactionId"] == 7


def test_a_stop_without_an_id_finds_the_only_open_session() -> None:
    """Ended sessions are no candidates."""
    stage = Stage()
    first = stage.secondary_session()
    stage.charger.calls("e1", "StopTransaction", transactionId=first, meterStop=5, timestamp="t")
    stage.delivers()
    stage.primary_session(server_id=8)
    stage.charger.calls("e2", "StopTransaction", transactionId=0, meterStop=5, timestamp="t")
    assert stage.primary.hears_call()[2]["transactionId"] == 8


@pytest.mark.parametrize("badge", [{"idTag": "SECO1"}, {}])
def test_a_stop_without_an_id_is_not_that_of_a_session_whose_stop_was_lost(badge: dict[str, str]) -> None:
    """A power cut took the first one's stop; the second has its connector, so it is the one that stops."""
    stage = Stage()
    stage.secondary_session(server_id=7)
    stage.starts("SECO1", "again", meter=5000)
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=71)
    stage.charger.calls("e", "StopTransaction", transactionId=-1, meterStop=9000, timestamp="t", **badge)
    assert stage.secondary.hears_call()[2]["transactionId"] == 71
    assert stage.primary.hears() == []


def test_a_stop_without_an_id_is_that_of_the_plugged_session_of_its_badge() -> None:
    """Though its badge has another open one, and another badge is plugged in, too."""
    stage = Stage()
    stage.primary_session(connector=2)
    stage.secondary_session(server_id=7)
    stage.starts("SECO1", "again", meter=5000)
    stage.secondary.answers(stage.secondary.hears_call()[0], transactionId=71)
    stage.charger.calls("e", "StopTransaction", transactionId=-1, meterStop=9, timestamp="t", idTag="SECO1")
    assert stage.secondary.hears_call()[2]["transactionId"] == 71


def test_a_stop_without_an_id_or_candidates_goes_by_its_badge() -> None:
    """Two open sessions of other badges: neither is guessed."""
    stage = Stage()
    stage.primary_session(connector=1)
    stage.secondary_session(connector=2)
    stage.charger.calls("e", "StopTransaction", transactionId=-1, idTag="SECO7", meterStop=5, timestamp="t")
    assert stage.secondary.hears_call()[2]["transactionId"] == -1
    assert len([s for s in stage.memory.sessions.values() if s.ended is None]) == 2


def test_a_refused_start_is_a_session_whose_stop_ends_no_other() -> None:
    """A server answers it with id 0: the charger gets another, and the server its 0 back."""
    stage = Stage()
    stage.primary_session(server_id=7, connector=1)
    stage.starts("PRIM2", "refused", connector=2)
    stage.primary.hears()
    stage.primary.says('[3,"refused",{"transactionId":0,"idTagInfo":{"status":"Invalid"}}]')
    ((_, _, payload),) = stage.charger.hears()
    assert payload["idTagInfo"] == {"status": "Invalid"}
    assert payload["transactionId"] % 2 == 0
    stage.charger.calls("e", "StopTransaction", transactionId=payload["transactionId"], meterStop=0)
    assert stage.primary.hears_call()[2]["transactionId"] == 0
    assert stage.memory.sessions[7].ended is None


# Translation.


@pytest.mark.parametrize("server_id", [0, -5, FIRST, LAST, 2**31])
def test_an_id_that_could_be_mistaken_is_translated_both_ways(server_id: int) -> None:
    """The charger gets an id of the proxy; the server always sees its own."""
    stage = Stage()
    transaction_id = stage.primary_session(server_id=server_id)
    assert FIRST <= transaction_id <= LAST
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId=transaction_id, meterValue=[])
    assert stage.primary.hears_call()[2]["transactionId"] == server_id
    stage.primary.calls("x", "RemoteStopTransaction", transactionId=server_id)
    assert stage.charger.hears_call()[2] == {"transactionId": transaction_id}


def test_an_id_that_another_session_bears_is_translated() -> None:
    """A server that says 1 every time (EVerest's) has several sessions."""
    stage = Stage()
    assert stage.primary_session(server_id=1, badge="PRIM1", connector=1) == 1
    second = stage.primary_session(server_id=1, badge="PRIM2", connector=2)
    assert second >= FIRST
    stage.charger.calls("e", "StopTransaction", transactionId=second, meterStop=5, timestamp="t")
    assert stage.primary.hears_call()[2]["transactionId"] == 1


def test_an_id_written_as_a_string_is_known() -> None:
    """A charger or server that quotes its numbers is understood."""
    stage = Stage()
    stage.starts("PRIM1", "start")
    stage.primary.hears()
    stage.primary.answers("start", transactionId="12", idTagInfo={"status": "Accepted"})
    stage.charger.hears()
    stage.charger.calls("m", "MeterValues", connectorId=1, transactionId="12", meterValue=[])
    assert stage.primary.hears_call()[0] == "m"
    assert 12 in stage.memory.sessions


# Remote starts and reservations.


def remote_start(stage: Stage, badge: str, status: str = "Accepted", connector: int | None = None) -> None:
    """Let the secondary start a badge remotely, and the charger answer."""
    payload = {"idTag": badge} | ({} if connector is None else {"connectorId": connector})
    stage.secondary.calls("r", "RemoteStartTransaction", **payload)
    assert stage.charger.hears_call()[0] == "r"
    stage.charger.answers("r", status=status)
    assert stage.secondary.hears() == [[3, "r", {"status": status}]]


def test_a_remote_start_claims_the_next_session_of_its_badge() -> None:
    """An Authorize matches the claim and leaves it; the session that starts ends it."""
    stage = Stage()
    remote_start(stage, "PRIM-ONE-TIME")
    stage.charger.calls("a", "Authorize", idTag="prim-one-time")
    assert actions(stage.secondary.hears()) == ["Authorize"]
    stage.starts("PRIM-ONE-TIME", "s")
    assert len(stage.memory.claims) == 0
    stage.charger.hears()
    stage.charger.calls("e", "StopTransaction", transactionId=next(iter(stage.memory.sessions)), meterStop=1)
    stage.starts("PRIM-ONE-TIME", "again", meter=9)
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_refused_remote_start_claims_nothing() -> None:
    """The charger's Rejected voids the claim."""
    stage = Stage()
    remote_start(stage, "PRIM1", status="Rejected")
    stage.starts("PRIM1")
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_remote_start_answered_with_an_error_claims_nothing() -> None:
    """A CallError of the charger voids the claim."""
    stage = Stage()
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="PRIM1")
    stage.charger.errs("r")
    stage.starts("PRIM1")
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_remote_start_that_is_refused_late_claims_nothing() -> None:
    """The charger's word counts, though nobody waits for it any more."""
    stage = Stage()
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="PRIM1")
    stage.passes(31)
    stage.charger.answers("r", status="Rejected")
    stage.starts("PRIM1")
    assert "StartTransaction" in actions(stage.primary.hears())


def test_a_remote_start_that_waits_unsent_claims_nothing_yet() -> None:
    """The claim counts from the moment the Call is sent to the charger."""
    stage = Stage()
    stage.primary.calls("busy", "GetConfiguration")
    stage.secondary.calls("r", "RemoteStartTransaction", idTag="PRIM1")
    assert stage.memory.claims == []
    stage.charger.answers("busy", configurationKey=[])
    assert len(stage.memory.claims) == 1


def test_a_claim_for_a_connector_does_not_match_another() -> None:
    """A remote start names where it wants its session."""
    stage = Stage()
    remote_start(stage, "PRIM1", connector=2)
    stage.starts("PRIM1", connector=1)
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_claim_ends_after_five_minutes() -> None:
    """A remote start that no session followed is forgotten."""
    stage = Stage()
    remote_start(stage, "PRIM1")
    stage.passes(p.CLAIM_SECONDS + 1)
    stage.primary.hears()
    stage.starts("PRIM1")
    assert actions(stage.primary.hears()) == ["StartTransaction"]
    stage.sweeps(p.CLAIM_SECONDS)
    assert stage.memory.claims == []


def test_of_two_claims_for_one_badge_the_newest_wins() -> None:
    """Both servers started the same badge; the later one meant the session that follows."""
    stage = Stage()
    remote_start(stage, "TAG")
    stage.primary.calls("p", "RemoteStartTransaction", idTag="TAG")
    stage.charger.hears()
    stage.charger.answers("p", status="Accepted")
    stage.starts("TAG")
    assert "StartTransaction" in actions(stage.primary.hears())


def reserve(stage: Stage, number: int, badge: str, expiry: str) -> None:
    """Let the secondary reserve a connector."""
    stage.secondary.calls(
        "res", "ReserveNow", connectorId=1, idTag=badge, reservationId=number, expiryDate=expiry
    )
    stage.charger.hears()
    stage.charger.answers("res", status="Accepted")
    stage.secondary.hears()


def test_a_reservation_claims_until_its_expiry_date() -> None:
    """It lasts as long as the server said, whatever the charger's clock says."""
    stage = Stage()
    reserve(stage, 5, "PRIM1", p.Instant(0, stage.utc + stage.time + 3600).text)
    assert stage.memory.claims[0].until == pytest.approx(stage.now().utc + 3600, abs=1)


@pytest.mark.parametrize("expiry", ["soon", "", "2026-13-99"])
def test_a_reservation_with_an_unreadable_expiry_claims_for_five_minutes(expiry: str) -> None:
    """An expiry that nobody can read does not last for ever."""
    stage = Stage()
    reserve(stage, 5, "PRIM1", expiry)
    assert stage.memory.claims[0].until == stage.now().utc + p.CLAIM_SECONDS


def test_a_start_that_names_a_reservation_belongs_to_the_server_that_made_it() -> None:
    """The reservation id counts, even with another badge of the same group."""
    stage = Stage()
    reserve(stage, 5, "GROUP", p.Instant(0, stage.utc + stage.time + 3600).text)
    stage.charger.calls(
        "s", "StartTransaction", connectorId=1, idTag="PRIM1", reservationId=5, meterStart=0, timestamp="t"
    )
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


def test_a_cancelled_reservation_claims_nothing() -> None:
    """CancelReservation, once the charger accepts it, ends the claim of that server and id."""
    stage = Stage()
    reserve(stage, 5, "PRIM1", p.Instant(0, stage.utc + stage.time + 3600).text)
    reserve(stage, 6, "PRIM2", p.Instant(0, stage.utc + stage.time + 3600).text)
    stage.secondary.calls("c", "CancelReservation", reservationId=5)
    stage.charger.answers("c", status="Accepted")
    assert [claim.reservation for claim in stage.memory.claims] == [6]


# Requests.


@pytest.mark.parametrize(
    ("asked", "report"),
    [
        ("GetDiagnostics", "DiagnosticsStatusNotification"),
        ("UpdateFirmware", "FirmwareStatusNotification"),
        ("SignedUpdateFirmware", "SignedFirmwareStatusNotification"),
        ("GetLog", "LogStatusNotification"),
    ],
)
def test_a_report_goes_to_the_server_that_asked_last(asked: str, report: str) -> None:
    """In 1.6 some reports name no request; the last such Call tells."""
    stage = Stage()
    stage.charger.calls("0", report, status="Idle")
    assert actions(stage.primary.hears()) == [report]
    stage.primary.answers("0")
    stage.secondary.calls("g", asked, location="ftp://x")
    stage.charger.answers("g")
    stage.secondary.hears()
    stage.charger.calls("1", report, status="Uploading")
    assert actions(stage.secondary.hears()) == [report]


def test_a_request_that_cancels_an_older_one_is_not_refused() -> None:
    """GetLog may be answered with AcceptedCanceled."""
    stage = Stage()
    stage.secondary.calls("s", "GetLog", requestId=1, log={})
    stage.charger.answers("s", status="AcceptedCanceled")
    stage.charger.calls("1", "LogStatusNotification", status="Uploaded", requestId=1)
    assert "LogStatusNotification" in actions(stage.secondary.hears())


def test_a_late_refusal_of_a_request_leaves_a_newer_one_alone() -> None:
    """Both had the same id; the newer one was accepted."""
    stage = Stage()
    stage.secondary.calls("a", "GetLog", requestId=1, log={})
    stage.passes(31)
    stage.secondary.calls("b", "GetLog", requestId=1, log={})
    stage.charger.answers("b", status="Accepted")
    stage.charger.answers("a", status="Rejected")
    stage.charger.calls("1", "LogStatusNotification", status="Uploaded", requestId=1)
    assert "LogStatusNotification" in actions(stage.secondary.hears())


def test_a_refused_request_without_an_id_is_not_the_last() -> None:
    """Home Assistant probes chargers with an UpdateFirmware that they refuse."""
    stage = Stage()
    stage.primary.calls("p", "UpdateFirmware", location="x")
    stage.charger.answers("p")
    stage.secondary.calls("s", "UpdateFirmware", location="dummy")
    stage.charger.errs("s", "NotSupported")
    stage.charger.calls("1", "FirmwareStatusNotification", status="Installed")
    assert "FirmwareStatusNotification" in actions(stage.primary.hears())


def test_a_refused_request_is_forgotten() -> None:
    """A report under the id of a request that the charger refused is the station's matter."""
    stage = Stage()
    stage.secondary.calls("s", "GetLog", requestId=1, log={})
    stage.charger.answers("s", status="Rejected")
    stage.charger.calls("1", "LogStatusNotification", status="Uploaded", requestId=1)
    assert actions(stage.primary.hears()) == ["LogStatusNotification"]


# Copies.


def test_the_secondary_sees_the_charger_online() -> None:
    """Statuses are copied to it under ids of the proxy, and its answers go nowhere."""
    stage = Stage()
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
    assert stage.primary.hears_call()[0] == "n"
    message_id, action, payload = stage.secondary.hears_call()
    assert (action, payload["status"]) == ("StatusNotification", "Charging")
    assert message_id != "n"
    stage.secondary.answers(message_id)
    assert stage.charger.hears() == []


def test_only_the_actions_of_secondary_copies_are_copied() -> None:
    """An empty message to the station stays with the primary unless the ini says otherwise."""
    stage = Stage("secondary_copies = SecurityEventNotification")
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
    stage.primary.answers("n")
    assert stage.secondary.hears() == []
    stage.charger.calls("e", "SecurityEventNotification", type="x", timestamp="t")
    assert actions(stage.secondary.hears()) == ["SecurityEventNotification"]


def test_a_copy_is_dropped_with_the_connection() -> None:
    """What the secondary misses while it is away is not made up for."""
    stage = Stage()
    stage.secondary.lost()
    stage.charger.calls("n", "SecurityEventNotification", type="x", timestamp="t")
    assert stage.outbox(p.Peer.SECONDARY).live == []


def test_an_available_connector_has_no_session_any_more() -> None:
    """Meter values there are the station's then; the session stays routable by its id."""
    stage = Stage()
    transaction_id = stage.secondary_session(connector=1)
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Available")
    stage.primary.answers("n")
    stage.charger.calls("m", "MeterValues", connectorId=1, meterValue=[])
    assert "MeterValues" in actions(stage.primary.hears())
    stage.delivers()
    stage.charger.calls("e", "StopTransaction", transactionId=transaction_id, meterStop=1, timestamp="t")
    assert [action for action, _ in stage.delivers()] == ["StopTransaction"]


# Servers that are the proxy itself.


def test_a_local_primary_answers_here_and_delivers_nowhere() -> None:
    """With `server = local` no CSMS is needed."""
    stage = Stage(ini="[ext-server]\nserver = local\n{more}")
    stage.charger.calls("b", "BootNotification", chargePointVendor="V", chargePointModel="M")
    ((_, _, boot),) = stage.charger.hears()
    assert (boot["status"], boot["interval"]) == ("Accepted", 300)
    stage.starts("ANY", "s")
    ((_, _, start),) = stage.charger.hears()
    assert start["idTagInfo"] == {"status": "Accepted"}
    stage.charger.calls("e", "StopTransaction", transactionId=start["transactionId"], meterStop=1)
    assert stage.charger.hears() == [[3, "e", {}]]
    assert stage.memory.stored == {}


def test_a_local_secondary_records_its_sessions_and_gets_no_copies() -> None:
    """The badges of a local secondary never reach the primary."""
    stage = Stage(
        ini="[ext-server]\nserver = ws://a\nsecondary_server = local\nsecondary_rfid = SECO*\n{more}"
    )
    stage.starts("SECO1", "s")
    assert stage.charger.hears()[0][2]["idTagInfo"] == {"status": "Accepted"}
    stage.charger.calls("n", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
    assert actions(stage.primary.hears()) == ["StatusNotification"]


def test_a_rejected_badge_is_recorded_and_delivered_nowhere() -> None:
    """A charger that starts all the same is answered Invalid under an id of the proxy, to the end."""
    stage = Stage("unknown_rfid = reject")
    stage.starts("STRANGER", "s")
    ((_, _, start),) = stage.charger.hears()
    assert start["idTagInfo"] == {"status": "Invalid"}
    stage.charger.calls(
        "m", "MeterValues", connectorId=1, transactionId=start["transactionId"], meterValue=[]
    )
    stage.charger.calls("e", "StopTransaction", transactionId=start["transactionId"], meterStop=1)
    assert stage.charger.hears() == [[3, "m", {}], [3, "e", {}]]
    assert stage.primary.hears() == []
    assert stage.secondary.hears() == []


def test_a_free_vending_start_without_a_badge_is_the_primarys() -> None:
    """Where no badge is sent at all, the station's server has the session."""
    stage = Stage()
    stage.charger.calls("s", "StartTransaction", connectorId=1, meterStart=0, timestamp="t")
    assert actions(stage.primary.hears()) == ["StartTransaction"]


def test_a_1_6_start_over_2_0_1_is_routed_by_its_badge() -> None:
    """A FoxESS speaks 1.6 over a negotiated 2.0.1."""
    stage = Stage(version="ocpp2.0.1")
    stage.starts("SECO1")
    assert actions(stage.secondary.hears()) == ["StartTransaction"]


# Bounds.


def test_the_tables_of_a_charger_are_bounded() -> None:
    """A charger or server that floods them loses its oldest entries, nothing else."""
    stage = Stage(ini="[ext-server]\nserver = local\nsecondary_server = ws://b\n{more}")
    stage.starts("ANY", "first", connector=9)
    for number in range(p.MAX_SESSIONS + 5):
        stage.starts("ANY", str(number), meter=number)
    assert len(stage.memory.sessions) == p.MAX_SESSIONS
    for number in range(p.MAX_CLAIMS + 5):
        stage.secondary.calls("r", "RemoteStartTransaction", idTag=str(number))
        stage.charger.answers("r", status="Accepted")
    assert len(stage.memory.claims) == p.MAX_CLAIMS
    for number in range(p.MAX_ASKED + 5):
        stage.secondary.calls("r", "GetLog", requestId=number, log={})
        stage.charger.answers("r", status="Accepted")
    assert len(stage.memory.asked) == p.MAX_ASKED
    for number in range(p.MAX_STATUSES + 5):
        stage.charger.calls("n", "StatusNotification", connectorId=number, status="Available")
    assert len(stage.memory.statuses) == p.MAX_STATUSES
