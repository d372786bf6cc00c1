"""The figures as XML: what is drawn, of whom, and where; the same bytes every time."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from bench.config import PRIMITIVE_NAMES, UserError
from bench.figures import robustness_figure
from bench.learning.rules import RULES
from bench.looks import LOOKS, look
from bench.robustness_summary import Point, summarize

LEVELS = (0.1, 0.2, 0.4, 0.8)
SVG = "{http://www.w3.org/2000/svg}"


def site(*rules: str, seeds: int = 3, lost: str = "", tail: float = 0.3) -> dict[str, Any]:
    """Curves that fall from 0.9 to ``tail``, twice, and differ by rule and seed; ``lost`` diverges at the last."""
    points = [
        Point(
            site="update",
            rule=rule,
            seed=seed,
            level=level,
            accuracy=accuracy + 0.01 * seed + 0.002 * i * seed,
            status="diverged" if rule == lost and level == LEVELS[-1] else "finished",
        )
        for i, rule in enumerate(rules)
        for seed in range(seeds)
        for level, accuracy in zip((0.0, *LEVELS), (0.9, 0.85, 0.8 - 0.1 * i, tail, tail), strict=True)
    ]
    found: dict[str, Any] = summarize(points, chance=0.1, tested=1000)["sites"][0]
    return found


def draw(found: dict[str, Any], path: Path, **more: str) -> ElementTree.Element:
    words = {"title": "Noise in the updates", "note": "n = 3 seeds, resnet18, digits", "unit": "× learning rate"}
    robustness_figure(found, **{**words, **more}, path=path)
    return ElementTree.parse(path).getroot()


def parts(root: ElementTree.Element, kind: str) -> dict[str, ElementTree.Element]:
    """The groups ``kind RULE``, by rule."""
    named = {group.get("id", ""): group for group in root.iter(f"{SVG}g")}
    return {name.removeprefix(f"{kind} "): group for name, group in named.items() if name.startswith(f"{kind} ")}


def texts(path: Path) -> list[str]:
    """Text is drawn as outlines, each behind a comment that says it."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def points(group: ElementTree.Element) -> list[tuple[float, float]]:
    """The vertices of the first path in a group."""
    path = next(iter(group.iter(f"{SVG}path"))).get("d", "")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


def marks(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the markers of a group stand."""
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in group.iter(f"{SVG}use")]


# --- what is drawn ---------------------------------------------------------------------------------------


def test_every_rule_has_its_line_band_difference_and_name(tmp_path: Path) -> None:
    rules = ("backprop", "symmetric", "amp+null")
    root = draw(site(*rules), tmp_path / "a.svg")
    assert set(parts(root, "mean")) == set(parts(root, "band")) == set(parts(root, "clean")) == set(rules)
    assert set(parts(root, "half")) == set(rules)
    assert set(parts(root, "difference")) == set(rules) - {"backprop"}
    said = texts(tmp_path / "a.svg")
    words = ["Noise in the updates", "n = 3 seeds, resnet18, digits", "σ (× learning rate), log scale", "chance", "σ½"]
    assert set(words) | set(rules) | {"accuracy, %", "rule − backprop, points"} <= set(said)
    assert "a run diverged" not in said
    assert [text for text in said if text in ("0", *map(str, LEVELS))].count("0.4") == 1


def test_a_line_goes_through_its_means(tmp_path: Path) -> None:
    """Four levels, an octave apart: even steps to the right; heights linear in accuracy, up is more."""
    found = site("backprop", "symmetric")
    drawn = points(parts(draw(found, tmp_path / "a.svg"), "mean")["symmetric"])
    assert len(drawn) == len(LEVELS)
    steps = [b[0] - a[0] for a, b in pairwise(drawn)]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-3)
    means = [at["acc"]["mean"] for at in found["rules"][1]["curve"]]
    slopes = [(y - drawn[0][1]) / (m - means[0]) for (_, y), m in zip(drawn[1:], means[1:], strict=True)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-3)
    assert slopes[0] < 0  # y grows downwards


def test_a_band_is_as_high_as_its_interval(tmp_path: Path) -> None:
    found = site("backprop", "symmetric")
    root = draw(found, tmp_path / "a.svg")
    line, band = (points(parts(root, kind)["symmetric"]) for kind in ("mean", "band"))
    scale = (line[0][1] - line[2][1]) / (0.85 - 0.3)
    interval = found["rules"][1]["curve"][0]["acc"]
    heights = [y for x, y in band if x == pytest.approx(line[0][0], abs=1e-3)]
    assert abs(max(heights) - min(heights)) == pytest.approx(
        abs(scale) * (interval["high"] - interval["low"]), rel=0.01
    )


def test_differences_stand_beside_zero_with_their_intervals(tmp_path: Path) -> None:
    """Five marks (0 and four levels) and bars; only at the second level does the mean differ by more than 0.003."""
    found = site("backprop", "symmetric")
    root = draw(found, tmp_path / "a.svg")
    heights = [y for _, y in marks(parts(root, "difference")["symmetric"])]
    zero = points(next(group for group in root.iter(f"{SVG}g") if group.get("id") == "zero"))[0][1]
    expected = [0.002, 0.002, -0.098, 0.002, 0.002]
    assert [zero - y for y in heights] == pytest.approx([(zero - heights[2]) / -0.098 * e for e in expected], rel=0.01)
    bars = list(parts(root, "interval")["symmetric"].iter(f"{SVG}path"))
    assert len(bars) == 5
    ends = [float(y) for y in re.findall(r"[ML] [\d.-]+ ([\d.-]+)", bars[2].get("d", ""))]
    interval = found["rules"][1]["curve"][1]["versus"]
    scale = (zero - heights[2]) / -0.098
    assert abs(ends[1] - ends[0]) == pytest.approx(scale * (interval["high"] - interval["low"]), rel=0.01)


def test_one_seed_has_no_band_and_one_rule_no_differences(tmp_path: Path) -> None:
    heights = [y for _, y in points(parts(draw(site("backprop", seeds=1), tmp_path / "a.svg"), "band")["backprop"])]
    assert len(set(heights)) == 3  # both edges are the line, and it ends level
    root = draw(site("backprop"), tmp_path / "b.svg")
    assert parts(root, "difference") == {}
    assert "rule − backprop, points" not in texts(tmp_path / "b.svg")


def test_diverged_runs_are_marked_and_censored_half_levels_are_not(tmp_path: Path) -> None:
    root = draw(site("backprop", "mirror", lost="mirror", tail=0.7), tmp_path / "a.svg")
    assert {rule: len(marks(group)) for rule, group in parts(root, "diverged").items()} == {"mirror": 1}
    assert "a run diverged" in texts(tmp_path / "a.svg")
    assert set(parts(root, "half")) == {"mirror"}


def test_a_rule_without_noise_has_its_clean_mark_alone(tmp_path: Path) -> None:
    found = summarize(
        (
            Point(site="update", rule=rule, seed=s, level=level, accuracy=0.9 - level + 0.01 * s)
            for rule in ("backprop", "sign")
            for s in range(3)
            for level in ((0.0, *LEVELS) if rule == "backprop" else (0.0,))
        ),
        chance=0.1,
        tested=1000,
        unaffected={"update": ["sign"]},
    )["sites"][0]
    root = draw(found, tmp_path / "a.svg")
    assert set(parts(root, "clean")) == {"backprop", "sign"}
    kinds = ("mean", "band", "half", "diverged", "difference")
    assert [kind for kind in kinds if "sign" in parts(root, kind)] == []
    assert {"backprop", "sign, no noise"} <= set(texts(tmp_path / "a.svg"))
    assert "sign" not in texts(tmp_path / "a.svg")


def test_crowded_levels_keep_their_marks_and_lose_labels(tmp_path: Path) -> None:
    levels = [0.01 * 1.1**i for i in range(40)]
    found = summarize(
        (
            Point(site="input", rule="backprop", seed=s, level=level, accuracy=0.5 + 0.01 * s)
            for s in range(2)
            for level in (0.0, *levels)
        ),
        chance=0.1,
        tested=1000,
    )["sites"][0]
    root = draw(found, tmp_path / "a.svg")
    assert len(points(parts(root, "mean")["backprop"])) >= 2
    labels = [text for text in texts(tmp_path / "a.svg") if text in {f"{s:g}" for s in levels}]
    assert 4 < len(labels) < 13


# --- the same every time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_bytes_whatever_the_user_has_set(tmp_path: Path, suffix: str) -> None:
    words = {"title": "t", "note": "n", "unit": "rms"}
    paths = [tmp_path / "deep" / f"{name}{suffix}" for name in "ab"]
    robustness_figure(site("backprop", "mirror"), **words, path=paths[0])
    with matplotlib.rc_context({"font.size": 30, "axes.linewidth": 9, "svg.hashsalt": None}):
        robustness_figure(site("backprop", "mirror"), **words, path=paths[1])
        assert matplotlib.rcParams["font.size"] == 30
    one, other = (path.read_bytes() for path in paths)
    assert one == other
    assert one.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_no_date_no_version(tmp_path: Path) -> None:
    draw(site("backprop"), tmp_path / "a.svg")
    assert not re.search(r"dc:date|\b20\d\d-|Matplotlib v", (tmp_path / "a.svg").read_text(encoding="utf-8"))


def test_nothing_of_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is now an error
    draw(site("backprop", "mirror"), tmp_path / "a.svg")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.SVG"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"figures are \.svg or \.png"):
        robustness_figure(site("backprop"), title="t", note="n", unit="u", path=tmp_path / name)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_where_it_cannot_be_written_is_said(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        robustness_figure(site("backprop"), title="t", note="n", unit="u", path=tmp_path / "file" / f"a{suffix}")


def test_no_level_is_nothing_to_draw(tmp_path: Path) -> None:
    clean = [Point(site="update", rule="backprop", seed=1, level=0, accuracy=0.9)]
    found = summarize(clean, chance=0.1, tested=100)["sites"][0]
    with pytest.raises(UserError, match="measured at no level"):
        robustness_figure(found, title="t", note="n", unit="u", path=tmp_path / "a.svg")


# --- looks -----------------------------------------------------------------------------------------------


def test_every_named_rule_and_every_subset_looks_like_no_other() -> None:
    assert set(LOOKS) == set(RULES)
    subsets = ["+".join(parts) for size in range(2, 6) for parts in combinations(PRIMITIVE_NAMES, size)]
    looks = [look(rule) for rule in [*RULES, *subsets]]
    assert len(set(looks)) == len(looks) == 14 + 26
    assert look("null+amp") == look("amp+null")
    assert look("a rule of tomorrow") == look("a rule of tomorrow")


def test_the_colour_in_the_figure_is_that_of_the_rule(tmp_path: Path) -> None:
    """Alone or among others."""
    for rules in (("backprop", "symmetric"), ("backprop", "activation", "mirror", "symmetric")):
        line = parts(draw(site(*rules), tmp_path / "a.svg"), "mean")["symmetric"]
        assert LOOKS["symmetric"].color.lower() in next(iter(line.iter(f"{SVG}path"))).get("style", "")
