"""The HTML report: the numbers are there, untrusted text stays text, and no missing or broken file stops it."""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from report_fixture import STAGES, after_sft, decision, write_run

from tunegate.report import render_markdown, render_report, render_summary
from tunegate.report.curves import curve_panel
from tunegate.report.reading import without_password, without_secrets
from tunegate.report.reading_curves import read_panels
from tunegate.report.reading_effects import mean_per_token
from tunegate.storage.runs import RunRecord, RunStore, StageRecord

FILES = (
    "validation.json",
    "ingest.json",
    "sft.json",
    "reward.json",
    "ppo.json",
    "evaluation.json",
    "decision.json",
    "plan.json",
    "cost.json",
    "gate-data.json",
    "gate-reward.json",
)


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, elements and open <details>."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.stack = []
        self.elements = []
        self.words = []
        self.hidden = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in {"style", "script"}:
            return
        self.words.append(data)
        if "details" in self.stack and "summary" not in self.stack:
            self.hidden.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def promoted(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(promoted):
    return render_report(promoted)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_verdict_comes_first_with_reasons_and_what_to_do(page):
    text = page.text
    assert text.index("PROMOTE") < text.index("All 20 gates pass") < text.index("What to do next")
    assert text.index("What to do next") < text.index("Did training do what it should?")
    assert "tunegate rollback starter-assistant" in text
    assert "starter-assistant version 3 (candidate, champion)" in text


@pytest.mark.parametrize(
    "fact",
    [
        "10 min 39 s",  # wall time
        "4.1 GB",  # peak memory
        "8.0% [1.8%, 14.2%] on 100 prompts",  # a gate's reason
        "74.3% [66.5%, 80.8%]",  # reward accuracy, Wilson interval of 104 of 140
        "55.7% [47.4%, 63.7%]",  # length baseline, 78 of 140
        "right in 40 of 54 pairs",
        "It rose from −0.05 to 1.22 on 64 prompts",
        "1.27 [1.04, 1.49]",
        "0.51 [0.34, 0.68]",
        "5.4 of at most 10",
        "67.2% [61.1%, 73.3%]",
        "Expected calibration error 2.1%",
        "6 to 20 tokens shorter",
        "1,410 rows came in, 23 (1.6%) were quarantined.",
        "near duplicate",
        "2 min 21 s · 2.9 GB",
        "SFT model",
        "0.041 USD at 0.24 USD an hour",
        "Watchdog at update 31",
        "The saved policy is the one after update 35",
        "cut at the length limit",
        "smollm2-135m-instruct",
        "How can I kill a Python process that hangs?",
        "user My colleague turns forty on Friday. assistant How nice! What do they like to do?",
    ],
)
def test_golden_facts(page, fact):
    assert fact in page.text


def test_the_numbers_of_the_sft_card_are_those_of_the_file(promoted, page):
    content = json.loads(promoted.read_file("sft.json"))
    means = [sum(content[k]["sums"]) / sum(content[k]["tokens"]) for k in ("heldout_before", "heldout_after")]
    assert f"It fell from {means[0]:.3f} to {means[1]:.3f} nats a token on 51 conversations" in page.text


def test_every_gate_is_shown_with_its_number(page):
    for gate in decision("PROMOTE").gates:
        assert gate.title in page.text
        if gate.n:
            assert f"n = {gate.n}" in page.text


def test_the_page_loads_nothing_from_elsewhere(html, page):
    assert "url(" not in html and "@import" not in html
    for name, attributes in page.elements:
        assert name not in {"img", "iframe", "object", "embed", "link", "form", "base"}
        assert not {"src", "srcset", "poster", "action", "xlink:href"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_every_chart_is_valid_xml_with_a_label(html):
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) > 60
    for chart in charts:
        root = ET.fromstring(chart)
        assert root.get("aria-label") or root.get("aria-hidden") == "true"


def test_untrusted_text_stays_text(html, page):
    assert "<script>alert" not in html and "<img src" not in html
    assert "<script>alert('prompt')</script> & \"quotes\"" in page.text
    assert "\x1b" not in html and "�[31m" in html
    assert [name for name, _ in page.elements].count("script") == 1


def test_only_the_reports_own_script_may_run(html):
    script = re.search(r"<script>(.*?)</script>", html, flags=re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_answers_to_harmful_requests_are_behind_a_click(page):
    hidden = " ".join(page.hidden)
    assert "I won't help with a forged note" in hidden
    assert "wifi wifi wifi" in hidden
    assert "Give it six hours of light" not in hidden
    assert "Tell me how to forge" not in hidden


def test_secrets_of_the_spec_are_not_shown(html, page):
    assert "hunter2" not in html
    assert "//mlflow.example/x" in page.text


def test_secrets_are_recognised_by_key_and_in_urls():
    shown = without_secrets(
        {"a": {"api_key": "s", "max_tokens": 4, "password": ""}, "u": ["s3://b/k", "ftp://u:p@h/x"]}
    )
    assert shown == {"a": {"api_key": "(hidden)", "max_tokens": 4, "password": ""}, "u": ["s3://b/k", "ftp://h/x"]}
    assert without_password("https://user:p@ss@host/x") == "https://host/x"
    assert without_password("https://[broken@x") == "(hidden)"


def test_the_same_run_gives_the_same_page(promoted, html):
    assert render_report(promoted) == html


@pytest.mark.parametrize("verdict", ["HOLD", "REJECT", "INVALID"])
def test_other_verdicts_say_why_and_what_to_do(tmp_path, verdict):
    page = Page(render_report(write_run(tmp_path, verdict=verdict)))
    text = page.text
    head = text[: text.index("Gates", text.index("What to do next"))]
    assert verdict in head
    expected = {
        "HOLD": ["862 more", "evaluation.prompts_per_tag", "straddles"],
        "REJECT": ["17.0% [11.0%, 23.0%]", "breaks that", "Attacked harmful requests"],
        "INVALID": ["10.8% of the rows contain evaluation prompts", "The data was refused"],
    }
    for words in expected[verdict]:
        assert words in head


def test_gates_that_did_not_pass_come_first(tmp_path):
    text = Page(render_report(write_run(tmp_path, verdict="REJECT"))).text
    start = text.index("Estimate and interval")
    order = [text.index(t, start) for t in ("Attacked harmful requests", "Harmful requests not", "Data validation")]
    assert order == sorted(order)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_failed_in_any_stage_has_a_report(tmp_path, stage):
    run = write_run(tmp_path, fail=stage, error="data.sft: <b>no such file</b> (got 'x'). Fix: give one.")
    page = Page(render_report(run))
    assert f"The run failed in {stage}" in page.text
    assert "data.sft: <b>no such file</b> (got 'x'). Fix: give one." in page.text
    assert f"tunegate resume {run.run_id}" in page.text
    if stage == "ppo":
        assert "No answers were generated: the run ended in ppo" in page.text
    if stage == "evaluate":
        assert "Held-out prompts before and after PPO" in page.text
        assert "The moon pulls on the sea." in " ".join(page.hidden)
    if stage == "promote":
        assert "Nothing was registered" not in page.text


def test_a_run_that_never_began_has_a_report(tmp_path):
    run = RunStore(str(tmp_path), "nothing")
    page = Page(render_report(run))
    assert "This run left no record" in page.text
    assert "FAILED" in render_markdown(run)


@pytest.mark.parametrize(("status", "word"), [("running", "RUNNING"), ("interrupted", "INTERRUPTED"), ("done", "DONE")])
def test_runs_without_a_verdict(tmp_path, status, word):
    run = RunStore(str(tmp_path), "r1")
    run.write_run(RunRecord(run_id="r1", name="n", pipeline="p", status=status, started="2026-11-22T10:00:00+00:00"))
    stage = "running" if status == "running" else "interrupted" if status == "interrupted" else "done"
    run.write_stage(StageRecord(stage="sft", status=stage, started="2026-11-22T10:00:00+00:00"))
    assert word in Page(render_report(run)).text


def test_a_reward_gate_that_stopped_the_run_is_explained(tmp_path):
    run = write_run(tmp_path, fail="ppo")
    gate = json.loads(run.read_file("gate-reward.json"))
    gate |= {"verdict": "REJECT", "reason": "Reward model's accuracy: 45.0% on 140 held-out pairs."}
    run.write_file("gate-reward.json", json.dumps(gate).encode())
    run.update_run(status="done", verdict="REJECT", failed_stage=None, error=None)
    text = Page(render_report(run)).text
    assert "not good enough to train against" in text
    assert "45.0% on 140 held-out pairs" in text
    assert "more pairs" in text


@pytest.mark.parametrize("name", FILES)
def test_any_one_file_may_be_missing_or_broken(tmp_path, name):
    run = write_run(tmp_path)
    whole = run.read_file(name)
    for content in (b"[1, 2]", whole[: len(whole) // 2], b'{"gates": 3, "checks": {}, "models": "\xff"}'):
        run.write_file(name, content)
        assert "PROMOTE" in render_report(run)


def mutate(value, rng):
    """Somewhere in a JSON value, something else than the schema promised."""
    odd = [None, "NaN", "Infinity", -1, 1e300, [], {}, "x", True, [None], {"estimate": "x"}]
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        return {k: mutate(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.93:
        index = rng.randrange(len(value))
        return [mutate(v, rng) if i == index else v for i, v in enumerate(value)]
    return rng.choice(odd)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_schema_do_not_stop_the_report(tmp_path, name):
    run = write_run(tmp_path)
    whole = json.loads(run.read_file(name))
    rng = random.Random(11)
    for _ in range(3):
        changed = whole
        for _ in range(15):
            changed = mutate(changed, rng)
        run.write_file(name, json.dumps(changed).encode())
        assert render_report(run).endswith("</html>")


def test_curves_with_holes_and_nonsense(tmp_path):
    run = write_run(tmp_path)
    rows = [{"step": i, "sft/loss": float("nan") if i % 3 else 2.0} for i in range(30)]
    run.write_metrics("sft", [*rows, {"sft/loss": 1.0}, {"step": None, "sft/odd": "x"}, {"step": 5}])
    run.write_metrics("ppo", [])
    page = Page(render_report(run))
    assert "Supervised fine-tuning" in page.text


def test_numbers_logged_once_are_no_curves(tmp_path):
    run = write_run(tmp_path)
    run.write_metrics("evaluate", [{"step": 0, "evaluation/candidate/nll": 3.1}])
    assert "evaluation/candidate/nll" not in render_report(run)


def test_a_learning_rate_is_drawn_as_it_was():
    rows = [{"step": i, "sft/learning_rate": float(i == 9), "sft/loss": float(i == 9)} for i in range(30)]
    panels, _ = read_panels("sft", rows, {})
    assert {panel.title: panel.series[0].exact for panel in panels} == {"Loss": False, "Learning rate": True}
    assert [str(curve_panel(panel)).count("line raw") for panel in panels] == [1, 0]


def test_dpo_as_the_last_stage_has_its_own_curves():
    rows = [
        {"step": i, "dpo/loss": 0.7 - i / 100, "dpo/accuracy": 0.5, "dpo/learning_rate": 1e-5 * i} for i in range(9)
    ]
    rows.append({"step": 9, "dpo/heldout_loss": 0.61, "dpo/heldout_accuracy": 0.66, "dpo/heldout_margin": 0.2})
    panels, others = read_panels("ppo", rows, {})
    assert [panel.title for panel in panels] == ["Preference loss", "Pairs ranked right", "Margin"]
    assert [[series.label for series in panel.series] for panel in panels[:2]] == [["train", "held out"]] * 2
    assert [panel.title for panel in others] == ["dpo/learning_rate"]


def test_a_bag_of_words_that_does_as_well_is_mentioned(tmp_path):
    run = write_run(tmp_path)
    content = json.loads(run.read_file("reward.json"))
    content["heldout"]["tfidf_baseline"]["value"] = 0.9
    run.write_file("reward.json", json.dumps(content).encode())
    assert "A bag of words is right as often" in render_report(run)


def test_a_long_run_stays_a_small_page(tmp_path):
    run = write_run(tmp_path)
    run.write_metrics("ppo", [{"step": i, **{f"ppo/m{k}": (i * k) % 97 for k in range(12)}} for i in range(8000)])
    assert len(render_report(run)) < 1_500_000


def test_old_runs_lineage_file_is_used_when_there_is_one(tmp_path):
    run = write_run(tmp_path)
    nodes = [{"name": "mine", "kind": "dataset", "digest": "ab" * 32}, {"name": "yours", "kind": "model", "digest": ""}]
    run.write_file("lineage.json", json.dumps({"nodes": nodes, "edges": [["mine", "yours"], ["x"]]}).encode())
    text = Page(render_report(run)).text
    assert "abababab" in text and "Clean data" not in text


def test_mean_per_token_is_the_ratio_estimator():
    sums, tokens = [2.0, 6.0, 5.0, 0.0], [2.0, 3.0, 5.0, 0.0]
    found = mean_per_token(sums, tokens)
    # By hand: ratio 13/10; residuals -0.6, 2.1, -1.5; variance 3/2 * 7.02 / 100.
    assert found.value == pytest.approx(1.3)
    assert found.n == 3
    assert found.high - found.value == pytest.approx(1.959964 * (1.5 * 7.02 / 100) ** 0.5, rel=1e-5)
    assert mean_per_token([1.0], [0.0]) is None
    assert mean_per_token([1.0], [2.0]).low is None


def test_the_interval_of_the_ratio_covers():
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        tokens = [rng.randint(5, 60) for _ in range(50)]
        sums = [t * rng.gauss(2.0, 0.5) for t in tokens]
        found = mean_per_token(sums, tokens)
        hits += found.low <= 2.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_summary_on_the_terminal(promoted):
    text = printed(promoted)
    assert "PROMOTE" in text.splitlines()[0]
    for words in (
        "sft        2 min 21 s  held-out loss 2.451 -> 1.842",
        "✓ pass  Reward model's accuracy",
        "registered  starter-assistant version 3, alias candidate, champion",
        "files/report.html",
        "tunegate ui",
    ):
        assert words in text


def test_summary_of_a_failed_run(tmp_path):
    text = printed(write_run(tmp_path, fail="sft", error="bad [red]markup[/red] \x1b[2J in the error"))
    assert "FAILED" in text
    assert "bad [red]markup[/red] �[2J in the error" in text
    assert "\x1b" not in text


def printed(run):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(render_summary(run))
    return console.file.getvalue()


def test_the_balance_over_versions(promoted, tmp_path):
    html = render_report(promoted)
    section = html.split('id="versions"')[1].split("</section>")[0]
    assert 'href="#versions"' in html
    assert section.count('class="marker') == 4
    assert section.count('class="front"') == 1
    assert section.count('class="arrow measured"') == 3
    rows = re.findall(r"<tr><td>.*?</tr>", section)
    assert [re.sub(r"<[^>]+>", " ", row).split()[0] for row in rows] == ["v3", "v2", "v1", "Base"]
    assert "v1: measured on other prompts" in section
    assert "compared by the judge of its own run" in section
    assert 'id="versions"' not in render_report(write_run(tmp_path, verdict="HOLD"))


def test_a_run_that_was_stopped_after_sft_says_so(tmp_path):
    run = write_run(tmp_path, verdict="REJECT")
    for name in ("decision.json", "evaluation.json", "gate-reward.json"):
        (tmp_path / "runs" / run.run_id / "files" / name).unlink()
    gate = after_sft().model_copy(
        update={"verdict": "REJECT", "reason": "Safety after SFT: significantly more violations."}
    )
    run.write_file("gate-sft.json", gate.model_dump_json().encode())
    html = render_report(run)
    assert "SFT made the model worse than the base model where it must not" in html
    assert "Train SFT more gently" in html
    assert "Safety after SFT" in html


def test_markdown(promoted, tmp_path):
    text = render_markdown(promoted)
    assert text.startswith("# PROMOTE\n")
    assert "| PROMOTE | Harmful requests not safely declined | 8.0% (1.8%, 14.2%) | ≤ 20% | 100 |" in text
    assert "- PPO raises held-out reward: It rose from −0.05 to 1.22" in text
    evil = render_markdown(write_run(tmp_path, fail="sft", error="# big <b>x</b> | [link](http://x) `code`\n\n- new"))
    assert "\\<b\\>x\\</b\\> \\| \\[link\\](http://x) \\`code\\` - new" in evil
    assert "\n# big" not in evil


def test_the_room_is_quick_to_import():
    code = (
        "import sys; import tunegate.report.html, tunegate.report.terminal, tunegate.report.markdown; "
        "print(sorted({'torch', 'mlflow', 'pandas', 'numpy', 'scipy', 'transformers', 'boto3'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bias_questions_prompt_sets_and_reward_models_are_shown(promoted):
    text = Page(render_report(promoted)).text
    for shown in (
        "Bias score",
        "age, text does not tell",
        "Bias questions right",
        "Failures by prompt set",
        "house set (harmful), attacked",
        "Calibration error: reward model 0.071, independent judge 0.071.",
    ):
        assert shown in text, shown
    # Only the candidate's own prompt sets are drawn.
    assert text.count("advbench (harmful)") == text.count("house set (harmful)")


def test_an_evaluation_run_speaks_of_the_evaluated_model(tmp_path):
    store = write_run(tmp_path)
    store.update_run(pipeline="evaluation")
    text = Page(render_report(store)).text
    assert "from base to SFT to Evaluated" in text
    assert "from base to SFT to PPO" not in text
    assert "Evaluated" in Page(render_report(store)).text.split("Paired differences")[0]
