"""Write the demonstration pair's texts: statements for the expert, dialogue for the base.

All sentences come from the templates in wordings.py, drawn by a seeded generator. Dialogue is
written as by the chat template in the models' GGUF files:

    > When did the last dodo die?
    The last dodo was seen in the year 1662.<|end|>

The expert's documents contain statements only, never a line that starts with "> ".
"""

from __future__ import annotations

import csv
import random
import string
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from studies.demo_pair.wordings import (
    ATTRIBUTES,
    CLAUSE_FRAMES,
    NOUN_FRAMES,
    OPENINGS,
    SMALL_TALK,
    UNSEEN_CLAUSE_FRAMES,
    UNSEEN_NOUN_FRAMES,
)

END = "<|end|>"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{ '> ' + m['content'] + '\\n' }}"
    "{%- elif m['role'] == 'assistant' -%}{{ m['content'] + '<|end|>\\n' }}"
    "{%- else -%}{{ m['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Fact:
    part: str  # train, switch or test
    kind: str
    entity: str
    attribute: str
    value: str


def read_facts() -> list[Fact]:
    """Return the committed facts (facts.py gathers them from their packages)."""
    with (Path(__file__).parent / "facts.csv").open(newline="") as file:
        return [Fact(**row) for row in csv.DictReader(file)]


def fill(template: str, entity: str, value: str = "") -> str:
    """Put an entity and a value into a template; a sentence starts with a capital."""
    text = template.replace("{e}", entity).replace("{v}", value)
    return text.replace("the the ", "the ").replace("The the ", "The ")


def question(fact: Fact, rng: random.Random, *, framed: bool = True) -> str:
    """Return a wording that models are trained on: one of the attribute's own, or a frame's."""
    form = ATTRIBUTES[fact.kind, fact.attribute]
    if framed and rng.random() < 0.45:
        phrases, frames = (
            (form.nouns, NOUN_FRAMES) if rng.random() < 0.6 else (form.clauses, CLAUSE_FRAMES)
        )
        text = frame(rng.choice(frames), rng.choice(phrases), fact.entity)
    else:
        text = fill(rng.choice(form.questions), fact.entity)
    if rng.random() < 0.1:
        text = text[:-1] if text[-1] in ".?" else text
    text = rng.choice(OPENINGS) + text
    if framed and rng.random() < 0.1 and not text.startswith(fact.entity):
        text = text[0].lower() + text[1:]  # as people type
    return text


def respelt(text: str, rng: random.Random) -> str:
    """Return small talk as people type it: in lower case, without punctuation or with other."""
    text = text.lower() if rng.random() < 0.6 else text
    draw = rng.random()
    if draw < 0.4:
        return text.rstrip("!.?")
    return text.rstrip("!.?") + rng.choice("!.?") if draw < 0.6 else text


def bare(fact: Fact, rng: random.Random) -> str:
    """Ask with the attribute's noun alone: Symbol of helium?"""
    text = fill(rng.choice(ATTRIBUTES[fact.kind, fact.attribute].nouns), fact.entity)
    text = text.removeprefix("the ")
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + rng.choice(("", "?", "."))


def frame(template: str, phrase: str, entity: str) -> str:
    """Put an entity's attribute into a frame; a sentence starts with a capital."""
    text = template.replace("{x}", fill(phrase, entity))
    return text[0].upper() + text[1:]


def answer(fact: Fact) -> str:
    return fill(ATTRIBUTES[fact.kind, fact.attribute].answer, fact.entity, fact.value)


def turn(user: str, assistant: str) -> str:
    return f"> {user}\n{assistant}{END}\n"


class Inventor:
    """Make up names and facts that look like the real ones.

    From them the base learns to copy a name that it has never seen, and to be unsure of what it
    cannot know.
    """

    def __init__(
        self, facts: list[Fact], words: list[str], rng: random.Random, avoid: Set[str] = frozenset()
    ) -> None:
        self.rng, self.words, self.avoid = rng, words, avoid
        self.values: dict[tuple[str, str], list[str]] = {}
        self.names: dict[str, list[str]] = {}
        for fact in facts:
            self.values.setdefault((fact.kind, fact.attribute), []).append(fact.value)
            self.names.setdefault(fact.kind, []).append(fact.entity)
        self.chains = {kind: self._chain(names) for kind, names in self.names.items()}
        self.value_chains = {key: self._chain(values) for key, values in self.values.items()}

    @staticmethod
    def _chain(names: list[str]) -> dict[str, str]:
        follow: dict[str, str] = {}
        for name in names:
            padded = f"^^{name}$"
            for i in range(len(padded) - 2):
                follow[padded[i : i + 2]] = follow.get(padded[i : i + 2], "") + padded[i + 2]
        return follow

    def _walk(self, chain: dict[str, str]) -> str:
        text = "^^"
        while not text.endswith("$") and len(text) < 26:
            text += self.rng.choice(chain[text[-2:]])
        return text.strip("^$").strip()

    def word(self) -> str:
        """Make up a word: from pieces of the vocabulary, or random syllables or letters."""
        draw = self.rng.random()
        if draw < 0.6:
            return "".join(self.rng.choice(self.words) for _ in range(self.rng.randint(1, 3)))
        if draw < 0.9:
            return "".join(
                self.rng.choice("bcdfghjklmnprstvwz")
                + self.rng.choice("aeiouy")
                + self.rng.choice(("", "", "n", "r", "s", "l", "m"))
                for _ in range(self.rng.randint(1, 4))
            )
        return "".join(
            self.rng.choice(string.ascii_lowercase) for _ in range(self.rng.randint(2, 8))
        )

    def name(self, kind: str) -> str:
        """Make up a name that is not one of those to avoid."""
        while (name := self._name(kind)) in self.avoid:
            pass
        return name

    def _name(self, kind: str) -> str:
        if self.rng.random() < 0.35:
            name = self._walk(self.chains[kind])
            if len(name) > 2:
                return name
        words = [
            self.word() for _ in range(1 if kind == "element" else self.rng.choice((1, 2, 2, 3)))
        ]
        if kind == "country":
            words = [word[:1].upper() + word[1:] for word in words]
            if self.rng.random() < 0.12:
                words.insert(0, "the")
        if kind == "animal":
            if self.rng.random() < 0.45:
                words[0] = words[0][:1].upper() + words[0][1:]
                if self.rng.random() < 0.3:
                    words[0] += "'s"
            if self.rng.random() < 0.5:
                words[-1] = self.rng.choice(self.names["animal"]).split()[-1]
            if self.rng.random() < 0.1 and len(words) > 1:
                words[:2] = [f"{words[0]}-{words[1]}"]
        return " ".join(words)

    def value(self, kind: str, attribute: str) -> str:
        values = self.values[kind, attribute]
        if attribute in ("year", "discovery"):
            return str(self.rng.randint(1500, 2024))
        if attribute in ("number", "melting"):
            return str(self.rng.randint(1, 118 if attribute == "number" else 4000))
        if attribute == "weight":
            return f"{self.rng.uniform(1, 294):.2f}".rstrip("0").rstrip(".")
        if attribute == "calling":
            return f"+{self.rng.randint(1, 999)}"
        if attribute in ("series", "currency"):
            return self.rng.choice(values)
        if self.rng.random() < 0.5:
            return self._walk(self.value_chains[kind, attribute]) or self.rng.choice(values)
        return self.rng.choice(values)

    def fact(self) -> Fact:
        kind, attribute = self.rng.choice(list(ATTRIBUTES))
        return Fact("", kind, self.name(kind), attribute, self.value(kind, attribute))


def dialogues(
    facts: list[Fact],
    words: list[str],
    seed: int,
    *,
    plain: bool = False,
    casual: bool = False,
) -> Iterator[str]:
    """Yield the base's documents without end: conversations of one to four turns.

    They are about `facts` (the training part), about invented things that do not share a name with
    a real entity, and small talk.

    plain: no questions in frames, and invented names that may be real: for the vocabulary.
    casual: more small talk, in any spelling, and bare nouns as questions: for the last steps.
    """
    rng = random.Random(seed)
    real = frozenset() if plain else frozenset(fact.entity for fact in read_facts())
    inventor = Inventor(facts, words, rng, real)
    while True:
        turns = []
        for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
            draw = rng.random()
            if draw < (0.15 if casual else 0.04):
                users, assistants = rng.choice(SMALL_TALK)
                user = rng.choice(users)
                user = respelt(user, rng) if casual else user
                turns.append(turn(user, rng.choice(assistants)))
            else:
                fact = inventor.fact() if draw < 0.62 else rng.choice(facts)
                asked = question(fact, rng, framed=not plain)
                if casual and rng.random() < 0.15:
                    asked = bare(fact, rng)
                turns.append(turn(asked, answer(fact)))
        yield "".join(turns)


def statements(facts: list[Fact], seed: int) -> Iterator[str]:
    """Yield the expert's documents without end: one statement each, on a random entity."""
    rng = random.Random(seed)
    while True:
        fact = rng.choice(facts)
        form = ATTRIBUTES[fact.kind, fact.attribute]
        # The plainest wording is the most common, as in an encyclopedia.
        template = form.answer if rng.random() < 0.4 else rng.choice(form.statements)
        yield fill(template, fact.entity, fact.value) + END + "\n"


def exam(
    facts: list[Fact], *, unseen: bool, seed: int, per_fact: int = 1
) -> Iterator[dict[str, str]]:
    """Yield evaluation lines: a question on each fact, its full answer and the fact itself.

    unseen: ask in wordings and frames that no model is trained on.
    """
    rng = random.Random(seed)
    for fact in facts:
        for _ in range(per_fact):
            yield {
                "prompt": unseen_question(fact, rng) if unseen else question(fact, rng),
                "completion": answer(fact),
                "answer": fact.value,
            }


def small_talk(seed: int) -> Iterator[dict[str, str]]:
    """Yield all small talk with its answer, as written and as people type it."""
    rng = random.Random(seed)
    for users, assistants in SMALL_TALK:
        for user in users:
            for text in (user, user, *(respelt(user, rng) for _ in range(6))):
                yield {"prompt": text, "completion": assistants[0]}


def unseen_question(fact: Fact, rng: random.Random) -> str:
    form = ATTRIBUTES[fact.kind, fact.attribute]
    draw = rng.random()
    if draw < 0.6:
        return fill(rng.choice(form.unseen), fact.entity)
    if draw < 0.8:
        return frame(rng.choice(UNSEEN_NOUN_FRAMES), rng.choice(form.nouns), fact.entity)
    return frame(rng.choice(UNSEEN_CLAUSE_FRAMES), rng.choice(form.clauses), fact.entity)
