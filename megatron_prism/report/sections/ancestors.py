"""Which models a model was made of: by the graph of a study; without one, the first model is everyone's beginning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_prism.report.material import Material

MEASURING = ("evaluate", "analyze")  # jobs that make no model


def of(material: Material, models: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each model, those among `models` that it was made of, the first one first. models: in the order of the report."""
    if not material.stages:
        return {model: [models[0]] if model != models[0] else [] for model in models}
    by_name = {stage.name: stage for stage in material.stages}

    def before(name: str) -> set[str]:
        earlier: set[str] = set()
        left = [name]
        while left:
            new = {one for one in by_name[left.pop()].after if one in by_name} - earlier
            earlier |= new
            left += new
        return earlier

    made_of: dict[str, list[str]] = {}
    for model in models:
        makers = [stage.name for stage in material.stages if stage.model == model and not stage.job.startswith(MEASURING)]
        earlier = {by_name[name].model for maker in makers for name in before(maker) if not by_name[name].job.startswith(MEASURING)}
        made_of[model] = [other for other in models if other != model and other in earlier]
    return made_of


def in_order(materials: Sequence[Material], models: Sequence[str]) -> list[str]:
    """Return the models with each behind the one that it was made from last, the largest family first: base, mid, RL of mid, another mid."""
    study = next((one for one in materials if one.stages), None)
    if study is None:
        return list(models)
    made_of = of(study, models)
    size = Counter(earlier for own in made_of.values() for earlier in own)
    last = {model: max(own, key=lambda earlier: len(made_of[earlier]), default=None) for model, own in made_of.items()}

    def family(model: str) -> Iterator[str]:
        yield model
        for child in models:
            if last[child] == model:
                yield from family(child)

    roots = sorted((model for model in models if last[model] is None), key=lambda model: -size[model])
    ordered = [model for root in roots for model in family(root)]
    return [*ordered, *(model for model in models if model not in ordered)]
