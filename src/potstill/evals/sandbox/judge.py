"""The trusted side: it holds the helpers and the test, and gets nothing but values from the candidate.

Started by `sandbox.py` as `python -c`, with the specification on descriptor 0, the verdict on 1, and the
numbers of the two pipes to the guest as arguments. The verdict is `passed` only after the test has returned,
the guest has answered the final request with its random id, and its pipe has ended without another byte.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import resource
import sys
import types
from typing import Any, NoReturn

from potstill.evals.sandbox.protocol import ProtocolError, pack, receive, send, unpack

MEMORY_BYTES = 2 << 30
GONE = "it exited before it answered"


class GuestFailed(BaseException):
    """The guest has exited or broken the protocol. No `except Exception` in a test hides it."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class CandidateError(Exception):
    """The candidate raised an exception that cannot be rebuilt here."""


class Guest:
    """The other end of the two pipes. `failure` is the first thing that went wrong, and is final."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers = requests, answers
        self.failure: GuestFailed | None = None

    def request(self, **fields: Any) -> dict[str, Any]:
        if self.failure is not None:  # a test with a bare `except:` continues after it
            raise self.failure
        number = os.urandom(8).hex()
        try:
            send(lambda data: os.write(self.requests, data), {"id": number, **fields})
        except ProtocolError as error:
            raise self.failed("error", f"the test sent: {error}") from error
        except BrokenPipeError as error:
            raise self.failed("died", GONE) from error
        try:
            answer = receive(lambda size: os.read(self.answers, min(size, 1 << 16)))
            if answer.pop("id", None) != number:
                raise ProtocolError("an answer to no request")
        except ProtocolError as error:
            raise self.failed("died", f"broken protocol: {error}") from error
        except EOFError as error:
            raise self.failed("died", GONE) from error
        return answer

    def failed(self, status: str, detail: str) -> GuestFailed:
        self.failure = self.failure or GuestFailed(status, detail)
        return self.failure

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The candidate, as the test sees it."""
        try:
            packed = pack((args, kwargs))
        except ProtocolError as error:  # the test's own mistake, which its `except` must not hide
            raise self.failed("error", f"the test sent: {error}") from error
        answer = self.request(call=packed)
        if "value" not in answer:
            self.raise_from(answer)
        try:
            return unpack(answer["value"])
        except ProtocolError as error:
            raise self.failed("error", str(error)) from error

    def raise_from(self, answer: dict[str, Any]) -> NoReturn:
        if "not_sendable" in answer:
            raise self.failed("error", f"it answered: {answer['not_sendable']}")
        name, text = str(answer.get("raised"))[:60], str(answer.get("text", ""))[:500]
        error_type = getattr(builtins, name, None)
        if isinstance(error_type, type) and issubclass(error_type, Exception):
            raise _rebuilt(error_type, text)
        raise self.failed("error", f"it raised {name}: {text}")

    def end(self) -> None:
        """Raises GuestFailed unless the guest confirms the end and sends nothing after it."""
        if self.request(end=True) != {"end": True} or os.read(self.answers, 1):
            raise GuestFailed("died", "it sent more than was requested")


def _rebuilt(error_type: type[Exception], text: str) -> Exception:
    try:
        return error_type(text)
    except Exception:  # UnicodeDecodeError, for one, takes more than a text
        return CandidateError(f"{error_type.__name__}: {text}")


def judge(spec: dict[str, Any], guest: Guest) -> tuple[str, str]:
    """The verdict's status and detail."""
    module = sys.modules["test"] = types.ModuleType("test")  # where dataclasses, for one, look a class up
    namespace = vars(module)
    try:
        for name in ("helpers", "test"):  # without the future statement of this file
            exec(compile(spec[name], name, "exec", dont_inherit=True), namespace)
    except Exception as error:
        return "error", f"the test itself does not run: {type(error).__name__}: {error}"
    try:
        answer = guest.request(**spec["guest"])
        if answer != {"ready": True}:
            guest.raise_from(answer)
        namespace[spec["guest"]["entry_point"]] = guest.call
        namespace["check"](guest.call)
        guest.end()
    except GuestFailed as failure:
        return failure.status, failure.detail
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
    random.seed(0)  # tests with random cases get the same ones each time
    verdict = os.dup(1)
    os.dup2(2, 1)  # a test may print
    status, detail = judge(spec, Guest(int(sys.argv[1]), int(sys.argv[2])))
    os.write(verdict, json.dumps({"status": status, "detail": detail[:2000]}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
