import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.losses import Reason, Tally
from semcons_ray.errors import RunFolderError
from semcons_ray.reporting import read_run, write_report
from semcons_ray.reporting.html import describe_setting, energy_note, headlines, render_report
from semcons_ray.reporting.prompts import MAX_TEXT_CHARS, prompt_table
from semcons_ray.runs.run_folder import RunFolder
from tests.reporting.builder import HOSTILE, forget_rounds_after, write_items, write_run


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts by id."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self._script = [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._script = dict(attributes).get("id", "")

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None


def describe(**sections):
    return describe_setting(ExperimentConfig.model_validate(sections).model_dump(mode="json"))


def test_the_report_is_written_beside_and_replaced(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in folder.iterdir() if "report" in path.name] == ["report.html"]


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot write .*report\.html"):
        write_report(folder)


def test_a_worker_of_many_clients_takes_no_more_room(tmp_path):
    folder = write_run(tmp_path / "run")
    placement = json.loads((folder / "placement.json").read_text())
    placement["workers"][0]["clients"] = [*range(0, 100_000, 2)]
    (folder / "placement.json").write_text(json.dumps(placement))
    assert '<td class="text">0, 2, 4, 6, 8, 10, 12, 14, ... (50000)</td>' in render_report(read_run(folder))


def test_hostile_text_stays_text(tmp_path):
    folder = write_run(
        tmp_path / "run",
        models=(HOSTILE,),
        answer=lambda round, prompt, client: HOSTILE,
        settings={"name": HOSTILE, "model": {"name": HOSTILE}},
    )
    html = render_report(read_run(folder))
    page = Page(html)
    assert "<script>document" not in html
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert [attributes for tag, attributes in page.tags if any(name.startswith("on") for name in attributes)] == []
    assert HOSTILE in json.loads(page.scripts["prompt-data"])["texts"]


def section(html, name):
    begin = html.index(f'id="{name}"')
    return html[begin : html.index("</section>", begin)]


def test_metrics_have_their_intervals_and_tasks_their_errors_in_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    without = render_report(read_run(folder))
    assert 'id="metrics"' not in without
    assert 'id="tasks"' not in without
    write_items(folder)
    metrics = pd.read_parquet(folder / "metrics.parquet")
    column = f"lm_eval/{HOSTILE}/acc"
    metrics = metrics.assign(**{column: 0.25 + metrics["round"] / 8, f"{column}_stderr": 0.1})
    metrics.to_parquet(folder / "metrics.parquet", index=False)
    html = render_report(read_run(folder))
    assert "<script>document" not in html
    known = section(html, "metrics")
    for said in ('<td class="text">NLL</td><td>2.000 [1.', "<td>−0.400 [−0.", "<td>40</td>", "not what another"):
        assert said in known
    assert "<td>0.250 ± 0.196</td><td>0.500 ± 0.196</td><td>+0.250</td>" in section(html, "tasks")


def test_what_of_the_data_is_not_used_is_in_the_page_by_reason(tmp_path):
    folder = write_run(tmp_path / "run")
    assert 'id="losses"' not in render_report(read_run(folder))  # a folder of before it was counted
    counts = {
        Reason(words=f"with {HOSTILE}", remedy="mend it"): 388,
        Reason(words="thinned out"): 1000,
    }
    few = Tally.of("data.source b.csv", "rows left out", 1000, {Reason(words="with none", remedy="mend it"): 10})
    RunFolder(folder).write_tallies([Tally.of("data.source a.csv", "rows left out", 1432, counts), few])
    html = render_report(read_run(folder))
    assert "<script>document" not in html
    losses = section(html, "losses")
    for said in ("warning: rows left out", "388 of 432", "89.8%", ">388<", "thinned out, by design", ">1,000<"):
        assert said in losses
    assert losses.count("warning") == 1
    assert "10 of 1,000" in losses


def test_nothing_outside_the_page_is_named(tmp_path):
    html = render_report(read_run(write_run(tmp_path / "run")))
    addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^"'\s<]*""", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for _, attributes in Page(html).tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_the_policy_forbids_everything_but_the_own_script(tmp_path):
    page = Page(render_report(read_run(write_run(tmp_path / "run"))))
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    policies = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules.pop("script-src").startswith("'sha256-")
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_private_examples_are_not_in_the_page(tmp_path):
    html = render_report(read_run(write_run(tmp_path / "run")))
    assert "secret" not in html
    assert "private 1" not in html
    assert "reference 1" in html


def test_headlines(tmp_path):
    run = read_run(write_run(tmp_path / "run", lost={2: (1,)}))
    assert [(item["label"], item["value"], item["note"]) for item in headlines(run)] == [
        (
            "Mean test NLL, base → round 2",
            "2.000 → 1.667",
            "−16.7%, nats a token, measured; 2 of 3 clients measured in round 2",
        ),
        ("Clients with lower test NLL", "3 of 3", "from −0.600 (client 2) to −0.200 (client 0)"),
        ("On the wire", "755 B", "505 B up, 250 B down, measured"),
        ("Energy", "295 J", "estimated"),
        ("Wall time", "12.0 s", "set-up 4.0 s of it, measured"),
    ]


def test_headlines_of_little(tmp_path):
    folder = forget_rounds_after(write_run(tmp_path / "base", energy_source="unavailable"), 0)
    base_only = headlines(read_run(folder))
    assert (base_only[0]["label"], base_only[0]["value"]) == ("Mean test NLL, base", "2.000")
    assert (base_only[3]["value"], base_only[3]["note"]) == ("unavailable", "no counter and no estimate")
    one = headlines(read_run(write_run(tmp_path / "one", num_clients=1, local_only=True)))
    assert (one[1]["value"], one[1]["note"]) == ("1 of 1", "−0.200 (client 0)")
    assert one[2]["value"] == "nothing"


def test_the_setting_in_a_sentence():
    usual = describe(
        seed=7,
        num_rounds=3,
        algorithm={"rule": "medoid", "first_exchange": 1},
        clients={"num_clients": 4},
        data={"source": "a.csv", "examples_per_client": 64, "partition": "dirichlet", "dirichlet_alpha": 0.5},
        model={"name": "org/tiny", "lora": {"rank": 8}},
        prompts={"budget": 32, "selection": "stratified"},
        training={"local_epochs": 1, "local_steps": None},
    )
    assert usual == (
        "4 clients fine-tune tiny (LoRA, rank 8) on 64 private examples each of a.csv, partition dirichlet with "
        "α = 0.5, 1 epoch a round for 3 rounds. They answer 32 public prompts (stratified); by the medoid rule the "
        "server keeps one answer to each as a pseudo-label, and abstains under 2 answers. Seed 7."
    )
    other = describe(
        num_rounds=1,
        algorithm={"rule": "multi_krum", "agreement_threshold": 0.8},
        clients={
            "num_clients": 4,
            "mix": {"org/a": 1, "org/b": 1},
            "participation": 0.5,
            "overrides": {"3": {"training": {"local_steps": 9}}, "2": {"training": {"local_steps": 8}}},
        },
        data={"partition": "iid"},
        training={"local_steps": 5},
    )
    assert "4 clients fine-tune a and b" in other
    assert "partition iid, 5 steps a round for 1 round. 50% of the clients take part in a round. Some clients" in other
    assert "Some clients have training or generation settings of their own: 2, 3. They answer" in other
    assert "by the multi krum rule the server" in other
    assert "as a pseudo-label, and abstains under 2 answers or an agreement of 0.8." in other
    alike = describe(algorithm={"rule": "own_answer"}, prompts={"budget": 32})
    assert "Each learns its own answers to 32 public prompts (stratified); nothing is exchanged." in alike
    alone = describe(algorithm={"name": "local_only"}, clients={"num_clients": 1})
    assert alone.startswith("1 client fine-tunes")
    assert alone.endswith("Training is local only: nothing is exchanged. Seed 0.")


def on_gpus(**workers: str) -> pd.DataFrame:
    return pd.DataFrame({"worker": [*workers], "gpus": [*workers.values()]})


def test_meters_are_named():
    cpus = on_gpus(a="", b="")
    assert energy_note({}, cpus) == ""
    assert energy_note({"energy_meters": {"a": "nvml+rapl"}}, cpus) == "metered by nvml+rapl"
    assert energy_note({"energy_meters": {"a": "nvml", "b": ""}}, cpus) == (
        "metered by nvml; 1 machine without an energy counter, where joules are estimated; "
        "the CPU's own energy is not counted where GPUs alone are metered"
    )


def test_it_is_said_that_workers_shared_a_gpu_and_that_runs_shared_a_machine():
    placement = {"energy_meters": {"a": "nvml+rapl"}, "alone": True}
    assert "shared out" not in energy_note(placement, on_gpus(a="GPU-0", b="GPU-1", server=""))
    assert "a GPU that several workers had are shared out" in energy_note(placement, on_gpus(a="GPU-0", b="GPU-0"))
    assert "several workers had are shared out" in energy_note(placement, on_gpus(a="GPU-1,GPU-0", b="GPU-0"))
    assert "energy.exclusive" not in energy_note(placement, on_gpus(a="GPU-0"))
    assert "energy.exclusive" in energy_note({**placement, "alone": False}, on_gpus(a="GPU-0"))


def test_equal_answers_are_one_entry_and_the_chosen_comes_first(tmp_path):
    run = read_run(write_run(tmp_path / "run", lost={2: (1,)}))
    table = prompt_table(run)
    assert (table["shown"], table["total"]) == (10, 10)
    assert [item["round"] for item in table["rounds"]] == [2, 1]
    newest = table["rounds"][0]["rows"]
    said = table["texts"].index
    # Round 2 without client 1: prompt 1 is won by client 0; 0 and 2 gave the same answer.
    assert newest[1] == (1, 0.2, 0, [[said("answer 0 to 1"), 0.51, 0, [0, 2]]])
    assert newest[0][2] == 1
    # Round 1, prompt 3: client 1 won, though the others' mean similarity is as high.
    assert table["rounds"][1]["rows"][3][3] == [
        [said("answer 1 to 3"), 0.51, 1, [1]],
        [said("answer 0 to 3"), 0.51, -1, [0, 2]],
    ]
    assert [table["texts"][index] for index in table["prompts"][3]] == ["question 3?", "reference 3", "category 1"]


def test_a_large_table_is_cut_from_the_oldest_round_and_says_so(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_rounds=6, num_prompts=40, answer=lambda *key: f"{key} " * 200))
    table = prompt_table(run, max_bytes=60_000)
    assert 0 < table["shown"] < table["total"] == 240
    assert [item["round"] for item in table["rounds"]] == list(range(6, 6 - len(table["rounds"]), -1))
    assert len(json.dumps(table, ensure_ascii=False).encode()) < 70_000
    assert max(map(len, table["texts"])) == MAX_TEXT_CHARS


def test_the_page_says_that_the_table_was_cut(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / "run"))
    monkeypatch.setattr("semcons_ray.reporting.html.prompt_table", lambda run: prompt_table(run, max_bytes=500))
    assert re.search(r"\d of 10 rows are in this page, newest rounds first", render_report(run))


def test_no_prompt_table_without_a_consensus(tmp_path):
    page = Page(render_report(read_run(write_run(tmp_path / "run", local_only=True))))
    assert page.scripts == {}


def test_headlines_of_models_that_differ_are_in_bits_per_byte(tmp_path):
    # Bits per byte by client: from 1, 0.5, 1 to 0.9, 0.4, 0.7.
    run = read_run(write_run(tmp_path / "run", models=("org/one", "org/two")))
    loss, clients, *_ = headlines(run)
    assert (loss["label"], loss["value"]) == ("Mean bits per byte, base → round 2", "0.833 → 0.667")
    assert loss["note"] == "−20.0%, of the reference text, measured"
    assert clients["label"] == "Clients with lower bits per byte"
    assert clients["note"] == "from −0.300 (client 2) to −0.100 (client 0)"


def test_nats_stand_beside_bits_per_byte_where_models_differ(tmp_path):
    one = render_report(read_run(write_run(tmp_path / "one")))
    assert "<th>base NLL</th><th>last NLL</th><th>change</th><th>ROUGE-L</th>" in one
    several = render_report(read_run(write_run(tmp_path / "several", models=("org/one", "org/two"))))
    assert "<th>base bits/byte</th><th>last bits/byte</th><th>change</th><th>last NLL</th>" in several
    assert re.search(r"<td>0\.500</td><td>0\.400</td>\s*<td class=\"better\">−0\.100</td>\s*<td>1\.600</td>", several)


def test_rounds_show_who_was_lost_and_why(tmp_path):
    html = render_report(read_run(write_run(tmp_path / "run", lost={2: (0, 1)})))
    why = "client 0, round 2: it died; client 1, round 2: it died"
    assert f'<td class="text worse">0, 1</td><td class="text">{why}</td>' in html


def test_a_client_that_is_behind_is_shown_with_its_last_round(tmp_path):
    html = render_report(read_run(write_run(tmp_path / "run", lost={1: (0,), 2: (0, 1)})))
    assert '<td class="worse">base</td>' in html
    assert '<td class="worse">round 1</td>' in html
    assert "<td>round 2</td>" in html


def test_a_last_round_without_answers_is_reported(tmp_path):
    run = read_run(write_run(tmp_path / "run", answer_last_round=False))
    assert set(run.consensus["round"]) == {1}
    html = render_report(run)
    assert '<section id="prompts">' in html
    assert "<td>0</td><td>–</td><td>–</td></tr>" in html  # pseudo-labels, agreement and churn of round 2


def test_importing_reporting_pulls_in_neither_torch_nor_ray():
    code = "import sys, semcons_ray.reporting; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
