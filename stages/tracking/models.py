"""The uploader's side of an exported model: a pyfunc model in MLflow, and a version of the registered model `gpt2`.

Where MLflow's artifacts are local, the weights are a hard link to the exported file: nothing is copied.
"""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from stages.tracking.handover import CODE_FILE, FOLDER, SHA256_TAG, SMALL_FILES, WEIGHTS, ModelFacts, link

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NAME = "gpt2"
"""Of the registered model. MLflow itself keeps its alias `latest`: models:/gpt2/latest."""
EXAMPLE_PARAMS = {"max_new_tokens": 40, "seed": 1}
PARAMS = {
    "max_new_tokens": 200,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 1,
    "dtype": "auto",
}
"""What `predict` takes as `params`, with its defaults: the options of `python -m gpt2 generate`."""
TYPES = {int: "long", float: "double", str: "string"}
"""MLflow's names of Python's types."""


def log_model(client: "MlflowClient", run: "Run", artifacts: Path, event: dict[str, Any]) -> None:
    """Logs and registers the model in a record's artifacts, unless MLflow has it. Raises any error of MLflow."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    facts, run_id = ModelFacts(**event), run.info.run_id
    versions = client.search_model_versions(f"name = '{NAME}' and run_id = '{run_id}'")
    if any(version.tags.get(SHA256_TAG) == facts.sha256 for version in versions):
        return
    tags = {SHA256_TAG: facts.sha256}
    logged = client.create_logged_model(
        run.info.experiment_id, name=NAME, source_run_id=run_id, tags=tags, params=run.data.params, model_type="gpt2"
    )
    status = LoggedModelStatus.FAILED
    try:
        with tempfile.TemporaryDirectory(dir=artifacts) as temporary:
            folder = Path(temporary) / "model"
            model = Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            )
            save(folder, artifacts / FOLDER, facts, model)
            if local := local_folder(logged.artifact_location):
                link(artifacts / FOLDER / WEIGHTS, local / "artifacts" / FOLDER / WEIGHTS)
            else:
                link(artifacts / FOLDER / WEIGHTS, folder / "artifacts" / FOLDER / WEIGHTS)
            client.log_model_artifacts(logged.model_id, str(folder))
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with suppress(MlflowException):  # it exists
        client.create_registered_model(NAME, description="The models that `export-to-space` exported.")
    client.create_model_version(
        NAME, f"models:/{logged.model_id}", run_id, tags, description=facts.description, model_id=logged.model_id
    )


def save(folder: Path, source: Path, facts: ModelFacts, model: Any) -> None:
    """Writes a folder that `mlflow.pyfunc.load_model` loads, but without the weights, artifacts/model/gpt_model.pt."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import ColSpec, DataType

    text = Schema([ColSpec(DataType.string)])
    params = ParamSchema([ParamSpec(name, TYPES[type(value)], value) for name, value in PARAMS.items()])
    with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        small = Path(temporary) / FOLDER  # MLflow keeps the folder's name
        small.mkdir()
        for name in SMALL_FILES:
            shutil.copyfile(source / name, small / name)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(source / CODE_FILE.name),
            artifacts={FOLDER: str(small)},
            code_paths=[str(path) for path in sorted((source / "code").iterdir())],
            signature=ModelSignature(text, text, params),
            input_example=([facts.example], EXAMPLE_PARAMS),
            pip_requirements=[f"mlflow=={mlflow.__version__}", *facts.requirements],
            mlflow_model=model,
        )


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names, if it is one on this machine."""
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(location) if not parts.scheme and location.startswith("/") else None
