"""Draw answers as SVG, as a terminal shows them: the expert's tokens coloured and underlined.

python tools/studies/draw_answer.py answer.svg "When did the last Caspian tiger die?" ...
python tools/studies/draw_answer.py docs/real-answer.svg -m base.gguf -me expert.gguf \\
    --pair qwen2.5-coder --defer-rate 0.1 "Which numbers below 30 are prime?"
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from colm_edge import load
from colm_edge.cli.terminal import summary

WIDTH, LINE, PAD, SIZE = 940, 24, 20, 15
COLUMNS = 99  # that fit the width


class Span(NamedTuple):
    text: str
    kind: str  # prompt, base, expert or note


def wrapped(spans: list[Span]) -> list[list[Span]]:
    """Return lines of spans, broken at line ends and, where they are too long, at spaces."""
    lines: list[list[Span]] = [[]]
    for text, kind in spans:
        for i, part in enumerate(text.split("\n")):
            if i or sum(len(span.text) for span in lines[-1]) + len(part) > COLUMNS:
                lines.append([])
            lines[-1].append(Span(part if i or lines[-1] else part.lstrip(" "), kind))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("-m", "--model")
    parser.add_argument("-me", "--expert")
    parser.add_argument("--pair")
    parser.add_argument("--defer-rate", type=float)
    args = parser.parse_args()
    lines: list[list[Span]] = []
    with load(args.model, args.expert, pair=args.pair) as pair:
        for threshold in (0, 1):  # loads both models
            pair.generate("When was gold discovered?", threshold=threshold, max_tokens=2)
        for question in args.questions:
            answer = pair.generate(question, temperature=0, defer_rate=args.defer_rate)
            asked = fill(f">>> {question}", COLUMNS, subsequent_indent="    ")
            lines += wrapped([Span(asked, "prompt")])
            lines += wrapped([Span(step.text, step.source) for step in answer.steps])
            lines += [[Span(summary(answer.stats), "note")], []]
    key = [("the base wrote this", "base"), ("   ", "note"), ("the expert wrote this", "expert")]
    lines.append([Span(*one) for one in key])
    height = 2 * PAD + LINE * len(lines)
    drawn = "\n".join(
        f'<text x="{PAD}" y="{PAD + LINE * i + SIZE}" xml:space="preserve">'
        + "".join(f'<tspan class="{kind}">{escape(text)}</tspan>' for text, kind in line)
        + "</text>"
        for i, line in enumerate(lines)
    )
    args.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n'
        "<style>text{font:15px 'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#e6e6e6}"
        ".prompt{fill:#9ad17b}.note{fill:#8b93a1;font-size:11.5px}"
        ".expert{fill:#4fd1e8;text-decoration:underline}</style>\n"
        f'<rect width="100%" height="100%" rx="10" fill="#1b1f27"/>\n{drawn}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
