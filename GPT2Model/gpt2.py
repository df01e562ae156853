"""Read 5 of 6. GPT-2: token ids in, one score for every word of the vocabulary out, at every position.

embeddings -> n_layers blocks -> norm -> head. Every size is in the cfg dict (`GPT2Model/config.py` has the keys).
Training and sampling live elsewhere and call `model(ids)`. Next: `orchestrator/orchestration.py`.
"""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from CMHA.choosing import announce, attention_report
from CMHA.kv_cache import KVCache
from CMHA.masks import AttentionMask, check_padding_mask
from GPT2Model.config import attention_cfg, complete
from TransformerBlock import variants
from TransformerBlock.transformer_block import TransformerBlock


class GPTModel(nn.Module):
    """GPT-2, assembled from a cfg dict.

    Args:
        cfg: the cfg dict; missing keys get their defaults in a copy, `model.cfg`. The caller's dict is not changed.
    Raises:
        ValueError: everything that is wrong with the dict, at once.
    Source: Radford et al., 2019; shapes and initialisation as in Hugging Face's code.
    """

    def __init__(self, cfg: Mapping):
        super().__init__()
        self.cfg = cfg = complete(cfg)
        self.token_embedding = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.position_embedding = variants.position_embedding(cfg)  # with rotary positions it adds 0
        self.dropout = nn.Dropout(cfg["drop_rate"])
        self.blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg["n_layers"]))
        self.final_norm = variants.norm(cfg)
        self.head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.initialise()
        if cfg["tie_weights"]:
            self.head.weight = self.token_embedding.weight  # one tensor, shared: not a copy
        announce(self.blocks[0].attention.choice())

    def forward(
        self, ids: Int[Tensor, "batch tokens"], padding_mask: Bool[Tensor, "batch key_len"] | None = None,
        cache: KVCache | None = None, documents: Int[Tensor, "batch key_len"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab_size"]:  # fmt: skip
        """Logits (B, T, vocab_size): the scores at position t are for the token that follows it.

        Args:
            ids: (B, T) token ids.
            padding_mask: (B, T) bool, True = a real token; with a cache, (B, cached + T).
            cache: keys and values of the tokens before `ids`; the new ones are added to it.
            documents: as padding_mask, the number of each token's text: packed ones are read as if each came alone.
        Raises:
            ValueError: too many tokens, an id outside the vocabulary, a mask that does not fit.
        """
        past = cache.length if cache is not None else 0
        self.check_input(ids, padding_mask, past)
        rules = {"padding_mask": padding_mask, "documents": documents, "batch_size": len(ids), "device": ids.device}
        mask = AttentionMask(ids.shape[1], past + ids.shape[1], **rules)
        x = self.dropout(self.token_embedding(ids) + self.position_embedding(mask.positions()))
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask, cache=cache.layers[i] if cache is not None else None)
        return self.head(self.final_norm(x))

    def check_input(self, ids: Tensor, padding_mask: Tensor | None, past: int) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            got = f"{getattr(ids, 'dtype', type(ids).__name__)} {tuple(getattr(ids, 'shape', ()))}"
            raise ValueError(f"ids must be an int64 tensor (B, T), got {got}: ids.long()? one text is ids[None].")
        tokens, limit = past + ids.shape[1], self.cfg["context_length"]
        if tokens > limit:
            raise ValueError(f"{tokens} tokens are more than context_length={limit}: pass the last {limit} at most.")
        # On CUDA the look would wait for all work so far, in torch.compile break the graph: there torch itself asserts.
        look = ids.device.type != "cuda" and ids.numel() and not torch.compiler.is_compiling()
        if look and not 0 <= ids.min() <= ids.max() < self.cfg["vocab_size"]:
            raise ValueError(
                f"token ids must be in 0..{self.cfg['vocab_size'] - 1}, got {ids.min()}..{ids.max()}: wrong tokenizer?"
            )
        if padding_mask is not None:
            check_padding_mask(padding_mask, tokens, ids.shape[0])

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's start: weights N(0, init_std), biases 0, what is added to the stream divided by sqrt(2 * n_layers).

        The division keeps the stream's variance at the last block independent of the depth: 2 * n_layers terms are
        added to it. It is the "modified initialization" of Radford et al., 2019, section 2.3.
        """
        std, depth = self.cfg["init_std"], 2 * self.cfg["n_layers"]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std / depth**0.5 if name.endswith(("out_proj", "down_proj")) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def set_attention(self, name_or_cfg: str | Mapping) -> None:
        """Compute attention another way from now on, in every block: `"eager"`, or a cfg whose toggle was flipped.

        Changing a cfg dict alone does nothing to a model that is built. Says which backend it is now.
        """
        for block in self.blocks:
            block.attention.set_attention(attention_cfg(name_or_cfg))
        announce(self.blocks[0].attention.choice())

    @contextmanager
    def using_attention(self, name_or_cfg: str | Mapping):
        """`with model.using_attention("eager"): ...` and back to what it was, also after an error."""
        before = [block.attention.settings for block in self.blocks]
        try:
            for block in self.blocks:
                block.attention.set_attention(attention_cfg(name_or_cfg))
            yield self
        finally:
            for block, kept in zip(self.blocks, before, strict=True):
                block.attention.set_attention(kept)

    def attention_report(self) -> dict:
        """What computes attention in this model as it stands, and why: JSON-ready."""
        attention = self.blocks[0].attention
        return attention_report(attention.settings, attention.typical_request())

    def num_parameters(self) -> int:
        """How many numbers are trained; a tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(cls, source, cfg: Mapping | None = None, dtype: torch.dtype | None = None) -> "GPTModel":
        """Weights from Hugging Face, this project, LLMs-from-scratch or nanoGPT: see `GPT2Model/pretrained.py`."""
        from GPT2Model.pretrained import load  # it builds a GPTModel, so it imports this file

        return load(source, cfg, dtype)

    def save_pretrained(self, folder, tokenizer=None) -> None:
        """Write a folder that this project and transformers open: see `GPT2Model/pretrained.py`."""
        from GPT2Model.pretrained import save

        save(self, folder, tokenizer)
