"""Read 4 of 6. One transformer block: attention, then feed-forward, each added to the stream it reads from.

The stream x (B, T, emb_dim) runs through the model unchanged but for what blocks add to it. GPT-2 normalises what
a block *reads* (pre-norm), never the stream itself, so the gradient has a straight way back to the embeddings.
LayerNorm, GELU and FeedForward are in `TransformerBlock/layers.py`; `TransformerBlock/variants.py` hands them out,
or what later models have in their place if the cfg says so. Next: `GPT2Model/gpt2.py`.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from CMHA.choosing import AttentionSettings
from CMHA.cmha import MultiHeadAttention
from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from CMHA.tap import tap
from TransformerBlock import variants


class TransformerBlock(nn.Module):
    """norm, attention, norm, feed-forward, two residuals.

    Args:
        cfg: the cfg dict. Needed: emb_dim, n_heads, context_length; every other key has its usual default.
    Raises:
        ValueError: heads that do not divide, or an unknown implementation.
    Source: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.3.
    """

    def __init__(self, cfg: Mapping):
        super().__init__()
        self.attention = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg.get("drop_rate", 0.1),
            num_heads=cfg["n_heads"],
            qkv_bias=cfg.get("qkv_bias", True),
            num_kv_heads=cfg.get("n_kv_heads"),
            rotary=variants.rotary(cfg),  # None: positions are added to the embeddings
            **vars(AttentionSettings.from_cfg(cfg)),  # use_flash, attn_implementation, ...
        )
        self.feed_forward = variants.feed_forward(cfg)
        self.norm_1, self.norm_2 = variants.norm(cfg), variants.norm(cfg)
        self.dropout = nn.Dropout(cfg.get("drop_rate", 0.1))

    def forward(
        self, x: Float[Tensor, "batch tokens emb_dim"], mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch tokens emb_dim"]:  # fmt: skip
        """x plus what attention and feed-forward have to add. `mask` and `cache` as in MultiHeadAttention."""
        x = tap("after_attention", x + self.dropout(self.attention(self.norm_1(x), mask=mask, cache=cache)))
        x = x + self.dropout(self.feed_forward(self.norm_2(x)))
        return x
