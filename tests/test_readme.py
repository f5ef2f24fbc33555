"""The README's Python blocks run, in order, each file's blocks as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_blocks_are_found():
    assert blocks("a\n```python\nx = 1\n```\n```\ny\n```\n```python\nx += 1\n```\n") == ["x = 1\n", "x += 1\n"]


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source tree")
def test_readme_runs():
    found = blocks(README.read_text())
    assert found, "the README shows no Python"
    namespace: dict[str, object] = {"__name__": "readme"}
    for k, block in enumerate(found):
        exec(compile(block, f"README.md, Python block {k + 1}", "exec"), namespace)


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source tree")
def test_first_code_comes_early():
    lines = README.read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```")) <= 15
