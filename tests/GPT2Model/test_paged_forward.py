"""A forward pass over pages gives the logits of GPTModel.forward, however the texts are cut, mixed and shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from CMHA.implementations.paged_attention import read_with
from CMHA.paged_kv_cache import PagedMask
from GPT2Model.generation import generate
from GPT2Model.paged_forward import PagedRows, make_paged_cache, paged_forward
from tests.CMHA.implementations import paged_cases  # noqa: F401  the kernels, ready for Triton's interpreter

VARIANTS = {
    "GPT-2": {},
    "grouped heads": {"n_kv_heads": 1},
    "rope": {"positions": "rope", "emb_dim": 36, "n_heads": 6},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "untied head": {"tie_weights": False},
    "no bias": {"qkv_bias": False},
    "all": {"n_kv_heads": 3, "positions": "rope", "emb_dim": 36, "n_heads": 6, "norm": "rmsnorm", "mlp": "swiglu",
            "tie_weights": False, "qkv_bias": False},
}  # fmt: skip
CONTEXT = 24


@pytest.fixture(scope="module")
def models(build):
    made = {}

    def get(name, dtype=torch.float64):
        if (name, dtype) not in made:
            made[name, dtype] = build(dtype, **VARIANTS[name])
        return made[name, dtype]

    return get


class Pages:
    """Texts in a paged cache full of garbage, written piece by piece; each text has blocks of its own, in no order."""

    def __init__(self, model, texts, block_size, garbage=1e4):
        held = -(-CONTEXT // block_size)
        numbers = torch.randperm(held * len(texts) + 1, generator=torch.Generator().manual_seed(block_size)).tolist()
        self.tables = [numbers[i * held : (i + 1) * held] for i in range(len(texts))]
        self.cache = make_paged_cache(model, len(numbers), block_size)
        for pools in self.cache.pools:
            for pool in pools:
                pool.fill_(garbage)
        self.model, self.texts, self.done = model, texts, [0] * len(texts)

    def read(self, new: dict[int, int]) -> torch.Tensor:
        """{text: tokens}: read so many more tokens of each of these texts; the logits after each, in that order."""
        ids = torch.cat([self.texts[i][self.done[i] : self.done[i] + count] for i, count in new.items()])
        tables, lengths = [self.tables[i] for i in new], [self.done[i] for i in new]
        mask = PagedMask(tables, lengths, list(new.values()), self.cache.block_size)
        logits = paged_forward(self.model, ids, mask, self.cache)
        for i, count in new.items():
            self.done[i] += count
        return logits


def whole(model, text: torch.Tensor) -> torch.Tensor:
    """(T, vocab_size): the logits after every token, by the model's own forward pass."""
    with torch.no_grad(), model.using_attention("eager"):
        return model(text[None])[0]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_read_in_pieces_beside_texts_that_write_have_the_logits_of_the_model(
    name, block_size, models, random_ids
):
    model = models(name)
    texts = [row[:length] for row, length in zip(random_ids(3, CONTEXT, seed=2), (24, 17, 9), strict=True)]
    pages, right = Pages(model, texts, block_size, garbage=float("nan")), [whole(model, text) for text in texts]
    for new in ({0: 7, 1: 16}, {1: 1, 0: 9}, {2: 8, 0: 1}, {0: 1, 2: 1}, {0: 6}):
        found = pages.read(new)
        assert_equal(found, torch.stack([right[i][pages.done[i] - 1] for i in new]))
    assert pages.done == [24, 17, 9]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_model(data, models, random_ids):
    model = models(data.draw(st.sampled_from(list(VARIANTS))))
    lengths = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4))
    texts = [random_ids(1, length, seed=length)[0] for length in lengths]
    pages, right = Pages(model, texts, data.draw(st.sampled_from([1, 3, 16]))), [whole(model, text) for text in texts]
    while unread := [i for i, length in enumerate(lengths) if pages.done[i] < length]:
        chosen = data.draw(st.lists(st.sampled_from(unread), min_size=1, unique=True))
        new = {i: data.draw(st.integers(1, lengths[i] - pages.done[i])) for i in chosen}
        found = pages.read(new)
        assert_equal(found, torch.stack([right[i][pages.done[i] - 1] for i in new]))


@pytest.mark.parametrize("name", ["GPT-2", "all"])
def test_texts_that_begin_alike_may_hold_the_same_blocks(name, models, random_ids):
    model, block_size = models(name), 4
    first, second = random_ids(2, 20, seed=5)
    second[:8] = first[:8]
    cache = make_paged_cache(model, 20, block_size)
    tables = [[9, 3, 7, 1, 5], [9, 3, 2, 8, 4]]
    paged_forward(model, first[:13], PagedMask(tables[:1], [0], [13], block_size), cache)
    mask = PagedMask(tables, [13, 8], [1, 6], block_size)  # the second begins behind what it shares
    found = paged_forward(model, torch.cat([first[13:14], second[8:14]]), mask, cache)
    assert_equal(found, torch.stack([whole(model, first)[13], whole(model, second)[13]]))


def test_after_a_block_is_copied_its_two_holders_go_their_own_ways(models, random_ids):
    """Copy on write: two samples of one prompt share its last, half-full block until one of them writes."""
    model, block_size = models("GPT-2"), 4
    prompt, ends = random_ids(1, 6, seed=1)[0], torch.tensor([11, 44])
    cache = make_paged_cache(model, 6, block_size)
    paged_forward(model, prompt, PagedMask([[4, 2]], [0], [6], block_size), cache)
    cache.copy_block(2, 0)
    found = paged_forward(model, ends, PagedMask([[4, 2], [4, 0]], [6, 6], [1, 1], block_size), cache)
    assert_equal(found, torch.stack([whole(model, torch.cat([prompt, end[None]]))[-1] for end in ends]))


def test_our_kernel_in_the_model_writes_what_plain_writes(models, random_ids, kernels):
    """In float32: a prompt in two pieces beside texts that write."""
    model = models("grouped heads", torch.float32).to(kernels)
    texts = list(random_ids(3, CONTEXT, seed=4).to(kernels))
    logits = {}
    for reader in ("plain", "triton"):
        pages = Pages(model, texts, 5, garbage=float("nan"))
        pages.cache.pools = [tuple(pool.to(kernels) for pool in pools) for pools in pages.cache.pools]
        with read_with(reader):
            logits[reader] = [pages.read(new) for new in ({0: 20, 1: 3}, {0: 1, 2: 5}, {1: 1, 0: 1, 2: 1})]
    for plain, triton in zip(*logits.values(), strict=True):
        torch.testing.assert_close(plain, triton, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits["plain"][2], logits["triton"][2])  # it was another way


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_another_number_of_ids_than_the_mask_has_is_refused(models):
    model = models("GPT-2")
    with pytest.raises(ValueError, match=r"for 3 new tokens.*got 2 ids"):
        paged_forward(
            model, torch.zeros(2, dtype=torch.long), PagedMask([[0]], [0], [3], 4), make_paged_cache(model, 1, 4)
        )


def test_a_sequence_longer_than_the_context_is_refused(models):
    model = models("GPT-2")
    with pytest.raises(ValueError, match="of up to 25, got 1 ids for a model of context_length=24"):
        paged_forward(
            model, torch.zeros(1, dtype=torch.long), PagedMask([range(7)], [24], [1], 4), make_paged_cache(model, 7, 4)
        )


def test_many_sequences_may_have_more_tokens_together_than_the_context(models, random_ids):
    model, texts = models("GPT-2"), random_ids(3, 20)
    found = Pages(model, list(texts), 4).read({0: 20, 1: 20, 2: 20})
    assert_equal(found, torch.stack([whole(model, text)[-1] for text in texts]))


def test_a_cache_has_the_models_heads_dtype_and_width(build):
    model = build(torch.bfloat16, n_kv_heads=1)
    cache = make_paged_cache(model, 3, 8)
    assert [tuple(pool.shape) for pools in cache.pools for pool in pools] == [(3, 8, 1, 6)] * 4
    assert cache.pools[0][0].dtype == torch.bfloat16


# --- PagedRows, and generate() ---------------------------------------------------------------------------------------


def plain_loop(model, ids: torch.Tensor, new_tokens: int) -> list[int]:
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -new_tokens:].tolist()


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, True
    return ids, mask


@pytest.mark.parametrize("name", VARIANTS)
def test_generate_over_pages_writes_the_plain_loops_tokens_with_left_padding(name, build, random_ids):
    model = build(torch.float32, **VARIANTS[name])
    with torch.no_grad():  # blocks that say more than the embedding, or the texts would repeat one token
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                parameter *= 6
    rows = [row[:length] for row, length in zip(random_ids(3, 9, seed=3), (9, 1, 5), strict=True)]
    ids, mask = left_padded(rows)
    expected = [plain_loop(model, row[None], 12) for row in rows]
    assert min(len(set(text)) for text in expected) > 2
    assert len({token for text in expected for token in text}) > 7
    with model.using_attention("paged_attention"):
        found = generate(model, ids, 12, padding_mask=mask)
    assert found[:, 9:].tolist() == expected


def test_rows_are_scored_as_the_model_scores_each_alone(models, random_ids):
    model = models("rope")
    rows = [row[:length] for row, length in zip(random_ids(3, 12, seed=8), (12, 3, 7), strict=True)]
    ids, mask = left_padded(rows)
    pages = PagedRows(model, 3, CONTEXT, block_size=5)
    assert_equal(pages.next_logits(model, ids, mask), torch.stack([whole(model, row)[-1] for row in rows]))
    assert (pages.lengths, pages.length) == ([12, 3, 7], 12)
    more = random_ids(3, 2, seed=9)
    longer = torch.cat([mask, torch.ones(3, 2, dtype=torch.bool)], 1)
    found = pages.next_logits(model, torch.cat([ids, more], 1), longer)
    right = [whole(model, torch.cat([row, end]))[-1] for row, end in zip(rows, more, strict=True)]
    assert_equal(found, torch.stack(right))
    assert (pages.lengths, pages.length) == ([14, 5, 9], 14)
    assert pages.nbytes == pages.cache.nbytes == 2 * 2 * 15 * 5 * 36 * 8  # layers, keys and values, blocks, tokens, C


def test_without_padding_every_row_has_all_its_tokens(models, random_ids):
    model, ids = models("GPT-2"), random_ids(2, 6)
    found = PagedRows(model, 2, CONTEXT).next_logits(model, ids, None)
    assert_equal(found, torch.stack([whole(model, row)[-1] for row in ids]))
