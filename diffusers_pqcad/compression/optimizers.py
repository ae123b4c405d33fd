"""Optimizers by name: Adam, and two whose state takes less memory than the weights it is for."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adam", "adafactor"]
ANY_SIZE = 1e6  # above that of all tensors


def check_optimizer(name: Any, *, use_8bit_adam: bool) -> None:
    """Raise ValueError for an optimizer of another name, and for one that cannot be had in 8 bits."""
    if name not in ("adam", "adafactor"):
        raise ValueError(f"optimizer: expected 'adam' or 'adafactor', got {name!r}.")
    if use_8bit_adam and name != "adam":
        raise ValueError(f"use_8bit_adam: it takes Adam's place, and optimizer is {name!r}; leave one of them out.")


def check_installed(*, use_8bit_adam: bool) -> None:
    """Raise ValueError where `use_8bit_adam` asks for a package that is not installed."""
    if use_8bit_adam and find_spec("bitsandbytes") is None:
        raise ValueError(
            "use_8bit_adam: expected bitsandbytes, whose Adam it is, got no such package. Install it with "
            "`pip install bitsandbytes`, or take optimizer='adafactor', which is torch's own and has less state still."
        )


def optimizer_of(
    groups: list[dict[str, Any]], name: OptimizerName = "adam", *, use_8bit_adam: bool = False, **settings: Any
) -> torch.optim.Optimizer:
    """Return the optimizer `name` of Adam's `groups`, whose rates are lengths of an update; `settings` are its own."""
    if use_8bit_adam:
        check_installed(use_8bit_adam=True)
        # Of no extra: where it is installed, peft and accelerate import it, too, and take other ways.
        return import_module("bitsandbytes.optim").Adam8bit(groups, **settings)
    return (MatrixAdafactor if name == "adafactor" else torch.optim.Adam)(groups, **settings)


class MatrixAdafactor(torch.optim.Adafactor):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with Adam's rates, and convolutions taken as matrices.

    torch factors the last two axes: of a convolution's (C_out, C_in, 3, 3) its state would be two thirds of the
    weight, and of a 1x1 convolution twice the weight. As (C_out, C_in * 9), it is a row and a column. An update's
    root mean square is at most the rate of its group, as one of Adam's is about the rate: what Adafactor makes of a
    tensor's size is left out, as our rates have it already.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.pairs = [(parameter, as_matrix(parameter)) for group in groups for parameter in group["params"]]
        matrices = {id(parameter): matrix for parameter, matrix in self.pairs}
        own = [
            group
            | {"params": [matrices[id(parameter)] for parameter in group["params"]], "lr": group["lr"] / ANY_SIZE}
            for group in groups
        ]
        super().__init__(own, eps=(None, ANY_SIZE), **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply the gradients of the parameters that the groups named."""
        for parameter, matrix in self.pairs:
            matrix.grad = None if parameter.grad is None else parameter.grad.view_as(matrix)
        loss = super().step(closure)
        for parameter, matrix in self.pairs:
            if matrix is not parameter:
                matrix.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters that the groups named."""
        for parameter, _ in self.pairs:
            parameter.grad = None


def as_matrix(parameter: nn.Parameter) -> Tensor:
    """Return `parameter` itself up to two axes; of more, a parameter (C_out, the rest) of the same memory."""
    return parameter if parameter.dim() <= 2 else nn.Parameter(parameter.detach().view(len(parameter), -1))
