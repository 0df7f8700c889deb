"""Show a held-out problem that one model got wrong and another gets right, from the folders of two evaluations.

Run: python examples/quickstart_problem.py --before EVALUATION --after EVALUATION [--task TASK]

A problem counts where every response before was wrong, and every one after is right. The first such problem with the longest response is shown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Responses = dict[str, list[dict[str, Any]]]  # problem -> responses


def main() -> None:
    """Print a problem, with a response of each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", type=Path, required=True, metavar="EVALUATION")
    parser.add_argument("--after", type=Path, required=True, metavar="EVALUATION")
    parser.add_argument("--task", default="code")
    arguments = parser.parse_args()
    before, after = (read(folder, arguments.task) for folder in (arguments.before, arguments.after))
    changed = [problem for problem in after if problem in before and share_right(before[problem]) == 0 and share_right(after[problem]) == 1]
    if not changed:
        raise SystemExit(f"no problem of {arguments.task} that every response before got wrong and every one after gets right")
    problem = max(changed, key=lambda name: len(after[name][0]["text"]))
    print(f"problem:  {problem}=   (one of {len(changed)} that went from never to always right)")
    print(f"before:   {before[problem][0]['text']}   {before[problem][0]['outcome']}")
    print(f"after:    {after[problem][0]['text']}   {after[problem][0]['outcome']}")


def read(folder: Path, task: str) -> Responses:
    """Return the responses to each problem of a task."""
    responses: Responses = {}
    with (folder / "results.jsonl").open() as lines:
        for result in map(json.loads, lines):
            if result["task"] == task:
                responses.setdefault(result["id"], []).append(result)
    return responses


def share_right(responses: list[dict[str, Any]]) -> float:
    """Return the share of right responses."""
    return sum(response["outcome"] == "right" for response in responses) / len(responses)


if __name__ == "__main__":
    main()
