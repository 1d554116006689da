"""The same as `d-emo distill`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("distill")
