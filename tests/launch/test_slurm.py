"""launch/slurm.sh with stand-ins for Slurm, DVC and torchrun: what it starts, in which order, and how it ends."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.conftest import ROOT
from tests.launch.programs import Checkout

SCRIPT = ROOT / "launch/slurm.sh"
# The long options in sbatch(1) of Slurm 22.05; also on https://slurm.schedmd.com/sbatch.html
OPTIONS = """account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep
    licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
    nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
    overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue
    reservation signal sockets-per-node spread-job switches test-only thread-spec threads-per-core time time-min tmp uid
    use-min-nodes verbose wait wait-all-nodes wckey wrap"""
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node-[9-10]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}
SRUN = "srun --kill-on-bad-exit=0 --cpu-bind=none"
ONE_NODE = f"{SRUN} --nodes=1 --ntasks=1 --nodelist=node-10"
TOKENIZE = [f"{ONE_NODE} dvc repro tokenize", "dvc repro tokenize"]
TORCHRUN = (
    "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=node-10:29500 "
    "--rdzv-id=7 -m stages.train"
)
TRAIN = [f"{SRUN} --wait=150 {TORCHRUN}", TORCHRUN]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def calls(checkout):
    """What the script called, without the questions that it asks Slurm and DVC."""
    questions = ("scontrol show", "dvc remote default")
    return [call for call in checkout.calls() if not call.startswith(questions)]


def directives():
    return re.findall(r"^#SBATCH (.*?)(?: +#.*)?$", SCRIPT.read_text(), re.MULTILINE)


def test_sbatch_knows_each_option_of_the_script():
    names = [re.fullmatch(r"--([a-z-]+)(?:=\S+)?", directive)[1] for directive in directives()]
    assert len(names) > 5
    assert set(names) <= set(OPTIONS.split())
    assert len(names) == len(set(names))
    header = SCRIPT.read_text().partition("\nset -euo")[0]  # sbatch reads no further than to the first command
    assert header.count("#SBATCH") == len(names)
    assert all(line.startswith("#") for line in header.splitlines())


def test_the_last_checkpoint_has_less_time_than_there_is_between_signal_and_time_limit():
    (signal_s,) = (int(each.rpartition("@")[2]) for each in directives() if each.startswith("--signal=B:USR1@"))
    (stop_s,) = map(int, re.findall(r"STOP_SECONDS:-(\d+)", SCRIPT.read_text()))
    assert stop_s + 30 < signal_s


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_tokens_training_on_all_nodes_results_and_push_follow_each_other(checkout):
    code, output = checkout.run("bash", SCRIPT, **SLURM)
    assert code == 0, output
    last = [f"{ONE_NODE} dvc repro", "dvc repro", f"{ONE_NODE} dvc push", "dvc push"]
    assert calls(checkout) == TOKENIZE + TRAIN + last


def test_the_environment_sets_the_choices(checkout):
    choices = {"PROCESSES_PER_NODE": "4", "PORT": "1234", "MAX_RESTARTS": "0", "STOP_SECONDS": "60"}
    assert checkout.run("bash", SCRIPT, **SLURM, **choices)[0] == 0
    (command,) = (call for call in calls(checkout) if call.startswith("torchrun"))
    assert "--nproc-per-node=4 --max-restarts=0 " in command
    assert "--rdzv-endpoint=node-10:1234 " in command
    assert any("--wait=90 torchrun" in call for call in calls(checkout))


def test_without_gpus_each_node_has_one_process(checkout):
    changes = {key: value for key, value in SLURM.items() if key != "SLURM_GPUS_ON_NODE"}
    assert checkout.run("bash", SCRIPT, **changes)[0] == 0
    assert any("--nproc-per-node=1 " in call for call in calls(checkout))


def test_without_a_remote_nothing_is_pushed(checkout):
    code, output = checkout.run("bash", SCRIPT, **SLURM, NO_REMOTE="1")
    assert code == 0
    assert f"the results are in {checkout.folder}" in output
    assert calls(checkout)[-1] == "dvc repro"


def test_it_starts_in_the_folder_of_sbatch(checkout):
    command = ("bash", "-c", f"cd / && exec bash {SCRIPT}")
    assert checkout.run(*command, **SLURM, SLURM_SUBMIT_DIR=str(checkout.folder))[0] == 0
    assert calls(checkout)[:2] == TOKENIZE


@pytest.mark.parametrize("missing", ["dvc.yaml", ".venv/bin/activate"])
def test_what_is_missing_is_said_before_anything_starts(checkout, missing):
    (checkout.folder / missing).unlink()
    code, output = checkout.run("bash", SCRIPT, **SLURM)
    assert code == 2
    assert "run make setup and sbatch in the root of the repository" in output
    assert checkout.calls() == []


def test_nothing_follows_a_failure_of_the_tokens(checkout):
    assert checkout.run("bash", SCRIPT, **SLURM, TOKENIZE_CODE="2")[0] == 2
    assert calls(checkout) == TOKENIZE


def test_nothing_follows_a_failure_of_training_and_the_exit_code_stays(checkout):
    assert checkout.run("bash", SCRIPT, **SLURM, TORCHRUN_CODE="3")[0] == 3
    assert calls(checkout) == TOKENIZE + TRAIN


def test_near_the_time_limit_training_gets_one_signal_and_the_job_starts_again(checkout):
    process = checkout.start("bash", SCRIPT, **SLURM, TORCHRUN_WAITS="1")
    assert checkout.interrupt(process, signal.SIGUSR1, signal.SIGUSR1) == 143
    end = ["scancel --signal=TERM 7", "torchrun gets TERM", "scontrol requeue 7"]
    assert calls(checkout) == TOKENIZE + TRAIN + end


@pytest.mark.parametrize(
    ("preempted", "end"),
    [("None", []), ("2026-01-01T00:00:00", ["scontrol requeue 7"])],
    ids=["cancelled", "preempted"],
)
def test_when_slurm_ends_the_job_only_a_preempted_one_starts_again(checkout, preempted, end):
    process = checkout.start("bash", SCRIPT, **SLURM, TORCHRUN_WAITS="1", PREEMPT_TIME=preempted)
    os.kill(checkout.wait_for("torchrun.pid"), signal.SIGTERM)  # as Slurm does, beside the script
    assert checkout.interrupt(process, signal.SIGTERM) == (143 if end else 1)
    assert calls(checkout) == [*TOKENIZE, *TRAIN, "torchrun gets TERM", *end]
