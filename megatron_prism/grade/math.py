"""Mathematical answers: which text is the answer, and the verdicts that need no algebra. What is left goes to math-verify (workers.py).

What is refused here although math-verify takes it (docs/GRADE.md): several numbers beside the gold in a text, an equation between two
different numbers, another number base, a box with more than a box inside, an anagram of a word, and a tiny number that is merely near.
"""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction

from megatron_prism.core.config.grade import AnswerForm
from megatron_prism.grade import exact
from megatron_prism.grade.number import without_exponent

MAX_ANSWER_CHARS = 2000  # the longest gold of MATH-500 has 57
MAX_WORD_CHARS = 64  # of an answer without a box
MAX_DIGITS = 200
RELATIVE_ERROR = Fraction(1, 100_000)  # between a rounded decimal and the gold
ROUNDED = 0.02  # what the two sides of \\approx may differ by
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))|([+-]?)([0-9]+)/([0-9]+)")
_SEPARATOR = re.compile(r"[\s,;$]*(?:(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})?[\s,;$]*")
TEXT = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|it|bf|sf|tt)|boldsymbol|[mhf]box|operatorname|bf)\s*\{([^{}]*)\}"
)  # the commands that set text
_MODE = re.compile(r"(?:\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\])\.?", re.DOTALL)
_NAME = re.compile(r"([A-Za-z])\s*=\s*")
_UNIT = re.compile(r"\s*(?:\\(?:text|mbox)\s*\{\s*([A-Za-z .]*)\}(?:\^\{?[23]\}?)?|\^\{?\\circ\}?)$")
_BARE_UNIT = re.compile(r"(?<=[0-9])\s+([a-z]{4,}(?: [a-z]{2,}){0,2})\.?$")  # words of prose: no product of letters
_MULTIPLIES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "pi"}
_HEDGES = {"or", "not", "either", "neither", "maybe", "perhaps", "if", "else", "otherwise", "unless"} | set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety".split()
)
_NO_UNIT = _MULTIPLIES | _HEDGES | {"and", "percent"}
# bare golds that are words, not products of letters: short ones by name, longer ones by their look
_SHORT_WORDS = {"no", "yes", "on", "off", "odd", "all", "any", "tie", "red"}
_NAMES = {
    "sin",
    "cos",
    "tan",
    "sec",
    "csc",
    "cot",
    "log",
    "exp",
    "max",
    "min",
    "gcd",
    "lcm",
    "sqrt",
    "sinh",
    "cosh",
    "tanh",
    "coth",
    "asin",
    "acos",
    "atan",
    "arcsin",
    "arccos",
    "arctan",
    "infinity",
    "infty",
} | set("alpha beta gamma delta epsilon zeta theta iota kappa lambda omicron sigma upsilon omega".split())
_CHANGES = set("half halve third fourth fifth sixth seventh eighth ninth tenth hundredth thousandth squared cubed factorial".split())
_NO_BARE_UNIT = _NO_UNIT | _NAMES | _CHANGES
SPACE = re.compile(r"\\[ ,;:]|~")  # LaTeX's spaces
_COMMA = r"(?:\\(?:text|mathrm))?\{,\}"  # one that LaTeX sets without a space
_GROUPED = re.compile(
    rf"(?<![0-9.])[0-9]{{1,3}}(?:(?:{SPACE.pattern}|{_COMMA})[0-9]{{3}})+(?![0-9])"
)  # thousands, by spaces or such commas
_REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}(?![0-9])")
_EQUALS = re.compile(r"((?<![<>!\\])=|\\(?:approx|simeq|equiv|cong)(?![A-Za-z]))")
_SIZES = re.compile(r"\\left\s*(?=[(\[|.]|\\(?:[{|]|l[avbcf]|vert))|\\right\s*(?=[)\].|]|\\(?:[}|]|r[avbcf]|vert))|\\!")
_ONLY_NUMBERS = re.compile(r"[-+]?[0-9(){}\s]+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_LAST_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
_BASE = re.compile(r"[0-9A-Za-z]_\{?([0-9]+)\}?$")


def extract(answer: str, form: AnswerForm) -> str | None:
    """Return the text of the answer that a response commits to, or None where it has none in the form that is asked for."""
    if form == "last_line":
        return answer.rsplit("\n", 1)[-1].strip() or None
    boxed = last_boxed(answer)
    if boxed is not None or form == "boxed":
        return boxed.strip() or None if boxed is not None else None
    if "\\boxed" in answer:  # a box that never closes
        return None
    if form == "boxed_or_last":
        return _last_said(answer)
    is_word = len(answer) <= MAX_WORD_CHARS and len(answer.split()) == 1
    return answer if is_word else None


def _last_said(answer: str) -> str | None:
    """Return what follows the last `answer is` in its sentence, else the last number, else None.

    Source: Qwen2.5-Math, evaluation/parser.py, extract_answer: its order. Its rewriting of the text that follows is not done here.
    """
    _, mark, said = answer.rpartition("answer is")
    if mark:
        return re.split(r"\n|\.\s", said, maxsplit=1)[0].strip(" :").removesuffix(".").strip() or None
    numbers = _LAST_NUMBER.findall(answer.replace(",", ""))
    return numbers[-1] if numbers else None


def last_boxed(answer: str) -> str | None:
    """Return what stands in the last \\boxed{} that stands in no other, or None where there is none or it never closes.

    Boxes side by side, with no more than a separator between them, are one answer of several values, as math-verify takes them.
    """
    stack: list[int] = []  # where each open brace's content begins; -1 for a brace that is no box
    num_boxes, begins, ended = 0, 0, 0
    last: list[str] | None = None
    for match in _BRACES.finditer(answer):
        if match[0].startswith("\\boxed"):
            begins = match.start() if num_boxes == 0 else begins
            num_boxes += 1
            stack.append(match.end())
        elif match[0] == "{":
            stack.append(-1)
        elif match[0] == "}" and stack:
            begin = stack.pop()
            if begin >= 0:
                num_boxes -= 1
                if num_boxes == 0:
                    content = answer[begin : match.start()]
                    is_beside = last is not None and begins - ended < MAX_WORD_CHARS and _SEPARATOR.fullmatch(answer[ended:begins])
                    last = [*(last or []), content] if is_beside and last and last[-1] != content else last if is_beside else [content]
                    ended = match.end()
    if num_boxes or last is None:
        return None
    return ",".join(filter(str.strip, last)) if last[-1].strip() else ""


def verdict(gold: str, answer: str) -> bool | None:
    """Say whether an answer is right where that is plain from the texts, else None. The gold has been looked at: see `unfit_gold`."""
    (gold_name, gold_value), (name, value) = _parts(gold), _parts(answer)
    gold_number, number = _number(gold_value), _number(value)
    if gold_number is not None and number is not None and (not gold_name or not name or gold_name == name):
        return _agree(gold_number, number, "." in gold_value, "." in value)
    if gold_number is not None and len({_number(part) for part in answer.split(",")} - {None}) > 1:
        return False  # several numbers
    gold_words = _words(gold)
    if gold_words is not None:  # never as a product of letters, which any order of them equals
        return " ".join(_text_of(answer).strip("() .").casefold().split()) == gold_words
    return True if _normal(gold) == _normal(answer) else exact.compare(gold, answer)


def unfit_gold(gold: str) -> str:
    """Say why a gold cannot be compared with anything; an empty text where it can."""
    if not gold.strip():
        return "the gold is empty"
    if len(gold) > MAX_ANSWER_CHARS:
        return f"the gold has {len(gold)} characters"
    try:
        without_exponent(gold)
    except ValueError as error:
        return f"the gold is {error}"
    return ""


def plain_pair(gold: str, answer: str) -> tuple[str, str]:
    """Return a fit gold and an answer without math mode's marks around them, as math-verify reads them, and with e-notation as plain decimals.

    The answer keeps its e-notation beside a gold with an `e` of its own, outside its texts and the names of its commands.
    """
    gold, answer = without_exponent(_readable(without_marks(gold))), _readable(without_marks(answer))
    if "e" not in re.sub(r"\\[A-Za-z]+", "", TEXT.sub("", gold)):
        with suppress(ValueError):
            answer = without_exponent(answer)
    return gold, answer


def without_marks(text: str) -> str:
    """Return a text without spaces around it, and without what begins and ends math mode around all of it: $5$, \\(5\\), \\[5\\]."""
    match = _MODE.fullmatch(text := text.strip())
    return next(filter(None, match.groups())).strip() if match else text


def _readable(text: str) -> str:
    """Return a text with what math-verify does not read spelt as it does: parted thousands, ties, repeating decimals, the empty set."""
    text = _GROUPED.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    text = _REPEATING.sub(_fraction, text.replace("~", " ").replace("{:}", ":"))
    return re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text)


def _fraction(repeating: re.Match[str]) -> str:
    """Return a decimal with a repeating end as a fraction."""
    fixed, period = repeating[1] + repeating[2], repeating[3]
    over, under = int(fixed + period) - int(fixed or "0"), (10 ** len(period) - 1) * 10 ** len(repeating[2])
    return rf"\frac{{{over}}}{{{under}}}"


def hedged(gold: str, answer: str) -> str:
    """Say why an answer that algebra could find right commits to no single value; an empty text where it does."""
    if len(answer) > MAX_ANSWER_CHARS:
        return f"an answer of {len(answer)} characters"
    if "\\boxed" in answer or "\\fbox" in answer:
        return "a box inside the box, beside other text"
    known, texts = TEXT.findall(gold), [text.strip() for text in TEXT.findall(answer)]
    said = _words_in(" ".join(text for text in texts if text.casefold() not in ("or", "and"))) - _words_in(" ".join(known))
    if said & _HEDGES or (not known and any(char.isdigit() for text in texts for char in text)):
        return "other values in words beside the answer"
    if said & _MULTIPLIES:
        return "a word that multiplies the number"
    if re.search(r"dots(?![a-z])|\.\.\.", answer) and "dots" not in gold:
        return "a list that goes on"
    if _ONLY_NUMBERS.fullmatch(re.sub(r"\\(?:left|right)", "", answer)) and len(re.findall("[0-9]+", answer)) > 1:
        return "several numbers side by side"
    sides = _EQUALS.split(answer)
    if any(exact.are_apart(sides[at], sides[at + 2], by=0.0 if sides[at + 1] == "=" else ROUNDED) for at in range(0, len(sides) - 2, 2)):
        return "an equation between different numbers"
    if (base := _base(answer)) is not None and base != (_base(gold) or 10):
        return f"a number in base {base}"
    return ""


def _words_in(text: str) -> set[str]:
    """Return a text's words in small letters, and as singulars."""
    words = re.findall("[a-z]+", text.casefold())
    return {*words, *(re.sub("ies$", "y", word) for word in words), *(re.sub("(?<=x)es$|s$", "", word) for word in words)}


def _base(text: str) -> int | None:
    match = _BASE.search(text.strip())
    return int(match[1]) if match and len(match[1]) < 4 else None


def _text_of(text: str) -> str:
    """Return a text without math mode's marks, and a \\text{} around all of it."""
    match = TEXT.fullmatch(text := without_marks(text))
    return match[1].strip() if match else text


def _words(gold: str) -> str | None:
    """Return the words of a gold that is nothing but words or \\text{words}, perhaps in parentheses; None for any other."""
    words = _text_of(gold).strip("() .")
    if not _WORDS.fullmatch(words) or not (TEXT.fullmatch(gold.strip()) or any(map(_is_word, words.split()))):
        return None
    return " ".join(words.casefold().split())


def _is_word(text: str) -> bool:
    """Say whether letters alone are a word: no product of variables (`xyz`), no polygon (`ABCE`), and no name of a function or a letter."""
    plain = text.casefold()
    if plain in _SHORT_WORDS:
        return True
    is_long, is_ascending = len(plain) >= (3 if text.istitle() else 4), list(plain) == sorted(plain)
    return is_long and not text.isupper() and not is_ascending and plain not in _NAMES and not set(plain).isdisjoint("aeiou")


def _number(text: str) -> Fraction | None:
    """Return the exact value of a plain integer, decimal or fraction, else None. ASCII digits only."""
    if len(text) > MAX_DIGITS:
        return None
    plain = re.sub(r"\\!\s*", "", _text_of(text)).removeprefix("\\$").removeprefix("$").strip()
    if _DECIMAL.fullmatch(plain) and any(char.isdigit() for char in plain):
        return Fraction(plain.replace(",", "").removesuffix("."))
    if match := _FRACTION.fullmatch(plain):
        sign = match[1] or match[6] or ""
        over, under = match[2] or match[3] or match[7], match[4] or match[5] or match[8]
        return Fraction(int(f"{sign}{over}"), int(under)) if int(under) else None
    return None


def _agree(gold: Fraction, number: Fraction, gold_is_decimal: bool, is_decimal: bool) -> bool:
    """Say whether two numbers are equal; a decimal may be rounded to 6 places, as math-verify takes it, unless the gold is an integer."""
    if gold == number or gold.denominator == 1 or not (gold_is_decimal or is_decimal):
        return gold == number
    return round(gold, 6) == round(number, 6) and abs(gold - number) <= RELATIVE_ERROR * abs(gold)


def _parts(text: str) -> tuple[str, str]:
    """Return the name that a text gives its value (`x = 5`), or an empty text, and the value without its unit."""
    text = _text_of(text)
    if match := _NAME.match(text):
        text = text[match.end() :]
    for units, none in ((_UNIT, _NO_UNIT), (_BARE_UNIT, _NO_BARE_UNIT)):
        unit = units.search(text[-100:])
        if unit and not none & _words_in(unit[1] or ""):
            return (match[1] if match else ""), text[: len(text) - len(unit[0])]
    return (match[1] if match else ""), text


def _normal(text: str) -> str:
    """Return a text without what changes no meaning: spaces (but between letters or digits), the sizes of brackets and fractions."""
    text = _SIZES.sub("", _text_of(text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<![0-9A-Za-z.]) | (?![0-9A-Za-z.])", "", re.sub(r"\s+", " ", text))
    return re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
