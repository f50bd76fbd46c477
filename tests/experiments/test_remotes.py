"""A colleague's clone: `git clone` and `dvc pull` bring the data, the model and the Space, and nothing trains."""

import shutil
import subprocess

import pytest

from gpt2.files import sha256_of
from tests.project import Project

pytestmark = pytest.mark.slow
KEYS = {"access_key_id": "an-id", "secret_access_key": "a-secret"}
NEEDED = "pip install dvc-s3 'moto[server]'"


class Clone(Project):
    """A clone of a project in another folder."""

    def __init__(self, folder, origin):
        self.folder = folder
        folder.mkdir()
        self.run("git", "clone", "-q", str(origin), ".")


@pytest.fixture
def s3_address():
    """An S3 server on this machine, with a bucket."""
    boto3, server = (pytest.importorskip(name, reason=NEEDED) for name in ("boto3", "moto.server"))
    pytest.importorskip("dvc_s3", reason=NEEDED)
    moto = server.ThreadedMotoServer("127.0.0.1", 0)
    moto.start()
    host, port = moto.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {f"aws_{name}": value for name, value in KEYS.items()}
    boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="results")
    yield address
    moto.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished run, and a repository that both people push to and pull from."""
    folder = tmp_path_factory.mktemp("mine")
    project = Project(folder)
    project.change(corpus={"source": "python-docs", "limit": "40 kB"})
    project.run("dvc", "repro")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "run")
    origin = tmp_path_factory.mktemp("origin")
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(origin)], check=True)
    project.run("git", "remote", "add", "origin", str(origin))
    project.origin = origin
    return project


def test_a_clone_pulls_everything_from_a_folder(project, tmp_path):
    project.run("dvc", "remote", "add", "--force", "-d", "storage", str(tmp_path / "storage"))
    share(project, "for-a-folder")
    pulls_everything(project, Clone(tmp_path / "clone", project.origin), "for-a-folder")


def test_a_clone_pulls_everything_from_s3(project, tmp_path, s3_address):
    project.run("dvc", "remote", "add", "--force", "-d", "storage", "s3://results/dvc")
    project.run("dvc", "remote", "modify", "storage", "endpointurl", s3_address)
    log_in(project)
    share(project, "for-s3")
    clone = Clone(tmp_path / "clone", project.origin)
    log_in(clone)
    pulls_everything(project, clone, "for-s3")
    assert "a-secret" not in clone.run("git", "log", "-p", "--all")


def log_in(project):
    for name, value in KEYS.items():
        project.run("dvc", "remote", "modify", "--local", "storage", name, value)


def share(project, experiment):
    """Pushes the run, and an experiment that knows the remote."""
    project.run("git", "commit", "-qam", "remote")
    project.run("dvc", "exp", "run", "--temp", "--name", experiment, "-S", "train.max_steps=16", "train")
    project.run("git", "push", "-q", "--force", "origin", "main")
    project.run("dvc", "push")
    project.run("dvc", "exp", "push", "origin", experiment)


def pulls_everything(project, clone, experiment):
    clone.run("dvc", "pull")
    model = "models/model.safetensors"
    assert sha256_of(clone.folder / model) == sha256_of(project.folder / model)
    assert (clone.folder / "dist/space/app.py").is_file()
    assert "Running stage" not in clone.run("dvc", "repro")

    clone.run("dvc", "exp", "pull", "origin", experiment)
    clone.run("dvc", "exp", "apply", experiment)
    assert clone.read("reports/train/metrics.json")["steps"] == 16
    (session,) = clone.read("reports/train/environment.json")
    assert sha256_of(clone.folder / model) == session["sha256"]["model"]

    shutil.rmtree(clone.folder / ".dvc/cache")  # another colleague, who wants to see it trained
    output = clone.run("python", "-m", "gpt2", "reproduce", experiment)
    assert "pulled the tokens from storage" in output
    assert f"same bits: the weights of {experiment} have SHA-256 {session['sha256']['model']} again" in output
