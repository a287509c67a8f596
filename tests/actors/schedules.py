"""One seed is one schedule of faults for the brain.

python tests/actors/schedules.py SEED [SEED...]            replays schedules, and says what happened
python tests/actors/schedules.py --devices ...             with workers that are devices, and combine
python tests/actors/schedules.py --shards ...              with devices that hold a part of the tensors each
python tests/actors/schedules.py --in-place ...            with devices that refine where they are, also with --shards
python tests/actors/schedules.py --corrupt ...             with fragments that nobody can read
python tests/actors/schedules.py --rotten ...              with fragments that some cannot read
python tests/actors/schedules.py --range START END         runs many in silence; says how each that fails is replayed
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from functools import cache
from typing import Final

from manifests import make_manifest
from simulator import PATIENT, Faults, Simulation

SPREADING: Final = replace(PATIENT, patience_s=20.0)

manifest_of = cache(make_manifest)


def schedule(
    seed: int,
    *,
    devices: bool = False,
    shards: bool = False,
    in_place: bool = False,
    corrupt: bool = False,
    rotten: bool = False,
) -> Simulation:
    """Everything about a schedule, from its seed."""
    rng = random.Random(seed)
    devices = devices or shards or in_place
    faults = Faults(
        kills=rng.randint(0, 6),
        node_losses=rng.randint(0, 2),
        joins=rng.randint(0, 2),
        coordinator_kills=rng.choice([0, 0, 1, 3]),
        failures=rng.choice([0.0, 0.1]),
        lies=rng.choice([0.0, 0.1]),
        duplicates=rng.choice([0.0, 0.3]),
        hangs=rng.choice([0.0, 0.0, 0.03]) if not shards else rng.choice([0.0, 0.03, 0.1]),
        start_failures=rng.choice([0.0, 0.2]),
        no_returns=rng.choice([0.0, 0.0, 0.4]) if shards else 0.0,
        corrupt=rng.choice([0.03, 0.2, 0.6]) if corrupt else 0.0,
        rotten=rng.choice([0.03, 0.2]) if rotten else 0.0,
    )
    return Simulation(
        seed,
        manifest_of(rng.randrange(20)),
        rng.choice([(1.0,), (0.5, 1.0), (0.5, 0.9, 0.99, 1.0), (0.3, 0.9)]),
        nodes=rng.randint(1, 3),
        workers=rng.randint(1, 5),
        receiver=rng.random() < 0.3 and not devices,
        devices=devices,
        shards=shards,
        in_place=in_place,
        faults=faults,
        policy=SPREADING if shards else PATIENT,
    )


def run(seed: int, **kind: bool) -> Simulation:
    """Run a schedule to its end; a failure names the command that replays it."""
    try:
        return schedule(seed, **kind).run()
    except AssertionError as error:
        options = "".join(f"--{name.replace('_', '-')} " for name, chosen in kind.items() if chosen)
        raise AssertionError(f"{error}\n  replay: python tests/actors/schedules.py {options}{seed}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--range", nargs=2, type=int, metavar=("START", "END"))
    kinds = ("devices", "shards", "in_place", "corrupt", "rotten")
    for name in kinds:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    arguments = parser.parse_args()
    kind = {name: getattr(arguments, name) for name in kinds}
    failed = 0
    for seed in arguments.seeds:
        simulation = schedule(seed, **kind)
        try:
            simulation.run()
        finally:
            print("\n".join(simulation.log))
            print(f"seed {seed}: {len(simulation.published)} generations, events {simulation.digest()}")
    for seed in range(*arguments.range or (0,)):
        try:
            run(seed, **kind)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
