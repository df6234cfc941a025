"""Models of other projects: decoders in and out, and memories added to them."""
