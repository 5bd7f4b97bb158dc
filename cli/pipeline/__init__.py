"""The stages of a run in their order, without a terminal: what the commands call, and the Python API.

from cli.pipeline import Run
from cli.recipe import load_recipe

report = Run(load_recipe("quickstart"), Path("runs/quickstart")).report()
"""

from __future__ import annotations

from cli.pipeline.run import Run

__all__ = ["Run"]
