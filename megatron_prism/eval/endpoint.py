"""A model served elsewhere, behind an `openai`-style interface, as what answers requests: only the standard library, one address, no proxy.

A request that fails is sent again, after waits that double. One that fails to the end is a fault, in words, and no wrong answer. Where no
server answers, where every request of a shard of 8 and more fails, or the server refuses the token or the model, the evaluation ends, and goes on
when it is started again.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import EndpointConfig
from megatron_prism.core.errors import EnvironmentFault, Problem, printable
from megatron_prism.core.manifest import sha256_json
from megatron_prism.data import tokenizer
from megatron_prism.eval.question import Question
from megatron_prism.eval.requests import Request, turns_of

ENDED = {"stop": "end_token", "length": "max_tokens"}  # finish_reason, in the engine's words
MAX_ANSWER_BYTES = 64 << 20
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
MANY = 8  # requests: where so many fail together, the server is at fault and no prompt
REFUSED = (301, 302, 303, 307, 308, 401, 403, 404)  # of every request alike
TOKEN = re.compile(r"[!-~]+")
AGAIN = (408, 409, 425, 429)  # and 500 to 599


class _Failed(Exception):
    """A request failed. is_final: sending it again would not help. is_refused: nor would any other. is_unreachable: no server answered."""

    def __init__(self, why: str, is_final: bool = False, is_refused: bool = False, wait_s: float = 0.0, is_unreachable: bool = False):
        super().__init__(why)
        self.is_final, self.is_refused, self.wait_s, self.is_unreachable = is_final, is_refused, wait_s, is_unreachable


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: the token is for one address."""
        return None


def identity(config: EndpointConfig) -> dict[str, Any]:
    """Return what the evaluation is of. The weights are not known: address, name and interface stand for them."""
    named = {"url": config.url, "model": config.model, "api": config.api}
    return {"kind": "endpoint", "path": f"{config.model} at {config.url}", **named, "sha256": sha256_json(named)}


def check(config: EndpointConfig, questions: Iterable[Question] = ()) -> list[Problem]:
    """Return what no request can be made of: an address, a token, or questions that are turns where the server continues a text."""
    problems, name = [], config.token_variable
    try:
        parts = urllib.parse.urlsplit(config.url)
        is_address = bool(parts.hostname) and parts.port != 0 and config.url.isascii() and not (parts.query or parts.fragment)
    except ValueError:  # a port that is no number, an open bracket
        is_address = False
    if "@" in config.url.split("/")[2]:  # which files and messages would show
        where, found = "model.endpoint.url", "an address that holds a name or a password"
        problems.append(Problem(where, found, "http://HOST:PORT/v1, and the token in a variable", "model.endpoint.token_variable"))
    elif not is_address:
        problems.append(Problem("model.endpoint.url", config.url, "an address in ASCII, as http://HOST:PORT/v1"))
    if name is not None and not (token := os.environ.get(name, "")):
        problems.append(
            Problem("model.endpoint.token_variable", f"{name}, which is not set", "a variable with the token", f"export {name}")
        )
    elif name is not None and not TOKEN.fullmatch(token):  # which a message must not show
        found = f"{name}, whose value has a line break, a blank or another character that no token has"
        problems.append(Problem("model.endpoint.token_variable", found, "the token alone"))
    if config.api == "completions" and (turns := next((one.id for one in questions if not isinstance(one.prompt, str)), None)):
        problems.append(
            Problem("model.endpoint.api", f"completions, and question {turns}, which is turns", "chat, or prompts that are a text")
        )
    return problems


def counter(config: EndpointConfig | None) -> Callable[[str], int]:
    """Return what counts a prompt's tokens, by the tokenizer that the config names."""
    assert config is not None and config.tokenizer is not None
    spec = tokenizer.load(config.tokenizer)
    return lambda text: len(tokenizer.encode_prompt(text, spec))


@dataclass(frozen=True)
class Endpoint:
    """A sampler (sample.Sampler) that asks a server. first_wait_s: before a request is sent again."""

    config: EndpointConfig
    first_wait_s: float = FIRST_WAIT_S

    def sample(self, shard: Sequence[Request] | None) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the responses of a shard, and the faults in words. Raises: EnvironmentFault where the server is down, or refuses all."""
        assert shard is not None
        with ThreadPoolExecutor(self.config.num_requests, "endpoint") as pool:
            answers = list(pool.map(partial(self._ask, told={}), shard))
        samples = {one.key: answer for one, answer in zip(shard, answers, strict=True) if isinstance(answer, dict)}
        faults = {one.key: str(answer) for one, answer in zip(shard, answers, strict=True) if isinstance(answer, _Failed)}
        refused = next((answer for answer in answers if isinstance(answer, _Failed) and answer.is_refused), None)
        is_down = not samples and (len(shard) >= MANY or all(isinstance(answer, _Failed) and answer.is_unreachable for answer in answers))
        if refused is not None or is_down:
            raise EnvironmentFault(f"{self.config.url}: {refused or next(iter(faults.values()))}; the same command goes on")
        return samples, faults

    def _ask(self, request: Request, told: dict[int, str]) -> dict[str, Any] | _Failed:
        """Return an answer, or the last failure. told: of a shard, by the number of the try, the one request whose wait is logged."""
        wait_s = self.first_wait_s
        for attempt in range(1 + self.config.num_retries):
            try:
                return _sample(self._post(request), self.config.api)
            except _Failed as failure:
                if failure.is_final or attempt == self.config.num_retries:
                    return failure
                waits = min(max(wait_s, failure.wait_s), LONGEST_WAIT_S)
                if told.setdefault(attempt, request.key) == request.key:  # many fail together
                    said, number = printable(str(failure)), f"{attempt + 1} of {self.config.num_retries}"
                    log.get().warning("%s: %s; asked again in %.0f s (%s)", self.config.url, said, waits, number)
                time.sleep(waits)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("a loop that always returns")

    def _post(self, request: Request) -> Any:
        path, prompt = "completions", {"prompt": request.asked.question.prompt}
        if self.config.api == "chat":
            path, prompt = "chat/completions", {"messages": list(turns_of(request.asked.question))}  # type: ignore[dict-item]
        sampling = request.sampling
        drawn = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed >> 32,
        }
        body = json.dumps({"model": self.config.model, **prompt, **drawn, "n": 1}).encode()
        headers = {"Content-Type": "application/json"}
        if self.config.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.config.token_variable]}"
        sent = urllib.request.Request(f"{self.config.url.rstrip('/')}/{path}", body, headers, method="POST")
        ends = time.monotonic() + self.config.timeout_s
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        try:
            with opener.open(sent, timeout=self.config.timeout_s) as answer:
                text = _body(answer, ends)
        except urllib.error.HTTPError as error:
            said = _said(error)
            is_final = error.code < 500 and error.code not in AGAIN
            raise _Failed(
                f"HTTP {error.code}: {said}", is_final, error.code in REFUSED, _seconds(error.headers.get("Retry-After"))
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"{type(error).__name__}: {error}"[:200], is_unreachable=True) from None
        if len(text) > MAX_ANSWER_BYTES:
            raise _Failed(f"an answer of more than {MAX_ANSWER_BYTES} bytes", is_final=True)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Failed(f"no JSON: {error}"[:200]) from None


def _body(answer: Any, ends: float) -> bytes:
    """Return an answer's body, up to more than is taken. Raises: TimeoutError where it still drips in when its time is over."""
    text = bytearray()
    while len(text) <= MAX_ANSWER_BYTES and (part := answer.read1(1 << 16)):
        text += part
        if time.monotonic() > ends:
            raise TimeoutError("the answer is not whole in time")
    return bytes(text)


def _said(error: urllib.error.HTTPError) -> str:
    """Return what a server says of its refusal. Its connection may break behind the status."""
    if place := error.headers.get("Location"):
        return f"a redirection to {place[:200]}, which is not followed"
    try:
        return " ".join(error.read(500).decode("utf-8", "replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return "no words"


def _sample(answer: Any, api: str) -> dict[str, Any]:
    """Return an answer as a kept response. A server that parses the thinking out gives it back between its tags. Raises: _Failed."""
    try:
        choice = answer["choices"][0]
        text = choice["text"] if api == "completions" else choice["message"].get("content") or ""
        thinking = "" if api == "completions" else choice["message"].get("reasoning_content") or choice["message"].get("reasoning") or ""
        ended, num_tokens = ENDED[choice["finish_reason"]], int((answer.get("usage") or {}).get("completion_tokens") or 0)
        if not isinstance(text, str) or not isinstance(thinking, str):
            raise TypeError("no text")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _Failed(f"an answer without choices, text and finish_reason stop or length ({type(error).__name__}: {error})"[:200]) from None
    whole = f"<think>{thinking}</think>{text}" if thinking else text
    plain = whole.encode("utf-8", "replace").decode()  # no lone surrogates
    return {"text": plain, "num_tokens": num_tokens, "ended": ended, "mean_logprob": None}


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date
        return 0.0
