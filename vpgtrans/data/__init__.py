"""Data sets and how they are read: image–caption sources, their mixture, and the built-in set `openmoji`."""
