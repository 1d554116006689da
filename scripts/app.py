"""The same as `d-emo app`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("app")
