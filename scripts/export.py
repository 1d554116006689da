"""The same as `d-emo export`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("export")
