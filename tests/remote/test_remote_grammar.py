"""Answers of a given form with an expert that names only its likeliest tokens."""

from __future__ import annotations

import numpy as np
import pytest
from expert_servers import faking
from remote_pairs import DIALECTS, PROMPT, remote_pair

pytestmark = pytest.mark.usefixtures("no_back_off")
FORM = {"temperature": 0.0, "max_tokens": 8}


@pytest.mark.parametrize("owner", DIALECTS)
def test_the_base_writes_where_the_expert_names_no_allowed_token(tiny, local, owner):
    """Not the first allowed id, of all that are equally likely."""
    words = [chr(c) for c in range(ord("!"), ord("~")) if chr(c) not in '"\\']
    tokens = {w: local.base.tokenize(w, special=False, bos=False) for w in words}
    ids = {w: one[0] for w, one in tokens.items() if len(one) == 1}
    at = local.prompt_tokens([{"role": "user", "content": PROMPT}])
    local.expert_session.sync(at)
    rank = np.argsort(np.argsort(-local.expert_session.logits))
    unlikely = [w for w in ids if rank[ids[w]] > 64]
    form = "root ::= " + " | ".join(f'"{w}"' for w in unlikely)
    alone = local.generate(PROMPT, threshold=1.0, **FORM, grammar=form)
    assert ids[alone.text] != min(ids[w] for w in unlikely)
    with faking(owner, tiny["expert"]) as (url, _), remote_pair(tiny, url) as pair:
        answer = pair.generate(PROMPT, **FORM, grammar=form, threshold=0.0)
        assert answer.text == alone.text
        assert answer.steps[0].source == "base"
        likely = max(ids, key=lambda w: -rank[ids[w]])
        named = pair.generate(PROMPT, **FORM, grammar=f'root ::= "{likely}"', threshold=0.0)
        assert (named.text, named.steps[0].source) == (likely, "expert")


def test_a_sure_expert_does_not_end_an_answer_of_a_given_form(tiny, local):
    """Where its likeliest tokens have all of the probability, the others have none."""
    with faking("llamacpp", tiny["expert"]) as (url, fake), remote_pair(tiny, url) as pair:
        told = fake.answer

        def sure(path, body):
            answer = told(path, body)
            for entry in answer.get("completion_probabilities", []):
                for i, one in enumerate(entry["top_logprobs"]):
                    one["logprob"] = -1e-7 if i == 0 else -30.0
            return answer

        fake.answer = sure
        for how in {"temperature": 0.0}, {"temperature": 0.8, "seed": 1}:
            form = {"grammar": 'root ::= "Yes." | "No."', "threshold": 0.0, "max_tokens": 8}
            assert pair.generate(PROMPT, **form, **how).text in ("Yes.", "No.")
