"""AdamW with GPT's two groups of parameters: what is multiplied decays, what is added or scales does not. And Muon.

Weight decay pulls weights towards zero. For matrices and embeddings that is a mild wish for simplicity; a bias or a
LayerNorm weight has no reason to be near zero.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: 2-D weights with decay, everything else without. A tied weight is listed once."""
    return groups_of([p for p in model.parameters() if p.requires_grad], weight_decay)


def groups_of(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], kind: str = "adamw"
) -> "torch.optim.AdamW | MuonAndAdamW":
    """AdamW over the two groups, as one fused kernel (on a CPU 391 -> 67 ms a step for GPT-2 124M); or with Muon.

    Args:
        kind: "adamw"; "muon": Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases.
    Returns:
        the optimizer; each group remembers its highest learning rate as "peak".
    """
    if kind == "muon":
        optimizer = MuonAndAdamW(model, learning_rate, weight_decay, betas)
    else:
        groups = decay_groups(model, weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    for group in optimizer.param_groups:
        group["peak"] = learning_rate
    return optimizer


class MuonAndAdamW:
    """Two optimizers that step together: each sees to the parameters that it was made for.

    Why Muon: it makes a matrix's update nearly orthogonal, so that no direction is left behind. It is meant for the
    matrices that map one hidden vector to another; an embedding is a table of rows and stays with AdamW. With
    `match_rms_adamw` its steps are as large as AdamW's, so that one learning rate and one schedule serve both.

    Attributes:
        param_groups, state: of both, as an optimizer of torch's has them.
    Source: Jordan et al., 2024; the size of the steps: Liu et al., 2025 ("Muon is scalable for LLM training").
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
        if not matrices:
            raise ValueError("Muon is for the matrices of the blocks, and this model has none that learn: use adamw.")
        taken = {id(p) for p in matrices}
        rest = groups_of([p for _, p in named if id(p) not in taken], weight_decay)
        self.parts = (
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=learning_rate, betas=betas, fused=True),
        )

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> Mapping:
        # Not a ChainMap: torch's states are defaultdicts, and the first would answer for every parameter. Read only:
        # a new entry belongs into its own part.
        return MappingProxyType({p: memory for part in self.parts for p, memory in part.state.items()})

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)
