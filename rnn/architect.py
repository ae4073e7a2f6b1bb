"""How the alphas of recurrent cells are updated: second-order DARTS, arXiv:1806.09055, equations 6 to 8, clipped."""
from conas.recurrent.steps import LanguageBilevel


class Architect(LanguageBilevel):
    """Terms, names and signs are those of `conas/darts/architect.py`; there is no momentum, and both gradients of the
    weights are clipped: `clip` gives a gradient and the factor k that it was shortened by.

    As in the published code, whose figures these are, `moving` is 0 for the words' embedding: the virtual step leaves
    it where it is, since that code writes the old matrix back through the decoder that shares it.
    """

    def hypergradient(self, train, valid, xi):
        w, decay, moving = self.weights(), self.weight_decay, self.moving
        gradient, k = self.clip(self.grad_weights(train, w))
        w_next = w - xi * moving * (gradient + decay * w)                       # (6) the step the weights would take
        grad_alpha, d = self.grad_alpha_and_weights(valid, w_next)              # (7) first term, and its direction
        d, _ = self.clip(d)
        hessian_d = self.hessian_vector(train, w, d)                            # (8) central difference
        return grad_alpha - xi * k * hessian_d                                  # (7)
