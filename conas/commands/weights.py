"""The weight step of a search: SGD on the cross-entropy of the training half."""
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.darts.architect import Batch, constant_alphas
from conas.darts.supernet import Supernet
from conas.runs.options import WeightOptions
from conas.runs.progress import clip_and_step, snapshot
from conas.runs.scores import is_right


def weight_optimizer(network: Supernet, options: WeightOptions) -> torch.optim.SGD:
    """The SGD of the weights; fused, since they are a thousand small tensors."""
    return torch.optim.SGD(network.weights().values(), lr=options.learning_rate, momentum=options.momentum,
                           weight_decay=options.weight_decay, fused=True)


def weight_step(network: Supernet, optimizer: torch.optim.Optimizer, batch: Batch, grad_clip: float,
                skip: bool = False, amp: bool = False) -> tuple[Tensor, Tensor]:
    """One SGD step of the weights. Returns the loss and the number of right answers, on the device.

    Of several processes each has its part of the batch, and the results are those of the whole batch.

    With `amp`, its passes are in bfloat16; master weights and optimizer stay in float32. With `skip`, a loss or
    gradient that is not finite leaves weights and running statistics as they were.
    """
    images, labels = batch
    before = snapshot(network) if skip else None
    w = network.flat().detach().requires_grad_()
    with constant_alphas(network), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = network.with_weights(images, w)
        loss = distributed.scaled_by_count(cross_entropy(logits, labels), len(labels))
    loss.backward(inputs=[w])
    weights = network.packing()
    for p, part in zip(weights, w.grad.split([p.numel() for p in weights])):
        part = part.view(p.shape)  # the fused optimizer takes it in the order of memory
        p.grad = part if p.is_contiguous() else torch.empty_like(p).copy_(part)
    hits = is_right(logits, labels).sum()
    loss, hits = distributed.after_backward(network, optimizer, loss, hits, len(labels))
    return clip_and_step(optimizer, loss, grad_clip, before), hits
