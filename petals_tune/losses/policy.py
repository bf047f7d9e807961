"""Policy-gradient losses: of tokens that a policy q sampled, with an advantage A_t for each of them.

`logprobs` among the inputs are log q(y_t), as the sampler said when it drew them. r_t = p(y_t) / q(y_t) is the
importance ratio. Tokens that were not sampled, such as a prompt's, have the advantage 0 and add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from petals_tune.errors import ConfigError
from petals_tune.losses.base import Inputs, Loss, Options

_CLIP: Mapping[str, float] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


class PolicyLoss(Loss):
    needs: ClassVar[tuple[str, ...]] = ("logprobs", "advantages")


class ImportanceSampling(PolicyLoss):
    """- sum_t r_t A_t: REINFORCE (Williams 1992), corrected for who sampled."""

    name: ClassVar[str] = "importance_sampling"

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        return -(_ratio(logprobs, inputs) * inputs["advantages"]).sum()


class PPO(PolicyLoss):
    """- sum_t min(r_t A_t, clip(r_t, low, high) A_t). Source: Schulman et al. 2017, arXiv:1707.06347, equation 7."""

    name: ClassVar[str] = "ppo"
    defaults: ClassVar[Mapping[str, float]] = _CLIP

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        return -_clipped(_ratio(logprobs, inputs), inputs["advantages"], options).sum()


class CISPO(PolicyLoss):
    """- sum_t stop_gradient(clip(r_t, low, high)) A_t log p(y_t).

    Source: MiniMax-M1, arXiv:2506.13585, equation 4: the ratio is clipped, and every token keeps a gradient.
    """

    name: ClassVar[str] = "cispo"
    defaults: ClassVar[Mapping[str, float]] = _CLIP

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        weight = _clip(_ratio(logprobs, inputs), options).detach()
        return -(weight * inputs["advantages"] * logprobs).sum()


class DRO(PolicyLoss):
    """- sum_t [A_t log p(y_t) - beta / 2 (log r_t)^2]. Source: Richemond et al. 2024, arXiv:2405.19107, token-wise."""

    name: ClassVar[str] = "dro"
    defaults: ClassVar[Mapping[str, float]] = {"beta": 0.05}

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        quadratic = (logprobs - inputs["logprobs"]).square()
        return -(logprobs * inputs["advantages"] - 0.5 * options["beta"] * quadratic).sum()


class GSPO(PolicyLoss):
    """- sum_t min(s_t A_t, clip(s_t, low, high) A_t), with the ratio of the whole text in the place of each token's.

    s = exp(mean of log r_t over the sampled tokens), those where `sequence_ratio_mask` is not 0. s_t has the value of s
    and the gradient of s at token t, so that advantages may differ by token: GSPO-token.
    Source: Zheng et al. 2025, arXiv:2507.18071, equations 7 and 13; summed over tokens, where the paper has means.
    """

    name: ClassVar[str] = "gspo"
    may_have: ClassVar[tuple[str, ...]] = ("sequence_ratio_mask",)
    defaults: ClassVar[Mapping[str, float]] = _CLIP

    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        mask = inputs.get("sequence_ratio_mask")
        sampled = inputs["advantages"] != 0 if mask is None else mask != 0
        if not bool(sampled.any()):
            if mask is None:  # no advantage at all
                return 0 * logprobs.sum()
            raise ConfigError("gspo: sequence_ratio_mask names no token", key="sequence_ratio_mask")
        log_ratio = logprobs - inputs["logprobs"]
        whole = log_ratio[sampled].mean().detach().exp()
        ratio = whole * (logprobs - logprobs.detach()).exp()
        return -_clipped(ratio, inputs["advantages"], options)[sampled].sum()


def _ratio(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return (logprobs - inputs["logprobs"]).exp()


def _clip(ratio: torch.Tensor, options: Options) -> torch.Tensor:
    low, high = options["clip_low_threshold"], options["clip_high_threshold"]
    if not 0 <= low <= high:
        raise ConfigError(
            f"clip_low_threshold={low:g} and clip_high_threshold={high:g}: 0 <= low <= high is needed, as in 0.8 and "
            "1.2",
            key="clip_low_threshold",
            seen=low,
        )
    return ratio.clamp(low, high)


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, options: Options) -> torch.Tensor:
    return torch.minimum(ratio * advantages, _clip(ratio, options) * advantages)
