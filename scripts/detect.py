"""The same as `d-emo detect`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("detect")
