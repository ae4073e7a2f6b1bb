"""Start a script as a process of its own, forked from one that has imported torch and other libraries, but no CoNAS.

Those imports are two thirds of the time of the short runs that tests make. In all else the process is as `python`
starts it: its own folder first in sys.path, its own files, exit code, and ends of pipes.
"""
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ["numpy", "torch", "torch._dynamo", "torchvision", "PIL.Image", "tqdm", "matplotlib.backends.backend_agg",
             "matplotlib.backends.backend_svg"]


def start(*command: object, cwd: str | Path, timeout: float = 300, fresh: bool = False, **settings
          ) -> subprocess.CompletedProcess:
    """The end of `python COMMAND`: a script and its arguments, or -m, a module and its arguments.

    If `fresh`, of a new interpreter after all, with `settings` of subprocess.
    """
    command = list(map(str, command))
    if fresh or "forkserver" not in multiprocessing.get_all_start_methods():
        return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                              **settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(command, str(cwd), list(map(str, outputs))))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, *(path.read_bytes() for path in outputs))
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def _run(command: list[str], cwd: str, outputs: list[str]) -> None:
    gc.freeze()  # no collection goes through what was imported
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "_pytest", "pytest")]:
        del sys.modules[name]
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    os.chdir(cwd)
    sys.dont_write_bytecode = False  # as pytest-xdist has it
    if command[0] == "-m":
        sys.argv, sys.path[:] = command[1:], [cwd, *libraries]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = command, [str(Path(command[0]).absolute().parent), *libraries]
        runpy.run_path(command[0], run_name="__main__")
