"""``python -m torrentlm``: the command line."""

from torrentlm.cli.main import main

if __name__ == "__main__":
    main()
