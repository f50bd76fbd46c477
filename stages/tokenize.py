"""tokenize: encodes data/corpus.txt into the token files of the training and validation splits."""

import subprocess
from contextlib import nullcontext
from dataclasses import replace

from tqdm import tqdm

from gpt2.data.tokenizing.shards import count_processes, write_tokens
from stages import cores, paths
from stages.params import load_params
from stages.process import StopSignal, echo, run_stage

LARGE_BYTES = 1_000_000_000
LINK = "dvc config --local cache.type hardlink,symlink,copy"


def main(stop: StopSignal) -> None:
    """Tokenizes the corpus, and prints the sizes of the splits."""
    params = load_params(paths.PARAMS)
    size = paths.CORPUS.stat().st_size
    processes = count_processes(size, params.runtime.threads or cores.available())
    on_cpu = replace(params.runtime, device="cpu")
    with (
        cores.reserve_cores(on_cpu, stop) if processes > 1 else nullcontext(),
        tqdm(desc="tokenizing", total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):

        def resume(num_bytes: int) -> None:
            echo(f"going on after {num_bytes / 1e6:,.0f} MB of text that an earlier run tokenized")
            bar.initial = bar.n = num_bytes  # so that the rate is that of this run

        index = write_tokens(
            paths.CORPUS,
            paths.DOCUMENTS,
            paths.TOKENS,
            params.tokenize,
            partial=paths.unfinished_tokens(),
            processes=processes,
            progress=stop.wrap(bar.update),
            resumed=resume,
        )
    train, val, duplicates = index["splits"]["train"], index["splits"]["val"], index["duplicates"]
    told = f"{paths.TOKENS}: {train['tokens']:,} training and {val['tokens']:,} validation tokens"
    if duplicates["removed"]:
        told += f"; {duplicates['removed']:,} duplicates were left out"
    if duplicates["across"]:
        told += f"; {duplicates['across']:,} validation documents are also in training: set tokenize.deduplicate"
    echo(told)
    if sum(split["tokens"] for split in index["splits"].values()) * 2 > LARGE_BYTES:
        tell_about_links()


def tell_about_links() -> None:
    """Says how to avoid a second copy of the tokens, unless DVC is configured for it."""
    try:
        configured = subprocess.run(["dvc", "config", "cache.type"], capture_output=True, text=True).stdout
    except OSError:  # there is no DVC
        return
    if "link" not in configured:
        echo(
            "on most file systems DVC now copies the tokens into its cache; to link them instead: "
            f"{LINK}, then dvc checkout --relink"
        )


if __name__ == "__main__":
    run_stage(main)
