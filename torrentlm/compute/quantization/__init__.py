"""Weights in fewer bits than the checkpoint has: chosen, packed, multiplied by, and kept on disk."""
