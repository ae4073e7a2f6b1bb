"""How the kernels come to be: the file they are compiled into, what is wrong with it, and processes that fork."""
import os
import subprocess
import sys

import pytest
import torch

from conas.engine.native import library, loader, selfcheck
from conas.engine.native.library import Table
from conas.engine.native.loader import kernels, why_no_kernels
from tests.conftest import ROOT

needs_kernels = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CONAS_NATIVE", "1")
    monkeypatch.setattr(loader, "FLAGS", ("-std=gnu11", "-O0", "-fPIC", "-shared", "-w"))  # quick to compile
    return tmp_path / "conas"


def files(cache):
    return sorted(path.name for path in cache.glob("*.so"))


@needs_kernels
def test_the_compiled_file_is_used_again_unless_it_is_broken_or_not_ours(cache):
    path = loader.compiled(loader.find_compiler(), loader.cache_folder())
    assert cache.stat().st_mode & 0o777 == 0o700 and files(cache) == [path.name]
    inode, content = path.stat().st_ino, path.read_bytes()
    assert loader.compiled(loader.find_compiler(), loader.cache_folder()).stat().st_ino == inode
    path.write_bytes(content[:5000])
    assert loader.compiled(loader.find_compiler(), loader.cache_folder()).stat().st_size == len(content)
    cache.chmod(0o777)
    (cache / path.name).write_bytes(b"of somebody")
    assert loader.cache_folder().stat().st_mode & 0o777 == 0o700 and not files(cache)


@needs_kernels
def test_two_processes_at_once_compile_one_file(cache):
    program = f"from conas.engine.native import loader; loader.FLAGS = {loader.FLAGS}; print(loader.load().path)"
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].strip() for process in both}
    assert len(paths) == 1 and files(cache) == [os.path.basename(paths.pop())]


@pytest.mark.parametrize("set_up, says", [
    (lambda patch, path: patch.setenv("CONAS_NATIVE", "0"), "CONAS_NATIVE=0"),
    (lambda patch, path: (patch.delenv("CC", raising=False), patch.setenv("PATH", str(path))), "no C compiler"),
    (lambda patch, path: patch.setenv("CC", "no-such-compiler -O1"), "no-such-compiler"),
    (lambda patch, path: patch.setenv("CC", "false"), "cannot be compiled"),
    (lambda patch, path: (patch.setenv("CC", "true"), (path / "conas").write_text("a file")),
     "conas cannot be written"),
])
def test_without_kernels_there_is_a_line_that_says_why(set_up, says, cache, tmp_path, monkeypatch):
    set_up(monkeypatch, tmp_path)
    with pytest.raises(loader.Unavailable, match=says) as caught:
        loader.load()
    assert "\n" not in str(caught.value)


@needs_kernels
def test_a_cache_of_somebody_else_is_not_used(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(loader.Unavailable, match="not a folder of this user"):
        loader.cache_folder()


@needs_kernels
@pytest.mark.parametrize("kernel", ["unit_forward", "unit_backward", "pools_forward", "pools_backward", "combine",
                                    "dots", "evaluate"])
def test_a_wrong_kernel_is_named(kernel, monkeypatch):
    library, right = kernels(), Table.__getattribute__

    def damaged(table, name):
        function = right(table, name)
        if name != kernel:
            return function

        def wrong(*arguments):
            return function(*(2 * a if isinstance(a, float) else a for a in spoiled(kernel, arguments)))

        return wrong

    monkeypatch.setattr(Table, "__getattribute__", damaged)
    assert f"{kernel} (float32)" in selfcheck.wrong_kernels(library)


def spoiled(kernel, arguments):
    """A kernel's arguments with another number among them."""
    arguments = list(arguments)
    if kernel in ("combine", "pools_backward"):  # the shares
        place = 7
        arguments[place] = type(arguments[place])(*(0.5 * p for p in arguments[place]))
    elif kernel == "dots":
        arguments[1] -= 1  # pixels
    elif kernel == "unit_forward":
        arguments[4] += 4  # weights that begin one later
    elif kernel in ("pools_forward", "evaluate"):
        arguments[1] += 4
    return arguments


@needs_kernels
def test_a_forked_process_has_kernels():
    program = """
import os, torch
from conas.darts.operations import SepConv
from conas.engine.native import library
from conas.engine.native.functions import run_operation
from conas.engine.native.loader import kernels
from conas.engine.native.parts import read
torch.set_num_threads(2)
library.SMALL = 0  # threads for a map so small that torch itself uses none: its own would hang in the child
module, x = SepConv(4, 3, 1, False), torch.randn(4, 4, 8, 8)
def run():
    return run_operation(kernels(), read(module), x, list(module.parameters()), True)
before = run()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(run(), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_small_maps_are_one_threads(monkeypatch):
    """A second thread would be awake when they are done, and where it shares its core with others, long after."""
    monkeypatch.setattr(library, "SMALL", 1000)
    torch.set_num_threads(2)
    try:
        assert [library.threads(numbers) for numbers in (1, 999, 1000, 10**9)] == [1, 1, 2, 2]
    finally:
        torch.set_num_threads(1)
