"""launch/skypilot.yaml: its keys, and its commands with stand-ins for DVC, torchrun and others."""

import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.launch.programs import Checkout

PATH = ROOT / "launch/skypilot.yaml"
TASK = YAML(typ="safe", pure=True).load(PATH)
# From https://docs.skypilot.co/en/latest/reference/yaml-spec.html and storage.html, as far as one file may need them.
KEYS = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "file_mounts",
    "volumes",
    "setup",
    "run",
    "config",
}
RESOURCES = {
    *("infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier", "network_tier"),
    *("image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery"),
}
MOUNT = {"name", "source", "store", "persistent", "mode", "type", "config"}
VARIABLES = {
    "SKYPILOT_NODE_IPS",
    "SKYPILOT_NODE_RANK",
    "SKYPILOT_NUM_NODES",
    "SKYPILOT_NUM_GPUS_PER_NODE",
    "SKYPILOT_TASK_ID",
}
NODES = {
    "SKYPILOT_NODE_IPS": "10.0.0.9\n10.0.0.10",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "task-1",
}
# SkyPilot appends lines to `run` that wait for uploads, and end with its exit code. They have a pipe that breaks.
APPENDED = "\ncode=$?; yes | grep -q y || echo 'an option leaks'; echo 'uploads are complete'; exit $code\n"
PREPARE = ["dvc remote default", "dvc repro --pull tokenize"]
FINISH = ["dvc repro", "dvc push"]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "bucket").mkdir()
    return Checkout(tmp_path)


def run(checkout, section, rank="0", **changes):
    """Exit code and output of a section, with the bucket in the folder of the test."""
    script = TASK[section].replace("/bucket", str(checkout.folder / "bucket"))
    if section == "run":
        script += APPENDED
    return checkout.run("bash", "-c", script, **{**TASK["envs"], **NODES, "SKYPILOT_NODE_RANK": rank, **changes})


def torchrun(address):
    return (
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=10.0.0.10:29500 "
        f"--rdzv-id=task-1 --local-addr={address} -m stages.train"
    )


def test_each_key_is_one_of_skypilot():
    assert TASK.keys() <= KEYS
    assert TASK["resources"].keys() <= RESOURCES
    for mount in TASK["file_mounts"].values():
        assert mount.keys() <= MOUNT
        assert mount["mode"] == "MOUNT_CACHED"
    assert all(isinstance(value, str) for value in TASK["envs"].values())  # SkyPilot takes no numbers here
    assert set(re.findall(r"SKYPILOT_\w+", PATH.read_text())) == VARIABLES


def test_skypilot_reads_the_file():
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(PATH))
    assert task.num_nodes == 2
    assert task.storage_mounts["/bucket"].source == TASK["envs"]["BUCKET"]


@pytest.mark.parametrize("section", ["setup", "run"])
def test_the_commands_are_valid_bash(section):
    subprocess.run(["bash", "-n"], input=TASK[section], text=True, check=True)


def test_setup_makes_the_environment_and_stores_checkpoints_in_the_bucket(checkout):
    code, output = run(checkout, "setup")
    assert code == 0, output
    made = [call for call in checkout.calls() if not call.startswith("python3 -c")]
    assert made == ["make setup PYTHON=python3", "python -m pip install --quiet dvc-s3", "git init --quiet"]
    (checkout.folder / "checkpoints/step").touch()
    assert (checkout.folder / "bucket/checkpoints/step").exists()
    assert run(checkout, "setup")[0] == 0  # again, where a machine is used again
    assert checkout.calls().count("git init --quiet") == 1


def test_setup_brings_a_newer_python_where_there_is_an_old_one(checkout):
    assert run(checkout, "setup", OLD_PYTHON="1")[0] == 0
    assert "make setup PYTHON=/uv/python3.12" in checkout.calls()


def test_the_node_that_torchrun_gives_rank_0_evaluates_and_pushes(checkout):
    code, output = run(checkout, "run", rank="1")  # its address is the first in alphabetical order
    assert code == 0, output
    results = f"tar -cf {checkout.folder}/bucket/results.tar dvc.lock reports"
    assert checkout.calls() == [*PREPARE, torchrun("10.0.0.10"), *FINISH, results]


def test_another_node_only_trains(checkout):
    assert run(checkout, "run", rank="0")[0] == 0
    assert checkout.calls() == [*PREPARE, torchrun("10.0.0.9")]


def test_nothing_follows_a_failure_but_skypilot_still_waits_for_uploads(checkout):
    code, output = run(checkout, "run", rank="1", TORCHRUN_CODE="3")
    assert code == 3
    assert checkout.calls() == [*PREPARE, torchrun("10.0.0.10")]
    assert "uploads are complete" in output
    assert "an option leaks" not in output


def test_without_a_remote_nothing_is_computed(checkout):
    code, output = run(checkout, "run", NO_REMOTE="1")
    assert code == 2
    assert "dvc remote add --default NAME ADDRESS" in output
    assert checkout.calls() == PREPARE[:1]
