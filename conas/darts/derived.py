"""The derived networks of DARTS (arXiv:1806.09055, section 3): a found cell, stacked and trained by itself.

`state_dict` names and shapes are those of the published DARTS code, so that its checkpoints load, also those
from before `num_batches_tracked`.
"""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conas import distributed
from conas.darts.genotype import Genotype, check
from conas.darts.operations import OPERATIONS, FactorizedReduce, ReLUConvBN, check_own
from conas.darts.supernet import STEM_MULTIPLIER
from conas.errors import InputError


class Cell(nn.Module):
    """A genotype's normal or reduction cell. Output: the concatenated states, (N, C_out, H', W')."""

    def __init__(self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int, reduction: bool,
                 reduction_prev: bool, operations: Mapping[str, Callable] = OPERATIONS):
        super().__init__()
        kind = "reduce" if reduction else "normal"
        edges, self.concat = getattr(genotype, kind), list(getattr(genotype, f"{kind}_concat"))
        self.sources = [source for _, source in edges]
        self.C_out = len(self.concat) * C
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        self._ops = nn.ModuleList(operations[operation](C, 2 if reduction and source < 2 else 1, True)
                                  for operation, source in edges)

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0, images: int | None = None) -> Tensor:
        """`drop_path_prob` in [0, 1) is the probability that an image loses an edge; 0 is off. `images` are as of
        `drop_path_scales`."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        scales = drop_path_scales(len(self._ops), states[0], drop_path_prob, images) if drop_path_prob > 0 else None
        for edge in range(0, len(self._ops), 2):
            states.append(self._node(edge, states, scales))
        return torch.cat([states[i] for i in self.concat], dim=1)

    def _node(self, edge: int, states: list[Tensor], scales: Tensor | None) -> Tensor:
        """The sum of an edge and the next."""
        return self._edge(edge, states, scales) + self._edge(edge + 1, states, scales)

    def _edge(self, edge: int, states: list[Tensor], scales: Tensor | None) -> Tensor:
        operation = self._ops[edge]
        out = operation(states[self.sources[edge]])
        # out-of-place: the output may be a state that other edges read
        return out if scales is None or isinstance(operation, nn.Identity) else out * scales[edge]


def drop_path_scales(edges: int, x: Tensor, drop_path_prob: float, images: int | None = None) -> Tensor:
    """What drop path multiplies edges by, (edges, N, 1, 1, 1) for the N images of `x`.

    0 with the given probability, else 1/keep: the expectation is 1, and evaluation rescales nothing. One draw
    serves a whole cell, since many small ones cost a GPU more time than their arithmetic. `images` are those that all
    processes have together (default: N); drawn for all, the numbers are those of a process alone.
    """
    keep, images = 1 - drop_path_prob, images or len(x)
    kept = torch.rand(edges, images, 1, 1, 1, device=x.device)[:, distributed.rank_slice(images)] < keep
    return kept.to(x.dtype) / keep


class AuxiliaryHead(nn.Module):
    """A second classifier on the features (N, C, size, size) at two thirds of the depth, for training only.

    The published heads average 5x5 windows in the four corners of their features, 8x8 for CIFAR and 7x7 for
    ImageNet. Other sizes are averaged to the same 2x2. The ImageNet head has no second BatchNorm.
    """

    def __init__(self, C: int, num_classes: int, size: int, second_norm: bool):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=size - 5) if size in (7, 8) else nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if second_norm else []),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class DerivedNetwork(nn.Module):
    """Cells with reductions at one and two thirds of the depth, classifier, auxiliary head.

    Subclasses add stems of `C_stem` channels that halve the image `stem_halvings` times.
    `kind` is a subclass's key in NETWORKS, `arguments` are those of its constructor but the genotype. A training
    loop sets `drop_path_prob`, in [0, 1), and `drop_path_images`, the size of a batch over all processes; evaluation
    ignores both. `operations` are those that the genotype names, a space's own among them. Raises InputError for a
    genotype that cannot be built or an `image_size` that is too small.
    """

    kind: str

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype,
                 image_size: int, C_stem: int, stem_halvings: int, second_norm: bool,
                 operations: Mapping[str, Callable]):
        super().__init__()
        self.arguments = {"C": C, "num_classes": num_classes, "layers": layers, "auxiliary": auxiliary,
                          "image_size": image_size}
        self.drop_path_prob = 0.0
        self.drop_path_images: int | None = None
        self._genotype = check(genotype, "genotype", operations)
        used = {operation for operation, _ in [*genotype.normal, *genotype.reduce]}
        check_own({name: operations[name] for name in used if operations[name] is not OPERATIONS.get(name)}, C, True)
        reductions = (layers // 3, 2 * layers // 3)
        size = _final_size(image_size, stem_halvings + len(set(reductions)), auxiliary)
        self.auxiliary_layer = reductions[1]
        self.auxiliary_head = None
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev = C_stem, C_stem
        reduction_prev = stem_halvings > 0  # the first cell's two inputs then differ in size
        for layer in range(layers):
            reduction = layer in reductions
            if reduction:
                C *= 2
            cell = Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev, operations)
            self.cells.append(cell)
            C_prev_prev, C_prev, reduction_prev = C_prev, cell.C_out, reduction
            if auxiliary and layer == self.auxiliary_layer:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, size, second_norm)
        self.classifier = nn.Linear(C_prev, num_classes)

    def genotype(self) -> Genotype:
        """The cells that the network is built from."""
        return self._genotype

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of the first cell, from images."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, num_classes) of images (N, channels, H, W).

        In training with an auxiliary head: (logits, logits_auxiliary).
        """
        s0, s1 = self.stems(x)
        drop_path_prob = self.drop_path_prob if self.training else 0.0
        logits_auxiliary = None
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, drop_path_prob, self.drop_path_images)
            if self.training and self.auxiliary_head is not None and layer == self.auxiliary_layer:
                logits_auxiliary = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean(dim=(2, 3)))
        return logits if logits_auxiliary is None else (logits, logits_auxiliary)


def _final_size(image_size: int, halvings: int, auxiliary: bool) -> int:
    """Height and width of the last features, which are as large as the auxiliary head's.

    Raises InputError for images too small to have 2 pixels for each halving and 2x2 for the auxiliary head.
    """
    smallest = 2 ** (halvings - 1 + auxiliary) + 1
    if image_size < smallest:
        raise InputError(f"--image_size {image_size}: must be at least {smallest} for a network that halves "
                         f"images {halvings} times" + (" and has an auxiliary head" if auxiliary else ""))
    return -(-image_size // 2 ** halvings)  # every halving rounds up


class NetworkCIFAR(DerivedNetwork):
    """The network for small images: one stem, at full size. The paper has 20 layers and C = 36."""

    kind = "cifar"

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype,
                 in_channels: int = 3, image_size: int = 32, operations: Mapping[str, Callable] = OPERATIONS):
        C_stem = STEM_MULTIPLIER * C
        super().__init__(C, num_classes, layers, auxiliary, genotype, image_size, C_stem, stem_halvings=0,
                         second_norm=True, operations=operations)
        self.arguments["in_channels"] = in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, C_stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(C_stem),
        )

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.stem(x)
        return s, s


class NetworkImageNet(DerivedNetwork):
    """The network for large images: two stems bring 224 pixels to 28. The paper has 14 layers and C = 48."""

    kind = "imagenet"

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype,
                 image_size: int = 224, operations: Mapping[str, Callable] = OPERATIONS):
        super().__init__(C, num_classes, layers, auxiliary, genotype, image_size, C, stem_halvings=3,
                         second_norm=False, operations=operations)
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        return s0, self.stem1(s0)


NETWORKS: dict[str, type[DerivedNetwork]] = {network.kind: network for network in (NetworkCIFAR, NetworkImageNet)}


def count_parameters(network: nn.Module) -> int:
    """The number of weights without those of an auxiliary head, which evaluation does not use."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))


def flops(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-adds for one image of `input_shape` (channels, H, W) in evaluation.

    A multiplication with its addition counts once; only convolutions and linear layers count.
    """
    return multiply_adds(network, input_shape)[0]


def multiply_adds(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """`flops`, and what the package thop counts beside them, whose convention many papers follow.

    thop 0.1.1 adds 4 for every value that a BatchNorm with affine parameters takes (2 without), and 1 for every value
    that an average pool gives. DARTS_V2 on ImageNet: 529.9 M and 546.5 M; the paper gives 574 M, which neither is.
    """
    like, training, counter, more = next(network.parameters()), network.training, FlopCounterMode(display=False), [0]

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        more[0] += output.numel() * (2 + 2 * module.affine if isinstance(module, nn.BatchNorm2d) else 1)

    hooks = [module.register_forward_hook(add) for module in network.modules()
             if isinstance(module, (nn.BatchNorm2d, nn.AvgPool2d))]
    network.eval()
    try:
        with torch.no_grad(), counter:
            network(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    own = counter.get_total_flops() // 2  # the counter takes multiplication and addition apart
    return own, own + more[0]
