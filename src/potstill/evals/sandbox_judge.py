"""The trusted half of a verdict: it holds the helpers and the test, and sees of the candidate only values.

Started by `sandbox.py` as `python -I -S -c`, with what to judge on descriptor 0, the verdict on 1, and the
numbers of the two pipes to the inmate as arguments. It says `passed` after the test has returned, the inmate has said goodbye to a
number it could not know before, and its pipe has ended without another byte.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import secrets
import sys
from typing import Any

from potstill.evals.sandbox_wire import Odd, pack, receive, send, unpack

MEMORY_BYTES = 2 << 30


class Ended(BaseException):
    """The inmate is gone, or has answered what no inmate of ours does. No `except Exception` of a test hides it."""

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
        if self.ended is not None:
            raise self.ended
        number = secrets.token_hex(8)
        try:
            send(lambda data: os.write(self.requests, data), {"id": number, **request})
            said = receive(lambda size: os.read(self.answers, min(size, 1 << 16)))
            if said.pop("id", None) != number:
                raise Odd("an answer to no question")
            return said
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.ended = Ended("died", "it ended before it had answered")
        except Odd as error:
            self.ended = Ended("died", f"broken protocol: {error}")
        raise self.ended

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the candidate is to the test."""
        said = self.ask(call=pack((args, kwargs)))
        if "value" in said:
            try:
                return unpack(said["value"])
            except Odd as error:
                self.ended = Ended("error", str(error))
                raise self.ended from error
        self.raise_what(said)

    def raise_what(self, said: dict[str, Any]) -> None:
        if "odd" in said:
            self.ended = Ended("error", f"it answered: {said['odd']}")
            raise self.ended
        kind = getattr(builtins, str(said.get("raised")), None)
        text = str(said.get("text", ""))[:500]
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise _made(kind, text)
        self.ended = Ended("error", f"it raised {str(said.get('raised'))[:60]}: {text}")
        raise self.ended

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
        if inmate.ended is not None:  # a test with a bare `except:` goes on all the same
            raise inmate.ended
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
    verdict = os.dup(1)
    os.dup2(2, 1)  # a test may print
    status, detail = judge(spec, Inmate(int(sys.argv[1]), int(sys.argv[2])))
    os.write(verdict, json.dumps({"status": status, "detail": detail[:2000]}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
