"""Options become settings."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from torrentlm.cli.options import client_options, node_options, settings_of
from torrentlm.config import NODE_KEYS, NodeConfig, Settings
from torrentlm.records import Endpoint, Span

MAGNET = "magnet:?xt=urn:btih:" + "ab" * 20


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NODE_KEYS:
        monkeypatch.delenv(f"TORRENTLM_{name.upper()}", raising=False)


def parse(decorate, *arguments: str, client: bool = False) -> Settings:
    found: list[Settings] = []

    @click.command
    @decorate
    def command(**options: object) -> None:
        found.append(settings_of(MAGNET, options, client=client))

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_every_key_of_a_node_is_an_option():
    @click.command
    @node_options
    def command() -> None: ...

    assert {parameter.name for parameter in command.params} == set(NODE_KEYS)


def test_options_reach_the_settings():
    node = parse(
        node_options,
        *("--data", "/d", "--port", "0", "--peer", "a:1", "--peer", "b:2", "--dht-bootstrap", "none"),
        *(
            "--blocks",
            "0-10",
            "--devices",
            "cuda,cpu",
            "--ram",
            "1GB",
            "--vram",
            "auto",
            "--disk",
            "2GiB",
            "--precision",
            "BF16",
        ),
        *("--threads", "2", "--lease", "5", "--host", "127.0.0.1", "--allow-code", "AB" * 32),
    ).node
    assert node == NodeConfig(
        data=Path("/d"),
        host="127.0.0.1",
        port=0,
        peers=(Endpoint("a", 1), Endpoint("b", 2)),
        dht_bootstrap=(),
        blocks=Span(0, 10),
        devices=("cuda:0", "cpu"),
        ram=10**9,
        disk=2 << 30,
        precision="BF16",
        threads=2,
        lease=5.0,
        allow_code=("ab" * 32,),
    )


def test_without_options_the_defaults_hold():
    assert parse(node_options).node == NodeConfig()


def test_a_client_takes_a_free_port_unless_told_otherwise(monkeypatch):
    assert parse(client_options, client=True).node.port == 0
    assert parse(client_options, "--port", "7", client=True).node.port == 7
    assert parse(client_options, "--host", "127.0.0.1", client=True).node.host == "127.0.0.1"
    monkeypatch.setenv("TORRENTLM_PORT", "8")
    assert parse(client_options, client=True).node.port == 8
