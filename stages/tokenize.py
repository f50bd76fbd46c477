"""tokenize: encodes data/corpus.txt into the token files of the training and validation splits."""

from tqdm import tqdm

from gpt2.data import token_files
from stages import paths
from stages.params import load_params
from stages.process import StopSignal, echo, run_stage


def main(stop: StopSignal) -> None:
    """Tokenizes the corpus, and prints the sizes of the splits."""
    config = load_params(paths.PARAMS).tokenize
    size = paths.CORPUS.stat().st_size
    with tqdm(desc="tokenizing", total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        meta = token_files.write_tokens(
            paths.CORPUS, paths.TOKENS, config.validation_fraction, progress=stop.wrap(bar.update)
        )
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    echo(f"{paths.TOKENS}: {train['tokens']:,} training and {val['tokens']:,} validation tokens")


if __name__ == "__main__":
    run_stage(main)
