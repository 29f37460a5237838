"""The benchmark measures what it says: played at the smallest size, for its books, not for its figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.play.rig import many_files
from tests.proof.benchmark import MEASUREMENTS, Size, framed, masked, unframed

TINY = Size(
    levels=(1, 100), rounds=1, calls=100, seconds=0.1, herds=1, herd=20, secure=5, stored=100, sessions=50
)


@pytest.mark.skipif(
    shutil.which("haproxy") is None or not Path("/proc/self/statm").exists(),
    reason="needs Linux and HAProxy; the gate installs it",
)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_it_measures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every Call is answered, nothing is complained about, and a figure is told."""
    with many_files():
        MEASUREMENTS[name](TINY)
    told = capsys.readouterr().out
    assert "\n- " in f"\n{told}"
    assert "says:" not in told


@pytest.mark.parametrize("size", [0, 1, 125, 126, 1000])
@pytest.mark.parametrize("key", [b"", b"\x01\x02\x03\x04"])
def test_frames_are_read_as_they_are_made(size: int, key: bytes) -> None:
    """Masked or not, and what is not complete yet is left."""
    text = bytes(range(256)) * 4
    frame = framed(text[:size], key)
    assert unframed(frame + frame[:1]) == ([(1, text[:size])], frame[:1])
    assert masked(masked(text, b"abcd"), b"abcd") == text
