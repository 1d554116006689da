"""The same as `d-emo convert`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("convert")
