"""The same as `d-emo plot-loss`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("plot-loss")
