"""The adapters of flash-attn refuse what the packages cannot do, and say why; and the fakes are like the packages."""

import inspect
from dataclasses import replace

import pytest
import torch

from CMHA import packages
from CMHA.choosing import AttentionSettings, choose
from CMHA.implementations import IMPLEMENTATIONS, flash_attention_2, flash_attention_3
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest
from tests.CMHA.implementations import fake_flash_attn

PACKAGES = tuple(fake_flash_attn.BUILDERS)
ON_HOPPER = AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(9, 0), query_len=8, key_len=8)
ON_A_LAPTOP = AttentionRequest(query_len=8, key_len=8)


def tensors(heads: int = 2, head_dim: int = 16) -> list[torch.Tensor]:
    """Queries, keys and values of 7 tokens, in bf16; two key-value heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, 7, head_dim) for count in (heads, 2, 2)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


# --- which door ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "capability", "opened"),
    [
        (["flash_attn_3", "flash_attn_4"], (9, 0), "flash_attn_3"),
        (["flash_attn_3", "flash_attn_4"], (10, 0), "flash_attn_4"),
        (["flash_attn_3", "flash_attn_4"], None, "flash_attn_3"),
        (["flash_attn_4"], (9, 0), "flash_attn_4"),
        (["flash_attn_4"], None, "flash_attn_4"),
        (["flash_attn_4"], (8, 0), "flash_attn_4"),  # check says no; a call all the same is the package's to refuse
    ],
)
def test_flash_attention_3_is_preferred_and_4_comes_in_by_the_same_door(
    installed, capability, opened, fakes, monkeypatch
):
    found = {name: fakes(name) for name in installed}
    monkeypatch.setattr(flash_attention_3, "capability_of", lambda device: capability)
    flash_attention_3.attention(*tensors(), AttentionMask(7, 7), scale=1.0)
    assert [name for name, fake in found.items() if fake.calls] == [opened]


def test_a_head_too_wide_for_flash_attention_4_asks_for_3(fakes):
    four = fakes("flash_attn_4")
    request = replace(ON_HOPPER, head_dim=256)
    assert "flash-attn-3 is not installed" in flash_attention_3.check(request)[0].message
    three = fakes("flash_attn_3")
    assert flash_attention_3.check(request) == []
    flash_attention_3.attention(*tensors(head_dim=256), AttentionMask(7, 7), scale=1.0)
    assert (len(three.calls), len(four.calls)) == (1, 0)


# --- what check says ----------------------------------------------------------------------------------

BOTH, TWO, THREE = ["flash_attention_2", "flash_attention_3"], ["flash_attention_2"], ["flash_attention_3"]


@pytest.mark.parametrize(
    ("names", "installed", "request_", "codes"),
    [
        (BOTH, True, ON_HOPPER, []),
        (BOTH, True, replace(ON_HOPPER, dtype=torch.float16, needs_grad=True), []),
        (BOTH, True, replace(ON_HOPPER, capability=None), []),  # not known: nothing is against it
        (BOTH, True, replace(ON_HOPPER, query_len=1, num_kv_heads=1), []),
        (BOTH, True, replace(ON_HOPPER, mask_kind="causal+padding+documents+window", query_len=3), []),
        (BOTH, True, replace(ON_HOPPER, mask_kind="full+window"), []),
        (BOTH, True, replace(ON_HOPPER, head_dim=256), []),
        (BOTH, False, ON_HOPPER, ["not_installed"]),
        (BOTH, False, ON_A_LAPTOP, ["cuda_only", "dtype", "not_installed"]),
        (BOTH, True, ON_A_LAPTOP, ["cuda_only", "dtype"]),
        (BOTH, True, replace(ON_A_LAPTOP, device="mps", dtype=torch.float16), ["cuda_only"]),
        (BOTH, True, replace(ON_HOPPER, dtype=torch.float32), ["dtype"]),
        (BOTH, True, replace(ON_HOPPER, needs_weights=True), ["weights_wanted"]),
        (BOTH, True, replace(ON_HOPPER, head_dim=264), ["head_dim"]),
        (BOTH, True, replace(ON_HOPPER, query_len=9), []),
        (BOTH, True, replace(ON_HOPPER, query_len=9, mask_kind="full"), []),
        (BOTH, True, replace(ON_HOPPER, query_len=9, mask_kind="full+window"), ["more_queries_than_keys"]),
        (BOTH, True, replace(ON_HOPPER, query_len=9, mask_kind="causal+padding"), ["more_queries_than_keys"]),
        (BOTH, True, replace(ON_HOPPER, capability=(7, 5)), ["capability"]),
        (TWO, True, replace(ON_HOPPER, capability=(8, 0)), []),
        (TWO, True, replace(ON_HOPPER, capability=(12, 0)), []),
        (TWO, True, replace(ON_HOPPER, head_dim=20), []),
        (TWO, True, replace(ON_HOPPER, dropout=0.1, needs_grad=True), []),
        (TWO, True, replace(ON_HOPPER, dropout=1.0), ["dropout"]),
        (TWO, True, replace(ON_HOPPER, dropout=0.1, needs_grad=True, head_dim=256), []),
        (TWO, True, replace(ON_HOPPER, dropout=0.1, needs_grad=True, head_dim=256, capability=(8, 9)), ["dropout"]),
        (TWO, True, replace(ON_HOPPER, dropout=0.1, head_dim=256, capability=(8, 9)), []),
        (THREE, True, replace(ON_HOPPER, dropout=0.1), ["dropout"]),
        (THREE, True, replace(ON_HOPPER, head_dim=20), ["head_dim"]),
        (THREE, True, replace(ON_HOPPER, capability=(8, 0)), ["capability"]),
        (THREE, True, replace(ON_HOPPER, capability=(10, 0)), []),
        (THREE, True, replace(ON_HOPPER, capability=(10, 0), head_dim=256), ["head_dim"]),
        (THREE, True, replace(ON_HOPPER, capability=(12, 0)), ["capability"]),
        (
            THREE, False,
            replace(ON_HOPPER, capability=(8, 6), dtype=torch.float32, dropout=0.1, needs_weights=True),
            ["weights_wanted", "dtype", "capability", "dropout", "not_installed"],
        ),
    ],
)  # fmt: skip
def test_every_reason_that_holds_is_given(names, installed, request_, codes, fakes):
    if installed:
        for name in PACKAGES:
            fakes(name)
    for name in names:
        reasons = IMPLEMENTATIONS[name].check(request_)
        assert sorted(reason.code for reason in reasons) == sorted(codes), name
        assert all(reason.message and reason.remedy for reason in reasons)


def test_who_lacks_the_package_is_told_how_to_install_it_and_that_sdpa_has_the_kernel():
    for name, distribution in ((TWO[0], "flash-attn "), (THREE[0], "flash-attn-3 or flash-attn-4 ")):
        reason = IMPLEMENTATIONS[name].check(ON_HOPPER)[0]
        assert reason.message.startswith(distribution)
        assert packages.PACKAGES[IMPLEMENTATIONS[name].ALIASES[0]].install in reason.remedy
        assert "sdpa" in reason.remedy


def test_a_package_that_does_not_import_is_named_with_its_error(fakes, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    fake_flash_attn.write_distribution(tmp_path, "flash_attn_3", "3.0.0")
    broken = "raise ImportError('libcudart.so.12: cannot open shared object file\\nand more')"
    (tmp_path / "flash_attn_interface.py").write_text(broken, encoding="utf-8")
    reason = flash_attention_3.check(ON_HOPPER)[0]
    assert reason.code == "import_failed"
    assert "flash-attn-3 3.0.0 is installed but does not import" in reason.message
    assert "(ImportError: libcudart.so.12: cannot open shared object file)" in reason.message
    assert torch.__version__ in reason.remedy
    fakes("flash_attn_4")  # the other door is open, on Hopper
    assert flash_attention_3.check(ON_HOPPER) == []


@pytest.mark.parametrize("adapter", [flash_attention_2, flash_attention_3], ids=lambda adapter: adapter.__name__)
def test_without_the_package_a_call_says_what_to_install(adapter):
    with pytest.raises(ImportError, match="not installed: on a CUDA machine pip install"):
        adapter.attention(*tensors(), AttentionMask(7, 7), scale=1.0)


def test_named_and_usable_they_are_chosen_and_auto_prefers_3_on_hopper(fakes):
    for name in PACKAGES:
        fakes(name)
    for name in ("fa2", "fa3"):
        assert choose(AttentionSettings(attn_implementation=name), ON_HOPPER).chosen == f"flash_attention_{name[-1]}"
    assert choose(AttentionSettings(), ON_HOPPER).chosen == "flash_attention_3"
    assert choose(AttentionSettings(), replace(ON_HOPPER, dropout=0.1)).chosen == "flash_attention_2"
    assert choose(AttentionSettings(), replace(ON_HOPPER, capability=(8, 0))).chosen == "flash_attention_2"


# --- the fakes ----------------------------------------------------------------------------------------

# As in flash-attention at commit 0251105 (15 August 2026): flash-attn 2.8.4, flash_attn/flash_attn_interface.py;
# flash-attn-3 3.0.0, hopper/flash_attn_interface.py; flash-attn-4 (4.0.0 beta), flash_attn/cute/interface.py, whose
# annotations are left out.
SIGNATURES = {
    ("flash_attn_2", "flash_attn_func"):
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    ("flash_attn_2", "flash_attn_varlen_func"):
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None",
    ("flash_attn_3", "flash_attn_func"):
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False",
    ("flash_attn_3", "flash_attn_varlen_func"):
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False",
    ("flash_attn_4", "flash_attn_func"):
        "q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None), "
        "learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, "
        "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False",
    ("flash_attn_4", "flash_attn_varlen_func"):
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
        "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False",
}  # fmt: skip


@pytest.mark.parametrize(("name", "function"), SIGNATURES)
def test_the_fakes_have_the_signatures_of_the_packages(name, function):
    fake = getattr(fake_flash_attn.BUILDERS[name](), function)
    assert str(inspect.signature(fake)) == f"({SIGNATURES[name, function]})"


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize(
    "spoil",
    [
        {"q": lambda q: q.float()},
        {"k": lambda k: k.half()},
        {"q": lambda q: q[:, :, :3]},  # 3 heads of queries, 2 of keys
        {"q": lambda q: q[:1]},
        dict.fromkeys("qkv", lambda tensor: tensor.repeat(1, 1, 1, 17)),
    ],
    ids=["fp32", "two dtypes", "heads", "batches", "heads of 272"],
)  # fmt: skip
def test_the_fakes_refuse_what_the_packages_refuse(name, spoil):
    arguments = dict(zip("qkv", (tensor.transpose(1, 2) for tensor in tensors(heads=4)), strict=True))
    fake = fake_flash_attn.BUILDERS[name]()
    fake.flash_attn_func(**arguments)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        fake.flash_attn_func(**arguments | {key: change(arguments[key]) for key, change in spoil.items()})
