"""The one grader: responses in, outcomes out, by id. It holds the processes that compare expressions, and runs programs in the sandbox."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import BackendMissing, EnvironmentFault, PrismError, Problem, raise_problems
from megatron_prism.grade import choice, math, strings
from megatron_prism.grade.format import answer_of
from megatron_prism.grade.outcome import Graded, Item, Outcome
from megatron_prism.grade.sandbox.sandbox import Sandbox
from megatron_prism.grade.workers import BAD_GOLD, Verdict, Workers

VERSION = "5"  # raised where a response may be graded otherwise than before: an evaluation then grades its kept responses anew


class Grader:
    """Grades responses. A context manager: no process is left after it.

    kinds: those that it will be given. What cannot be graded on this machine is refused as the context is entered.
    Raises: InputError where its config is wrong.
    """

    def __init__(self, config: GradeConfig | None = None, kinds: Iterable[str] = ()) -> None:
        self.config, self._kinds = config or GradeConfig(), frozenset(kinds)
        raise_problems(list(check_bounds(self.config)))
        self._sandbox: Sandbox | None = None
        self._is_ending = False
        self._workers = Workers(self.config.num_workers, self.config.cpu_limit_s, self.config.wall_limit_s)

    def __enter__(self) -> Self:
        self.prepare(self._kinds)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._workers.__exit__()

    def prepare(self, kinds: Collection[str]) -> None:
        """Refuse kinds that cannot be graded on this machine. The sandbox is chosen, and attacked, when code is first among them.

        Raises: BackendMissing where a kind's grader is not installed; EnvironmentFault where nothing contains code.
        """
        require(kinds)
        if "code" in kinds and self._sandbox is None:
            from megatron_prism.grade.sandbox.choose import choose

            self._sandbox = choose()

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome by its id. A fault of the machine is tried once more.

        Raises: InputError for an id that stands there twice; what prepare raises.
        """
        twice = [id_ for id_, count in Counter(item.id for item in items).items() if count > 1]
        raise_problems([Problem(f"item {id_!r}", "its id more than once", "an id of its own for each response") for id_ in twice])
        self.prepare({item.kind for item in items})
        graded: dict[str, Graded] = {}
        pairs: dict[str, tuple[str, str]] = {}  # what only algebra can say
        for item, first in zip(items, self._first(items), strict=True):
            if isinstance(first, Graded):
                graded[item.id] = first
            else:
                pairs[item.id] = first
        for id_, verdict in self._compare(pairs).items():
            outcome = "fault" if isinstance(verdict, str) else "right" if verdict else "wrong"
            why = (
                verdict
                if isinstance(verdict, str)
                else f"{pairs[id_][1][:80]!r} {'equals' if verdict else 'is not'} {pairs[id_][0][:80]!r}"
            )
            graded[id_] = Graded(id=id_, outcome=outcome, why=why)  # type: ignore[arg-type]  # one of Outcome's words
        return {item.id: graded[item.id] for item in items}

    def _first(self, items: Sequence[Item]) -> list[Graded | tuple[str, str]]:
        """Return for each item an outcome, or the gold and the answer that only algebra can compare. Programs run several at once."""
        with ThreadPoolExecutor(self.config.num_workers) as pool:
            running = {item.id: pool.submit(_guarded, item, self._grade_one) for item in items if item.kind == "code"}
            return [running[item.id].result() if item.id in running else _guarded(item, self._grade_one) for item in items]

    def _compare(self, pairs: dict[str, tuple[str, str]]) -> dict[str, Verdict]:
        once = list(dict.fromkeys(pairs.values()))  # a group's samples often agree
        verdicts = dict(zip(once, self._workers.compare(once), strict=True))
        again = [pair for pair, verdict in verdicts.items() if isinstance(verdict, str) and not verdict.startswith(BAD_GOLD)]
        verdicts |= dict(zip(again, self._workers.compare(again), strict=True))
        return {id_: verdicts[pair] for id_, pair in pairs.items()}

    def _grade_one(self, item: Item) -> Graded | tuple[str, str]:
        """Return an outcome, or the gold and the answer that only algebra can compare."""
        if self._is_ending:
            raise EnvironmentFault("grading was ended before it was done")
        if item.kind == "strings":  # no gate: RULER reads the first tokens of a response, whole or cut
            return _grade_strings(item)
        answer = answer_of(item, self.config.think)
        if isinstance(answer, Graded):
            return answer
        if item.kind == "code":
            return self._grade_code(item, answer)
        return self._grade_choice(item, answer) if item.kind == "choice" else self._grade_math(item, answer)

    def _grade_code(self, item: Item, answer: str) -> Graded:
        from megatron_prism.grade import code

        assert self._sandbox is not None
        return code.grade_code(item, answer, self._sandbox)

    def _grade_choice(self, item: Item, answer: str) -> Graded:
        if item.gold not in choice.letters(item.choices) or len(item.gold) != 1:
            return Graded(id=item.id, outcome="fault", why=f"the gold {item.gold!r} is none of its {len(item.choices)} options")
        text = choice.extract(answer, self.config.answer)
        if text is None:
            return Graded(id=item.id, outcome="no_format", why="neither a boxed choice nor a line Answer: X")
        letter = choice.chosen(text, item.choices)
        outcome: Outcome = "right" if letter == item.gold else "wrong"
        return Graded(id=item.id, outcome=outcome, why=f"chose {letter or ascii(text[:80])}", chosen=letter or "")

    def _grade_math(self, item: Item, answer: str) -> Graded | tuple[str, str]:
        if why := math.unfit_gold(item.gold):
            return Graded(id=item.id, outcome="fault", why=why)
        text = math.extract(answer, self.config.answer)
        if text is None:
            return Graded(id=item.id, outcome="no_format", why=f"no answer in the form {self.config.answer}")
        gold = item.gold
        if len(text) <= math.MAX_ANSWER_CHARS:
            gold, text = math.plain_pair(gold, text)
            is_right = math.verdict(gold, text)
            if is_right is not None:
                return Graded(id=item.id, outcome="right" if is_right else "wrong", why=f"{text[:80]!r} for {gold[:80]!r}")
        if why := math.hedged(gold, text):
            return Graded(id=item.id, outcome="wrong", why=why)
        return gold, text


def _grade_strings(item: Item) -> Graded:
    if item.gold not in strings.WANTED or not item.choices or not all(item.choices):
        return Graded(id=item.id, outcome="fault", why=f"{len(item.choices)} expected strings, of which {item.gold!r}: not all or any")
    score = strings.share(item.response, item.choices, item.gold)
    why = (
        f"{score:.2f} of {len(item.choices)} strings"
        if item.gold == "all"
        else f"{'one' if score else 'none'} of {len(item.choices)} strings"
    )
    return Graded(id=item.id, outcome="right" if score == 1 else "wrong", why=why, score=score)


def require(kinds: Iterable[str]) -> None:
    """Refuse kinds whose grader is not there, before anything is graded.

    Raises: BackendMissing, InputError.
    """
    wanted = set(kinds)
    if "math" in wanted and importlib.util.find_spec("math_verify") is None:
        raise BackendMissing("math-verify", "grading math", "pip install 'megatron_prism[rl]'")


def _guarded(item: Item, grade: Callable[[Item], Any]) -> Any:
    """Return a function's result; an unexpected error of ours is that item's fault, and no other item's."""
    try:
        return grade(item)
    except (PrismError, MemoryError):
        raise
    except Exception as error:
        return Graded(id=item.id, outcome="fault", why=f"{type(error).__name__}: {error}"[:200])
