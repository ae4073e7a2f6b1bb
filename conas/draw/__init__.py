"""Pictures of cells, and TensorBoard."""
