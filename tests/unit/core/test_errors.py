"""Errors that cross from one process to another arrive whole."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from megatron_prism.core.errors import BackendMissing, InputError, PrismError, Problem

MADE_OF: dict[str, tuple[object, ...]] = {"InputError": ([Problem("a", "b", "c"), Problem("d", "e", "f", "g")],)}
MADE_OF |= {"CheckpointError": MADE_OF["InputError"], "BackendMissing": ("numpy", "a figure", "install it")}


def subclasses(cls: type[PrismError]) -> Iterator[type[PrismError]]:
    yield cls
    for each in cls.__subclasses__():
        yield from subclasses(each)


def test_every_error_arrives_whole() -> None:
    classes = [cls for cls in subclasses(PrismError) if cls.__module__.startswith("megatron_prism.")]
    assert BackendMissing in classes and len(classes) >= 7
    for cls in classes:
        for is_agreed in (cls.is_agreed, True):
            error = cls(*MADE_OF.get(cls.__name__, ("said",)))
            error = error.agreed() if is_agreed else error
            arrived = pickle.loads(pickle.dumps(error))
            assert type(arrived) is cls and vars(arrived) == vars(error)
            assert (str(arrived), arrived.args, arrived.is_agreed) == (str(error), error.args, is_agreed)


@pytest.mark.parametrize("text", ["", "Caught InputError in DataLoader worker process 0.\nOriginal ..."])
def test_an_input_error_made_of_its_message_keeps_the_message(text: str) -> None:
    error = InputError(text)
    assert str(error) == text and error.problems == () and str(pickle.loads(pickle.dumps(error))) == text
