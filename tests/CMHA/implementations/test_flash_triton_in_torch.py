"""Our GPU kernels inside torch: torch.compile, autocast, checkpointing; no table, no second derivative."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import flash_triton
from CMHA.masks import AttentionMask
from orchestrator.evaluation.memory import peak_tensor_bytes
from tests.triton_interpreter import DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BLOCKS = {"query_block_size": 16, "kv_block_size": 32}


def inputs(device, heads=(2, 1), query_len=19, key_len=35, head_dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((heads[0], query_len), (heads[1], key_len), (heads[1], key_len))
    return [
        torch.randn(2, count, length, head_dim, device=device, dtype=dtype, requires_grad=True)
        for count, length in shapes
    ]


def outcome(mask, tensors, dropout=0.0):
    torch.manual_seed(1)
    context, _ = flash_triton.attention(*tensors, mask, scale=0.25, dropout=dropout, **BLOCKS)
    return context, *torch.autograd.grad(context.square().sum(), tensors)


COMPILED = """
import os, sys
if {device!r} == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, {root!r})
    import tests.triton_interpreter as fast
    import importlib
    fast.make_it_faster(importlib.import_module("triton.runtime.interpreter"))
import torch
from CMHA.cmha import MultiHeadAttention
from GPT2Model.gpt2 import GPTModel
device = {device!r}

def compare(make, call, fullgraph=True):
    # the same numbers compiled and not, outputs and gradients
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make().to(device)
        function = torch.compile(model, backend="aot_eager", fullgraph=fullgraph) if compiled else model
        torch.manual_seed(1)
        out = call(function)
        out.square().mean().backward()
        outcomes.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    print("equal", len(outcomes[0]))

options = dict(attn_implementation="flash_triton", attn_strict=True)
x = torch.randn(2, 19, 32, device=device)
padding = torch.ones(2, 19, dtype=torch.bool, device=device)
padding[1, :5] = False
compare(lambda: MultiHeadAttention(32, 32, 24, 0.0, 2, num_kv_heads=1, **options), lambda layer: layer(x))
compare(lambda: MultiHeadAttention(32, 32, 24, 0.3, 2, **options).train(), lambda layer: layer(x))
compare(lambda: MultiHeadAttention(32, 32, 24, 0.0, 2, **options), lambda layer: layer(x, padding_mask=padding))

cfg = dict(vocab_size=31, context_length=24, emb_dim=32, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=True, **options)
ids = torch.arange(38, device=device).view(2, 19) % 31
compare(lambda: GPTModel(cfg), lambda model: model(ids), fullgraph=False)  # its check of ids looks at them, on a CPU
"""


def test_torch_compile_gives_the_same_bits_and_a_layer_is_one_graph():
    """In a process of its own: the tests' check of shapes is nothing for torch.compile."""
    code = COMPILED.format(device=DEVICE, root=str(ROOT))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 4


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_check_of_custom_operators_finds_nothing(masked, kernels):
    queries, keys, values = inputs(kernels)
    texts = (None, None, None)
    if masked:
        padding = torch.ones(2, 35, dtype=torch.bool, device=kernels)
        padding[1, :5] = False
        mask = AttentionMask(19, 35, padding_mask=padding)
        texts = (*flash_triton.texts_of(mask, batch=2), torch.tensor([7], device=kernels))
    call = (True, 0, 0.25, 0.3 if masked else 0.0, 16, 32)
    operators = torch.ops.gpt2_from_scratch
    torch.library.opcheck(operators.flash_attention.default, (queries, keys, values, *texts, *call))
    plain = [tensor.detach() for tensor in (queries, keys, values)]
    context, log_sum_exp = flash_triton.forward(*plain, *texts, *call)
    arguments = (*plain, *texts, context, log_sum_exp, torch.ones_like(context), *call)
    torch.library.opcheck(operators.flash_attention_backward.default, arguments)


def test_under_autocast_the_kernels_work_in_bf16_and_give_what_bf16_gives(kernels):
    tensors, mask = inputs(kernels), AttentionMask(19, 35, device=kernels)
    with torch.autocast(kernels, dtype=torch.bfloat16):
        context, _ = flash_triton.attention(*tensors, mask, scale=0.25, **BLOCKS)
    assert context.dtype == torch.bfloat16
    expected, _ = flash_triton.attention(*(tensor.bfloat16() for tensor in tensors), mask, scale=0.25, **BLOCKS)
    assert torch.equal(context, expected)
    context.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(dropout, kernels):
    tensors, mask = inputs(kernels), AttentionMask(19, 35, device=kernels)
    expected = outcome(mask, tensors, dropout)
    torch.manual_seed(1)
    context = checkpoint(
        lambda *qkv: flash_triton.attention(*qkv, mask, scale=0.25, dropout=dropout, **BLOCKS)[0],
        *tensors,
        use_reentrant=False,
    )
    found = context, *torch.autograd.grad(context.square().sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_without_gradients_nothing_is_kept_and_the_context_is_the_same(kernels):
    tensors, mask = inputs(kernels), AttentionMask(19, 35, device=kernels)
    expected = outcome(mask, tensors)[0]
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            context, _ = flash_triton.attention(*tensors, mask, scale=0.25, **BLOCKS)
        assert not context.requires_grad
        assert torch.equal(context, expected)


def test_only_what_needs_a_gradient_gets_one(kernels):
    queries, keys, values = inputs(kernels)
    mask = AttentionMask(19, 35, device=kernels)
    expected = outcome(mask, [queries, keys, values])[3]
    context, _ = flash_triton.attention(queries.detach(), keys.detach(), values, mask, scale=0.25, **BLOCKS)
    context.square().sum().backward()
    assert torch.equal(values.grad, expected)
    assert queries.grad is None
    assert keys.grad is None


def test_a_second_derivative_is_refused_and_not_wrong(kernels):
    tensors = inputs(kernels)
    context, _ = flash_triton.attention(*tensors, AttentionMask(19, 35, device=kernels), scale=0.25, **BLOCKS)
    (gradient,) = torch.autograd.grad(context.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_beside_inputs_and_context_one_number_for_each_row_is_saved_its_log_sum_exp(kernels):
    tensors, mask = inputs(kernels), AttentionMask(19, 35, device=kernels)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        context, _ = flash_triton.attention(*tensors, mask, scale=0.25, **BLOCKS)
    known = {tensor.data_ptr() for tensor in (*tensors, context)}
    (log_sum_exp,) = (tensor for place, tensor in kept.items() if place not in known)
    queries, keys, _ = (tensor.detach().double() for tensor in tensors)
    scores = (queries @ keys.mT * 0.25).masked_fill(~mask.dense(), -torch.inf)
    torch.testing.assert_close(log_sum_exp.double(), scores.logsumexp(-1) / torch.log(torch.tensor(2.0)).item(),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_a_row_that_sees_nothing_has_a_log_sum_exp_of_plus_infinity(kernels):
    queries, keys, values = inputs(kernels, query_len=35, key_len=19)
    _, log_sum_exp = flash_triton.forward(queries, keys, values, None, None, None, True, 0, 0.25, 0.0, 16, 32)
    assert (log_sum_exp[:, :, :16] == torch.inf).all()
    assert log_sum_exp[:, :, 16:].isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory of a CPU is counted here")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_table_of_all_weights_is_ever_allocated(dropout, kernels):
    tokens = 1024
    layer = MultiHeadAttention(16, 16, tokens, dropout, 1, attn_implementation="flash_triton", attn_strict=True,
                               flash_query_block_size=128, flash_kv_block_size=128)  # fmt: skip
    x = torch.randn(1, tokens, 16)
    assert peak_tensor_bytes(lambda: layer(x).sum().backward()).largest < tokens * tokens  # bytes: not even of bools
