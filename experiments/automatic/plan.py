"""Which recipe fits the minutes of a whole `dvc repro` on this machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from experiments.automatic.probe import Speed
from experiments.automatic.recipe import SIZES, Recipe, expected_loss, most_tokens, recipe
from experiments.automatic.text import Text
from gpt2.errors import UserError

START_UPS = 12.0
"""Time of all stages but reading the text, training steps and scoring, in times that it takes to import torch and set
up a training: the stages import torch three times, and draw, generate, export and compare."""
SECONDS_PER_PARAMETER = 1.5e-7
"""Of the stages that read, write, quantize and compare weights."""
SCORING_PASSES = 4.0
"""Of the evaluate stage and of the export over the held-out tokens: with confidences, and in each dtype."""
VERBATIM_SECONDS = 1.2e-6
"""Of the search for copies, for each token of training."""
MAX_VALIDATION_FRACTION = 0.1
"""Most that is held out of a text."""
VALIDATION_SHARE = 0.12
"""Most of the time that goes into scoring held-out tokens."""
MIN_VALIDATION_TOKENS = 1_000
MIN_TRAINING_SHARE = 0.2
SLOWER = 1.03
"""Steps of a long run, with logs and checkpoints, beside those of a measurement."""
USUAL_UTILIZATION = 0.35
"""Of the peak of the machine's matrix products, for the first guess."""
USUAL_TRAINING_SHARE = 0.5
"""Of the time, to estimate the length of a run before it is known."""


class Measures(Protocol):
    """What `experiments.automatic.machine` does."""

    def __call__(self, chosen: Recipe, *, thorough: bool) -> Speed:
        """The speed of a training. Raises UserError if it does not fit into memory."""


@dataclass(frozen=True)
class Plan:
    """A run that ends in time.

    is_early: whether it ends before, because more epochs do not lower the loss. validation_fraction: of the text,
    held out. seconds: expected for the whole pipeline. epochs: how often the run reads the text. loss: expected, in
    nats per token.
    """

    recipe: Recipe
    speed: Speed
    steps: int
    is_early: bool
    validation_fraction: float
    seconds: float
    epochs: float
    loss: float

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations."""
        return -(-self.steps // self.recipe.evaluations)

    @property
    def tokens_per_s(self) -> float:
        """Tokens in a second of training."""
        return self.recipe.step_tokens / self.speed.step_s


@dataclass(frozen=True)
class Budget:
    """The seconds of a run. reading_s: of the text, by the stages fetch and tokenize."""

    seconds: float
    reading_s: float
    text: Text

    @property
    def training_tokens(self) -> float:
        """Tokens of the text that are not held out."""
        return self.text.tokens * (1 - MAX_VALIDATION_FRACTION)

    def usual_tokens(self, size: tuple[int, int, int], peak_flops: float) -> float:
        """On how many tokens a size would train if it reaches a usual share of the peak."""
        model = recipe(size, 1.0, self.training_tokens).model
        return self.tokens(USUAL_UTILIZATION * peak_flops / model.flops_per_token(model.block_size))

    def tokens(self, tokens_per_s: float) -> float:
        """On about how many tokens a run with this speed trains."""
        return min(most_tokens(self.training_tokens), max(1.0, USUAL_TRAINING_SHARE * self.seconds * tokens_per_s))

    def recipe(self, size: tuple[int, int, int], tokens: float) -> Recipe:
        """The recipe of a size."""
        return recipe(size, tokens, self.training_tokens)

    def loss(self, chosen: Recipe, tokens: float) -> float:
        """The expected loss."""
        return expected_loss(chosen.model, tokens, self.training_tokens, self.text)

    def plan(self, chosen: Recipe, speed: Speed) -> Plan:
        """As many steps as there is time for, or as lower the loss. Raises UserError if there is hardly any time.

        Time that the steps leave goes into scoring more held-out tokens.
        """
        scoring_s = VALIDATION_SHARE * self.seconds
        plan = self._plan(chosen, speed, scoring_s)
        if plan.is_early:
            plan = self._plan(chosen, speed, scoring_s + self.seconds - plan.seconds)
        return plan

    def _plan(self, chosen: Recipe, speed: Speed, scoring_s: float) -> Plan:
        """scoring_s: for held-out tokens."""
        tokens = self.text.tokens
        scored_s = chosen.evaluations / speed.validation_tokens_per_s + SCORING_PASSES / speed.scoring_tokens_per_s
        held_out = max(scoring_s / scored_s, MIN_VALIDATION_TOKENS)
        fraction = float(f"{min(MAX_VALIDATION_FRACTION, held_out / tokens):.2g}")
        other_s = (
            self.reading_s
            + START_UPS * speed.set_up_s
            + speed.compile_s
            + SECONDS_PER_PARAMETER * chosen.model.num_parameters()
            + VERBATIM_SECONDS * tokens
            + scored_s * fraction * tokens
        )
        if other_s > (1 - MIN_TRAINING_SHARE) * self.seconds:
            needed = math.ceil(other_s / 60 / (1 - MIN_TRAINING_SHARE))
            raise UserError(
                f"without training, the pipeline takes about {other_s / 60:.1f} minutes here; give it at least "
                f"{needed} {'minute' if needed == 1 else 'minutes'}"
            )
        step_s = SLOWER * speed.step_s
        in_time = max(2, int((self.seconds - other_s) / step_s))
        steps = min(in_time, math.ceil(most_tokens(tokens * (1 - fraction)) / chosen.step_tokens))
        return Plan(
            chosen,
            speed,
            steps,
            steps < in_time,
            fraction,
            other_s + steps * step_s,
            steps * chosen.step_tokens / (tokens * (1 - fraction)),
            self.loss(chosen, steps * chosen.step_tokens),
        )


def choose(budget: Budget, measure: Measures, peak_flops: float, tell: Callable[[str], None]) -> Plan:
    """The plan with the lowest expected loss, measured thoroughly. Raises UserError if none fits the time and memory.

    Begins with the size that the machine's peak suggests, and goes on to its neighbours while the loss falls. If the
    run ends early then, it goes on to larger sizes.
    """
    tokens = [budget.usual_tokens(size, peak_flops) for size in SIZES]
    guesses = [budget.recipe(size, count) for size, count in zip(SIZES, tokens, strict=True)]
    plans: dict[int, Plan] = {}
    problems: dict[int, UserError] = {}

    def loss(place: int) -> float:
        if 0 <= place < len(SIZES) and place not in plans and place not in problems:
            try:
                plans[place] = plan = budget.plan(guesses[place], measure(guesses[place], thorough=False))
                tell(
                    f"{describe(plan.recipe)}: {plan.tokens_per_s:,.0f} tokens/s; {plan.steps} steps in time, expected "
                    f"loss {plan.loss:.2f}"
                )
            except UserError as error:
                problems[place] = error
                tell(f"{describe(guesses[place])}: {error}")
        return plans[place].loss if place in plans else math.inf

    def thorough(place: int) -> Plan:
        # context, batch and evaluations depend on the length of the run, which is known by now
        chosen = budget.recipe(SIZES[place], plans[place].steps * plans[place].recipe.step_tokens)
        return budget.plan(chosen, measure(chosen, thorough=True))

    place = min(range(len(SIZES)), key=lambda place: budget.loss(guesses[place], tokens[place]))
    while True:
        best = min((place, place - 1, place + 1), key=loss)
        if best == place:
            break
        place = best
    if place not in plans:
        loss(0)  # the smallest size says how many minutes are needed at least
        if 0 not in plans:
            raise problems[0]
        place = 0
    plan = thorough(place)
    while plan.is_early and loss(place + 1) < math.inf:  # compiled, a larger size may fit the time, too
        try:
            larger = thorough(place + 1)
        except UserError as error:
            tell(f"{describe(guesses[place + 1])}, compiled: {error}")
            break
        tell(f"{describe(larger.recipe)}, compiled: expected loss {larger.loss:.2f}, beside {plan.loss:.2f}")
        if larger.loss >= plan.loss:
            break
        plan, place = larger, place + 1
    return plan


def describe(chosen: Recipe) -> str:
    """The size of a model in words."""
    return f"{chosen.model.n_layer} layers of width {chosen.model.n_embd}"
