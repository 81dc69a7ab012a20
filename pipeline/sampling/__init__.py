"""Random numbers, and what is drawn from them: crops, CutMix, the order of an epoch."""
