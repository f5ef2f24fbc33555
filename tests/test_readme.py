"""The README's Python blocks run, in order, as one program; docs/numerics.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pama_ext import Normalize

ROOT = Path(__file__).resolve().parent.parent
README, NUMERICS = ROOT / "README.md", ROOT / "docs" / "numerics.md"


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


@pytest.mark.skipif(not NUMERICS.exists(), reason="the tests run without the source tree")
def test_every_test_that_numerics_names_exists():
    named = re.findall(r"\[(test_\w+\.py)(?:::(\w+))?\]", NUMERICS.read_text())
    assert len(named) > 30
    for file, function in named:
        assert function and f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), f"{file}::{function}"


@pytest.mark.skipif(not NUMERICS.exists(), reason="the tests run without the source tree")
def test_numerics_lists_the_presets():
    presets = [name for name, value in vars(Normalize).items() if isinstance(value, classmethod)]
    assert len(presets) == 8
    for name in presets:
        assert f"| `{name}` |" in NUMERICS.read_text(), name
