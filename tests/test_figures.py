"""The figures of the comparison's page: what is drawn, and in which order."""

import re

import pytest

from evaluator.figures import curves


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
