"""A committee as one module of plain operations in float32: images in, probabilities out."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conas.data.augment import central
from ensemble.combine.network import CommitteeNetwork
from ensemble.deploy.plain import plain

TINY = torch.finfo(torch.float32).tiny


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:  # in the order of the members
        total = total + part
    return total / len(parts)


def _votes(logits: list[Tensor]) -> Tensor:
    classes = torch.arange(logits[0].shape[-1])
    votes = [(z.argmax(dim=-1, keepdim=True) == classes).float() for z in logits]
    return (_mean(votes) * len(votes) + _mean([z.softmax(-1) for z in logits])) / (len(votes) + 1)


RULES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "mean_softmax": lambda logits: _mean([z.softmax(-1) for z in logits]),
    "geometric_mean": lambda logits: _mean(logits).softmax(-1),  # the same in other words
    "logit_mean": lambda logits: _mean(logits).softmax(-1),
    "logit_sum": lambda logits: (_mean(logits) * len(logits)).softmax(-1),
    "majority_vote": _votes,
}


class PlainCommittee(nn.Module):
    """The committee of a `CommitteeNetwork` whose members are networks by their definition.

    Takes images (B, channels, image_size, image_size), uint8 or, with the same numbers, float32; gives probabilities
    (B, C) float32, NaN for an image for which a member's logits are not all finite.
    """

    def __init__(self, network: CommitteeNetwork):
        super().__init__()
        self.members, self.crops = nn.ModuleList(map(plain, network.networks)), network.crops
        self.register_buffer("pixel_mean", network.pixel_mean.float())
        self.register_buffer("pixel_scale", (1 / network.pixel_std.double()).float())
        self.combination, self.temperature = network.combination, network.temperature
        self.weights, self.temperatures = network.weights.tolist(), network.temperatures.tolist()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = images if images.dtype == torch.float32 else images.float()
        x = (x - self.pixel_mean) * self.pixel_scale
        logits = [member(central(x, crop)) for member, crop in zip(self.members, self.crops)]
        scaled = [z if T == 1 else z * (1 / T) for z, T in zip(logits, self.temperatures)]
        if self.combination in RULES:
            combined = RULES[self.combination](scaled)
        else:
            combined = _mean([len(scaled) * w * z.softmax(-1) for z, w in zip(scaled, self.weights)])
        if self.temperature != 1:
            combined = (combined.clamp_min(TINY).log() * (1 / self.temperature)).softmax(-1)
        return combined + 0 * _mean(logits).sum(dim=-1, keepdim=True)  # NaN where a logit is not finite
