"""The compiled module (csrc/python_module.cpp)."""

from collections.abc import Callable
from typing import Any

from pama_ext._result import Combined

class CombineOptions:
    def __init__(
        self,
        dim: int,
        clip_low: float,
        clip_high: float,
        noon: bool,
        level: str,
        solver: str,
        normalize: str,
        nan: str,
        skip_inactive: bool,
    ) -> None: ...

def combine(*arguments: Any) -> Combined | None: ...  # those of pama_ext.combine, in its order
def combine_(*arguments: Any) -> Combined | None: ...  # the same, out ignored
def gae(*arguments: Any) -> tuple[Any, Any] | None: ...  # those of pama_ext.gae, in its order
def policy_loss(*arguments: Any) -> tuple[Any, Any, Any, Any] | None: ...  # those of pama_ext.policy_loss
def value_loss(*arguments: Any) -> tuple[Any, Any, Any, Any] | None: ...  # those of pama_ext.value_loss
def scale(gradient: Any, incoming: Any, scale: Any, row_dim: int, in_place: bool) -> Any: ...
def min_norm(gramian: Any) -> Any: ...
def field(index: int, combined: tuple[Any, ...]) -> Any: ...
def set_python_side(combined: type, stats: type, normalize: type, options: Callable[..., CombineOptions]) -> None: ...
def set_loss_metrics(policy: type, value: type) -> None: ...
def has_door() -> bool: ...
def cuda_architectures() -> list[str]: ...
def cpu_instructions() -> str: ...
def use_cpu_instructions(name: str) -> bool: ...

built_with_torch: str
cuda_toolkit: int  # 13000 for 13.0; 0 without CUDA kernels
