"""Cloze questions from the held-out text: the last word of a passage, among words of similar frequency.

Like LAMBADA (https://arxiv.org/abs/1606.06031), but with four words to choose from, so that small models score, too.
"""

import random
import re
from collections import Counter

import numpy as np

from gpt2 import tokenizer
from gpt2.data.token_files import Tokens
from gpt2.errors import UserError
from gpt2.evaluation.choices import Question

CONTEXT_CHARACTERS = 300
MAX_QUESTIONS = 400
MAX_TOKENS = 1 << 20
CHOICES = 4
NEIGHBOURS = 10
WORD = re.compile(r"(?<=\S) ([^\W\d_]{3,})(?![\w'’-])")
"""A word of at least three letters, after one space."""


def cloze_questions(tokens: Tokens, seed: int) -> list[Question]:
    """Up to 400 questions from evenly spaced places of the first million held-out tokens; a pure function of both.

    The context is what precedes the word in its document, up to 300 characters. The wrong words are drawn from the
    text's words that are next to the right one by frequency, and begin like it with a capital or a small letter.
    Raises UserError if the text has too few different words.
    """
    text_tokens = np.asarray(tokens[:MAX_TOKENS])
    ends = np.flatnonzero(text_tokens == tokenizer.END_OF_TEXT)
    documents = [tokenizer.decode(part[part != tokenizer.END_OF_TEXT].tolist()) for part in np.split(text_tokens, ends)]
    places = [
        (document, match)
        for document in documents
        for match in WORD.finditer(document)
        if match.start() >= CONTEXT_CHARACTERS
    ]
    words = {
        capital: _by_frequency([match[1] for _, match in places if match[1][0].isupper() == capital])
        for capital in (False, True)
    }
    places = [place for place in places if len(words[place[1][1][0].isupper()]) >= CHOICES]
    if not places:
        raise UserError(
            "the held-out text is too short for evaluate.tasks: cloze; use a longer text or a larger "
            "tokenize.validation_fraction"
        )
    generator = random.Random(seed)  # noqa: S311 - not for secrets
    step = max(1.0, len(places) / MAX_QUESTIONS)
    chosen = [places[int(number * step)] for number in range(min(MAX_QUESTIONS, len(places)))]
    return [_question(document, match, words[match[1][0].isupper()], generator) for document, match in chosen]


def _by_frequency(words: list[str]) -> list[str]:
    return [word for word, _ in sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))]


def _question(document: str, match: re.Match[str], words: list[str], generator: random.Random) -> Question:
    rank = words.index(match[1])
    others = words[max(0, rank - NEIGHBOURS) : rank] + words[rank + 1 : rank + 1 + NEIGHBOURS]
    endings = generator.sample(others, CHOICES - 1)
    answer = generator.randrange(CHOICES)
    endings.insert(answer, match[1])
    context = document[match.start() - CONTEXT_CHARACTERS : match.start()]
    return Question(re.sub(r"^\S*\s+", "", context), tuple(endings), answer)
