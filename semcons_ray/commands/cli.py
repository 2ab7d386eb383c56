"""The `semcons` command. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 1 the run failed, and resume continues it; 2 a mistake that the user can mend, told in one line;
130 interrupted (SIGINT) and 143 terminated (SIGTERM), after both of which resume continues.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from semcons_ray import __version__
from semcons_ray.config import Within, describe_settings, is_option, load_config, parse_setting
from semcons_ray.errors import ConfigError, RunFolderError, SemconsError, UserError, first_line

if TYPE_CHECKING:
    from semcons_ray.runs.observers import Observer

EXAMPLE = """\
examples:
  semcons init experiment                              write experiment/config.yaml, every setting, with comments
  semcons run experiment/config.yaml --dry-run         what it would do and need
  semcons run experiment/config.yaml --out runs/first  run it
  semcons run --num_rounds 5 --out runs/second         the default experiment with one setting changed
  semcons watch runs/first                             see how far it is, from another terminal
  semcons resume runs/first                            continue after a crash
  semcons compare quality.yaml --out runs/quality      one table and one figure of many algorithms
  semcons sweep sweep.yaml --out runs/sweep            try many settings: Pareto fronts, and the effect of each
"""
COMPARE = """\
CONFIG says what is compared; every part of it may be left out:

  name: quality-dirichlet            # title of the table and the figure
  seeds: [0, 1, 2]                   # every arm is run with each of these
  reference: FedAvg-LoRA             # the arm at which "gap closed" is 100%
  baseline: local only               # the arm at which it is 0%
  experiment:                        # settings of all arms, as for semcons run
    num_rounds: 5
    resources: {fleet: local}        # runs in parallel, a process for each core; ray: one run at a time, on the cluster
  arms:                              # by label, the settings that differ; the others are compared with the first arm
    semantic consensus: {}
    local only: {algorithm: {name: local_only}}

A CONFIG of semcons run is taken as the experiment, and --any.setting changes the experiment. Of several files each is
laid over those before it. The same command again continues with what is not finished; arms and seeds may be added. Each
run has a folder below DIR/runs.

example:
  semcons compare quality.yaml --num_rounds 2 --resources.fleet local --out runs/quality
"""
SWEEP = """\
SWEEP says what is tried:

  name: prompt budget                # title of the table and the report
  experiment:                        # settings of all trials, as for semcons run
    resources: {fleet: local}        # a trial is a process on one core; ray: a core for each client, up to max_workers
    tracking: {report_to: []}        # each trial is a run of wandb, mlflow or trackio
  space:                             # any settings, by dotted key, each with one of these:
    prompts.budget: {grid: [12, 48]}                 # all of these values, crossed with the other keys
    algorithm.rule: {choice: [medoid, plurality]}    # one of these values is drawn
    training.learning_rate: {loguniform: [1.0e-4, 1.0e-3]}   # or uniform: [low, high]; randint: [first, end]
    clients.mix: {grid: [{}, {org/a: 1, org/b: 1}]}
  search: grid                       # random: num_samples draws; optuna: num_samples, each chosen by earlier results
  num_samples: 10
  seed: 0                            # of the search, not of the trials
  metric: bits_per_byte              # or worst_bits_per_byte, rouge_l, similarity; with one model mean_nll, worst_nll
  scheduler: none                    # asha stops trials that fall behind:
  asha: {grace_rounds: 1, reduction_factor: 2}    # from this round on, all but the best half
  max_concurrent_trials: 2           # left out: as many as the cluster has room for

Only space is required. --any.setting changes the experiment. Of several files each is laid over those before it; one of
semcons run is taken as the experiment. The same command again continues with what is not finished; values and samples
may be added. Each trial has a run folder below DIR/trials.

example:
  semcons sweep sweep.yaml --num_rounds 2 --out runs/sweep
"""


FILES = "YAML files, each laid over those before it; without one, the defaults"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    came: list[int] = []
    try:
        _check_text(words)
        words, overrides = _split_settings(words) if words[:1] in (["run"], ["compare"], ["sweep"]) else (words, {})
        args = _parser(needs_out="--dry-run" not in words).parse_args(words)
        args.overrides = overrides
        _quiet()
        with _terminable(came):
            code: int = args.function(args)
    except SemconsError as error:
        return _fail(error)
    except ImportError as error:  # torch without CUDA's libraries, for one
        return _fail(UserError(f"{first_line(error)}; `semcons doctor` says what is missing"))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(RunFolderError(f"cannot read or write{where}: {error.strerror or error}"))
    except KeyboardInterrupt:
        print(f"{'terminated' if came else 'interrupted'}{_goes_on(words[0])}", file=sys.stderr)
        return 128 + (signal.SIGTERM if came else signal.SIGINT)
    return code


def _check_text(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:  # bytes of another encoding, which no file of a run could hold
            raise ConfigError(f"{word!a} on the command line is not UTF-8; write it, or rename it, in UTF-8") from error


def _goes_on(command: str) -> str:
    if command in ("run", "resume"):
        return "; semcons resume goes on with what is not finished"
    return "; the same command goes on with what is not finished" if command in ("compare", "sweep") else ""


@contextlib.contextmanager
def _terminable(came: list[int]) -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does. Further ones are ignored, so that everything is closed in order.

    The signal is noted in `came`: an exception class of its own would not do, since Ray replaces any KeyboardInterrupt
    by one of its own.
    """

    def terminate(number: int, _: object) -> NoReturn:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a mistake in one line, as all other errors are."""
        self.exit(2, f"semcons: {message}; see {self.prog} --help\n")


def _parser(*, needs_out: bool = True) -> argparse.ArgumentParser:
    from semcons_ray.commands import cost, init, parts, schema

    parser = _Parser(
        prog="semcons",
        description="Simulate federated fine-tuning of language models by semantic consensus, on Ray.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"semcons {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Any, summary: str, **more: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )
        sub.set_defaults(function=function)
        return sub

    def add_out(sub: argparse.ArgumentParser, summary: str, kind: Any = str) -> None:
        sub.add_argument("--out", type=kind, required=needs_out, metavar="DIR", help=summary)
        told = "only print what would be done: data, placement, bytes, tokens, hours"
        sub.add_argument("--dry-run", action="store_true", help=told)

    sub = command("init", init.run, "Write DIR/config.yaml: every setting with its default and a comment, or a preset.")
    sub.add_argument("folder", type=_local, metavar="DIR")
    init.add_arguments(sub)

    sub = command("schema", schema.run, "Print the JSON Schema of YAML files, by which editors complete them.")
    schema.add_arguments(sub)

    sub = command("parts", parts.run, "List what settings can name: algorithms, rules, metrics and others.")
    parts.add_arguments(sub)

    command("doctor", _doctor, "Check what this machine has, what works on it, and what to do about the rest.")

    sub = command(
        "run",
        _run,
        "Run an experiment; everything that it writes goes to a new folder.",
        usage="semcons run [CONFIG ...] [--any.setting value ...] (--out DIR | --dry-run)",
        epilog=f"settings (the same names as in the YAML file; default in brackets):\n\n{describe_settings()}",
    )
    sub.add_argument("config", type=Path, nargs="*", metavar="CONFIG", help=FILES)
    add_out(sub, "new folder for the run's files, or a URL")

    sub = command("resume", _resume, "Continue a run that was stopped or failed; its numbers stay the same.")
    sub.add_argument("folder", metavar="DIR", help="the run's folder, or its URL")

    sub = command(
        "compare",
        _compare,
        "Run algorithms on the same data, seeds, models and budget: quality against bytes, seconds and joules.",
        usage="semcons compare [CONFIG ...] [--any.setting value ...] (--out DIR | --dry-run)",
        epilog=COMPARE,
    )
    sub.add_argument("config", type=Path, nargs="*", metavar="CONFIG", help=FILES)
    add_out(sub, "folder for all runs, tables and the figure", _local)

    sub = command(
        "sweep",
        _sweep,
        "Try many settings with Ray Tune: quality against bytes, seconds and joules, and the effect of each.",
        usage="semcons sweep SWEEP ... [--any.setting value ...] (--out DIR | --dry-run)",
        epilog=SWEEP,
    )
    sub.add_argument("config", type=Path, nargs="+", metavar="SWEEP", help="YAML files, each laid over those before it")
    add_out(sub, "folder for all trials and the report", _local)

    sub = command(
        "watch", _watch, "Show a run that goes on in another process: each round that is done, until it ends."
    )
    sub.add_argument("folder", type=_local, metavar="DIR", help="the run's folder")

    sub = command("report", _report, "Print a run's result table, and write its report.html again.")
    sub.add_argument("folder", metavar="DIR", help="the run's folder, or its URL")

    sub = command(
        "evaluate",
        _evaluate,
        "Measure a finished run's base models and adapters by tasks of lm-eval, into its metrics and report.",
    )
    sub.add_argument("folder", metavar="RUN", help="the run's folder, or its URL")
    sub.add_argument(
        "--tasks",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        required=True,
        metavar="TASKS",
        help="tasks, groups or tags of lm-eval or YAML files, separated by commas: arc_challenge,ifeval,./my_task.yaml",
    )
    sub.add_argument("--limit", type=_positive, metavar="N", help="only the first N items of each task")

    sub = command("cost", cost.run, "Calculate the bytes that a round sends: answers against LoRA weights.")
    cost.add_arguments(sub)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from semcons_ray.commands.doctor import diagnose, exit_code, render

    checks = diagnose()
    render(checks)
    return exit_code(checks)


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from semcons_ray.commands import dry_run

        if args.out:
            _check_free(args.out)
        dry_run.run(config)
        return 0
    from semcons_ray.commands.progress import Progress
    from semcons_ray.runs.experiment import run_experiment

    with _run_folder(args.out, new=True) as (folder, copying):
        with Progress() as progress:
            run_experiment(config, folder, *copying, progress)
        return _finish(folder)


def _resume(args: argparse.Namespace) -> int:
    from semcons_ray.commands.progress import Progress
    from semcons_ray.runs.experiment import resume_experiment

    with _run_folder(args.folder) as (folder, copying):
        with Progress() as progress:
            resume_experiment(folder, *copying, progress)
        return _finish(folder)


def _compare(args: argparse.Namespace) -> int:
    from semcons_ray.reporting.summary import render_summary
    from semcons_ray.studies.comparison import load_comparison, plan_runs, run_comparison

    wanted = load_comparison(args.config, args.overrides)
    if args.dry_run:
        from semcons_ray.commands import dry_run

        runs = plan_runs(wanted, args.out or Path())
        dry_run.run_many([(run.arm, run.config) for run in runs[: len(wanted.arms)]], times=len(wanted.seeds))
        return 0
    done, failed = run_comparison(wanted, args.out, lambda line: print(line, file=sys.stderr, flush=True))
    if done:
        reference, baseline = wanted.reference, wanted.baseline
        print(render_summary(done.summary, wanted.name, reference=reference, baseline=baseline, metrics=done.metrics))
        print(f"table and figure: {args.out / 'table.md'}, {args.out / 'pareto.svg'}")
    return 1 if failed else 0


def _sweep(args: argparse.Namespace) -> int:
    from semcons_ray.studies.search_space import describe_point, load_sweep

    wanted = load_sweep(args.config, args.overrides)
    if args.dry_run:
        from semcons_ray.commands import dry_run

        points = wanted.points()  # none if they are chosen as the sweep goes: then the first stands for all
        labelled = [(describe_point(point), wanted.configure(point)) for point in points or [wanted.first()]]
        dry_run.run_many(labelled, times=1 if points else wanted.num_samples)
        return 0
    from semcons_ray.reporting.sweep import render_sweep
    from semcons_ray.studies.sweep import run_sweep

    result, failed = run_sweep(wanted, args.out, lambda line: print(line, file=sys.stderr, flush=True))
    if result:
        print(render_sweep(result))
        print(f"report: {args.out / 'report.html'}")
    return 1 if failed else 0


def _watch(args: argparse.Namespace) -> int:
    from semcons_ray.commands.watch import watch

    return watch(args.folder)


def _report(args: argparse.Namespace) -> int:
    with _run_folder(args.folder) as (folder, _):
        return _finish(folder)


def _evaluate(args: argparse.Namespace) -> int:
    from semcons_ray.runs.tasks import evaluate_run

    with _run_folder(args.folder) as (folder, _):
        evaluate_run(folder, args.tasks, args.limit, lambda line: print(f"{line} ...", file=sys.stderr, flush=True))
        return _finish(folder)


def _positive(words: str) -> int:
    if not words.isdecimal() or int(words) < 1:
        raise argparse.ArgumentTypeError(f"{words} is not a number above 0")
    return int(words)


def _local(place: str) -> Path:
    if "://" in place:
        raise RunFolderError(f"{place} is a URL; only run, resume and report take one")
    return Path(place)


def _check_free(place: str) -> None:
    if "://" in place:
        from semcons_ray.runs.remote_folder import RemoteFolder

        RemoteFolder(place).check_free()
    else:
        from semcons_ray.runs.run_folder import RunFolder

        RunFolder.check_free(Path(place))


@contextlib.contextmanager
def _run_folder(place: str, *, new: bool = False) -> Iterator[tuple[Path, list[Observer]]]:
    """A run's local folder, and, for a URL, the observer that copies each round there."""
    if "://" not in place:
        yield Path(place), []
        return
    from semcons_ray.runs.remote_folder import Copying, RemoteFolder

    remote = RemoteFolder(place)
    if new:
        remote.check_free()
    else:
        remote.fetch()
    yield remote.folder, [Copying(remote)]
    remote.copy()


def _finish(folder: Path) -> int:
    from semcons_ray.reporting import read_run, render_result, write_report

    print(render_result(read_run(folder)))
    print(f"report: {write_report(folder)}")
    return 0


def _split_settings(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate `--a.b value` and `--a.b=value` from the other words; returns those, and the nested settings.

    argparse cannot do it: it would take the value of an option that it does not know for an argument. Nor does it take
    files on both sides of an option, so its own options are moved behind them.
    """
    others: list[str] = []
    options: list[str] = []
    nested: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--"):
            others.append(word)
            continue
        if key in ("", "out", "help", "dry-run"):
            options += [word, *([rest.pop(0)] if word == "--out" and rest else [])]
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        value = parse_setting(key, text)
        *parents, last = key.split(".")
        place = nested
        for depth, parent in enumerate(parents, start=1):
            place = place.setdefault(parent, Within() if is_option(key) and depth == len(parents) else {})
            if not isinstance(place, dict):
                raise ConfigError(f"--{key}: {parent} was given a value itself")
        place[last] = value
    return [*others, *options], nested


def _quiet() -> None:
    """Turn off libraries' progress bars and notices, among which this command's own lines would be lost."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and tables hold what the terminal's encoding may lack
        sys.stdout.reconfigure(errors="backslashreplace")
    told = logging.StreamHandler(sys.stderr)
    told.setLevel(logging.WARNING)  # a run's own log has more
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[told])
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "RAY_DEDUP_LOGS"):
        os.environ.setdefault(name, "1")
    warnings.simplefilter("ignore")


def _fail(error: SemconsError) -> int:
    print(f"semcons: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
