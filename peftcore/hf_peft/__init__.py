"""HF PEFT's public names, in the places from which scripts import them."""
