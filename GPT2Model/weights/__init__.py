"""Weights from others and for others: formats, folders, shards, the hub. Start with `GPT2Model/pretrained.py`."""
