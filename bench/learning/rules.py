"""The rules: one row each. A rule says where B comes from, and which primitives move it.

To add a rule, add a row; the contract in tests/test_rules.py picks it up by itself. Any subset of the
primitives is a rule too, written ``a+b``: `parse_rule` gives it its canonical name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from bench.config import ACTIVITY_PRIMITIVES, PRIMITIVE_NAMES, UserError, unknown

#: Where B comes from. weight: B is W. fixed: random, for ever. sign: s·sign(W), made anew in every step.
#: learned: a random initial value, then moved by the primitives.
Feedback = Literal["weight", "fixed", "sign", "learned"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule, as data (design, section 4).

    ``task_gradient``: B receives dW too (Kolen-Pollack). ``trains``: which forward layers learn, all or
    only the last one (the control ``frozen``).
    """

    name: str
    summary: str
    source: str
    feedback: Feedback = "learned"
    primitives: tuple[str, ...] = ()
    task_gradient: bool = False
    trains: Literal["all", "last"] = "all"

    @property
    def learns(self) -> bool:
        """Whether B has a gradient of its own."""
        return self.feedback == "learned"

    @property
    def sees_activity(self) -> bool:
        """Whether that gradient reads the layers' activity, so that its scaling has an effect."""
        return any(name in ACTIVITY_PRIMITIVES for name in self.primitives)

    @property
    def maps(self) -> int:
        """How many maps of a layer the gradient of its B takes: what is elementwise counts nothing.

        As `bench.learning.primitives.activity_gradient` does it: sparse is one forward and one kernel_grad, null one
        transpose and one kernel_grad; amp rides along with either, and is one kernel_grad alone.
        """
        return 2 * sum(name in self.primitives for name in ("sparse", "null")) or int("amp" in self.primitives)

    @property
    def noise_maps(self) -> int:
        """How many maps of a layer's patches the gradient of its B takes on noise (`bench.learning.activity`)."""
        if not self.sees_activity:
            return 0
        return 3 + 2 * ("sparse" in self.primitives) if "null" in self.primitives else 2

    @property
    def cost_floor(self) -> float:
        """A training step's maps, in those of backprop, which are 3 a layer; `bench.arithmetic` counts a network's."""
        return 1 + self.maps / 3


_KUNIN = "Kunin et al. 2020, arXiv 2003.01513"
_AKROUT = "Akrout et al. 2019, arXiv 1904.05391"

_ROWS = (
    Rule(name="backprop", feedback="weight", summary="B is W: the true gradient", source="Rumelhart et al. 1986"),
    Rule(
        name="feedback",
        feedback="fixed",
        summary="B random and fixed: feedback alignment",
        source="Lillicrap et al. 2016, doi 10.1038/ncomms13276",
    ),
    Rule(
        name="sign",
        feedback="sign",
        summary="B = s·sign(W), s the standard deviation of the initialiser (uSF in BioTorch)",
        source="Xiao et al. 2019, arXiv 1811.03567",
    ),
    Rule(
        name="kolen-pollack",
        primitives=("decay",),
        task_gradient=True,
        summary="B receives dW too, and the same decay as W",
        source=f"Kolen & Pollack 1994; {_AKROUT}",
    ),
    Rule(name="mirror", primitives=("decay", "amp"), summary="weight mirror: amp against decay", source=_AKROUT),
    Rule(
        name="information",
        primitives=("decay", "amp", "null"),
        summary="information alignment: amp against null and decay",
        source=_KUNIN,
    ),
    Rule(name="symmetric", primitives=("decay", "self"), summary="symmetric alignment: B to W", source=_KUNIN),
    Rule(
        name="activation",
        primitives=("amp", "sparse"),
        summary="activation alignment: B·x to W·x",
        source=_KUNIN,
    ),
    Rule(name="decay", primitives=("decay",), summary="½‖B‖²", source=_KUNIN),
    Rule(name="amp", primitives=("amp",), summary="−⟨B·x, W·x⟩", source=_KUNIN),
    Rule(name="null", primitives=("null",), summary="½‖Bᵀ·W·x‖²", source=_KUNIN),
    Rule(name="sparse", primitives=("sparse",), summary="½‖B·x‖²", source=_KUNIN),
    Rule(name="self", primitives=("self",), summary="−⟨B, W⟩", source=_KUNIN),
    Rule(
        name="frozen",
        feedback="weight",
        trains="last",
        summary="control: all but the last layer stays at its initial value",
        source="control",
    ),
)

RULES: dict[str, Rule] = {row.name: row for row in _ROWS}

#: Named rules that are nothing but a subset of primitives, by that subset.
_BY_SUBSET = {frozenset(r.primitives): r for r in _ROWS if r.learns and not r.task_gradient}


#: Not a rule but all of them: which primitives are on is searched together with their coefficients.
ANY = "any"


def subsets(primitives: Sequence[str] = PRIMITIVE_NAMES) -> tuple[Rule, ...]:
    """The rules that these primitives make: every non-empty subset, 31 of five; the small ones first.

    UserError for a name that is no primitive, or that stands twice.
    """
    for name in primitives:
        if name not in PRIMITIVE_NAMES:
            raise unknown("primitive", name, PRIMITIVE_NAMES)
    if not primitives or len(set(primitives)) < len(primitives):
        raise UserError(f"primitives {','.join(primitives)}: name one or more, each once.")
    ordered = [name for name in PRIMITIVE_NAMES if name in primitives]
    return tuple(parse_rule("+".join(s)) for size in range(1, len(ordered) + 1) for s in combinations(ordered, size))


def parse_rule(text: str) -> Rule:
    """The rule with this name; ``a+b+...`` is the subset of these primitives, in any order.

    A subset that has a name is that named rule (``decay+amp`` is ``mirror``); another gets the canonical
    name that joins its primitives in the order decay, amp, null, sparse, self. A UserError otherwise.
    """
    if text in RULES:
        return RULES[text]
    parts = text.split("+")
    if len(parts) < 2 or not set(parts) <= set(PRIMITIVE_NAMES):
        error = unknown("rule", text, RULES)
        raise UserError(f"{error} Or a subset of the primitives {', '.join(PRIMITIVE_NAMES)}, joined by '+'.")
    if len(set(parts)) < len(parts):
        raise UserError(f"rule {text!r} names a primitive twice; write each once, e.g. 'amp+decay'.")
    subset = frozenset(parts)
    if subset in _BY_SUBSET:
        return _BY_SUBSET[subset]
    ordered = tuple(p for p in PRIMITIVE_NAMES if p in subset)
    return Rule(
        name="+".join(ordered), primitives=ordered, summary=f"subset of primitives: {', '.join(ordered)}", source=_KUNIN
    )
