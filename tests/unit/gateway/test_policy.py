from __future__ import annotations

import pytest

from torrentlm.errors import ConfigError
from torrentlm.gateway.policy import Policy


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_always_allowed(host: str) -> None:
    assert Policy.from_environment({"TORRENTLM_LOOPBACK_ONLY": "1"}).allows(host)
    assert Policy.from_environment({}).allows(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "10.1.2.3", "192.168.0.1", "2001:db8::1", "::ffff:8.8.8.8", "example.org"])
def test_loopback_only_means_it(host: str) -> None:
    assert not Policy.from_environment({"TORRENTLM_LOOPBACK_ONLY": "1"}).allows(host)
    assert Policy.from_environment({"TORRENTLM_LOOPBACK_ONLY": "0"}).allows(host)


def test_networks_can_be_added() -> None:
    policy = Policy.from_environment(
        {"TORRENTLM_LOOPBACK_ONLY": "1", "TORRENTLM_ALLOWED_NETS": "10.1.0.0/16, fd00::/8"}
    )
    assert policy.allows("10.1.2.3") and policy.allows("fd00::1") and policy.allows("127.0.0.1")
    assert not policy.allows("10.2.0.1")


def test_a_bad_network_is_named() -> None:
    with pytest.raises(ConfigError, match="TORRENTLM_ALLOWED_NETS"):
        Policy.from_environment({"TORRENTLM_LOOPBACK_ONLY": "1", "TORRENTLM_ALLOWED_NETS": "10.1.0.0/99"})
