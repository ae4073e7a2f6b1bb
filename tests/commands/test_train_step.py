"""Retraining: the recipe's terms by hand."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conas.commands import train
from conas.runs.options import RECIPES, RecipeOptions


class Affine(nn.Module):
    """Logits and auxiliary logits that are linear in the flat images."""

    def __init__(self, auxiliary):
        super().__init__()
        self.main, self.side = nn.Linear(12, 4), nn.Linear(12, 4) if auxiliary else None

    def forward(self, x):
        return self.main(x.flatten(1)) if self.side is None else (self.main(x.flatten(1)), self.side(x.flatten(1)))


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("clip", [1e-2, 100.0])
def test_a_step_by_hand(auxiliary, smooth, clip):
    """The gradient of softmax regression in closed form; then clipping, decay and momentum as SGD defines them."""
    torch.manual_seed(0)
    network = Affine(auxiliary).double()
    rate, mu, decay, weight = 0.3, 0.8, 0.01, 0.4
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=mu, weight_decay=decay, fused=True)
    recipe = replace(RecipeOptions(), grad_clip=clip, label_smooth=smooth)
    expected = {name: (p.detach().clone(), torch.zeros_like(p)) for name, p in network.named_parameters()}
    for _ in range(2):
        x, y = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (6,))
        target = (1 - smooth) * torch.eye(4, dtype=torch.float64)[y] + smooth / 4
        gradients, losses, right = {}, {}, {}
        for part in ("main", "side") if auxiliary else ("main",):
            W, b = expected[f"{part}.weight"][0], expected[f"{part}.bias"][0]
            p = (x.flatten(1) @ W.T + b).softmax(dim=1)
            losses[part] = -(target * p.log()).sum(dim=1).mean().item()
            right[part] = (p.argmax(dim=1) == y).sum().item()
            error = (1.0 if part == "main" else weight) * (p - target) / 6
            gradients |= {f"{part}.weight": error.T @ x.flatten(1), f"{part}.bias": error.sum(dim=0)}
        norm = sum((g**2).sum().item() for g in gradients.values()) ** 0.5
        for name, (w, v) in expected.items():
            v = mu * v + min(1, clip / norm) * gradients[name] + decay * w
            expected[name] = w - rate * v, v
        loss, hits = train.train_step(network, optimizer, (x, y), recipe, weight, amp=False)
        assert loss.item() == pytest.approx(losses["main"], rel=1e-9) and hits.item() == right["main"]
        for name, p in network.named_parameters():
            assert torch.allclose(p, expected[name][0], rtol=1e-4, atol=1e-8)  # clipping adds 1e-6 to the norm


def test_learning_rates():
    small, large = (replace(RecipeOptions(), **{k: v for k, v in RECIPES[name].items() if hasattr(RecipeOptions, k)})
                    for name in ("cifar", "imagenet"))
    for epoch in (0, 1, 300, 599):
        assert train.learning_rate(small, epoch) == pytest.approx(0.025 * (1 + np.cos(np.pi * epoch / 600)) / 2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for period in (1, 3):
        optimizer.param_groups[0]["lr"] = 0.1
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, period, 0.97)
        for epoch in range(10):
            assert train.learning_rate(replace(large, decay_period=period), epoch) == \
                   pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()


def test_the_best_epoch_and_patience():
    def rows(*accuracies):
        return [{"valid_top1": top1, "valid_loss": -epoch % 3} for epoch, top1 in enumerate(accuracies)]

    assert train.best_epoch(rows(50, 70, 60)) == 1
    assert train.best_epoch(rows(70, 70, 70, 60)) == 0   # losses 0, 2, 1
    assert train.best_epoch(rows(60, 70, 70)) == 2       # losses 0, 2, 1
    assert train.best_epoch([{"valid_top1": None}] * 3) == 2
    assert not train.is_finished([], 3, 1)
    assert [train.is_finished(rows(50, 70, 60, 60, 60)[:n], 9, 2) for n in range(1, 6)] == [False] * 3 + [True] * 2
    assert [train.is_finished(rows(50, 70, 60)[:n], 3, None) for n in range(1, 4)] == [False, False, True]
