"""Count how many answers to drawn JSON schemas are valid, judged by the package jsonschema.

    python tools/studies/schema_answers.py -n 1000                      # the demo pair
    python tools/studies/schema_answers.py -m base.gguf -me expert.gguf --pair qwen2.5-coder -n 100

Each answer has a schema of its own, and the ways to write one take turns: greedy, sampled, compose,
under review, the expert alone. An answer that reaches the limit of tokens is counted apart.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from typing import Any

import jsonschema

from colm_edge.llama.grammar import grammar_of
from colm_edge.pair import load

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {},
    "compose": {"strategy": "compose"},
    "review": {"temperature": 0.0, "review": 1.0},
    "lossless": {"review": 0.0},
    "expert alone": {"threshold": 0.0},
}
WORDS = ("name", "year", "kind", "place", "count", "good")
PROMPTS = ("Describe a tiger.", "Which planet is the largest?", "Name a metal.", "When and where?")


def drawn(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a schema: a scalar, a choice, or up to three properties or items of such."""
    kinds = ["integer", "boolean", "null", "string", "enum", "number"]
    kind = draw.choice(kinds + ["object", "array", "object"] * (depth > 0))
    if kind == "enum":
        return {"enum": draw.sample(["red", "green", 1, 2, True], 2)}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(1, 12)}
    if kind == "array":
        return {"type": "array", "items": drawn(draw, depth - 1), "maxItems": draw.randint(1, 3)}
    if kind == "object":
        names = draw.sample(WORDS, draw.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: drawn(draw, depth - 1) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    return {"type": kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--model-expert")
    parser.add_argument("--pair")
    parser.add_argument("-n", type=int, default=100, help="answers")
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300)
    args = parser.parse_args()
    found: Counter[tuple[str, str]] = Counter()
    with load(
        args.model, args.model_expert, pair=args.pair, n_threads=args.threads, n_ctx=1024
    ) as pair:
        for i in range(args.n):
            draw = random.Random(i)
            schema, way = drawn(draw), list(WAYS)[i % len(WAYS)]
            answer = pair.generate(
                draw.choice(PROMPTS), grammar=grammar_of(schema), seed=i,
                max_tokens=args.max_tokens, **WAYS[way],
            )  # fmt: skip
            if answer.finish_reason == "length":
                found[way, "cut"] += 1
                continue
            try:
                jsonschema.validate(json.loads(answer.text), schema)
                found[way, "valid"] += 1
            except (ValueError, jsonschema.ValidationError) as e:
                found[way, "invalid"] += 1
                print(f"{i}, {way}: {answer.text!r} is not {json.dumps(schema)}: {e}")
    print("| way | valid | invalid | cut |\n| --- | ---: | ---: | ---: |")
    for way in WAYS:
        print(
            f"| {way} | "
            + " | ".join(str(found[way, x]) for x in ("valid", "invalid", "cut"))
            + " |"
        )


if __name__ == "__main__":
    main()
