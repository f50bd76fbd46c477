import numpy as np
import pytest

from gpt2 import tokenizer
from gpt2.errors import UserError
from gpt2.evaluation import cloze
from gpt2.evaluation.cloze import cloze_questions


def tokens_of(*documents):
    tokens = [token for document in documents for token in (tokenizer.END_OF_TEXT, *tokenizer.encode(document))]
    return np.array(tokens[1:], dtype=np.uint16)


def test_questions_are_made_from_the_text(text):
    questions = cloze_questions(tokens_of(text), 1)
    assert len(questions) == cloze.MAX_QUESTIONS
    words = set(text.replace(".", " ").split())
    for question in questions:
        right = question.endings[question.answer]
        assert f"{question.context} {right}" in text
        assert 200 < len(question.context) <= cloze.CONTEXT_CHARACTERS
        assert question.context == question.context.strip()
        assert len(set(question.endings)) == 4
        assert set(question.endings) <= words
        assert len({ending[0].isupper() for ending in question.endings}) == 1
    answers = [question.answer for question in questions]
    assert all(60 < answers.count(index) < 140 for index in range(4))


def test_the_wrong_words_are_as_frequent_as_the_right_one():
    # word number n occurs n times
    words = [a + b + "word" for a in "abcdefgh" for b in "abcdefgh"]
    text = "start " * 60 + " ".join(word for number, word in enumerate(words, 1) for _ in range(number))
    for question in cloze_questions(tokens_of(text), 1):
        right = question.endings[question.answer]
        if right in words:
            distances = [abs(words.index(right) - words.index(other)) for other in question.endings if other in words]
            assert max(distances) <= cloze.NEIGHBOURS + 1


def test_questions_depend_on_the_seed_and_the_text_alone(text):
    tokens = tokens_of(text)
    assert cloze_questions(tokens, 1) == cloze_questions(tokens, 1)
    assert cloze_questions(tokens, 1) != cloze_questions(tokens, 2)


def test_a_context_does_not_cross_documents(text):
    questions = cloze_questions(tokens_of(text[:2000], "Another text begins here.\n" + text[2000:4000]), 1)
    assert any("begins here" in question.context for question in questions)
    for question in questions:
        assert question.context in text[:2000] or question.context in "Another text begins here.\n" + text[2000:4000]


def test_a_short_text_is_an_error():
    for short in ("Too short.", "word " * 500):
        with pytest.raises(UserError, match=r"the held-out text is too short for evaluate\.tasks: cloze"):
            cloze_questions(tokens_of(short), 1)
