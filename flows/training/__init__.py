"""Training: the adapter's configuration, trainers and objectives, callbacks, and several processes or machines."""
