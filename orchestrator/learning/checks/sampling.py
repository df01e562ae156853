"""Exercises `sampling_probabilities` and `sample`: from logits to the next token, and how that goes wrong.

Drawing is judged by what is drawn: 20,000 rows with the same logits, whose frequencies must be the probabilities to
within five standard deviations. So any way of drawing is right that is right.
"""

import torch

from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers, Symptom

ROWS = 20_000
FIVE_SIGMA = 5 * 0.5 / ROWS**0.5  # of a frequency whose probability is 1/2, where it scatters most


def sampling_probabilities(
    logits, temperature, top_k, top_p, *, heat="divide", keep_k="k", cut_k="before", cut_p="the last stays",
    renormalised=True, order="k, p", from_top=True, put_back=True, top_p_from="heated", stable=True,
):  # fmt: skip
    V = logits.shape[-1]
    if temperature == 0 and heat != "nan":
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), V).to(logits.dtype)
    heated = logits * temperature if heat == "multiply" else logits if heat == "forgotten" else logits / temperature

    def softmax(of):
        of = of - of.amax(dim=-1, keepdim=True) if stable else of
        return of.exp() / of.exp().sum(dim=-1, keepdim=True)

    if keep_k == "forgotten" or top_k is None:
        top_k = V
    by_k = heated.argsort(dim=-1, descending=from_top).argsort(dim=-1) < top_k + (keep_k == "k + 1")
    before_k = softmax(heated)
    whole = softmax(heated.masked_fill(~by_k, -torch.inf)) if cut_k == "before" else before_k * by_k
    if top_p is None or top_p >= 1 or cut_p == "forgotten":
        return whole
    basis = {"k, p": whole, "p, k": before_k}[order]
    if top_p_from == "cold":
        basis = softmax(logits.masked_fill(~by_k, -torch.inf))
    ordered, places = basis.sort(dim=-1, descending=from_top)
    reached = ordered.cumsum(dim=-1)
    cut = reached > top_p if cut_p == "the last goes" else reached - ordered > top_p
    cut[..., 0] = cut[..., 0] & (cut_p != "the last stays")
    if not put_back:
        cut_sorted = whole.sort(dim=-1, descending=True).values.masked_fill(cut, 0.0)
        return cut_sorted / cut_sorted.sum(dim=-1, keepdim=True)
    kept = whole.masked_fill(torch.zeros_like(cut).scatter(-1, places, cut), 0.0)
    return kept / kept.sum(dim=-1, keepdim=True) if renormalised else kept


def probability_cases() -> list[Case]:
    def case(label, seed, B, V, temperature=1.0, top_k=None, top_p=None, scale=1.5, dtype=torch.float32):
        logits = Numbers(seed, dtype)(B, V, scale=scale)
        return Case(label, {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p})

    return [
        case("temperature 1", 70, 2, 9),
        case("temperature 0.5", 71, 3, 7, temperature=0.5),
        case("temperature 2", 72, 1, 12, temperature=2.0),
        case("temperature 0: greedy", 73, 3, 8, temperature=0.0),
        case("temperature 0.01", 74, 2, 6, temperature=0.01, scale=4.0),
        case("top-k 3", 75, 2, 9, top_k=3),
        case("top-k 1", 76, 2, 5, top_k=1),
        case("top-k 50 of 6", 77, 1, 6, top_k=50),
        case("top-p 0.7", 78, 3, 10, top_p=0.7),
        case("top-p 0.05: only the likeliest", 79, 2, 8, top_p=0.05),
        case("top-p 1", 80, 1, 8, top_p=1.0),
        case("temperature 2, top-k 5, top-p 0.6", 81, 4, 12, temperature=2.0, top_k=5, top_p=0.6),
        case("temperature 0.6, top-p 0.8", 82, 4, 12, temperature=0.6, top_p=0.8),
        case("float64, top-k 4, top-p 0.9", 83, 2, 10, top_k=4, top_p=0.9, dtype=torch.float64),
    ]


SAMPLING_PROBABILITIES = Exercise(
    "sampling_probabilities", "sampling", 8, sampling_probabilities, probability_cases, ("(B, vocab_size)",),
    (
        Mistake("temperature_multiplied",
                "the logits are multiplied by the temperature; divide: a high temperature makes the distribution "
                "flat.", ({"heat": "multiply"},)),
        Mistake("temperature_forgotten", "the temperature is not used.", ({"heat": "forgotten"},)),
        Mistake("nan_at_temperature_0",
                "temperature 0 divides by 0. It means greedy: probability 1 for the likeliest token.",
                ({"heat": "nan"},)),
        Mistake("no_maximum",
                "exp of large logits is inf, and inf / inf is NaN: subtract each row's maximum first, as "
                "torch.softmax does.", ({"stable": False},)),
        Mistake("top_k_forgotten", "top_k is not used.", ({"keep_k": "forgotten"},)),
        Mistake("top_k_one_too_many", "top_k + 1 tokens stay.", ({"keep_k": "k + 1"},)),
        Mistake("top_k_not_renormalised",
                "after top-k the rest does not sum to 1: set the *logits* of the others to -inf before the softmax, "
                "or divide by the sum.", ({"cut_k": "after"},)),
        Mistake("top_p_forgotten", "top_p is not used.", ({"cut_p": "forgotten"},)),
        Mistake("top_p_drops_the_crossing_token",
                "the token whose probability crosses top_p is dropped. It stays: the kept tokens' probabilities sum "
                "to top_p *at least*.", ({"cut_p": "the last goes"},)),
        Mistake("top_p_not_renormalised",
                "after top-p the rest does not sum to 1: divide by its sum.", ({"renormalised": False},)),
        Mistake("top_p_before_top_k",
                "top-p adds up the probabilities of all tokens, those that top-k has cut included. The usual order "
                "is temperature, top-k, softmax, top-p.", ({"order": "p, k"},)),
        Mistake("top_p_before_temperature",
                "top-p is decided by the probabilities at temperature 1. First the temperature, then the cut.",
                ({"top_p_from": "cold"},)),
        Mistake("least_likely_kept",
                "sorted the wrong way round: the unlikely tokens are kept.", ({"from_top": False},)),
        Mistake("sorted_order_returned",
                "the probabilities come back sorted, so that they belong to other tokens: put them back in place "
                "(scatter).", ({"put_back": False},)),
    ),
    "notebooks/generation.ipynb, sections 2 and 3",
)  # fmt: skip


# ------------------------------------------------------------------ drawing


def observe_drawing(function, arguments) -> torch.Tensor:
    """Frequencies over ROWS rows of the same logits; what is wrong with the way of drawing is raised as a Symptom."""
    logits = arguments["logits"]
    many = logits.expand(ROWS, -1)

    def draw(seed):
        others = {name: value for name, value in arguments.items() if name != "logits"}
        return function(logits=many, **others, generator=torch.Generator().manual_seed(seed))

    global_state = torch.get_rng_state()
    ids = draw(1)
    if not isinstance(ids, torch.Tensor):
        return ids
    if tuple(ids.shape) != (ROWS,):
        raise Symptom("wrong_shape", f"got {tuple(ids.shape)} for {ROWS} rows of logits; wanted: ({ROWS},)")
    if ids.dtype != torch.int64:
        raise Symptom("wrong_dtype", f"got {ids.dtype}; wanted: torch.int64")
    greedy = arguments["temperature"] == 0
    if not torch.equal(ids, draw(1)) or (not greedy and not torch.equal(global_state, torch.get_rng_state())):
        torch.set_rng_state(global_state)
        raise Symptom("generator_ignored")
    if not greedy and len(ids.unique()) == 1:
        likeliest = all(bool((draw(seed) == logits.argmax()).all()) for seed in range(2, 12))
        raise Symptom("always_greedy" if likeliest else "one_draw_for_all_rows")
    if ids.min() < 0 or ids.max() >= logits.shape[-1]:
        raise Symptom("not_an_id")
    return torch.bincount(ids, minlength=logits.shape[-1]) / ROWS


def expect_drawing(formula, arguments, **changes) -> torch.Tensor:
    return formula(**arguments, **changes)[0]


def drawing_probabilities(logits, temperature, top_k, top_p, *, even=False, **changes):
    probabilities = sampling_probabilities(logits, temperature, top_k, top_p, **changes)
    return (probabilities > 0) / (probabilities > 0).sum(dim=-1, keepdim=True) if even else probabilities


def drawing_cases() -> list[Case]:
    def case(label, temperature=1.0, top_k=None, top_p=None):
        logits = torch.tensor([[0.3, 1.4, -0.6, 1.9, 0.9, -1.1]])
        return Case(label, {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p})

    return [
        case("temperature 1"),
        case("temperature 0: greedy", temperature=0.0),
        case("temperature 0.5", temperature=0.5),
        case("top-k 3", top_k=3),
        case("top-p 0.6", top_p=0.6),
    ]


SAMPLE = Exercise(
    "sample", "sampling", 4, drawing_probabilities, drawing_cases, ("(B,), torch.int64",),
    (
        Mistake("generator_ignored",
                "the generator is not used: the same generator twice gives different ids, or torch's global state "
                "was moved. Pass it on: torch.multinomial(..., generator=generator)."),
        Mistake("one_draw_for_all_rows", "all rows got the same id from one draw. Each row draws by itself."),
        Mistake("always_greedy", "it always takes the likeliest token; at a temperature above 0 it must draw."),
        Mistake("not_an_id", "an id below 0 or beyond the vocabulary came back."),
        Mistake("drawn_evenly",
                "all tokens that are left are drawn equally often: draw by their probabilities.", ({"even": True},)),
        Mistake("temperature_forgotten", "what is drawn does not depend on the temperature.", ({"heat": "forgotten"},)),
        Mistake("temperature_multiplied",
                "the logits are multiplied by the temperature; divide.", ({"heat": "multiply"},)),
        Mistake("top_k_forgotten", "top_k is not used.", ({"keep_k": "forgotten"},)),
        Mistake("top_p_forgotten", "top_p is not used.", ({"cut_p": "forgotten"},)),
    ),
    "notebooks/generation.ipynb, sections 2 and 3",
    observe=observe_drawing,
    expect=expect_drawing,
    bound=FIVE_SIGMA,
    also_given=("generator",),
)  # fmt: skip
