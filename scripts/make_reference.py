"""The same as `d-emo reference`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("reference")
