"""PAMA for PyTorch: Pareto multi-objective combination of RLHF advantages in one fused pass.

See :func:`combine`; the method is arXiv 2508.07768, the specification is :mod:`pama_ext.reference`.
"""

from pama_ext import _ops as _ops  # loads the compiled module and registers the operators; must come first
from pama_ext import reference
from pama_ext._combine import combine, combine_
from pama_ext._gae import gae
from pama_ext._loss import PolicyMetrics, ValueMetrics, policy_loss, value_loss
from pama_ext._min_norm import min_norm
from pama_ext._normalize import Normalize
from pama_ext._result import Combined, ObjectiveStats

__version__ = "0.1.0"
__all__ = [
    "Combined",
    "Normalize",
    "ObjectiveStats",
    "PolicyMetrics",
    "ValueMetrics",
    "combine",
    "combine_",
    "gae",
    "min_norm",
    "policy_loss",
    "reference",
    "value_loss",
]
