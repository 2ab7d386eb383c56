"""The `semcons` command. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 1 the run failed, and resume continues it; 2 a mistake that the user can mend, told in one line;
130 interrupted (SIGINT) and 143 terminated (SIGTERM), after both of which resume continues.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import semcons_ray as sr
from semcons_ray.api.experiments import RULES, SHARES, Kind
from semcons_ray.api.places import local_folder
from semcons_ray.config import Layers, Within, as_study, describe_settings, is_option, parse_setting
from semcons_ray.errors import ConfigError, RunFolderError, SemconsError, UserError, first_line

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
  semcons labels runs/first                            how many labels each rule gets right, from its stored answers
  semcons attack runs/first --out runs/attack          how many labels malicious clients would capture
  semcons replay runs/first --federation phones.yaml   its hours and joules on other devices and links
  semcons break-even runs/quality --models llama-3.1-8b=rtx-4090   by size of the model and link, who is faster
  semcons audit runs/first                             whether private text shows in its answers and models
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
LABELS = """\
A part with options is written 'plurality {min_cosine: 0.95}'. Every rule is tried with every competence, defence and
number of samples. Answers are right if they match the public prompts' own responses exactly, but for case, punctuation
and articles.

example:
  semcons labels runs/seed-0 runs/seed-1 --rules medoid 'plurality {min_cosine: 0.95}' --csv labels.csv
"""
ATTACK = """\
A part with options is written 'backdoor {trigger: gcd}'. Every rule is tried with every defence, attack and share of
malicious clients, who come in addition to those of the run. A label is captured if it is an answer of theirs, wrong,
and would not be elected without them. Nothing is trained, unless --learn asks for it.

examples:
  semcons attack experiments/attack/labels.yaml --seeds 0 1 2 --out runs/attack
  semcons attack runs/seed-0 runs/seed-1 --rules medoid plurality --shares 0.3 --out runs/attack
  semcons attack runs/seed-0 --attacks 'backdoor {trigger: gcd}' --shares 0.3 --learn --out runs/backdoor
"""
REPLAY = """\
F.yaml has a section federation, as the settings of an experiment:

  federation:
    devices: {laptop-cpu: 3, raspberry-pi-5: 1}      # shares of clients; semcons show devices lists them
    links: {dsl: 1}                                  # semcons show links
    policy: deadline                                 # semcons parts policy
    policy_options: {hours: 2}

Laid over an experiment's own settings (semcons run config.yaml F.yaml) it gives the run a virtual clock. A replay
runs nothing again: it takes what clients trained, wrote and sent from the ledger.

examples:
  semcons replay runs/first --federation F.yaml --model llama-3.1-8b
  semcons replay runs/quality --federation F.yaml --out runs/quality-on-laptops
"""
BREAK_EVEN = """\
examples:
  semcons break-even runs/quality --models own=laptop-cpu llama-3.2-1b=macbook-m4 llama-3.1-8b=rtx-4090
  semcons break-even runs/quality --models llama-3.1-8b --links 4g dsl fibre --federation F.yaml --out runs/map
"""
SCHEMA = """\
Editors with YAML's language server find the schema by a line at the head of a file, which semcons init writes:

  # yaml-language-server: $schema=config.schema.json"""
FILES = "YAML files, each laid over those before it"
RUN = "the run's folder, or its URL"
DRY_RUN = "only print what would be done: data, placement, bytes, tokens, hours"
TASKS = "tasks, groups or tags of lm-eval or YAML files, separated by commas: arc_challenge,ifeval,./my_task.yaml"


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
    from semcons_ray.api.profiles import TABLES
    from semcons_ray.api.schema import KINDS
    from semcons_ray.commands import cost, init, parts

    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(
        prog="semcons",
        description="Simulate federated fine-tuning of language models by semantic consensus, on Ray.",
        epilog=EXAMPLE,
        **shape,
    )
    parser.add_argument("--version", action="version", version=f"semcons {sr.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[..., int], does: object, **more: Any) -> argparse.ArgumentParser:
        summary = does if isinstance(does, str) else (inspect.getdoc(does) or "").partition("\n")[0]
        sub = commands.add_parser(name, help=summary, description=summary, **shape, **more)
        sub.set_defaults(function=function)
        return sub

    def work(name: str, function: Callable[..., int], does: object, out: Any, about: str, epilog: str) -> None:
        """A command that does what files say."""
        file = "SWEEP" if name == "sweep" else "CONFIG"
        files, count, told = f"[{file} ...]", "*", f"{FILES}; without one, the defaults"
        if name == "sweep":
            files, count, told = f"{file} ...", "+", FILES
        usage = f"semcons {name} {files} [--any.setting value ...] (--out DIR | --dry-run)"
        sub = command(name, function, does, usage=usage, epilog=epilog)
        sub.add_argument("config", type=Path, nargs=count, metavar=file, help=told)
        sub.add_argument("--out", type=out, required=needs_out, metavar="DIR", help=about)
        sub.add_argument("--dry-run", action="store_true", help=DRY_RUN)

    sub = command("init", init.run, "Write DIR/config.yaml: every setting with its default and a comment, or a preset.")
    sub.add_argument("folder", type=local_folder, metavar="DIR")
    init.add_arguments(sub)
    schema = "Print the JSON Schema of YAML files, by which editors complete them."
    sub = command("schema", _schema, schema, epilog=SCHEMA)
    kinds = f"the command that the file is for: {', '.join(KINDS)}. Default: %(default)s."
    sub.add_argument("kind", nargs="?", choices=KINDS, default="run", metavar="COMMAND", help=kinds)
    sub = command("parts", parts.run, "List what settings can name: algorithms, rules, metrics and others.")
    parts.add_arguments(sub)
    command("doctor", _doctor, sr.diagnose)
    settings = f"settings (the same names as in the YAML file; default in brackets):\n\n{describe_settings()}"
    work("run", _run, sr.run, str, "new folder for the run's files, or a URL", settings)
    command("resume", _resume, sr.resume).add_argument("folder", metavar="DIR", help=RUN)
    work("compare", _compare, sr.compare, str, "folder for all runs, tables and the figure, or a URL", COMPARE)
    work("sweep", _sweep, sr.sweep, str, "folder for all trials and the report, or a URL", SWEEP)
    watched = RUN.partition(",")[0]
    command("watch", _watch, sr.watch).add_argument("folder", type=local_folder, metavar="DIR", help=watched)
    report = "Print a run's result table, and write its report.html again."
    command("report", _report, report).add_argument("folder", metavar="DIR", help=RUN)
    sub = command("evaluate", _evaluate, sr.evaluate)
    sub.add_argument("folder", metavar="RUN", help=RUN)
    sub.add_argument("--tasks", type=_names, required=True, metavar="TASKS", help=TASKS)
    sub.add_argument("--limit", type=_positive, metavar="N", help="only the first N items of each task")
    command("audit", _audit, sr.audit).add_argument("folders", nargs="+", metavar="RUN", help=RUN)
    sub = command("labels", _labels, sr.labels, epilog=LABELS)
    sub.add_argument("folders", nargs="+", metavar="RUN", help="folders or URLs of runs, of several seeds")
    sub.add_argument("--rules", nargs="+", default=RULES, metavar="RULE", help=f"default: {', '.join(RULES)}")
    sub.add_argument("--competences", nargs="+", metavar="NAME", help="default: all that are built in")
    sub.add_argument("--defences", nargs="+", default=["none"], metavar="NAME", help="default: none")
    samples = "how many of a client's samples to use, the first ones. Default: 1, 2, 4 and so on, and all"
    sub.add_argument("--samples", type=_positive, nargs="+", default=(), metavar="N", help=samples)
    sub.add_argument("--csv", type=local_folder, metavar="FILE", help="a file for the table, with all its columns")
    sub = command("attack", _attack, sr.attack, epilog=ATTACK)
    places = "folders or URLs of runs, of several seeds; or settings of an experiment, to be run first, in DIR/honest"
    sub.add_argument("places", nargs="+", metavar="RUN", help=places)
    seeds = "with which seeds an experiment is run. Default: 0"
    sub.add_argument("--seeds", type=int, nargs="+", default=(0,), metavar="SEED", help=seeds)
    about = "folder for the table and the figure"
    sub.add_argument("--out", type=local_folder, required=True, metavar="DIR", help=about)
    sub.add_argument("--rules", nargs="+", default=(), metavar="RULE", help="default: the rule of the first run")
    defences = ["none", "independent"]
    sub.add_argument("--defences", nargs="+", default=defences, metavar="NAME", help=f"default: {', '.join(defences)}")
    sub.add_argument("--attacks", nargs="+", default=(), metavar="NAME", help="default: all that have a name")
    shares = f"of all clients, which are malicious. Default: {', '.join(map(str, SHARES))}"
    sub.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE", help=shares)
    learnt = "let the runs' clients learn the labels that backdoors led to, for one round, in DIR/learnt"
    sub.add_argument("--learn", action="store_true", help=learnt)
    sub = command("replay", _replay, sr.replay, epilog=REPLAY)
    places = "folders or URLs of finished runs, comparisons or sweeps"
    sub.add_argument("places", nargs="+", metavar="RUN", help=places)
    federation = "YAML file with a section federation. Default: each run's own settings"
    sub.add_argument("--federation", type=Path, metavar="F.yaml", help=federation)
    scaled = "model for whose size times and weights are calculated, of semcons show models. Default: the runs' own"
    sub.add_argument("--model", metavar="NAME", help=scaled)
    sub.add_argument("--out", type=local_folder, metavar="DIR", help="folder for tables and figures")
    sub = command("break-even", _break_even, sr.break_even, epilog=BREAK_EVEN)
    sub.add_argument("places", nargs="+", metavar="RUN", help=places)
    scaled = "models of semcons show models, or own, each with the clients' device; without: that of --federation"
    sub.add_argument("--models", nargs="+", required=True, type=_model_on, metavar="NAME[=DEVICE]", help=scaled)
    sub.add_argument("--links", nargs="+", default=(), metavar="NAME", help="default: all of semcons show links")
    arms = "arms that are compared with --against; default: all"
    sub.add_argument("--arms", nargs="+", default=(), metavar="ARM", help=arms)
    against = "arm with which the others are compared; default: the one that averages weights"
    sub.add_argument("--against", metavar="ARM", help=against)
    sub.add_argument("--federation", type=Path, metavar="F.yaml", help="YAML file with a section federation, the rest")
    sub.add_argument("--out", type=local_folder, metavar="DIR", help="folder for tables and figures")
    show = "List the devices, links, regions or models that a federation can name, with where their numbers are from."
    sub = command("show", _show, show)
    sub.add_argument("kind", choices=TABLES, metavar="KIND", help=f"what to list: {', '.join(TABLES)}")
    sub = command("cost", cost.run, "Calculate the bytes that a round sends: answers against LoRA weights.")
    cost.add_arguments(sub)
    return parser


def _schema(args: argparse.Namespace) -> int:
    from semcons_ray.api.schema import schema_text

    print(schema_text(args.kind), end="")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from semcons_ray.commands.doctor import exit_code, render

    checks = sr.diagnose()
    render(checks)
    return exit_code(checks)


def _run(args: argparse.Namespace) -> int:
    settings = Layers.read(args.config, args.overrides)
    if args.dry_run:
        return _plan(settings, "run", args.out)
    return _tell(sr.run(settings, out=args.out, observers=[sr.Progress()]))


def _resume(args: argparse.Namespace) -> int:
    return _tell(sr.resume(args.folder, observers=[sr.Progress()]))


def _compare(args: argparse.Namespace) -> int:
    settings = _of_study(args)
    if args.dry_run:
        return _plan(settings, "compare", args.out)
    done = sr.compare(settings, out=args.out, say=_say)
    if done.runs:
        place = args.out.rstrip("/")
        print(f"{done}\n\ntable and figure: {place}/table.md, {place}/{done.figure.name}")
    return 1 if done.failed else 0


def _sweep(args: argparse.Namespace) -> int:
    settings = _of_study(args)
    if args.dry_run:
        return _plan(settings, "sweep", args.out)
    done = sr.sweep(settings, out=args.out, say=_say)
    if done.runs:
        print(f"{done}\nreport: {args.out.rstrip('/')}/{done.figure.name}")
    return 1 if done.failed else 0


def _watch(args: argparse.Namespace) -> int:
    return 0 if sr.watch(args.folder) else 1


def _report(args: argparse.Namespace) -> int:
    found = sr.load(args.folder)
    if not isinstance(found, sr.Run):
        raise RunFolderError(f"{args.folder} is no run folder, but {found!r}")
    found.write_report()
    return _tell(found)


def _evaluate(args: argparse.Namespace) -> int:
    return _tell(sr.evaluate(args.folder, args.tasks, limit=args.limit, say=lambda line: _say(f"{line} ...")))


def _audit(args: argparse.Namespace) -> int:
    for number, folder in enumerate(args.folders):
        found = sr.audit(folder, say=lambda line: _say(f"{line} ..."))
        print(f"{chr(10) if number else ''}{folder}\n\n{found}")
    return 0


def _labels(args: argparse.Namespace) -> int:
    given = {"rules": args.rules, "competences": args.competences, "defences": args.defences}
    found = sr.labels(*args.folders, **given, num_samples=args.samples)
    if args.csv:
        found.write(args.csv)
    print(f"{found}\n\ntable: {args.csv}" if args.csv else found)
    return 0


def _attack(args: argparse.Namespace) -> int:
    given = {"rules": args.rules, "defences": args.defences, "attacks": args.attacks, "shares": args.shares}
    done = sr.attack(*args.places, **given, seeds=args.seeds, learn=args.learn, out=args.out, say=_say)
    print(f"{done}\n\ntable and figure: {args.out / 'attack.csv'}, {args.out / 'attack.svg'}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    done = sr.replay(*args.places, federation=args.federation, model=args.model)
    print(done)
    if args.out:
        done.write(args.out)
        print(f"\ntables and figures: {args.out}")
    return 0


def _model_on(text: str) -> tuple[str, str | None]:
    """A model, and the device that clients have with it."""
    name, _, device = text.partition("=")
    return name, device or None


def _break_even(args: argparse.Namespace) -> int:
    models = dict(args.models)
    if len(models) < len(args.models):
        raise UserError("--models: a model is there twice; each has one device")
    given = {name: getattr(args, name) for name in ("links", "federation", "arms", "against")}
    done = sr.break_even(*args.places, models=models, **given)
    print(done)
    if args.out:
        done.write(args.out)
        print(f"\ntables and figures: {args.out}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from semcons_ray.api.profiles import render_profiles

    print(render_profiles(args.kind))
    return 0


def _of_study(args: argparse.Namespace) -> Layers:
    """Settings of a comparison or a sweep; those on the command line are of its experiment."""
    return Layers.read(args.config, as_study(args.overrides) if args.overrides else None)


def _plan(settings: Layers, kind: Kind, out: str | Path | None) -> int:
    print(sr.plan(settings, kind, out=out, observers=[sr.Progress()]))
    return 0


def _tell(run: sr.Run) -> int:
    print(f"{run}\n\nreport: {run.report_html}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(words: str) -> list[str]:
    return [name.strip() for name in words.split(",") if name.strip()]


def _positive(words: str) -> int:
    if not words.isdecimal() or int(words) < 1:
        raise argparse.ArgumentTypeError(f"{words} is not a number above 0")
    return int(words)


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
