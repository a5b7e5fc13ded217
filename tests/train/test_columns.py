"""What scores may hold: what a model can say, and nothing that would spoil a fit."""

from __future__ import annotations

import numpy as np
import pytest

from colm_edge.train.columns import CHECK_ROWS, check_columns

NAN, INF = np.nan, np.inf


def whole(n: int = 3) -> dict[str, np.ndarray]:
    return {
        "logprob": np.full(n, -1.0),
        "best": np.zeros(n),
        "choice": np.full(n, -9999.5),
        "right": np.ones(n, np.bool_),
        "likeliest": np.arange(n, dtype=np.int32),
        "hidden": np.ones((n, 4), np.float32),
        "features": np.ones((n, 8), np.float32),
    }


def test_what_models_say_is_accepted():
    check_columns(whole(), 3)
    untold = np.full(3, NAN)  # by a server
    check_columns(whole() | {"best": untold, "choice": untold}, 3)
    check_columns({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, x)
            for name in ("logprob", "best", "choice")
            for x in (NAN, INF, -INF, 0.1, -1e300)
        ),
        *((name, x) for name in ("hidden", "features") for x in (NAN, INF, -INF, 1e30)),
        ("likeliest", -1),
        ("likeliest", 3),
    ],
)
def test_what_none_says_is_refused(name, value):
    columns = whole()
    columns[name].reshape(-1)[1] = value
    with pytest.raises(ValueError, match=rf"{name} holds .*, expected numbers from"):
        check_columns(columns, 3)


def test_every_row_is_looked_at():
    columns = {"logprob": np.full(CHECK_ROWS + 2, -1.0)}
    columns["logprob"][-1] = NAN
    with pytest.raises(ValueError, match="logprob holds nan"):
        check_columns(columns)
