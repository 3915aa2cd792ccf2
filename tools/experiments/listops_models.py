"""What classifies ListOps without its order: counting symbols."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnnlm.data.sequences.rows import LabelledRows


class BagOfSymbols(nn.Module):
    """A linear classifier of how often each symbol occurs: all that can be known without the order."""

    def __init__(self, n_symbols: int, n_classes: int) -> None:
        super().__init__()
        self.n_symbols = n_symbols
        self.head = nn.Linear(n_symbols, n_classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, C) for tokens (B, L), whose pads count for nothing."""
        counts = nn.functional.one_hot(tokens, self.n_symbols + 1)[:, :, 1:].sum(1)
        logits: Tensor = self.head(counts.to(self.head.weight.dtype))
        return logits

    def fit(self, rows: LabelledRows, steps: int = 200) -> None:
        """To the optimum of the cross-entropy over all rows, by L-BFGS."""
        counts = torch.stack([_counts(rows, index, self.n_symbols) for index in range(len(rows))])
        labels = torch.from_numpy(rows.labels).long()
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.head(counts), labels)
            loss.backward()
            return loss.item()

        optimizer.step(closure)


def _counts(rows: LabelledRows, index: int, n_symbols: int) -> Tensor:
    symbols = torch.from_numpy(rows.symbols(index)[: rows.length].astype("int64"))
    return torch.bincount(symbols, minlength=n_symbols).float()
