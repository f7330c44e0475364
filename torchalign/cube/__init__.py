"""What a labelled cube is, and the one loop over its frames; :mod:`torchalign.xr` and others are its faces."""
