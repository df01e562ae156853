"""What `python -m orchestrator generate` needs beside the model: settings, a page to write on, a clock, a conversation."""
