"""The core of CoNAS: everything about one network, from its search space to its test result."""

__version__ = "0.1.0"
