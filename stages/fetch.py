"""fetch: writes the text of `corpus.source` to data/corpus.txt, and where its documents end to data/documents.bin."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from gpt2.config import CorpusConfig
from gpt2.data import corpus
from gpt2.data.corpus import CorpusInfo
from gpt2.data.limit import parse_limit
from gpt2.data.sources.download import DownloadError
from gpt2.files import write_json
from stages import paths
from stages.params import load_params
from stages.process import StopSignal, echo, redact_secrets, run_stage, warn


def main(stop: StopSignal) -> None:
    """Fetches the source, or the fallback if the download fails."""
    config = load_params(paths.PARAMS).corpus
    fallback_reason = None
    link_own_files(config.source)
    try:
        facts = write(config, stop)
    except DownloadError as error:
        if config.fallback is None or config.fallback == config.source:
            raise DownloadError(f"{error}; check the network, set corpus.fallback, or use a text file") from None
        fallback_reason = str(error)
        config = replace(config, source=config.fallback)
        warn(f"{error}. Using the fallback corpus {config.source!r} instead")
        facts = write(config, stop)
    name = config.source if isinstance(config.source, str) else ", ".join(config.source)
    content = {"name": name, **asdict(facts), "fallback_reason": fallback_reason}
    shown = {key: redact_secrets(value) if isinstance(value, str) else value for key, value in content.items()}
    write_json(paths.CORPUS_FACTS, shown)
    size = f"{facts.characters:,} characters in {facts.lines:,} lines"
    if facts.documents > 1 or facts.skipped:
        size += f" and {facts.documents:,} documents ({facts.skipped:,} without text skipped)"
    echo(f"{paths.CORPUS}: {size} from {facts.source}")


def write(config: CorpusConfig, stop: StopSignal) -> CorpusInfo:
    """Writes the corpus files."""
    root = paths.real_root()
    with tqdm(desc="fetching", unit="B", unit_scale=True, disable=None, leave=False, delay=1) as bar:
        return corpus.write_corpus(
            config.source,
            paths.CORPUS,
            paths.DOCUMENTS,
            downloads=root / "data/downloads",
            roots=[Path.cwd(), root],
            text_column=config.text_column,
            limit=parse_limit(config.limit) if config.limit else None,
            progress=stop.wrap(bar.update),
        )


def link_own_files(source: str | Sequence[str]) -> None:
    """Links the user's own files into data/linked, a dependency of this stage in dvc.yaml.

    So DVC detects edits of these files, wherever they are. It does not detect files that are added to a folder later.
    """
    for old in paths.LINKED.iterdir() if paths.LINKED.is_dir() else ():
        if old.is_symlink():
            old.unlink()
    for file in corpus.local_files(source, [Path.cwd(), paths.real_root()]):
        paths.LINKED.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]
        (paths.LINKED / f"{name}-{file.name}").symlink_to(file)


if __name__ == "__main__":
    run_stage(main)
