"""The rules: one row each. A rule says where B comes from, and which primitives move it.

To add a rule, add a row; the contract in tests/test_rules.py picks it up by itself. Any subset of the
primitives is a rule too, written ``a+b``: `parse_rule` gives it its canonical name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.config import PRIMITIVE_NAMES, UserError, unknown

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
