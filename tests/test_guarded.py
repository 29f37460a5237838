"""What the secondary may not do to the charger: move it away, or change who it is and how it logs in."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.plays import Stage

REJECTED = {"status": "Rejected"}


def variable(component: str, name: str) -> dict[str, Any]:
    return {"component": {"name": component}, "variable": {"name": name}, "attributeValue": "x"}


@pytest.mark.parametrize(
    "key",
    [
        *(
            "AuthorizationKey",
            "authorizationkey",
            " AuthorizationKey\x00",
            "SecurityProfile",
            "Cst_BackendUrl",
        ),
        *("AuthorizationKey\x00x", "AuthorizationKey\xa0", "x" * 1_000_000),
    ],
)
def test_the_secondary_may_not_change_where_the_charger_belongs(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It hears the schema's Rejected; the charger hears nothing; the log tells."""
    caplog.set_level(logging.INFO)
    stage = Stage()
    stage.secondary.calls("1", "ChangeConfiguration", key=key, value="x")
    assert stage.secondary.hears() == [[3, "1", REJECTED]]
    assert stage.charger.hears() == []
    assert any("refused" in line for line in caplog.messages)


@pytest.mark.parametrize("action", ["Reset\x00", "Reset ", "RemoteStopTransaction\x00", "Reset\xa0", ""])
def test_an_action_with_an_odd_character_reaches_nobody(action: str) -> None:
    """A charger's parser might end the text there, and do what the secondary may not ask for."""
    stage = Stage("secondary_refuse = Reset")
    stage.secondary.calls("1", action, transactionId=7)
    assert [answer[:3] for answer in stage.secondary.hears()] == [[4, "1", "SecurityError"]]
    assert stage.charger.hears() == []


@pytest.mark.parametrize(
    ("action", "kind", "passes"),
    [
        ("CertificateSigned", None, False),
        ("CertificateSigned", "ChargingStationCertificate", False),
        ("CertificateSigned", "V2GCertificate", True),
        ("InstallCertificate", "CentralSystemRootCertificate", False),
        ("InstallCertificate", "CSMSRootCertificate", False),
        ("InstallCertificate", "MORootCertificate", True),
        ("DeleteCertificate", None, False),
    ],
)
def test_the_secondary_may_not_change_the_certificates_of_the_login(
    action: str, kind: str | None, passes: bool
) -> None:
    """With security profile 3 they are the login; those of the car are not."""
    stage = Stage()
    stage.secondary.calls("1", action, certificateType=kind)
    assert bool(stage.charger.hears()) == passes
    assert bool(stage.secondary.hears()) != passes


def test_the_primary_may() -> None:
    """It is the charger's own server."""
    stage = Stage()
    stage.primary.calls("1", "ChangeConfiguration", key="AuthorizationKey", value="x")
    assert stage.charger.hears_call()[0] == "1"


@pytest.mark.parametrize("key", ["HeartbeatInterval", "MeterValueSampleInterval", "WebSocketPingInterval"])
def test_the_secondary_may_change_the_rest(key: str) -> None:
    """Unless `secondary_refuse` says otherwise."""
    stage = Stage()
    stage.secondary.calls("1", "ChangeConfiguration", key=key, value="300")
    assert stage.charger.hears_call()[1:] == ("ChangeConfiguration", {"key": key, "value": "300"})


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("SecurityCtrlr", "BasicAuthPassword"),
        ("securityctrlr", "BASICAUTHPASSWORD"),
        ("SecurityCtrlr", "Identity"),
        ("SecurityCtrlr", "SecurityProfile"),
        ("OCPPCommCtrlr", "NetworkConfigurationPriority"),
        ("OCPPCommCtrlr", "ActiveNetworkProfile"),
        ("NetworkConfiguration", "MessageTimeout"),
    ],
)
def test_the_secondary_may_not_set_such_a_variable(component: str, name: str) -> None:
    """One among several refuses them all, each in the words of the schema."""
    stage = Stage(version="ocpp2.0.1")
    data = [variable("OCPPCommCtrlr", "HeartbeatInterval"), variable(component, name)]
    stage.secondary.calls("1", "SetVariables", setVariableData=data)
    ((_, _, answer),) = stage.secondary.hears()
    assert [result["attributeStatus"] for result in answer["setVariableResult"]] == ["Rejected"] * 2
    assert answer["setVariableResult"][1]["variable"] == {"name": name}
    assert stage.charger.hears() == []


def test_the_secondary_may_not_give_the_charger_another_network_profile() -> None:
    """It holds the address of the server."""
    stage = Stage(version="ocpp2.0.1")
    stage.secondary.calls("1", "SetNetworkProfile", configurationSlot=1, connectionData={})
    assert stage.secondary.hears() == [[3, "1", REJECTED]]


def test_other_variables_pass() -> None:
    """Such as the interval of heartbeats."""
    stage = Stage(version="ocpp2.0.1")
    data = [variable("OCPPCommCtrlr", "HeartbeatInterval")]
    stage.secondary.calls("1", "SetVariables", setVariableData=data)
    assert stage.charger.hears_call()[1] == "SetVariables"


@pytest.mark.parametrize(
    "text",
    [
        '[2,"1","ChangeConfiguration",{"key":"AuthorizationKey","value":"x","key":"HeartbeatInterval"}]',
        '[2,"1","ChangeConfiguration",{"k\\u0065y":"AuthorizationKey","value":"x","key":"HeartbeatInterval"}]',
    ],
)
def test_what_can_be_read_in_two_ways_passes_in_neither(text: str) -> None:
    """The charger might take the first of two keys, the proxy the last."""
    stage = Stage()
    stage.secondary.says(text)
    assert stage.secondary.hears() == [[3, "1", {"status": "Rejected"}]]
    assert stage.charger.hears() == []


def test_an_action_without_a_rejected_of_its_own_is_answered_with_a_call_error() -> None:
    """SetVariables without data, on `secondary_refuse`."""
    stage = Stage("secondary_refuse = SetVariables", version="ocpp2.0.1")
    stage.secondary.calls("1", "SetVariables", setVariableData=[])
    assert [answer[:3] for answer in stage.secondary.hears()] == [[4, "1", "SecurityError"]]


# Vendors' keys, as found in dumps of their chargers, their manuals and the code of those who deal with them.
VENDORS_KEYS = """
    Cst_BackendUrl Cst_ChargeBoxId Cst_WiFiSSID CentralSystemURI ChargePointId HostName
    VerifyCsmsAllowWildcards
    G_ServerURL G_ChargerID G_Authentication G_4GAPN G_ChargerNetIP BackOffice-URL-wired BackOffice-Path-APN
    BackOfficeNetworkProfile1 NetworkConfigurationPriority Identity PW-SetChargerPassword ProtocolVersion
    evb_ServerURL evb_UseBackend evb_SerialAsConnectorId evb_APNName ConnectionURL
    VEC_ocppServerURL
    VEC_ocppChargePointID VEC_ocppVersion VEC_vpnHostIP ConnexionUrl ChargePointIdentifier
    CentralSystemAddress
    CentralSystemPort ChargeBoxIdentity HostConnectorCentralSystemPassword SetSecureOutgoingConnection
    DisableCertificateValidation DisableHostnameVerification SecurityProfileFallback
    HostConnectorProxyServerAddress PortalHost enc.PortalBasicAuthenticationPassword ChargepointAddress
    HostConnectorType GsmApn WebSocketUrl WebSocketUser WebSocketPassword com_Endpoint com_OCPPID com_ProtType
    com_Options eth_cfg NetworkConnectionProfile1 VendorWebsocketSettings VendorChargeBoxId ChargePointName
    CentralURL OCPPEndPoint OcppUrl
"""


@pytest.mark.parametrize("key", VENDORS_KEYS.split())
def test_vendors_keys_for_the_servers_address_and_the_login_are_guarded(key: str) -> None:
    """As far as known; in 2.x some are variables of the same name."""
    assert p.guarded_by("ChangeConfiguration", {"key": key}) == key
    data = [variable("VendorStation", key)]
    assert p.guarded_by("SetVariables", {"setVariableData": data}) == key


# The keys of OCPP 1.6, and of its security white paper, that no pattern for vendors' keys may hit.
STANDARD_KEYS = """
    AllowOfflineTxForUnknownId AuthorizationCacheEnabled AuthorizeRemoteTxRequests BlinkRepeat
    ClockAlignedDataInterval ConnectionTimeOut ConnectorPhaseRotation ConnectorPhaseRotationMaxLength
    GetConfigurationMaxKeys HeartbeatInterval LightIntensity LocalAuthorizeOffline LocalPreAuthorize
    MaxEnergyOnInvalidId MeterValuesAlignedData MeterValuesAlignedDataMaxLength MeterValuesSampledData
    MeterValuesSampledDataMaxLength MeterValueSampleInterval MinimumStatusDuration NumberOfConnectors
    ResetRetries StopTransactionOnEVSideDisconnect StopTransactionOnInvalidId StopTxnAlignedData
    StopTxnAlignedDataMaxLength StopTxnSampledData StopTxnSampledDataMaxLength SupportedFeatureProfiles
    SupportedFeatureProfilesMaxLength TransactionMessageAttempts TransactionMessageRetryInterval
    UnlockConnectorOnEVSideDisconnect WebSocketPingInterval LocalAuthListEnabled LocalAuthListMaxLength
    SendLocalListMaxLength ReserveConnectorZeroSupported ChargeProfileMaxStackLevel
    ChargingScheduleAllowedChargingRateUnit ChargingScheduleMaxPeriods ConnectorSwitch3to1PhaseSupported
    MaxChargingProfilesInstalled AdditionalRootCertificateCheck CertificateSignedMaxChain
    CertificateStoreMaxLength CpoName SupportedFileTransferProtocols
"""


def test_no_standard_key_is_taken_for_a_vendors() -> None:
    """But the two that change the login."""
    assert not any(p.guarded_by("ChangeConfiguration", {"key": key}) for key in STANDARD_KEYS.split())


@pytest.mark.parametrize("payload", [{}, {"key": None}, {"key": ["a"]}, {"setVariableData": [1, {}]}])
@pytest.mark.parametrize("action", ["ChangeConfiguration", "SetVariables"])
def test_odd_payloads_are_the_chargers_to_answer(action: str, payload: dict[str, Any]) -> None:
    """Nothing raises."""
    stage = Stage(version="ocpp1.6" if action == "ChangeConfiguration" else "ocpp2.0.1")
    stage.secondary.says(json.dumps([2, "1", action, payload]))
    assert stage.charger.hears_call()[1] == action
