"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from vmm_helpers import anykvm, require_soft

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_prints_what_it_says() -> None:
    require_soft()
    found = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", TEXT, re.DOTALL)
    assert found
    code, shown = found.groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == re.sub(r"^    ", "", shown, flags=re.MULTILINE)
    assert len(code.splitlines()) <= 15


def test_the_commands_exist() -> None:
    for name in re.findall(r"^    anykvm (\w+)", TEXT, re.MULTILINE):
        assert anykvm(name, "--help").returncode == 0
