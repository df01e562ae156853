"""Our attention under transformers' own models: GPT-2 and Llama with grouped heads, padded, trained and generating.

    python examples/with_transformers.py

Random weights, no network, a few seconds. Exit code 1 if something that should agree does not.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages lie one folder up, installed or not

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from CMHA.choosing import get_flash_attention_config
from CMHA.choosing.choose import reasons_against
from CMHA.request import AttentionRequest
from CMHA.with_transformers import register_with_transformers

TOKENS = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 99}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "GPT-2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "Llama, 4 heads on 2": LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, **HEADS, **TOKENS),
}


def main() -> int:
    print("What this machine has:")
    print(json.dumps(get_flash_attention_config(), indent=2))

    names = register_with_transformers()
    # It is trained below: what has no backward pass here is left out.
    request = AttentionRequest(head_dim=16, query_len=8, key_len=8, num_heads=4, num_kv_heads=4, needs_grad=True)
    usable = [name for name, canonical in names.items() if not reasons_against(canonical, request)]

    torch.manual_seed(0)
    ids = torch.randint(0, 99, (2, 8))
    padding = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])  # the second text is shorter: padded on its left
    labels = ids.masked_fill(padding == 0, -100)
    labels[1, 3] = -100  # the first real token would be predicted from padding

    all_agree = True
    for title, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        theirs = train_and_generate(model, ids, padding, labels)
        print(f"\n{title}, against transformers' own eager attention:")
        for name in usable:
            model.set_attn_implementation(name)
            ours = train_and_generate(model, ids, padding, labels)
            distance = max(float((a - b).abs().max()) for a, b in zip(ours[0], theirs[0], strict=True))
            same_tokens = torch.equal(ours[1], theirs[1])
            all_agree &= distance < 1e-4 and same_tokens
            print(f"  {name:12} loss and gradients differ by at most {distance:.1e}; the same tokens: {same_tokens}")

    print("\nPASS" if all_agree else "\nFAIL")
    return 0 if all_agree else 1


def train_and_generate(model, ids, padding, labels) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The loss and every gradient, and ten tokens more."""
    model.zero_grad()
    logits = model(ids, attention_mask=padding).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # -100 is left out
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return [loss.detach(), *gradients], model.generate(
        ids, attention_mask=padding, max_new_tokens=10, do_sample=False, pad_token_id=99
    )


if __name__ == "__main__":
    sys.exit(main())
