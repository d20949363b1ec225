"""`chat` and `generate`: what reaches the model and what reaches the screen, on a pipe and on a real terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.unit.cli import fake_engine
from torrentlm.cli import commands as cli
from torrentlm.cli.chat import figures, route_lines

MAGNET = "magnet:?xt=urn:btih:" + "ab" * 20


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[fake_engine.Model]:
    for name in ("torrentlm.api", "torrentlm.compute.threads"):
        monkeypatch.setitem(sys.modules, name, None)  # put back what was there
    return fake_engine.install()


def run(*arguments: str, stdin: str = "", monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return cli.run(arguments)


def test_generate_streams_text_alone(models, monkeypatch, capsys):
    assert run("generate", MAGNET, "--prompt", "Hi", "--max-new-tokens", "3", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "one two three four\n"
    [(_, prompt, how)] = models[0].calls[:1]
    assert prompt == "Hi"
    assert how["max_new_tokens"] == 3 and how["temperature"] == 0 and not how["chat"] and how["stop"] == ()
    assert models[0].calls[-1] == "model closed"
    assert models[0].settings.magnet == MAGNET and models[0].settings.node.port == 0


def test_generate_hands_over_every_option(models, monkeypatch, capsys):
    options = (
        "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 7 --stop A --stop B --chat"
        " --adapter magnet:?x"
    )
    assert run("generate", MAGNET, "--prompt", "-", *options.split(), stdin="from a pipe", monkeypatch=monkeypatch) == 0
    assert models[0].calls[0] == (
        "generate",
        "from a pipe",
        {
            "max_new_tokens": 256, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
            "repetition_penalty": 1.1, "seed": 7, "stop": ("A", "B"), "chat": True,
            "adapter": "magnet:?x",
        },
    )  # fmt: skip


def test_generate_json_is_one_object(models, monkeypatch, capsys):
    assert run("generate", MAGNET, "--prompt", "Hi", "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "one two",
        "tokens": [1, 2],
        "tokens_per_second": 9.213,
        "time_to_first_token_s": 0.6123,
        "route": [
            {"peer": "127.0.0.1:1", "first": 0, "last": 10},
            {"peer": "127.0.0.1:22", "first": 11, "last": 11},
        ],
        "finish": "length",
    }


def test_chat_from_a_pipe(models, monkeypatch, capsys):
    lines = "Hello\n\n/system Be brief.\n/route\n/stats\n/reset\n/what\n/etc/passwd is a file\n/help\n/quit\nnot read\n"
    assert run("chat", MAGNET, "--system", "S", "--seed", "4", stdin=lines, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    said = [call[1] if isinstance(call, tuple) else call for call in models[0].calls]
    assert said == ["Hello", "left", "reset", "reset", "/etc/passwd is a file", "left", "close", "model closed"]
    assert models[0].calls[0][2]["seed"] == 4
    for part in (
        "one two three four\n",
        "System prompt: Be brief.",
        "127.0.0.1:1   blocks 0-10\n127.0.0.1:22  block 11\n",
        "2 tokens · 9.21 tokens/s · first after 0.61 s",
        "pipes:\n  127.0.0.1:39183  1.75 ms\n  127.0.0.1:1\nbytes sent: 10\n",
        "There is no /what",
        "/system TEXT",
    ):
        assert part in output


def test_an_error_ends_a_chat_from_a_pipe(models, monkeypatch, capsys):
    assert run("chat", MAGNET, stdin="please fail\nnot read\n", monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.err == "torrentlm: a holder was lost\n"
    assert models[0].calls[-2:] == ["close", "model closed"]


SURROGATE = b"\xff".decode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (("generate", MAGNET, "--prompt", f"a{SURROGATE}"), ""),
        (("generate", MAGNET, "--prompt", "a", "--stop", SURROGATE), ""),
        (("generate", MAGNET, "--prompt", "-"), SURROGATE),
        (("chat", MAGNET, "--system", SURROGATE), ""),
        (("chat", MAGNET), f"{SURROGATE}\n"),
        (("chat", MAGNET), f"/system {SURROGATE}\n"),
        (("demo", SURROGATE), ""),
    ],
)
def test_what_is_not_utf8_is_refused_in_a_sentence(arguments, stdin, models, monkeypatch, capsys):
    assert run(*arguments, stdin=stdin, monkeypatch=monkeypatch) == 1
    captured = capsys.readouterr()
    assert "is not valid UTF-8 at character" in captured.err and captured.err.count("\n") == 1
    assert not any(isinstance(call, tuple) for model in models for call in model.calls)  # nothing was asked


def test_input_that_cannot_be_decoded_is_refused_in_a_sentence(models, monkeypatch, capsys):
    for command in (("generate", MAGNET, "--prompt", "-"), ("chat", MAGNET)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
        assert cli.run(command) == 1
        assert capsys.readouterr().err == "torrentlm: Standard input is not valid UTF-8; convert it first.\n"


def test_figures_without_a_rate():
    assert figures(fake_engine.Result(tokens=(1,), tokens_per_second=0.0)) == "1 token · first after 0.61 s"
    assert route_lines(()) == ""


def test_inspect_shows_tables_and_json(models, monkeypatch, capsys):
    assert run("inspect", MAGNET, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    for part in ("Tiny", "142 MB", "stem", "113 MB", "127.0.0.1:1, 127.0.0.1:22"):
        assert part in output
    assert [line.split() for line in output.splitlines()][-1] == ["1", "head", "1", "B", "2"]  # tensors are counted
    assert "norm.weight" not in output
    assert run("inspect", MAGNET, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == models[1].inspect()


class Terminal:
    """A child process on a pseudo-terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.output = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=os.environ | {"TERM": "xterm"}
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, timeout: float = 30) -> None:
        """Read until ``text`` has come, then forget everything up to it."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come, only {self.output!r}"
            if select.select([self._master], [], [], left)[0]:
                self.output += os.read(self._master, 4096).decode(errors="replace")
        self.output = self.output.split(text, 1)[1]

    def interrupt(self) -> None:
        time.sleep(0.3)  # readline notices a signal only while it waits for a key
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def chatting() -> Iterator[Terminal]:
    terminal = Terminal(sys.executable, "-m", "tests.unit.cli.fake_engine", "chat", MAGNET)
    with contextlib.closing(terminal):
        terminal.wait_for("(no peer yet)")
        terminal.wait_for("/quit leaves.")
        terminal.wait_for("> ")
        yield terminal


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with chatting() as terminal:
        yield terminal


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal):
    terminal.type("slowly\n")
    terminal.wait_for("one two")
    terminal.interrupt()
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    terminal.interrupt()  # a second one right after was meant for the answer
    terminal.wait_for("> ")
    terminal.type("again\n")
    terminal.wait_for("one two three four")
    terminal.wait_for("9.21 tokens/s")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(10) == 0


def test_an_error_does_not_end_the_chat_on_a_terminal(terminal: Terminal):
    terminal.type("fail\n")
    terminal.wait_for("[a holder was lost]")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0


def test_neither_ctrl_c_nor_an_error_in_a_command_ends_the_chat(monkeypatch):
    for kind, says in (("slow", "[stopped]"), ("lost", "[no route]")):
        monkeypatch.setenv("FAKE_ROUTE", kind)
        with chatting() as terminal:
            terminal.type("/route\n")
            terminal.wait_for("/route")
            if kind == "slow":
                terminal.interrupt()
            terminal.wait_for(says)
            terminal.wait_for("> ")
            terminal.type("/quit\n")
            assert terminal.process.wait(10) == 0


def test_a_line_that_is_not_utf8_does_not_end_the_chat(terminal: Terminal):
    os.write(terminal._master, b"a\xffb\n")
    terminal.wait_for("is not valid UTF-8")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(10) == 0


def test_ctrl_c_at_the_prompt_clears_the_line_then_leaves(terminal: Terminal):
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.interrupt()
    terminal.wait_for("> ")
    terminal.interrupt()
    assert terminal.process.wait(10) == 130
    assert "Traceback" not in terminal.output
