"""The adapter of flash-attn's paged functions: tables, lengths and scale as the package wants them.

The package needs a GPU, so this runs against a stand-in that looks every key up in the block table it is given.
"""

import copy
from dataclasses import replace

import pytest
import torch

from CMHA.implementations import paged_attention, paged_flash_attention_2
from CMHA.paged_kv_cache import PagedMask
from GPT2Model.gpt2 import GPTModel
from GPT2Model.paged_forward import make_paged_cache, paged_forward
from tests.CMHA.implementations.fake_flash_attn_pages import add_pages
from tests.CMHA.implementations.paged_cases import Batch

NAN = float("nan")


@pytest.fixture
def fake(fakes, monkeypatch):
    """The stand-in is found as the package is; that this is no GPU is not said."""
    real = paged_flash_attention_2.reasons
    monkeypatch.setattr(
        paged_flash_attention_2, "reasons", lambda *call: [each for each in real(*call) if each.code != "cuda_only"]
    )
    return add_pages(fakes("flash_attn_2"))


SMALL = Batch((260, 3, 0, 255, 12), (1, 1, 20, 1, 7), 256, garbage=NAN, dtype=torch.bfloat16)
BATCHES = {
    "both": SMALL,
    "only_writing": replace(SMALL, past=(260, 3, 255), new=(1, 1, 1)),
    "only_reading": replace(SMALL, past=(250, 0), new=(9, 20)),
    "fp16": replace(SMALL, dtype=torch.float16, heads=3, kv_heads=1),
    "one": replace(SMALL, past=(0,), new=(1,)),
    "wide": replace(SMALL, past=(5,), new=(1,), head_dim=256),
    "blocks_of_512": replace(SMALL, past=(600, 2), new=(1, 4), block_size=512),
    "shared": replace(SMALL, past=(300, 270, 257), new=(1, 5, 1), shared=1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_it_is_within_the_bound_and_asks_the_package_once_for_each_kind(name, fake):
    batch = BATCHES[name]
    assert batch.error_over_bound(batch.read("flash_attention_2")) <= 1
    kinds = {"flash_attn_with_kvcache": 1 in batch.new, "flash_attn_varlen_func": max(batch.new) > 1}
    assert [called for called, _ in fake.calls] == [kind for kind, wanted in kinds.items() if wanted]


def test_the_pool_is_handed_over_as_it_lies(fake):
    """Any copy of it would cost more than attention does."""
    pools = SMALL.pools()
    with torch.no_grad():
        paged_flash_attention_2.read(SMALL.queries, *pools, SMALL.mask(), scale=1.0)
    assert len(fake.calls) == 2
    for _, given in fake.calls:
        handed = [given.get(f"{name}_cache", given[name]) for name in ("k", "v")]
        for one, pool in zip(handed, pools, strict=True):
            assert one.data_ptr() == pool.data_ptr()
            assert one.is_contiguous()
            assert one.shape == (SMALL.num_blocks, 256, 2, 16)


def test_blocks_that_are_no_multiple_of_256_raise_where_it_is_named(fake):
    with pytest.raises(ValueError, match=r"multiples of 256 tokens, not 16; make the cache with block_size=256"):
        replace(SMALL, past=(3,), new=(1,), block_size=16).read("flash_attention_2")


def test_a_model_in_bf16_writes_through_it(fake):
    """As near to float64 as eager in bf16 is, or twice as far: a prompt in two pieces beside one that writes."""
    cfg = {"vocab_size": 61, "context_length": 400, "emb_dim": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2,
           "drop_rate": 0.0, "qkv_bias": True}  # fmt: skip
    torch.manual_seed(0)
    model = GPTModel(cfg).to(torch.bfloat16).eval()
    ids = [torch.randint(61, (length,)) for length in (270, 12)]
    cache = make_paged_cache(model, 3, 256)
    tables = [[2, 0], [1]]
    with paged_attention.read_with("flash_attention_2"):
        paged_forward(model, torch.cat([ids[0][:260], ids[1][:11]]), PagedMask(tables, [0, 0], [260, 11], 256), cache)
        found = paged_forward(
            model, torch.cat([ids[0][260:], ids[1][11:]]), PagedMask(tables, [260, 11], [10, 1], 256), cache
        )
    with torch.no_grad(), model.using_attention("eager"):
        plain = torch.cat([model(own[None])[:, -1] for own in ids])
        exact = torch.cat([copy.deepcopy(model).double()(own[None])[:, -1] for own in ids])
    assert len(fake.calls) == 6  # two layers: twice one kind, then twice both
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
