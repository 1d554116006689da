"""The same as `d-emo demo`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("demo")
