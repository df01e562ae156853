"""Read 1 of 6. Causal multi-head attention: the one place in GPT-2 where tokens look at each other.

Five steps, and only the middle one has variants: project, split into heads, attend, merge the heads, project.
The variants are files in `CMHA/implementations/` and all give the same numbers; `use_flash` and
`attn_implementation` pick one, `CMHA/choosing/` explains the pick, and the weights never notice.
Letters in comments: B sequences, T tokens, H heads, D width of one head. Next: `CMHA/implementations/eager.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor, cat, is_grad_enabled, nn

from CMHA.choosing import AttentionChoice, AttentionSettings, choose
from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest, capability_of
from CMHA.rotary import RotaryPositions
from CMHA.tap import tap


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention with one set of weights for every implementation.

    Why several heads: one softmax gives each token one weighted average; H of them, each on d_out / H of the
    width, let it look at H things at once for the same cost.

    Args:
        d_in, d_out: width of the input and of the output; d_out is all heads together, not one.
        context_length: the longest sequence, in tokens.
        dropout: probability of dropping an attention weight, in training only.
        num_heads: must divide d_out.
        qkv_bias: whether the query, key and value projections have a bias (GPT-2's have).
        use_flash: False: always the manual path, eager. True: whatever attn_implementation says.
        attention_settings: attn_implementation, attn_strict and the other fields of `AttentionSettings`.
        num_kv_heads: key and value heads, each shared by a group of query heads; None: num_heads, as in GPT-2.
        rotary: turns queries and keys by their positions (`CMHA/rotary.py`); None: as in GPT-2, which adds them.
    Raises:
        ValueError: heads that do not divide, or an unknown implementation.
    Source: "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.2; GPT-2's `c_attn` and `c_proj`.
    """

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False,
        use_flash: bool = True, *, num_kv_heads: int | None = None, rotary: RotaryPositions | None = None,
        **attention_settings,
    ):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or d_out % num_heads or num_heads % num_kv_heads:
            raise ValueError(f"{d_out=} must be a multiple of {num_heads=}, and that of {num_kv_heads=}.")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_out // num_heads
        self.context_length, self.dropout, self.rotary = context_length, dropout, rotary
        self.settings = AttentionSettings(use_flash=use_flash, **attention_settings)
        # Queries, keys and values in one matrix product instead of three: rows stacked in this order.
        self.widths = [d_out, num_kv_heads * self.head_dim, num_kv_heads * self.head_dim]
        self.W_qkv = nn.Linear(d_in, sum(self.widths), bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.register_load_state_dict_pre_hook(fuse_separate_projections)

    def forward(
        self,
        x: Float[Tensor, "batch tokens d_in"],
        padding_mask: Bool[Tensor, "batch key_len"] | None = None,
        *,
        mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "batch tokens d_out"] | tuple[Float[Tensor, "batch tokens d_out"], Tensor]:
        """Mix each token with the tokens before it.

        Args:
            x: (B, T, d_in).
            padding_mask: (B, key_len), True = a real token. A position with nothing to attend to gives zeros.
            mask: a ready AttentionMask instead, shared by all layers; then padding_mask is not looked at.
            cache: keys and values of earlier tokens; the new ones are added to it.
            return_weights: also return (B, H, T, key_len) weights. Only eager has them: it serves that call.
        Raises:
            ValueError: more tokens than context_length, or a mask that does not fit.
        """
        queries, keys, values = self.W_qkv(x).split(self.widths, dim=-1)  # each (B, T, heads * D)
        queries = self.split_heads(queries, self.num_heads)
        keys, values = self.split_heads(keys, self.num_kv_heads), self.split_heads(values, self.num_kv_heads)
        lengths = (x.shape[1], x.shape[1] + (cache.length if cache is not None else 0))
        if lengths[1] > self.context_length and not (mask is not None and mask.paged):  # there: of many sequences
            raise ValueError(f"{lengths[1]} tokens are more than context_length={self.context_length}: pass fewer.")
        if mask is None:
            mask = AttentionMask(*lengths, padding_mask=padding_mask, batch_size=len(x), device=x.device)
        elif (mask.query_len, mask.key_len) != lengths or mask.batch_size not in (None, 1, len(x)):
            fits = f"{(mask.query_len, mask.key_len)} queries and keys, {mask.batch_size or 'any'} sequences"
            raise ValueError(f"the mask is for {fits}, not {lengths}, {len(x)}.")
        if self.rotary is not None:
            queries, keys = self.rotary(queries, keys, mask)
        queries, keys, values = tap("queries", queries), tap("keys", keys), tap("values", values)
        if cache is not None:
            keys, values = cache.append(keys, values)

        dropout = self.dropout if self.training else 0.0
        request = AttentionRequest.describe(queries, keys, mask, dropout=dropout, needs_weights=return_weights)
        choice = choose(self.settings, request)
        scale = self.head_dim**-0.5  # keeps the scores' variance near 1, whatever D
        context, weights = choice.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

        output = self.out_proj(self.merge_heads(tap("context", context)))  # a tap: where trace() looks
        return (output, weights) if return_weights else output

    def split_heads(self, x: Tensor, num_heads: int) -> Float[Tensor, "batch heads tokens head_dim"]:
        # (B, T, H*D) -> (B, T, H, D) -> (B, H, T, D). Viewing as (B, H, T, D) at once would mix up tokens.
        return x.view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, context: Tensor) -> Float[Tensor, "batch tokens d_out"]:
        return context.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, H*D)

    def set_attention(self, name_or_cfg: str | Mapping | AttentionSettings) -> None:
        """Compute attention another way from now on; the weights stay as they are.

        Args:
            name_or_cfg: an implementation ("eager", ...); a cfg dict, of which the attention keys that it has are
                taken; or settings kept from before.
        """
        if isinstance(name_or_cfg, AttentionSettings):
            self.settings = name_or_cfg
        elif isinstance(name_or_cfg, Mapping):
            self.settings = self.settings.merged(name_or_cfg)
        else:
            self.settings = replace(self.settings, use_flash=True, attn_implementation=name_or_cfg)

    def choice(self, tokens: int | None = None) -> AttentionChoice:
        """Which implementation a plain causal pass over `tokens` tokens (the context, if None) takes, and why."""
        return choose(self.settings, self.typical_request(tokens))

    def typical_request(self, tokens: int | None = None) -> AttentionRequest:
        """The request of a plain causal pass, as the layer stands now: device, dtype, training, gradients or not."""
        tokens, weight = tokens or self.context_length, self.W_qkv.weight
        request = AttentionRequest(
            device=weight.device.type, dtype=weight.dtype, head_dim=self.head_dim, query_len=tokens, key_len=tokens,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, dropout=self.dropout if self.training else 0.0,
            needs_grad=is_grad_enabled() and weight.requires_grad, capability=capability_of(weight.device))  # fmt: skip
        return self.settings.as_used(request, self.training)


def fuse_separate_projections(module, state_dict, prefix, *_) -> None:
    """Accept W_query, W_key and W_value where W_qkv is expected, and drop a stored causal mask."""
    for kind in ("weight", "bias"):
        separate = [f"{prefix}{name}.{kind}" for name in ("W_query", "W_key", "W_value")]
        if all(key in state_dict for key in separate):
            state_dict[f"{prefix}W_qkv.{kind}"] = cat([state_dict.pop(key) for key in separate])
    state_dict.pop(f"{prefix}mask", None)
