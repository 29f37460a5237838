"""
Fuzzing by hand, guided by coverage: texts, conversations of three peers, handshakes; from the corpus on.

    python -m pip install atheris        # Not in requirements.txt: there is no wheel for every Python.
    python -m tests.proof.fuzz router --seconds 240

Prints what it did, and every distinct crash with its input, which belongs into the corpus; exit code 1 then.
Only functions import what is fuzzed: atheris has to be there first, to watch.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import re
import socket
import subprocess
import sys
import tempfile
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.corpus import entries, request_of, text_of

if TYPE_CHECKING:
    import ocpp_2w_proxy as p
else:  # Imported once atheris watches imports.
    p = None

INSTRUMENTED = ["ocpp_2w_proxy", "json", "websockets"]
LONGEST = 4096  # Bytes of an input.
MOST_MESSAGES = 40  # Of a conversation.
MESSAGE_END = b"\x1e"
VERSIONS = ("ocpp1.6", "ocpp2.0.1", "ocpp2.1")
SECONDS = (0.5, 5.0, 31.0, 130.0)  # That may pass.

Target = Callable[[bytes], None]


# Texts.


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


def text_seeds() -> Iterator[bytes]:
    """Yield the texts of the corpus."""
    for entry in entries("messages"):
        if "text" in entry:
            yield text_of(entry["text"]).encode()[:LONGEST]


# Conversations: one byte for version and mode, then messages; the first byte of each is the peer.


def converse(data: bytes) -> None:
    """Let the peers say what they like; the storm checks what the others hear."""
    from tests.proof.storms import PEERS, Storm

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
    from tests.proof.storms import PEERS, templates

    for number, version in enumerate(VERSIONS):
        said = [bytes([PEERS.index(peer)]) + text.encode() for peer, text in templates(version)]
        answers = said[-12:]
        for start in range(0, len(said) - 12, 4):
            yield bytes([number]) + MESSAGE_END.join([*said[start : start + 4], *answers[start % 3 :: 3]])
    for entry in entries("messages"):
        if "text" in entry:
            peer = bytes([PEERS.index(entry["sender"])])
            yield (
                bytes([VERSIONS.index(entry.get("version", "ocpp1.6"))])
                + peer
                + text_of(entry["text"]).encode()
            )


# Handshakes.


class Pipe(asyncio.Transport):
    """A transport that goes nowhere, as strict as asyncio's."""

    def __init__(self) -> None:
        super().__init__({"socket": SOCKET})
        self.has_ended = self.is_cut = False

    def write(self, _data: Any) -> None:
        if self.has_ended:
            raise RuntimeError("Cannot call write() after write_eof()")

    def write_eof(self) -> None:
        self.has_ended = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.is_cut

    def abort(self) -> None:
        self.is_cut = True

    close = abort

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


SOCKET = socket.socket()


async def knock(proxy: p.Proxy, data: bytes) -> None:
    """Send a request, admit it as the proxy does, and hang up."""
    link, pipe = p.incoming_link(2**20, lambda _: None), Pipe()
    link.connection_made(pipe)
    while data and not pipe.is_cut:
        buffer = link.get_buffer(-1)
        piece, data = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(piece)] = piece
        link.buffer_updated(len(piece))
    if link.handshake.done() and not link.handshake.exception():
        request: Any = link.handshake.result()
        try:
            visitor = proxy._visitor(request)
        except p.RefusedError as refusal:
            link.respond(refusal.response())
        else:
            check_told(proxy, visitor)
            link.accept(link.answer_to(request), visitor.chosen("ocpp1.6"))
    link.eof_received()
    link.connection_lost(None)


def check_told(proxy: p.Proxy, visitor: p.Visitor) -> None:
    """What a server is told of a visitor is a request of one charger's id, and nothing slips into it."""
    assert p.is_charger_id(visitor.charger_id)
    from websockets.client import ClientProtocol
    from websockets.server import ServerProtocol
    from websockets.uri import parse_uri

    path = f"/{urllib.parse.quote(visitor.charger_id, safe='')}"
    protocol = ClientProtocol(parse_uri(f"ws://primary.example{path}"))
    server = visitor.config.primary
    request = proxy.dialer._request(protocol, server, visitor.charger_id, visitor.credentials)
    heard = ServerProtocol()
    heard.receive_data(request.serialize())
    seen: Any = heard.events_received()[0]
    assert (seen.path, seen.headers) == (path, request.headers)


def knocker() -> Target:
    """Return the target of handshakes, with a proxy that does not listen."""
    from tests.play.plays import config_of

    loop = asyncio.new_event_loop()
    proxy = p.Proxy(config_of("[ext-server]\nserver = ws://primary.example"))
    return lambda data: loop.run_until_complete(knock(proxy, data))


def handshake_seeds() -> Iterator[bytes]:
    """Yield the handshakes of the corpus."""
    for entry in entries("handshakes"):
        yield request_of(entry)[:LONGEST]


# The run: atheris in a process of its own, because it ends the process that it fuzzes in.

SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "messages": text_seeds,
    "router": conversation_seeds,
    "handshake": handshake_seeds,
}
TARGETS: dict[str, Callable[[], Target]] = {
    "messages": lambda: read_text,
    "router": lambda: converse,
    "handshake": knocker,
}


def dictionary() -> str:
    """Return the tokens that libFuzzer may put in, in its own spelling."""
    from tests.proof.storms import ODD, TOKEN, templates

    tokens = {
        token for version in VERSIONS for _, text in templates(version) for token in TOKEN.findall(text)
    }
    spelt = ("".join(f"\\x{byte:02x}" for byte in token.encode()) for token in sorted(tokens | set(ODD)))
    return "".join(f'"{token}"\n' for token in spelt if token)


class SafeLines(logging.Handler):
    """Checks that a log line is one line of printable ASCII, whatever is in it."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        assert line.isascii(), line
        assert line.isprintable(), line


def caught(target: Target) -> Target:
    """Return the target with each distinct crash told once, so that the run goes on."""
    known: set[tuple[str, str]] = set()

    def run(data: bytes) -> None:
        try:
            target(data)
        except Exception as error:  # noqa: BLE001
            where = str(traceback.extract_tb(error.__traceback__)[-1])
            if (type(error).__name__, where) not in known:
                known.add((type(error).__name__, where))
                print(
                    f"CRASH {type(error).__name__}: {error}\n{traceback.format_exc()}INPUT {data!r}",
                    flush=True,
                )

    return run


def fuzz(target: str, seconds: int, folder: str) -> None:
    """Fuzz for so long; does not return."""
    global p
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):
        p = importlib.import_module("ocpp_2w_proxy")
    handler = SafeLines()
    handler.addFilter(p.REDACTOR)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for number, seed in enumerate(SEEDS[target]()):
        Path(folder, str(number)).write_bytes(seed)
    words = Path(folder).with_suffix(".dict")
    words.write_text(dictionary())
    limits = [f"-dict={words}", f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, folder], caught(TARGETS[target]()))
    atheris.Fuzz()


def watched(target: str, seconds: int) -> int:
    """Fuzz in a process of its own; print what it did, and return how many crashes there were."""
    crashes, last = 0, dict[str, str]()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "inputs")
        folder.mkdir()
        command = [
            sys.executable,
            "-m",
            "tests.proof.fuzz",
            target,
            "--seconds",
            str(seconds),
            "--folder",
            str(folder),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            last.update(re.findall(r"\b(cov|ft|corp|number_of_executed_units): *(\d+)", line))
            crashes += line.startswith("CRASH")
            if not re.match(r"#\d|INFO|stat|\s*$|Done|DONE", line):
                print(line, end="", flush=True)
        code = process.wait()
    count = int(last.get("number_of_executed_units", 0))
    print(
        f"{target}: {count} executions in {seconds} s, {count / seconds:.0f}/s; crashes: {crashes};", end=" "
    )
    print(f"coverage: {last.get('cov')} edges, {last.get('ft')} features")
    return crashes + (code != 0)


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        fuzz(options.target, options.seconds, options.folder)
    return 1 if watched(options.target, options.seconds) else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
