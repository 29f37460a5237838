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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.corpus import entries, request_of, text_of
from tests.play.processes import let_go

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
            head = VERSIONS.index(entry.get("version", "ocpp1.6")), PEERS.index(entry["sender"])
            yield bytes(head) + text_of(entry["text"]).encode()


# Handshakes.


def knocker() -> Target:
    """Return the target of handshakes: a proxy that listens, and a good charger in it."""
    from tests.proof.storms import Door

    runner, door = asyncio.Runner(), Door()
    stack = runner.run(door.open())  # Whoever drops it closes the door.

    def knock(data: bytes, _: object = stack) -> None:
        runner.run(door.knock(data, hangs_up=True))

    return knock


def handshake_seeds() -> Iterator[bytes]:
    """Yield the handshakes of the corpus."""
    for entry in entries("handshakes"):
        yield request_of(entry)[:LONGEST]


# The run: atheris in a process of its own, because it ends the process that it fuzzes in.

TARGETS: dict[str, tuple[Callable[[], Target], Callable[[], Iterator[bytes]]]] = {  # With their seeds.
    "messages": (lambda: read_text, text_seeds),
    "router": (lambda: converse, conversation_seeds),
    "handshake": (knocker, handshake_seeds),
}


def dictionary() -> str:
    """Return the tokens that libFuzzer may put in, in its own spelling."""
    from tests.proof.storms import ODD, TOKEN, templates

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
                told = f"CRASH {type(error).__name__}: {error}\n{traceback.format_exc()}INPUT {data!r}"
                print(told, flush=True)

    return run


def fuzz(target: str, seconds: int, folder: str) -> None:
    """Fuzz for so long; does not return."""
    global p
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):
        p = importlib.import_module("ocpp_2w_proxy")
    handler = SafeLines()
    handler.setFormatter(p.REDACTOR)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    make, seeds = TARGETS[target]
    for number, seed in enumerate(seeds()):
        Path(folder, str(number)).write_bytes(seed)
    words = Path(folder).with_suffix(".dict")
    words.write_text(dictionary())
    limits = [f"-dict={words}", f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, folder], caught(make()))
    atheris.Fuzz()


def watched(target: str, seconds: int) -> int:
    """Fuzz in a process of its own; print what it did, and return how many crashes there were."""
    crashes, last = 0, dict[str, str]()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "inputs")
        folder.mkdir()
        command = [sys.executable, "-m", "tests.proof.fuzz", target]
        command += ["--seconds", str(seconds), "--folder", str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **pipes, text=True, preexec_fn=let_go)  # type: ignore[call-overload]
        assert process.stdout is not None
        for line in process.stdout:
            last.update(re.findall(r"\b(cov|ft|corp|number_of_executed_units): *(\d+)", line))
            crashes += line.startswith("CRASH")
            if not re.match(r"#\d|INFO|stat|\s*$|Done|DONE", line):
                print(line, end="", flush=True)
        code = process.wait()
    count = int(last.get("number_of_executed_units", 0))
    what = f"{count} executions in {seconds} s, {count / seconds:.0f}/s; crashes: {crashes}"
    print(f"{target}: {what}; coverage: {last.get('cov')} edges, {last.get('ft')} features")
    return crashes + int(code != 0)


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
