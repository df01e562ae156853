"""What `python -m orchestrator generate` needs beside the model: settings, a page, a clock, a conversation."""
