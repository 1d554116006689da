"""The same as `d-emo sample`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("sample")
