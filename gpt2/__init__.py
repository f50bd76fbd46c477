"""Train and use GPT-2: the model, its tokens, its training, its evaluation and its generation.

Nothing is imported here, so that `python -m gpt2 --help` and the checks of a configuration need no torch. Import what
you use: `from gpt2.model import GPT`.
"""

__version__ = "0.1.0"
