"""Paths of the checkout, its recipes and its test data."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs"
SOFT_LABELS = ROOT / "tests" / "data" / "soft_labels.npz"
SHARED = ROOT.parent / "shared" / "data"  # real photographs and weights, which few machines have
