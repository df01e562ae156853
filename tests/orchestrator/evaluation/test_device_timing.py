"""FLOPs of a call by formula, against figures worked out by hand and torch's own counter. No timing is asserted."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from CMHA.implementations import eager
from orchestrator.evaluation.cases import Case, mask_of, tensors
from orchestrator.evaluation.device_timing import attention_flops, device_timed
from tests.triton_interpreter import DEVICE


def test_the_flops_of_the_two_shapes_are_those_worked_out_by_hand():
    # 4096 x 4096 = 16,777,216 pairs; x 8 x 12 tables x 64 columns x 4 = 412,316,860,416; a causal mask leaves half.
    one = Case(head_dim=64, query_len=4096, key_len=4096, num_heads=12, num_kv_heads=12, batch_size=8)
    assert attention_flops(one, "forward") == 206_158_430_208
    assert attention_flops(one, "forward_backward") == 721_554_505_728
    # 8192 x 8192 = 67,108,864 pairs; x 4 x 16 tables x 128 columns x 4 = 2,199,023,255,552.
    two = Case(head_dim=128, query_len=8192, key_len=8192, num_heads=16, num_kv_heads=16, batch_size=4)
    assert attention_flops(two, "forward") == 1_099_511_627_776


def test_without_a_mask_they_are_what_torch_counts_and_backward_recomputes_one_product():
    case = Case(head_dim=16, query_len=24, key_len=40, causal=False, num_heads=3, num_kv_heads=3, batch_size=2)
    inputs, grad_context, _ = tensors(case)
    with FlopCounterMode(display=False) as forward:
        context, _ = eager.attention(*inputs, mask_of(case, None), scale=case.scale)
    with FlopCounterMode(display=False) as backward:
        context.backward(grad_context)
    assert attention_flops(case, "forward") == forward.get_total_flops()
    again = forward.get_total_flops() / 2  # Q K^T, which eager keeps and a flash kernel computes again
    both = forward.get_total_flops() + backward.get_total_flops() + again
    assert attention_flops(case, "forward_backward") == both


def test_the_time_of_a_call_is_that_of_running_it_once():
    calls = []
    seconds = device_timed(lambda: calls.append(torch.ones(8, device=DEVICE).sum()), DEVICE)
    assert (len(calls), seconds > 0) == (1, True)
