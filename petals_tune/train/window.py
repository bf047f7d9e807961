"""Running means over the batches that are accumulated for one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field

from petals_tune.train.objective import Scores


@dataclass(kw_only=True)
class Window:
    """Token-weighted means over the batches of one optimizer step so far; plain numbers, which a checkpoint can hold.

    With several processes each has its own sums, and all have the same `tokens`, so that the average of their means is
    the mean over the tokens of all.
    """

    tokens: float = 0.0  # supervised tokens (rows, for a classification) so far, averaged over the processes
    sums: dict[str, float] = field(default_factory=dict)  # metric -> sum over the tokens of this process

    def add(self, scores: Scores, mean_count: float) -> tuple[float, float]:
        """Add a batch; `mean_count` is its number of tokens, averaged over the processes.

        Returns the factors by which the gradient so far and the batch's mean loss become terms of the new mean.
        """
        before = self.tokens
        self.tokens += mean_count
        for name, value in {"loss": scores.loss, **scores.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + scores.count * value.item()
        return before / self.tokens, scores.count / self.tokens

    @property
    def means(self) -> dict[str, float]:
        return {name: total / self.tokens for name, total in self.sums.items()}
