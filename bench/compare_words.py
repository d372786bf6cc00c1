"""What `bench.compare` found, as a table, as CSV and as LaTeX.

Accuracies are fractions of 1 in CSV; elsewhere they are in %, and differences of them in percentage points.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from bench.cells import NOTHING, difference, inert, interval, pairs, spread
from bench.compare import VERSUS_FIRST, VERSUS_REFERENCE, title_of
from bench.config import PRIMITIVE_NAMES
from bench.space import UPDATE_FIELDS
from bench.summary import REFERENCE, UPDATES

#: To be said under the table.
CAPTION = (
    "each study's best confirmed configuration, by validation mean; mean ± standard deviation over n fresh seeds, "
    "[95 %] the t interval; diverged runs count at chance, failed ones have no accuracy",
    "test was read once per confirmed run, and nothing was chosen by it; differences are paired by seed, each verdict "
    "is one interval by itself",
)

#: The headings of `table_rows`. A new line, there too, is where a narrow table may break.
COLUMNS = (
    "study",
    "rule",
    "network",
    "data set",
    "coefficients",
    "trials ×\nepochs",
    "val %",
    "test %\n[95 %]",
    "n",
    "diverged /\nfailed",
    f"test − {REFERENCE},\npoints [95 %]",
    "test − the first,\npoints [95 %]",
)
#: So many of them hold words.
TEXTS = 6


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The studies, then the controls."""
    return [
        (
            *words,
            spread(line["val_acc"]),
            _with_interval(line["test_acc"]),
            *_counts(line),
            *(difference(value, len(line["seeds"])).replace("] ", "]\n") for value in _differences(line)),
        )
        for line, words in zip(_lines(found), _words(found), strict=True)
    ]


def _lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*found["studies"], *found["controls"]]


def _words(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells that hold words. Whose control a line is, is said where they could be confused."""
    alike = Counter(map(_what, found["controls"]))
    return [
        (
            line["study"] or ("control" if alike[_what(line)] == 1 else f"control of {', '.join(line['beside'])}"),
            *_what(line)[:3],
            _settings(line),
            f"{NOTHING if line['trials'] is None else line['trials']} × {line['epochs']}",
        )
        for line in _lines(found)
    ]


def _what(line: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return line["rule"], line["arch"], line["dataset"], line["epochs"]


def _settings(line: Mapping[str, Any]) -> str:
    """Coefficients, and how B is updated where that is unusual."""
    said = [f"{name} {value:.2e}" for name, value in line["coefficients"].items()]
    said += [f"{name} {value:.2g}" for name, value in line["updates"].items() if value != UPDATES.get(name)]
    return ",\n".join(said) or NOTHING


def _counts(line: Mapping[str, Any]) -> tuple[str, str]:
    return str(len(line["seeds"])), f"{line['diverged']}/{line['failed']}"


def _differences(line: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """To the reference and to the first; that of the reference to itself is none."""
    return None if line["rule"] == REFERENCE else line[VERSUS_REFERENCE], line[VERSUS_FIRST]


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value["low"] is None:
        return spread(value)
    return f"{spread(value)}\n[{value['low'] * 100:.2f}, {value['high'] * 100:.2f}]"


# --- as CSV ----------------------------------------------------------------------------------------------

_PLAIN = ("rule", "arch", "dataset", "trials", "epochs")
_ESTIMATE = ("mean", "sd", "n", "low", "high")


def csv_text(found: Mapping[str, Any]) -> str:
    """A line per study and control, in full precision (RFC 4180); what there is not is empty."""
    out = io.StringIO()
    lines = [_flat(line) for line in _lines(found)]
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: inert(value) for name, value in line.items()} for line in lines)
    return out.getvalue()


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    flat = {"kind": line["kind"], "study": line["study"], "beside": "; ".join(line["beside"])}
    flat |= {name: line[name] for name in _PLAIN}
    flat |= {name: line["coefficients"].get(name) for name in PRIMITIVE_NAMES}
    flat |= {name: line["updates"].get(name) for name in UPDATE_FIELDS}
    flat |= {name: line[name] for name in ("space",)}
    for name in ("val_acc", "test_acc"):
        flat |= _parts(name, line[name], _ESTIMATE)
    flat |= {name: line[name] for name in ("diverged", "failed")}
    for name, value in zip((VERSUS_REFERENCE, VERSUS_FIRST), _differences(line), strict=True):
        flat |= _parts(name, value, (*_ESTIMATE, "verdict"))
    flat |= {name: line[name] for name in ("device", "dataset_digest", "test_examples")}
    return {**flat, "reasons": "; ".join(line["reasons"])}


def _parts(name: str, value: Mapping[str, Any] | None, parts: Iterable[str]) -> dict[str, Any]:
    return {f"{name}_{part}": None if value is None else value[part] for part in parts}


# --- as LaTeX --------------------------------------------------------------------------------------------

#: What LaTeX would not set as it stands; "[" for the sake of what it means at the beginning of a line.
_SPECIAL: dict[str, str | int | None] = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    NOTHING: "--",
}


def latex_escape(text: str) -> str:
    """Text as LaTeX sets it, in one line."""
    return " ".join(text.split()).translate(str.maketrans(_SPECIAL))


def latex(found: Mapping[str, Any]) -> str:
    r"""A tabular for a paper (it needs ``\usepackage{booktabs}``), below comments that say budgets and n."""
    lines = _lines(found)
    said = [f"{title_of(line)}: {_budget(line)}" for line in lines]
    return "\n".join(
        [
            *(f"% {' '.join(note.split())}" for note in (*said, *CAPTION, *found["notes"])),
            rf"\begin{{tabular}}{{{'l' * TEXTS}{'r' * (len(COLUMNS) - TEXTS)}}}",
            r"\toprule",
            _latex_row(map(latex_escape, COLUMNS)),
            r"\midrule",
            *(_latex_row(_latex_cells(line, words)) for line, words in zip(lines, _words(found), strict=True)),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _budget(line: Mapping[str, Any]) -> str:
    trials = "" if line["trials"] is None else f"trials {line['trials']}, "
    return f"{trials}epochs {line['epochs']}, n {len(line['seeds'])}"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cells(line: Mapping[str, Any], words: Iterable[str]) -> list[str]:
    n = len(line["seeds"])
    return [
        *map(latex_escape, words),
        _math(spread(line["val_acc"])),
        _math(_with_interval(line["test_acc"])),
        *_counts(line),
        *("--" if v is None else f"{_math(interval(v))} {v['verdict']}{pairs(v, n)}" for v in _differences(line)),
    ]


def _math(text: str) -> str:
    """A number and its interval, in math mode."""
    return "--" if text == NOTHING else "$" + text.replace("±", r"\pm").replace("\n", " ").replace(" [", r"\ [") + "$"
