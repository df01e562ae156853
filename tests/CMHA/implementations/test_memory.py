"""What flash attention is for: no table of T x T is ever made. Measured at the allocator, inside kernels too."""

import pytest
import torch

from CMHA.choosing import AttentionSettings, attention_report
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest
from orchestrator.evaluation.memory import PeakMemory, peak_tensor_bytes

T, D = 2048, 64  # T * T bytes, a table of bools, is then more than any tensor of the layer


def forward_and_backward(name: str, tokens: int):
    queries, keys, values = (torch.randn(1, 1, tokens, D, requires_grad=True) for _ in range(3))

    def run():
        mask = AttentionMask(tokens, tokens)
        context, _ = IMPLEMENTATIONS[name].attention(queries, keys, values, mask, scale=D**-0.5, dropout=0.0)
        context.backward(torch.ones_like(context))

    return run


# --- the instrument ------------------------------------------------------------------------------------


def test_a_sum_of_two_tensors_costs_one_more_tensor():
    x, y = torch.ones(1000, 250), torch.ones(1000, 250)
    assert peak_tensor_bytes(lambda: x + y) == PeakMemory(peak=1_000_000, largest=1_000_000)


def test_in_a_chain_each_intermediate_dies_when_the_next_is_made():
    x = torch.ones(1000, 250)
    assert peak_tensor_bytes(lambda: x.exp().sin().cos().tan()) == PeakMemory(peak=2_000_000, largest=1_000_000)


def test_intermediates_that_are_kept_are_all_counted():
    x = torch.ones(1000, 250)
    assert peak_tensor_bytes(lambda: [x + x for _ in range(5)]) == PeakMemory(peak=5_000_000, largest=1_000_000)


def test_what_lived_before_is_not_counted_and_what_is_freed_inside_is_not_missed():
    before = torch.ones(1000, 1000)
    assert peak_tensor_bytes(lambda: before.view(-1)).peak == 0
    assert peak_tensor_bytes(lambda: [before + before for _ in range(3)] and None).peak == 12_000_000


# --- the implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash_tiled"])
def test_with_use_flash_and_a_causal_mask_no_table_is_allocated(name, training):
    torch.manual_seed(0)
    layer = MultiHeadAttention(D, D, T, 0.0, 1, attn_implementation=name).train(training)
    x = torch.randn(1, T, D)
    with torch.set_grad_enabled(training):
        memory = peak_tensor_bytes(lambda: layer(x).sum().backward() if training else layer(x))
    assert memory.largest < T * T  # bytes: not even a table of bools


def test_the_detector_finds_the_table_where_there_is_one():
    layer = MultiHeadAttention(D, D, T, 0.0, 1, use_flash=False)
    assert peak_tensor_bytes(lambda: layer(torch.randn(1, T, D))).largest == T * T * 4


def test_dropout_on_a_cpu_makes_torchs_op_take_its_math_kernel_which_does_make_the_table():
    """Not ours to change: flash_tiled drops weights without one."""
    peaks = {}
    for name in ("sdpa", "flash_tiled"):
        layer = MultiHeadAttention(D, D, T, 0.1, 1, attn_implementation=name).train()
        x = torch.randn(1, T, D)
        peaks[name] = peak_tensor_bytes(lambda layer=layer, x=x: layer(x))
    assert peaks["sdpa"].largest >= T * T * 4
    assert peaks["flash_tiled"].largest < T * T
    request = AttentionRequest(query_len=T, key_len=T, num_heads=1, num_kv_heads=1, dropout=0.1, needs_grad=True)
    assert attention_report(AttentionSettings(), request)["torch_sdpa_kernel"] == "math"


def test_at_8192_tokens_flash_tiled_keeps_less_than_a_tenth_of_what_eager_keeps():
    peaks = {name: peak_tensor_bytes(forward_and_backward(name, 8192)).peak for name in ("eager", "flash_tiled")}
    assert peaks["eager"] > 8192 * 8192 * 4
    assert peaks["flash_tiled"] < peaks["eager"] / 10


def test_the_memory_of_flash_tiled_grows_with_t_and_that_of_eager_with_its_square():
    growth = {}
    for name in ("eager", "flash_tiled"):
        short, long = (peak_tensor_bytes(forward_and_backward(name, tokens)).peak for tokens in (1024, 4096))
        growth[name] = long / short
    assert growth["flash_tiled"] < 4.4
    assert growth["eager"] > 14
