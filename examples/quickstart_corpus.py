"""Make a small corpus of mathematics, code and prose, and a tokenizer, from what this machine already has.

Run: python examples/quickstart_corpus.py OUT

Nothing is downloaded: mathematics comes from reasoning-gym's generators, code from the Python standard library, prose
from Python's own documentation. OUT then holds {math,code,general}.jsonl, their held-out {..}_valid.jsonl, which share
no document, and tokenizer/, a Hugging Face folder. The same Python and reasoning-gym give the same bytes again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

RECIPE = 1  # raise it when the corpus changes: a finished OUT of another recipe is made again
MARKER = "corpus.json"  # written last: it says that OUT is complete
SEED = 20260317
VALID_BYTES, MATH_BYTES, CODE_BYTES, GENERAL_BYTES = 150_000, 1_600_000, 2_500_000, 2_500_000
CHUNK_CHARS = 2000  # a document is cut at the first blank line after as many characters
PROSE_CHARS = 160  # a docstring at least as long is prose; a shorter one stays in the code
VOCAB_SIZE = 2048
TOKENIZER_CHARS = 1_000_000  # of each source; more text makes the same merges, later
PROBLEMS = {  # reasoning-gym's task: how many
    "gsm_symbolic": 1200,
    "chain_sum": 4000,
    "simple_equations": 2000,
    "gcd": 1500,
    "lcm": 1500,
    "fraction_simplification": 1500,
    "products": 1000,
    "leg_counting": 700,
}
NOT_CODE = {
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
Documents = dict[str, list[dict[str, str]]]  # what is kept together (a module, a topic, a problem) -> its records


def main() -> None:
    """Make the corpus in OUT, or say that it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    made = finished(out)
    if made is None:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).unlink(missing_ok=True)
        made = make(out)
        (out / MARKER).write_text(json.dumps({"recipe": RECIPE, "files": made}, indent=2) + "\n")
    show(made, out)


def finished(out: Path) -> dict[str, list[int]] | None:
    """Return what a finished OUT holds, or None where there is no such corpus yet."""
    try:
        marker = json.loads((out / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker["files"] if marker.get("recipe") == RECIPE else None


def make(out: Path) -> dict[str, list[int]]:
    """Write the files and the tokenizer; return each file's number of documents and of bytes."""
    code, general = standard_library()
    sources = {
        "math": (problems(), MATH_BYTES),
        "code": (code, CODE_BYTES),
        "general": (topics() | general, GENERAL_BYTES),
    }
    made = {}
    for name, (documents, train_bytes) in sources.items():
        train, valid = hold_out(documents, train_bytes)
        for file, lines in {name: train, f"{name}_valid": valid}.items():
            text = "".join(f"{line}\n" for line in lines)
            (out / f"{file}.jsonl").write_text(text, encoding="utf-8")
            made[file] = [len(lines), len(text.encode())]
    write_tokenizer(out / "tokenizer", [out / f"{name}.jsonl" for name in sources])
    return made


def hold_out(documents: Documents, train_bytes: int) -> tuple[list[str], list[str]]:
    """Return the JSON lines to train on and the held-out ones; a group falls on one side, by the hash of its key."""
    train: list[str] = []
    valid: list[str] = []
    trained = held = 0
    seen: set[str] = set()
    for key in sorted(documents, key=lambda key: hashlib.sha256(key.encode()).digest()):
        lines = [json.dumps(record, ensure_ascii=False) for record in documents[key]]
        lines = [line for line in dict.fromkeys(lines) if line not in seen]
        seen.update(lines)
        size = sum(len(line.encode()) + 1 for line in lines)
        if held < 0.9 * VALID_BYTES and held + size <= VALID_BYTES:
            valid, held = valid + lines, held + size
        elif trained + size <= train_bytes:
            train, trained = train + lines, trained + size
    return train, valid


def problems() -> Documents:
    """Return problems with answers in GSM8K's form: the steps where there are some, then `#### result`."""
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit("reasoning-gym is not installed; it makes the mathematics of this corpus; pip install -e '.[cpu]'") from None
    found: Documents = {}
    for task, count in PROBLEMS.items():
        for item in reasoning_gym.create_dataset(task, size=count, seed=SEED):
            steps = worked(task, item["metadata"])
            answer = f"{steps}\n#### {item['answer']}" if steps else f"#### {item['answer']}"
            question = item["question"].strip()
            found.setdefault(question, [{"question": question, "answer": answer}])
    return found


def worked(task: str, metadata: Mapping[str, str]) -> str:
    """Return the steps to an answer, one a line, or an empty string where the task gives none."""
    if task == "gsm_symbolic":
        return metadata["answer_cot"].split("####")[0].strip()
    if task != "chain_sum":
        return ""
    terms = metadata["expression"].split()
    total, lines = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join(lines)


def topics() -> Documents:
    """Return the chapters of the language reference that `help()` shows."""
    from pydoc_data.topics import topics as chapters

    return {f"topic {name}": [{"text": part} for part in chunks(text)] for name, text in chapters.items()}


def standard_library() -> tuple[Documents, Documents]:
    """Return the standard library's code and its prose: the long docstrings, which are cut out of the code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code: Documents = {}
    prose: Documents = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if NOT_CODE & set(name.parts) or name.stem.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = text.split("\n")  # as ast counts them: splitlines() also stops at a form feed
        said = []
        for node in sorted(docstrings(tree), key=lambda node: -node.lineno):  # from the end: earlier line numbers stay true
            said.append(inspect.cleandoc(str(node.value)))
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + '"""..."""']
        code[f"module {name}"] = [{"text": part} for part in chunks("\n".join(lines))]
        prose[f"docstrings {name}"] = [{"text": part} for text in reversed(said) for part in chunks(text)]
    return code, prose


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the docstrings that are long enough to be prose."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        body = getattr(node, "body", [])
        if not isinstance(body, list):
            continue
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            value = body[0].value.value
            if isinstance(value, str) and len(value) >= PROSE_CHARS:
                yield body[0].value
        waiting += [child for child in body if isinstance(child, ast.stmt)]


def chunks(text: str) -> Iterator[str]:
    """Yield a text in parts that end at a blank line."""
    part: list[str] = []
    size = 0
    for line in text.splitlines():
        if size >= CHUNK_CHARS and not line.strip():
            yield "\n".join(part).strip("\n")
            part, size = [], 0
        part.append(line.rstrip())
        size += len(line) + 1
    if "\n".join(part).strip():
        yield "\n".join(part).strip("\n")


def write_tokenizer(folder: Path, files: list[Path]) -> None:
    """Train a byte-level BPE on the corpus and write it as Hugging Face does.

    `<unk>` is never produced: it is there so that `<s>` and `</s>` have LLaMA's ids, 1 and 2. Digits stand alone, so
    that a number is read the same way wherever it stands.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for file in files for text in first_texts(file)), trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def first_texts(file: Path) -> Iterator[str]:
    """Yield a file's texts until they make TOKENIZER_CHARS."""
    size = 0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text = "\n".join(json.loads(line).values())
            size += len(text)
            if size > TOKENIZER_CHARS:
                return
            yield text


def show(made: dict[str, list[int]], out: Path) -> None:
    """Print what each file holds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Corpus in {out}", caption=f"tokenizer/: byte-level BPE, {VOCAB_SIZE} tokens", title_justify="left")
    table.add_column("source")
    for column in ("documents", "MB", "held-out documents", "held-out MB"):
        table.add_column(column, justify="right")
    for name in [name for name in made if not name.endswith("_valid")]:
        (documents, size), (held, held_size) = made[name], made[f"{name}_valid"]
        table.add_row(name, f"{documents:,}", f"{size / 1e6:.2f}", f"{held:,}", f"{held_size / 1e6:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
