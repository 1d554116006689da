"""The same as `d-emo fid`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("fid")
