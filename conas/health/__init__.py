"""How healthy a search is: the curvature of its loss w.r.t. the alphas, and its collapse into skip connections."""
