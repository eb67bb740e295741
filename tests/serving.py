"""A server in this process that speaks what vLLM, SGLang and OpenAI speak, over a real model, with faults on request."""

from __future__ import annotations

import functools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

Json = dict[str, Any]
IMPOSSIBLE = -9999.0
"""vLLM's log-probability of what has none."""
PART = "\N{REPLACEMENT CHARACTER}"
NEUTRAL: Json = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
}
"""What vLLM and SGLang do where neither a request nor the generation config says anything."""


@functools.cache
def _loaded(folder: Path) -> tuple[Any, Any, list[str]]:
    """A model, its tokenizer and the text of each id: one for all that serve it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, [tokenizer.decode([token]) for token in range(len(tokenizer))]


class Served:
    """What is served, and what goes wrong. `fault(path, body)` names the fault of a request, or None."""

    def __init__(self, folder: Path, name: str = "served", key: str | None = None) -> None:
        self.model, self.tokenizer, texts = _loaded(folder)
        self.name, self.key, self.max_length = name, key, 512
        self.texts = [*texts]
        self.owner, self.completes = "vllm", True
        """What it says of itself, and whether it shows the last byte of a character as all of it."""
        self.known = len(self.texts)
        """Ids from here on have probability 0."""
        self.model(torch.tensor([[1, 2]]))  # what libraries do at the first call, they do in one thread
        self.fault: Callable[[str, Json], str | None] = lambda path, body: None
        self.generation: Json = {}
        """What its generation config says of sampling."""
        self.own_end = self.tokenizer.eos_token_id
        self.answers: list[list[int]] = []
        """What was written."""
        self.retry_after: str | None = None
        """Header of answers whose status is a fault."""
        self.requests: list[tuple[str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = self.connections = 0
        self.lock = threading.Lock()

    def logp(self, ids: list[int], fault: str | None, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            logits_LV = self.model(torch.tensor([ids])).logits[0]
        logits_LV[:, self.known :] = -torch.inf
        if fault == "tempered":
            logits_LV = logits_LV / max(temperature, 0.1)
        if fault == "logits":
            return logits_LV
        return logits_LV.log_softmax(-1)

    def text(self, token: int, fault: str | None) -> str:
        return self.texts[(token + (fault == "other tokenizer" and token > 40)) % len(self.texts)]

    def answer(self, path: str, body: Json, fault: str | None) -> Json:
        if path == "/v1/models":
            entry = {"id": self.name, "owned_by": self.owner, "max_model_len": self.max_length}
            return {"data": [entry]}
        if path == "/generate":
            return self.sglang(body, fault)
        return self.openai(body, fault) if body.get("echo") else self.vllm(body, fault)

    def vllm(self, body: Json, fault: str | None) -> Json:
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if k is None:
            ends = {*body["stop_token_ids"]} | ({self.own_end} if not body["ignore_eos"] else set())
            return {"choices": [{"token_ids": self.written(ids, body, body["max_tokens"], ends)}]}
        entries: list[Json | None] = [None]
        for p_V, given in zip(self.logp(ids, fault, body["temperature"]), ids[1:], strict=False):
            best = p_V.topk(min(k, len(p_V)) - (1 if fault == "fewer ids" else 0))
            found = dict(zip(best.indices.tolist(), best.values.clamp(min=IMPOSSIBLE).tolist(), strict=True))
            found[given] = float("nan") if fault == "nan" else float(p_V[given].clamp(min=IMPOSSIBLE))
            entries.append(
                {
                    str(token): {"logprob": p, "rank": 1, "decoded_token": self.text(token, fault)}
                    for token, p in found.items()
                }
            )
        if fault == "short":
            entries.pop()
        return {"choices": [{"prompt_logprobs": entries, "text": "x"}]}

    def sglang(self, body: Json, fault: str | None) -> Json:
        ids, sampling = body["input_ids"], body["sampling_params"]
        if not body.get("return_logprob"):
            # As its `check_finished`: no end at all where the own one is to be ignored.
            ends = {*sampling["stop_token_ids"], self.own_end} if not sampling["ignore_eos"] else set()
            return {"output_ids": self.written(ids, sampling, sampling["max_new_tokens"], ends)}
        start, k = body["logprob_start_len"], body["top_logprobs_num"]

        def text(token: int) -> str | None:
            return self.text(token, fault) if body["return_text_in_logprobs"] else None

        given: list[Any] = [[None, ids[start], text(ids[start])]]
        likeliest: list[Any] = [None]
        logp_LV = self.logp(ids, fault, sampling["temperature"])
        for place in range(start, len(ids) - 1):
            p_V, token = logp_LV[place], ids[place + 1]
            best = p_V.topk(min(k, self.known))
            given.append([float(p_V[token]), token, text(token)])
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            likeliest.append([[p, each, text(each)] for p, each in pairs])
        if fault == "short":
            given.pop()
        return {"meta_info": {"input_token_logprobs": given, "input_top_logprobs": likeliest}}

    def openai(self, body: Json, fault: str | None) -> Json:
        ids, k = body["prompt"], body["logprobs"]
        logp_LV = self.logp(ids, fault, body["temperature"])
        new = int(logp_LV[-1].argmax())
        names: list[str] = [self.named(ids[0], [], body, fault)]
        given, likeliest = [None], [None]
        for place, token in enumerate([*ids[1:], new]):
            p_V = logp_LV[place].clamp(min=IMPOSSIBLE)
            best, name = p_V.topk(k), partial(self.named, before=ids[: place + 1], body=body, fault=fault)
            names.append(name(token))
            given.append(float(p_V[token]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            likeliest.append({name(token): float(p_V[token])} | {name(each): p for each, p in pairs})
        return {
            "choices": [{"logprobs": {"tokens": names, "token_logprobs": given, "top_logprobs": likeliest}}]
        }

    def named(self, token: int, before: list[int], body: Json, fault: str | None) -> str:
        """What stands for an id where OpenAI's API has texts."""
        if self.owner == "vllm" and body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        text = self.text(token, fault)
        if not (self.completes and text.endswith(PART)):
            return text
        # As vLLM's `_correct_decoded_token`: the character that ends here, or nothing.
        for count in range(1, 5):
            whole: str = self.tokenizer.decode([*before[-count:], token])
            if not whole.endswith(PART):
                return whole[-1:]
        return ""

    def written(self, ids: list[int], how: Json, count: int, ends: set[int]) -> list[int]:
        """Greedy, or by its own seed and the place; what the request leaves out is the generation config's."""
        how = NEUTRAL | self.generation | {name: value for name, value in how.items() if value is not None}
        new: list[int] = []
        while len(new) < count and not (new and new[-1] in ends):
            logp_V = self.logp([*ids, *new], None, 1.0)[-1].double()
            seen, times_V = [*{*ids, *new}], torch.bincount(torch.tensor(new).long(), minlength=len(logp_V))
            logp_V[seen] *= how["repetition_penalty"]
            logp_V -= how["frequency_penalty"] * times_V + how["presence_penalty"] * (times_V > 0)
            new.append(self.drawn(logp_V, how, len(ids) + len(new)))
        self.answers.append(new)
        return new

    def drawn(self, logp_V: torch.Tensor, how: Json, place: int) -> int:
        if not how["temperature"]:
            return int(logp_V.argmax())
        p_V = (logp_V / how["temperature"]).softmax(-1)
        order = p_V.sort(descending=True)
        before_V = (order.values.cumsum(0) - order.values) / order.values.sum()
        keep_V = (before_V < how["top_p"]) & (order.values >= how["min_p"] * order.values[0])
        keep_V[how["top_k"] if how["top_k"] > 0 else len(keep_V) :] = False
        generator = torch.Generator().manual_seed(how.get("seed", how.get("sampling_seed", 0)) + place)
        return int(order.indices[torch.multinomial(order.values * keep_V, 1, generator=generator)])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet: a second one would wait for the first to be confirmed
    disable_nagle_algorithm = True
    served: Served

    def setup(self) -> None:
        super().setup()
        with self.served.lock:
            self.served.connections += 1

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.handle_one({})

    def do_POST(self) -> None:
        self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_one(self, body: Json) -> None:
        served = self.served
        with served.lock:
            served.requests.append((self.path, body))
            served.headers.append(dict(self.headers))
            served.in_flight += 1
            served.most_in_flight = max(served.most_in_flight, served.in_flight)
            fault = served.fault(self.path, body)
        try:
            self.respond(body, fault)
        finally:
            with served.lock:
                served.in_flight -= 1

    def respond(self, body: Json, fault: str | None) -> None:
        served = self.served
        if fault == "late":
            time.sleep(0.5)
        given = self.headers.get("Authorization", "")
        if (served.key is not None and given != f"Bearer {served.key}") or fault == "echo":
            self.send({"error": {"message": f"no such key: {given} in {dict(self.headers)}"}}, 401)
        elif fault is not None and fault.isdigit():
            message = {"400": "logprobs: at most 20"}.get(fault, "out of memory")
            self.send({"error": {"message": message}}, int(fault), retry_after=served.retry_after)
        elif fault is not None and fault.startswith("200 "):
            code = int(fault.split()[1])
            self.send({"error": {"message": "Provider returned error: overloaded", "code": code}}, 200)
        elif fault == "moved":
            self.send_response(307)
            self.send_header("Location", "http://elsewhere.example/v1")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "gone":
            self.close_connection = True
            self.connection.close()
        else:
            self.send(
                served.answer(self.path, body, fault), 200, is_cut=fault == "cut", drips=fault == "drip"
            )

    def send(
        self,
        tree: Json | str,
        status: int,
        is_cut: bool = False,
        drips: bool = False,
        retry_after: str | None = None,
    ) -> None:
        content = (tree if isinstance(tree, str) else json.dumps(tree)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        for start in range(0, len(content), 64) if drips else ():
            self.wfile.write(content[start : start + 64])
            self.wfile.flush()
            time.sleep(0.05)
        self.wfile.write(content[: len(content) // 2] if is_cut else b"" if drips else content)
        if is_cut:
            self.close_connection = True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """A connection that the other side has closed."""


@contextmanager
def serving(
    served: Served, port: int = 0, certificate: tuple[Path, Path] | None = None, host: str = "127.0.0.1"
) -> Iterator[str]:
    """The address of a server that ends with the block; https with a certificate and its key."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = type("Listening", (_Quiet,), {"address_family": family})
    server = listening((host, port), type("Handler", (Handler,), {"served": served}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        name = f"[{host}]" if ":" in host else host
        yield f"http{'s' * (certificate is not None)}://{name}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
