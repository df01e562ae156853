"""GPT-2 with one idea taken out or moved: no norm, norm after the addition, no positions.

Each function changes a model that was built from its cfg dict, in place, and gives it back; the files of the model know
nothing of it. Everything else is as before: the names of the weights, the toggle of attention, training, tracing.

    model = post_norm(GPTModel(cfg))
"""

from jaxtyping import Float
from torch import Tensor, nn

from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from GPT2Model.gpt2 import GPTModel
from TransformerBlock.transformer_block import TransformerBlock


def without_norm(model: GPTModel) -> GPTModel:
    """Take every LayerNorm out: blocks read the stream at whatever scale it has, and so does the head.

    Why try it: to see what the norms are there for. A model that learned with norms is useless without them.
    """
    check_norms(model)
    for block in model.blocks:
        block.norm_1, block.norm_2 = nn.Identity(), nn.Identity()
    model.final_norm = nn.Identity()
    return model


def post_norm(model: GPTModel) -> GPTModel:
    """Normalise the stream itself after each addition, as the first transformer and GPT-1 did; no norm at the end.

    Why try it: GPT-2 moved the norms, and this shows from what. The last block's own norm is the one before the head.

    Source: "Attention Is All You Need" (Vaswani et al., 2017), section 3.1: LayerNorm(x + Sublayer(x)).
    """
    check_norms(model)
    model.blocks = nn.ModuleList(PostNormBlock(block) for block in model.blocks)
    model.final_norm = nn.Identity()
    return model


def without_positions(model: GPTModel) -> GPTModel:
    """Set the table of positions to zero and keep it there: equal tokens go in as equal vectors, wherever they stand.

    Why try it: to see how much order the causal mask alone gives away. The table stays among the weights, so that the
    model can be saved; it is no longer trained.

    Source: "Transformer Language Models without Positional Encodings Still Learn Positional Information" (Haviv et
    al., 2022).
    """
    check(model)
    model.position_embedding.weight.requires_grad_(False).zero_()
    return model


class PostNormBlock(nn.Module):
    """A block whose norms stand behind the additions: x = norm_1(x + attention(x)); x = norm_2(x + feed_forward(x)).

    Args:
        block: the pre-norm block whose parts it takes over, under the same names.
    """

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.attention, self.feed_forward = block.attention, block.feed_forward
        self.norm_1, self.norm_2, self.dropout = block.norm_1, block.norm_2, block.dropout

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb_dim"],
        mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch tokens emb_dim"]:
        x = self.norm_1(x + self.dropout(self.attention(x, mask=mask, cache=cache)))
        return self.norm_2(x + self.dropout(self.feed_forward(x)))


def check(model: object) -> None:
    """Raises TypeError for what is no GPTModel."""
    if not isinstance(model, GPTModel):
        raise TypeError(f"a variant is made of a GPTModel, got {type(model).__name__}: try post_norm(GPTModel(cfg)).")


def check_norms(model: object) -> None:
    """Raises TypeError for what is no GPTModel, and ValueError for one whose norms are gone or moved already."""
    check(model)
    if isinstance(model.final_norm, nn.Identity):
        raise ValueError("the norms of this model were taken out or moved already: build a new GPTModel(cfg).")
