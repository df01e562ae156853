"""The figure of parity: every row is in it, what is huge or not a number too, and nothing leaves its axes."""

import math

from orchestrator.views.attention_figures import parity_chart


def row(name, forward, gradients, dtype="float32", failed=0):
    return {"implementation": name, "dtype": dtype, "forward": forward, "gradients": gradients, "failed": failed}


def test_each_row_is_a_marker_with_its_figure_and_what_is_huge_stands_at_the_edge():
    rows = [row("good", 0.25, 0.5), row("wild", 4.5e9, math.nan, failed=3), row("half", 0.3, None, "bfloat16")]
    left, right = parity_chart(rows, title="title").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["good", "wild", "half"]
    assert left.get_xscale() == "log"
    texts = {text.get_text() for text in left.texts}
    assert {"0.25", "0.30"} < texts
    assert any(text.startswith("4e+09") or text.startswith("5e+09") for text in texts)
    assert {"0.50", "NaN", "forward only"} == {text.get_text() for text in right.texts}
    for axes in (left, right):
        low, high = axes.get_xlim()
        for line in axes.lines[:-1]:
            assert all(low <= x <= high for x in line.get_xdata() if isinstance(x, float))
