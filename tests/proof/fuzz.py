"""
Fuzzing by hand, guided by coverage: texts, conversations of three peers, handshakes; from the corpus on.

    python -m pip install atheris        # Not in requirements.txt: there is no wheel for every Python.
    python -m tests.proof.fuzz router --seconds 240

It ends at the first crash with exit code 1, and leaves the input, which belongs into the corpus, in a file.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")
with atheris.instrument_imports(include=["ocpp_2w_proxy", "json", "websockets"]):
    import ocpp_2w_proxy as p
    from tests.corpus import entries, request_of, text_of, texts
    from tests.proof.storms import ODD, PEERS, TOKEN, Door, Storm, templates

LONGEST = 4096  # Bytes of an input.
MOST_MESSAGES = 40  # Of a conversation.
MESSAGE_END = b"\x1e"
VERSIONS = ("ocpp1.6", "ocpp2.0.1", "ocpp2.1")
SECONDS = (0.5, 5.0, 31.0, 130.0)  # That may pass.

Target = Callable[[bytes], None]


def read_text(data: bytes) -> None:
    """Parse a text, and change its ids."""
    try:
        message = p.parse(data.decode(errors="replace"))
    except p.MessageError:
        return
    another = p.parse(p.patch(message.text, (1,), "another"))
    assert another[2:4] == message[2:4]
    if message.type is p.MessageType.CALL:
        patched = p.parse(p.patch(message.text, (3, "transactionId"), 7))
        assert patched.payload == {**message.payload, "transactionId": 7}


# Conversations: one byte for version and mode, then messages; the first byte of each is the peer.


def converse(data: bytes) -> None:
    """Let the peers say what they like; the storm checks what the others hear."""
    how = data[0] if data else 0
    storm = Storm(VERSIONS[how % 3], "secondary_replies = forward" if how & 64 else "")
    for message in data[1:].split(MESSAGE_END)[:MOST_MESSAGES]:
        who = message[0] % 4 if message else 3
        if who == 3:
            storm.passes(SECONDS[len(message) % 4])
        else:
            storm.says(PEERS[who], message[1:].decode(errors="replace"))


def conversation_seeds() -> Iterator[bytes]:
    """Yield short conversations of all that each version knows, and the texts of the corpus."""
    for number, version in enumerate(VERSIONS):
        said = [bytes([PEERS.index(peer)]) + text.encode() for peer, text in templates(version)]
        answers = said[-12:]
        for start in range(0, len(said) - 12, 4):
            yield bytes([number]) + MESSAGE_END.join([*said[start : start + 4], *answers[start % 3 :: 3]])
    for entry in entries("messages"):
        if "text" in entry:
            head = VERSIONS.index(entry.get("version", "ocpp1.6")), PEERS.index(entry["sender"])
            yield bytes(head) + text_of(entry["text"]).encode()


def knocker() -> Target:
    """Return the target of handshakes: a proxy that listens, and a good charger in it."""
    runner, door = asyncio.Runner(), Door()
    stack = runner.run(door.open())  # Whoever drops it closes the door.

    def knock(data: bytes, _: object = stack) -> None:
        runner.run(door.knock(data, hangs_up=True))

    return knock


TARGETS: dict[str, tuple[Callable[[], Target], Callable[[], Iterable[bytes]]]] = {  # With their seeds.
    "messages": (lambda: read_text, lambda: (text.encode() for text in texts())),
    "router": (lambda: converse, conversation_seeds),
    "handshake": (knocker, lambda: map(request_of, entries("handshakes"))),
}


def dictionary() -> str:
    """Return the tokens that libFuzzer may put in, in its own spelling."""
    texts = (text for version in VERSIONS for _, text in templates(version))
    tokens = {token for text in texts for token in TOKEN.findall(text)} | set(ODD)
    spelt = ("".join(f"\\x{byte:02x}" for byte in token.encode()) for token in sorted(tokens))
    return "".join(f'"{token}"\n' for token in spelt if token)


class SafeLines(logging.Handler):
    """Checks that a log line is one line of printable ASCII, whatever is in it."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        assert line.isascii(), line
        assert line.isprintable(), line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=240)
    options = parser.parse_args()
    handler = SafeLines()
    handler.setFormatter(p.REDACTOR)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    make, seeds = TARGETS[options.target]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))  # It stays, because libFuzzer ends this process.
    inputs, words = folder / "inputs", folder / "words"
    inputs.mkdir()
    for number, seed in enumerate(seeds()):
        (inputs / str(number)).write_bytes(seed[:LONGEST])
    words.write_text(dictionary())
    limits = [f"-dict={words}", f"-max_total_time={options.seconds}", f"-max_len={LONGEST}"]
    atheris.Setup([sys.argv[0], *limits, "-error_exitcode=1", str(inputs)], make())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
