"""Second-order DARTS (arXiv:1806.09055) straight from the paper, module by module and equation by equation.

The baseline of the benchmarks and the independent oracle of the tests: it imports nothing but torch and
shares nothing with `conas`. Every edge owns a module for every primitive, every virtual step builds a
network, tensors are NCHW. `state_dict()` names are those of the published code, plus `alphas_normal` and
`alphas_reduce`.

    network = Network(PRIMITIVES)
    optimizer = weight_optimizer(network)
    architect = Architect(network)
    architect.step(train, valid, xi, optimizer)     # equations 6 to 8, then Adam on the alphas
    weight_step(network, optimizer, train)
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NODES, EDGES = 4, 14
Batch = tuple[Tensor, Tensor]


class Zero(nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::self.stride, ::self.stride] * 0.0


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class Sequence(nn.Module):
    """Layers under the published name `op`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def relu_conv_bn(C_in: int, C_out: int) -> nn.Module:
    return Sequence(nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=False))


def depthwise_separable(C: int, size: int, stride: int, dilation: int) -> list[nn.Module]:
    padding = dilation * (size - 1) // 2
    return [nn.ReLU(), nn.Conv2d(C, C, size, stride, padding, dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False)]


def operation(primitive: str, C: int, stride: int) -> nn.Module:
    kind, _, size = primitive.rpartition("_")
    if primitive == "none":
        return Zero(stride)
    if primitive == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(C, C)
    if kind in ("max_pool", "avg_pool"):
        average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        pool = average if kind == "avg_pool" else nn.MaxPool2d(3, stride, 1)
        return nn.Sequential(pool, nn.BatchNorm2d(C, affine=False))
    size = int(size[0])
    if kind == "sep_conv":
        return Sequence(*depthwise_separable(C, size, stride, 1), *depthwise_separable(C, size, 1, 1))
    if kind == "dil_conv":
        return Sequence(*depthwise_separable(C, size, stride, 2))
    raise ValueError(f"unknown primitive {primitive!r}")


class MixedOp(nn.Module):
    def __init__(self, primitives: tuple[str, ...], C: int, stride: int):
        super().__init__()
        self._ops = nn.ModuleList(operation(primitive, C, stride) for primitive in primitives)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))      # equation 2


class Cell(nn.Module):
    def __init__(self, primitives: tuple[str, ...], C_prev_prev: int, C_prev: int, C: int, reduction: bool,
                 reduction_prev: bool):
        super().__init__()
        self.reduction = reduction
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(C_prev_prev, C)
        self.preprocess1 = relu_conv_bn(C_prev, C)
        self._ops = nn.ModuleList()
        for node in range(NODES):
            for source in range(2 + node):
                self._ops.append(MixedOp(primitives, C, 2 if reduction and source < 2 else 1))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(NODES):
            state = sum(self._ops[edge + j](h, weights[edge + j]) for j, h in enumerate(states))  # equation 1
            edge += len(states)
            states.append(state)
        return torch.cat(states[-NODES:], dim=1)


class Network(nn.Module):
    def __init__(self, primitives: tuple[str, ...], C: int = 16, num_classes: int = 10, layers: int = 8,
                 in_channels: int = 3):
        super().__init__()
        self.arguments = (primitives, C, num_classes, layers, in_channels)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 3 * C, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(3 * C))
        C_prev_prev, C_prev, reduction_prev = 3 * C, 3 * C, False
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(primitives, C_prev_prev, C_prev, C, reduction, reduction_prev))
            C_prev_prev, C_prev, reduction_prev = C_prev, NODES * C, reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(EDGES, len(primitives)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(EDGES, len(primitives)))

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, alphas.softmax(dim=-1))
        return self.classifier(self.global_pooling(s1).flatten(1))

    def loss(self, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def alphas(self) -> dict[str, nn.Parameter]:
        return {"alphas_normal": self.alphas_normal, "alphas_reduce": self.alphas_reduce}

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name not in self.alphas()}


class Architect:
    """The alphas' Adam step on the gradient of equations 6 to 8. Its passes move BatchNorm's running
    statistics, as those of the published code do."""

    def __init__(self, network: Network, momentum: float = 0.9, weight_decay: float = 3e-4,
                 learning_rate: float = 3e-4, alpha_decay: float = 1e-3):
        self.network, self.momentum, self.weight_decay = network, momentum, weight_decay
        self.optimizer = torch.optim.Adam(network.alphas().values(), lr=learning_rate, betas=(0.5, 0.999),
                                          weight_decay=alpha_decay)

    def step(self, train: Batch, valid: Batch, xi: float, optimizer: torch.optim.SGD) -> None:
        unrolled = self.virtual_step(train, xi, optimizer)
        unrolled.loss(valid).backward()
        direction = [w.grad for w in unrolled.weights().values()]
        implicit = self.hessian_vector(train, direction)
        for alpha, virtual, part in zip(self.network.alphas().values(), unrolled.alphas().values(), implicit):
            alpha.grad = virtual.grad - xi * part                                       # equation 7
        self.optimizer.step()

    def virtual_step(self, train: Batch, xi: float, optimizer: torch.optim.SGD) -> Network:
        """Equation 6: a new network whose weights are one momentum SGD step ahead."""
        weights = self.network.weights()
        gradients = torch.autograd.grad(self.network.loss(train), list(weights.values()))
        unrolled = Network(*self.network.arguments).to(next(iter(weights.values())))
        state = self.network.state_dict()
        for (name, w), gradient in zip(weights.items(), gradients):
            velocity = optimizer.state[w].get("momentum_buffer") if w in optimizer.state else None
            step = gradient + self.weight_decay * w.detach()
            if velocity is not None:
                step = step + self.momentum * velocity
            state[name] = w.detach() - xi * step
        unrolled.load_state_dict(state)
        return unrolled

    @torch.no_grad()
    def hessian_vector(self, train: Batch, direction: list[Tensor], r: float = 0.01) -> list[Tensor]:
        """Equation 8: the derivative of grad_alpha along `direction`, by a central difference in w."""
        weights, alphas = list(self.network.weights().values()), list(self.network.alphas().values())
        eps = r / torch.cat([d.reshape(-1) for d in direction]).norm()
        gradients = []
        for move in (eps, -2 * eps):
            for w, d in zip(weights, direction):
                w.add_(move * d)
            with torch.enable_grad():
                gradients.append(torch.autograd.grad(self.network.loss(train), alphas))
        for w, d in zip(weights, direction):
            w.add_(eps * d)
        return [(plus - minus) / (2 * eps) for plus, minus in zip(*gradients)]


def weight_optimizer(network: Network, learning_rate: float = 0.025) -> torch.optim.SGD:
    return torch.optim.SGD(network.weights().values(), lr=learning_rate, momentum=0.9, weight_decay=3e-4)


def weight_step(network: Network, optimizer: torch.optim.SGD, train: Batch,
                clip: float = 5.0) -> tuple[Tensor, Tensor]:
    """One SGD step of the weights; the logits and the loss before it."""
    optimizer.zero_grad()
    images, labels = train
    logits = network(images)
    loss = cross_entropy(logits, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(network.weights().values(), clip)
    optimizer.step()
    return logits.detach(), loss.detach()
