from __future__ import annotations

import pytest
import torch

from distill.objectives.split_head import class_logits_of


@pytest.mark.parametrize("tau", [0.004, 0.3, 1.0, 4.0])
def test_class_logits_in_half_precision_survive_a_small_temperature(tau: float) -> None:
    # 300 / 0.004 is beyond the largest FP16 number, and so is the distance of the classes' logits
    head = torch.tensor(
        [[300.0, 299.0, -300.0, 0.5], [-300.0, -300.0, 6e4, -6e4]], dtype=torch.float16
    ).requires_grad_()
    found = class_logits_of(head, 2, tau)
    exact = head.detach().double().requires_grad_()
    expected = tau * torch.logsumexp(exact.reshape(2, 2, 2) / tau, -1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(head.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)
