"""JSON over HTTP, with what a long run needs of it: a bound on requests in flight, retries, and one line at the end.

A request is sent again while there is no answer: no connection, one that was cut, or a status that says "later". It is
not sent again where the server understood it and refuses. The key is in one header and nowhere else: not in a file, a
log or a message, even where the server repeats it.
"""

from __future__ import annotations

import contextlib
import functools
import html
import ipaddress
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, unquote

import httpx
import tenacity

from potstill.errors import UserError, one_line

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
LATER = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
"""Statuses of a server that starts, is overloaded, or stands behind a proxy that cannot reach it."""
UNREACHED = frozenset({502, 503, 504, *range(520, 528), 530})
"""Those of a proxy that cannot reach it: the one that answers next may be another."""
LONGEST_WAIT_S = 15.0
FIRST_DEADLINE_S = 5.0
"""Of a server that is not proven."""
END_S = 2.0
"""For requests in flight to end in."""
KEPT_S = 2.0
"""For which a connection that is not used is kept: vLLM and SGLang close theirs after 5 s."""
SHOWN = 300
"""Characters of a server's own message."""
NO_JSON = object()
SECRET = 8
"""Characters of the key in a row that must not be shown."""
HIDDEN = "*** (not shown, since it has a part of the API key)"


class _NoAnswer(Exception):
    """Nothing that could be read came back; it may after a while.

    Args:
        is_outage: the server was out of reach, so that another one may answer next.
        wait_s: how long the server itself asks to be left alone.
    """

    def __init__(self, message: str, is_outage: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.is_outage, self.wait_s = is_outage, wait_s


CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@functools.cache
def _certificates(*named: str | None) -> ssl.SSLContext:
    """Whom connections trust, by the environment's `CERTIFICATE_VARIABLES`. Kept: reading all authorities takes longer
    than a request.
    """
    return httpx.create_ssl_context()


class HttpClient:
    """A server that answers JSON with JSON. Threads may share one.

    Args:
        url: where it is, without a path of its own.
        key_variable: environment variable that has its API key; None: it wants none.
        timeout_s: of one request.
        deadline_s: of a request with all its repetitions.
        requests: in flight at most.

    Raises:
        UserError: the variable is empty, or its value is none that fits into a header; no connection can be made to
            such an address, or with the proxy or the certificates that the environment names.
    """

    def __init__(
        self, url: str, key_variable: str | None, timeout_s: float, deadline_s: float, requests: int
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s, self.deadline_s = timeout_s, deadline_s
        self.note: Callable[[str], None] = lambda line: None
        """Called once an outage with a line that says so, possibly by another thread."""
        self.on_return: Callable[[], None] = lambda: None
        """Called when it answers again after an outage, before the answer is used; may raise UserError."""
        self.is_proven = False
        """Whether it has shown what it is: one that has not is not waited for, since its address is likely wrong."""
        self.in_flight = self.answered = 0
        key = _key_of(key_variable)
        self._key = key or ""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(
            max_connections=requests, max_keepalive_connections=requests, keepalive_expiry=KEPT_S
        )
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            self._refuse_url(error)
        # A proxy of the environment cannot reach this machine's own addresses.
        address = f"[{host}]" if ":" in host else host
        direct = {f"all://{address}": None} if _is_loopback(host) else {}
        try:
            # Redirects are not followed: the key would go wherever they lead.
            self._client = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=timeout_s,
                limits=limits,
                mounts=direct,
                verify=_certificates(*map(os.environ.get, CERTIFICATE_VARIABLES)),
            )
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            # Of an address, the library quotes what may be a part of a password.
            what = (
                "a proxy's address cannot be read."
                if isinstance(error, httpx.InvalidURL)
                else one_line(error)
            )
            raise UserError(
                f"{self.url}: no connection can be made with the proxy or the certificates of the environment:"
                f" {what} See HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE; NO_PROXY names addresses"
                " that need no proxy."
            ) from None
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="potstill-request")
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._returning, self._returned_s, self._is_returning = threading.RLock(), 0.0, False

    def get(self, path: str) -> Any:
        """What the server answers.

        Raises:
            UserError: it refuses, or gives no answer until the deadline.
        """
        return self._send("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """As `get`."""
        return self._send("POST", path, body)

    def map(self, ask: Callable[[Asked], Answered], items: Iterable[Asked]) -> list[Answered]:
        """`ask` of each item on threads, in order; the first error ends the others that have not started."""
        futures: list[Future[Answered]] = [self._pool.submit(ask, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End what waits, and the connections."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline_s = time.monotonic() + END_S
        while self.in_flight and time.monotonic() < deadline_s:
            self._hang_up()
            time.sleep(0.01)
        self._client.close()

    def clean(self, text: str) -> str:
        """One line of a server's text, without the key that it may repeat."""
        # Before it is shortened: a part of the key would be left of one that is cut in two.
        for form in _written_forms(self._key) if self._key else ():
            text = text.replace(form, "***")
        shown = " ".join(text.split())[:SHOWN]
        if self._key and _has_part(shown, self._key):
            return HIDDEN
        # A terminal takes orders in such characters.
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in shown)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        started_s = time.monotonic()
        deadline_s = self.deadline_s if self.is_proven else min(self.deadline_s, FIRST_DEADLINE_S)
        outages_s: list[float] = []
        retries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_NoAnswer),
            stop=tenacity.stop_after_delay(deadline_s) | tenacity.stop_when_event_set(self._closed),
            wait=_Wait(deadline_s),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=lambda state: self._note_failure(state, deadline_s, outages_s),
            reraise=True,
        )
        try:
            answer = retries(self._once, method, path, body)
        except _NoAnswer as error:
            self._require_open()
            passed_s = time.monotonic() - started_s
            # Longer where one request alone took longer.
            shown_s = deadline_s if passed_s < 2 * deadline_s else round(passed_s, 1)
            raise UserError(
                f"{self.url}: no answer in {shown_s:g} s: {error}."
                " Start the server, or correct teacher.url; a run that has started goes on from its last checkpoint"
                " with --resume."
            ) from None  # the cause holds the request with its headers
        if self.is_proven and outages_s:
            self._confirm(outages_s[-1])
        with self._lock:
            self.answered += 1
        return answer

    def _confirm(self, failed_s: float) -> None:
        """Call `on_return` once an outage: not for the other requests that met it, nor for those of the call itself."""
        with self._returning:
            # Whoever finds it true here is `on_return` itself: others wait for the lock. What it was answered after
            # an outage of its own is part of the proof.
            if self._is_returning or self._returned_s > failed_s:
                return
            self._returned_s, self._is_returning = time.monotonic(), True
            try:
                self.on_return()
            except BaseException:
                self._returned_s = 0.0  # the others that met the outage must not use their answers either
                raise
            finally:
                self._is_returning = False

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise UserError(f"{self.url}: the connection was closed.")

    def _hang_up(self) -> None:
        """End what is in flight: who reads from a socket is not woken where it is closed."""
        with self._lock:
            streams = [*self._streams]
        for stream in streams:
            with contextlib.suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def _trace(self, event: str, about: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._streams.add(about["return_value"])

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        self._require_open()
        with self._lock:
            self.in_flight += 1
        try:
            response = self._answer(method, path, body)
        except (httpx.InvalidURL, UnicodeError) as error:
            self._refuse_url(error)
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise UserError(
                    f"{self.url}: its certificate cannot be verified: {self.clean(str(error))}. Name the file of those"
                    " who signed it in SSL_CERT_FILE."
                ) from None
            raise _NoAnswer(self.clean(f"{type(error).__name__}: {error}").rstrip(".")) from None
        except RuntimeError:  # of httpx, once `close` has been called
            self._require_open()
            raise
        finally:
            with self._lock:
                self.in_flight -= 1
        return self._read(response, method, path)

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """The whole answer; httpx bounds the time of each read, and this that of all together."""
        end_s = time.monotonic() + self.timeout_s
        with self._client.stream(method, path, json=body, extensions={"trace": self._trace}) as response:
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > end_s:
                    raise _NoAnswer(f"it took more than {self.timeout_s:g} s (teacher.timeout_s)")
        return httpx.Response(response.status_code, headers=_without_coding(response), content=bytes(content))

    def _read(self, response: httpx.Response, method: str, path: str) -> Any:
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = NO_JSON
        status = response.status_code
        if status == httpx.codes.OK and answer is NO_JSON:  # cut off, or of something in between
            raise _NoAnswer(f"what came back is no JSON: {self.clean(response.text)!r}")
        if status == httpx.codes.OK and isinstance(answer, dict) and answer.get("error"):
            status = _status_of(answer["error"])
        if status in LATER:
            raise _NoAnswer(
                f"status {status}: {self.clean(_message(response, answer))}",
                is_outage=status in UNREACHED,
                wait_s=_retry_after_s(response.headers.get("retry-after", "")),
            )
        if response.is_redirect:
            raise UserError(
                f"{self.url}{path}: redirects to {self.clean(response.headers.get('location', 'nowhere'))}. Set"
                " teacher.url to where the server is."
            )
        if status != httpx.codes.OK:
            raise UserError(
                f"{self.url}: refuses {method} {path} with status {status}:"
                f" {self.clean(_message(response, answer))}. {_advice(status)}"
            )
        return answer

    def _refuse_url(self, error: Exception) -> NoReturn:
        raise UserError(
            f"teacher.url: {self.url}: {one_line(error)} Write it as http://HOST:PORT or https://HOST."
        ) from None

    def _note_failure(
        self, state: tenacity.RetryCallState, deadline_s: float, outages_s: list[float]
    ) -> None:
        error = _failure(state)
        if error.is_outage:
            outages_s.append(time.monotonic())
        if state.attempt_number == 1:
            self.note(f"{self.url}: {error}; asking again for up to {deadline_s:g} s")


class _Wait(tenacity.wait.wait_base):
    """Longer each time, or as long as the server asks for; not beyond the deadline."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.grows = tenacity.wait_exponential(multiplier=0.5, max=LONGEST_WAIT_S)
        self.varies = tenacity.wait_random(0, 0.2)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        wait_s = max(self.grows(retry_state), _failure(retry_state).wait_s) + self.varies(retry_state)
        return max(min(wait_s, self.deadline_s - (retry_state.seconds_since_start or 0.0)), 0.0)


def _failure(state: tenacity.RetryCallState) -> _NoAnswer:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, _NoAnswer)  # nothing else is asked again
    return error


def _retry_after_s(header: str) -> float:
    """Seconds of a `Retry-After`, which has their number or a date (RFC 9110, 10.2.3); 0 where it has neither."""
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        date = parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return 0.0
    # A date without a zone is of UTC.
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _status_of(error: Any) -> int:
    """Of an error that a proxy passes on under a status of 200: its code, if that is a status; else 500."""
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if re.fullmatch("[45][0-9]{2}", code) else 500


def _key_of(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(
            f"teacher.api_key_variable: the environment has no {variable}. Set it to the key of the server."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"teacher.api_key_variable: the value of {variable} has characters that no key has. Set it again, without"
            " quotes or a line break."
        )
    return key


def _without_coding(response: httpx.Response) -> httpx.Headers:
    """Headers of content that has been decoded."""
    headers = response.headers.copy()
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        headers.pop(name, None)
    return headers


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _written_forms(key: str) -> list[str]:
    """The key as texts, JSON, Python and addresses write it, the longest first."""
    in_json = json.dumps(key)[1:-1]
    forms = {key, in_json, in_json.replace("/", r"\/"), repr(key)[1:-1], quote(key), quote(key, safe="")}
    return sorted(forms, key=len, reverse=True)


def _has_part(text: str, key: str) -> bool:
    """Whether as much of the key as counts can be read from a text, be it escaped twice."""
    forms = {text}
    for _ in range(2):
        forms |= {decode(form) for form in forms for decode in (html.unescape, unquote, _unescaped)}
    size = min(SECRET, len(key))
    parts = {key[start : start + size] for start in range(len(key) - size + 1)}
    return any(part in "".join(form.split()) for form in forms for part in parts)


def _unescaped(text: str) -> str:
    r"""Without the escapes of strings: \u0026, \x26, \046 and \&."""

    def character(found: re.Match[str]) -> str:
        in_hex, in_octal, itself = found[1] or found[2] or found[3], found[4], found[5]
        code = int(in_hex, 16) if in_hex else int(in_octal, 8) if in_octal else ord(itself)
        return chr(code) if code <= sys.maxunicode else ""

    escape = r"\\(?:u\{?([0-9a-fA-F]{4})\}?|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([0-7]{3})|(.))"
    return re.sub(escape, character, text)


def _message(response: httpx.Response, answer: Any) -> str:
    """The server's own words: those of the field that OpenAI's API has for them, else the beginning of its text."""
    found = answer.get("error", answer) if isinstance(answer, dict) else None
    if not found:
        return response.text.strip() or response.reason_phrase
    message = found.get("message", json.dumps(found)) if isinstance(found, dict) else found
    return str(message).rstrip(".")


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Name the environment variable with its API key in teacher.api_key_variable."
    if status in (404, 405):
        return "See teacher.url, which ends before /v1, teacher.model and teacher.api."
    return "See the settings that the server was started with."
