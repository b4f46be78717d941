"""How the bottleneck states of a source text and of a target text are mixed: φ of FLARE (arXiv 2501.06892, section 3.2).

`s = A·x_S` and `t = A·x_T` are batch × columns × rank, column by column of one position in the text. What comes out goes
through B, which starts at zero: whatever φ is, an untrained fused layer is the frozen one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ELEMENTWISE: Mapping[str, Mix] = {
    "add": lambda s, t: s + t,
    "mul": lambda s, t: s * t,
    "add_relu": lambda s, t: torch.relu(s) + torch.relu(t),
    "mul_relu": lambda s, t: torch.relu(s) * torch.relu(t),
}
"""The functions without parameters."""


@dataclass(frozen=True)
class Attended:
    """Which target columns cross-attention may read.

    Attributes:
        there: batch × key columns, True where the target has a token; None: everywhere.
        first: The first query's column among the key columns: what was read before is in a cache.
        causal: Whether a column reads only itself and those before it.
    """

    there: torch.Tensor | None = None
    first: int = 0
    causal: bool = False

    def mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """batch (or 1) × queries × keys, True where attention may go; a column may always read itself."""
        if self.there is None and not self.causal:
            return None
        rows = torch.arange(queries, device=device)[:, None] + self.first
        columns = torch.arange(keys, device=device)[None]
        allowed = (
            torch.ones(1, 1, dtype=torch.bool, device=device) if self.there is None else self.there[:, None, :keys]
        )
        if self.causal:
            allowed = allowed & (columns <= rows)
        return (allowed | (columns == rows)).reshape(-1, queries, keys)


class CrossAttention(torch.nn.Module):
    """`softmax((W_q s + b_q)(W_k t + b_k)ᵀ / √r) (W_v t + b_v)`: one head, no output projection.

    Args:
        rank: r.
        draw: Gives the initial values of a parameter by its name and shape.
    """

    def __init__(self, rank: int, draw: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(rank, rank) for _ in range(3))
        for name, parameter in self.named_parameters():
            parameter.data = draw(name, tuple(parameter.shape))

    def forward(self, s: torch.Tensor, t: torch.Tensor, attended: Attended) -> torch.Tensor:
        """Mixes.

        Args:
            s: batch × columns × rank.
            t: batch × key columns × rank.
            attended: Which of these may be read.

        Returns:
            batch × columns × rank.
        """
        query, key, value = self.query(s), self.key(t), self.value(t)
        # Written out: with so few dimensions torch's fused attention takes longer on a processor.
        scores = query @ key.to(query.dtype).transpose(1, 2) * query.shape[-1] ** -0.5
        mask = attended.mask(query.shape[1], key.shape[1], query.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).to(value.dtype) @ value
