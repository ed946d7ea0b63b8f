"""Write the report of one or more sweeps: ``python -m bnnft.report multirun/NAME``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich

from bnnft.report.write import write_report
from bnnft.runs.job import read_jobs
from bnnft.runs.tables import job_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, print what became of the runs and where the files are; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bnnft.report", description="Tables and figures of sweeps.")
    parser.add_argument("folders", type=Path, nargs="+", help="of sweeps, for example multirun/bft")
    parser.add_argument("--group-by", metavar="KEY", help="setting that makes the groups, for example loss or ber.rate")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write to (the first folder)")
    given = parser.parse_args(arguments)
    try:
        jobs, faults = read_jobs(given.folders)
        title = " and ".join(folder.name for folder in given.folders)
        files = write_report(jobs, faults, title, given.out or given.folders[0], given.group_by)
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    rich.print(job_table(jobs))
    for fault in faults:
        print(f"left out: {fault}")
    if not any(path.suffix == ".html" for path in files):
        print("for an interactive page: pip install 'bnnft[report]'")
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
