"""The same as `d-emo models`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("models")
