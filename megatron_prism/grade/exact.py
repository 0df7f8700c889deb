"""Decide whether two answers are equal without algebra software: both are read into a normal form, where equal values look the same.

A value is a scalar (scalar.py), a tuple or interval of constants, a set, a matrix of constants, or a linear equation for a letter. What this
grammar does not read, what LaTeX or math-verify reads in another way, and what is near but not equal is left undecided: `compare` says None,
and math-verify decides. bench/agree.py compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_prism.grade.scalar import INFINITY, ONE, Scalar, Undecided, add, inverse, is_constant, root, same, times, value_of

MAX_CHARS, MAX_EXPONENT = 300, 12
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<letter>[A-Za-z])|(?P<command>\\(?:[A-Za-z]+|[{}\\]))|(?P<sign>[-+*/^_=(){}\[\],&]))"
)
_IGNORED = re.compile(r"\\left(?=[(\[]|\\\{)|\\right(?=[)\]]|\\\})|\\!\s*|\\displaystyle(?![A-Za-z])")
_DEGREE = re.compile(r"(?<=[0-9)}])\s*\^(?:\\circ(?![A-Za-z])|\{\\circ\})")  # no factor: math-verify drops it
# what math-verify's normalisation or LaTeX reads in another way: thousands, digits behind a group, products of bare letters, units at the end
_AMBIGUOUS = re.compile(
    r"[0-9],\s*[0-9]{3}|\}\s*[0-9]|\^\s*[0-9]{2}|(?<![\\A-Za-z])[A-Za-z]\s*[A-Za-z]|[thclsgmdoTHCLSGMDO]\s*$|[0-9]\s+[.0-9]"
)
_NO_LETTER = frozenset("deDEIOST")  # differentials, Euler's number, the imaginary unit, a transposed matrix
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_OPEN, _CLOSE = ("(", "["), (")", "]")


@dataclass(frozen=True)
class Value:
    """What a text says. kind: scalar, set, `(..)` and the like for a tuple or interval, matrix RxC, or `x=` for an equation."""

    kind: str
    parts: tuple[Scalar, ...]
    has_decimal: bool
    has_case: bool


def compare(gold: str, answer: str) -> bool | None:
    """Say whether two answers are equal, or None where it cannot be said exactly."""
    try:
        one, other = read(gold), read(answer)
        if one.kind.endswith("=") and other.kind == "scalar":  # x = 5 and 5
            one = Value("scalar", one.parts, one.has_decimal, one.has_case)
        elif other.kind.endswith("=") and one.kind == "scalar":
            other = Value("scalar", other.parts, other.has_decimal, other.has_case)
        if one.kind != other.kind:
            return None
        has_decimal = one.has_decimal or other.has_decimal
        if one.kind == "set":
            is_same = _same_set(one.parts, other.parts, has_decimal)
        elif len(one.parts) != len(other.parts):
            is_same = False
        else:
            equal = [same(part, beside, has_decimal) for part, beside in zip(one.parts, other.parts, strict=True)]
            is_same = all(equal)
    except (Undecided, RecursionError):
        return None
    return None if is_same and (has_decimal or one.has_case or other.has_case) else is_same


def are_apart(one: str, other: str, by: float = 0.0) -> bool:
    """Say whether two texts are constants, and certainly different ones: by more than a share of the larger."""
    try:
        values = read(one), read(other)
        if not all(value.kind == "scalar" and is_constant(value.parts[0]) for value in values) or compare(one, other) is not False:
            return False
        numbers = [value_of(value.parts[0]) for value in values]
    except (Undecided, RecursionError):
        return False
    return not abs(numbers[0] - numbers[1]) <= by * max(map(abs, numbers))


@lru_cache(maxsize=4096)
def read(text: str) -> Value:
    """Return the value of a text.

    Raises: Undecided.
    """
    text = _DEGREE.sub(" ", _IGNORED.sub("", text)).strip().removeprefix("\\$").strip("$ ")
    if len(text) > MAX_CHARS or not text.isascii():
        raise Undecided
    if match := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in match[2].split("\\\\")]
        if len({len(row) for row in rows}) != 1:
            raise Undecided
        return _value(f"{match[1]}matrix {len(rows)}x{len(rows[0])}", [_Reader(cell) for row in rows for cell in row])
    reader = _Reader(text)
    if (based := re.fullmatch(r"([0-9]+)_(?:([0-9])|\{([0-9]{1,2})\})", text)) is not None:
        return Value(f"base {based[2] or based[3]}", ({ONE: Fraction(int(based[1]))},), False, False)
    if len(reader.tokens) > 2 and reader.tokens[1] == "=" and reader.tokens[0].isalpha():
        return _equation(reader)
    return _collection(reader)


def _value(kind: str, readers: list[_Reader]) -> Value:
    parts = [reader.whole() for reader in readers]
    value = Value(kind, tuple(parts), any(one.has_decimal for one in readers), any(one.has_case for one in readers))
    if kind != "scalar" and not all(map(is_constant, parts)):
        raise Undecided
    return value


def _equation(reader: _Reader) -> Value:
    """Return a linear equation `x = ...` that is solved for its letter."""
    name = reader.letter(reader.tokens[0])
    reader.at = 2
    scalar = reader.whole()
    degrees = [sum(exponent for atom, exponent in atoms if atom != "pi") for _, atoms in scalar]
    if any(degree > 1 for degree in degrees) or any(atom == name for _, atoms in scalar for atom, _ in atoms):
        raise Undecided
    return Value(f"{name}=", (scalar,), reader.has_decimal, reader.has_case)


def _collection(reader: _Reader) -> Value:
    """Return a scalar, a tuple, an interval, or a set."""
    tokens = reader.tokens
    kind = "set"
    if tokens and tokens[0] in _OPEN and tokens[-1] in _CLOSE and (tokens[0] == "[" or "," in _outside(tokens[1:-1])):
        kind, tokens = f"{tokens[0]}{tokens[-1]}", tokens[1:-1]
    elif tokens and tokens[0] == "\\{" and tokens[-1] == "\\}":
        tokens = tokens[1:-1]
    elif "," not in _outside(tokens):
        kind = "scalar"
    inner = _Reader("")
    inner.tokens = tokens
    elements = inner.elements()
    if kind == "scalar" and len(elements) == 2:
        kind = "set"  # a plus or minus b
    is_pair = len(elements) == 2 and "\\pm" not in tokens
    if kind not in ("scalar", "set"):
        if not all(map(is_constant, elements)) or not (is_pair or kind == "()"):
            raise Undecided
        if kind != "()" and not value_of(elements[0]) < value_of(elements[1]):  # an empty set, or a tuple after all
            raise Undecided
    return Value(kind, tuple(elements), inner.has_decimal, inner.has_case)


def _outside(tokens: list[str]) -> list[str]:
    """Return the tokens that stand in no bracket."""
    outside, depth = [], 0
    for token in tokens:
        depth -= token in (")", "]", "}", "\\}")
        if depth == 0:
            outside.append(token)
        depth += token in ("(", "[", "{", "\\{")
    return outside


class _Reader:
    """Reads scalars from tokens, by recursive descent."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.at = 0
        self.has_decimal = self.has_case = False
        end = 0
        text = text.strip()
        if _AMBIGUOUS.search(text):
            raise Undecided
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None:
                raise Undecided
            self.tokens.append(match[0].strip())
            end = match.end()

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, token: str = "") -> str:
        taken = self.next
        if not taken or (token and taken != token):
            raise Undecided
        self.at += 1
        return taken

    def whole(self) -> Scalar:
        scalar = self.sum()
        if self.next:
            raise Undecided
        return scalar

    def elements(self) -> list[Scalar]:
        """Return scalars between commas; `a \\pm b` are two."""
        scalars = []
        while True:
            scalar = {} if self.next == "\\pm" else self.sum()
            if self.next == "\\pm":
                self.take()
                other = self.product()
                if self.next not in ("", ","):  # a plus or minus b, plus c
                    raise Undecided
                scalars += [add(scalar, other), add(scalar, times(other, {ONE: Fraction(-1)}))]
            else:
                scalars.append(scalar)
            if not self.next:
                return scalars
            self.take(",")

    def sum(self) -> Scalar:
        total: Scalar = {}
        sign = self.take() if self.next in ("+", "-") else "+"
        while True:
            total = add(total, times(self.product(), {ONE: Fraction(-1 if sign == "-" else 1)}))
            if self.next not in ("+", "-"):
                return total
            sign = self.take()

    def product(self) -> Scalar:
        scalar = self.juxtaposed()
        while self.next in ("*", "\\cdot", "\\times", "/"):
            sign = self.take()
            other = self.juxtaposed(may_be_several=sign != "/")
            scalar = times(scalar, inverse(other) if sign == "/" else other)
        return scalar

    def juxtaposed(self, may_be_several: bool = True) -> Scalar:
        """Return factors that stand side by side; an integer before a fraction of integers is a mixed number."""
        begins_with_integer = self.next.isdigit()
        factors = [self.power()]
        fraction_at = -1
        while (
            self.next and (self.next[0] in "(\\" or self.next.isalnum()) and self.next not in ("\\cdot", "\\times", "\\pm", "\\}", "\\\\")
        ):
            before = self.tokens[self.at - 1]
            if self.next == "(" and (before.isalpha() or before == "\\pi"):  # a function's argument
                raise Undecided
            if self.next[0].isdigit() or self.next[0] == ".":
                raise Undecided
            fraction_at = len(factors) if self.next in ("\\frac", "\\dfrac", "\\tfrac") else fraction_at
            factors.append(self.power())
        rationals = [index for index, factor in enumerate(factors) if set(factor) <= {ONE}]
        if not may_be_several and (len(factors) > 1 or len(rationals) != 1):  # 1/2x
            raise Undecided
        if len(rationals) > 1:
            if len(factors) == 2 and begins_with_integer and fraction_at == 1 and factors[1].get(ONE, 0) > 0 and _is_plain_fraction(self):
                return add(*factors)
            raise Undecided
        product = factors[0]
        for factor in factors[1:]:
            product = times(product, factor)
        return product

    def power(self) -> Scalar:
        base = self.atom()
        if self.next != "^":
            return base
        self.take()
        is_braced = self.next == "{"
        if is_braced:
            self.take()
        exponent = self.take()
        if is_braced:
            self.take("}")
        if not exponent.isdigit() or not 1 <= int(exponent) <= MAX_EXPONENT or self.next == "^":
            raise Undecided
        power = base
        for _ in range(int(exponent) - 1):
            power = times(power, base)
        return power

    def atom(self) -> Scalar:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            self.has_decimal |= "." in token
            return {ONE: Fraction(token)} if Fraction(token) else {}
        if token.isalpha():
            return {(1, ((self.letter(token), 1),)): Fraction(1)}
        if token == "\\pi":
            return {(1, (("pi", 1),)): Fraction(1)}
        if token == "\\infty":
            return dict(INFINITY)
        if token == "(":
            scalar = self.sum()
            self.take(")")
            return scalar
        if token == "\\sqrt":
            return root(self.argument())
        if token in ("\\frac", "\\dfrac", "\\tfrac"):
            over, under = self.argument(), self.argument()
            return times(over, inverse(under))
        raise Undecided

    def letter(self, token: str) -> str:
        if token in _NO_LETTER:
            raise Undecided
        self.has_case |= token.isupper() or token == "i"
        return token.lower()

    def argument(self) -> Scalar:
        """Return what a command is given: a group in braces, or one digit."""
        if self.next != "{":
            digits = self.take()
            if len(digits) == 2 and self.tokens[self.at - 2] in ("\\frac", "\\dfrac", "\\tfrac"):  # 12: two arguments
                self.tokens[self.at - 1 : self.at] = list(digits)
                digits = digits[0]
            if not (len(digits) == 1 and digits.isdigit()):
                raise Undecided
            return {ONE: Fraction(digits)} if digits != "0" else {}
        self.take("{")
        scalar = self.sum()
        self.take("}")
        return scalar


def _is_plain_fraction(reader: _Reader) -> bool:
    """Say whether the last tokens are an integer and \\frac{integer}{integer}."""
    text = "".join(reader.tokens[: reader.at])
    return re.search(r"[0-9]\\[dt]?frac(?:\{[0-9]+\}\{[0-9]+\}|[0-9]{2})$", text) is not None


def _same_set(gold: tuple[Scalar, ...], answer: tuple[Scalar, ...], has_decimal: bool) -> bool:
    equal = [[same(one, other, has_decimal) for other in answer] for one in gold]
    for side in (gold, answer):
        if any(one == other for index, one in enumerate(side) for other in side[:index]):
            raise Undecided  # an element twice
    return len(gold) == len(answer) and all(map(any, equal))
