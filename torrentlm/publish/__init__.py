"""Checkpoint in, torrents out: streams a model's tensors into block files and describes them in a model torrent."""
