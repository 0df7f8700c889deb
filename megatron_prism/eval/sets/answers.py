"""Sets whose answer is a number or an expression: AIME 2024 and 2025, MATH-500, GSM8K."""

from __future__ import annotations

from megatron_prism.eval.question import Question
from megatron_prism.eval.sets.prompt import asked, id_of
from megatron_prism.eval.sets.rows import Row
from megatron_prism.grade import math

# QwenLM/Qwen2.5-Math, evaluation/utils.py, PROMPT_TEMPLATES: "deepseek-math" as a text, the user's turn of "qwen-boxed" as a chat.
INSTRUCTION = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
AIME_FIELDS = ("id", "ID", "problem", "Problem", "question", "Question", "answer", "Answer", "expected_answer", "solution")
MATH_FIELDS = ("problem", "answer", "subject", "level", "unique_id")
GSM8K_FIELDS = ("question", "answer")


def aime(row: Row, chat: bool) -> Question:
    """Read a problem of AIME. The answer stands in a field of its own, or in the box of the solution (math-ai/aime24)."""
    problem = row.text("problem", "Problem", "question", "Question")
    if any(row.get(name) is not None for name in ("answer", "Answer", "expected_answer")):
        gold = row.text("answer", "Answer", "expected_answer").strip()
    else:
        gold = (math.last_boxed(row.text("solution")) or "").strip()
    if not (gold.isdecimal() and gold.isascii() and 0 <= int(gold) <= 999) and not row.problems:
        row.wrong(f"the answer {gold!r}", "an integer from 0 to 999, as each answer of AIME is")
    return _question(row, chat, problem, str(int(gold)) if gold.isdecimal() else gold, ("id", "ID"), {})


def math500(row: Row, chat: bool) -> Question:
    """Read a problem of MATH-500."""
    tags = {name: str(value) for name in ("subject", "level") if (value := row.get(name)) is not None}
    return _question(row, chat, row.text("problem"), row.text("answer").strip(), ("unique_id",), tags)


def gsm8k(row: Row, chat: bool) -> Question:
    """Read a problem of GSM8K. The answer follows `####`."""
    steps = row.text("answer")
    _, mark, gold = steps.rpartition("####")
    if steps and not (mark and gold.strip()):
        row.wrong("field 'answer' without '####' and an answer", "the answer behind '####'")
    return _question(row, chat, row.text("question"), gold.strip().replace(",", ""), (), {})


def _question(row: Row, chat: bool, problem: str, gold: str, ids: tuple[str, ...], tags: dict[str, str]) -> Question:
    if gold and (why := math.unfit_gold(gold)):
        row.wrong(why, "an answer that can be compared")
    prompt = asked(INSTRUCTION.format(problem=problem.strip()), chat, "\n\n")
    return Question(id=id_of(row, problem, *ids), prompt=prompt, kind="math", gold=gold, tags=tags)
