"""Int8 weights: off by no more than their rounding, whatever the dtype, and a model like any other but for training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from GPT2Model import int8_matmul as products
from GPT2Model.generation import generate
from GPT2Model.int8_matmul import by_digits, by_floats, by_packed, int8_matmul, int8_products_are_exact, to_digits
from GPT2Model.quantization import Int8Linear, quantize_int8, quantize_rows, weight_bytes
from GPT2Model.tracing import trace

VARIANTS = [
    {},
    {"tie_weights": False, "qkv_bias": False},
    {"n_kv_heads": 1},
    {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rope"},
]
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def rows_of_many_sizes(d_out: int, d_in: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """A matrix whose rows differ in size by factors of thousands, a row of zeros, one with a large number."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-3, 1, d_out, dtype=torch.float64)[:, None]
    weight[0] = 0
    weight[1, 0] = 50
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_moves_by_half_a_step_of_its_row_at_most(dtype):
    weight = rows_of_many_sizes(17, 33, dtype)
    quantized, scale = quantize_rows(weight)
    exact = weight.double()
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double() * 127, exact.abs().amax(1).clamp(min=127 * 2.0**-126), rtol=1e-6, atol=0)
    moved = (quantized.double() * scale.double()[:, None] - exact).abs()
    assert (moved <= scale.double()[:, None] / 2 * (1 + 1e-5)).all()
    assert moved[-1].max() > scale[-1] / 3  # the bound is not far from what happens
    assert quantized[0].abs().max() == 0
    assert (quantized[1:].abs().amax(1) == 127).all()


def test_scales_are_of_rows_so_small_rows_keep_their_levels():
    weight = rows_of_many_sizes(17, 64)
    quantized, _ = quantize_rows(weight)
    assert all(len(set(row.tolist())) > 30 for row in quantized[2:])


def test_weights_on_the_grid_come_back_exactly_and_the_order_of_signs_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-127, 128, (9, 40), generator=generator)
    grid[:, 3] = 127
    weight = grid * 2.0 ** torch.arange(-12.0, -3.0)[:, None]
    layer = Int8Linear(weight)
    assert torch.equal(layer.quantized, grid.to(torch.int8))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(quantize_rows(-weight)[0], -layer.quantized)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize(("d_in", "d_out"), [(30, 61), (33, 17), (64, 96), (2, 3), (1, 5)])
def test_the_output_is_within_the_bound_of_the_rounded_weights(dtype, rows, d_in, d_out):
    """|y - x W^T| <= sum |x_i| * scale / 2 for the weights, and a few roundings of what is summed for the dtype."""
    weight = rows_of_many_sizes(d_out, d_in, dtype)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    bias = torch.randn(d_out, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    layer = Int8Linear(weight, bias).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = F.linear(x.double(), weight.double(), bias.double())
    stored = layer.quantized.double() * layer.scale.double()[:, None]
    sizes = x.double().abs() @ stored.abs().T + bias.double().abs()
    rounding = (4 + math.sqrt(d_in)) * EPS[dtype] * sizes
    half_steps = x.double().abs().sum(1, keepdim=True) * layer.scale.double() / 2
    assert ((y.double() - exact).abs() <= half_steps * (1 + 1e-5) + rounding).all()
    # and what the rounded weights give is met far more closely: nothing else is rounded to 8 bits
    expected = x.double() @ stored.T + bias.double()
    assert ((y.double() - expected).abs() <= rounding + 2.0**-20 * largest(x) * stored.abs().sum(1)).all()


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.double().abs().amax(1, keepdim=True)


@pytest.mark.parametrize("way", [by_digits, by_floats, by_packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_all_ways_compute_the_same_product(way, dtype, rows):
    quantized, scale = quantize_rows(rows_of_many_sizes(50, 192))
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = x.double() @ (quantized.double() * scale.double()[:, None]).T
    stored = (quantized.double() * scale.double()[:, None]).abs()
    bound = 3 * EPS[dtype] * (x.double().abs() @ stored.T)
    if way is by_digits:  # fixed point: off by a part of the row's largest number, whatever a number's own size
        last_place = largest(x) / 254 / 128.0 ** (products.DIGITS[dtype] - 1)
        bound += 1.1 * last_place * stored.sum(1)
    assert ((way(x, quantized, scale).double() - expected).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize(("dtype", "count", "bits"), [(torch.float32, 3, 21), (torch.bfloat16, 2, 14)])
def test_digits_hold_a_row_to_half_of_their_last_place(dtype, count, bits):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 100, generator=generator) * torch.logspace(-6, 6, 20)[:, None]
    x[3, 5] = 1e6  # one activation far larger than the others, as trained models have
    x = x.to(dtype)
    digits, size = to_digits(x, count)
    assert digits.dtype == torch.int8
    assert digits.abs().max() <= 127
    places = torch.tensor([128.0**-i for i in range(count)], dtype=torch.float64)
    value = (digits.double() * places[:, None, None]).sum(0) * size.double() / 127
    off = (value - x.double()).abs()
    assert (off <= size.double() / 127 * (places[-1] / 2 + 2.0**-16)).all()
    assert (off <= size.double() * 2.0**-bits).all()


def test_the_plain_formula_serves_where_whole_numbers_do_not(monkeypatch):
    used = []
    monkeypatch.setattr(products, "by_digits", lambda *given: used.append("digits") or by_digits(*given))
    monkeypatch.setattr(products, "by_floats", lambda *given: used.append("floats") or by_floats(*given))
    monkeypatch.setattr(products, "by_packed", lambda *given: used.append("packed") or by_packed(*given))
    quantized, scale = quantize_rows(rows_of_many_sizes(6, 64))
    for rows, d_in in ((4, 64), (5, 64), (4, 63)):  # a width of 63 would be read past its end
        int8_matmul(torch.ones(rows, d_in, dtype=torch.bfloat16), quantized[:, :d_in].contiguous(), scale)
    assert used == ["packed", "digits", "digits"]
    used.clear()
    quantized, scale = quantize_rows(rows_of_many_sizes(6, 8))
    int8_matmul(torch.ones(2, 8), quantized, scale)
    int8_matmul(torch.ones(2, 8, dtype=torch.float64), quantized, scale)
    int8_matmul(torch.ones(2, 1), quantized[:, :1], scale)  # torch's own product was wrong here
    int8_matmul(torch.ones(0, 8), quantized, scale)
    assert used == ["digits", "floats", "floats", "floats"]
    int8_products_are_exact.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    try:
        int8_matmul(torch.ones(2, 8), quantized, scale)
    finally:
        int8_products_are_exact.cache_clear()
    assert used[4:] == ["floats"]


def test_a_sum_that_would_leave_int32_is_not_computed_in_whole_numbers():
    """The longest row whose sum of 127 * 127 fits, and longer ones: 2^31 / 127^2 is 133,144."""
    for d_in in (2**17, 133_145, 140_000):
        quantized = torch.full((2, d_in), 127, dtype=torch.int8)
        quantized[1] = -127
        y = int8_matmul(torch.ones(1, d_in), quantized, torch.tensor([0.5, 2.0]))
        assert y[0].tolist() == pytest.approx([0.5 * 127 * d_in, -2.0 * 127 * d_in], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_large_activation_leaves_the_others_the_digits_of_float16(dtype):
    """It is multiplied with zeros, so the outputs are of the others alone: 11 bits each, 2^14 times smaller than it."""
    weight = torch.randn(50, 192, generator=torch.Generator().manual_seed(5))
    weight[:, 7] = 0
    quantized, scale = quantize_rows(weight)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(6))
    x[:, 7] = 2.0**14
    x = x.to(dtype)
    stored = quantized.double() * scale.double()[:, None]
    bound = 3 * EPS[torch.float16] * (x.double().abs() @ stored.abs().T)
    assert ((int8_matmul(x, quantized, scale).double() - x.double() @ stored.T).abs() <= bound).all()


def test_a_processor_whose_sums_leave_16_bits_is_found_out(monkeypatch):
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b).clamp(max=2**15))
    int8_products_are_exact.cache_clear()
    try:
        assert not int8_products_are_exact()
    finally:
        int8_products_are_exact.cache_clear()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_holds_nan_or_infinity_does_not_come_out_as_numbers(bad):
    layer = Int8Linear(rows_of_many_sizes(6, 8))
    x = torch.ones(3, 8)
    x[1, 2] = bad
    y = layer(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_a_row_of_zeros_gives_zeros():
    layer = Int8Linear(rows_of_many_sizes(6, 8))
    assert (layer(torch.zeros(2, 8)) == 0).all()
    assert (layer(torch.ones(2, 8))[:, 0] == 0).all()
    tiny = Int8Linear(torch.full((2, 8), 1e-44))
    assert (tiny(torch.ones(1, 8)).abs() < 1e-36).all()


def dequantized(model):
    """The same model with its rounded weights as floats again: what the int8 one must compute."""
    floats = copy.deepcopy(model)
    for module in list(floats.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Int8Linear):
                linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                linear.weight.data = layer.quantized.double() * layer.scale.double()[:, None]
                if layer.bias is not None:
                    linear.bias.data = layer.bias.double()
                setattr(module, name, linear)
    return floats.double()


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())) or "gpt2")
def test_every_variant_computes_what_its_rounded_weights_say(build, random_ids, changes):
    model = build(torch.float32, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, ids = quantize_int8(model), random_ids(3, 20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    linears = [module for module in small.modules() if isinstance(module, torch.nn.Linear)]
    assert linears == []
    assert sum(isinstance(module, Int8Linear) for module in small.modules()) == 1 + 2 * (
        5 if changes.get("mlp") == "swiglu" else 4
    )
    with torch.no_grad():
        expected = dequantized(small)(ids)
        torch.testing.assert_close(small(ids).double(), expected, rtol=0, atol=3e-5)
        rounded = (small(ids) - model(ids)).abs().max()
    assert 1e-3 < rounded < 1.0  # it is another model, and not much of another


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())) or "gpt2")
def test_it_writes_with_and_without_a_cache_and_under_every_attention(build, random_ids, changes):
    small = quantize_int8(build(torch.float32, seed=1, **{**changes, "tie_weights": False, "init_std": 0.6}))
    ids = random_ids(2, 6)
    plain = ids
    with torch.no_grad():
        for _ in range(12):
            plain = torch.cat([plain, small(plain)[:, -1].argmax(-1, keepdim=True)], 1)
    assert len(set(plain[0, 6:].tolist())) > 4
    assert torch.equal(generate(small, ids, 12), plain)
    assert torch.equal(generate(small, ids, 12, use_cache=False), plain)
    small.set_attention("eager")
    assert torch.equal(generate(small, ids, 12), plain)


def test_it_is_traced_like_any_model(build, random_ids):
    small, ids = quantize_int8(build(torch.float32)), random_ids(1, 7)
    found = trace(small, ids)
    with torch.no_grad():
        assert torch.equal(found["logits"], small(ids))
    assert found["blocks.1.attention.queries"].shape == (1, 5, 7, 6)


def test_scales_stay_float32_when_the_model_changes_its_dtype(build, random_ids):
    model = build(torch.float32)
    small = quantize_int8(model).to(torch.bfloat16)
    layer = small.blocks[0].attention.W_qkv
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, quantize_int8(model).blocks[0].attention.W_qkv.scale)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits = small(random_ids(2, 9))
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - model(random_ids(2, 9))).abs().max() < 1.0
    assert generate(small, random_ids(1, 4), 8).shape == (1, 12)


def test_the_head_is_its_own_and_the_embedding_stays_as_it_was(build):
    model = build(torch.float32)
    small = quantize_int8(model)
    assert torch.equal(small.token_embedding.weight, model.token_embedding.weight)
    assert small.token_embedding.weight.data_ptr() != model.token_embedding.weight.data_ptr()
    assert model.cfg["tie_weights"]
    assert not small.cfg["tie_weights"]
    assert model.head.weight is model.token_embedding.weight
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_memory_is_counted_by_the_tensors_that_are_there(build):
    model = build(torch.float32)
    small = quantize_int8(model)
    assert weight_bytes(model) == 4 * model.num_parameters()
    matrices = sum(layer.quantized.numel() for layer in small.modules() if isinstance(layer, Int8Linear))
    rows = sum(layer.out_features for layer in small.modules() if isinstance(layer, Int8Linear))
    rest = model.num_parameters() - matrices + model.head.weight.numel()  # biases, norms, embeddings
    assert weight_bytes(small) == matrices + 4 * rows + 4 * rest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_each_layer_named(build, value):
    model = build(torch.float32)
    with torch.no_grad():
        model.blocks[1].feed_forward.up_proj.weight[2, 3] = value
        model.blocks[0].attention.out_proj.weight[0, :2] = value
    with pytest.raises(ValueError, match="NaN or infinite") as refused:
        quantize_int8(model)
    assert "blocks.0.attention.out_proj: 2 of 900 weights" in str(refused.value)
    assert "blocks.1.feed_forward.up_proj: 1 of 3,600 weights" in str(refused.value)


def test_weights_beyond_float32_are_refused(build):
    model = build(torch.float64)
    with torch.no_grad():
        model.blocks[0].attention.out_proj.weight[0, 0] = 1e300
    with pytest.raises(ValueError, match=r"out_proj: weights up to 1.0e\+300"):
        quantize_int8(model)


def test_training_it_is_refused_in_words(build, random_ids):
    small = quantize_int8(build(torch.float32))
    with pytest.raises(ValueError, match="cannot be trained"):
        small.train()
    small.token_embedding.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="cannot be trained"):
        small(random_ids(1, 4))
    with torch.no_grad():
        small(random_ids(1, 4))


def test_a_refused_train_changes_the_mode_of_nothing(build, random_ids):
    """drop_rate is 0.5: were any part left in training, the logits would be drawn anew each time."""
    small, ids = quantize_int8(build(torch.float32, drop_rate=0.5).train()), random_ids(2, 9)
    again = copy.deepcopy(small)
    for one in (small, again):
        assert not any(module.training for module in one.modules())
        with torch.no_grad():
            before = one(ids)
            with pytest.raises(ValueError, match="cannot be trained"):
                one.train()
            assert not any(module.training for module in one.modules())
            assert torch.equal(one(ids), before)
        assert one.eval() is one.train(False) is one


def test_saving_and_loading_and_quantising_again_are_refused_in_words(build, tmp_path):
    model = build(torch.float32)
    small = quantize_int8(model)
    with pytest.raises(ValueError, match="save the model that it was made from"):
        small.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="takes no state dict"):
        small.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="int8 weights already"):
        quantize_int8(small)
    again = copy.deepcopy(small)
    assert torch.equal(again.head.quantized, small.head.quantized)
