"""What runs inside the sandbox, as the text of `python -c`: limits, containment without namespaces, and the roles program, answer and judge.

A program is run with its stdin and stdout. An answer and its judge are two sandboxes joined by two pipes: the answer runs the judged code and
answers calls; the judge runs the tests, where the judged code never is. What crosses are values of built-in types (`encode`), so an `__eq__` of
the answer's own, its patches of builtins and its prints do not reach the judge. The judge's verdict leaves by a pipe that only the judge has.

This file imports the standard library alone, and what it needs at its start is small: it is compiled in each run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20


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


def send(fd: int, message: bytes) -> None:
    """Write a message behind its length."""
    view = memoryview(b"%08x" % len(message) + message)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes:
    """Read a message.

    Raises: EOFError: the other side is gone. ValueError: no message.
    """
    size = int(_exactly(fd, 8), 16)
    if not 0 <= size <= MAX_MESSAGE_BYTES:
        raise ValueError("the message is too long")
    return _exactly(fd, size)


def _exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 16))
        if not part:
            raise EOFError
        data += part
    return data


def run_program(source: str) -> dict[str, Any]:
    """Run a source as the main module and return its names."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def answer(source: str, requests: int, replies: int) -> None:
    """Run the judged code, then answer the judge's requests until it is gone."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def carry_out(operation: str, target: Any, *arguments: Any) -> Any:
        if operation == "name":
            return names[target]
        if operation == "call":
            return (names[target] if isinstance(target, str) else target)(*arguments[0], **arguments[1])
        if isinstance(target, str):
            target = names[target]
        return operations[operation](target, *arguments)

    names: dict[str, Any] = {}
    operations: dict[str, Any] = {"attribute": getattr, "iterate": iter, "next": next, "length": len, "item": lambda a, b: a[b]}
    try:
        names = run_program(source)
        said: tuple[Any, ...] = ("value", None)
    except Exception as error:
        said = ("error", type(error).__name__, str(error)[:200])
    while True:
        try:
            message = encode(said, keep)
            if len(message) > MAX_MESSAGE_BYTES:
                raise ValueError("the value is too large to be compared")
        except Exception as error:
            message = encode(("error", type(error).__name__, str(error)[:200]))
        send(replies, message)
        try:
            request = decode(receive(requests), lambda number: kept[number])
        except EOFError:
            return
        try:
            said = ("value", carry_out(*request))
        except Exception as error:
            said = ("error", type(error).__name__, str(error)[:200])


def exception(name: str, text: str) -> Any:
    """Return the built-in exception of this name, or an Exception."""
    kind = BUILTINS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return Exception(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:  # it wants more, as UnicodeDecodeError does
        return ValueError(text)


class Gone(BaseException):
    """The answer's process is gone, or says what no answer says."""


class Link:
    """The judge's side of the pipes."""

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = requests, replies
        self.fault = ""  # stays: tests that catch everything do not hide it

    def ask(self, *request: Any) -> Any:
        message = encode(request)
        try:
            send(self.requests, message)
        except OSError:
            self.lose("the answer's process ended")
        return self.hear()

    def hear(self) -> Any:
        try:
            said = decode(receive(self.replies), lambda number: Proxy(self, Ref(number)))
            is_value, is_error = said[0] == "value" and len(said) == 2, said[0] == "error" and len(said) == 3
        except EOFError:
            self.lose("the answer's process ended")
        except Exception:
            self.lose("the answer's process says what cannot be read")
        if is_value:
            return said[1]
        if not is_error or not isinstance(said[1], str):
            self.lose("the answer's process says what cannot be read")
        error = exception(said[1], said[2])
        error.is_of_answer = True
        raise error

    def lose(self, why: str) -> None:
        self.fault = self.fault or why
        raise Gone(why)


class Proxy:
    """An object of the answer's, seen by the tests. Its comparisons are not asked of the answer: it equals itself alone."""

    def __init__(self, link: Link, target: Any):
        self._link, self._target = link, target

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._link.ask("call", self._target, _refs(arguments), _refs(keywords))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("attribute", self._target, name)

    def __iter__(self) -> Any:
        iterator = self._link.ask("iterate", self._target)
        while True:
            try:
                item = iterator._link.ask("next", iterator._target)
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        return self._link.ask("next", self._target)

    def __len__(self) -> int:
        return self._link.ask("length", self._target)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self._target, _refs(key))


def _refs(value: Any) -> Any:
    """Return a value with each proxy as what it stands for."""
    if isinstance(value, Proxy):
        return value._target
    if isinstance(value, dict):
        return {_refs(key): _refs(item) for key, item in value.items()}
    return type(value)(map(_refs, value)) if type(value) in (list, tuple) else value


BUILTINS: dict[str, Any] = dict(vars(sys.modules["builtins"]))


def judge(source: str, names: list[str], requests: int, replies: int) -> str:
    """Run the tests, with the answer's names as proxies; return `passed`, or `failed: ` or `broken: ` and why."""
    link = Link(requests, replies)
    try:
        link.hear()  # the answer's code has run
        tests: dict[str, Any] = {"__name__": "tests"}
        for name in names:
            try:
                tests[name] = link.ask("name", name)
            except KeyError:
                continue  # where the tests need it, they fail with NameError
            if isinstance(tests[name], Proxy):
                tests[name] = Proxy(link, name)
        exec(compile(source, "tests.py", "exec", dont_inherit=True), tests)
    except NotPlain as error:
        return f"broken: {error}"
    except (NameError, ImportError, SyntaxError) as error:  # the answer's own are marked; a name may be what it lacks
        is_of_answer = hasattr(error, "is_of_answer") or getattr(error, "name", None) in names
        return f"{'failed' if is_of_answer else 'broken'}: {error}"
    except BaseException as error:
        return f"failed: {link.fault or type(error).__name__ + ' ' + str(error)[:200]}"
    return f"failed: {link.fault}" if link.fault else "passed"


def contain(readable: list[str], seccomp: bytes) -> None:
    """Give up, for good, every file but the readable ones, every capability, and the filter's system calls.

    Raises: OSError: the kernel refuses a part of it.
    """
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> int:
        given = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
        got = getattr(libc, name)(*given)
        if got < 0:
            raise OSError(ctypes.get_errno(), f"{name} {arguments[:2]}")
        return int(got)

    abi = call("syscall", 444, None, 0, 1)
    fs = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    handled = struct.pack("=QQQ", fs, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", 444, handled, len(handled), 0)
    for path in readable:
        fd = os.open(path, os.O_PATH)
        rights = 4 | 8 if os.path.isdir(path) else 4  # READ_FILE, READ_DIR
        call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)
    capset = 126 if os.uname().machine == "x86_64" else 91
    call("syscall", capset, struct.pack("=II", 0x20080522, 0), bytes(24))
    call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    buffer = ctypes.create_string_buffer(seccomp, len(seccomp))
    fprog = struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(buffer))
    call("prctl", 22, 2, fprog, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


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
    if job["seccomp"]:
        contain(job["readable"], job["seccomp"])
    os.write(job["started"], b"s")
    os.close(job["started"])
    role, source = job["role"], job["source"]
    if role == "program":
        run_program(source)
    elif role == "answer":
        answer(source, job["requests"], job["replies"])
    else:
        os.write(job["verdict"], judge(source, job["names"], job["requests"], job["replies"]).encode("utf-8", "backslashreplace")[:1000])
        os._exit(0)  # whatever the tests left, the verdict is given


if __name__ == "__main__":
    main(int(sys.argv[1]))
