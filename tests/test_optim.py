"""Our AdamW takes the steps of torch's."""

import pytest
import torch
from torch import nn

from transfermium.optim import AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch(weight_decay: float) -> None:
    ours, theirs = layers(), layers()
    a = AdamW(groups(ours), weight_decay)
    b = torch.optim.AdamW(groups(theirs), weight_decay=weight_decay)
    for k in range(20):
        for optimizer, net in ((a, ours), (b, theirs)):
            optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)
            optimizer.zero_grad()
            net[k % 2 :](torch.linspace(-1, 1, 4, dtype=torch.float64)).square().sum().backward()  # some have none
            optimizer.step()

    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
        assert a.state[p]["step"] == float(b.state[q]["step"])
        torch.testing.assert_close(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"])


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)).double()


def groups(net: nn.Sequential) -> list[dict[str, object]]:
    return [{"params": list(net[0].parameters()), "lr": 0.1}, {"params": list(net[2].parameters()), "lr": 0.02}]
