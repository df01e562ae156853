"""Train a GPT-2 on a data set, or on a text of your own. Every option: `python train.py --help`.

    python train.py                                     # a small model learns the tales, in about a minute
    python train.py --model gpt2 --dataset wikitext --attn_implementation auto --max_steps 100 \\
        --eval_on_start --eval_steps 10
    python train.py --dataset my-book.txt --tokenizer char --out runs/my-book --resume auto

A door, no more: the options are in `orchestrator/training/options.py`, the loop in `orchestrator/training/loop.py`.
"""

from orchestrator.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
