"""The wrong code of each classic mistake: functions that take the right code and give the wrong one.

`orchestrator/learning/planted.py` says which of them goes where, and takes them back. A wrapper of
`CMHA.cmha.choose` changes what an implementation is handed (scale, mask), so it acts under all of them; only what lies
inside a fused op cannot be done wrong from outside, and those two act under eager alone.
Letters: B sequences, T tokens, H heads, D width of a head, C width of the model, V words.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from CMHA.masks import AttentionMask
from CMHA.tap import tap
from orchestrator.text.corpora import IGNORED

# ------------------------------------------------------------------ attention: what every implementation is handed


class MovedMask(AttentionMask):
    """A causal mask whose edge lies `by` keys further to the right (or, below 0, to the left).

    It says of itself that it is no plain case, so that nobody takes a shortcut for it.
    """

    is_plain_causal = hides_nothing = False

    def __init__(self, right: AttentionMask, by: int):
        rules = {"padding_mask": right.padding_mask, "documents": right.documents, "window": right.window}
        super().__init__(right.query_len, right.key_len, causal=right.causal, device=right.device, **rules)
        self.offset += by


def handed(change: Callable) -> Callable:
    """choose -> a choose whose implementations are called with what `change(queries, mask, scale)` returns."""

    def make(choose: Callable) -> Callable:
        def wrong_choose(settings, request):
            choice = choose(settings, request)

            def attention(queries, keys, values, mask, *, scale, dropout=0.0):
                mask, scale = change(queries, mask, scale)
                return choice.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

            return replace(choice, attention=attention)

        return wrong_choose

    return make


def without_causality(queries, mask, scale):
    rules = {"padding_mask": mask.padding_mask, "documents": mask.documents, "window": mask.window}
    return AttentionMask(mask.query_len, mask.key_len, causal=False, device=mask.device, **rules), scale


scale_forgotten = handed(lambda queries, mask, scale: (mask, 1.0))
scale_by_emb_dim = handed(lambda queries, mask, scale: (mask, (queries.shape[1] * queries.shape[3]) ** -0.5))
mask_forgotten = handed(without_causality)
mask_shifted = handed(lambda queries, mask, scale: (MovedMask(mask, 1), scale))
mask_too_strict = handed(lambda queries, mask, scale: (MovedMask(mask, -1), scale))
mask_upper_left = handed(lambda queries, mask, scale: (MovedMask(mask, -mask.offset), scale))


# ------------------------------------------------------------------ attention: inside the definition


def in_eager(weights_of: Callable) -> Callable:
    """choose -> a choose under which eager makes its weights by `weights_of(scores, hidden)`."""

    def attention(queries, keys, values, mask, *, scale, dropout=0.0):
        group = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = tap("scores", queries @ keys.transpose(-2, -1) * scale)  # (B, H, query_len, key_len)
        weights = tap("weights", weights_of(scores, ~mask.dense()))
        weights = torch.dropout(weights, dropout, train=dropout > 0)
        return weights @ values, weights

    def make(choose: Callable) -> Callable:
        def wrong_choose(settings, request):
            choice = choose(settings, request)
            return replace(choice, attention=attention) if choice.chosen == "eager" else choice

        return wrong_choose

    return make


def softmax_then_mask(scores, hidden):
    return torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)


def softmax_down_the_columns(scores, hidden):
    scores = tap("masked_scores", scores.masked_fill(hidden, torch.finfo(scores.dtype).min))
    return torch.softmax(scores, dim=-2).masked_fill(hidden, 0.0)


mask_after_softmax = in_eager(softmax_then_mask)
softmax_over_queries = in_eager(softmax_down_the_columns)


def split_without_transpose(right):
    def split_heads(self, x, num_heads):
        # Not view: x is a part of the fused W_qkv(x), and on that torch refuses the view. Its message advises reshape.
        return x.reshape(x.shape[0], num_heads, x.shape[1], self.head_dim)

    return split_heads


def merge_without_transpose(right):
    def merge_heads(self, context):
        batch, heads, tokens, head_dim = context.shape
        return context.reshape(batch, tokens, heads * head_dim)

    return merge_heads


def projection_not_transposed(forward):
    def wrong_forward(self, *args, **kwargs):
        def product(module, inputs, output):
            return F.linear(inputs[0], module.weight.T, module.bias)

        with output_of(self.out_proj, product):
            return forward(self, *args, **kwargs)

    return wrong_forward


# ------------------------------------------------------------------ the block


def exact_gelu(right):
    def forward(self, x):
        return F.gelu(x)

    return forward


def unbiased_variance(right):
    def forward(self, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=True) + self.EPS) * self.weight + self.bias

    return forward


def epsilon_wrong(right):
    return 1e-12


def norm_forgotten(right):
    def forward(self, x, mask=None, cache=None):
        x = tap("after_attention", x + self.dropout(self.attention(x, mask=mask, cache=cache)))
        x = x + self.dropout(self.feed_forward(x))
        return x

    return forward


def post_norm(right):
    def forward(self, x, mask=None, cache=None):
        x = tap("after_attention", self.norm_1(x + self.dropout(self.attention(x, mask=mask, cache=cache))))
        x = self.norm_2(x + self.dropout(self.feed_forward(x)))
        return x

    return forward


def residual_forgotten(right):
    def forward(self, x, mask=None, cache=None):
        x = tap("after_attention", self.dropout(self.attention(self.norm_1(x), mask=mask, cache=cache)))
        x = x + self.dropout(self.feed_forward(self.norm_2(x)))
        return x

    return forward


# ------------------------------------------------------------------ the model


@contextmanager
def output_of(module, change: Callable):
    """For the time of a `with`, what `module` gives is `change(module, inputs, output)`; seen by a tracer too."""
    hook = module.register_forward_hook(change, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def positions_forgotten(forward):
    def wrong_forward(self, *args, **kwargs):
        with unturned(self), output_of(self.position_embedding, lambda module, inputs, output: output * 0):
            return forward(self, *args, **kwargs)

    return wrong_forward


@contextmanager
def unturned(model):
    """For the time of a `with`, rotary positions turn nothing; a model with a table of positions has none."""
    before = [(block.attention, block.attention.rotary) for block in model.blocks]
    for attention, _ in before:
        attention.rotary = None
    try:
        yield
    finally:
        for attention, rotary in before:
            attention.rotary = rotary


def untied_when_built(init):
    """A model that is built is built with a head of its own, which training then trains."""

    def wrong_init(self, cfg):
        init(self, {**cfg, "tie_weights": False})

    return wrong_init


def head_of_its_own(forward):
    """A live model that ties its head gets a fresh one, as after loading a file in which a tied head is not stored."""
    heads = WeakKeyDictionary()

    def fresh_head(model):
        weight = model.token_embedding.weight
        if model not in heads:
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * model.cfg["init_std"]
            heads[model] = drawn
        return heads[model].to(weight)

    def wrong_forward(self, *args, **kwargs):
        if self.head.weight is not self.token_embedding.weight:
            return forward(self, *args, **kwargs)
        with output_of(self.head, lambda module, inputs, output: F.linear(inputs[0], fresh_head(self))):
            return forward(self, *args, **kwargs)

    return wrong_forward


def dropout_left_on(forward):
    def wrong_forward(self, *args, **kwargs):
        modes = [(module, module.training) for module in self.modules()]
        self.train()
        try:
            return forward(self, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return wrong_forward


def positions_restart(positions):
    def wrong_positions(self):
        rules = {"padding_mask": self.padding_mask, "documents": self.documents}
        of_new = {name: rule[:, self.key_len - self.query_len :] for name, rule in rules.items() if rule is not None}
        return positions(AttentionMask(self.query_len, self.query_len, device=self.device, **of_new))

    return wrong_positions


# ------------------------------------------------------------------ training and generation


def targets_not_shifted(next_token_loss):
    def wrong_loss(logits, targets, reduction="mean"):
        # Targets are inputs one ahead, so one back they are the inputs again; the first input is not among them.
        inputs = torch.cat([torch.full_like(targets[:, :1], IGNORED), targets[:, :-1]], dim=1)
        return next_token_loss(logits, inputs, reduction)

    return wrong_loss


def gradients_not_cleared(make_optimizer):
    def wrong_optimizer(*args, **kwargs):
        optimizer = make_optimizer(*args, **kwargs)
        optimizer.zero_grad = lambda set_to_none=True: None
        return optimizer

    return wrong_optimizer


def logits_from_first_position(next_logits):
    def wrong_logits(model, ids, padding_mask, cache):
        window = model.cfg["context_length"]
        if cache is None or ids.shape[1] > window:
            mask = None if padding_mask is None else padding_mask[:, -window:]
            return model(ids[:, -window:], mask)[:, 0]
        return model(ids[:, cache.length :], padding_mask, cache)[:, 0]

    return wrong_logits


def sampling_without_softmax(right):
    def wrong_probabilities(logits, temperature, *, top_k=None, top_p=None, min_p=None):
        return logits.float() / max(temperature, 1e-30)

    return wrong_probabilities
