"""The tables, against the schemas in the package `ocpp`; what the secondary may not set."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped]
import ocpp  # type: ignore[import-untyped]
import pytest
from ocpp.v16.enums import ConfigurationKey  # type: ignore[import-untyped]

import ocpp_2w_proxy as p
from tests.play.plays import Stage
from tests.play.wires import Log

SCHEMAS = Path(ocpp.__file__).parent
FOLDERS = {"ocpp1.6": "v16", "ocpp2.0.1": "v201", "ocpp2.1": "v21"}
SEND = "NotifyPeriodicEventStream"  # The only SEND: it has no answer.
VALUES = {"now": "2026-01-31T12:00:00Z", "verdict": "Invalid", "transaction": 2_000_000_001}
VALUES |= {"vat_number": '"NL123456789B01"', "model": '"EVBOX-1"'}

# Which of the Facts holds the path of a field of this name.
KINDS = {"idTag": "badge", "idToken.idToken": "badge", "groupIdToken.idToken": "badge"}
KINDS |= {"transactionId": "transaction", "requestId": "request", "reservationId": "reservation"}
KINDS |= {"remoteStartId": "remote_start"}
NOT_IN_THE_TABLES = {
    "SendLocalList *": "nothing is decided on it",
    "* *groupIdToken.idToken": "a group is no badge",
    "SignCertificate requestId": "made by the charger",
    "CertificateSigned requestId": "made by the charger",
}
NOT_IN_THE_SCHEMAS = [("Authorize", "connectorId")]  # Some 1.6 chargers add it.


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


def actions(version: str) -> set[str]:
    """Return all Actions that a version has schemas for."""
    files = (SCHEMAS / FOLDERS[version] / "schemas").glob("*.json")
    return {file.stem.removesuffix("Response").removesuffix("Request") for file in files}


EVERY = [(version, action) for version in FOLDERS for action in sorted(actions(version))]
CHARGERS = [(version, action) for version, action in EVERY if action in p.VOCABULARIES[version].charger]
SERVERS = [pair for pair in EVERY if pair not in CHARGERS or pair[1] == "DataTransfer"]


def facts_of(version: str, action: str) -> p.Facts:
    """Return what the tables say of an Action, on the side that sends it."""
    vocabulary = p.VOCABULARIES[version]
    return vocabulary.charger.get(action) or vocabulary.server[action]


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

ANSWERED = [
    (version, f"{action}Response", facts_of(version, action).answer)
    for version, action in CHARGERS
    if action != SEND
]
ANSWERED += [("ocpp1.6", "BootNotification", p.VOCABULARIES["ocpp1.6"].boot)]
for version in ("ocpp2.0.1", "ocpp2.1"):
    ANSWERED += [
        (version, "TransactionEventResponse", facts_of(version, "TransactionEvent").badge_answer),
        (version, "AuthorizeResponse", facts_of(version, "Authorize").certificate_answer),
        (version, "BootNotificationRequest", p.VOCABULARIES[version].boot),
    ]


@pytest.mark.parametrize(("version", "name", "template"), ANSWERED)
def test_what_the_proxy_makes_up_is_valid(version: str, name: str, template: str) -> None:
    """The smallest answer to every Action of the charger, and the boot of one that never sent its own."""
    assert is_valid(version, name, json.loads(Template(template).substitute(VALUES)))


@pytest.mark.parametrize(("version", "action"), SERVERS)
def test_rejects_is_what_the_schema_says(version: str, action: str) -> None:
    """The tables know which of the servers' Actions can be answered with Rejected."""
    can_reject = is_valid(version, f"{action}Response", json.loads(p.STATUS_REJECTED))
    assert p.VOCABULARIES[version].server[action].rejects is can_reject


# Paths.


@pytest.mark.parametrize(("version", "action"), EVERY)
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


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("side", ["charger", "server"])
def test_paths_of_the_tables_are_in_the_schema(version: str, side: str) -> None:
    """Each leads to a field of an Action of that side; the older Actions of 2.x are those of 1.6."""
    fields = {*KINDS.values(), "badge_type", "connector", "state"}
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
    asked = {facts.asked_by for facts in rows.values()} - {""}
    assert asked <= p.VOCABULARIES[version].server.keys(), "a report is on what a server asks"


# Copies.


def test_what_can_carry_a_badge_or_a_transaction_is_copied_to_nobody() -> None:
    """It goes to its owner alone, whatever the ini says, in whatever version."""
    session = "Authorize BatterySwap MeterValues NotifyDisplayMessages NotifyEvent NotifySettlement"
    session += (
        " TransactionEvent NotifyPriorityCharging ReportChargingProfiles StartTransaction StopTransaction"
    )
    assert {p.concern_of(action) for action in session.split()} == {"session"}
    station = "StatusNotification Heartbeat SecurityEventNotification Reset"
    assert {p.concern_of(action) for action in station.split()} == {"station"}
    assert {action for _, action in EVERY if p.concern_of(action) == "unknown"} == set()
    assert p.concern_of("Rest") == "unknown"


@pytest.mark.parametrize(
    ("sample", "watt_hours"),
    [
        *(({"value": "5"}, 5), ({"value": "5", "unit": "kWh"}, 5000)),
        ({"value": 5, "unitOfMeasure": {"unit": "kWh", "multiplier": -1}}, 500),
        *(({"value": 5, "unitOfMeasure": {"multiplier": 10}}, None), ({"value": 5, "unitOfMeasure": {}}, 5)),
        *(({"value": "5", "unit": "Percent"}, None), ({"value": "5", "measurand": "Voltage"}, None)),
        *(({"value": "5", "phase": "L1"}, None), ({"value": True}, None), ({"value": "five"}, None)),
        *(({"value": "1e300"}, None), ({}, None), ("5", None)),
    ],
)
def test_the_energy_register_is_read(sample: Any, watt_hours: float | None) -> None:
    """In Wh, of whatever unit; any other measurand is none."""
    facts = p.VOCABULARIES["ocpp1.6"].charger["MeterValues"]
    assert p.Content(facts, {"meterValue": [{"sampledValue": [sample]}]}).register == watt_hours


# What the secondary may not do to the charger: move it away, or change who it is and how it logs in.


HARMLESS, SECRET = ("OCPPCommCtrlr", "HeartbeatInterval"), "AuthorizationKey"
ODD = ("authorizationkey", f" {SECRET}\x00", f"{SECRET}\x00x", f"{SECRET}\xa0", "x" * 10**6)
SECRETS = [
    *(("SecurityCtrlr", "BasicAuthPassword"), ("securityctrlr", "BASICAUTHPASSWORD")),
    *(("SecurityCtrlr", "Identity"), ("SecurityCtrlr", "SecurityProfile")),
    *(("OCPPCommCtrlr", "NetworkConfigurationPriority"), ("OCPPCommCtrlr", "ActiveNetworkProfile")),
    ("NetworkConfiguration", "MessageTimeout"),
]


def key_is(key: object) -> tuple[str, dict[str, Any]]:
    return "ChangeConfiguration", {"key": key, "value": "x"}


def variables(*pairs: tuple[str, str]) -> tuple[str, dict[str, Any]]:
    data = [{"component": {"name": c}, "variable": {"name": v}, "attributeValue": "x"} for c, v in pairs]
    return "SetVariables", {"setVariableData": data}


def certificate(action: str, kind: object) -> tuple[str, dict[str, Any]]:
    return f"{action}Certificate" if action != "Signed" else "CertificateSigned", {"certificateType": kind}


def plays_on(action: str) -> Stage:
    """A stage of the version that has an Action."""
    return Stage(version="ocpp2.0.1" if action.startswith("Set") else "ocpp1.6")


@pytest.mark.parametrize(
    ("action", "payload"),
    [
        *map(key_is, (SECRET, "SecurityProfile", "Cst_BackendUrl", *ODD)),
        *(variables(HARMLESS, secret) for secret in SECRETS),
        ("SetNetworkProfile", {"configurationSlot": 1, "connectionData": {}}),
        *(certificate("Signed", kind) for kind in (None, "ChargingStationCertificate")),
        *(certificate("Install", f"{kind}RootCertificate") for kind in ("CentralSystem", "CSMS")),
        certificate("Install", ["V2GRootCertificate"]),  # No text is nothing that a car needs.
        *(certificate("Install", {"a": 1}), certificate("Delete", None)),
    ],
)
def test_the_secondary_may_not_change_where_the_charger_belongs(
    action: str, payload: dict[str, Any], caplog: Log
) -> None:
    """Or its login; it hears the schema's Rejected, for each of several variables; the log tells."""
    caplog.set_level(logging.INFO)
    stage = plays_on(action)
    stage.secondary.calls("1", action, **payload)
    (heard,) = stage.secondary.hears()
    if action == "SetVariables":
        told = [(result["attributeStatus"], result["variable"]) for result in heard[2]["setVariableResult"]]
        assert told == [("Rejected", said["variable"]) for said in payload["setVariableData"]]
    elif action == "DeleteCertificate":  # Its schema has no Rejected.
        assert heard[:3] == [4, "1", "SecurityError"]
    else:
        assert heard == [3, "1", {"status": "Rejected"}]
    assert stage.charger.hears() == []
    assert any("refused" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("action", "payload"),
    [
        *map(key_is, ("HeartbeatInterval", "MeterValueSampleInterval", "WebSocketPingInterval", None, ["a"])),
        *(variables(HARMLESS), ("SetVariables", {"setVariableData": [1, {}]}), ("SetVariables", {})),
        *(certificate("Signed", "V2GCertificate"), certificate("Install", "MORootCertificate")),
    ],
)
def test_the_secondary_may_change_the_rest(action: str, payload: dict[str, Any]) -> None:
    """And the primary all; what is odd is the charger's to answer."""
    for name, wanted in (("secondary", (action, payload)), ("primary", key_is(SECRET))):
        assert plays_on(wanted[0]).asks(name, wanted[0], **wanted[1]) == wanted[1]


TWICE = [
    f'"ChangeConfiguration",{{"key":"{SECRET}","value":"x","key":"Blink"}}',
    f'"ChangeConfiguration",{{"k\\u0065y":"{SECRET}","value":"x","key":"Blink"}}',
    '"SetVariables",{"setVariableData":[{"component":{},"variable":{},"attributeValue":1,"attributeValue":2}]}',
]


@pytest.mark.parametrize("call", TWICE)
def test_what_can_be_read_in_two_ways_passes_in_neither(call: str) -> None:
    """The charger might take the first of two keys, the proxy the last; elsewhere it does not matter."""
    stage = Stage(version="ocpp2.1")
    stage.secondary.says(f'[2,"1",{call}]')
    assert "Rejected" in stage.secondary.hears_text()
    assert stage.charger.hears() == []
    stage.secondary.says('[2,"2","ClearCache",{"a":1,"a":2}]')
    assert stage.charger.hears_text() == '[2,"2","ClearCache",{"a":1,"a":2}]'


@pytest.mark.parametrize("action", ["Reset\x00", "Reset ", "RemoteStopTransaction\x00", "Reset\xa0", ""])
def test_an_action_with_an_odd_character_reaches_nobody(action: str) -> None:
    """A charger's parser might end the text there, and do what the secondary may not ask for."""
    stage = Stage("secondary_refuse = Reset")
    stage.secondary.calls("1", action, transactionId=7)
    assert [answer[:3] for answer in stage.secondary.hears()] == [[4, "1", "SecurityError"]]
    assert stage.charger.hears() == []


# Vendors' keys, as found in dumps of their chargers, their manuals and the code of those who deal with them.
VENDORS_KEYS = """
    Cst_BackendUrl Cst_ChargeBoxId Cst_WiFiSSID CentralSystemURI ChargePointId HostName G_ServerURL
    G_ChargerID VerifyCsmsAllowWildcards G_Authentication G_4GAPN G_ChargerNetIP BackOffice-URL-wired
    BackOffice-Path-APN BackOfficeNetworkProfile1 NetworkConfigurationPriority Identity PW-SetChargerPassword
    ProtocolVersion evb_ServerURL evb_UseBackend evb_SerialAsConnectorId evb_APNName ConnectionURL
    VEC_ocppServerURL VEC_ocppChargePointID VEC_ocppVersion VEC_vpnHostIP ConnexionUrl ChargePointIdentifier
    CentralSystemAddress CentralSystemPort ChargeBoxIdentity HostConnectorCentralSystemPassword
    SetSecureOutgoingConnection DisableCertificateValidation DisableHostnameVerification
    SecurityProfileFallback ChargepointAddress HostConnectorProxyServerAddress PortalHost
    enc.PortalBasicAuthenticationPassword HostConnectorType GsmApn WebSocketUrl WebSocketUser
    WebSocketPassword com_Endpoint com_OCPPID com_ProtType com_Options eth_cfg NetworkConnectionProfile1
    VendorWebsocketSettings VendorChargeBoxId ChargePointName CentralURL OCPPEndPoint OcppUrl
"""


def test_vendors_keys_for_the_servers_address_and_the_login_are_guarded() -> None:
    """As far as known; in 2.x some are variables of the same name; no standard key is taken for one."""
    for key in VENDORS_KEYS.split():
        assert p.guarded_by(*key_is(key)) == p.guarded_by(*variables(("VendorStation", key))) == key
    guarded = {key for key in ConfigurationKey if p.guarded_by(*key_is(key.value))}
    assert guarded == {ConfigurationKey.authorization_key, ConfigurationKey.security_profile}


def test_each_role_of_the_tables_is_one_that_the_router_knows() -> None:
    """A word that is written wrong would make an Action a station's matter."""
    rows = [
        facts
        for words in p.VOCABULARIES.values()
        for facts in (*words.charger.values(), *words.server.values())
    ]
    assert {facts.role for facts in rows} == {*get_args(p.Role)}
