"""The same as `d-emo evaluate`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("evaluate")
