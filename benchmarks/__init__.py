"""Benchmarks: speed on this machine, as ratios within one run, and what bytes are worth on real weights."""

import sys
from pathlib import Path

# The real model whose embeddings are the yardstick is an example, not a part of the package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
