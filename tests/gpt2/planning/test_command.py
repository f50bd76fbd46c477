import re
import subprocess
import sys

import pytest

from gpt2.__main__ import main
from gpt2.errors import UserError
from gpt2.planning.command import parse_count
from gpt2.planning.report import human
from tests.conftest import ROOT


def run(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def rows(output):
    """The cells of each line of the table, by its label."""
    table = output.split("\n\n")[1]
    return {line[:26].strip(): re.split(r"\s{2,}", line[26:].strip()) for line in table.splitlines()}


def test_the_plan_says_what_to_take(capsys):
    output = run(capsys, "--preset", "gpt2-xl", "--gpus", "64", "--gpu", "h100", "--interconnect", "infiniband-400")
    assert "gpt2-xl: 1,557,611,200 parameters, adamw" in output
    assert "64 x NVIDIA H100 SXM, 80 GB; 8 nodes of 8" in output
    assert "nvlink4: 370 GB/s" in output
    assert "infiniband-400: 48 GB/s" in output
    table = rows(output)
    assert table["strategy"] == ["ddp", "fsdp"]
    assert table["micro-batch"] == ["1 x 8", "1 x 8"]
    assert float(table["hours"][0]) == pytest.approx(3.5, rel=0.2)
    assert re.search(r"^take fsdp, .* train.batch_size=8 train.gradient_accumulation_steps=64 ", output, re.MULTILINE)


def test_the_docs_show_what_is_printed(capsys):
    docs = (ROOT / "docs/scale.md").read_text()
    command = re.search(r"^    python -m gpt2 plan (.*32B)$", docs, re.MULTILINE)
    shown = [f"    {line}".rstrip() for line in run(capsys, *command[1].split()).splitlines()]
    assert "\n".join(shown) in docs


def test_every_option_changes_the_plan(capsys):
    options = ["--gpu", "a100", "--gpus", "16", "--gpus-per-node", "4", "--interconnect", "pcie4", "ethernet-25"]
    options += ["--optimizer", "muon", "--sequence-length", "512", "--tokens", "10B", "--price", "1.5"]
    output = run(capsys, "--preset", "gpt2", *options, "--batch-tokens", "524288", "--mfu", "0.3")
    assert "parameters, muon" in output
    assert "4 nodes of 4" in output
    assert "pcie4: 20 GB/s" in output
    assert "ethernet-25: 0.475 GB/s" in output
    assert "0.30 of 312 TFLOP/s (given)" in output
    assert "$1.50 an hour (given)" in output
    assert "1,024 sequences of 512 tokens" in output
    assert "10B tokens" in output


def test_a_measured_speed_is_that_of_one_gpu(capsys):
    options = ["--preset", "gpt2", "--gpus", "1", "--tokens-per-second-per-gpu", "1000", "--batch-size", "8"]
    output = run(capsys, *options)
    assert "1,000 tokens/s alone (given)" in output
    assert rows(output)["tokens/s"] == ["1,000"]
    assert "one node" in output
    assert "in a node" not in output


def test_a_model_that_does_not_fit_is_told_so(capsys):
    output = run(capsys, "--preset", "gpt2-xl", "--gpu", "t4", "--gpus", "1", "--batch-size", "8")
    assert rows(output)["micro-batch"] == ["none"]
    assert rows(output)["hours"] == ["-"]
    assert re.search(r"^does not fit: a device needs [\d.]+ GB and has 15.03 GB", output, re.MULTILINE)


def test_checkpointing_stands_among_the_settings(capsys):
    output = run(capsys, "--preset", "gpt2-xl", "--gpu", "t4", "--gpus", "2")
    assert output.endswith("runtime.gradient_checkpointing=true\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "h800"], "no GPU 'h800'; there are: t4, l4, rtx4090, a100-40gb, a100, h100, h200, b200"),
        (["--interconnect", "wifi"], "no interconnect 'wifi'; there are: nvlink3, nvlink4"),
        (["--gpus", "48"], "48 GPUs do not divide a batch of 512 sequences; expected a multiple of 48"),
        (["--gpus", "12"], "12 GPUs do not fill nodes of 8"),
        (["--gpus", "-1"], "--gpus is -1"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0"),
        (["--optimizer", "sgd"], "no optimizer 'sgd'; there are: adamw, muon"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (
            ["--batch-tokens", "1000"],
            "a batch of 1,000 tokens is not a multiple of the sequence length 1,024; near it for 8 GPUs",
        ),
        (["--batch-tokens", "1.5"], "--batch-tokens is 1.5; expected a whole number"),
        (["--sequence-length", "2048"], "--sequence-length is 2048; expected 1 to 1024"),
        (["--tokens", "many"], "--tokens is many; expected a number such as 300e9"),
        (["--mfu", "44"], "--mfu is 44.0; expected a fraction"),
        (["--tokens-per-second-per-gpu", "-5"], "--tokens-per-second-per-gpu is -5.0"),
        (["--price", "nan"], "--price is nan"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert main(["plan", "--preset", "gpt2", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_an_unknown_preset_is_refused_with_those_that_there_are(capsys):
    assert main(["plan", "--preset", "gpt3"]) == 2
    assert "no model preset 'gpt3'; there are: gpt2, gpt2-medium" in capsys.readouterr().err


def test_a_plan_needs_no_torch():
    program = "import sys; from gpt2.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "plan", "--preset", "gpt2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("text", "count"),
    [("10B", 10e9), ("300e9", 300e9), ("0.5M", 5e5), ("524288", 524288), ("524,288", 524288), ("2t", 2e12)],
)
def test_counts(text, count):
    assert parse_count("--tokens", text) == count


@pytest.mark.parametrize("text", ["", "B", "0", "-5", "1e400", "1.2.3", "ten", "inf", "nan"])
def test_what_is_no_count(text):
    with pytest.raises(UserError, match="--tokens is"):
        parse_count("--tokens", text)


def test_numbers_for_people():
    assert [human(n) for n in (31.152e9, 1.5e12, 2e6, 999, 1000)] == ["31.2B", "1.5T", "2M", "999", "1k"]
