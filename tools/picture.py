"""Draws the picture of the README: `python tools/picture.py > docs/picture.svg`.

It brings its own background, so that it can be read on a light page and on a dark one.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

WIDTH, HEIGHT = 900, 220
TOP, BOX_HEIGHT, LINE = 44, 118, 21
BELOW = TOP + BOX_HEIGHT + 36
"""Height of the labels' way, which passes below the teacher."""
STYLE = """
  svg { --page: #ffffff; --box: #eef4f1; --edge: #0b6e4f; --ink: #1f2a26; --soft: #52605a }
  @media (prefers-color-scheme: dark) {
    svg { --page: #11181a; --box: #1b2a26; --edge: #58c99a; --ink: #e8efec; --soft: #a9b8b1 }
  }
  text { font: 14px system-ui, sans-serif; fill: var(--ink) }
  .title { font-weight: 600; font-size: 15px }
  .soft { fill: var(--soft); font-size: 13px }
  .page { fill: var(--page) }
  .box { fill: var(--box); stroke: var(--edge); stroke-width: 1.5 }
  .arrow { fill: none; stroke: var(--edge); stroke-width: 1.8 }
  .head { fill: var(--edge) }
"""


@dataclass(frozen=True)
class Box:
    title: str
    lines: tuple[str, ...]
    x: int
    width: int

    @property
    def right(self) -> int:
        return self.x + self.width


CORPUS = Box(
    "corpus", ("text, code, chats,", "prompts, tokens;", "packed into rows,", "some held out"), 20, 150
)
TEACHER = Box("teacher", ("in memory, on disk,", "on a server,", "or several"), 250, 160)
STUDENT = Box("student", ("cut from the teacher,", "a checkpoint, LoRA,", "or random weights"), 490, 165)
PROOF = Box(
    "proof", ("held-out KL and CE,", "tasks, HumanEval;", "receipt, report;", "HF folder and GGUF"), 720, 160
)
ALT = (
    "Rows of the corpus go to the teacher. Its targets go to the student, which is trained with the KL to them and with"
    " the cross-entropy to the next tokens of the corpus. Of the student come held-out numbers, a receipt, a report, a"
    " Hugging Face folder and GGUF files."
)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{named}>{html.escape(words)}</text>'


def box(of: Box) -> list[str]:
    middle = of.x + of.width / 2
    return [
        text(middle, TOP - 14, of.title, "title"),
        f'<rect x="{of.x}" y="{TOP}" width="{of.width}" height="{BOX_HEIGHT}" rx="8" class="box"/>',
        *(
            text(middle, TOP + BOX_HEIGHT / 2 + 5 + LINE * (i - (len(of.lines) - 1) / 2), line)
            for i, line in enumerate(of.lines)
        ),
    ]


def arrow(way: str, x: float, y: float, *, up: bool = False) -> list[str]:
    """A line along `way`, a path whose end is (x, y), with a head there."""
    head = f"M{x - 5:g} {y + 9:g}L{x:g} {y:g}L{x + 5:g} {y + 9:g}Z"
    if not up:
        head = f"M{x - 9:g} {y - 5:g}L{x:g} {y:g}L{x - 9:g} {y + 5:g}Z"
    return [f'<path d="{way}" class="arrow"/>', f'<path d="{head}" class="head"/>']


def picture() -> str:
    """The SVG."""
    middle = TOP + BOX_HEIGHT // 2
    drawn = [*box(CORPUS), *box(TEACHER), *box(STUDENT), *box(PROOF)]
    for before, after, word in (
        (CORPUS, TEACHER, "rows"),
        (TEACHER, STUDENT, "targets"),
        (STUDENT, PROOF, ""),
    ):
        drawn += arrow(f"M{before.right} {middle}H{after.x - 5}", after.x - 1, middle)
        if word:
            drawn.append(text((before.right + after.x) / 2, middle - 10, word, "soft"))
    drawn.append(text((TEACHER.right + STUDENT.x) / 2, middle + 22, "loss: KL", "soft"))
    start, end = CORPUS.x + CORPUS.width // 2, STUDENT.x + STUDENT.width // 2
    bottom = TOP + BOX_HEIGHT
    drawn += arrow(f"M{start} {bottom}V{BELOW}H{end}V{bottom + 5}", end, bottom + 1, up=True)
    drawn.append(text((start + end) / 2, BELOW - 9, "next tokens, loss: CE", "soft"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' role="img" aria-labelledby="title">',
            f'<title id="title">{html.escape(ALT)}</title>',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="page"/>',
            *drawn,
            "</svg>",
        ]
    )


if __name__ == "__main__":
    print(picture())
