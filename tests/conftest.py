"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kills import Play
from tests.plays import Stage


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Begin a play with a state file."""
    stages: list[Stage] = []

    def begin(more: str = "", **options: Any) -> Stage:
        stages.append(Stage(more, state=tmp_path / "state.db", **options))
        return stages[-1]

    yield begin
    for stage in stages:
        assert stage.journal.file is not None
        stage.journal.file.close()
