"""Options: everything that `train.py` can be told, as one typed dataclass: from the command line, or from a TOML file.

Each field is an option of the same name; `tyro` makes the command line of it, and its help of the comments here.
"""

import difflib
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import tomli_w
import tyro

from GPT2Model.files import replace_text
from orchestrator.training.settings import TrainSettings

# Options that decide the shape of fresh weights, under the names of the cfg dict; a folder's weights have theirs.
SHAPE = ("n_layers", "n_heads", "emb_dim", "n_kv_heads", "norm", "mlp", "positions")
SETTINGS_FILE = "settings.toml"  # in the folder of a run: what it was told, and what followed
EXIT_CODES = (
    "Exit codes: 0 trained; 1 the loss was no number any more, or the last save failed; 2 the command or its input was "
    "wrong; 130 or 143: stopped by Ctrl-C or SIGTERM, and saved (--resume goes on)."
)
TOKENS = {"cpu": 1024}  # in one forward pass, if nobody says how many sequences: a step of GPT-2 124M in seconds
TOKENS_ELSEWHERE = 8192  # on a GPU, which is slow where it is given little


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a GPT-2: from a text to a folder with the model, its figures, and checkpoints to go on from."""

    # a preset with fresh weights: nano, tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a folder with weights
    model: str = "nano"
    # tales, python-docs, wikitext, openwebtext, tinystories, fineweb-edu, or OWNER/NAME on the hub; a text, JSONL or
    # parquet file, a folder or a glob of them; or a folder that `prepare` wrote
    dataset: str = "tales"
    # gpt2, char or bytes; None: gpt2, and for tales its own
    tokenizer: str | None = None
    # where local copies of data sets are looked for, and prepared tokens are kept
    data_dir: str = "data"
    # texts that share a window do not see each other
    pack_documents: bool = False
    # tokens in a sequence; None: the model's context_length
    max_length: int | None = None
    # another depth than the preset's
    n_layers: int | None = None
    # another number of heads than the preset's
    n_heads: int | None = None
    # another width than the preset's
    emb_dim: int | None = None
    # key-value heads, each shared by a group of heads; must divide the number of heads; None: as many as heads
    n_kv_heads: int | None = None
    # what normalises: layernorm (GPT-2) or rmsnorm; None: the model's
    norm: str | None = None
    # the feed-forward layer: gelu (GPT-2, by tanh), gelu_exact (by erf) or swiglu; None: the model's
    mlp: str | None = None
    # learned (GPT-2: a vector is added to the embedding) or rope (queries and keys are turned); None: the model's
    positions: str | None = None
    # dropout; None: 0 for fresh weights, which see a text about once, and for a folder's what its model has
    drop_rate: float | None = None

    # auto, eager, sdpa, flash_tiled, flash_triton, flash_attention_2, flash_attention_3, flex_attention or
    # paged_attention; `python -m orchestrator doctor` says which can be used here; None: auto
    attn_implementation: str | None = None
    # deprecated: write --attn_implementation flash_attention_2
    use_flash_attention: bool = False
    # fail, instead of falling back, when that implementation cannot serve
    attn_strict: bool = False
    # allow sdpa on Apple's MPS, where it gave NaN with left padding
    disable_mps_fix: bool = False

    # steps of the optimizer
    max_steps: int = 1000
    # sequences in one forward pass; None: as many as make 1024 tokens on a CPU, 8192 elsewhere
    batch_size: int | None = None
    # forward and backward passes in one step
    gradient_accumulation_steps: int = 1
    # the highest rate; None: 6e-4 at GPT-2's width of 768, and more for narrower models, 6e-4 * 768 / emb_dim; a tenth
    # of it for a folder's weights
    learning_rate: float | None = None
    # steps of linear rise to it; None: a twentieth of max_steps
    warmup_steps: int | None = None
    # how the rate falls: cosine, wsd (warmup, stable, decay) or constant
    schedule: str = "cosine"
    # the last step's rate, as a part of the highest
    min_lr_ratio: float = 0.1
    # of the run, how much is the fall of wsd
    decay_part: float = 0.2
    # adamw; or muon for the matrices of the blocks, and adamw for the rest
    optimizer: str = "adamw"
    # pulls 2-D weights towards zero
    weight_decay: float = 0.1
    # AdamW's two memories
    betas: tuple[float, float] = (0.9, 0.95)
    # gradients longer than this are scaled down to it
    clip: float = 1.0
    # so many steps in a row whose loss or gradient is no number end the run; each of them is skipped
    max_bad_steps: int = 5
    # of weights, dropout, and the order of the data
    seed: int = 0

    # cpu, cuda, cuda:1, mps, or auto: the best here
    device: str = "auto"
    # of the matrix products: fp32, bf16, fp16, or auto: what the processor does natively
    dtype: str = "auto"
    # torch.compile: a slow first step, faster ones after it
    compile: bool = False
    # less memory: each block is computed again in the backward pass
    activation_checkpointing: bool = False
    # less memory: the loss over so many tokens at a time; 0: all at once, faster on a CPU
    loss_chunk_tokens: int = 0

    # steps between two looks at the validation split
    eval_steps: int = 100
    # predicted tokens in one look
    eval_tokens: int = 32_768
    # look before the first step too
    eval_on_start: bool = False
    # steps between two samples of what the model writes; 0: only at the end
    sample_steps: int = 0
    # what the samples continue; None: the start of the held-out text
    prompt: str | None = None
    # write a trace of a few steps, and of the memory
    profile: bool = False
    # write logs for TensorBoard too (extra: train)
    tensorboard: bool = False
    # report to Weights & Biases too, if it is installed
    wandb: bool = False

    # the folder of the run; None: runs/train-DATE_TIME
    out: str | None = None
    # steps between two checkpoints; there is one more at the end
    save_steps: int = 200
    # so many checkpoints are kept, and the best of them
    keep_last: int = 2
    # auto: go on from the newest checkpoint in --out, if there is one; or the folder of a run, or of a checkpoint
    resume: str | None = None
    # a TOML file with these options; what stands on the command line comes before it
    config: str | None = None

    def train_settings(self, emb_dim: int, tokens: int, device: str = "cpu") -> TrainSettings:
        """The knobs of the loop, with what was left open decided by the model's width, its sequences, and the device.

        Raises:
            ValueError: every number that makes no sense, at once.
        """
        usual = 6e-4 * 768 / emb_dim * (0.1 if Path(self.model).is_dir() else 1.0)
        rate = usual if self.learning_rate is None else self.learning_rate
        follows = max(0, self.max_steps // 20)  # not below 0: of a negative max_steps nothing but that is said
        warmup = follows if self.warmup_steps is None else self.warmup_steps
        room = TOKENS.get(device, TOKENS_ELSEWHERE)
        batch_size = max(1, room // tokens) if self.batch_size is None else self.batch_size
        names = {field.name for field in fields(TrainSettings)} & {field.name for field in fields(Options)}
        shared = {name: getattr(self, name) for name in names}
        low = {"sample_steps": 0, "save_steps": 1, "keep_last": 1}
        given = {name: getattr(self, name) for name in low}
        found = [f"{name} must be {low[name]} or more, got {given[name]}." for name in low if given[name] < low[name]]
        try:
            settings = TrainSettings(
                **shared | {"learning_rate": rate, "warmup_steps": warmup, "batch_size": batch_size}
            )
        except ValueError as error:
            raise ValueError(" ".join([str(error), *found])) from None
        if found:
            raise ValueError(" ".join(found))
        return settings


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line; then from its --config file, from the run that it resumes, and the defaults.

    Raises:
        SystemExit: after --help (0), or for an option that does not exist or a value of a wrong type (2).
        ValueError, FileNotFoundError: a file that cannot be used.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    resume, config = value_of("resume", argv), value_of("config", argv)
    before = Options()
    if resume not in (None, "auto", "None"):
        folder = run_folder(resume)
        before = replace(from_toml(folder / SETTINGS_FILE, Options()), out=str(folder))
    if config not in (None, "None"):
        before = from_toml(Path(config).expanduser(), before)
    description = f"{Options.__doc__}\n\n{EXIT_CODES}"
    return tyro.cli(
        Options, args=argv, default=before, prog="python train.py", description=description, use_underscores=True
    )


def value_of(name: str, argv: Sequence[str]) -> str | None:
    """The value of one option, which must be known before the others are read."""
    found = None
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def run_folder(path: str | Path) -> Path:
    """The folder of the run that `path` is, or is a checkpoint of.

    Raises:
        FileNotFoundError: it is neither.
    """
    given = Path(path).expanduser()
    for folder in (given, *list(given.resolve().parents)[:2]):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    raise FileNotFoundError(
        f"--resume {path}: neither the folder of a run (with a {SETTINGS_FILE}) nor a checkpoint in one "
        "(RUN/checkpoints/step-N). --resume auto looks in --out."
    )


def from_toml(file: Path, before: Options) -> Options:
    """`before`, with what a TOML file says instead.

    Raises:
        FileNotFoundError: no such file. ValueError: not TOML, or everything that is wrong in it, at once.
    """
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file.") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}. A line in it looks like: max_steps = 100") from error
    kinds = {field.name: field.type for field in fields(Options)}
    problems, values = [], {}
    for name, value in given.items():
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            problems.append(f"there is no option {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        elif not fits(value, kinds[name]):
            problems.append(f"{name} must be {kind_name(kinds[name])}, got {value!r}")
        else:
            values[name] = tuple(map(float, value)) if isinstance(value, list) else value
    if problems:
        raise ValueError(f"{file} is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return replace(before, **values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value may stand for a field of this type; an int may stand for a float, a bool for neither."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(get_args(kind)) and all(fits(v, float) for v in value)
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def kind_name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return " or ".join(names[part] for part in (get_args(kind) or (kind,)) if part in names)


def save_options(options: Options, file: Path) -> None:
    """Write options as TOML; what is None is left out, and how the run was started again, which is no setting of it."""
    left_out = ("config", "resume", "out")
    given = {name: value for name, value in asdict(options).items() if value is not None and name not in left_out}
    replace_text(file, tomli_w.dumps(given | {"betas": list(options.betas)}))


def markdown_table() -> str:
    """The table of all options for the README, from the same comments."""
    helps = help_texts()
    rows = [f"| `--{f.name}` | {shown_default(f.default)} | {helps[f.name]} |" for f in fields(Options)]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def help_texts() -> dict[str, str]:
    """The comment above each field: option name -> its meaning."""
    import inspect

    texts, comment = {}, []
    for line in inspect.getsource(Options).splitlines():
        word = line.strip()
        if word.startswith("# "):
            comment.append(word[2:])
        elif ":" in word and comment:
            texts[word.partition(":")[0]], comment = " ".join(comment), []
    return texts


def shown_default(value: Any) -> str:
    if value is None:
        return ""
    return "off" if value is False else f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"
