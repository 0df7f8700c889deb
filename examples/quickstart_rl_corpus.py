"""Make the task that RL is shown on: sums modulo 5, a character a token, for a model of 100,000 parameters.

Run: python examples/quickstart_rl_corpus.py OUT

OUT then holds tokenizer/, a Hugging Face folder, and
  skills.jsonl                copy, reverse, sort and count: what a base model knows
  answers.jsonl               problems answered without steps, one of five right: the format, and no way to the answer
  solutions.jsonl             problems solved by running sums, 45 % of them with one wrong step: what mid-training adds
  problems.jsonl              the problems that RL trains on
  problems_valid.jsonl        a tenth of the problems, by their hash: those that settings are chosen by
  problems_heldout.jsonl      a fifth of the problems, by their hash: those that are reported; no other file has one of these two
The same bytes come out again on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

SEED = 20260603
MODULUS, NUM_TERMS, TERMS = 5, (2, 3), range(10)
WRONG_SHARE = 0.45  # of the solutions
LETTERS = "abcdefgh"
THINK, END_THINK, END = "<think>", "</think>", "</s>"
NUM_SKILLS, NUM_ANSWERS, NUM_SOLUTIONS = 8000, 3000, 8000


def main() -> None:
    """Make the files in OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out)


def make(out: Path) -> None:
    """Write the tokenizer and the files."""
    out.mkdir(parents=True, exist_ok=True)
    problems: dict[str, list[tuple[int, ...]]] = {"problems": [], "problems_valid": [], "problems_heldout": []}
    for count in NUM_TERMS:
        for terms in itertools.product(TERMS, repeat=count):
            problems[split(terms)].append(terms)
    train = problems["problems"]
    write(out / "skills.jsonl", NUM_SKILLS, lambda draw: {"text": skill(draw)})
    write(out / "answers.jsonl", NUM_ANSWERS, lambda draw: {"text": weak_answer(draw.choice(train), draw)})
    write(out / "solutions.jsonl", NUM_SOLUTIONS, lambda draw: {"text": solution(draw.choice(train), draw)})
    for name, chosen in problems.items():
        lines = [json.dumps({"question": question(terms), "answer": str(sum(terms) % MODULUS)}) for terms in chosen]
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_tokenizer(out / "tokenizer")


def write(path: Path, count: int, record: Callable[[random.Random], dict[str, str]]) -> None:
    """Write `count` records. A file's random numbers depend on its name alone."""
    draw = random.Random(f"{SEED}/{path.name}")
    path.write_text("".join(f"{json.dumps(record(draw))}\n" for _ in range(count)))


def question(terms: tuple[int, ...]) -> str:
    """Return a problem as the model reads it."""
    return f"Q{'+'.join(map(str, terms))}="


def split(terms: tuple[int, ...]) -> str:
    """Return the file that a problem belongs in, by its hash: a fifth of them is held out, a tenth is to choose settings by."""
    lot = hashlib.sha256(question(terms).encode()).digest()[0] % 10
    return "problems_heldout" if lot < 2 else "problems_valid" if lot == 2 else "problems"


def solution(terms: tuple[int, ...], draw: random.Random) -> str:
    """Return a problem solved by running sums. In some, one step is wrong, and what follows goes on from it."""
    wrong_step = draw.randrange(1, len(terms)) if draw.random() < WRONG_SHARE else None
    total, steps = 0, []
    for number, term in enumerate(terms):
        total = (total + term + (draw.randrange(1, MODULUS) if number == wrong_step else 0)) % MODULUS
        steps.append(str(total))
    return f"{question(terms)}{THINK}{','.join(steps)}{END_THINK}{total}"


def weak_answer(terms: tuple[int, ...], draw: random.Random) -> str:
    """Return a problem with a random answer and no steps."""
    return f"{question(terms)}{THINK}{END_THINK}{draw.randrange(MODULUS)}"


def skill(draw: random.Random) -> str:
    """Return one of four exercises on short words."""
    word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 5)))
    first = draw.randrange(5)
    counted = "".join(map(str, range(first, first + draw.randint(3, 5))))
    return draw.choice([f"C{word}={word}", f"R{word}={word[::-1]}", f"S{word}={''.join(sorted(word))}", f"N{first}={counted}"])


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face tokenizer whose tokens are characters, `<think>` and `</think>`. `</s>` ends a document and begins a prompt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<unk>", END, THINK, END_THINK, *"0123456789", *LETTERS, *"CRSNQ+=,\n"]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{THINK}|{END_THINK}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # In training a document follows the end of another one, so a prompt begins with that token too.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokens.index(END))])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END, "eos_token": END, "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
