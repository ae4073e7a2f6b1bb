"""The core of CoNAS: everything about one network, from its search space to its test result.

darts/ states the method, engine/ computes the same numbers faster, data/ and runs/ feed and keep a run, commands/ is
what the scripts of a space call; draw/ and recurrent/ stand beside them.
"""
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

# What a program that uses CoNAS as a library imports from here; see README. Nothing is loaded before it is asked for.
PUBLIC = {
    "Bilevel": "conas.darts.architect",
    "Genotype": "conas.darts.genotype",
    "NetworkCIFAR": "conas.darts.derived",
    "NetworkImageNet": "conas.darts.derived",
    "OPERATIONS": "conas.darts.operations",
    "Search": "conas.commands.library",
    "Supernet": "conas.darts.supernet",
    "accelerate": "conas.engine.door",
}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


# Modules by the names that they had before they were put into packages: a space of a user's own goes on importing them.
MOVED = {
    "conas.animate": "conas.draw.animate",
    "conas.architect": "conas.darts.architect",
    "conas.draw_recurrent": "conas.recurrent.draw",
    "conas.evaluate": "conas.commands.test_all",
    "conas.genotype": "conas.darts.genotype",
    "conas.measure": "conas.commands.test",
    "conas.search": "conas.commands.search",
    "conas.supernet": "conas.darts.supernet",
    "conas.train": "conas.commands.train",
}


class _Moved(MetaPathFinder, Loader):
    """Imports a module of MOVED by its present name, and lets `python -m` run it by the former one."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec) -> None:
        return None

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])  # what `import` then hands on

    def get_code(self, fullname):
        return compile(f"import runpy; runpy.run_module({MOVED[fullname]!r}, run_name='__main__')", fullname, "exec")


sys.meta_path.append(_Moved())
