"""Leave only the section Routing in a session of cosmic-ray: python -m tests.routing_only SESSION."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing

from tests.sections import SCRIPT, sections

# `|` stands in annotations, which are never run; None and Enums have no order, and one of each.
POINTLESS = ["core/ReplaceBinaryOperator_BitOr_*", "core/ReplaceComparisonOperator_Is_[^I]*"]

if __name__ == "__main__":
    lines = sections(SCRIPT.read_text())["Routing"]
    where = "start_pos_row BETWEEN ? AND ? AND operator_name NOT GLOB ? AND operator_name NOT GLOB ?"
    with closing(sqlite3.connect(sys.argv[1])) as database, database:
        run = database.execute
        run(f"DELETE FROM mutation_specs WHERE NOT ({where})", (lines.start, lines.stop - 1, *POINTLESS))
        run("DELETE FROM work_items WHERE job_id NOT IN (SELECT job_id FROM mutation_specs)")
        print(run("SELECT count(*) FROM work_items").fetchone()[0], "mutations are left")
