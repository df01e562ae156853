"""Exercises `layer_norm` and `gelu`: the two small formulas, and how they go wrong."""

import math

import torch

from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers


def layer_norm(
    x, weight, bias, eps, *, unbiased=False, eps_at="inside", axis=-1, root=True, gain=True, shift=True, centre=True
):
    mean = x.mean() if axis is None else x.mean(dim=axis, keepdim=True)
    squares = (x - mean) ** 2
    count = squares.numel() if axis is None else squares.shape[axis]
    total = squares.sum() if axis is None else squares.sum(dim=axis, keepdim=True)
    variance = total / (count - 1 if unbiased else count)
    if eps_at in ("inside", "fixed"):
        variance = variance + (eps if eps_at == "inside" else 1e-5)
    spread = variance.sqrt() if root else variance
    if eps_at == "outside":
        spread = spread + eps
    normed = (x - mean if centre else x) / spread
    return normed * (weight if gain else 1) + (bias if shift else 0)


def layer_norm_cases() -> list[Case]:
    def case(label, seed, shape, scale=1.0, mean=0.0, eps=1e-5, dtype=torch.float32):
        draw = Numbers(seed, dtype)
        x = draw(*shape, scale=scale, mean=mean)
        weight, bias = draw(shape[-1], scale=0.3, mean=1.0), draw(shape[-1], scale=0.5)
        return Case(label, {"x": x, "weight": weight, "bias": bias, "eps": eps})

    equal = case("eight equal numbers", 5, (2, 3, 8))
    equal.arguments["x"].fill_(3.0)
    return [
        case("(2, 5, 16)", 0, (2, 5, 16), scale=3.0, mean=1.0),
        case("one vector, (6,)", 1, (6,)),
        case("(1, 7, 12)", 2, (1, 7, 12), scale=0.5, mean=-2.0),
        case("a batch of heads, (2, 3, 4, 8)", 3, (2, 3, 4, 8)),
        case("tiny numbers, where eps counts", 4, (3, 4, 10), scale=2e-3),
        equal,
        case("a large eps", 6, (2, 4, 8), eps=0.1),
        case("float64", 7, (2, 3, 6), dtype=torch.float64),
    ]


LAYER_NORM = Exercise(
    "layer_norm", "layers", 4, layer_norm, layer_norm_cases, ("the shape of x",),
    (
        Mistake("unbiased_variance",
                "the variance is divided by n - 1; LayerNorm divides by n. torch's `var` divides by n - 1 unless "
                "told otherwise.", ({"unbiased": True},)),
        Mistake("eps_outside_root",
                "eps is added to the standard deviation; it belongs to the variance, under the root.",
                ({"eps_at": "outside"},)),
        Mistake("eps_forgotten",
                "eps is missing: equal numbers have variance 0, and 0 / 0 is NaN.", ({"eps_at": "nowhere"},)),
        Mistake("eps_not_the_argument", "eps is a fixed 1e-5; use the argument.", ({"eps_at": "fixed"},)),
        Mistake("root_forgotten", "divided by the variance; it takes its square root.", ({"root": False},)),
        Mistake("wrong_axis",
                "mean and variance are taken over other axes than the last. Each token is normalised by itself, "
                "over its emb_dim numbers.", ({"axis": -2}, {"axis": 0}, {"axis": 1}, {"axis": None})),
        Mistake("mean_not_subtracted",
                "divided by the spread, but the mean was not subtracted first.", ({"centre": False},)),
        Mistake("weight_forgotten", "the result is not multiplied by weight.", ({"gain": False},)),
        Mistake("bias_forgotten", "bias is not added.", ({"shift": False},)),
    ),
    "notebooks/llm.ipynb, section 5",
)  # fmt: skip


SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
GELU_FORMS = {
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3))),
    "exact": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "no_root": lambda x: 0.5 * x * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3))),
    "no_factor": lambda x: 0.5 * x * (1 + torch.tanh(x + 0.044715 * x**3)),
    "square": lambda x: 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**2))),
    "no_cube": lambda x: 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * x)),
    "no_half": lambda x: x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3))),
    "no_one": lambda x: 0.5 * x * torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3)),
}


def gelu(x, *, form="tanh"):
    return GELU_FORMS[form](x)


def gelu_cases() -> list[Case]:
    draw, exact = Numbers(10), Numbers(11, torch.float64)
    return [
        Case("(2, 5, 16)", {"x": draw(2, 5, 16)}),
        Case("from -6 to 6", {"x": torch.linspace(-6, 6, 121)}),
        Case("one number", {"x": torch.tensor(0.7)}),
        Case("large numbers, (3, 4)", {"x": draw(3, 4, scale=8.0)}),
        Case("float64", {"x": exact(4, 6)}),
    ]


GELU = Exercise(
    "gelu", "layers", 3, gelu, gelu_cases, ("the shape of x",),
    (
        Mistake("exact_gelu",
                "this is the exact GELU, through erf (torch's default). GPT-2 was trained with the tanh form: with "
                "the exact one the text stays fluent and the logits are wrong.", ({"form": "exact"},)),
        Mistake("sigmoid_gelu",
                "this is the sigmoid form, x * sigmoid(1.702 x). GPT-2 has the tanh form.", ({"form": "sigmoid"},)),
        Mistake("relu", "this is ReLU: nothing at all below zero.", ({"form": "relu"},)),
        Mistake("silu", "this is SiLU (swish), x * sigmoid(x).", ({"form": "silu"},)),
        Mistake("root_forgotten",
                "the factor inside tanh is the square root of 2 / pi, about 0.798; here it is another.",
                ({"form": "no_root"}, {"form": "no_factor"})),
        Mistake("cube_forgotten",
                "0.044715 multiplies the third power of x; here it multiplies another power, or is not there.",
                ({"form": "square"}, {"form": "no_cube"})),
        Mistake("half_forgotten",
                "the factor 0.5 in front is missing: for large x the result must be x, not 2 x.",
                ({"form": "no_half"},)),
        Mistake("one_forgotten",
                "the 1 in (1 + tanh) is missing: for large x the result must be x.", ({"form": "no_one"},)),
    ),
    "notebooks/llm.ipynb, section 5",
)  # fmt: skip
