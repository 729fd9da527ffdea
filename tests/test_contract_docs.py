"""docs/contract.md and docs/inject.md say what the code has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from anykvm.layers.contract import RULES
from anykvm.layers.inject import Rule
from anykvm.layers.inject.sites import FAULTS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_rule_of_the_contract_is_listed() -> None:
    text = (DOCS / "contract.md").read_text()
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.whose} | {rule.text} | {rule.document} |" in text


def test_every_key_and_fault_is_explained() -> None:
    text = (DOCS / "inject.md").read_text()
    for name in [entry.name for entry in fields(Rule) if entry.name not in ("site", "gpa_end")] + list(FAULTS):
        assert f"`{name}`" in text, name
