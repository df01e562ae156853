"""Floor 1: causal multi-head attention, and every way of computing it. Start with `CMHA/cmha.py`."""
