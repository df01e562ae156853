"""How fast ours writes, beside transformers, on the very same weights: one text, a queue of requests, a common prefix.

    python benchmarks/generation_against_transformers.py                     everything, on a quiet machine
    python benchmarks/generation_against_transformers.py --only one profile  some parts; what is known of others stays
    python benchmarks/generation_against_transformers.py --tiny              a tiny model, in seconds: tries the script

one      64 tokens are read and 128 written, greedily: generate() of both, by dtype; ours with int8 weights too
queue    32 requests that are all there at second 0, prompts and texts log-uniform in 16 to 256 tokens: the engine
         (pages, continuous batching), and static batches of 8 in order of arrival, of transformers and of ours
prefix   16 requests that begin with the same 192 tokens: the engine with prefix sharing and without
profile  where the time of a step goes: one text, transformers' too, and the engine with 8 and 32 requests running

The model is GPT-2 124M with random weights and noise on each, so that texts vary; transformers opens what our
save_pretrained() writes. All contenders take turns in one run, in changing order: a ratio is theirs over ours in the
same round (above 1: ours is faster), and its median counts. Before each part everybody warms up on a small piece. In
every round the tokens are compared: where they differ, the place and the gap of the two logits are told.
The lines for CUDA were written without a GPU and have not been run.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local: transformers need not ask the hub for newer files

import torch
from torch import Tensor

from GPT2Model.files import replace_text
from orchestrator.evaluation.generation_bench import Stopwatch, Written
from orchestrator.evaluation.generation_parts import MEASURES
from orchestrator.evaluation.generation_plan import DTYPES, OURS_TOO, Plan, Sides, tiny
from orchestrator.evaluation.machine import check_device, machine_facts
from orchestrator.report import make_folder, plain
from orchestrator.views.generation_figures import profile_bars, queue_picture
from orchestrator.views.generation_tables import markdown_tables
from orchestrator.views.run_figures import save_figure

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = tuple(MEASURES)
TRIED = "a tiny model, to try the script: NOT A MEASUREMENT"


# ------------------------------------------------------------------ both sides


class Tokens:
    """What transformers' generate() hands its tokens to: first the prompt, which is let pass, then each new token."""

    def __init__(self, note: Callable):
        self.note, self.seen = note, 0

    def put(self, ids: Tensor) -> None:
        self.seen += 1
        if self.seen > 1:
            self.note(ids)

    def end(self) -> None:
        """Nothing is left to show."""


class Transformers:
    """GPT2LMHeadModel with the weights of `folder`, and its own generate() with its own defaults, greedy."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str):
        from transformers import GPT2LMHeadModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.model.generation_config.eos_token_id = None  # it never stops early
        self.model.generation_config.pad_token_id = 0
        self.device = device

    @property
    def attention(self) -> str:
        return self.model.config._attn_implementation

    def write(
        self, ids: Tensor, padding_mask: Tensor | None, new_tokens: int, also: Callable = lambda: None
    ) -> Written:
        """A Writer; the positions of left-padded rows are counted by transformers itself, from the mask."""
        mask = torch.ones_like(ids) if padding_mask is None else padding_mask.long()
        watch = Stopwatch(self.device, also)
        written = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True,
            streamer=Tokens(watch.note),
        )  # fmt: skip
        return Written(written[:, ids.shape[1] :].tolist(), watch.times, watch.now())


# ------------------------------------------------------------------ the command


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--tiny", "--dry_run", action="store_true", help="a tiny model: tries the script, in seconds")
    parser.add_argument("--rounds", type=int, help="of each part (default: one 10, queue 5, prefix 7; tiny: 2)")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, *OURS_TOO], default=None, metavar="NAME",
                        help="of `one`: float32, bfloat16, int8 (weights; the rest float32), int8_bfloat16 (default: "
                             "all four); transformers runs in those that it has")  # fmt: skip
    parser.add_argument("--queue_dtypes", nargs="+", choices=list(DTYPES), default=None, metavar="NAME",
                        help="of `queue`: float32, bfloat16 (default: float32)")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu); cuda was never tried")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, ids, lengths and orders (default: 0)")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="of results and figures (default: benchmarks/results; with --tiny: runs)")  # fmt: skip
    args = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to {2**63 - 1}, got {args.seed}.")
    args.out = args.out or (Path("runs") if args.tiny else RESULTS)
    if args.tiny and args.out.resolve().is_relative_to(RESULTS):
        parser.error("--tiny measures nothing, so it writes nothing into benchmarks/results: choose another --out.")
    try:
        args.device = check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    make = tiny if args.tiny else Plan
    rounds = args.rounds or (2 if args.tiny else None)
    changed = {"rounds": rounds and dict.fromkeys(PARTS, rounds), "dtypes": args.dtypes and tuple(args.dtypes)}
    changed["queue_dtypes"] = args.queue_dtypes and tuple(args.queue_dtypes)
    return make(device=args.device, seed=args.seed, **{name: value for name, value in changed.items() if value})


def draw(results: Mapping, out: Path) -> list[str]:
    """The figures of what was measured, beside the results; their names."""
    figures, where = {}, results.get("not_a_measurement")
    for dtype in DTYPES:
        if dtype in results.get("queue", {}):
            name = "queue" if dtype == "float32" else f"queue-{dtype}"
            figures[name] = queue_picture(results["queue"], dtype, note=where)
    if "profile" in results:
        figures["profile"] = profile_bars(results["profile"], note=where)
    places = {out.with_name(f"{out.stem}-{name}.png"): figure for name, figure in figures.items()}
    for place, figure in places.items():
        save_figure(figure, place)
    return [place.name for place in places]


def main(arguments: Sequence[str] | None = None) -> int:
    args = read_arguments(arguments)
    plan = plan_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("CMHA").setLevel(logging.WARNING)  # which backend: the same for all, and in the results
    import transformers

    machine = machine_facts(args.device)
    machine["versions"] = machine["versions"] | {"transformers": transformers.__version__}
    out = make_folder(args.out) / f"{'tiny' if args.tiny else torch.device(args.device).type}-generation.json"
    results = {"about": "writing, beside transformers: by benchmarks/generation_against_transformers.py"}
    if args.tiny:
        results["not_a_measurement"] = TRIED
        print(TRIED)
    elif out.exists():
        results |= json.loads(out.read_text(encoding="utf-8"))
    facts = {
        "command": shlex.join(
            ["python", "benchmarks/generation_against_transformers.py", *(arguments or sys.argv[1:])]
        ),
        "machine": machine,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch.no_grad():
        sides = Sides(plan, Path(folder), Transformers)
        for part in (part for part in PARTS if part in args.only):
            found = facts | {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
            results[part] = plain(found | MEASURES[part](sides, plan))
            replace_text(out, json.dumps(results, indent=1) + "\n")
    print("\n" + markdown_tables(results, [part for part in PARTS if part in args.only]))
    print(f"written: {', '.join([str(out), *draw(results, out)])}" + f" ({TRIED})" * args.tiny)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
