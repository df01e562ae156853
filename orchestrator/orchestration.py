"""Read 6 of 6. One dict in, GPT-2 out: assembled, run, toggled and proven.

    python orchestrator/orchestration.py            the smoke tests, about 30 seconds on two CPU cores
    python orchestrator/orchestration.py --train    then a small model learns to write, and is judged
    python orchestrator/orchestration.py --help

Each step prints PASS or FAIL with its figure. This ends the reading path: `notebooks/llm.ipynb` runs through it.
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder up, whether installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from GPT2Model.config import PRESETS
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.agreement import GRADIENTS_LIMIT, LOGITS_LIMIT, forward_backward, largest_differences
from orchestrator.evaluation.estimates import count_parameters, forward_flops, memory_bytes
from orchestrator.evaluation.machine import describe_attention, describe_machine, trainable_here
from orchestrator.evaluation.parity import toggle_table
from orchestrator.report import Run
from orchestrator.text.corpora import first_tokens, read_text
from orchestrator.views.figures import implementations_chart

# GPT-2 124M. Change a value, run the file again, and see what follows.
cfg = {
    "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
    "drop_rate": 0.1, "qkv_bias": True,
    "use_flash": True,                 # False: the manual path, always and on every device
    "attn_implementation": "auto",     # which fast path use_flash=True takes: eager, sdpa, flash_tiled, ...
}  # fmt: skip


def build_model(cfg: dict = cfg, device: str = "cpu", seed: int = 0) -> GPTModel:
    """The model that a cfg dict describes, with fresh weights, in eval mode. One seed gives one set of weights."""
    torch.manual_seed(seed)
    return GPTModel(cfg).to(device).eval()


def run_smoke_tests(
    cfg: dict = cfg, *, text: str = "python-docs", device: str = "cpu", seed: int = 0, run: Run | None = None
) -> Run:
    """Assemble, run, toggle, generate: each step against a number computed another way.

    Args:
        cfg: the model. text: "python-docs", a file or a folder. device: a torch device. seed: of the weights.
        run: where steps are recorded; None: on the screen only.
    Returns:
        the run: `.passed`, and `.steps` with what was measured.
    Raises:
        ValueError, FileNotFoundError: a cfg, text or device that cannot be used.
    """
    run = run or Run()
    run.heading("This machine")
    for line in describe_machine(device):
        run.say(line)

    run.heading("GPT-2, assembled from the dict")
    model = build_model(cfg, device, seed)
    check_assembly(run, model)
    for line in describe_attention(model):
        run.say(line)
    tokens = min(256, model.cfg["context_length"])
    ids, targets = (part.to(device) for part in first_tokens(read_text(text), batch=2, tokens=tokens, name=text))
    check_forward(run, model, ids, targets)

    run.heading("The toggle: every usable implementation against eager")
    check_attention(run, model, ids)
    check_model_toggle(run, model, ids, targets)

    run.heading("Generation")
    check_generation(run, model, ids)
    return run


def check_assembly(run: Run, model: GPTModel) -> None:
    counted, formula = model.num_parameters(), count_parameters(model.cfg)
    run.step("parameters", counted == formula, f"{counted:,}; by formula {formula:,}", parameters=counted)
    fresh = {name for name, preset in PRESETS.items() if all(model.cfg[key] == value for key, value in preset.items())}
    run.say(f"preset: {', '.join(fresh) or 'none, sizes of your own'}; head tied: {model.cfg['tie_weights']}")


def check_forward(run: Run, model: GPTModel, ids: torch.Tensor, targets: torch.Tensor) -> None:
    (B, T), V = ids.shape, model.cfg["vocab_size"]
    with torch.no_grad():
        logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    run.step("token ids -> logits", logits.shape == (B, T, V), f"({B}, {T}) -> {tuple(logits.shape)}")
    # Fresh logits are noise: it costs half its variance, and each word of the text has one draw of it (3 sigma).
    noise = model.cfg["init_std"] * model.cfg["emb_dim"] ** 0.5
    limit = 0.5 * noise**2 + 3 * noise / len(targets.unique()) ** 0.5
    figure = f"loss {loss:.3f}, ln {V} = {math.log(V):.3f} (limit: {limit:.2f} away)"
    run.step("an untrained model knows nothing", abs(loss - math.log(V)) < limit, figure, loss=loss)
    memory = {name: f"{size / 2**20:,.0f} MiB" for name, size in memory_bytes(model.cfg, B, T).items()}
    flops = forward_flops(model.cfg, B, T)
    run.say(f"by formula: {flops / 1e9:,.0f} GFLOP forward; " + ", ".join(f"{k} {v}" for k, v in memory.items()))


def check_attention(run: Run, model: GPTModel, ids: torch.Tensor) -> None:
    rows = toggle_table(model.cfg, batch=ids.shape[0], tokens=ids.shape[1], device=str(ids.device))
    for row in rows:
        worst = max(row["ratio"], key=row["ratio"].get)  # the output or a gradient, whichever is nearest its bound
        figure = f"{worst} off by {row['error'][worst]:.1e} (bound {row['bound'][worst]:.1e}); "
        figure += f"{row['seconds'] * 1e3:.0f} ms, {row['seconds_over_eager']:.2f}x eager's time"
        run.step(f"attention by {row['implementation']}, forward and backward", row["passed"], figure, measured=row)
    run.save_figure(implementations_chart(rows, title="Attention, one call, forward and backward"), "attention.png")


def check_model_toggle(run: Run, model: GPTModel, ids: torch.Tensor, targets: torch.Tensor) -> None:
    """use_flash True against False in the whole model; where both are eager, nothing would be compared: say so."""
    fast = model.blocks[0].attention.choice(ids.shape[1])
    others = [name for name in trainable_here(model) if name not in ("eager", fast.chosen)]
    if fast.chosen == "eager":
        run.say(f"NOT COMPARED: use_flash=True is eager itself here ({fast.explain()}).")
        others = ["flash_tiled"]
    with model.using_attention({"use_flash": False}):
        manual = forward_backward(model, ids, targets)
    for name in [*({fast.chosen} - {"eager"}), *others]:
        with model.using_attention(name):
            flash = forward_backward(model, ids, targets)
        apart = largest_differences(flash, manual)
        passed = apart["logits"] <= LOGITS_LIMIT and apart["gradients"] <= GRADIENTS_LIMIT  # NaN is never <= anything
        figure = (
            f"logits {apart['logits']:.1e} apart (limit {LOGITS_LIMIT:.0e}), gradients {apart['gradients']:.1e} of "
        )
        figure += f"their size ({GRADIENTS_LIMIT:.0e}); {flash.seconds:.1f} s, eager {manual.seconds:.1f} s"
        what = "use_flash=True (" + name + ") and False" if name == fast.chosen else name + " and eager"
        run.step(f"the whole model, {what}", passed, figure, **apart)


def check_generation(run: Run, model: GPTModel, ids: torch.Tensor, new_tokens: int = 16) -> None:
    prompt = ids[:, : min(32, model.cfg["context_length"] // 2)]
    new_tokens = min(new_tokens, model.cfg["context_length"] - prompt.shape[1])
    cached = generate(model, prompt, new_tokens)
    uncached = generate(model, prompt, new_tokens, use_cache=False)
    same = int((cached == uncached)[:, prompt.shape[1] :].sum())
    run.step("cached generation equals uncached", torch.equal(cached, uncached), f"{same} of {2 * new_tokens} tokens")


if __name__ == "__main__":
    from orchestrator.cli import main

    raise SystemExit(main())
