"""The kernels stay within their maps, over odd shapes, under a sanitizer for addresses and undefined behaviour."""
import os
import re
import subprocess
from pathlib import Path

import pytest

from conas.engine.native import loader
from conas.engine.native.library import KERNELS

CASES = Path(__file__).with_name("native_bounds.c")
FLAGS = "-std=gnu11", "-O0", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
STORE = "NAME(store)(maximum + at, best, n);"  # of pools_forward


def sanitized(source: Path, program: Path, *flags: str) -> None:
    """Compile with the sanitizer. Raises Unavailable or CalledProcessError."""
    subprocess.run([*loader.find_compiler(), *FLAGS, *flags, str(source), "-lm", "-o", str(program)], check=True,
                   capture_output=True, text=True)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=os.environ | options)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """native_bounds.c with a copy of the kernels, in which a write may be told to go one number too far."""
    folder = tmp_path_factory.mktemp("bounds")
    try:
        (folder / "empty.c").write_text("int main(void) { return 0; }")
        sanitized(folder / "empty.c", folder / "empty")
        run(folder / "empty").check_returncode()
    except (loader.Unavailable, subprocess.CalledProcessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        pytest.skip(f"no sanitizer works here: {lines[0]}")
    texts = {part.name: part.read_text() for part in loader.PARTS}
    assert sum(text.count(STORE) for text in texts.values()) == 1
    for name, text in texts.items():
        (folder / name).write_text(text.replace(STORE, STORE.replace("at,", "at + planted,")))
    for native in loader.NATIVE:  # the first of these that the compiler takes, as for the kernels themselves
        try:
            sanitized(CASES, folder / "bounds", "-I", str(folder), *native)
            return folder / "bounds"
        except subprocess.CalledProcessError as error:
            failed = error
    pytest.fail(failed.stderr)


def test_every_kernel_is_called():
    assert set(KERNELS) <= set(re.findall(r"bad \+= NAME\((\w+)\)\(&?\w", CASES.read_text()))


def test_no_kernel_leaves_its_maps_or_uses_what_was_never_written(program):
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 results not finite" in done.stdout and int(done.stdout.split()[0]) > 1000


def test_a_write_that_goes_one_number_too_far_is_seen(program):
    done = run(program, "1")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    assert "WRITE of size" in done.stderr and "pools_forward" in done.stderr
