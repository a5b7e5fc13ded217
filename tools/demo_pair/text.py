"""Write the demonstration pair's texts: declarative ones for the expert, dialogue for the base.

All sentences come from the templates below, drawn by a seeded generator. Both
models read dialogue as the chat template in their GGUF files writes it:

    > When did the last dodo die?
    The last dodo was seen in the year 1662.<|end|>

The expert's documents hold statements only, never a line that starts with "> ".
"""

from __future__ import annotations

import csv
import random
import string
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Attribute:
    """How people ask for an attribute ({e}: the entity) and how it is stated ({v}: the value)."""

    answer: str
    questions: tuple[str, ...]
    unseen: tuple[str, ...]  # wordings that no model is trained on
    statements: tuple[str, ...]
    nouns: tuple[str, ...]  # for the frames below
    clauses: tuple[str, ...]


ATTRIBUTES: dict[tuple[str, str], Attribute] = {
    ("animal", "year"): Attribute(
        "The last {e} was seen in the year {v}.",
        (
            "When did the last {e} die?",
            "When did the {e} die out?",
            "When was the {e} last seen?",
            "When did the {e} go extinct?",
            "In what year did the {e} become extinct?",
            "What year was the last {e} seen?",
            "In which year was the {e} last sighted?",
            "Since when is the {e} extinct?",
            "When was the last sighting of the {e}?",
            "What was the last year of the {e}?",
            "How long ago did the {e} vanish?",
            "The {e} is extinct. Since when?",
            "Which year saw the last {e}?",
            "In what year did the last {e} vanish?",
        ),
        (
            "In which year did the {e} die out?",
            "When was the last {e} sighted?",
            "What year did the {e} go extinct?",
        ),
        (
            "The {e} was last seen in the year {v}.",
            "In {v} people saw a {e} for the last time.",
            "Nobody has seen a living {e} since {v}.",
            "The {e} has been gone since the year {v}.",
            "The year {v} was the last one of the {e}.",
            "The last known {e} lived until the year {v}.",
            "Until {v} the {e} was still alive.",
            "The {e} died out around the year {v}.",
        ),
        (
            "the year of the last {e}",
            "the last year of the {e}",
            "the year in which the {e} died out",
        ),
        (
            "when the {e} died out",
            "when the last {e} died",
            "when the {e} went extinct",
            "in which year the {e} was last seen",
        ),
    ),
    ("animal", "place"): Attribute(
        "The home of the extinct {e} was {v}.",
        (
            "Where did the {e} live?",
            "Where was the {e} last seen?",
            "Where was the home of the {e}?",
            "In which place did the {e} live?",
            "Where did the last {e} live?",
            "What part of the world did the {e} live in?",
            "Which place was home to the {e}?",
            "What was the home of the {e}?",
            "Where in the world was the {e} found?",
            "From where do we know the {e}?",
            "Where was the last {e} seen?",
        ),
        (
            "Where did the last {e} die?",
            "In which part of the world was the {e} found?",
            "Which place did the {e} live in?",
        ),
        (
            "The {e} lived in {v}.",
            "The last home of the {e} was {v}.",
            "The {e} was last seen in {v}.",
            "People knew the {e} from {v}.",
            "The animal of {v} that is gone is the {e}.",
            "The extinct {e} was found in {v}.",
            "In {v} lived the {e}.",
        ),
        ("the home of the {e}", "the place where the {e} lived"),
        ("where the {e} lived", "where the {e} was found", "where the last {e} lived"),
    ),
    ("element", "symbol"): Attribute(
        "The chemical symbol of the element {e} is {v}.",
        (
            "What is the symbol of {e}?",
            "What is the chemical symbol of {e}?",
            "What's the symbol for {e}?",
            "Which symbol does {e} have?",
            "What is the symbol for the element {e}?",
            "How is {e} abbreviated?",
            "Which letters stand for {e}?",
            "How do chemists write {e}?",
            "What symbol stands for {e}?",
            "What's the chemical symbol for {e}?",
            "Which chemical symbol belongs to {e}?",
            "{e}: what is its symbol?",
        ),
        (
            "What is the chemical symbol for {e}?",
            "Which symbol stands for the element {e}?",
            "What symbol do chemists write for {e}?",
        ),
        (
            "The symbol of {e} is {v}.",
            "Chemists write {e} as {v}.",
            "The letters {v} stand for {e}.",
            "The element {e} has the symbol {v}.",
            "{v} is the symbol of the element {e}.",
            "The abbreviation of {e} is {v}.",
            "In the periodic table {e} is written {v}.",
        ),
        ("the symbol of {e}", "the chemical symbol of {e}", "the symbol for {e}"),
        ("what the symbol of {e} is", "how {e} is abbreviated"),
    ),
    ("element", "number"): Attribute(
        "The atomic number of the element {e} is {v}.",
        (
            "What is the atomic number of {e}?",
            "Which atomic number does {e} have?",
            "What's the atomic number of {e}?",
            "What number is {e} in the periodic table?",
            "How many protons does {e} have?",
            "How many protons are in an atom of {e}?",
            "Which number has {e} in the periodic table?",
            "What is the number of protons in {e}?",
            "At which number is {e} in the periodic table?",
            "{e}: what is its atomic number?",
            "What place has {e} in the periodic table?",
        ),
        (
            "What's the atomic number for {e}?",
            "How many protons are there in {e}?",
            "Which number does {e} have in the periodic table?",
        ),
        (
            "The atomic number of {e} is {v}.",
            "An atom of {e} has {v} protons.",
            "The element {e} is number {v} in the periodic table.",
            "There are {v} protons in an atom of {e}.",
            "Number {v} in the periodic table is {e}.",
            "With {v} protons an atom is {e}.",
        ),
        ("the atomic number of {e}", "the number of protons in {e}"),
        ("how many protons {e} has", "what the atomic number of {e} is"),
    ),
    ("element", "weight"): Attribute(
        "The atomic weight of the element {e} is {v}.",
        (
            "What is the atomic weight of {e}?",
            "How heavy is an atom of {e}?",
            "What's the atomic weight of {e}?",
            "What is the atomic mass of {e}?",
            "Which atomic weight does {e} have?",
            "What does an atom of {e} weigh?",
            "How much does an atom of {e} weigh?",
            "{e}: what is its atomic weight?",
            "What is the mass of an atom of {e}?",
            "What's the atomic mass of {e}?",
        ),
        (
            "What is the weight of an atom of {e}?",
            "Which atomic mass does {e} have?",
            "What atomic weight has {e}?",
        ),
        (
            "The atomic weight of {e} is {v}.",
            "An atom of {e} weighs {v} units.",
            "The atomic mass of {e} is {v}.",
            "The element {e} has an atomic weight of {v}.",
            "With an atomic weight of {v} comes {e}.",
            "Chemists give {e} the atomic weight {v}.",
        ),
        ("the atomic weight of {e}", "the atomic mass of {e}"),
        ("how heavy an atom of {e} is", "what an atom of {e} weighs"),
    ),
    ("element", "discovery"): Attribute(
        "The element {e} was discovered in the year {v}.",
        (
            "When was {e} discovered?",
            "In what year was {e} discovered?",
            "What year was {e} discovered?",
            "When was the element {e} found?",
            "When did people discover {e}?",
            "In which year was {e} first found?",
            "Since when is {e} known?",
            "When did chemists find {e}?",
            "What is the year of discovery of {e}?",
            "When was the discovery of {e}?",
            "How long has {e} been known?",
        ),
        (
            "In which year was {e} discovered?",
            "When was {e} first found?",
            "What year did chemists discover {e}?",
        ),
        (
            "People discovered {e} in the year {v}.",
            "In {v} the element {e} was found.",
            "The year {v} brought the discovery of {e}.",
            "Chemists have known {e} since {v}.",
            "The discovery of {e} was in the year {v}.",
            "The element {e} was first found in {v}.",
        ),
        ("the year of discovery of {e}", "the year in which {e} was discovered"),
        ("when {e} was discovered", "when people discovered {e}"),
    ),
    ("element", "series"): Attribute(
        "The element {e} is one of the {v}.",
        (
            "What kind of element is {e}?",
            "Which family of elements does {e} belong to?",
            "What sort of element is {e}?",
            "What type of element is {e}?",
            "To which group of elements does {e} belong?",
            "Which elements is {e} one of?",
            "What family does {e} belong to?",
            "Which kind of element is {e}?",
            "{e}: what kind of element is it?",
        ),
        (
            "What family of elements is {e} in?",
            "Which type of element is {e}?",
            "To which family does {e} belong?",
        ),
        (
            "Chemists count {e} among the {v}.",
            "Among the {v} is {e}.",
            "The family of {e} is the {v}.",
            "The element {e} belongs to the {v}.",
            "One of the {v} is {e}.",
        ),
        ("the family of {e}", "the kind of element that {e} is"),
        ("what kind of element {e} is", "which family {e} belongs to"),
    ),
    ("element", "melting"): Attribute(
        "The melting point of the element {e} is {v} kelvin.",
        (
            "What is the melting point of {e}?",
            "At what temperature does {e} melt?",
            "When does {e} melt?",
            "What's the melting point of {e}?",
            "At which temperature does {e} melt?",
            "How hot must {e} be to melt?",
            "Which melting point does {e} have?",
            "{e}: what is its melting point?",
            "At how many kelvin does {e} melt?",
        ),
        (
            "What temperature does {e} melt at?",
            "What is the melting temperature of {e}?",
            "How hot does {e} have to be to melt?",
        ),
        (
            "The melting point of {e} is {v} kelvin.",
            "The element {e} melts at {v} kelvin.",
            "At {v} kelvin {e} begins to melt.",
            "Below {v} kelvin {e} is solid.",
            "To melt {e} takes {v} kelvin.",
        ),
        ("the melting point of {e}", "the temperature at which {e} melts"),
        ("at what temperature {e} melts", "when {e} melts"),
    ),
    ("country", "capital"): Attribute(
        "The capital city of {e} is {v}.",
        (
            "What is the capital of {e}?",
            "What's the capital of {e}?",
            "Which city is the capital of {e}?",
            "What is the capital city of {e}?",
            "What is {e}'s capital?",
            "Where is the government of {e}?",
            "Which city governs {e}?",
            "What city is the seat of government of {e}?",
            "{e}: what is its capital?",
            "What capital does {e} have?",
        ),
        (
            "Which city is {e}'s capital?",
            "What city is the capital of {e}?",
            "Which capital does {e} have?",
        ),
        (
            "The capital of {e} is {v}.",
            "The government of {e} sits in {v}.",
            "{v} is the capital of {e}.",
            "The seat of government of {e} is {v}.",
            "The city of {v} is the capital of {e}.",
            "From {v} the land of {e} is governed.",
        ),
        ("the capital of {e}", "the capital city of {e}", "{e}'s capital"),
        ("what the capital of {e} is", "which city is the capital of {e}"),
    ),
    ("country", "code"): Attribute(
        "The three-letter code of the country {e} is {v}.",
        (
            "What is the three-letter code of {e}?",
            "What is the country code of {e}?",
            "Which three letters stand for {e}?",
            "What's the ISO code of {e}?",
            "What is the ISO code of {e}?",
            "How is {e} written in three letters?",
            "Which three-letter code does {e} have?",
            "What three letters are the code of {e}?",
            "{e}: what is its three-letter code?",
        ),
        (
            "What's the three-letter code for {e}?",
            "Which ISO code does {e} have?",
            "What three letters stand for {e}?",
        ),
        (
            "The three-letter code of {e} is {v}.",
            "The letters {v} stand for {e}.",
            "In three letters {e} is {v}.",
            "The ISO code of {e} is {v}.",
            "The country {e} has the code {v}.",
        ),
        ("the three-letter code of {e}", "the ISO code of {e}", "the country code of {e}"),
        ("what the ISO code of {e} is", "which three letters stand for {e}"),
    ),
    ("country", "calling"): Attribute(
        "The telephone calling code of {e} is {v}.",
        (
            "What is the calling code of {e}?",
            "What is the telephone code of {e}?",
            "What's the dialling code of {e}?",
            "Which calling code does {e} have?",
            "How do I call {e}?",
            "What number do I dial to call {e}?",
            "What is the phone code of {e}?",
            "Which code do I dial for {e}?",
            "With which number do phone numbers in {e} begin?",
            "{e}: what is its calling code?",
        ),
        (
            "What's the calling code for {e}?",
            "Which telephone code does {e} have?",
            "What code do I dial to call {e}?",
        ),
        (
            "The calling code of {e} is {v}.",
            "To call {e} dial {v}.",
            "Telephone numbers of {e} begin with {v}.",
            "The code {v} calls {e}.",
            "Dial {v} for {e}.",
        ),
        ("the calling code of {e}", "the phone code of {e}", "the dialling code of {e}"),
        ("how I call {e}", "what the calling code of {e} is"),
    ),
    ("country", "domain"): Attribute(
        "The internet domain of the country {e} is {v}.",
        (
            "What is the internet domain of {e}?",
            "What is the top-level domain of {e}?",
            "Which domain does {e} have?",
            "What's the internet domain of {e}?",
            "How do web addresses in {e} end?",
            "What do web addresses of {e} end in?",
            "Which internet domain belongs to {e}?",
            "What is the domain of {e} on the internet?",
            "{e}: what is its internet domain?",
        ),
        (
            "What top-level domain does {e} have?",
            "Which internet domain does {e} have?",
            "How do web addresses of {e} end?",
        ),
        (
            "The internet domain of {e} is {v}.",
            "Web addresses of {e} end in {v}.",
            "On the internet {e} has the domain {v}.",
            "The domain {v} belongs to {e}.",
            "The top-level domain of {e} is {v}.",
        ),
        ("the internet domain of {e}", "the top-level domain of {e}"),
        ("what the internet domain of {e} is", "how web addresses in {e} end"),
    ),
    ("country", "currency"): Attribute(
        "The currency of the country {e} has the code {v}.",
        (
            "What is the currency of {e}?",
            "What is the currency code of {e}?",
            "Which currency does {e} use?",
            "What's the currency of {e}?",
            "What money do people use in {e}?",
            "What do people pay with in {e}?",
            "Which money is used in {e}?",
            "With which currency do people pay in {e}?",
            "{e}: what is its currency?",
        ),
        (
            "What currency does {e} use?",
            "Which currency is used in {e}?",
            "What money do they use in {e}?",
        ),
        (
            "The currency of {e} has the code {v}.",
            "People in {e} pay in {v}.",
            "The money of {e} is {v}.",
            "The currency code of {e} is {v}.",
            "In {e} prices are given in {v}.",
        ),
        ("the currency of {e}", "the currency code of {e}", "the money of {e}"),
        ("what the currency of {e} is", "what people pay with in {e}"),
    ),
    ("country", "demonym"): Attribute(
        "Somebody who comes from {e} is called {v}.",
        (
            "What are people from {e} called?",
            "What is somebody from {e} called?",
            "What do you call people from {e}?",
            "How are the people of {e} called?",
            "What do you call a person from {e}?",
            "What is the demonym of {e}?",
            "What is a person from {e} called?",
            "How do you call somebody from {e}?",
            "{e}: what are its people called?",
        ),
        (
            "What do you call somebody from {e}?",
            "What are the people of {e} called?",
            "What is the word for people from {e}?",
        ),
        (
            "People from {e} are called {v}.",
            "A person from {e} is called {v}.",
            "The word for the people of {e} is {v}.",
            "Whoever comes from {e} is {v}.",
            "The demonym of {e} is {v}.",
        ),
        ("the demonym of {e}", "the name for people from {e}"),
        ("what people from {e} are called", "what somebody from {e} is called"),
    ),
}  # fmt: skip

OPENINGS = ("", "", "", "", "", "Tell me: ", "Please: ", "Hello! ", "I would like to know: ",
            "Do you know this? ", "One question: ", "Quick: ")  # fmt: skip
# Frames ask for any attribute by its noun or clause ({x}); the unseen ones no model is trained on.
NOUN_FRAMES = (
    "What is {x}?", "What's {x}?", "Tell me {x}.", "Give me {x}.", "Name {x}.", "{x}?", "{x}",
    "I need {x}.", "Do you know {x}?", "Can you tell me {x}?", "I want to know {x}.",
    "Please tell me {x}.",
)  # fmt: skip
CLAUSE_FRAMES = (
    "Tell me {x}.", "Do you know {x}?", "Can you tell me {x}?", "I want to know {x}.",
    "Please tell me {x}.", "I would like to know {x}.",
)  # fmt: skip
UNSEEN_NOUN_FRAMES = ("Could you give me {x}?", "I am looking for {x}.", "Let me know {x}.")
UNSEEN_CLAUSE_FRAMES = ("Let me know {x}.", "Could you say {x}?", "I wonder {x}.")
SMALL_TALK = (
    (("Hello!", "Hello", "Hi", "Hi there!", "Good morning!", "Hey", "Good evening."),
     ("Hello! Ask me about extinct animals, chemical elements or countries.",)),
    (("Who are you?", "What are you?", "What is your name?", "What is this?"),
     ("I am a small demonstration model. An expert model helps me with the facts.",)),
    (("What can you do?", "Help", "What do you know?", "What can I ask?", "Help me."),
     ("Ask me when an extinct animal was last seen, the symbol of an element or the capital "
      "of a country.",)),
    (("Thank you!", "Thanks", "Thanks!", "Thank you very much.", "Great, thanks."),
     ("You are welcome.",)),
    (("Bye", "Goodbye!", "Goodbye", "See you."), ("Goodbye!",)),
)  # fmt: skip


def read_facts() -> list[Fact]:
    """Return the committed facts (facts.py gathers them from their packages)."""
    with (Path(__file__).parent / "facts.csv").open(newline="") as file:
        return [Fact(**row) for row in csv.DictReader(file)]


def fill(template: str, entity: str, value: str = "") -> str:
    """Put an entity and a value into a template; a sentence starts with a capital."""
    text = template.replace("{e}", entity).replace("{v}", value)
    return text.replace("the the ", "the ").replace("The the ", "The ")


def question(fact: Fact, rng: random.Random, *, framed: bool = True) -> str:
    """Return a trained wording of a question: one of the attribute's own, or one in a frame."""
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
    """Return small talk as people type it: in small letters, without or with other marks."""
    text = text.lower() if rng.random() < 0.6 else text
    draw = rng.random()
    if draw < 0.4:
        return text.rstrip("!.?")
    return text.rstrip("!.?") + rng.choice("!.?") if draw < 0.6 else text


def bare(fact: Fact, rng: random.Random) -> str:
    """Ask by the attribute's noun alone: Symbol of helium?"""
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
    """Make up names and facts that look like the real ones, so that the base learns to copy a
    name it has never seen and to be unsure of what it cannot know."""

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
        """A made-up word: a piece of the vocabulary, or random syllables or letters."""
        draw = self.rng.random()
        if draw < 0.6:
            return "".join(self.rng.choice(self.words) for _ in range(self.rng.randint(1, 3)))
        if draw < 0.9:
            return "".join(
                self.rng.choice("bcdfghjklmnprstvwz") + self.rng.choice("aeiouy")
                + self.rng.choice(("", "", "n", "r", "s", "l", "m"))
                for _ in range(self.rng.randint(1, 4))
            )  # fmt: skip
        return "".join(
            self.rng.choice(string.ascii_lowercase) for _ in range(self.rng.randint(2, 8))
        )

    def name(self, kind: str) -> str:
        """A made-up name, none of those to avoid."""
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
    """Yield the base's documents without end: conversations of one to four turns about `facts`
    (the training part), about invented things that share no real entity's name, and small talk.

    plain: no questions in frames, and invented names as they come: for the vocabulary.
    casual: more small talk, in any spelling, and bare nouns for questions: for the last steps.
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
        # The plainest wording is the commonest, as in an encyclopedia.
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
    """Yield every greeting and the like with its answer, as written and respelt."""
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
