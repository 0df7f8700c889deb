"""Every error a user can meet, with the exit code the command line gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found, what is required, what to do."""

    where: str
    found: str
    required: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{_line(self.where)}: found {_line(self.found)}; required {_line(self.required)}"
        return f"{text}; {_line(self.fix)}" if self.fix else text


def _line(text: str, max_length: int = 1000) -> str:
    """Return a text as part of one line. Text from an untrusted file can neither break the line, flood it, nor control a terminal."""
    return printable(text if len(text) <= max_length else f"{text[: max_length // 2]} ... {text[-max_length // 4 :]}")


def printable(text: str, keep: str = "") -> str:
    """Return a text with unprintable characters, except those in `keep`, as Python escapes."""
    return text if text.isprintable() else "".join(part if part.isprintable() or part in keep else ascii(part)[1:-1] for part in text)


class PrismError(Exception):
    """Base of all errors meant for the user. exit_code: of the process. is_agreed: all ranks raise the error, and only rank 0 prints it."""

    exit_code = 1
    is_agreed = False

    def agreed(self) -> Self:
        """Mark the error as raised by every rank, and return it."""
        self.is_agreed = True
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error whole, whatever its class takes to be made: it crosses from one process to another."""
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(cls: type[PrismError], args: tuple[Any, ...]) -> PrismError:
    return cls.__new__(cls, *args)  # without __init__, whose parameters differ from class to class


class InputError(PrismError):
    """The input is wrong: a config, a checkpoint, a data file. Carries every problem found, not the first.

    problems: a text stands for itself, without a Problem: torch's DataLoader makes an error of its worker again from its message alone.
    """

    exit_code = 2

    def __init__(self, problems: Problem | Sequence[Problem] | str):
        self.problems: tuple[Problem, ...] = ()
        if not isinstance(problems, str):
            self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(problems if isinstance(problems, str) else "\n".join(map(str, self.problems)))


class CheckpointError(InputError):
    """A checkpoint folder cannot be used. Each problem names the file or the tensor."""


class ResultFailure(PrismError):
    """The job ran, and its result is a failure (a failed gate or verification)."""

    is_agreed = True


class Stopped(PrismError):
    """The job stopped on request (a signal, its wall clock) and saved its state. Started again, it resumes."""

    exit_code = 3
    is_agreed = True


class EnvironmentFault(PrismError):
    """The machine is at fault: no space left, a dead process, a missing device."""

    exit_code = 4


class BackendMissing(EnvironmentFault):
    """A heavy package is not installed. The message says what needs it and what to do instead."""

    def __init__(self, name: str, needed_for: str, instead: str):
        super().__init__(f"{name} is not installed; it is needed for {needed_for}; {instead}")


def first_of(problems: Sequence[Problem], where: str, most: int = 24) -> list[Problem]:
    """Return the first problems, and where there are more than `most` one more, which counts them all. where: the file that they are of."""
    return [*problems[:most], *([Problem(where, f"{len(problems)} problems in all", "none")] if len(problems) > most else [])]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one InputError that lists `problems`, or return where there are none."""
    if problems:
        raise InputError(problems)
