"""`bench list`: the registries as tables. Each is read from its rows, so that a new row shows by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Listing = list[dict[str, str]]


def _rules() -> Listing:
    from bench.learning.rules import RULES

    return [
        {"name": r.name, "what": r.summary, "primitives": " + ".join(r.primitives) or "–", "source": r.source}
        for r in RULES.values()
    ]


def _primitives() -> Listing:
    from bench.learning.primitives import PRIMITIVES

    return [{"name": p.name, "energy": p.formula, "kind": p.kind, "sees": p.sees} for p in PRIMITIVES.values()]


def _networks() -> Listing:
    from bench.models import ARCHITECTURES, MLP

    rows = [{"name": a.name, "what": a.summary, "source": a.source} for a in (*ARCHITECTURES.values(), MLP)]
    return [
        *rows,
        {
            "name": "NAME@F",
            "what": "any of these, channels and hidden units times F, as in resnet18@0.25",
            "source": "",
        },
        *({"name": f"{lib}:NAME", "what": f"any network of {lib}", "source": lib} for lib in ("torchvision", "timm")),
    ]


def _datasets() -> Listing:
    from bench.datasets import DATASETS

    return [{"name": d.name, "what": d.summary, "source": d.source} for d in DATASETS.values()]


def _spaces() -> Listing:
    from bench.spaces import SPACES

    return [
        {"name": s.name, "what": s.summary, "in every trial": _said(s.settings), "source": s.source}
        for s in SPACES.values()
    ]


def _ranges() -> Listing:
    from bench.space_files import load_space, space_names
    from bench.spaces import SPACES, canonical_space

    found = []
    for row in SPACES.values():
        for rule in space_names(row.name):
            if canonical_space(rule, row.name) != row.name:
                continue
            space = load_space(rule, "resnet18", space=row.name)
            ranges = "; ".join(
                f"{name} {p['min']:g} to {p['max']:g} ({p['scale']})"
                if "min" in p
                else f"{name} {p.get('choices', p.get('value'))}"
                for name, p in space.to_dict().items()
            )
            file = "/".join(filter(None, ("search_spaces", row.folder, f"{rule}.yaml")))
            own = {name: value for name, value in space.settings.items() if name not in row.settings}
            found.append(
                {"space": row.name, "rule": rule, "searched on resnet18": ranges, "sets": _said(own), "file": file}
            )
    return found


def _said(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "–"


def _samplers() -> Listing:
    from bench.choices import SAMPLERS

    return [{"name": s.name, "what": s.summary, "source": s.source} for s in SAMPLERS.values()]


def _schedulers() -> Listing:
    from bench.choices import SCHEDULERS

    return [{"name": s.name, "what": s.summary, "source": s.source} for s in SCHEDULERS.values()]


def _objectives() -> Listing:
    from bench.choices import OBJECTIVES

    return [{"name": o.name, "what": o.summary, "metrics": ", ".join(o.metrics)} for o in OBJECTIVES.values()]


def _scalings() -> Listing:
    from bench.learning.activity import SCALINGS

    return [{"name": s.name, "what": s.summary, "source": s.source} for s in SCALINGS.values()]


def _sites() -> Listing:
    from bench.noise import SITES

    return [
        {"name": s.name, "when": s.when, "what": s.definition, "σ in": s.unit, "levels": _levels(s.levels)}
        for s in SITES.values()
    ]


def _levels(levels: Sequence[float] | None) -> str:
    from bench.noise import ADDED_UP

    return _grid(levels) if levels else f"by recipe: those that add up to {_grid(ADDED_UP)} in a weight"


def _attacks() -> Listing:
    from bench.evaluators.adversarial import ATTACKS

    return [
        {"name": a.name, "what": a.summary, "ε in": a.unit, "levels": _grid(a.levels), "source": a.source}
        for a in ATTACKS.values()
    ]


def _grid(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:.3g}" for level in levels)


LISTS: dict[str, Callable[[], Listing]] = {
    "rules": _rules,
    "primitives": _primitives,
    "networks": _networks,
    "datasets": _datasets,
    "spaces": _spaces,
    "ranges": _ranges,
    "samplers": _samplers,
    "schedulers": _schedulers,
    "objectives": _objectives,
    "scalings": _scalings,
    "sites": _sites,
    "attacks": _attacks,
}


def listing(name: str) -> Listing:
    """The rows of one list, as text."""
    return LISTS[name]()
