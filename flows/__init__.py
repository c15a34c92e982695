"""The pipeline around peftcore: data, training, evaluation, registry, promotion and retraining."""
