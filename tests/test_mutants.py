"""The mutations of the section Routing still fit the script; `python -m tests.mutants` tries them."""

from __future__ import annotations

import re

import pytest

from tests.mutants import routing
from tests.mutations import MUTATIONS, Mutation
from tests.sections import SCRIPT

SECTION = routing(SCRIPT.read_text())[1]
BLOCKS = re.split(r"^(?=(?: {4})?(?:@|def |class ))", SECTION, flags=re.MULTILINE)  # Functions, mostly.


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_a_mutation_changes_stands_once_in_the_section(mutation: Mutation) -> None:
    """And what it becomes is another function, and still Python."""
    assert SECTION.count(mutation.before) == 1
    (block,) = [block for block in BLOCKS if mutation.before in block]
    changed = block.replace(mutation.before, mutation.after)
    assert changed != block
    compile(f"def routing():\n{changed}" if block.startswith(" ") else changed, "Routing", "exec")


def test_each_mutation_has_a_name_of_its_own() -> None:
    """And they are enough to say something of the tests."""
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30
