"""The app: a page to draw pictures on."""
