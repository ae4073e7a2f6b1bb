"""Operations of the definition as compiled kernels, for CPUs."""
