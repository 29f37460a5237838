"""Fixtures that several files share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ocpp_2w_proxy as p
from tests.play.kills import Play
from tests.play.planted import Eavesdropper
from tests.play.plays import Stage


@pytest.fixture(scope="session", autouse=True)
def nothing_planted_is_told() -> Iterator[Eavesdropper]:
    """Listen to all that is logged in the whole run, INFO included; no planted secret may be among it."""
    ear = Eavesdropper()
    p.log.addHandler(ear)
    logging.getLogger().addHandler(ear)
    level = p.log.level
    p.log.setLevel(logging.INFO)
    yield ear
    p.log.setLevel(level)
    p.log.removeHandler(ear)
    logging.getLogger().removeHandler(ear)
    assert ear.leaks == []


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Begin a play with a state file."""
    stages: list[Stage] = []

    def begin(more: str = "", **options: Any) -> Stage:
        stages.append(Stage(more, state=tmp_path / "state.db", **options))
        return stages[-1]

    yield begin
    for stage in stages:
        stage.journal.database.close()
