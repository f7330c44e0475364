"""What the pictures of :mod:`torchalign.plot` and :mod:`torchalign.html` are made of."""
