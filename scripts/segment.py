"""The same as `d-emo segment`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("segment")
