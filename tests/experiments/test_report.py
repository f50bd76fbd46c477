import json
import math
import re
import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pytest

from benchmarks.report import write_runs
from experiments.report import numbers, write_report
from experiments.report.curves import MAX_POINTS, curves, flops_per_token, history, losses_at_equal_budget, measurements
from experiments.report.facts import PASSAGE, collect, held_out_texts, params_table, samples_by_prompt
from experiments.report.page import content_security_policy, json_for_html, render
from experiments.runs import Run
from gpt2.__main__ import main
from gpt2.config import GPTConfig
from stages import paths
from tests.conftest import ROOT
from tests.experiments.report_runs import HOSTILE, MemoryFiles, invented

NOW = datetime(2026, 7, 31, 12, 30)
FAILED = Run("failed", None, MemoryFiles({}))


@pytest.fixture(autouse=True)
def no_vega(monkeypatch, tmp_path):
    """Vega takes a second to be put together; pages here are not opened."""
    monkeypatch.setattr("experiments.report.page.vega_script", lambda: "vegaEmbed = 0")
    monkeypatch.setattr("experiments.report.vega.vega_script", lambda: "vegaEmbed = 0")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    write_runs(tmp_path / "repository", 3)
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path / "repository"


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL))


def with_file(run, path, content):
    return Run(run.name, run.commit, MemoryFiles({**run.files.content, path: content}))


# numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (math.nan, "–"), (0, "0"), (999, "999"), (999.9, "1 k"), (4418, "4.42 k"), (1110986752, "1.11 G")],
)
def test_a_short_number_has_three_digits_and_a_prefix(value, shown):
    assert numbers.short(value) == shown


def test_numbers_for_people():
    assert numbers.power(5.14e13) == "5.1 × 10¹³"
    assert numbers.power(0) == "0"
    assert [numbers.duration(seconds) for seconds in (None, 45.2, 115.9, 12_000)] == [
        "–",
        "45 s",
        "1 min 56 s",
        "3 h 20 min",
    ]
    assert [numbers.fixed(value, 2) for value in (None, math.inf, 1234.567)] == ["–", "–", "1,234.57"]


def test_a_name_cannot_hide_or_turn_what_follows():
    assert numbers.plain("exe.\u202etxt\n\x00") == "exe.\ufffdtxt\ufffd\ufffd"
    assert numbers.plain("naïve שלום 🙂") == "naïve שלום 🙂"


# curves


def test_curves_have_the_logged_numbers_against_each_budget():
    found = curves(invented(steps=200))
    assert found["step"][:2] == [10, 20]
    assert found["tokens"][:2] == [10240, 20480]
    config = GPTConfig(block_size=128, vocab_size=50257, n_layer=4, n_head=4, n_embd=256)
    assert found["flops"][0] == pytest.approx(10240 * config.flops_per_token(128), rel=1e-5)
    assert len(found["held_out"]["step"]) == len(found["held_out"]["val_loss"]) == 20
    assert None not in found["held_out"]["val_loss"]
    assert found["rows_in_a_point"] == 1
    json.dumps(found, allow_nan=False)


def test_a_long_history_becomes_means():
    run = invented(steps=100_000)
    found = curves(run)
    assert len(found["step"]) == len(found["train_loss"]) == MAX_POINTS
    assert found["step"][-1] == 100_000
    assert found["rows_in_a_point"] == 25
    assert found["train_loss"][0] == pytest.approx(run.history["train_loss"][:25].mean(), rel=1e-5)
    assert len(found["held_out"]["step"]) <= MAX_POINTS
    assert found["held_out"]["step"][-1] == 100_000


@pytest.mark.parametrize(
    "content", ["", "step\n", "nonsense\n1\n", "step,train_loss\n10,nan\n20,inf\nx,3\n", "step,train_loss\n10,text\n"]
)
def test_a_damaged_history_is_drawn_as_far_as_it_goes(content):
    run = with_file(invented(), "reports/train/history.csv", content)
    found = curves(run)
    assert found is None or set(found["train_loss"]) <= {None, 3}
    assert measurements(history(run)).get("last_train_loss") is None
    render([run], NOW)


def test_without_a_model_in_the_params_there_are_no_flops():
    run = with_file(invented(), "params.yaml", "train: {sequence_length: 128}\nmodel: {n_layer: -1}\n")
    assert flops_per_token(run) is None
    assert set(curves(run)["flops"]) == {None}


def test_losses_are_compared_at_the_most_that_all_runs_reached():
    short = pd.DataFrame({"step": [10.0, 20.0], "val_loss": [8.0, 6.0]})
    long = pd.DataFrame({"step": [15.0, 25.0, 35.0], "val_loss": [7.0, 5.0, 3.0]})
    tables = [
        table.assign(tokens=table["step"] * 100, seconds=table["step"] * speed, flops=np.nan)
        for table, speed in ((short, 1.0), (long, 10.0))
    ]
    found = losses_at_equal_budget([*tables, None])
    assert found["step"] == (20.0, [6.0, 6.0, None])
    assert found["tokens"][0] == 2000.0
    assert found["seconds"] == (20.0, [6.0, None, None])  # the second was not yet evaluated
    assert "flops" not in found
    assert losses_at_equal_budget([None]) == {}


# facts


def test_the_best_comes_first_and_runs_without_results_last():
    runs = [FAILED, invented(0, bits_per_byte=2.2), invented(1, "half", without=["reports/evaluate"])]
    found = collect([*runs, invented(2, bits_per_byte=2.1)])
    assert [each.name for each in found] == ["run-02", "run-00", "half", "failed"]
    assert [each.state for each in found] == ["", "", "not evaluated", "no results"]


def test_runs_are_grouped_by_the_held_out_text():
    def with_sum(run, sha256):
        losses = {
            "sha256": sha256,
            "tokens": 128,
            "segment_tokens": 128,
            "losses": [1],
            "bits_per_byte": [1],
            "bytes": [9],
        }
        return with_file(run, paths.SEGMENT_LOSSES.as_posix(), json.dumps(losses))

    same = [with_sum(invented(0), "aa"), invented(1)]  # the second is of an earlier version, which wrote no sum
    other = with_sum(invented(2, tokens=99), "bb")
    texts = held_out_texts([*same, other, FAILED])
    assert texts == ["aa", "aa", "bb", ""]
    html = render([other, *same], NOW)
    assert "not comparable" in html
    assert (
        html.index("Held-out text 1") < html.index(">run-01<") < html.index("Held-out text 2") < html.index(">run-02<")
    )
    assert "not comparable" not in render(same, NOW)


def test_params_that_differ_mark_the_uncommon_values():
    text = (ROOT / "params.yaml").read_text()
    runs = [
        with_file(invented(number), "params.yaml", text.replace("n_embd: 256", f"n_embd: {size}"))
        for number, size in enumerate((256, 256, 128))
    ]
    table = params_table(collect([*runs, FAILED]))
    assert dict(table)["model.n_embd"][-1] == ("", False)
    assert sorted(dict(table)["model.n_embd"][:3]) == [("128", True), ("256", False), ("256", False)]
    assert params_table(collect([FAILED])) == []


def test_samples_with_other_seeds_are_told():
    runs = [invented(0), invented(1)]
    assert "Of the same prompts and seeds, of" in text_of(render(runs, NOW))
    changed = with_file(runs[1], "params.yaml", runs[1].files.content["params.yaml"].replace("top_k: 50", "top_k: 5"))
    assert "Params of evaluate differ" in text_of(render([runs[0], changed], NOW))


def test_samples_stand_by_their_prompt():
    run = with_file(
        invented(1), "reports/evaluate/samples.json", '[{"prompt": "Prompt 1", "sample": "x"}, {"sample": "y"}]'
    )
    found = dict(samples_by_prompt(collect([invented(0), run])))
    assert [len(found[f"Prompt {i}"]) for i in range(3)] == [1, 2, 1]


def test_a_part_of_a_character_counts_with_the_token_that_completes_it():
    content = {"tokens": ["a", "", "🙂", "b"], "losses": [None, 1.0, 0.5, 2.0]}
    (each,) = collect([with_file(invented(), PASSAGE, json.dumps(content))])
    assert each.passage == (["a", "🙂", "b"], [None, 1.5, 2.0])


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        "{}",
        '{"tokens": ["a"], "losses": []}',
        '{"tokens": [1], "losses": [1]}',
        '{"tokens": ["a"], "losses": ["x"]}',
        '{"tokens": [], "losses": []}',
    ],
)
def test_a_damaged_passage_is_left_out(content):
    (each,) = collect([with_file(invented(), PASSAGE, content)])
    assert each.passage is None
    assert 'id="passage"' not in render([each.run], NOW)


# the page


def test_the_page_has_the_numbers_as_text():
    run = invented(0, bits_per_byte=2.1836, bits_per_byte_low=2.1459, bits_per_byte_high=2.2222)
    text = text_of(render([run, invented(1)], NOW))
    assert "2 runs, 31 July 2026, 12:30" in text
    for number in ("2.184", "2.146 – 2.222", "1 GB", "Peak learning rate"):
        assert number in text
    assert "python -m gpt2 reproduce run-00" in text


def test_hostile_texts_stay_texts():
    run = invented(0, HOSTILE)
    for path in ("reports/evaluate/samples.json", PASSAGE, "reports/train/environment.json", "params.yaml"):
        content = {
            "reports/evaluate/samples.json": json.dumps([{"prompt": HOSTILE, "sample": HOSTILE}]),
            PASSAGE: json.dumps({"tokens": [HOSTILE], "losses": [None]}),
            "reports/train/environment.json": json.dumps({HOSTILE: {HOSTILE: HOSTILE}}),
            "params.yaml": f"train: {{optimizer: {json.dumps(HOSTILE)}}}",
        }[path]
        run = with_file(run, path, content)
    html = render([run, invented(1)], NOW)
    assert len(re.findall(r"<script", html)) == 3
    assert "hacked" in html
    assert "python -m gpt2 reproduce &#39;&lt;/script" in html  # quoted for the shell, and for HTML


def test_data_cannot_end_its_script_element():
    assert json_for_html({"a": "</script>\u2028"}) == '{"a":"\\u003c/script>\\u2028"}'


def test_the_policy_allows_nothing_but_the_scripts_of_the_page():
    # echo -n 'alert(1)' | openssl dgst -sha256 -binary | base64
    policy = content_security_policy(["alert(1)"])
    assert policy.startswith("default-src 'none'; script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI=';")
    assert "unsafe-eval" not in policy


def test_twenty_runs_take_a_megabyte_or_two(tmp_path):
    num_bytes = write_report([invented(number, steps=5000) for number in range(20)], tmp_path / "new/page.html")
    assert num_bytes == (tmp_path / "new/page.html").stat().st_size < 1.5e6  # and 0.9 MB of Vega


def luminance(red, green, blue):
    """Relative luminance of sRGB from 0 to 255: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    linear = (
        part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)
    )
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(*one), luminance(*other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    css = (ROOT / "experiments/report/assets/page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    text = light if scheme == "light" else dark
    hexes = re.findall(r"--([a-z0-9-]+): #([0-9a-f]{6})", text)
    colours = {name: tuple(bytes.fromhex(value)) for name, value in hexes}
    colours |= {name: tuple(map(int, value.split())) for name, value in re.findall(r"--([ab]): ([0-9 ]+);", text)}
    for surface in ("page", "surface", "faint", "note", "other"):
        assert contrast(colours["text"], colours[surface]) >= 7
    for name in ("quiet", "accent"):
        assert min(contrast(colours[name], colours[surface]) for surface in ("page", "surface", "faint")) >= 4.5
    for hue in range(10):
        assert contrast(colours[f"hue-{hue}"], colours["surface"]) >= 3
    for side in ("a", "b"):  # behind text
        pairs = zip(colours[side], colours["surface"], strict=True)
        strongest = [0.62 * over + 0.38 * under for over, under in pairs]
        assert contrast(colours["text"], strongest) >= 4.5


# the command


def test_the_command_reports_all_experiments_and_those_it_is_given(repository, capsys):
    assert main(["report"]) == 0
    assert "reports/experiments.html: 3 runs" in capsys.readouterr().out
    html = (repository / "reports/experiments.html").read_text()
    assert "dvc exp apply run-01" in html
    assert main(["report", "run-01", "run-02", "run-01", "--output", "two.html"]) == 0
    assert "two.html: 2 runs" in capsys.readouterr().out
    assert "run-00" not in (repository / "two.html").read_text()
    assert main(["report", "run-01"]) == 0
    assert "the run run-01" in capsys.readouterr().out


def test_the_last_commit_and_the_workspace_are_there_when_they_have_results_of_their_own(repository, capsys):
    subprocess.run(["git", "checkout", "-q", next(iter(refs(repository))), "--", "."], cwd=repository, check=True)
    assert main(["report"]) == 0
    assert "3 runs" in capsys.readouterr().out  # the workspace is one of the experiments
    metrics = repository / "reports/train/metrics.json"
    metrics.write_text(metrics.read_text().replace("4400", "4000"))
    assert main(["report"]) == 0
    assert "4 runs" in capsys.readouterr().out
    assert "dvc exp save" in (repository / "reports/experiments.html").read_text()


def refs(folder):
    done = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/exps"], cwd=folder, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run-0"], "did you mean"),
        (["--output", "."], "is a folder"),
        (["--output", "params.yaml/x"], "params.yaml"),
        (["--dvc-plots"], "has no .dvc"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, repository, capsys):
    assert main(["report", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_report_of_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert capsys.readouterr().err.startswith("error: there are no runs to report")
    assert not list(tmp_path.iterdir())


def test_the_command_starts_without_torch():
    names = ("torch", "mlflow", "vl_convert", "dvc")
    program = f"import sys, experiments.report; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
