"""Run the README's `$ ` commands as they stand, in order, in a fresh clone; not collected by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 750  # For one command.


def commands(text: str) -> list[str]:
    """Return the commands of the README's console blocks."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def serve(command: str, folder: Path) -> int:
    """Run a command that serves until it is stopped; stop it once it listens. Return its exit code."""
    process = subprocess.Popen(command.split(), cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listens on" in line:
            process.terminate()
    return process.wait(SECONDS)


def main(folder: Path) -> int:
    """Clone the repository into the folder and run the commands there; stop at the first that fails."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for command in commands((folder / "README.md").read_text()):
        begun = time.monotonic()
        if command.endswith("ocpp_2w_proxy.py"):
            code = serve(command, folder)
        else:
            code = subprocess.run(command, shell=True, cwd=folder, timeout=SECONDS, check=False).returncode
        print(f"{command}: exit code {code} after {time.monotonic() - begun:.1f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
