"""The benchmark measures what it says: played at the smallest size, for its books, not for its figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.play.frames import unframed
from tests.play.rig import SCRIPT
from tests.proof.benchmark import MEASUREMENTS, QUICK, Bench, reading, undisturbed


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy; the gate installs it")
@pytest.mark.parametrize("name", MEASUREMENTS)
async def test_it_measures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every Call is answered, nothing is complained about, and each version of the script has its figures."""
    scripts = [SCRIPT, Path(shutil.copy(SCRIPT, tmp_path))]
    with undisturbed():
        await getattr(Bench(QUICK, scripts), name)()
    told = capsys.readouterr().out
    assert told.count("\n| ") > 2
    assert all(str(script) in told for script in scripts)


@pytest.mark.parametrize("length", [250, 500, 8000])
def test_a_reading_is_as_long_as_it_says(length: int) -> None:
    """The text, without the head and the key of its frame."""
    ((_, text),), _ = unframed(reading(7, length)[1])
    assert len(text) == length
