"""Guesses: what a draft model's guesses were worth, over all texts that it helped to write."""

from GPT2Model.speculative import SpeculativeResult
from orchestrator.writing.clock import counted


class Guesses:
    """`add` goes into `generate_text(on_draft=...)`. Nothing is said where there was no draft."""

    def __init__(self):
        self.results: list[SpeculativeResult] = []

    def add(self, index: int, result: SpeculativeResult) -> None:
        """The completion of this number is complete."""
        self.results.append(result)

    def total(self, name: str) -> int:
        return sum(getattr(result, name) for result in self.results)

    def facts(self) -> dict:
        """How many tokens were guessed, how many of them kept, in how many passes of the model; JSON-ready."""
        if not self.results:
            return {}
        judged = self.total("accepted") + self.total("rejected")
        rate = self.total("accepted") / judged if judged else None
        passes = {"guessed": self.total("proposed"), "kept": self.total("accepted"), "passes": self.total("rounds")}
        return {"draft": {**passes, "acceptance_rate": rate}}

    def lines(self) -> list[str]:
        """The same as text: one line, or none."""
        if not self.results:
            return []
        facts = self.facts()["draft"]
        rate = "" if facts["acceptance_rate"] is None else f" ({facts['acceptance_rate']:.0%} of those judged)"
        guessed = counted(facts["guessed"], "guess").replace("guesss", "guesses")
        return [
            f"{guessed}, {facts['kept']} kept{rate}, in {counted(facts['passes'], 'pass').replace('passs', 'passes')}"
        ]
