"""The specification of this package in plain PyTorch, written in the order of the paper.

What the compiled kernels compute is defined here, one formula per line, on any device. The method is PAMA
(arXiv 2508.07768). Arithmetic is float64 for float64 input and float32 otherwise; pass ``advantages.double()``
for ground truth.
"""

from pama_ext.reference._combine import closed_form, combine, combine_, pama
from pama_ext.reference._gae import gae
from pama_ext.reference._loss import policy_loss, value_loss
from pama_ext.reference._min_norm import min_norm

__all__ = ["closed_form", "combine", "combine_", "gae", "min_norm", "pama", "policy_loss", "value_loss"]
