"""By which check is a planted mistake seen, and where does it stay silent? Computed, not remembered.

Small models learn the tales, whose floor is known exactly. Each mistake is looked at in two lives: a model that is
*trained* with it from its first step, and *right weights* that are run with it, as when OpenAI's are loaded into faulty
code. `CHECKS` lists what is measured. What counts as seen is decided by the noise of the right model: the same training
from several seeds (loss, text), and its rounding against float64 (everything that compares logits).
"""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

import torch
from tqdm.auto import tqdm

from orchestrator.learning.looks import (
    IMPLEMENTATIONS,
    Settings,
    apart,
    between_cached_and_whole,
    between_implementations,
    corpus_of,
    grammatical,
    model_of,
    moved_before,
    quiet,
    train_one,
)
from orchestrator.learning.planted import Mistake, planted, the_mistake
from orchestrator.learning.reference import reference_logits
from orchestrator.training import loop

# key -> (heading, what is measured)
CHECKS = {
    "start": ("fresh: loss", "loss of a fresh model, nats per token above the floor"),
    "trained_loss": ("trained: loss", "loss after training with the mistake, nats per token above the floor"),
    "trained_text": ("trained: text", "stories that obey the grammar, written by the model trained with the mistake"),
    "right_loss": ("right weights: loss", "loss of right weights run with the mistake, nats per token above the floor"),
    "right_text": ("right weights: text", "stories that obey the grammar, right weights run with the mistake"),
    "reference": ("against float64", "largest difference of a logit from the formulas in float64, the same weights"),
    "implementations": ("eager = sdpa = tiled", "largest difference of a logit between implementations of attention"),
    "causality": ("causality", "one token is changed: largest move of a logit before it"),
    "cache": (
        "cached = whole",
        "largest difference of a logit between reading in pieces, with a KV cache, and whole",
    ),
    "repeat": ("twice the same", "largest difference of a logit between two calls on the same ids"),
}
LOSS_AND_TEXT = ("start", "trained_loss", "trained_text", "right_loss", "right_text")
DEVIATIONS = 4  # how many standard deviations of the right model's seeds are noise
LEAST_LOSS = 0.005  # nats: what luck is worth on 200 held-out stories
ROUNDINGS = 10  # how many times the right model's own rounding is noise
CEILING = 256 * torch.finfo(torch.float32).eps  # of the largest logit; more is no rounding, even in the right model
TOO_GOOD, NOT_MET = "too good to be true", "training does not meet it"
ERRORS = (ValueError, TypeError, RuntimeError, IndexError, FloatingPointError)
NOTHING = Mistake("nothing", "the right model", "", "", "", "model", (), in_training=False)


@dataclass(frozen=True)
class Right:
    """The right model, trained from several seeds: what is normal, and how much of it is luck.

    Attributes:
        settings: how it was trained.
        weights: the first seed's, as arrays, so that another process can have them.
        start, gap, text: of each seed: loss above the floor before and after training, part of the stories that obey.
        rounding: its largest difference from float64, in a logit; largest: its largest logit.
    """

    settings: Settings
    weights: dict
    start: list[float]
    gap: list[float]
    text: list[float]
    rounding: float
    largest: float

    def normal(self, check: str) -> tuple[float, float]:
        """(what is expected, how far from it is still noise)."""
        if check not in LOSS_AND_TEXT:
            return 0.0, min(ROUNDINGS * self.rounding, CEILING * self.largest)
        values = {"start": self.start, "trained_text": self.text, "right_text": self.text}.get(check, self.gap)
        spread = DEVIATIONS * statistics.stdev(values)
        expected = (
            values[0] if check.startswith("right") else statistics.mean(values)
        )  # the right weights are the first
        return expected, spread if check.endswith("text") else max(spread, LEAST_LOSS)


@dataclass(frozen=True)
class Finding:
    """What one check gave. value: None where it does not apply or raised; note: an error, or what else was seen."""

    value: float | None
    seen: bool
    note: str = ""


@dataclass(frozen=True)
class Symptoms:
    """One row of the table. `findings` has an entry for each of CHECKS."""

    name: str
    findings: dict[str, Finding]

    @property
    def seen(self) -> list[str]:
        return [check for check, finding in self.findings.items() if finding.seen]

    @property
    def silent(self) -> list[str]:
        """The checks that were made and saw nothing."""
        return [check for check, found in self.findings.items() if not found.seen and found.value is not None]

    @property
    def verdict(self) -> str:
        """One line: who sees it."""
        if not self.seen:
            return "silent in everything"
        words = ["seen by " + ", ".join(CHECKS[check][0] for check in self.seen)]
        if TOO_GOOD in (self.findings["trained_loss"].note, self.findings["right_loss"].note):
            words.insert(0, TOO_GOOD)
        if not set(self.seen) & set(LOSS_AND_TEXT):
            words.insert(0, "silent in loss and text")
        elif self.findings["trained_loss"].note == NOT_MET:
            words.insert(0, NOT_MET)
        elif not set(self.seen) & {"start", "trained_loss", "trained_text"}:
            words.insert(0, "learned around")
        if any(finding.value is None and finding.seen for finding in self.findings.values()):
            words.append("it stops with an error")
        return "; ".join(words)

    def as_dict(self) -> dict:
        findings = {check: asdict(finding) for check, finding in self.findings.items()}
        return {"name": self.name, "verdict": self.verdict, "findings": findings}


def symptoms(mistake: str | Mistake, right: Right) -> Symptoms:
    """Which checks see a mistake.

    Args:
        mistake: a name of `planted.MISTAKES`, or a Mistake of your own.
        right: from `right_model`.
    """
    mistake, settings = the_mistake(mistake), right.settings
    corpus, measured = corpus_of(settings), {}
    with quiet():
        measured |= trained(mistake, settings)
        model = model_of(settings, mistake)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in right.weights.items()})
        ids = corpus.validation[0][0][:8, :40]  # (B=8, T=40), no padding: stories are longer
        expected = reference_logits(model.state_dict(), model.cfg, ids)
        with planted(mistake), torch.no_grad():
            looks = {
                "right_loss": lambda: loop.evaluate(model, corpus.validation) - corpus.floor,
                "right_text": lambda: grammatical(model, corpus, settings),
                "reference": lambda: apart(model(ids), expected),
                "implementations": lambda: between_implementations(model, ids),
                "causality": lambda: moved_before(model, ids),
                "cache": lambda: between_cached_and_whole(model, ids),
                "repeat": lambda: apart(model(ids), model(ids)),
            }
            torch.manual_seed(settings.seed)  # for a mistake that draws
            measured |= {check: attempt(look) for check, look in looks.items()}
    return Symptoms(mistake.name, {check: judge(check, measured[check], right) for check in CHECKS})


def right_model(settings: Settings, each: Callable = map) -> Right:
    """Train the right model from its seeds. `each`: map, or another process's."""
    runs = list(each(right_run, [replace(settings, seed=settings.seed + i) for i in range(settings.right_seeds)]))
    columns = {key: [run[key] for run in runs] for key in ("start", "gap", "text")}
    extremes = {key: max(run[key] for run in runs) for key in ("rounding", "largest")}
    return Right(settings, runs[0]["weights"], **columns, **extremes)


def right_run(settings: Settings) -> dict:
    corpus = corpus_of(settings)
    with quiet():
        model, history = train_one(settings, None)
        ids = corpus.validation[0][0][:8, :40]
        expected = reference_logits(model.state_dict(), model.cfg, ids)
        with torch.no_grad():
            errors = []
            for name in IMPLEMENTATIONS:
                with model.using_attention(name):
                    errors.append(apart(model(ids), expected))
        return {
            "start": history.validation[0][1] - corpus.floor,
            "gap": history.validation[-1][1] - corpus.floor,
            "text": grammatical(model, corpus, settings),
            "rounding": max(errors),
            "largest": expected.abs().max().item(),
            "weights": {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()},
        }


def table(
    names: list[str], settings: Settings, *, jobs: int = 1, progress: bool = True
) -> tuple[Right, list[Symptoms]]:
    """The right model; and a row for each mistake, behind one for `NOTHING`, in which no check may see anything.

    Args:
        names: of `planted.MISTAKES`.
        jobs: processes. The numbers are the same for any.
        progress: show a bar.
    """
    for name in names:
        the_mistake(name)
    bar = tqdm(total=settings.right_seeds + len(names), desc="models", unit="model", disable=not progress)

    def shown(results: Iterator) -> Iterator:
        for result in results:
            bar.update()
            yield result

    with bar:
        if jobs == 1:
            right = right_model(settings, lambda *work: shown(map(*work)))
            return right, [symptoms(NOTHING, right), *shown(symptoms(name, right) for name in names)]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # a planted mistake fills a process
            right = right_model(settings, lambda *work: shown(pool.map(*work)))
            return right, [symptoms(NOTHING, right), *shown(pool.map(symptoms, names, [right] * len(names)))]


# ------------------------------------------------------------------ what is measured


def trained(mistake: Mistake, settings: Settings) -> dict:
    """start, trained_loss, trained_text. A mistake that training does not meet is looked at before training only."""
    corpus = corpus_of(settings)
    if not mistake.in_training:
        with planted(mistake):
            torch.manual_seed(settings.seed)
            fresh = model_of(settings, mistake)
            start = attempt(lambda: loop.evaluate(fresh, corpus.validation) - corpus.floor)
        return {"start": start, "trained_loss": None, "trained_text": None}
    with planted(mistake):
        outcome = attempt(lambda: train_one(settings, mistake))
        if isinstance(outcome, Exception):
            return {"start": outcome, "trained_loss": outcome, "trained_text": outcome}
        model, history = outcome
        (_, start), *_, (_, end) = history.validation
        text = attempt(lambda: grammatical(model, corpus, settings))
    return {"start": start - corpus.floor, "trained_loss": end - corpus.floor, "trained_text": text}


# ------------------------------------------------------------------ what is judged


def attempt(look: Callable):
    """What `look()` gives, or the error that it raises: an error is a symptom too."""
    try:
        return look()
    except ERRORS as error:
        return error


def judge(check: str, measured, right: Right) -> Finding:
    """What a measured figure means. (figure, note): what the note says was seen besides."""
    if measured is None:
        return Finding(None, False, NOT_MET)
    if isinstance(measured, Exception):
        return Finding(None, True, f"{type(measured).__name__}: {str(measured).splitlines()[0]}")
    measured, note = measured if isinstance(measured, tuple) else (measured, "")
    expected, noise = right.normal(check)
    if check.endswith("text"):  # better than usual is no symptom
        return Finding(measured, measured < expected - noise)
    if check in ("trained_loss", "right_loss") and measured < -LEAST_LOSS:  # below the floor
        return Finding(measured, True, TOO_GOOD)
    return Finding(measured, bool(note) or not abs(measured - expected) <= noise, note)  # not <=: NaN is seen
