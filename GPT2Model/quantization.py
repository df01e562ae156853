"""Weight-only int8: a model's matrices in a quarter of float32's bytes, and what that changes.

One new token of one sequence reads every weight once and does two operations with it, so its time is that of reading
the weights. Here a row of a matrix is kept as whole numbers from -127 to 127 and one float32 scale, its largest
magnitude / 127. Activations, sums, norms and embeddings stay in floating point. What it costs in perplexity:
`python -m orchestrator perplexity --int8`.
"""

import copy

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from GPT2Model.gpt2 import GPTModel
from GPT2Model.int8_matmul import LEVELS, int8_matmul

UNTRAINABLE = (
    "an int8 model cannot be trained: its weights are whole numbers, and a gradient step is far smaller than the next "
    "one. Train the model that it was made from, and quantise that one afterwards."
)
UNSAVED = (
    "an int8 model has no state dict, and is not saved: save the model that it was made from, and quantise it again "
    "when it is opened, with quantize_int8(GPTModel.from_pretrained(FOLDER)). That takes seconds."
)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: y = (x Q^T) * scale + bias.

    Why a scale for each row: outputs of a layer differ in size, and one scale for all would leave the small ones few
    of the 255 levels. It is a factor of one output, so it is applied once, after the sum.

    Args:
        weight: (d_out, d_in), finite. Rounding moves each number by scale / 2 at most.
        bias: (d_out,) or None; stays in floating point.
    Attributes:
        quantized: (d_out, d_in) int8. scale: (d_out,) float32, whatever dtype the model is moved to.
    Source: "LLM.int8()" (Dettmers et al., 2022), section 2: absmax quantisation, here of the rows of the weights alone.
    """

    def __init__(self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        quantized, scale = quantize_rows(weight.detach())
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("like", weight.detach().new_empty(0))  # empty: follows the model's dtype
        super().train(False)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Raises ValueError where a gradient would be asked for."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(UNTRAINABLE)
        y = int8_matmul(x.reshape(-1, self.in_features), self.quantized, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix that it stands for, in the model's dtype: made anew at each look."""
        return (self.quantized * self.scale[:, None].to(torch.promote_types(self.like.dtype, torch.float32))).to(
            self.like.dtype
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def train(self, mode: bool = True) -> "Int8Linear":
        if mode:
            raise ValueError(UNTRAINABLE)
        return super().train(mode)

    def _apply(self, fn, recurse=True) -> "Int8Linear":
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # moved, but never rounded: it is a factor of a whole row
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(UNSAVED)

    def _load_from_state_dict(self, *args):
        raise ValueError("an int8 model takes no state dict: load it into a GPTModel, and quantise that one.")


class Int8GPTModel(GPTModel):
    """What `quantize_int8` makes. It refuses `train()` as a whole: its layers alone would refuse only when the
    embeddings and some blocks had changed their mode, and dropout would be on in them."""

    def train(self, mode: bool = True) -> "Int8GPTModel":
        if mode:
            raise ValueError(UNTRAINABLE)
        return super().train(mode)


def quantize_int8(model: GPTModel) -> Int8GPTModel:
    """A copy of a model whose blocks and head have int8 weights; the model itself is unchanged.

    Why not the token embedding: of that a row is looked up, not the whole matrix multiplied, so it costs no time. It
    keeps its floats, and a head that was tied to it becomes a matrix of its own (`cfg["tie_weights"]` says False).

    Args:
        model: in the dtype that the weights are to be rounded from; quantise first, then `.to(torch.bfloat16)`.
    Returns:
        a model in eval mode whose parameters ask for no gradients. It generates, traces, and changes its attention as
        any other; it cannot be trained or saved, and says so.
    Raises:
        ValueError: weights that are NaN, infinite or too large, each layer named; a model that is int8 already.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if any(isinstance(layer, Int8Linear) for layer in model.modules()):
        raise ValueError("this model has int8 weights already: use it as it is.")
    problems = [problem for name, layer in layers.items() if (problem := unquantizable(name, layer.weight))]
    if problems:
        raise ValueError("these weights cannot be made int8:\n" + "\n".join(f"  - {problem}" for problem in problems))
    # What deepcopy finds in its memo it takes as copied already: the float weights are never there twice.
    memo = {id(layer): Int8Linear(layer.weight, layer.bias) for layer in layers.values()}
    quantized = copy.deepcopy(model, memo).requires_grad_(False).eval()
    quantized.__class__ = Int8GPTModel  # to construct one would take the memory of its float weights
    quantized.cfg["tie_weights"] = False
    return quantized


def quantize_rows(
    weight: Float[Tensor, "d_out d_in"],
) -> tuple[Int8[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """Whole numbers and the float32 scale of each row: weight = numbers * scale, to within scale / 2."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # A row of zeros has no scale of its own. Subnormal ones would lose the digits that the division needs.
    scale = (weight.abs().amax(dim=1) / LEVELS).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def unquantizable(name: str, weight: Tensor) -> str | None:
    """Why a matrix has no scale; None: it has one."""
    bad = int((~weight.isfinite()).sum())
    if bad:
        return f"{name}: {bad:,} of {weight.numel():,} weights are NaN or infinite: was its training cut off?"
    if weight.abs().max().double() / LEVELS > torch.finfo(torch.float32).max:
        return f"{name}: weights up to {weight.abs().max():.1e} have no float32 scale."
    return None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; a shared tensor is counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
