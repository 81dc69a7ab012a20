"""Serve a store's crops and labels to other trainers."""

from pipeline.loading.decoder import Decoder as Decoder
from pipeline.loading.stored_crops import StoredCrops as StoredCrops
