"""Plans every recipe and every published row, as tools/ do: planner_worker.py FILE writes them, and the tables, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
import planner_table
import recipes_table

if __name__ == "__main__":
    plans, rows = recipes_table.plans(), planner_table.rows()
    published = [
        {
            "facts": row.facts,
            "rate_error": row.rate_error,
            "flops_error": row.flops_error,
            "memory_gib": row.found.memory_gib,
            "gradients_gib": [found.gradients / 2**30 for found in row.found.memories],
        }
        for row in rows
    ]
    tables = {"RECIPES.md": recipes_table.table(plans), "PLANNER.md": planner_table.table(rows)}
    found = {"plans": plans, "published": published, "tables": tables, "evaluations": recipes_table.evaluations()}
    Path(sys.argv[1]).write_text(json.dumps(found))
