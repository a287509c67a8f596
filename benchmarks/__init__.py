"""Benchmarks: speed on this machine, as ratios within one run."""
