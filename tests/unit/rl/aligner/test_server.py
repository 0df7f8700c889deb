"""The reward server as a client sees it: verdicts, faults, refusals, the token, its limits, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.rl.aligner import forward
from megatron_prism.rl.aligner.reward import Rewarder
from megatron_prism.rl.aligner.server import Limits, RewardServer, is_loopback
from tests.unit.rl.aligner.conftest import is_gold

Rows = Callable[..., tuple[np.ndarray, np.ndarray]]
Serve = Callable[..., RewardServer]
INFER = "/v2/models/reward_model/infer"
FIVE, PRODUCT = "What is 2 + 3?\n", "The product of 4 and 7:\n"
SECRET = "0123456789abcdef-secret"


def request_of(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> bytes:
    tokens = {"name": "tokens", "datatype": "INT64", "shape": list(tokens_BS.shape), "data": tokens_BS.ravel().tolist()}
    lengths = {"name": "sequence_lengths", "datatype": "INT64", "shape": [len(lengths_B), 1], "data": lengths_B.tolist()}
    return json.dumps({"inputs": [tokens, lengths]}).encode()


def ask(server: RewardServer, body: bytes, path: str = INFER, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def rewards(answer: tuple[int, Any]) -> list[float]:
    assert answer[0] == 200, answer
    return list(answer[1]["outputs"][0]["data"])


def test_rewards_are_those_of_the_rows_problems(serve: Serve, rows: Rows) -> None:
    body = request_of(*rows((FIVE, "5"), (PRODUCT, "5"), (PRODUCT, "28"), ("Which? A or B?\n", "B")))
    assert rewards(ask(serve(), body)) == [1.0, 0.0, 1.0, 1.0]


def test_a_response_that_did_not_end_is_told_to_the_grader(serve: Serve, rows: Rows) -> None:
    assert rewards(ask(serve(), request_of(*rows((FIVE, "5"), end=False)))) == [0.0]


def test_what_stands_behind_the_length_is_not_read(serve: Serve, rows: Rows) -> None:
    tokens_BS, lengths_B = rows((FIVE, "5"))
    tokens_BS[0, lengths_B[0] :] = 77
    assert rewards(ask(serve(), request_of(tokens_BS, lengths_B))) == [1.0]


def test_a_fault_is_retried_and_then_503_never_a_reward(serve: Serve, rows: Rows) -> None:
    calls: list[list[str]] = []

    def faulty(until: int, items: Sequence[Item]) -> dict[str, Graded]:
        calls.append([item.id for item in items])
        if len(calls) == 1:
            raise OSError("the sandbox is gone")
        graded = is_gold(items)
        if len(calls) < until:
            graded["1"] = Graded(id="1", outcome="fault", why="killed")
        return graded

    body = request_of(*rows((FIVE, "5"), (FIVE, "5")))
    assert rewards(ask(serve(lambda items: faulty(3, items)), body)) == [1.0, 1.0]
    assert calls == [["0", "1"], ["0", "1"], ["1"]]  # what has a verdict is not graded again
    calls.clear()
    status, answer = ask(serve(lambda items: faulty(9, items)), body)
    assert status == 503 and "1 of 2 responses" in answer["error"]


def test_an_outcome_that_is_left_out_is_a_fault(serve: Serve, rows: Rows) -> None:
    assert ask(serve(lambda items: {}), request_of(*rows((FIVE, "5"))))[0] == 503


def test_an_unknown_prompt_is_422_by_row(serve: Serve, rows: Rows) -> None:
    status, answer = ask(serve(), request_of(*rows((FIVE, "5"), ("Who?\n", "5"))))
    assert status == 422 and "row 1" in answer["error"]
    tokens_BS, lengths_B = rows((FIVE, "5"))
    tokens_BS[0, 0] = 10**9
    assert ask(serve(), request_of(tokens_BS, lengths_B))[0] == 422


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"no json", 400),
        ({"Inference_Header_Content_Length": "x"}, b"{}", 400),
        ({"Inference_Header_Content_Length": "99"}, b"{}", 400),
        ({"Content_Encoding": "gzip"}, b"{}", 400),
        ({"Content_Length": "-1"}, b"", 400),
        ({"Content_Length": str(10**9)}, b"", 413),
    ],
)
def test_a_bad_request_is_refused(serve: Serve, headers: dict[str, str], body: bytes, status: int) -> None:
    code, answer = ask(serve(), body, **headers)
    assert code == status and answer["error"]


def test_no_other_route(serve: Serve) -> None:
    assert ask(serve(), b"{}", "/v2/models/other/infer")[0] == 404


def test_a_foreign_address_needs_a_token(rewarder: Callable[..., Rewarder]) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(InputError, match="a loopback address, or a token"):
            RewardServer(host, 0, rewarder())
    with pytest.raises(InputError, match="at least 16"):
        RewardServer("0.0.0.0", 0, rewarder(), "short")
    assert is_loopback("127.9.9.9") and is_loopback("::1") and is_loopback("localhost")


def test_with_a_token_every_request_needs_it(serve: Serve, rows: Rows) -> None:
    server, body = serve(host="0.0.0.0", token=SECRET), request_of(*rows((FIVE, "5")))
    assert ask(server, body)[0] == 401
    assert ask(server, body, Authorization=f"Bearer {SECRET}x")[0] == 401
    assert rewards(ask(server, body, Authorization=f"Bearer {SECRET}")) == [1.0]


def test_the_forwarder_carries_the_token(serve: Serve, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = f"127.0.0.1:{serve(token=SECRET).server_port}"
    body = request_of(*rows((FIVE, "5"), (FIVE, "6")))
    assert forward.ask(upstream, "POST", INFER, body, {})[0] == 401
    monkeypatch.setenv("PRISM_REWARD_TOKEN", SECRET)
    status, answer, _ = forward.ask(upstream, "POST", INFER, body, {})
    assert status == 200 and json.loads(answer)["outputs"][0]["data"] == [1.0, 0.0]


def test_a_client_that_stops_in_the_middle_holds_nothing(serve: Serve, rows: Rows) -> None:
    server = serve(limits=Limits(num_requests=1, read_s=0.3))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as slow:
        slow.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(100)
    assert rewards(ask(server, request_of(*rows((FIVE, "5"))))) == [1.0]


def test_a_client_whose_headers_drip_in_holds_no_connection(serve: Serve) -> None:
    server = serve(limits=Limits(num_connections=1, read_s=0.5))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as slow:
        slow.sendall(b"GET /v2/health/ready HTTP/1.1\r\n")
        slow.settimeout(0.1)
        said = b""
        for number in range(30):  # each line comes well within the time
            with contextlib.suppress(TimeoutError, ConnectionError):
                slow.sendall(b"X-%d: 1\r\n" % number)
                said = said or slow.recv(100)
            if said:
                break
        assert b" 408 " in said
    assert ask(server, b"{}")[0] == 400


def test_connections_beyond_the_limit_are_told_to_come_again(serve: Serve) -> None:
    server = serve(limits=Limits(num_connections=1, read_s=5.0))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20):
        time.sleep(0.1)  # its thread is the only one allowed
        assert ask(server, b"{}")[0] == 503
    assert ask(server, b"{}")[0] == 400


def test_many_at_once_each_get_their_own(serve: Serve, rows: Rows) -> None:
    server = serve()
    answers: dict[int, list[float]] = {}

    def one(number: int) -> None:
        pairs = [(FIVE, "5" if (number >> bit) & 1 else "6") for bit in range(4)]
        answers[number] = rewards(ask(server, request_of(*rows(*pairs))))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [float((number >> bit) & 1) for bit in range(4)] for number in range(16)}


def test_a_port_in_use_is_told(serve: Serve, rewarder: Callable[..., Rewarder]) -> None:
    with pytest.raises(EnvironmentFault, match="choose another --port"):
        RewardServer("127.0.0.1", serve().server_port, rewarder())


def test_the_forwarder_needs_nothing_of_this_project() -> None:
    text = Path(forward.__file__).read_text()
    assert "megatron_prism" not in text and "numpy" not in text
