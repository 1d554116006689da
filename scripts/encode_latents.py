"""The same as `d-emo encode`."""

from d_emo.cli import main

if __name__ == "__main__":
    main("encode")
