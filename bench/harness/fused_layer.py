"""The weights of one basis convolution, as they travel to the engines that have a fused kernel."""

from __future__ import annotations

from torch import Tensor, nn

from basisconv_kernels.core.problem import Conv2dProblem


class FusedLayer(nn.Module):
    """Weights and shapes; an engine calls its own op on them, so this module has no forward."""

    def __init__(self, problem: Conv2dProblem, basis_weight: Tensor, coefficients: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.problem = problem
        self.basis_weight = nn.Parameter(basis_weight)
        self.coefficients = nn.Parameter(coefficients)
        self.bias = nn.Parameter(bias)
