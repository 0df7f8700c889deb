"""The bytes on the wire: a recorded request of NeMo-Aligner's own client, plain JSON, and what is refused."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prism.rl.aligner import wire
from megatron_prism.rl.aligner.server import RewardServer

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
TOKENS = {"name": "tokens", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]}
LENGTHS = {"name": "sequence_lengths", "datatype": "INT64", "shape": [1, 1], "data": [3]}


def recorded() -> tuple[bytes, int]:
    headers = dict(line.split(": ", 1) for line in RECORDED["head"].split("\r\n")[1:])
    return base64.b64decode(RECORDED["body"]), int(headers["Inference-Header-Content-Length"])


def test_the_recorded_request_has_the_tensors_that_were_sent() -> None:
    body, header_bytes = recorded()
    request = wire.parse(body, header_bytes)
    assert [tokens_S[:length].tolist() for tokens_S, length in zip(request.tokens_BS, request.lengths_B, strict=True)] == RECORDED["rows"]
    assert request.tokens_BS.shape == (3, 64) and request.is_binary


def test_one_changed_byte_of_the_recorded_request_is_another_token() -> None:
    body, header_bytes = recorded()
    changed = bytearray(body)
    changed[header_bytes] ^= 1
    assert wire.parse(bytes(changed), header_bytes).tokens_BS[0, 0] != RECORDED["rows"][0][0]


def test_the_recorded_bytes_get_their_answer(serve: Callable[..., RewardServer]) -> None:
    server = serve()
    asked: list[np.ndarray] = []

    class Stub:
        def rewards(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
            asked.append(lengths_B)
            return np.array([1, 0, 1], np.float32)

    server.state.rewarder = Stub()  # type: ignore[assignment]
    for first in RECORDED["gets"]:
        assert exchange(server, f"{first}\r\nHost: a\r\n\r\n".encode())[0] == 200, first
    body, _ = recorded()
    status, headers, answer = exchange(server, f"{RECORDED['head']}\r\n\r\n".encode() + body)
    header_bytes = int(headers["inference-header-content-length"])
    (output,) = json.loads(answer[:header_bytes])["outputs"]
    assert status == 200 and asked[0].tolist() == [len(row) for row in RECORDED["rows"]]
    assert output == {"name": "rewards", "datatype": "FP32", "shape": [3, 1], "parameters": {"binary_data_size": 12}}
    assert np.frombuffer(answer[header_bytes:], "<f4").tolist() == [1.0, 0.0, 1.0]


def exchange(server: RewardServer, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and return the status, the headers and the body of the answer."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(request)
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def test_plain_json_is_read_flat_and_nested() -> None:
    flat = wire.parse(json.dumps({"inputs": [TOKENS, LENGTHS]}).encode(), None)
    nested = wire.parse(json.dumps({"inputs": [{**TOKENS, "data": [[1, 2, 3]]}, {**LENGTHS, "data": [[3]]}]}).encode(), None)
    assert flat.tokens_BS.tolist() == nested.tokens_BS.tolist() == [[1, 2, 3]]
    body, header_bytes = wire.respond(flat, np.array([1.0], np.float32))
    assert header_bytes is None and json.loads(body)["outputs"] == [{"name": "rewards", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]


def of(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


@pytest.mark.parametrize(
    ("body", "header_bytes", "why"),
    [
        (b"{", None, "no JSON"),
        (b"[" * 100_000, None, "no JSON"),
        (b"[]", None, "not an object"),
        (b"{}", None, "inputs is not a list"),
        (of(TOKENS), None, "no input sequence_lengths"),
        (of(TOKENS, TOKENS), None, "each once"),
        (of({**TOKENS, "name": "x"}), None, "the inputs are"),
        (of({**TOKENS, "datatype": "FP32"}), None, "datatype"),
        (of({**TOKENS, "shape": [3]}), None, "two sizes"),
        (of({**TOKENS, "shape": [1, True]}), None, "two sizes"),
        (of({**TOKENS, "shape": [2**30, 2**30]}), None, "is not"),
        (of({**TOKENS, "data": [1, 2]}), None, "is not 3 integers"),
        (of({**TOKENS, "data": [1, 2, 1.5]}), None, "is not 3 integers"),
        (of({**TOKENS, "data": [1, 2, 2**70]}), None, "is not 3 integers"),
        (of(TOKENS, {**LENGTHS, "data": [4]}), None, "outside 1 to 3"),
        (of(TOKENS, {**LENGTHS, "data": [0]}), None, "outside 1 to 3"),
        (of(TOKENS, {**LENGTHS, "shape": [2, 1], "data": [1, 1]}), None, "as tokens asks"),
        (of(TOKENS, LENGTHS, outputs=[{"name": "loss"}]), None, "only output"),
        (of({**TOKENS, "parameters": {"binary_data_size": 24}}), None, "and not both"),
        (of({"name": "tokens", "datatype": "INT64", "shape": [1, 3], "parameters": {"binary_data_size": 24}}), None, "0 are left"),
        (of(TOKENS), 10**6, "Inference-Header-Content-Length"),
        (of(TOKENS, LENGTHS) + b"xx", len(of(TOKENS, LENGTHS)), "2 bytes after"),
    ],
)
def test_a_malformed_request_is_refused_with_why(body: bytes, header_bytes: int | None, why: str) -> None:
    with pytest.raises(wire.Malformed, match=why):
        wire.parse(body, header_bytes)


def test_tritonclient_gets_its_rewards(serve: Callable[..., RewardServer], rows: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    client_of = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed: bash tools/test_nemo_aligner.sh runs it")
    server = serve()
    client = client_of.InferenceServerClient(f"127.0.0.1:{server.server_port}")
    tokens_BS, lengths_B = rows(("What is 2 + 3?\n", "5"), ("What is 2 + 3?\n", "6"))
    inputs = [client_of.InferInput("tokens", list(tokens_BS.shape), "INT64"), client_of.InferInput("sequence_lengths", [2, 1], "INT64")]
    inputs[0].set_data_from_numpy(tokens_BS)
    inputs[1].set_data_from_numpy(lengths_B[:, None])
    assert client.is_server_ready() and client.is_model_ready(wire.MODEL)
    assert client.infer(wire.MODEL, inputs).as_numpy("rewards").tolist() == [[1.0], [0.0]]
