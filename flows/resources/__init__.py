"""Resource estimation: memory, time and disk of a training run. The command is `peftcore plan`."""
