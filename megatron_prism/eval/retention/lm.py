"""Our model as what lm-eval's evaluate() asks of an LM (lm_eval.api.model.LM). It is no subclass: importing lm-eval changes the environment.

Contexts, windows, truncation and what follows a stop text are those of lm-eval's own `hf` model, with two differences: a text gets the
begin-of-text tokens that the policy names and never a second one, and a generation ends at every end token of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, Protocol

from megatron_prism.core import log
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import chat, tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.eval.retention.serve import Asking, Pair, Score, rounds, rows_of
from megatron_prism.generate.engine import Rollout, Sampling, not_finite, seed_of
from megatron_prism.generate.stop import StopTexts

Bos = Literal["none", "one"]
MAX_TOKENS = 256  # of a generation whose task names none, as lm-eval's hf model
KEPT_AT_ONCE = 2000  # answers: each write to `kept` may be a file
PIECE_ROLLOUTS = 8  # times num_rows: the prompts between two lines of progress
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Kept(Protocol):
    """Answers that were computed before, by the hash of what was asked (cache.Kept is one)."""

    def get(self, key: str, /) -> Any: ...

    def write(self, values: Mapping[str, Any], /) -> None: ...


class InMemory(dict[str, Any]):
    """Answers of this process alone."""

    def write(self, values: Mapping[str, Any]) -> None:
        self.update(values)


@dataclass
class Counts:
    """What a run of the LM met: requests, answers found in `kept`, contexts cut on their left, texts that begin with two BOS."""

    num_requests: int = 0
    num_kept: int = 0
    num_cut: int = 0
    num_two_bos: int = 0


@dataclass(frozen=True)
class Asked:
    """A generation that was asked for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    until: tuple[str, ...]
    weights: str

    @property
    def key(self) -> str:
        """The hash of all that decides the answer."""
        sampling = self.sampling
        how = [sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.end_ids, self.until]
        return _key(self.weights, "generate", self.prompt, how, self.seed if sampling.temperature else 0)


@dataclass
class Ended:
    """How a document's first generation ended."""

    num_tokens: int
    ended: str


def own_bos(spec: TokenizerSpec) -> Bos:
    """Return the policy that a folder's tokenizer follows by itself, and so lm-eval's hf model."""
    return "one" if spec.bos_id is not None and tokenizer.encode_prompt("a", spec)[0] == spec.bos_id else "none"


@dataclass(eq=False)
class GangLM:
    """lm-eval's LM over a gang, for its rank 0. To lm-eval it is one process: the gang divides the requests.

    seed: of generations that a task samples; each (document, repeat) has its own. kept: the answers of earlier runs, by `weights` (what the model
    is known by) and what was asked.
    """

    asking: Asking
    bos: Bos
    seed: int
    kept: Kept
    weights: str = ""

    def __post_init__(self) -> None:
        self.rank, self.world_size = 0, 1  # lm-eval's
        self.served, self.spec = self.asking.served, self.asking.served.spec
        self.counts = Counts()
        self.ended: dict[tuple[Any, Any], Ended] = {}  # by task and document
        self._encoded = lru_cache(maxsize=4)(self._encode)  # the choices of a question share its context

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context. A model without BOS gets its EOS, as in lm-eval."""
        prefix = self.spec.bos_id if self.spec.bos_id is not None else self.spec.eos_id
        if prefix is None:
            raise InputError(
                Problem("tokenizer", f"neither BOS nor EOS in {self.spec.folder}", "a token to begin a text without a context")
            )
        return prefix

    @property
    def max_length(self) -> int:
        return self.served.longest

    @property
    def tokenizer_name(self) -> str:
        return self.spec.sha256

    def _encode(self, text: str, is_whole: bool) -> tuple[int, ...]:
        """Return a text's ids. A whole text gets one BOS where the policy asks for it and the text spells none."""
        ids = tokenizer.encode_text(text, self.spec)
        bos_id = self.spec.bos_id
        if is_whole and self.bos == "one" and bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        if bos_id is not None and ids[:2] == [bos_id, bos_id]:
            if not self.counts.num_two_bos:
                log.get().warning("lm_eval: a text begins with two begin-of-text tokens, which it spells itself: %.60r", text)
            self.counts.num_two_bos += 1
        return tuple(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            found = "a task that begins the answer itself (gen_prefix)"
            raise InputError(Problem("lm_eval chat", found, "turns that end before the answer", "run it without the chat template"))
        return chat.render(chat.load(self.spec.folder), chat_history, add_generation_prompt=True)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Score]:
        """Return (log-probability, whether each token is the likeliest) of each request's continuation after its context."""
        return self._scores([self._pair(*request.args) for request in requests], [request.args[1] for request in requests])

    def _pair(self, context: str, continuation: str) -> Pair:
        """Return both as ids. Spaces at the end of a context belong to the continuation; a text without a context follows the prefix token."""
        if not context:
            ids = self._encoded(continuation, False)
            return ((self.prefix_token_id,), ids) if ids[:1] != (self.prefix_token_id,) else (ids[:1], ids[1:])
        bare = context.rstrip()
        before = self._encoded(bare, True)
        whole = self._encoded(context + continuation, True)
        return before or (self.prefix_token_id,), whole[len(before) :]

    def _scores(self, pairs: Sequence[Pair], texts: Sequence[str]) -> list[Score]:
        """Return the scores of pairs. texts: what is named where a pair cannot be scored."""
        for text, (_, continuation) in zip(texts, pairs, strict=True):
            if not 1 <= len(continuation) <= self.max_length:
                found, required = f"{len(continuation)} tokens: {text!r:.120}", f"1 to {self.max_length}, the context"
                raise InputError(Problem("lm_eval continuation", found, required))
        keys = [_key(self.weights, "score", *pair, self.max_length) for pair in pairs]
        answers: dict[int, Score] = {}
        for number, key in enumerate(keys):
            if (answer := self.kept.get(key)) is not None:
                answers[number] = (float(answer[0]), bool(answer[1]))
        self.counts.num_requests += len(pairs)
        self.counts.num_kept += len(answers)
        new = [number for number in range(len(pairs)) if number not in answers]
        rows = rows_of([pairs[number] for number in new], self.max_length)
        self.counts.num_cut += sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        groups = self.served.groups
        fresh: dict[str, Score] = {}
        try:
            for some in rounds(rows, self.served.batch_tokens, groups.dp * groups.pp):
                scores = {new[number]: score for number, score in self.asking.scores(some).items()}
                if damaged := [number for number, (logprob, _) in scores.items() if not math.isfinite(logprob)]:
                    raise not_finite(f"lm_eval continuation {texts[damaged[0]]!r:.120}")  # the first of its choices would be taken
                answers |= scores
                fresh |= {keys[number]: score for number, score in scores.items()}
                if len(fresh) >= KEPT_AT_ONCE:
                    self.kept.write(fresh)
                    fresh = {}
                    log.get().info("lm_eval: %d of %d log-likelihoods", len(answers), len(pairs))
        finally:
            self.kept.write(fresh)
        return [answers[number] for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the context, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = list(self._encoded(request.args[0], False))
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((tuple(context), tuple(continuation)))
                owners.append(number)
        scores = self._scores(pairs, [requests[number].args[0] for number in owners])
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generation of each request up to a stop text. Repeats of a request have seeds of their own."""
        from lm_eval.models.utils import postprocess_generated_text

        repeats: Counter[tuple[Any, ...]] = Counter()
        asked: list[Asked] = []
        for request in requests:
            document = (request.task_name, request.doc_id, request.idx)
            asked.append(self._asked(request, repeats[document]))
            repeats[document] += 1
        answers = self._generated(asked)
        texts = []
        for request, one, (token_ids, ended) in zip(requests, asked, answers, strict=True):
            self.ended.setdefault((request.task_name, request.doc_id), Ended(len(token_ids), ended))
            text = tokenizer.decode(token_ids, self.spec, skip_special=True)
            texts.append(postprocess_generated_text(text, list(one.until), None))
        return texts

    def _asked(self, request: Any, repeat: int) -> Asked:
        from lm_eval.models.utils import normalize_gen_kwargs

        context, given = request.args
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_TOKENS))
        if unknown := sorted(set(kwargs) - GENERATION):
            found = f"{', '.join(unknown)} in generation_kwargs of {request.task_name}"
            raise InputError(Problem("lm_eval generation", found, f"of {', '.join(sorted(GENERATION))}"))
        num_tokens, until = kwargs["max_gen_toks"], tuple(text for text in kwargs["until"] if text)
        if num_tokens >= self.max_length:
            required = f"fewer than the context of {self.max_length}"
            raise InputError(Problem(f"lm_eval task {request.task_name}", f"{num_tokens} tokens to generate", required))
        ids = self._encoded(context, True) or (self.prefix_token_id,)
        prompt = ids[-(self.max_length - num_tokens) :]
        self.counts.num_cut += len(prompt) < len(ids)
        is_drawn = bool(kwargs["do_sample"])
        sampling = Sampling(
            max_tokens=num_tokens,
            temperature=float(kwargs.get("temperature", 1.0)) if is_drawn else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)) if is_drawn else 1.0,
            top_k=kwargs.get("top_k") if is_drawn else None,
            end_ids=self.spec.end_ids,
            stop=StopTexts(until, self.spec) if until else None,
        )
        name = int.from_bytes(hashlib.sha256(str(request.task_name).encode()).digest()[:7], "big")
        return Asked(prompt, sampling, seed_of(self.seed, name, request.doc_id or 0, request.idx, repeat), until, self.weights)

    def _generated(self, asked: Sequence[Asked]) -> list[tuple[tuple[int, ...], str]]:
        """Return each generation's tokens, without an end token, and how it ended."""
        answers: dict[str, tuple[tuple[int, ...], str]] = {}
        for one in asked:
            if (answer := self.kept.get(one.key)) is not None:
                answers[one.key] = (tuple(answer[0]), str(answer[1]))
        self.counts.num_requests += len(asked)
        self.counts.num_kept += sum(one.key in answers for one in asked)
        new = {one.key: one for one in asked if one.key not in answers}
        by_sampling = sorted(new.values(), key=lambda one: (repr(one.sampling), -len(one.prompt)))
        for _, group in groupby(by_sampling, key=lambda one: repr(one.sampling)):
            of_sampling = list(group)
            step = PIECE_ROLLOUTS * self.served.num_rows * self.served.groups.dp
            for start in range(0, len(of_sampling), step):
                some = of_sampling[start : start + step]
                rollouts = self.asking.rollouts([one.prompt for one in some], some[0].sampling, [one.seed for one in some])
                made = {one.key: self._tokens(rollout) for one, rollout in zip(some, rollouts, strict=True)}
                self.kept.write(made)
                answers |= made
                log.get().info("lm_eval: %d of %d generations", len(answers), len(new))
        return [answers[one.key] for one in asked]

    def _tokens(self, rollout: Rollout) -> tuple[tuple[int, ...], str]:
        has_end = rollout.ended == "end_token"
        return tuple(rollout.token_ids[:-1] if has_end else rollout.token_ids), rollout.ended


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()
