"""Our trainers against TRL's on the same work; see benchmarks/README.md."""

import sys
from pathlib import Path

# Recipes import their neighbours by name, as scripts do.
sys.path.append(str(Path(__file__).parents[1] / "recipes"))
