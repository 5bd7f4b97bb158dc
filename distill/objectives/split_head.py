"""A head that predicts subclasses, and the class logits that it stands for; part of the exported graph."""

from __future__ import annotations

from torch import Tensor


def log_sum_exp(x: Tensor, tau: float = 1.0) -> Tensor:
    """tau log sum exp(x / tau) over the last dimension, from plain operators.

    Every runtime then computes it without overflow: some execute ONNX's ReduceLogSumExp as log(sum(exp(x))), which is
    infinite in FP16 from x = 12 on. The maximum is taken away before the division: x / tau itself may be infinite in
    FP16, what is below the maximum may become -inf and then counts as 0.
    """
    top = x.detach().amax(-1, keepdim=True)
    below = x - top
    if tau == 1:  # no operators for nothing in the exported graph
        result: Tensor = below.exp().sum(-1).log() + top.squeeze(-1)
        return result
    return tau * (below / tau).exp().sum(-1).log() + top.squeeze(-1)


def class_logits_of(head: Tensor, subclasses: int, tau: float = 1.0) -> Tensor:
    """tau logsumexp_s(o_cs / tau): class logits whose softmax at `tau` sums the subclasses' probabilities.

    Args:
        head: o (..., C S), the subclasses of one class next to each other.
        subclasses: S.
        tau: temperature > 0. Without it here, a perfect student would change labels at tau != 1.

    Returns:
        (..., C) in the type of `head`. S = 1 gives `head` itself. Permuting a class's subclasses changes nothing.
    """
    if subclasses == 1:
        return head
    parts = head.reshape(*head.shape[:-1], head.shape[-1] // subclasses, subclasses)
    return log_sum_exp(parts, tau)
