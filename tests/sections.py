"""Print lines and branch coverage of the script by section; exit 1 if a pure one is not covered to 100 %."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ocpp_2w_proxy.py"
BANNER = re.compile(r"^# -{20,}\n# ([A-Z][a-z ]+)\n#", re.MULTILINE)
FULLY_COVERED = {"Messages", "Vocabulary", "Routing"}


def sections(text: str) -> dict[str, range]:
    """Return the line numbers of each section, by banner."""
    found = [(match[1], text.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(text)]
    found.append(("", text.count("\n") + 1))
    return {name: range(first, last) for (name, first), (_, last) in pairwise(found)}


def coverage(report: Path) -> tuple[list[int], list[list[int]]]:
    """Return the lines and the branches of the script that the tests missed."""
    script = json.loads(report.read_text())["files"][SCRIPT.name]
    return script["missing_lines"], script["missing_branches"]


def main(report: Path) -> int:
    """Print the table of coverage.py's JSON report; return the exit code."""
    missing_lines, missing_branches = coverage(report)
    is_well = True
    for name, lines in sections(SCRIPT.read_text()).items():
        missed = [line for line in missing_lines if line in lines]
        jumps = [jump for jump in missing_branches if jump[0] in lines]
        print(f"{name:14} {len(lines):5} lines; not covered: {len(missed)} lines, {len(jumps)} branches")
        is_well = is_well and not (name in FULLY_COVERED and (missed or jumps))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
