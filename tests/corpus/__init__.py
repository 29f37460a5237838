"""
Odd messages and odd handshakes of the field, each with its evidence and with what becomes of it.

A text is a string, or a list of parts: strings, and `[string, times]` for what is too long to write down.
`hears` tells what each peer hears of it, in the words of `test_third_party.py`; a peer that is not named
hears nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WEBSOCKET = [  # What `<websocket>` stands for in a request.
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==",
]

Entry = dict[str, Any]


def entries(name: str) -> list[Entry]:
    """Return the entries of a file of the corpus."""
    found: list[Entry] = json.loads((FOLDER / f"{name}.json").read_text("ascii"))
    return found


def text_of(parts: Any) -> str:
    """Return a text that may be written down in parts."""
    if isinstance(parts, str):
        return parts
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)


def request_of(entry: Entry) -> bytes:
    """Return the bytes of a handshake: raw, or its lines with their ends."""
    if "raw" in entry:
        return text_of(entry["raw"]).encode("latin-1")
    lines = [text_of(line) for line in entry["lines"]]
    if "<websocket>" in lines:
        place = lines.index("<websocket>")
        lines[place : place + 1] = WEBSOCKET
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def texts() -> list[str]:
    """Return the texts of all messages, for storms to begin with."""
    return [text_of(entry["text"]) for entry in entries("messages") if "text" in entry]
