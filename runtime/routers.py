"""What a family's router ranks experts by, and which weights a choice of experts gets.

Decides nothing: it is the rule of each model, so that another choice than the router's own is weighted as the model
would have weighted it. Must not know who chooses otherwise, nor why. Axes: T tokens, E experts, K top-k.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RouterRule:
    """How a model makes weights of router logits.

    Attributes
    ----------
    is_sigmoid
        Scores are sigmoids (DeepSeek-V3), else a softmax over all experts.
    is_normalised
        The weights of a token's experts are scaled so that those of the router's own choice add up to 1.
    scale
        What weights are multiplied by in the end.
    """

    is_sigmoid: bool
    is_normalised: bool
    scale: float

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores of all experts, [T, E] float32, of the router's logits [T, E]."""
        logits = logits.float()
        return torch.sigmoid(logits) if self.is_sigmoid else torch.softmax(logits, dim=-1)

    def weights(self, scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Return the weights of chosen experts, [T, K].

        A model that normalises does so over its router's own choice, whoever stands in for part of it: what is kept
        keeps its weight, and a stand-in gets its own score in the same measure. To scale up what is left instead moves
        a layer further from its exact output (tinymoe-base, 8 of 32 experts: KL .0196 against .0184, and perplexity
        +.71 % against +.51 % on text that it has not seen).

        Parameters
        ----------
        scores
            [T, K]; 0 where there is no expert.
        mass
            [T, 1], summed scores of the router's own choice.
        """
        return (scores / mass.clamp_min(1e-20) if self.is_normalised else scores) * self.scale


def router_rule(config: Any) -> RouterRule:
    """Return the rule of a transformers config."""
    family = config.model_type
    always = family in {"mixtral", "gpt_oss"}  # gpt-oss: softmax over the chosen logits, which is the same
    never = family == "deepseek_v2"  # its config has the switch, its router does not look
    is_normalised = always or (not never and bool(getattr(config, "norm_topk_prob", False)))
    scale = float(config.routed_scaling_factor) if family in {"deepseek_v2", "deepseek_v3"} else 1.0
    return RouterRule(is_sigmoid=family == "deepseek_v3", is_normalised=is_normalised, scale=scale)


def rank_experts(
    rule: RouterRule, router: Any, logits: torch.Tensor, chosen: torch.Tensor, *, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank the experts of one layer: the chosen ones best first, then the next best.

    Parameters
    ----------
    router
        The router module (DeepSeek-V3 ranks with its correction bias).
    logits, chosen
        [T, E] and [T, K] as the router returned them.
    width
        C.

    Returns
    -------
    expert_ids, scores
        [T, C] int64 and float32.
    """
    scores = rule.scores(logits)
    rank_by = scores + router.e_score_correction_bias if rule.is_sigmoid else scores
    # every score lies in 0 … 1 and a correction is small beside 1e6, so that the chosen come first whatever they score
    rank_by = rank_by.double().scatter_add(1, chosen, torch.full_like(chosen, 1e6, dtype=torch.float64))
    order = torch.sort(rank_by, dim=-1, descending=True, stable=True).indices[:, :width]
    return order, scores.gather(1, order)


def routers_of(model: Any) -> list[torch.nn.Module]:
    """Return the routers in layer order."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
