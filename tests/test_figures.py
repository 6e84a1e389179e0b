"""The figures of the comparison's page: what is drawn, and in which order."""

import re

import pytest

from evaluator.figures import curves, trade_off


def test_a_setting_stands_in_its_order_under_every_methods_line():
    """Numbers in their order, evenly spaced; a line for each method, and one for what the setting does not change."""
    lines = {"fused": [(40, 2.1), (0, 2.3), (10, 2.2)], "mixed": [(10, 2.4), (40, 2.2)]}
    svg = curves(lines, {"TIES": 2.25}, "mixed questions", "nats")
    words = [words.strip() for words in re.findall(r"<text[^>]*>([^<]*)<", svg)]
    assert [words.index(one) for one in ("0", "10", "40", "mixed questions")] == sorted(
        words.index(one) for one in ("0", "10", "40", "mixed questions")
    )
    places = [float(x) for x in re.findall(r'id="xtick_\d+">.*?<use [^>]*?x="([\d.]+)"', svg, flags=re.S)]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0])
    assert {"fused", "mixed", "TIES"} <= {*words} and 'aria-label="nats over mixed questions, for 3 methods"' in svg


def test_a_trade_off_joins_a_paths_points_in_its_order():
    """In a panel for each measure; what is in no path stands alone."""
    svg = trade_off(
        {
            "on": {"refused": 0.0, "unsafe": 0.4, "flagged": 0.1},
            "half": {"refused": 0.1, "unsafe": 0.3, "flagged": 0.2},
            "off": {"refused": 0.3, "unsafe": 0.1, "flagged": 0.3},
            "raw": {"refused": 0.2, "unsafe": 0.2, "flagged": 0.4},
        },
        "refused",
        {"the dial": {"off": "-∞", "on": "+∞", "half": "none"}},
    )
    words = [words.strip() for words in re.findall(r"<text[^>]*>([^<]*)<", svg)]
    assert {"refused", "unsafe", "flagged", "the dial", "raw", "-∞", "none", "+∞"} <= {*words}
    assert words.count("the dial") == 1 and words.count("none") == 2
    assert 'aria-label="unsafe and flagged over refused, of 4 runs, 1 paths"' in svg
    lines = re.findall(r'<path d="(M[^"]*?)"[^>]*style="fill: none; stroke: #d55e00', svg)
    places = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", line)] for line in lines]
    *in_order, _ = [xs for xs in places if len(xs) == 3]  # and the legend's
    assert len(in_order) == 2 and all(off > half > on for off, on, half in in_order)
