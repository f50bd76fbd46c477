"""What a campaign of faults found."""

from dataclasses import dataclass, field


@dataclass
class Result:
    """name: what was done. failures: what went wrong, a line each. notes: what else was measured."""

    name: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, problem: str | None) -> None:
        """Counts a case."""
        self.cases += 1
        if problem:
            self.failures.append(problem)

    def check(self, at_least: int) -> None:
        """For a test: nothing went wrong, and it was not for want of cases."""
        assert not self.failures, "\n".join(self.failures[:20])
        assert self.cases >= at_least
