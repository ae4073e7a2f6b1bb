"""The last layer of a language model with its loss, as one autograd function.

Logits of all words at all time steps are by far the largest tensor of a language model. Here they are computed once,
and the same memory then holds their gradient: softmax minus the right answer.
"""
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def decoded_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of x W^T + b, for x (T, B, H), W (V, H), b (V,) and targets (T, B) int64."""
    if not torch.is_grad_enabled():
        return cross_entropy(linear(x, weight, bias).flatten(0, 1), targets.flatten())
    return _DecodedLoss.apply(x.flatten(0, 1), weight, bias, targets.flatten())


class _DecodedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        logits = torch.addmm(bias, x, weight.t())
        right = logits.gather(1, targets[:, None])
        total = logits.logsumexp(dim=1, keepdim=True)
        loss = (total - right).mean()
        logits.sub_(total).exp_()
        logits.scatter_add_(1, targets[:, None], -torch.ones_like(total))
        ctx.save_for_backward(x, weight, logits)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        x, weight, d_logits = ctx.saved_tensors
        scale = d_loss / len(x)
        d_x, d_weight, d_bias, _ = ctx.needs_input_grad
        return ((d_logits @ weight).mul_(scale) if d_x else None,
                (d_logits.t() @ x).mul_(scale) if d_weight else None,
                d_logits.sum(dim=0).mul_(scale) if d_bias else None, None)
