"""One node: swarm, gateway, holder and the models that it takes part in, in one nursery."""

from torrentlm.node.node import Node, open_node

__all__ = ["Node", "open_node"]
