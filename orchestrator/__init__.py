"""Floor 4: assembles everything from one cfg dict, and runs it. Start with `orchestrator/orchestration.py`."""
