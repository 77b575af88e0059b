"""Encoders, connectors, image preprocessing, the VPG, and importers for other people's VLMs."""
