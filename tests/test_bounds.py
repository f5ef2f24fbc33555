"""Not a byte beyond a tensor is read or written on the CPU: each lies at the very end of a page that another follows.

That page may not be touched, so a step too far ends the process. It runs in a process of its own, once for each
instruction set.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest

from pama_ext import _C

WALK = """
import ctypes, mmap, sys
import torch
from pama_ext import _C, Normalize, combine, combine_, gae, policy_loss, value_loss

assert _C.use_cpu_instructions(sys.argv[1])
torch.set_num_threads(1)
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
kept = []


def at_the_end(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    assert protect(whole.data_ptr() + pages, mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    return whole[pages - size : pages].view(tensor.dtype).view(tensor.shape).copy_(tensor)


if "--beyond" in sys.argv:
    x = at_the_end(torch.randn(8))
    print("last", x[-1].item(), flush=True)
    torch.as_strided(x, (9,), (1,)).sum()

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for n in (*range(1, 18), 31, 32, 33, 63, 64):
        for tokens in (1, 15, 16, 17, 50):
            x = at_the_end(torch.randn(tokens, n).to(dtype))
            mask, log_ratio = at_the_end(torch.rand(tokens) < 0.8), at_the_end(torch.randn(tokens))
            out = at_the_end(torch.empty(tokens, dtype=dtype))
            for level in ("batch", "token"):
                combine(x, mask=mask, log_ratio=log_ratio, out=out, level=level)
                combine_(x, mask=mask, log_ratio=log_ratio, level=level)
            combine([at_the_end(c) for c in x.unbind(-1)], mask=at_the_end(mask.to(torch.int64)))
            combine(x.T.contiguous().T, solver="min_norm")
            combine(x, normalize=Normalize(by="group", group_size=tokens))
            last = torch.eye(n)[-1]  # the only one that is read again, from the first of its entries on
            combine(x.view(1, tokens, n), level="sequence", solver="fixed", reward_weights=last)
            kept.clear()
    for n in (2, 3, 4, 8, 10, 16):  # walked over from the second tile on, or abreast, if log_ratio has their dtype
        for tokens in (2000, 1568, 2608, 1280, 944, 512):
            x = at_the_end(torch.randn(tokens, n).to(dtype))
            mask, log_ratio = at_the_end(torch.rand(tokens) < 0.8), at_the_end(torch.randn(tokens).to(dtype))
            out = at_the_end(torch.empty(tokens, dtype=dtype))
            for level in ("batch", "token"):
                combine(x, mask=mask, log_ratio=log_ratio, out=out, level=level)
                columns = [at_the_end(c) for c in x.unbind(-1)]
                combine(columns, mask=at_the_end(mask.long()), log_ratio=log_ratio, out=out, level=level)
            rows = [t.view(2, -1, *t.shape[1:]) for t in (x, mask, log_ratio, out)]
            combine(rows[0], mask=rows[1], log_ratio=rows[2], out=rows[3], level="sequence")
            kept.clear()
    for length in (1, 16, 33):
        values = at_the_end(torch.randn(3, length, 3).to(dtype))
        valid = at_the_end(torch.rand(3, length) < 0.8)
        gae(at_the_end(values.clone()), values, mask=valid)
        log_probs = at_the_end(torch.randn(3, length).to(dtype))
        policy_loss(log_probs, at_the_end(log_probs.clone()), at_the_end(log_probs.clone()), mask=valid)
        value_loss(values, values, at_the_end(values.clone()), mask=valid)
        kept.clear()
print("done")
"""


def walk(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WALK, *arguments], capture_output=True, text=True, check=False)


pytestmark = pytest.mark.skipif(
    not sysconfig.get_platform().startswith("linux"), reason="mprotect is found by its name on Linux"
)


def test_nothing_beyond_a_tensor_is_touched(instructions):
    done = walk(_C.cpu_instructions())
    assert done.returncode == 0 and done.stdout == "done\n", f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_a_step_too_far_is_noticed():
    done = walk(_C.cpu_instructions(), "--beyond")
    assert done.returncode < 0 and done.stdout.startswith("last"), done
