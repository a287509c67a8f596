"""Fuzzes a target with coverage in hand (Atheris, which is libFuzzer for Python), from the kept corpus on.

    python tests/fuzz/run.py manifest|safetensors|fragments [libFuzzer's options]    e.g. -max_total_time=600
    python tests/fuzz/run.py TARGET FILE                                             replays one input

New inputs and what crashed go to `.fuzz/TARGET`; `-merge=1 tests/fuzz/corpus/TARGET .fuzz/TARGET` keeps what adds
coverage. Kernels are compiled with checks of bounds, in a cache of their own.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / ".fuzz"
LIMITS = (
    "-timeout=20",
    "-rss_limit_mb=3072",
    "-max_len=16384",
    "-print_final_stats=1",
    f"-dict={Path(__file__).with_name('words.dict')}",
)


def main() -> None:
    target, *options = sys.argv[1:]
    os.environ |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(WORK / "kernels")}
    warnings.simplefilter("ignore")  # NumPy's remarks about weights that are nonsense
    import atheris

    with atheris.instrument_imports(include=["holoray"]):
        import fuzz_targets
    found, corpus = WORK / target, REPOSITORY / "tests" / "fuzz" / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    for path in sorted(corpus.iterdir()):  # kernels are compiled before the clock runs
        fuzz_targets.TARGETS[target](path.read_bytes())
    if not any(Path(option).exists() or option.startswith("-merge") for option in options):
        options += [str(found), str(corpus)]
    atheris.Setup([sys.argv[0], f"-artifact_prefix={found}/", *LIMITS, *options], fuzz_targets.TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
