"""The method: DARTS in plain words of torch. Read genotype, operations, supernet, architect, derived, in this order."""
