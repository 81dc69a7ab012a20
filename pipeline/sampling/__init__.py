"""Random numbers, and their uses: crops, CutMix, the order of an epoch."""
