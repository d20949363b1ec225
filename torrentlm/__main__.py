"""``python -m torrentlm``: the command line."""

if __name__ == "__main__":
    try:
        from torrentlm.cli.main import main

        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
