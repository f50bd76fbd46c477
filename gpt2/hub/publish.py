"""Uploads a Space and a model to the Hugging Face Hub."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.errors import FileError, GPT2Error, UserError

WAIT_S = 20 * 60
POLL_S = 5.0
FAILED = ("BUILD_ERROR", "CONFIG_ERROR", "NO_APP_FILE", "RUNTIME_ERROR", "APP_STARTING_ERROR", "DELETING", "PAUSED")


class HubError(GPT2Error):
    """The Hugging Face Hub refused a request, or is unreachable."""

    exit_code = 1


@dataclass(frozen=True)
class Target:
    """A folder to upload. kind: "space" or "model", as the Hub calls it."""

    kind: str
    folder: Path

    def files(self) -> dict[str, int]:
        """Its files, with their sizes in bytes. Raises FileError if there are none."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        if not paths:
            raise FileError(f"{self.folder} has no files; create them with `dvc repro`")
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def listing(self, repo: str) -> str:
        """The files to upload, one per line."""
        files = self.files()
        lines = [f"{self.kind} {repo}, from {self.folder}: {len(files)} files, {sum(files.values()):,} bytes"]
        return "\n".join(lines + [f"  {size:>13,}  {name}" for name, size in files.items()])


def publish(repo: str, target: Target, log: Callable[[str], object], *, wait_s: float = WAIT_S) -> str:
    """Creates the repository if it does not exist, and replaces its files with these, in one commit.

    Waits until a Space runs, and reports its state to `log`. Returns the URL. Raises HubError.
    """
    from huggingface_hub import HfApi

    target.files()
    api = HfApi()
    _call_hub(api.whoami, api)
    hardware = _hardware(target) if target.kind == "space" else {}
    created = _call_hub(api.create_repo, api, repo, repo_type=target.kind, exist_ok=True, **hardware)
    commit = _call_hub(
        api.upload_folder,
        api,
        repo_id=repo,
        repo_type=target.kind,
        folder_path=target.folder,
        commit_message="Published from its pipeline",
        ignore_patterns=["**/__pycache__/**"],
        delete_patterns="*",  # files of earlier uploads
    )
    if target.kind == "space":
        _wait(api, repo, commit.oid, log, wait_s)
    return str(created)


def _hardware(target: Target) -> dict[str, str]:
    """The hardware of a Space, from its card, as arguments of create_repo."""
    card = (target.folder / "README.md").read_text(encoding="utf-8")
    is_zero = "suggested_hardware: zero" in card
    return {"space_sdk": "gradio", **({"space_hardware": "zero-a10g"} if is_zero else {})}


def _wait(api: Any, repo: str, commit: str, log: Callable[[str], object], wait_s: float) -> None:
    """Waits until the Space runs this commit."""
    deadline_s, last_stage, pause_s = time.monotonic() + wait_s, None, 0.2
    while True:
        runtime = _call_hub(api.get_space_runtime, api, repo)
        stage = str(getattr(runtime.stage, "value", runtime.stage))
        if stage != last_stage:
            log(f"the Space is {stage.lower().replace('_', ' ')}")
            last_stage = stage
        is_current = runtime.raw.get("sha", commit) == commit
        if is_current and stage == "RUNNING":
            return
        if is_current and stage in FAILED:
            raise HubError(f"the Space does not run ({stage}); its log is at {api.endpoint}/spaces/{repo}")
        if time.monotonic() > deadline_s:
            raise HubError(f"the Space is {stage} after {wait_s:.0f} s; look at {api.endpoint}/spaces/{repo}")
        time.sleep(pause_s)
        pause_s = min(POLL_S, 1.5 * pause_s)


def _call_hub(method: Callable[..., Any], api: Any, *arguments: Any, **options: Any) -> Any:
    """Calls the Hub. Raises HubError with one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        return method(*arguments, **options)
    except LocalTokenNotFoundError:
        raise HubError("no token: log in with `hf auth login`, or set HF_TOKEN to one with write access") from None
    except HFValidationError as error:
        raise UserError(f"--repo: {' '.join(str(error).split())}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        detail = " ".join((error.server_message or str(error)).split())[:200]
        advice = {
            401: "the Hub does not accept the token; log in with `hf auth login`",
            402: "the Hub asks for a paid plan for this; for a free Space set export.target to zerogpu",
            403: "the token has no write access to this repository; use a token with write access, and your user name",
            404: "the repository does not exist, or the token has no access to it",
            429: "too many requests to the Hub; try again later",
        }.get(status, "server error of the Hub; try again later" if status >= 500 else "the Hub refused the request")
        raise HubError(f"{advice} ({status}: {detail})") from None
    except Exception as error:
        # compares names, because the class changes when the library changes its HTTP client
        if not isinstance(error, OSError) and "TransportError" not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(f"{api.endpoint} cannot be reached ({reason}); check the network and try again") from None
