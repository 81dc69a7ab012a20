"""Read label stores of the Hugging Face hub: addresses, packs, fetching."""
