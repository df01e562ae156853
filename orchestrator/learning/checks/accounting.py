"""Exercises `count_parameters`, `forward_flops`, `attention_share`: numbers by formula, and what they leave out.

Letters: V vocab_size, C emb_dim, L n_layers, T tokens, F ff_dim, N context_length.
"""

from numbers import Real

import torch

from GPT2Model.config import from_preset
from orchestrator.learning.checks.exercise import Case, Exercise, Mistake


def sizes(cfg) -> tuple[int, ...]:
    C = cfg["emb_dim"]
    return cfg["vocab_size"], C, cfg["n_layers"], cfg["ff_dim"] or 4 * C, cfg["context_length"]


def count_parameters(
    cfg, *, head="tied once", positions=True, biases="all", norms="all", layers="all", ff="ff_dim", qkv=3, project=True
):
    V, C, L, F, N = sizes(cfg)
    F = {"ff_dim": F, "C": C, "4C": 4 * C}[ff]
    qkv_bias = qkv * C if biases == "always" or (biases == "all" and cfg["qkv_bias"]) else 0
    bias = biases != "none"
    attention = qkv * C * C + qkv_bias + (C * C + bias * C) * project
    block = attention + 2 * C * F + bias * (F + C) + (4 * C if norms in ("all", "but the last") else 0)
    own_head = {"tied once": not cfg["tie_weights"], "always": True, "never": False}[head]
    total = (1 + own_head) * V * C + (L if layers == "all" else 1) * block
    return total + (N * C if positions else 0) + (2 * C if norms == "all" else 0)


def forward_flops(
    cfg, tokens, *, factor=2, table="whole", head=True, ff="ff_dim", per="sequence", layers="all", qkv=3, project=True,
    length="tokens", lookup=False, heads=False,
):  # fmt: skip
    V, C, L, F, N = sizes(cfg)
    F = {"ff_dim": F, "C": C, "4C": 4 * C}[ff]
    T = {"tokens": tokens, "context": N}[length]
    row = {"whole": 2 * T, "one product": T, "visible": T + 1, "none": 0}[table] * C * (cfg["n_heads"] if heads else 1)
    block = qkv * C * C + project * C * C + 2 * C * F + row
    per_token = (L if layers == "all" else 1) * block + head * V * C + lookup * V * C
    return factor * per_token * (T if per == "sequence" else 1)


def attention_share(cfg, tokens, *, part="products", head=True, length="tokens", percent=False):
    _, C, L, _, N = sizes(cfg)
    T = {"tokens": tokens, "context": N}[length]
    products = {"products": 2 * T * C, "one product": T * C, "layer": 2 * T * C + 4 * C * C}[part]
    share = 2 * L * T * products / forward_flops(cfg, T, head=head)
    return 100 * share if percent else share


def observe_number(function, arguments):
    """A number, as a tensor in float64: whole numbers up to 9e15 are exact in it."""
    value = function(**arguments)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return torch.tensor(float(value), dtype=torch.float64) if isinstance(value, Real) else value


def expect_number(formula, arguments, **changes):
    return torch.tensor(float(formula(**arguments, **changes)), dtype=torch.float64)


def models() -> dict[str, dict]:
    return {
        "gpt2-xl at context 1,024": from_preset("gpt2-xl"),
        "gpt2-xl at context 16,384": from_preset("gpt2-xl", context_length=16384),
        "gpt2": from_preset("gpt2"),
        "gpt2 without qkv_bias, head of its own": from_preset("gpt2", qkv_bias=False, tie_weights=False),
        "nano with ff_dim 200": from_preset("nano", ff_dim=200),
    }


def parameter_cases() -> list[Case]:
    return [Case(label, {"cfg": cfg}) for label, cfg in models().items()]


def flops_cases() -> list[Case]:
    cases = [Case(label, {"cfg": cfg, "tokens": cfg["context_length"]}) for label, cfg in models().items()]
    return [*cases, Case("gpt2 over 100 tokens", {"cfg": from_preset("gpt2"), "tokens": 100})]


COUNT_PARAMETERS = Exercise(
    "count_parameters", "accounting", 3, count_parameters, parameter_cases, ("a whole number",),
    (
        Mistake("head_counted_twice",
                "the head is counted though it is tied: it is the token embedding's table, once.",
                ({"head": "always"},)),
        Mistake("own_head_forgotten",
                "with tie_weights False the head has a table of its own, V*C.", ({"head": "never"},)),
        Mistake("positions_forgotten",
                "the position embedding is missing: context_length rows.", ({"positions": False},)),
        Mistake("biases_forgotten", "the biases of the linear layers are missing.", ({"biases": "none"},)),
        Mistake("qkv_bias_not_looked_at",
                "qkv's bias is counted always, or never: cfg['qkv_bias'] says whether it is there.",
                ({"biases": "always"}, {"biases": "no qkv"})),
        Mistake("norms_forgotten", "the norms are missing: each has a weight and a bias.", ({"norms": "none"},)),
        Mistake("final_norm_forgotten", "the last norm is missing: 2C.", ({"norms": "but the last"},)),
        Mistake("one_layer", "one block is counted; there are n_layers.", ({"layers": "one"},)),
        Mistake("feed_forward_not_widened",
                "feed-forward is counted with C wide inside; it is ff_dim wide, which is 4C if None.", ({"ff": "C"},)),
        Mistake("ff_dim_ignored", "feed-forward is counted with 4C always; cfg['ff_dim'] may be set.", ({"ff": "4C"},)),
        Mistake("one_of_qkv", "queries, keys and values have a matrix each: three of C*C, not one.", ({"qkv": 1},)),
        Mistake("out_proj_forgotten", "the projection behind attention is missing: C*C + C.", ({"project": False},)),
    ),
    "notebooks/llm.ipynb, section 6; GPT2Model/gpt2.py",
    observe=observe_number,
    expect=expect_number,
    bound=0.5,
)  # fmt: skip

FORWARD_FLOPS = Exercise(
    "forward_flops", "accounting", 3, forward_flops, flops_cases, ("a whole number",),
    (
        Mistake("factor_2_forgotten", "exactly half: a multiply-add is two operations.", ({"factor": 1},)),
        Mistake("quadratic_term_forgotten",
                "the two products inside attention are missing: Q K^T and weights V, which grow with the square of "
                "the tokens.", ({"table": "none"},)),
        Mistake("half_of_attention",
                "half of the products inside attention is missing. There are two of T*T*C, Q K^T and weights V; and "
                "here the whole table counts, hidden half included, as eager computes it.",
                ({"table": "one product"}, {"table": "visible"})),
        Mistake("table_times_heads",
                "the products inside attention are multiplied by n_heads: each head is only C / n_heads wide, so "
                "all together cost T*T*C.", ({"heads": True},)),
        Mistake("head_forgotten", "the head is missing: V*C for each token, tied or not.", ({"head": False},)),
        Mistake("lookup_counted",
                "the embedding is counted as a matrix product; it is a lookup of rows.", ({"lookup": True},)),
        Mistake("feed_forward_not_widened",
                "feed-forward is counted with C wide inside; it is ff_dim wide, which is 4C if None.", ({"ff": "C"},)),
        Mistake("ff_dim_ignored", "feed-forward is counted with 4C always; cfg['ff_dim'] may be set.", ({"ff": "4C"},)),
        Mistake("per_token", "this is the cost of one token; the sequence has `tokens` of them.", ({"per": "token"},)),
        Mistake("one_layer", "one block is counted; there are n_layers.", ({"layers": "one"},)),
        Mistake("one_of_qkv", "queries, keys and values have a matrix each: three of C*C, not one.", ({"qkv": 1},)),
        Mistake("out_proj_forgotten", "the projection behind attention is missing: C*C.", ({"project": False},)),
        Mistake("context_for_tokens",
                "counted for context_length tokens always; `tokens` says how many.", ({"length": "context"},)),
    ),
    "notebooks/llm.ipynb, section 6; orchestrator/evaluation/estimates.py",
    observe=observe_number,
    expect=expect_number,
    bound=0.5,
)  # fmt: skip

ATTENTION_SHARE = Exercise(
    "attention_share", "accounting", 2, attention_share, flops_cases, ("a number from 0 to 1",),
    (
        Mistake("percent", "this is in per cent; a number from 0 to 1 is wanted.", ({"percent": True},)),
        Mistake("projections_included",
                "the projections (qkv and out_proj) are included. Only the two products that grow with the square "
                "of the tokens are meant.", ({"part": "layer"},)),
        Mistake("half_of_attention",
                "one of the two products is missing: Q K^T, and weights V.", ({"part": "one product"},)),
        Mistake("head_forgotten",
                "the whole, of which it is a share, lacks the head: V*C for each token.", ({"head": False},)),
        Mistake("context_for_tokens",
                "counted for context_length tokens always; `tokens` says how many.", ({"length": "context"},)),
    ),
    "notebooks/attention.ipynb, section 8; orchestrator/evaluation/estimates.py",
    observe=observe_number,
    expect=expect_number,
    bound=5e-5,
)  # fmt: skip
