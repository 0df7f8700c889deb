"""Whether tests assert anything when they run, from their text alone.

An answer has no say in it: were executed asserts counted, an answer that gives an empty list to a loop of asserts would make itself a fault.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_CHECKS = ("assert", "raises", "fail")  # how the names of checks that raise begin: assertEqual, assert_allclose, raises


def asserts_when_run(tests: str) -> bool:
    """Say whether a module's own statements, or functions that they call, hold an assert, a raise, or a call of a check that raises.

    A function counts as called where it is called by name or as an attribute, is an argument of a call, or is looped over.
    Raises: SyntaxError: the tests are no Python.
    """
    module = ast.parse(tests)
    functions: dict[str, list[ast.AST]] = {}
    for node in ast.walk(module):
        if isinstance(node, _FUNCTIONS):
            functions.setdefault(node.name, []).append(node)
    defined = set(functions)
    waiting: list[ast.AST] = [module]
    while waiting:
        for node in _run_by(waiting.pop()):
            if isinstance(node, (ast.Assert, ast.Raise)):
                return True
            if isinstance(node, ast.Call) and (name := _name(node.func)).startswith(_CHECKS) and name not in defined:
                return True
            waiting += [function for name in _called(node) for function in functions.pop(name, [])]
    return False


def _run_by(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs in a module or a function, without the bodies of the functions that it defines, and branches that never run."""
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        child = waiting.pop()
        yield child
        if isinstance(child, (ast.If, ast.While)) and _is_never(child.test):
            waiting += child.orelse
        elif not isinstance(child, (*_FUNCTIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(child)


def _is_never(test: ast.expr) -> bool:
    """Say whether a condition is a false constant, or __name__ == "__main__": the tests are no main module."""
    if isinstance(test, ast.Constant):
        return not test.value
    sides = [test.left, *test.comparators] if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq) else []
    return any(_name(side) == "__name__" for side in sides) and any(
        isinstance(side, ast.Constant) and side.value == "__main__" for side in sides
    )


def _called(node: ast.AST) -> set[str]:
    """Return the names that a node calls, or hands to what may call them."""
    if isinstance(node, ast.Call):
        handed: list[ast.AST] = [*node.args, *node.keywords]
        return {_name(node.func)} | {_name(part) for one in handed for part in ast.walk(one)}
    if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        return {_name(part) for part in ast.walk(node.iter)}
    return set()


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
