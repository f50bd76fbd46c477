"""The result of a fault injection campaign."""

from dataclasses import dataclass, field


@dataclass
class Result:
    """name: of the campaign. failures: one line each. notes: other measurements."""

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
        """Asserts that there were no failures, in at least this number of cases."""
        assert not self.failures, "\n".join(self.failures[:20])
        assert self.cases >= at_least
