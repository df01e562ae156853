"""A wrong solution for every hint: the right one, with one edit that a learner might have made.

WRONG[exercise, mistake] holds edits (old, new) of `exercises/solutions/adapters.py`. An edit is made inside the
function of the exercise, or, where it begins with `in NAME:`, inside the function NAME. Every hint that any function
may have (GENERAL) has one too.
"""

import ast
from pathlib import Path

SOLUTIONS = Path(__file__).resolve().parents[2] / "exercises" / "solutions" / "adapters.py"


def named(exercise: str, **edits) -> dict:
    return {(exercise, mistake): [edit] if isinstance(edit, tuple) else edit for mistake, edit in edits.items()}


SCALE = "/ math.sqrt(queries.shape[-1])"
MASKED = "scores.masked_fill(~mask, -torch.inf)"
TABLE = "table = 2 * tokens * C"
LOGITS = 'norm(x, weights, "final_norm") @ head.T'
# tiled_attention without tiles: for each query by itself, an ordinary softmax over all keys.
ONE_QUERY_AT_A_TIME = """\
    if queries.shape[-2] > 1:
        each = zip(queries.split(1, dim=-2), mask.split(1), strict=True)
        rows = [tiled_attention(query, keys, values, row, tile_size) for query, row in each]
        return torch.cat([row[0] for row in rows], dim=-2), torch.cat([row[1] for row in rows], dim=-1)
    largest = torch"""
DRAW = "torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)"

# What can go wrong in the scores of one head, wherever they are used.
SCORES = {
    "scale_forgotten": (SCALE, ""),
    "scaled_by_width": (SCALE, "/ queries.shape[-1]"),
    "multiplied_by_root": (SCALE, "* math.sqrt(queries.shape[-1])"),
    "mask_forgotten": (MASKED, "scores"),
    "mask_inverted": ("~mask", "mask"),
    "mask_after_softmax": (f"torch.softmax({MASKED}, dim=-1)", "scores.softmax(-1).masked_fill(~mask, 0.0)"),
    "masked_with_zero": ("-torch.inf", "0.0"),
    "softmax_wrong_axis": ("dim=-1", "dim=-2"),
}


def in_one_head(edit: tuple[str, str]) -> tuple[str, str]:
    return f"in one_head:{edit[0]}", edit[1]


WRONG: dict[tuple[str, str], list[tuple[str, str]]] = {
    **named(
        "layer_norm",
        unbiased_variance=("centred.square().mean(dim=-1, keepdim=True)", "x.var(dim=-1, keepdim=True)"),
        eps_outside_root=("torch.sqrt(variance + eps)", "(torch.sqrt(variance) + eps)"),
        eps_forgotten=("variance + eps", "variance"),
        eps_not_the_argument=("variance + eps", "variance + 1e-5"),
        root_forgotten=("torch.sqrt(variance + eps)", "(variance + eps)"),
        wrong_axis=[("x.mean(dim=-1", "x.mean(dim=-2"), ("square().mean(dim=-1", "square().mean(dim=-2")],
        mean_not_subtracted=("return centred /", "return x /"),
        weight_forgotten=("* weight ", ""),
        bias_forgotten=(" + bias", ""),
    ),
    **named(
        "gelu",
        exact_gelu=("return 0.5 * x * (1 + torch.tanh(inner))", "return torch.nn.functional.gelu(x)"),
        sigmoid_gelu=("return 0.5 * x * (1 + torch.tanh(inner))", "return x * torch.sigmoid(1.702 * x)"),
        relu=("return 0.5 * x * (1 + torch.tanh(inner))", "return torch.relu(x)"),
        silu=("return 0.5 * x * (1 + torch.tanh(inner))", "return torch.nn.functional.silu(x)"),
        root_forgotten=("math.sqrt(2 / math.pi)", "2 / math.pi"),
        cube_forgotten=("x**3", "x**2"),
        half_forgotten=("0.5 * x", "x"),
        one_forgotten=("(1 + torch.tanh(inner))", "torch.tanh(inner)"),
    ),
    **named(
        "causal_mask",
        inverted=("return everything.tril", "return ~everything.tril"),
        upper_triangle=("everything.tril", "everything.triu"),
        own_token_hidden=("key_len - query_len)", "key_len - query_len - 1)"),
        mask_shifted=("key_len - query_len)", "key_len - query_len + 1)"),
        upper_left=("diagonal=key_len - query_len", "diagonal=0"),
        nothing_hidden=(".tril(diagonal=key_len - query_len)", ""),
    ),
    **named(
        "one_head",
        **SCORES,
        scaled_by_tokens=(SCALE, "/ math.sqrt(keys.shape[-2])"),
        keys_not_transposed=("keys.mT", "keys"),
        queries_and_keys_exchanged=("queries @ keys.mT", "keys @ queries.mT"),
    ),
    **named(
        "multi_head_attention",
        **{name: in_one_head(edit) for name, edit in SCORES.items()},
        view_without_transpose=(
            "in split_heads:x.unflatten(-1, (num_heads, -1)).transpose(1, 2)",
            "x.reshape(len(x), num_heads, x.shape[1], -1)",
        ),
        merged_without_transpose=("in merge_heads:context.transpose(1, 2).flatten(2)", (
            "context.reshape(len(context), context.shape[2], -1)"
        )),
        scaled_by_emb_dim=(
            "one_head(*heads,",
            "one_head(*(part * num_heads**-0.5 if i == 0 else part for i, part in enumerate(heads)),",
        ),
        out_proj_forgotten=("linear(merge_heads(context), out_weight, out_bias)", "merge_heads(context)"),
        qkv_order=("queries, keys, values = ", "keys, queries, values = "),
        qkv_cut_by_head=(
            "linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)",
            "linear(x, qkv_weight, qkv_bias).unflatten(-1, (num_heads, 3, -1)).movedim(-2, 0).flatten(-2)",
        ),
        qkv_bias_forgotten=("qkv_weight, qkv_bias)", "qkv_weight, None)"),
        out_bias_forgotten=("out_weight, out_bias)", "out_weight, None)"),
        weights_not_transposed=("in linear:weight.T", "weight"),
    ),
    **named(
        "tiled_attention",
        nothing_rescaled=("rescale = torch.exp(largest - base)", "rescale = 1.0"),
        output_not_rescaled=("output * rescale", "output"),
        sum_not_rescaled=("total * rescale", "total"),
        maximum_of_the_tile=[
            ("torch.maximum(largest, scores.amax(dim=-1, keepdim=True))", "scores.amax(dim=-1, keepdim=True)"),
            ("rescale = torch.exp(largest - base)", "rescale = 1.0"),
        ],
        no_maximum=[
            ("risen = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))", "risen = torch.zeros_like(largest)"),
            ("torch.full_like(queries[..., :1], -torch.inf)", "torch.zeros_like(queries[..., :1])"),
        ],
        lse_without_maximum=("(largest + total.log())", "total.log()"),
        lse_without_logarithm=("total.log()", "total"),
        lse_is_the_maximum=("(largest + total.log())", "largest"),
        lse_base_2=("(largest + total.log())", "((largest + total.log()) / math.log(2))"),
        mask_ignored=("scores.masked_fill(~visible, -torch.inf)", "scores"),
        mask_in_first_tile_only=(
            "scores.masked_fill(~visible, -torch.inf)",
            "scores.masked_fill(~visible, -torch.inf) if some_keys.data_ptr() == keys.data_ptr() else scores",
        ),
        nan_where_nothing_is_seen=("torch.where(risen == -torch.inf, 0.0, risen)", "risen"),
        average_where_nothing_is_seen=("~visible, -torch.inf", "~visible, torch.finfo(scores.dtype).min"),
        lse_where_nothing_is_seen=("(largest + total.log())", "torch.where(total == 0, 0.0, largest + total.log())"),
        last_tile_dropped=(
            "some_keys, some_values, visible in tiles:",
            "some_keys, some_values, visible in [tile for tile in tiles if tile[0].shape[-2] == tile_size]:",
        ),
        not_divided=("output / torch.where(total == 0, 1.0, total)", "output"),
        scale_forgotten=(SCALE, ""),
        scaled_by_width=(SCALE, "/ queries.shape[-1]"),
        whole_table=("tiles = zip(", "table = queries @ keys.mT\n    tiles = zip("),
        whole_row=[("    largest = torch", ONE_QUERY_AT_A_TIME), ("split(tile_size", "split(keys.shape[-2]")],
    ),
    **named(
        "transformer_block",
        post_norm=[
            ("x = x + multi_head_attention(\n        norm(x, weights, \"norm_1\"),", "x = x + multi_head_attention(x,"),
            ("return x + feed_forward(norm(x, weights, \"norm_2\"), weights)", (
                "x = norm(x, weights, 'norm_1')\n    return norm(x + feed_forward(x, weights), weights, 'norm_2')"
            )),
        ],
        first_residual_forgotten=("x = x + multi_head_attention", "x = multi_head_attention"),
        second_residual_forgotten=("return x + feed_forward", "return feed_forward"),
        residual_from_norm=[
            ("x = x + multi_head_attention", "x = norm(x, weights, 'norm_1') + multi_head_attention"),
            ("return x + feed_forward", "return norm(x, weights, 'norm_2') + feed_forward"),
        ],
        norm_1_used_twice=('"norm_2"', '"norm_1"'),
        first_norm_forgotten=('norm(x, weights, "norm_1")', "x"),
        second_norm_forgotten=('norm(x, weights, "norm_2")', "x"),
        in_parallel=[
            ("x = x + multi", "start = x\n    x = x + multi"),
            ('norm(x, weights, "norm_2")', 'norm(start, weights, "norm_2")'),
        ],
        exact_gelu=("in gelu:torch.tanh(inner)", "torch.erf(x / math.sqrt(2))"),
        gelu_forgotten=("in feed_forward:gelu(hidden)", "torch.relu(hidden)"),
        mask_forgotten=in_one_head(SCORES["mask_forgotten"]),
    ),
    **named(
        "gpt2",
        positions_forgotten=(' + weights["position_embedding.weight"][:tokens]', ""),
        positions_from_1=("[:tokens]", "[torch.arange(1, tokens + 1)]"),
        final_norm_forgotten=('norm(x, weights, "final_norm")', "x"),
        one_block_for_all=('f"blocks.{layer}."', '"blocks.0."'),
        last_block_left_out=('range(cfg["n_layers"])', 'range(cfg["n_layers"] - 1)'),
        blocks_sorted_as_text=('range(cfg["n_layers"])', 'sorted(map(str, range(cfg["n_layers"])))'),
        blocks_reversed=('range(cfg["n_layers"])', 'reversed(range(cfg["n_layers"]))'),
        head_transposed=("@ head.T", "@ head"),
        own_head_ignored=(' if cfg["tie_weights"] else "head.weight"', ""),
        probabilities_returned=(LOGITS, f"({LOGITS}).softmax(-1)"),
        embedding_scaled=('["token_embedding.weight"][ids]', '["token_embedding.weight"][ids] * cfg["emb_dim"] ** 0.5'),
        dropout_left_on=("    for layer", "    x = torch.dropout(x, cfg['drop_rate'], train=True)\n    for layer"),
        post_norm=[
            ("in transformer_block:x = x + multi_head_attention(\n        norm(x, weights, \"norm_1\"),", (
                "x = x + multi_head_attention(x,"
            )),
            ("in transformer_block:return x + feed_forward(norm(x, weights, \"norm_2\"), weights)", (
                "x = norm(x, weights, 'norm_1')\n    return norm(x + feed_forward(x, weights), weights, 'norm_2')"
            )),
        ],
        exact_gelu=("in gelu:torch.tanh(inner)", "torch.erf(x / math.sqrt(2))"),
        mask_forgotten=in_one_head(SCORES["mask_forgotten"]),
    ),
    **named(
        "sampling_probabilities",
        temperature_multiplied=("logits / temperature", "logits * temperature"),
        temperature_forgotten=("logits = logits / temperature", "pass"),
        nan_at_temperature_0=("if temperature == 0:", "if temperature < 0:"),
        no_maximum=("torch.softmax(logits, dim=-1)", "logits.exp() / logits.exp().sum(dim=-1, keepdim=True)"),
        top_k_forgotten=("if top_k is not None and", "if False and"),
        top_k_one_too_many=(
            "logits.topk(top_k).values[:, -1:]", "logits.topk(min(top_k + 1, logits.shape[-1])).values[:, -1:]"
        ),
        top_k_not_renormalised=[
            ("logits = logits.masked_fill(logits < cut, -torch.inf)", "gone = logits < cut"),
            ("    if top_k is", "    gone = torch.zeros_like(logits, dtype=torch.bool)\n    if top_k is"),
            ("torch.softmax(logits, dim=-1)", "torch.softmax(logits, dim=-1).masked_fill(gone, 0.0)"),
        ],
        top_p_forgotten=("if top_p is None or top_p >= 1:", "if True:"),
        top_p_drops_the_crossing_token=("before >= top_p", "falling.cumsum(dim=-1) > top_p"),
        top_p_not_renormalised=("return kept / kept.sum(dim=-1, keepdim=True)", "return kept"),
        top_p_before_top_k=[
            ("    if top_k is", "    everything = torch.softmax(logits, dim=-1)\n    if top_k is"),
            ("probabilities.sort(dim=-1, descending=True)", "everything.sort(dim=-1, descending=True)"),
            ("before >= top_p, 0.0)", "before >= top_p, 0.0) * (probabilities.gather(-1, places) > 0)"),
        ],
        top_p_before_temperature=[
            ("    logits = logits / temperature", "    cold, logits = logits, logits / temperature"),
            ("before = falling.cumsum(dim=-1) - falling", (
                "cold = cold.masked_fill(torch.isinf(logits), -torch.inf).softmax(-1).gather(-1, places)\n"
                "    before = cold.cumsum(dim=-1) - cold"
            )),
        ],
        least_likely_kept=[
            ("logits.topk(top_k)", "logits.topk(top_k, largest=False)"),
            ("logits < cut", "logits > cut"),
            ("descending=True", "descending=False"),
        ],
        sorted_order_returned=("torch.zeros_like(probabilities).scatter(-1, places, falling)", "falling"),
    ),
    **named(
        "sample",
        generator_ignored=(", generator=generator", ""),
        one_draw_for_all_rows=(DRAW, f"{DRAW}[:1].expand(len(probabilities))"),
        always_greedy=(DRAW, "probabilities.argmax(dim=-1)"),
        not_an_id=(DRAW, f"{DRAW} - 1"),
        drawn_evenly=("torch.multinomial(probabilities,", "torch.multinomial((probabilities > 0).float(),"),
        temperature_forgotten=("(logits, temperature,", "(logits, 1.0,"),
        temperature_multiplied=("(logits, temperature,", "(logits, 1 / temperature,"),
        top_k_forgotten=("temperature, top_k, top_p)", "temperature, None, top_p)"),
        top_p_forgotten=("temperature, top_k, top_p)", "temperature, top_k, None)"),
    ),
    **named(
        "kv_cache_attention",
        upper_left=("mask = causal_mask(queries.shape[-2], keys.shape[-2])", (
            "mask = torch.ones(queries.shape[-2], keys.shape[-2]).tril().bool()"
        )),
        mask_forgotten=("mask = causal_mask(queries.shape[-2], keys.shape[-2])", (
            "mask = torch.ones(queries.shape[-2], keys.shape[-2]).bool()"
        )),
        new_before_old=[("[cached_keys, new_keys]", "[new_keys, cached_keys]"), (
            "[cached_values, new_values]", "[new_values, cached_values]"
        )],
        wrong_axis=[("[cached_keys, new_keys], dim=-2", "[cached_keys, new_keys], dim=1"), (
            "[cached_values, new_values], dim=-2", "[cached_values, new_values], dim=1"
        )],
        cache_not_read=("return one_head(queries, keys, values, mask)", (
            "return one_head(queries, new_keys, new_values, mask[:, -new_keys.shape[-2] :])"
        )),
        cache_not_returned=("mask), keys, values", "mask), cached_keys, cached_values"),
        only_new_returned=("mask), keys, values", "mask), new_keys, new_values"),
        values_not_joined=("torch.cat([cached_values, new_values], dim=-2)", "new_values"),
        scale_forgotten=in_one_head(SCORES["scale_forgotten"]),
    ),
    **named(
        "gpt2_with_cache",
        positions_restart=("[past : past + new]", "[:new]"),
        positions_one_late=("[past : past + new]", "[past + 1 : past + 1 + new]"),
        upper_left=("in causal_mask:diagonal=key_len - query_len", "diagonal=0"),
        one_cache_for_all_layers=("context, keys,", "old_keys, old_values = cache[0]\n        context, keys,"),
        cache_not_returned=("grown.append((keys, values))", "grown.append((old_keys, old_values))"),
        only_new_returned=("grown.append((keys, values))", "grown.append((keys[:, :, past:], values[:, :, past:]))"),
    ),
    **named(
        "count_parameters",
        head_counted_twice=('0 if cfg["tie_weights"] else ', ""),
        own_head_forgotten=('0 if cfg["tie_weights"] else cfg["vocab_size"] * C', "0"),
        positions_forgotten=(' + cfg["context_length"]', ""),
        biases_forgotten=[
            ('(3 * C * C + (3 * C if cfg["qkv_bias"] else 0)) + (C * C + C)', "4 * C * C"),
            ("(F * C + F) + (C * F + C)", "2 * C * F"),
        ],
        qkv_bias_not_looked_at=('(3 * C if cfg["qkv_bias"] else 0)', "3 * C"),
        norms_forgotten=[("2 * (2 * C) + ", ""), (" + 2 * C + head", " + head")],
        final_norm_forgotten=(" + 2 * C + head", " + head"),
        one_layer=('cfg["n_layers"] * block', "block"),
        feed_forward_not_widened=("(F * C + F) + (C * F + C)", "2 * (C * C + C)"),
        ff_dim_ignored=("C, F = widths(cfg)", 'C, F = cfg["emb_dim"], 4 * cfg["emb_dim"]'),
        one_of_qkv=('3 * C * C + (3 * C if cfg["qkv_bias"] else 0)', 'C * C + (C if cfg["qkv_bias"] else 0)'),
        out_proj_forgotten=(" + (C * C + C)  # qkv", "  # qkv"),
    ),
    **named(
        "forward_flops",
        factor_2_forgotten=("return 2 * tokens", "return tokens"),
        quadratic_term_forgotten=(TABLE, "table = 0"),
        half_of_attention=(TABLE, "table = tokens * C"),
        table_times_heads=(TABLE, f'{TABLE} * cfg["n_heads"]'),
        head_forgotten=(' + C * cfg["vocab_size"]', ""),
        lookup_counted=('C * cfg["vocab_size"]', '2 * C * cfg["vocab_size"]'),
        feed_forward_not_widened=("C * F + F * C", "2 * C * C"),
        ff_dim_ignored=("C, F = widths(cfg)", 'C, F = cfg["emb_dim"], 4 * cfg["emb_dim"]'),
        per_token=("return 2 * tokens *", "return 2 *"),
        one_layer=('cfg["n_layers"] * (linears', "(linears"),
        one_of_qkv=("3 * C * C", "C * C"),
        out_proj_forgotten=("3 * C * C + C * C", "3 * C * C"),
        context_for_tokens=("C, F = widths(cfg)", 'C, F = widths(cfg)\n    tokens = cfg["context_length"]'),
    ),
    **named(
        "attention_share",
        percent=("return 2", "return 100 * 2"),
        projections_included=("2 * tokens * C /", "(2 * tokens * C + 4 * C * C) /"),
        half_of_attention=("2 * tokens * C /", "tokens * C /"),
        head_forgotten=('in forward_flops: + C * cfg["vocab_size"]', ""),
        context_for_tokens=("C, _ = widths(cfg)", 'C, _ = widths(cfg)\n    tokens = cfg["context_length"]'),
    ),
    # Mistakes that any function may have.
    ("gelu", "signature"): [("def gelu(x: ", "def gelu(y, x: ")],
    ("layer_norm", "nothing_returned"): [("return centred", "result = centred")],
    ("one_head", "not_a_tensor"): [("return weights @ values", "return (weights @ values).tolist()")],
    ("tiled_attention", "number_of_results"): [("return output, (largest + total.log()).squeeze(-1)", "return output")],
    ("multi_head_attention", "axes_exchanged"): [("return linear(merge_heads(context), out_weight, out_bias)", (
        "return linear(merge_heads(context), out_weight, out_bias).transpose(0, 1)"
    ))],
    ("gpt2", "wrong_shape"): [(LOGITS, f"({LOGITS})[:, -1]")],
    ("causal_mask", "not_bool"): [("dtype=torch.bool", "dtype=torch.float32")],
    ("gelu", "wrong_dtype"): [("(1 + torch.tanh(inner))", "(1 + torch.tanh(inner).double())")],
    ("layer_norm", "rounding"): [("centred.square().mean(dim=-1, keepdim=True)", (
        "x.square().mean(dim=-1, keepdim=True) - x.mean(dim=-1, keepdim=True).square()"
    ))],
    ("gelu", "random"): [("return 0.5 * x", "return torch.dropout(x, 0.5, train=True)")],
    ("transformer_block", "inputs_overwritten"): [("x = x + multi_head_attention", "x += multi_head_attention")],
    ("one_head", "precision_lost"): [
        ("return weights @ values", "return (weights.float() @ values.float()).to(values.dtype)")
    ],
    ("one_head", "dtype_fixed"): [("weights @ values", "weights @ values.float()")],
    ("layer_norm", "not_finite"): [("return centred", "centred[..., 0] = torch.nan\n    return centred")],
}  # fmt: skip


def source(exercise: str, mistake: str) -> str:
    """The solutions with this mistake in them."""
    text = SOLUTIONS.read_text(encoding="utf-8")
    for old, new in WRONG[exercise, mistake]:
        function = exercise
        if old.startswith("in "):
            function, old = old.removeprefix("in ").split(":", 1)
        start, end = span(text, function)
        body = text[start:end]
        assert old in body, f"{exercise}, {mistake}: {old!r} is not in {function}"
        text = text[:start] + body.replace(old, new) + text[end:]
    return text


def span(text: str, function: str) -> tuple[int, int]:
    """Where a function of the file begins and ends."""
    lines = text.splitlines(keepends=True)
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function)
    return len("".join(lines[: node.lineno - 1])), len("".join(lines[: node.end_lineno]))
