"""The terms of DARTS' bilevel gradient (arXiv:1806.09055, section 2.3); a space's `architect.py` puts them together.

With weights w, alphas a, learning rate xi, momentum mu, velocity v and weight decay lambda:

    w' = w - xi (mu v + grad_w L_train(w, a) + lambda w)                                              equation 6
    hypergradient = grad_a L_val(w', a) - xi  d2/da dw L_train(w, a) . d,   d = grad_w' L_val(w', a)   equation 7
    d2/da dw L_train . d  ~  [grad_a L_train(w + eps d, a) - grad_a L_train(w - eps d, a)] / (2 eps)    equation 8
    eps = 0.01 / |d|

The exact product on the left of equation 8 is an option, for its cost. It is the derivative where there is one: at the
kinks of ReLU and max pooling the difference quotient sees the jumps of the gradient too, the exact product does not.
docs/options.md shows how far apart they are.

Weights, velocity and their gradients are one flat vector each, and so are the alphas: the lines of a space's
update are then the lines above.
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conas import distributed
from conas.darts.passes import by_definition, constant_alphas, frozen_statistics
from conas.darts.supernet import Supernet

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,); of several processes each has its part

PERTURBATION = 0.01  # |eps d| in equation 8, the paper's footnote 2


class Bilevel:
    """The alphas' optimizer and the terms of their gradient, which a space's Architect puts together.

    `optimizer` is the SGD of the weights: the virtual step reads its momentum, velocity and weight decay, so that
    it is the step that the weights are about to take. Nothing here changes weights or BatchNorm statistics.
    `hvp` is how `hessian_vector` multiplies: "difference" or "exact".
    All passes of a step draw the same random numbers (noise, drop path): equation 8 is the difference of one function
    at two places, not of two functions. A subclass for networks that do not classify images has another `loss`.
    """

    betas = (0.5, 0.999)  # of the alphas' Adam

    def __init__(self, network: Supernet, optimizer: torch.optim.SGD, *, arch_learning_rate: float = 3e-4,
                 arch_weight_decay: float = 1e-3, unrolled: bool = True, hvp: str = "difference"):
        self.network, self.optimizer, self.unrolled, self.hvp = network, optimizer, unrolled, hvp
        self.at_once = one_after_the_other  # or what runs both passes of equation 8 at once
        self._random: RandomState | None = None  # of the step that is being taken
        self.momentum = optimizer.param_groups[0]["momentum"]
        self.weight_decay = optimizer.param_groups[0]["weight_decay"]
        self._weights, self._alphas = network.packing(), list(network.alphas().values())
        self._flat = torch.cat([w.detach().reshape(-1) for w in self._weights])
        parts = self._flat.split([w.numel() for w in self._weights])
        self._parts = [part.view_as(w) for part, w in zip(parts, self._weights)]
        self.alpha_optimizer = torch.optim.Adam(self._alphas, lr=arch_learning_rate, betas=self.betas,
                                                weight_decay=arch_weight_decay)

    def hypergradient(self, train: Batch, valid: Batch, xi: float) -> Tensor:
        """The gradient of the validation loss w.r.t. the flat alphas, through the virtual step of rate `xi`.

        This is DARTS' own; a space's architect.py states the one of that space.
        """
        w, v, mu, decay = self.weights(), self.velocity(), self.momentum, self.weight_decay
        w_next = w - xi * (mu * v + self.grad_weights(train, w) + decay * w)    # (6)
        grad_alpha, d = self.grad_alpha_and_weights(valid, w_next)
        return grad_alpha - xi * self.hessian_vector(train, w, d)                # (7), (8)

    def step(self, train: Batch, valid: Batch, xi: float, skip: bool = False) -> bool:
        """One Adam step of the alphas: second order if `unrolled`, else on grad_a L_val(w, a) alone.

        With `skip`, which waits for the device, there is none if the gradient is not finite. Returns whether there was.
        """
        if any(p is not now for p, now in zip(self._weights, self.network.packing())):
            raise RuntimeError("the order of the network's flat weights has changed since its architect was made; "
                               "accelerate the network first")
        with frozen_statistics(self.network), self.replayed():
            gradient = self.hypergradient(train, valid, xi) if self.unrolled else self.grad_alpha(valid, self.weights())
        if skip and not gradient.isfinite().all():
            return False
        for alpha, part in zip(self._alphas, gradient.split([alpha.numel() for alpha in self._alphas])):
            alpha.grad = part.view_as(alpha)
        self.alpha_optimizer.step()
        return True

    # The state, as flat vectors.

    def weights(self) -> Tensor:
        """w, a copy."""
        return self._flatten(self._weights)

    def velocity(self) -> Tensor:
        """v, the momentum buffers of the weights' optimizer; zeros before its first step."""
        buffers = [self.optimizer.state.get(w, {}).get("momentum_buffer") for w in self._weights]
        return self._flatten(torch.zeros_like(w) if v is None else v for w, v in zip(self._weights, buffers))

    @torch.no_grad()
    def _flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        if self._flat.device.type != "cpu":  # there the call below is a thousand copies
            return _flatten(tensors)
        torch._foreach_copy_(self._parts, list(tensors))  # one call for a thousand tensors
        return self._flat.clone()

    # The terms. Each is that of the whole batch on every process: all-reduced here, so that no space need know of it.

    def grad_weights(self, batch: Batch, w: Tensor) -> Tensor:
        """grad_w L(w, a) on `batch`."""
        w = w.detach().requires_grad_()
        with constant_alphas(self.network):
            (gradient,) = distributed.all_reduce_mean(torch.autograd.grad(self._loss(batch, w), [w]), self.count(batch))
        return gradient

    def grad_alpha(self, batch: Batch, w: Tensor) -> Tensor:
        """grad_a L(w, a) on `batch`; no gradient of the weights is computed."""
        gradient = _flatten(torch.autograd.grad(self._loss(batch, w.detach()), self._alphas))
        return distributed.all_reduce_mean([gradient], self.count(batch))[0]

    def grad_alpha_and_weights(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor]:
        """grad_a L(w, a) and grad_w L(w, a) on `batch`, in one pass."""
        w = w.detach().requires_grad_()
        *alphas, weights = torch.autograd.grad(self._loss(batch, w), [*self._alphas, w])
        alphas, weights = distributed.all_reduce_mean([_flatten(alphas), weights], self.count(batch))
        return alphas, weights

    def hessian_vector(self, batch: Batch, w: Tensor, d: Tensor) -> Tensor:
        """d2/da dw L(w, a) . d on `batch`: by the central difference of equation 8, or as it is with `hvp` "exact"."""
        return self.exact_product(batch, w, d) if self.hvp == "exact" else self.difference_quotient(batch, w, d)

    def difference_quotient(self, batch: Batch, w: Tensor, d: Tensor, r: float = PERTURBATION) -> Tensor:
        """The right side of equation 8, with |eps d| = r."""
        eps = r / d.norm()
        plus, minus = self.at_once(w.device, lambda: self.grad_alpha(batch, w + eps * d),
                                   lambda: self.grad_alpha(batch, w - eps * d))
        return (plus - minus) / (2 * eps)

    def exact_product(self, batch: Batch, w: Tensor, d: Tensor) -> Tensor:
        """The left side of equation 8, by double backward: the gradient of (grad_w L . d) w.r.t. the alphas."""
        w = w.detach().requires_grad_()
        with by_definition(self.network):  # an engine's gradients are no graph
            (gradient,) = torch.autograd.grad(self._loss(batch, w), [w], create_graph=True)
            product = _flatten(torch.autograd.grad(gradient, self._alphas, d))
        (product,) = distributed.all_reduce_mean([product], self.count(batch))
        return product

    def alpha_products(self, batch: Batch, w: Tensor) -> Callable[[Tensor], Tensor]:
        """The function v -> d2/da2 L(w, a) . v on `batch`, by double backward, for v as long as the flat alphas.

        It keeps the graph of the gradient.
        """
        with by_definition(self.network):
            gradient = _flatten(torch.autograd.grad(self._loss(batch, w.detach()), self._alphas, create_graph=True))

        def product(v: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradient, self._alphas, v, retain_graph=True, materialize_grads=True)
            return distributed.all_reduce_mean([_flatten(parts)], self.count(batch))[0]

        return product

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, every pass begins with the random state that there is now."""
        self._random = RandomState(self._flat.device)
        try:
            yield
        finally:
            self._random = None

    def _loss(self, batch: Batch, w: Tensor) -> Tensor:
        if self._random is not None:
            self._random.restore()
        return self.loss(batch, w)

    def loss(self, batch: Batch, w: Tensor) -> Tensor:
        """L(w, a) on `batch` with the weights in the flat vector `w`: mean cross-entropy in nats, `scaled_by_count`."""
        images, labels = batch
        loss = cross_entropy(self.network.with_weights(images, w), labels)
        return distributed.scaled_by_count(loss, self.count(batch))

    def count(self, batch: Batch) -> int:
        """What the mean in `loss` is over: the images of `batch` that this process has."""
        return len(batch[1])


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def one_after_the_other(device: torch.device, first: Callable[[], Tensor], second: Callable[[], Tensor]
                        ) -> tuple[Tensor, Tensor]:
    """The results of two passes."""
    return first(), second()


class RandomState:
    """The state of the random generators that a pass on `device` draws from; nothing while a CUDA graph is recorded."""

    def __init__(self, device: torch.device):
        self.device = device
        self.recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self.recording:
            self.state = torch.get_rng_state()
            self.of_device = (torch.cuda.get_rng_state(device) if device.type == "cuda" else
                              torch.mps.get_rng_state() if device.type == "mps" else None)

    def restore(self) -> None:
        """Let the generators go on from that state."""
        if not self.recording:
            torch.set_rng_state(self.state)
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.of_device, self.device)
            elif self.device.type == "mps":
                torch.mps.set_rng_state(self.of_device)
