"""
Secrets that the tests plant: in inis, handshakes, messages. None may be in any log line, error or answer.

A fixture of conftest.py listens to all log lines of the run; test_secrets.py looks at what a process says.
"""

from __future__ import annotations

import base64
import logging

import ocpp_2w_proxy as p

HOST_PASSWORD = "planted-host-9f2c"
PRIMARY_PASSWORD = "planted-primary-7b1e"
SECONDARY_PASSWORD = "planted-secondary-5d3a"
CHARGER_PASSWORD = "planted-charger-1c8e"
NEW_KEY = "planted-key-4e6f"
URL_PASSWORD = "planted-url-8a0d"
BADGES = ("0BADC0DE11AA", "0BADC0DE22BB", "0BADC0DE33CC")
CHARGER_LOGIN = "Basic " + base64.b64encode(f"CP1:{CHARGER_PASSWORD}".encode()).decode()
PASSWORDS = (HOST_PASSWORD, PRIMARY_PASSWORD, SECONDARY_PASSWORD, CHARGER_PASSWORD, NEW_KEY, URL_PASSWORD)


def logins() -> list[str]:
    """Return what the passwords look like in Basic headers: cut where no other bytes reach into it."""
    found = []
    for password in PASSWORDS:
        for before in range(3):
            encoded = base64.b64encode(b"x" * before + password.encode()).decode()
            found.append(encoded[4:-4])
    return found


SECRETS = (*PASSWORDS, *logins(), *BADGES)


def told(text: str) -> list[str]:
    """Return the planted secrets that a text tells."""
    return [secret for secret in SECRETS if secret.lower() in text.lower()]


class Eavesdropper(logging.Handler):
    """Hears every log line of the run, as the proxy would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(p.REDACTOR)
        self.count = 0
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self.count += 1
        if told(line):
            self.leaks.append(line)
