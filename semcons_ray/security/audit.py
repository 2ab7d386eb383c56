"""Looks in a finished run for private text: in the answers that clients sent, the pseudo-labels and the models."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.canaries import Canary, read_canaries, without_canaries
from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit, read_split
from semcons_ray.errors import DataError, RunFolderError, UserError, writing
from semcons_ray.federation.fleet import client_folder
from semcons_ray.federation.server import build_embedder
from semcons_ray.messages import text_of
from semcons_ray.modeling.chat import read_formats
from semcons_ray.modeling.exported import load_base, response_nll, with_adapter
from semcons_ray.reporting.tables import read_run
from semcons_ray.reporting.terminal import print_whole
from semcons_ray.runs.assembly import embedder_of, find_models, unused_examples
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.runs.tasks import device_here
from semcons_ray.security.canaries import in_models, in_texts, recovered
from semcons_ray.security.chance import Floats
from semcons_ray.security.disclosure import Embed, Shares, disclosure
from semcons_ray.security.mixes import compare_mixes, infer_mixes

ALPHA = 0.01
"""An adjusted p-value below this is a leak: among 100 runs without one, at most one false alarm is to be expected."""

FOLDER = "audit"


@dataclass(frozen=True, eq=False)
class Audit:
    """What of private data the answers, the pseudo-labels and the models of a run tell; `audit` returns one.

    Attributes:
        disclosure: For each client that has sent answers, whether these are more like its private examples than like
            others; see `security.disclosure.disclosure`. No rows if no answers are sent.
        canaries: How well canaries are found again; see `security.canaries.recovered`. No rows without `data.canaries`.
        mixes: How well clients' mixes of categories are guessed; see `security.mixes.compare_mixes`. No rows if no
            answers are sent, or there is one category or one client.
    """

    disclosure: pd.DataFrame
    canaries: pd.DataFrame
    mixes: pd.DataFrame

    @property
    def leaks(self) -> bool:
        """Whether private text was found, in answers or by canaries, with a chance of a false alarm below 1% each."""
        return bool((self.disclosure["p_adjusted"] < ALPHA).any() or (self.canaries["p_adjusted"] < ALPHA).any())

    @property
    def verdict(self) -> str:
        """What was found, a line for each kind of test."""
        return "\n".join([self._of_disclosure(), self._of_canaries(), self._of_mixes()])

    def _of_disclosure(self) -> str:
        table = self.disclosure
        if table.empty:
            return "answers: none were sent"
        found = table[table["p_adjusted"] < ALPHA]
        if found.empty:
            return (
                f"answers: no leak noticed, of {table['client_id'].nunique()} clients; smallest adjusted p "
                f"{_least(table):.2g}"
            )
        clients = ", ".join(
            f"{client} ({', '.join(f'{row.score} {row.effect:+.3f}' for row in rows.itertuples())})"
            for client, rows in found.groupby("client_id")
        )
        return f"answers: LEAK, they hold private examples of client {clients}; adjusted p < {ALPHA}"

    def _of_canaries(self) -> str:
        table = self.canaries
        if table.empty:
            return "canaries: there are none; data.canaries puts some among private examples"
        found = table[table["p_adjusted"] < ALPHA]
        if found.empty:
            return f"canaries: not noticed outside clients' own models; smallest adjusted p {_least(table):.2g}"
        places = ", ".join(f"{row.place} ({row.kind}, AUC {row.auc:.2f})" for row in found.itertuples())
        return f"canaries: LEAK, the coin shows in {places}; adjusted p < {ALPHA}"

    def _of_mixes(self) -> str:
        table = self.mixes
        if table.empty:
            return "mixes of categories: nothing to guess them from"
        error, guess, p = (table[name].mean() for name in ("error", "guess", "p"))
        told = "tell of them" if p < ALPHA else "are not shown to tell of them"
        return f"mixes of categories: answers {told} (p {p:.2g}); error {error:.2f}, that of the mean mix {guess:.2f}"

    def __str__(self) -> str:
        """The tables and the verdict as text, as wide as the terminal."""
        stream, width = io.StringIO(), shutil.get_terminal_size((200, 24)).columns
        console = Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=width, force_jupyter=False)
        for frame in (self.disclosure, self.canaries, self.mixes):
            if not frame.empty:
                print_whole(console, _rendered(frame))
                console.print()
        console.print(self.verdict)
        return stream.getvalue().rstrip("\n")

    def write(self, folder: Path) -> None:
        """Write the tables that have rows as CSV files, and verdict.txt.

        Raises:
            RunFolderError: The folder cannot be written to.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("disclosure", "canaries", "mixes"):
                frame: pd.DataFrame = getattr(self, name)
                if not frame.empty:
                    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
            (folder / "verdict.txt").write_text(f"{self.verdict}\n", encoding="utf-8")


def _least(table: pd.DataFrame) -> float:
    return float(table["p_adjusted"].min())


def _rendered(frame: pd.DataFrame) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for name in frame:
        table.add_column(str(name).replace("_", " "), justify="left" if frame[name].dtype == "str" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    return table


def audit_run(out: Path, say: Callable[[str], None]) -> Audit:
    """Audit a run, and write what was found to its folder.

    All draws are from the run's seed, so the same run gives the same numbers.

    Args:
        out: The run's folder.
        say: Called with a line before each step that takes long.

    Raises:
        RunFolderError: It is no folder of a run that is finished.
        UserError: Nothing is held out that private examples could be compared with.
        ConfigError: The run's GPU is not there.
        ModelError: A model cannot be found or loaded.
    """
    folder = RunFolder(out)
    config = folder.begun_with()
    if not folder.is_finished(config.num_rounds):
        raise RunFolderError(f"{out} is not finished, so not all is there to audit; semcons resume {out} goes on")
    canaries = read_canaries(folder.canaries)
    split = without_canaries(read_split(folder.data), canaries)
    random = np.random.default_rng(config.seed)
    algorithm = config.algorithm
    answers = read_run(out).consensus
    if not algorithm.forms_consensus or algorithm.rule == "own_answer":  # then none have left their client
        answers = answers[:0]
    sent = {
        client: answers.loc[answers["client_id"] == client, "answer"].tolist()
        for client in sorted(answers["client_id"].unique().tolist())
    }
    told, mixes = pd.DataFrame(columns=["p_adjusted"]), pd.DataFrame()
    scores: dict[str, Floats] = {}
    if sent:
        say(f"comparing {len(answers)} answers with private examples")
        embed = build_embedder(*embedder_of(config, folder.revisions()), "cpu").embed
        unused = _unused(config, split, folder, say)
        told = audit_answers(config, split, unused, sent, embed, random)
        mixes = _mixes(split, answers, embed, random)
        scores["answers"] = in_texts(canaries, sent)
        if algorithm.elects:
            labels = answers.loc[answers["chosen"], "answer"].tolist()
            scores["pseudo-labels"] = in_texts(canaries, dict.fromkeys(range(len(split.private)), labels))
    if canaries:
        scores |= _in_models(folder, config, canaries, say)
    result = Audit(told, recovered(canaries, scores, random), mixes)
    result.write(out / FOLDER)
    return result


def _unused(
    config: ExperimentConfig, split: DataSplit, folder: RunFolder, say: Callable[[str], None]
) -> list[Example]:
    try:
        return unused_examples(config, split, folder.revisions())
    except DataError as error:
        say(f"only examples of the run itself are held out, which makes leaks harder to see: {error}")
        return []


def audit_answers(
    config: ExperimentConfig,
    split: DataSplit,
    unused: Sequence[Example],
    answers: Mapping[int, Sequence[str]],
    embed: Embed,
    random: np.random.Generator,
) -> pd.DataFrame:
    """The train-against-held-out test of a run's answers, see `disclosure`.

    Held out are a client's own test set, what is used nowhere, the test set of all and others' private examples; where
    clients are natural, only what is their own.

    Args:
        config: The run's settings.
        split: Its data, without canaries.
        unused: Examples of the data that are in no part of the split.
        answers: All answers that a client has sent, by client id.
        embed: The run's embedder.
        random: Random numbers of the permutations.

    Raises:
        UserError: Nothing is held out that private examples could be compared with.
    """
    shares = {}
    for client in answers:
        trained = split.private[client]
        tested = split.client_test[client] if split.client_test else ()
        others = [one for other, share in enumerate(split.private) if other != client for one in share]
        held_out = [*tested, *unused, *split.test, *others]
        if config.data.partition == "natural":
            held_out = [one for one in held_out if one.owner == trained[0].owner]
        shares[client] = Shares(trained, held_out)
    public = [text_of(example.prompt) for example in split.public]
    table = disclosure(shares, answers, public, embed, random)
    if table.empty:
        raise UserError(
            "no private example has others of its category, and with data.partition natural of its client, on which "
            "nobody trained; raise data.num_test or data.client_test_fraction"
        )
    return table


def _mixes(split: DataSplit, answers: pd.DataFrame, embed: Embed, random: np.random.Generator) -> pd.DataFrame:
    known = [example for example in (*split.test, *split.public) if example.response]
    categories = {example.category for example in known}
    if len(categories) < 2 or answers["client_id"].nunique() < 2:
        return pd.DataFrame()
    names, inferred = infer_mixes(answers, known, embed)
    true = {}
    for client in inferred:
        has = [example.category for example in split.private[client]]
        true[client] = np.array([has.count(name) for name in names]) / len(has)
    return compare_mixes(inferred, true, random)


def _in_models(
    folder: RunFolder, config: ExperimentConfig, canaries: Sequence[Canary], say: Callable[[str], None]
) -> dict[str, Floats]:
    """Scores of canaries by the adapters of the run."""
    pairs = [(canary.prompt, canary.response) for canary in canaries]
    models, model = config.client_models(), config.model
    nll: dict[int, Floats] = {}
    known: dict[str, Floats] = {}  # clients may share one adapter
    for name, path in find_models(config, folder.revisions()).items():
        say(f"{name}: how likely it finds {len(canaries)} canaries")
        base = load_base(str(path), dtype=model.dtype, device=device_here(folder), quantization=model.quantization)
        chat = read_formats(
            {name: path},
            max_length=model.num_tokens,
            system_prompt=model.system_prompt,
            template_kwargs=model.chat_template_kwargs,
            template_date=model.template_date,
        )[name]
        before = np.array(response_nll(base, chat, pairs))
        for client, has in enumerate(models):
            adapter = folder.adapters / client_folder(client)
            if has == name and adapter.is_dir():
                content = sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
                if content not in known:
                    with with_adapter(base, adapter) as adapted:
                        known[content] = before - np.array(response_nll(adapted, chat, pairs))
                nll[client] = known[content]
    if not nll:
        return {}
    return in_models(canaries, nll, same=config.algorithm.averages_weights and len(known) == 1)


