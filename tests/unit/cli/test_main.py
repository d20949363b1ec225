"""Every way that a command can end: one sentence at most, and the right status."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import pytest

from torrentlm.cli import commands as cli
from torrentlm.errors import ConfigError, NoHolderError


def ending_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    @click.command
    def command() -> None:
        raise error

    monkeypatch.setattr(cli._Subcommands, "get_command", lambda *_: command)
    return cli.run(["seed"])


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ConfigError("Do this."), 1, "torrentlm: Do this.\n"),
        (NoHolderError("no peer holds\nblock 7"), 1, "torrentlm: no peer holds block 7\n"),
        (
            BaseExceptionGroup("nursery", [ExceptionGroup("inner", [ConfigError("Do this.")])]),
            1,
            "torrentlm: Do this.\n",
        ),
        (BaseExceptionGroup("nursery", [KeyboardInterrupt(), ConfigError("x")]), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
        (BrokenPipeError(), 1, ""),
        (SystemExit(143), 143, ""),
        (click.UsageError("No such thing."), 2, "Error: No such thing.\n"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero); set TORRENTLM_DEBUG=1 to see where.\n"),
        (AssertionError(), 1, "(AssertionError); set TORRENTLM_DEBUG=1"),
    ],
    ids=repr,
)
def test_status_and_sentence(error: BaseException, status: int, says: str, monkeypatch, capfd):
    monkeypatch.delenv("TORRENTLM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_leave_pipe_alone", lambda: None)
    assert ending_with(error, monkeypatch) == status
    out, err = capfd.readouterr()
    assert (says in err if says else err.strip() == "") and out == ""
    assert "Traceback" not in err


def test_debug_shows_where(monkeypatch):
    monkeypatch.setenv("TORRENTLM_DEBUG", "1")
    with pytest.raises(ConfigError):
        ending_with(ConfigError("Do this."), monkeypatch)


def torrentlm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torrentlm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


INTERRUPTED_AT = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
sys.argv[1:] = sys.argv[1:2] + ["--version"]
"""
ENTRIES = {
    "module": "runpy.run_module('torrentlm', run_name='__main__')",
    "console": "from torrentlm.cli.main import main; sys.exit(main())",
}


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        *(("module", name) for name in ("torrentlm.cli", "torrentlm.cli.main")),
        *((entry, name) for entry in ENTRIES for name in ("torrentlm.cli.parent", "torrentlm.cli.commands", "click")),
    ],
)
def test_ctrl_c_during_our_imports_is_quiet(entry: str, name: str):
    """From the first line of ours that runs; before it Python itself, reading its site files, shows a traceback."""
    command = [sys.executable, "-c", INTERRUPTED_AT + ENTRIES[entry], name]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_a_mistake_on_the_command_line_is_one_sentence():
    for arguments, says in (
        (("chat", "absent.toml"), "Cannot read absent.toml (no such file or directory)"),
        (("seed", "magnet:?x", "--blocks", "9-1"), "--blocks must be"),
        (("seed", "magnet:?x", "--peer", "nowhere"), "--peer must be a list"),
        (("inspect", "absent.torrent"), "Cannot read absent.torrent"),
    ):
        found = torrentlm(*arguments)
        assert found.returncode == 1
        assert found.stdout == ""
        assert found.stderr.startswith(f"torrentlm: {says}")
        assert found.stderr.count("\n") == 1


def test_usage_errors_have_status_2():
    assert torrentlm("generate", "magnet:?x").returncode == 2
    assert torrentlm("nothing").returncode == 2
    assert torrentlm("seed", "magnet:?x", "--port", "many").returncode == 2


def test_help_is_quick_and_names_every_subcommand():
    started = time.monotonic()
    found = torrentlm("--help")
    assert time.monotonic() - started < 2  # 0.1 s where nothing else runs
    assert all(f"\n  {name} " in found.stdout for name in cli.SUBCOMMANDS)
    for name in cli.SUBCOMMANDS:
        assert cli.run([name, "--help"]) == 0


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "torrentlm", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(write)
    assert found.stderr == b""
    assert found.returncode == 1


def test_an_interrupt_that_python_drops_comes_again() -> None:
    code = """
import time, torrentlm.cli.main
from torrentlm.cli import commands
class Dropped:
    def __del__(self):
        raise KeyboardInterrupt
def run():
    Dropped()
    time.sleep(20)
    return 0
commands.run = run
torrentlm.cli.main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")
