"""habana_frameworks.torch.hpex.optimizers"""

from collections.abc import Iterable
from typing import Any

import torch

from habana_frameworks import record


class FusedAdamW(torch.optim.AdamW):
    """The arguments and defaults of the real one, which also refuses empty groups."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ):
        record(f"FusedAdamW lr={lr} betas={betas} eps={eps}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        assert all(group["params"] for group in self.param_groups)
