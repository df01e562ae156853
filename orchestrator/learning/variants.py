"""GPT-2 with one idea taken out or moved: no norm, norm after the addition, no positions.

Each function changes a model that was built from its cfg dict, in place, and gives it back; the files of the model know
nothing of it. The names of the weights, the toggle of attention, the cache and training stay as they are.

    model = post_norm(GPTModel(cfg))

Two things do not:

- Saving. A folder of weights says nothing about norms that are gone or moved, so `save_pretrained` refuses such a
  model. Keep its state_dict, and load it into a variant made the same way.
- Tracing. All names are there, but `trace` describes each value as it is in GPT-2. In a post-norm model
  `after_attention` is the sum before its norm, and `norm_1` and `norm_2` are the stream itself, not a copy that a layer
  reads; what `residual_norms` shows as added by feed-forward holds both norms too. Where a norm is gone, its name holds
  what it would have read.
"""

from os import PathLike

from jaxtyping import Float
from torch import Tensor, nn

from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from CMHA.tap import tap
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
    return marked(model, "without_norm")


def post_norm(model: GPTModel) -> GPTModel:
    """Normalise the stream itself after each addition, as the first transformer and GPT-1 did; no norm at the end.

    Why try it: GPT-2 moved the norms, and this shows from what. The last block's own norm is the one before the head.

    Source: "Attention Is All You Need" (Vaswani et al., 2017), section 3.1: LayerNorm(x + Sublayer(x)).
    """
    check_norms(model)
    model.blocks = nn.ModuleList(PostNormBlock(block) for block in model.blocks)
    model.final_norm = nn.Identity()
    return marked(model, "post_norm")


def without_positions(model: GPTModel) -> GPTModel:
    """Set the table of positions to zero and keep it there: equal tokens go in as equal vectors, wherever they stand.

    Why try it: to see how much order the causal mask alone gives away. The table stays among the weights and is no
    longer trained; `initialise()` leaves it at zero. So the model can be saved: opened again it computes the same, as a
    plain GPTModel that would train its table. Loading other weights brings their positions back.

    Source: "Transformer Language Models without Positional Encodings Still Learn Positional Information" (Haviv et
    al., 2022).
    Raises:
        ValueError: a model with rotary positions, which has no table.
    """
    check(model)
    if model.cfg["positions"] != "learned":
        raise ValueError(
            "this model has no table of positions to set to zero, it turns queries and keys: "
            'build one with positions="learned".'
        )
    model.position_embedding.weight.requires_grad_(False).zero_()
    return marked(model, "without_positions")


class Variant(GPTModel):
    """What a model becomes when one of these functions has changed it: a GPTModel that knows what it is no longer.

    Attributes:
        changes: the functions that changed it, by name.
    """

    changes: tuple[str, ...] = ()

    def initialise(self) -> None:
        super().initialise()
        if "without_positions" in self.changes:
            self.position_embedding.weight.detach().zero_()

    def save_pretrained(self, folder: str | PathLike) -> None:
        """As GPTModel's, of a model whose norms stand where GPT-2's do.

        Raises:
            ValueError: they are gone or moved, and whoever opens the folder would compute something else, or fail.
        """
        moved = [name for name in self.changes if name != "without_positions"]
        if moved:
            made = "GPTModel(cfg)"
            for name in self.changes:
                made = f"{name}({made})"
            raise ValueError(
                f"a model that went through {moved[0]}() cannot be saved as a folder: its format says nothing about "
                f"norms, and GPT-2's would be expected. Use torch.save(model.state_dict(), FILE), and to open it "
                f"{made}.load_state_dict(torch.load(FILE, weights_only=True))."
            )
        super().save_pretrained(folder)


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
        x = self.norm_1(tap("after_attention", x + self.dropout(self.attention(x, mask=mask, cache=cache))))
        return self.norm_2(x + self.dropout(self.feed_forward(x)))


def marked(model: GPTModel, change: str) -> Variant:
    """The same model, of the class that knows of the change: its weights, hooks and cfg stay where they are."""
    changes = (*getattr(model, "changes", ()), change)
    model.__class__ = Variant
    model.changes = changes
    return model


def check(model: object) -> None:
    """Raises TypeError for what is no GPTModel; a class of one's own made from it would be lost, and is refused too."""
    if type(model) not in (GPTModel, Variant):
        raise TypeError(f"a variant is made of a GPTModel, got {type(model).__name__}: try post_norm(GPTModel(cfg)).")


def check_norms(model: object) -> None:
    """Raises TypeError for what is no GPTModel, and ValueError for one whose norms are gone or moved already."""
    check(model)
    if isinstance(model.final_norm, nn.Identity):
        raise ValueError("the norms of this model were taken out or moved already: build a new GPTModel(cfg).")
