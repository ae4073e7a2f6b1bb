"""The import rule of the packages: the method does not know the engine, and nothing imports what stands above it."""
import ast

from tests.conftest import ROOT

MAY_IMPORT = {"ground": "", "darts": "", "engine": "darts", "data": "", "runs": "darts data", "draw": "darts exchange",
              "exchange": "darts runs", "health": "darts runs", "recurrent": "darts data runs draw",
              "commands": "darts engine data runs draw exchange health"}  # and each its own modules, and the ground
# What is left to do: this set only ever shrinks.
VIOLATIONS: set[str] = set()


def room(module: str) -> str:
    """The package of conas that a module belongs to; modules directly below conas are the ground."""
    folder = (module.split(".") + [""])[1]
    return folder if (ROOT / "conas" / folder).is_dir() and folder else "ground"


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports; `from a import b` may import a.b."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "no relative imports below conas"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_packages_import_what_stands_below_them_and_conas_imports_nothing_else_of_this_repository():
    found = set()
    for path in sorted((ROOT / "conas").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        own = room(name.removesuffix(".py").replace("/", "."))
        for module in [m for node in ast.walk(ast.parse(path.read_text())) for m in imported(node)]:
            top, target = module.split(".")[0], room(module)
            assert top not in {"ensemble", "tests", "benchmarks", "cnn", "rnn"}, f"{name} imports {module}"
            if top == "conas" and target not in {own, "ground", *MAY_IMPORT[own].split()}:
                found.add(f"{name} -> {target}")
    assert found == VIOLATIONS
