"""The console script: finds verbs, suggests the nearest, says errors in a sentence, survives a closed pipe."""

import subprocess
import sys

import pytest

from qlora_ref import cli

ENVIRONMENT = {"PYTHONPATH": "python", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def test_usage_lists_every_verb(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


def test_unknown_verb_suggests_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "no verb 'trian'. Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    try:
        code = cli.main([verb, "--help"])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 0 and f"qlora-ref {verb}" in capsys.readouterr().out


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m qlora_ref estimate --list-models | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout
