"""Problems for the suite: named shapes, layouts, and hypothesis strategies that build a whole call of ``combine``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pama_ext import Normalize

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
MASKS = [torch.bool, *INTEGERS, *DTYPES]
LEVELS = ["batch", "sequence", "token"]
SOLVERS = ["closed_form", "fixed"]

TILE, SHORT_TILE = 1040, 368  # float32 tokens, where N is small and where it is large (kTileTokens, kShortestBytes)

# [B, N] or [B, T, N] with objectives last. The CPU kernel works on tiles of TILE or SHORT_TILE tokens, on vectors of 4,
# 8 or 16, and cuts 32768 elements and more into an even number of parts.
SHAPES: dict[str, tuple[int, ...]] = {
    "no rows": (0, 3),
    "no rows of tokens": (0, 4, 2),
    "rows without tokens": (3, 0, 2),
    "one entry": (1, 1),
    "one row": (1, 7, 3),
    "one token each": (5, 1, 2),
    "one objective": (4, 6, 1),
    "outcome rewards": (64, 3),
    "below a vector": (15, 4),
    "a vector": (16, 4),
    "above a vector": (17, 4),
    "five objectives": (3, 11, 5),
    "tile - 1": (1, TILE - 1, 2),
    "tile": (2, TILE // 2, 2),
    "tile + 1": (3, 347, 2),
    "rows that straddle tiles": (3, 700, 3),
    "a tile cut by N": (1, SHORT_TILE + 1, 63),
    "most objectives": (2, 65, 64),
    "most objectives, tile": (SHORT_TILE, 64),
    "one element short of two parts": (1, 32767, 1),
    "two parts": (64, 256, 2),
    "six parts, uneven": (7, 4683, 3),
}
LAYOUTS = ["last", "first", "middle", "transposed", "slice", "unaligned", "list", "tuple", "dict", "columns"]


def lay_out(values: Tensor, layout: str) -> tuple[Any, int]:
    """``(advantages, dim)``: a copy of ``values`` (objectives last) as one of LAYOUTS."""
    if layout == "last":
        return values.clone(), -1
    if layout == "first":  # [N, B, T] in memory and in shape
        return values.movedim(-1, 0).clone(memory_format=torch.contiguous_format), 0
    if layout == "middle":  # [B, N, T]
        return values.movedim(-1, 1).clone(memory_format=torch.contiguous_format), 1
    if layout == "transposed":  # objectives last, but [N, T, B] in memory
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards), -1
    if layout == "slice":
        return surrounded(values), -1
    if layout == "unaligned":  # starts one element into its storage
        flat = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return flat[1:].view(values.shape).copy_(values), -1
    tensors = [column.clone() for column in values.unbind(-1)]
    if layout == "dict":
        return {f"r{i}": tensor for i, tensor in enumerate(tensors)}, -1
    if layout == "columns":  # views of one tensor
        return list(values.clone().unbind(-1)), -1
    return {"list": list, "tuple": tuple}[layout](tensors), -1


def surrounded(values: Tensor) -> Tensor:
    """The same values as a slice with a step in every dimension; around them stands 7."""
    larger = torch.full([2 * size + 3 for size in values.shape], 7, device=values.device).to(values.dtype)
    inner = larger[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)]
    return inner.copy_(values)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of ``combine``; ``values`` has the objectives last, ``options`` all keywords but ``dim`` and ``out``."""

    values: Tensor
    layout: str = "last"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def call(self) -> tuple[Any, dict[str, Any]]:
        """``(advantages, keywords)`` in the layout asked for; the advantages are a fresh copy."""
        advantages, dim = lay_out(self.values, self.layout)
        return advantages, {**self.options, "dim": dim}

    def to(self, device: torch.device) -> Problem:
        options = {k: _moved(v, device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        if isinstance(normalize := options.get("normalize"), Normalize):
            groups = {
                k: g.to(device) for k in ("group_ids", "group_offsets") if (g := getattr(normalize, k)) is not None
            }
            options["normalize"] = dataclasses.replace(normalize, **groups)
        return dataclasses.replace(self, values=_moved(self.values, device), options=options)

    def but(self, values: Tensor | None = None, layout: str | None = None, **options: Any) -> Problem:
        merged = {**self.options, **options}
        return Problem(self.values if values is None else values, layout or self.layout, merged)

    @property
    def mask(self) -> Tensor:
        mask = self.options.get("mask")
        return torch.ones(self.values.shape[:-1], dtype=torch.bool) if mask is None else (mask != 0)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides."""
    if tensor.device.type == device.type:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def grid(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Eighths from -3 to 3. Sums of them are exact in every arithmetic, so scalars tie exactly or differ for all."""
    return (torch.randint(-24, 25, shape, generator=generator) / 8).to(dtype)


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, draw=grid, **options: Any
) -> Problem:
    """A problem with mask and log_ratio; options replace or add."""
    g = torch.Generator().manual_seed(seed)
    values = draw(shape, g, dtype)
    mask = torch.rand(shape[:-1], generator=g) < 0.8
    log_ratio = 0.4 * torch.randn(shape[:-1], generator=g)
    return Problem(values, options={"mask": mask, "log_ratio": log_ratio, **options})


def masks(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """About a third invalid; the others of whatever value is not 0, NaN included."""
    valid = torch.rand(shape, generator=generator) < 0.7
    if dtype == torch.bool:
        return valid
    if dtype.is_floating_point:
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        some = torch.tensor([1.0, -1.0, tiny, math.inf, math.nan], dtype=dtype)
        none = torch.tensor([0.0, -0.0], dtype=dtype)
        pick = torch.randint(0, 10, shape, generator=generator)
        return torch.where(valid, some[pick % 5], none[pick % 2])
    high = torch.iinfo(dtype).max
    return torch.where(valid, torch.where(torch.rand(shape, generator=generator) < 0.5, 1, min(high, 2**62)), 0).to(
        dtype
    )


def log_ratios(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, clips: tuple[float, ...]
) -> Tensor:
    """Values on both sides of the clips, next to them, beyond +-20, infinite and NaN."""
    near = torch.tensor([*clips, 0.0, 0.05, -0.05, 1.0, -1.0, 25.0, -25.0, math.inf, -math.inf, math.nan]).to(dtype)
    chosen = near[torch.randint(0, len(near), shape, generator=generator)]
    toward = near[torch.randint(0, len(near), shape, generator=generator)]
    if dtype in (torch.float32, torch.float64):
        chosen = torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, torch.nextafter(chosen, toward))
    return chosen


@st.composite
def problems(draw, values=grid, levels=LEVELS, solvers=SOLVERS, nan=("ignore", "propagate"), garbage=True) -> Problem:
    """A whole problem. What shrinks well is drawn, what fills the tensors comes from a drawn seed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), label="seed"))
    n = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17]), label="N")
    tokens = draw(st.none() | st.integers(0, 40), label="T")
    shape = (draw(st.integers(0, 9), label="B"), *(() if tokens is None else (tokens,)))
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    data = values((*shape, n), generator, dtype)
    if draw(st.booleans(), label="a sparse problem"):  # objectives without an active token
        data[..., torch.rand(n, generator=generator) < 0.5] *= 0
    if garbage and draw(st.booleans(), label="non-finite entries"):
        bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        some = torch.rand(data.shape, generator=generator) < 0.1
        data = torch.where(some, bad[torch.randint(0, 3, data.shape, generator=generator)], data)

    options: dict[str, Any] = {
        "level": draw(st.sampled_from(levels)),
        "solver": draw(st.sampled_from(solvers)),
        "nan": draw(st.sampled_from(nan)),
        "noon": draw(st.booleans()),
        "skip_inactive": draw(st.booleans()),
        "clip_low": draw(st.sampled_from([0.2, 0.0, 0.1, 0.999, 1.0, 3.0])),
        "clip_high": draw(st.sampled_from([0.2, 0.0, 0.28, 5.0, 1e12])),
    }
    if draw(st.booleans(), label="mask"):
        options["mask"] = _placed(draw, masks(shape, generator, draw(st.sampled_from(MASKS), label="mask dtype")))
        if garbage and draw(st.booleans(), label="garbage behind the mask"):
            data = torch.where((options["mask"] != 0).unsqueeze(-1), data, torch.tensor(math.nan, dtype=dtype))
    if draw(st.booleans(), label="log_ratio"):
        clips = (math.log1p(options["clip_high"]), math.log1p(-min(options["clip_low"], 0.999)))
        kind = draw(st.sampled_from(DTYPES), label="log_ratio dtype")
        options["log_ratio"] = _placed(draw, log_ratios(shape, generator, kind, clips))
    if draw(st.booleans(), label="reward_weights"):  # powers of two: they round nothing
        weights = [draw(st.sampled_from([1.0, 0.5, 2.0, 0.0, -1.0])) for _ in range(n)]
        kind = draw(st.sampled_from([None, *DTYPES]), label="reward_weights dtype")
        options["reward_weights"] = weights if kind is None else torch.tensor(weights, dtype=kind)
    return Problem(data, draw(st.sampled_from(LAYOUTS)), options)


def _placed(draw, tensor: Tensor) -> Tensor:
    """The mask or log_ratio as it is, as a slice of a larger tensor, or with its dimensions in the other order."""
    how = draw(st.sampled_from(["dense", "slice", "transposed"]))
    if how == "slice":
        return surrounded(tensor)
    return tensor.t().contiguous().t() if how == "transposed" and tensor.dim() == 2 else tensor
