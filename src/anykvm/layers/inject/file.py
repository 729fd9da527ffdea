"""Rules from a TOML file, or from a command line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from anykvm.layers.inject.rule import Rule, RuleError

_HEADER: Final = re.compile(r"\s*\[\[\s*rule\s*\]\]")


def load(path: str | Path) -> tuple[Rule, ...]:
    """Read a file of ``[[rule]]`` tables, whose keys are ``Rule``'s fields.

    ``gpa`` may be an address, or the text ``"0x1000-0x3000"``. Raises RuleError with one line that begins with the
    file's name and the line; OSError if it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(str(path), f"not UTF-8 at byte {error.start}") from None
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RuleError(str(path), f"not TOML: {error}") from None
    unknown = sorted(set(content) - {"rule"})
    tables = content.get("rule", [])
    if unknown:
        raise RuleError(
            f"{path}:{_line(text, unknown[0])}", f"{unknown[0]}: there are [[rule]] tables, and nothing else"
        )
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RuleError(f"{path}:{_line(text, 'rule')}", "rule: not a [[rule]] table")
    if not tables:
        raise RuleError(str(path), "there is no [[rule]]")
    return tuple(_rule(path, text, number, table) for number, table in enumerate(tables))


def _rule(path: str | Path, text: str, number: int, table: dict[str, Any]) -> Rule:
    try:
        return Rule.make(table)
    except RuleError as error:
        raise RuleError(f"{path}:{_line(text, error.key, number)}", f"rule {number + 1}: {error}") from None


def _line(text: str, key: str, table: int = -1) -> int:
    """Find the line of a key in the ``table``-th rule, or outside them; the table's own line where it is not found."""
    at, found = -1, 1
    for line, content in enumerate(text.splitlines(), 1):
        if _HEADER.match(content):
            at += 1
            found = line if at == table else found
        elif at == table and re.match(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[\]=.]""", content):
            return line
    return found


def rules(arguments: Iterable[str]) -> tuple[Rule, ...]:
    """Read rules as a command line gives them: each argument is a rule, or a file whose name ends with ``.toml``.

    Raises as ``load``.
    """
    found: list[Rule] = []
    for argument in arguments:
        found += load(argument) if argument.endswith(".toml") else [Rule.parse(argument)]
    return tuple(found)
