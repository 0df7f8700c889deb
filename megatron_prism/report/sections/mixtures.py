"""The mixtures of training tokens and of RL prompts: their sources as bars, in the colours of their domains."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prism.report import blend, draw
from megatron_prism.report.document import Column, Figure, Section, Table
from megatron_prism.report.material import Material, Mixture
from megatron_prism.report.sections.common import Paper, absent, from_paper, slug

ID, TITLE = "mixtures", "Mixtures"


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a figure a mixture; the paper's shares below. Studies share their mixtures: those of the first that has each are shown."""
    by_name: dict[str, Mixture] = {}
    for mixture in (mixture for one in materials for mixture in one.mixtures):
        by_name.setdefault(mixture.name, mixture)
    mixtures = list(by_name.values())
    if not mixtures:
        return absent(ID, TITLE, "No prepared mixture was given.")
    used: set[str] = set()
    text = ("Of several studies, those of the first are shown.",) if len(materials) > 1 else ()
    return Section(ID, TITLE, text, (*(_figure(mixture, used) for mixture in mixtures), *from_paper(paper, "t01_data", "mixtures_paper")))


def _figure(mixture: Mixture, used: set[str]) -> Figure:
    parts = sorted(mixture.parts, key=lambda part: -part.share)
    id = f"mixture_{slug(mixture.name, used)}"
    columns = (Column("source"), Column("domain"), Column("share", "%", ".3g"), Column(mixture.unit), Column("epochs", "", ".3g"))
    rows = tuple((part.name, part.domain, 100 * part.share, part.tokens, part.epochs) for part in parts)
    title = f"{mixture.name}: shares of the {mixture.unit}"
    table = Table(f"{id}_data", title, columns, rows, num_keys=1)
    share = Column(f"share of the {mixture.unit}", "%", ".3g")
    return draw.bars(id, title, share, [part.name for part in parts], [100 * part.share for part in parts], blend.colours_of(parts), table)
