"""Polynomials with rational coefficients in letters, pi and square roots of integers, in a normal form where equal ones look the same.

The form is unique: pi is transcendental, and square roots of different squarefree integers are linearly independent over the rationals.
"""

from __future__ import annotations

import math
from fractions import Fraction

MAX_TERMS, MAX_RADICAND, MAX_BITS, MAX_DEGREE = 64, 10**6, 256, 64
NEAR, NEAR_DECIMAL = 1e-6, 1e-4  # relative; math-verify compares 6 places where one side is a decimal

Monomial = tuple[int, tuple[tuple[str, int], ...]]  # a squarefree radicand, and letters or "pi" with their exponents
Scalar = dict[Monomial, Fraction]
ONE: Monomial = (1, ())
INFINITY: Scalar = {(1, (("oo", 1),)): Fraction(1)}


class Undecided(Exception):
    """A text is beyond the grammar, or it can be read in two ways, or two values are near and not equal."""


def add(one: Scalar, other: Scalar) -> Scalar:
    total = dict(one)
    for monomial, factor in other.items():
        total[monomial] = total.get(monomial, Fraction(0)) + factor
    return _checked({monomial: factor for monomial, factor in total.items() if factor})


def times(one: Scalar, other: Scalar) -> Scalar:
    if not all(scalar or not INFINITY.keys() & beside.keys() for scalar, beside in ((one, other), (other, one))):
        raise Undecided  # nothing times infinity
    product: Scalar = {}
    for (radicand, atoms), factor in one.items():
        for (radicand_2, atoms_2), factor_2 in other.items():
            common = math.gcd(radicand, radicand_2)
            exponents = dict(atoms)
            for atom, exponent in atoms_2:
                exponents[atom] = exponents.get(atom, 0) + exponent
            key = (radicand * radicand_2 // common**2, tuple(sorted((atom, exponent) for atom, exponent in exponents.items() if exponent)))
            product[key] = product.get(key, Fraction(0)) + factor * factor_2 * common
    return _checked({monomial: factor for monomial, factor in product.items() if factor})


def _checked(scalar: Scalar) -> Scalar:
    """Return a scalar of a bounded size. Infinity is no number: it stands alone, with a sign."""
    if len(scalar) > MAX_TERMS:
        raise Undecided
    for (radicand, atoms), factor in scalar.items():
        if ("i", 2) in atoms:  # the imaginary unit, or not
            raise Undecided
        if max(factor.numerator.bit_length(), factor.denominator.bit_length(), radicand.bit_length()) > MAX_BITS:
            raise Undecided
        if any(abs(exponent) > MAX_DEGREE for _, exponent in atoms):  # a power of pi that no float holds
            raise Undecided
        if any(atom == "oo" for atom, _ in atoms) and (len(scalar) > 1 or abs(factor) != 1 or (radicand, atoms) not in INFINITY):
            raise Undecided
    return scalar


def inverse(scalar: Scalar) -> Scalar:
    """Return 1 / scalar of a constant that is one term."""
    if len(scalar) != 1:
        raise Undecided
    ((radicand, atoms), factor), *_ = scalar.items()
    if any(atom != "pi" for atom, _ in atoms):
        raise Undecided
    return {(radicand, tuple((atom, -exponent) for atom, exponent in atoms)): 1 / (factor * radicand)}


def root(scalar: Scalar) -> Scalar:
    """Return the square root of a positive rational."""
    value = scalar.get(ONE, Fraction(0))
    if set(scalar) != {ONE} or value < 0:
        raise Undecided
    radicand, outside = value.numerator * value.denominator, 1
    if radicand > MAX_RADICAND:
        raise Undecided
    for divisor in range(2, math.isqrt(radicand) + 1):
        while radicand % divisor**2 == 0:
            radicand, outside = radicand // divisor**2, outside * divisor
        if divisor * divisor > radicand:
            break
    return {(radicand, ()): Fraction(outside, value.denominator)}


def is_constant(scalar: Scalar) -> bool:
    return all(atom in ("pi", "oo") for _, atoms in scalar for atom, _ in atoms)


def value_of(scalar: Scalar) -> float:
    """Return a constant, or one letter's coefficient, as a float."""
    value = 0.0
    for (radicand, atoms), factor in scalar.items():
        if (radicand, atoms) in INFINITY:
            return math.inf * factor
        value += float(factor) * math.sqrt(radicand) * math.prod(math.pi**exponent for atom, exponent in atoms if atom == "pi")
    return value


def same(one: Scalar, other: Scalar, has_decimal: bool) -> bool:
    """Say whether two scalars are equal.

    Raises: Undecided: they differ by so little that a comparison of decimals could find them equal, or by the name of a product.
    """
    if one == other:
        if _is_letter(one):  # math-verify finds x and 1x apart
            raise Undecided
        return True
    if INFINITY.keys() & (one.keys() | other.keys()):
        return False
    if has_decimal and not (is_constant(one) and is_constant(other)):
        raise Undecided
    if any(map(_is_product_of_letters, (one, other))):  # ab is the name of one variable, or a product
        raise Undecided
    difference = add(one, {monomial: -factor for monomial, factor in other.items()})
    by_letters: dict[tuple[tuple[str, int], ...], Scalar] = {}
    for (radicand, atoms), factor in difference.items():
        letters = tuple(atom for atom in atoms if atom[0] != "pi")
        by_letters.setdefault(letters, {})[radicand, atoms] = factor
    largest = max(abs(value_of({monomial: factor})) for side in (one, other) for monomial, factor in side.items())
    near = (NEAR_DECIMAL if has_decimal else NEAR) * max(1.0, largest)
    if not any(abs(value_of(coefficient)) > near for coefficient in by_letters.values()):
        raise Undecided
    return False


def _is_letter(scalar: Scalar) -> bool:
    return list(scalar.values()) == [1] and all(
        radicand == 1 and len(atoms) == 1 and len(atoms[0][0]) == 1 and atoms[0][1] == 1 for radicand, atoms in scalar
    )


def _is_product_of_letters(scalar: Scalar) -> bool:
    return len(scalar) == 1 and all(factor == 1 and radicand == 1 and len(atoms) > 1 for (radicand, atoms), factor in scalar.items())
