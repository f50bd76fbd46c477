"""fetch: writes the text of `corpus.source` to data/corpus.txt."""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from gpt2.data import corpus
from gpt2.data.corpus import CorpusInfo
from gpt2.data.download import DownloadError, is_url
from gpt2.files import write_json
from stages import paths
from stages.params import load_params
from stages.process import StopSignal, echo, redact_secrets, run_stage, warn


def main(stop: StopSignal) -> None:
    """Fetches the source, or the fallback if the download fails."""
    config = load_params(paths.PARAMS).corpus
    source, fallback_reason = config.source, None
    link_own_text(source)
    try:
        facts = write(source, stop)
    except DownloadError as error:
        if config.fallback is None or config.fallback == source:
            raise DownloadError(f"{error}; check the network, set corpus.fallback, or use a text file") from None
        fallback_reason = str(error)
        source = config.fallback
        warn(f"{error}. Using the fallback corpus {source!r} instead")
        facts = write(source, stop)
    content = {"name": source, **asdict(facts), "fallback_reason": fallback_reason}
    shown = {key: redact_secrets(value) if isinstance(value, str) else value for key, value in content.items()}
    write_json(paths.CORPUS_FACTS, shown)
    echo(f"{paths.CORPUS}: {facts.characters:,} characters in {facts.lines:,} lines from {facts.source}")


def write(source: str, stop: StopSignal) -> CorpusInfo:
    """Writes the corpus file from a source."""
    root = paths.real_root()
    with tqdm(desc="downloading", unit="B", unit_scale=True, disable=None, leave=False, delay=1) as bar:
        return corpus.write_corpus(
            source,
            paths.CORPUS,
            downloads=root / "data/downloads",
            roots=[Path.cwd(), root],
            progress=stop.wrap(bar.update),
        )


def link_own_text(source: str) -> None:
    """Links the user's own files into data/linked, a dependency of this stage in dvc.yaml.

    So DVC detects edits of these files, wherever they are. It does not detect files that are added to a folder later.
    """
    for old in paths.LINKED.iterdir() if paths.LINKED.is_dir() else ():
        if old.is_symlink():
            old.unlink()
    if source in corpus.KNOWN or is_url(source):
        return
    paths.LINKED.mkdir(parents=True, exist_ok=True)
    path = corpus.find_path(source, [Path.cwd(), paths.real_root()])
    for file in corpus.text_files(path):
        name = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]
        (paths.LINKED / f"{name}-{file.name}").symlink_to(file)


if __name__ == "__main__":
    run_stage(main)
