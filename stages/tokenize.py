"""tokenize: data/corpus.txt becomes the token files of the training and the validation split."""

from gpt2 import data
from stages import paths
from stages.params import load_params
from stages.process import run_stage, say


def main() -> None:
    """Tokenizes, and says how long the splits are."""
    config = load_params(paths.PARAMS).tokenize
    meta = data.write_tokens(paths.CORPUS, paths.TOKENS, config.validation_fraction)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    say(f"{paths.TOKENS}: {train['tokens']:,} training and {val['tokens']:,} validation tokens")


if __name__ == "__main__":
    run_stage(main)
