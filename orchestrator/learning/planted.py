"""planted("scale_forgotten"): one classic mistake in the running code, for the time of a `with`.

    with planted("exact_gelu"):
        model(ids)  # as if the line were written wrong; afterwards as before, bit for bit

No source file is changed: functions and methods are replaced in memory, for the whole process, so live models have the
mistake as well as models built inside. `MISTAKES` says of each what it is, the wrong and the right line, and why it is
easily made; `orchestrator/learning/symptoms.py` computes by which check it is seen.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from CMHA import cmha
from CMHA.choosing.names import did_you_mean
from CMHA.cmha import MultiHeadAttention
from CMHA.masks import AttentionMask
from GPT2Model import generation
from GPT2Model.gpt2 import GPTModel
from orchestrator.learning import wrong_code
from orchestrator.training import loop
from TransformerBlock.layers import GELU, LayerNorm
from TransformerBlock.transformer_block import TransformerBlock

logger = logging.getLogger("orchestrator")

PLACES = ("attention", "block", "model", "training", "generation")
EVERYWHERE = "every implementation"


@dataclass(frozen=True)
class Patch:
    """One replacement in memory.

    Attributes:
        owner, attribute: the class or module, and the name in it.
        make: right code -> wrong code.
        part: what of it is changed, where two mistakes may change different things of one function.
    """

    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    part: str = ""

    @property
    def spot(self) -> tuple:
        return self.owner, self.attribute, self.part

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.attribute}" + f" ({self.part})" * bool(self.part)


@dataclass(frozen=True)
class Mistake:
    """A classic mistake.

    Attributes:
        name: what `planted` takes.
        what: what it is, in a line.
        wrong, right: the line of code, as it is written by mistake and as it should be.
        why: why it is easily made.
        where: "attention", "block", "model", "training" or "generation".
        patches: what plants it.
        implementations: the ways of computing attention under which it acts; None: all.
        in_training: whether a model that is trained with it learns otherwise.
        needs: cfg keys without which it does nothing.
    """

    name: str
    what: str
    wrong: str
    right: str
    why: str
    where: str
    patches: tuple[Patch, ...] = field(repr=False, compare=False)
    implementations: tuple[str, ...] | None = None
    in_training: bool = True
    needs: tuple[tuple[str, Any], ...] = ()


def attention_patch(make: Callable, part: str) -> tuple[Patch, ...]:
    return (Patch(cmha, "choose", make, part),)


_ALL = (
    Mistake(
        "scale_forgotten", "the scores are not divided by sqrt(head_dim)",
        "scores = queries @ keys.mT", "scores = queries @ keys.mT / math.sqrt(head_dim)",
        "every shape is right without it, and a small model learns all the same", "attention",
        attention_patch(wrong_code.scale_forgotten, "scale"),
    ),
    Mistake(
        "scale_by_emb_dim", "the scores are divided by the square root of the whole width instead of the head's",
        "scores / math.sqrt(emb_dim)", "scores / math.sqrt(emb_dim // n_heads)",
        "with one head the two are the same, and d_k of the paper is easily read as the width", "attention",
        attention_patch(wrong_code.scale_by_emb_dim, "scale"),
    ),
    Mistake(
        "mask_forgotten", "each token sees all tokens, the later ones too",
        "attention(queries, keys, values)", "attention(queries, keys, values, is_causal=True)",
        "is_causal is False by default, and nothing fails without it", "attention",
        attention_patch(wrong_code.mask_forgotten, "mask"),
    ),
    Mistake(
        "mask_shifted", "each token sees the next one: the answer",
        "hidden = torch.ones(T, T).triu(diagonal=2)", "hidden = torch.ones(T, T).triu(diagonal=1)",
        "triu and tril count their diagonals from different sides, and one of them is off by one", "attention",
        attention_patch(wrong_code.mask_shifted, "mask"),
    ),
    Mistake(
        "mask_too_strict", "a token does not see itself",
        "hidden = torch.ones(T, T).triu(diagonal=0)", "hidden = torch.ones(T, T).triu(diagonal=1)",
        "triu() hides the diagonal too, where tril() keeps it", "attention",
        attention_patch(wrong_code.mask_too_strict, "mask"),
    ),
    Mistake(
        "mask_after_softmax", "future weights are set to zero after the softmax, which had counted them in",
        "softmax(scores).masked_fill(hidden, 0)", "softmax(scores.masked_fill(hidden, -inf))",
        "the table of weights has its zeros in the right places; only the rows no longer sum to 1", "attention",
        attention_patch(wrong_code.mask_after_softmax, "weights"), ("eager",),
    ),
    Mistake(
        "mask_upper_left_with_cache", "with a KV cache the causal triangle lies at the first keys, not at the last",
        "ones(query_len, key_len).tril()", "ones(query_len, key_len).tril(diagonal=key_len - query_len)",
        "is_causal=True means the upper left corner in torch's op, and without a cache both are the same", "attention",
        attention_patch(wrong_code.mask_upper_left, "mask"), in_training=False,
    ),
    Mistake(
        "softmax_over_queries", "the softmax runs down the columns: over the queries",
        "torch.softmax(scores, dim=-2)", "torch.softmax(scores, dim=-1)",
        "the table is square, so the other axis gives no error", "attention",
        attention_patch(wrong_code.softmax_over_queries, "weights"), ("eager",),
    ),
    Mistake(
        "view_without_transpose", "heads are split by cutting the sequence, so that tokens are mixed up",
        "x.reshape(B, H, T, D)", "x.view(B, T, H, D).transpose(1, 2)",
        "the shape is the wanted one; and where view fails, its error message advises reshape", "attention",
        (Patch(MultiHeadAttention, "split_heads", wrong_code.split_without_transpose),),
    ),
    Mistake(
        "merge_without_transpose", "heads are merged without moving them behind the tokens first",
        "context.reshape(B, T, H * D)", "context.transpose(1, 2).flatten(2)",
        "the shape is the wanted one; view would refuse this memory layout, reshape does not", "attention",
        (Patch(MultiHeadAttention, "merge_heads", wrong_code.merge_without_transpose),),
    ),
    Mistake(
        "projection_not_transposed", "the output projection is used the other way round, as OpenAI's file stores it",
        "context @ out_proj.weight", "context @ out_proj.weight.T",
        "GPT-2's files hold (in, out) and torch's Linear holds (out, in); this one is square, so it fits", "attention",
        (Patch(MultiHeadAttention, "forward", wrong_code.projection_not_transposed),),
    ),
    Mistake(
        "exact_gelu", "GELU through erf, where GPT-2 has its approximation through tanh",
        "nn.GELU()", 'nn.GELU(approximate="tanh")',
        "the exact form is torch's default, and sounds like the better one", "block",
        (Patch(GELU, "forward", wrong_code.exact_gelu),),
    ),
    Mistake(
        "unbiased_variance", "LayerNorm divides by n - 1 instead of n",
        "x.var(dim=-1, keepdim=True)", "x.var(dim=-1, keepdim=True, unbiased=False)",
        "unbiased=True is torch's default for var and std", "block",
        (Patch(LayerNorm, "forward", wrong_code.unbiased_variance),),
    ),
    Mistake(
        "epsilon_wrong", "LayerNorm with BERT's epsilon, 1e-12, instead of GPT-2's 1e-5",
        "eps = 1e-12", "eps = 1e-5",
        "it is a small number either way, and both stand in published code", "block",
        (Patch(LayerNorm, "EPS", wrong_code.epsilon_wrong),),
    ),
    Mistake(
        "norm_forgotten", "attention and feed-forward read the stream as it is, without LayerNorm",
        "x = x + self.attention(x)", "x = x + self.attention(self.norm_1(x))",
        "two layers learn something without it, and no shape is wrong", "block",
        (Patch(TransformerBlock, "forward", wrong_code.norm_forgotten),),
    ),
    Mistake(
        "post_norm", "the stream itself is normalised after each addition, as in the first transformer",
        "x = self.norm_1(x + self.attention(x))", "x = x + self.attention(self.norm_1(x))",
        "the figure of the 2017 paper draws it so", "block",
        (Patch(TransformerBlock, "forward", wrong_code.post_norm),),
    ),
    Mistake(
        "residual_forgotten", "what attention gives replaces the stream instead of being added to it",
        "x = self.attention(self.norm_1(x))", "x = x + self.attention(self.norm_1(x))",
        "the shapes are the same", "block",
        (Patch(TransformerBlock, "forward", wrong_code.residual_forgotten),),
    ),
    Mistake(
        "positions_forgotten", "no position embedding is added: order is known only through the mask",
        "x = token_embedding(ids)", "x = token_embedding(ids) + position_embedding(positions)",
        "the causal mask tells a two-layer model enough of the order to learn", "model",
        (Patch(GPTModel, "forward", wrong_code.positions_forgotten, "positions"),),
    ),
    Mistake(
        "head_untied", "the head has weights of its own, fresh ones, instead of the token embedding's",
        "self.head = nn.Linear(C, V)", "self.head.weight = self.token_embedding.weight",
        "files of tied models do not store the head, and a loader that is not strict says nothing", "model",
        (
            Patch(GPTModel, "__init__", wrong_code.untied_when_built),
            Patch(GPTModel, "forward", wrong_code.head_of_its_own, "head"),
        ),
    ),
    Mistake(
        "dropout_left_on", "the model is asked without model.eval(): dropout is on",
        "model(ids)", "model.eval()(ids)",
        "a model that is built is in training mode, and a loop that evaluates must switch back and forth", "model",
        (Patch(GPTModel, "forward", wrong_code.dropout_left_on, "dropout"),), in_training=False,
        needs=(("drop_rate", 0.1),),
    ),
    Mistake(
        "targets_not_shifted", "each position is asked for its own token instead of the next one",
        "cross_entropy(logits, inputs)", "cross_entropy(logits[:, :-1], inputs[:, 1:])",
        "some libraries shift inside the model, others expect it to be done", "training",
        (Patch(loop, "next_token_loss", wrong_code.targets_not_shifted),),
    ),
    Mistake(
        "gradients_not_cleared", "each step adds its gradient to those of all steps before",
        "optimizer.step()", "optimizer.step(); optimizer.zero_grad()",
        "torch adds gradients up by design, and clipping keeps the sum from exploding", "training",
        (Patch(loop, "make_optimizer", wrong_code.gradients_not_cleared),),
    ),
    Mistake(
        "positions_restart_with_cache", "with a KV cache each new token is given position 0",
        "positions = arange(ids.shape[1])", "positions = arange(cached, cached + ids.shape[1])",
        "without a cache nothing was cached, and the two are the same", "generation",
        (Patch(AttentionMask, "positions", wrong_code.positions_restart),), in_training=False,
    ),
    Mistake(
        "logits_from_first_position", "the next token is taken from the first position's logits instead of the last's",
        "model(ids)[:, 0]", "model(ids)[:, -1]",
        "with a cache each step reads one token, and then first and last are the same", "generation",
        (Patch(generation, "next_logits", wrong_code.logits_from_first_position),), in_training=False,
    ),
    Mistake(
        "sampling_without_softmax", "tokens are drawn from the logits as if they were probabilities",
        "torch.multinomial(logits, 1)", "torch.multinomial(softmax(logits, dim=-1), 1)",
        "greedy choice works without the softmax, and sampling is added later", "generation",
        (Patch(generation, "filtered_probabilities", wrong_code.sampling_without_softmax),), in_training=False,
    ),
)  # fmt: skip
MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in _ALL}

_active: list[Mistake] = []
_right_code: dict[tuple[Any, str], Any] = {}
_settled: set[str] = set()  # active mistakes that have acted, or of which it was said that they do not


@contextmanager
def planted(mistake: str | Mistake) -> Iterator[Mistake]:
    """Plant a mistake for the time of a `with`, also for models that exist already; taken back after an error too.

    Different ones may be nested. It acts on the whole process: in other threads as well, and not in other processes.
    A model that was *built* under `head_untied` keeps the head that it was built with: that is weights, not code.
    One that acts under some implementations of attention only (`Mistake.implementations`) warns, once in each `with`,
    if the first pass runs under another, where it changes nothing.

    Args:
        mistake: a name of `MISTAKES`, or a Mistake of your own.
    Yields:
        the Mistake.
    Raises:
        ValueError: an unknown name, with the nearest; or one that stands where another does already.
    """
    mistake = the_mistake(mistake)
    for other in _active:
        shared = {patch.spot for patch in mistake.patches} & {patch.spot for patch in other.patches}
        if mistake.name == other.name or shared:
            where = ", ".join(str(patch) for patch in mistake.patches if patch.spot in shared)
            reason = f"{other.name!r} is planted, and both change {where}"
            if mistake.name == other.name:
                reason = "it is planted already"
            raise ValueError(f"{mistake.name!r} cannot be planted: {reason}. Leave the other `with` first.")
    _active.append(mistake)
    try:
        _write()
        yield mistake
    finally:
        _active.remove(mistake)
        _settled.discard(mistake.name)
        _write()


def the_mistake(name: str | Mistake) -> Mistake:
    """The Mistake behind a name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, Mistake):
        return name
    if name not in MISTAKES:
        raise ValueError(f"unknown mistake {name!r}.{did_you_mean(name, MISTAKES)} Mistakes: {', '.join(MISTAKES)}.")
    return MISTAKES[name]


def _write() -> None:
    """Put the right code back everywhere, then each active mistake's, in the order in which they were planted."""
    for (owner, attribute), right in _right_code.items():
        setattr(owner, attribute, right)
    _right_code.clear()
    for mistake in _active:
        for patch in (*mistake.patches, *watch(mistake)):
            now = vars(patch.owner)[patch.attribute]
            _right_code.setdefault((patch.owner, patch.attribute), now)
            setattr(patch.owner, patch.attribute, patch.make(now))


def watch(mistake: Mistake) -> tuple[Patch, ...]:
    """What warns of a pass in which the mistake changes nothing, where there are such passes.

    Why not on entering: only a pass shows which implementation runs; a warning that is always there is read by nobody.
    """
    if mistake.implementations is None:
        return ()

    def make(choose: Callable) -> Callable:
        def watched_choose(settings, request):
            choice = choose(settings, request)

            def attention(*tensors, **options):
                settle(mistake, choice.chosen)
                return choice.attention(*tensors, **options)

            return replace(choice, attention=attention)

        return watched_choose

    return attention_patch(make, "watch")


def settle(mistake: Mistake, ran: str) -> None:
    """Say once, at the first pass, that a mistake does not act there."""
    if mistake.name in _settled:
        return
    _settled.add(mistake.name)
    if ran not in mistake.implementations:
        acts = mistake.implementations[0]
        logger.warning(
            "planted(%r) changes nothing here: attention ran by %s, and the mistake "
            'acts under %s only. Do: with model.using_attention("%s"), planted("%s"): ...',
            mistake.name, ran, " and ".join(mistake.implementations), acts, mistake.name,
        )  # fmt: skip
