"""The same as `d-emo benchmark`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("benchmark")
