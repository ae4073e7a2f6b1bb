"""Former names of modules go on working, in imports and as commands."""
from importlib import import_module

import pytest

import conas
from tests.conftest import ROOT
from tests.helpers.launch import start


@pytest.mark.parametrize("former, present", sorted(conas.MOVED.items()))
def test_a_module_is_the_same_object_by_its_former_name(former, present):
    module = import_module(former)
    assert module is import_module(present) and module.__name__ == present
    assert module.__spec__.name == present


@pytest.mark.parametrize("command", ["conas.draw", "conas.animate", "conas.draw_recurrent"])
def test_a_command_runs_by_its_former_name(command):
    done = start("-m", command, "--help", cwd=ROOT, fresh=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr


def test_another_name_is_as_unknown_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"conas\.nothing"):
        import_module("conas.nothing")
