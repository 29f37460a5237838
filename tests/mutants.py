"""
Break the section Routing of the script on purpose, in one place after another: do the tests notice?

    python -m tests.mutants [--list] [--only NUMBER_OR_WORDS]...

Each mutation is tried in a copy of the working tree. The exit code is 0 if the tests fail with every one of
them, 1 if they pass with one, 2 if nothing can be said: they fail without any, or a run of pytest breaks off.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.mutations import MUTATIONS, Mutation
from tests.sections import ROOT, SCRIPT, sections

# Plays come first: they are fast and name what is broken. The machine that plays at random comes last.
PLAYS = [
    "ownership",
    "transactions",
    "stored",
    "calls",
    "connections",
    "routing_gaps",
    "guarded",
    "journal",
    "disk",
]
TESTS = [f"tests/test_{name}.py" for name in (*PLAYS, "bounds", "state_file", "properties")]
# The same examples every time; a fixed seed is none where examples are kept from the run before.
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".hypothesis", "__pycache__", "*_cache", "*.db*")
MAX_SECONDS = 600  # Of one run; the tests alone take 15, on a machine that is busy 60.
PASSED, FAILED = 0, 1  # Exit codes of pytest. With any other it has not said what the tests say.


class Run(NamedTuple):
    """What pytest said of one tree."""

    exit_code: int | None  # None: it was killed by time.
    output: str
    seconds: float

    @property
    def is_kill(self) -> bool:
        return self.exit_code in (FAILED, None)

    @property
    def words(self) -> str:
        """Say how it ended: by which test, in how many seconds."""
        if self.exit_code is None:
            return f"killed by time: more than {MAX_SECONDS} s"
        if self.exit_code == PASSED:
            return f"SURVIVED ({self.seconds:.1f} s)"
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", self.output, re.MULTILINE)
        return f"killed by {failed[1] if failed else 'an unnamed test'} ({self.seconds:.1f} s)"


class BrokenRunError(Exception):
    """Nothing can be said of the tests."""


def routing(text: str) -> tuple[str, str, str]:
    """Return the text above the section Routing, the section, and the text below it."""
    lines = text.splitlines(keepends=True)
    span = sections(text)["Routing"]
    above, section, below = (
        lines[: span.start - 1],
        lines[span.start - 1 : span.stop - 1],
        lines[span.stop - 1 :],
    )
    return "".join(above), "".join(section), "".join(below)


def mutated(text: str, mutation: Mutation) -> str:
    """Return the script with the mutation in it."""
    above, section, below = routing(text)
    if section.count(mutation.before) != 1:
        raise BrokenRunError(f"{mutation.name}: what it changes does not stand once in Routing")
    return above + section.replace(mutation.before, mutation.after) + below


def run_tests(mutation: Mutation | None) -> Run:
    """Run the tests in a copy of the working tree, with the mutation or without any."""
    with TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        if mutation:
            (tree / SCRIPT.name).write_text(mutated(SCRIPT.read_text(), mutation))
        begun = time.monotonic()
        exit_code, output = run_pytest(tree)
        return Run(exit_code, output, time.monotonic() - begun)


def run_pytest(tree: Path) -> tuple[int | None, str]:
    """Run pytest there; return its exit code, None after MAX_SECONDS, and what it said."""
    command = [*PYTEST, *TESTS]
    with Popen(command, cwd=tree, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True) as pytest:
        try:
            output, _ = pytest.communicate(timeout=MAX_SECONDS)
        except TimeoutExpired:
            return None, ""
        finally:
            if pytest.poll() is None:
                os.killpg(pytest.pid, signal.SIGKILL)  # With the processes that its tests have started.
        return pytest.returncode, output


def check_the_tests() -> None:
    """Let the tests pass without a mutation: those that fail anyway kill nothing."""
    run = run_tests(None)
    if run.exit_code != PASSED:
        raise BrokenRunError(f"the tests do not pass without a mutation:\n{run.output[-3000:]}")
    print(f"without a mutation the tests pass ({run.seconds:.1f} s)", flush=True)


def is_killed(number: int, mutation: Mutation) -> bool:
    """Try one mutation, and tell how it went."""
    run = run_tests(mutation)
    if run.exit_code not in (PASSED, FAILED, None):
        raise BrokenRunError(
            f"{number}. {mutation.name}: pytest ended with {run.exit_code}\n{run.output[-3000:]}"
        )
    print(f"{number:3}. {mutation.name}: {run.words}", flush=True)
    return run.is_kill


def chosen(wanted: list[str]) -> dict[int, Mutation]:
    """Return the mutations with these numbers, or with these words in their names; all if there are none."""
    numbered = dict(enumerate(MUTATIONS, 1))
    for word in wanted:
        if not any(word == str(number) or word in mutation.name for number, mutation in numbered.items()):
            raise BrokenRunError(f"no mutation is called {word}")
    return {
        number: mutation
        for number, mutation in numbered.items()
        if not wanted or any(word == str(number) or word in mutation.name for word in wanted)
    }


def main() -> int:
    """Try all mutations, or those that are asked for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__.strip().split("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="say what the mutations are, and try none")
    parser.add_argument("--only", action="append", default=[], metavar="NUMBER_OR_WORDS")
    arguments = parser.parse_args()
    try:
        mutations = chosen(arguments.only)
        if arguments.list:
            print("\n".join(f"{number:3}. {mutation.name}" for number, mutation in mutations.items()))
            return 0
        check_the_tests()
        killed = [is_killed(number, mutation) for number, mutation in mutations.items()]
    except BrokenRunError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{sum(killed)} of {len(killed)} killed")
    return 0 if all(killed) else 1


if __name__ == "__main__":
    sys.exit(main())
