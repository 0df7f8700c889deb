"""An answer and its judge: the judged code answers calls on one side of two pipes, and the tests run on the other.

Its text is run in the names of `inside.py`, inside the sandbox; nothing imports it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from megatron_prism.grade.sandbox.inside import NotPlain, Ref, decode, encode, run_program

MAX_MESSAGE_BYTES = 16 << 20
BUILTINS: dict[str, Any] = dict(vars(sys.modules["builtins"]))


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
        names = run_program(source, "answer")  # imported: what it does as a program of its own is not asked of it
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
    return type(value)(map(_refs, value)) if type(value) in (list, tuple, set, frozenset) else value


def judge(source: str, names: list[str], requests: int, replies: int) -> str:
    """Run the tests, with the answer's names as proxies; return `passed`, or `failed: ` or `broken: ` and why."""
    link = Link(requests, replies)
    try:
        code = compile(source, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:  # any later one is of a text that the tests parse, which may be the answer's
        return f"broken: {error}"
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
        exec(code, tests)
    except NotPlain as error:
        return f"broken: {error}"
    except (NameError, ImportError) as error:  # the answer's own are marked; a name may be what it lacks
        is_of_answer = hasattr(error, "is_of_answer") or getattr(error, "name", None) in names
        return f"{'failed' if is_of_answer else 'broken'}: {error}"
    except BaseException as error:
        return f"failed: {link.fault or type(error).__name__ + ' ' + str(error)[:200]}"
    return f"failed: {link.fault}" if link.fault else "passed"
