"""Draw answers as SVG, as a terminal shows them: the expert's tokens coloured and underlined.

python tools/studies/draw_answer.py docs/answer.svg "When did the last Caspian tiger die?" ...
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from colm_edge import load
from colm_edge.cli.terminal import summary

WIDTH, LINE, PAD, SIZE = 940, 24, 20, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    args = parser.parse_args()
    rows: list[str] = []
    with load() as pair:
        pair.generate("When was gold discovered?", temperature=0)  # loads both models
        for question in args.questions:
            answer = pair.generate(question, temperature=0)
            spans = "".join(
                f'<tspan class="{step.source}">{escape(step.text)}</tspan>' for step in answer.steps
            )
            rows += [
                f'<tspan class="prompt">&gt;&gt;&gt; {escape(question)}</tspan>',
                spans,
                f'<tspan class="note">{escape(summary(answer.stats))}</tspan>',
                "",
            ]
    rows.append(
        '<tspan class="base">the base wrote this</tspan>'
        '<tspan class="note">   </tspan><tspan class="expert">the expert wrote this</tspan>'
    )
    height = 2 * PAD + LINE * len(rows)
    lines = "\n".join(
        f'<text x="{PAD}" y="{PAD + LINE * i + SIZE}" xml:space="preserve">{row}</text>'
        for i, row in enumerate(rows)
    )
    args.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n'
        "<style>text{font:15px 'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#e6e6e6}"
        ".prompt{fill:#9ad17b}.note{fill:#8b93a1;font-size:11.5px}"
        ".expert{fill:#4fd1e8;text-decoration:underline}</style>\n"
        f'<rect width="100%" height="100%" rx="10" fill="#1b1f27"/>\n{lines}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
