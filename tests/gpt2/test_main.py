import re
import subprocess
import sys

import pytest

from gpt2.__main__ import main
from gpt2.config import PRESETS
from gpt2.files import write_json
from gpt2.hub.export import save_pretrained
from gpt2.memory import MACHINES, largest_batch
from gpt2.model.storage import save_weights
from tests.conftest import ROOT, TINY


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    save_weights(tiny_model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", TINY.to_dict())
    return str(tmp_path)


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def test_help_needs_no_torch():
    program = "import runpy, sys\nsys.argv = ['gpt2', '--help']\ntry: runpy.run_module('gpt2', run_name='__main__')\n"
    result = run("-c", program + "except SystemExit: print('torch' in sys.modules)")
    assert "generate" in result.stdout
    assert result.stdout.endswith("False\n")


def test_generate_continues_the_prompt(model_folder, capsys):
    arguments = ["generate", "--model", model_folder, "--max-new-tokens", "12", "--prompt", "Hello world"]
    arguments += ["--dtype", "fp32"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("Hello world")
    assert len(first) > len("Hello world\n")
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--seed", "2"]) == 0
    assert capsys.readouterr().out != first


def test_generate_accepts_a_hugging_face_folder_and_standard_input(
    tiny_model, model_folder, tmp_path, capsys, monkeypatch
):
    import io

    save_pretrained(tiny_model, tmp_path / "hf")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    arguments = ["generate", "--dtype", "fp32", "--max-new-tokens", "9", "--temperature", "0", "--prompt"]
    assert main([*arguments, "-", "--model", str(tmp_path / "hf")]) == 0
    theirs = capsys.readouterr().out
    assert main([*arguments, "Hello", "--model", model_folder]) == 0
    assert capsys.readouterr().out == theirs


@pytest.mark.parametrize("name", ["auto", "fp32", "bf16", "int8"])
def test_stats_print_the_dtype_and_the_speed(model_folder, capsys, name):
    arguments = ["generate", "--model", model_folder, "--max-new-tokens", "30", "--dtype", name, "--stats"]
    assert main(arguments) == 0
    how = r"(fp32|bf16|int8), PyTorch: [^:]+"
    pattern = how + r": first token after \d+ ms, then [\d.]+ tokens/s; \d+ tokens in [\d.]+ s\n"
    match = re.fullmatch(pattern, capsys.readouterr().err)
    assert match
    assert name in ("auto", match[1])


def test_generate_ends_before_a_stop_string(model_folder, capsys):
    arguments = ["generate", "--model", model_folder, "--dtype", "fp32", "--max-new-tokens", "40", "--prompt", "Hello"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--stop", text[25:28]]) == 0
    assert capsys.readouterr().out == text[: text.index(text[25:28], len("Hello"))] + "\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "7"], "top_p is 7.0"),
        (["--top-k", "-2"], "top_k is -2"),
        (["--seed", "-1"], "the seed is -1"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--stop", ""], "a stop string is empty"),
        (["--context-length", "0"], "--context-length is 0"),
    ],
)
def test_settings_out_of_range_are_one_line_errors(model_folder, capsys, arguments, expected):
    assert main(["generate", "--model", model_folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_missing_model_error_names_the_command_that_trains_one(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "none")]) == 74
    assert "dvc repro" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), [("--format", "--dtype"), ("--context", "--context-length")])
def test_renamed_options_are_refused_with_their_new_names(old, new, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["generate", old, "8"])
    assert exited.value.code == 2
    assert f"{old} was renamed to {new}" in capsys.readouterr().err


def test_info_of_a_preset(capsys):
    assert main(["info", "--preset", "gpt2"]) == 0
    output = capsys.readouterr().out
    assert "124,439,808" in output
    assert "1.99 GB" in output  # 16 bytes a parameter
    fitting = {line[:22].strip(): line[22:].split() for line in output.splitlines() if "GB  " in line}
    assert list(fitting) == list(MACHINES)
    assert [int(n.replace(",", "")) for n in fitting["GPU, 80 GB"]] == [
        largest_batch(PRESETS["gpt2"], MACHINES["GPU, 80 GB"], gradient_checkpointing=checkpointing, on_cpu=False)
        for checkpointing in (False, True)
    ]


def test_info_of_a_trained_model_with_changes(model_folder, capsys):
    assert main(["info", "--model", model_folder, "--n-layer", "1"]) == 0
    assert "n_layer 1" in capsys.readouterr().out
    assert main(["info", "--model", model_folder, "--n-head", "3"]) == 2
    assert "not a multiple" in capsys.readouterr().err


def test_a_pipe_that_closes_is_no_traceback(model_folder):
    command = f"{sys.executable} -m gpt2 generate --model {model_folder} --max-new-tokens 30 | head -c 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def test_commands_of_the_project_are_imported_when_they_are_called():
    program = "import sys, runpy\ntry: runpy.run_module('gpt2', run_name='__main__')\n"
    program += "except SystemExit as end: print(end.code, [name for name in sys.modules if 'experiments' in name])\n"
    result = run("-c", program, "info", "--preset", "gpt2")
    assert result.stdout.endswith("0 []\n")
    result = run("-c", program, "compare", "no-such-run")
    assert "experiments.compare" in result.stdout
    assert "torch" not in result.stdout
    assert result.stderr.startswith("error: there is no experiment, branch, tag, commit or MLflow run 'no-such-run'")


def test_commands_of_the_project_need_its_repository(tmp_path):
    program = f"import sys; sys.path[:] = [p for p in sys.path if p] ; sys.path.append({str(tmp_path)!r})\n"
    program += "from gpt2.__main__ import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "gpt2").symlink_to(ROOT / "gpt2")
    for arguments in (["compare", "a", "b"], ["compare", "--help"]):
        result = run("-c", program, *arguments, env={"PYTHONSAFEPATH": "1"})
        assert result.returncode == 2
        assert result.stderr == (
            "error: `compare` works in the project's repository: change to its folder, and try again\n"
        )
    result = run("-c", program, "--help", env={"PYTHONSAFEPATH": "1"})
    assert "compare" in result.stdout
