"""The memory of a training step by formula is what torch's allocator sees, in the real loop: within 10 %."""

import re
from dataclasses import replace

import pytest
import torch

from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.estimates import count_parameters, widths
from orchestrator.evaluation.memory import peak_tensor_bytes
from orchestrator.evaluation.training_memory import moments, optimizer_bytes, training_peak
from orchestrator.evaluation.training_step import TrainingStep, block_activations, kept_by
from orchestrator.text.samples import Batch
from orchestrator.training.loop import accumulate_gradients, start, update
from orchestrator.training.precision import Precision
from orchestrator.training.settings import TrainSettings

LIMIT = 0.10


def model_cfg(vocab_size, context_length, emb_dim, n_heads, n_layers, **more):
    sizes = {"vocab_size": vocab_size, "context_length": context_length, "emb_dim": emb_dim, "n_heads": n_heads}
    return {**sizes, "n_layers": n_layers, "drop_rate": 0.0, **more}


def ready(step: TrainingStep):
    """The model, the optimizer, and a function that makes one whole step of the training loop, the first one made."""
    torch.manual_seed(0)
    model = GPTModel({**step.cfg, "attn_implementation": step.attention}).train()
    settings = TrainSettings(
        max_steps=10, batch_size=step.batch, learning_rate=1e-4, warmup_steps=0, dtype=step.dtype,
        gradient_accumulation_steps=step.gradient_accumulation_steps, optimizer=step.optimizer,
        activation_checkpointing=step.activation_checkpointing, loss_chunk_tokens=step.loss_chunk_tokens,
    )  # fmt: skip
    state = start(model, settings)
    ids = torch.randint(step.cfg["vocab_size"], (step.gradient_accumulation_steps, step.batch, step.tokens + 1))
    batches = [Batch(one[:, :-1].contiguous(), one[:, 1:].contiguous(), None) for one in ids]
    precision = Precision(step.dtype, "cpu", state.scaler)

    def whole_step() -> None:
        loss = accumulate_gradients(model, batches, settings, precision)
        update(model, state.optimizer, loss, settings, precision)

    whole_step()  # the optimizer has its numbers after it
    return model, state.optimizer, whole_step


def measured(step: TrainingStep) -> tuple[int, int]:
    """(bytes alive at the worst moment of a step, bytes alive between steps), the second counted tensor by tensor."""
    model, optimizer, whole_step = ready(step)
    between = sum(p.nbytes for p in model.parameters())
    between += sum(t.nbytes for memory in optimizer.state.values() for t in memory.values() if torch.is_tensor(t))
    return between + peak_tensor_bytes(whole_step).peak, between


WIDE = model_cfg(300, 128, 96, 6, 4)  # activations are most of it
LONG = model_cfg(300, 256, 64, 4, 3)  # tables (T, T) are
GPT2_WORDS = model_cfg(50257, 128, 64, 4, 2)  # GPT-2's vocabulary: logits, or the gradient of its embedding
DEEP = model_cfg(1000, 64, 192, 4, 4)  # weights and gradients
FEW_WORDS = model_cfg(100, 64, 192, 4, 4)  # the blocks' matrices
DROPOUT = {"drop_rate": 0.1}
TODAYS = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2}
CHECKPOINT, CHUNKS = {"activation_checkpointing": True}, {"loss_chunk_tokens": 32}

CASES = {
    "wide eager": TrainingStep(WIDE, 8, 128, attention="eager"),
    "wide sdpa": TrainingStep(WIDE, 8, 128),
    "wide sdpa bf16": TrainingStep(WIDE, 8, 128, "bf16"),
    "wide eager bf16 dropout": TrainingStep(WIDE | DROPOUT, 4, 128, "bf16", "eager"),
    "wide sdpa bf16 dropout": TrainingStep(WIDE | DROPOUT, 4, 128, "bf16"),
    "wide sdpa checkpoint": TrainingStep(WIDE, 8, 128, **CHECKPOINT),
    "wide sdpa bf16 dropout checkpoint": TrainingStep(WIDE | DROPOUT, 4, 128, "bf16", **CHECKPOINT),
    "wide sdpa two passes": TrainingStep(WIDE, 4, 64, gradient_accumulation_steps=2),
    "wide sdpa grouped heads": TrainingStep(WIDE | {"n_kv_heads": 2}, 8, 128),
    "wide eager grouped heads": TrainingStep(WIDE | {"n_kv_heads": 2}, 8, 128, attention="eager"),
    "wide sdpa narrow feed-forward": TrainingStep(WIDE | {"ff_dim": 100}, 8, 128),
    "wide sdpa rmsnorm": TrainingStep(WIDE | {"norm": "rmsnorm"}, 8, 128),
    "wide sdpa bf16 rmsnorm": TrainingStep(WIDE | {"norm": "rmsnorm"}, 8, 128, "bf16"),
    "wide sdpa exact gelu": TrainingStep(WIDE | {"mlp": "gelu_exact"}, 8, 128),
    "wide sdpa bf16 exact gelu checkpoint": TrainingStep(WIDE | {"mlp": "gelu_exact"}, 8, 128, "bf16", **CHECKPOINT),
    "wide sdpa swiglu": TrainingStep(WIDE | {"mlp": "swiglu"}, 8, 128),
    "wide sdpa bf16 swiglu checkpoint": TrainingStep(WIDE | {"mlp": "swiglu"}, 8, 128, "bf16", **CHECKPOINT),
    "wide sdpa wide swiglu checkpoint": TrainingStep(WIDE | {"mlp": "swiglu", "ff_dim": 384}, 8, 128, **CHECKPOINT),
    "wide sdpa rope": TrainingStep(WIDE | {"positions": "rope"}, 8, 128),
    "wide sdpa bf16 rope": TrainingStep(WIDE | {"positions": "rope"}, 8, 128, "bf16"),
    "wide sdpa all variants": TrainingStep(WIDE | TODAYS, 8, 128),
    "wide sdpa bf16 all variants": TrainingStep(WIDE | TODAYS, 8, 128, "bf16"),
    "wide sdpa bf16 all variants dropout checkpoint": TrainingStep(
        WIDE | TODAYS | DROPOUT, 4, 128, "bf16", **CHECKPOINT
    ),
    "wide sdpa all variants two passes": TrainingStep(WIDE | TODAYS, 4, 64, gradient_accumulation_steps=2),
    "long eager all variants dropout checkpoint": TrainingStep(
        LONG | TODAYS | DROPOUT, 4, 256, attention="eager", **CHECKPOINT
    ),
    "long eager bf16 all variants": TrainingStep(LONG | TODAYS, 4, 256, "bf16", "eager"),
    "long flash_tiled bf16 rope": TrainingStep(LONG | {"positions": "rope"}, 4, 256, "bf16", "flash_tiled"),
    "50257 words chunks all variants": TrainingStep(GPT2_WORDS | TODAYS, 4, 128, **CHUNKS),
    "deep muon all variants": TrainingStep(FEW_WORDS | TODAYS, 1, 32, optimizer="muon"),
    "long eager dropout": TrainingStep(LONG | DROPOUT, 4, 256, attention="eager"),
    "long eager dropout checkpoint": TrainingStep(LONG | DROPOUT, 4, 256, attention="eager", **CHECKPOINT),
    "long eager bf16 checkpoint": TrainingStep(LONG, 4, 256, "bf16", "eager", **CHECKPOINT),
    "long eager dropout checkpoint chunks, many words": TrainingStep(
        LONG | DROPOUT | {"vocab_size": 20_000}, 4, 256, attention="eager", **CHECKPOINT, **CHUNKS
    ),  # the head's gradient waits while a block is computed again
    "long sdpa dropout": TrainingStep(LONG | DROPOUT, 4, 256),
    "long sdpa": TrainingStep(LONG, 4, 256),
    "long flash_tiled": TrainingStep(LONG, 4, 256, attention="flash_tiled"),
    "long flash_tiled bf16 dropout": TrainingStep(LONG | DROPOUT, 4, 256, "bf16", "flash_tiled"),
    "50257 words": TrainingStep(GPT2_WORDS, 4, 128),
    "50257 words bf16": TrainingStep(GPT2_WORDS, 4, 128, "bf16"),
    "50257 words chunks": TrainingStep(GPT2_WORDS, 4, 128, **CHUNKS),
    "50257 words bf16 chunks": TrainingStep(GPT2_WORDS, 4, 128, "bf16", **CHUNKS),
    "50257 words chunks checkpoint dropout": TrainingStep(GPT2_WORDS | DROPOUT, 4, 128, **CHUNKS, **CHECKPOINT),
    "50257 words untied chunks two passes": TrainingStep(
        GPT2_WORDS | {"tie_weights": False}, 2, 128, gradient_accumulation_steps=2, **CHUNKS
    ),
    "50257 words one short text": TrainingStep(GPT2_WORDS, 1, 16),
    "deep one short text": TrainingStep(DEEP, 1, 32),
    "deep one short text bf16": TrainingStep(DEEP, 1, 32, "bf16"),
    "deep muon": TrainingStep(FEW_WORDS, 1, 32, optimizer="muon"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_by_formula_is_what_the_allocator_sees(name):
    step = CASES[name]
    peak, between = measured(step)
    by_formula = training_peak(step).bytes
    assert between == pytest.approx(4 * count_parameters(step.cfg) + optimizer_bytes(step), rel=0.001)
    assert by_formula == pytest.approx(peak, rel=LIMIT)
    # And without weights and optimizer, which are exact, and could hide an error in what is not.
    assert by_formula - between == pytest.approx(peak - between, rel=LIMIT)


def test_these_cases_have_their_worst_moments_at_every_place_there_is():
    worst = {training_peak(step).name for step in CASES.values()}
    assert worst >= {
        "the loss, backward",
        "the head, backward",
        "the last block, attention, backward",
        "the last block, attention, forward again",
        "the first block, feed-forward, backward",
        "the embeddings, backward",
        "the optimizer's step",
    }


def test_what_a_block_keeps_is_what_autograd_saves():
    """Tensor by tensor, through autograd's own hook: each storage once, weights left out."""
    cases = [("eager", "fp32", 0.1, {}), ("sdpa", "bf16", 0.0, {}), ("flash_tiled", "fp32", 0.0, {})]
    for variant in ({"norm": "rmsnorm"}, {"mlp": "swiglu"}, {"positions": "rope"}, TODAYS):
        cases += [("eager", "bf16", 0.1, variant), ("sdpa", "fp32", 0.0, variant), ("sdpa", "bf16", 0.1, variant)]
        cases += [("sdpa", "bf16", 0.0, variant), ("flash_tiled", "bf16", 0.0, variant)]
    for attention, dtype, drop, variant in cases:
        step = TrainingStep(WIDE | {"drop_rate": drop} | variant, 2, 128, dtype, attention)
        model = GPTModel({**step.cfg, "attn_implementation": attention}).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def pack(tensor, kept=kept, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor  # kept alive by the graph: no address is used twice

        x = torch.randn(2, 128, 96, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Precision(dtype, "cpu").autocast():
            out = model.blocks[1](x)
        assert out.shape == x.shape
        by_formula = kept_by(block_activations(step)) + step.angles
        assert by_formula == pytest.approx(sum(kept.values()), rel=0.005), (attention, dtype, variant)


@pytest.mark.parametrize("variant", [{}, {"norm": "rmsnorm"}, TODAYS], ids=["gpt2", "rmsnorm", "all"])
def test_what_a_model_of_one_block_keeps_until_the_head_is_what_autograd_saves(variant):
    step = TrainingStep(WIDE | variant | {"n_layers": 1}, 2, 128)
    model = GPTModel(step.cfg).train()
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.randint(300, (2, 128)))
    assert logits.requires_grad
    head = next(moment for moment in moments(step) if moment.name == "the head, backward")
    assert head.parts["activations"] == pytest.approx(sum(kept.values()), rel=0.005)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("variant", [{}, TODAYS], ids=["gpt2", "variants"])
def test_each_printed_formula_gives_its_bytes(dtype, attention, drop_rate, device, variant):
    step = TrainingStep(WIDE | variant | {"drop_rate": drop_rate, "n_kv_heads": 3}, 3, 40, dtype, attention, device)
    C, F, K = widths(step.cfg)
    letters = {"B": 3, "T": 40, "C": C, "F": F, "K": K, "H": 6, "s": step.size}
    for term in block_activations(step).values():
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", term.formula)
        assert eval(product, {}, letters) == term.bytes, term.formula


def test_checkpointing_and_chunks_save_what_they_are_for():
    step = TrainingStep(GPT2_WORDS | {"n_layers": 6}, 8, 128)
    by_checkpoint, by_chunks = replace(step, **CHECKPOINT), replace(step, **CHUNKS)
    plain, block = training_peak(step).parts, kept_by(block_activations(step))
    assert training_peak(by_checkpoint).parts["activations"] == plain["activations"] - 6 * (block - 4 * 8 * 128 * 64)
    logits = {moment.name: moment.parts["logits"] for moment in moments(by_chunks)}
    assert logits["the loss, backward"] == plain["logits"] * 32 // (8 * 128)
    assert training_peak(replace(by_chunks, **CHECKPOINT)).bytes < min(
        training_peak(by_checkpoint).bytes, training_peak(by_chunks).bytes
    )


def test_rmsnorm_keeps_more_than_layernorm_on_a_cpu_and_less_on_cuda():
    """On CUDA torch has one kernel for it; on a CPU it is a few operations, and each keeps what it read."""
    layer, rms = TrainingStep(WIDE, 8, 128), TrainingStep(WIDE | {"norm": "rmsnorm"}, 8, 128)
    more = kept_by(block_activations(rms)) - kept_by(block_activations(layer))
    assert more == 2 * 4 * 8 * 128 * 96 - 8 * 8 * 128
    layer, rms = replace(layer, device="cuda"), replace(rms, device="cuda")
    assert kept_by(block_activations(rms)) - kept_by(block_activations(layer)) == -8 * 8 * 128


def test_on_cuda_dropout_keeps_bools_and_sdpa_no_table():
    with_dropout = TrainingStep(LONG | DROPOUT, 4, 256, device="cuda")
    without = TrainingStep(LONG, 4, 256, device="cuda")
    more = kept_by(block_activations(with_dropout)) - kept_by(block_activations(without))
    assert more == 2 * 4 * 256 * 64
    assert "attention: tables" not in block_activations(with_dropout)
    assert "attention: tables" in block_activations(replace(with_dropout, device="cpu"))


def test_a_step_that_makes_no_sense_is_refused_with_every_reason():
    with pytest.raises(ValueError, match="cannot be estimated") as refused:
        TrainingStep(WIDE, 0, 129, "int8", device="tpu", optimizer="sgd", loss_chunk_tokens=-1)
    for reason in (
        "batch must be 1 or more, got 0",
        "loss_chunk_tokens must be 0 or more, got -1",
        "129 tokens are more than context_length=128",
        "dtype must be one of fp32, bf16, fp16, got 'int8'",
        "device must be one of cpu, cuda, got 'tpu'",
        "optimizer must be one of adamw, muon, none, got 'sgd'",
    ):
        assert reason in str(refused.value)
