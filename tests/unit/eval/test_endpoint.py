"""A model served elsewhere: a failing server is asked again, a fault is a fault, and the token goes to one address only."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_prism.core.config import EndpointConfig
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.eval import endpoint
from megatron_prism.eval.endpoint import Endpoint
from megatron_prism.eval.question import Question
from megatron_prism.eval.requests import Asked, Request
from megatron_prism.generate.engine import Sampling

STALL, DRIP = b"stall" * 9, b"drip" * 99  # the answer's body does not come; it comes as blanks, one by one
Reply = Callable[[dict[str, Any], int], tuple[int, Any]]


def text(words: str, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"text": words, "finish_reason": reason}], "usage": {"completion_tokens": 3}}


@pytest.fixture
def server() -> Iterator[Any]:
    """Return a server on this machine: `reply` decides what it answers to a body that comes for the n-th time, `seen` is what came."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            one.seen.append((self.path, body, self.headers.get("Authorization")))  # type: ignore[attr-defined]
            status, answer = one.reply(body, sum(other == body for _, other, _ in one.seen))  # type: ignore[attr-defined]
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{one.server_port}/v1/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if data == DRIP:
                while not one.ended.wait(0.1):  # type: ignore[attr-defined]
                    self.wfile.write(b" ")
                return
            if data == STALL:
                one.ended.wait(20)  # type: ignore[attr-defined]
                return
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.ended = threading.Event()  # type: ignore[attr-defined]
    one.seen, one.reply = [], lambda body, times: (200, text("42"))  # type: ignore[attr-defined]
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.ended.set()  # type: ignore[attr-defined]
    one.shutdown()
    one.server_close()


def ask(server: Any, count: int = 3, **changes: Any) -> tuple[dict[str, Any], dict[str, str]]:
    given = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "num_retries": 2, "num_requests": 2, **changes}
    shard = [
        Request(
            "t",
            Asked(Question(id=f"q{n}", prompt=f"P{n}", kind="math", gold="1"), 9, ""),
            0,
            n << 40,
            Sampling(max_tokens=9, top_p=0.9),
            f"k{n}",
        )
        for n in range(count)
    ]
    return Endpoint(EndpointConfig(**given), first_wait_s=0.01).sample(shard)


def test_each_request_has_its_own_seed_and_answers_are_joined_by_key(server: Any) -> None:
    server.reply = lambda body, times: (200, text(body["prompt"].lower(), "length" if body["prompt"] == "P1" else "stop"))
    samples, faults = ask(server)
    assert not faults and {key: one["text"] for key, one in samples.items()} == {"k0": "p0", "k1": "p1", "k2": "p2"}
    assert [samples[key]["ended"] for key in ("k0", "k1")] == ["end_token", "max_tokens"] and samples["k0"]["num_tokens"] == 3
    paths, bodies, tokens = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/completions"} and set(tokens) == {None} and len({body["seed"] for body in bodies}) == 3
    assert {key: bodies[0][key] for key in ("model", "max_tokens", "temperature", "top_p", "n")} == {
        "model": "m", "max_tokens": 9, "temperature": 0.0, "top_p": 0.9, "n": 1
    }  # fmt: skip


def test_what_fails_is_asked_again_and_what_fails_to_the_end_is_a_fault(server: Any) -> None:
    """Trap 5: an infrastructure fault is retried, then a fault."""
    broken = {"P0": [(503, b"busy"), (200, b"no JSON")], "P1": [(500, b"no")] * 3, "P2": [(400, b"too long")]}
    server.reply = lambda body, times: (broken[body["prompt"]] + [(200, text("7"))])[times - 1]
    samples, faults = ask(server)
    assert list(samples) == ["k0"] and samples["k0"]["text"] == "7"
    assert faults["k1"].startswith("HTTP 500: no") and faults["k2"].startswith("HTTP 400: too long")
    asked = [body["prompt"] for _, body, _ in server.seen]
    assert {prompt: asked.count(prompt) for prompt in broken} == {"P0": 3, "P1": 3, "P2": 1}


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://a:b/v1", "http://:80/v1", "http://a/v1?b=c", "http://u:sesame@a/v1", "http://a/v\u00fc"]
)
def test_an_address_that_is_none_and_turns_without_a_template_are_refused(url: str) -> None:
    turns = Question(id="q", prompt=({"role": "user", "content": "x"},), kind="math", gold="1")
    given = EndpointConfig(url=url, model="m")
    problems = endpoint.check(given, [turns])
    assert [problem.where for problem in problems] == ["model.endpoint.url", "model.endpoint.api"] and "sesame" not in str(problems)
    assert not endpoint.check(EndpointConfig(url="http://[::1]:80/v1", model="m", api="chat"), [turns])


def test_an_answer_that_drips_in_ends_with_its_time(server: Any) -> None:
    server.reply = lambda body, times: (200, DRIP) if body["prompt"] == "P0" else (200, text("1"))
    samples, faults = ask(server, timeout_s=0.5, num_retries=0)
    assert set(samples) == {"k1", "k2"} and "TimeoutError: the answer is not whole in time" in faults["k0"]


def test_a_connection_that_breaks_behind_the_status_is_a_fault(server: Any) -> None:
    server.reply = lambda body, times: (500, STALL) if body["prompt"] == "P0" else (200, text("1"))
    samples, faults = ask(server, timeout_s=0.3, num_retries=0)
    assert set(samples) == {"k1", "k2"} and faults["k0"].startswith("HTTP 500")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        text("x", "content_filter"),
        {"choices": [{"text": 3, "finish_reason": "stop"}]},
        {**text("x"), "usage": {"completion_tokens": float("inf")}},
    ],
)
def test_an_answer_that_is_none_is_no_wrong_response(server: Any, answer: Any) -> None:
    server.reply = lambda body, times: (200, answer if body["prompt"] == "P0" else text("1"))
    samples, faults = ask(server)
    assert list(faults) == ["k0"] and set(samples) == {"k1", "k2"}


def test_no_server_ends_the_evaluation(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each wait is said, once for all requests that wait."""
    with pytest.raises(EnvironmentFault, match=r"URLError.*the same command goes on"):
        ask(server, 3, url="http://127.0.0.1:9/v1")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("http://127.0.0.1:9/v1: URLError" in one for one in said) and said[1].endswith("(2 of 2)")


@pytest.mark.parametrize(("status", "count"), [(401, 2), (404, 2), (302, 2), (500, 24)])
def test_a_server_that_refuses_all_ends_the_evaluation(server: Any, status: int, count: int) -> None:
    server.reply = lambda body, times: (status, b"no")
    with pytest.raises(EnvironmentFault, match=f"HTTP {status}.*the same command goes on"):
        ask(server, 8)
    assert len(server.seen) >= count and not any("elsewhere" in path for path, _, _ in server.seen)  # no redirection is followed


def test_the_token_is_sent_and_never_said(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = EndpointConfig(url="http://a", model="m", token_variable="PRISM_TEST_TOKEN")
    monkeypatch.delenv("PRISM_TEST_TOKEN", raising=False)
    assert [problem.where for problem in endpoint.check(given)] == ["model.endpoint.token_variable"]
    for token in ("sesame\n", "sesame\u201d", "sesame seed"):
        monkeypatch.setenv("PRISM_TEST_TOKEN", token)
        (problem,) = endpoint.check(given)
        assert "PRISM_TEST_TOKEN" in problem.found and "sesame" not in str(problem)
    monkeypatch.setenv("PRISM_TEST_TOKEN", "sesame")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy that is not there
    assert not endpoint.check(given) and "sesame" not in json.dumps(endpoint.identity(given))
    assert len(ask(server, token_variable="PRISM_TEST_TOKEN")[0]) == 3
    assert {token for _, _, token in server.seen} == {"Bearer sesame"}


def test_a_chats_thinking_comes_back_between_its_tags(server: Any) -> None:
    message = {"content": "7", "reasoning_content": "3 + 4"}
    server.reply = lambda body, times: (200, {"choices": [{"message": message, "finish_reason": "stop"}]})
    samples, _ = ask(server, 1, api="chat")
    path, body, _ = server.seen[0]
    assert samples["k0"]["text"] == "<think>3 + 4</think>7" and path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "P0"}] and "prompt" not in body
