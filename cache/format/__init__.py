"""What is in a store: its arrays, attributes, manifest, crops, codecs, and the seal
that protects its description."""
