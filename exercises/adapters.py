"""The exercises: fifteen functions, from LayerNorm to GPT-2 with a cache. Write them here; each checks itself.

    python -m orchestrator check                  all
    python -m orchestrator check attention        a group
    python -m orchestrator check layer_norm       one

These functions are *adapters*. They take raw weights and tensors and give tensors, so your own classes may look as you
like: put them into `my_gpt2.py`, and let the adapter make one, load the weights into it and call it. Or write the
formula here. `README.md` says how to work, and what counts.

What holds everywhere:
- Linear weights are (out, in), as torch.nn.Linear keeps them: y = x @ weight.T + bias.
- Masks are torch.bool, True = may attend.
- Results have the dtype of the arguments. Arguments are left as they are.
- No dropout: the functions compute what a model in eval mode computes.
- Everything is small. No GPU is needed: all checks together take seconds on a laptop.

Letters: B sequences, T tokens, C emb_dim, H heads, D head_dim, F ff_dim, V vocab_size, L layers, N context_length.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# ------------------------------------------------------------------ layers: 7 points


def layer_norm(
    x: Float[Tensor, "*batch emb_dim"], weight: Float[Tensor, " emb_dim"], bias: Float[Tensor, " emb_dim"], eps: float
) -> Float[Tensor, "*batch emb_dim"]:
    """Bring each token's vector to mean 0 and variance 1, then let the model choose scale and shift. 4 points.

    Derivation: each block adds to the stream, so its numbers grow with the depth. Per token, over the last axis:

        mean = 1/C sum_i x_i        variance = 1/C sum_i (x_i - mean)^2
        y_i  = (x_i - mean) / sqrt(variance + eps) * weight_i + bias_i

    eps is for vectors of (nearly) equal numbers, whose variance is (nearly) 0.

    Args:
        x: (*batch, C), with any number of axes in front, also none.
        weight, bias: (C,). eps: a small positive number.
    Returns: the shape of x.
    Deliverable: without torch's own layer_norm, so that you have met each operation.
    Tip: keepdim=True keeps the axis for broadcasting. Find out what `Tensor.var` divides by.
    Source: "Layer Normalization" (Ba et al., 2016), equation 4. Notebook: `llm.ipynb`, section 5.
    """
    raise NotImplementedError


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The bend between the two linear layers of feed-forward, in the form GPT-2 was trained with. 3 points.

    Derivation: GELU(x) = x * P(Z <= x) with Z normal: each number is kept to the degree that it is large among normal
    numbers. The paper gives an approximation of that probability by tanh, and GPT-2 uses the approximation:

        0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    Returns: the shape of x.
    Deliverable: the function, and an answer: how far is it from the exact form, at most, and where?
    Tip: `math.sqrt(2 / math.pi)` is a plain number; it needs no tensor.
    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel, 2016), section 2. Notebook: `llm.ipynb`, section 5.
    """
    raise NotImplementedError


# ------------------------------------------------------------------ attention: 38 points


def causal_mask(query_len: int, key_len: int) -> Bool[Tensor, "query_len key_len"]:
    """Who may attend to whom: a token sees itself and what came before it. 4 points.

    Derivation: with as many queries as keys, query i sees keys 0..i: a lower triangle with its diagonal. With a cache a
    few new queries meet many keys, and the *last* query stands at the *last* key. So query i stands at position
    i + (key_len - query_len), and sees the keys up to there.

    Args:
        query_len, key_len: in tokens; query_len <= key_len.
    Returns: (query_len, key_len), torch.bool, True = may attend.
    Deliverable: also draw the mask for 2 queries and 5 keys on paper, before you run it.
    Tip: two `torch.arange`, one as a column and one as a row, and a comparison; or `tril` with a diagonal.
    Source: FlashAttention-2's convention since its version 2.1. Notebook: `llm.ipynb`, sections 2 and 7.
    """
    raise NotImplementedError


def one_head(
    queries: Float[Tensor, "*batch query_len head_dim"],
    keys: Float[Tensor, "*batch key_len head_dim"],
    values: Float[Tensor, "*batch key_len value_dim"],
    mask: Bool[Tensor, "query_len key_len"],
) -> Float[Tensor, "*batch query_len value_dim"]:
    """Scaled dot-product attention: each query's average of the values, weighted by how well the keys fit. 8 points.

        Attention(Q, K, V) = softmax(Q K^T / sqrt(head_dim)) V

    Derivation of the scale: a sum of head_dim products of independent numbers with variance 1 has variance head_dim.
    Divided by its root, the scores have variance 1 whatever the width, and the softmax is not sure of itself from the
    start. A hidden key must get the weight 0, and the weights of the others must still sum to 1.

    Args:
        queries, keys: (*batch, tokens, D). values: (*batch, key_len, value_dim); value_dim need not be D.
        mask: (query_len, key_len), True = may attend. Each query may attend to one key at least.
    Returns: (*batch, query_len, value_dim).
    Deliverable: without scaled_dot_product_attention.
    Tip: do three tokens of width 4 on paper; the notebook has them with whole numbers.
    Source: "Attention Is All You Need" (Vaswani et al., 2017), equation 1. Notebook: `llm.ipynb`, section 2.
    """
    raise NotImplementedError


def multi_head_attention(
    x: Float[Tensor, "batch tokens emb_dim"],
    qkv_weight: Float[Tensor, "three_emb_dim emb_dim"],
    qkv_bias: Float[Tensor, " three_emb_dim"] | None,
    out_weight: Float[Tensor, "emb_dim emb_dim"],
    out_bias: Float[Tensor, " emb_dim"],
    num_heads: int,
) -> Float[Tensor, "batch tokens emb_dim"]:
    """Causal self-attention with several heads, each on its own part of the width. 10 points.

        head_h = Attention(Q_h, K_h, V_h)        output = concat(head_1, ..., head_H) W_out^T + b_out

    Derivation: one softmax gives one average per token. H of them on D = C / H numbers each cost the same and look at H
    things at once. Head h has the numbers h*D to (h+1)*D of each token's query, key and value.

    Args:
        x: (B, T, C).
        qkv_weight: (3C, C): C rows that make the queries of all heads, then C for the keys, then C for the values.
        qkv_bias: (3C,), or None: no bias.
        out_weight: (C, C). out_bias: (C,). num_heads: H, which divides C.
    Returns: (B, T, C). The mask is causal.
    Deliverable: write the shape behind each line. (B, T, C) -> (B, T, H, D) -> (B, H, T, D), and back.
    Tip: fill x with the number of its token (0, 0, ..., 1, 1, ...) and look at head 0 after your split.
    Source: Vaswani et al., 2017, section 3.2.2. Notebook: `llm.ipynb`, section 3.
    """
    raise NotImplementedError


def tiled_attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch heads key_len head_dim"],
    values: Float[Tensor, "batch heads key_len head_dim"],
    mask: Bool[Tensor, "query_len key_len"],
    tile_size: int,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], Float[Tensor, "batch heads query_len"]]:
    """The heart of flash attention: the same numbers, one tile of keys after another, by an online softmax. 16 points.

    Derivation: softmax does not change when a number m is subtracted from a row's scores. Take the largest so far.
    Three things are kept for each query, and for a tile with the scores S and the values V_tile they become

        m' = max(m, rowmax S)
        l' = l exp(m - m') + rowsum exp(S - m')
        O' = O exp(m - m') + exp(S - m') V_tile

    What was summed before belongs to the old maximum; exp(m - m') makes it belong to the new one. At the end the output
    is O / l, and log_sum_exp = m + log l: the one number per query from which the backward pass finds every weight
    again, as exp(score - log_sum_exp). The scores are scaled by 1 / sqrt(D), as always.

    Args:
        queries: (B, H, query_len, D). keys, values: (B, H, key_len, D).
        mask: (query_len, key_len), True = may attend. Here a query may see nothing at all.
        tile_size: keys in a tile. The last tile is shorter if key_len is no multiple. (All queries at once.)
    Returns: output (B, H, query_len, D); log_sum_exp (B, H, query_len), natural logarithm. A query that sees nothing:
        output exactly 0, log_sum_exp -inf (the logarithm of an empty sum), and no NaN.
    Deliverable: no table of query_len by key_len numbers at any time, and of one query not all key_len scores either;
        the check watches that.
    Tip: begin with 4 keys in tiles of 2 and one query, and print m, l and O after each tile.
    Source: FlashAttention-2 (Dao, 2023), algorithm 1. Notebook: `attention.ipynb`, sections 4 and 5.
    """
    raise NotImplementedError


# ------------------------------------------------------------------ model: 20 points


def transformer_block(
    x: Float[Tensor, "batch tokens emb_dim"], weights: Mapping[str, Tensor], n_heads: int
) -> Float[Tensor, "batch tokens emb_dim"]:
    """One block: attention adds to the stream, then feed-forward does. 8 points.

        x = x + attention(norm_1(x))
        x = x + feed_forward(norm_2(x))        feed_forward(z) = gelu(z W_up^T + b_up) W_down^T + b_down

    Derivation: each layer reads a normalised *copy* (pre-norm) and adds what it has found. So the stream, and the
    gradient on its way back, has a straight path through all blocks. eps of the norms is 1e-5.

    Args:
        x: (B, T, C).
        weights: by the names of TransformerBlock.state_dict():
            norm_1.weight, norm_1.bias, norm_2.weight, norm_2.bias (C,);
            attention.W_qkv.weight (3C, C), attention.W_qkv.bias (3C,): missing if the model has no qkv_bias;
            attention.out_proj.weight (C, C), attention.out_proj.bias (C,);
            feed_forward.up_proj.weight (F, C), .bias (F,); feed_forward.down_proj.weight (C, F), .bias (C,).
        n_heads: H.
    Returns: (B, T, C).
    Deliverable: an answer: what does the block give if out_proj and down_proj are all zeros?
    Tip: `weights.get(name)` is None where a name is missing.
    Source: Radford et al., 2019, section 2.3. Notebook: `llm.ipynb`, section 5.
    """
    raise NotImplementedError


def gpt2(
    ids: Int[Tensor, "batch tokens"], weights: Mapping[str, Tensor], cfg: Mapping
) -> Float[Tensor, "batch tokens vocab_size"]:
    """The whole model: ids in, a score for every word of the vocabulary out, at every position. 12 points.

        x = token_embedding[ids] + position_embedding[0..T-1];  L blocks;  final_norm;  logits = x @ head.T

    Derivation: the head asks how well the last vector fits each word's vector. GPT-2 uses the embedding's own vectors
    for that (tied weights, cfg["tie_weights"]): one table, read by rows at the start and as a matrix at the end.

    Args:
        ids: (B, T), T <= context_length.
        weights: by the names of GPTModel.state_dict(): token_embedding.weight (V, C), position_embedding.weight (N, C),
            blocks.0.norm_1.weight and so on for each block, final_norm.weight, final_norm.bias (C,). head.weight (V, C)
            is there only if cfg["tie_weights"] is False.
        cfg: the cfg dict; needed are n_layers, n_heads and tie_weights. Its drop_rate is for training.
    Returns: logits (B, T, V): no softmax.
    Deliverable: then give it the weights of a trained model of yours, and let it write.
    Tip: test with one layer first; `python -m orchestrator check transformer_block` before this one.
    Source: Radford et al., 2019. Notebook: `llm.ipynb`, section 6.
    """
    raise NotImplementedError


# ------------------------------------------------------------------ sampling: 12 points


def sampling_probabilities(
    logits: Float[Tensor, "batch vocab_size"], temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab_size"]:
    """From scores to the chances that are drawn from: temperature, top-k, softmax, top-p, in this order. 8 points.

    Derivation: softmax(logits / temperature) is flat for a high temperature and tends to the likeliest token for a low
    one. top_k keeps the k largest logits. top_p keeps the fewest likely tokens whose chances sum to p *at least*: going
    down from the likeliest, a token stays if the sum *before* it is below p. What is left is made to sum to 1 again.
    (Dividing by a positive number keeps the order: so top-k before or after the temperature is the same. top-p is not.)

    Args:
        logits: (B, V).
        temperature: 0 (greedy: chance 1 for the likeliest token) or above.
        top_k: None, or how many stay; more than V: all. top_p: None, or above 0 and at most 1.
    Returns: (B, V), rows that sum to 1, each chance in its token's place.
    Deliverable: nothing but 0, 1 and numbers between, even for a temperature of 0.01.
    Tip: one row of five logits, sorted by hand, shows every trap of top-p.
    Source: "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019), section 3.1, equations 2 and 3.
    Notebook: `generation.ipynb`, sections 2 and 3.
    """
    raise NotImplementedError


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
    """Draw the next token of each row. 4 points.

    Derivation: all chance comes from `generator`, so that a seed gives one text. At temperature 0 nothing is drawn.

    Args:
        logits, temperature, top_k, top_p: as in sampling_probabilities.
        generator: where the chance comes from; torch's global state stays as it is.
    Returns: (B,), torch.int64: one id for each row, drawn for each row by itself.
    Deliverable: any way of drawing that gives the right frequencies; the check draws 20,000 times.
    Tip: torch.multinomial takes a generator.
    Source: Holtzman et al., 2019. Notebook: `generation.ipynb`, sections 2 and 3.
    """
    raise NotImplementedError


# ------------------------------------------------------------------ cache: 15 points


def kv_cache_attention(
    queries: Float[Tensor, "batch heads new head_dim"],
    new_keys: Float[Tensor, "batch heads new head_dim"],
    new_values: Float[Tensor, "batch heads new head_dim"],
    cached_keys: Float[Tensor, "batch heads past head_dim"],
    cached_values: Float[Tensor, "batch heads past head_dim"],
) -> tuple[
    Float[Tensor, "batch heads new head_dim"],
    Float[Tensor, "batch heads all head_dim"],
    Float[Tensor, "batch heads all head_dim"],
]:
    """One step of generation: new tokens attend to kept keys and values, and to their own. 7 points.

    Derivation: under a causal mask an old token never sees a new one. So its key and value in every layer never change,
    and need not be computed again. Only the new tokens' queries are needed; they meet past + new keys.

    Args:
        queries, new_keys, new_values: (B, H, new, D) of the new tokens, one or several.
        cached_keys, cached_values: (B, H, past, D) of the tokens before; past may be 0.
    Returns: context (B, H, new, D); keys and values (B, H, past + new, D), to be kept for the next step.
    Deliverable: an answer: why is torch's is_causal=True wrong here for several new tokens?
    Tip: your causal_mask(new, past + new) and one_head do most of it.
    Source: the causal mask itself. Notebook: `generation.ipynb`, sections 4 and 5.
    """
    raise NotImplementedError


def gpt2_with_cache(
    ids: Int[Tensor, "batch new"],
    cache: list[tuple[Tensor, Tensor]] | None,
    weights: Mapping[str, Tensor],
    cfg: Mapping,
) -> tuple[Float[Tensor, "batch new vocab_size"], list[tuple[Tensor, Tensor]]]:
    """The whole model, reading only what is new. 8 points.

    Derivation: norms, feed-forward and head look at each token by itself. Only attention looks back, and what it needs
    is kept, for each layer: its keys and values. The new tokens' positions go on where the kept ones end.

    Args:
        ids: (B, new): the prompt at first, then one token at a time, or a chunk.
        cache: a list with (keys, values) for each layer, each (B, H, past, D). None: nothing has been read yet.
        weights, cfg: as in gpt2; the head is tied here.
    Returns: logits (B, new, V), and the cache with the new tokens: a new list, the old one stays as it is.
    Deliverable: ids in one piece, or token by token: the same logits.
    Tip: past is the length of the keys of layer 0.
    Source: the causal mask itself. Notebook: `generation.ipynb`, sections 4 and 5.
    """
    raise NotImplementedError


# ------------------------------------------------------------------ accounting: 8 points


def count_parameters(cfg: Mapping) -> int:
    """How many numbers does a model of this cfg train? 3 points.

    Derivation: go through the model with a pencil. Two embeddings; in each block two norms (weight and bias), qkv (bias
    only if cfg["qkv_bias"]), out_proj, up_proj, down_proj (each with bias); a last norm; a head without bias, which is
    the token embedding once more if cfg["tie_weights"].

    Args:
        cfg: vocab_size, context_length, emb_dim, n_layers, ff_dim (None: 4 * emb_dim), qkv_bias, tie_weights.
    Returns: a whole number.
    Deliverable: gpt2-xl at context 1,024 and at 16,384. Which part has grown, and by how much?
    Tip: gpt2 has 124,439,808. `from GPT2Model.config import from_preset` gives you every cfg.
    Notebook: `llm.ipynb`, section 6.
    """
    raise NotImplementedError


def forward_flops(cfg: Mapping, tokens: int) -> int:
    """Floating-point operations of one forward pass over one sequence. 3 points.

    Derivation: a product (m, k) @ (k, n) takes m * k * n multiply-adds. The convention here:
    - 2 operations for each multiply-add;
    - matrix products only: qkv, Q K^T, weights V, out_proj, up_proj, down_proj, head. No biases, norms, softmax, GELU;
    - Q K^T and weights V over the whole T x T table, the hidden half included, as eager computes it;
    - the embeddings are lookups: 0. The head is computed at every position, tied or not.

    Args:
        cfg: as in count_parameters. tokens: T, not necessarily context_length.
    Returns: a whole number.
    Deliverable: gpt2-xl over 1,024 tokens and over 16,384. Sixteen times the tokens: how many times the operations?
    Tip: one row for each product: its three sizes, and how often it occurs.
    Notebook: `llm.ipynb`, section 6, for the sizes.
    """
    raise NotImplementedError


def attention_share(cfg: Mapping, tokens: int) -> float:
    """What part of these operations is inside attention: in Q K^T and weights V? 2 points.

    Derivation: these two grow with the square of the tokens, everything else in proportion to them. So their part is
    small for short texts and tends to 1.

    Args:
        cfg, tokens: as in forward_flops.
    Returns: a number from 0 to 1, right to four decimals. The projections (qkv, out_proj) do not belong to the part.
    Deliverable: gpt2-xl at 1,024 and at 16,384; and the number of tokens at which the part is one half.
    Tip: V*C and C*C do not depend on the tokens; T*C does.
    Notebook: `attention.ipynb`, section 8.
    """
    raise NotImplementedError
