"""The engine: the numbers of the method, faster."""
