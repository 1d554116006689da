"""The same as `d-emo compare`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("compare")
