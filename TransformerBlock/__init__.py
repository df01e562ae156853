"""Floor 2: one transformer block. Start with `TransformerBlock/transformer_block.py`."""
