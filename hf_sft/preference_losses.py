"""Losses over preference pairs, from the log-probabilities of their answers.

With s_w and s_l the policy's log-probabilities of the chosen and the rejected answer (sums over their tokens, or means where an
answer's length is to count for nothing), r_w and r_l the reference's, and h = (s_w - r_w) - (s_l - r_l):

| loss    | of a pair                                                                         | source                          |
|---------|-----------------------------------------------------------------------------------|---------------------------------|
| sigmoid | -(1 - e) log sigmoid(b h) - e log sigmoid(-b h)                                   | DPO, arXiv 2305.18290; e: cDPO  |
| robust  | (-(1 - e) log sigmoid(b h) + e log sigmoid(-b h)) / (1 - 2 e)                     | arXiv 2403.00409                |
| hinge   | max(0, 1 - b h)                                                                   | SLiC, arXiv 2305.10425          |
| ipo     | (h - 1 / (2 b))^2, of means                                                       | arXiv 2310.12036                |
| simpo   | as sigmoid, of b (s_w - s_l) - g, of means, without a reference                   | arXiv 2405.14734                |
| orpo    | -b log sigmoid(log odds(s_w) - log odds(s_l)) - s_w, of means, without a reference | arXiv 2403.07691                |

with b = beta, e = label_smoothing, g = gamma and log odds(s) = s - log(1 - exp s). In orpo -s_w, the mean loss of the chosen
answer's tokens, is the auxiliary term: it is summed over all tokens of a step and divided once.

Shapes: P pairs; 2P answers, the chosen one of a pair before its rejected one; R scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Kind = Literal["sigmoid", "ipo", "hinge", "robust", "orpo", "simpo"]
REFERENCE_FREE = ("orpo", "simpo")
OF_MEANS = ("ipo", "orpo", "simpo")


@dataclass(frozen=True)
class PairLoss:
    """The loss of preference pairs.

    Args:
        kind: see the table above.
        beta, label_smoothing, gamma: as there.
        length_normalized: means instead of sums over an answer's tokens; ipo, orpo and simpo always take means.
    """

    kind: Kind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    length_normalized: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.kind not in REFERENCE_FREE

    def rewards(self, logps: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:
        """[P, 2] beta times what chosen and rejected answers gain over the reference (log-probabilities where there is none).

        Args:
            logps: [2P] sums of the policy's log-probabilities over each answer, in nats.
            reference: [2P] the same of the reference.
            tokens: [2P] tokens of each answer.
        """
        gain = logps if reference is None else logps - reference
        if self.length_normalized or self.kind in OF_MEANS:
            gain = gain / tokens.clamp_min(1)
        return self.beta * gain.view(-1, 2)

    def losses(self, rewards: Tensor) -> Tensor:
        """[P] the loss of each pair, without an auxiliary term.

        Args:
            rewards: [P, 2] as :meth:`rewards` gives them.
        """
        margin = rewards[:, 0] - rewards[:, 1]
        smooth = self.label_smoothing
        if self.kind == "ipo":
            return (margin / self.beta - 1 / (2 * self.beta)).square()
        if self.kind == "hinge":
            return (1 - margin).relu()
        if self.kind == "orpo":
            odds = _log_odds(rewards / self.beta)
            return -self.beta * logsigmoid(odds[:, 0] - odds[:, 1])
        if self.kind == "robust":
            return (smooth * logsigmoid(-margin) - (1 - smooth) * logsigmoid(margin)) / (1 - 2 * smooth)
        margin = margin - self.gamma if self.kind == "simpo" else margin
        return -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probabilities below 0; log(1 - exp x) is -inf at 0, where a model is certain."""
    return logp - torch.log(-torch.expm1(logp.clamp_max(-torch.finfo(logp.dtype).eps)))


def answer_sums(values: Tensor, answer: Tensor, answers: int) -> Tensor:
    """[answers] the sum of ``values`` [R] over the rows of each answer; ``answer`` [R] is the number of each row's."""
    return torch.zeros(answers, dtype=values.dtype, device=values.device).index_add(0, answer, values)
