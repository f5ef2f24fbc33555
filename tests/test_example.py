"""examples/rollouts.py: its own arithmetic, and two small runs whose printed tables must agree with Theorem 1."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _name in ("textblob", "tqdm", "transformers"):
    pytest.importorskip(_name, reason="examples/rollouts.py needs it")

SCRIPT = Path(__file__).parents[1] / "examples" / "rollouts.py"
SMALL = ["--steps", "2", "--batch-size", "16", "--new-tokens", "8", "--pretrain-steps", "5", "--learning-rate", "1e-2"]
COLUMNS = ("reward", "mean", "std", "min", "max", "positive", "clipped", "a_i", "weight")
REWARD_RANGES = {"length": (0.5, 1.5), "sentiment": (-1.0, 1.0), "non-repetition": (0.0, 1.0)}
NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def rollouts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rollouts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rollouts"] = module  # where `from __future__ import annotations` looks names up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def parse(output: str) -> list[tuple[float, dict[str, dict[str, float]]]]:
    """``(s*, {objective: {column: number}})`` of each step."""
    steps = []
    for block in re.split(r"^step \d+  ", output.split("\nmean reward")[0], flags=re.MULTILINE)[1:]:
        value = re.match(rf"s\* ({NUMBER})  KL {NUMBER}  clip {NUMBER}%  tokens \d+  \"", block)
        assert value, block
        rows = {}
        for name in REWARD_RANGES:
            row = re.search(rf"^    {name} .*$", block, flags=re.MULTILINE)
            assert row, f"{name} is missing in {block}"
            numbers = [float(number) for number in re.findall(NUMBER, row.group())]
            rows[name] = dict(zip(COLUMNS, numbers, strict=True))
        steps.append((float(value.group(1)), rows))
    return steps


def check(output: str, steps: int, epochs: int) -> None:
    parsed = parse(output)
    assert len(parsed) == steps
    for value, rows in parsed:
        scalars = [row["a_i"] for row in rows.values()]
        assert value == min(scalars) >= 0  # Noon leaves no a_i below 0, so s* is the smallest; all are rounded alike
        assert sum(row["weight"] for row in rows.values()) == pytest.approx(1, abs=2e-3)  # three decimals are printed
        for name, row in rows.items():
            low, high = REWARD_RANGES[name]
            assert low <= row["reward"] <= high
            assert row["min"] <= row["mean"] <= row["max"] and row["std"] >= 0
            assert row["weight"] == 0 or row["a_i"] == value
    clipped = [row["clipped"] for _, rows in parsed for row in rows.values()]
    if epochs == 1:
        assert not any(clipped)  # u = 1 before the first update: log-probs line up with those of the rollout
    else:
        assert any(clipped)
    costs = re.findall(rf"pama_ext +({NUMBER}) us   eager PyTorch +({NUMBER}) us +({NUMBER}) x$", output, re.MULTILINE)
    assert len(costs) == 2
    assert all(float(number) > 0 for row in costs for number in row)


def test_default_model_prints_every_step() -> None:
    done = run(*SMALL, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    check(done.stdout, steps=2, epochs=2)
    assert "pre-training: 100%" in done.stderr and "Noon PPO: 100%" in done.stderr


def test_model_option_loads_a_model_and_its_tokenizer(rollouts: ModuleType, tmp_path: Path) -> None:
    lm, tokenizer = rollouts.make_model(rollouts.CORPUS.read_text().splitlines(), new_tokens=8, steps=2)
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = run(*SMALL, "--epochs", "1", "--model", str(tmp_path))
    assert done.returncode == 0, done.stderr
    check(done.stdout, steps=2, epochs=1)
    assert "pre-training" not in done.stderr


def test_options_out_of_range_are_refused(
    rollouts: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rollouts.py", "--steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        rollouts.main()
    assert "must be positive" in capsys.readouterr().err


def test_log_probs_are_those_of_the_completion_tokens(rollouts: ModuleType) -> None:
    logits, tokens = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    found = rollouts.token_log_probs(logits, tokens)
    for b, t in ((0, 0), (1, 2)):
        position = rollouts.PROMPT + t
        expected = logits[b, position - 1].log_softmax(-1)[tokens[b, position]]
        torch.testing.assert_close(found[b, t], expected)
    assert found.shape == (2, 6 - rollouts.PROMPT)


def test_completion_ends_with_its_first_end_token(rollouts: ModuleType) -> None:
    completions = torch.tensor([[5, 6, 7], [5, 0, 0], [0, 5, 0]])
    expected = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    assert torch.equal(rollouts.completion_mask(completions, end=0), expected)


def test_rewards(rollouts: ModuleType) -> None:
    assert [rollouts.score("", tokens, 140)[0] for tokens in (1, 70, 140, 210, 400)] == [0.5, 0.5, 1.0, 1.5, 1.5]
    good, bad = (rollouts.score(f"It is a {word} film.", 6, 16)[1] for word in ("wonderful", "terrible"))
    assert bad < 0 < good
    assert [rollouts.score(text, 4, 16)[2] for text in ("a b c d", "a a b B", "")] == [1.0, 0.5, 0.0]
