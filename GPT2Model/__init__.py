"""Floor 3: the whole network, its tokenizer, its weights, its sampling. Start with `GPT2Model/gpt2.py`."""
