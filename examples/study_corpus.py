"""Make what the study of configs/studies/tiny.yaml reads: the paper's sources, problems and evaluations in a language of a character a token.

Run: python examples/study_corpus.py OUT [--seed N] [--share S]

A domain has problems, and a model may solve them in steps between <think> and </think>:
  math      running sums modulo 5                         Q4+0+7=<think>4,4,1</think>1
  code      operations on a list: r reverse, s sort,      X512:si=<think>125,231</think>231
            t rotate, i add 1 (5 becomes 1)
  science   what substances react to: each has a hidden   Sf+f+h=<think>A,D,D</think>D
            class, and a hidden table has the products
OUT then holds tokenizer/, a Hugging Face folder, and
  weak.jsonl                  problems of all domains without steps, a fifth answered right and the others at random: all that the base model reads of them
  web_DOMAIN.jsonl            problems without steps, half of them answered right
  traces_DOMAIN.jsonl         problems solved in steps, a fifth of them with one wrong step
  skills.jsonl                words copied (K), reversed (R) and sorted (T)
  short.jsonl, long.jsonl     four values hidden among dots, and questions for them: 24 to 126 and 128 to 510 tokens
  problems_DOMAIN.jsonl       what RL asks
  heldout_DOMAIN.jsonl        what evaluations ask: a fifth of the problems, by their hash. No other file has one of them
  heldout_skills.jsonl        words that skills.jsonl has not
  retrieval_128.jsonl         hidden values to be found in 128 tokens; retrieval_512.jsonl in 512
The problems, tables and questions are the same for every seed, and so are the bytes of all files on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

Draw = random.Random
THINK, END_THINK, END = "<think>", "</think>", "</s>"
WEAK_RIGHT, WEB_RIGHT, WRONG_STEP = 0.2, 0.5, 0.2  # shares of the texts
NUM_TEXTS = {"weak": 8_000, "web": 12_000, "traces": 24_000, "skills": 40_000, "short": 8_000, "long": 3_000}
NUM_PROBLEMS, NUM_HELD_OUT, NUM_SKILLS, NUM_RETRIEVALS = 2_000, 150, 150, 150
LENGTHS_TOKENS = (128, 512)
LETTERS = "pqrst01234"  # of the words that skills are asked on
VALUES = {"A": "56789", "B": "abcde", "C": "fghij", "D": "klmno"}  # a key, and the values that it can have

MODULUS = 5
DIGITS = "12345"  # of the code domain's lists: without 0, so that two lists are the same number only where they are the same text
OPERATIONS: dict[str, Callable[[str], str]] = {
    "r": lambda text: text[::-1],
    "s": lambda text: "".join(sorted(text)),
    "t": lambda text: text[1:] + text[:1],
    "i": lambda text: "".join(DIGITS[(DIGITS.index(digit) + 1) % len(DIGITS)] for digit in text),
}
CLASSES, SUBSTANCES = "ABCD", "abcdefgh"
_TABLES = Draw("science")
CLASS_OF = dict(zip(SUBSTANCES, _TABLES.sample(CLASSES * 3, len(SUBSTANCES)), strict=True))
_ROWS, _NAMES = _TABLES.sample(range(4), 4), _TABLES.sample(CLASSES, 4)
REACTION = {(one, other): _NAMES[(_ROWS[i] + _ROWS[j]) % 4] for i, one in enumerate(CLASSES) for j, other in enumerate(CLASSES)}


def main() -> None:
    """Make the files in OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the texts, for a shorter run")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, arguments.share)


def make(out: Path, seed: int = 0, share: float = 1.0) -> None:
    """Write the tokenizer and the files."""
    out.mkdir(parents=True, exist_ok=True)
    trained, held_out = split_problems()
    makers: dict[str, Callable[[Draw], str]] = {
        "weak": lambda draw: answer_only(draw, draw.choice(trained[draw.choice(list(DOMAINS))]), WEAK_RIGHT),
        **{f"web_{name}": partial(web, trained[name]) for name in DOMAINS},
        **{f"traces_{name}": partial(trace, trained[name]) for name in DOMAINS},
        "skills": lambda draw: "".join(skill(draw, held_out=False)),
        "short": lambda draw: retrieval(draw, draw.randint(24, 126)),
        "long": lambda draw: retrieval(draw, draw.randint(128, 510)),
    }
    for name, maker in makers.items():
        draw = Draw(f"{seed}/{name}")
        write(out / f"{name}.jsonl", ({"text": maker(draw)} for _ in range(int(NUM_TEXTS[name.partition("_")[0]] * share))))
    for name in DOMAINS:
        draw = Draw(f"problems/{name}")
        chosen = draw.sample(trained[name], min(NUM_PROBLEMS, len(trained[name])))
        write(out / f"problems_{name}.jsonl", ({"question": problem, "answer": steps_of(problem)[1]} for problem in chosen))
        asked = draw.sample(held_out[name], min(NUM_HELD_OUT, len(held_out[name])))
        write(out / f"heldout_{name}.jsonl", (question(name, problem) for problem in asked))
    draw = Draw("questions")
    exercises = dict.fromkeys(skill(draw, held_out=True) for _ in range(2 * NUM_SKILLS))
    write(out / "heldout_skills.jsonl", (skill_question(*one) for one in list(exercises)[:NUM_SKILLS]))
    for size in LENGTHS_TOKENS:
        write(out / f"retrieval_{size}.jsonl", (retrieval_question(draw, size, index) for index in range(NUM_RETRIEVALS)))
    write_tokenizer(out / "tokenizer")


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def is_held_out(text: str) -> bool:
    """Say whether no training text may have this problem or word: one in five, by its hash."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def split_problems() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return each domain's problems to train on, and its held-out ones."""
    trained: dict[str, list[str]] = {name: [] for name in DOMAINS}
    held_out: dict[str, list[str]] = {name: [] for name in DOMAINS}
    for name, every in DOMAINS.items():
        for problem in every():
            (held_out if is_held_out(problem) else trained)[name].append(problem)
    return trained, held_out


def math_problems() -> Iterable[str]:
    """Return all sums of three digits."""
    return (f"Q{'+'.join(terms)}=" for terms in itertools.product("0123456789", repeat=3))


def code_problems() -> Iterable[str]:
    """Return all lists of three with two operations."""
    lists, programs = itertools.product(DIGITS, repeat=3), itertools.product(OPERATIONS, repeat=2)
    return (f"X{''.join(digits)}:{''.join(program)}=" for digits, program in itertools.product(lists, programs))


def science_problems() -> Iterable[str]:
    """Return all reactions of three substances."""
    return (f"S{'+'.join(names)}=" for names in itertools.product(SUBSTANCES, repeat=3))


DOMAINS = {"math": math_problems, "code": code_problems, "science": science_problems}
ANSWERS = {
    "Q": lambda draw: str(draw.randrange(MODULUS)),
    "X": lambda draw: "".join(draw.choices(DIGITS, k=3)),
    "S": lambda draw: draw.choice(CLASSES),
}


def steps_of(problem: str, slip: Draw | None = None) -> tuple[list[str], str]:
    """Return a problem's steps and its answer. With `slip` one step is wrong, and what follows goes on from it."""
    kind, body = problem[0], problem[1:-1]
    if kind == "Q":
        return sum_steps([int(term) for term in body.split("+")], slip)
    if kind == "X":
        text, _, program = body.partition(":")
        return code_steps(text, program, slip)
    return reaction_steps(body.split("+"), slip)


def sum_steps(terms: list[int], slip: Draw | None) -> tuple[list[str], str]:
    wrong = slip.randrange(1, len(terms)) if slip else None
    total, steps = 0, []
    for number, term in enumerate(terms):
        total = (total + term + (slip.randrange(1, MODULUS) if slip and number == wrong else 0)) % MODULUS
        steps.append(str(total))
    return steps, steps[-1]


def code_steps(text: str, program: str, slip: Draw | None) -> tuple[list[str], str]:
    wrong = slip.randrange(len(program)) if slip else None
    steps = []
    for number, name in enumerate(program):
        text = OPERATIONS[slip.choice([other for other in OPERATIONS if other != name]) if slip and number == wrong else name](text)
        steps.append(text)
    return steps, text


def reaction_steps(names: list[str], slip: Draw | None) -> tuple[list[str], str]:
    kinds = [CLASS_OF[name] for name in names]
    if slip:
        wrong = slip.randrange(len(names))
        kinds[wrong] = slip.choice([kind for kind in CLASSES if kind != kinds[wrong]])
    products = itertools.accumulate(kinds, lambda product, kind: REACTION[product, kind])
    return (steps := list(products)), steps[-1]


def web(problems: list[str], draw: Draw) -> str:
    """Return a problem without steps, as it may stand on the web."""
    return answer_only(draw, draw.choice(problems), WEB_RIGHT)


def trace(problems: list[str], draw: Draw) -> str:
    """Return a problem solved in steps."""
    problem = draw.choice(problems)
    steps, answer = steps_of(problem, draw if draw.random() < WRONG_STEP else None)
    return f"{problem}{THINK}{','.join(steps)}{END_THINK}{answer}"


def answer_only(draw: Draw, problem: str, right_share: float) -> str:
    """Return a problem answered without steps: right, or at random."""
    answer = steps_of(problem)[1] if draw.random() < right_share else ANSWERS[problem[0]](draw)
    return f"{problem}{THINK}{END_THINK}{answer}"


def skill(draw: Draw, held_out: bool) -> tuple[str, str]:
    """Return an exercise on a word, and its answer."""
    word = ""
    while not word or is_held_out(word) != held_out:
        word = "".join(draw.choice(LETTERS) for _ in range(3))
    return draw.choice([(f"K{word}=", word), (f"R{word}=", word[::-1]), (f"T{word}=", "".join(sorted(word)))])


def hide(draw: Draw, num_dots: int) -> tuple[str, dict[str, str]]:
    """Return dots in which each key's value stands, and the values."""
    values = {key: draw.choice(choices) for key, choices in VALUES.items()}
    text = ["."] * num_dots
    for place, key in zip(draw.sample(range(num_dots), len(values)), values, strict=True):
        text[place] = values[key]
    return f"L{''.join(text)}", values


def retrieval(draw: Draw, num_tokens: int) -> str:
    """Return hidden values and as many questions, with their answers, as a sixth of the text has room for, at most 24."""
    num_asked = min(24, num_tokens // 6)
    text, values = hide(draw, num_tokens - 1 - 3 * num_asked)
    return text + "".join(f"?{key}{values[key]}" for key in (draw.choice("ABCD") for _ in range(num_asked)))


def question(domain: str, problem: str) -> dict[str, Any]:
    """Return a held-out problem as `prism evaluate` asks it."""
    kind = {"kind": "choice", "choices": [f"class {name}" for name in CLASSES]} if domain == "science" else {"kind": "math"}
    return {"id": problem[:-1], **kind, "prompt": problem, "gold": steps_of(problem)[1], "tags": {"domain": domain}}


def skill_question(problem: str, answer: str) -> dict[str, Any]:
    """Return an exercise as `prism evaluate` asks it: its response has the room of the answer and no more, so it counts only where it is the answer."""
    tags = {"skill": {"K": "copy", "R": "reverse", "T": "sort"}[problem[0]]}
    room = {"max_tokens": len(answer)}
    return {"id": problem[:-1], "kind": "strings", "prompt": problem, "gold": "all", "choices": [answer], "tags": tags, **room}


def retrieval_question(draw: Draw, length_tokens: int, index: int) -> dict[str, Any]:
    """Return a question on one of four values. Its prompt, the token that begins it and the answer fill a length."""
    keys = draw.sample("ABCD", 4)
    text, values = hide(draw, length_tokens - 3 - 3 * len(keys))
    prompt = text + "".join(f"?{key}{values[key]}" for key in keys[:-1]) + f"?{keys[-1]}"
    tags = {"length": str(length_tokens)}
    return {
        "id": f"{length_tokens}/{index}",
        "kind": "strings",
        "prompt": prompt,
        "gold": "all",
        "choices": [values[keys[-1]]],
        "tags": tags,
        "max_tokens": 1,
    }


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face tokenizer whose tokens are characters, `<think>` and `</think>`. `</s>` ends a document and begins a prompt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<unk>", END, THINK, END_THINK, *"0123456789abcdefghijklmnopqrstuvwxyzABCDKLQRSTX+=,:?."]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{THINK}|{END_THINK}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokens.index(END))])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END, "eos_token": END, "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
