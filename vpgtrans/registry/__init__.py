"""The checkpoint registry: an index of parts and VLMs with the checksum of every file."""
