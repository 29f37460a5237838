"""Every fault of the table in tests/README.md, tried against the script in a process of its own."""

from __future__ import annotations

import asyncio

import pytest

from tests.proof.network import NOT_TRIED, ROWS, Row, Seen, play_all, promised


@pytest.fixture(scope="module")
def all_seen(request: pytest.FixtureRequest) -> dict[str, Seen]:
    """What became of the rows that were asked for, played at the same time because they mostly wait."""
    asked = {item.name.partition("[")[2] for item in request.session.items if item.path.samefile(__file__)}
    rows = [row for row in ROWS if f"{row.name}]" in asked and not row.is_slow]
    return {seen.name: seen for seen in asyncio.run(play_all(rows))}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_what_is_promised_is_kept(row: Row, all_seen: dict[str, Seen]) -> None:
    """Or it says what was seen instead."""
    if row.is_slow:
        pytest.skip("takes too long here: python -m tests.proof.network")
    seen = all_seen[row.name]
    if seen.text == NOT_TRIED:
        pytest.skip(seen.text)
    assert seen.is_kept, seen.text


def test_the_readme_promises_what_is_played() -> None:
    """A line for each play, and no other."""
    assert sorted(promised()) == sorted(row.name for row in ROWS)
