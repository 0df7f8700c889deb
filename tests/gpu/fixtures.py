"""The tiny models and the mixture that the parts share, made once: python -m tests.gpu.fixtures FOLDER.

FOLDER/NAME/hf and FOLDER/NAME/ckpt of each family (tests/parity/tiny.py) and of HYBRID, FOLDER/tokenizer, FOLDER/data.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.jobs import convert, prepare
from tests.parity.tiny import FAMILIES, random_model
from tools.smoke import write_tokenizer

TEXTS = [f"The sum of {a} and {b} is {a + b}, their product {a * b}." for a in range(60) for b in range(60)]
HYBRID = "hybrid"  # a Nemotron-H whose projections have multiples of 16 rows, as FP8 needs


def main(root: Path, names: Sequence[str] = (*FAMILIES, HYBRID)) -> None:
    """Make what is not there yet."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "tokenizer").is_dir():
        write_tokenizer(root / "tokenizer", TEXTS)
    if not (root / "data").is_dir():
        (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        source = SourceConfig(name="sums", path=(str(root / "texts.jsonl"),), weight=100, valid_percent=5)
        prepare.run(PrepareConfig(out=root / "data", tokenizer=root / "tokenizer", sources=(source,), num_workers=1))
    for name in names:
        if (root / name / "ckpt").is_dir():
            continue
        model = random_model("nemotron_h", mamba_num_heads=16, expand=4) if name == HYBRID else random_model(name)
        model.save_pretrained(root / name / "hf")
        for file in (root / "tokenizer").iterdir():
            shutil.copy(file, root / name / "hf" / file.name)
        convert.run_import(root / name / "hf", root / name / "ckpt", dry_run=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
