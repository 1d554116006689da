"""The same as `d-emo train-video`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("train-video")
