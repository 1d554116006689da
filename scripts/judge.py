"""The same as `d-emo class-accuracy`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("class-accuracy")
