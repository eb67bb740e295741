"""The one exception that is the user's and not ours. Apart from `types.py` because a typo must not wait for
torch.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: `where: what is wrong, with both values. What to do.`

    Several at once when one place holds several. The command line prints each on one line, without a
    traceback, and exits 2. Everything else that is raised is a bug and keeps its traceback.
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class Unreadable(UserError):
    """The system does not let a file be read: what it holds is not known, so it is not taken for damaged."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(f"{what} {todo}".rstrip())
        self.what = what


class Fault(UserError):
    """Numbers that no update may be made of: not finite, or a loss above its ceiling."""


class OfOneRank(UserError):
    """Where several processes run, what not each of them knows."""

    is_told = True
    """False where another of them says it."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end. No `except Exception` of a library can take it for its own."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What a library's error says on one line, with its type where the text alone says little."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return f"{text[:limit].rstrip('.: ')}."
