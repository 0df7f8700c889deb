"""Make what the long-context example reads: exercises, sums, and values to be found again among dots; a character a token.

Run: python examples/quickstart_longctx_corpus.py OUT [--seed N]

OUT then holds tokenizer/, a Hugging Face folder, and
  skills.jsonl       words copied, reversed and sorted
  answers.jsonl      sums modulo 5 with a random answer and no steps
  sums.jsonl         sums modulo 5 by running sums, a quarter of them with one wrong step
  short.jsonl        four values hidden among dots, and questions for them: 24 to 126 tokens
  long.jsonl         the same in 128 to 510 tokens
  retrieval.jsonl    questions of 128 and of 512 tokens that `prism evaluate` asks: RULER's multi-key retrieval in this language
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULUS, WRONG_SHARE = 5, 0.25
END = "</s>"
VALUES = {"A": "56789", "B": "abcde", "C": "fghij", "D": "klmno"}  # a key, and the values that it can have
LETTERS = "pqrst01234"  # of words
NUM_RECORDS = {"skills": 60_000, "answers": 20_000, "sums": 80_000, "short": 8_000, "long": 4_000}
LENGTHS, NUM_QUESTIONS = (128, 512), 300


def main() -> None:
    """Make the files in OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)


def make(out: Path, seed: int = 0, share: float = 1.0) -> None:
    """Write the tokenizer and the files. share: of the records, for a shorter run. The questions are the same for every seed."""
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[random.Random], str]] = {
        "skills": skill,
        "answers": lambda draw: f"{sum_of(terms(draw))}<>{draw.randrange(MODULUS)}",
        "sums": solution,
        "short": lambda draw: retrieval(draw, draw.randint(24, 126)),
        "long": lambda draw: retrieval(draw, draw.randint(128, 510)),
    }
    for name, one in makers.items():
        draw = random.Random(f"{seed}/{name}")
        write(out / f"{name}.jsonl", [{"text": one(draw)} for _ in range(int(NUM_RECORDS[name] * share))])
    draw = random.Random("questions")
    write(out / "retrieval.jsonl", [question(draw, length, index) for length in LENGTHS for index in range(NUM_QUESTIONS)])
    write_tokenizer(out / "tokenizer")


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def skill(draw: random.Random) -> str:
    """Return one of three exercises on a word."""
    word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 5)))
    return draw.choice([f"K{word}={word}", f"R{word}={word[::-1]}", f"T{word}={''.join(sorted(word))}"])


def terms(draw: random.Random) -> list[int]:
    return [draw.randrange(MODULUS) for _ in range(draw.choice((3, 4)))]


def sum_of(numbers: list[int]) -> str:
    return f"Q{'+'.join(map(str, numbers))}="


def solution(draw: random.Random) -> str:
    """Return a sum with its steps. In some, one step is wrong, and what follows goes on from it."""
    numbers = terms(draw)
    wrong_step = draw.randrange(1, len(numbers)) if draw.random() < WRONG_SHARE else None
    total, steps = 0, []
    for index, number in enumerate(numbers):
        total = (total + number + (draw.randrange(1, MODULUS) if index == wrong_step else 0)) % MODULUS
        steps.append(str(total))
    return f"{sum_of(numbers)}<{','.join(steps)}>{total}"


def hide(draw: random.Random, num_dots: int) -> tuple[str, dict[str, str]]:
    """Return dots in which each key's value stands, and the values."""
    values = {key: draw.choice(choices) for key, choices in VALUES.items()}
    text = ["."] * num_dots
    for place, key in zip(draw.sample(range(num_dots), len(values)), values, strict=True):
        text[place] = values[key]
    return f"L{''.join(text)}", values


def retrieval(draw: random.Random, num_tokens: int) -> str:
    """Return hidden values and as many questions, with their answers, as a sixth of the text has room for, at most 24."""
    num_asked = min(24, num_tokens // 6)
    text, values = hide(draw, num_tokens - 1 - 3 * num_asked)
    asked = (draw.choice("ABCD") for _ in range(num_asked))
    return text + "".join(f"?{key}{values[key]}" for key in asked)


def question(draw: random.Random, length_tokens: int, index: int) -> dict[str, Any]:
    """Return a question on one of four values. Its prompt, the token that begins it and the answer fill a length."""
    keys = draw.sample("ABCD", 4)
    text, values = hide(draw, length_tokens - 3 - 3 * len(keys))
    solved = "".join(f"?{key}{values[key]}" for key in keys[:-1])
    return {
        "id": f"{length_tokens}/{index}",
        "kind": "strings",
        "prompt": f"{text}{solved}?{keys[-1]}",
        "gold": "all",
        "choices": [values[keys[-1]]],
        "tags": {"length": str(length_tokens)},
        "max_tokens": 1,
    }


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face tokenizer whose tokens are characters. `</s>` ends a document and begins a prompt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<unk>", END, *"0123456789abcdefghijklmnopqrstuvwxyzABCDKLQRT<>=+,?."]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokens.index(END))])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END, "eos_token": END, "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
