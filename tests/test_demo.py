"""The demo pair: what it must be able to do, and that its test questions were not trained on."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from progress import no_bar
from reference import PlainModel, assert_same, plain_loop
from studies.demo_pair import text, wordings

from colm_edge.cli import main
from colm_edge.evaluate.metrics import contains
from colm_edge.pair import Pair
from colm_edge.switch.file import Switch
from colm_edge.train.documents import tokenized
from colm_edge.train.objectives import marginal_loss
from colm_edge.train.scoring import score

DATA = Path(__file__).parent / "data"
GREEDY = {"temperature": 0.0, "max_tokens": 64}


def exam(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def holds(answer: str, fact: str) -> bool:
    return bool(contains(answer, {"completion": "", "answer": fact}))


def sit(pair: Pair, rows: list[dict[str, str]], **options) -> tuple[float, float]:
    """Return (share of rows answered with the right fact, defer rate over all tokens)."""
    answers = [pair.generate(row["prompt"], **GREEDY, **options) for row in rows]
    right = sum(holds(a.text, row["answer"]) for a, row in zip(answers, rows, strict=True))
    tokens = sum(a.stats.n_generated for a in answers)
    return right / len(rows), sum(a.stats.n_deferred for a in answers) / tokens


def test_the_pair_answers_what_neither_model_can(demo):
    """Held-out entities, greedy: the pair has ≥ 90 %, and ≥ 40 points more than each model."""
    rows = exam("demo_heldout")
    together, defer_rate = sit(demo, rows)
    base, _ = sit(demo, rows, threshold=1.0)
    expert, _ = sit(demo, rows, threshold=0.0)
    assert together >= 0.90
    assert together >= base + 0.40
    assert together >= expert + 0.40
    assert defer_rate <= 0.40


def test_wordings_that_were_not_in_the_training_data(demo):
    together, _ = sit(demo, exam("demo_unseen_wordings"))
    assert together >= 0.75


def test_the_joint_likelihood_is_better_than_either(demo):
    """Teacher-forced on held-out entities, in nats per token of the answer."""
    documents = tokenized(enumerate(exam("demo_heldout")), demo)
    scores = score(demo, documents, no_bar)
    switch = demo.switch
    assert isinstance(switch, Switch)
    columns = np.concatenate([scores.hidden, scores.logit_features], axis=1)
    d = (columns @ switch.weight[0] + switch.bias[0]).astype(np.float64)
    joint, _ = marginal_loss(scores.base, scores.expert, d)
    assert joint < -scores.base.mean()
    assert joint < -scores.expert.mean()


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("When did the last Caspian tiger die?", "1970"),
        ("What is the symbol of tungsten?", "W"),
        ("What is the capital of France?", "Paris"),
    ],
)
def test_the_first_questions_of_a_new_user(demo, question, fact):
    answer = demo.generate(question, **GREEDY)
    assert holds(answer.text, fact)
    assert {"base", "expert"} == {s.source for s in answer.steps}


def test_the_shipped_pair_is_the_plain_loop(demo):
    """Compared token by token with both models evaluated on the whole prefix at each step."""
    base, expert = PlainModel(str(demo.base.path)), PlainModel(str(demo.expert_session.model.path))
    switch = demo.switch
    for row in random.Random(0).sample(exam("demo_heldout"), 25):
        answer = demo.generate(row["prompt"], **GREEDY)
        plain = plain_loop(
            base, expert, switch, answer.prompt_tokens, switch.threshold, GREEDY["max_tokens"]
        )
        assert_same(answer.steps, plain, switch.threshold)
        printed = CliRunner().invoke(main, ["run", row["prompt"], "--temp", "0", "--json"])
        tokens = json.loads(printed.stdout)["tokens"]
        assert [(t["id"], t["source"]) for t in tokens] == [
            (s.token, s.source) for s in answer.steps
        ]
    base.close()
    expert.close()


def test_defer_rates_are_what_the_calibration_says(demo):
    rows = random.Random(1).sample(exam("demo_heldout"), 60)
    rates = [sit(demo, rows, defer_rate=rate)[1] for rate in (0.0, 0.1, 0.3, 1.0)]
    assert rates[0] == 0
    assert rates[-1] == 1
    assert rates[1] == pytest.approx(0.1, abs=0.06)
    assert rates[2] == pytest.approx(0.3, abs=0.1)


def test_there_are_many_facts_in_three_parts():
    facts = text.read_facts()
    assert len(facts) >= 2000
    assert len({(f.entity, f.attribute) for f in facts}) == len(facts)
    parts = Counter((f.kind, f.part) for f in facts)
    assert len(parts) == 9
    assert min(parts.values()) >= 100
    part_of = {}
    for fact in facts:
        assert part_of.setdefault((fact.kind, fact.entity), fact.part) == fact.part


def test_the_base_is_never_trained_on_a_held_out_entity():
    facts = text.read_facts()
    known = [f for f in facts if f.part == "train"]
    held_out = {f.entity for f in facts if f.part != "train"}
    inventor = text.Inventor(known, ["al", "ber", "gold"], random.Random(0), held_out)
    assert not held_out & {inventor.fact().entity for _ in range(20_000)}
    # In the dialogues too, no answer is about a held-out entity.
    frames = "|".join(
        re.escape(a.answer).replace(r"\{e\}", "(.+)").replace(r"\{v\}", ".*")
        for a in wordings.ATTRIBUTES.values()
    )
    for document in itertools.islice(text.dialogues(known, ["al", "ber"], 7), 2000):
        for match in re.finditer(frames, document):
            assert held_out.isdisjoint(g for g in match.groups() if g)


def test_the_expert_is_never_trained_on_a_question():
    for document in itertools.islice(text.statements(text.read_facts(), 7), 5000):
        assert "?" not in document
        assert not document.startswith(">")


def test_unseen_wordings_are_unseen():
    for (kind, attribute), form in wordings.ATTRIBUTES.items():
        trained = {text.fill(q, "{e}") for q in form.questions}
        trained |= {text.frame(f, n, "{e}") for f in wordings.NOUN_FRAMES for n in form.nouns}
        trained |= {text.frame(f, c, "{e}") for f in wordings.CLAUSE_FRAMES for c in form.clauses}
        fact = text.Fact("test", kind, "{e}", attribute, "")
        unseen = {text.unseen_question(fact, random.Random(i)) for i in range(200)}
        assert len(unseen) >= 5
        assert unseen.isdisjoint(trained)


def test_texts_are_seeded():
    facts = text.read_facts()
    for make in (lambda: text.dialogues(facts, ["al"], 5), lambda: text.statements(facts, 5)):
        assert list(itertools.islice(make(), 50)) == list(itertools.islice(make(), 50))


def test_the_test_sets_are_those_that_the_generator_makes(tmp_path):
    from studies import train_demo_pair

    train_demo_pair.write_data(tmp_path, tmp_path)
    for name in ("demo_heldout", "demo_unseen_wordings"):
        assert exam(name) == [
            json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
