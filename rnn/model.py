"""The network of a found recurrent cell."""
from conas.recurrent.model import RecurrentNetwork as Network  # noqa: F401  the name that DARTS' folder has it under
