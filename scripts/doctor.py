"""The same as `d-emo doctor`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("doctor")
