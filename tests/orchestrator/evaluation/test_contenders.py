"""torch's op held to one kernel: that kernel runs and no other, it is right, and its check says what it cannot do."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import AttentionRequest
from orchestrator.evaluation.cases import Case, mask_of, tensors
from orchestrator.evaluation.contenders import ONE_KERNEL, contender, contenders
from orchestrator.evaluation.parity import measure, serves

CPU = {"flash": "aten::_scaled_dot_product_flash_attention_for_cpu", "math": "aten::_scaled_dot_product_attention_math"}


@pytest.mark.parametrize("kernel", CPU)
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_that_is_named_runs_and_no_other(kernel, causal):
    case = Case(query_len=32, key_len=32, causal=causal)
    inputs, _, _ = tensors(case)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ONE_KERNEL[f"sdpa:{kernel}"].attention(*inputs, mask_of(case, None), scale=case.scale)
    ran = {event.key for event in seen.key_averages()}
    assert [name for name, op in CPU.items() if op in ran] == [kernel]


@pytest.mark.parametrize("kernel", CPU)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_within_the_bound_forward_and_backward(kernel, causal, dtype):
    case = Case(dtype, head_dim=32, query_len=50, key_len=50, causal=causal, num_heads=4, num_kv_heads=2, strided=True)
    found = measure(ONE_KERNEL[f"sdpa:{kernel}"], case)
    assert set(found.error) == {"context", "dQ", "dK", "dV"}
    assert found.passed, found.ratio


def codes(kernel: str, **request) -> list[str]:
    return [reason.code for reason in ONE_KERNEL[f"sdpa:{kernel}"].check(AttentionRequest(**request))]


def test_what_a_kernel_cannot_do_is_said_by_its_check():
    gpu = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0)}
    for kernel in ("flash", "cudnn", "efficient", "math"):
        assert codes(kernel, **gpu) == []
        assert codes(kernel, **gpu, needs_grad=True, head_dim=128) == []
        assert "mask" in codes(kernel, **gpu, mask_kind="causal+padding")
        assert "mask" in codes(kernel, **gpu, query_len=1)  # torch's causal flag aligns to the upper left
        assert "device" in codes(kernel, device="mps")
    for kernel in ("flash", "cudnn"):
        assert codes(kernel, **gpu | {"dtype": torch.float32}) == ["dtype"]
        assert codes(kernel, **gpu | {"capability": (7, 5)}) == ["capability"]
    assert codes("efficient", **gpu | {"dtype": torch.float32}) == []
    assert codes("efficient", **gpu, num_kv_heads=4) == ["grouped_heads"]
    assert codes("flash", **gpu, num_kv_heads=4) == []
    assert (codes("flash"), codes("math")) == ([], [])
    assert (codes("cudnn"), codes("efficient")) == (["cuda_only"], ["cuda_only"])
    assert serves(ONE_KERNEL["sdpa:cudnn"], Case()) is None


def test_contenders_are_the_registrys_names_their_aliases_and_the_kernels():
    found = contenders(["manual", "sdpa:flash", " triton"])
    assert list(found) == ["eager", "sdpa:flash", "flash_triton"]
    assert found["eager"] is IMPLEMENTATIONS["eager"]
    for word, said in (("sdpa:fast", "no kernel 'sdpa:fast'"), ("paged_attention", "nothing to measure"), ("x", "'x'")):
        with pytest.raises(ValueError, match=said):
            contender(word)
