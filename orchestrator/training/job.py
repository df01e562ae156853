"""One training run, from the options to the folder that it leaves: `python train.py`, `python -m orchestrator train`.

Everything that can be wrong is looked at before the first step: the options, the data, the model, the device, the
folder, and what is resumed. Then `loop.train` does the work.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from CMHA.choosing import attention_report
from GPT2Model.config import KEYS
from GPT2Model.files import replace_text
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.machine import check_device, describe_attention, describe_machine, machine_facts
from orchestrator.report import make_folder, plain
from orchestrator.text.documents import NAMES
from orchestrator.text.samples import Samples, open_samples
from orchestrator.text.tokenizers import fingerprint, tokenizer_facts
from orchestrator.training import checkpoint, metrics, mfu, profiling
from orchestrator.training.final import save_final
from orchestrator.training.job_model import cfg_of, make_model, weights_folder
from orchestrator.training.job_process import alone_in, stop_signal
from orchestrator.training.loop import History, start, train
from orchestrator.training.options import SETTINGS_FILE, SHAPE, Options, run_folder, save_options
from orchestrator.training.precision import resolve_dtype
from orchestrator.training.settings import TrainSettings
from orchestrator.training.state import TrainState
from orchestrator.training.watch import ProgressBar, Several, Watch
from orchestrator.views.run_figures import save_run_figures

EXIT_OF = {"SIGTERM": 143, "Ctrl-C": 130}  # what a shell reports of a program that a signal ended
FAILED = 1

logger = logging.getLogger("orchestrator")


@dataclass(frozen=True)
class Job:
    """A run that was looked at and can begin.

    Attributes:
        options: with nothing left open but what None means. settings: of the loop.
        out: the folder of the run. samples, model, device, dtype: what learns from what, where.
        resumed: the checkpoint to go on from, None: from the beginning.
    """

    options: Options
    settings: TrainSettings
    out: Path
    samples: Samples
    model: GPTModel
    device: str
    resumed: Path | None

    @property
    def max_length(self) -> int:
        return self.options.max_length


def run(options: Options) -> int:
    """Train as the options say, and leave a folder; the exit code is returned.

    Returns:
        0: trained. 1: the loss was no number any more, or the last save failed. 130, 143: stopped by Ctrl-C or
        SIGTERM, and saved.
    Raises:
        ValueError, FileNotFoundError, OSError, ImportError: what is wrong, before anything was trained.
    """
    out = folder_of(options)
    with alone_in(out):
        return run_job(assemble(replace(options, out=str(out))))


def folder_of(options: Options) -> Path:
    """Where the run is, or will be."""
    if options.out is None and options.resume == "auto":
        raise ValueError("--resume auto looks in the folder of the run: say which, with --out DIR.")
    return Path(options.out or Path("runs") / datetime.now().strftime("train-%Y-%m-%d_%H%M%S"))


def run_job(job: Job) -> int:
    say_what_happens(job)
    state = start(job.model, job.settings)
    if job.resumed is not None:
        checkpoint.restore(job.resumed, state)
        go_on(job, state)
    watch = watchers(job, state)
    save_options(with_absolute_paths(job.options), job.out / SETTINGS_FILE)
    kept = checkpoint.Checkpoints(
        job.out / "checkpoints", every=job.options.save_steps, keep_last=job.options.keep_last, facts=facts_of(job)
    )
    with stop_signal() as asked:  # until the last byte is on the disk
        try:
            history = train(
                job.model, job.samples, job.settings, state=state, watch=watch, checkpoints=kept,
                write=lambda model: write(model, job), sample_steps=job.options.sample_steps, stop=asked,
            )  # fmt: skip
        except FloatingPointError as error:
            print(f"error: {error}\n{kept.wait() or 'saved: ' + str(kept.folder)}", file=sys.stderr)
            if (before := kept.healthy()) is not None:
                print(f"from before it went wrong: --resume {before} --learning_rate LOWER", file=sys.stderr)
            return FAILED
        finally:
            failure = kept.wait()
        return finish(job, state, history, failure)


def go_on(job: Job, state: TrainState) -> None:
    """Say from where the run goes on.

    Raises:
        ValueError: it has more steps behind it than it is to have.
    """
    done, wanted = state.counters.step, job.settings.max_steps
    if done > wanted:
        raise ValueError(
            f"{job.resumed} has {done} steps behind it already: --max_steps {wanted} would take some back."
        )
    all_done = " (all that were asked for: --max_steps makes it longer)" if done == wanted else ""
    print(f"resumed from {job.resumed}, after step {done}{all_done}", flush=True)


def assemble(options: Options) -> Job:
    """Look at everything before the work: raises for what is wrong, with what to do."""
    out = folder_of(options)
    options = replace(options, model=weights_folder(options.model))
    resumed = what_to_resume(options, out)
    device = check_device(options.device)
    sizes = cfg_of(options)
    options = replace(options, out=str(out), max_length=options.max_length or sizes["context_length"], device=device)
    if not Path(options.model).is_dir():  # what the preset decided, for those who read the settings
        decided = (*SHAPE, "drop_rate", "attn_implementation")
        options = replace(options, use_flash_attention=False, **{name: sizes[name] for name in decided})
    settings = options.train_settings(sizes["emb_dim"], options.max_length, device)
    settings = replace(settings, dtype=resolve_dtype(settings.dtype, device))
    samples = open_samples(
        options.dataset, options.tokenizer, options.max_length, options.seed, options.data_dir, options.pack_documents
    )
    options = replace(options, tokenizer=samples.tokenizer.name, **{
        name: getattr(settings, name) for name in ("dtype", "batch_size", "learning_rate", "warmup_steps")
    })  # fmt: skip
    samples.batch(0, settings.batch_size)  # a batch larger than the data shows here
    prompt_ids(options, samples)
    model = make_model(options, sizes, samples.tokenizer, device)
    make_folder(out)
    job = Job(options, settings, out, samples, model, device, resumed)
    if resumed is not None:
        checkpoint.check_same_run(resumed, facts_of(job))
    return job


def what_to_resume(options: Options, out: Path) -> Path | None:
    """The checkpoint to go on from, if that is asked for and there is one.

    Raises:
        ValueError: the folder holds a run already, and nobody said to go on with it.
        FileNotFoundError: there is nothing to resume from.
    """
    place = out / "checkpoints"
    if options.resume is None:
        if place.is_dir() and any(place.iterdir()):
            raise ValueError(
                f"{out} holds a run already: --resume auto goes on with it, another --out begins a new one."
            )
        return None
    if options.resume == "auto":
        return checkpoint.find(place)
    given = Path(options.resume).expanduser()
    if given.is_dir() and given.resolve() != run_folder(given).resolve() and given.parent.name != "checkpoints":
        raise ValueError(f"--resume {given} is no checkpoint: pass {run_folder(given)}, or a checkpoints/step-N in it.")
    if given.resolve() == run_folder(given).resolve():
        found = checkpoint.find(given / "checkpoints")
        if found is None:
            raise FileNotFoundError(f"--resume {given}: it has no checkpoints yet.")
        return found
    checkpoint.verify(given)
    return given


def with_absolute_paths(options: Options) -> Options:
    """Paths that hold from any folder: a run may be resumed from another."""
    model, dataset = options.model, options.dataset
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    if dataset not in NAMES and (Path(dataset).exists() or "*" in dataset):
        dataset = str(Path.cwd() / dataset)
    return replace(options, model=model, dataset=dataset, data_dir=str(Path(options.data_dir).resolve()))


def facts_of(job: Job) -> dict:
    """What a checkpoint must say of its run, so that it can be opened alone, and is never gone on with as another."""
    return {
        "cfg": job.model.cfg,
        "tokenizer": tokenizer_facts(job.samples.tokenizer),
        "tokenizer_fingerprint": fingerprint(job.samples.tokenizer),
        "data": getattr(job.samples, "content", job.samples.name),  # what is read, under whatever path it lies
        "options": asdict(job.options),
        "settings": asdict(job.settings),
        "attention": job.model.attention_report()["chosen"],
    }


def say_what_happens(job: Job) -> None:
    """The run in a few lines, before it begins."""
    model, settings = job.model, job.settings
    for line in describe_machine(job.device):
        print(line)
    print(f"model: {called(job)}, {model.num_parameters():,} parameters, sequences of {job.max_length} tokens")
    print(f"data: {job.samples.describe()}")
    for line in describe_attention(model):
        print(line)
    tokens = settings.samples_per_step * job.max_length
    print(
        f"{settings.max_steps} steps of {settings.samples_per_step} x {job.max_length} = {tokens:,} tokens, "
        f"{settings.dtype}, {settings.optimizer}, learning rate {settings.learning_rate:.2g}"
    )
    print(f"folder: {job.out}", flush=True)


def called(job: Job) -> str:
    """The model in a few words: what was asked for, and what in it is not as in GPT-2."""
    cfg = job.model.cfg
    others = [cfg[name] for name in ("norm", "mlp", "positions") if cfg[name] != KEYS[name].default]
    if cfg["n_kv_heads"] not in (None, cfg["n_heads"]):
        others.append(f"n_kv_heads {cfg['n_kv_heads']}")
    return f"{job.options.model} with {', '.join(others)}" if others else job.options.model


def watchers(job: Job, state: TrainState) -> Watch:
    """A bar on the screen, JSON lines in the folder, and what else was asked for."""
    options, cfg = job.options, job.model.cfg
    peak = mfu.peak_flops(job.device, job.settings.dtype)
    rate = (cfg, job.max_length, peak)
    step = state.counters.step if job.resumed else None
    found: list[Watch] = [ProgressBar(rate), metrics.JsonLines(job.out / "metrics.jsonl", step, rate)]
    if options.tensorboard:
        found.append(metrics.TensorBoard(job.out / "tensorboard", step, rate))
    if options.wandb:
        found.append(metrics.WeightsAndBiases(job.out, asdict(options), resumed=job.resumed is not None, rate=rate))
    if options.profile:
        found.append(profiling.Profile(job.out / "profile", job.device))
    return Several(*found)


def prompt_ids(options: Options, samples: Samples) -> torch.Tensor:
    """What the samples of a run continue, (1, t) ids.

    Raises:
        ValueError: an empty prompt, or one that the tokenizer cannot encode.
    """
    if options.prompt is None:
        return samples.prompt()
    ids = samples.tokenizer.encode(options.prompt)
    if not ids:
        raise ValueError("--prompt is empty: give it a word, or leave it out: then the held-out text is continued.")
    return torch.tensor([ids])


@torch.compiler.set_stance("force_eager")  # prompts of many lengths: each would be compiled anew
def write(model: GPTModel, job: Job, new_tokens: int = 60) -> str:
    """A short sample: the prompt in brackets, and what the model makes of it. One seed, whatever else is random."""
    tokenizer = job.samples.tokenizer
    prompt = prompt_ids(job.options, job.samples)
    prompt = prompt[:, -(model.cfg["context_length"] // 2) :].to(job.device)
    settings = {"seed": job.options.seed, "stop_tokens": tokenizer.end_of_text, "past_context": "slide"}
    ids = generate(model, prompt, new_tokens, 0.8, **settings)[0].tolist()
    start_, new = ids[: prompt.shape[1]], ids[prompt.shape[1] :]
    new = new[: new.index(tokenizer.end_of_text)] if tokenizer.end_of_text in new else new
    return f"[{tokenizer.decode(start_)}]{tokenizer.decode(new)}"


def finish(job: Job, state: TrainState, history: History, failure: str | None) -> int:
    """The model if the run came to its end, first of all; then the figures, and a few lines."""
    counters, final = state.counters, job.out / "final"
    problems = [] if failure is None else [failure]
    if history.stopped is None:
        try:
            save_final(job.model, job.samples.tokenizer, final)
            facts = {
                "counters": asdict(counters),
                "machine": machine_facts(job.device),
                "attention": attention_report(),
            }
            replace_text(job.out / "report.json", json.dumps(plain(facts), indent=2) + "\n")
        except OSError as error:
            problems.append(f"the trained model could not be written: {error}")
    draw(job)
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return FAILED
    if history.stopped is not None:
        print(f"stopped by {history.stopped} after step {counters.step}, saved. To go on: --resume {job.out}")
        return EXIT_OF[history.stopped]
    if state.validation_loss is not None:
        floor = floor_of(job)
        known = f"; the exact floor is {floor:.4f}" if floor is not None else ""
        best = (
            f"best {counters.best_loss:.4f} after step {counters.best_step}" if counters.best_step is not None else ""
        )
        print(f"validation loss {state.validation_loss:.4f} nats per token{known}; {best}")
    since = f", {history.seconds:.0f} s of it since it was resumed" if job.resumed else f" in {history.seconds:.0f} s"
    print(f"{counters.tokens:,} tokens{since}; steps skipped: {counters.skipped}")
    print(
        f"the model, as it is after the last step: {final}; open_trained({str(job.out)!r}) opens it (docs/TRAINING.md)"
    )
    return 0


def draw(job: Job) -> None:
    """The figures of the run. That they cannot be written costs nothing but themselves."""
    try:
        figures = save_run_figures(
            job.out / "metrics.jsonl", job.out / "figures", title=f"{called(job)} on {job.samples.name}",
            floor=floor_of(job), clip=job.settings.clip,
        )  # fmt: skip
        print(f"figures: {', '.join(str(path) for path in figures)}")
    except OSError as error:
        logger.warning("the figures could not be written: %s", error)


def floor_of(job: Job) -> float | None:
    """The exact loss that a perfect model would have on what is looked at, where it is known: on the tales."""
    samples = job.samples
    return samples.floor_of(job.settings.eval_tokens) if samples.floor is not None else None
