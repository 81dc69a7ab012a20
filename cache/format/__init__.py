"""Define the content of a store: arrays, attributes, manifest, crops, codecs, and the
seal that protects the store's description."""
