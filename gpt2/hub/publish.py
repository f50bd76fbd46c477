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
    """What is published. kind: "space" or "model", as the Hub calls it."""

    kind: str
    folder: Path

    def files(self) -> dict[str, int]:
        """Its files, with their sizes in bytes. Raises FileError if there are none."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        if not paths:
            raise FileError(f"there is nothing in {self.folder}; make it with `dvc repro`")
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def listing(self, repo: str) -> str:
        """What would be uploaded, a line for each file."""
        files = self.files()
        lines = [f"{self.kind} {repo}, from {self.folder}: {len(files)} files, {sum(files.values()):,} bytes"]
        return "\n".join(lines + [f"  {size:>13,}  {name}" for name, size in files.items()])


def publish(repo: str, target: Target, say: Callable[[str], object], *, wait_s: float = WAIT_S) -> str:
    """Creates the repository if there is none, and makes it hold exactly these files, in one commit.

    A Space is waited for until it runs. Gives its address. Raises HubError, with one line to act on.
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
        delete_patterns="*",  # what is there and not here
    )
    if target.kind == "space":
        _wait(api, repo, commit.oid, say, wait_s)
    return str(created)


def _hardware(target: Target) -> dict[str, str]:
    """The arguments of create_repo that say what a Space runs on, as its card does."""
    card = (target.folder / "README.md").read_text(encoding="utf-8")
    is_zero = "suggested_hardware: zero" in card
    return {"space_sdk": "gradio", **({"space_hardware": "zero-a10g"} if is_zero else {})}


def _wait(api: Any, repo: str, commit: str, say: Callable[[str], object], wait_s: float) -> None:
    """Waits until the Space runs this commit."""
    deadline_s, last_stage, pause_s = time.monotonic() + wait_s, None, 0.2
    while True:
        runtime = _call_hub(api.get_space_runtime, api, repo)
        stage = str(getattr(runtime.stage, "value", runtime.stage))
        if stage != last_stage:
            say(f"the Space is {stage.lower().replace('_', ' ')}")
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


def _call_hub(question: Callable[..., Any], api: Any, *arguments: Any, **options: Any) -> Any:
    """Calls the Hub. Raises HubError with one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        return question(*arguments, **options)
    except LocalTokenNotFoundError:
        raise HubError("no token: log in with `hf auth login`, or set HF_TOKEN to one that may write") from None
    except HFValidationError as error:
        raise UserError(f"--repo: {' '.join(str(error).split())}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = " ".join((error.server_message or str(error)).split())[:200]
        advice = {
            401: "the Hub does not accept the token; log in with `hf auth login`",
            402: "the Hub asks for a paid plan for this; for a free Space set export.target to zerogpu",
            403: "the token may not write there; take one with the right to write, and a name of your own",
            404: "the Hub does not know this repository, or the token may not see it",
            429: "the Hub is asked too often; try again later",
        }.get(status, "the Hub could not do it; try again later" if status >= 500 else "the Hub refused")
        raise HubError(f"{advice} ({status}: {said})") from None
    except Exception as error:
        # by name: the library's HTTP client, and with it the class, has changed before
        if not isinstance(error, OSError) and "TransportError" not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(f"{api.endpoint} cannot be reached ({reason}); look at the network and try again") from None
