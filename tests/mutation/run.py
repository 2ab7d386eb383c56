"""Mutation testing: what could be broken in the modules that decide numbers without a test noticing.

    make test-mutation                          all of it
    .venv-mutation/bin/python tests/mutation/run.py --most 200 semcons_ray/messages.py     a sample, some modules

mutmut, set up in pyproject.toml, makes the mutants, and runs for each the tests that pass through its function until
one fails. This script chooses which mutants, and writes modules.csv and survivors.csv beside itself. A survivor's
reason, written by hand in the column `why`, is kept as long as the survivor is.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

HERE = Path(__file__).parent
ALIVE = ("survived", "no tests")
UNTRIED = "not checked"
COLUMNS = ("module", "mutant", "before", "after", "why")


def modules() -> list[Path]:
    """Those that pyproject.toml says are mutated."""
    paths = sorted(path for source in config().source_paths for path in source.rglob("*.py"))
    return [path for path in paths if any(fnmatch.fnmatch(str(path), wanted) for wanted in config().only_mutate)]


def chosen(path: Path, most: int | None, seed: int) -> list[str]:
    """Names of a module's mutants, or of `most` of them, drawn by the seed."""
    made = mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names
    names = [get_mutant_name(path, name) for name in made]
    if most is None or len(names) <= most:
        return names
    return sorted(random.Random(f"{seed} {path}").sample(names, most))


def statuses(path: Path, names: Sequence[str]) -> dict[str, str]:
    """What became of each mutant that was tried."""
    data = SourceFileMutationData(path=path)
    data.load()
    return {name: status_by_exit_code[data.exit_code_by_key.get(name)] for name in names}


def changed(path: Path, name: str) -> tuple[str, str]:
    """The lines that a mutant takes away, and those that it puts there."""
    lines = [line for line in get_diff_for_mutant(name, path=path).splitlines() if line[:3] not in ("---", "+++")]
    before, after = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return before, after


def write(rows: Sequence[dict[str, object]], columns: Sequence[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def report(names_of: dict[Path, list[str]], total: dict[Path, int], folder: Path) -> None:
    """Write both tables."""
    survivors = folder / "survivors.csv"
    known: dict[tuple[str, ...], str] = {}
    if survivors.is_file():
        with survivors.open(encoding="utf-8", newline="") as file:
            known = {(row["module"], row["before"], row["after"]): row["why"] for row in csv.DictReader(file)}
    counts, alive = [], []
    for path, names in names_of.items():
        outcome = statuses(path, names)
        tally = Counter(outcome.values())
        lost = sum(tally[status] for status in (*ALIVE, UNTRIED))
        counts.append({"module": path, "mutants": total[path], "tried": len(names), "timeout": tally["timeout"],
                       "survived": tally["survived"], "no_tests": tally["no tests"],
                       "not_checked": tally[UNTRIED],
                       "killed_percent": round(100 * (1 - lost / max(len(names), 1)), 1)})  # fmt: skip
        for name in (name for name, status in outcome.items() if status in ALIVE):
            before, after = changed(path, name)
            why = known.get((str(path), before, after), "")
            mutant = name.rpartition(".")[2]
            alive.append({"module": path, "mutant": mutant, "before": before, "after": after, "why": why})
    write(counts, list(counts[0]), folder / "modules.csv")
    write(alive, COLUMNS, survivors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", type=Path, nargs="*", help="of those in pyproject.toml; all without any")
    parser.add_argument("--most", type=int, help="mutants tried of a module; without it, all")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--go-on", action="store_true", help="keep what an earlier run, of the same tests, has found")
    args = parser.parse_args()
    paths = [path for path in modules() if not args.modules or path in args.modules]
    if not paths:
        parser.error("no such module in only_mutate of pyproject.toml")
    total = {path: len(chosen(path, None, args.seed)) for path in paths}
    names_of = {path: chosen(path, args.most, args.seed) for path in paths}
    if not args.go_on:
        shutil.rmtree("mutants", ignore_errors=True)
    # One thread a process: they are forks of one that has imported torch.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = [name for each in names_of.values() for name in each]
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(args.processes), *names]
    code = subprocess.run(command, env=environment).returncode
    if code == 0:
        report(names_of, total, HERE)
    return code


if __name__ == "__main__":
    sys.exit(main())
