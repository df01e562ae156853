"""Attention over pages: every reader is within the bound, whatever lies around the keys; and which reader is taken.

Of the readers that need a GPU, test_paged_triton.py and test_paged_flash_attention_2.py have more to say.
"""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.implementations import eager, flash_attention_2, flash_triton, paged_attention, paged_plain, sdpa
from CMHA.implementations.paged_attention import choose_reader, read_with, readers_report
from CMHA.packages import Found
from CMHA.paged_kv_cache import Pages
from CMHA.request import AttentionRequest, Reason
from tests.CMHA.implementations.paged_cases import TURNS, Batch, batches

NAN = float("nan")
HOPPER = AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(9, 0), paged=True)
PAGES = Pages(256, torch.bfloat16)


# --- plain ------------------------------------------------------------------------------------------------------


@given(batch=batches())
def test_plain_is_within_the_bound_for_any_mix_of_reading_and_writing(batch):
    assert batch.error_over_bound(batch.read("plain")) <= 1


@pytest.mark.parametrize("batch", TURNS, ids=str)
def test_so_it_is_for_every_block_size_and_width(batch):
    assert batch.error_over_bound(batch.read("plain")) <= 1


def test_in_float64_it_is_the_formula_to_the_last_digits():
    batch = Batch((40, 0, 7), (9, 20, 1), block_size=3, dtype=torch.float64, garbage=NAN, shared=2)
    found = batch.read("plain")
    torch.testing.assert_close(found, torch.cat(batch.formula(torch.float64), 2), rtol=1e-13, atol=1e-13)


def test_where_sdpa_gave_nan_eager_attends():
    assert paged_plain.ordinary("mps") is eager
    assert paged_plain.ordinary("cuda") is paged_plain.ordinary("cpu") is sdpa


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.integers(0, 99))
def test_a_sequence_is_read_alike_alone_and_among_others_and_wherever_its_blocks_lie(lengths, seed):
    batch = Batch(tuple(length - 1 for length in lengths), (1,) * len(lengths), seed=seed, garbage=NAN)
    together = batch.read("plain")
    for number in range(len(lengths)):
        alone = Batch((batch.past[number],), (1,), seed=seed + 1, spare=7)
        vars(alone).update(queries=batch.queries[:, :, number : number + 1], texts=[batch.texts[number]])
        assert torch.equal(alone.read("plain"), together[:, :, number : number + 1])


# --- which reader is taken --------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine("flash_attn_2", "triton"): these packages can be imported, others not."""

    def build(*found):
        missing = [reason("not_installed")]
        monkeypatch.setattr(
            flash_attention_2.flash_package, "reasons_of_machine", lambda name: [] if name in found else missing
        )
        monkeypatch.setattr(
            flash_triton, "reasons_of_device",
            lambda device: [] if device == "cuda" and "triton" in found else [reason("no_triton")],
        )  # fmt: skip

    return build


def reason(code):
    return Reason(code, f"it has {code}", f"mend {code}")


def codes(request=HOPPER, pages=PAGES):
    return {
        name: [each["code"] for each in against] for name, against in readers_report(request, pages)["readers"].items()
    }


def test_on_cuda_flash_attention_comes_first_then_our_kernel_then_plain_and_elsewhere_plain(machine):
    machine("flash_attn_2", "triton")
    assert choose_reader(HOPPER, PAGES) == ("flash_attention_2", {})
    name, rejected = choose_reader(HOPPER, PAGES._replace(block_size=16))
    assert (name, list(rejected)) == ("triton", ["flash_attention_2"])
    assert rejected["flash_attention_2"][0].code == "block_size"
    machine("triton")
    assert choose_reader(HOPPER, PAGES)[0] == "triton"
    machine()
    assert choose_reader(HOPPER, PAGES)[0] == "plain"
    for device in ("cpu", "mps", "xla"):
        assert choose_reader(replace(HOPPER, device=device, capability=None), PAGES) == ("plain", {})


CANNOT = {  # what is asked beyond HOPPER and PAGES; the codes against flash_attention_2, triton and flex
    "nothing": ({}, {}, [], [], []),
    "small_blocks": ({}, {"block_size": 128}, ["block_size"], [], []),
    "more_than_256": ({}, {"block_size": 384}, ["block_size"], [], []),
    "two_times_256": ({}, {"block_size": 512}, [], [], []),
    "odd_heads": ({"head_dim": 20}, {}, ["head_dim"], [], []),
    "wide_heads": ({"head_dim": 264}, {}, ["head_dim"], ["head_dim"], []),
    "the_widest": ({"head_dim": 256}, {}, [], [], []),
    "float32": ({"dtype": torch.float32}, {"dtype": torch.float32}, ["dtype"], [], []),
    "autocast": ({}, {"dtype": torch.float32}, ["cache_dtype"], [], ["cache_dtype"]),
    "float64": ({"dtype": torch.float64}, {"dtype": torch.float64}, ["dtype"], ["dtype"], ["dtype"]),
    "dropout": ({"dropout": 0.1}, {}, ["dropout"], ["dropout"], ["dropout"]),
    "turing": ({"capability": (7, 5)}, {}, ["capability"], ["capability"], []),
    "one_key_head_for_128": ({"num_heads": 128, "num_kv_heads": 1}, {}, [], ["group"], []),
    "one_key_head_for_64": ({"num_heads": 64, "num_kv_heads": 1}, {}, [], [], []),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_reader_cannot_do_is_a_reason_against_it(name, machine, monkeypatch):
    machine("flash_attn_2", "triton")
    monkeypatch.setattr(paged_attention.paged_flex.flex_attention, "find", lambda name: Found("3", module=json))
    asked, pages, *expected = CANNOT[name]
    found = codes(replace(HOPPER, **asked), PAGES._replace(**pages))
    assert [found["flash_attention_2"], found["triton"], found["flex"], found["plain"]] == [*expected, []]
    for against in readers_report(replace(HOPPER, **asked), PAGES._replace(**pages))["readers"].values():
        assert all(each["message"] and each["remedy"] for each in against)


def test_what_is_missing_on_the_machine_is_a_reason_too(machine):
    machine()
    found = codes()
    assert found["flash_attention_2"] == ["not_installed"]
    assert found["triton"] == ["no_triton"]


def test_on_a_cpu_the_kernels_say_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = codes(AttentionRequest(paged=True), Pages())
    assert found["triton"] == ["cuda_only"]
    assert {"block_size", "cuda_only", "dtype"} <= set(found["flash_attention_2"])


def test_the_report_is_plain_data_and_names_the_choice(machine):
    machine("flash_attn_2", "triton")
    report = readers_report(HOPPER, PAGES)
    assert json.loads(json.dumps(report)) == report
    assert (report["chosen"], report["named"], report["block_size"]) == ("flash_attention_2", None, 256)
    assert list(report["readers"]) == list(paged_attention.READERS)
    with read_with("triton"):
        assert readers_report(HOPPER, PAGES)["chosen"] == "triton"
        assert readers_report(replace(HOPPER, head_dim=300), PAGES)["chosen"] is None
        assert readers_report(HOPPER, PAGES)["named"] == "triton"
    assert readers_report()["chosen"] == "plain"


def test_a_reader_that_is_named_is_taken_or_says_why_not_and_then_choosing_is_free_again(monkeypatch):
    batch, taken = Batch((20, 3), (1, 4)), []
    for name, reader in paged_attention.READERS.items():
        monkeypatch.setattr(reader, "read", lambda q, *a, _name=name, **k: taken.append(_name) or q)
    monkeypatch.setattr(paged_attention.paged_flash_attention_2, "reasons", lambda *call: [])
    monkeypatch.setattr(paged_attention.paged_triton, "reasons", lambda *call: [reason("one"), reason("two")])
    mask, pools = batch.mask(), batch.pools()

    def attend():
        return paged_attention.attention(batch.queries, *pools, mask, scale=1.0)

    with torch.no_grad():
        attend()
        with read_with("flash_attention_2"):
            attend()
            with read_with("plain"):
                attend()
            attend()
            said = r"with triton here:\n  it has one; mend one\n  it has two; mend two"
            with pytest.raises(ValueError, match=said), read_with("triton"):
                attend()
            with read_with(None):
                attend()
        attend()
    assert taken == ["plain", "flash_attention_2", "plain", "flash_attention_2", "plain", "plain"]
    known = r"unknown reader of pages 'fa9'. Known: flash_attention_2, triton, plain, flex"
    with pytest.raises(ValueError, match=known), read_with("fa9"):
        pass


def test_the_layers_of_a_pass_ask_once(monkeypatch):
    batch, asked, real = Batch((20, 3), (1, 4)), [], paged_attention.choose_reader
    monkeypatch.setattr(paged_attention, "choose_reader", lambda *call: asked.append(call) or real(*call))
    mask, pools = batch.mask(), batch.pools()
    for _ in range(3):
        paged_attention.attention(batch.queries, *pools, mask, scale=1.0)
    ((request, pages),) = asked
    assert pages == Pages(16, torch.float32)
    assert (request.device, request.dtype, request.head_dim, request.num_heads) == ("cpu", torch.float32, 16, 4)
    monkeypatch.setattr(paged_plain, "read", lambda queries, *others, **options: queries)
    paged_attention.attention(batch.queries.bfloat16(), *pools, mask, scale=1.0)  # other dtypes are other calls
    paged_attention.attention(batch.queries, *(pool.double() for pool in pools), mask, scale=1.0)
    assert [(request.dtype, pages.dtype) for request, pages in asked[1:]] == [
        (torch.bfloat16, torch.float32), (torch.float32, torch.float64),
    ]  # fmt: skip


# --- the registry's check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"paged": True}, []),
        ({"paged": True, "dropout": 0.1}, []),
        ({}, ["no_pages"]),
        ({"needs_grad": True}, ["training"]),
        ({"needs_grad": True, "paged": True}, ["training"]),
        ({"needs_weights": True}, ["no_pages", "weights_wanted"]),
    ],
    ids=str,
)
def test_there_must_be_pages_and_no_training(asked, expected):
    assert [each.code for each in paged_attention.check(AttentionRequest(**asked))] == expected


def test_dropout_is_left_to_plain():
    batch = Batch((20, 3), (1, 4))
    torch.manual_seed(0)
    kept, dropped = (
        paged_attention.attention(batch.queries, *batch.pools(), batch.mask(), scale=1.0, dropout=dropout)[0]
        for dropout in (0.0, 0.5)
    )
    assert not torch.allclose(kept, dropped)
