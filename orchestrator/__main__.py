"""`python -m orchestrator`, or `python PATH/TO/orchestrator` from any folder: the main job, as in orchestration.py."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: the packages lie one folder up, whether installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from orchestrator.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
