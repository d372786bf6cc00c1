"""How a rule looks: one colour, marker and dash for each, the same in every figure and on every page."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from bench.config import PRIMITIVE_NAMES

#: Okabe & Ito 2008, told apart by the colour-blind; grey in the place of yellow, which vanishes on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#888888"

#: Matplotlib's markers and dashes, in Plotly's words.
_SYMBOLS = {
    "o": "circle",
    "v": "triangle-down",
    "^": "triangle-up",
    "<": "triangle-left",
    ">": "triangle-right",
    "P": "cross",
    "X": "x",
    "D": "diamond",
    "d": "diamond-tall",
    "s": "square",
    "p": "pentagon",
    "h": "hexagon",
    "*": "star",
    "x": "x-thin-open",
}
_LINES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a rule is drawn, in every figure: colour, marker, dashes; the latter two in matplotlib's words."""

    color: str
    marker: str
    dash: str = "-"

    @property
    def symbol(self) -> str:
        """The marker, in Plotly's words."""
        return _SYMBOLS[self.marker]

    @property
    def line(self) -> str:
        """The dashes, in Plotly's words."""
        return _LINES[self.dash]


#: Whole lines for the rules that are compared most, dashes for single primitives and the control.
LOOKS = {
    "backprop": Look(color=BLACK, marker="o"),
    "feedback": Look(color=ORANGE, marker="v"),
    "sign": Look(color=SKY, marker="P"),
    "kolen-pollack": Look(color=GREY, marker="X"),
    "mirror": Look(color=PURPLE, marker="D"),
    "information": Look(color=BLUE, marker="^"),
    "symmetric": Look(color=VERMILLION, marker="s"),
    "activation": Look(color=GREEN, marker="d"),
    "decay": Look(color=ORANGE, marker="<", dash="--"),
    "amp": Look(color=PURPLE, marker=">", dash="--"),
    "null": Look(color=BLUE, marker="p", dash="--"),
    "sparse": Look(color=GREEN, marker="h", dash="--"),
    "self": Look(color=VERMILLION, marker="*", dash="--"),
    "frozen": Look(color=BLACK, marker="x", dash=":"),
}
_COLORS = (ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)
_MARKERS = ("o", "s", "^", "v", "D", "P", "X")


def look(rule: str) -> Look:
    """The look of this rule. A subset of the primitives, ``a+b``, has one that no other subset has."""
    if rule in LOOKS:
        return LOOKS[rule]
    parts = rule.split("+")
    known = set(parts) <= set(PRIMITIVE_NAMES)
    key = sum(1 << PRIMITIVE_NAMES.index(p) for p in set(parts)) if known else zlib.crc32(rule.encode())
    row, column = divmod(key, len(_COLORS))
    return Look(color=_COLORS[column], marker=_MARKERS[row % len(_MARKERS)], dash="-.")
