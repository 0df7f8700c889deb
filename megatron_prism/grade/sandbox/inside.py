"""What runs inside the sandbox, as the text of `python -c`: limits, containment, and the roles program, answer and judge.

A program is run with its stdin and stdout. An answer and its judge are two sandboxes joined by two pipes (exchange.py): the answer runs the judged
code and answers calls; the judge runs the tests, where the judged code never is. What crosses are values of built-in types (`encode`), so an
`__eq__` of the answer's own, its patches of builtins and its prints do not reach the judge. The judge's verdict leaves by a pipe that only the
judge has.

This text is compiled in each run: it imports what each interpreter has imported, and what only some runs need comes with the job (`load`).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's would cost more than all the rest of a start
if TYPE_CHECKING:
    from typing import Any

# Python's own 4,300 end right programs. Source: LiveCodeBench, lcb_runner/evaluation/compute_code_generation_metrics.py
MAX_INT_DIGITS = 50_000


class Ref:
    """An object that stays with the answer, by its number there."""

    def __init__(self, number: int):
        self.number = number


class NotPlain(Exception):
    """A value of the tests cannot be handed to the answer."""


def encode(value: Any, keep: Any = None) -> bytes:
    """Return a value of built-in types as bytes. keep(value) -> its number, for a value of any other type.

    Raises: NotPlain: a value of another type, without keep.
    """
    if value is None or value is True or value is False:
        return {None: b"N", True: b"T", False: b"F"}[value]
    if isinstance(value, int):
        return b"i%s;" % format(int(value), "x").encode()
    if isinstance(value, float):
        return b"f%s;" % float.hex(value).encode()
    if isinstance(value, complex):
        return b"c" + encode(value.real) + encode(value.imag)
    if isinstance(value, str):
        text = str.encode(value, "utf-8", "surrogatepass")
        return b"s%d;" % len(text) + text
    if isinstance(value, (bytes, bytearray)):
        return b"b%d;" % len(value) + bytes(value)
    if isinstance(value, dict):
        return b"d%d;" % len(value) + b"".join(encode(key, keep) + encode(item, keep) for key, item in value.items())
    for kind, tag in ((list, b"l"), (tuple, b"t"), (set, b"e"), (frozenset, b"z")):
        if isinstance(value, kind):
            return tag + b"%d;" % len(value) + b"".join(encode(item, keep) for item in value)
    if isinstance(value, Ref):
        return b"r%d;" % value.number
    if keep is None:
        raise NotPlain(f"a value of type {type(value).__name__} cannot be handed to the answer")
    return b"r%d;" % keep(value)


def decode(data: bytes, make: Any = Ref) -> Any:
    """Return the value that `encode` wrote; make(number) stands for an object that stayed with the answer.

    Raises: ValueError, IndexError, TypeError, RecursionError: data that `encode` does not write.
    """
    value, end = _decode(data, 0, make)
    if end != len(data):
        raise ValueError("bytes after the value")
    return value


def _decode(data: bytes, at: int, make: Any) -> tuple[Any, int]:
    tag = data[at : at + 1]
    at += 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag == b"c":
        real, at = _decode(data, at, make)
        imag, at = _decode(data, at, make)
        return complex(real, imag), at
    end = data.index(b";", at)
    field, at = data[at:end].decode("ascii"), end + 1
    if tag == b"i":
        return int(field, 16), at
    if tag == b"f":
        return float.fromhex(field), at
    number = int(field)
    if tag == b"r":
        return make(number), at
    if tag in (b"s", b"b"):
        part = data[at : at + number]
        if len(part) != number:
            raise ValueError("cut off")
        return (part.decode("utf-8", "surrogatepass") if tag == b"s" else part), at + number
    items = []
    for _ in range(2 * number if tag == b"d" else number):
        item, at = _decode(data, at, make)
        items.append(item)
    if tag == b"d":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    kinds: dict[bytes, Any] = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}
    return kinds[tag](items), at


def run_program(source: str, name: str = "__main__") -> dict[str, Any]:
    """Run a source as the main module, or as an imported one of another name, and return its names."""
    known: Any = sys.modules["builtins"]
    known.exit = known.quit = sys.exit  # of `site`, which is not imported here
    module = type(sys)(name)
    sys.modules["__main__"] = sys.modules[name] = module  # dataclasses and pickle look a class's module up
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def load(source: str, name: str) -> dict[str, Any]:
    """Run one of this package's own texts beside this one, and return its names."""
    names = dict(globals())
    exec(compile(source, name, "exec", dont_inherit=True), names)
    return names


def main(job_fd: int) -> None:
    """Limit and contain this process, say that it started, and play the job's role."""
    with open(job_fd, "rb") as file:
        job = decode(file.read())
    import resource

    for name, value in job["limits"].items():
        if name == "RLIMIT_CPU" and not job["seccomp"]:
            continue  # set before the filter, which refuses it
        hard = value + 1 if name == "RLIMIT_CPU" else value  # SIGXCPU first
        resource.setrlimit(getattr(resource, name), (value, hard))
    sys.set_int_max_str_digits(MAX_INT_DIGITS)
    if job["seccomp"]:
        load(job["landlock"], "landlock.py")["contain"](job["readable"], job["seccomp"])
    os.write(job["started"], b"s")
    os.close(job["started"])
    if job["role"] == "program":
        run_program(job["source"])
        return
    exchange = load(job["exchange"], "exchange.py")
    if job["role"] == "answer":
        exchange["answer"](job["source"], job["requests"], job["replies"])
    else:
        verdict = exchange["judge"](job["source"], job["names"], job["requests"], job["replies"])
        os.write(job["verdict"], verdict.encode("utf-8", "backslashreplace")[:1000])
        os._exit(0)  # whatever the tests left, the verdict is given


if __name__ == "__main__":
    main(int(sys.argv[1]))
