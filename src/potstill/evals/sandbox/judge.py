"""The trusted half of a verdict: it holds the helpers and the test, and sees of the candidate only values.

Started by `sandbox.py` as `python -c`, with what to judge on descriptor 0, the verdict on 1, and the
numbers of the two pipes to the inmate as arguments. It says `passed` after the test has returned, the inmate
has said goodbye to a number it could not know before, and its pipe has ended without another byte.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import resource
import sys
from typing import Any, NoReturn

from potstill.evals.sandbox.protocol import Odd, pack, receive, send, unpack

MEMORY_BYTES = 2 << 30
GONE = "it ended before it had answered"


class Ended(BaseException):
    """The inmate is gone, or has broken the protocol; no `except Exception` of a test hides it."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Raised(Exception):
    """The candidate raised something of its own."""


class Inmate:
    """The other end of the two pipes. `ended` keeps the first thing that went wrong for good."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers = requests, answers
        self.ended: Ended | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        if self.ended is not None:  # a test with a bare `except:` goes on all the same
            raise self.ended
        number = os.urandom(8).hex()
        try:
            send(lambda data: os.write(self.requests, data), {"id": number, **request})
        except Odd as error:
            raise self.over("error", f"the test asked: {error}") from error
        except BrokenPipeError as error:
            raise self.over("died", GONE) from error
        try:
            said = receive(lambda size: os.read(self.answers, min(size, 1 << 16)))
            if said.pop("id", None) != number:
                raise Odd("an answer to no question")
        except Odd as error:
            raise self.over("died", f"broken protocol: {error}") from error
        except EOFError as error:
            raise self.over("died", GONE) from error
        return said

    def over(self, status: str, detail: str) -> Ended:
        self.ended = self.ended or Ended(status, detail)
        return self.ended

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the candidate is to the test."""
        try:
            packed = pack((args, kwargs))
        except Odd as error:  # the test's own fault: its `except` must not make a verdict of it
            raise self.over("error", f"the test asked: {error}") from error
        said = self.ask(call=packed)
        if "value" not in said:
            self.raise_what(said)
        try:
            return unpack(said["value"])
        except Odd as error:
            raise self.over("error", str(error)) from error

    def raise_what(self, said: dict[str, Any]) -> NoReturn:
        if "odd" in said:
            raise self.over("error", f"it answered: {said['odd']}")
        name, text = str(said.get("raised"))[:60], str(said.get("text", ""))[:500]
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise _made(kind, text)
        raise self.over("error", f"it raised {name}: {text}")

    def end(self) -> None:
        """Raises Ended unless the inmate takes its leave, and nothing comes after it."""
        if self.ask(end=True) != {"end": True} or os.read(self.answers, 1):
            raise Ended("died", "it said more than it was asked")


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except Exception:  # UnicodeDecodeError and its like want more than a text
        return Raised(f"{kind.__name__}: {text}")


def judge(spec: dict[str, Any], inmate: Inmate) -> tuple[str, str]:
    """The verdict's status and detail."""
    namespace: dict[str, Any] = {"__name__": "test"}
    try:
        exec(compile(spec["helpers"], "helpers", "exec"), namespace)
        exec(compile(spec["test"], "test", "exec"), namespace)
    except Exception as error:
        return "error", f"the test itself cannot be read: {type(error).__name__}: {error}"
    try:
        begun = inmate.ask(**spec["inmate"])
        if begun != {"ready": True}:
            inmate.raise_what(begun)
        namespace[spec["inmate"]["entry_point"]] = inmate.call
        namespace["check"](inmate.call)
        inmate.end()
    except Ended as ended:
        return ended.status, ended.detail
    except AssertionError as error:
        return "failed", str(error) or "an assertion is false"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"
    return "passed", ""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = json.loads(sys.stdin.buffer.read())
    seconds = spec["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    random.seed(0)  # tests that draw their cases draw the same ones each time
    verdict = os.dup(1)
    os.dup2(2, 1)  # a test may print
    status, detail = judge(spec, Inmate(int(sys.argv[1]), int(sys.argv[2])))
    os.write(verdict, json.dumps({"status": status, "detail": detail[:2000]}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
