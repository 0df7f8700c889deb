"""KServe v2 inference over HTTP, with the binary tensor extension: bytes to arrays and back. Nothing of a request is evaluated.

Source: the Open Inference Protocol's REST API; Triton's extension_binary_data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MODEL = "reward_model"
DTYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
INPUTS = {"tokens": ("INT64", "INT32"), "sequence_lengths": ("INT64", "INT32"), "sentences": ("BYTES",)}
MAX_HEADER_BYTES = 64 * 1024  # of a request with binary tensors; with plain JSON data the body is the header


class Malformed(ValueError):
    """A request that is not of the protocol, or not of this model. The message says why."""


@dataclass(frozen=True)
class Request:
    """A request for rewards.

    tokens_BS: int64, prompt and response, padded. lengths_B: int64, of prompt and response together. is_binary: how rewards are answered.
    """

    id: str
    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    is_binary: bool


def parse(body: bytes, header_bytes: int | None) -> Request:
    """Return a request's tensors. header_bytes: of its JSON, where binary tensors follow it. Raises: Malformed."""
    if header_bytes is not None and not 0 < header_bytes <= min(len(body), MAX_HEADER_BYTES):
        raise Malformed(f"Inference-Header-Content-Length {header_bytes} of a body of {len(body)} bytes, at most {MAX_HEADER_BYTES}")
    header = _json(body if header_bytes is None else body[:header_bytes])
    binary = memoryview(b"" if header_bytes is None else body)[header_bytes or 0 :]
    tensors: dict[str, np.ndarray] = {}
    for entry in _list(header, "inputs"):
        name, kind, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
        if name not in INPUTS or name in tensors:
            raise Malformed(f"input {str(name)[:80]!r}; the inputs are {', '.join(INPUTS)}, each once")
        if kind not in INPUTS[name]:
            raise Malformed(f"{name} has datatype {str(kind)[:80]!r}, not {' or '.join(INPUTS[name])}")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape)):
            raise Malformed(f"{name} has shape {str(shape)[:80]}, not two sizes above 0")
        size = _binary_size(entry)
        if size is not None:
            if size > len(binary):
                raise Malformed(f"{name} has {size} bytes, {len(binary)} are left")
            data, binary = binary[:size], binary[size:]
        if name == "sentences":  # the decoded response: it is not trusted, the tokens are decoded here
            tensors[name] = np.empty(0)
        else:
            tensors[name] = _of_json(name, entry.get("data"), shape) if size is None else _of_bytes(name, data, kind, shape)
    if len(binary):
        raise Malformed(f"{len(binary)} bytes after the last tensor")
    return _checked(header, tensors)


def _checked(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Request:
    if missing := [name for name in ("tokens", "sequence_lengths") if name not in tensors]:
        raise Malformed(f"no input {' and '.join(missing)}")
    tokens_BS, lengths_B1 = tensors["tokens"], tensors["sequence_lengths"]
    if lengths_B1.shape != (len(tokens_BS), 1):
        raise Malformed(f"sequence_lengths has shape {list(lengths_B1.shape)}, not [{len(tokens_BS)}, 1] as tokens asks")
    lengths_B = lengths_B1[:, 0]
    if lengths_B.min() < 1 or lengths_B.max() > tokens_BS.shape[1]:
        raise Malformed(f"sequence_lengths from {lengths_B.min()} to {lengths_B.max()}, outside 1 to {tokens_BS.shape[1]}")
    outputs = _list(header, "outputs") if "outputs" in header else []
    if outputs and [output.get("name") for output in outputs] != ["rewards"]:
        raise Malformed("outputs: the only output is rewards")
    asked = [_parameters(entry).get("binary_data") for entry in outputs]
    is_binary = asked[0] if asked and asked[0] is not None else _parameters(header).get("binary_data_output", False)
    return Request(str(header.get("id", ""))[:200], tokens_BS, lengths_B, bool(is_binary))


def _json(text: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON: {error}") from None
    if not isinstance(header, dict):
        raise Malformed("the JSON is not an object")
    return header


def _list(header: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = header.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Malformed(f"{name} is not a list of objects")
    return entries


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Malformed("parameters is not an object")
    return parameters


def _binary_size(entry: Mapping[str, Any]) -> int | None:
    size = _parameters(entry).get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise Malformed(f"binary_data_size {str(size)[:80]}")
    if (size is None) == ("data" not in entry):
        raise Malformed(f"{entry.get('name')} needs data or binary_data_size, and not both")
    return size


def _of_bytes(name: str, data: memoryview, kind: str, shape: list[int]) -> np.ndarray:
    if len(data) != math.prod(shape) * DTYPES[kind].itemsize:
        raise Malformed(f"{name} has {len(data)} bytes, not those of {kind} {shape}")
    return np.frombuffer(data, DTYPES[kind]).reshape(shape).astype(np.int64)


def _of_json(name: str, data: Any, shape: list[int]) -> np.ndarray:
    if isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        data = [value for row in data for value in row]
    if not isinstance(data, list) or len(data) != math.prod(shape) or not all(type(value) is int and abs(value) < 2**63 for value in data):
        raise Malformed(f"{name}: data is not {math.prod(shape)} integers")
    return np.array(data, np.int64).reshape(shape)


def respond(request: Request, rewards_B: np.ndarray) -> tuple[bytes, int | None]:
    """Return a response's body, and the bytes of its JSON where a binary tensor follows it. The output is rewards, FP32 [B, 1]."""
    output: dict[str, Any] = {"name": "rewards", "datatype": "FP32", "shape": [len(rewards_B), 1]}
    binary = rewards_B.astype("<f4").tobytes() if request.is_binary else b""
    output |= {"parameters": {"binary_data_size": len(binary)}} if request.is_binary else {"data": [float(one) for one in rewards_B]}
    header: dict[str, Any] = {"model_name": MODEL, "model_version": "1", "outputs": [output]}
    text = json.dumps({"id": request.id, **header} if request.id else header).encode()
    return text + binary, len(text) if request.is_binary else None


def metadata() -> dict[str, Any]:
    """Return the answer to GET /v2/models/reward_model."""
    inputs = [{"name": name, "datatype": kinds[0], "shape": [-1, -1 if name == "tokens" else 1]} for name, kinds in INPUTS.items()]
    outputs = [{"name": "rewards", "datatype": "FP32", "shape": [-1, 1]}]
    return {"name": MODEL, "versions": ["1"], "platform": "megatron_prism", "inputs": inputs, "outputs": outputs}


def config(max_batch: int) -> dict[str, Any]:
    """Return the answer to GET /v2/models/reward_model/config, in Triton's words: dims are without the batch."""
    optional = {"sentences"}
    inputs = [
        {
            "name": name,
            "data_type": "TYPE_STRING" if kinds[0] == "BYTES" else f"TYPE_{kinds[0]}",
            "dims": [-1 if name == "tokens" else 1],
            "optional": name in optional,
        }
        for name, kinds in INPUTS.items()
    ]
    outputs = [{"name": "rewards", "data_type": "TYPE_FP32", "dims": [1]}]
    return {"name": MODEL, "platform": "", "backend": "python", "max_batch_size": max_batch, "input": inputs, "output": outputs}
