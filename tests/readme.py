"""Run the README's `$ ` commands as they stand, in order, in a fresh clone; not collected by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 600  # For one command.


def commands(text: str) -> list[str]:
    """Return the commands of the README's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")
    ]


def main(folder: Path) -> int:
    """Clone the repository into the folder and run the commands there; stop at the first that fails."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for command in commands((folder / "README.md").read_text()):
        begun = time.monotonic()
        done = subprocess.run(command, shell=True, cwd=folder, timeout=SECONDS, check=False)
        print(f"{command}: exit code {done.returncode} after {time.monotonic() - begun:.1f} s", flush=True)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
