"""The same as `d-emo explain`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("explain")
