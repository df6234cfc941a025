"""Tries to break runs: kills, signals, damaged files, full disks, two processes, senseless configs.

python -m tests.campaign [KIND ...] [--cases N] [--seed S] [--case I] [--folder DIR]

Every case is drawn from the seed. A failure prints the command that repeats it; when a kill or a signal arrives depends
on the machine's pace, so such a case may need more than one try.
"""

import argparse
import pathlib
import sys
import tempfile
import time

from tests.campaign.cases import FULL, KINDS, Bench, run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all when none is named")
    parser.add_argument(
        "--cases", type=int, help="of each kind; else " + ", ".join(f"{k} {n}" for k, n in FULL.items())
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--folder", type=pathlib.Path, help="for workdirs; those of failed cases stay there")
    args = parser.parse_args()
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {sorted(unknown)}; known: {', '.join(KINDS)}")
    bench = Bench(args.folder or pathlib.Path(tempfile.mkdtemp(prefix="campaign-")))
    failures = 0
    for kind in args.kinds or KINDS:
        cases = [args.case] if args.case is not None else range(args.cases or FULL[kind])
        begun, broken = time.monotonic(), 0
        for case in cases:
            failure = run_case(kind, args.seed, case, bench)
            if failure is not None:
                broken += 1
                print(failure, flush=True)
        failures += broken
        print(f"{kind}: {len(cases) - broken} of {len(cases)} held, {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
