"""PAMA on real completions: a GPT-2 with one value head for each of three rewards, and a few Noon-PPO updates.

    python examples/rollouts.py                    tokenizer and GPT-2 are made here from corpus.txt; needs no network
    python examples/rollouts.py --model gpt2       any causal language model of the Hugging Face Hub, its own tokenizer

The paper is arXiv 2508.07768. Of its Algorithm 1, `pama_ext.gae` in `rollout` and `combine`, `policy_loss` and
`value_loss` in `update` are what this package does; all else belongs to the trainer. Shapes: B responses, T completion
tokens, N objectives.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from textblob import TextBlob
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pama_ext

CORPUS = Path(__file__).with_name("corpus.txt")
END = "<|endoftext|>"
PROMPT = 3  # tokens of a review that are given; the policy writes the rest
GAMMA, LAMBDA, CLIP, KL_COEFFICIENT = 1.0, 0.95, 0.2, 0.2  # the paper's
VALUE_COEFFICIENT, RIDGE = 0.1, 10.0

# ---- step 2: the rewards R_i(x, y) ----

OBJECTIVES = ("length", "sentiment", "non-repetition")


def score(completion: str, tokens: int, unit: float) -> list[float]:
    """Rewards of one completion, in the order of ``OBJECTIVES``.

    Length is clip(l / unit, 0.5, 1.5), which is the paper's clip(l/140, 70/140, 210/140) at ``unit`` 140. Sentiment is
    TextBlob's polarity in [-1, 1]. Non-repetition is the share of distinct words, which falls as a text grows.
    """
    words = completion.lower().split()
    length = min(max(tokens / unit, 0.5), 1.5)
    return [length, TextBlob(completion).sentiment.polarity, len(set(words)) / max(len(words), 1)]


# ---- the policy: a language model with N value heads ----


class Policy(nn.Module):
    """A causal language model and, on its last hidden states, one linear value head for each objective."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.value_heads = nn.Linear(lm.config.get_text_config().hidden_size, len(OBJECTIVES))

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B, T]`` of the completion tokens; ``[B, T, H]``, the states they were chosen in."""
        output = self.lm(input_ids=tokens, attention_mask=attention_mask, output_hidden_states=True)
        return token_log_probs(output.logits, tokens), output.hidden_states[-1][:, PROMPT - 1 : -1].float()


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T]`` from the logits ``[B, PROMPT + T, vocabulary]``; position p predicts token p + 1."""
    return -F.cross_entropy(logits[:, PROMPT - 1 : -1].float().mT, tokens[:, PROMPT:], reduction="none")


def make_model(lines: list[str], new_tokens: int, steps: int) -> tuple[Any, Any]:
    """A small GPT-2 and its tokenizer, both trained on ``lines``: a few seconds, and completions are sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1024, special_tokens=[END], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)

    encoded = tokenizer([line + END for line in lines], padding=True, return_tensors="pt")
    positions = max(encoded["input_ids"].shape[1], PROMPT + new_tokens)
    size = {"vocab_size": len(tokenizer), "n_positions": positions, "n_embd": 128, "n_layer": 2, "n_head": 4}
    lm = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).eval()  # eval: no dropout, here or in PPO

    optimizer = torch.optim.Adam(lm.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), "pre-training")):
        rows = torch.randint(len(lines), (32,))
        width = int(encoded["attention_mask"][rows].sum(1).max())
        tokens, attention_mask = encoded["input_ids"][rows, :width], encoded["attention_mask"][rows, :width]
        targets = tokens.masked_fill(attention_mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(lm(input_ids=tokens, attention_mask=attention_mask).logits[:, :-1].mT, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return lm, tokenizer


def load_model(name: str) -> tuple[Any, Any]:
    """A model of the Hub (or a folder) and its tokenizer; float32, so that log-ratios of one policy are 0."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), tokenizer


# ---- steps 1 to 3: sample, score, estimate advantages ----


class Rollout(NamedTuple):
    """One batch of completions and what its PPO epochs need; all of it constant."""

    tokens: Tensor  # [B, PROMPT + T]
    attention_mask: Tensor  # [B, PROMPT + T]
    mask: Tensor  # [B, T] bool: the completion up to its end token; prompt and padding are not in it
    log_probs: Tensor  # [B, T] under the policy that sampled
    states: Tensor  # [B, T, H]
    rewards: Tensor  # [B, N]
    advantages: Tensor  # [B, T, N]: A'_i(t)
    returns: Tensor  # [B, T, N]
    kl: Tensor  # []: KL of a completion against the reference policy, estimated over the batch
    text: str  # one of them


def completion_mask(completions: Tensor, end: int) -> Tensor:
    """True up to and including each row's first end token; what follows is padding."""
    ends = (completions == end).long()
    return ends.cumsum(1) - ends == 0


@torch.no_grad()
def rollout(policy: Policy, reference: Any, tokenizer: Any, prompts: Tensor, new_tokens: int, unit: float) -> Rollout:
    """Complete the prompts ``[B, PROMPT]``, score the completions and estimate N advantages for each token."""
    tokens = policy.lm.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,  # the policy itself, nothing truncated
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    mask = completion_mask(tokens[:, PROMPT:], tokenizer.eos_token_id)
    attention_mask = F.pad(mask.long(), (PROMPT, 0), value=1)
    log_probs, states = policy(tokens, attention_mask)
    kl = (log_probs - token_log_probs(reference(input_ids=tokens, attention_mask=attention_mask).logits, tokens)) * mask

    lengths = mask.sum(1)
    completions = tokenizer.batch_decode(tokens[:, PROMPT:], skip_special_tokens=True)
    scores = [score(text, length, unit) for text, length in zip(completions, lengths.tolist(), strict=True)]
    outcome = torch.tensor(scores, device=tokens.device)

    advantages, returns = pama_ext.gae(  # a score counts at the last token; each objective pays the KL penalty
        outcome, policy.value_heads(states), mask=mask, gamma=GAMMA, lam=LAMBDA, kl_penalty=KL_COEFFICIENT * kl
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    kl = kl.sum(1).mean()
    return Rollout(tokens, attention_mask, mask, log_probs, states, outcome, advantages, returns, kl, text)


@torch.no_grad()
def fit_value_heads(heads: nn.Linear, batch: Rollout) -> None:
    """Start the value heads at the ridge regression of the returns: without it every early advantage is positive."""
    states, returns = F.pad(batch.states[batch.mask], (0, 1), value=1.0), batch.returns[batch.mask]
    penalty = RIDGE * torch.eye(states.shape[1], device=states.device)
    solution = torch.linalg.solve(states.mT @ states + penalty, states.mT @ returns)
    heads.weight.copy_(solution[:-1].mT)
    heads.bias.copy_(solution[-1])


# ---- steps 4 to 6: combine, Noon PPO, regress the value heads ----


def update(
    policy: Policy, optimizer: torch.optim.Adam, batch: Rollout
) -> tuple[pama_ext.Combined, pama_ext.PolicyMetrics, dict[str, Any]]:
    """One PPO epoch; returns what ``combine`` and the loss found, and the arguments of ``combine``."""
    log_probs, states = policy(batch.tokens, batch.attention_mask)
    log_ratio = log_probs - batch.log_probs  # 0 in the first epoch; from the second on the indicator matters

    # Theorem 1 compares the a_i, so the objectives are put on one scale. No centring: Noon needs the sign.
    scale = batch.advantages[batch.mask].std(0, correction=0).clamp(min=1e-6)
    arguments = {
        "advantages": batch.advantages, "mask": batch.mask, "log_ratio": log_ratio.detach(),
        "clip_low": CLIP, "clip_high": CLIP, "reward_weights": 1 / scale,
    }  # fmt: skip
    combined = pama_ext.combine(**arguments)
    # A reading also found in public code gives s* to every valid token: advantages = combined.value * batch.mask

    loss, metrics = pama_ext.policy_loss(
        log_probs, batch.log_probs, combined.advantages, mask=batch.mask, clip_low=CLIP, clip_high=CLIP
    )
    value_loss, _ = pama_ext.value_loss(policy.value_heads(states), None, batch.returns, mask=batch.mask)
    loss = loss + VALUE_COEFFICIENT * value_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return combined, metrics, arguments


# ---- what is printed ----


def report(step: int, batch: Rollout, combined: pama_ext.Combined, clip_fraction: float) -> str:
    """The rewards of a rollout, and of its last epoch: statistics of A', weights, s*, share of tokens clipped."""
    metrics = combined.metrics(prefix="", names=OBJECTIVES)  # one transfer; a flat dict, ready for any logger
    lines = [
        f"step {step}  s* {metrics['value']:.4f}  KL {batch.kl:.2f}  clip {clip_fraction:.1%}  "
        f'tokens {batch.mask.sum()}  "{batch.text}"',
        "                    reward    mean     std     min     max  positive  clipped     a_i  weight",
    ]
    for name, reward in zip(OBJECTIVES, batch.rewards.mean(0).tolist(), strict=True):
        mean, std, low, high = (metrics[f"{key}/{name}"] for key in ("mean", "std", "min", "max"))
        positive, clipped = metrics[f"positive/{name}"], metrics[f"clipped/{name}"]
        lines.append(
            f"    {name:<14}{reward:8.3f}{mean:8.3f}{std:8.3f}{low:8.3f}{high:8.3f}{positive:10.1%}{clipped:9.1%}"
            f"{metrics[f'active_mean/{name}']:8.4f}{metrics[f'weight/{name}']:8.3f}"
        )
    return "\n".join(lines)


def cost(arguments: dict[str, Any]) -> str:
    """``combine`` beside eager PyTorch on the last rollout, alone and 16 times over: results compared, then timed."""
    device, threads = arguments["mask"].device, torch.get_num_threads()
    lines = [f"cost of one combine ({device}, {threads} threads, median of 21 interleaved pairs)"]
    for copies in (1, 16):
        tensors = {key: arguments[key] for key in ("advantages", "mask", "log_ratio")}
        call = arguments | {key: tensor.repeat(copies, *[1] * (tensor.dim() - 1)) for key, tensor in tensors.items()}
        functions = (pama_ext.combine, pama_ext.reference.combine)
        torch.testing.assert_close(*(function(**call) for function in functions))
        ours, eager = (Timer("f(**call)", globals={"f": f, "call": call}, num_threads=threads) for f in functions)
        pairs = [(ours.timeit(20).mean * 1e6, eager.timeit(5).mean * 1e6) for _ in range(21)]
        fast, slow = (statistics.median(times) for times in zip(*pairs, strict=True))
        shape = " x ".join(str(size) for size in call["advantages"].shape)
        lines.append(f"    {shape:<16}pama_ext {fast:8.1f} us   eager PyTorch {slow:8.1f} us   {slow / fast:6.1f} x")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line; everything has a default that runs in well under two minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="name or folder of a causal language model; without it one is made from corpus.txt")
    add("--steps", type=int, default=12, help="rollouts (default: %(default)s)")
    add("--epochs", type=int, default=4, help="PPO epochs over each rollout (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="completions of a rollout (default: %(default)s, the paper's)")
    add("--new-tokens", type=int, default=32, help="longest completion (default: %(default)s)")
    add("--length-unit", type=float, default=16, help="unit of the length reward (default: %(default)s; paper: 140)")
    add("--learning-rate", type=float, help="of Adam (default: 1e-4; with --model 1e-5, the paper's)")
    add("--pretrain-steps", type=int, default=200, help="on corpus.txt, without --model (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.epochs, args.batch_size, args.new_tokens, args.pretrain_steps) < 1 or args.length_unit <= 0:
        parser.error("the numbers of steps, epochs, completions and tokens, and --length-unit, must be positive")
    return args


def main() -> None:
    """Make or load the model, run Algorithm 1, and print each step and the cost of ``combine``."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    lines = CORPUS.read_text().splitlines()
    lm, tokenizer = load_model(args.model) if args.model else make_model(lines, args.new_tokens, args.pretrain_steps)
    policy = Policy(lm).to(args.device)
    reference = copy.deepcopy(policy.lm).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate or (1e-5 if args.model else 1e-4))
    starts = torch.tensor([ids[:PROMPT] for ids in tokenizer(lines)["input_ids"]], device=args.device)

    def sample() -> Rollout:
        prompts = starts[torch.randint(len(starts), (args.batch_size,))]
        return rollout(policy, reference, tokenizer, prompts, args.new_tokens, args.length_unit)

    fit_value_heads(policy.value_heads, sample())
    rewards = []
    with tqdm(total=args.steps * args.epochs, desc="Noon PPO", unit="epoch") as bar:
        for step in range(1, args.steps + 1):
            batch = sample()
            rewards.append(batch.rewards.mean(0))
            for _ in range(args.epochs):
                combined, metrics, arguments = update(policy, optimizer, batch)
                bar.update()
            tqdm.write(report(step, batch, combined, float(metrics.clip_fraction)))

    quarter = -(-args.steps // 4)
    print(f"\nmean reward over the first and the last {quarter} of {args.steps} steps")
    first, last = torch.stack(rewards[:quarter]).mean(0), torch.stack(rewards[-quarter:]).mean(0)
    for name, before, after in zip(OBJECTIVES, first.tolist(), last.tolist(), strict=True):
        print(f"    {name:<14}{before:8.3f} -> {after:6.3f}")
    print("\n" + cost(arguments))


if __name__ == "__main__":
    main()
