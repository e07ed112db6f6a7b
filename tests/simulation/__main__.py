"""Run schedules: ``python -m simulation --schedules 10000``, or one: ``--seed 17``."""

from __future__ import annotations

import argparse
import collections
import gc
import json
import multiprocessing
import sys
import time
from pathlib import Path

from simulation.loop import START
from simulation.mutations import MUTATIONS
from simulation.schedule import Report, run_schedule


def main() -> None:
    """Run what the command line asks for; exit code 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--seed", type=int, help="run one schedule, and print its course")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--result", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--mutations", action="store_true", help="count the schedules that find each mutation"
    )
    options = parser.parse_args()
    if options.seed is not None:
        report = run_schedule(options.seed)
        print("\n".join(report.log))
        print(f"course {report.course:08x}, {report.seconds:.3f}, {dict(report.outcomes)}")
        sys.exit(_show(report))
    gc.freeze()
    if options.mutations:
        sys.exit(_show_mutations(range(options.first, options.first + options.schedules)))
    began = time.perf_counter()
    seeds = range(options.first, options.first + options.schedules)
    outcomes: collections.Counter[str] = collections.Counter()
    failed, virtual = 0, 0.0
    with multiprocessing.Pool(options.processes) as pool:
        for report in pool.imap(run_schedule, seeds, chunksize=10):
            outcomes += report.outcomes
            virtual += report.seconds - START
            failed += _show(report)
    seconds = time.perf_counter() - began
    if options.result is not None:
        figures = {
            "schedules": len(seeds),
            "first_seed": options.first,
            "failed": failed,
            "seconds": round(seconds),
            "virtual_seconds": round(virtual),
            "requests": dict(sorted(outcomes.items())),
        }
        options.result.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{len(seeds)} schedules, {failed} failed, {seconds:.0f} s, {dict(outcomes)}")
    sys.exit(min(1, failed))


def _show_mutations(seeds: range) -> int:
    """Print after how many schedules each mutation was found; return 1 if one was not."""
    missed = 0
    for mutation in MUTATIONS:
        with mutation.applied():
            for count, seed in enumerate(seeds, 1):
                failures = run_schedule(seed).failures
                if failures:
                    print(f"| {mutation.name} | {count} | {failures[0][:150]} |", flush=True)
                    break
            else:
                missed = 1
                print(f"| {mutation.name} | not in {len(seeds)} | |", flush=True)
    return missed


def _show(report: Report) -> int:
    for failure in report.failures:
        print(f"seed {report.seed}: {failure}")
    return int(bool(report.failures))


if __name__ == "__main__":
    main()
