"""Where a merge comes from: merge.json for programs, and README.md, the model card, for people and the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint.at_rest import AtRest
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import describe, write_json, write_text
from megatron_prism.merge.parent import PROVENANCE, provenance
from megatron_prism.merge.plan import Plan, weights

FILE, CARD, PARENT_CARD = PROVENANCE, "README.md", "README_PARENT.md"
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")  # true of the merge too


def write(plan: Plan, root: Path, sums: list[dict[str, str]]) -> None:
    """Write merge.json and README.md. The origin's own card, whose figures are not the merge's, is kept as README_PARENT.md."""
    parents = [
        _parent(parent, weight, of_parent) for parent, (_, weight), of_parent in zip(plan.parents, weights(plan.config), sums, strict=True)
    ]
    inputs = {path: digest for of_parent in sums for path, digest in of_parent.items()}
    facts = describe(
        "merge", inputs, config=to_dict(plan.config), config_from=str(plan.origin.path), parents=parents, notes=list(plan.notes)
    )
    write_json(root / FILE, facts)
    before = (root / CARD).read_text(encoding="utf-8", errors="replace") if (root / CARD).is_file() else None
    if before is not None:
        (root / CARD).rename(root / PARENT_CARD)
    write_text(root / CARD, _card(plan, facts, before))


def _parent(parent: AtRest, weight: str | float | None, sums: Mapping[str, str]) -> dict[str, Any]:
    before = provenance(parent)
    made_by = {} if before is None else {"merge": before}
    return {"path": str(parent.path), "weight": weight, "sums": dict(sums), **made_by}


def _front_matter(text: str) -> list[str]:
    """Return the lines of a card's metadata that hold for the merge too."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return []
    kept: list[str] = []
    is_kept = False
    for line in lines[1 : lines.index("---", 1)]:
        if line[:1] not in (" ", "-", "#", ""):
            is_kept = line.partition(":")[0] in KEPT
        kept += [line] if is_kept else []
    return kept


def _card(plan: Plan, facts: Mapping[str, Any], before: str | None) -> str:
    config = plan.config
    keys = ("t", "density", "scale", "normalize", "any_sum", "dtype")
    settings = [f"{key} {getattr(config, key)}" for key in keys if getattr(config, key) != type(config).__dataclass_fields__[key].default]
    rows = [f"| {each['path']} | {each['weight']} | {_short(each['sums'])} |" for each in facts["parents"]]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "---",
        *_front_matter(before or ""),
        "tags:",
        "- merge",
        "---",
        "",
        f"# {config.out.resolve().name}",
        "",
        f"A merge by `prism merge` ({facts['created']}): method {', '.join([config.method, *settings])}. Sums in fp32, one rounding at the end.",
        f"config.json, tokenizer and all other files are those of {plan.origin.path}.",
        "",
        f"| model | weight | {config.sums} |",
        "|---|---|---|",
        *rows,
        "",
        *[f"- {note}" for note in plan.notes],
        *([""] if plan.notes else []),
        f"All sums are in [{FILE}]({FILE}). Versions: {versions}.",
    ]
    if before is not None:
        lines.append(f"The parent's own card is [{PARENT_CARD}]({PARENT_CARD}).")
    return "\n".join(lines) + "\n"


def _short(sums: Mapping[str, str]) -> str:
    return "<br>".join(f"{Path(path).name} {digest[:12]}" for path, digest in sums.items())
