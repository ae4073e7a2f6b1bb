"""The runs of a study: whatever is missing is started, one after another or side by side, and goes on where it stopped.

A run is a process in a session of its own, which a Ctrl-C in the terminal does not reach: it gets every signal once,
from here. It then keeps the state after its present step, and the same command goes on from there.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from conas.errors import InputError, Stopped, one_line
from conas.files import read_json, write_json, write_text
from conas.places import absolute
from conas.runs.folder import list_checkpoints, read_arguments

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"search": "train_search.py", "train": "train.py"}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}  # 128 + the signal's number, as shells have it
SLURM = """#!/bin/bash
# The {count} runs of {plan}, a task of this array each. In the repository's root: sbatch {script}
# Submitted again, it goes on with what is missing. What your cluster needs besides (--partition, --time, --gres=gpu:1)
# is added here or given to sbatch; PYTHON names the interpreter, if it is not python.
#SBATCH --job-name={name}
#SBATCH --array=1-{count}
#SBATCH --cpus-per-task=1
#SBATCH --output={name}-%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
cd "${{SLURM_SUBMIT_DIR:-.}}" || exit
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
exec "${{PYTHON:-python}}" -m ensemble.study run {quoted} --part "$SLURM_ARRAY_TASK_ID/{count}"
"""


def execute(content: dict, part: str, jobs: int = 1, data: str | None = None) -> None:
    """Run what is missing of a plan, `jobs` runs at a time; several have one thread each. `data`: where the images are.

    Raises InputError naming the command that failed, after all others had their turn, and Stopped if asked to stop,
    once every run has kept its state.
    """
    try:
        i, n = map(int, part.split("/"))
        assert 1 <= i <= n
    except (ValueError, AssertionError) as error:
        raise InputError(f"--part {part}: write it as 2/3, the second of three parts") from error
    runs = content["runs"][i - 1::n]
    if data is not None:  # the last of two equal flags counts
        runs = [run | {"commands": [[*command, "--data", absolute(data)] for command in run["commands"]]}
                for run in runs]
    check_trainings(runs)
    failed = _Jobs(runs, jobs).run()
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed, first: {failed[0]}; the others are done, and the "
                         "same command tries these again")
    print(f"{len(runs)} runs are done")


def check_trainings(runs: list[dict]) -> None:
    """Raise InputError if train.py would refuse its flags when the first search is done; the cells do not matter."""
    for run in runs:
        search, *trainings = run["commands"]
        if trainings and not finished(command_folder(run, search)):
            command = [*trainings[0], "--check_only"]
            if not {"--arch", "--init_from"} & {word.split("=")[0] for word in command}:
                command += ["--arch", "DARTS", "--any_ops"]
            done = subprocess.run([sys.executable, *command], cwd=ROOT / run["space"], capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"train.py would fail after the searches: {_last_line(done.stderr)}")
            return


class _Jobs:
    """Processes of runs, at most `jobs` at a time."""

    def __init__(self, runs: list[dict], jobs: int):
        self.jobs, self.count, self.done, self.failed = jobs, len(runs), 0, []
        self.waiting = [(number, run, 0) for number, run in enumerate(runs, 1)]  # and the command that is next
        self.active: list[_Job] = []
        self.wish: int | None = None  # the signal that has come

    def run(self) -> list[str]:
        """The commands that failed."""
        with self._signals(), tqdm(total=self.count, desc="runs", leave=False, disable=None if self.jobs > 1 else True
                                   ) as self.bar:
            try:
                while self.active or (self.waiting and self.wish is None):
                    while self.waiting and len(self.active) < self.jobs and self.wish is None:
                        self._start(*self.waiting.pop(0))
                    time.sleep(0.1)
                    for job in [job for job in self.active if job.process.poll() is not None]:
                        self.active.remove(job)
                        self._end(job)
                if self.wish is not None:
                    raise Stopped(f"stopped; {self.done} of {self.count} runs are done and the others keep what they "
                                  "have; start the same command again to go on", CODES[self.wish])
            finally:
                for job in self.active:  # an error of ours
                    job.process.terminate()
                    job.process.wait()
        return self.failed

    def _start(self, number: int, run: dict, index: int) -> None:
        """Start the first unfinished command of a run, from `index` on, if there is one."""
        for index in range(index, len(run["commands"])):  # noqa: B020
            command = run["commands"][index]
            if not finished(command_folder(run, command)):
                text = f"cd {run['space']} && python {shlex.join(command)}"
                tqdm.write(f"[{number} of {self.count}] {text}")
                sys.stdout.flush()
                self.active.append(_Job(number, run, index, text, self.jobs > 1))
                return
        self.done += 1
        self.bar.update()

    def _end(self, job: "_Job") -> None:
        job.write_seconds()
        code = job.process.returncode
        if code and self.wish is None:
            self.failed.append(job.text)
            tqdm.write(f"[{job.number} of {self.count}] failed: {job.complaint() or f'exit code {code}'}")
        elif not code:
            self.waiting.insert(0, (job.number, job.run, job.index + 1))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def forward(number: int, _frame) -> None:
            self.wish = self.wish or number
            for job in self.active:
                job.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        before = {number: signal.signal(number, forward) for number in CODES
                  if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP}  # nohup
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Job:
    """A process of one command of a run; `several` have one thread each, and show no bars of their own."""

    def __init__(self, number: int, run: dict, index: int, text: str, several: bool):
        self.number, self.run, self.index, self.text = number, run, index, text
        self.folder = command_folder(run, run["commands"][index])
        self.errors = tempfile.TemporaryFile("w+", errors="replace") if several else None  # noqa: SIM115
        threads: Mapping[str, str] = {"OMP_NUM_THREADS": "1"} if several else {}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *run["commands"][index]], cwd=self.folder.parent, env={**os.environ, **threads},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors, start_new_session=True)

    def write_seconds(self) -> None:
        """Add the time that it took to seconds.json in its folder."""
        if self.folder.is_dir():
            seconds = (read_seconds(self.folder) or 0) + time.monotonic() - self.began
            write_json(self.folder / "seconds.json", {"seconds": seconds})

    def complaint(self) -> str:
        """The last line on its standard error, if that was not the terminal."""
        if self.errors is None:
            return ""
        self.errors.seek(0)
        return _last_line(self.errors.read())


def _last_line(text: str) -> str:
    return one_line(next((line for line in reversed(text.splitlines()) if line.strip()), "")).removeprefix("error: ")


def command_folder(run: dict, command: list[str]) -> Path:
    """The folder of the run that a command of a plan starts."""
    stage = next(stage for stage, script in SCRIPTS.items() if script == command[0])
    return ROOT / run["space"] / f"{stage}-{run['save']}"


def finished(folder: Path) -> bool:
    """Return True if a run's last epoch has its checkpoint."""
    try:
        return max(list_checkpoints(folder)) + 1 == read_arguments(folder).get("epochs")
    except InputError:
        return False


def read_seconds(folder: Path) -> float | None:
    """What `execute` has measured of a run, all its starts together; None for runs that were started otherwise.

    Raises InputError if the file is damaged.
    """
    path = folder / "seconds.json"
    try:
        seconds = read_json(path)["seconds"]
        if type(seconds) in (int, float) and 0 <= seconds < 1e12:
            return seconds
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: damaged; delete it, and the run counts as one of unknown duration")


def write_slurm(script: Path, plan: Path, content: dict) -> None:
    """Write a Slurm script for the runs of the plan, an array with a task for each.

    Raises InputError instead of overwriting anything else.
    """
    text = SLURM.format(count=len(content["runs"]), plan=one_line(plan), script=one_line(shlex.quote(str(script))),
                        name=re.sub(r"[^\w.-]", "_", plan.stem), quoted=shlex.quote(str(plan)))
    if script.exists() and script.read_bytes() != text.encode():
        raise InputError(f"--slurm {script}: is another file; give this one another name, or delete that")
    write_text(script, text)
    print(f"for Slurm, in the repository's root: sbatch {script}")
