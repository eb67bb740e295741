"""Errors that a user can fix, and the exceptions that end a run.

Apart from `types.py`, which imports torch: a typo in a recipe must be reported without waiting for that.
"""

from __future__ import annotations

LONGEST = 2000
"""Characters of a message. A longer one quotes a file's own text, such as a key of 100,000 letters."""


class UserError(Exception):
    """A mistake that the user can fix: `where: what is wrong, with both values. What to do.`

    Several mistakes can be reported at once. The command line prints each on one line, without a traceback,
    and exits 2. Everything else that is raised is a bug and keeps its traceback.
    """

    def __init__(self, *mistakes: str) -> None:
        self.mistakes = tuple(map(_shortened, mistakes))
        super().__init__("\n".join(self.mistakes))


def _shortened(mistake: str) -> str:
    return mistake if len(mistake) <= LONGEST else f"{mistake[:400]} … {mistake[-400:]}"


class Unreadable(UserError):
    """The operating system refuses to read a file. Its content is unknown, so it must not be treated as damaged."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(f"{what} {todo}".rstrip())
        self.what = what


class Fault(UserError):
    """A step that must not update the weights: a value is not finite, or the loss is above its ceiling."""


class RankError(UserError):
    """An error of a distributed run that not every rank sees, so rank 0 cannot be relied on to report it."""

    is_reported = True
    """False where another rank prints it."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop. Not an `Exception`, so that no library's `except Exception` swallows it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """A library's error as one line of whole sentences, with its type where the message alone is not enough."""
    text = ""
    for line in filter(None, (" ".join(line.split()) for line in str(error).splitlines())):
        # A line that starts like a sentence ends the one before, which often has no full stop.
        ends = text and line[0].isupper() and text[-1] not in ".,:;!?"
        text = f"{text}{'.' if ends else ''} {line}"
    text = text.strip()
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    if len(text) > limit:
        return f"{text[:limit].rsplit(' ', 1)[0].rstrip('.,:;')} …"
    return text if text[-1] in "!?" else f"{text.rstrip('.: ')}."
