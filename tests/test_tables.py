"""Tables of results: a row of each kind in Markdown, CSV and JSON."""

from __future__ import annotations

import json

from colm_edge.bench.tune import CATCH_UP
from colm_edge.tables import STYLES, render

EVAL = {
    "method": "colm", "threshold": 0.437212, "defer_rate": 0.18249,
    "nll": 1.23456, "nll_low": 1.1, "nll_high": 1.36789,
    "nll_hard": 1.3, "nll_hard_low": 1.25, "nll_hard_high": 1.35049,
    "accuracy": 0.625, "accuracy_low": 0.5004, "accuracy_high": 0.71239,
    "generated_defer_rate": 1.0, "tokens_per_answer": 1234.56, "tokens_per_second": 45.678,
    "cut": 0.0,
}  # fmt: skip
BENCH = {
    "replay": "f=0.2", "method": "colm-fast",
    "tokens_per_second": 1234.56, "tokens_per_second_low": 999.5, "tokens_per_second_high": 1300.4,
    "first_token_seconds": 0.123456, "ratio_expert": 3.14159, "ratio_sequential": 1.0,
    "ratio_limit": None, "outside_us": 12.34, "defer_rate": 0.2, "expert_calls": 1234,
    "calls_per_100": 19.53125, "expert_tokens": None, "peak_memory_mb": 2345.678,
}  # fmt: skip
TUNE = {
    "model": "base", "threads": 2, "flash_attention": "on", "cache_type": "q8_0", "ubatch": 1024,
    "ms_1_token": 12.345, "ms_5_tokens": 23.456, "ms_prompt": 1234.567, "kept": "yes",
}  # fmt: skip


def markdown(row):
    """Return a row's cells by column."""
    names, rule, cells = render([row], "md").splitlines()
    n = names.count("|") - 1
    assert rule == "| --- |" + " ---: |" * (n - 1)
    return dict(zip(names.split("|")[1:-1], cells.split("|")[1:-1], strict=True))


def test_a_row_of_an_evaluation():
    assert markdown(EVAL) == {
        " method ": " colm ",
        " threshold ": " 0.437 ",
        " defer_rate ": " 18.2 % ",
        " nll ": " 1.235 (1.100–1.368) ",
        " nll_hard ": " 1.300 (1.250–1.350) ",
        " accuracy ": " 62.5 % (50.0–71.2) ",
        " generated_defer_rate ": " 100.0 % ",
        " tokens_per_answer ": " 1,234.6 ",
        " tokens_per_second ": " 45.7 ",
        " cut ": " 0.0 % ",
    }


def test_a_row_of_a_bench():
    assert markdown(BENCH) == {
        " replay ": " f=0.2 ",
        " method ": " colm-fast ",
        " tokens_per_second ": " 1,234.6 (1,000–1,300) ",
        " first_token_seconds ": " 0.123 ",
        " ratio_expert ": " 3.142 ",
        " ratio_sequential ": " 1.000 ",
        " ratio_limit ": " – ",
        " outside_us ": " 12.3 ",
        " defer_rate ": " 20.0 % ",
        " expert_calls ": " 1,234 ",
        " calls_per_100 ": " 19.5 ",
        " expert_tokens ": " – ",
        " peak_memory_mb ": " 2,345.7 ",
    }


def test_a_row_of_settings():
    assert markdown(TUNE) == {
        " model ": " base ",
        " threads ": " 2 ",
        " flash_attention ": " on ",
        " cache_type ": " q8_0 ",
        " ubatch ": " 1,024 ",
        " ms_1_token ": " 12.3 ",
        " ms_5_tokens ": " 23.5 ",
        " ms_prompt ": " 1,234.6 ",
        " kept ": " yes ",
    }
    assert f"ms_{CATCH_UP}_tokens" in STYLES


def test_a_threshold_near_zero_or_one_is_not_rounded_to_it():
    shown = {0.0: "0", 1.0: "1", 5e-324: "4.94e-324", 0.9999996: "0.9999996", None: "–"}
    for value, text in shown.items():
        assert markdown({"method": "colm", "threshold": value})[" threshold "] == f" {text} "


def test_the_ends_of_a_low_speed_are_not_rounded_to_it():
    row = {"method": "colm"}
    for name, value in zip(("", "_low", "_high"), (9.96, 9.6, 12.34), strict=True):
        row[f"tokens_per_second{name}"] = value
    assert markdown(row)[" tokens_per_second "] == " 10.0 (9.6–12) "


def test_csv_and_json_hold_every_field():
    for row in (EVAL, BENCH, TUNE):
        assert json.loads(render([row, row], "json")) == [row, row]
        names, *lines = render([row, row], "csv").splitlines()
        assert names == ",".join(row)
        assert lines == [",".join("" if v is None else str(v) for v in row.values())] * 2
