"""The tables against the JSON schemas of the Open Charge Alliance, as the package `ocpp` ships them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import ocpp  # type: ignore[import-untyped]
import pytest

import ocpp_2w_proxy as p

SCHEMAS = Path(ocpp.__file__).parent
FOLDERS = {"ocpp1.6": "v16", "ocpp2.0.1": "v201", "ocpp2.1": "v21"}
SEND = "NotifyPeriodicEventStream"  # The only SEND: it has no answer.


def names(text: str) -> set[str]:
    """Return the words of the text."""
    return set(text.split())


CHARGER_16 = names(
    """
    Authorize BootNotification DataTransfer DiagnosticsStatusNotification FirmwareStatusNotification Heartbeat
    LogStatusNotification MeterValues SecurityEventNotification SignCertificate
    SignedFirmwareStatusNotification StartTransaction StatusNotification StopTransaction
    """
)
CHARGER_201 = names(
    """
    Authorize BootNotification ClearedChargingLimit DataTransfer FirmwareStatusNotification
    Get15118EVCertificate GetCertificateStatus Heartbeat LogStatusNotification MeterValues NotifyChargingLimit
    NotifyCustomerInformation NotifyDisplayMessages NotifyEVChargingNeeds NotifyEVChargingSchedule NotifyEvent
    NotifyMonitoringReport NotifyReport PublishFirmwareStatusNotification ReportChargingProfiles
    ReservationStatusUpdate SecurityEventNotification SignCertificate StatusNotification TransactionEvent
    """
)
CHARGER_21 = CHARGER_201 | names(
    """
    BatterySwap ClosePeriodicEventStream GetCertificateChainStatus NotifyDERAlarm NotifyDERStartStop
    NotifyPeriodicEventStream NotifyPriorityCharging NotifySettlement NotifyWebPaymentStarted
    OpenPeriodicEventStream PullDynamicScheduleUpdate ReportDERControl VatNumberValidation
    """
)
CHARGER_ACTIONS = {"ocpp1.6": CHARGER_16, "ocpp2.0.1": CHARGER_201, "ocpp2.1": CHARGER_21}
ANSWERED = [(v, action) for v, actions in CHARGER_ACTIONS.items() for action in sorted(actions - {SEND})]

VALUES = {
    "now": "2026-01-31T12:00:00Z",
    "verdict": "Invalid",
    "transaction": 2_000_000_001,
    "vat_number": '"NL123456789B01"',
    "model": '"EVBOX-1"',
}

# Which of the Facts holds the path of a field of this name.
KINDS = {
    "idTag": "badge",
    "idToken.idToken": "badge",
    "groupIdToken.idToken": "badge",
    "transactionId": "transaction",
    "requestId": "request",
    "reservationId": "reservation",
    "remoteStartId": "remote_start",
}
NOT_IN_THE_TABLES = {
    "* *groupIdToken.idToken": "a group is no badge",
    "SignCertificate requestId": "made by the charger",
    "CertificateSigned requestId": "made by the charger",
}
NOT_IN_THE_SCHEMAS = {
    ("Authorize", "connectorId"): "some 1.6 chargers add it",
}


def filled(template: str) -> Any:
    """Return what a template of the tables says once its places are filled in."""
    return json.loads(Template(template).substitute(VALUES))


@cache
def schema(version: str, name: str) -> dict[str, Any] | None:
    """Return a schema by the name of its file; None if there is none."""
    path = SCHEMAS / FOLDERS[version] / "schemas" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else None


def request_schema(version: str, action: str) -> dict[str, Any] | None:
    """Return the schema of an Action's payload."""
    return schema(version, f"{action}Request") or schema(version, action)


def is_valid(version: str, name: str, payload: dict[str, Any]) -> bool:
    """Whether the payload is what the schema allows."""
    kind = jsonschema.Draft4Validator if version == "ocpp1.6" else jsonschema.Draft6Validator
    found = schema(version, name)
    assert found is not None
    return bool(kind(found, format_checker=kind.FORMAT_CHECKER).is_valid(payload))


def server_actions(version: str) -> set[str]:
    """Return the servers' Actions: all that the charger does not have, and DataTransfer."""
    files = (SCHEMAS / FOLDERS[version] / "schemas").glob("*.json")
    actions = {file.stem.removesuffix("Response").removesuffix("Request") for file in files}
    return actions - CHARGER_ACTIONS[version] | {"DataTransfer"}


SERVED = [(version, action) for version in FOLDERS for action in sorted(server_actions(version))]


def facts_of(version: str, action: str) -> p.Facts:
    """Return what the tables say of an Action, on the side that sends it."""
    vocabulary = p.VOCABULARIES[version]
    side = vocabulary.charger if action in CHARGER_ACTIONS[version] else vocabulary.server
    return side.get(action, p.PLAIN)


def leaves(node: dict[str, Any], root: dict[str, Any], path: p.FieldPath = ()) -> Iterator[p.FieldPath]:
    """Yield the path of every plain value that the schema knows."""
    while "$ref" in node:
        node = root["definitions"][node["$ref"].removeprefix("#/definitions/")]
    if "properties" in node:
        for key, child in node["properties"].items():
            yield from leaves(child, root, (*path, key))
    elif "items" in node:
        yield from leaves(node["items"], root, (*path, "*"))
    else:
        yield path


def paths_in(version: str, action: str) -> list[str]:
    """Return the paths of all plain values of an Action, joined by dots."""
    root = request_schema(version, action)
    assert root is not None
    return [".".join(path) for path in leaves(root, root)]


def kind_of(path: str) -> str | None:
    """Return the Facts field that such a path belongs to."""
    field = f".{path.removesuffix('.*')}"
    return next((kind for name, kind in KINDS.items() if field.endswith(f".{name}")), None)


# Answers.


@pytest.mark.parametrize(("version", "action"), ANSWERED)
def test_answer_is_valid(version: str, action: str) -> None:
    """The smallest answer to every Action of the charger is one that its schema allows."""
    answer = filled(facts_of(version, action).answer)
    assert is_valid(version, f"{action}Response", answer)


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
@pytest.mark.parametrize("action", sorted(CHARGER_16 - CHARGER_201))
def test_answer_to_an_older_action_is_valid(version: str, action: str) -> None:
    """A charger that sends 1.6 messages over a 2.x connection gets the answers of 1.6."""
    facts = p.VOCABULARIES[version].charger.get(action, p.PLAIN)
    assert facts == facts_of("ocpp1.6", action)


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
def test_answer_to_a_badge_is_valid(version: str) -> None:
    """A TransactionEvent with a badge gets a verdict on it."""
    answer = filled(facts_of(version, "TransactionEvent").badge_answer)
    assert answer == {"idTokenInfo": {"status": "Invalid"}}
    assert is_valid(version, "TransactionEventResponse", answer)


@pytest.mark.parametrize("version", ["ocpp2.0.1", "ocpp2.1"])
def test_answer_to_a_certificate_is_valid(version: str) -> None:
    """Plug & Charge: only the server can check it."""
    answer = filled(facts_of(version, "Authorize").certificate_answer)
    assert answer["certificateStatus"] == "NoCertificateAvailable"
    assert is_valid(version, "AuthorizeResponse", answer)


def test_only_transaction_event_has_a_badge_answer() -> None:
    """Everywhere else the answer does not depend on whether there is a badge."""
    for vocabulary in p.VOCABULARIES.values():
        for action, facts in {**vocabulary.charger, **vocabulary.server}.items():
            assert (facts.badge_answer != "") is (action == "TransactionEvent")


@pytest.mark.parametrize(("version", "action"), SERVED)
def test_rejects_is_what_the_schema_says(version: str, action: str) -> None:
    """The tables know which of the servers' Actions can be answered with Rejected."""
    can_reject = is_valid(version, f"{action}Response", json.loads(p.STATUS_REJECTED))
    assert p.VOCABULARIES[version].server.get(action, p.PLAIN).rejects is can_reject


@pytest.mark.parametrize("version", FOLDERS)
def test_made_up_boot_is_valid(version: str) -> None:
    """The BootNotification of a charger that never sent one is one that the schema allows."""
    name = "BootNotification" if version == "ocpp1.6" else "BootNotificationRequest"
    assert is_valid(version, name, filled(p.VOCABULARIES[version].boot))


# Paths.


def every_action() -> list[tuple[str, str]]:
    """Return every Action of every version."""
    actions = {v: sorted(server_actions(v) | CHARGER_ACTIONS[v]) for v in FOLDERS}
    return [(version, action) for version in FOLDERS for action in actions[version]]


@pytest.mark.parametrize(("version", "action"), every_action())
def test_fields_of_the_schema_are_in_the_table(version: str, action: str) -> None:
    """Where an Action carries a badge, transaction, connector, request or reservation is in the table."""
    facts = facts_of(version, action)
    gaps = [
        path
        for path in paths_in(version, action)
        if (kind := kind_of(path))
        and ".".join(getattr(facts, kind)) != path
        and not any(fnmatchcase(f"{action} {path}", known) for known in NOT_IN_THE_TABLES)
    ]
    assert gaps == []


@pytest.mark.parametrize("pattern", NOT_IN_THE_TABLES)
def test_exceptions_are_needed(pattern: str) -> None:
    """What the tables leave out on purpose is in a schema, and in no table."""
    left_out = [
        (version, action, path)
        for version, action in every_action()
        for path in paths_in(version, action)
        if (kind := kind_of(path))
        and fnmatchcase(f"{action} {path}", pattern)
        and ".".join(getattr(facts_of(version, action), kind)) != path
    ]
    assert left_out


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("side", ["charger", "server"])
def test_paths_of_the_tables_are_in_the_schema(version: str, side: str) -> None:
    """Every path of the tables leads to a field of its Action; the older Actions of 2.x are those of 1.6."""
    fields = (
        "badge",
        "badge_type",
        "transaction",
        "connector",
        "request",
        "reservation",
        "remote_start",
        "state",
    )
    rows: dict[str, p.Facts] = getattr(p.VOCABULARIES[version], side)
    unknown = [
        (action, path)
        for action, facts in rows.items()
        for path in (".".join(getattr(facts, name)) for name in fields)
        if path
        and path not in paths_in(version if request_schema(version, action) else "ocpp1.6", action)
        and (action, path) not in NOT_IN_THE_SCHEMAS
    ]
    assert unknown == []


@pytest.mark.parametrize("version", FOLDERS)
def test_tables_hold_the_actions_of_their_side(version: str) -> None:
    """No Action stands in the table of the wrong side, or under a name that no schema has."""
    vocabulary = p.VOCABULARIES[version]
    assert set(vocabulary.charger) <= CHARGER_ACTIONS[version] | CHARGER_16
    assert set(vocabulary.server) <= server_actions(version) | server_actions("ocpp1.6")


@pytest.mark.parametrize("version", FOLDERS)
def test_reports_name_an_action_of_the_server(version: str) -> None:
    """What a report is said to be asked by is something that a server asks."""
    asked_by = {
        facts.asked_by
        for action, facts in p.VOCABULARIES[version].charger.items()
        if action in CHARGER_ACTIONS[version] and facts.asked_by
    }
    assert asked_by
    assert asked_by <= server_actions(version)


def test_table_reads_each_kind_of_word() -> None:
    """A line of a table names Actions, their values and their flags."""
    rows = p.table("""
        Boot,Again role=boot answer=boot asked_by=Reset
        Event badge=a.*.b badge_answer=badge-2.x
              rejects by_connector
    """)
    boot = p.Facts(role=p.Role.BOOT, answer=p.ANSWERS["boot"], asked_by="Reset", is_stations=False)
    event = p.Facts(
        badge=("a", "*", "b"),
        badge_answer=p.ANSWERS["badge-2.x"],
        rejects=True,
        by_connector=True,
        is_stations=False,
    )
    assert rows == {"Boot": boot, "Again": boot, "Event": event}


@pytest.mark.parametrize(
    ("action", "payload", "is_16"),
    [
        ("Authorize", {"idTag": "A"}, True),
        ("Authorize", {"idToken": {"idToken": "A", "type": "ISO14443"}}, False),
        ("MeterValues", {"connectorId": 1, "transactionId": 7, "meterValue": []}, True),
        ("MeterValues", {"evseId": 1, "meterValue": []}, False),
        ("StatusNotification", {"connectorId": 1, "errorCode": "NoError", "status": "Available"}, True),
        ("StatusNotification", {"evseId": 1, "connectorId": 1, "connectorStatus": "Available"}, False),
        ("StopTransaction", {"transactionId": 7}, True),
        ("TransactionEvent", {"transactionInfo": {"transactionId": "T"}, "evse": {"id": 1}}, False),
        ("Heartbeat", {}, False),
        ("NotifyPriorityCharging", {"transactionId": "T", "activated": True}, False),
    ],
)
def test_a_message_of_1_6_over_2_x_is_read_by_the_row_of_1_6(
    action: str, payload: dict[str, Any], is_16: bool
) -> None:
    """By its Action and its shape (FoxESS: lbbrhzn/ocpp#2050)."""
    for version in ("ocpp2.0.1", "ocpp2.1"):
        message = p.parse(json.dumps([2, "1", action, payload]))
        assert p.content_of(p.VOCABULARIES[version].charger, message).facts.is_16 is is_16


# Values.


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ((), []),
        (("a",), [1]),
        (("x",), []),
        (("a", "b"), []),
        (("a", "*"), []),
        (("b", "c"), [None]),
        (("d", "*", "e"), [1, 2]),
        (("d", "e"), []),
        (("b", "*"), []),
        (("d", "*", "e", "f"), []),
    ],
)
def test_values_at(path: p.FieldPath, found: list[Any]) -> None:
    """All values at a path are found, and none where the payload has another shape."""
    payload = {"a": 1, "b": {"c": None}, "d": [{"e": 1}, "e", {"f": 0}, {"e": 2}]}
    assert p.values_at(payload, path) == found
    assert p.value_at(payload, path) == next(iter(found), None)


# Copies.


@pytest.mark.parametrize("action", ["StatusNotification", "Heartbeat", "SecurityEventNotification", "Reset"])
def test_concern_of_what_concerns_the_station(action: str) -> None:
    """What never carries a badge or a transaction may go to both servers."""
    assert p.concern_of(action) == "station"


def test_concern_of_every_action_of_the_schemas_is_known() -> None:
    """And a misspelt one is not."""
    assert {action for _, action in every_action() if p.concern_of(action) == "unknown"} == set()
    assert p.concern_of("Rest") == "unknown"


@pytest.mark.parametrize(
    "action",
    [
        "Authorize",
        "BatterySwap",
        "MeterValues",
        "NotifyDisplayMessages",
        "NotifyEvent",
        "NotifyPriorityCharging",
        "NotifySettlement",
        "ReportChargingProfiles",
        "StartTransaction",
        "StopTransaction",
        "TransactionEvent",
    ],
)
def test_concern_of_what_concerns_one_server(action: str) -> None:
    """What can carry a badge or a transaction, in whatever version, goes to its owner alone."""
    assert p.concern_of(action) == "session"


@pytest.mark.parametrize(
    ("sample", "watt_hours"),
    [
        ({"value": "5"}, 5),
        ({"value": "5", "unit": "kWh"}, 5000),
        ({"value": 5, "unitOfMeasure": {"unit": "kWh", "multiplier": -1}}, 500),
        ({"value": 5, "unitOfMeasure": {"multiplier": 10}}, None),
        ({"value": 5, "unitOfMeasure": {}}, 5),
        ({"value": "5", "unit": "Percent"}, None),
        ({"value": "5", "measurand": "Voltage"}, None),
        ({"value": "5", "phase": "L1"}, None),
        ({"value": True}, None),
        ({"value": "five"}, None),
        ({"value": "1e300"}, None),
        ({}, None),
        ("5", None),
    ],
)
def test_the_energy_register_is_read(sample: Any, watt_hours: float | None) -> None:
    """In Wh, of whatever unit; any other measurand is none."""
    assert p.watt_hours(sample) == watt_hours
