"""What `preset auto` found out about texts: Tiny Shakespeare, its first 30 kB, and 20 MB of Python."""

from experiments.automatic.text import Text

NOVEL = Text(1_100_000, 1, 338_000, 11_000, 0.004, 0.002, 5.74, False)
NOTE = Text(30_000, 1, 9_100, 1_776, 0.001, 0.0, 6.76, False)
CODE = Text(20_000_000, 1, 9_652_000, 16_639, 0.415, 0.268, 3.99, False)
