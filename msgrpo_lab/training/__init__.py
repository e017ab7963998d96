"""Training: the data module, the Lightning module, and what is built, collated and saved around them."""
