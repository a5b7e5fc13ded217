"""The report of a fit: figures that fit each other, pictures, and a page of its own."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from progress import no_bar

from colm_edge.errors import ColmError, DataError
from colm_edge.pair import load
from colm_edge.train import report
from colm_edge.train.documents import tokenized
from colm_edge.train.fit import FitOptions, fit_switch
from colm_edge.train.objectives import hard_curve


@pytest.fixture(scope="module")
def fitted(tiny):
    with load(tiny["base"], tiny["expert"], "margin", n_threads=1, n_ctx=256) as pair:
        rows = [{"prompt": f"p{i}", "completion": f"a < b & c{i} é"} for i in range(20)]
        fit = fit_switch(
            pair, tokenized(enumerate(rows), pair), FitOptions("both"), progress=no_bar
        )
        yield fit, pair.base


def test_the_report_is_written(fitted, tmp_path):
    fit, base = fitted
    report.write_report(fit, base, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "report.json").read_text()) == fit.report
    for picture in ("curve.png", "reliability.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network_and_shows_the_texts(fitted):
    fit, base = fitted
    page = report.page(fit, base)
    assert "http" not in page
    assert "src=" not in page
    spans = re.findall(r"<span[^>]*title=\"p_defer [^>]*>([^<]*)</span>", page)
    assert len(spans) == len(fit.p)
    assert "a &lt; b &amp; c" in "".join(spans)
    assert "\N{REPLACEMENT CHARACTER}" not in page
    assert "é" in "".join(spans)  # in this vocabulary two tokens
    marked = len(re.findall(r"<span class=\"expert\" title", page))
    assert marked == (fit.p > fit.switch.threshold).sum()


def test_the_curve_runs_from_base_to_expert(fitted):
    fit, _ = fitted
    scores = fit.scores.base[fit.valid], fit.scores.expert[fit.valid]
    curve = hard_curve(fit.p, *scores)
    assert curve[0] == pytest.approx(fit.report["nll_base"])
    assert curve[-1] == pytest.approx(fit.report["nll_expert"])
    assert curve.min() >= fit.report["nll_oracle"] - 1e-9
    at = round(fit.report["defer_rate"] * len(fit.p))
    assert curve[at] == pytest.approx(fit.report["nll_hard"])
    assert np.array_equal(hard_curve(fit.p, *scores), curve)


def test_what_is_missing_is_an_error_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the folder"):
        report.check_report(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ColmError, match=r"pip install 'colm-edge\[plots\]'"):
        report.check_report(tmp_path)
