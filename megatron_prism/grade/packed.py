"""Cases of tests that stay packed until they are run: LiveCodeBench's are gigabytes, and every process of a gang holds its questions.

They stay as they were published: base64 of zlib of a pickle of one text, which is JSON. The pickle is read by its opcodes, never run.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 1 << 30  # of one problem's tests, unpacked
TEXT = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
AROUND = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP")  # what pickle.dumps writes around one text


def with_cases(tests: Mapping[str, Any]) -> dict[str, Any]:
    """Return tests whose packed cases follow the plain ones in `cases`.

    Raises: ValueError where the packed ones are no list.
    """
    cases = unpacked(tests["packed_cases"])
    if not isinstance(cases, list):
        raise ValueError(f"packed cases that are a {type(cases).__name__}, not a list")
    return {**{key: value for key, value in tests.items() if key != "packed_cases"}, "cases": [*tests.get("cases", ()), *cases]}


def unpacked(text: str) -> Any:
    """Return the tests of a problem, which are JSON in the older files of the set.

    Raises: ValueError for anything but JSON, or a packed pickle of one text that is JSON.
    """
    if text.lstrip()[:1] in ("[", "{"):
        return json.loads(text)
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"neither JSON nor base64 of zlib: {error}") from None
    if not decompressor.eof:
        raise ValueError(f"zlib data that are cut, or more than {MAX_BYTES >> 30} GiB")
    return json.loads(text_in_pickle(data))


def text_in_pickle(data: bytes) -> str:
    """Return the text that a pickle of one text holds, by its opcodes alone.

    Raises: ValueError for a pickle of anything else.
    """
    texts: list[str] = []
    end = 0
    for operation, argument, position in pickletools.genops(data):
        if operation.name in TEXT:
            texts.append(str(argument))
        elif operation.name not in AROUND:
            raise ValueError(f"a pickle with {operation.name}, not of one text alone: loading it could run code")
        end = (position or 0) + 1
    if len(texts) != 1 or end != len(data):
        raise ValueError(f"a pickle of {len(texts)} texts, with {len(data) - end} bytes after it; not of one text alone")
    return texts[0]
