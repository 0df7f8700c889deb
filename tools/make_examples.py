"""Write examples/slurm/: what `prism submit --dry-run -- train CONFIG` (of rl.yaml `rl`, of eval.yaml `evaluate`) makes of every recipe, and of the tiny config, on a cluster of ours.

python tools/make_examples.py            # write them
python tools/make_examples.py --check    # exit code 1 where a file is not what it would write (tests/unit/jobs/test_submit_shipped.py)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_prism.cli.submit import read_command
from megatron_prism.jobs import submit

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("examples/slurm")
CLUSTERS = Path("configs/clusters")
COMMANDS = {"rl": "rl", "eval": "evaluate"}  # by the name of a recipe; of all others, train


def scripts() -> dict[Path, str]:
    """Return the text of every example by its path."""
    wanted = {"tiny_mid": (Path("configs/tiny/mid.yaml"), ["world_size=2"], "test.yaml")}
    for recipe in sorted(Path("configs/recipes").glob("*/*.yaml")):
        wanted[f"{recipe.parent.name}_{recipe.stem}"] = (recipe, [], "h100_pyxis.yaml")
    return {
        FOLDER / f"{name}.sbatch": "".join(
            submit.run([COMMANDS.get(config.stem, "train"), str(config), *overrides], CLUSTERS / cluster, dry_run=True, read=read_command)[
                "texts"
            ]
        )
        for name, (config, overrides, cluster) in wanted.items()
    }


def main() -> int:
    os.chdir(ROOT)  # paths in the scripts are relative to the folder they are submitted in
    wanted = scripts()
    if "--check" not in sys.argv:
        FOLDER.mkdir(exist_ok=True)
        for path, text in wanted.items():
            path.write_text(text)
    found = {path: path.read_text() for path in FOLDER.glob("*.sbatch")}
    wrong = sorted(str(path) for path in {*found, *wanted} if found.get(path) != wanted.get(path))
    print(
        "\n".join(f"{path}: not what prism submit makes; run python tools/make_examples.py, or remove it" for path in wrong)
        or f"{len(found)} examples"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
