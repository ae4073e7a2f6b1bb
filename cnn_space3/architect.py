"""How this space updates its alphas: second-order DARTS, arXiv:1806.09055, equations 6 to 8."""
from conas.darts.architect import Bilevel


class Architect(Bilevel):
    """Terms, names and signs are those of `conas/darts/architect.py`; each line below is one of them."""

    def hypergradient(self, train, valid, xi):
        w, v, mu, decay = self.weights(), self.velocity(), self.momentum, self.weight_decay
        w_next = w - xi * (mu * v + self.grad_weights(train, w) + decay * w)   # (6) the step the weights would take
        grad_alpha, d = self.grad_alpha_and_weights(valid, w_next)              # (7) first term, and its direction
        hessian_d = self.hessian_vector(train, w, d)                            # (8) central difference
        return grad_alpha - xi * hessian_d                                      # (7)
